"""Reading proteins from every source, what is wrong with them, and the tokenised store."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import itertools
import json
import multiprocessing
import pickle
import random
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError

from src.common.cli import add_data_flags
from src.proteins import formats, notation, readers, sources, table_rows
from src.proteins.encoding import token_letters, tokenizer_fingerprint
from src.proteins.hashes import SeenHashes, chosen, held_out, sequence_hash
from src.proteins.layouts import END_OF_TEXT, PROTGPT2, layout
from src.proteins.reading import ReadReport
from src.proteins.sources import SAME_NAMES, has_split, read_proteins
from src.proteins.tokens import TokenisedProteins, data_summary, open_store, tokenise

A, B, C = "MKVLAAGIT", "MSTNPKPQRKTKRNTNRRPQDVKFPGG", "MAAAK"
HEAVY = A + B


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


def fasta(proteins: list[str], width: int = 60) -> str:
    return "".join(
        f">p{i} some words\n" + "".join(f"{p[j : j + width]}\n" for j in range(0, len(p), width))
        for i, p in enumerate(proteins)
    )


def dropped(report: ReadReport) -> int:
    return sum(entry["count"] for entry in report.dropped.values())


def read(path: Path, **options) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    found = [p.residues for p in read_proteins(path, report=report, **options)]
    assert report.read == report.kept + dropped(report)
    assert report.kept == len(found)
    assert report.residues == sum(map(len, found))
    return found, report


@pytest.fixture
def stored(tmp_path, tiny_tokenizer):
    """Return a function that tokenises a source, or the text of one, for 64 positions."""

    def stored(source: Path | str, max_length: int = 64, **options) -> TokenisedProteins:
        if isinstance(source, str):
            source = write(tmp_path / ("a.fasta" if source[0] == ">" else "a.txt"), source)
        options = {"cache_dir": tmp_path / "cache", "quiet": True, **options}
        return tokenise(source, None, tiny_tokenizer, max_length, **options)

    return stored


def counts(entries: dict) -> dict[str, int]:
    return {kind: entry["count"] for kind, entry in entries.items()}


# The layout


@pytest.mark.parametrize("length", [1, 59, 60, 61, 120])
def test_layout_at_the_edges_of_a_line(length):
    residues = "".join(itertools.islice(itertools.cycle("ACDEFGHIKLMNPQRSTVWY"), length))
    text = layout(residues)
    lines = text.split("\n")
    assert lines[0] == lines[-1] == END_OF_TEXT
    assert all(len(line) == 60 for line in lines[1:-2])
    assert 1 <= len(lines[-2]) <= 60
    assert PROTGPT2.read(text) == residues


@pytest.mark.parametrize("seed", range(5))
def test_layout_round_trip_on_random_proteins(random_proteins, seed, tiny_tokenizer):
    for residues in random_proteins(30, 1, 400, seed):
        assert PROTGPT2.read(layout(residues)) == residues
        assert layout(residues).startswith(PROTGPT2.prompt(residues))
        ids = tiny_tokenizer(layout(residues))["input_ids"]
        assert PROTGPT2.read(tiny_tokenizer.decode(ids)) == residues


# Formats: the same proteins out of each


def one_of_each_kind(folder: Path, proteins: list[str], tokenizer) -> dict[str, Path]:
    rows = [[f"p{i}", p] for i, p in enumerate(proteins)]
    table = io.StringIO()
    csv.writer(table).writerows([["id", "sequence"], *rows])
    texts = io.StringIO()
    csv.writer(texts).writerows([["text"], *([layout(p)] for p in proteins)])
    paths = {
        "fasta": write(folder / "a.fasta", fasta(proteins)),
        "fasta.gz": write(folder / "a.fa.gz", fasta(proteins, 80)),
        "fasta by content": write(folder / "a.dat", "\n" + fasta(proteins)),
        "fasta named txt": write(folder / "b.txt", fasta(proteins)),
        "gzip without the suffix": folder / "c.fasta",
        "text": write(folder / "a.txt", "\n".join(proteins)),
        "text.gz": write(folder / "a.seq.gz", "\n\n".join(proteins) + "\n"),
        "csv": write(folder / "a.csv", table.getvalue()),
        "csv of layout": write(folder / "b.csv.gz", texts.getvalue()),
        "tsv": write(
            folder / "a.tsv", "Entry\tSequence\n" + "".join(f"x{n}\t{p}\n" for n, p in rows)
        ),
    }
    paths["gzip without the suffix"].write_bytes(gzip.compress(fasta(proteins).encode()))
    tables = {
        "parquet": {"sequence": proteins, "name": [n for n, _ in rows]},
        "parquet of layout": {"text": [layout(p) for p in proteins], "other": proteins},
        "parquet of tokens": {"input_ids": tokenizer([layout(p) for p in proteins])["input_ids"]},
    }
    for name, columns in tables.items():
        paths[name] = folder / f"{name.replace(' ', '_')}.parquet"
        pq.write_table(pa.table(columns), paths[name], row_group_size=7)
    return paths


def test_every_format_gives_the_same_proteins(tmp_path, random_proteins, tiny_tokenizer):
    proteins = [A, *random_proteins(20, 1, 200, 3)]
    for name, path in one_of_each_kind(tmp_path, proteins, tiny_tokenizer).items():
        found, report = read(path, tokenizer=tiny_tokenizer)
        assert found == proteins, name
        assert not report.dropped, name
        assert not report.fixed, name


def test_fasta_agrees_with_biopython(proteins_dir):
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    with gzip.open(proteins_dir / "validation.fasta.gz", "rt") as handle:
        expected = [(title.split()[0], sequence) for title, sequence in SimpleFastaParser(handle)]
    assert [p[:2] for p in read_proteins(proteins_dir, split="validation")] == expected


def test_names(tmp_path):
    path = write(tmp_path / "a.fasta", ">sp|P1|X_Y words\nMK\n>\nMKV\n> late\x1b\nMKVL\n")
    assert [p.name for p in read_proteins(path)] == ["sp|P1|X_Y", "line_3", "late?"]
    path = write(tmp_path / "a.csv", "sequence,accession\nMK,P1\nMKV,P2\n")
    assert [p.name for p in read_proteins(path)] == ["P1", "P2"]


def test_directory_of_parts(tmp_path):
    write(tmp_path / "train.fasta.gz", fasta([A, B]))
    write(tmp_path / "test.txt", C)
    for number, protein in enumerate([B, A]):
        shard = tmp_path / f"validation-0000{number}-of-00002.parquet"
        pq.write_table(pa.table({"sequence": [protein]}), shard)
    assert read(tmp_path, split="train")[0] == [A, B]
    assert read(tmp_path, split="test")[0] == [C]
    assert read(tmp_path, split="validation")[0] == [B, A]
    assert has_split(tmp_path, "validation")
    assert not has_split(tmp_path, "other")
    assert has_split(tmp_path / "test.txt", "train")
    assert not has_split(tmp_path / "test.txt", "validation")
    write(tmp_path / "train.csv", "sequence\nMK\n")
    with pytest.raises(ValueError, match="several files for the part 'train'"):
        read(tmp_path, split="train")


# One behaviour for each thing that is wrong


@pytest.mark.parametrize(
    ("text", "expected", "fixed"),
    [
        ("mkvLAAGIT", A, {sources.LOWER_CASE: 1}),
        (f"{A}*", A, {sources.FINAL_STOP: 1}),
        (f"{A}**", A, {sources.FINAL_STOP: 1}),
        ("MKV LAA\tGIT", A, {sources.WHITE_SPACE: 1}),
        ("MK-VLA..AGIT--", A, {sources.GAPS: 1}),
        (f"  {A.lower()}-* ", A, dict.fromkeys(
            (sources.WHITE_SPACE, sources.GAPS, sources.FINAL_STOP, sources.LOWER_CASE), 1)),
    ],
)  # fmt: skip
def test_fixed_and_counted(tmp_path, text, expected, fixed):
    found, report = read(write(tmp_path / "a.fasta", f">a\n{B}\n>b\n{text}\n"))
    assert found == [B, expected]
    assert counts(report.fixed) == fixed
    assert all(entry["first"] == "a.fasta:3" for entry in report.fixed.values())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", sources.NO_RESIDUES),
        ("\n\n  ", sources.NO_RESIDUES),
        ("*", sources.NO_RESIDUES),
        ("---", sources.NO_RESIDUES),
        ("MK*VL", sources.INNER_STOP),
        ("MKXVL", sources.AMBIGUOUS),
        ("MKUVL", sources.AMBIGUOUS),
        ("MK1VL", sources.NO_RESIDUE),
        ("MK;DROP", sources.NO_RESIDUE),
        ("MKéVL", sources.NO_RESIDUE),
        ("MKſVL", sources.NO_RESIDUE),
        (b"MK\xff\xfeVL", sources.NO_RESIDUE),
        ("MKVLXXXXXXXXXXMKVL", sources.RUN_OF_X),
        ("ATGGCTCTGGCTGATATCTCTGG", sources.NUCLEIC),
        ("auggcucuggcugauaucucugg", sources.NUCLEIC),
        ("MK" * 50_001, readers.TOO_LONG),
        ("A" * (2 << 20), readers.TOO_LONG),
    ],
)
def test_dropped_and_counted(tmp_path, text, reason):
    body = text if isinstance(text, bytes) else text.encode()
    content = f">a\n{A}\n>b\n".encode() + body + f"\n>c\n{B}\n".encode()
    found, report = read(write(tmp_path / "a.fasta", content))
    assert found == [A, B]
    assert counts(report.dropped) == {reason: 1}
    assert report.dropped[reason]["first"].startswith("a.fasta:3")
    assert any("dropped 1: " + reason in line for line in report.lines())


def test_a_comment_of_another_width_is_counted_and_a_column_may_be_called_data(tmp_path):
    path = write(tmp_path / "a.csv", f"data_id,sequence\n# made by, hand, today\na,{A}\n")
    found, report = read(path)
    assert found == [A]
    assert counts(report.fixed) == {formats.COMMENTS: 1}


def test_ambiguous_residues_are_kept_when_asked(tmp_path):
    path = write(tmp_path / "a.txt", "MKXV\nMBZJOU\nMK*XV")
    found, report = read(path, keep_ambiguous=True)
    assert found == ["MKXV", "MBZJOU"]
    assert counts(report.dropped) == {sources.INNER_STOP: 1}


def test_crlf_and_byte_order_mark(tmp_path):
    content = b"\xef\xbb\xbf" + fasta([A, B]).replace("\n", "\r\n").encode()
    found, report = read(write(tmp_path / "a.fasta", content))
    assert found == [A, B]
    assert counts(report.fixed) == {formats.CRLF: 4}


REFUSED = {
    "empty": ("a.fasta", b"", "is empty"),
    "empty gzip": ("a.fasta.gz", gzip.compress(b""), "no protein"),
    "only blank lines": ("a.txt", b"\n\n\n", "no protein"),
    "headers only": ("a.fasta", b">a\n>b\n", "none of its 2 proteins is usable.*no residues"),
    "text before a header": ("a.fasta", b"\nMKV\n>a\nMK\n", r"a\.fasta:2: text before"),
    "NUL": ("a.fasta", b">a\nMK\0V\n", r"a\.fasta:2: a NUL byte"),
    "UTF-16 without its mark": ("a.txt", "MKV\n".encode("utf-16-le"), r"a\.txt:1: a NUL byte"),
    "lone carriage returns": ("a.fasta", b">a\rMKV\r>b\rMK\r", r"a\.fasta:1: a carriage return"),
    "truncated gzip": ("a.fasta.gz", gzip.compress(b">a\nMK\n" * 999)[:-20], "truncated gzip"),
    "altered gzip": ("a.fa.gz", gzip.compress(b">a\nMK\n")[:-8] + b"12345678", "broken or trunc"),
    "rubbish after gzip": ("a.fa.gz", gzip.compress(b">a\nMK\n") + b"rubbish", "broken or trunc"),
    "not gzip": ("a.fasta.gz", b">a\nMK\n", "is named .gz but is not gzip"),
    "zip": ("a.fasta", b"PK\x03\x04rest", "broken or locked archive"),
    "JSON array that is cut": ("a.json", b'[{"sequence": "MK"}', "has no end: the file is cut"),
    "JSON array of numbers": ("a.json", b"[1, 2]", "object 1: not a JSON object"),
    "long object that is cut": ("a.json", b'{\n"sequence": "MK"\n', "object 1: broken JSON"),
    "broken JSON array": ("a.json", b'[{"sequence": "MK"}, {"s', "object 2: broken JSON"),
    "long line": ("a.csv", b"sequence\n" + b"A" * (2 << 20), r"a\.csv:2: the line is longer"),
    "tar": ("a.fasta.gz", gzip.compress(b"x" * 257 + b"ustar" + b"x" * 300), "broken or locked"),
    "LFS pointer": ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:a1\n",
                    "git lfs pull"),
    "web page": ("a.fasta", b"<!DOCTYPE html>\n<html>", "a web page"),
    "old Excel": ("a.xls", b"\xd0\xcf\x11\xe0rest", "save it as .xlsx"),
    "UniProt record": ("a.txt", b"ID   A_B  Reviewed; 3 AA.\nSQ   SEQUENCE\n     MKV\n//\n",
                       "save its proteins as FASTA"),
    "rich text": ("a.txt", b"{\\rtf1\\ansi MKV}", "save it as plain text"),
    "structure": ("a.pdb", b"HEADER    OXYGEN STORAGE\nATOM      1\n", "a PDB structure"),
    "Stockholm": ("a.txt", b"# STOCKHOLM 1.0\na MKV\n", "convert it to FASTA"),
    "alignment of a complex": ("a.a3m", b"#4,5\t1,1\n>101\t102\nMKVLMKVLA\n", "joined chains"),
    "DNA": ("a.fasta", b">a\nATGGCTCTGGCTGATATC\n>b\nATGGCTCTGGCTGATATCGG\n>c\nMKV\n",
            "2 of 3 sequences are nucleic acids, the first at a.fasta:1"),
    "DNA in a table": ("a.csv", b"id,sequence\nx,ATGGCTCTGGCTGATATC\n", "--sequence_column"),
    "words in a line": ("a.txt", b"MKV\nMKV 0.5 good\n", r"a\.txt:2: 3 words in a line"),
    "broken JSON": ("a.jsonl", b'{"sequence": "MK"}\n{"sequ', r"a\.jsonl:2: broken JSON"),
    "paired antibodies": (
        "a.csv", b"aa_heavy,aa_light\nMKVLAAGITMKVLAAGIT,MKVLAAGITMKVLAAGIV\n",
        r"pass --sequence_column \(aa_heavy, aa_light look like it\)"),
    "JSON by columns": ("a.json", b'{"sequence": {"0": "%s", "1": "%s"}}' % ((b"MKVLA" * 9,) * 2),
                        r"orient='records'"),
    "peptides without a header": ("a.csv", b"SIINFEKL,1\nGILGFVFTL,0\n",
                                  "or write a line of column names above"),
    "unknown": ("a.xyz", b"MKV\n", "not clear"),
    "CSV without a column": ("a.csv", b"name,length\na,3\n", "no column 'sequence'.*name, length"),
    "CSV with a comma in a name": ("a.csv", b"name,sequence\nKinase 0, alpha,MKT\n",
                                   r"a\.csv:2: 3 cells for 2 columns: .* comma in it .* quotes"),
    "CSV with a cell too few": ("a.csv", b"id,sequence,family\n1,MK,C\nMKT,KINASE\n",
                                r"a\.csv:3: 2 cells for 3 columns"),
    "TSV with a tab in a name": ("a.tsv", b"name\tsequence\na\tb\tMKT\n", "a tab in it"),
    "CSV with a column twice": ("a.csv", b"Sequence,sequence\nMKT,AAA\n",
                                "2 columns are named 'sequence': rename or drop"),
    "CSV with two names": ("a.csv", b"id,id,sequence\na,b,MKT\n", "2 columns are named 'id'"),
    "CSV with an open quote": ("a.csv", b'sequence\n"MKV\nMK\n', r"a\.csv:3: broken CSV"),
    "CSV of tokens": ("a.csv", b"input_ids\n1\n", "use parquet"),
    "two chains in a line": ("a.txt", f"{HEAVY} {B}\n".encode(), "2 words in a line"),
    "proteins beside text": ("a.csv", f"protein,text\n{HEAVY},membrane protein\n".encode(),
                             "--sequence_column protein"),
    "proteins beside types": (
        "a.csv", f"construct,aa,type\nc0,{HEAVY},wildtype\nc1,{B},mutant\n".encode(),
        "--sequence_column .aa"),
    "mmCIF": ("a.cif", b"data_1UBQ\n#\n", "in mmCIF"),
    "PDB": ("a.pdb", b"REMARK 1\nATOM\n", "a PDB structure"),
    "JSON of other keys": ("a.json", json.dumps([{"primary": HEAVY}]).encode(),
                           "--sequence_column .primary"),
    "parquet of nothing": ("a.parquet", b"PAR1rubbishPAR1", "broken parquet"),
    "parquet by name": ("a.parquet", b"hello", "broken parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_file_and_line(tmp_path, case):
    name, content, message = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sequence": [1, 2]}, "holds int64, not text"),
        ({"input_ids": [1, 2]}, "holds int64, not lists"),
        ({"input_ids": [[1.5]]}, "not lists of whole numbers"),
        ({"input_ids": [[1, None]]}, "a token is null"),
        ({"other": ["MK"]}, "no column .*: pass --sequence_column"),
        ({"sequence": ["MK"], "Sequence": ["MV"]}, "2 columns are named 'sequence'"),
        ({"sequence": pa.array([], pa.string())}, "no protein"),
    ],
)
def test_parquet_of_the_wrong_kind(tmp_path, tiny_tokenizer, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.parquet", tokenizer=tiny_tokenizer)


def test_nulls_and_empty_cells_are_dropped(tmp_path):
    pq.write_table(pa.table({"sequence": [A, None, B]}), tmp_path / "a.parquet")
    found, report = read(tmp_path / "a.parquet")
    assert found == [A, B]
    assert report.dropped[sources.NO_RESIDUES] == {"count": 1, "first": "a.parquet row 2"}
    found, report = read(write(tmp_path / "a.csv", f"id,sequence\n1,{A}\n2,\n\n3,{B}\n"))
    assert (found, dropped(report)) == ([A, B], 1)


def test_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "FREE_EXPANSION_BYTES", 1 << 20)
    bomb = gzip.compress((">a\n" + ("A" * 60 + "\n") * 1000).encode() * 100)
    path = tmp_path / "bomb.fasta.gz"
    path.write_bytes(bomb)
    with pytest.raises(ValueError, match="decompression bomb"):
        read(path)


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.txt", A)
    with pytest.raises(ValueError, match="--data is an empty name"):
        list(sources.read_proteins("", split="train"))
    with pytest.raises(ValueError, match="--data is an empty name"):
        sources.has_split("", "train")


def test_a_row_of_csv_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(table_rows, "MAX_ROW_BYTES", 1 << 16)
    path = write(tmp_path / "a.csv", "sequence\n" + '"a\n",' * 50_000)
    with pytest.raises(ValueError, match="a row of over"):
        read(path)


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("nowhere.fasta", None, "no such file"),
        ("./nowhere", None, "no such file"),
        ("a/b/c", None, "no such file"),
        ("data", None, "directory of parts"),
        ("empty", "train", "holds no part at all"),
        ("data", "validation", "no validation.fasta.gz.*it has train"),
        ("data/train.txt", "test", "one file and has no test part"),
        ("/dev/null", None, "neither a file nor a directory"),
    ],
)
def test_sources_that_are_not_there(tmp_path, monkeypatch, source, split, message):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("empty").mkdir()
    write(Path("data/train.txt"), A)
    with pytest.raises(ValueError, match=message):
        read(Path(source) if source != "./nowhere" else source, split=split)  # type: ignore[arg-type]


# The hub


def test_hub_out_of_reach_says_what_to_pass(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="'datasets' is not installed.*--data data/proteins"):
        read("nferruz/UR50_2021_04", split="train")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route\nto host"), "there is no network: connect to it"),
        (DatasetNotFoundError("Dataset 'x' doesn't exist"), "the hub has no data set 'x/y'"),
        (DatasetNotFoundError("is a gated dataset on the Hub."), "is gated: accept its terms"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found y.py"),
            "code of its own",
        ),
        (ValueError("Config name is missing."), "(Config name is missing.)"),
    ],
)
def test_each_failure_of_a_hub_data_set_has_its_own_line(error, said, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(ValueError, match="pass --data FILE") as caught:
        read("x/y", split="train")  # type: ignore[arg-type]
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert ("no network" in message) == ("no network" in said)


def test_hub_rows_are_streamed(monkeypatch, tiny_tokenizer):
    def rows(name, split, streaming):
        assert (name, split, streaming) == ("owner/proteins", "validation", True)
        yield from ({"text": layout(p)} for p in (A, B))
        raise OSError("the line went dead")

    fake = types.SimpleNamespace(load_dataset=rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    stream = read_proteins("owner/proteins", split="validation")
    assert [next(stream).residues, next(stream).residues] == [A, B]
    monkeypatch.setattr(readers, "HUB_PAUSES", ())
    with pytest.raises(ValueError, match="row 3: the stream broke 1 times .the line went dead"):
        next(stream)
    ids = tiny_tokenizer([layout(A), layout(B)])["input_ids"]
    unnamed = [{"id": None, "sequence": A}, {"id": "b", "sequence": B}]
    fake.load_dataset = lambda *a, **k: unnamed
    names = [p.name for p in read_proteins("owner/proteins", split="train")]
    assert names == ["row_1", "b"]
    fake.load_dataset = lambda *a, **k: [{"input_ids": row} for row in ids]
    found, _ = read("owner/proteins", split="train", tokenizer=tiny_tokenizer)  # type: ignore[arg-type]
    assert found == [A, B]


# Rows of tokens


def test_rows_of_tokens_are_cut_at_their_markers(tmp_path, tiny_tokenizer, stored):
    marker = tiny_tokenizer.eos_token_id
    a, b, c = (row[1:-1] for row in tiny_tokenizer([layout(p) for p in (A, B, C)])["input_ids"])
    rows = [
        [marker, *a, marker],
        [*a[3:], marker, *b, marker, *c, marker, *a[:4]],  # a block of a longer text
        [marker, *c, marker, marker, marker],  # padded
        [marker, marker],
        [],
    ]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), path)
    found, report = read(path, tokenizer=tiny_tokenizer)
    assert found == [A, B, C, PROTGPT2.read(tiny_tokenizer.decode(a[:4])), C]
    assert counts(report.dropped) == {sources.HEADLESS: 1, sources.NO_RESIDUES: 2}
    assert counts(report.fixed) == {sources.CUT_IN_SOURCE: 1}

    store = stored(path)
    expected = [[marker, *row, marker] for row in (a, b, c)]
    assert [row.tolist() for row in store] == [*expected, [marker, *a[:4]]]
    assert len(stored(path, long_proteins="drop")) == 3


def test_tokens_need_their_tokenizer(tmp_path, tiny_tokenizer):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"input_ids": [[0, 999, 0]]}), path)
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        read(path)
    with pytest.raises(ValueError, match="row 1: token 999 is outside the vocabulary"):
        read(path, tokenizer=tiny_tokenizer)


def test_tokens_in_another_layout_are_kept_and_told(tmp_path, tiny_tokenizer):
    text = f"{END_OF_TEXT}{A}{END_OF_TEXT}"
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"input_ids": [tiny_tokenizer(text)["input_ids"]]}), path)
    found, report = read(path, tokenizer=tiny_tokenizer)
    assert found == [A]
    assert counts(report.fixed) == {sources.OTHER_LAYOUT: 1}


# Hostile input: only ValueErrors of one line, whatever the bytes


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        kind = rng.randrange(4)
        place = rng.randrange(len(changed) + 1)
        if kind == 0 and changed:
            changed[place % len(changed)] = rng.randrange(256)
        elif kind == 1:
            changed[place:place] = rng.choice([b"\0", b">", b"\r", b'"', b"\n\n", b"\xff", b","])
        elif kind == 2:
            del changed[place : place + rng.randint(1, 40)]
        else:
            changed[place:place] = changed[place : place + rng.randint(1, 60)]
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_broken_files_never_raise_anything_else(tmp_path, tiny_tokenizer, random_proteins, seed):
    rng = random.Random(seed)
    paths = one_of_each_kind(tmp_path, random_proteins(6, 5, 80, seed), tiny_tokenizer)
    for path in paths.values():
        original = path.read_bytes()
        for _ in range(25):
            path.write_bytes(mutated(original, rng))
            message = path.name
            try:
                read(path, tokenizer=tiny_tokenizer)
            except ValueError as error:
                message = str(error)
            assert path.name in message
            assert "\n" not in message


# The store


def test_store_equals_direct_tokenisation(tmp_path, random_proteins, tiny_tokenizer):
    proteins = random_proteins(300, 1, 200, 5)
    path = write(tmp_path / "a.fasta.gz", fasta(proteins))
    store = tokenise(path, "train", tiny_tokenizer, 90, tmp_path / "cache", quiet=True)
    distinct = list(dict.fromkeys(proteins))
    whole = [tiny_tokenizer(layout(p))["input_ids"] for p in distinct]
    expected = [row[:90] for row in whole]
    assert [store[i].tolist() for i in range(len(store))] == expected
    assert store.lengths.tolist() == [len(row) for row in expected]
    visible = [PROTGPT2.read(tiny_tokenizer.decode(row)) for row in expected]
    assert [store.sequence(i) for i in range(len(store))] == visible
    assert store.residues.tolist() == [len(v) for v in visible]
    assert store.hashes.tolist() == [sequence_hash(p) for p in distinct]
    assert store.names[0] == "p0"
    assert len(store.names) == len(store)
    assert isinstance(store.array("tokens.bin").base, np.memmap)
    assert store.report.fixed["cut to 90 tokens"]["count"] == sum(len(row) > 90 for row in whole)


def test_batches_do_not_show(tmp_path, random_proteins, stored, monkeypatch):
    proteins = "\n".join(random_proteins(50, 1, 60, 6))
    whole = stored(proteins)
    monkeypatch.setattr("src.proteins.tokens.BATCH_PROTEINS", 3)
    assert whole.fingerprint == stored(proteins, cache_dir=tmp_path / "2").fingerprint


def test_long_proteins_are_cut_or_dropped(random_proteins, tiny_tokenizer, stored):
    proteins = random_proteins(40, 10, 120, 7)
    cut = stored("\n".join(proteins), 50)
    dropped = stored("\n".join(proteins), 50, long_proteins="drop")
    fit = [p for p in proteins if len(tiny_tokenizer(layout(p))["input_ids"]) <= 50]
    assert len(cut) == 40
    assert cut.lengths.max() == 50
    assert [dropped.sequence(i) for i in range(len(dropped))] == fit
    assert dropped.report.dropped["longer than 50 tokens"]["count"] == 40 - len(fit)


def test_duplicates_are_dropped_once_cleaned(stored):
    store = stored(fasta([A, B, A.lower(), C, f"{B}*", A]))
    assert [store.sequence(i) for i in range(len(store))] == [A, B, C]
    assert store.report.dropped["duplicates"] == {"count": 3, "first": "p2"}
    assert (store.report.read, store.report.kept) == (6, 3)


@pytest.mark.parametrize("seed", range(5))
def test_seen_hashes_behave_like_a_set(seed):
    rng = np.random.default_rng(seed)
    seen, known = SeenHashes(), set()
    for _ in range(30):
        batch = rng.integers(0, 2000, rng.integers(0, 100)).astype(np.uint64)
        expected = []
        for value in batch.tolist():
            expected.append(value not in known)
            known.add(value)
        assert seen.add(batch).tolist() == expected
    assert sum(map(len, seen.runs)) == len(known)
    assert len(seen.runs) <= 12


def test_a_store_is_found_again(tmp_path, tiny_tokenizer, stored):
    path = write(tmp_path / "a.txt", f"{A}\n{B}\n")
    first = stored(path)
    made = {p.name: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    # Calls with truncation leave their mark on a tokenizer; that must not make it another one.
    tiny_tokenizer([layout(A)], truncation=True, max_length=5)
    again = stored(path)
    assert again.folder == first.folder
    assert {p.name: p.stat().st_mtime_ns for p in again.folder.iterdir()} == made
    assert stored(path, 63).folder != first.folder
    path.write_text(f"{A}\n{C}\n")
    changed = stored(path)
    assert changed.folder != first.folder
    assert changed.sequence(1) == C
    assert not list((tmp_path / "cache").glob("*.unfinished"))


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "manifest", "not JSON"])
def test_a_damaged_store_is_built_anew(capsys, damage, stored):
    store = stored(f"{A}\n{B}\n")
    tokens, manifest = store.folder / "tokens.bin", store.folder / "manifest.json"
    if damage == "altered":
        tokens.write_bytes(b"\1" + tokens.read_bytes()[1:])
    elif damage == "truncated":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif damage == "missing":
        tokens.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"proteins": 2', '"proteins": 1'))
    else:
        manifest.write_text("{")
    with pytest.raises(ValueError, match=str(store.folder)):
        open_store(store.folder)
    again = stored(f"{A}\n{B}\n", quiet=False)
    assert "damaged" in capsys.readouterr().out
    assert again.fingerprint == store.fingerprint
    assert [again.sequence(i) for i in range(2)] == [A, B]


def test_a_full_disk_is_named_with_a_way_out(tmp_path, random_proteins, stored, full_disk):
    full_disk("src.proteins.tokens._build")
    with pytest.raises(ValueError, match=r"cache: no space left on the disk.*--cache_dir"):
        stored(fasta(random_proteins(3)))
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_nothing_is_left_behind_by_a_broken_source(tmp_path, stored):
    with pytest.raises(ValueError, match="NUL"):
        stored(f">a\n{A}\n>b\nMK\0V\n")
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def _build_in_process(path: str, cache: str, queue) -> None:
    from src.proteins.tokenizer import train_tokenizer
    from tests.conftest import make_proteins

    tokenizer = train_tokenizer(make_proteins(50, seed=1), 64, n_positions=256)
    queue.put(tokenise(path, None, tokenizer, 64, cache, quiet=True).fingerprint)


@pytest.mark.slow
def test_concurrent_builders(tmp_path, random_proteins):
    path = write(tmp_path / "a.txt", "\n".join(random_proteins(2000, 20, 60, 8)))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=_build_in_process, args=(str(path), str(tmp_path / "c"), queue))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    found = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(found) == 1
    assert len([p for p in (tmp_path / "c").iterdir() if p.is_dir()]) == 1


def test_selections(random_proteins, stored):
    store = stored("\n".join(random_proteins(20, 10, 30, 9)))
    part = store.subset([5, 3, -1])
    assert [part.sequence(i) for i in range(3)] == [store.sequence(i) for i in (5, 3, 19)]
    assert part.lengths.tolist() == store.lengths[[5, 3, 19]].tolist()
    assert part.names[:] == [store.names[i] for i in (5, 3, 19)]
    assert part.subset([2]).sequence(0) == store.sequence(19)
    assert part.subset([]).lengths.tolist() == []
    fingerprints = {s.fingerprint for s in (store, part, store.subset([3, 5, 19]))}
    assert len(fingerprints) == 3
    for wrong in (20, -21):
        with pytest.raises(IndexError):
            store[wrong]
        with pytest.raises(IndexError):
            store.subset([wrong])


def test_workers_map_the_same_files(random_proteins, stored):
    from torch.utils.data import DataLoader

    store = stored("\n".join(random_proteins(200, 20, 60, 10)))
    assert len(store.sequence(0)) == store.residues[0] < store.lengths[0] + 60
    copy = pickle.loads(pickle.dumps(store.subset(range(100))))
    assert isinstance(copy, TokenisedProteins)
    assert not copy._arrays
    assert copy[7].tolist() == store[7].tolist()
    assert len(pickle.dumps(store)) < 5000
    loader = DataLoader(store, batch_size=None, num_workers=2)  # type: ignore[arg-type]
    assert [row.tolist() for row in loader] == [store[i].tolist() for i in range(200)]


def test_at_most_so_many_proteins(random_proteins, stored):
    proteins = [A, A, *random_proteins(30, 10, 30, 11)]
    store = stored("\n".join(proteins), max_proteins=10)
    assert [store.sequence(i) for i in range(len(store))] == [A, *proteins[2:11]]
    report = store.report
    assert report.read == report.kept + dropped(report) + report.not_chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 3}, "--max_length must be at least 4"),
        ({"proportion": 0.0}, "--train_size_prop must be above 0"),
        ({"proportion": 1.5}, "--train_size_prop must be above 0"),
        ({"proportion": 1e-9}, "raise --train_size_prop"),
        ({"max_length": 4, "long_proteins": "drop"}, "none of 2 proteins fits.*raise --max_length"),
    ],
)
def test_wrong_settings(stored, options, message):
    with pytest.raises(ValueError, match=message):
        stored(f"{A}\n{B}\n", **options)


def test_a_tokenizer_that_does_not_know_the_layout(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(["[UNK]", "[END]", *"ACDEFGHIKLMNPQRSTVWY"])}
    backend = Tokenizer(models.WordLevel(letters, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]"
    )
    path = write(tmp_path / "a.txt", A)
    with pytest.raises(ValueError, match="does not take <|endoftext|>"):
        tokenise(path, None, tokenizer, 64, tmp_path / "cache", quiet=True)


def test_token_letters_and_fingerprint(tiny_tokenizer):
    from src.proteins.tokenizer import train_tokenizer

    letters = token_letters(tiny_tokenizer)
    assert letters[tiny_tokenizer.eos_token_id] == ""
    for residues in (A, B * 5):
        ids = tiny_tokenizer(layout(residues))["input_ids"]
        assert "".join(letters[i] for i in ids) == residues
    other = train_tokenizer([A, B], 60, n_positions=256)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tiny_tokenizer)


# Shares of the training proteins


@pytest.mark.parametrize("seed", range(4))
def test_shares_are_nested_and_of_the_right_size(random_proteins, seed):
    hashes = np.array([sequence_hash(p) for p in random_proteins(4000, 20, 40, seed)], np.uint64)
    before = np.zeros(len(hashes), dtype=bool)
    for proportion in (0.01, 0.05, 0.1, 0.5, 0.999, 1.0):
        mask = chosen(hashes, proportion, seed)
        assert not (before & ~mask).any(), "a smaller share is part of a larger one"
        expected, spread = len(hashes) * proportion, np.sqrt(len(hashes) * proportion)
        assert abs(mask.sum() - expected) <= 4.5 * spread * np.sqrt(1 - proportion) + 1e-9
        assert (chosen(hashes[::-1], proportion, seed) == mask[::-1]).all()
        before = mask
    assert before.all()


def test_shares_of_different_seeds_are_independent(random_proteins):
    hashes = np.array([sequence_hash(p) for p in random_proteins(8000, 20, 40, 1)], np.uint64)
    both = chosen(hashes, 0.5, 0) & chosen(hashes, 0.5, 1)
    assert abs(both.mean() - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 8000)


def test_train_size_prop_takes_effect(random_proteins, stored):
    proteins = "\n".join(random_proteins(600, 20, 40, 12))
    stores = [stored(proteins, proportion=p) for p in (0.05, 0.1, 1.0)]
    names = [set(store.names) for store in stores]
    assert names[0] < names[1] < names[2]
    assert len(names[2]) == 600
    expected = chosen(stores[2].hashes, 0.1)
    assert names[1] == {stores[2].names[i] for i in np.flatnonzero(expected)}
    assert stores[1].report.not_chosen == 600 - len(names[1])
    assert set(stored(proteins, proportion=0.1, seed=1).names) != names[1]


# For a person


def test_summary(random_proteins, stored):
    proteins = random_proteins(100, 20, 200, 13)
    store = stored(fasta([*proteins, "MK1", proteins[0], "mkv"]), 128)
    text = "\n".join(data_summary(store, "train"))
    for part in (
        "103 proteins read, 101 kept",
        "dropped 1: duplicates",
        "dropped 1: characters that are no residues (first at a.fasta:",
        "fixed 1: lower case",
        f"train: 101 proteins, {int(store.residues.sum()):,} residues",
        f"{int(store.lengths.sum()):,} tokens",
        "quartiles",
    ):
        assert part in text
    assert json.dumps(store.report.as_dict())


def test_reading_is_lazy_and_bounded(tmp_path):
    """The first protein comes out before the rest of the file is read."""
    path = tmp_path / "a.fasta"
    with path.open("w") as handle:
        handle.writelines(f">p{i}\n{A}\n" for i in range(30_000))
        handle.write(">last\nMK\0\n")
    stream = read_proteins(path)
    assert next(stream).name == "p0"
    with pytest.raises(ValueError, match=":60002: a NUL"):
        for _ in stream:
            pass


# Files as people bring them

LONG = "MKVLAAGITMSTNPKPQRKTKRN"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", f"{END_OF_TEXT}\n{A}\n{B}\n{END_OF_TEXT}\n{C}\n{END_OF_TEXT}\n", [A + B, C]),
        ("a.txt", f"{A}\n{B}\n{END_OF_TEXT}{C}\n", [A + B, C]),
        ("a.fasta", f">1\n{END_OF_TEXT}\n{A}\n{END_OF_TEXT}\n>2\n{B}\n", [A, B]),
        ("a.txt", f"; a comment\n>x\n{A}\n# another\n{B}\n", [A + B]),
        ("a.fasta", f"# one\n\n; two\n>x\n{A}\n", [A]),
        ("a.txt", f"# names are no residues\nID\tSEQ\nHEWLA\t{A}\nVARA\t{B}\n", [A, B]),
        ("a.txt", f"HEWLA\t{LONG}\nVARA\t{LONG}\n", [LONG, LONG]),
        ("a.txt", f"HEWLA {LONG}\nVARA  {A}\n", [LONG, A]),
        ("a.txt", "MKVLAAGITM STNPKPQRKT KRN\n", [LONG]),
        ("a.fasta", ">x\n        1 mkvlaagitm stnpkpqrkt\n       21 krn\n", [LONG]),
        ("a.fasta", f">x\n{A} 9\n{B}   36\n", [A + B]),
        ("a.a3m", f"#9\t1\n>q\n{A}\n>h\n--{A[2:5]}aa{A[5:]}\n\0", [A, A[2:5] + "AA" + A[5:]]),
        ("a.csv", f"sep=;\nname;Sequence\nx;{A}\n;\n;\n", [A]),
        ("a.csv", f"Assay of today,,\n\nID,Mutated Sequence,x\n1,{A},\n,,\n", [A]),
        ("a.tsv", f"name,sequence\nx,{A}\n", [A]),
        ("a.csv", f"x,{LONG}\ny,{LONG}\n", [LONG, LONG]),
        ("a.tsv", f"sequence\tsequence_aa\nATGGCT\t{A}\n", [A]),
        ("a.jsonl", f'{{"id": "x", "sequence": "{A}"}}\n\n{{"sequence": "{B}"}}\n', [A, B]),
        ("a.dat", f'{{"Sequence": "{A}"}}\n', [A]),
        ("a.jsonl", f'{{"x": {{"y": {{}}}}, "sequence": {{"value": "{A}", "length": 9}}}}\n', [A]),
        ("a.txt", f"Sequence\n{A}\n{B}\n", [A, B]),
        ("a.txt", f"# names are no residues\nname  Seq\nHEWLA  {A}\nVARA  {B}\n", [A, B]),
        ("a.txt", f"PEPTIDE\n{A}\nSEQ\n", [A, "SEQ"]),
        ("a.csv", "Sequence\nAla-Ala-Gly\nH-Met-Lys-Val-OH\nAc-MKV-NH2\nMKV-OH\nAcD-EF\n",
         ["AAG", "MKV", "MKV", "MKV", "ACDEF"]),
        ("a.fasta", ">a\nMET LYS VAL\nLEU GLY\n>b\nMetLysVal\n>c\nAC-DEF\n",
         ["MKVLG", "MKV", "ACDEF"]),
        ("a.pir", f">P1;x\nPEPTIDE\n{A}\n{B}*\n>P1;y\n\n{B}*\n>P1;z\n{A}\n", [A + B, B, A]),
        ("a.csv", f'"{{""Run"": ""X""}}"\nsequence,sequence_alignment_aa\nATG,{A}\n', [A]),
        # cat a.csv b.csv, and write.table of R
        ("a.csv", f"name,sequence\nx,{HEAVY}\nname,sequence\ny,{B}\n", [HEAVY, B]),
        ("a.tsv", f"sequence\tscore\n1\t{HEAVY}\t0.5\n2\t{B}\t0.1\n", [HEAVY, B]),
        ("a.tsv", f'name\tsequence\n"Foo" protein\t{HEAVY}\nb\t{B}\n', [HEAVY, B]),
        ("a.csv", f'name, sequence\nx, "{HEAVY}"\n', [HEAVY]),
        ("a.csv", "# a comment\n" * 25 + f"name,sequence\nx,{HEAVY}\n", [HEAVY]),
        ("a.fasta", f" >x\n{HEAVY}\n >y\n{B}\n", [HEAVY, B]),
        ("a.fasta", f">A1;B some words\n{HEAVY}*\n>b\n{B}*\n", [HEAVY, B]),  # no PIR
        ("a.txt", f"{HEAVY} active\n{B} inactive\n", [HEAVY, B]),
        ("a.txt", f"KKLLKKLLKK active\n{B}\n", ["KKLLKKLLKK", B]),
        ("a.fasta", ">a\nMET GLN MSE VAL\n>b\nGLY HIE LYS HID TRP\n", ["MQMV", "GHKHW"]),
        ("a.fasta", ">a\nACE ALA GLN ALA NME\n>b\nAla-Gln\n", ["AQA", "AQ"]),
        ("a.fasta", ">a\nGIGAVLKV-COOH\n", ["GIGAVLKV"]),
    ],
)  # fmt: skip
def test_files_as_people_bring_them(tmp_path, name, text, expected):
    found, report = read(write(tmp_path / name, text))
    assert found == expected
    assert not report.dropped
    for encoding in ("utf-16", "utf-8-sig"):
        if not name.endswith(("a3m", "dat")):
            path = tmp_path / name
            path.write_bytes(text.encode(encoding))
            assert read(path)[0] == expected


def test_words_in_the_place_of_residues_are_dropped(tmp_path):
    cells = f"name,sequence\nx,unknown\ny,Missing\nz,TBD\nw,{HEAVY}\n"
    lines = f"Melittin\n{HEAVY}\nMagainin\n{B}\n"
    assert read(write(tmp_path / "a.csv", cells))[0] == [HEAVY]
    assert read(write(tmp_path / "a.txt", lines))[0] == [HEAVY, B]


def test_a_named_column_is_read(tmp_path):
    path = write(tmp_path / "a.csv", f"sequence,Other\n{A},{B}\n")
    report = ReadReport()
    proteins = read_proteins(path, report=report, sequence_column="other")
    assert [p.residues for p in proteins] == [B]
    assert "  residues from the column 'Other'" in report.lines()
    with pytest.raises(ValueError, match="no column 'none' among its columns"):
        list(read_proteins(path, sequence_column="none"))
    with pytest.raises(ValueError, match="has no columns"):
        list(read_proteins(write(tmp_path / "a.fasta", ">a\nMK\n"), sequence_column="x"))


def test_excel(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["My assay"], [], ["Name", "Sequence", "Score"], ["x", A, 0.5], [None, B, None]):
        book.active.append(row)
    book.create_sheet("notes").append(["Read me"])
    book.save(tmp_path / "a.xlsx")
    found, report = read(tmp_path / "a.xlsx")
    assert found == [A, B]
    assert "of 2 sheets this one: Sheet" in report.notes
    (tmp_path / "b.xlsx").write_bytes((tmp_path / "a.xlsx").read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"b\.xlsx: broken Excel file"):
        read(tmp_path / "b.xlsx")


def test_excel_without_its_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    path = write(tmp_path / "a.xlsx", "PK\x03\x04")
    with pytest.raises(ValueError, match="pip install openpyxl, or save the sheet as CSV"):
        read(path)


def test_parts_have_several_names_and_other_files_are_named(tmp_path):
    for name, protein in (("Training.fa", A), ("dev.fasta", B), ("TEST.txt", C), ("more.csv", A)):
        write(tmp_path / name, protein if name.endswith("txt") else f">x\n{protein}\n")
    write(tmp_path / "notes.md", "text")
    for split, protein in (("train", A), ("validation", B), ("test", C)):
        found, report = read(tmp_path, split=split)
        assert found == [protein]
        assert report.notes == ["not read: more.csv"]
    write(tmp_path / "val.fasta", ">x\nMK\n")
    with pytest.raises(ValueError, match="several files for the part 'validation'"):
        has_split(tmp_path, "validation")


def test_several_files_and_patterns(tmp_path):
    for name, protein in (("a1.fasta", A), ("a2.fasta", B), ("b.csv", C)):
        write(tmp_path / name, f"sequence\n{C}\n" if name == "b.csv" else f">x\n{protein}\n")
    source = f"{tmp_path}/a*.fasta,{tmp_path}/b.csv"
    assert read(source)[0] == [A, B, C]  # type: ignore[arg-type]
    assert has_split(source, "train")
    assert not has_split(source, "test")
    assert not sources.on_hub(source)
    with pytest.raises(ValueError, match=r"c\.csv: there is no such file"):
        read(f"{tmp_path}/a1.fasta,{tmp_path}/c.csv")  # type: ignore[arg-type]
    parser = argparse.ArgumentParser()
    add_data_flags(parser.add_argument, "proteins")
    assert parser.parse_args(["--data", "x y.fa", "z.fa"]).data == "x y.fa,z.fa"


def test_a_stream_that_breaks_goes_on_at_its_row(monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(readers.time, "sleep", pauses.append)

    class Rows:
        def __init__(self, start=0, breaks=None):
            self.start, self.breaks = start, [3, 3, 5] if breaks is None else breaks

        def skip(self, count):
            return Rows(count, self.breaks)

        def __iter__(self):
            for number in range(self.start, 8):
                if self.breaks and self.breaks[0] == number:
                    self.breaks.pop(0)
                    raise OSError("reset by peer")
                yield {"sequence": "M" + "K" * number}

    fake = types.SimpleNamespace(load_dataset=lambda *a, **k: Rows())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = [p.residues for p in read_proteins("owner/proteins", split="train")]
    assert found == ["M" + "K" * n for n in range(8)]
    assert pauses == [1, 4, 1]
    assert "row 4: the stream broke (reset by peer): going on at this row in 1 s" in (
        capsys.readouterr().out
    )


def test_few_proteins_still_give_validation_proteins():
    for count, least in ((3, 0), (4, 1), (9, 1), (10, 2), (100, 2)):
        hashes = np.array([sequence_hash(str(i)) for i in range(count)], np.uint64)
        aside = held_out(hashes, 1e-9, 1, 500)
        assert aside.sum() == least
        assert (held_out(hashes[::-1], 1e-9, 1, 500) == aside[::-1]).all()
        assert (held_out(hashes, 0.5, 1, 500) >= aside).all()


def test_no_more_proteins_are_set_aside_than_are_measured():
    hashes = np.array([sequence_hash(str(i)) for i in range(1000)], np.uint64)
    some, all_of_share = (held_out(hashes, 0.1, 1, most) for most in (30, 500))
    assert some.sum() == 30
    assert 60 < all_of_share.sum() < 140
    assert (all_of_share >= some).all()


def test_numbers_beside_residues_are_found_in_time_that_grows_with_the_line():
    from src.proteins.readers import without_numbers

    assert without_numbers("1 MKV LLA 60") == without_numbers("MKV LLA 60") == "MKVLLA"
    assert without_numbers("12 34") == without_numbers("MKV LLA") == without_numbers("MKV1") == ""
    for hostile in (" " * 10**6 + "M", "M" + " 1" * 10**6 + "X", "1" * 10**6 + "M"):
        without_numbers(hostile)  # a search for blanks before digits took minutes


def test_different_proteins_have_different_names(tmp_path, tiny_tokenizer):
    path = tmp_path / "p.fasta"
    path.write_text(f">a x\n{A}\n>a x\n{A}\n>a y\n{B}\n>a y\n{C}\n>b\n{A[:-1]}\n")
    store = tokenise(path, None, tiny_tokenizer, 64, tmp_path, quiet=True)
    assert list(store.names) == ["a", "a_y", "a_y_3", "b"]
    assert store.report.fixed[SAME_NAMES] == {"count": 2, "first": "a_y"}


def archive(path: Path, files: dict[str, bytes]) -> Path:
    """Write a zip or tar archive, by the name."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in files.items():
                packed.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_the_one_file_of_an_archive_is_read(name, tmp_path):
    fasta = f">a\n{A}\n>b\n{B}\n".encode()
    table = f"id,sequence\na,{A}\nb,{B}\n".encode()
    beside = {"proteins/README": b"read me", "__MACOSX/proteins/._a.fasta": b"\0\0"}
    for files in (
        {"proteins/a.fasta": fasta},
        {"proteins/a.fasta.gz": gzip.compress(fasta), **beside},
        {"proteins/a.csv": table, **beside},
    ):
        found, _ = read(archive(tmp_path / name, files))
        assert found == [A, B]
    _, report = read(archive(tmp_path / name, {"proteins/own.fasta": fasta}))
    assert report.notes == ["read from the archive: own.fasta"]
    for files, message in (
        (
            {"a.fasta": fasta, "b.fasta": fasta},
            "archive of 2 files .a.fasta, b.fasta, ....: unpack",
        ),
        ({"a.parquet": b"PAR1"}, "is an archive with a.parquet: unpack it"),
        ({"a.fasta": b">a\n" + b"M\n" * 12_000_000}, "decompression bomb"),
    ):
        if "bomb" in message and name == "a.tar":
            continue  # it is not compressed
        with pytest.raises(ValueError, match=message):
            read(archive(tmp_path / name, files))
    archive(tmp_path / name, {"a.fasta": b">a\n" + random.Random(0).randbytes(4000).hex().encode()})
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="broken or "):
        read(tmp_path / name)


