from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from scripts import evaluate as script
from src.evaluation.gates import check_teacher
from src.evaluation.measurement import (
    evaluate,
    evaluate_students,
    protein_clusters,
)
from src.evaluation.per_protein import write_per_protein
from src.evaluation.results import lookup, read_results, validate
from src.evaluation.scoring import EvaluationSettings, length_batches, protein_nll
from src.evaluation.student_record import clusters_of
from src.models.sizes import threshold_for
from src.proteins.encoding import encode
from src.proteins.layouts import STANDARD_RESIDUES, layout
from src.proteins.ngrams import fit_ngrams
from tests.conftest import write_parts

ROOT = Path(__file__).resolve().parents[1]


class Tokens(list):
    """Token ids of some proteins, in memory."""

    def __init__(self, rows, names=None):
        super().__init__(np.asarray(row) for row in rows)
        self.names = names or [f"p{i}" for i in range(len(self))]
        self.lengths = np.array([len(row) for row in self])
        self.fingerprint = "0" * 64


def ordered_proteins(count, seed=0, low=20, high=70):
    """Proteins in which most residues follow from the one before: easy to learn."""
    rng = random.Random(seed)
    proteins = []
    for _ in range(count):
        letters = [rng.choice(STANDARD_RESIDUES)]
        for _ in range(rng.randint(low, high) - 1):
            following = STANDARD_RESIDUES[(STANDARD_RESIDUES.index(letters[-1]) + 3) % 20]
            letters.append(following if rng.random() < 0.7 else rng.choice(STANDARD_RESIDUES))
        proteins.append("".join(letters))
    return proteins


@pytest.fixture(scope="module")
def tokenizer():
    from src.proteins.tokenizer import train_tokenizer

    return train_tokenizer(ordered_proteins(200, seed=1), 64, n_positions=256)


@pytest.fixture(scope="module")
def teacher(tokenizer):
    """A small model that has learnt the ordered proteins: a few seconds of training."""
    return trained(tokenizer, width=32, steps=150)


def trained(tokenizer, width, steps):
    from transformers import GPT2Config, GPT2LMHeadModel

    from src.proteins.batching import PaddingCollator

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=256, n_layer=1, n_head=2, n_embd=width, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = encode(tokenizer, ordered_proteins(steps * 8, seed=2))
    for step in range(steps):
        batch = PaddingCollator(0)([{"input_ids": r} for r in rows[8 * step : 8 * step + 8]])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def student(tokenizer):
    return trained(tokenizer, width=8, steps=50)


@pytest.fixture(scope="module")
def proteins():
    return ordered_proteins(60, seed=3)


@pytest.fixture(scope="module")
def tokens(tokenizer, proteins):
    return Tokens(encode(tokenizer, proteins))


@pytest.fixture(scope="module")
def evaluation(student, teacher, tokenizer, tokens):
    settings = EvaluationSettings(bootstrap=300)
    return evaluate(
        student, teacher, tokenizer, tokens, settings, train=ordered_proteins(300, seed=4)
    )


@torch.no_grad()
def plain_figures(model, other, rows):
    """One protein at a time, whole logits, float64: an evaluator that shares no code with ours."""
    model, other = model.double(), other.double()
    nll = kl = brier = correct = 0.0
    count = 0
    confidences, outcomes = [], []
    for row in rows:
        ids = torch.tensor(np.asarray(row))[None]
        log_q = torch.log_softmax(model(ids).logits[0, :-1], -1)
        log_p = torch.log_softmax(other(ids).logits[0, :-1], -1)
        for position, target in enumerate(ids[0, 1:].tolist()):
            q, p = log_q[position].exp(), log_p[position].exp()
            nll -= float(log_q[position, target])
            kl += float((p * (log_p[position] - log_q[position])).sum())
            one_hot = torch.zeros_like(q)
            one_hot[target] = 1
            brier += float(((q - one_hot) ** 2).sum())
            correct += float(q.argmax() == target)
            confidences.append(float(q.max()))
            outcomes.append(float(q.argmax() == target))
            count += 1
    model.float()
    other.float()
    ece = 0.0
    confidence, outcome = np.array(confidences), np.array(outcomes)
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(outcome[inside].mean() - confidence[inside].mean())
    return {"nll": nll, "kl": kl, "brier": brier, "correct": correct, "tokens": count, "ece": ece}


