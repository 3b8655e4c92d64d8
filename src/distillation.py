"""The Trainer that distils, and the loss it minimises (its pure functions live in ``src.loss.reference``).

In a notebook::

    from src.distillation import DistillationTrainer

    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, temperature=2.0, alpha=0.5,
        use_uncertainty_weighting=True, use_calibration_smoothing=True,
        args=training_arguments, train_dataset=dataset, data_collator=collator,
    )
    trainer.train()
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from src.common.settings import LOSS_IMPLEMENTATIONS, OPTIMIZERS, LossSettings
from src.loss.fused import StudentStates, fused_distillation_losses, teacher_statistics
from src.loss.reference import (
    CONSTANT_ENTROPY,
    IGNORED_LABEL,
    LossParts,
    at_least_float32,
    check_vocabularies,
    distillation_loss,
    divergence,
    entropy,
    hard_loss,
    masked_mean,
    position_weights,
    published_weights,
    segments_from_positions,
    smooth_log_probs,
    smoothing_epsilon,
    valid_positions,
)
from src.models.loading import accepts, final_hidden_states, has_dropout, model_inputs, output_head
from src.models.sharding import in_step
from src.proteins.batching import EpochSampler, PackedDataset, ProteinDataset
from src.trainer.optimizers import muon_with_adamw
from src.trainer.safeguards import GuardedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = tuple[Tensor, Tensor | None]
"""Weight ``(V, E)`` and bias ``(V,)`` or None of an output head."""

__all__ = [
    "DistillationTrainer",
    "LossSettings",
    "CONSTANT_ENTROPY",
    "IGNORED_LABEL",
    "LossParts",
    "at_least_float32",
    "check_vocabularies",
    "distillation_loss",
    "divergence",
    "entropy",
    "hard_loss",
    "masked_mean",
    "position_weights",
    "published_weights",
    "segments_from_positions",
    "smooth_log_probs",
    "smoothing_epsilon",
    "valid_positions",
]


class DistillationTrainer(GuardedTrainer):
    """A ``transformers.Trainer`` whose loss compares the student with a teacher.

    The teacher is kept beside the model, not inside it: in eval mode, without gradients, in its
    own dtype, moved to the device once, and in no checkpoint. A batch holds ``input_ids``,
    ``labels`` and either ``attention_mask`` (padding on either side) or ``position_ids`` that begin
    again at each protein (packed rows).

    Args:
        model: the student, a causal language model.
        teacher_model: the teacher, with the student's vocabulary.
        temperature: T of the soft loss.
        alpha: share of the hard loss.
        use_uncertainty_weighting: weight positions by the teacher's entropy.
        use_calibration_smoothing: smooth the teacher's distribution.
        smoothing_factor: λ.
        weighting, smoothing, divergence, divergence_weight: see :class:`LossSettings`.
        loss_impl: ``fused`` never holds logits of a whole batch; ``reference`` is the plain form.
        optimizer: ``adamw`` (the one of ``args``) or ``muon`` (:mod:`src.trainer.optimizers`).
        other_learning_rate: with Muon, the rate of embeddings, norms and biases.
        **kwargs: everything that ``transformers.Trainer`` takes.

    Raises:
        ValueError: a setting is out of range, no teacher is given although α < 1, the vocabularies
            differ, or several GPUs are driven by one process.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | None = None,
        temperature: float = 2.0,
        alpha: float = 0.5,
        use_uncertainty_weighting: bool = False,
        use_calibration_smoothing: bool = False,
        smoothing_factor: float = 0.1,
        *,
        weighting: str = "published",
        smoothing: str = "published",
        divergence: str = "forward_kl",
        divergence_weight: float = 0.5,
        loss_impl: str = "fused",
        optimizer: str = "adamw",
        other_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.loss_settings = LossSettings(
            temperature=temperature,
            alpha=alpha,
            use_uncertainty_weighting=use_uncertainty_weighting,
            use_calibration_smoothing=use_calibration_smoothing,
            smoothing_factor=smoothing_factor,
            weighting=weighting,
            smoothing=smoothing,
            divergence=divergence,
            divergence_weight=divergence_weight,
        )
        if loss_impl not in LOSS_IMPLEMENTATIONS:
            raise ValueError(
                f"loss_impl must be one of {', '.join(LOSS_IMPLEMENTATIONS)}, got {loss_impl!r}"
            )
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        self.loss_impl = loss_impl
        self._optimizer_name = optimizer
        self._other_learning_rate = other_learning_rate
        super().__init__(model=model, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process drives {self.args.n_gpu} GPUs: start it with 'torchrun "
                "--nproc_per_node N', or choose one with CUDA_VISIBLE_DEVICES=0"
            )
        student: PreTrainedModel = self.accelerator.unwrap_model(self.model)  # type: ignore[assignment]
        self.teacher_model = self._adopt_teacher(teacher_model, student)
        # Our loss is a sum over N positions of the whole step: accumulation must not divide again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._can_skip_head = accepts(student, "logits_to_keep")
        self._tallies = [PartsTally() for _ in self.all_settings]
        self._waited = 0.0
        self._micro_batch = (-1, 0)

    def _adopt_teacher(
        self, teacher: PreTrainedModel | None, student: PreTrainedModel
    ) -> PreTrainedModel | None:
        """Freeze the teacher and move it to the device, having checked that it fits."""
        if teacher is None:
            if self.loss_settings.alpha < 1.0:
                raise ValueError("teacher_model is needed unless alpha is 1 (hard loss alone)")
            return None
        check_vocabularies(student.config.vocab_size, teacher.config.vocab_size)
        teacher.requires_grad_(False).to(device=self.args.device)  # type: ignore[call-arg]
        return teacher.eval()

    # What the loss needs of a batch ------------------------------------------------------------

    def _split_inputs(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor, Any]:
        """Return a forward pass's keyword arguments, the labels, and segments of packed rows."""
        input_ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        positions = inputs.get("position_ids")
        segments = None
        if positions is not None and mask is None:
            segments = segments_from_positions(positions)
        labels = inputs.get("labels")
        if labels is None:
            labels = input_ids if mask is None else input_ids.masked_fill(mask == 0, IGNORED_LABEL)
        assert isinstance(self.model, nn.Module)
        return model_inputs(self.model, input_ids, mask, positions), labels, segments

    def _valid(self, inputs: Mapping[str, Any]) -> Tensor:
        _, labels, segments = self._split_inputs(inputs)
        return valid_positions(labels, inputs.get("attention_mask"), segments)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Return N: valid positions of all accumulated batches, over all processes."""
        counts = [self._valid(batch).sum() for batch in batch_samples]
        total = torch.stack(counts).sum().to(device) if counts else torch.zeros((), device=device)
        return self._sum_over_processes(total)

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        if self.args.world_size > 1:
            return self.accelerator.reduce(value, reduction="sum")  # type: ignore[return-value]
        return value

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Collect the batches of one optimiser step, with the means that span all of them."""
        started = time.monotonic()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.monotonic() - started
        if batches and any(settings.needs_batch_means for settings in self.all_settings):
            temperatures = sorted({settings.temperature for settings in self.all_settings})
            batches = [self._prepare_inputs(batch) for batch in batches]
            each = [self._uncertainty_sums(batch, temperatures) for batch in batches]
            sums = self._sum_over_processes(torch.stack(each).sum(0))
            positions = sums[1].clamp(min=1)
            for batch in batches:
                batch["weight_mean"] = sums[0] / positions
                doubts = sums[2:] / positions
                batch["uncertainty_means"] = dict(zip(temperatures, doubts, strict=True))
        return batches, count

    @property
    def all_settings(self) -> list[LossSettings]:
        """The loss settings of each student."""
        return [self.loss_settings]

    @torch.no_grad()
    def _uncertainty_sums(self, inputs: Mapping[str, Any], temperatures: list[float]) -> Tensor:
        """Return Σ published weights, positions, and Σ (1 - max p) at each temperature ``(2+t,)``.

        The teacher's hidden states stay in the batch, so that the loss need not run it again.
        """
        assert self.teacher_model is not None
        _, labels, segments = self._split_inputs(inputs)
        valid = valid_positions(labels, inputs.get("attention_mask"), segments)
        hidden = self._teacher_hidden(inputs)
        inputs["teacher_hidden_states"] = hidden  # type: ignore[index]
        weight, bias = output_head(self.teacher_model)
        shifted = None if segments is None else segments[:, :-1]
        doubts = []
        for temperature in temperatures:
            figures = teacher_statistics(hidden[:, :-1], weight, bias, valid, temperature)
            doubts.append(torch.where(valid, 1.0 - figures.max_prob, 0.0).sum())
        weights = published_weights(figures.entropy, valid, shifted)
        return torch.stack([weights.sum(), valid.sum().to(weights.dtype), *doubts])

    def _teacher_hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the teacher's final hidden states ``(B, T, E)``: the batch's, if it has them."""
        if "teacher_hidden_states" in inputs:
            return inputs["teacher_hidden_states"]
        assert self.teacher_model is not None
        with torch.no_grad():
            return final_hidden_states(
                self.teacher_model,
                inputs["input_ids"],
                inputs.get("attention_mask"),
                inputs.get("position_ids"),
            )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any) -> Tensor:
        """Do one batch's forward and backward pass, knowing which batch of its step it is."""
        step, number = self._micro_batch
        here = self.state.global_step
        self._micro_batch = (here, number + 1 if step == here else 0)
        return super().training_step(model, inputs, *more)

    def _seed_dropout(self, student: nn.Module) -> None:
        """Let a student's dropout depend on seed, step, batch and process alone.

        So a resumed run draws what an undisturbed one draws, and a student of several in one
        process what it would draw alone.
        """
        if student.training and has_dropout(student):
            state = [self.args.seed, max(self._micro_batch[0], 0), self._micro_batch[1]]
            sequence = np.random.SeedSequence([*state, self.args.process_index])
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimiser, made at the first call."""
        if self.optimizer is None and self._optimizer_name == "muon":
            self.optimizer = muon_with_adamw(
                self.model,  # type: ignore[arg-type]
                self.args.learning_rate,
                self._other_learning_rate,
                self.args.weight_decay,
            )
        return self.optimizer or super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return an order that depends on seed and epoch alone for our datasets."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, (ProteinDataset, PackedDataset)):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(
            dataset.lengths,
            self.args.train_batch_size,
            seed,
            epoch=lambda: int(self.state.epoch or 0),
            by_length=dataset.by_length,
        )

    # The loss ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the scalar loss of a batch, and the student's outputs if asked.

        Args:
            model: the student, possibly wrapped for several processes.
            inputs: ``input_ids``, ``labels`` and ``attention_mask`` or ``position_ids``, each
                ``(B, T)``.
            return_outputs: also return the student's outputs, with full logits.
            num_items_in_batch: N of the whole optimiser step; None: the positions of this batch.
        """
        if return_outputs or self.loss_impl == "reference":
            parts, outputs = self._reference_parts(model, inputs, num_items_in_batch)
        else:
            parts, outputs = self._fused_parts(model, inputs, num_items_in_batch), None
        if model.training:
            for tally, each in zip(self._tallies, parts, strict=True):
                if not tally.started:
                    tally.start(self.state.global_step)
                tally.add(each)
        loss = parts[0].loss if len(parts) == 1 else torch.stack([p.loss for p in parts]).sum()
        if self.args.world_size > 1 and num_items_in_batch is not None:
            # Gradients are averaged over processes, while N already counts all their positions.
            loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _reference_parts(
        self, model: nn.Module, inputs: Mapping[str, Any], count: Tensor | int | None
    ) -> tuple[list[LossParts], Any]:
        """Return the loss from full logits, and the student's outputs."""
        forward, labels, segments = self._split_inputs(inputs)
        self._seed_dropout(model)
        outputs = model(**forward, use_cache=False)
        teacher_logits = outputs.logits.detach()  # α = 1: anything of the right shape will do
        if self.teacher_model is not None:
            weight, bias = output_head(self.teacher_model)
            teacher_logits = F.linear(self._teacher_hidden(inputs), weight, bias)
        parts = distillation_loss(
            outputs.logits,
            teacher_logits,
            labels,
            inputs.get("attention_mask"),
            self.loss_settings,
            segments=segments,
            num_positions=count,
            weight_mean=inputs.get("weight_mean"),
            uncertainty_mean=self._uncertainty_mean(inputs, self.loss_settings),
        )
        return [parts], outputs

    @staticmethod
    def _uncertainty_mean(inputs: Mapping[str, Any], settings: LossSettings) -> Tensor | None:
        return inputs.get("uncertainty_means", {}).get(settings.temperature)

    def _fused_parts(
        self, model: nn.Module, inputs: Mapping[str, Any], count: Tensor | int | None
    ) -> list[LossParts]:
        """Return each student's loss from hidden states, chunk by chunk."""
        forward, labels, segments = self._split_inputs(inputs)
        states = self._hidden_states_and_heads(model, forward)
        teacher_hidden = teacher_weight = teacher_bias = None
        if self.teacher_model is not None and any(s.alpha < 1.0 for s in self.all_settings):
            teacher_hidden = self._teacher_hidden(inputs)
            teacher_weight, teacher_bias = output_head(self.teacher_model)
        return fused_distillation_losses(
            [
                StudentStates(hidden, *head, settings, self._uncertainty_mean(inputs, settings))
                for (hidden, head), settings in zip(states, self.all_settings, strict=True)
            ],
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            labels,
            inputs.get("attention_mask"),
            segments=segments,
            num_positions=count,
            weight_mean=inputs.get("weight_mean"),
            teacher_entropy=inputs.get("teacher_entropy"),
        )

    def _hidden_states_and_heads(
        self, model: nn.Module, forward: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Head]]:
        """Run the student up to its head and return hidden states ``(B, T, E)`` and the head.

        The wrapped model is called, so that autocast and gradient averaging over processes work as
        in any Trainer; a hook takes the hidden states, and the head is asked for no position.
        """
        student = self.accelerator.unwrap_model(model)
        self._seed_dropout(student)
        captured: list[Tensor] = []
        hook = student.base_model.register_forward_hook(
            lambda module, arguments, output: captured.append(output[0])
        )
        options = {"logits_to_keep": torch.zeros(0, dtype=torch.long, device=self.args.device)}
        try:
            model(**forward, use_cache=False, **(options if self._can_skip_head else {}))
        finally:
            hook.remove()
        return [self._in_product_dtype(captured[0], output_head(student))]

    def _in_product_dtype(self, hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
        """Return hidden states and head in the dtype in which they are to be multiplied."""
        weight, bias = head
        dtype = torch.bfloat16 if self.args.bf16 else at_least_float32(hidden[:0]).dtype
        return hidden.to(dtype), (weight.to(dtype), None if bias is None else bias.to(dtype))

    # Evaluation and logging --------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of this process, each protein in one process only.

        By default proteins are repeated until all processes have equally many batches, which would
        count them twice.
        """
        config = self.accelerator.dataloader_config
        before = config.even_batches
        config.even_batches = before and self.compute_metrics is not None
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            config.even_batches = before

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the loss and its parts over all valid positions, each position counted once.

        With ``compute_metrics`` the Trainer's own loop runs, because it needs the logits.
        """
        if self.compute_metrics is not None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        assert isinstance(self.model, nn.Module)
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            # Evaluated before any training: autocast is still to be set up, as the Trainer does it.
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        tallies = [PartsTally() for _ in self.all_settings]
        rows = 0
        one = torch.ones((), device=self.args.device)
        # Processes validate different numbers of batches, so that each protein counts once.
        with torch.no_grad(), in_step(self.teacher_model, len(dataloader)):
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                rows += len(inputs["input_ids"])
                with self.compute_loss_context_manager():
                    if self.loss_impl == "reference":
                        parts, _ = self._reference_parts(model, inputs, one)
                    else:
                        parts = self._fused_parts(model, inputs, one)
                for tally, each in zip(tallies, parts, strict=True):
                    tally.add(each)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        model.train(was_training)
        found = []
        for tally, settings in zip(tallies, self.all_settings, strict=True):
            sums = self._sum_over_processes(tally.sums.to(self.args.device))
            means = PartsTally.means(sums, steps=None)
            means["loss"] = (
                settings.alpha * means["hard_loss"]
                + (1.0 - settings.alpha) * settings.temperature**2 * means["soft_loss"]
            )
            found.append(means)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self._join(found, "eval").items()}
        return EvalLoopOutput(None, None, metrics, rows)  # type: ignore[arg-type]

    def _join(self, records: list[dict[str, float]], when: str) -> dict[str, Any]:
        """Return one record of the figures of all students, of ``train`` or ``eval``."""
        return records[0]

    def interval_tensors(self) -> dict[str, Tensor]:
        """Return also the sums of the losses' parts since the last record, ``(students, 6)``."""
        sums = torch.stack([tally.sums for tally in self._tallies])
        return {**super().interval_tensors(), "parts": sums}

    def plain_state(self) -> dict[str, Any]:
        """Return also where and for how long the losses' parts have been summed."""
        first = self._tallies[0]
        times = {"seconds": time.monotonic() - first.since, "waited": self._waited}
        since = {"started": first.started, "first_step": first.first_step, **times}
        return {**super().plain_state(), "tally": since}

    def restore_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Set also the sums of the losses' parts."""
        super().restore_state(tensors, plain)
        since = plain["tally"]
        for tally, sums in zip(self._tallies, tensors["parts"], strict=True):
            tally.sums, tally.started = sums.clone(), since["started"]
            tally.first_step = since["first_step"]
            tally.since = time.monotonic() - since["seconds"]
        self._waited = since["waited"]

    def merge_intervals(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the sums for another number of processes: the first takes them all."""
        sums = torch.stack([part["parts"] for part in parts]).sum(0)
        sums = sums if self.args.process_index == 0 else torch.zeros_like(sums)
        return {**super().merge_intervals(parts), "parts": sums}

    def number_micro_batch(self, step: int, number: int) -> None:
        """Note which batch of which step is done next."""
        self._micro_batch = (step, number)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the training loss since the last record, and the rate, to ``logs``.

        ``data_wait_share`` is the share of that time in which the step waited for its batches.
        """
        first = self._tallies[0]
        if "loss" in logs and first.started:
            steps = self.state.global_step - first.first_step
            sums = [self._sum_over_processes(t.sums.to(self.args.device)) for t in self._tallies]
            logs.update(self._join([PartsTally.means(each, steps=steps) for each in sums], "train"))
            seconds = max(time.monotonic() - first.since, 1e-9)
            logs["tokens_per_second"] = round(float(sums[0][-1]) / seconds, 1)
            logs["data_wait_share"] = round(min(self._waited / seconds, 1.0), 4)
            self._tallies = [PartsTally() for _ in self.all_settings]
            self._waited = 0.0
        super().log(logs, start_time)


class PartsTally:
    """Sums of loss parts over batches, kept on the device so that adding never waits for it."""

    NAMES = ("hard_loss", "soft_loss", "mean_weight", "mean_epsilon", "teacher_entropy")

    def __init__(self) -> None:
        self.sums = torch.zeros(len(self.NAMES) + 1, dtype=torch.float64)
        self.started = False
        self.first_step = 0
        self.since = 0.0

    def start(self, step: int) -> None:
        """Note that the sums begin after ``step`` optimiser steps, now."""
        self.started, self.first_step, self.since = True, step, time.monotonic()

    def add(self, parts: LossParts) -> None:
        """Add one batch: losses as they are, means weighted by their positions."""
        each = parts.positions.double()
        losses = torch.stack([parts.hard.double(), parts.soft.double()])
        means = torch.stack([parts.mean_weight, parts.mean_epsilon, parts.teacher_entropy])
        new = torch.cat([losses, means.double() * each, each.reshape(1)])
        self.sums = self.sums.to(new.device) + new

    @classmethod
    def means(cls, sums: Tensor, steps: int | None) -> dict[str, float]:
        """Return the named means of ``sums`` ``(6,)``.

        Args:
            sums: what :meth:`add` summed.
            steps: optimiser steps, where the losses were divided by their step's N; None where
                they are sums over positions.
        """
        values = sums.tolist()
        positions = max(values[-1], 1.0)
        losses = [value / (steps or positions) for value in values[:2]]
        return dict(
            zip(cls.NAMES, losses + [value / positions for value in values[2:-1]], strict=True)
        )
