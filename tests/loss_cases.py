"""What the tests of the loss share: random settings, and divergences that are not in the table."""

from __future__ import annotations

import dataclasses
import random

import pytest

from src.common import settings
from src.common.settings import DIVERGENCES, SMOOTHINGS, WEIGHTINGS, LossSettings
from src.loss import divergences


def random_settings(seed: int, **fixed) -> LossSettings:
    """Return settings that a seed draws, with some of them fixed."""
    rng = random.Random(seed * 7919 + 1)
    drawn = LossSettings(
        temperature=rng.choice([0.7, 1.0, 2.0, 2.0, 5.0]),
        alpha=rng.choice([0.0, 0.3, 0.5, 1.0]),
        use_uncertainty_weighting=rng.random() < 0.6,
        use_calibration_smoothing=rng.random() < 0.6,
        smoothing_factor=rng.choice([0.0, 0.01, 0.1, 0.5]),
        weighting=rng.choice(WEIGHTINGS),
        smoothing=rng.choice(SMOOTHINGS),
        divergence=rng.choice(DIVERGENCES),
        divergence_weight=rng.choice([0.1, 0.5, 0.8]),
    )
    return dataclasses.replace(drawn, **fixed)


def settings_with(
    monkeypatch: pytest.MonkeyPatch, name: str, entry: divergences.Divergence | None, **fixed
) -> LossSettings:
    """Return settings with a divergence of this name; without an entry the table lacks it."""
    monkeypatch.setitem(settings.CHOICES, "divergence", (*DIVERGENCES, name))
    if entry is not None:
        monkeypatch.setitem(divergences.TABLE, name, entry)
    return LossSettings(divergence=name, **fixed)
