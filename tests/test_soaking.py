"""tests/stress/soak.py: a leak is seen, noise is not; and a short soak."""

from __future__ import annotations

import json
import mmap
import os
import random
from pathlib import Path

import pytest

from tests.conftest import run_python
from tests.stress import soak

ROOT = Path(__file__).resolve().parents[1]


def samples_of(count: int, **rises):
    """Return samples of constant holdings but for those given as functions of the cycle."""
    return [
        {
            "cycle": n,
            "seconds": 10.0 * (n + 1),
            "kind": "odd" if n % 2 else "even",
            "outcome": f"{n % 2}",
            **{name: rises.get(name, lambda n: 7)(n) for name in soak.BOUNDS},
        }
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("leak", "warm_up", "grows"),
    [(0.0, -120, []), (0.3, 0, ["memory"]), (0.05, 0, [])],
    ids=["noise and a warm-up", "a leak in the noise", "a steady rise below the bound"],
)
def test_growth_of_memory(leak, warm_up, grows):
    rng = random.Random(0)
    samples = samples_of(
        300, memory=lambda n: 500 + rng.gauss(0, 5) + leak * n + (warm_up if n < 60 else 0)
    )
    verdict = soak.verdict(samples)
    assert verdict["grows"] == grows
    assert verdict["passed"] is not bool(grows)
    memory = verdict["quantities"]["memory"]
    assert memory["per_cycle"] == pytest.approx(leak, abs=0.02)
    assert memory["growth"] == pytest.approx(leak * 199, abs=6)
    assert memory["growth_interval"][0] < memory["growth"] < memory["growth_interval"][1]
    assert verdict["cycles_by_kind"] == {"even": 150, "odd": 150}


@pytest.mark.parametrize("name", ["handles", "threads", "children", "disk"])
def test_one_left_in_a_hundred_cycles_is_growth(name):
    assert soak.verdict(samples_of(300, **{name: lambda n: 7 + n // 100}))["grows"] == [name]


def test_cycles_that_end_unlike_their_kind_are_named():
    samples = samples_of(30)
    samples[20]["outcome"] = "other"
    verdict = soak.verdict(samples)
    assert verdict["unlike"] == ["even"]
    assert verdict["passed"] is False


def test_too_few_cycles_say_nothing():
    assert soak.verdict([])["passed"] is None
    assert soak.verdict(samples_of(soak.FEWEST - 1))["passed"] is None


def test_a_cycle_that_leaks_is_found_by_the_engine(tmp_path):
    """Real memory, handles and files, left behind by artificial cycles."""
    hoard = []

    def leak(number):
        if number == 16:
            raise KeyboardInterrupt
        # Pages of their own: a block of the heap may be one that earlier tests have given back.
        hoard.append(mmap.mmap(-1, 1 << 23, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        hoard[-1].write(os.urandom(1 << 23))
        hoard.append((tmp_path / f"{number}").open("wb"))
        hoard[-1].write(b"x" * 200_000)
        hoard[-1].flush()
        return {"kind": "leak", "outcome": ""}

    lines = tmp_path / "soak.jsonl"
    samples, ended = soak.soak(leak, 600, lambda: soak.holdings(tmp_path), lines)
    for handle in hoard[1::2]:
        handle.close()
    assert ended == soak.ASKED_TO_STOP
    verdict = soak.verdict(samples)
    assert {"memory", "handles", "disk"} <= set(verdict["grows"])
    assert verdict["quantities"]["handles"]["per_cycle"] == pytest.approx(1.0)
    assert verdict["passed"] is False
    assert [json.loads(line) for line in lines.read_text().splitlines()] == samples


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), soak.ASKED_TO_STOP),
        (OSError("no space"), "cycle 3 failed: OSError: no space"),
    ],
)
def test_a_soak_that_is_interrupted_or_fails_says_so_and_keeps_its_samples(tmp_path, error, reason):
    def cycle(number):
        if number == 3:
            raise error
        return {"kind": "a", "outcome": ""}

    lines = tmp_path / "soak.jsonl"
    samples, ended = soak.soak(cycle, 60, lambda: dict.fromkeys(soak.BOUNDS, 1), lines)
    assert ended == reason
    assert len(samples) == len(lines.read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_short_soak_ends_alike_in_every_turn(tmp_path):
    path = tmp_path / "soak.json"
    command = ["tests/stress/soak.py", "--minutes", "1.5", "--record", path]
    done = run_python(*command)
    record = json.loads(path.read_text())
    # Twenty cycles are too few to tell the memory of a warm-up from a leak.
    assert set(record["grows"]) <= {"memory"}, done.stdout + done.stderr
    assert record["ended_early"] is None
    assert record["cycles"] >= 4
    assert record["unlike"] == []
    again = run_python(*command)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
