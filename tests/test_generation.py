"""Sampling: the distribution, the warps, whole proteins, counts, seeds, batches, cache, scores."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from src.evaluation.draws import Warp, attempt_stream, likeliest, pick
from src.evaluation.filters import SEEN, TOO_CLOSE, Filters, banned_tokens
from src.evaluation.generation import Tally, fasta_records, perplexities, sample, sample_proteins
from src.evaluation.sampler import (
    EMPTY,
    NO_PROTEIN,
    TOO_LONG,
    TOO_SHORT,
    UNFINISHED,
    GeneratedProtein,
    GenerationSettings,
    Sampler,
)
from src.evaluation.scoring import score_proteins
from src.proteins.fasta import FastaRecord, fasta_text, format_header, write_fasta
from src.proteins.layouts import PROTGPT2, layout
from src.proteins.sources import read_proteins
from src.proteins.tokenizer import train_tokenizer


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer


@pytest.fixture
def model(tiny_lm):
    """Return a model in float64 that ends about one protein in twenty tokens."""
    return ending(tiny_lm(n_embd=24, seed=4), 2.0)


def ending(model, logit: float):
    """Add ``logit`` to the end token's wherever the model is, and make the model exact."""
    head = torch.nn.Linear(model.config.n_embd, model.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight * 0.5)
        head.bias.zero_()
        head.bias[0] = logit
    model.lm_head = head
    return model.double().eval()


def test_picked_tokens_follow_the_distribution():
    torch.manual_seed(0)
    scores = torch.randn(1, 12)
    scores[0, 3] = scores[0, 11] = -torch.inf
    uniforms = torch.rand(20_000, dtype=torch.float64)
    counts = torch.bincount(pick(scores.expand(20_000, 12), uniforms), minlength=12).numpy()
    expected = scores.softmax(-1)[0].double().numpy() * 20_000
    possible = expected > 0
    assert counts[~possible].sum() == 0
    expected = expected[possible] * counts.sum() / expected[possible].sum()
    assert chisquare(counts[possible], expected).pvalue > 0.001
    largest = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert pick(scores, largest).item() == 10  # never an excluded token
    scores[0, 0] = -torch.inf
    assert pick(scores, torch.zeros(1, dtype=torch.float64)).item() == 1


def test_the_first_tokens_of_1e5_attempts_follow_the_models_distribution(tiny_lm, tokenizer):
    model = ending(tiny_lm(n_embd=24, seed=4, n_positions=8), 2.0)
    settings = GenerationSettings(top_k=20, repetition_penalty=1.2, batch_size=5000, seed=3)
    counts = np.zeros(64, dtype=np.int64)
    with torch.inference_mode():
        for start in range(0, 100_000, 5000):
            sampler = Sampler(model, tokenizer, settings)
            sampler.next = start
            sampler.begin(5000, 100_000)
            rows = list(sampler.rows)
            sampler.step()
            counts += np.bincount([row.tokens[2] for row in rows], minlength=64)
        ids: Any = torch.tensor([tokenizer(PROTGPT2.prompt())["input_ids"]])
        library = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2), TopKLogitsWarper(20)])
        expected = library(ids, model(ids).logits[:, -1])[0].softmax(-1).numpy()
    possible = expected > 0
    assert possible.sum() == 20
    assert counts[~possible].sum() == 0
    assert counts.sum() == 100_000
    assert chisquare(counts[possible], expected[possible] * 1e5).pvalue > 0.001


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_one_likeliest_token_is_the_librarys_greedy_decoding(model, tokenizer, penalty):
    settings = GenerationSettings(
        num_sequences=1, top_k=1, repetition_penalty=penalty, whole_only=False, prompt="MK"
    )
    result = sample_proteins(model, tokenizer, settings)
    prompt = torch.tensor([tokenizer(PROTGPT2.prompt("MK"))["input_ids"]])
    greedy: Any = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_length=256,
        repetition_penalty=penalty, pad_token_id=0,
    )  # fmt: skip
    text = tokenizer.decode(greedy[0]).replace("<|endoftext|>", "").replace("\n", "")
    assert result.sequences == [text]


