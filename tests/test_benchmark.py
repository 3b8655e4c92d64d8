"""The benchmark's own arithmetic, its checks, and one run of everything that needs no GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from src.common.settings import StudentSettings
from tests.conftest import run_python
from tools.benchmark import report
from tools.benchmark import run as script
from tools.benchmark import sections as b
from tools.benchmark import workbench as w
from tools.benchmark.loss import LossBench, LossCase, loss_peak

ROOT = Path(__file__).resolve().parents[1]
TINY = w.Scale(
    teacher=StudentSettings(2, 2, 24),
    vocabulary=97,
    students=(("4l512", StudentSettings(1, 2, 16)), ("6l768", StudentSettings(1, 2, 20))),
    loss_batch=(2, 24),
    step_batch=(2, 24),
    rounds=1,
    slow_rounds=1,
    long_rounds=1,
    sampled_rows=(1, 16),
    sampled_tokens=16,
    evaluated=5,
)

NEEDS_TRL = pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs trl")
BEGIN, END = f"<!-- {report.SECTION} -->", f"<!-- /{report.SECTION} -->"


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory, tiny_lm, saved_model):
    return saved_model(tmp_path_factory.mktemp("teacher"), tiny_lm(n_layer=1, n_positions=64))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory, random_proteins):
    path = tmp_path_factory.mktemp("proteins") / "proteins.fasta"
    proteins = random_proteins(12, 8, 20, seed=3)
    path.write_text("".join(f">p{i}\n{p}\n" for i, p in enumerate(proteins)))
    return path


@pytest.fixture
def bench(teacher_dir, fasta, tmp_path):
    bench = w.open_workbench(
        torch.device("cpu"), str(fasta), str(teacher_dir), cache_dir=str(tmp_path)
    )
    bench.scale = TINY
    bench.announce = lambda line: None
    return bench


def test_sides_that_differ_are_not_timed(bench, monkeypatch):
    w.require_same("x", {"loss": 1e-6}, 1e-5)
    for wrong in (1e-4, float("nan")):
        with pytest.raises(RuntimeError, match="loss differs"):
            w.require_same("x", {"loss": wrong}, 1e-5)
    monkeypatch.setattr(LossBench, "fused", lambda *a: LossBench.reference(*a) * 1.01)
    with pytest.raises(RuntimeError, match="not timed"):
        b.loss_section(bench)


@pytest.mark.slow
def test_the_plain_loss_holds_its_logits_and_ours_does_not():
    """512 positions of 20,011 tokens: one tensor of float32 logits is 41 MB."""
    labels = tuple(tuple(range(128)) for _ in range(4))
    large = LossCase(labels, 8, 12, 20_011, "float32", w.ENHANCED, "cpu", 1)
    logits = 512 * 20_011 * 4
    plain = loss_peak(large, "reference")["bytes"]
    assert plain > 5 * logits
    assert 0 < loss_peak(large, "fused")["bytes"] < plain


@pytest.mark.parametrize(
    "section",
    [
        *("step", "students", "generation", "evaluation"),
        pytest.param("trl", marks=[NEEDS_TRL, pytest.mark.slow]),
    ],
)
def test_a_section_checks_and_measures(bench, section):
    results = b.run_benchmark(bench, [section])
    assert set(results["ratios"]) <= set(report.FIGURES)
    assert all(value > 0 for value in results["ratios"].values())
    for name, each in report.measures(results).items():
        assert results["ratios"][name] == each["ratio"]
        assert len(each["ours"]) == len(each["reference"]) == 1
    if section == "step":
        work = results["sections"]["step"]["work"]["4l512"]
        # The fused loss leaves out each last position, which predicts nothing.
        assert work["cached"]["flops"] < work["online"]["flops"] < work["reference"]["flops"]
        assert set(results["ratios"]) == {
            f"{kind}_step_{name}" for kind in ("online", "cached") for name, _ in TINY.students
        }


@pytest.mark.parametrize(("section", "package"), [("trl", "trl"), ("liger", "liger_kernel")])
def test_what_is_not_installed_is_left_out(bench, monkeypatch, section, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    said: list[str] = []
    bench.announce = said.append
    results = b.run_benchmark(bench, [section])
    assert results["ratios"] == {}
    assert "is not installed" in said[-1]


def example(**changes) -> dict:
    measured = {
        "loss_memory": w.ratio([4e9], [1e9]),
        "loss_time_fp32": w.ratio([3.0, 2.0], [1.0, 2.0]),
        "generation_100": w.ratio([0.004], [0.001]) | {"unit": "seconds for each token"},
    }
    work = {"flops": 2_000_000_000, "flops_per_second": 1e9, "mfu": None}
    results = {
        "schema_version": 1,
        "kind": "benchmark",
        "quick": False,
        "device": {"type": "cpu", "threads": 2},
        "ratios": {name: each["ratio"] for name, each in measured.items()},
        "sections": {
            "loss": {"measured": measured},
            "step": {"measured": {}, "work": {"4l512": {"cached": work}}},
            "trl": {"skipped": "trl is not installed"},
        },
        "run": {
            "git": {"commit": "0123456789abcdef", "dirty": True},
            "platform": {"machine": "x86_64"},
            "versions": {"torch": "2.13.0"},
        },
    }
    return results | changes


def test_the_tables_of_a_page(tmp_path):
    path, page = tmp_path / "benchmark_cpu.json", tmp_path / "page.md"
    path.write_text(json.dumps(example()))
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert script.main(["--tables", str(page), "--output", str(path)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "x86_64, 2 threads, PyTorch 2.13.0, commit 0123456789 with changes" in text
    assert "| loss, peak memory, float32 | 4,000 MB | 1,000 MB | **4.00** |" in text
    assert "| 2.50 s | 1.50 s | **2.00** (1.00 to 3.00) |" in text
    assert "| 4.00 ms a token | 1.00 ms a token |" in text
    assert "Left out: trl (trl is not installed)." in text
    assert "| 4l512 | cached | 2.0 | 1 |  |" in text
    script.main(["--tables", str(page), "--output", str(path)])
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("page", "results", "message"),
    [
        ("no markers", example(), "needs the marks"),
        (f"{BEGIN}\n{END}", {"ratios": {}}, "not the results"),
        (f"{BEGIN}\n{END}", example(schema_version=9), "another version"),
    ],
)
def test_a_page_or_results_that_do_not_fit_are_refused(tmp_path, capsys, page, results, message):
    (tmp_path / "r.json").write_text(json.dumps(results))
    (tmp_path / "page.md").write_text(page)
    arguments = ["--tables", str(tmp_path / "page.md"), "--output", str(tmp_path / "r.json")]
    assert script.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == page


def test_the_script_writes_results(tmp_path, teacher_dir, fasta, monkeypatch, capsys):
    monkeypatch.setattr(w.Scale, "of", classmethod(lambda cls, device, quick=False: TINY))
    output = tmp_path / "out" / "r.json"
    arguments = ["--only", "evaluation, generation", "--quick", "--device", "cpu", "--output"]
    arguments += [str(output), "--data", str(fasta), "--teacher_model", str(teacher_dir)]
    arguments += ["--cache_dir", str(tmp_path), "--rounds", "2"]
    assert script.main(arguments) == 0
    results = report.read_benchmark(output)
    assert {"evaluation_1000", "generation_hf_tiny_16_generate"} <= set(results["ratios"])
    assert results["quick"] is True
    assert len(results["sections"]["evaluation"]["measured"]["evaluation_1000"]["ours"]) == 2
    assert results["run"]["versions"]["torch"] == torch.__version__
    assert script.main(arguments) == 2
    assert "exists: pass --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "must be some of loss,step"),
        (["--only", ","], "must be some of loss,step"),
        (["--rounds", "0"], "at least 1"),
        (["--data", "nowhere.fasta"], "nowhere.fasta"),
        (["--teacher_model", "./nowhere"], "there is no such directory"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, teacher_dir, refusal, arguments, message):
    given = ["--teacher_model", str(teacher_dir), "--output", str(tmp_path / "r.json")]
    assert message in refusal(lambda: script.main([*given, *arguments]))


@pytest.mark.slow
def test_the_quick_benchmark_runs_through(tmp_path, teacher_dir, fasta):
    """With the processes that measure memory, which import the script anew."""
    output = tmp_path / "r.json"
    command = ["tools/benchmark/run.py", "--quick", "--only", "loss", "--device"]
    command += ["cpu", "--data", str(fasta), "--teacher_model", str(teacher_dir)]
    command += ["--output", str(output), "--cache_dir", str(tmp_path)]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    assert {"loss_memory", "loss_time_fp32", "loss_time_bf16"} <= set(
        report.read_benchmark(output)["ratios"]
    )
