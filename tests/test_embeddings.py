"""Embeddings: padded batches equal single proteins; parts; files; two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from scripts.embed import main
from src.evaluation import embeddings as e
from src.models.loading import ProteinModel
from src.proteins.layouts import layout

ROOT = Path(__file__).resolve().parents[1]


def alone(model, tokenizer, protein, layer):
    """Return the vectors of a protein's residues, letter by letter from the tokens' texts."""
    ids = tokenizer(layout(protein))["input_ids"]
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    pairs = [(c, state) for t, state in zip(tokens, states, strict=True) for c in t]
    letters = [(c, state) for c, state in pairs if "A" <= c <= "Z"]
    assert "".join(c for c, _ in letters) == protein
    return torch.stack([state for _, state in letters]).numpy()


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_a_padded_batch_equals_single_proteins(tiny_lm, tiny_tokenizer, random_proteins, layer):
    model = tiny_lm()
    proteins = [*random_proteins(9, 1, 130), "M", "MK"]
    settings = e.EmbeddingSettings(layer, batch_size=4)
    found = dict(e.residue_embeddings(ProteinModel(model, tiny_tokenizer), proteins, settings))
    assert sorted(found) == list(range(11))
    for i, protein in enumerate(proteins):
        expected = alone(model, tiny_tokenizer, protein, layer)
        np.testing.assert_allclose(found[i], expected, atol=2e-5)
        both = e.pooled(found[i])
        np.testing.assert_allclose(both["mean"], expected.mean(0), atol=2e-5)
        np.testing.assert_allclose(both["last"], expected[-1], atol=2e-5)
    for bad in (3, -4):
        with pytest.raises(ValueError, match="the model has layers 0 to 2"):
            list(
                e.residue_embeddings(
                    ProteinModel(model, tiny_tokenizer), ["M"], e.EmbeddingSettings(bad)
                )
            )
    with pytest.raises(ValueError, match=r"2,000 residues\) are longer than the model takes"):
        list(e.residue_embeddings(ProteinModel(model, tiny_tokenizer), ["A" * 2000]))


@pytest.fixture
def folder(tmp_path, saved_model, random_proteins, monkeypatch):
    monkeypatch.setattr(e, "PART", 4)
    saved_model(tmp_path / "model")
    proteins = [*random_proteins(10, 20, 90), "A" * 3000]
    text = "".join(f">p{i}\n{residues}\n" for i, residues in enumerate(proteins))
    (tmp_path / "in.fasta").write_text(text)
    return tmp_path


def run(folder, name, *options):
    given = ["--model", folder / "model", "--input", folder / "in.fasta", "--device", "cpu"]
    return main([str(a) for a in [*given, "--output", folder / name, *options]])


def test_files(folder, capsys):
    assert run(folder, "a.npz") == 0
    shown = capsys.readouterr().out
    assert "1 proteins, the first is p10, are longer than the model takes" in shown
    assert "10 proteins embedded" in shown
    assert run(folder, "a.parquet") == run(folder, "r.npz", "--per_residue") == 0
    assert run(folder, "r.parquet", "--per_residue", "--batch_size", 3) == 0
    assert not list(folder.glob("*.parts"))
    table = parquet.read_table(folder / "a.parquet").to_pydict()
    pooled, residues = np.load(folder / "a.npz"), np.load(folder / "r.npz")
    assert table["name"] == pooled["names"].tolist() == [f"p{i}" for i in range(10)]
    np.testing.assert_array_equal(np.array(table["mean"], np.float32), pooled["mean"])
    np.testing.assert_array_equal(np.array(table["last"], np.float32), pooled["last"])
    long = parquet.read_table(folder / "r.parquet").to_pydict()
    for i in range(10):
        vectors = residues["embeddings"][residues["offsets"][i] : residues["offsets"][i + 1]]
        assert len(vectors) == long["residues"][i] == pooled["residues"][i]
        np.testing.assert_allclose(vectors.mean(0), pooled["mean"][i], atol=1e-5)
        flat = np.array(long["embeddings"][i], np.float32).reshape(len(vectors), -1)
        np.testing.assert_allclose(flat, vectors, atol=1e-5)


def stopped_at(call, monkeypatch):
    """Interrupt the part of that number; return the list of the parts that were begun."""
    real, calls = e._arrays, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(e, "_arrays", stops)
    return calls


def test_a_stopped_run_goes_on(folder, capsys, monkeypatch):
    calls = stopped_at(3, monkeypatch)
    assert run(folder, "a.npz") == 130
    assert run(folder, "a.npz", "--layer", 1) == 2
    assert "parts of other settings" in capsys.readouterr().err
    assert run(folder, "a.npz") == 0
    assert "going on after 2 of 3 parts" in capsys.readouterr().out
    assert len(calls) == 4
    assert run(folder, "b.npz") == 0
    for name in ("mean", "last", "names"):
        np.testing.assert_array_equal(
            np.load(folder / "a.npz")[name], np.load(folder / "b.npz")[name]
        )


def test_a_stopped_run_goes_on_with_smaller_batches(folder, capsys, monkeypatch):
    stopped_at(2, monkeypatch)  # as when memory is short
    assert run(folder, "a.npz") == 130
    assert run(folder, "a.npz", "--batch_size", 1) == 0
    assert "going on after 1 of 3 parts" in capsys.readouterr().out
    assert run(folder, "b.npz") == 0
    for key, values in np.load(folder / "b.npz").items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(np.load(folder / "a.npz")[key], values, atol=1e-5)


def test_parts_of_another_column_are_not_used(folder, capsys, monkeypatch, random_proteins):
    """The file and the names are the same, the proteins are not."""
    pairs = zip(random_proteins(10, 20, 90), random_proteins(10, 20, 90, seed=9), strict=True)
    lines = [f"p{i},{heavy},{light}" for i, (heavy, light) in enumerate(pairs)]
    (folder / "in.csv").write_text("\n".join(["name,heavy,light", *lines]) + "\n")
    given = ["--input", folder / "in.csv", "--sequence_column"]
    stopped_at(3, monkeypatch)
    assert run(folder, "a.npz", *given, "heavy") == 130
    assert run(folder, "a.npz", *given, "light") == 2
    assert "other proteins" in capsys.readouterr().err
    assert run(folder, "a.npz", *given, "heavy") == 0


@pytest.mark.slow
def test_two_processes_share_the_proteins(folder):
    assert run(folder, "one.npz") == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; from src.evaluation import embeddings as e; e.PART = 4; "
        "from scripts.embed import main; sys.exit(main(sys.argv[1:]))"
    )
    given = ["--model", folder / "model", "--input", folder / "in.fasta", "--device", "cpu"]
    command = [sys.executable, "-c", code, *map(str, given), "--output", str(folder / "two.npz")]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE, text=True,
        )
        for r in (0, 1)
    ]  # fmt: skip
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "10 proteins embedded" in told[0]
    assert told[1] == ""
    one, two = np.load(folder / "one.npz"), np.load(folder / "two.npz")
    np.testing.assert_array_equal(one["mean"], two["mean"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", 7), "--layer 7: the model has layers 0 to 2"),
        (("--output", "x.csv"), "must end in .parquet or .npz"),
        (("--model", "./nowhere"), "there is no such directory"),
    ],
)
def test_errors_are_one_line(folder, refusal, options, message):
    assert message in refusal(run(folder, "a.npz", *options))
