"""Hostile files: some hundred through tools/fuzz_inputs.py, and each fault that it ever found."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from src.common.cli import one_line, printable
from src.common.files import is_plain_name, read_json
from src.common.runs import read_run
from src.evaluation.results import read_results, summary_lines, with_interval, write_results
from src.models.teacher_cache import TeacherCache
from src.proteins.report import ReadReport
from src.proteins.sources import read_entries
from src.proteins.splits import read_clusters, read_split
from tests.stress import fuzzing
from tests.test_results import good

ROOT = Path(__file__).resolve().parents[1]


# The generator and its watch


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return fuzzing.build_formats(tmp_path_factory.mktemp("valid"))


def run_all(formats, cases, seed=0, seconds=fuzzing.SECONDS):
    return list(fuzzing.run_cases(formats, cases, seed, seconds))


def test_every_valid_file_is_read(formats, tmp_path):
    for name, form in formats.items():
        folder = tmp_path / name
        try:
            kind, detail = fuzzing.outcome(form, form.files, folder)
        except fuzzing.Hang:
            pytest.fail(name)
        # A run that is not touched is unfinished and resumable.
        assert (name, kind, detail) == (name, "read", "")


def test_cases_are_shared_out_and_numbered(formats):
    cases = fuzzing.planned_cases(formats, 120)
    assert len(set(cases)) == len(cases) == 120
    assert {name for name, _ in cases} == set(formats)


def test_a_case_depends_on_its_seed_alone(formats):
    one, same, other = (fuzzing.spoiled_case(formats, "CSV", seed, 3) for seed in (1, 1, 2))
    assert one == same != other


def allocate(folder, files):
    np.ones(4 << 30, dtype=np.uint8)


def spin(folder, files):
    while True:
        pass


def kill_itself(folder, files):
    os.kill(os.getpid(), signal.SIGKILL)


def miscount(folder, files):
    raise fuzzing.Vanished("one protein")


def two_lines(folder, files):
    raise ValueError(f"{folder}\nand more")


def no_name(folder, files):
    raise ValueError("something is wrong")


def steer(folder, files):
    raise ValueError(f"{folder}: \x1b[2J")


def look_up(folder, files):
    raise KeyError("a")


def bare_unicode(folder, files):
    b"\xff".decode()


def right(folder, files):
    raise OSError(2, "No such file or directory", str(folder / "a"))


@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        (allocate, "MemoryError"),
        (spin, "hang"),
        (kill_itself, "death"),
        (miscount, "Vanished"),
        (two_lines, "message is not one line"),
        (no_name, "message names no file"),
        (steer, "message is not printable"),
        (look_up, "KeyError"),
        (bare_unicode, "bare UnicodeDecodeError"),
        (right, "refused"),
    ],
)
def test_what_is_wrong_is_seen(reader, kind):
    form = fuzzing.Format({"a": b"x"}, lambda files, rng: files, reader)
    ends = run_all({"f": form}, [("f", 0), ("f", 1)], seconds=1)
    assert [end[2] for end in ends] == [kind, kind], ends


def test_hostile_files_are_read_or_refused_with_a_line(tmp_path, formats):
    """The tool itself, in a process of its own: a fork of this one would inherit its threads."""
    output = tmp_path / "fuzz.json"
    command = [sys.executable, "tools/fuzz_inputs.py", "--cases", "120", "--seed", "11"]
    command += ["--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "cases 120, faults 0"
    record = json.loads(output.read_text())
    assert set(record["formats"]) == set(formats)
    counts = record["formats"].values()
    assert sum(count["read"] + count["refused"] for count in counts) == 120
    assert sum(count["read"] for count in counts) > 10
    assert sum(count["refused"] for count in counts) > 40
    assert {"command", "git", "versions"} <= set(record["run"])
    assert record["run"]["command"][0] == "fuzz_inputs.py"


def test_the_tool_fails_where_a_reader_does(monkeypatch, capsys):
    from tools import fuzz_inputs

    found = fuzzing.Format({"a": b"x"}, lambda files, rng: files, look_up)
    monkeypatch.setattr(fuzzing, "build_formats", lambda folder: {"f": found})
    with pytest.raises(SystemExit) as stopped:
        fuzz_inputs.main(["--cases", "3"])
    assert stopped.value.code == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "cases 3, faults 3"
    assert shown[0].startswith("f, case 0: KeyError")
    assert fuzz_inputs.main(["--format", "no such"]) == 2


# Bombs and endless lines: bounded memory and time


def growth_of(code: str, limit_bytes: int) -> tuple[str, float]:
    """Run code in a process that may not grow by more than a limit; return its line, seconds."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LIMITED}\n{code}"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(limit_bytes)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), time.monotonic() - started


