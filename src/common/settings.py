"""The settings of students and losses. Light to import, so that ``--help`` is quick.

Each dataclass checks itself when it is made; its ``ValueError`` is one line that names the flag.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from src.common.cli import LARGEST, LARGEST_COUNT

DEFAULT_TEACHER = "nferruz/ProtGPT2"
DEFAULT_DATA = "nferruz/UR50_2021_04"
BUNDLED_TEACHER = "data/small_teacher"
BUNDLED_DATA = "data/proteins"
WEIGHTINGS = ("published", "mean_one", "inverse", "permuted", "matched")
SMOOTHINGS = ("published", "confident", "constant", "matched")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
"""Names of divergences. The formulas are in ``src.loss.divergences.TABLE``, which needs PyTorch and
checks at import that it holds these names; weightings and smoothings do the same."""
LOSS_IMPLEMENTATIONS = ("fused", "reference")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BATCHINGS = ("bucketed", "packed", "padded")
SCHEDULES = ("linear", "cosine", "constant_with_warmup", "warmup_stable_decay")
OPTIMIZERS = ("adamw", "muon")
DECAY_SHARE = 0.4
"""Share of a run's steps in the linear decay at the end of ``warmup_stable_decay``."""
LARGEST_GPT2 = {"n_layer": 48, "n_head": 25, "n_embd": 1600}
"""The largest published GPT-2, of 1.6 billion parameters (Radford et al. 2019, table 2)."""
LARGEST_FACTOR = 100
"""A student this many times deeper or wider is a typing error, and would take forever to build."""


class Bounds(NamedTuple):
    """The values that a setting may take; both ends belong to them unless they are open."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    note: str = ""

    def __contains__(self, value: object) -> bool:
        """Return whether ``value`` lies within; NaN never does."""
        assert isinstance(value, (int, float))
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        """Return the bounds as a message states them."""
        low, high = (f"{x:g}" if isinstance(x, float) else str(x) for x in self[:2])
        if self.high == 1:
            return f"in {'[('[self.low_open]}{low}, {high}{'])'[self.high_open]}"
        if self.low_open:
            return f"above {low}"
        if self.high == math.inf:
            return f"at least {low}"
        positive = "above 0, " if 0 < self.low < 1 else ""
        return f"{positive}from {low} to {high}{self.note}"


POSITIVE = Bounds(1e-12, LARGEST)
"""Rates and penalties: logits divided by the smallest are still finite in float32."""
SEED = Bounds(0, LARGEST_COUNT)
BOUNDS = {
    "temperature": Bounds(
        1e-4, 1e4
    ),  # The soft loss is scaled by T²: beyond, float32 is too coarse
    "alpha": Bounds(0, 1),
    "smoothing_factor": Bounds(0, 1, high_open=True),
    "divergence_weight": Bounds(0, 1, low_open=True, high_open=True),
    **{name: Bounds(1, LARGEST_FACTOR * most) for name, most in LARGEST_GPT2.items()},
    "dropout": Bounds(0, 1, high_open=True),
    "train_size_prop": Bounds(0, 1, low_open=True),
    "data_seed": SEED,
    "learning_rate": POSITIVE,
    "other_learning_rate": POSITIVE,
    "weight_decay": Bounds(0, LARGEST),
    "max_grad_norm": POSITIVE,
    "batch_size": Bounds(1),
    "gradient_accumulation_steps": Bounds(1),
    "num_train_epochs": POSITIVE,
    "max_steps": Bounds(1, LARGEST_COUNT, note=", or -1 for what the epochs make"),
    "max_length": Bounds(8),
    "validation_proteins": Bounds(1),
    "skip_loss_spikes": Bounds(1, LARGEST, low_open=True),
    "early_stopping": Bounds(1),
    "lora_rank": Bounds(1),
    "seed": SEED,
}
CHOICES = {
    "weighting": WEIGHTINGS,
    "smoothing": SMOOTHINGS,
    "divergence": DIVERGENCES,
    "optimizer": OPTIMIZERS,
    "lr_schedule": SCHEDULES,
    "batching": BATCHINGS,
    "precision": PRECISIONS,
    "loss_impl": LOSS_IMPLEMENTATIONS,
}


def require_moderate(name: str, value: float, bounds: Bounds = POSITIVE) -> None:
    """Raise ``ValueError`` unless the value of the flag ``name`` is within ``bounds``."""
    if value not in bounds:
        raise ValueError(f"--{name} must be {bounds}, got {value}")


def require_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_fields(settings: Any) -> None:
    """Check each field of a dataclass against ``BOUNDS`` and ``CHOICES``; None is always allowed.

    Raises:
        ValueError: a value is out of bounds, or not one of the choices.
    """
    for name, value in vars(settings).items():
        if name in CHOICES:
            require_choice(f"--{name}", value, CHOICES[name])
        elif name in BOUNDS and value is not None and (name, value) != ("max_steps", -1):
            require_moderate(name, value, BOUNDS[name])


@dataclass(frozen=True)
class LossSettings:
    """Everything that decides the loss. The two ``use_`` flags turn the enhancements on.

    Attributes:
        temperature: T of both softmaxes in the soft loss.
        alpha: share of the hard loss, in [0, 1].
        use_uncertainty_weighting: weight positions by the teacher's entropy.
        use_calibration_smoothing: mix the teacher's distribution with the uniform one.
        smoothing_factor: λ in [0, 1), the largest ε.
        weighting: which weights (:func:`src.loss.reference.position_weights`).
        smoothing: which ε (:func:`src.loss.reference.smoothing_epsilon`).
        divergence: between target and student (:mod:`src.loss.divergences`).
        divergence_weight: β of the generalised Jensen-Shannon divergence, λ of skew KL.
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
        check_fields(self)

    @property
    def needs_weight_mean(self) -> bool:
        """Whether weights refer to their mean over the optimiser step."""
        return self.use_uncertainty_weighting and self.weighting in ("mean_one", "matched")

    @property
    def needs_uncertainty_mean(self) -> bool:
        """Whether ε refers to the mean of 1 - max p over the optimiser step."""
        return self.use_calibration_smoothing and self.smoothing == "matched"

    @property
    def needs_batch_means(self) -> bool:
        """Whether a weight or an ε refers to a mean over the optimiser step."""
        return self.alpha < 1 and (self.needs_weight_mean or self.needs_uncertainty_mean)


