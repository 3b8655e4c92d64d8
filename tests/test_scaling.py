"""The cost model against its limits: one device, no communication, slow disks, failures."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from scripts import simulate_scaling as script
from src.common.cli import size
from src.experiments.scaling import (
    EXAMPLE,
    LARGEST,
    SMALLEST,
    STUDENTS,
    Job,
    Measurements,
    all_reduce_seconds,
    assumed_bounds,
    bound,
    cache_bytes,
    devices_that_reading_feeds,
    estimate,
    failure_factor,
    gpt2_gflop,
    passes_from_which_caching_pays,
    remarks,
    slowest_of,
    table,
)

ROOT = Path(__file__).resolve().parents[1]
FAST: dict[str, Any] = {"cache_read_bytes_per_s": 1e15, "cache_write_bytes_per_s": 1e15}
BASE = Measurements(
    name="a device",
    source="measured",
    capture_tokens_per_s=1e5,
    cached_step_tokens_per_s=3e5,
    online_step_tokens_per_s=75e3,
    student_parameters=100_000_000,
    tokens_per_step=30_000,
    teacher_width=1280,
    hidden_bytes=2,
    node_all_reduce_bytes_per_s=1e15,
    network_bytes_per_s=1e15,
    **FAST,
)
JOB = Job(proteins=36_000_000, tokens_per_protein=100, epochs=2, students=3)


def test_one_device_by_hand():
    found = estimate(BASE, JOB, 1, 1)
    tokens = 36e6 * 100
    assert found.capture_hours == pytest.approx(tokens / 1e5 / 3600)
    assert found.cached_hours == pytest.approx(6 * tokens / 3e5 / 3600)
    assert found.online_hours == pytest.approx(6 * tokens / 75e3 / 3600)
    assert (found.efficiency, found.limit) == (pytest.approx(1), "compute")
    assert cache_bytes(BASE, JOB) == tokens * 2572


@pytest.mark.parametrize(("nodes", "devices"), [(1, 8), (4, 8), (16, 1)])
def test_without_communication_hours_fall_with_the_devices(nodes, devices):
    one, many = estimate(BASE, JOB, 1, 1), estimate(BASE, JOB, nodes, devices)
    for name in ("capture_hours", "cached_hours", "online_hours"):
        assert getattr(many, name) == pytest.approx(getattr(one, name) / many.devices, rel=1e-4)
    assert many.efficiency == pytest.approx(1, rel=1e-4)


def test_all_reduce_by_hand():
    m = replace(BASE, node_all_reduce_bytes_per_s=4e9, network_bytes_per_s=1e9)
    size_ = 4 * 100_000_000
    assert all_reduce_seconds(m, 1, 1) == 0
    assert all_reduce_seconds(m, 1, 8) == pytest.approx(2 * 7 / 8 * size_ / 4e9)
    assert all_reduce_seconds(m, 2, 8) == pytest.approx(
        2 * 7 / 8 * size_ / 4e9 + 2 * 1 / 2 * size_ / 1e9
    )
    # A step of 0.1 s, 0.175 s of exchange: hidden where it overlaps whole.
    found = estimate(m, JOB, 1, 8)
    assert found.cached_tokens_per_s == pytest.approx(8 * 30_000 / (0.1 + 0.175))
    assert found.limit == "communication"
    half = estimate(replace(m, overlap=0.5), JOB, 1, 8)
    assert half.cached_tokens_per_s == pytest.approx(8 * 30_000 / (0.1 + 0.125))
    fast = replace(m, node_all_reduce_bytes_per_s=40e9, overlap=1.0)
    assert estimate(fast, JOB, 1, 8).efficiency == pytest.approx(1)


def test_a_slow_disk_binds_and_more_nodes_help_unless_they_share_it():
    m = replace(BASE, cache_read_bytes_per_s=2572 * 6e5)
    assert devices_that_reading_feeds(m) == pytest.approx(2)
    assert estimate(m, JOB, 1, 2).limit == "compute"
    bound_ = estimate(m, JOB, 1, 8)
    assert bound_.limit == "cache reading"
    assert bound_.cached_tokens_per_s == pytest.approx(6e5)
    assert estimate(m, JOB, 4, 8).cached_tokens_per_s == pytest.approx(24e5)
    shared = replace(m, shared_storage=True)
    assert estimate(shared, JOB, 4, 8).cached_tokens_per_s == pytest.approx(6e5)
    # The teacher online needs no cache.
    assert bound_.online_hours == estimate(BASE, JOB, 1, 8).online_hours


def test_more_devices_never_take_longer():
    for m in [
        *assumed_bounds(),
        replace(BASE, network_bytes_per_s=1e10, cache_read_bytes_per_s=1e9),
    ]:
        hours = [estimate(m, JOB, 1, g).cached_hours for g in (1, 2, 4, 8)]
        assert hours == sorted(hours, reverse=True)
        online = [estimate(m, JOB, n, 8).online_hours for n in (1, 2, 4, 8)]
        assert online == sorted(online, reverse=True)


def test_slowest_of_many():
    assert slowest_of(1, 0.3) == slowest_of(100, 0.0) == 1
    # Mean of the larger of two standard normals: 1/sqrt(pi). Of eight: 1.42360.
    assert slowest_of(2, 0.1) == pytest.approx(1 + 0.1 / math.sqrt(math.pi), abs=1e-3)
    assert slowest_of(8, 0.1) == pytest.approx(1.142360, abs=1e-3)
    assert slowest_of(64, 0.1, seed=3) == slowest_of(64, 0.1, seed=3)


def test_failures():
    m = replace(BASE, failure_hours=1000.0, checkpoint_minutes=60.0, restart_minutes=30.0)
    assert failure_factor(BASE, 1000) == 1
    assert failure_factor(m, 100) == pytest.approx(0.9)
    assert estimate(m, JOB, 1, 1).cached_hours == pytest.approx(
        estimate(BASE, JOB, 1, 1).cached_hours / 0.999
    )
    with pytest.raises(ValueError, match="fail more often"):
        estimate(m, JOB, 1000, 8)


def test_caching_pays_after_some_passes():
    # Capture costs 10 µs a token, each pass saves 10 µs: it pays from the first pass on.
    assert passes_from_which_caching_pays(BASE) == pytest.approx(1)
    # Reading takes 6.7 µs more than compute, so that a pass saves 3.3 µs: three passes.
    slow = replace(BASE, cache_read_bytes_per_s=2572 / (1 / 3e5 + 2 / 3 * 1e-5))
    assert passes_from_which_caching_pays(slow) == pytest.approx(3)
    never = replace(BASE, cache_read_bytes_per_s=2572 * 1e4)
    assert passes_from_which_caching_pays(never) == math.inf
    assert "never" in "\n".join(remarks(never, JOB, size))


def test_bounds_are_peak_over_flop():
    others: dict[str, Any] = {
        "student_parameters": 1,
        "tokens_per_step": 1,
        "teacher_width": 1,
        "hidden_bytes": 2,
    }
    m = bound("x", 2e15, 2.0, 0.5, 1.5, **others, **FAST)
    assert m.source == "bound"
    assert m.capture_tokens_per_s == pytest.approx(1e6)
    assert m.cached_step_tokens_per_s == pytest.approx(1e6)
    assert m.online_step_tokens_per_s == pytest.approx(2e15 / 3.5e9)


def test_operations_of_the_published_shapes():
    """GFLOP for each token at 512 positions, and how much faster the cache can make training."""
    assert sum(gpt2_gflop(36, 1280, 50257, 512)) == pytest.approx(1.591, abs=5e-4)
    assert gpt2_gflop(36, 1280, 50257, 512)[1] == pytest.approx(0.129, abs=5e-4)
    for (layers, width), gflop in zip(STUDENTS.values(), (0.236, 0.501, 1.252), strict=True):
        assert 3 * sum(gpt2_gflop(layers, width, 50257, 512)) == pytest.approx(gflop, abs=5e-4)
    wide = [replace(b, cache_read_bytes_per_s=1e15) for b in assumed_bounds()]
    found = [estimate(b, JOB, 1, 1) for b in wide]
    assert [round(e.online_hours / e.cached_hours, 1) for e in found] == [5.0, 3.3, 2.1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cached_step_tokens_per_s": 0}, "cached_step_tokens_per_s must be a number above 0"),
        ({"cached_step_tokens_per_s": "fast"}, "must be a number"),
        ({"cached_step_tokens_per_s": float("nan")}, "must be a number"),
        ({"teacher_width": True}, "must be a number"),
        ({"cached_step_tokens_per_s": 1e-308}, "cached_step_tokens_per_s must be .* from 1e-30"),
        ({"teacher_width": 1e308}, "teacher_width must be .* to 1e.30"),
        ({"teacher_width": 10**400}, "teacher_width must be"),
        ({"overlap": 2}, "overlap must be in"),
        ({"source": "guessed"}, "source must be measured or bound"),
        ({"shared_storage": "no"}, "true or false"),
        ({"speed": 3}, "unknown: speed"),
    ],
)
def test_wrong_figures_are_refused_with_their_file(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Measurements.from_json({**EXAMPLE, **change}, "my.json")
    assert "my.json" in str(caught.value)


@pytest.mark.parametrize("ends", [(SMALLEST, LARGEST), (LARGEST, SMALLEST)])
def test_the_ends_of_what_is_taken_can_be_estimated(ends):
    """Every figure as small or as large as it may be, in turns."""
    numbers = [key for key, value in EXAMPLE.items() if isinstance(value, int | float)]
    numbers = [key for key in numbers if key not in ("shared_storage", "overlap")]
    figures = {key: ends[index % 2] for index, key in enumerate(numbers)}
    m = Measurements.from_json({**EXAMPLE, **figures})
    job = Job(int(LARGEST), LARGEST, LARGEST, int(LARGEST))
    assert table(m, job, [(1, 1), (2, 2)])
    assert remarks(m, job, str)


def test_missing_figures_are_named():
    assert Measurements.from_json(EXAMPLE).name == EXAMPLE["name"]
    for key in ("teacher_width", "cache_read_bytes_per_s", "name"):
        with pytest.raises(ValueError, match=f"missing: {key}"):
            Measurements.from_json({k: v for k, v in EXAMPLE.items() if k != key})
    with pytest.raises(ValueError, match="expected an object"):
        Measurements.from_json([])
    lonely = replace(BASE, node_all_reduce_bytes_per_s=None)
    assert estimate(lonely, JOB, 1, 1)
    with pytest.raises(ValueError, match="need a figure node_all_reduce"):
        estimate(lonely, JOB, 1, 2)


def test_the_script(tmp_path, capsys):
    path, output = tmp_path / "m.json", tmp_path / "out.json"
    path.write_text(json.dumps(asdict(BASE)))
    document = tmp_path / "doc.md"
    document.write_text("a\n<!-- scaling tables -->\nold\n<!-- /scaling tables -->\nz\n")
    typed = ["--measurements", str(path), "--clusters", "1x1", "2x4", "--epochs", "2"]
    assert script.main([*typed, "--output", str(output), "--update", str(document)]) == 0
    shown = capsys.readouterr().out
    assert "| 2 × 4 |" in shown
    text = document.read_text()
    assert text.startswith("a\n")
    assert text.endswith("z\n")
    assert "old" not in text
    assert table(BASE, Job(epochs=2), [(1, 1), (2, 4)]) in text
    record = json.loads(output.read_text())
    assert record["devices"][0]["estimates"][1]["devices_per_node"] == 4
    assert record["run"]["git"]
    assert script.main([*typed, "--output", str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "--measurements"),
        (["--measurements", "missing.json"], "missing.json"),
        (["--bounds", "--update", "missing.md"], "missing.md"),
        (["--bounds", "--clusters", "1x1000000000"], "--clusters: at most 100,000 devices"),
    ],
)
def test_user_errors_are_one_line(typed, message, capsys):
    assert script.main(typed) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("sizes", [{"proteins": 10**400}, {"epochs": 1e300}, {"students": 0}])
def test_a_job_beyond_all_measure_is_refused(sizes):
    with pytest.raises(ValueError, match=f"--{next(iter(sizes))} must be above 0 and at most"):
        Job(**sizes)


def test_the_documents_tables_are_the_scripts(capsys, tmp_path):
    """docs/SCALING.md shows what its command prints."""
    document = ROOT / "docs" / "SCALING.md"
    copy = tmp_path / "SCALING.md"
    copy.write_text(document.read_text())
    assert script.main(["--bounds", "--update", str(copy)]) == 0
    assert copy.read_text() == document.read_text()
    assert re.search(r"\| 1 × 8 \|", copy.read_text())