def test_an_independent_evaluator_agrees(evaluation, student, teacher, tokens, proteins):
    residues = sum(map(len, proteins))
    mine = plain_figures(student, teacher, tokens)
    theirs = plain_figures(teacher, student, tokens)
    found = evaluation.results
    n = mine["tokens"]
    assert found["data"]["tokens"] == n
    expected = {
        "student_perplexity": math.exp(mine["nll"] / n),
        "teacher_perplexity": math.exp(theirs["nll"] / n),
        "perplexity_ratio": math.exp((mine["nll"] - theirs["nll"]) / n),
        "student_perplexity_per_residue": math.exp(mine["nll"] / residues),
        "student_bits_per_residue": mine["nll"] / residues / math.log(2),
        "perplexity_ratio_per_residue": math.exp((mine["nll"] - theirs["nll"]) / residues),
        "kl_divergence": mine["kl"] / n,
        "kl_per_residue": mine["kl"] / residues,
        "reverse_kl_divergence": theirs["kl"] / n,
        "student_accuracy": mine["correct"] / n,
        "student_brier": mine["brier"] / n,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    assert found["student_ece"]["ece"] == pytest.approx(mine["ece"], rel=1e-3)
    assert found["teacher_ece"]["ece"] == pytest.approx(theirs["ece"], rel=1e-3)


@pytest.mark.parametrize(("rows", "budget", "chunk"), [(1, 100, 7), (5, 150, 1024), (64, 9000, 50)])
def test_batches_and_chunks_do_not_matter(teacher, tokens, monkeypatch, rows, budget, chunk):
    usual = protein_nll(teacher, tokens)
    monkeypatch.setattr("src.evaluation.scoring.BATCH_TOKENS", {"cpu": budget, "cuda": budget})
    monkeypatch.setattr("src.evaluation.scoring.CHUNK_TOKENS", chunk)
    other = protein_nll(teacher, tokens, EvaluationSettings(batch_size=rows))
    np.testing.assert_allclose(other, usual, rtol=1e-5)
    with torch.no_grad():
        plain = [
            float(torch.nn.functional.cross_entropy(
                teacher(torch.tensor(r)[None]).logits[0, :-1], torch.tensor(r[1:]), reduction="sum"
            ))
            for r in tokens
        ]  # fmt: skip
    np.testing.assert_allclose(usual, plain, rtol=1e-5)


def test_students_measured_together_are_measured_as_if_alone(
    evaluation, student, teacher, tokenizer, tokens
):
    settings = EvaluationSettings(bootstrap=0)
    students = {"teacher": teacher, "student": student}
    together = evaluate_students(students, teacher, tokenizer, tokens, settings)
    for name, model in students.items():
        alone = evaluate(model, teacher, tokenizer, tokens, settings)
        mine = {k: v for k, v in together[name].results.items() if k != "performance"}
        theirs = {k: v for k, v in alone.results.items() if k != "performance"}
        assert mine == theirs
        assert np.array_equal(together[name].per_protein["kl"], alone.per_protein["kl"])
    assert together["teacher"].results["perplexity_ratio"] == 1


def test_length_batches_hold_everything_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(5, 300, 200)
    batches = length_batches(lengths, 16, 1000)
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert all(len(b) <= 16 and len(b) * lengths[b].max() <= 1000 for b in batches)
    assert [len(b) for b in length_batches(np.array([5000, 3]), 8, 1000)] == [1, 1]


def test_results_fit_the_schema_and_every_figure_has_its_interval(evaluation):
    results = {"schema_version": 1, **evaluation.results, "run": {}}
    validate(results)
    json.dumps(results, allow_nan=False)
    for name, interval in results["intervals"].items():
        value = lookup(results, name)
        assert value is not None, name
        assert interval[0] <= value <= interval[1] or interval[1] - interval[0] < 1e-9, name
    for name in ("perplexity_ratio", "kl_divergence", "student_ece.ece", "kept_advantage"):
        assert results["intervals"][name]
    assert results["performance"]["peak_memory_bytes"] > 1e6
    curve = results["student_ece"]["reliability"]
    assert sum(curve["count"]) == results["data"]["tokens"]
    assert len(curve["edges"]) == 16


def test_the_better_model_is_told_from_the_worse(evaluation):
    found = evaluation.results
    assert found["perplexity_ratio"] > 1
    assert 0 < found["kept_advantage"] < 1
    assert found["floors"]["trigram"]["teacher_gain"] is not None
    assert found["floors"]["fitted_on"] == "train"
    assert found["gates"]["passed"]
    assert found["teacher_ece"]["calibration_meaningful"]


def test_kept_advantage_and_floors_follow_their_definition(evaluation, proteins):
    unigram = fit_ngrams(ordered_proteins(300, seed=4))["unigram"]
    floor = unigram.nll(proteins).sum() / sum(map(len, proteins))
    found = evaluation.results
    student, teacher = found["student_nats_per_residue"], found["teacher_nats_per_residue"]
    assert found["floors"]["unigram"]["nats_per_residue"] == pytest.approx(floor)
    assert found["kept_advantage"] == pytest.approx((floor - student) / (floor - teacher), rel=1e-6)
    assert found["floors"]["uniform"]["perplexity_per_residue"] == 20.0


def test_a_kept_share_without_an_interval_is_not_reported(
    student, teacher, tokenizer, tokens, monkeypatch
):
    """In some replicates the teacher is no better than a unigram model."""
    from src.evaluation import measurement as m

    def unclear(*given):
        return real(*given) | {"kept_advantage": m.Estimate(-36.6, float("nan"), float("nan"))}

    real = m.bootstrap_or_plain
    monkeypatch.setattr(m, "bootstrap_or_plain", unclear)
    for replicates, kept in ((50, None), (0, -36.6)):
        settings = EvaluationSettings(bootstrap=replicates)
        found = evaluate(student, teacher, tokenizer, tokens, settings)
        assert found.results["kept_advantage"] == kept


def test_single_proteins_add_up_to_the_whole(evaluation, tmp_path):
    table = evaluation.per_protein
    found = evaluation.results
    total = table["residues"].sum()
    assert math.exp(table["nll_student"].sum() / total) == pytest.approx(
        found["student_perplexity_per_residue"]
    )
    assert table["kl"].sum() / table["tokens"].sum() == pytest.approx(found["kl_divergence"])
    write_per_protein(tmp_path / "p.parquet", table)
    import pyarrow.parquet as pq

    read = pq.read_table(tmp_path / "p.parquet")
    assert read.column_names == [
        "protein", "cluster", "residues", "tokens", "nll_student", "nll_teacher", "kl",
    ]  # fmt: skip
    assert read.num_rows == 60


def test_a_teacher_beside_itself(teacher, tokenizer, tokens):
    found = evaluate(teacher, teacher, tokenizer, tokens, EvaluationSettings(bootstrap=50)).results
    assert found["perplexity_ratio"] == pytest.approx(1)
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1
    assert found["kept_advantage"] == pytest.approx(1)
    assert found["compression_ratio"] == 1
    assert found["floors"]["fitted_on"] == "other half"


def test_duplicates_leave_intervals_unchanged(student, teacher, tokenizer, tokens):
    settings = EvaluationSettings(bootstrap=200)
    train = ordered_proteins(50, seed=4)
    rows = list(tokens)
    names = [f"p{i}" for i in range(len(rows))]
    clusters = {name: f"c{i // 2}" for i, name in enumerate(names)}
    copies = [f"copy{i}" for i in range(len(rows))]
    clusters |= {copy: clusters[name] for copy, name in zip(copies, names, strict=True)}
    once, twice = (
        evaluate(
            student, teacher, tokenizer, given, settings, train=train, clusters=clusters
        ).results
        for given in (Tokens(rows, names), Tokens(rows + rows, names + copies))
    )
    assert twice["data"]["proteins"] == 2 * once["data"]["proteins"]
    # Debiased figures depend on the number of tokens; everything else is a ratio of sums.
    for name, interval in once["intervals"].items():
        if "debiased" not in name and "equal_mass" not in name:
            assert twice["intervals"][name] == pytest.approx(interval, rel=1e-4, abs=1e-6), name


def test_exact_duplicates_share_a_cluster_without_a_table():
    clusters = protein_clusters(["a", "b", "c"], ["MKV", "MKV", "AAA"])
    assert clusters[0] == clusters[1] != clusters[2]
    assert protein_clusters(["a", "b"], ["MKV", "AAA"], {"a": "x", "b": "x"}) == ["x", "x"]


def test_exact_duplicates_share_the_cluster_that_the_table_has_for_any_of_them():
    assert protein_clusters(["a", "b"], ["MKV", "MKV"], {"b": "C7"}) == ["C7", "C7"]
    assert protein_clusters(["a", "b"], ["MKV"] * 2, {"a": "C1", "b": "C7"}) == ["C1", "C1"]


def test_natural_proteins_beat_shuffled_ones(teacher, tokenizer, tokens):
    found = check_teacher(teacher, tokenizer, tokens, ordered_proteins(100, seed=4))
    assert found["natural"] < found["unigram"]
    assert found["natural"] < found["shuffled"]
    assert 0 < found["shuffled_minus_natural"]["low"] < found["shuffled_minus_natural"]["high"]
    assert "natural" in found["summary"]
    assert teacher.training is False


def test_the_recorded_check_counts_relatives_once(teacher, tokenizer, monkeypatch):
    """Twelve variants of one protein beside ten others: eleven groups, as the decision has them."""
    rng = random.Random(0)
    others = ["".join(rng.choices(STANDARD_RESIDUES, k=60)) for _ in range(11)]
    first = others.pop()
    given = [*(first[:i] + "C" + first[i + 1 :] for i in range(12)), *others]
    gain = np.random.default_rng(0).normal(0.1, 0.1, len(given))

    def nats(model, rows, settings, what):
        return 60 * (2 + (gain if what == "shuffled proteins" else 0 * gain))

    monkeypatch.setattr("src.evaluation.gates.protein_nll", nats)
    found = check_teacher(teacher, tokenizer, Tokens(encode(tokenizer, given)))
    recorded = found["shuffled_minus_natural"]
    assert (recorded["groups"], recorded["pairs"]) == (11, 22)
    means = np.array([gain[:12].mean(), *gain[12:]])
    assert recorded["mean"] == pytest.approx(means.mean())
    one_sided: Any = stats.ttest_1samp(means, 0, alternative="greater")
    assert recorded["p_value"] == pytest.approx(one_sided.pvalue)
    both: Any = stats.ttest_1samp(means, 0)
    interval = both.confidence_interval(0.95)
    assert (recorded["low"], recorded["high"]) == pytest.approx((interval.low, interval.high))

    # A table of families says more than the sequences, unless it has very few.
    family = {protein: "A" if i < 16 else f"B{i % 4}" for i, protein in enumerate(given)}
    tokens = Tokens(encode(tokenizer, given))
    found = check_teacher(teacher, tokenizer, tokens, cluster_of=family)
    recorded = found["shuffled_minus_natural"]
    parts = [[i for i, p in enumerate(given) if family[p] == f] for f in set(family.values())]
    assert recorded["groups"] == len(parts) == 5
    assert recorded["mean"] == pytest.approx(np.mean([gain[part].mean() for part in parts]))
    one = check_teacher(teacher, tokenizer, tokens, cluster_of=dict.fromkeys(given, "A"))
    assert one["shuffled_minus_natural"]["groups"] == 11


@pytest.mark.parametrize(
    ("proteins", "refused"),
    [
        ("unrelated", True),
        ("one", False),
        ("variants", False),
        ("truncated", False),
    ],
)
@pytest.mark.parametrize(
    ("natural", "mixed", "message"),
    [(2, 1, "less likely than shuffled ones"), (4.5, 5, "no better than guessing among its 64")],
)
def test_being_wrong_about_one_protein_is_no_proof(
    proteins, refused, natural, mixed, message, teacher, tokenizer, monkeypatch
):
    rng = random.Random(0)
    unrelated = ["".join(rng.choices(STANDARD_RESIDUES, k=60)) for _ in range(20)]
    first = unrelated[0]
    given = {
        "unrelated": unrelated,
        "one": [first],
        "variants": [first[:i] + "C" + first[i + 1 :] for i in range(0, 60, 3)],
        "truncated": [first[:i] for i in range(30, 61, 2)],
    }[proteins]

    def nats(model, rows, settings, what):
        noise = np.random.default_rng(0).uniform(1, 1.01, len(rows))
        level = natural if what == "natural proteins" else mixed  # ln 64 = 4.16 is a guess
        return noise * [level * len(row) for row in rows]

    monkeypatch.setattr("src.evaluation.gates.protein_nll", nats)
    rows = Tokens(encode(tokenizer, given))
    if refused:
        with pytest.raises(ValueError, match=f"{message}.*--skip_teacher_check"):
            check_teacher(teacher, tokenizer, rows)
    else:
        found = check_teacher(teacher, tokenizer, rows)
        assert "too few or too short proteins to tell" in found["summary"]
        assert not found["passed"]
        recorded = found["shuffled_minus_natural"]
        assert (recorded["groups"], recorded["pairs"]) == (1, len(given))
        assert recorded["low"] is recorded["high"] is recorded["p_value"] is None


def test_a_random_teacher_is_stopped(tiny_lm, tokenizer, tokens):
    with pytest.raises(ValueError, match="wrong layout or tokenizer") as caught:
        check_teacher(tiny_lm(), tokenizer, tokens)
    assert "\n" not in str(caught.value)


def test_a_broken_layout_is_stopped(teacher, tokenizer, proteins):
    def without(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    backwards = Tokens(without(layout(p[::-1])) for p in proteins)
    spaced = Tokens(
        without(layout(p).replace("\n", "")[:13] + "\n".join(p) + "\n<|endoftext|>")
        for p in proteins
    )
    foreign = np.random.default_rng(0).integers(0, 64, (20, 30))
    foreign[:, 15] = 0
    for broken in (backwards, spaced, Tokens(foreign)):
        with pytest.raises(ValueError, match="wrong layout or tokenizer"):
            evaluate(teacher, teacher, tokenizer, broken, EvaluationSettings(bootstrap=0))


def test_a_student_beyond_all_numbers_has_not_passed(student, teacher, tokenizer, tokens):
    """e^(nats a token) overflows: the ratio is null."""
    from copy import deepcopy

    lost = deepcopy(student)
    with torch.no_grad():
        lost.transformer.ln_f.weight *= 1e6
    settings = EvaluationSettings(bootstrap=0, check=False)
    found = evaluate(lost, teacher, tokenizer, tokens, settings).results
    assert found["perplexity_ratio"] is None
    assert found["threshold"]["passed"] is False


def test_vocabularies_must_match(teacher, tiny_lm, tokenizer, tokens):
    settings = EvaluationSettings(check=False)
    with pytest.raises(ValueError, match="vocabulary"):
        evaluate(tiny_lm(vocab_size=80), teacher, tokenizer, tokens, settings)


def test_long_proteins_are_left_out_and_counted(student, teacher, tokenizer, tokens):
    settings = EvaluationSettings(bootstrap=0, max_length=int(np.median(tokens.lengths)))
    found = evaluate(student, teacher, tokenizer, tokens, settings).results
    assert found["data"]["too_long"] + found["data"]["proteins"] == 60
    assert found["data"]["too_long"] > 10
    with pytest.raises(ValueError, match="fits 3 tokens"):
        evaluate(student, teacher, tokenizer, tokens, EvaluationSettings(max_length=3))


def test_calibration_is_measured_when_asked(student, teacher, tokenizer, tokens):
    settings = EvaluationSettings(compute_ece=False, bootstrap=0)
    found = evaluate(student, teacher, tokenizer, tokens, settings).results
    assert found["student_ece"] == {}
    validate({"schema_version": 1, **found, "run": {}})


def test_calibration_of_an_ignorant_model_is_not_meaningful(tiny_lm, teacher, tokenizer, tokens):
    ignorant = tiny_lm(initializer_range=0.02)
    found = evaluate(ignorant, teacher, tokenizer, tokens, EvaluationSettings()).results
    assert found["student_ece"]["calibration_meaningful"] is False


@pytest.mark.parametrize(
    ("share", "bound"),
    [(0.01, 3.0), (0.05, 3.0), (0.08, 2.75), (0.11, 2.5), (0.27, 2.0), (0.9, 2.0)],
)
def test_threshold_depends_on_size(share, bound):
    assert threshold_for(share) == pytest.approx(bound)


def test_clusters_are_read_from_their_table(tmp_path):
    assert clusters_of(tmp_path) is None
    with gzip.open(tmp_path / "clusters.tsv.gz", "wt") as handle:
        handle.write("protein\tcluster\na\tx\nb\tx\n")
    assert clusters_of(tmp_path) == {"a": "x", "b": "x"}


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory, student, teacher, tokenizer):
    """A teacher, a student with its record, and a data directory, as training leaves them."""
    root = tmp_path_factory.mktemp("run")
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    counts = {"train": (200, 4), "test": (30, 3)}
    write_parts(root / "proteins", {p: ordered_proteins(*given) for p, given in counts.items()})
    record = {
        "settings": {},
        "teacher": {"name": str(root / "teacher")},
        "data": {"source": str(root / "proteins")},
    }
    (root / "student" / "run.json").write_text(json.dumps(record))
    return root


def call(*arguments) -> int:
    return script.main([str(a) for a in arguments])


def test_the_owners_command(run_folders, tmp_path, capsys):
    output, table = tmp_path / "r.json", tmp_path / "p.parquet"
    arguments = [
        "--student_model", run_folders / "student", "--num_samples", 4, "--compute_ece",
        "--output", output, "--per_protein", table, "--cache_dir", tmp_path / "cache",
        "--bootstrap", 100, "--device", "cpu",
    ]  # fmt: skip
    assert call(*arguments) == 0
    shown = capsys.readouterr().out
    assert "perplexity per token" in shown
    assert "kept of the teacher's advantage" in shown
    results = read_results(output)
    assert results["data"]["proteins"] == 30
    assert results["run"]["teacher"]["name"] == "teacher"  # it lies outside the working directory
    assert results["student_ece"]["ece"] is not None
    assert results["kl_from_natural"]["student"] is not None
    generated = results["generation"]["student"]
    assert generated["sequences"] == generated["counts"]["kept"] == 4
    assert len(generated["examples"]) == 4
    assert generated["sequences_per_second"] > 0
    low, high = generated["intervals"]["teacher_perplexity_per_residue"]
    assert 1 < low <= generated["teacher_perplexity_per_residue"] <= high
    assert results["generation"]["natural"]["sequences"] == 4
    assert "shuffled" not in results["generation"]
    assert "diversity" not in generated
    interval = generated["intervals"]["kl_from_natural"]
    assert results["intervals"]["kl_from_natural.student"] == interval
    assert table.exists()
    assert call(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call(*arguments, "--overwrite", "--num_samples", 0) == 0


def test_proteins_of_the_training_are_refused_or_told(run_folders, tmp_path, capsys):
    """A student of one file has no held-out part to fall back on."""
    one = tmp_path / "one.fasta"
    one.write_text("".join(f">p{i}\n{p}\n" for i, p in enumerate(ordered_proteins(20, 4))))
    path = run_folders / "student" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"data": {"source": str(one)}}))
    arguments = [
        "--student_model", run_folders / "student", "--cache_dir", tmp_path / "cache",
        "--bootstrap", 0, "--device", "cpu", "--skip_teacher_check",
    ]  # fmt: skip
    assert call(*arguments, "--output", tmp_path / "a.json") == 2
    assert "pass --data with proteins that it has not seen" in capsys.readouterr().err
    for data, seen in ((one, True), (run_folders / "proteins", False)):
        output = tmp_path / f"{data.stem}.json"
        assert call(*arguments, "--data", data, "--output", output) == 0
        assert read_results(output)["run"]["data"]["trained_on"] is seen
        assert ("trained on these proteins" in capsys.readouterr().out) is seen
    path.write_text(json.dumps(record))
    train = run_folders / "proteins" / "train.fasta.gz"
    assert call(*arguments, "--data", train, "--output", tmp_path / "b.json") == 0
    assert read_results(tmp_path / "b.json")["run"]["data"]["trained_on"]