@pytest.mark.parametrize("size", [64, 5000])
@pytest.mark.parametrize(
    "warp",
    [Warp(1.3, 0.7, 10, 0.8), Warp(top_k=50), Warp(1.2, 1.0, 950), Warp(top_p=0.5), Warp()],
    ids=str,
)
def test_warps_are_the_librarys_in_its_order(size, warp):
    torch.manual_seed(1)
    ids: Any = torch.randint(0, size, (3, 9))
    logits = torch.randn(3, size)
    if warp.top_p == 1:  # of equal ones, which top p leaves is chance
        logits[1, 5:9] = logits[1].topk(10).values[-1]  # equal to the tenth
    logits[2, : size // 2] = -torch.inf
    library = LogitsProcessorList()
    if warp.repetition_penalty != 1.0:
        library.append(RepetitionPenaltyLogitsProcessor(warp.repetition_penalty))
    library.append(TemperatureLogitsWarper(warp.temperature))
    if warp.top_k:
        library.append(TopKLogitsWarper(warp.top_k))
    library.append(TopPLogitsWarper(warp.top_p))
    expected = library(ids, logits.clone()).softmax(-1)  # type: ignore[arg-type]
    scores, columns = warp(logits.clone(), ids)
    found = scores.softmax(-1)
    if columns is not None:
        assert columns.shape[1] < size
        assert all((row[: k + 1].diff() > 0).all() for row, k in _real(columns, scores))
        found = torch.zeros(3, size).scatter_add_(1, columns, found)
    torch.testing.assert_close(found, expected)
    levels = torch.rand(3, dtype=torch.float64)
    drawn = pick(scores, levels)
    drawn = drawn if columns is None else columns.gather(1, drawn[:, None])[:, 0]
    assert drawn.tolist() == pick(library(ids, logits.clone()), levels).tolist()  # type: ignore[arg-type]


def _real(columns, scores):
    """Return each row of ids with the place of the last candidate that is possible."""
    return [
        (row, int((values > -torch.inf).nonzero()[-1]))
        for row, values in zip(columns, scores, strict=True)
    ]


def test_the_largest_scores_of_long_and_short_rows():
    torch.manual_seed(2)
    for size in (30, 4096, 4097, 20_011):
        scores = torch.randn(5, size)
        for k in (1, 7, 29, size - 1):
            kept, ids = likeliest(scores, k)
            if ids is not None:
                kept = torch.full_like(scores, -torch.inf).scatter_reduce_(1, ids, kept, "amax")
            least = scores.topk(k).values[:, -1:]
            expected = scores.masked_fill(scores < least, -torch.inf)
            assert torch.equal(kept, expected), (size, k)


@pytest.mark.parametrize("prompt", ["", "MKTAYIAKQRQISFVKSHFSRQ"])
def test_batches_do_not_change_what_is_sampled(model, tokenizer, prompt):
    """Slots are refilled, made fewer and more; every protein is the one of its attempt alone."""
    found = []
    for batch in (1, 3, 8, 64):
        settings = GenerationSettings(
            num_sequences=14, batch_size=batch, seed=5, min_length=30, max_length=150, prompt=prompt
        )
        result = sample_proteins(model, tokenizer, settings)
        tally = result.tally
        tally.tokens = 0  # it depends on the batch
        found.append((result.proteins, tally))
        assert len(result.proteins) == 14
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0][1].discarded  # some were discarded, or nothing was tested
    assert all(s.startswith(prompt) for s in [p.residues for p in found[0][0]])


