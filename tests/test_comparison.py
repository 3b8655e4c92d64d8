from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts import compare as script
from src.evaluation.results import write_results
from src.evaluation.statistics import cluster_bootstrap
from src.publishing import comparison as c
from src.publishing import verdicts as v
from tests.conftest import run_python


def results(
    ratio: float = 1.5,
    kl: float = 0.2,
    ece: float | None = 0.05,
    spread: float | None = 0.05,
    share: float = 0.25,
    **more: Any,
) -> dict[str, Any]:
    """A results file whose intervals reach ``spread`` (relative) to either side."""
    record = {
        "perplexity_ratio": ratio,
        "kl_divergence": kl,
        "student_ece": {"ece": ece} if ece is not None else {},
        "teacher_ece": {},
        "student_perplexity": 30.0,
        "teacher_perplexity": 20.0,
        "compression_ratio": 1 / share,
        "share_of_teacher": share,
        "kl_from_natural": {"student": 0.02, "teacher": None},
        "intervals": {},
        "data": {"fingerprint": "d" * 64},
        "run": {"teacher": {"fingerprint": "t" * 64}},
    }
    figures = {"perplexity_ratio": ratio, "kl_divergence": kl, "student_ece.ece": ece}
    for name, value in figures.items():
        if value is not None and spread is not None:
            record["intervals"][name] = [value * (1 - spread), value * (1 + spread)]
    return {**record, **more}


def entry(name="x", **figures) -> v.ResultsFile:
    return v.ResultsFile(Path(f"{name}.json"), results(**figures), name)


