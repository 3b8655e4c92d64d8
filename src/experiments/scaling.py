r"""Estimates what distilling on many devices takes, from figures measured on one.

A run needs N tokens (proteins × tokens of each × epochs). With g devices on each of n nodes:

- compute of a step: ``B / r`` for B tokens on a device at r tokens/s: ``r_c`` with the teacher's
  hidden states read from the cache, ``r_o`` with the teacher run beside the student
- waiting for the slowest of ``n g`` devices: that times the mean of the largest of ``n g`` normal
  draws with the measured spread of step times (drawn, seeded)
- gradients: ring all-reduce of ``4 P`` bytes for P parameters (Patarasuk & Yuan 2009, J. Parallel
  Distrib. Comput. 69:117): ``2 (g-1)/g · 4P / b`` inside a node and then ``2 (n-1)/n · 4P / b'``
  between nodes, less the share of compute that hides it
- the teacher's hidden states: a token has ``E · bytes + 12``; a node reads at most ``R`` bytes/s
  (or all nodes together, where they share the storage), so at most ``R / bytes`` tokens/s
- lost to failures: each of ``n g`` devices fails once in M hours; a failure costs half the time
  between two checkpoints, and the restart

The rate is the smaller of compute and reading; hours are tokens over the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from src.evaluation.results import is_number

GRADIENT_BYTES = 4
FIGURES_BYTES = 12
"""Of the teacher cache, for each token: three float32 figures beside the hidden states."""
DRAWS = 20_000
SMALLEST, LARGEST = 1e-30, 1e30
"""Of a figure that is given: beyond every device, and products of some stay within floats."""
MOST_DEVICES = 100_000
"""Of a cluster: drawing the slowest of more takes minutes."""


@dataclass(frozen=True)
class Measurements:
    """What one device, one node and the network do. Rates for each second.

    Attributes:
        name: device and student, for the table.
        source: ``measured`` or ``bound``; a bound is what no device of that peak can exceed.
        capture_tokens_per_s: of one device that captures the teacher cache.
        cached_step_tokens_per_s: of one device that trains a student from the cache.
        online_step_tokens_per_s: of one device that runs the teacher beside the student.
        student_parameters: of the student.
        tokens_per_step: on each device, between two all-reduces.
        teacher_width: features of the teacher's hidden states.
        hidden_bytes: bytes of each feature in the cache.
        cache_read_bytes_per_s: of one node, or of storage that all share.
        cache_write_bytes_per_s: likewise.
        node_all_reduce_bytes_per_s: of one device inside a node; None where nodes have one.
        network_bytes_per_s: of one node; None where there is one.
        shared_storage: whether the nodes read one file system.
        overlap: share of a step's compute that hides communication, in [0, 1].
        step_spread: standard deviation of a device's step time over its mean.
        failure_hours: mean hours between two failures of one device; None: never.
        checkpoint_minutes: between two checkpoints.
        restart_minutes: from a failure to the next step.
    """

    name: str
    source: str
    capture_tokens_per_s: float
    cached_step_tokens_per_s: float
    online_step_tokens_per_s: float
    student_parameters: int
    tokens_per_step: int
    teacher_width: int
    hidden_bytes: int
    cache_read_bytes_per_s: float
    cache_write_bytes_per_s: float
    node_all_reduce_bytes_per_s: float | None = None
    network_bytes_per_s: float | None = None
    shared_storage: bool = False
    overlap: float = 0.0
    step_spread: float = 0.0
    failure_hours: float | None = None
    checkpoint_minutes: float = 30.0
    restart_minutes: float = 10.0

    def __post_init__(self) -> None:
        """Check every figure. Raises ``ValueError``."""
        if not isinstance(self.name, str) or self.source not in ("measured", "bound"):
            raise ValueError(f"source must be measured or bound, got {self.source!r:.40}")
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.name in ("name", "source") or value is None and field.default is None:
                continue
            if field.name == "shared_storage":
                if not isinstance(value, bool):
                    raise ValueError(f"shared_storage must be true or false, got {value!r:.40}")
                continue
            real = value if is_number(value) else math.nan
            least_zero = field.name in ("overlap", "step_spread", "restart_minutes")
            if not (SMALLEST <= real <= LARGEST or (least_zero and real == 0)):
                raise ValueError(
                    f"{field.name} must be a number above 0, from {SMALLEST:g} to {LARGEST:g}, "
                    f"got {value!r:.40}"
                )
        if self.overlap > 1:
            raise ValueError(f"overlap must be in [0, 1], got {self.overlap}")

    @classmethod
    def from_json(cls, values: Any, path: Any = "measurements") -> Measurements:
        """Return the figures that a JSON object holds; ``notes`` in it are for people.

        Raises:
            ValueError: a figure is missing, unknown or wrong.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{path}: expected an object at the top")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known - {"notes"})
        needed = sorted(f.name for f in fields(cls) if f.default is not None and _is_needed(f))
        missing = [name for name in needed if name not in values]
        if unknown or missing:
            what = f"unknown: {unknown[0]:.40}" if unknown else f"missing: {missing[0]}"
            raise ValueError(f"{path}: the figures do not fit ({what})")
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the teacher cache for each token."""
        return self.teacher_width * self.hidden_bytes + FIGURES_BYTES


def _is_needed(field: Any) -> bool:
    from dataclasses import MISSING

    return field.default is MISSING


@dataclass(frozen=True)
class Job:
    """What is to be distilled: proteins, tokens of each, passes over them, students."""

    proteins: int = 45_000_000
    tokens_per_protein: float = 75.0
    epochs: float = 1.0
    students: int = 1

    def __post_init__(self) -> None:
        """Check the sizes. Raises ``ValueError``."""
        for name, value in asdict(self).items():
            if not 0 < value <= LARGEST:
                raise ValueError(
                    f"--{name} must be above 0 and at most {LARGEST:g}, got {value!r:.40}"
                )

    @property
    def tokens(self) -> float:
        """Tokens of one pass."""
        return self.proteins * self.tokens_per_protein


@dataclass(frozen=True)
class Estimate:
    """Hours and limits for one number of nodes and devices.

    ``limit`` names what binds the cached run: ``compute``, ``communication`` (the exposed
    all-reduce takes more than a tenth of a step) or ``cache reading``.
    """

    nodes: int
    devices_per_node: int
    capture_hours: float
    cached_hours: float
    online_hours: float
    cached_tokens_per_s: float
    efficiency: float
    limit: str

    @property
    def devices(self) -> int:
        """All devices."""
        return self.nodes * self.devices_per_node


def slowest_of(devices: int, spread: float, seed: int = 0) -> float:
    """Return the mean of the largest of ``devices`` normal draws of mean 1 and this spread.

    Synchronous steps end when the slowest device does.
    """
    if devices == 1 or spread == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // devices)
    sums = drawn = 0.0
    while drawn < DRAWS:
        sums += float((1 + spread * rng.standard_normal((rows, devices))).max(1).sum())
        drawn += rows
    return sums / drawn


def all_reduce_seconds(m: Measurements, nodes: int, devices_per_node: int) -> float:
    """Return the time to average the gradients once: ring inside nodes, then between them.

    Raises:
        ValueError: a bandwidth that this takes was not given.
    """
    size = GRADIENT_BYTES * m.student_parameters
    seconds = 0.0
    for count, rate, name in (
        (devices_per_node, m.node_all_reduce_bytes_per_s, "node_all_reduce_bytes_per_s"),
        (nodes, m.network_bytes_per_s, "network_bytes_per_s"),
    ):
        if count > 1:
            if rate is None:
                raise ValueError(f"{m.name}: {count} devices or nodes need a figure {name}")
            seconds += 2 * (count - 1) / count * size / rate
    return seconds


def failure_factor(m: Measurements, devices: int) -> float:
    """Return the share of time that is not lost to failures, at least 0."""
    if m.failure_hours is None:
        return 1.0
    lost = (m.checkpoint_minutes / 2 + m.restart_minutes) / 60
    return max(0.0, 1 - lost * devices / m.failure_hours)


def estimate(m: Measurements, job: Job, nodes: int, devices_per_node: int) -> Estimate:
    """Estimate a run on ``nodes`` × ``devices_per_node`` devices.

    Args:
        m: figures of one device, one node and the network.
        job: what is to be distilled.
        nodes: how many.
        devices_per_node: on each.

    Returns:
        Hours for the capture of the teacher cache (once), and for all students and epochs with it
        and without it. ``efficiency`` is the cached rate over that of so many single devices.

    Raises:
        ValueError: the numbers are wrong or a bandwidth is missing.
    """
    if nodes < 1 or devices_per_node < 1:
        raise ValueError(f"nodes and devices must be at least 1, got {nodes} x {devices_per_node}")
    devices = nodes * devices_per_node
    if devices > MOST_DEVICES:
        raise ValueError(f"--clusters: at most {MOST_DEVICES:,} devices, got {devices!r:.40}")
    kept = failure_factor(m, devices)
    if kept == 0:
        raise ValueError(f"{devices} devices fail more often than they can be restarted")
    storages = 1 if m.shared_storage else nodes
    exchange = all_reduce_seconds(m, nodes, devices_per_node)
    slowest = slowest_of(devices, m.step_spread)

    def rate(compute: float) -> tuple[float, float]:
        exposed = max(0.0, exchange - m.overlap * compute)
        return devices * m.tokens_per_step / (compute * slowest + exposed), exposed / compute

    computed, exposed = rate(m.tokens_per_step / m.cached_step_tokens_per_s)
    readable = storages * m.cache_read_bytes_per_s / m.cache_bytes_per_token
    cached = min(computed, readable)
    online, _ = rate(m.tokens_per_step / m.online_step_tokens_per_s)
    writable = storages * m.cache_write_bytes_per_s / m.cache_bytes_per_token
    captured = min(devices * m.capture_tokens_per_s, writable)
    limit = "communication" if exposed > 0.1 else "compute"
    all_tokens = job.tokens * job.epochs * job.students
    return Estimate(
        nodes=nodes,
        devices_per_node=devices_per_node,
        capture_hours=job.tokens / captured / kept / 3600,
        cached_hours=all_tokens / cached / kept / 3600,
        online_hours=all_tokens / online / kept / 3600,
        cached_tokens_per_s=cached * kept,
        efficiency=cached * kept / (devices * m.cached_step_tokens_per_s),
        limit="cache reading" if readable < computed else limit,
    )


def cache_bytes(m: Measurements, job: Job) -> float:
    """Return the size of the teacher cache."""
    return job.tokens * m.cache_bytes_per_token


def devices_that_reading_feeds(m: Measurements) -> float:
    """Return how many devices one storage feeds at full speed: ``R / (r_c · bytes a token)``."""
    return m.cache_read_bytes_per_s / (m.cached_step_tokens_per_s * m.cache_bytes_per_token)


def passes_from_which_caching_pays(m: Measurements) -> float:
    """Return the passes (epochs × students) from which one device is faster with the cache.

    Capture takes the longer of computing and writing, once; each pass then saves ``1 / r_o`` less
    the longer of ``1 / r_c`` and reading. Infinite where reading is slower than the teacher.
    """
    reading = m.cache_bytes_per_token / m.cache_read_bytes_per_s
    saved = 1 / m.online_step_tokens_per_s - max(1 / m.cached_step_tokens_per_s, reading)
    writing = m.cache_bytes_per_token / m.cache_write_bytes_per_s
    capture = max(1 / m.capture_tokens_per_s, writing)
    return capture / saved if saved > 0 else math.inf


def bound(
    name: str,
    peak_flops: float,
    teacher_gflop: float,
    head_gflop: float,
    student_gflop: float,
    **figures: Any,
) -> Measurements:
    """Return figures that no device of a peak can exceed: ``peak / FLOP of a token``.

    Args:
        name: device and student.
        peak_flops: the maker's figure, FLOP/s.
        teacher_gflop: of a token's forward pass through the teacher.
        head_gflop: of the teacher's head in it, which the cache does not save.
        student_gflop: of a token's forward and backward pass through the student.
        **figures: the others of :class:`Measurements`.
    """
    return Measurements(
        name=name,
        source="bound",
        capture_tokens_per_s=peak_flops / (teacher_gflop * 1e9),
        cached_step_tokens_per_s=peak_flops / ((head_gflop + student_gflop) * 1e9),
        online_step_tokens_per_s=peak_flops / ((teacher_gflop + student_gflop) * 1e9),
        **figures,
    )


def table(m: Measurements, job: Job, clusters: Sequence[tuple[int, int]]) -> str:
    """Return estimates as a Markdown table, one line for each (nodes, devices on each)."""
    lines = [
        "| nodes × devices | capture, h | with cache, h | online, h | tokens/s with cache "
        "| efficiency | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for nodes, devices in clusters:
        e = estimate(m, job, nodes, devices)
        lines.append(
            f"| {nodes} × {devices} | {e.capture_hours:,.2f} | {e.cached_hours:,.2f} | "
            f"{e.online_hours:,.2f} | {e.cached_tokens_per_s:,.0f} | {e.efficiency:.0%} | "
            f"{e.limit} |"
        )
    return "\n".join(lines)


SOURCES = {
    "measured": "from figures measured on one device",
    "bound": "a bound, not a measurement: no device of that peak can be faster",
}

EXAMPLE: dict[str, Any] = {
    "notes": "replace every figure by your own; docs/SCALING.md says how each is measured",
    "name": "my device, 6L/8H/768E",
    "source": "measured",
    "capture_tokens_per_s": 1.0,
    "cached_step_tokens_per_s": 1.0,
    "online_step_tokens_per_s": 1.0,
    "student_parameters": 81_000_000,
    "tokens_per_step": 16384,
    "teacher_width": 1280,
    "hidden_bytes": 2,
    "cache_read_bytes_per_s": 1.0,
    "cache_write_bytes_per_s": 1.0,
    "node_all_reduce_bytes_per_s": 1.0,
    "network_bytes_per_s": 1.0,
    "shared_storage": False,
    "overlap": 0.0,
    "step_spread": 0.05,
    "failure_hours": None,
    "checkpoint_minutes": 30.0,
    "restart_minutes": 10.0,
}

STUDENTS = {"4L/4H/512E": (4, 512), "6L/8H/768E": (6, 768), "12L/16H/1024E": (12, 1024)}
POSITIONS = 512


def gpt2_gflop(n_layer: int, n_embd: int, vocab_size: int, positions: int) -> tuple[float, float]:
    """Return GFLOP of one token's forward pass through a GPT-2, blocks and head.

    Each block multiplies ``12 E²`` weights and attends to half of the positions, twice ``E`` each;
    a multiplication with its addition is two operations.
    """
    blocks = 2 * n_layer * (12 * n_embd**2 + positions * n_embd)
    return blocks / 1e9, 2 * n_embd * vocab_size / 1e9


def assumed_bounds() -> list[Measurements]:
    """Return bounds for the three published students on an assumed device and node.

    The device: 1e15 FLOP/s. The node: storage of 5 GB/s, all-reduce of 400 GB/s inside it and
    50 GB/s between nodes. Round figures that stand for no product.
    """
    from src.models.sizes import PROTGPT2, gpt2_parameters

    vocabulary = PROTGPT2["vocab_size"]
    shape = (vocabulary, PROTGPT2["n_positions"])
    blocks, head = gpt2_gflop(PROTGPT2["n_layer"], PROTGPT2["n_embd"], vocabulary, POSITIONS)
    return [
        bound(
            f"assumed device of 1e15 FLOP/s, student {name}",
            1e15,
            blocks + head,
            head,
            3 * sum(gpt2_gflop(layers, width, vocabulary, POSITIONS)),
            student_parameters=gpt2_parameters(layers, width, *shape),
            tokens_per_step=32 * 512,
            teacher_width=PROTGPT2["n_embd"],
            hidden_bytes=2,
            cache_read_bytes_per_s=5e9,
            cache_write_bytes_per_s=5e9,
            node_all_reduce_bytes_per_s=400e9,
            network_bytes_per_s=50e9,
        )
        for name, (layers, width) in STUDENTS.items()
    ]


def remarks(m: Measurements, job: Job, size: Any) -> list[str]:
    """Return what the table cannot say: the cache's size, where reading saturates, when it pays.

    Args:
        m: figures.
        job: what is to be distilled.
        size: turns bytes into text for a person.
    """
    passes = passes_from_which_caching_pays(m)
    pays = (
        "never: reading is slower than running the teacher"
        if passes == math.inf
        else f"from {max(1, math.ceil(passes))} passes (epochs × students) on"
    )
    where = "all nodes together" if m.shared_storage else "each node"
    return [
        f"- teacher cache: {size(cache_bytes(m, job))} for {job.tokens:,.0f} tokens "
        f"({m.cache_bytes_per_token:,} bytes a token)",
        f"- reading feeds {devices_that_reading_feeds(m):.2f} devices at full speed for {where}",
        f"- on one device the cache pays {pays}",
    ]
