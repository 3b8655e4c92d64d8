"""Trains and evaluates over and over in one process, and watches what the process holds.

A cycle is a whole training into a fresh directory, an evaluation of its student by the code of
``scripts/evaluate.py``, and the removal of the directory. After each, what should be as before is
sampled: resident memory, open file handles, threads, child processes, bytes on the disk. The first
third of a soak is its warm-up, in which allocators and caches fill; over the rest, the Theil-Sen
slope (Sen 1968) says how much is left behind. "No growth" is said only where the upper end of the
slope's 95 % interval, over the whole rest, stays below a bound. Samples that follow one another are
not independent, so that interval is a little too narrow.

Kinds of cycles take turns, each with settings of its own and the same in every turn. So all
students of a kind must have the same weights: the process carries nothing from one to the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.common.files import read_json, read_json_lines, write_json
from src.evaluation.results import check_figures

MEGABYTE = 1e6
WARM_UP = 1 / 3
"""Share of the cycles that come before the growth is measured."""
FEWEST = 12
"""Cycles before a growth is stated."""
LEVEL = 0.95
POLL_SECONDS = 0.005
WRITE_SECONDS = 120.0
"""Seconds between two writings of the record of a soak that goes on."""
SCHEMA_VERSION = 1
ASKED_TO_STOP = "asked to stop"


@dataclass(frozen=True)
class Quantity:
    """Something that a process holds.

    Attributes:
        label: for a person.
        unit: of the samples; empty for counts.
        bound: growth from which on we say that it grows, over the run after its warm-up.
    """

    label: str
    unit: str
    bound: float


QUANTITIES = {
    "memory": Quantity("resident memory", "MB", 20.0),
    "handles": Quantity("open file handles", "", 0.5),
    "threads": Quantity("threads", "", 0.5),
    "children": Quantity("child processes", "", 0.5),
    "disk": Quantity("work directory and cache", "MB", 0.5),
}


def release_freed_memory() -> None:
    """Collect garbage and have the C library give back what is free in its heap, where it can.

    A heap keeps freed pages for the next request, and more of them the more scattered they are:
    that they rise and fall would hide, or look like, what is left behind.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(ctypes.c_size_t(0))


def holdings(work: Path) -> dict[str, float]:
    """Return what this process holds now, freed memory released: the keys of QUANTITIES."""
    import psutil

    release_freed_memory()
    process = psutil.Process()
    with process.oneshot():
        memory, threads = process.memory_info().rss, process.num_threads()
    return {
        "memory": memory / MEGABYTE,
        "handles": process.num_fds(),
        "threads": threads,
        "children": len(process.children(recursive=True)),
        "disk": sum(p.stat().st_size for p in work.rglob("*") if p.is_file()) / MEGABYTE,
    }


def soak(
    cycle: Callable[[int], Mapping[str, Any]],
    seconds: float,
    watch: Callable[[], Mapping[str, float]],
    keep: Callable[[dict[str, Any]], None],
) -> str | None:
    """Run cycles one after the other until the time is over.

    Args:
        cycle: does the cycle of a number, from 0; returns what goes into its sample.
        seconds: no cycle begins later than this after the first.
        watch: takes a sample after each cycle.
        keep: called with each sample.

    Returns:
        None where the time was used up, or why the soak ended before: it was asked to stop, or
        what a cycle raised.
    """
    started, number = time.monotonic(), 0
    while not number or time.monotonic() - started < seconds:
        try:
            more = dict(cycle(number))
            held = dict(watch())
        except (KeyboardInterrupt, SystemExit):
            return ASKED_TO_STOP
        except Exception as error:
            return f"cycle {number} failed: {type(error).__name__}: {error}"
        now = round(time.monotonic() - started, 2)
        keep({"cycle": number, "seconds": now, **more, **held})
        number += 1
    return None