@pytest.fixture
def files(tmp_path):
    write_results(tmp_path / "a.json", results())
    write_results(tmp_path / "b_1.json", results(ratio=2.1, kl=0.4, ece=None))
    old = {
        "perplexity_ratio": 8.93,
        "kl_divergence": 1.62,
        "student_ece": {"ece": 0.216},
        "compression_ratio": 47.5,
        "student_generation": {"kl_from_natural": 0.024},
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    (tmp_path / "benchmark_cpu.json").write_text('{"schema_version": 1, "ratios": {"x": 2.0}}')
    return tmp_path


# The table


def test_figures_intervals_and_gaps(files):
    entries, notes = c.read_entries(
        [files / n for n in ("a.json", "b_1.json", "old.json", "no.json")]
    )
    headings, rows = c.table(entries)
    assert headings[1:4] == ["perplexity ratio", "KL", "ECE"]
    assert rows[0][:3] == ["a", "1.500 [1.425, 1.575]", "0.200 [0.190, 0.210]"]
    assert rows[1][3] == "---"
    assert rows[2] == ["old", "8.930", "1.620", "0.216", "0.024", "47.5x", "fail? (< 3.00)"]
    assert rows[3] == ["no", *["---"] * 6]
    assert notes == [f"{files}/no.json is missing"]


def test_other_results_are_left_out_and_named(files):
    entries, notes = c.read_entries(sorted(files.glob("*.json")))
    assert [e.name for e in entries] == ["a", "b_1", "old"]
    assert len(notes) == 1
    assert "benchmark_cpu.json: left out" in notes[0]
    with pytest.raises(ValueError, match="holds no evaluation"):
        c.read_entries([files / "benchmark_cpu.json"])


def test_names_tell_files_apart(files):
    (files / "sub").mkdir()
    write_results(files / "sub" / "a.json", results())
    entries, _ = c.read_entries([files / "a.json", files / "sub" / "a.json", files / "a.json"])
    assert [e.name for e in entries] == [str(files / "a"), str(files / "sub" / "a")]


def test_a_missing_published_student_comes_with_its_command(tmp_path):
    _, notes = c.read_entries([tmp_path / "eval_hf_tiny_old.json"])
    assert "littleworth/protgpt2-distilled-tiny" in notes[0]
    assert "hub" in notes[0]
    assert "\n" not in notes[0]


@pytest.mark.parametrize(
    ("share", "ratio", "spread", "cell"),
    [
        (0.05, 2.9, 0.01, "pass (< 3.00)"),
        (0.05, 2.9, 0.10, "pass? (< 3.00)"),
        (0.05, 3.0, None, "fail? (< 3.00)"),
        (0.11, 2.6, 0.01, "fail (< 2.50)"),
        (0.11, 2.6, 0.10, "fail? (< 2.50)"),
        (0.27, 1.9, 0.01, "pass (< 2.00)"),
        (0.60, 1.9, 0.01, "pass (< 2.00)"),
        (0.19, 2.2, 0.01, "pass (< 2.25)"),
    ],
)
def test_thresholds_depend_on_size_and_say_when_they_are_close(share, ratio, spread, cell):
    _, rows = c.table([entry(share=share, ratio=ratio, spread=spread)])
    assert rows[0][-1] == cell


def test_markdown_csv_and_latex_hold_the_same_figures(files):
    entries, notes = c.read_entries([files / "a.json", files / "b_1.json", files / "no.json"])
    verdicts, _ = v.verdicts_on(entries, files / "a.json")
    markdown = c.as_markdown(entries, verdicts, notes)
    lines = markdown.splitlines()
    assert lines[2].startswith("| a | 1.500 [1.425, 1.575] | 0.200 [0.190, 0.210] |")
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "**b_1 against a: inconclusive" in markdown

    rows = list(csv.DictReader(c.as_csv(entries, verdicts, notes).splitlines()))
    assert [row["name"] for row in rows] == ["a", "b_1", "no"]
    assert float(rows[0]["perplexity_ratio_low"]) == pytest.approx(1.425)
    assert rows[1]["student_ece.ece"] == ""
    assert rows[1]["verdict"] == "inconclusive"
    assert float(rows[1]["kl_difference_low"]) == pytest.approx(0.38 - 0.21)
    assert set(rows[2].values()) == {"no", str(files / "no.json"), "", None}

    latex = c.as_latex(entries, verdicts, notes)
    assert r"b\_1 & 2.100 [1.995, 2.205]" in latex
    assert r"($<$ 2." in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {6}


# The verdict

OUTCOMES = ("lower", "higher", "unclear", "unknown")


@pytest.mark.parametrize(
    "outcomes",
    list(itertools.product(("equivalent", *OUTCOMES), OUTCOMES, OUTCOMES)),
)
def test_scenarios_are_the_owners(outcomes):
    expected = {
        ("lower", "lower", "lower"): "best",
        ("equivalent", "lower", "lower"): "good",
        ("higher", "lower", "lower"): "okay",
        ("higher", "higher", "higher"): "investigate",
    }
    assert v.scenario_of(*outcomes) == expected.get(outcomes, "inconclusive")


@pytest.mark.parametrize(
    ("low", "high", "equivalent", "outcome"),
    [
        (-0.3, -0.1, False, "lower"),
        (-0.003, -0.001, True, "lower"),
        (0.001, 0.003, True, "equivalent"),
        (-0.001, 0.003, True, "equivalent"),
        (0.1, 0.3, False, "higher"),
        (-0.1, 0.3, False, "unclear"),
        (-0.1, 0.0, False, "unclear"),
        (math.nan, 0.3, True, "unknown"),
    ],
)
def test_what_an_interval_shows(low, high, equivalent, outcome):
    assert v.outcome_of(low, high, equivalent) == outcome


@pytest.mark.parametrize(
    ("figures", "scenario"),
    [
        ({"ratio": 1.2, "kl": 0.1, "ece": 0.02, "spread": 0.05}, "best"),
        ({"ratio": 1.2, "kl": 0.1, "ece": 0.02, "spread": 0.5}, "inconclusive"),
        ({"ratio": 1.5, "kl": 0.1, "ece": 0.02, "spread": 0.004}, "good"),
        ({"ratio": 1.5, "kl": 0.1, "ece": 0.02, "spread": 0.02}, "inconclusive"),
        ({"ratio": 1.9, "kl": 0.1, "ece": 0.02, "spread": 0.05}, "okay"),
        ({"ratio": 1.9, "kl": 0.4, "ece": 0.09, "spread": 0.05}, "investigate"),
        ({"ratio": 1.2, "kl": 0.4, "ece": 0.09, "spread": 0.05}, "inconclusive"),
        ({"ratio": 1.2, "kl": 0.1, "ece": 0.02, "spread": None}, "inconclusive"),
        ({"ratio": 1.2, "kl": 0.1, "ece": None, "spread": 0.05}, "inconclusive"),
    ],
)
def test_from_two_intervals(figures, scenario):
    reference = entry("reference", spread=min(figures["spread"] or 0.05, 0.05))
    verdict = v.verdict_on(entry("candidate", **figures), reference)
    assert verdict.scenario == scenario
    methods = {d.method for d in verdict.differences.values() if d.outcome != "unknown"}
    assert methods <= {"two intervals"}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"spread": None}, "no interval"),
        ({"student_ece": {"ece": 0.01, "calibration_meaningful": False}}, "ECE means nothing"),
    ],
)
def test_bare_numbers_and_meaningless_calibration_never_decide(more, reason):
    verdict = v.verdict_on(entry("a", ratio=1.1, kl=0.01, ece=0.01, **more), entry("b"))
    assert verdict.scenario == "inconclusive"
    assert reason in " ".join(verdict.reasons)