@dataclass(frozen=True)
class StudentSettings:
    """The shape of a GPT-2 student. Widths in features; ``dropout`` is a probability."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the shape. Raises ``ValueError``."""
        check_fields(self)
        if self.n_embd % self.n_head:
            low, high = self.n_embd // self.n_head * self.n_head, self.n_head
            nearest = f"{low} or {low + high}" if low else f"{high}"
            raise ValueError(
                f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}: "
                f"try --n_embd {nearest}"
            )


@dataclass(frozen=True)
class Preset:
    """A named shape of a student, and its initial learning rate."""

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
"""Hub ids of the published students of ProtGPT2, by the preset of the same shape."""
OF_TEACHER = "teacher"
"""Value of ``--init_from`` that stands for the teacher itself."""
RECIPES: dict[str, dict[str, Any]] = {
    "published": {"use_uncertainty_weighting": True, "use_calibration_smoothing": True},
    "recommended": {
        "init_from": OF_TEACHER, "temperature": 1.0, "alpha": 0.0,
        "optimizer": "muon", "lr_schedule": "warmup_stable_decay",
    },
}  # fmt: skip
"""Flags of train.py that each recipe sets; docs/RESULTS.md compares them."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings that decide a run's outcome; output places and logging are not among them.

    Lengths are in tokens, batch sizes in rows. ``warmup_steps``, ``eval_steps`` and ``save_steps``
    of None are derived from the number of steps (:func:`derived_steps`). ``cached_teacher`` reads
    the teacher's hidden states from disk, which are equal but for rounding. ``init_from`` names a
    model whose weights the student starts from, instead of random ones. A ``student`` of None is
    that model as it is, of any class; without ``init_from``, the class and shape of the model in
    ``tokenizer`` with random weights. ``lora_rank`` trains additions of that rank to the linear
    maps alone, and adds them to the weights at the end. ``early_stopping`` is the number of
    validations without improvement after which a run ends and keeps its best weights.
    """

    student: StudentSettings | None = field(default_factory=StudentSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    data: str = DEFAULT_DATA
    sequence_column: str | None = None
    teacher_model: str | None = DEFAULT_TEACHER
    tokenizer: str | None = None
    layout: str | None = None
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
    lora_rank: int | None = None
    skip_loss_spikes: float | None = None
    early_stopping: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        check_fields(self)
        if self.other_learning_rate is not None and self.optimizer != "muon":
            raise ValueError("--other_learning_rate: needs --optimizer muon")
        if self.tokenizer is not None and (self.loss.alpha != 1 or self.init_from is not None):
            raise ValueError(
                "--tokenizer: is for training from random weights without a teacher: give "
                "--alpha 1, and no --init_from"
            )

    @property
    def shape(self) -> StudentSettings:
        """The student's shape, of settings that have one."""
        assert self.student is not None
        return self.student


DEFAULTS = TrainSettings()
ADDED_LATER = (
    "early_stopping",
    "layout",
    "lora_rank",
    "optimizer",
    "other_learning_rate",
    "sequence_column",
    "tokenizer",
)
"""Settings that older records lack."""


def as_recorded(settings: TrainSettings) -> dict[str, Any]:
    """Return settings as a record holds them; runs with equal records are the same run.

    Settings of ``ADDED_LATER`` are left out at their defaults, so that records made before such a
    setting existed, and hashes of them, are those of the same run.
    """
    record = asdict(settings)
    for name in ADDED_LATER:
        if record[name] == getattr(DEFAULTS, name):
            del record[name]
    return record


def default_run_name(settings: TrainSettings) -> str:
    """Return the name of a run's directory: its main settings, then a suffix for each other choice.

    ``protgpt2-distilled-t2.0-a0.5-l4-h4-e256-p0.1-lr1e-03.uniprot`` is the run of the defaults.
    """
    student, loss = settings.student, settings.loss
    weighting = "" if loss.weighting == "published" else f"-{loss.weighting}"
    smoothing = "" if loss.smoothing == "published" else f"-{loss.smoothing}"
    factor = "" if loss.smoothing_factor == 0.1 else f"{loss.smoothing_factor}"
    shape, dropout = "", 0.0
    if student is not None:
        shape = f"-l{student.n_layer}-h{student.n_head}-e{student.n_embd}"
        dropout = student.dropout
    taught = settings.teacher_model is not None
    suffixes = (
        (loss.use_uncertainty_weighting, f"uncertainty{weighting}"),
        (loss.use_calibration_smoothing, f"calibration{factor}{smoothing}"),
        (loss.divergence != "forward_kl", f"{loss.divergence}{loss.divergence_weight}"),
        (settings.seed != DEFAULTS.seed, f"s{settings.seed:g}"),
        (
            settings.num_train_epochs != DEFAULTS.num_train_epochs,
            f"ep{settings.num_train_epochs:g}",
        ),
        (settings.max_steps != DEFAULTS.max_steps, f"steps{settings.max_steps:g}"),
        (settings.optimizer != DEFAULTS.optimizer, settings.optimizer),
        (settings.early_stopping, f"stop{settings.early_stopping}"),
        (dropout, f"drop{dropout}"),
        (settings.init_from, f"init-{_last_part(settings.init_from)}"),
        (not taught, "untaught"),
        (
            taught and settings.teacher_model != DEFAULT_TEACHER,
            f"from-{_last_part(settings.teacher_model)}",
        ),
    )
    name = (
        f"protgpt2-distilled-t{loss.temperature}-a{loss.alpha}{shape}"
        f"-p{settings.train_size_prop}-lr{settings.learning_rate:.0e}.uniprot"
    )
    return "-".join([name, *(suffix for wanted, suffix in suffixes if wanted)])


def _last_part(name: str | None) -> str:
    """Return the last part of a path or hub id."""
    return (name or "").rstrip("/").split("/")[-1]


def derived_steps(settings: TrainSettings, steps: int, evaluations: int = 10) -> dict[str, int]:
    """Return warm-up, evaluation, saving and logging steps for a run of ``steps`` steps.

    Where a setting is None, warm-up is 5 % of the steps but at most 500, and there are
    ``evaluations`` evaluations and ten checkpoints. There are always fifty lines of log.
    """
    tenth = max(1, math.ceil(steps / 10))
    warmup = settings.warmup_steps
    return {
        "warmup_steps": min(500, math.ceil(0.05 * steps)) if warmup is None else warmup,
        "eval_steps": settings.eval_steps or max(1, math.ceil(steps / evaluations)),
        "save_steps": settings.save_steps or tenth,
        "logging_steps": max(1, steps // 50),
    }
