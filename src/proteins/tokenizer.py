"""Trains a byte-pair tokenizer on proteins in ProtGPT2's layout."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from src.proteins.layouts import END_OF_TEXT, layout

LETTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "Ċ"]
"""All letters, and the newline in byte-level BPE: as tokens they make every protein encodable."""


def train_tokenizer(
    proteins: Iterable[str], vocab_size: int, n_positions: int
) -> PreTrainedTokenizerFast:
    """Train a GPT-2 style byte-level BPE tokenizer on laid-out proteins.

    Args:
        proteins: residues of each protein.
        vocab_size: with the letters, the newline and the end-of-text marker; 28 is these alone.
        n_positions: the longest input of the model, recorded in the tokenizer.

    Returns:
        The tokenizer; its begin, end and padding token is the marker, as in GPT-2.

    Raises:
        ValueError: the vocabulary is too small for the letters.
    """
    if vocab_size < len(LETTERS) + 1:
        raise ValueError(f"--vocab_size must be at least {len(LETTERS) + 1}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=LETTERS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (layout(p).replace(END_OF_TEXT, "") for p in proteins), trainer=trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=n_positions,
        clean_up_tokenization_spaces=False,
    )