def test_the_margin_is_the_users():
    candidate = entry("a", ratio=1.53, kl=0.1, ece=0.02, spread=0.005)
    reference = entry("b", spread=0.005)
    assert v.verdict_on(candidate, reference, margin=0.02).scenario == "okay"
    assert v.verdict_on(candidate, reference, margin=0.05).scenario == "good"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"run": {"teacher": {"fingerprint": "u" * 64}}}, "different teachers"),
        ({"data": {"fingerprint": "e" * 64}}, "different proteins"),
        ({"data": {"fingerprint": [1]}}, "different proteins"),
    ],
)
def test_what_was_not_measured_alike_is_not_judged(more, reason):
    best = {"ratio": 1.1, "kl": 0.01, "ece": 0.01}
    verdict = v.verdict_on(entry("a", **best, **more), entry("b"))
    assert verdict.scenario == "inconclusive"
    assert reason in verdict.reasons[0]
    assert v.verdict_on(entry("a", **best), entry("b")).scenario == "best"


class World:
    """Test proteins in clusters, and students whose true figures are known.

    A student's loss over the teacher, for each token, is its true ln(perplexity ratio) plus what
    its cluster makes of it, which all students share, plus its own noise.
    """

    def __init__(self, seed: int, clusters: int = 120, each: int = 3) -> None:
        self.rng = np.random.default_rng(seed)
        self.proteins = clusters * each
        self.cluster = np.repeat(np.arange(clusters), each)
        self.tokens = self.rng.integers(40, 160, self.proteins)
        self.shared = self.rng.normal(0, 0.25, clusters)[self.cluster]
        self.teacher = self.tokens * (2.5 + self.rng.normal(0, 0.2, self.proteins))

    def student(
        self, folder, name, log_ratio, kl, ece, noise=0.03, ece_error=0.004
    ) -> v.ResultsFile:
        def around(mean):
            own = self.rng.normal(0, noise, self.proteins)
            return self.tokens * (mean + mean * self.shared + own)

        gap, divergence = around(log_ratio), np.abs(around(kl))
        table = {
            "protein": [f"p{i}" for i in range(self.proteins)],
            "cluster": [str(i) for i in self.cluster],
            "residues": self.tokens * 2,
            "tokens": self.tokens,
            "nll_student": self.teacher + gap,
            "nll_teacher": self.teacher,
            "kl": divergence,
        }
        arrays = {"gap": gap, "kl": divergence, "tokens": self.tokens}
        found = cluster_bootstrap(
            lambda sums: {
                "perplexity_ratio": np.exp(sums["gap"] / sums["tokens"]),
                "kl_divergence": sums["kl"] / sums["tokens"],
            },
            arrays,
            self.cluster,
            200,
        )
        measured = ece + self.rng.normal(0, ece_error)
        record = results(
            found["perplexity_ratio"].estimate,
            found["kl_divergence"].estimate,
            measured,
            student_perplexity=float(np.exp((self.teacher + gap).sum() / self.tokens.sum())),
        )
        record["intervals"] = {n: [e.low, e.high] for n, e in found.items()}
        half = 1.96 * ece_error
        record["intervals"]["student_ece.ece"] = [measured - half, measured + half]
        path = folder / f"{name}.json"
        write_results(path, record, overwrite=True)
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
        return c.read_entries([path])[0][0]

    def pair(self, folder, truth) -> tuple[v.ResultsFile, v.ResultsFile]:
        """Return a candidate and the reference."""
        reference = self.student(folder, "reference", *REFERENCE)
        return self.student(folder, "candidate", *truth), reference


