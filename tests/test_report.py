"""The page on a run: whole, self-contained, and honest about what is missing."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from src.report import build_report, command_line, short_name
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
        "train.py --data …/proteins --n_layer 2",
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


def test_a_run_alone_says_how_to_measure_it(folders):
    text = Page(build_report(folders / "run")).text
    assert "Not measured yet" in text
    assert "scripts/evaluate.py --student_model" in text


def test_results_alone(folders):
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
def test_user_errors_are_one_line(folders, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folders)
    assert script().main([*arguments, "-o", "r.html"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (folders / "r.html").exists()


def test_the_script_writes_and_does_not_overwrite(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    arguments = ["--run", "run", "-o", "r.html"]
    assert script().main(arguments) == 0
    assert (folders / "r.html").read_text().startswith("<!doctype html>")
    assert script().main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert script().main([*arguments, "--overwrite"]) == 0


def test_names_lose_the_directories_of_this_machine():
    assert short_name("/home/me/models/x") == "x"
    assert short_name("nferruz/ProtGPT2") == "nferruz/ProtGPT2"
    assert short_name(None) == ""
    assert command_line(["a.py", "--x", "/tmp/y", "two words"]) == "a.py --x …/y 'two words'"


def script():
    spec = importlib.util.spec_from_file_location("report", ROOT / "scripts" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
