"""Layouts: the table, templates, tags, how a model's own is found, and that it is kept."""

from __future__ import annotations

import contextlib
import json
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from scripts import generate, score
from src.evaluation.embeddings import residue_embeddings
from src.evaluation.gates import residues_of_tokens
from src.evaluation.generation import (
    GenerationResult,
    GenerationSettings,
    Tally,
    sample_proteins,
)
from src.evaluation.scoring import score_proteins
from src.evaluation.sequence_quality import measure_generation
from src.evaluation.variants import windowed_nll
from src.models.loading import ProteinModel, load_tokenizer
from src.models.recognition import NATURAL, candidates, settle_layout
from src.proteins.encoding import Spelling, encode, tokenizer_fingerprint
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
    tag_in,
)
from src.proteins.sources import read_proteins
from src.proteins.tokens import tokenise

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


ROWS = [
    {"id": "a", "EC": "3.2.1.17; 3.4.24.-", "sequence": "MKVLA"},
    {"id": "b", "EC": None, "sequence": "MKVLL"},
    {"id": "c", "EC": "1.1.1.1", "sequence": "MKVLT"},
]


@pytest.mark.parametrize("form", ["fasta", "csv", "parquet", "jsonl", "hub"])
def test_tags_come_from_headers_and_columns(form, tmp_path, monkeypatch):
    tokenizer = loaded("zymctrl", tmp_path / "model")
    path: Any = tmp_path / f"proteins.{form}"
    if form == "fasta":
        path.write_text(">a EC=3.2.1.17 lysozyme\nMKVLA\n>b\nMKVLL\n>c x EC=1.1.1.1\nMKVLT\n")
    elif form == "csv":
        path.write_text("id,ec,sequence\na,3.2.1.17,MKVLA\nb,,MKVLL\nc,1.1.1.1,MKVLT\n")
    elif form == "parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        path = "owner/enzymes"
        monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: ROWS)
        monkeypatch.setattr("datasets.get_dataset_split_names", lambda name: ["train"])
    stored = tokenise(path, None, tokenizer, 64, tmp_path / "cache", quiet=True)
    decoded = [str(tokenizer.decode(stored[i])) for i in range(len(stored))]
    assert [text.replace(" ", "") for text in decoded] == [
        "3.2.1.17<sep><start>MKVLA<end>",
        "1.1.1.1<sep><start>MKVLT<end>",
    ]
    (dropped,) = stored.report.dropped
    assert "EC" in dropped
    assert stored.residues.tolist() == [5, 5]


def test_letters_of_a_tag_are_no_residues(tmp_path):
    """BRENDA's preliminary numbers have a B; a tag may be a word."""
    tokenizer = loaded("zymctrl", tmp_path)
    protein = TaggedProtein("MKVLA", "3.4.21.B8")
    (ids,) = encode(tokenizer, [protein])
    spelling = Spelling(tokenizer)
    assert spelling.sizes(ids).tolist() == [0] * 11 + [1] * 5 + [0]
    assert spelling.spells(ids, protein)
    assert not spelling.spells(encode(tokenizer, [TaggedProtein("MKVLA", "?")])[0], protein)
    path = tmp_path / "p.fasta"
    path.write_text(">a EC=3.4.21.B8\nMKVLA\n>b EC=3.4.21.?\nMKVLT\n")
    stored = tokenise(path, None, tokenizer, 64, tmp_path / "cache", quiet=True)
    assert stored.residues.tolist() == [5]
    assert stored.sequence(0) == "MKVLA"
    assert stored.report.dropped["residues, or a tag, that the tokenizer does not know"] == {
        "count": 1,
        "first": "b",
    }
    model = model_of(tokenizer)
    scores = score_proteins(model, tokenizer, [protein, TaggedProtein("MKVLA", "?")])
    assert np.isfinite(scores.nll[0])
    assert np.isnan(scores.nll[1])
    ((_, vectors),) = residue_embeddings(ProteinModel(model, tokenizer), [protein])
    assert len(vectors) == 5
    long = TaggedProtein("MKVLA" * 80, "3.4.21.B8")
    found = windowed_nll(ProteinModel(model, tokenizer), [long, protein])
    assert np.isfinite(found).all()
    (whole,) = score_proteins(model, tokenizer, [protein]).nll
    assert found[1] == pytest.approx(whole, rel=1e-5)


