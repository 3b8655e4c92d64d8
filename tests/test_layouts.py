"""Layouts: the table, templates, tags, how a model's own is found, and that it is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from src.evaluation.gates import residues_of_tokens
from src.evaluation.generation import GenerationSettings, sample_proteins
from src.evaluation.likelihoods import score_proteins
from src.models.loading import load_tokenizer
from src.models.recognition import NATURAL, candidates, settle_layout
from src.proteins.layouts import (
    LAYOUTS,
    PROTGPT2,
    Layout,
    TaggedProtein,
    layout_of,
    set_layout,
    shuffled,
    spelt_out,
    stop_token,
    tagged,
)
from src.proteins.tokens import encode, tokenise, tokenizer_fingerprint

LETTERS = [*"ABCDEFGHIKLMNOPQRSTUVWXYZ"]
KINDS = {
    "plain": (["<pad>", "<unk>", "<s>", "</s>", *LETTERS], "</s>", "<s>"),
    "progen": (["<pad>", "<unk>", "<|bos|>", "<|eos|>", "1", "2", *LETTERS], None, None),
    "zymctrl": (
        ["<pad>", "<unk>", "<sep>", "<start>", "<end>", *"0123456789.-", *LETTERS],
        None,
        None,
    ),
}
"""Vocabulary, end and begin of letter-wise tokenizers like those of published models."""


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    vocabulary, end, begin = KINDS[kind]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    markers = [t for t in vocabulary if t.startswith("<")]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=end,
        bos_token=begin,
        additional_special_tokens=[m for m in markers if m not in ("<pad>", "<unk>", end, begin)],
        clean_up_tokenization_spaces=False,
    )


def loaded(kind: str, folder) -> PreTrainedTokenizerFast:
    tokenizer_of(kind).save_pretrained(folder)
    return load_tokenizer(folder)  # type: ignore[return-value]


def model_of(tokenizer, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2,
        bos_token_id=2, eos_token_id=3, initializer_range=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


EXPECTED = {
    "plain": "<s>MKV</s>",
    "progen": "1MKV2",
    "zymctrl": "3.2.1.17<sep><start>MKV<end>",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_is_found_from_the_tokenizer_and_kept(kind, tmp_path, capsys):
    tokenizer = loaded(kind, tmp_path / "given")
    layout = layout_of(tokenizer)
    protein = TaggedProtein("MKV", "3.2.1.17")
    assert layout.text(protein) == EXPECTED[kind]
    assert layout.read(layout.text(protein)) == "MKV"
    (ids,) = encode(tokenizer, [protein])
    assert tokenizer.unk_token_id not in ids
    read = residues_of_tokens([np.array(ids)], tokenizer)
    assert read == ["MKV"]
    assert layout.text(shuffled(read[0])).removesuffix(layout.parts[1])  # its tag is still there
    lines: list[str] = []
    settle_layout(model_of(tokenizer), tokenizer, lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("layout of proteins: ")
    tokenizer.save_pretrained(tmp_path / "student")
    again = load_tokenizer(tmp_path / "student")
    assert layout_of(again) == layout_of(tokenizer) == layout
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert again.convert_ids_to_tokens(stop_token(again)) == layout.parts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_samples_are_in_the_layout(kind, tmp_path):
    tokenizer = loaded(kind, tmp_path)
    model = model_of(tokenizer)
    if kind == "zymctrl":
        with pytest.raises(ValueError, match="needs EC of each protein"):
            score_proteins(model, tokenizer, ["MKVLA"])
        set_layout(tokenizer, spelt_out("1.1.1.1<sep><start>{residues}<end>", tokenizer))
    text = EXPECTED[kind].replace("3.2.1.17", "1.1.1.1").replace("MKV", "MKVLA")
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        own = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    assert score_proteins(model, tokenizer, ["MKVLA"]).nll == pytest.approx([-own.item()], rel=1e-5)
    result = sample_proteins(
        model, tokenizer, GenerationSettings(num_sequences=3, max_length=40, whole_only=False)
    )
    assert all(p.isalpha() and p.isupper() for p in result.sequences)


@pytest.mark.parametrize("name", ["protgpt2", "plain"])
def test_a_trained_model_chooses_between_two_layouts(name, tiny_tokenizer):
    """Its tokenizer can write both: natural proteins decide."""
    tokenizer = tiny_tokenizer
    assert [layout.name for layout in candidates(tokenizer)][0] == "protgpt2"
    template = spelt_out(LAYOUTS[name], tokenizer)
    model = model_of(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    rows = [
        torch.tensor([tokenizer(template.text(p), add_special_tokens=False)["input_ids"][:250]])
        for p in NATURAL
    ]
    for _ in range(25):
        for row in rows:
            optimizer.zero_grad()
            model(row, labels=row).loss.backward()
            optimizer.step()
    lines: list[str] = []
    try:
        assert settle_layout(model.eval(), tokenizer, lines.append) == template
    finally:
        set_layout(tokenizer, PROTGPT2)
    assert len(lines) == (name != "protgpt2")


@pytest.mark.parametrize("form", ["fasta", "csv"])
def test_tags_come_from_headers_and_columns(form, tmp_path):
    tokenizer = loaded("zymctrl", tmp_path / "model")
    path = tmp_path / f"proteins.{form}"
    if form == "fasta":
        path.write_text(">a EC=3.2.1.17 lysozyme\nMKVLA\n>b\nMKVLL\n>c x EC=1.1.1.1\nMKVLT\n")
    else:
        path.write_text("id,ec,sequence\na,3.2.1.17,MKVLA\nb,,MKVLL\nc,1.1.1.1,MKVLT\n")
    stored = tokenise(path, None, tokenizer, 64, tmp_path / "cache", quiet=True)
    decoded = [str(tokenizer.decode(stored[i])) for i in range(len(stored))]
    assert [text.replace(" ", "") for text in decoded] == [
        "3.2.1.17<sep><start>MKVLA<end>",
        "1.1.1.1<sep><start>MKVLT<end>",
    ]
    (dropped,) = stored.report.dropped
    assert "EC" in dropped
    assert stored.residues.tolist() == [5, 5]


def test_templates():
    layout = Layout("<a>{kind}<start>\n{lines}\n<end>")
    protein = TaggedProtein("M" * 61, "X1")
    assert layout.text(protein) == f"<a>X1<start>\n{'M' * 60}\nM\n<end>"
    assert layout.prompt(TaggedProtein("MK", "X1")) == "<a>X1<start>\nMK"
    read = layout.read(layout.text(protein))
    assert (read, getattr(read, "tag", "")) == ("M" * 61, "X1")
    assert Layout("[CLS] {spaced} [SEP]").text("MKV") == "[CLS] M K V [SEP]"
    assert tagged("MKV", "EC", "sp|P1 EC=1.2.3.- OS=x").tag == "1.2.3.-"  # type: ignore[union-attr]
    assert tagged("MKV", "EC", "sp|P1 REC=1") is None


@pytest.mark.parametrize(
    "template", ["", "MKV", "{begin}{end}", "{residues}{lines}", "{a}{b}{residues}"]
)
def test_templates_that_are_none(template):
    with pytest.raises(ValueError, match="--layout .*needs {residues} once"):
        Layout(template)


def test_a_template_that_the_tokenizer_cannot_write(tmp_path):
    tokenizer_of("plain").save_pretrained(tmp_path)
    assert layout_of(load_tokenizer(tmp_path, layout="plain")).name == "<s>{residues}</s>"
    with pytest.raises(ValueError, match="has no tokens for it"):
        load_tokenizer(tmp_path, layout="<start>{residues}<end>")