REFERENCE = (0.60, 0.40, 0.10)
TRUE = {
    "best": (0.55, 0.36, 0.06),
    "good": (0.60, 0.36, 0.06),
    "okay": (0.66, 0.36, 0.06),
    "investigate": (0.66, 0.44, 0.14),
}


@pytest.mark.parametrize("scenario", TRUE)
def test_simulated_scenarios_are_found_when_paired(tmp_path, scenario):
    found = []
    for seed in range(10):
        verdict = v.verdict_on(*World(seed).pair(tmp_path, TRUE[scenario]), replicates=300)
        assert verdict.differences["perplexity"].method == "paired"
        assert verdict.differences["ECE"].method == "two intervals"
        assert verdict.clusters == 120
        found.append(verdict.scenario)
    assert found.count(scenario) >= 9, found


def test_without_pairs_the_same_difference_is_not_claimed(tmp_path):
    candidate, reference = World(0).pair(tmp_path, TRUE["best"])
    assert v.verdict_on(candidate, reference).scenario == "best"
    (tmp_path / "candidate.parquet").unlink()
    verdict = v.verdict_on(candidate, reference)
    assert verdict.scenario == "inconclusive"
    assert {d.method for d in verdict.differences.values()} == {"two intervals"}
    assert "no table of single proteins" in " ".join(verdict.reasons)


def test_equal_students_are_seldom_told_apart(tmp_path):
    """Of equal students at most 5 % should seem lower or higher in each figure: here 2 x 20."""
    claims = scenarios = 0
    for seed in range(20):
        verdict = v.verdict_on(*World(100 + seed).pair(tmp_path, REFERENCE), replicates=200)
        outcomes = [verdict.differences[name].outcome for name in ("perplexity", "KL")]
        claims += outcomes.count("lower") + outcomes.count("higher")
        scenarios += verdict.scenario != "inconclusive"
    assert claims <= 6  # binomial(40, 0.05): more in under 0.4 % of cases
    assert scenarios == 0


def test_equivalence_at_the_margin_is_seldom_claimed(tmp_path):
    """A true difference of exactly the margin passes two one-sided tests in at most 5 %."""
    claimed = 0
    for seed in range(20):
        world = World(200 + seed)
        world.shared = np.zeros(world.proteins)
        verdict = v.verdict_on(*world.pair(tmp_path, (0.62, 0.36, 0.06)), replicates=300)
        claimed += verdict.differences["perplexity"].outcome == "equivalent"
    assert claimed <= 4  # binomial(20, 0.05): more in under 0.3 % of cases


def test_a_verdict_from_few_clusters_says_so(tmp_path):
    line = "intervals are too narrow: 4 clusters, at least 5 are needed"
    assert line in v.verdict_on(*World(0, 4).pair(tmp_path, REFERENCE)).reasons
    assert line not in v.verdict_on(*World(0, 5).pair(tmp_path, REFERENCE)).reasons