def test_tags_of_one_token_need_no_letters(tmp_path):
    """Such as ProGen2's families: one token, whose name holds the digit of the marker."""
    vocabulary = ["<|pf01101|>", *KINDS["progen"][0]]
    KINDS["families"] = (vocabulary, None, None)
    try:
        tokenizer_of("families").save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path, layout="{family}1{residues}2")
    finally:
        del KINDS["families"]
    layout = layout_of(tokenizer)
    protein = TaggedProtein("MKV", "<|pf01101|>")
    (ids,) = encode(tokenizer, [protein])
    assert Spelling(tokenizer).spells(ids, protein)
    read = layout.read(layout.text(protein))
    assert (read, getattr(read, "tag", "")) == ("MKV", "<|pf01101|>")
    with pytest.raises(ValueError, match="more than one protein"):
        layout.read(2 * layout.text(protein))


@pytest.fixture
def enzymes(tmp_path):
    """A model of enzymes, its tokenizer, and two proteins with one sequence and two tags."""
    folder = tmp_path / "model"
    tokenizer = loaded("zymctrl", folder)
    model = model_of(tokenizer)
    model.save_pretrained(folder)
    path = tmp_path / "enzymes.fasta"
    path.write_text(">a EC=3.2.1.17\nMKVLA\n>b EC=1.1.1.B1\nMKVLA\n>c\nMKVLT\n")
    return folder, model, tokenizer, path


def test_every_protein_is_scored_under_its_own_tag(enzymes, tmp_path, capsys):
    folder, model, tokenizer, path = enzymes
    tagged = [TaggedProtein("MKVLA", tag) for tag in ("3.2.1.17", "1.1.1.B1")]
    expected = [-score_proteins(model, tokenizer, [protein]).nll[0] for protein in tagged]
    assert abs(expected[0] - expected[1]) > 0.1
    out = tmp_path / "scores.csv"
    assert score.main(["--model", str(folder), "--input", str(path), "--output", str(out)]) == 0
    found = [line.split(",")[2] for line in out.read_text().splitlines()[1:]]
    assert [float(value) for value in found] == pytest.approx(expected, abs=1e-5)
    assert "dropped 1: no EC=... in the header" in capsys.readouterr().out
    table = tmp_path / "enzymes.csv"
    table.write_text("name,ec,sequence\na,3.2.1.17,MKVLA\nc,,MKVLT\nb,1.1.1.B1,MKVLA\n")
    out = tmp_path / "rows.csv"
    assert score.main(["--model", str(folder), "--input", str(table), "--output", str(out)]) == 0
    found = [line.split(",")[3] for line in out.read_text().splitlines()[1:]]
    assert found[1] == ""
    assert [float(found[0]), float(found[2])] == pytest.approx(expected, abs=1e-5)
    wild, scan = tmp_path / "wild.fasta", tmp_path / "scan.csv"
    wild.write_text(">a EC=3.2.1.17\nMKVLA\n")
    assert score.main([
        "--model", str(folder), "--wildtype", str(wild), "--mutants", "A5T", "--output", str(scan)
    ]) == 0  # fmt: skip
    mutant = -score_proteins(model, tokenizer, [TaggedProtein("MKVLT", "3.2.1.17")]).nll[0]
    assert float(scan.read_text().splitlines()[1].split(",")[2]) == pytest.approx(mutant, abs=1e-5)


def test_a_protein_keeps_its_tag_on_the_way_to_another_process():
    copied = pickle.loads(pickle.dumps(TaggedProtein("MK", "1.2")))
    assert (copied, copied.tag) == ("MK", "1.2")


def test_samples_have_a_tag_and_say_it(enzymes, tmp_path, capsys):
    folder, model, tokenizer, _ = enzymes
    out = tmp_path / "new.fasta"
    words = ["--model", str(folder), "--num_sequences", "3", "--max_length", "40"]
    words += ["--allow_unfinished", "--output", str(out)]
    assert generate.main(words) == 2
    assert "generate.py --tag" in capsys.readouterr().err
    assert generate.main([*words, "--tag", "1.?"]) == 2
    assert "--tag 1.?: the tokenizer does not know it" in capsys.readouterr().err
    assert generate.main([*words, "--tag", "1.1.1.B1"]) == 0
    read = list(read_proteins(out, tag="EC", keep_ambiguous=True))
    assert {entry.residues.tag for entry in read} == {"1.1.1.B1"}  # type: ignore[attr-defined]
    headers = [line for line in out.read_text().splitlines() if line.startswith(">")]
    costs = [float(h.split("perplexity_per_residue=")[1].split()[0]) for h in headers]
    scores = score_proteins(
        model, tokenizer, [e.residues for e in read], ["whole=yes" in h for h in headers]
    )
    assert scores.perplexity_per_residue == pytest.approx(costs, rel=1e-4)
    plain = tmp_path / "plain"
    model_of(tokenizer_of("plain")).save_pretrained(plain)
    tokenizer_of("plain").save_pretrained(plain)
    words[1] = str(plain)
    assert generate.main([*words, "--tag", "1.1.1.1", "--overwrite"]) == 2
    assert "--tag 1.1.1.1: the layout <s>{residues}</s> has none" in capsys.readouterr().err


