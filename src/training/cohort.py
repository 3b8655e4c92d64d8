"""Trains several students in one process; they share batches and the teacher's logits.

All students of a cohort see each batch together. The teacher runs once for it (or not at all, from
its cache), and its logits of a chunk are computed once for all
(``src.loss.fused.fused_distillation_losses``). Parameters, gradients, clipping, learning rates and
dropout are each student's own, so on a CPU every student ends in the bits of training it alone
with the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from src.common.settings import LossSettings
from src.distillation import DistillationTrainer
from src.loss.chunks import OutputHead
from src.models.forward import final_hidden_states, output_head
from src.trainer.checkpoints import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STUDENTS_FILE = "students.safetensors"


@dataclass
class Member:
    """A student of a cohort."""

    name: str
    model: PreTrainedModel
    loss: LossSettings
    learning_rate: float


class Cohort(nn.Module):
    """The students of a cohort as one module, which a Trainer treats like a model."""

    def __init__(self, students: Sequence[PreTrainedModel]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        self.config = students[0].config
        self.before_each: Callable[[nn.Module], None] = lambda student: None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the hidden states ``(B, T, E)`` of each student."""
        hidden = []
        for student in self.students:
            self.before_each(student)
            hidden.append(
                final_hidden_states(student, input_ids, attention_mask, position_ids)  # type: ignore[arg-type]
            )
        return hidden


class CohortTrainer(DistillationTrainer):
    """A :class:`DistillationTrainer` for several students.

    Args:
        members: the students, each with a name of its own.
        teacher_model: the teacher of all.
        **kwargs: everything that :class:`DistillationTrainer` takes but the loss and the model.

    Members have names of their own, and one vocabulary; the loss is the fused one, the optimiser
    AdamW.
    """

    def __init__(
        self,
        members: Sequence[Member],
        teacher_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        self.members = list(members)
        self._norms: list[Tensor] = []
        cohort = Cohort([member.model for member in members])
        cohort.before_each = self.seed_dropout
        # The nominal loss, used for nothing else, asks for a teacher only if one is given.
        super().__init__(
            model=cohort,  # type: ignore[arg-type]
            teacher_model=teacher_model,
            alpha=1.0 if teacher_model is None else 0.0,
            **kwargs,
        )

    @property
    def all_settings(self) -> list[LossSettings]:
        """The loss settings of each student."""
        return [member.loss for member in self.members]

    def _measure_head(self, student: PreTrainedModel) -> None:
        """Find out how each student's logits are made, before they are wrapped for training."""
        for member in self.members:
            super()._measure_head(member.model)

    def hidden_states_and_heads(
        self, model: nn.Module, forward: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, OutputHead]]:
        """Return the hidden states ``(B, T, E)`` and the head of each student."""
        states = model(**forward)
        return [
            self.in_product_dtype(hidden, output_head(member.model))
            for hidden, member in zip(states, self.members, strict=True)
        ]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the Trainer's optimiser with groups of each student's own."""
        if self.optimizer is None:
            groups = []
            for member in self.members:
                decayed = set(self.get_decay_parameter_names(member.model))
                named = [(n, p) for n, p in member.model.named_parameters() if p.requires_grad]
                for inside, decay in ((True, self.args.weight_decay), (False, 0.0)):
                    groups.append(
                        {
                            "params": [p for n, p in named if (n in decayed) == inside],
                            "weight_decay": decay,
                            "lr": member.learning_rate,
                        }
                    )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def clip_gradients(self, model: nn.Module) -> Tensor:
        """Clip each student's gradients by themselves, and return the largest norm."""
        limit = self.args.max_grad_norm
        norms = [
            self.accelerator.clip_grad_norm_(member.model.parameters(), limit)
            for member in self.members
        ]
        self._norms = [torch.as_tensor(norm).detach() for norm in norms]
        return torch.stack(self._norms).max()

    def joined(self, records: list[dict[str, float]], when: str) -> dict[str, Any]:
        """Return the mean of every value, and each student's own under ``students``.

        A student's own training record holds its last gradient norm before clipping.
        """
        joined: dict[str, Any] = {
            key: sum(record[key] for record in records) / len(records) for key in records[0]
        }
        if when == "train" and self._norms:
            norms = torch.stack(self._norms).tolist()
            records = [r | {"grad_norm": n} for r, n in zip(records, norms, strict=True)]
        names = [member.name for member in self.members]
        joined["students"] = dict(zip(names, records, strict=True))
        return joined

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean of the students' losses instead of their sum."""
        if "loss" in logs:
            logs["loss"] = logs["loss"] / len(self.members)
        super().log(logs, start_time)

    def write_model(self, folder: Path, as_trained: bool = False) -> None:
        """Write all students to one file."""
        tensors = {
            f"{number}.{name}": parameter.detach().cpu().contiguous()
            for number, member in enumerate(self.members)
            for name, parameter in member.model.named_parameters()
        }
        save_file(tensors, folder / STUDENTS_FILE)

    def read_model(self, folder: Path) -> None:
        """Load the weights of all students."""
        tensors = read_tensors(folder / STUDENTS_FILE)
        with torch.no_grad():
            for number, member in enumerate(self.members):
                for name, parameter in member.model.named_parameters():
                    parameter.copy_(tensors[f"{number}.{name}"])
