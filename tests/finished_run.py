"""A finished model directory as ``scripts/train.py`` leaves it, made by a very small training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_proteins


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_lm, saved_model) -> Path:
    """A folder with ``teacher``, ``proteins.fasta`` and the finished run ``student``."""
    from src.common.settings import StudentSettings, TrainSettings
    from src.training.stages import train

    folder = tmp_path_factory.mktemp("finished")
    saved_model(folder / "teacher", tiny_lm(n_embd=32, initializer_range=0.02))
    proteins = make_proteins(200, seed=3)
    (folder / "proteins.fasta").write_text("".join(f">p{i}\n{p}\n" for i, p in enumerate(proteins)))
    settings = TrainSettings(
        student=StudentSettings(1, 2, 16),
        data=str(folder / "proteins.fasta"),
        teacher_model=str(folder / "teacher"),
        train_size_prop=1.0,
        max_steps=2,
        batch_size=4,
        max_length=128,
        validation_proteins=4,
    )
    train(
        settings,
        folder / "student",
        device_name="cpu",
        cache_dir=str(folder / "cache"),
        skip_teacher_check=True,
        announce=lambda line: None,
    )
    return folder