def test_an_evaluation_samples_under_the_tags_of_natural_proteins(enzymes):
    _, model, tokenizer, _ = enzymes
    natural = [TaggedProtein("MKVLA" * n, "3.2.1.17" if n % 2 else "1.1.1.1") for n in (1, 2, 3)]
    results: dict[str, Any] = {"intervals": {}, "kl_from_natural": {}}
    sampled: list[tuple[str, int]] = []

    def sample(model, tokenizer, settings):
        sampled.append((settings.tag, settings.num_sequences))
        return GenerationResult([], Tally(), 1.0, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.evaluation.generation.sample_proteins", sample)
        with contextlib.suppress(Exception):
            measure_generation(results, {"student": model}, tokenizer, natural, 20)
    assert {tag for tag, _ in sampled} == {"3.2.1.17", "1.1.1.1"}
    assert sum(count for _, count in sampled) == 20


def test_templates():
    layout = Layout("<a>{kind}<start>\n{lines}\n<end>")
    protein = TaggedProtein("M" * 61, "X1")
    assert layout.text(protein) == f"<a>X1<start>\n{'M' * 60}\nM\n<end>"
    assert layout.prompt(TaggedProtein("MK", "X1")) == "<a>X1<start>\nMK"
    read = layout.read(layout.text(protein))
    assert (read, getattr(read, "tag", "")) == ("M" * 61, "X1")
    assert Layout("[CLS] {spaced} [SEP]").text("MKV") == "[CLS] M K V [SEP]"
    assert tag_in("sp|P1 EC=1.2.3.- OS=x", "EC") == "1.2.3.-"
    assert tag_in("sp|P1 REC=1", "EC") == ""


@pytest.mark.parametrize(
    "template",
    ["", "MKV", "{begin}{end}", "{residues}{lines}", "{a}{b}{residues}", "{a}{residues}"],
)
def test_templates_that_are_none(template):
    with pytest.raises(ValueError, match="--layout .*needs {residues} once"):
        Layout(template)


def test_a_template_that_the_tokenizer_cannot_write(tmp_path):
    tokenizer_of("plain").save_pretrained(tmp_path)
    assert layout_of(load_tokenizer(tmp_path, layout="plain")).name == "<s>{residues}</s>"
    with pytest.raises(ValueError, match="has no tokens for it"):
        load_tokenizer(tmp_path, layout="<start>{residues}<end>")


def test_a_layout_that_the_user_states_is_kept(tmp_path, tiny_tokenizer, monkeypatch):
    """Even where natural proteins cost less in another one."""
    tiny_tokenizer.save_pretrained(tmp_path / "given")
    tokenizer = load_tokenizer(tmp_path / "given", layout="protgpt2")
    monkeypatch.setattr(
        "src.models.recognition.nats_per_residue",
        lambda model, tokenizer, layout: np.full(4, 3.0 if layout == PROTGPT2 else 1.0),
    )
    assert settle_layout(model_of(tokenizer), tokenizer, print) == PROTGPT2
    tokenizer.save_pretrained(tmp_path / "student")
    again = load_tokenizer(tmp_path / "student")
    assert settle_layout(model_of(again), again, print) == PROTGPT2
    unstated = load_tokenizer(tmp_path / "given")
    assert settle_layout(model_of(unstated), unstated, print) != PROTGPT2


@pytest.mark.parametrize("layout", ["progen", "zymctrl", "<cls>{residues}<eos>"])
def test_markers_that_a_tokenizer_leaves_out_are_refused(layout, tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokens for it"):
        load_tokenizer(tmp_path, layout=layout)
