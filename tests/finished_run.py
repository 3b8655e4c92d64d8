"""A finished model directory as ``scripts/train.py`` leaves it, made by a very small training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TINY_VOCABULARY, make_proteins


def make_teacher(folder: Path, tokenizer) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TINY_VOCABULARY,
        n_positions=256,
        n_layer=2,
        n_head=2,
        n_embd=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with ``teacher``, ``proteins.fasta`` and the finished run ``student``."""
    from src.common.settings import StudentSettings, TrainSettings
    from src.training.stages import train

    folder = tmp_path_factory.mktemp("finished")
    make_teacher(folder / "teacher", tiny_tokenizer)
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
