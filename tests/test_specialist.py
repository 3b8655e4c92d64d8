"""From a family to a specialist: figures by hand, one whole run with tiny models, bad input."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyhmmer")

from scripts.specialise import build_parser, main, student_shape
from src.common.settings import PRESETS, StudentSettings
from src.evaluation import filters
from src.experiments import candidates as c
from src.experiments import family_run as fr
from src.experiments import specialist as s
from src.models.inspection import count_parameters
from src.models.loading import config_of, load_causal_lm, load_tokenizer, model_fingerprint
from src.proteins.homology import Hit
from src.proteins.sources import Protein

ROOT = Path(__file__).resolve().parents[1]

# Judging --------------------------------------------------------------------------------------


def judged(**more):
    proteins = [Protein("a", "M" * 10), Protein("b", "M" * 30), Protein("c", "M" * 60)]
    nll = {
        s.START: np.array([30.0, 90.0, 150.0]),
        s.ADAPTED: np.array([20.0, 60.0, np.nan]),
        s.SPECIALIST: np.array([22.0, 66.0, 100.0]),
        **more,
    }
    return s.compare_models(nll, proteins, ["x", "y", "y"], bootstrap=50)


def test_figures_of_a_judgement_by_hand():
    record = judged()
    assert (record["proteins"], record["not_fitting"], record["residues"]) == (2, 1, 40)
    assert record["clusters"] == 2
    assert record["nats"] == pytest.approx({s.START: 3.0, s.ADAPTED: 2.0, s.SPECIALIST: 2.2})
    assert record["gain"] == pytest.approx({s.ADAPTED: 1.0, s.SPECIALIST: 0.8})
    assert record["kept"] == pytest.approx(0.8)
    assert record["intervals"]["kept"] == pytest.approx([0.8, 0.8])
    json.dumps(record, allow_nan=False)


def test_a_model_that_no_member_fits_is_named():
    with pytest.raises(ValueError, match="no held-out member fits all models"):
        judged(other=np.full(3, np.nan))


def test_a_sweep_stands_around_the_given_rate():
    assert s.tuned(s.FitSettings(learning_rates=(3e-3,))).learning_rates == (1e-3, 3e-3, 9e-3)


def test_the_rate_suits_the_size(model_dir):
    def rate(parameters, fit=s.ADAPTATION):
        return s.suited(fit, parameters).learning_rates[0]

    assert rate(3_300_000) == 1.5e-3
    assert rate(774_000_000) == 5e-5
    assert rate(1_000) == 1.5e-3  # no larger than what was tried
    rates = [rate(n) for n in (4_000_000, 40_000_000, 400_000_000)]
    assert rates == sorted(rates, reverse=True)
    assert rate(124_000_000) == pytest.approx(1.6e-4)
    assert rate(900_000, s.DISTILLATION) == 4e-3
    assert rate(774_000_000, s.DISTILLATION) == pytest.approx(4e-3 / 30, rel=0.03)
    shape = StudentSettings(1, 2, 8)
    whole, small = (s.parameters_of(model_dir, student) for student in (None, shape))
    assert small < whole == count_parameters(load_causal_lm(model_dir))
    with pytest.raises(ValueError, match="there is no"):
        s.parameters_of(model_dir / "none", shape)


def test_steps_grow_with_the_family():
    small, large = (s.ADAPTATION.train_settings(n, 1e-3) for n in (10, 1000))
    assert small.max_steps == s.ADAPTATION.least_steps
    assert small.eval_steps == s.ADAPTATION.evaluate_each
    assert large.max_steps == s.ADAPTATION.epochs * 125
    assert large.eval_steps == 125
    assert small.early_stopping == s.ADAPTATION.patience


def test_a_stage_is_done_once_and_refuses_other_settings(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"n": len(calls)}

    quiet = {"announce": lambda line: None}
    assert s.run_stage(tmp_path / "a", {"x": 1}, work, **quiet) == {"n": 1}
    assert s.run_stage(tmp_path / "a", {"x": 1}, work, **quiet) == {"n": 1}
    with pytest.raises(ValueError, match=r"other settings \(x\)"):
        s.run_stage(tmp_path / "a", {"x": 2}, work, **quiet)


def test_a_stage_that_failed_is_done_again(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s.run_stage(tmp_path / "a", {}, fail)
    assert s.run_stage(tmp_path / "a", {}, lambda: {"n": 1}) == {"n": 1}


# Candidates -----------------------------------------------------------------------------------


@pytest.fixture
def assessed(monkeypatch, random_proteins):
    members = random_proteins(5, 60, 80)
    good = random_proteins(3, 60, 80, seed=9)
    samples = [
        good[0],
        good[0],
        members[2],
        "QQQQQQQQQQ" + good[1][:50],
        good[1],
        good[2],
        "W" + good[2],
    ]
    hit = np.array([1, 1, 1, 1, 1, 1, 0], dtype=bool)
    bits = np.array([50.0, 50, 50, 50, 90, 10, np.nan])
    monkeypatch.setattr(c, "family_hits", lambda proteins, profile: {"hit": hit})
    monkeypatch.setattr(c, "read_profiles", lambda profile: [])
    monkeypatch.setattr(c, "profile_bits", lambda profiles, proteins: bits)
    train = [Protein(f"m{i}", m) for i, m in enumerate(members)]
    nll = np.array([2.0, 2.0, 1.0, 2.0, 1.0, 3.0, 3.0]) * [len(x) for x in samples]
    return c.assess(samples, nll, train, Path("x.hmm"), 0.9)


def test_each_useless_sample_has_its_reason(assessed):
    assert assessed["dropped"] == ["", c.SEEN, c.TOO_CLOSE, c.REPEATED, "", "", c.NO_HIT]
    assert assessed["nearest_member"][2] == "m2"
    assert assessed["nearest_identity"][2] == 1.0
    assert c.drop_counts(assessed) == {
        c.KEPT: 3, c.SEEN: 1, c.TOO_CLOSE: 1, c.REPEATED: 1, c.NO_HIT: 1,
    }  # fmt: skip


def test_candidates_are_ranked_by_both_scores(assessed):
    assert assessed["rank"] == [2, None, None, None, 1, 3, None]
    assert c.ranked(assessed) == [4, 0, 5]


def test_candidates_are_written_best_first_and_read_back(assessed, tmp_path):
    c.write_candidates(tmp_path, assessed)
    table = c.read_table(tmp_path / "candidates.csv")
    assert table["rank"][:4] == ["1", "2", "3", ""]
    assert len(table["sequence"]) == 7
    headers = [
        line
        for line in (tmp_path / "candidates.fasta").read_text().splitlines()
        if line.startswith(">")
    ]
    assert [h.split()[1] for h in headers] == ["rank=1", "rank=2", "rank=3"]


def test_a_repetitive_family_sets_the_limit():
    usual = c.limits_of(["ACDEFGHIKLMNPQRSTVWY"])
    assert usual == {
        c.REPEATED: filters.MOST_REPEATS,
        c.LOW_COMPLEXITY: filters.MOST_LOW_COMPLEXITY,
    }
    assert c.limits_of(["QQQQQQQQACDEFGHI"])[c.REPEATED] == 0.5


def test_each_reason_is_printed_with_its_count_and_why(assessed):
    lines = c.drop_lines(c.drop_counts(assessed))
    assert lines[0] == "3 of 7 samples are kept"
    assert len(lines) == 5
    for reason, line in zip((c.SEEN, c.TOO_CLOSE, c.REPEATED, c.NO_HIT), lines[1:], strict=True):
        assert line == f"  1 dropped: {reason} ({filters.WHY[reason]})"


@pytest.mark.parametrize(
    ("shares", "chosen", "tried"),
    [
        ((0.75, 1.0), 1.0, 1),
        ((0.0, 0.25, 0.5), 0.7, 3),
        ((0.0, 0.0, 0.25, 0.125), 0.7, 4),
        ((0.0, 0.0, 0.0, 0.0), 0.55, 4),
    ],
)
def test_the_temperature_is_the_highest_that_keeps_half_of_a_pilot(shares, chosen, tried):
    left = list(shares)
    asked = []

    def sample(settings):
        asked.append(settings.temperature)
        assert settings.num_candidates == c.PILOT
        return {"samples": ["M"] * c.PILOT if left[0] else []}

    def judge(drawn):
        kept = int(left.pop(0) * c.PILOT)
        return {"dropped": [""] * kept + [c.NO_HIT] * (c.PILOT - kept)}

    def none_left(settings):
        drawn = sample(settings)
        if not drawn["samples"]:
            left.pop(0)
        return drawn

    found, record = c.choose_temperature(c.CandidateSettings(), none_left, judge)
    assert found == chosen
    assert asked == list(c.TEMPERATURES[:tried])
    assert list(record.values()) == list(shares[:tried])


# The whole run --------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tmp_path, tiny_lm, tiny_tokenizer):
    folder = tmp_path / "model"
    tiny_lm(initializer_range=0.02).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def family_file(tmp_path, monkeypatch):
    from tests.test_profiles import RESIDUES, mutants

    members = mutants((RESIDUES * 3)[:50], 14, 0.2, 5)
    path = tmp_path / "family.fasta"
    path.write_text("".join(f">p{i}\n{m}\n" for i, m in enumerate(members)))

    def alignments(proteins, queries, targets, settings):
        return [Hit(a, b, 1.0 if a == b else 0.5, 1.0) for a in queries for b in targets]

    monkeypatch.setattr("src.proteins.family_split.alignments", alignments)
    return path


def small_run(family, model, folder, **more) -> fr.FamilyRun:
    fit = s.FitSettings(epochs=1, least_steps=4, evaluate_each=2, patience=1)
    return fr.FamilyRun(
        family,
        str(model),
        folder,
        specialist=StudentSettings(1, 2, 8),
        adaptation=more.pop("adaptation", fit),
        random=fit,
        distillation=fit,
        candidates=c.CandidateSettings(num_candidates=6, temperature=1.0, seed=1),
        device="cpu",
        cache_dir=str(folder / "cache"),
        announce=more.pop("announce", lambda line: None),
        **more,
    )


def test_a_family_becomes_a_model_a_specialist_candidates_and_a_page(
    tmp_path, family_file, model_dir, monkeypatch
):
    folder = tmp_path / "out"
    monkeypatch.setattr(fr, "SPEED_SAMPLES", 2)
    said: list[str] = []
    run = small_run(family_file, model_dir, folder, announce=said.append)
    judgement = fr.run_family(run)
    assert set(judgement["held_out"]["nats"]) == {
        s.START, s.ADAPTED, s.SCRATCH, s.SPECIALIST, s.PROFILE,
    }  # fmt: skip
    assert judgement["held_out"]["nats"][s.PROFILE] < judgement["held_out"]["nats"][s.START]
    counts = {k: judgement["family"][k] for k in ("train", "validation", "test")}
    assert sum(counts.values()) == 14
    assert sum(judgement["candidates"]["dropped"].values()) == 6
    for name in ("adapted", "random", "specialist"):
        assert (folder / name / "model.safetensors").is_file()
    assert json.loads((folder / "judgement" / "judgement.json").read_text()) == judgement
    page = (folder / "page.html").read_text()
    for words in ("profile HMM", "from random weights", "specialist", "family.fasta", "adamw"):
        assert words in page
    assert str(tmp_path) not in page
    with (folder / "candidates" / "candidates.csv").open(newline="") as handle:
        assert len(list(csv.DictReader(handle))) == 6

    # Once more: nothing is trained or sampled again.
    def forbidden(*args, **kwargs):
        raise AssertionError("done before")

    monkeypatch.setattr(c, "sample_proteins", forbidden)
    monkeypatch.setattr(s, "score_proteins", forbidden)
    monkeypatch.setattr("src.experiments.family_inputs.read_family", forbidden)
    assert fr.run_family(run) == judgement
    assert sum("finished" in line for line in said) >= 6

    # Without the specialist the models are judged again, and nothing else is done again.
    monkeypatch.undo()
    monkeypatch.setattr(fr, "SPEED_SAMPLES", 2)
    again = fr.run_family(replace(run, specialist=None))
    assert s.SPECIALIST not in again["held_out"]["nats"]
    assert again["candidates"] == judgement["candidates"]
    assert any("judging again" in line for line in said)


def test_another_family_is_refused(tmp_path, family_file, model_dir, monkeypatch):
    run = small_run(family_file, model_dir, tmp_path / "out")
    fr.prepare(run)
    family_file.write_text(family_file.read_text() + ">more\nMKTAYIAKQR\n")
    with pytest.raises(ValueError, match="holds another family"):
        fr.prepare(run)


def test_tuning_keeps_the_run_of_the_lowest_validation_loss(
    tmp_path, family_file, model_dir, monkeypatch
):
    fit = s.FitSettings(
        learning_rates=(1e-4, 3e-2), epochs=1, least_steps=6, evaluate_each=3, batch_size=4
    )
    monkeypatch.chdir(tmp_path)  # records name their data from where they lie
    run = small_run(Path(family_file.name), model_dir, Path("out"), adaptation=fit, scratch=False)
    family = fr.prepare(run)
    record = fr.adapt_model(run, family)
    sweep = json.loads((tmp_path / "out" / "adapted-rates.json").read_text())
    assert set(sweep) == {"0.0001", "0.03"}
    best = min(sweep, key=lambda rate: sweep[rate])
    assert record["settings"]["learning_rate"] == float(best)
    assert s.final_loss(record) == sweep[best]
    assert fr.adapt_model(run, family) == record
    assert [p.name for p in (tmp_path / "out").glob("adapted-*")] == ["adapted-rates.json"]


def test_a_split_directory_is_taken_as_it_is(tmp_path, random_proteins, model_dir):
    from tests.conftest import write_parts

    proteins = random_proteins(14, 40, 60)
    parts = {"train": proteins[:8], "validation": proteins[8:10], "test": proteins[10:]}
    write_parts(tmp_path / "split", parts)
    family = fr.prepare(small_run(tmp_path / "split", model_dir, tmp_path / "out"))
    assert [p.residues for p in family.test] == proteins[10:]
    assert not (tmp_path / "out").exists()
    assert any("rough" in note for note in family.notes)


# Other starts ---------------------------------------------------------------------------------


def llama_dir(folder, tokenizer, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.test_architectures import COMMON

    torch.manual_seed(0)
    settings = {**COMMON, "vocab_size": len(tokenizer), "max_position_embeddings": 256, **more}
    settings |= {"initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model("llama", **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_llama_of_another_layout_keeps_it_and_its_specialist_is_a_gpt2(
    tmp_path, family_file, monkeypatch
):
    from src.proteins.layouts import layout_of
    from tests.test_layouts import loaded

    monkeypatch.setattr(fr, "SPEED_SAMPLES", 2)
    folder = tmp_path / "out"
    tokenizer = loaded("progen", tmp_path / "llama")
    judgement = fr.run_family(
        small_run(family_file, llama_dir(tmp_path / "llama", tokenizer), folder)
    )
    for name in ("adapted", "random", "specialist"):
        assert layout_of(load_tokenizer(folder / name)) == layout_of(tokenizer)
    classes = {n: config_of(folder / n).model_type for n in ("adapted", "random", "specialist")}
    assert classes == {"adapted": "llama", "random": "llama", "specialist": "gpt2"}
    sizes = {n: m["parameters"] for n, m in judgement["models"].items()}
    assert sizes[s.START] == sizes[s.ADAPTED] == sizes[s.SCRATCH]
    prints = {n: model_fingerprint(load_causal_lm(folder / n)) for n in ("adapted", "random")}
    assert len({*prints.values(), model_fingerprint(load_causal_lm(tmp_path / "llama"))}) == 3
    assert set(judgement["held_out"]["nats"]) >= {s.START, s.ADAPTED, s.SCRATCH, s.SPECIALIST}


def test_a_layout_with_tags_is_refused_before_anything_is_made(tmp_path, family_file):
    from tests.test_layouts import loaded, model_of

    model_of(loaded("zymctrl", tmp_path / "model")).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"needs EC, of .*--layout '3.2.1.17<sep><start>\{resid"):
        fr.run_family(small_run(family_file, tmp_path / "model", tmp_path / "out"))
    assert not (tmp_path / "out" / "adapted").exists()


def test_a_family_s_tag_is_written_in_the_layout_once(tmp_path, family_file, monkeypatch):
    from src.evaluation.scoring import score_proteins
    from src.models.loading import ProteinModel
    from src.proteins.layouts import STANDARD_RESIDUES, TaggedProtein, layout_of
    from tests.test_layouts import loaded, model_of

    monkeypatch.setattr(fr, "SPEED_SAMPLES", 2)
    model = model_of(tokenizer := loaded("zymctrl", tmp_path / "model"))
    wanted = {tokenizer.get_vocab()[token] for token in (*STANDARD_RESIDUES, "<end>")}
    others = [token for token in range(len(tokenizer)) if token not in wanted]
    with torch.no_grad():  # random weights would hardly write a protein: digits are tokens too
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[others] = -0.5
    model.save_pretrained(tmp_path / "model")
    layout, folder = "3.2.1.17<sep><start>{residues}<end>", tmp_path / "out"
    run = replace(small_run(family_file, tmp_path / "model", folder), layout=layout)
    judgement = fr.run_family(run)
    for name in ("adapted", "random", "specialist"):
        assert layout_of(load_tokenizer(folder / name)).template == layout
    test = s.part_of(folder / "split", "test")
    start = ProteinModel.load(tmp_path / "model")
    tagged = [TaggedProtein(p.residues, "3.2.1.17") for p in test]
    nats = score_proteins(*start, tagged).nll.sum() / sum(map(len, tagged))
    assert judgement["held_out"]["nats"][s.START] == pytest.approx(nats)


def test_a_specialist_larger_than_the_model_is_refused_at_once(tmp_path, family_file, model_dir):
    run = replace(
        small_run(family_file, model_dir, tmp_path / "out"), specialist=StudentSettings(4, 2, 8)
    )
    with pytest.raises(ValueError, match="n_layer is 4, that of .* 2: .*--n_layer 2 or less"):
        fr.run_family(run)
    assert not (tmp_path / "out" / "adapted").exists()


# Low-rank adaptation --------------------------------------------------------------------------


def test_lora_without_peft_says_what_to_install(tmp_path, family_file, model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    run = replace(small_run(family_file, model_dir, tmp_path / "out"), lora_rank=2)
    with pytest.raises(ValueError, match="--lora needs peft: pip install -r"):
        fr.run_family(run)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lora_begins_at_the_model_and_is_merged_exactly(kind):
    pytest.importorskip("peft")
    from src.models.lora import add_lora, merge_lora
    from tests.test_architectures import build, rows

    model, plain = build(kind), build(kind)
    ids, mask = rows(9, 6)
    add_lora(model, 3, seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        own = plain(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, own)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
        changed = model(input_ids=ids, attention_mask=mask).logits
        assert not torch.allclose(changed, own, atol=1e-2)
        merge_lora(model)
        assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits, changed, atol=1e-4)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_lora_leaves_plain_weights_and_everything_after_it_is_unchanged(
    tmp_path, family_file, model_dir, monkeypatch
):
    pytest.importorskip("peft")
    monkeypatch.setattr(fr, "SPEED_SAMPLES", 2)
    folder = tmp_path / "out"
    fit = s.FitSettings((1e-2,), epochs=1, least_steps=8, evaluate_each=2, patience=4)
    run = replace(small_run(family_file, model_dir, folder, adaptation=fit), lora_rank=2)
    judgement = fr.run_family(run)
    start, adapted = (load_causal_lm(path) for path in (model_dir, folder / "adapted"))
    assert set(start.state_dict()) == set(adapted.state_dict())
    embedding = "transformer.wte.weight"
    assert torch.equal(start.get_parameter(embedding), adapted.get_parameter(embedding))
    record = json.loads((folder / "adapted" / "run.json").read_text())
    assert record["student"]["parameters"] == count_parameters(start)
    assert record["settings"]["lora_rank"] == 2
    assert judgement["held_out"]["nats"][s.ADAPTED] < judgement["held_out"]["nats"][s.START]
    assert fr.run_family(run) == judgement


def test_a_family_as_long_as_the_model_is_sampled_within_its_positions(model_dir):
    """There is no room for half as much again: that ended the command after the training."""
    wanted = c.CandidateSettings(num_candidates=5, temperature=1.0)
    positions = config_of(model_dir).n_positions
    drawn = c.sample_family(model_dir, wanted, positions, announce=lambda line: None)
    assert len(drawn["samples"]) == 5


# Killed --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_command_that_is_killed_in_each_stage_ends_in_the_same_result(tmp_path, model_dir):
    from tests.conftest import write_parts
    from tests.test_profiles import RESIDUES, mutants

    members = mutants((RESIDUES * 3)[:50], 30, 0.3, 5)
    parts = {"train": members[:20], "validation": members[20:25], "test": members[25:]}
    write_parts(tmp_path / "family", parts)

    def begin(folder):
        flags = ["--family", tmp_path / "family", "--model", model_dir, "--output_dir", folder]
        flags += ["--cache_dir", tmp_path / "cache", "--skip_random", "--num_candidates", 40]
        flags += ["--n_layer", 1, "--n_head", 2, "--n_embd", 8, "--device", "cpu"]
        command = [sys.executable, ROOT / "scripts" / "specialise.py", *flags]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([str(word) for word in command], **out)

    def kill(folder, pattern, number):
        process = begin(folder)
        while not any(folder.glob(pattern)) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        output = process.communicate(timeout=300)[0]
        assert process.returncode != 0, (pattern, output)

    def finish(folder):
        process = begin(folder)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
        return output

    calm, killed = tmp_path / "calm", tmp_path / "killed"
    finish(calm)
    kill(killed, "profile/run.json", signal.SIGKILL)
    kill(killed, "adapted/checkpoint-*", signal.SIGTERM)
    assert not (killed / "candidates").exists()
    kill(killed, "candidates/run.json", signal.SIGKILL)
    kill(killed, "specialist/checkpoint-*", signal.SIGKILL)
    kill(killed, "judgement/run.json", signal.SIGTERM)
    assert "adapted holds this run, finished" in finish(killed)
    for name in (
        "adapted/model.safetensors",
        "specialist/model.safetensors",
        "candidates/candidates.csv",
        "specialist-data/train.fasta",
    ):
        assert (calm / name).read_bytes() == (killed / name).read_bytes(), name
    figures = [json.loads((f / "judgement/judgement.json").read_text()) for f in (calm, killed)]
    assert figures[0]["held_out"] == figures[1]["held_out"]
    assert figures[0]["candidates"]["dropped"] == figures[1]["candidates"]["dropped"]


# The command ----------------------------------------------------------------------------------


def test_the_shape_of_a_specialist():
    def shape(*flags):
        parsed = build_parser().parse_args(["--family", "f", "--output_dir", "o", *flags])
        return student_shape(parsed)

    assert shape() is None
    assert shape("--student_preset", "xs") == PRESETS["xs"].student
    assert shape("--n_layer", "4", "--n_head", "2", "--n_embd", "64") == StudentSettings(4, 2, 64)
    with pytest.raises(ValueError, match="--n_layer, --n_head, --n_embd"):
        shape("--n_layer", "4")


def test_bad_input_is_one_line(tmp_path, refusal, model_dir, random_proteins, monkeypatch, capsys):
    dna = tmp_path / "dna.fasta"
    dna.write_text("".join(f">g{i}\n{'ACGTTGCA' * 9}{'A' * i}\n" for i in range(12)))
    one = tmp_path / "one.fasta"
    one.write_text(">a\nMKTAYIAKQR\n")
    out = tmp_path / "out"
    same = tmp_path / "same.fasta"
    same.write_text("".join(f">p{i}\n{'MKTAYIAKQR' * 5}\n" for i in range(20)))
    long = tmp_path / "long.fasta"
    long.write_text("".join(f">p{i}\n{p}\n" for i, p in enumerate(random_proteins(12, 900, 999))))
    mixed = tmp_path / "mixed.fasta"
    mixed.write_text("".join(f">p{i}\n{p}\n" for i, p in enumerate(random_proteins(20, 40, 60))))
    monkeypatch.setattr(
        "src.proteins.family_split.alignments",
        lambda proteins, queries, targets, settings: [
            Hit(a, b, 0.9, 1.0) for a in queries for b in targets if len(a) == len(b)
        ],
    )  # p0 to p9, and p10 to p19
    capsys.readouterr()  # what saving the model printed
    for path, words in (
        (dna, "nucleic acids"),
        (same, "20 proteins, 1 of them distinct: at least 10"),
        (long, "0 of these short enough"),
        (mixed, "2 groups without a detectable relative in another"),
        (one, "at least 10"),
        (tmp_path / "no.fasta", "no such"),
    ):
        line = refusal(
            main(["--family", str(path), "--model", str(model_dir), "--output_dir", str(out)])
        )
        assert words in line
        assert not list(out.glob("*/run.json"))