def test_generated_proteins_beside_their_controls(run_folders, tmp_path):
    output = tmp_path / "r.json"
    arguments = [
        "--student_model", run_folders / "student", "--num_samples", 6, "--generation_metrics",
        "--output", output, "--cache_dir", tmp_path / "cache", "--bootstrap", 50, "--device", "cpu",
    ]  # fmt: skip
    assert call(*arguments) == 0
    generation = read_results(output)["generation"]
    assert generation.pop("reference")["proteins"] == 30
    assert set(generation) == {"student", "teacher", "natural", "shuffled"}
    for record in generation.values():
        assert record["novelty"]["train_proteins"] == 200
        for name, interval in record["intervals"].items():
            value = lookup(record, name)
            assert interval is None or interval[0] <= value <= interval[1], name
    natural, shuffled = generation["natural"], generation["shuffled"]
    name = "teacher_perplexity_per_residue"
    assert natural[name] < generation["shuffled"][name]
    assert natural["composition"] == shuffled["composition"]


def test_proteins_that_are_too_long_are_counted(run_folders, tmp_path, tokenizer):
    lengths = np.array([len(row) for row in encode(tokenizer, ordered_proteins(30, 3))])
    limit = int(np.median(lengths))
    output = tmp_path / "r.json"
    arguments = [
        "--student_model", run_folders / "student", "--max_length", limit, "--output", output,
        "--cache_dir", tmp_path / "cache", "--bootstrap", 0, "--device", "cpu",
    ]  # fmt: skip
    assert call(*arguments) == 0
    counts = read_results(output)["data"]
    assert counts["too_long"] == (lengths > limit).sum() > 0
    assert counts["proteins"] == (lengths <= limit).sum()


