#!/usr/bin/env python3
"""Train and evaluate over and over in one process, and see whether the process grows.

A cycle is a training into a fresh directory, an evaluation of its student, and the removal of the
directory. After each cycle memory, file handles, threads, child processes and disk are written to
a file beside the record (.jsonl). The first third is warm-up; over the rest the Theil-Sen slope
(Sen 1968) estimates what stays behind. "No growth" needs the upper end of the slope's 95 % interval
below a bound. Successive samples are not independent, so that interval is a little too narrow.
Kinds of cycles alternate; all cycles of a kind must end in the same weights and scores. The exit
status is 1 if something grew, a cycle failed, or cycles of a kind differ.

Examples:
  python tests/stress/soak.py --minutes 120 --record results/reliability/soak.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from src.common.cli import HelpFormatter, positive_float, run_script, say
from src.common.files import check_outputs, write_json
from src.common.settings import BUNDLED_DATA, BUNDLED_TEACHER
from tests.stress.in_process import run_main

MEGABYTE = 1e6
WARM_UP = 1 / 3
FEWEST = 12
"""Cycles before growth is stated."""
ASKED_TO_STOP = "asked to stop"


BOUNDS = {"memory": 20.0, "handles": 0.5, "threads": 0.5, "children": 0.5, "disk": 0.5}
"""From which growth on a quantity grows; memory (resident) and disk are in megabytes."""


def holdings(work: Path) -> dict[str, float]:
    """Return what this process holds now, by the keys of BOUNDS.

    Garbage is collected and the C library gives freed memory back first: the number of pages that
    a heap keeps for the next request varies, which would hide, or look like, a leak.
    """
    import psutil

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(ctypes.c_size_t(0))
    process = psutil.Process()
    return {
        "memory": process.memory_info().rss / MEGABYTE,
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "disk": sum(p.stat().st_size for p in work.rglob("*") if p.is_file()) / MEGABYTE,
    }


def soak(
    cycle: Callable[[int], Mapping[str, Any]],
    seconds: float,
    watch: Callable[[], Mapping[str, float]],
    path: Path,
) -> tuple[list[dict[str, Any]], str | None]:
    """Run cycles until the time is over, and append a sample after each to a file.

    Args:
        cycle: runs the cycle of a number, from 0; returns its ``kind`` and ``outcome``.
        seconds: no cycle begins later than this after the first.
        watch: takes a sample.
        path: where each sample is appended, as a line of JSON.

    Returns:
        The samples, and why the soak ended early, or None.
    """
    started = time.monotonic()
    samples: list[dict[str, Any]] = []
    while not samples or time.monotonic() - started < seconds:
        number = len(samples)
        try:
            sample = {"cycle": number, **cycle(number), **watch()}
        except (KeyboardInterrupt, SystemExit):
            return samples, ASKED_TO_STOP
        except Exception as error:
            return samples, f"cycle {number} failed: {type(error).__name__}: {error}"
        samples.append({**sample, "seconds": round(time.monotonic() - started, 2)})
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(samples[-1]) + "\n")
    return samples, None


def growth(values: Sequence[float], bound: float) -> dict[str, Any]:
    """Return by how much a quantity grew after the warm-up, with the interval of its slope."""
    from scipy.stats import theilslopes

    warm = np.array(values[int(len(values) * WARM_UP) :], dtype=float)
    slope, _, low, high = map(float, theilslopes(warm, alpha=0.95))
    cycles = len(warm) - 1
    tenth = max(1, len(warm) // 10)
    return {
        "warm_up_cycles": len(values) - len(warm),
        "first": float(np.median(warm[:tenth])),
        "last": float(np.median(warm[-tenth:])),
        "per_cycle": slope,
        "growth": slope * cycles,
        "growth_interval": [low * cycles, high * cycles],
        "bound": bound,
        "grows": high * cycles > bound,
    }


def verdict(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the samples of a soak say.

    ``grows`` names the quantities above their bound, ``unlike`` the kinds of cycles that did not
    all end alike. ``passed`` is None if there are too few cycles.
    """
    kinds: dict[str, list[str]] = {}
    for sample in samples:
        kinds.setdefault(sample["kind"], []).append(sample["outcome"])
    quantities: dict[str, dict[str, Any]] = {}
    if len(samples) >= FEWEST:
        for name, bound in BOUNDS.items():
            quantities[name] = growth([sample[name] for sample in samples], bound)
    grows = [name for name, q in quantities.items() if q["grows"]]
    unlike = [kind for kind, outcomes in kinds.items() if len(set(outcomes)) > 1]
    return {
        "minutes": round(samples[-1]["seconds"] / 60, 2) if samples else 0.0,
        "cycles": len(samples),
        "cycles_by_kind": {kind: len(outcomes) for kind, outcomes in kinds.items()},
        "quantities": quantities,
        "grows": grows,
        "unlike": unlike,
        "passed": not grows and not unlike if quantities else None,
    }


