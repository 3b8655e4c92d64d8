"""scripts/generate.py as a user runs it."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from scripts.generate import main
from src.evaluation.generation import Begun
from src.proteins.sources import read_proteins


@pytest.fixture
def folder(tiny_lm, saved_model, tmp_path):
    """Write a model that ends proteins often enough."""
    saved_model(tmp_path / "model", tiny_lm(n_embd=24, seed=4, initializer_range=0.1))
    return tmp_path


def run(folder, *options, name="new.fasta"):
    return main(
        ["--model", str(folder / "model"), "--output", str(folder / name), "--device", "cpu"]
        + [str(option) for option in options]
    )


def headers(path):
    entries = [line[1:].split() for line in path.read_text().splitlines() if line[0] == ">"]
    return [(name, dict(word.split("=", 1) for word in words)) for name, *words in entries]


def test_a_run(folder, capsys):
    options = ("--num_sequences", 4, "--min_length", 2, "--max_length", 200, "--prompt", "MK")
    assert run(folder, *options) == 0
    shown = capsys.readouterr().out
    assert "attempts: 4 kept" in shown
    assert "proteins/s" in shown
    assert f"written: {folder / 'new.fasta'}" in shown
    proteins = list(read_proteins(folder / "new.fasta", keep_ambiguous=True))
    assert len(proteins) == 4
    assert all(p.residues.startswith("MK") and len(p.residues) <= 200 for p in proteins)
    for (name, fields), protein in zip(headers(folder / "new.fasta"), proteins, strict=True):
        assert name == protein.name
        assert float(fields["perplexity_per_residue"]) > 1
        assert int(fields["residues"]) == len(protein.residues)
        assert (fields["model"], fields["seed"], fields["whole"]) == ("model", "0", "yes")
        assert "scorer" not in fields
    assert run(folder, *options, "--batch_size", 2, name="again.fasta") == 0
    assert (folder / "again.fasta").read_text() == (folder / "new.fasta").read_text()


def test_a_full_disk_is_named_with_a_way_out(folder, capsys, full_disk):
    full_disk("src.proteins.fasta.write_fasta")
    assert run(folder, "--num_sequences", 1) == 2
    said = capsys.readouterr().err
    assert f"{folder / 'new.fasta'}: no space left on the disk; make space, or name" in said


def test_ranking_by_another_model(folder, tiny_lm, saved_model):
    saved_model(folder / "judge", tiny_lm(seed=9))
    options = ("--num_sequences", 6, "--rank_by_perplexity")
    assert run(folder, *options) == 0
    assert run(folder, *options, "--scorer", folder / "judge", name="judged.fasta") == 0
    ranked, judged = headers(folder / "new.fasta"), headers(folder / "judged.fasta")
    for found in (ranked, judged):
        values = [float(fields["perplexity_per_residue"]) for _, fields in found]
        assert values == sorted(values)
        assert [name for name, _ in found] == [f"protein_000{i}" for i in range(1, 7)]
    assert judged[0][1]["scorer"] == "judge"
    assert {f["attempt"] for _, f in ranked} == {f["attempt"] for _, f in judged}


def test_every_sampling_flag_changes_something(folder):
    run(folder, "--num_sequences", 3)
    plain = (folder / "new.fasta").read_text().splitlines()[1:]
    for number, option in enumerate(
        (
            ("--top_k", 3),
            ("--top_p", 0.3),
            ("--repetition_penalty", 2.0),
            ("--temperature", 0.5),
            ("--seed", 1),
            ("--prompt", "W"),
            ("--min_length", 40),
            ("--max_length", 5, "--allow_unfinished"),
            ("--length", "40-200"),
            ("--ban_residues", "ACDEFG"),
        )
    ):
        assert run(folder, "--num_sequences", 3, *option, name=f"{number}.fasta") == 0
        assert (folder / f"{number}.fasta").read_text().splitlines()[1:] != plain, option


def test_families_are_named(folder, profiles, capsys):
    """A protein that begins with a family's member is hit by the family's profile."""
    member, hmms = profiles
    options = ("--profiles", hmms / "gathering.hmm", "--num_sequences", 2)
    assert run(folder, *options, "--prompt", member, name="members.fasta") == 0
    assert [fields["family"] for _, fields in headers(folder / "members.fasta")] == ["family"] * 2
    assert "2 of 2 proteins hit a known family, 1 of the 1 families" in capsys.readouterr().out
    assert run(folder, *options, name="others.fasta") == 0
    assert [fields["family"] for _, fields in headers(folder / "others.fasta")] == ["none"] * 2
    assert "residues  no known family" in capsys.readouterr().out
    assert run(folder, "--profiles", folder / "none.hmm") == 2
    assert "none.hmm: there is no such HMM file" in capsys.readouterr().err


def test_filters_are_told_by_reason(folder, capsys):
    assert run(folder, "--num_sequences", 3) == 0
    capsys.readouterr()
    known = ("--max_identity", 0.9, "--against", folder / "new.fasta")
    options = ("--distinct", "--drop_repeats", *known)
    assert run(folder, "--num_sequences", 3, *options, name="other.fasta") == 0
    assert "too close to a known protein" in capsys.readouterr().out
    first, second = (
        {p.residues for p in read_proteins(folder / name, keep_ambiguous=True)}
        for name in ("new.fasta", "other.fasta")
    )
    assert len(second) == 3
    assert not first & second


def test_a_file_is_overwritten_when_asked(folder):
    (folder / "new.fasta").write_text("mine")
    assert run(folder, "--num_sequences", 1, "--overwrite") == 0
    assert (folder / "new.fasta").read_text().startswith(">")
    assert run(folder, name=".") == 2


def test_too_few_are_told_and_none_is_an_error(folder, refusal, capsys):
    assert run(folder, "--num_sequences", 9, "--max_attempts", 9, "--min_length", 60) == 0
    kept = len(headers(folder / "new.fasta"))
    assert 0 < kept < 9
    assert f"only {kept} of 9 proteins found: widen" in capsys.readouterr().out
    hopeless = ("--num_sequences", 3, "--min_length", 200, "--max_length", 201)
    error = refusal(run(folder, *hopeless, "--max_attempts", 5, name="none.fasta"))
    assert "only 0 of 3 proteins found" in error
    assert not (folder / "none.fasta").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "MK2"), "--prompt: '2' is not a residue"),
        (("--max_length", 99999), "the model's 256 positions hold at most"),
        (("--min_length", 9, "--max_length", 5), "--max_length 5 is below --min_length 9"),
        (("--length", "5-9", "--min_length", 3), "--length sets both"),
        (("--length", "9-"), "must be a range such as 80-120, got '9-'"),
        (("--length", "5:9"), "must be a range such as 80-120, got '5:9'"),
        (("--length", "9-5"), "--max_length 5 is below --min_length 9"),
        (("--max_identity", 0.5), "--max_identity and --against go together"),
        (("--ban_residues", "4"), "--ban_residues: '4' is none of"),
        (("--scorer", "./nowhere"), "there is no such directory"),
        (("--device", "cuda"), "no CUDA device"),
        (("--device", "xpu"), "--device must be auto, cpu, cuda, cuda:N or mps, got 'xpu'"),
        (("--device", "cpu:1"), "--device must be auto, cpu, cuda, cuda:N or mps, got 'cpu:1'"),
        (("--temperature", "1e-320"), "--temperature must be above 0, from 1e-12"),
        (("--temperature", "1e308"), "--temperature: must be above 0 and at most 1e+12"),
        (("--repetition_penalty", "1e308"), "--repetition_penalty: must be above 0 and at most"),
        (("--repetition_penalty", "1e-308"), "--repetition_penalty must be above 0, from"),
        (("--batch_size", "9" * 30), "--batch_size: must be at most"),
    ],
)
def test_errors_are_one_line(folder, refusal, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert message in refusal(lambda: run(folder, *options))


@pytest.mark.parametrize(
    "options",
    [
        ("--temperature", "1e-12", "--repetition_penalty", "1e12"),
        ("--temperature", "1e-12", "--repetition_penalty", "1e-12"),
        ("--temperature", "1e12", "--repetition_penalty", "1e12"),
    ],
)
def test_the_limits_of_sampling_are_numbers_to_the_model(folder, capsys, options):
    """What is sampled there is of no use: it need only not look like a fault of the model."""
    run(folder, *options, "--num_sequences", 1, "--max_attempts", 2)
    assert " attempts: " in capsys.readouterr().out


def test_a_tokenizer_without_an_end(folder, capsys):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / "model" / name
        if path.exists():
            record = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in record.items() if k != "eos_token"}))
    assert run(folder) == 0  # the layout says what ends a protein
    assert "written" in capsys.readouterr().out


def test_help_is_quick_and_complete(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--rank_by_perplexity", "--scorer", "--allow_unfinished"))


@pytest.mark.parametrize("options", [(), ("--distinct", "--drop_repeats", "--min_length", "9")])
def test_a_stopped_run_goes_on_to_the_same_proteins(folder, options, capsys, monkeypatch):
    wanted = ("--num_sequences", 30, *options)
    assert run(folder, *wanted, name="whole.fasta") == 0
    counts = capsys.readouterr().out.splitlines()
    add = Begun.add

    def stopping(self, protein, tally):
        add(self, protein, tally)
        if tally.kept % 11 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Begun, "add", stopping)
    begun = folder / "new.fasta.begun"
    for stopped in (11, 22):
        assert run(folder, *wanted, "--batch_size", stopped) == 130
        assert len(begun.read_text().splitlines()) == 1 + stopped
        with begun.open("a") as handle:
            handle.write('{"residues": "MK')  # killed while it wrote
    assert not (folder / "new.fasta").exists()
    assert run(folder, *wanted, "--seed", 1) == 2
    assert "new.fasta.begun: proteins of a stopped run with another seed" in capsys.readouterr().err
    assert run(folder, "--num_sequences", 7, *options, name="few.fasta") == 0
    begun_again = begun.read_text()
    capsys.readouterr()
    assert run(folder, *wanted) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any("going on after 22 proteins" in line for line in shown)
    assert [s for s in shown if "attempts:" in s] == [s for s in counts if "attempts:" in s]
    assert (folder / "new.fasta").read_text() == (folder / "whole.fasta").read_text()
    assert not begun.exists()
    begun.write_text(begun_again)  # fewer are wanted than there are
    assert run(folder, "--num_sequences", 7, *options, "--overwrite") == 0
    assert (folder / "new.fasta").read_text() == (folder / "few.fasta").read_text()


def test_a_run_that_finds_nothing_leaves_nothing(folder):
    assert run(folder, "--num_sequences", 1, "--min_length", 240, "--max_attempts", 2) == 2
    assert not list(folder.glob("new.*"))


def test_a_name_with_gz_is_packed_and_read_again(folder):
    assert run(folder, "--num_sequences", 2) == 0
    assert run(folder, "--num_sequences", 2, name="new.fasta.gz") == 0
    assert (
        gzip.decompress((folder / "new.fasta.gz").read_bytes()).decode()
        == (folder / "new.fasta").read_text()
    )
    assert len(list(read_proteins(folder / "new.fasta.gz", keep_ambiguous=True))) == 2


def test_residues_to_ban_as_people_write_them(folder):
    files = ("C,W", "cw", "C W", "CWX")
    for number, banned in enumerate(files):
        name = f"{number}.fasta"
        assert run(folder, "--num_sequences", 5, "--ban_residues", banned, name=name) == 0
    texts = {(folder / f"{number}.fasta").read_text() for number in range(3)}
    assert len(texts) == 1
    assert "W" not in "".join(texts).split("\n", 1)[1]