def test_samples_of_a_model_that_states_no_longest_input(run_folders, tmp_path, tokenizer):
    """``--max_length`` stands in for its positions in every part of an evaluation."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2, bos_token_id=0)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    output = tmp_path / "r.json"
    arguments = [
        "--student_model", tmp_path / "bloom", "--teacher_model", run_folders / "teacher",
        "--data", run_folders / "proteins", "--max_length", 100, "--num_samples", 2, "--output",
        output, "--cache_dir", tmp_path / "cache", "--bootstrap", 0, "--device", "cpu",
    ]  # fmt: skip
    assert call(*arguments) == 0
    generation = read_results(output)["generation"]
    assert generation["student"]["counts"]["kept"] == 2
    assert generation["student"]["sampling"]["max_length"] == 100
    assert generation["teacher"]["sampling"]["max_length"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--student_model ./none", "no such directory"),
        ("--student_model {student} --data ./none", "no such"),
        ("--student_model {student} --split holdout", "holdout"),
        ("--student_model {student} --device abacus", "--device"),
        ("--student_model {student} --profiles x.hmm", "--generation_metrics"),
    ],
)
def test_user_errors_are_one_line(run_folders, tmp_path, refusal, arguments, message):
    typed = arguments.format(student=run_folders / "student").split()
    assert message in refusal(call(*typed, "--output", tmp_path / "r.json"))