@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_of_json_are_read(indent, tmp_path, monkeypatch):
    monkeypatch.setattr("src.proteins.table_rows.MAX_ROW_BYTES", 64)  # read in pieces
    rows = [{"id": f"p{i}", "sequence": A[: 3 + i % 5] + B[: 2 + i % 7]} for i in range(20)]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=indent))
    found, report = read(path)
    assert found == [row["sequence"] for row in rows]
    assert report.column == "sequence"
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed)[0] == found
    assert read(write(tmp_path / "b.json", json.dumps([A, B], indent=indent)))[0] == [A, B]
    apart = "\n".join(json.dumps(row, indent=indent) for row in rows)  # as jq writes them
    assert read(write(tmp_path / "c.json", apart))[0] == found


@pytest.mark.parametrize("indent", [None, 2])
def test_uniprots_json_is_read(indent, tmp_path):
    rows = [
        {"primaryAccession": f"P{i}", "genes": [{}], "sequence": {"value": p, "length": len(p)}}
        for i, p in enumerate((A, B, C))
    ]
    path = write(tmp_path / "a.json", json.dumps({"results": rows}, indent=indent))
    assert [(p.name, p.residues) for p in read_proteins(path)] == [("P0", A), ("P1", B), ("P2", C)]
    for row in rows:
        row["target"] = {"construct": LONG}
        del row["sequence"]
    path = write(tmp_path / "b.json", json.dumps(rows))
    with pytest.raises(ValueError, match=r"--sequence_column \(target.construct looks like it"):
        read(path)
    assert [p.residues for p in read_proteins(path, sequence_column="target.construct")][0] == LONG


