"""The settings of students and losses: light to import, so that ``--help`` is quick.

Each dataclass checks itself; its ``ValueError`` names the flag.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from src.common.cli import LARGEST, LARGEST_COUNT

DEFAULT_TEACHER = "nferruz/ProtGPT2"
DEFAULT_DATA = "nferruz/UR50_2021_04"
BUNDLED_TEACHER = "data/small_teacher"
BUNDLED_DATA = "data/proteins"
WEIGHTINGS = ("published", "mean_one", "inverse", "permuted", "matched")
SMOOTHINGS = ("published", "confident", "constant", "matched")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
LOSS_IMPLEMENTATIONS = ("fused", "reference")
SMALLEST = 1e-12
"""Of a temperature, rate or penalty: logits divided by it are still finite in float32."""
TEMPERATURES = (1e-4, 1e4)
"""The soft loss is scaled by T²: beyond, it is float32's rounding errors."""
LARGEST_GPT2 = {"n_layer": 48, "n_head": 25, "n_embd": 1600}
"""The largest published GPT-2, of 1.6 billion parameters (Radford et al. 2019, table 2)."""
LARGEST_FACTOR = 100
"""A student that is so many times deeper or wider is a slip of the finger; building it would never
end. One that is merely too large for a machine is refused when it is to be built there."""


def require_moderate(name: str, value: float, low: float = SMALLEST, high: float = LARGEST) -> None:
    """Raise ``ValueError`` where a setting above 0 is beyond all measure."""
    if not low <= value <= high:
        raise ValueError(f"--{name} must be above 0, from {low:g} to {high:g}, got {value}")


