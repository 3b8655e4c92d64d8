from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from src.common.files import check_outputs
from src.evaluation.results import (
    REQUIRED,
    SCHEMA_VERSION,
    SECTIONS,
    lookup,
    print_table,
    read_results,
    summary_lines,
    validate,
    with_interval,
    write_results,
)


def good() -> dict:
    return {
        "perplexity_ratio": 1.5,
        "kl_divergence": 0.2,
        "student_ece": {"ece": 0.03, "smooth_ece": 0.02, "calibration_meaningful": False},
        "teacher_ece": {"ece": 0.02},
        "student_perplexity": 30.0,
        "teacher_perplexity": 20.0,
        "compression_ratio": 4.0,
        "student_parameters": 10,
        "teacher_parameters": 40,
        "share_of_teacher": 0.25,
        "kept_advantage": 0.6,
        "threshold": {"perplexity_ratio_below": 2.0, "passed": True},
        "floors": {"uniform": {"perplexity_per_residue": 20.0}},
        "data": {"proteins": 5, "clusters": 4},
        "kl_from_natural": {"student": 0.01, "teacher": None},
        "intervals": {"perplexity_ratio": [1.4, 1.6], "kl_divergence": None},
        "run": {"seed": 0},
    }


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results(path, good())
    assert read_results(path) == {"schema_version": SCHEMA_VERSION, **good()}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_directories_of_others_are_left_out_of_what_made_it(tmp_path):
    path = tmp_path / "results.json"
    where = "/tmp/x/alice/home/cache"
    made = {
        "run": {"arguments": {"cache_dir": where}, "command": [f"--cache_dir={where}"]},
        "settings": {"key": "0" * 64, "train": {"data": "/home/alice/sets/p.fasta"}},
    }
    write_results(path, good() | made)
    found = read_results(path)
    assert found["run"] == {"arguments": {"cache_dir": "cache"}, "command": ["--cache_dir=cache"]}
    assert found["settings"] == {"key": "0" * 64, "train": {"data": "p.fasta"}}


def test_a_file_is_not_overwritten_without_leave(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("precious")
    with pytest.raises(ValueError, match="--overwrite"):
        write_results(path, good())
    assert path.read_text() == "precious"
    write_results(path, good(), overwrite=True)
    assert read_results(path)["perplexity_ratio"] == 1.5
    with pytest.raises(ValueError, match="is a directory"):
        write_results(tmp_path, good(), overwrite=True)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="file is a file, not a directory"):
        check_outputs(tmp_path / "file" / "deeper" / "r.json", overwrite=True)
    check_outputs(tmp_path / "new" / "deeper" / "r.json", overwrite=False)
    assert not (tmp_path / "new").exists()
    if Path("/proc").is_dir():  # which takes no files, from root either
        with pytest.raises(ValueError, match="new/r.json cannot be written in /proc: "):
            check_outputs("/proc/new/r.json", overwrite=False)


def test_an_input_is_never_replaced(tmp_path):
    (tmp_path / "r.json").write_text("precious")
    for path in (tmp_path / "r.json", tmp_path / "new" / ".." / "r.json"):
        with pytest.raises(ValueError, match="r.json is an input: name another file"):
            check_outputs(path, overwrite=True, inputs=[None, str(tmp_path / "r.json")])
    check_outputs(tmp_path / "r.json", overwrite=True, inputs=[None, str(tmp_path)])


MODEL = "data/small_teacher"
REPLACING = """
evaluate --student_model MODEL --data {} --output {}
evaluate --student_model MODEL --profiles {} --output r --per_protein {}
generate --model MODEL --max_identity 0.5 --against {} --output {}
report --results {} --output {}
report --fasta {} --output {}
score --model MODEL --input {} --output {}
score --model MODEL --input {} --output r --correlations {}
score --model MODEL --wildtype {} --mutants M1A --output {}
score --model MODEL --wildtype MKV --mutants {} --output {}
"""
NEW = """
compare results/students/recommended_1500.json --output {}
evaluate --student_model MODEL --output {}
generate --model MODEL --output {}
report --results results/students/recommended_1500.json --output {}
score --model MODEL --wildtype MKV --mutants M1A --output {}
"""


def typed(line: str, path: Path) -> tuple[Callable[[list[str]], int], list[str]]:
    """Return a script's main and the arguments of a line, with a file's name filled in."""
    script, *words = line.replace("MODEL", MODEL).replace("{}", str(path)).split()
    return importlib.import_module(f"scripts.{script}").main, words


@pytest.mark.parametrize("line", REPLACING.strip().splitlines())
def test_no_script_replaces_what_it_reads(line, tmp_path, capsys):
    path = tmp_path / "precious.txt"
    path.write_text("MKV\n")
    main, words = typed(line, path)
    assert main([*words, "--overwrite"]) == 2
    assert "precious.txt is an input" in capsys.readouterr().err
    assert path.read_text() == "MKV\n"


