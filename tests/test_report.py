"""The page on a run: whole, self-contained, and honest about what is missing."""

from __future__ import annotations

import copy
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scripts import report as script
from src.evaluation.results import REQUIRED
from src.publishing import report
from src.publishing.report import build_report
from src.trainer.callbacks import read_metrics
from tests.finished_run import finished  # noqa: F401 - a fixture
from tests.spoiling import refusals
from tests.test_plots import calibration

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "br", "use"}

RUN = {
    "name": "demo <run>",
    "status": "finished",
    "finished": "2026-01-02T03:04:05+0000",
    "train_seconds": 90.0,
    "peak_memory_bytes": 2_000_000,
    "settings": {
        "student": {"n_layer": 2, "n_head": 2, "n_embd": 64},
        "loss": {
            "temperature": 2.0,
            "alpha": 0.5,
            "divergence": "forward_kl",
            "use_uncertainty_weighting": True,
            "weighting": "mean_one",
        },
        "seed": 0,
        "learning_rate": 1e-3,
        "batch_size": 8,
    },
    "command": ["train.py", "--data", "/home/somebody/secret/proteins", "--n_layer", "2"],
    "git": {"commit": "abc123", "dirty": True},
    "teacher": {"name": "/home/somebody/secret/teacher", "parameters": 2_000_000},
    "student": {"parameters": 100_000, "fingerprint": "f" * 64},
    "data": {
        "source": "/home/somebody/secret/proteins",
        "train": {"proteins": 1234, "residues": 56789, "fingerprint": "0" * 64},
    },
    "steps": 100,
}
COMPOSITION = dict.fromkeys("ACDEFGHIKLMNPQRSTVWY", 0.05)
RESULTS = {
    "schema_version": 1,
    "perplexity_ratio": 1.25,
    "kl_divergence": 0.125,
    "student_ece": calibration([500, 200, 100, 20]),
    "teacher_ece": calibration([500, 200, 100, 200]),
    "student_perplexity": 125.0,
    "teacher_perplexity": 100.0,
    "student_perplexity_per_residue": 15.0,
    "teacher_perplexity_per_residue": 14.0,
    "compression_ratio": 20.0,
    "kl_from_natural": {"student": 0.1, "teacher": 0.05},
    "threshold": {"perplexity_ratio_below": 3.0, "passed": True},
    "floors": {"unigram": {"student_gain": -0.1, "teacher_gain": 0.2}},
    "generation": {
        "student": {
            "sequences": 7,
            "composition": COMPOSITION,
            "valid_share": 0.5,
            "intervals": {"valid_share": [0.25, 0.75]},
            "examples": ["MKV" * 30, "<b>bold</b>"],
        },
        "reference": {"composition": COMPOSITION},
    },
    "intervals": {"perplexity_ratio": [1.125, 1.375]},
    "run": {"student": {"name": "models/demo", "fingerprint": "f" * 64}},
}


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(RUN))
    lines = [{"step": s, "hard_loss": 5 / s, "tokens_per_second": s} for s in range(1, 9)]
    lines.append({"step": 8, "eval_hard_loss": 1.0})
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path