def test_titles_of_pir_are_no_residues(tmp_path):
    found, report = [], ReadReport()
    path = write(tmp_path / "a.ali", f">P1;one\nPEPTIDE\n{A}*\n>P1;two\n\n{B}*\n")
    found = list(read_proteins(path, report=report))
    assert [p[:2] for p in found] == [("one", A), ("two", B)]
    assert report.fixed[readers.PIR_TITLES] == {"count": 2, "first": "a.ali:1"}


# What else people bring


@pytest.mark.parametrize(
    "text",
    ["Tyr-D-Ala-Gly-Phe-Met", "Met-Gln-Nle-Val-Lys", "fMet-Leu-Phe", "Gly-Hyp-Pro", "MET ILE FOO"],
)
def test_codes_that_are_no_known_residues_are_no_letters_either(tmp_path, text):
    found, report = read(write(tmp_path / "a.fasta", f">a\n{text}\n>b\n{HEAVY}\n"))
    assert found == [HEAVY]
    assert counts(report.dropped) == {notation.OTHER_CODES: 1}


def test_json_keys_that_come_late_are_read_or_named(tmp_path, monkeypatch):
    rows = [json.dumps({"sequence": A + "MKVL"[i % 4] * i}) for i in range(25)]
    rows.append(json.dumps({"sequence": B, "name": "lys"}))
    path = write(tmp_path / "a.jsonl", "\n".join(rows))
    assert [p.name for p in read_proteins(path)][-1] == "lys"
    monkeypatch.setattr(table_rows, "JSON_SAMPLE", 5)
    found, report = read(path)
    assert len(found) == 26
    assert report.noticed[table_rows.LATE_KEYS]["count"] == 1