def test_foreign_and_unlike_tables_are_not_paired(tmp_path):
    candidate, reference = World(0, clusters=20).pair(tmp_path, TRUE["best"])
    kept = pq.read_table(tmp_path / "candidate.parquet")

    pq.write_table(pq.read_table(tmp_path / "reference.parquet"), tmp_path / "candidate.parquet")
    verdict = v.verdict_on(candidate, reference)
    assert "another evaluation" in verdict.reasons[0]

    renamed = kept.set_column(0, "protein", pa.array([f"q{i}" for i in range(len(kept))]))
    pq.write_table(renamed, tmp_path / "candidate.parquet")
    assert "differ in protein" in v.verdict_on(candidate, reference).reasons[0]

    pq.write_table(kept.take(np.arange(len(kept))[::-1]), tmp_path / "candidate.parquet")
    verdict = v.verdict_on(candidate, reference)
    assert verdict.differences["KL"].method == "paired"  # another order is no difference

    pq.write_table(kept.drop_columns(["kl"]), tmp_path / "candidate.parquet")
    with pytest.raises(ValueError, match=r"candidate\.parquet: broken, or not a table"):
        v.verdict_on(candidate, reference)
    (tmp_path / "candidate.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(ValueError, match=r"candidate\.parquet: broken, or not a table"):
        v.verdict_on(candidate, reference)


def test_the_recorded_table_is_found(tmp_path):
    reference = World(0, clusters=20).student(tmp_path, "reference", *REFERENCE)
    elsewhere = tmp_path / "elsewhere.parquet"
    (tmp_path / "reference.parquet").rename(elsewhere)
    assert v.per_protein_path(reference) is None
    assert reference.results is not None
    reference.results["run"]["arguments"] = {"per_protein": str(elsewhere)}
    assert v.per_protein_path(reference) == elsewhere


# The script


def test_the_script_prints_and_writes(files, capsys):
    assert script.main([str(files / "a.json"), str(files / "none.json")]) == 0
    shown = capsys.readouterr().out
    assert "1.500 [1.425, 1.575]" in shown
    assert "---" in shown
    for suffix in ("md", "csv", "tex"):
        output = files / f"out.{suffix}"
        arguments = [str(files / "a.json"), "--output", str(output)]
        assert script.main(arguments) == 0
        assert "1.5" in output.read_text()
        assert script.main([*arguments, "--overwrite"]) == 0
    capsys.readouterr()
    assert script.main([str(files / "a.json"), "--format", "csv"]) == 0
    assert len(list(csv.reader(capsys.readouterr().out.splitlines()))) == 2


def test_rows_that_were_not_measured_alike_are_told_without_a_reference(files, capsys):
    other = json.loads((files / "a.json").read_text())
    other["data"] = other.get("data", {}) | {"fingerprint": "e" * 64}
    first = other | {"data": other["data"] | {"fingerprint": "d" * 64}}
    for name, results in (("x", first), ("y", other)):
        (files / f"{name}.json").write_text(json.dumps(results))
    assert script.main([str(files / "x.json"), str(files / "y.json")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "x and y: they were measured on different proteins: evaluate both alike" in shown
    assert script.main([str(files / "x.json"), str(files / "x.json")]) == 0
    assert "different proteins" not in capsys.readouterr().out


def test_the_script_judges(files, capsys):
    reference = ["--reference", str(files / "a.json")]
    assert script.main([str(files / "b_1.json"), str(files / "old.json"), *reference]) == 0
    shown = capsys.readouterr().out
    assert "b_1 against a: inconclusive" in shown
    assert "ECE was not measured for both: evaluate with --compute_ece" in shown
    assert "old against a: inconclusive" in shown


def test_a_missing_reference_is_told_beside_the_table(files, capsys):
    missing = files / "eval_hf_tiny_old.json"
    assert script.main([str(files / "a.json"), "--reference", str(missing)]) == 0
    shown = capsys.readouterr().out
    assert "1.500" in shown
    assert "littleworth/protgpt2-distilled-tiny" in shown
    assert "no verdict without the reference" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/*.jsonx"], "no file matches"),
        (["{}"], "is a directory"),
        (["{}/broken.json"], "broken.json"),
        (["{}/a.json", "--output", "{}/x.txt"], ".md, .csv, .tex"),
        (["{}/a.json", "--output", "{}/x.md", "--format", "terminal"], "--output"),
        (["{}/a.json", "--reference", "{}/benchmark_cpu.json"], "--reference"),
        (["{}/benchmark_cpu.json"], "no evaluation"),
    ],
)
def test_user_errors_are_one_line(files, arguments, message, refusal):
    (files / "broken.json").write_text("{")
    assert message in refusal(script.main([a.format(files) for a in arguments]))


def test_the_owners_snippet_runs_on_our_files(files):
    write_results(files / "without_ece.json", results(ece=None))
    snippet = """
import json
models = {'ours': 'a.json', 'without ECE': 'without_ece.json', 'not there': 'none.json'}
for name, path in models.items():
    try:
        d = json.load(open(path))
        ppl = d.get('perplexity_ratio', float('nan'))
        kl = d.get('kl_divergence', float('nan'))
        ece = d.get('student_ece', {}).get('ece', float('nan'))
        print(f'{name:<12} {ppl:>10.2f} {kl:>10.4f} {ece:>10.4f}')
    except FileNotFoundError:
        print(f'{name:<12} {"---":>10} {"---":>10} {"---":>10}')
"""
    done = run_python("-c", snippet, cwd=files)
    assert [line.split()[-3:] for line in done.stdout.splitlines()] == [
        ["1.50", "0.2000", "0.0500"],
        ["1.50", "0.2000", "nan"],
        ["---", "---", "---"],
    ]