LIMITED = """
import resource
import signal
from src.proteins.sources import read_entries
import src.evaluation.results, src.proteins.splits, src.common.runs, pyarrow.parquet, pathlib, csv, gzip
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
def told(action, *arguments):
    try:
        print("read", action(*arguments))
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("name", ["a.fasta", "a.txt", "a.csv", "a.json", "a.tsv.gz"])
def test_a_line_of_a_gigabyte(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as handle:
        handle.write(b">a\nMK\n" if name == "a.fasta" else b"")
        handle.truncate(1 << 30)  # a hole: zeros without a disk
    if name == "a.json":
        code = f"told(src.evaluation.results.read_results, {str(path)!r})"
    elif name == "a.tsv.gz":
        code = f"told(src.proteins.splits.read_clusters, pathlib.Path({str(path)!r}))"
    else:
        code = f"told(lambda: len(list(read_entries({str(path)!r}))))"
    line, seconds = growth_of(code, 400 << 20)
    assert name in line
    assert "read" not in line.split()[0]
    assert seconds < 120


@pytest.mark.slow
def test_a_line_of_a_gigabyte_of_residues(tmp_path):
    path = tmp_path / "a.fasta"
    with path.open("wb") as handle:
        handle.write(b">a\n")
        for _ in range(1024):
            handle.write(b"ACDEFGHI" * (1 << 17))
    line, _ = growth_of(f"told(lambda: len(list(read_entries({str(path)!r}))))", 100 << 20)
    assert "a.fasta:2: the line is longer than" in line


def bomb(path: Path, piece: bytes, unpacked: int) -> Path:
    with gzip.open(path, "wb", compresslevel=9) as handle:
        for _ in range(unpacked // (len(piece) * 1000)):
            handle.write(piece * 1000)
    return path


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("a.fasta.gz", b">a\n" + b"A" * 60 + b"\n"),
        ("a.txt.gz", b"\n"),
        ("a.csv.gz", b"sequence\n" + b"A" * 100 + b"\n"),
    ],
)
def test_a_packed_bomb(tmp_path, name, piece):
    path = bomb(tmp_path / name, piece, 40 << 20)
    assert path.stat().st_size < 400_000
    with pytest.raises(ValueError, match="decompression bomb") as caught:
        list(read_entries(path))
    assert name in str(caught.value)


def test_a_bomb_of_clusters(tmp_path):
    with pytest.raises(ValueError, match="bomb"):
        read_clusters(bomb(tmp_path / "c.tsv.gz", b"a" * 90 + b"\t" + b"a" * 90 + b"\n", 40 << 20))


@pytest.mark.parametrize("kind", ["page", "tokens"])
def test_a_parquet_bomb(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    if kind == "page":
        table, expected = pa.table({"sequence": ["A" * (64 << 20)]}), "decompression bomb"
    else:
        cells = pa.array([[0] * (1 << 25)], pa.list_(pa.int32()))
        table, expected = pa.table({"input_ids": cells}), "over 1,048,576 tokens"
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    line, _ = growth_of(f"told(lambda: len(list(read_entries({str(path)!r}))))", 1 << 30)
    assert re.search(expected, line)
    assert "a.parquet" in line


# Faults that were found, each with what mends it


def written(path: Path, value) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" * 5000, "digits"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[1,\n]", "line 2"),
    ],
)
def test_json_is_refused_with_its_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_json(written(tmp_path / "a.json", text))
    assert "a.json" in str(caught.value)


def test_json_has_a_largest_size_and_is_a_file(tmp_path):
    path = written(tmp_path / "a.json", [0] * 100)
    assert read_json(path, 1000) == [0] * 100
    with pytest.raises(ValueError, match="over 10 bytes"):
        read_json(path, 10)
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "", "missing.json", "a\0b"):
        with pytest.raises(ValueError, match="no file|cannot be read"):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perplexity_ratio": 10**400}, "perplexity_ratio is too large"),
        ({"run": {"seed": 10**400}}, "run.seed is too large"),
        ({"threshold": {"perplexity_ratio_below": []}}, "threshold.perplexity_ratio_below must"),
        ({"floors": {"unigram": {"perplexity_per_residue": "x"}}}, "floors.unigram"),
        ({"data": {"proteins": "x", "clusters": 3}}, "data.proteins must be a number"),
        ({"student_ece": {"ece": 0.1, "smooth_ece": []}}, "student_ece.smooth_ece"),
        ({"student_accuracy": []}, "student_accuracy must be a number"),
        ({"intervals": {"\x1b[2J": 3}}, r"\\x1b\[2J is 3"),
        ({"run": {"a": {"b" * 5000: float("inf")}}}, "is not valid|finite"),
    ],
)
def test_results_whose_figures_cannot_be_shown_are_refused(tmp_path, change, message):
    path = written(tmp_path / "r.json", {"schema_version": 1, **good(), **change})
    with pytest.raises(ValueError, match=message) as caught:
        read_results(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_what_is_nested_without_end_is_neither_written_nor_read(tmp_path):
    def nested(depth):
        return json.loads('{"a":' * depth + "[]" + "}" * depth)

    assert read_json(written(tmp_path / "a.json", nested(99))) == nested(99)
    for depth in (100, 300):
        with pytest.raises(ValueError, match="nested more than"):
            read_json(written(tmp_path / "a.json", nested(depth)))
        with pytest.raises(ValueError, match="nested more than"):
            write_results(tmp_path / "r.json", {**good(), "run": nested(depth)})
    for flat in (3, "x", None, [], {}, [1, [2]]):
        assert read_json(written(tmp_path / "a.json", json.dumps(flat))) == flat


def test_results_that_lack_what_is_optional_are_shown():
    for key in ("student_parameters", "share_of_teacher", "data", "threshold", "floors"):
        results = {k: v for k, v in good().items() if k != key}
        assert summary_lines(results)
    results = {**good(), "data": {"proteins": 3}}
    assert not any("clusters" in line for line in summary_lines(results))
    assert with_interval({"x": 1, "intervals": None}, "x") == "1.000"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": 3}, "not the record of a run"),
        ({"settings": []}, "not the record of a run"),
        ({"schema_version": 99}, "newer"),
        ({"schema_version": "1"}, "whole number"),
        ({"schema_version": None}, "whole number"),
        ({"schema_version": 1.5}, "whole number"),
        ({"teacher": 3}, "teacher must be an object"),
        ({"teacher": {"name": 3}}, "teacher.name must be a name"),
        ({"teacher": {"name": "a\0b"}}, "teacher.name must be a name"),
        ({"teacher": {"name": "a" * 5000}}, "teacher.name must be a name"),
        ({"settings": {"data": ["x"]}}, "settings.data must be a name"),
        ({"data": {"source": {}}}, "data.source must be a name"),
        ({"resumed": 3}, "resumed must be a list"),
    ],
)
def test_records_of_runs(tmp_path, change, message):
    record = {"schema_version": 1, "settings": {"data": "d"}, "teacher": {"name": "t"}}
    written(tmp_path / "run.json", record)
    assert read_run(tmp_path) == record
    written(tmp_path / "run.json", {**record, **change})
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"parts": None},
        {"parts": {}},
        {"parts": {"train": 3}},
        {"parts": {"train": {"proteins": "1", "residues": 1, "clusters": 1}}},
        {"parts": {"../x": {"proteins": 1, "residues": 1, "clusters": 1}}},
        {"leakage": {"test": 3}},
        {"leakage": 3},
        {"split_hash": 3},
        {"full_train": 3},
        {"full_train": {"leakage": {"test": {}}}},
        {"schema_version": 2},
    ],
)
def test_records_of_splits(tmp_path, change):
    entry = {"proteins": 1, "residues": 1, "clusters": 1, "hash": "x"}
    record = {"schema_version": 1, "parts": {"train": entry}, "leakage": {}, "split_hash": "x"}
    written(tmp_path / "split.json", record)
    assert read_split(tmp_path) == record
    written(tmp_path / "split.json", {**record, **change})
    with pytest.raises(ValueError, match=r"split.json: (not the record|schema_version)"):
        read_split(tmp_path)


def test_a_table_of_clusters_holds_names(tmp_path):
    with pytest.raises(ValueError, match="c.tsv:1: not two names"):
        read_clusters(written(tmp_path / "c.tsv", "a\tb\x1b[2J\n"))


@pytest.fixture
def cache(formats, tmp_path):
    fuzzing.write_files(tmp_path, formats["teacher cache"].files)
    return tmp_path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.update(width=0), "width"),
        (lambda m: m.update(width="8"), "width"),
        (lambda m: m.update(dtype=[]), "broken"),
        (lambda m: m.update(shards=3), "names no shard"),
        (lambda m: m["shards"][0].update(first=1), "does not follow"),
        (lambda m: m["shards"][0].update(lengths=[-1]), "lengths"),
        (lambda m: m["shards"][0]["lengths"].append(10**30), "lengths"),
        (lambda m: m["shards"][0]["lengths"].append(5), "sizes"),
        (lambda m: m["shards"][0].update(files=3), "broken"),
        (lambda m: m["shards"][0].update(files={"../a": {}, "b": {}}), "files"),
        (lambda m: m["shards"].reverse(), "does not follow"),
        (lambda m: m.pop("shards"), "broken"),
    ],
)
def test_manifests_of_teacher_caches(cache, spoil, message):
    path = cache / "manifest.json"
    manifest = json.loads(path.read_text())
    assert len(TeacherCache(cache, "teacher", "data")[0][0])
    spoil(manifest)
    written(path, manifest)
    with pytest.raises(ValueError, match=message) as caught:
        TeacherCache(cache, "teacher", "data")
    assert str(cache) in str(caught.value)


def test_a_teacher_cache_without_its_last_proteins(cache):
    path = cache / "manifest.json"
    manifest = json.loads(path.read_text())
    proteins = sum(len(shard["lengths"]) for shard in manifest["shards"])
    manifest["shards"].pop()
    written(path, manifest)
    with pytest.raises(ValueError, match="is not among the"):
        TeacherCache(cache, "teacher", "data")[proteins - 1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.update(version="\ud800"), r"of version '\\ud800'"),
        (lambda m: m.pop("files"), "broken"),
        (lambda m: m["files"].pop("names.bin"), "its files are others"),
        (lambda m: m["files"]["names.bin"].update(bytes=[]), "size or hash"),
        (lambda m: m["files"]["tokens.bin"].pop("sha256"), "broken"),
        (lambda m: m.update(proteins=m["proteins"] + 1), "size of"),
        (lambda m: m.update(dtype="O"), "dtype"),
        (lambda m: m.update(report=3), "broken"),
    ],
)
def test_manifests_of_token_stores_signed_anew(formats, tmp_path, spoil, message):
    from src.common.manifest import signature
    from src.proteins.tokens import open_store

    fuzzing.write_files(tmp_path, formats["token store"].files)
    assert len(open_store(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    spoil(manifest)
    manifest["check"] = signature(manifest)
    written(tmp_path / "manifest.json", manifest)
    with pytest.raises(ValueError, match=message):
        open_store(tmp_path)


def test_a_tokenizer_that_fails_in_use_is_refused_when_loaded(formats, tmp_path):
    from src.models.loading import load_tokenizer

    fuzzing.write_files(tmp_path, formats["tokenizer"].files)
    load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    written(path, {**json.loads(path.read_text()), "unk_token": ""})
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_names_and_messages():
    assert all(map(is_plain_name, ("a", "model.safetensors", "shard-00001.bin", "é")))
    for name in ("", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0", "a\n", "a" * 201, 3, None):
        assert not is_plain_name(name)
    assert printable("a\x1b[2J\ud800\u202eé") == r"a\x1b[2J\ud800\u202eé"
    assert one_line(ValueError("a\nb\x07")) == r"a b\x07"
    assert one_line(ValueError()) == "ValueError"


def test_a_column_name_cannot_steer_a_terminal(tmp_path):
    path = written(tmp_path / "a.csv", "\x1b[2J,b\n1,2\n")
    with pytest.raises(ValueError, match=r"no column.*\\x1b"):
        list(read_entries(path, report=ReadReport()))


def test_the_limit_that_bombs_are_tried_under_is_one():
    code = "try:\n    bytes(1 << 30)\nexcept MemoryError:\n    print('refused')"
    assert growth_of(code, 200 << 20)[0] == "refused"