# Cycles -------------------------------------------------------------------------------------------

STOPPED_KIND = "stopped and resumed, a worker"
KINDS = {
    "by length": "--max_steps 8",
    "packed, teacher cached": "--max_steps 8 --batching packed --teacher_cache {folder}/teacher",
    "padded, accumulated": "--max_steps 8 --batching padded --gradient_accumulation_steps 2",
    STOPPED_KIND: "--max_steps 20 --num_workers 1",
}
TRAIN = (
    "--teacher_model {teacher} --data {data} --cache_dir {work}/tokens --output_dir {folder}/run "
    "--n_layer 1 --n_head 2 --n_embd 32 --dropout 0.1 --use_uncertainty_weighting "
    "--use_calibration_smoothing --train_size_prop 0.02 --validation_proteins 16 --batch_size 2 "
    "--max_length 96 --eval_steps 4 --save_steps 4 --device cpu --skip_teacher_check "
)
EVALUATE = (
    "--student_model {folder}/run --data {data} --max_proteins 16 --bootstrap 200 --num_samples 2 "
    "--device cpu --cache_dir {work}/tokens --output {folder}/results.json "
    "--per_protein {folder}/results.parquet --compute_ece"
)


def train_and_evaluate(number: int, work: Path, teacher: str, data: str) -> dict[str, Any]:
    """Run a cycle; return its kind and its outcome, which all cycles of a kind share."""
    from scripts import evaluate, train

    kind = list(KINDS)[number % len(KINDS)]
    folder = work / f"cycle-{number}"
    names = {"work": work, "folder": folder, "teacher": teacher, "data": data}
    typed = (TRAIN + KINDS[kind]).format(**names).split()
    try:
        if kind == STOPPED_KIND:
            run_main(train.main, typed, stop_at=4)
            typed.append("--resume")
        run_main(train.main, typed)
        run_main(evaluate.main, EVALUATE.format(**names).split())
        record = json.loads((folder / "run" / "run.json").read_text())
        results = json.loads((folder / "results.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    scores = [results["student_perplexity"], results["kl_divergence"]]
    outcome = f"{record['student']['fingerprint'][:16]} {scores[0]:.12g} {scores[1]:.12g}"
    return {"kind": kind, "outcome": outcome, "resumed": len(record.get("resumed", []))}


# Command line -------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--minutes", type=positive_float, default=120.0, help="how long")
    add("--record", type=Path, required=True, help="JSON file for the verdict")
    add("--teacher_model", default=BUNDLED_TEACHER, help="directory")
    add("--data", default=BUNDLED_DATA, help="proteins with train and test parts")
    add("--work_dir", type=Path, help="where runs are made (default: the system's temporary)")
    add("--overwrite", action="store_true", help="replace the record and its samples")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Soak, and write the record. Exits with 1 if something is wrong."""
    from src.common.runs import provenance

    lines = args.record.with_suffix(".jsonl")
    check_outputs(args.record, lines, overwrite=args.overwrite)
    lines.unlink(missing_ok=True)
    made_by = provenance()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=args.work_dir) as folder:
        work = Path(folder)
        samples, ended = soak(
            lambda number: train_and_evaluate(number, work, args.teacher_model, args.data),
            60 * args.minutes,
            lambda: holdings(work),
            lines,
        )
    record = {"schema_version": 1, "planned_minutes": args.minutes, "ended_early": ended}
    record |= {**verdict(samples), "run": made_by}
    write_json(args.record, record)
    for name, q in record["quantities"].items():
        low, high = q["growth_interval"]
        say(
            f"{name:<9}{q['first']:10.2f} → {q['last']:10.2f}"
            f" growth {q['growth']:8.3f} ({low:.3f} to {high:.3f}, bound {q['bound']:g})"
        )
    if ended:
        say(f"ended early: {ended}")
    wrong = ", ".join([*record["grows"], *record["unlike"]]) or "nothing"
    say(f"{record['cycles']} cycles in {record['minutes']:.1f} minutes, grew or differed: {wrong}")
    if record["passed"] is False or ended not in (None, ASKED_TO_STOP):
        raise SystemExit(1)
    return record


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