class Page(HTMLParser):
    """Collects the text of a page, and checks that its elements are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert tag not in ("script", "link", "iframe", "img"), tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
        if "id" in attributes:
            self.ids.append(attributes["id"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_tells_everything_and_asks_for_nothing(folders):
    page = build_report(folders / "run", folders / "results.json")
    read = Page(page)
    for wanted in (
        "demo <run>",
        "A GPT-2 of 2 blocks, 2 heads and width 64, 100,000 parameters, distilled from teacher",
        "1,234 proteins of proteins",
        "Finished 2026-01-02 03:04 after 1 min 30 s of training.",
        "1.250 [1.125, 1.375]",
        "below 3.00 for this size: passed",
        "0.500 [0.250, 0.750]",
        "uncertainty weighting (mean_one)",
        "The student predicts proteins no better than the frequencies of residues alone.",
        "The code of training differed from the commit",
        "abc123 and changes",
        "train.py --data proteins --n_layer 2",
        "5 tokens/s",
        "<b>bold</b>",
        "seed 0",
    ):
        assert wanted in read.text, wanted
    assert "The teacher predicts" not in read.text
    assert "secret" not in page
    assert "<b>bold" not in page
    assert not re.search(r"url\((?!#)|@import", page)
    assert len(read.ids) == len(set(read.ids))
    assert page.count("<svg") == 4  # one learning curve, two reliability diagrams, composition


def test_a_fine_tuned_model_is_not_called_distilled(folders):
    record = json.loads(json.dumps(RUN))
    record["settings"] |= {"init_from": "models/demo"}
    record["settings"]["loss"]["alpha"] = 1.0
    stopped = {"best_step": 3, "best_eval_loss": 1.0, "last_step": 8, "reason": "no improvement"}
    (folders / "run" / "run.json").write_text(json.dumps({**record, "early_stopping": stopped}))
    text = Page(build_report(folders / "run")).text
    assert "models/demo trained further on" in text
    assert "distilled from" not in text
    assert "stopped after step 8: no improvement" in text


def test_the_rows_of_a_step_are_those_of_all_processes(folders):
    (folders / "run" / "run.json").write_text(json.dumps({**RUN, "processes": 4}))
    assert "100 of 32 rows" in Page(build_report(folders / "run")).text


def test_a_run_or_results_alone_make_a_page(folders):
    text = Page(build_report(folders / "run")).text
    assert "Not measured yet" in text
    assert "scripts/evaluate.py --student_model" in text
    text = Page(build_report(None, folders / "results.json")).text
    assert text.startswith("models/demo: report")
    assert "1.250" in text
    assert "Learning curves" not in text


def test_the_first_results_files_are_reported_too(folders):
    old = {"perplexity_ratio": 18.95, "kl_divergence": 2.23, "student_ece": {"ece": 0.274}}
    (folders / "old.json").write_text(json.dumps(old))
    text = Page(build_report(None, folders / "old.json")).text
    assert "18.950" in text
    assert "These results have no intervals" in text
    (folders / "old.json").write_text('{"perplexity_ratio": 18.95, "data": {"proteins": 12}}')
    assert "12 held-out proteins. Intervals" in Page(build_report(None, folders / "old.json")).text


def test_sequences_of_a_file_are_shown(folders):
    (folders / "new.fasta").write_text(">one x=1\n" + "ACDEFGHIKL" * 7 + "\n>two\nMKV\n")
    text = Page(build_report(folders / "run", folders / "results.json", folders / "new.fasta")).text
    assert "one · 70 residues" in text
    assert "two · 3 residues" in text
    assert "sample 1" not in text


def test_results_of_another_model_are_refused(folders):
    other = copy.deepcopy(RESULTS)
    other["run"]["student"]["fingerprint"] = "e" * 64
    (folders / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="another model"):
        build_report(folders / "run", folders / "other.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--run, --results"),
        (["--run", "missing"], "no such directory"),
        (["--run", "."], "run.json is missing"),
        (["--results", "missing.json"], "missing.json"),
        (["--run", "run", "--fasta", "missing.fasta"], "missing.fasta"),
    ],
)
def test_user_errors_are_one_line(folders, monkeypatch, refusal, arguments, message):
    monkeypatch.chdir(folders)
    assert message in refusal(script.main([*arguments, "-o", "r.html"]))
    assert not (folders / "r.html").exists()


def test_the_script_writes_and_overwrites_when_asked(folders, monkeypatch):
    monkeypatch.chdir(folders)
    arguments = ["--run", "run", "-o", "r.html"]
    assert script.main(arguments) == 0
    assert (folders / "r.html").read_text().startswith("<!doctype html>")
    assert script.main([*arguments, "--overwrite"]) == 0


def check_spoiled(record, path, of_each, *arguments):
    """Spoil every place of a record in some ways: a page comes of it, or a line with its file."""

    def build():
        assert build_report(*arguments).startswith("<!doctype html>")

    messages = refusals(record, path, build, of_each)
    assert messages
    assert all(m.startswith((str(path), "--run", "--results")) for m in messages), messages
    assert all(m.isprintable() for m in messages)


def measured() -> dict:
    """Return committed results with everything that a page shows, examples and reliability too."""
    return json.loads((ROOT / "results" / "students" / "recommended_1500.json").read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out what takes most of the time."""
    monkeypatch.setattr(report, "make_drawing", lambda draw, name, text: report.Drawing("", text))


