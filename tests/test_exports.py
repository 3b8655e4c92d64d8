"""Other runtimes give a protein the log-probabilities of PyTorch, or the export is not kept."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace

import numpy as np
import pytest

from src.publishing import exports as x
from tools.export import main

PACKAGES = {"ctranslate2": ("ctranslate2",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


def needs(runtime):
    there = all(importlib.util.find_spec(name) for name in PACKAGES[runtime])
    return pytest.mark.skipif(not there, reason=f"needs {' '.join(PACKAGES[runtime])}")


@pytest.fixture
def folder(tmp_path, tiny_lm, saved_model, random_proteins):
    saved_model(tmp_path / "model", tiny_lm(vocab_size=70))
    text = "".join(f">p{i}\n{p}\n" for i, p in enumerate(random_proteins(6, 20, 90)))
    (tmp_path / "in.fasta").write_text(text)
    return tmp_path


def run(folder, *options):
    given = ["--model", folder / "model", "--data", folder / "in.fasta"]
    return main([str(a) for a in [*given, "--output", folder / "out", *options]])


@pytest.mark.parametrize("runtime", [pytest.param(r, marks=needs(r)) for r in PACKAGES])
def test_an_export_is_the_same_model(folder, capsys, runtime):
    assert run(folder, "--to", runtime) == 0
    shown = capsys.readouterr().out
    found = re.search(r"log-probability ([\d.e-]+) nats, KL", shown)
    assert found is not None
    assert float(found[1]) < 1e-3
    assert "6 proteins" in shown
    assert re.search(r"^sampled there: [A-Z]+$", shown, flags=re.MULTILINE)
    assert (folder / "out").exists()
    assert run(folder, "--to", runtime) == 2


@needs("ctranslate2")
def test_int8_tells_what_it_costs(folder, capsys):
    assert run(folder, "--to", "ctranslate2", "--int8") == 0
    assert "perplexity x" in capsys.readouterr().out


@needs("ctranslate2")
def test_an_export_that_differs_is_not_kept(folder, refusal, monkeypatch):
    real = x.ctranslate2_log_probs

    def wrong(path):
        log_probs = real(path)
        return lambda ids: log_probs(ids) - 0.01

    monkeypatch.setattr(x, "ctranslate2_log_probs", wrong)
    assert "the export was not kept" in refusal(run(folder, "--to", "ctranslate2"))
    assert sorted(p.name for p in folder.iterdir()) == ["in.fasta", "model"]


def test_a_model_that_states_no_longest_input_is_exported(folder, monkeypatch):
    """PyTorch itself stands in for the other runtime."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=70, hidden_size=16, n_layer=1, n_head=2, eos_token_id=0)
    model = BloomForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    monkeypatch.setattr(x, "to_onnx", lambda model, path: path.write_text(""))
    monkeypatch.setattr(x, "onnx_log_probs", lambda path: x.torch_log_probs(model))
    lengths = []
    monkeypatch.setattr(x, "sample_protein", lambda draw, tokenizer, n: lengths.append(n))
    assert run(folder, "--to", "onnx") == 0
    assert lengths == [x.SAMPLED_TOKENS]


def test_a_missing_package_is_named(folder, refusal, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(x, "importlib", SimpleNamespace(import_module=missing))
    message = refusal(run(folder, "--to", "ctranslate2"))
    assert "this needs ctranslate2: pip install ctranslate2" in message


def test_the_comparison_is_that_of_two_distributions(tiny_tokenizer):
    first, second = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])

    def log_probs(row):
        return lambda ids: np.pad(
            np.tile(row, (len(ids) - 1, 1)), ((0, 0), (0, 61)), constant_values=-800.0
        )

    ids = tiny_tokenizer("<|endoftext|>\nM\n<|endoftext|>")["input_ids"]
    found = x.compare(log_probs(first), log_probs(second), tiny_tokenizer, ["M"])
    assert found["tokens"] == len(ids) - 1
    assert found["kl"] == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    expected = [float((first - second)[i]) if i < 3 else 0.0 for i in ids[1:]]
    assert found["largest_difference"] == pytest.approx(max(map(abs, expected)))
    assert found["nll"] - found["reference_nll"] == pytest.approx(np.mean(expected))


def test_nothing_to_compare_is_one_line(tiny_tokenizer):
    with pytest.raises(ValueError, match="no protein fits the model"):
        x.compare(lambda ids: np.zeros(0), lambda ids: np.zeros(0), tiny_tokenizer, [])


def test_a_stepwise_sample_follows_the_runtime(tiny_tokenizer):
    """A runtime that gives the next token of a text all the probability spells that text."""
    text = tiny_tokenizer("<|endoftext|>\nMKVLA\n<|endoftext|>")["input_ids"]
    calls = []

    def log_probs(ids):
        calls.append(len(ids))
        rows = np.full((len(ids) - 1, 64), -800.0)
        rows[np.arange(len(rows)), text[1 : len(ids)]] = 0.0
        return rows

    draw = x.stepwise_draw(log_probs, text[-1])
    assert x.sample_protein(draw, tiny_tokenizer) == "MKVLA"
    assert calls[-1] == len(text)
    assert x.sample_protein(draw, tiny_tokenizer, longest=len(text) - 1) == ""
    empty = x.stepwise_draw(log_probs, text[-1])
    text[2:] = text[-1:] * (len(text) - 2)  # it ends before the first residue
    with pytest.raises(ValueError, match="no protein among 20 samples that ended"):
        x.sample_protein(empty, tiny_tokenizer)