def test_a_word_document_is_called_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
        archive.writestr("styles.xml", "<w/>")
    with pytest.raises(ValueError, match="a Word document: save it as plain text"):
        read(tmp_path / "a.docx")


def test_names_with_commas_in_them(tmp_path):
    folder = tmp_path / "run 1, final"
    folder.mkdir()
    for name, protein in (("a.fasta", A), ("b, c.fasta", B)):
        write(folder / name, f">x{name[0]}\n{protein}\n")
    paths = [str(folder / "a.fasta"), str(folder / "b, c.fasta")]
    assert read(",".join(paths))[0] == [A, B]  # type: ignore[arg-type]
    assert read(str(folder / "*.fasta"))[0] == [A, B]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a.fasta: there is no such file"):
        read(",".join([*paths, "nope/a.fasta"]))  # type: ignore[arg-type]


def test_a_saved_data_set_is_called_so(tmp_path):
    for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
        (tmp_path / name).write_bytes(b"ARROW1")
    with pytest.raises(ValueError, match="write parquet with to_parquet"):
        read(tmp_path, split="train")


def test_many_files_are_not_one_with_a_long_name(tmp_path, monkeypatch):
    """Together their names are longer than a file's may be."""
    monkeypatch.chdir(tmp_path)
    names = [f"a_file_with_a_name_{i}.fasta" for i in range(40)]
    for i, name in enumerate(names):
        write(Path(name), f">p{i}\n{A}{'MKVL'[i % 4] * i}\n")
    source = ",".join(names)
    assert len(read(source)[0]) == 40  # type: ignore[arg-type]
    assert has_split(source, "train")
    assert not has_split(source, "test")
