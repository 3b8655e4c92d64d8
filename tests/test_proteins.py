"""The layout of a protein: what it is, and what it refuses."""

from __future__ import annotations

import pytest

from src.proteins.layouts import (
    AMBIGUOUS_RESIDUES,
    END_OF_TEXT,
    PROTEIN_LETTERS,
    PROTGPT2,
    STANDARD_RESIDUES,
    layout,
)


def test_alphabet():
    assert len(STANDARD_RESIDUES) == len(set(STANDARD_RESIDUES)) == 20
    assert set(STANDARD_RESIDUES + AMBIGUOUS_RESIDUES) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert set(STANDARD_RESIDUES + AMBIGUOUS_RESIDUES) == PROTEIN_LETTERS


def test_layout_by_hand():
    assert layout("M") == "<|endoftext|>\nM\n<|endoftext|>"
    assert layout("M" * 61) == f"<|endoftext|>\n{'M' * 60}\nM\n<|endoftext|>"
    assert layout("M" * 120) == f"<|endoftext|>\n{'M' * 60}\n{'M' * 60}\n<|endoftext|>"


@pytest.mark.parametrize("length", [1, 59, 60, 61, 120])
def test_prompts_begin_the_layout(length):
    residues = "ACDEFGHIKLMNPQRSTVWY" * 6
    whole, prompt = layout(residues), PROTGPT2.prompt(residues[:length])
    assert whole.startswith(prompt)
    assert prompt.endswith(residues[:length][-1])
    assert PROTGPT2.prompt() == f"{END_OF_TEXT}\n"


@pytest.mark.parametrize("residues", ["", "mkv", "MK V", "MK\nV", "MK*", "MK-V", "MÉ", "M1", "ſ"])
def test_what_layout_refuses(residues):
    with pytest.raises(ValueError, match="residue"):
        layout(residues)


@pytest.mark.parametrize(
    ("text", "residues"),
    [
        ("MKV", "MKV"),
        ("MK\nV\n", "MKV"),
        (f"{END_OF_TEXT}\nMKV", "MKV"),
        (f"\nMKV\n{END_OF_TEXT}", "MKV"),
        (f"{END_OF_TEXT}\n{END_OF_TEXT}", ""),
        ("", ""),
        (f"{END_OF_TEXT}\nMKX\nU\n{END_OF_TEXT}", "MKXU"),
    ],
)
def test_reading_back(text, residues):
    assert PROTGPT2.read(text) == residues


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"MK{END_OF_TEXT}MV", "more than one protein"),
        ("MKv", "'v' is not a residue"),
        ("MK*", "is not a residue"),
        ("<|endoftex", "is not a residue"),
    ],
)
def test_what_reading_back_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        PROTGPT2.read(text)
