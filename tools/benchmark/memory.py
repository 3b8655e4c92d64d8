"""Measures the peak memory of training a preset at the default teacher's true shape.

Weights and tokens are random: memory does not depend on them. A cell of the table is one process,
because a process knows only the peak of its whole life.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from src.common.cli import size
from src.common.settings import PRESETS, TrainSettings
from src.models.sizes import PROTGPT2, estimate, gpt2_parameters

TEACHERS = ("cached", "online")
SHORT_ROW = 8
"""Tokens of the first step's rows: it only brings the optimiser's state into being."""


@dataclass(frozen=True)
class Cell:
    """A student, its batch, and how it is taught: ``cached`` or ``online``."""

    preset: str
    batch_size: int
    teacher: str
    tokens: int = 512

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What tells cells apart."""
        return (self.preset, self.batch_size, self.teacher, self.tokens)


class _Rows:
    """As many short rows as long ones, of random tokens; with a teacher's states if it has some."""

    def __init__(self, cell: Cell) -> None:
        import numpy as np

        self.lengths = np.array([SHORT_ROW] * cell.batch_size + [cell.tokens] * cell.batch_size)
        self.tokens = np.random.default_rng(0).integers(1, PROTGPT2["vocab_size"], cell.tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        return self.tokens[: self.lengths[index]]


class _States(_Rows):
    """The teacher's hidden states and figures of the rows."""

    def __getitem__(self, index: int) -> Any:
        import torch

        length = int(self.lengths[index])
        return torch.randn(length, PROTGPT2["n_embd"]), torch.rand(length, 3)


def measure(cell: Cell, device_name: str = "cpu", precision: str = "fp32") -> dict[str, Any]:
    """Train two steps in this process, a short one and a full one, and return the peak memory.

    Returns:
        ``peak_bytes``: of the GPU, or of the process on a CPU, of which ``base_bytes`` were there
        before the models.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    from src.common.cli import quiet_libraries
    from src.common.devices import DTYPES, choose_device, peak_memory
    from src.distillation import DistillationTrainer
    from src.models.loading import build_student, student_config
    from src.models.teacher_cache import CachedCollator
    from src.proteins.batching import PaddingCollator, ProteinDataset, length_grouped_order

    quiet_libraries()
    device = choose_device(device_name)
    base = peak_memory(device)
    shape: dict[str, Any] = dict(PROTGPT2)
    if cell.teacher == "cached":
        shape["n_layer"] = 0  # what is kept of a teacher whose states are read: the head
    config = GPT2Config(**shape)
    teacher: Any = GPT2LMHeadModel(config)
    teacher = teacher.to(device=device, dtype=DTYPES[precision])
    student = build_student(student_config(PRESETS[cell.preset].student, config), 0)
    rows = _Rows(cell)
    # The optimiser's state must be there when the full batch comes, as in all steps but the first.
    seed = next(
        seed
        for seed in range(100)
        if length_grouped_order(rows.lengths, cell.batch_size, seed, 0)[0] < cell.batch_size
    )
    collator: Any = PaddingCollator(0)
    if cell.teacher == "cached":
        collator = CachedCollator(collator)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            train_dataset=ProteinDataset(
                rows, cache=_States(cell) if cell.teacher == "cached" else None
            ),
            data_collator=collator,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=cell.batch_size,
                max_steps=2,
                seed=seed,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=precision == "bf16",
                use_cpu=device.type == "cpu",
                optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
                remove_unused_columns=False,
            ),
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer.train()
    return {"peak_bytes": peak_memory(device), "base_bytes": base}


def planned(cell: Cell, precision: str = "fp32") -> int:
    """Return the memory that planning estimates for a cell, in bytes."""
    settings = TrainSettings(
        batch_size=cell.batch_size, max_length=cell.tokens, precision=precision
    )
    shape = SimpleNamespace(**PROTGPT2)
    layers = shape.n_layer if cell.teacher == "online" else 0
    parameters = gpt2_parameters(layers, shape.n_embd, shape.vocab_size, shape.n_positions)
    return estimate(PRESETS[cell.preset].student, settings, shape, parameters, None).memory


def table(record: Mapping[str, Any]) -> str:
    """Return the cells of a record as Markdown: a line for each preset and teacher."""
    cells = record["cells"]
    batches = sorted({cell["batch_size"] for cell in cells})
    found = {(c["preset"], c["teacher"], c["batch_size"]): c for c in cells}
    heads = [f"{number} × {record['tokens']}" for number in batches]
    lines = [
        f"| preset | teacher | {' | '.join(heads)} |",
        "|---|---|" + "---:|" * len(batches),
    ]
    for preset, teacher in _lines(cells):
        figures = [found.get((preset, teacher, number)) for number in batches]
        shown = [size(cell["peak_bytes"]) if cell else "–" for cell in figures]
        lines.append(f"| `{preset}` | {teacher} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _lines(cells: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for preset in PRESETS:
        for teacher in TEACHERS:
            if any(c["preset"] == preset and c["teacher"] == teacher for c in cells):
                yield preset, teacher


def comparison_line(record: Mapping[str, Any]) -> str:
    """Return how far planning's estimates were from the measured peaks.

    What the process held before the models, Python and its packages, is no part of an estimate.
    """
    ratios = [c["planned_bytes"] / (c["peak_bytes"] - c["base_bytes"]) for c in record["cells"]]
    base = max(cell["base_bytes"] for cell in record["cells"])
    without = f", Python and its packages ({size(base)}) left out" if base else ""
    return (
        f"The estimate that `--dry_run` makes by formula is {min(ratios):.2f} to "
        f"{max(ratios):.2f} times what these cells took{without}."
    )
