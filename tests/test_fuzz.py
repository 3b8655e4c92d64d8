"""Hostile files: a hundred from tests/stress/fuzz.py, bombs, and the faults that it once found."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from src.common.cli import one_line, printable
from src.common.files import is_plain_name, read_json
from src.evaluation.results import summary_lines, write_results
from src.proteins.homology import read_clusters
from src.proteins.sources import read_proteins
from tests.conftest import run_python
from tests.spoiling import refusals
from tests.stress import fuzz
from tests.test_results import good

ROOT = Path(__file__).resolve().parents[1]


# The generator and its watch


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return fuzz.build_formats(tmp_path_factory.mktemp("valid"))


def test_every_valid_file_is_read(formats, tmp_path):
    ends = {name: fuzz.outcome(form, form.files, tmp_path / "a") for name, form in formats.items()}
    assert ends == dict.fromkeys(formats, ("read", ""))


def allocate(folder, files):
    np.ones(4 << 30, dtype=np.uint8)


def spin(folder, files):
    while True:
        pass


def kill_itself(folder, files):
    os.kill(os.getpid(), signal.SIGKILL)


def lose_a_protein(folder, files):
    raise fuzz.Vanished("one protein")


def two_lines(folder, files):
    raise ValueError(f"{folder}\nand more")


def no_name(folder, files):
    raise ValueError("something is wrong")


def steer(folder, files):
    raise ValueError(f"{folder}: \x1b[2J")


def bare_unicode(folder, files):
    b"\xff".decode()


def fail_on_zeros(folder, files):
    if b"\0" in (folder / "a").read_bytes():
        raise KeyError("a")


def refuse(folder, files):
    raise OSError(2, "No such file or directory", str(folder / "a"))


@pytest.mark.parametrize(
    ("reader", "fault"),
    [
        (allocate, "MemoryError"),
        (spin, "hang"),
        (kill_itself, "death"),
        (lose_a_protein, "Vanished"),
        (two_lines, "message is not one line"),
        (no_name, "message names no file"),
        (steer, "message is not printable"),
        (bare_unicode, "bare UnicodeDecodeError"),
        (fail_on_zeros, "KeyError"),
        (refuse, ""),
    ],
)
def test_every_kind_of_fault_is_seen(reader, fault, tmp_path):
    form = fuzz.Format({"a": b"xyz"}, ["a"], reader)
    ends, seen = fuzz.run_format(form, 200, 0, tmp_path / "case", seconds=1)
    assert seen.split(":")[0] == fault
    if reader is refuse:
        assert ends == {"refused": 200}
    if reader is fail_on_zeros:
        assert (tmp_path / "case" / "a").read_bytes().count(b"\0") == 1, "shrunk"


def test_hostile_files_are_read_or_refused_with_a_line(tmp_path, formats):
    """Run the tool in a process of its own: a fork of this one would inherit its threads."""
    output = tmp_path / "fuzz.json"
    command = ["tests/stress/fuzz.py", "--cases", "60", "--seed", "11", "--output"]
    done = run_python(*command, output)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    assert (record["cases"], record["faults"]) == (60, 0)
    counts = record["formats"]
    assert set(counts) == set(formats)
    assert sum(count.get("read", 0) for count in counts.values()) > 10
    assert sum(count.get("refused", 0) for count in counts.values()) > 40
    assert record["run"]["command"][0] == "fuzz.py"


def test_the_tool_fails_where_a_reader_does_and_keeps_the_case(monkeypatch, capsys, tmp_path):
    form = fuzz.Format({"a": b"x"}, ["a"], lose_a_protein)
    monkeypatch.setattr(fuzz, "build_formats", lambda folder: {"f": form})
    with pytest.raises(SystemExit) as stopped:
        fuzz.main(["--cases", "3", "--keep", str(tmp_path)])
    assert stopped.value.code == 1
    assert "Vanished" in capsys.readouterr().out
    assert (tmp_path / "f" / "a").exists()
    assert fuzz.main(["--format", "no such"]) == 2


# Bombs and endless lines: bounded memory and time


def output_within(code: str, limit_bytes: int) -> str:
    """Run code in a process that may not grow by more than a limit, and return its output."""
    done = run_python("-c", f"{LIMITED}\n{code}", limit_bytes)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LIMITED = """
import pathlib, resource, sys
from src.proteins.sources import read_proteins
import src.evaluation.results, src.proteins.homology
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
def refusal_of(action, *arguments):
    try:
        print("read", action(*arguments))
    except ValueError as error:
        print(error)