@pytest.mark.parametrize("of_each", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_with_anything_wrong_is_shown_or_refused(finished, tmp_path, undrawn, of_each):  # noqa: F811
    record = json.loads((finished / "student" / "run.json").read_text())
    stopped = {"best_step": 1, "best_eval_loss": 1.0, "last_step": 2, "reason": "no improvement"}
    record |= {"early_stopping": stopped}
    check_spoiled(record, tmp_path / "run.json", of_each, tmp_path)


@pytest.mark.parametrize("of_each", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_results_with_anything_wrong_are_shown_or_refused(tmp_path, undrawn, of_each):
    path = tmp_path / "results.json"
    check_spoiled(measured(), path, of_each, None, path)


def test_what_is_drawn_with_anything_wrong_is_drawn_or_refused(tmp_path, monkeypatch):
    """Figures are made, but not written as SVG."""
    monkeypatch.setattr("src.publishing.plots.inline_svg", lambda figure, name, text: "<svg></svg>")
    path = tmp_path / "results.json"
    sets = {name: {"composition": {"A": 0.5}} for name in ("student", "reference")}
    drawn = {"student_ece": calibration([500, 200]), "teacher_ece": None, "generation": sets}
    required = {key: RESULTS[key] for key in REQUIRED}
    check_spoiled({"schema_version": 1, **required, **drawn}, path, 2, None, path)


@pytest.mark.parametrize(
    ("gates", "said", "unsaid"),
    [
        (None, "The teacher was not checked", "cannot tell"),
        (
            {"passed": False, "summary": "checked, cannot tell: x"},
            "Checked, cannot tell: x.",
            "not checked",
        ),
        ({"passed": False}, "The teacher was checked, and did not pass.", "not checked"),
        ({"passed": True, "summary": "checked"}, "These results", "The teacher was"),
    ],
)
def test_a_check_of_the_teacher_that_cannot_tell_is_no_missing_check(folders, gates, said, unsaid):
    given = {k: v for k, v in RESULTS.items() if k not in ("generation", "floors")}
    (folders / "g.json").write_text(json.dumps(given | {"gates": gates, "intervals": {}}))
    text = Page(build_report(None, folders / "g.json")).text
    assert said in text
    assert unsaid not in text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"step": 1, "hard_loss": "x"}', "line 1: hard_loss is no number"),
        ('{"hard_loss": 1.0}', "line 1: step is no number"),
        ('{"step": 1, "eval_hard_loss": 1e200}', "line 1: eval_hard_loss is no number"),
        ("[" * 100_000 + '\n{"step": 1}', "line 1: not a JSON object"),
        ('\udcff\n{"step": 1}', "line 1: not a JSON object"),
    ],
)
def test_broken_metrics_are_refused_with_their_file(folders, lines, message):
    path = folders / "run" / "metrics.jsonl"
    path.write_bytes(lines.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        build_report(folders / "run")
    assert str(caught.value).startswith(str(path))


def test_metrics_without_end_are_refused(folders, monkeypatch):
    path = folders / "run" / "metrics.jsonl"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"metrics.jsonl: cannot be read \(is no file"):
        read_metrics(folders / "run")
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"metrics.jsonl: cannot be read \(is no file"):
        read_metrics(folders / "run")
    path.unlink()
    with path.open("wb") as handle:
        handle.truncate(1 << 40)  # sparse: it takes no room
    with pytest.raises(ValueError, match="is this the right file"):
        read_metrics(folders / "run")


def test_a_killed_runs_last_line_is_left_out_and_a_diverged_run_is_shown(folders):
    path = folders / "run" / "metrics.jsonl"
    for half in (b'{"step": 2, "hard_l', b"[" * 100_000, b"\xff"):
        path.write_bytes(b'{"step": 1, "hard_loss": 2.0}\n' + half)
        assert read_metrics(folders / "run") == [{"step": 1, "hard_loss": 2.0}]
    path.write_text('{"step": 1, "hard_loss": NaN, "soft_loss": Infinity}\n')
    assert "Learning curves" not in Page(build_report(folders / "run")).text
