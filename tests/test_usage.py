"""The code of a model card lays proteins out as the project does, whatever the layout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from src.proteins.layouts import TaggedProtein, layout_of, set_layout, spelt_out, stop_token
from src.publishing.usage import Usage
from tests.test_layouts import KINDS, tokenizer_of

PROTEIN = "MKVLAAGIAVWHERE".replace("WHERE", "QFT") * 9
CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)


def usage_of(kind: str, layout: str | None = None):
    tokenizer = tokenizer_of(kind)
    set_layout(tokenizer, spelt_out(layout or kind, tokenizer))
    return tokenizer, Usage.of(tokenizer, CONFIG)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, None) for kind in KINDS),
        ("plain", "spaced"),
        ("plain", "{begin}\\n{lines}{end}"),
        ("zymctrl", "<start>{EC}<sep>{residues}<end>"),
    ],
)
def test_the_code_on_a_card_gives_the_layout(kind, layout):
    tokenizer, usage = usage_of(kind, layout)
    known = {"residues": PROTEIN, "tag": usage.example_tag}
    protein = TaggedProtein(PROTEIN, str(usage.example_tag))
    assert eval(usage.text, known) == layout_of(tokenizer).text(protein)
    assert eval(usage.prompt, known) == layout_of(tokenizer).prompt(protein[:0])
    assert usage.stop == stop_token(tokenizer)
    assert (usage.tag is None) == ("EC" not in layout_of(tokenizer).template)


def test_protgpt2_is_named_and_others_are_shown(tiny_tokenizer):
    gpt2 = SimpleNamespace(model_type="gpt2", n_positions=256, max_position_embeddings=256)
    usage = Usage.of(tiny_tokenizer, gpt2)
    assert usage.kind == "GPT-2"
    assert usage.layout.startswith("the text of ProtGPT2")
    assert usage.prompt == '"<|endoftext|>\\n"'
    _, other = usage_of("progen")
    assert other.kind == "llama model"
    assert other.shape == "2 layers, 4 heads, 64 wide"
    assert "`1{residues}2`" in other.layout


def test_markers_that_a_tokenizer_adds_by_itself_are_not_added_twice():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("plain")
    assert not Usage.of(tokenizer, CONFIG).adds_markers
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    assert Usage.of(tokenizer, CONFIG).adds_markers


def test_a_layout_that_nothing_ends_is_refused():
    with pytest.raises(ValueError, match="nothing ends a protein: write its marker behind"):
        usage_of("progen", "1{residues}")