"""


def test_the_limit_that_bombs_are_tried_under_is_one():
    code = "try:\n    bytes(1 << 30)\nexcept MemoryError:\n    print('refused')"
    assert output_within(code, 200 << 20) == "refused"


@pytest.mark.parametrize("name", ["a.fasta", "a.txt", "a.csv", "a.json", "a.tsv.gz"])
def test_a_line_of_a_gigabyte(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as handle:
        handle.write(b">a\nMK\n" if name == "a.fasta" else b"")
        handle.truncate(1 << 30)  # a hole: zeros without a disk
    reader = {
        "a.json": "src.evaluation.results.read_results",
        "a.tsv.gz": "lambda p: src.proteins.homology.read_clusters(pathlib.Path(p))",
    }.get(name, "lambda p: len(list(read_proteins(p)))")
    started = time.monotonic()
    line = output_within(f"refusal_of({reader}, {str(path)!r})", 400 << 20)
    assert name in line
    assert not line.startswith("read")
    assert time.monotonic() - started < 120


@pytest.mark.slow
def test_a_line_of_a_gigabyte_of_residues(tmp_path):
    path = tmp_path / "a.fasta"
    with path.open("wb") as handle:
        handle.write(b">a\n")
        for _ in range(1024):
            handle.write(b"ACDEFGHI" * (1 << 17))
    line = output_within(f"refusal_of(lambda: len(list(read_proteins({str(path)!r}))))", 100 << 20)
    assert "a.fasta:2: the line is longer than" in line


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("a.fasta.gz", b">a\n" + b"A" * 60 + b"\n"),
        ("a.txt.gz", b"\n"),
        ("a.csv.gz", b"sequence\n" + b"A" * 100 + b"\n"),
        ("c.tsv.gz", b"a" * 90 + b"\t" + b"a" * 90 + b"\n"),
    ],
)
def test_a_packed_bomb(tmp_path, name, piece):
    path = tmp_path / name
    path.write_bytes(gzip.compress(piece * ((40 << 20) // len(piece))))
    assert path.stat().st_size < 400_000
    read = read_clusters if name == "c.tsv.gz" else lambda path: list(read_proteins(path))
    with pytest.raises(ValueError, match="bomb") as caught:
        read(path)
    assert name in str(caught.value)


# Faults that were found


def changed(raw: bytes, change) -> bytes:
    """Return a JSON file with some values replaced by a function or an object."""
    value = json.loads(raw)
    if callable(change):
        change(value)
    else:
        value |= change
    return json.dumps(value).encode()


ONE_PART = {"proteins": 1, "residues": 1, "clusters": 1}
REFUSED = {
    ("run.json", "run.json"): [
        {"schema_version": 99},
        {"schema_version": 1.5},
        {"settings": []},
        {"teacher": {"name": "a" * 5000}},
    ],
    ("split record", "split.json"): [{"parts": {"../x": ONE_PART}}, {"schema_version": 2}],
    ("teacher cache", "manifest.json"): [
        {"width": 0},
        lambda m: m["shards"][0].update(first=1),
        lambda m: m["shards"][0]["lengths"].append(5),
        lambda m: m["shards"][0].update(files={"../a": {}, "b": {}}),
        lambda m: m["shards"].append(m["shards"][0]),
        lambda m: m["shards"].pop(),
    ],
    ("token store", "manifest.json"): [{"dtype": "O"}, lambda m: m["files"].pop("names.bin")],
    ("tokenizer", "tokenizer_config.json"): [{"unk_token": ""}],
    ("clusters", "c.tsv.gz"): [b"a\tb\x1b[2J\n", b"a\t\n", b"a\n"],
    ("CSV", "a.csv"): [b"\x1b[2J,b\n1,2\n"],
}


@pytest.mark.parametrize(
    ("label", "name"), [("split record", "split.json"), ("teacher cache", "manifest.json")]
)
def test_a_record_with_anything_wrong_is_read_or_refused_with_a_line(
    formats, tmp_path, label, name
):
    """Of runs and of results test_report shows it."""
    form, path = formats[label], tmp_path / name

    def read():
        files = form.files | {name: path.read_bytes()}
        kind, message = fuzz.outcome(form, files, tmp_path / "case")
        if kind == "refused":
            raise ValueError(message)

    assert refusals(json.loads(form.files[name]), path, read, of_each=2)


@pytest.mark.parametrize(
    ("label", "name", "change"),
    [(*where, change) for where, changes in REFUSED.items() for change in changes],
)
def test_a_broken_file_is_refused_with_one_line_that_names_it(
    formats, tmp_path, label, name, change
):
    files = dict(formats[label].files)
    raw = change if isinstance(change, bytes) else changed(files[name], change)
    files[name] = gzip.compress(raw) if name.endswith(".gz") else raw
    kind, message = fuzz.outcome(formats[label], files, tmp_path / "case")
    assert kind == "refused"
    assert len(message) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" * 5000, "digits"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[1,\n]", "line 2"),
        ('{"a":' * 100 + "[]" + "}" * 100, "nested more than"),
    ],
)
def test_json_is_refused_with_its_file(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path)
    assert "a.json" in str(caught.value)
    with pytest.raises(ValueError, match="over 3 bytes"):
        read_json(path, 3)


def test_json_is_a_file_and_may_be_nested_99_deep(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "", "missing.json", "a\0b"):
        with pytest.raises(ValueError, match="no file|cannot be read"):
            read_json(tmp_path / name)
    deep = json.loads('{"a":' * 99 + "[]" + "}" * 99)
    for value in (deep, 3, "x", None, [], {}, [1, [2]]):
        (tmp_path / "a.json").write_text(json.dumps(value))
        assert read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match="nested more than"):
        write_results(tmp_path / "r.json", {**good(), "run": {"a": deep}})


def test_results_that_lack_what_is_optional_are_shown():
    for key in ("student_parameters", "share_of_teacher", "data", "threshold", "floors"):
        assert summary_lines({k: v for k, v in good().items() if k != key})
    assert not any("clusters" in line for line in summary_lines(good() | {"data": {"proteins": 3}}))


def test_names_and_messages():
    assert all(map(is_plain_name, ("a", "model.safetensors", "shard-00001.bin", "é")))
    for name in ("", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0", "a\n", "a" * 201, 3, None):
        assert not is_plain_name(name)
    assert printable("a\x1b[2J\ud800\u202eé") == r"a\x1b[2J\ud800\u202eé"
    assert one_line(ValueError("a\nb\x07")) == r"a b\x07"
    assert one_line(ValueError()) == "ValueError"