def growth(samples: Sequence[Mapping[str, Any]], name: str, bound: float) -> dict[str, Any]:
    """Return by how much a quantity grew after the warm-up, with the interval of its slope.

    Args:
        samples: one of each cycle.
        name: which entry of them.
        bound: from which growth on we say that it grows.

    Raises:
        ValueError: too few cycles for a statement.
    """
    from scipy.stats import theilslopes

    if len(samples) < FEWEST:
        raise ValueError(f"{len(samples)} cycles are too few: {FEWEST} are needed")
    skipped = int(len(samples) * WARM_UP)
    warm = samples[skipped:]
    numbers = np.array([sample["cycle"] for sample in warm], dtype=float)
    values = np.array([sample[name] for sample in warm], dtype=float)
    slope, intercept, low, high = map(float, theilslopes(values, numbers, LEVEL))
    cycles = float(numbers[-1] - numbers[0])
    tenth = max(1, len(values) // 10)
    return {
        "warm_up_cycles": skipped,
        "first": float(np.median(values[:tenth])),
        "last": float(np.median(values[-tenth:])),
        "intercept": intercept,
        "per_cycle": slope,
        "per_cycle_interval": [low, high],
        "growth": slope * cycles,
        "growth_interval": [low * cycles, high * cycles],
        "bound": bound,
        "grows": high * cycles > bound,
    }


def verdict(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the samples of a soak say: growth by quantity, and outcomes by kind of cycle.

    ``grows`` names the quantities that do, ``creeps`` those that rise steadily (the interval of
    their slope is above zero) but stay below their bound, ``unlike`` the kinds whose cycles did not
    all end alike. ``passed`` speaks of the first and the last; it is None where there are too few
    cycles to say.
    """
    kinds: dict[str, list[str]] = {}
    for sample in samples:
        kinds.setdefault(sample["kind"], []).append(sample["outcome"])
    unlike = [kind for kind, outcomes in kinds.items() if len(set(outcomes)) > 1]
    found = {}
    if len(samples) >= FEWEST:
        found = {name: growth(samples, name, q.bound) for name, q in QUANTITIES.items()}
    grows = [name for name, each in found.items() if each["grows"]]
    return {
        "minutes": round(samples[-1]["seconds"] / 60, 2) if samples else 0.0,
        "cycles": len(samples),
        "cycles_by_kind": {kind: len(outcomes) for kind, outcomes in kinds.items()},
        "quantities": found,
        "grows": grows,
        "creeps": [
            name
            for name, each in found.items()
            if each["growth_interval"][0] > 0 and not each["grows"]
        ],
        "unlike": unlike,
        "passed": not grows and not unlike if found else None,
    }


class Recorder:
    """Writes what a soak finds: a line for each cycle, and now and then its record.

    The figure is drawn at the end: drawing keeps fonts open, which would be seen as growth.

    Args:
        record: JSON file; samples (``.jsonl``) and figure (``.png``) stand beside it.
        minutes: how long the soak was meant to take.
        made_by: provenance, taken before the start.
    """

    def __init__(self, record: Path, minutes: float, made_by: Mapping[str, Any]) -> None:
        self.path, self.minutes, self.made_by = record, minutes, made_by
        self.samples: list[dict[str, Any]] = []
        self._written = 0.0

    def keep(self, sample: Mapping[str, Any]) -> None:
        """Append a sample, flushed to the disk; write the record anew where it is old."""
        path = self.path.with_suffix(".jsonl")
        self.samples.append(dict(sample))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(sample) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self.write("still running, or killed")

    def write(self, ended: str | None) -> dict[str, Any]:
        """Write record and figure; ``ended``: why before its time, or None. Returns the record."""
        found = verdict(self.samples)
        record = {
            "schema_version": SCHEMA_VERSION,
            "planned_minutes": self.minutes,
            "ended_early": ended,
            **found,
            "run": self.made_by,
        }
        write_json(self.path, record)
        self._written = time.monotonic()
        return record


GROWTH = {
    **{name: "at least 0" for name in ("warm_up_cycles", "bound")},
    **{name: "number" for name in ("intercept", "per_cycle", "growth")},
    "growth_interval": "interval",
}
"""Kinds of what is drawn of a quantity's growth, as in ``src.evaluation.results``."""


def draw(record: Path) -> None:
    """Draw the figure of a record from the samples beside it, where it states a growth.

    Raises:
        ValueError: the record or its samples are missing, broken or not those of a soak.
    """
    from src.publishing.plots import holdings_over_time, save_figure

    way_out = "name the record of a soak"
    found = read_json(record)
    kinds = {"quantities": "object", "cycles": "at least 0"}
    check_figures(found, kinds, record, needed=True, way_out=way_out)
    growths = found["quantities"]
    if growths:
        kinds = {f"{name}.{key}": kind for name in QUANTITIES for key, kind in GROWTH.items()}
        check_figures(growths, kinds, f"{record}: quantities", needed=True, way_out=way_out)
        path = record.with_suffix(".jsonl")
        # A soak that was killed took samples after it wrote its record.
        samples = read_json_lines(path)[: int(found["cycles"])]
        warm_up = max(growths[name]["warm_up_cycles"] for name in QUANTITIES)
        if not warm_up < len(samples) == found["cycles"]:
            raise ValueError(f"{path}: its lines are not the cycles of {record}: {way_out}")
        for number, sample in enumerate(samples, start=1):
            kinds = dict.fromkeys(("cycle", "seconds", *QUANTITIES), "at least 0")
            check_figures(sample, kinds, f"{path}: line {number}", needed=True, way_out=way_out)
        labels = {name: (q.label, q.unit) for name, q in QUANTITIES.items()}
        save_figure(holdings_over_time(samples, growths, labels), record.with_suffix(".png"))


# What is run --------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "by length": {},
    "packed, teacher cached": {"batching": "packed", "cached_teacher": True},
    "padded, accumulated": {"batching": "padded", "gradient_accumulation_steps": 2},
    "stopped and resumed, a worker": {"max_steps": 20},
}
STOPPED_KIND = "stopped and resumed, a worker"


class Cycles:
    """Trainings and evaluations, each in a directory of its own that is removed after it.

    Args:
        work: where they happen; tokenised proteins are kept in it from one to the next.
        teacher: directory of the teacher.
        data: proteins with training, validation and test parts.
    """

    def __init__(self, work: Path, teacher: str, data: str) -> None:
        self.work, self.teacher, self.data = work, teacher, data

    def __call__(self, number: int) -> dict[str, Any]:
        """Do a cycle and return its kind and its outcome, which all of a kind share."""
        kind = list(KINDS)[number % len(KINDS)]
        folder = self.work / f"cycle-{number}"
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                record = self._train(folder, kind)
                results = self._evaluate(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        figures = [results["student_perplexity"], results["kl_divergence"]]
        outcome = f"{record['student']['fingerprint'][:16]} {figures[0]:.12g} {figures[1]:.12g}"
        found = {"kind": kind, "outcome": outcome}
        return found | {"resumed": len(record.get("resumed", []))}

    def _train(self, folder: Path, kind: str) -> dict[str, Any]:
        from src.common.settings import LossSettings, StudentSettings, TrainSettings
        from src.training.stages import train

        settings = TrainSettings(
            student=StudentSettings(1, 2, 32, dropout=0.1),
            loss=LossSettings(use_uncertainty_weighting=True, use_calibration_smoothing=True),
            teacher_model=self.teacher,
            data=self.data,
            train_size_prop=0.02,
            validation_proteins=16,
            batch_size=2,
            max_length=96,
            eval_steps=4,
            save_steps=4,
            **{"max_steps": 8, **KINDS[kind]},
        )
        stops = kind == STOPPED_KIND
        options: dict[str, Any] = {
            "device_name": "cpu",
            "cache_dir": str(self.work / "tokens"),
            "teacher_cache": folder / "teacher" if settings.cached_teacher else None,
            "workers": int(stops),
        }
        run = folder / "run"
        if stops:
            with asked_to_stop_once_there(run / "checkpoint-4"):
                try:
                    return train(settings, run, **options)
                except SystemExit as stop:
                    if stop.code != 128 + signal.SIGTERM:
                        raise
            options["resume"] = True
        return train(settings, run, **options)

    def _evaluate(self, folder: Path) -> dict[str, Any]:
        script = importlib.import_module("scripts.evaluate")
        arguments = {
            "--student_model": folder / "run",
            "--data": self.data,
            "--max_proteins": 16,
            "--bootstrap": 200,
            "--num_samples": 2,
            "--device": "cpu",
            "--cache_dir": self.work / "tokens",
            "--output": folder / "results.json",
            "--per_protein": folder / "results.parquet",
        }
        typed = [str(part) for pair in arguments.items() for part in pair]
        return script.run(script.build_parser().parse_args([*typed, "--compute_ece"]))


@contextlib.contextmanager
def asked_to_stop_once_there(path: Path):
    """Send this process SIGTERM when a path appears, as a scheduler might in a training."""
    ended = threading.Event()

    def wait() -> None:
        while not ended.wait(POLL_SECONDS):
            if path.exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    # A training that finished just before the signal must not let it end the whole soak.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
