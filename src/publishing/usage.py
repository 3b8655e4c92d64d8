"""How a model is used with transformers alone: its layout as Python code, for the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from src.evaluation.sampler import suited_penalty
from src.models.forward import stated_positions
from src.proteins.encoding import token_letters
from src.proteins.layouts import PROTGPT2, RESIDUES_PER_LINE, Layout, layout_of, stop_token

LAYOUT_IN_WORDS = {
    "lines": f"one-letter residues with a newline after each {RESIDUES_PER_LINE}",
    "spaced": "one-letter residues with spaces between them",
    "residues": "one-letter residues",
}
BODY_IN_PYTHON = {
    "lines": '"\\n".join(residues[i : i + N] for i in range(0, len(residues), N))'.replace(
        "N", str(RESIDUES_PER_LINE)
    ),
    "spaced": '" ".join(residues)',
    "residues": "residues",
}
EXAMPLE_TAGS = {"EC": "3.2.1.17"}
"""Values of tags for examples; EC 3.2.1.17 are lysozymes."""


@dataclass(frozen=True)
class Usage:
    """What the card's text and code say of a model and its tokenizer.

    Attributes:
        kind: of model, such as ``GPT-2``.
        shape: blocks, heads and width, as far as the configuration states them.
        layout: in words.
        tag: name of the layout's tag, or None.
        example_tag: a value of it.
        prompt: Python code for the beginning of a protein.
        text: Python code for a whole protein with the residues ``residues``.
        end: text that ends a protein.
        stop: token that ends a protein.
        adds_markers: the tokenizer adds markers by itself, which the layout has already.
        penalty: repetition penalty that suits the tokens.
        n_positions: longest input in tokens, None where there is no limit.
    """

    kind: str
    shape: str
    layout: str
    tag: str | None
    example_tag: str | None
    prompt: str
    text: str
    end: str
    stop: int
    adds_markers: bool
    penalty: float
    n_positions: int | None

    @classmethod
    def of(cls, tokenizer: Any, config: Any) -> Usage:
        """Return how a model is used."""
        layout = layout_of(tokenizer)
        prompt = _before(layout)
        plain, marked = (
            tokenizer("M", add_special_tokens=added)["input_ids"] for added in (False, True)
        )
        return cls(
            kind="GPT-2" if config.model_type == "gpt2" else f"{config.model_type} model",
            shape=_shape(config),
            layout=_in_words(layout),
            tag=layout.tag,
            example_tag=EXAMPLE_TAGS.get(layout.tag or "", "value"),
            prompt=prompt,
            text=" + ".join(
                filter(None, (prompt, BODY_IN_PYTHON[layout.body], _literal(layout.parts[1])))
            ),
            end=layout.parts[1].strip(),
            stop=stop_token(tokenizer),
            adds_markers=plain != marked,
            penalty=suited_penalty(token_letters(tokenizer)),
            n_positions=stated_positions(config),
        )


def _literal(text: str) -> str:
    """Return Python code for a text in double quotes; empty for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _before(layout: Layout) -> str:
    """Return Python code for what stands before the residues."""
    if layout.tag is None:
        return _literal(layout.parts[0]) or '""'
    front, _, opening = layout.parts[0].partition(f"{{{layout.tag}}}")
    return " + ".join(filter(None, (_literal(front), "tag", _literal(opening))))


def _shape(config: Any) -> str:
    """Return blocks, heads and width of a configuration, those that it states."""
    names = {
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "wide": "hidden_size",
    }
    stated = {word: getattr(config, name, None) for word, name in names.items()}
    return ", ".join(f"{value} {word}" for word, value in stated.items() if value is not None)


def _in_words(layout: Layout) -> str:
    if layout == PROTGPT2:
        return (
            "the text of ProtGPT2: an end-of-text marker, a newline, and "
            f"{LAYOUT_IN_WORDS['lines']}"
        )
    template = layout.template.replace("\n", "\\n")
    tagged = f", after the {layout.tag} of the protein" if layout.tag else ""
    return f"proteins as `{template}`: {LAYOUT_IN_WORDS[layout.body]}{tagged}"
