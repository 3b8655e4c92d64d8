"""Between proteins and a tokenizer's tokens, and whether these spell those."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from src.proteins.layouts import PROTGPT2, Layout, layout_of

_MARKER = re.compile(r"<.*>|\[.*\]")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of the rules that decide a tokenizer's output on laid-out proteins."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # These two are changed by calls, and not used by tokenise().
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    parts = [rules, tokenizer.eos_token_id]
    if layout_of(tokenizer) != PROTGPT2:
        parts.append(layout_of(tokenizer).template)
    state = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()


def require_known(token: int, vocabulary: int) -> None:
    """Raise ``ValueError`` where a token has no place in a model's vocabulary."""
    if token >= vocabulary:
        raise ValueError("the tokenizer has more tokens than the model: is it another model's?")


def token_letters(tokenizer: Any) -> list[str]:
    """Return the residues of each token id; empty for markers and line breaks."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [
        ""
        if i in special or token is None or _MARKER.fullmatch(token)
        else "".join(c for c in token if "A" <= c <= "Z")
        for i, token in enumerate(tokens)
    ]


class Spelling:
    """Tells which tokens of a laid-out protein are residues: the letters of its tag are none.

    Attributes:
        letters: residues of each token id (:func:`token_letters`).
    """

    def __init__(self, tokenizer: Any, layout: Layout | None = None) -> None:
        self.letters = token_letters(tokenizer)
        self._counts = np.array([len(letters) for letters in self.letters], dtype=np.int64)
        self._unknown = tokenizer.unk_token_id
        layout = layout or layout_of(tokenizer)
        self._opening: list[int] = []
        if layout.tag is not None:
            self._opening = tokenizer(layout.opening, add_special_tokens=False)["input_ids"]

    def _start(self, row: Sequence[int] | np.ndarray) -> int:
        """Return where the residues begin: behind the last marker that opens them, or at the end.

        Without a tag that is the row's beginning.
        """
        if not self._opening:
            return 0
        size = len(self._opening)
        if len(row) < size:
            return len(row)
        openings = (sliding_window_view(np.asarray(row), size) == self._opening).all(-1)
        return int(np.flatnonzero(openings)[-1]) + size if openings.any() else len(row)

    def sizes(self, row: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the residues of each token of a row, ``(T,)``."""
        sizes = self._counts[row]
        sizes[: self._start(row)] = 0
        return sizes

    def spells(self, row: Sequence[int] | np.ndarray, residues: str) -> bool:
        """Return whether the tokens say all of a protein: its residues and its tag."""
        known = self._unknown in self._opening or self._unknown not in row[: self._start(row)]
        return bool(known) and int(self.sizes(row).sum()) == len(residues)


def encode(
    tokenizer: Any, proteins: Sequence[str], whole: Sequence[bool] | None = None
) -> list[list[int]]:
    """Return the token ids of laid-out proteins without padding.

    ``whole`` says of each whether its end is written; None: of all.
    """
    if not proteins:
        return []
    layout = layout_of(tokenizer)
    ends = [True] * len(proteins) if whole is None else whole
    return tokenizer(
        [layout.text(p) if w else layout.prompt(p) for p, w in zip(proteins, ends, strict=True)],
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the residues that tokens spell in the tokenizer's layout.

    Raises:
        ValueError: they are not the tokens of a laid-out protein.
    """
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return layout_of(tokenizer).read(text)


def require_layout(tokenizer: Any) -> None:
    """Raise ``ValueError`` where proteins are in ProtGPT2's layout and the markers are not."""
    if layout_of(tokenizer) != PROTGPT2:
        return
    marker = tokenizer.eos_token_id
    name = getattr(tokenizer, "name_or_path", "")
    ids = encode(tokenizer, ["M"])[0]
    if marker is None or not ids or ids[0] != marker or ids[-1] != marker:
        raise ValueError(
            f"{name or 'the tokenizer'}: does not take <|endoftext|> for its end-of-text token: "
            "proteins in ProtGPT2's layout need one that does"
        )