@pytest.mark.parametrize("line", NEW.strip().splitlines())
def test_no_script_overwrites_unasked(line, tmp_path, capsys):
    path = tmp_path / "precious.md"
    path.write_text("mine")
    main, words = typed(line, path)
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_two_outputs_of_one_name_are_refused(tmp_path):
    twice = [tmp_path / "r.json", tmp_path / "folder" / ".." / "r.json"]
    with pytest.raises(ValueError, match="named for two outputs"):
        check_outputs(*twice, overwrite=True)
    check_outputs(twice[0], None, None, overwrite=False)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("perplexity_ratio", -1.0, "perplexity_ratio must be above 0"),
        ("perplexity_ratio", "2", "perplexity_ratio must be a number"),
        ("perplexity_ratio", True, "perplexity_ratio must be a number"),
        ("perplexity_ratio", float("nan"), "perplexity_ratio must be above 0"),
        ("kl_divergence", float("inf"), "kl_divergence is not a finite number"),
        ("student_ece", 0.1, "student_ece must be an object"),
        ("student_ece", {"ece": 2}, "student_ece.ece must be at most 1"),
        ("intervals", None, "intervals must be an object"),
        ("intervals", {"x": [2, 1]}, r"intervals.x must be \[low, high\]"),
        ("intervals", {"x": [1]}, r"intervals.x must be \[low, high\]"),
        ("kl_from_natural", {"student": "a"}, "kl_from_natural.student must be a number"),
        ("run", [], "run must be an object"),
        ("top1_agreement", 1.2, "top1_agreement must be at most 1"),
        ("run", {"a": [{"b": float("nan")}]}, r"run\.a\[0\]\.b is not a finite"),
        ("run", {"b" * 5000: float("inf")}, "is not a finite"),
        ("perplexity_ratio", 10**400, "perplexity_ratio must be"),
        ("intervals", {"\x1b[2J": 3}, "intervals"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path, key, value, message):
    path = tmp_path / "bad.json"
    with pytest.raises(ValueError, match=message) as caught:
        write_results(path, {**good(), key: value})
    assert "bad.json" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert not path.exists()


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_missing_keys_are_named(tmp_path, key):
    results = good()
    del results[key]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        write_results(tmp_path / "r.json", results)


def test_files_of_the_first_scripts_are_read(tmp_path):
    path = tmp_path / "old.json"
    old = {"perplexity_ratio": 18.95, "kl_divergence": 2.23, "student_ece": {"ece": 0.274}}
    path.write_text(json.dumps({**old, "teacher_ece": 0.1, "kl_from_natural": 0.03}))
    results = read_results(path)
    assert results["schema_version"] == SCHEMA_VERSION
    assert results["student_ece"]["ece"] == 0.274
    assert results["teacher_ece"] == {"ece": 0.1}
    assert results["kl_from_natural"] == {"student": 0.03, "teacher": None}
    assert results["student_perplexity"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "not a results file"),
        ('{"schema_version": 99}', "newer"),
        ('{"schema_version": "1"}', "whole number"),
        ('{"schema_version": 1}', "is missing"),
        ('{"schema_version": true}', "whole number"),
        ("[" * 100_000, "not valid JSON"),
        ('{"perplexity_ratio": NaN}', "above 0"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_results(path)
    assert "broken.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_mixture_of_values_is_read_or_refused_with_a_line():
    rng = random.Random(0)
    pool = [None, -1, 0, 0.5, 3, True, "x", [], [1, 2], {}, {"ece": []}, {"student": {}}, 1e400]
    keys = [*REQUIRED, *(key for key in SECTIONS if "." not in key)]
    for _ in range(3000):
        results = {"schema_version": 1, **good()}
        for key in rng.sample(keys, k=rng.randint(1, 4)):
            results[key] = rng.choice(pool)
        refused = None
        try:
            validate(results, "r.json")
        except ValueError as error:
            refused = str(error)
        assert refused is None or refused.startswith("r.json: ")


def test_figures_by_dotted_name():
    assert lookup(good(), "student_ece.ece") == 0.03
    assert lookup(good(), "student_ece.nothing") is None
    assert lookup(good(), "perplexity_ratio.nothing") is None


def test_table_for_a_person(capsys):
    assert with_interval(good(), "perplexity_ratio") == "1.500 [1.400, 1.600]"
    assert with_interval(good(), "kl_divergence") == "0.200"
    print_table(good())
    shown = capsys.readouterr().out
    assert "1.500 [1.400, 1.600]" in shown
    assert "ratio below 2.00: passed" in shown
    assert "calibration of the student is not meaningful" in shown
    assert summary_lines({}) == []


def test_intervals_of_few_clusters_are_warned_of():
    results = good() | {"intervals": {"kl_divergence": [0.1, 0.3]}}
    line = "intervals are too narrow: 4 clusters, at least 5 are needed"
    assert line in summary_lines(results)
    assert line not in summary_lines(results | {"data": {"proteins": 5, "clusters": 5}})
    assert line not in summary_lines(results | {"intervals": {}})


def test_proteins_that_the_student_was_trained_on_are_told():
    line = "the student was trained on these proteins: the figures say nothing about new ones"
    for seen in (True, False):
        results = good() | {"run": {"data": {"trained_on": seen}}}
        assert (line in summary_lines(results)) is seen


def test_without_a_table_of_relatives_no_clusters_are_claimed():
    results = good() | {"data": {"proteins": 9, "clusters": 9, "cluster_kind": "proteins"}}
    (line,) = (line for line in summary_lines(results) if line.startswith("9 proteins"))
    assert "clusters" not in line
    assert "too narrow if many are relatives" in line


def test_a_share_of_an_advantage_that_is_not_clear_is_not_told():
    floors = {"floors": {"unigram": {"student_gain": 0.01, "teacher_gain": 0.02}}}
    for kept, said in ((None, True), (0.5, False)):
        results = good() | floors | {"kept_advantage": kept}
        assert any("is not told" in line for line in summary_lines(results)) is said


@pytest.mark.parametrize(("gain", "said"), [(-0.2, True), (0.0, True), (0.1, False), (None, False)])
def test_a_student_below_the_floor_is_named(gain, said):
    results = good() | {"floors": {"unigram": {"student_gain": gain, "teacher_gain": 0.3}}}
    line = "the student predicts proteins no better than the frequencies of residues alone"
    assert (line in summary_lines(results)) is said
    assert not any("the teacher predicts" in line for line in summary_lines(results))
