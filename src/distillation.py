"""The Trainer that distils; the pure functions of its loss are in ``src.loss.reference``.

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

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from src.common.settings import LOSS_IMPLEMENTATIONS, OPTIMIZERS, LossSettings
from src.loss.chunks import OutputHead
from src.loss.fused import StudentStates, fused_distillation_losses, teacher_statistics
from src.loss.reference import (
    IGNORED_LABEL,
    LossParts,
    at_least_float32,
    check_vocabularies,
    distillation_loss,
    published_weights,
    segments_from_positions,
    valid_positions,
)
from src.models.forward import (
    accepts,
    final_hidden_states,
    head_form,
    model_inputs,
    output_head,
)
from src.models.loading import has_dropout
from src.models.sharding import in_step
from src.proteins.batching import EpochSampler, PackedDataset, ProteinDataset
from src.trainer.adapter import TrainerAdapter
from src.trainer.log_interval import LogInterval, LossSums
from src.trainer.optimizers import muon_with_adamw

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DistillationTrainer(TrainerAdapter):
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
        self._measure_head(student)
        self.teacher_model = self._adopt_teacher(teacher_model, student)
        # Our loss is a sum over N positions of the whole step: accumulation must not divide again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._can_skip_head = accepts(student, "logits_to_keep")
        self.interval = LogInterval(len(self.all_settings))

    def _measure_head(self, student: PreTrainedModel) -> None:
        """Find out how the student's logits are made, before it is wrapped for training."""
        head_form(student)

    def _adopt_teacher(
        self, teacher: PreTrainedModel | None, student: PreTrainedModel
    ) -> PreTrainedModel | None:
        """Check the teacher against the student, freeze it, and move it to the device."""
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

    def count_positions(self, batches: list[Any]) -> Tensor:
        """Return N: the valid positions of some batches, over all processes."""
        total = torch.zeros((), dtype=torch.long, device=self.args.device)
        for batch in batches:
            _, labels, segments = self._split_inputs(batch)
            valid = valid_positions(labels, batch.get("attention_mask"), segments)
            total = total + valid.sum().to(total.device)
        return self.sum_over_processes(total)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of one optimiser step, with the means that span them, and N."""
        with self.interval.fetching(self.state.global_step):
            batches = list(islice(epoch_iterator, num_batches))
        count = self.count_positions(batches)
        self.guard.keep_batches(batches, count)
        if batches and any(settings.needs_batch_means for settings in self.all_settings):
            temperatures = sorted({settings.temperature for settings in self.all_settings})
            batches = [self.on_device(batch) for batch in batches]
            per_batch = [self._uncertainty_sums(batch, temperatures) for batch in batches]
            sums = self.sum_over_processes(torch.stack(per_batch).sum(0))
            means = sums / sums[1].clamp(min=1)
            for batch in batches:
                batch["weight_mean"] = means[0]
                batch["uncertainty_means"] = dict(zip(temperatures, means[2:], strict=True))
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
        head = output_head(self.teacher_model)
        shifted = None if segments is None else segments[:, :-1]
        uncertainties = []
        for temperature in temperatures:
            teacher = teacher_statistics(hidden[:, :-1], head, valid, temperature)
            uncertainties.append(torch.where(valid, 1.0 - teacher.max_prob, 0.0).sum())
        weights = published_weights(teacher.entropy, valid, shifted)
        return torch.stack([weights.sum(), valid.sum().to(weights.dtype), *uncertainties])

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

    def seed_dropout(self, student: nn.Module) -> None:
        """Make a student's dropout depend on seed, step, batch and process alone.

        So a resumed run draws what an undisturbed one draws, and each of several students draws
        what it would draw alone.
        """
        if student.training and has_dropout(student):
            state = [self.args.seed, *self.micro_batch, self.args.process_index]
            sequence = np.random.SeedSequence(state)
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimiser; the first call makes it."""
        if self.optimizer is None and self._optimizer_name == "muon":
            self.optimizer = muon_with_adamw(
                self.model,  # type: ignore[arg-type]
                self.args.learning_rate,
                self._other_learning_rate,
                self.args.weight_decay,
            )
        return self.optimizer or super().create_optimizer(model)

    def train_sampler(self, dataset: Any) -> Any:
        """Return an order that depends on seed and epoch alone for our datasets, else None."""
        if not isinstance(dataset, (ProteinDataset, PackedDataset)):
            return None
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
            parts, outputs = self.reference_parts(model, inputs, num_items_in_batch)
        else:
            parts, outputs = self._fused_parts(model, inputs, num_items_in_batch), None
        if model.training:
            self.interval.sums.add(parts)
        loss = parts[0].loss if len(parts) == 1 else torch.stack([p.loss for p in parts]).sum()
        if self.args.world_size > 1 and num_items_in_batch is not None:
            # Gradients are averaged over processes, while N already counts all their positions.
            loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def reference_parts(
        self, model: nn.Module, inputs: Mapping[str, Any], count: Tensor | int | None
    ) -> tuple[list[LossParts], Any]:
        """Return the loss from full logits, and the student's outputs."""
        forward, labels, segments = self._split_inputs(inputs)
        self.seed_dropout(model)
        outputs = model(**forward, use_cache=False)
        teacher_logits = outputs.logits.detach()  # α = 1: anything of the right shape will do
        if self.teacher_model is not None:
            teacher_logits = output_head(self.teacher_model).logits(self._teacher_hidden(inputs))
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
        states = self.hidden_states_and_heads(model, forward)
        teacher_hidden = teacher_head = None
        if self.teacher_model is not None and any(s.alpha < 1.0 for s in self.all_settings):
            teacher_hidden = self._teacher_hidden(inputs)
            teacher_head = output_head(self.teacher_model)
        return fused_distillation_losses(
            [
                StudentStates(hidden, head, settings, self._uncertainty_mean(inputs, settings))
                for (hidden, head), settings in zip(states, self.all_settings, strict=True)
            ],
            teacher_hidden,
            teacher_head,
            labels,
            inputs.get("attention_mask"),
            segments=segments,
            num_positions=count,
            weight_mean=inputs.get("weight_mean"),
            teacher_entropy=inputs.get("teacher_entropy"),
        )

    def hidden_states_and_heads(
        self, model: nn.Module, forward: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, OutputHead]]:
        """Run the student up to its head and return hidden states ``(B, T, E)`` and the head.

        The wrapped model is called, so that autocast and gradient averaging over processes work as
        in any Trainer; a hook takes the hidden states, and the head is asked for no position where
        it need not be run.
        """
        student = self.accelerator.unwrap_model(model)
        form, head = head_form(student), output_head(student)
        self.seed_dropout(student)
        captured: list[Tensor] = []
        options = {}
        if form.direct:
            hook = student.base_model.register_forward_hook(
                lambda module, arguments, output: captured.append(output[0])
            )
            if self._can_skip_head:
                none = torch.zeros(0, dtype=torch.long, device=self.args.device)
                options["logits_to_keep"] = none
        elif form.linear:
            hook = student.get_output_embeddings().register_forward_pre_hook(
                lambda module, arguments: captured.append(arguments[0])
            )
        else:
            hook = student.register_forward_hook(
                lambda module, arguments, output: captured.append(output.logits)
            )
        try:
            model(**forward, use_cache=False, **options)
        finally:
            hook.remove()
        return [self.in_product_dtype(captured[0], head)]

    def in_product_dtype(self, hidden: Tensor, head: OutputHead) -> tuple[Tensor, OutputHead]:
        """Return hidden states and head in the dtype in which they are to be multiplied."""
        dtype = torch.bfloat16 if self.args.bf16 else at_least_float32(hidden[:0]).dtype
        return hidden.to(dtype), head.to(dtype)

    # Evaluation and logging --------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the validation batches of this process, each protein in one process only.

        The Trainer repeats proteins until all processes have equally many batches, which would
        count some twice.
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
        model = self.model_for_evaluation()
        was_training = model.training
        model.eval()
        sums = LossSums(len(self.all_settings))
        rows = 0
        one = torch.ones((), device=self.args.device)
        # Processes validate different numbers of batches, so that each protein counts once.
        with torch.no_grad(), in_step(self.teacher_model, len(dataloader)):
            for batch in dataloader:
                inputs = self.on_device(batch)
                rows += len(inputs["input_ids"])
                with self.compute_loss_context_manager():
                    if self.loss_impl == "reference":
                        parts, _ = self.reference_parts(model, inputs, one)
                    else:
                        parts = self._fused_parts(model, inputs, one)
                sums.add(parts)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        model.train(was_training)
        records = LossSums.means(self.sum_over_processes(sums.values.to(self.args.device)))
        for record, settings in zip(records, self.all_settings, strict=True):
            soft_weight = (1.0 - settings.alpha) * settings.temperature**2
            record["loss"] = (
                settings.alpha * record["hard_loss"] + soft_weight * record["soft_loss"]
            )
        joined = self.joined(records, "eval")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in joined.items()}
        return EvalLoopOutput(None, None, metrics, rows)  # type: ignore[arg-type]

    def joined(self, records: list[dict[str, float]], when: str) -> dict[str, Any]:
        """Return one record for the log from those of all students, of ``train`` or ``eval``."""
        return records[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log also the parts of the training loss since the last record, and the rate.

        ``data_wait_share`` is the share of that time in which steps waited for their batches.
        """
        interval = self.interval
        if "loss" in logs and interval.started:
            steps = self.state.global_step - interval.first_step
            sums = self.sum_over_processes(interval.sums.values.to(self.args.device))
            logs.update(self.joined(LossSums.means(sums, steps), "train"))
            logs.update(interval.rates(float(sums[0, -1])))
            interval.restart()
        super().log(logs, start_time)
