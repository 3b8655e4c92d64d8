"""What every script gets from ``src.common.cli``, beyond its own tests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from src.common import cli
from src.common.cli import HUGE_PAGES
from tests.conftest import run_python

ROOT = Path(__file__).parents[1]
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import argparse
from src.common.cli import run_script

def run(args):
    import torch
    weights = torch.ones(32 << 20)  # 128 MB
    pages = sum(
        int(line.split()[1])
        for line in open("/proc/self/smaps")
        if line.startswith("AnonHugePages")
    )
    print(pages)

raise SystemExit(run_script(run, argparse.ArgumentParser, []))
"""


def huge_kilobytes(**variables: str) -> int:
    """Return how much memory in huge pages a script holds that allocates 128 MB."""
    return int(run_python("-c", SCRIPT, variables={HUGE_PAGES: None, **variables}).stdout)


@pytest.mark.skipif(
    not SWITCH.exists() or "[madvise]" not in SWITCH.read_text(),
    reason="the kernel gives huge pages to all or to none",
)
def test_large_tensors_lie_in_huge_pages_unless_the_user_says_no():
    assert huge_kilobytes() >= 100_000
    assert huge_kilobytes(**{HUGE_PAGES: "0"}) < 10_000


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (
            10,
            [
                "reading: 3 of 8 shards, 10.0 s each, 50 s left",
                "reading: 6 of 8 shards, 10.0 s each, 20 s left",
            ],
        ),
        (40, [f"reading: {n} of 8 shards, 40.0 s each" for n in range(1, 9)]),
        (0.02, []),
    ],
)
def test_elsewhere_than_on_a_terminal_progress_is_a_line_now_and_then(
    seconds, lines, monkeypatch, capsys
):
    clock = iter(seconds * n for n in range(100))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert list(cli.progress("abcdefgh", description="reading", unit="shards")) == [*"abcdefgh"]
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(lines)
    assert all(said.startswith(line) for said, line in zip(printed, lines, strict=True))


def test_many_a_second_are_a_rate(monkeypatch, capsys):
    clock = iter(0.25 * n for n in range(1000))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    list(cli.progress(range(150), description="reading", unit="files"))
    assert capsys.readouterr().err == "reading: 120 of 150 files, 4.0 files/s, 8 s left\n"


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("scripts/train.py --help", "--use_uncertainty_weighting"),
        ("scripts/evaluate.py --help", "--compute_ece"),
        ("scripts/compare.py --help", "--reference"),
        ("scripts/pipeline.py --help", "--sweep"),
        ("tools/upload_to_hf.py --help", "--dry_run"),
        ("tools/benchmark/run.py --help", "--quick"),
        ("tools/write_cli_docs.py --check", "up to date"),
        (
            f"scripts/compare.py {ROOT}/results/students/recommended_1500.json "
            f"--reference {ROOT}/results/students/published_1500.json",
            "recommended_1500 against published_1500",
        ),
        ("scripts/pipeline.py --dry_run --baselines", "[8/8] evaluate medium: new"),
        ("scripts/pipeline.py --dry_run --sweep alpha", "alpha"),
    ],
)
def test_help_plans_and_comparisons_are_quick_and_need_no_torch(typed, wanted, tmp_path):
    name, *arguments = typed.split()
    heavy = ["torch", "transformers", *(["huggingface_hub"] if "--help" in typed else [])]
    code = (
        f"import runpy, sys; sys.argv = [{name!r}, *{arguments!r}]\n"
        f"try: runpy.run_path({str(ROOT / name)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"assert not set({heavy}) & set(sys.modules)"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "typed",
    [
        "scripts/evaluate.py --student_model data/small_teacher --output results.json",
        "scripts/compare.py results/students/recommended_1500.json",
        "tools/upload_to_hf.py --model_dir data/small_teacher --repo_id me/student --dry_run",
    ],
)
def test_without_the_packages_one_line_says_so(typed):
    """As where a new shell has not activated the environment: -S hides its packages."""
    done = run_python("-S", *typed.split())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not installed for" in done.stderr
    assert "source .venv/bin/activate" in done.stderr


def test_an_interrupt_while_the_flags_are_read_is_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    assert cli.run_script(lambda args: None, interrupted, []) == cli.INTERRUPTED
    assert capsys.readouterr().err == "train.py: interrupted\n"


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (cli.natural, "-1", "must not be negative, got -1"),
        (cli.natural, "4294967296", "must be at most 4294967295, got 4294967296"),
        (cli.positive_int, "0", "must be at least 1, got 0"),
        (cli.positive_int, "9" * 4000, f"must be at most 4294967295, got {'9' * 40}"),
        (cli.positive_int, "x" * 5000, f"must be a whole number, got '{'x' * 40}'"),
        (cli.positive_float, "0", "must be above 0 and at most 1e+12, got 0"),
        (cli.positive_float, "1e300", "must be above 0 and at most 1e+12, got 1e300"),
        (cli.positive_float, "nan", "must be above 0 and at most 1e+12, got nan"),
        (cli.workers, "13", "must be at most 12, 4 for each CPU of this machine, got 13"),
        (cli.workers, "1" + "0" * 30, "must be at most 4294967295"),
        (cli.folder, "/dev/null", "must be a directory, and /dev/null is none"),
    ],
)
def test_a_value_beyond_measure_is_refused_by_its_type(kind, text, message, monkeypatch):
    monkeypatch.setattr(cli.os, "cpu_count", lambda: 3)
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert str(caught.value).startswith(message)


def test_the_largest_values_of_each_type(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.os, "cpu_count", lambda: 3)
    assert cli.natural("4294967295") == cli.positive_int("4294967295") == 2**32 - 1
    assert cli.workers("12") == 12
    assert cli.positive_float("1e12") == 1e12
    assert cli.folder(str(tmp_path)) == str(tmp_path)
    assert cli.folder(str(tmp_path / "new")) == str(tmp_path / "new")