def test_another_seed_gives_other_proteins(model, tokenizer):
    first, again, other = (
        sample_proteins(model, tokenizer, GenerationSettings(num_sequences=3, seed=seed)).sequences
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_dropout_is_off_for_the_while(tiny_lm, tokenizer):
    settings = GenerationSettings(num_sequences=3, whole_only=False, max_length=30)
    found = []
    for training in (False, True):
        dropping = ending(tiny_lm(embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5), 2.0)
        dropping.train(training)
        found.append(sample_proteins(dropping, tokenizer, settings).proteins)
        assert dropping.training == training
    assert found[0] == found[1]


def test_the_penalty_suits_the_tokens(model, tokenizer):
    """Where tokens are single residues, all of them occur soon: there is nothing to penalise."""
    letters = train_tokenizer(["MKV"], 28, 256)
    wanted = GenerationSettings(num_sequences=2, whole_only=False, max_length=20)
    assert wanted.suited(letters).repetition_penalty == 1.0
    assert wanted.suited(tokenizer).repetition_penalty == 1.2
    assert replace(wanted, repetition_penalty=1.1).suited(letters).repetition_penalty == 1.1
    result = sample_proteins(model, tokenizer, wanted)
    assert result.settings.repetition_penalty == 1.2
    given = replace(wanted, repetition_penalty=1.2)
    assert sample_proteins(model, tokenizer, given).sequences == result.sequences


def test_cached_steps_equal_uncached_ones(model, tokenizer):
    """Each protein, found with slots and cache, is the one that full passes find."""
    settings = GenerationSettings(num_sequences=6, seed=11, top_k=20, batch_size=2)
    warp = Warp(1.2, settings.temperature, settings.top_k)
    for protein in sample_proteins(model, tokenizer, settings).proteins:
        ids: Any = torch.tensor([tokenizer(PROTGPT2.prompt())["input_ids"]])
        for level in torch.from_numpy(attempt_stream(11, protein.attempt, 256)):
            with torch.no_grad():
                scores, _ = warp(model(ids).logits[:, -1].float(), ids)
            ids = torch.cat([ids, pick(scores, level[None])[None]], -1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids[0]).replace("<|endoftext|>", "").replace("\n", "")
        assert text == protein.residues


def test_every_attempt_is_accounted_for(model, tokenizer):
    settings = GenerationSettings(num_sequences=12, min_length=8, max_length=25, batch_size=5)
    result = sample_proteins(model, tokenizer, settings)
    assert len(result.proteins) == 12
    assert result.tally.attempts == 12 + sum(result.tally.discarded.values())
    assert result.counts == {"attempts": result.tally.attempts, "kept": 12} | result.tally.discarded
    assert set(result.tally.discarded) <= {EMPTY, TOO_SHORT, TOO_LONG, UNFINISHED, NO_PROTEIN}
    assert {TOO_SHORT, TOO_LONG} <= set(result.tally.discarded)
    assert all(8 <= len(p.residues) <= 25 and p.whole for p in result.proteins)
    assert [p.attempt for p in result.proteins] == sorted(p.attempt for p in result.proteins)
    assert result.tally.tokens > sum(len(p.residues) for p in result.proteins) / 3
    assert not model.training


def test_short_proteins_are_not_preferred(model, tokenizer):
    """The ten first attempts are taken, not the ten that are done first of many."""
    few = GenerationSettings(num_sequences=10, batch_size=10, min_length=30, max_length=200)
    many = GenerationSettings(num_sequences=40, batch_size=40, min_length=30, max_length=200)
    first = sample_proteins(model, tokenizer, few).proteins
    assert first == sample_proteins(model, tokenizer, many).proteins[:10]


def test_banned_residues_never_come_though_tokens_hold_several(model, tokenizer):
    settings = GenerationSettings(num_sequences=40, ban_residues="CW", seed=1)
    free = GenerationSettings(num_sequences=40, seed=1)
    assert any(set(s) & set("CW") for s in sample_proteins(model, tokenizer, free).sequences)
    sequences = sample_proteins(model, tokenizer, settings).sequences
    assert len(sequences) == 40
    assert not any(set(s) & set("CW") for s in sequences)
    banned = banned_tokens(tokenizer, "C", 70)
    tokens = tokenizer.convert_ids_to_tokens(list(range(64)))
    assert banned[:64].tolist() == ["C" in token for token in tokens]
    assert not banned[64:].any()
    assert any("C" in token and len(token) > 1 for token in tokens)
    with pytest.raises(ValueError, match="--prompt holds C, which --ban_residues bans"):
        GenerationSettings(prompt="MC", ban_residues="CW")
    with pytest.raises(ValueError, match="--ban_residues: '-' is none of"):
        sample_proteins(model, tokenizer, GenerationSettings(ban_residues="-"))


def test_distinct_proteins_whatever_the_batch(model, tokenizer):
    """Of equal proteins the first attempt stays, though a later one may be done before it."""
    options: Any = {"max_length": 1, "whole_only": False, "num_sequences": 12, "seed": 2}
    found = []
    for batch in (1, 7, 40):
        result = sample_proteins(
            model, tokenizer, GenerationSettings(**options, batch_size=batch),
            Filters(distinct=True),
        )  # fmt: skip
        found.append((result.proteins, result.counts))
    assert found[0] == found[1] == found[2]
    assert len(set(result.sequences)) == 12
    every = GenerationSettings(**options | {"num_sequences": found[0][1]["attempts"]})
    alone = sample_proteins(model, tokenizer, every)
    assert list(dict.fromkeys(alone.sequences)) == result.sequences
    assert found[0][1][SEEN] > 0


def test_filters_judge_each_protein(model, tokenizer):
    settings = GenerationSettings(num_sequences=8, min_length=20)
    plain = sample_proteins(model, tokenizer, settings)
    known = [s[2:] for s in plain.sequences[:3]]
    result = sample_proteins(model, tokenizer, settings, Filters(max_identity=0.9, against=known))
    # The first three are 18 residues and more of a known one.
    close = [len(k) / (len(k) + 2) > 0.9 for k in known]
    assert any(close)
    kept = [s for s, c in zip(plain.sequences, [*close, *[False] * 5], strict=True) if not c]
    assert result.sequences[: len(kept)] == kept
    assert result.counts[TOO_CLOSE] == sum(close)


def test_the_generator_gives_the_same_proteins_and_may_be_left(model, tokenizer):
    settings = GenerationSettings(num_sequences=9, min_length=10, seed=4, batch_size=3)
    everything = sample_proteins(model, tokenizer, settings)
    tally = Tally()
    model.train()
    found = []
    for protein in sample(model, tokenizer, settings, tally=tally):
        assert not model.training
        found.append(protein)
        assert tally.kept == len(found)
        assert tally.attempts == protein.attempt + 1
        if len(found) == 5:
            break
    del protein
    assert found == everything.proteins[:5]
    iterator = sample(model, tokenizer, settings)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert model.training


def test_both_bounds_of_the_length_are_allowed(model, tokenizer):
    protein = sample_proteins(model, tokenizer, GenerationSettings(num_sequences=1)).proteins[0]
    size = len(protein.residues)
    for low, high, kept in ((size, size, True), (size + 1, 200, False), (1, size - 1, False)):
        settings = GenerationSettings(num_sequences=1, min_length=low, max_length=high)
        found = sample_proteins(model, tokenizer, settings).proteins
        assert (found == [protein]) == kept


def test_a_model_that_never_ends(tiny_lm, tokenizer):
    endless = ending(tiny_lm(n_layer=1, n_positions=40), -50.0)
    lines = []
    result = sample_proteins(
        endless, tokenizer, GenerationSettings(num_sequences=1), announce=lines.append
    )
    assert result.proteins == []
    assert result.counts == {"attempts": 200, "kept": 0, UNFINISHED: 200}
    assert len(lines) == 1
    assert "none good so far" in lines[0]
    unfinished = GenerationSettings(num_sequences=3, whole_only=False, max_length=12)
    kept = sample_proteins(endless, tokenizer, unfinished).proteins
    assert [(len(p.residues), p.whole) for p in kept] == [(12, False)] * 3
    one = GenerationSettings(num_sequences=1, whole_only=False)
    all_positions = 40 - len(tokenizer(PROTGPT2.prompt())["input_ids"])
    assert sample_proteins(endless, tokenizer, one).tally.tokens == all_positions
    to_the_end = GenerationSettings(num_sequences=3, whole_only=False, repetition_penalty=1.0)
    for protein in sample_proteins(endless, tokenizer, to_the_end).proteins:
        assert len(protein.residues) > 12
        assert not protein.whole


def test_padding_columns_of_the_vocabulary_are_never_sampled(tiny_lm, tokenizer):
    padded = tiny_lm(n_layer=1, vocab_size=80, n_positions=40)
    ending(padded, 2.0)
    with torch.no_grad():
        padded.lm_head.bias[64:] = 100.0
    settings = GenerationSettings(num_sequences=4, top_k=0)
    assert len(sample_proteins(padded, tokenizer, settings).proteins) == 4


def test_other_architectures(tokenizer, tiny_llama):
    """Rotary positions and fewer key heads than heads: nothing here is GPT-2's own."""
    llama = tiny_llama(max_position_embeddings=60).double()
    found = [
        sample_proteins(
            llama, tokenizer, GenerationSettings(num_sequences=6, whole_only=False, batch_size=b)
        ).proteins
        for b in (1, 4)
    ]
    assert found[0] == found[1]


def test_what_does_not_fit_is_refused(model, tiny_lm, tokenizer):
    def sample(other=model, **options):
        return sample_proteins(other, tokenizer, GenerationSettings(**options))

    for options, message in (
        ({"prompt": "ACDEFGHIKL" * 60}, "leave no room"),
        ({"max_length": 100_000}, "--max_length 100000: the model's 256 positions"),
        ({"min_length": 9999}, "--min_length 9999: the model's 256 positions"),
        ({"other": tiny_lm(vocab_size=10), "prompt": "MKT"}, "more tokens than the model"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(**options)
    broken = tiny_lm()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not a number"):
        sample(broken)


def test_scores_equal_a_plain_pass(model, tokenizer, random_proteins):
    proteins = [*random_proteins(4, 5, 90, seed=2), "ACDEF" * 300]  # the last does not fit
    scores = score_proteins(model, tokenizer, proteins)
    assert scores.perplexity_per_residue[-1] is None
    assert math.isnan(scores.nll[-1])
    values = scores.perplexity_per_residue[:-1]
    for residues, nll, tokens, value in zip(
        proteins, scores.nll, scores.tokens, values, strict=False
    ):
        ids = torch.tensor([tokenizer(layout(residues))["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        expected = -sum(log_probs[t, ids[0, t + 1]].item() for t in range(ids.shape[1] - 1))
        assert tokens == ids.shape[1] - 1
        assert nll == pytest.approx(expected, rel=1e-5)
        assert value == pytest.approx(math.exp(expected / len(residues)), rel=1e-5)
    unfinished = GeneratedProtein(proteins[0], False, 0)
    whole = GeneratedProtein(proteins[0], True, 0)
    first, second = perplexities(model, tokenizer, [unfinished, whole])
    assert first is not None
    assert second is not None
    assert first < second == pytest.approx(values[0])
    assert perplexities(model, tokenizer, []) == []


def test_fasta_round_trip(tmp_path, random_proteins):
    residues = [*random_proteins(7, 1, 200, seed=3), "M" * 60, "M" * 61, "M"]
    scored = [(GeneratedProtein(s, i % 2 == 0, i), 1.5 + i) for i, s in enumerate(residues)]
    records = fasta_records([*scored[:-1], (scored[-1][0], None)], 7, {"model": "my model"})
    path = tmp_path / "new" / "out.fasta"
    write_fasta(path, records)
    lines = path.read_text().splitlines()
    assert max(len(line) for line in lines if line[0] != ">") == 60
    assert [p.residues for p in read_proteins(path)] == residues
    entries = [line[1:].split() for line in lines if line[0] == ">"]
    headers = [(name, dict(word.split("=", 1) for word in words)) for name, *words in entries]
    described = {"perplexity_per_residue": "1.5", "residues": str(len(residues[0]))}
    described |= {"model": "my_model", "seed": "7", "attempt": "0", "whole": "yes"}
    assert headers[0] == ("protein_0001", described)
    assert headers[-1][1]["perplexity_per_residue"] == "none"


def test_headers_stay_one_line():
    record = FastaRecord("a\nb", "MK", {"model": " x\ty=z ", "empty": "", "value": 1 / 3})
    header = format_header(record)
    assert header == ">a_b model=x_y=z empty=_ value=0.333333"
    assert fasta_text(record) == f"{header}\nMK\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sequences": 0}, "--num_sequences"),
        ({"min_length": 9, "max_length": 5}, "--max_length"),
        ({"prompt": "mk"}, "--prompt"),
        ({"prompt": "MK1"}, "--prompt: '1' is not a residue"),
        ({"prompt": "MKT", "max_length": 2}, "--prompt has more"),
        ({"top_p": 0.0}, "--top_p"),
        ({"temperature": 0.0}, "--temperature"),
        ({"repetition_penalty": -1.0}, "--repetition_penalty"),
        ({"top_k": -1}, "--top_k"),
        ({"seed": -1}, "--seed"),
        ({"num_sequences": 9, "max_attempts": 8}, "--max_attempts"),
    ],
)
def test_bad_settings_name_the_flag(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**options)