@dataclass(frozen=True)
class LossSettings:
    """Everything that decides the loss. The two ``use_`` flags turn the enhancements on.

    Attributes:
        temperature: T of both softmaxes in the soft loss, within ``TEMPERATURES``.
        alpha: share of the hard loss, in [0, 1].
        use_uncertainty_weighting: weight positions by the teacher's entropy.
        use_calibration_smoothing: mix the teacher's distribution with the uniform one.
        smoothing_factor: λ in [0, 1), the largest ε.
        weighting: which weights (:func:`position_weights`).
        smoothing: which ε (:func:`smoothing_epsilon`).
        divergence: what stands between target and student (:func:`divergence`).
        divergence_weight: β of the generalised Jensen-Shannon divergence or the skew of skew KL.
    """

    temperature: float = 2.0
    alpha: float = 0.5
    use_uncertainty_weighting: bool = False
    use_calibration_smoothing: bool = False
    smoothing_factor: float = 0.1
    weighting: str = "published"
    smoothing: str = "published"
    divergence: str = "forward_kl"
    divergence_weight: float = 0.5

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        require_moderate("temperature", self.temperature, *TEMPERATURES)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"--alpha must be in [0, 1], got {self.alpha}")
        if not 0 <= self.smoothing_factor < 1:
            raise ValueError(f"--smoothing_factor must be in [0, 1), got {self.smoothing_factor}")
        if not 0 < self.divergence_weight < 1:
            raise ValueError(f"--divergence_weight must be in (0, 1), got {self.divergence_weight}")
        for name, choices in (
            ("weighting", WEIGHTINGS),
            ("smoothing", SMOOTHINGS),
            ("divergence", DIVERGENCES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"--{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )

    @property
    def needs_batch_means(self) -> bool:
        """Whether a weight or an ε refers to its own mean over the optimiser step."""
        return (self.use_uncertainty_weighting and self.weighting in ("mean_one", "matched")) or (
            self.use_calibration_smoothing and self.smoothing == "matched"
        )


@dataclass(frozen=True)
class StudentSettings:
    """The shape of a GPT-2 student. Widths in features; ``dropout`` is a probability."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the shape. Raises ``ValueError``."""
        for name, known in LARGEST_GPT2.items():
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) > LARGEST_FACTOR * known:
                raise ValueError(
                    f"--{name} must be at most {LARGEST_FACTOR * known:,}, {LARGEST_FACTOR} times "
                    f"that of the largest GPT-2, got {getattr(self, name):,}"
                )
        if self.n_embd % self.n_head:
            low, high = self.n_embd // self.n_head * self.n_head, self.n_head
            nearest = f"{low} or {low + high}" if low else f"{high}"
            raise ValueError(
                f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}: "
                f"try --n_embd {nearest}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class Preset:
    """A named student with the learning rate that it starts from."""

    student: StudentSettings
    learning_rate: float


PRESETS = {
    "xs": Preset(StudentSettings(2, 2, 128), 1e-3),
    "tiny": Preset(StudentSettings(4, 4, 256), 1e-3),
    "small": Preset(StudentSettings(6, 8, 512), 1e-3),
    "medium": Preset(StudentSettings(12, 12, 768), 1e-3),
    "hf-tiny": Preset(StudentSettings(4, 4, 512), 1e-3),
    "hf-small": Preset(StudentSettings(6, 8, 768), 5e-4),
    "hf-medium": Preset(StudentSettings(12, 16, 1024), 1e-4),
}
PUBLISHED_STUDENTS = {
    "hf-tiny": "littleworth/protgpt2-distilled-tiny",
    "hf-small": "littleworth/protgpt2-distilled-small",
    "hf-medium": "littleworth/protgpt2-distilled-medium",
}
"""Hub ids of the published students of ProtGPT2 by the preset of the same shape."""


OF_TEACHER = "teacher"
"""As ``--init_from``: the teacher itself, whichever it is."""
RECIPES: dict[str, dict[str, Any]] = {
    "published": {"use_uncertainty_weighting": True, "use_calibration_smoothing": True},
    "recommended": {"init_from": OF_TEACHER, "temperature": 1.0, "alpha": 0.0},
}
"""Values of train.py's flags by name of a recipe; docs/RESULTS.md has what is known of them."""

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BATCHINGS = ("bucketed", "packed", "padded")
SCHEDULES = ("linear", "cosine", "constant_with_warmup", "warmup_stable_decay")
OPTIMIZERS = ("adamw", "muon")
DECAY_SHARE = 0.4
"""Of a run's steps: the linear decay at the end of ``warmup_stable_decay``."""


@dataclass(frozen=True)
class TrainSettings:
    """A distillation run: what decides its outcome, and nothing of where or how it is watched.

    Lengths are in tokens, batch sizes in rows. ``warmup_steps``, ``eval_steps`` and ``save_steps``
    of None are derived from the number of steps (:func:`derived_steps`). ``cached_teacher`` reads
    the teacher's hidden states from disk, which are equal but for rounding; ``init_from`` names a
    model whose weights the student starts from instead of random ones. ``early_stopping`` is the
    number of validations without improvement that ends a run, whose best weights are then kept.
    """

    student: StudentSettings = field(default_factory=StudentSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    data: str = DEFAULT_DATA
    teacher_model: str | None = DEFAULT_TEACHER
    tokenizer: str | None = None
    train_size_prop: float = 0.1
    data_seed: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    other_learning_rate: float | None = None
    lr_schedule: str = "linear"
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    max_length: int = 512
    batching: str = "bucketed"
    precision: str = "auto"
    eval_steps: int | None = None
    save_steps: int | None = None
    validation_proteins: int = 500
    loss_impl: str = "fused"
    cached_teacher: bool = False
    init_from: str | None = None
    skip_loss_spikes: float | None = None
    early_stopping: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        if not 0 < self.train_size_prop <= 1:
            raise ValueError(f"--train_size_prop must be in (0, 1], got {self.train_size_prop}")
        for name in ("learning_rate", "num_train_epochs", "max_grad_norm"):
            require_moderate(name, getattr(self, name))
        if not 0 <= self.weight_decay <= LARGEST:
            raise ValueError(
                f"--weight_decay must be from 0 to {LARGEST:g}, got {self.weight_decay}"
            )
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) <= LARGEST_COUNT:
                raise ValueError(
                    f"--{name} must be from 0 to {LARGEST_COUNT}, got {getattr(self, name)}"
                )
        if self.max_steps != -1 and not 1 <= self.max_steps <= LARGEST_COUNT:
            raise ValueError(
                f"--max_steps must be from 1 to {LARGEST_COUNT}, or -1 for what the epochs make, "
                f"got {self.max_steps}"
            )
        for name in ("batch_size", "gradient_accumulation_steps", "validation_proteins"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.other_learning_rate is not None:
            require_moderate("other_learning_rate", self.other_learning_rate)
            if self.optimizer != "muon":
                raise ValueError("--other_learning_rate: needs --optimizer muon")
        if self.tokenizer is not None and (self.loss.alpha != 1 or self.init_from is not None):
            raise ValueError(
                "--tokenizer: is for training from random weights without a teacher: give "
                "--alpha 1, and no --init_from"
            )
        if self.skip_loss_spikes is not None and not 1 < self.skip_loss_spikes <= LARGEST:
            raise ValueError(f"--skip_loss_spikes must be above 1, got {self.skip_loss_spikes}")
        if self.early_stopping is not None and self.early_stopping < 1:
            raise ValueError(f"--early_stopping must be at least 1, got {self.early_stopping}")
        if self.max_length < 8:
            raise ValueError(f"--max_length must be at least 8 tokens, got {self.max_length}")
        for name, choices in (
            ("precision", PRECISIONS),
            ("batching", BATCHINGS),
            ("lr_schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("loss_impl", LOSS_IMPLEMENTATIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"--{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )


def as_recorded(settings: TrainSettings) -> dict[str, Any]:
    """Return settings as records hold them, which tell by comparison whether a run is the same one.

    Settings of ``ADDED_LATER`` are left out at their defaults: records made before there was such a
    setting, and hashes of them, stay those of the same run.
    """
    record = asdict(settings)
    for name in ADDED_LATER:
        if record[name] == getattr(DEFAULTS, name):
            del record[name]
    return record


DEFAULTS = TrainSettings()
ADDED_LATER = ("early_stopping", "optimizer", "other_learning_rate", "tokenizer")


def default_run_name(settings: TrainSettings) -> str:
    """Return the name of a run's directory: its main settings, then every other choice.

    ``protgpt2-distilled-t2.0-a0.5-l4-h4-e256-p0.1-lr1e-03.uniprot`` is the run of the defaults;
    an enhancement or another non-default choice adds a suffix, so that two runs that differ do
    not meet in one directory.
    """
    student, loss = settings.student, settings.loss
    name = (
        f"protgpt2-distilled-t{loss.temperature}-a{loss.alpha}"
        f"-l{student.n_layer}-h{student.n_head}-e{student.n_embd}"
        f"-p{settings.train_size_prop}-lr{settings.learning_rate:.0e}.uniprot"
    )
    suffixes = []
    if loss.use_uncertainty_weighting:
        kind = "" if loss.weighting == "published" else f"-{loss.weighting}"
        suffixes.append(f"uncertainty{kind}")
    if loss.use_calibration_smoothing:
        kind = "" if loss.smoothing == "published" else f"-{loss.smoothing}"
        factor = "" if loss.smoothing_factor == 0.1 else f"{loss.smoothing_factor}"
        suffixes.append(f"calibration{factor}{kind}")
    if loss.divergence != "forward_kl":
        suffixes.append(f"{loss.divergence}{loss.divergence_weight}")
    defaults = TrainSettings()
    for field_name, label in (("seed", "s"), ("num_train_epochs", "ep"), ("max_steps", "steps")):
        value = getattr(settings, field_name)
        if value != getattr(defaults, field_name):
            suffixes.append(f"{label}{value:g}")
    if settings.optimizer != defaults.optimizer:
        suffixes.append(settings.optimizer)
    if settings.early_stopping:
        suffixes.append(f"stop{settings.early_stopping}")
    if student.dropout:
        suffixes.append(f"drop{student.dropout}")
    if settings.init_from:
        suffixes.append(f"init-{settings.init_from.rstrip('/').split('/')[-1]}")
    if settings.teacher_model is None:
        suffixes.append("untaught")
    elif settings.teacher_model != DEFAULT_TEACHER:
        suffixes.append(f"from-{settings.teacher_model.rstrip('/').split('/')[-1]}")
    return "-".join([name, *suffixes])


def derived_steps(settings: TrainSettings, steps: int, evaluations: int = 10) -> dict[str, int]:
    """Return warm-up, evaluation, saving and logging steps for a run of ``steps`` steps.

    Where a setting is None: warm-up is 5 % of the steps but at most 500, and there are
    ``evaluations`` evaluations and ten checkpoints; fifty lines of log in any case.
    """
    tenth = max(1, math.ceil(steps / 10))
    warmup = settings.warmup_steps
    return {
        "warmup_steps": min(500, math.ceil(0.05 * steps)) if warmup is None else warmup,
        "eval_steps": settings.eval_steps or max(1, math.ceil(steps / evaluations)),
        "save_steps": settings.save_steps or tenth,
        "logging_steps": max(1, steps // 50),
    }
