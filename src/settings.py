"""The settings of students and losses: light to import, so that ``--help`` is quick.

Each dataclass checks itself; its ``ValueError`` names the flag.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_TEACHER = "nferruz/ProtGPT2"
DEFAULT_DATA = "nferruz/UR50_2021_04"
BUNDLED_TEACHER = "data/small_teacher"
BUNDLED_DATA = "data/proteins"
WEIGHTINGS = ("published", "mean_one", "inverse", "permuted", "matched")
SMOOTHINGS = ("published", "confident", "constant", "matched")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
LOSS_IMPLEMENTATIONS = ("fused", "reference")


@dataclass(frozen=True)
class LossSettings:
    """Everything that decides the loss. The two ``use_`` flags turn the enhancements on.

    Attributes:
        temperature: T > 0 of both softmaxes in the soft loss.
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
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")
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
        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
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
