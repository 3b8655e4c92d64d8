"""Makes hostile input files and watches what the project's readers do with them.

A case starts from a valid file, is spoiled at random (by its seed alone), and goes through the
function that reads such a file for real. Only two ends are right: a result, in which everything
that was read is accounted for, or a ``ValueError`` or ``OSError`` whose one line names the file.
Anything else is a fault: another exception, a second line, unprintable characters, more than
``SECONDS`` or ``MEMORY_BYTES``, the death of the process, or a protein that vanished.

Cases run in processes forked from one that has imported and built everything, many cases a
process, under ``RLIMIT_AS`` and an alarm; a process that dies costs only the case it was at.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from src.common.cli import one_line
from src.proteins.fasta import FastaRecord, fasta_text

SECONDS = 10
"""Of the processor, for a case."""
MEMORY_BYTES = 3 << 30
"""Address space that a case may take beyond what its process had at its start."""
CASES_A_PROCESS = 400
MESSAGE_LENGTH = 1000
RIGHT_ENDS = ("read", "refused")
Files = dict[str, bytes]

HOSTILE_NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-320,
)
HOSTILE_TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "a\nb",
    "a\r\nb",
    "\x1b[2J\x1b]0;title\x07",
    "\ud800",
    "\u202egnirts",
    "\U0001f9ec" * 50,
    "NaN",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "C:\\Windows",
    "a" * 5000,
    "%s%n{0.__class__}",
    "__proto__",
    "1e999",
    "<|endoftext|>",
)


class Vanished(Exception):
    """A reader's result does not account for what its input held."""


class Hang(BaseException):
    """A case took too long. No ``Exception``, so that no reader takes it for a broken file."""


# Spoiling bytes


def spoiled_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to three random faults."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        raw = rng.choice(BYTE_FAULTS)(raw, rng)
    return raw


def _place(raw: bytes, rng: random.Random) -> int:
    return rng.randint(0, len(raw))


def _truncate(raw: bytes, rng: random.Random) -> bytes:
    return raw[: _place(raw, rng)]


def _flip_bits(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if raw else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(raw: bytes, rng: random.Random) -> bytes:
    at, piece = _place(raw, rng), rng.randbytes(rng.choice((1, 4, 100, 4000)))
    return raw[:at] + piece + raw[at + len(piece) :]


def _insert(raw: bytes, rng: random.Random) -> bytes:
    at = _place(raw, rng)
    return raw[:at] + rng.choice(PIECES) + raw[at:]


def _insert_huge(raw: bytes, rng: random.Random) -> bytes:
    at = _place(raw, rng)
    size = rng.choice((70_000, 140_000, 1 << 20, (1 << 20) + 1, 5 << 20))
    piece = rng.choice((b"A", b"[", b"9", b"\n", b" ", b">", b"ACDEFG\n"))
    return raw[:at] + piece * (size // len(piece)) + raw[at:]


def _cut_out(raw: bytes, rng: random.Random) -> bytes:
    start, stop = sorted((_place(raw, rng), _place(raw, rng)))
    return raw[:start] + raw[stop:]


def _repeat(raw: bytes, rng: random.Random) -> bytes:
    start, stop = sorted((_place(raw, rng), _place(raw, rng)))
    return raw[:stop] + raw[start:stop] * rng.choice((1, 2, 20)) + raw[stop:]


def _line_ends(raw: bytes, rng: random.Random) -> bytes:
    return raw.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"", b"\0\n", b"\v", b"\x85")))


def _rubbish(raw: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"", rng.randbytes(rng.choice((1, 10, 1000, 100_000)))))


def _reencode(raw: bytes, rng: random.Random) -> bytes:
    text = raw.decode("utf-8", errors="replace")
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")), errors="replace")


def _case(raw: bytes, rng: random.Random) -> bytes:
    return raw.swapcase()


BYTE_FAULTS = (
    _truncate,
    _flip_bits,
    _flip_bits,
    _overwrite,
    _insert,
    _insert,
    _insert_huge,
    _cut_out,
    _repeat,
    _line_ends,
    _rubbish,
    _reencode,
    _case,
)
PIECES = (
    *(text.encode("utf-8", errors="surrogatepass") for text in HOSTILE_TEXTS),
    b"\0" * 10,
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xc3\x28",
    b">",
    b"\n>\n",
    b">>>",
    b"\n\n",
    b"\r",
    b"*",
    b"-",
    b'"',
    b'"""',
    b",",
    b"\t",
    b"{",
    b"]",
    b"\x1f\x8b",
    b"PAR1",
    b"ACDXBZ*acd-.",
)


# Spoiling JSON


def spoiled_json(raw: bytes, rng: random.Random) -> bytes:
    """Return a JSON file with one to three wrong values, keys or shapes, or spoiled as bytes."""
    if rng.random() < 0.25:
        return spoiled_bytes(raw, rng)
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _spoiled_value(value, rng)
    text = json.dumps(value, indent=rng.choice((None, 2)))
    if rng.random() < 0.15:
        text = _twice(text, value, rng)
    return text.encode("utf-8", errors="surrogatepass")


def _twice(text: str, value: Any, rng: random.Random) -> str:
    """Return an object's text with one key standing there twice."""
    if not isinstance(value, dict) or not value:
        return text
    key = json.dumps(rng.choice(list(value)))
    return f"{{{key}: {json.dumps(hostile_value(rng))}, {text.lstrip()[1:]}"


def hostile_value(rng: random.Random) -> Any:
    """Return a value that is unlikely to be expected."""
    kind = rng.randrange(9)
    if kind <= 1:
        return rng.choice(HOSTILE_NUMBERS)
    if kind <= 3:
        return rng.choice(HOSTILE_TEXTS)
    if kind == 4:
        return rng.choice((math.nan, math.inf, -math.inf))
    if kind == 5:
        return rng.choice((None, True, False))
    if kind == 6:
        return rng.choice(([], {}, [[]], [{}], {"": {}}, [None], list(range(1000))))
    if kind == 7:
        return nested(rng.choice((5, 500)), rng)
    return rng.randint(-(10 ** rng.randint(1, 20)), 10 ** rng.randint(1, 20))


def nested(depth: int, rng: random.Random) -> Any:
    """Return lists or objects inside one another."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _spoiled_value(value: Any, rng: random.Random) -> Any:
    places = list(_containers(value))
    if not places or rng.random() < 0.03:
        return hostile_value(rng)
    # Shallow places hold what matters; deep ones are many.
    place = rng.choice(places[: rng.choice((3, 20, len(places)))])
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    action = rng.random()
    if not keys or action < 0.1:
        if isinstance(place, dict):
            place[rng.choice(HOSTILE_TEXTS)] = hostile_value(rng)
        else:
            place.append(hostile_value(rng))
        return value
    key = rng.choice(keys)
    if action < 0.25:
        del place[key]
    elif action < 0.35 and isinstance(place, dict):
        place[rng.choice(HOSTILE_TEXTS)] = place.pop(key)
    elif action < 0.45:
        with suppress(RecursionError):  # where a spoiled place already goes deep
            place[key] = copy.deepcopy(rng.choice(places))
    elif action < 0.6 and isinstance(place[key], int | float):
        place[key] = rng.choice((place[key] + 1, -place[key], place[key] * 2, float(place[key])))
    else:
        place[key] = hostile_value(rng)
    return value


def _containers(value: Any) -> Iterator[Any]:
    """Yield every object and list of a JSON value, outermost first."""
    queue = [value]
    for item in queue:
        if isinstance(item, dict | list) and len(queue) < 5000:
            yield item
            queue += item.values() if isinstance(item, dict) else item


# What is fuzzed


@dataclass
class Format:
    """One kind of input: valid files, how they are spoiled, and what reads them."""

    files: Files
    spoil: Callable[[Files, random.Random], Files]
    read: Callable[[Path, Files], Any]
    weight: int = 1


def spoil_one(
    spoilers: Sequence[tuple[str, Callable[[bytes, random.Random], bytes]]],
) -> Callable[[Files, random.Random], Files]:
    """Return a spoiler of sets of files: of the named ones, one at a time, seldom removing it."""

    def spoil(files: Files, rng: random.Random) -> Files:
        name, spoiler = rng.choice(spoilers)
        if rng.random() < 0.02:
            return {key: raw for key, raw in files.items() if key != name}
        return {**files, name: spoiler(files[name], rng)}

    return spoil


def spoiled_gzip(raw: bytes, rng: random.Random) -> bytes:
    """Return gzip that is broken outside or holds spoiled text, or a small decompression bomb."""
    action = rng.random()
    if action < 0.35:
        return spoiled_bytes(raw, rng)
    if action < 0.37:
        piece = rng.choice((b"A", b"\n", b">a\n" + b"ACDEFGHIK\n" * 20))
        return gzip.compress(piece * ((40 << 20) // len(piece)), 1)
    if action < 0.42:
        return raw + rng.choice((b"\0" * 100, raw, b"rubbish", raw[:20], gzip.compress(b"")))
    return gzip.compress(spoiled_bytes(gzip.decompress(raw), rng), 1)


def spoiled_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with a spoiled header, or spoiled as bytes."""
    if rng.random() < 0.4:
        return spoiled_bytes(raw, rng)
    size = int.from_bytes(raw[:8], "little")
    header = spoiled_json(raw[8 : 8 + size], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63, len(raw)))
    return length.to_bytes(8, "little") + header + raw[8 + size :]


def spoiled_parquet(raw: bytes, rng: random.Random) -> bytes:
    """Return parquet spoiled as bytes, or a whole table of strange types and values."""
    if rng.random() < 0.6:
        return spoiled_bytes(raw, rng)
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rng.choice((0, 1, 5, 600))
    columns = {}
    names = ("sequence", "text", "input_ids", "name", "Sequence ", "id", "a\0b", "")
    for name in rng.sample(names, rng.randint(1, 4)):
        kind = rng.randrange(8)
        if kind <= 2:
            cells = (None, "MKT", "MKTAY*", "mk\r\n", "A" * 3000, *HOSTILE_TEXTS[:6])
            columns[name] = pa.array([rng.choice(cells) for _ in range(rows)], pa.string())
        elif kind <= 4:
            tokens = ([], None, [0, 5, 6, 0], [0] * 2000, [0, 64, 0], [0, -1, 0], [5])
            types = (pa.int32(), pa.int64(), pa.int16())
            columns[name] = pa.array(
                [rng.choice(tokens) for _ in range(rows)], pa.list_(rng.choice(types))
            )
        elif kind == 5:
            columns[name] = pa.array([rng.randbytes(5) for _ in range(rows)], pa.binary())
        elif kind == 6:
            columns[name] = pa.array([[[1]]] * rows, pa.list_(pa.list_(pa.int64())))
        else:
            values = [rng.choice((1.5, None, math.nan)) for _ in range(rows)]
            columns[name] = pa.array(values, pa.float64())
    sink = io.BytesIO()
    codec = rng.choice(("snappy", "zstd", "none", "gzip"))
    pq.write_table(pa.table(columns), sink, compression=codec, row_group_size=max(1, rows // 2))
    whole = sink.getvalue()
    return spoiled_bytes(whole, rng) if rng.random() < 0.3 else whole


# What reads it


def entries_in(name: str, raw: bytes) -> int | None:
    """Count the proteins of a file in another way than the readers do; None where that is unclear.

    Raises:
        Vanished: gzip that was read is broken.
    """
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Vanished(f"broken gzip was read: {error}") from None
        name = name.removesuffix(".gz")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if name.endswith(".parquet") or raw[:4] == b"PAR1":
        import pyarrow.parquet as pq

        file = pq.ParquetFile(io.BytesIO(raw))
        names = [column.strip().lower() for column in file.schema_arrow.names]
        return file.metadata.num_rows if "sequence" in names else None
    lines = raw.split(b"\n")
    if name.endswith((".csv", ".tsv")):
        text = raw.decode("utf-8", errors="replace").replace("\r\n", "\n")
        rows = [
            row
            for row in csv.reader(io.StringIO(text), delimiter="," if "csv" in name else "\t")
            if row
        ]
        return len(rows) - 1 if "sequence" in [c.strip().lower() for c in rows[0]] else None
    filled = [line for line in lines if line.decode("utf-8", errors="replace").strip()]
    if name.endswith(".fasta") or filled[0].startswith(b">"):
        return sum(line.startswith(b">") for line in lines)
    return len(filled)


def read_source(folder: Path, files: Files, name: str, tokenizer: Any) -> None:
    """Read a file of proteins as training does, and account for each of them."""
    from src.proteins.sources import ReadReport, read_entries
    from src.proteins.tokens import open_store, tokenise

    report = ReadReport()
    entries = list(read_entries(folder / name, report=report, tokenizer=tokenizer))
    if report.read != report.kept + report.dropped_count or len(entries) != report.kept:
        raise Vanished(f"{report.as_dict()} with {len(entries)} proteins")
    if sum(len(entry.residues) for entry in entries) != report.residues:
        raise Vanished("residues are miscounted")
    raw = files[name]
    expected = entries_in(name, raw)
    if expected is not None and expected != report.read:
        raise Vanished(f"{expected} proteins are in the file, {report.read} were read")
    if len(raw) % 3:
        return  # tokenising costs more than all the rest: every third will do
    store = tokenise(folder / name, None, tokenizer, 64, folder / "cache", quiet=True)
    found = store.report
    if found.read != report.read or found.read != found.kept + found.dropped_count:
        raise Vanished(f"the store's report: {found.as_dict()}")
    cut = found.fixed.get("cut to 64 tokens", {"count": 0})["count"]
    distinct = {entry.residues for entry in entries}
    spoken = [store.sequence(i) for i in range(len(store))]
    if sum(s not in distinct for s in spoken) > cut or len(open_store(store.folder)) != found.kept:
        raise Vanished("the store holds other proteins")


def read_results_file(folder: Path, files: Files) -> None:
    """Read a results file and show it, as every script does that compares some."""
    from src.evaluation.results import TABLE, read_results, summary_lines, with_interval
    from src.publishing.report import build_report

    results = read_results(folder / "r.json")
    summary_lines(results)
    for _, name, ratio in TABLE:
        for key in (f"student_{name}", f"teacher_{name}", ratio):
            if key:
                with_interval(results, key)
    json.dumps(results, allow_nan=False)
    build_report(None, folder / "r.json").encode("utf-8")


RUN_SETTINGS = {
    "data": "a",
    "teacher_model": "t",
    "student": {"n_layer": 2, "n_head": 2, "n_embd": 8},
    "loss": {"alpha": 0.5, "temperature": 2.0, "divergence": "forward_kl"},
    "learning_rate": 0.001,
}


def read_run_record(folder: Path, files: Files) -> None:
    """Read a run's record as training, evaluation and the report do."""
    from src.common.runs import claim_folder
    from src.evaluation.scoring import named_data, named_teacher, run_of
    from src.publishing.report import build_report

    record = run_of(folder)
    for name in (named_teacher(record), named_data(record)):
        if name is not None:
            Path(name).is_dir()
    build_report(folder).encode("utf-8")
    claim_folder(folder, RUN_SETTINGS, resume=True)


def read_model(folder: Path, files: Files) -> None:
    """Load a model and run it on a few tokens."""
    import torch

    from src.models.loading import load_causal_lm, max_positions, output_head

    model = load_causal_lm(folder)
    output_head(model)
    length = min(5, max_positions(model.config))
    with torch.inference_mode():
        model(torch.arange(1, length + 1)[None] % model.config.vocab_size)
    # Finite weights may still overflow for some input: evaluation refuses that when it meets it.
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise Vanished("a model whose weights are no numbers was loaded")


def read_tokenizer(folder: Path, files: Files, proteins: Sequence[str]) -> None:
    """Load a tokenizer and tokenise proteins with it."""
    from src.models.loading import load_tokenizer
    from src.proteins.tokens import tokenise

    tokenizer = load_tokenizer(folder)
    (folder / "a.txt").write_text("\n".join(proteins))
    store = tokenise(folder / "a.txt", None, tokenizer, 64, folder / "cache", quiet=True)
    report = store.report
    if report.read != report.kept + report.dropped_count or len(store) != report.kept:
        raise Vanished(f"{report.as_dict()}")
    wholes = {protein[: len(store.sequence(i))] for i in range(len(store)) for protein in proteins}
    if any(store.sequence(i) not in wholes for i in range(len(store))):
        raise Vanished("the store holds other proteins")


def read_split(folder: Path, files: Files) -> None:
    """Check a split and show its record."""
    from src.proteins.splits import check_split, record_lines

    record_lines(check_split(folder))


def read_cluster_table(folder: Path, files: Files) -> None:
    """Read a table of clusters."""
    from src.proteins.splits import read_clusters

    clusters = read_clusters(folder / "c.tsv.gz")
    entries_in("c.txt.gz", files["c.tsv.gz"])
    if not all(clusters) or not all(clusters.values()):
        raise Vanished("a cluster or protein without a name")


def read_checkpoint(folder: Path, files: Files) -> None:
    """Choose the checkpoint to resume from; it must be the spoiled one only if all is there."""
    from src.trainer.checkpoints import fault_of, newest_valid, read_tensors

    chosen = newest_valid(folder, lambda line: None)
    if chosen is None:
        raise Vanished("the older checkpoint was whole")
    for name, raw in files.items():
        if Path(name).parent.name == chosen.name and name in CHECKPOINT and raw != CHECKPOINT[name]:
            raise Vanished(f"{name} was altered and the checkpoint chosen")
    if fault_of(chosen) is not None:
        raise Vanished("a faulty checkpoint was chosen")
    read_tensors(chosen / "model.safetensors")


CHECKPOINT: Files = {}
"""The valid checkpoint's files but for its manifest, to compare with."""


def read_cache(folder: Path, files: Files, lengths: Sequence[int]) -> None:
    """Open a teacher cache and read every protein of it."""
    from src.models.teacher_cache import TeacherCache

    cache = TeacherCache(folder, "teacher", "data")
    for index, length in enumerate(lengths):
        states, figures = cache[index]
        if states.shape != (length, 8) or figures.shape != (length, 3):
            raise Vanished(f"protein {index} came out as {tuple(states.shape)}")


def read_store(folder: Path, files: Files) -> None:
    """Open a store of tokenised proteins and read every protein of it."""
    from src.proteins.tokens import open_store

    store = open_store(folder)
    for index in range(len(store)):
        if not store.sequence(index) or not store.names[index]:
            raise Vanished("an empty protein or name")
    if int(store.lengths.sum()) != store.manifest["tokens"]:
        raise Vanished("tokens are miscounted")


def signed_manifest(raw: bytes, rng: random.Random) -> bytes:
    """Return a store's manifest, spoiled and signed anew: an attacker can sign, too."""
    from src.proteins.tokens import _manifest_check

    spoiled = spoiled_json(raw, rng)
    with suppress(ValueError, RecursionError):
        value = json.loads(spoiled)
        if isinstance(value, dict):
            value["check"] = _manifest_check(value)
            spoiled = json.dumps(value).encode("utf-8", errors="surrogatepass")
    return spoiled


# Valid files


def folder_files(folder: Path) -> Files:
    """Return the files below a folder, by relative name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def build_formats(folder: Path) -> dict[str, Format]:
    """Build valid files of every format in an empty folder and return them with their readers."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    from src.common.runs import write_run
    from src.evaluation.results import REQUIRED, write_results
    from src.models.teacher_cache import capture
    from src.proteins import splits
    from src.proteins.tokenizer import train_tokenizer
    from src.proteins.tokens import encode, tokenise
    from src.trainer import checkpoints

    rng = random.Random(0)
    proteins = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=n)) for n in (30, 61, 120, 5, 40, 80)]
    tokenizer = train_tokenizer(proteins * 5, 64, n_positions=128)
    fasta = "".join(f">p{i} some words\n{p[:60]}\n{p[60:]}\n" for i, p in enumerate(proteins))
    table = "".join(f"p{i},{p},{i / 3}\n" for i, p in enumerate(proteins))
    sources = {
        "a.fasta": fasta.encode(),
        "a.fasta.gz": gzip.compress(fasta.encode(), mtime=0),
        "a.txt": "\n".join(proteins).encode(),
        "a.csv": f"name,sequence,score\n{table}".encode(),
        "a.tsv": f"name,sequence,score\n{table}".replace(",", "\t").encode(),
    }
    ids = encode(tokenizer, proteins)
    for name, column in (("a.parquet", {"sequence": proteins}), ("t.parquet", {"input_ids": ids})):
        sink = io.BytesIO()
        names = [f"p{i}" for i in range(len(proteins))]
        pq.write_table(pa.table({**column, "name": names}), sink)
        sources[name] = sink.getvalue()
    spoilers = {"gz": spoiled_gzip, "parquet": spoiled_parquet}

    formats: dict[str, Format] = {}
    labels = ("FASTA", "FASTA.gz", "text", "CSV", "TSV", "parquet", "parquet of tokens")
    for label, (name, raw) in zip(labels, sources.items(), strict=True):
        spoiler = spoilers.get(name.rsplit(".", 1)[-1], spoiled_bytes)
        read = partial(read_source, name=name, tokenizer=tokenizer)
        formats[label] = Format({name: raw}, spoil_one([(name, spoiler)]), read, 3)

    results = {key: 1.0 for key, kind in REQUIRED.items() if kind in ("above 0", "at least 0")}
    results |= {
        "student_ece": {"ece": 0.1, "calibration_meaningful": True},
        "teacher_ece": {"ece": 0.1},
        "kl_from_natural": {"student": 0.1, "teacher": 0.2},
        "intervals": {"perplexity_ratio": [0.9, 1.1], "student_ece.ece": [0.0, 0.2]},
        "run": {"seed": 0, "command": ["evaluate.py"], "student": {"name": "s"}},
        "student_parameters": 10,
        "teacher_parameters": 40,
        "share_of_teacher": 0.25,
        "kept_advantage": 0.5,
        "threshold": {"perplexity_ratio_below": 2.0, "passed": True},
        "floors": {"unigram": {"perplexity_per_residue": 18.0, "student_gain": -0.1}},
        "data": {"proteins": 6, "clusters": 5, "residues": 300, "tokens": 100},
        # Without what is drawn: figures take longer than all the rest.
        "generation": {
            "student": {
                "sequences": 6,
                "valid_share": 0.5,
                "intervals": {"valid_share": [0.25, 0.75]},
                "sampling": {"top_k": 950, "top_p": 1.0, "temperature": 1.0, "seed": 0},
                "counts": {"attempts": 7, "kept": 6},
                "examples": proteins[:2],
            }
        },
    }
    write_results(folder / "results" / "r.json", results)
    run = folder / "run"
    run.mkdir()
    about = {
        "name": "n",
        "status": "running",
        "settings": RUN_SETTINGS,
        "command": ["train.py"],
        "teacher": {"name": "t", "parameters": 40},
        "student": {"parameters": 10},
        "data": {"train": {"proteins": 6, "residues": 300}},
        "train_seconds": 1.0,
        "peak_memory_bytes": 1000,
        "steps": 2,
    }
    write_run(run, about)

    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=64, n_positions=128)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder / "model")
    (folder / "tokenizer" / "config.json").write_bytes(
        (folder / "model" / "config.json").read_bytes()
    )

    split = folder / "split"
    split.mkdir()
    parts = {"train": ["p0", "p1", "p2"], "validation": ["p3"], "test": ["p4", "p5"]}
    named = {f"p{i}": p for i, p in enumerate(proteins)}
    clusters = {name: name for name in named}
    for part, names in parts.items():
        splits.write_packed(
            split / f"{part}.fasta.gz", [fasta_text(FastaRecord(n, named[n])) for n in names]
        )
    rows = ["protein\tcluster", *(f"{n}\t{c}" for n, c in clusters.items())]
    splits.write_packed(split / splits.CLUSTERS_FILE, [f"{row}\n" for row in rows])
    record = {
        "schema_version": splits.SCHEMA_VERSION,
        "parts": splits.describe_parts(named, parts, clusters),
        "leakage": {"test": {"proteins": 2, "any_hit": 0, "identity_30": 0, "identity_50": 0}},
        "split_hash": splits.split_hash({p: [named[n] for n in ns] for p, ns in parts.items()}),
    }
    (split / splits.SPLIT_FILE).write_text(json.dumps(record))
    splits.check_split(split)

    for step in (4, 8):
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        tensors = ("model.safetensors", checkpoints.OPTIMIZER_FILE)
        for name in (*tensors, checkpoints.PROCESS_FILE.format(0)):
            save_file({"a": torch.arange(9.0) + step}, checkpoint / name)
        for name in (checkpoints.STATE_FILE, checkpoints.TRAINER_STATE_FILE):
            (checkpoint / name).write_text(json.dumps({"global_step": step}))
        checkpoints.write_manifest(checkpoint)
    saved = folder_files(folder / "checkpoints")
    CHECKPOINT.clear()
    CHECKPOINT.update({k: v for k, v in saved.items() if not k.endswith(checkpoints.MANIFEST)})

    (folder / "a.txt").write_text("\n".join(proteins))
    store = tokenise(folder / "a.txt", None, tokenizer, 64, folder / "stores", quiet=True)
    teacher = model.bfloat16()
    captured = capture(
        teacher, store, folder / "cache", shard_bytes=2000, announce=lambda line: None
    ).folder
    manifest = json.loads((captured / "manifest.json").read_bytes())
    manifest |= {"teacher": "teacher", "data": "data"}
    (captured / "manifest.json").write_text(json.dumps(manifest))
    lengths = store.lengths.tolist()
    cached = folder_files(captured)
    stored = folder_files(store.folder)
    newest = "checkpoint-8/"

    def plain(
        files: Files,
        spoilers: Sequence[tuple[str, Callable[[bytes, random.Random], bytes]]],
        read: Callable[[Path, Files], Any],
        weight: int = 1,
    ) -> Format:
        return Format(files, spoil_one(spoilers), read, weight)

    formats |= {
        "results": plain(
            folder_files(folder / "results"), [("r.json", spoiled_json)], read_results_file, 4
        ),
        "run.json": plain(folder_files(run), [("run.json", spoiled_json)], read_run_record, 3),
        "tokenizer": plain(
            folder_files(folder / "tokenizer"),
            [("tokenizer.json", spoiled_json)] * 2 + [("tokenizer_config.json", spoiled_json)],
            partial(read_tokenizer, proteins=proteins),
            2,
        ),
        "config.json": plain(
            folder_files(folder / "model"), [("config.json", spoiled_json)], read_model, 2
        ),
        "weights": plain(
            folder_files(folder / "model"),
            [("model.safetensors", spoiled_safetensors)],
            read_model,
            2,
        ),
        "split": plain(
            folder_files(split),
            [
                (splits.SPLIT_FILE, spoiled_json),
                (splits.SPLIT_FILE, spoiled_json),
                (splits.CLUSTERS_FILE, spoiled_gzip),
                ("test.fasta.gz", spoiled_gzip),
            ],
            read_split,
            3,
        ),
        "clusters": plain(
            {"c.tsv.gz": stored_clusters(clusters)},
            [("c.tsv.gz", spoiled_gzip)],
            read_cluster_table,
            2,
        ),
        "checkpoint": plain(
            saved,
            [
                (f"{newest}{checkpoints.MANIFEST}", spoiled_json),
                (f"{newest}{checkpoints.MANIFEST}", spoiled_json),
                (f"{newest}model.safetensors", spoiled_safetensors),
                (f"{newest}{checkpoints.STATE_FILE}", spoiled_json),
            ],
            read_checkpoint,
            2,
        ),
        "teacher cache": plain(
            cached,
            [("manifest.json", spoiled_json)] * 4 + [("hidden-00000.bin", spoiled_bytes)],
            partial(read_cache, lengths=lengths),
            3,
        ),
        "token store": plain(
            stored,
            [("manifest.json", signed_manifest)] * 3 + [("letters.json", spoiled_json)],
            read_store,
            2,
        ),
    }
    return formats


def stored_clusters(clusters: dict[str, str]) -> bytes:
    """Return a gzipped table of clusters."""
    rows = ["protein\tcluster", *(f"{name}\t{cluster}" for name, cluster in clusters.items())]
    return gzip.compress("\n".join(rows).encode(), mtime=0)


# Running the cases


@dataclass
class Fault:
    """A case that ended wrongly, and what makes it again."""

    format: str
    case: int
    kind: str
    detail: str


@dataclass
class Tally:
    """Cases of one format by their end."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, name: str, case: int, kind: str, detail: str) -> None:
        """Count a case."""
        self.cases += 1
        if kind in RIGHT_ENDS:
            setattr(self, kind, getattr(self, kind) + 1)
        else:
            self.faults.append(Fault(name, case, kind, detail))


def spoiled_case(formats: dict[str, Format], name: str, seed: int, case: int) -> Files:
    """Return the files of a case: they depend on format, seed and number alone."""
    rng = random.Random(f"{seed} {name} {case}")
    return formats[name].spoil(dict(formats[name].files), rng)


def write_files(folder: Path, files: Files) -> None:
    """Write files below a folder."""
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)


def outcome(form: Format, files: Files, folder: Path) -> tuple[str, str]:
    """Read a case and return ``read``, ``refused`` or a kind of fault, with its detail."""
    write_files(folder, files)
    try:
        form.read(folder, files)
    except (ValueError, OSError) as error:
        return refusal(error, folder)
    except Hang:
        return "hang", "".join(traceback.format_exc(limit=-4).splitlines(keepends=True)[-9:])
    except BaseException as error:  # noqa: BLE001 - whatever a reader lets through is the finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return type(error).__name__, f"{where}: {str(error)[:300]}"
    return "read", ""


def refusal(error: ValueError | OSError, folder: Path) -> tuple[str, str]:
    """Return ``refused`` where an error's message will do for a person, else what is wrong."""
    raw = one_line(error) if isinstance(error, OSError) else str(error)
    ours = type(error) is ValueError or type(error).__module__.startswith("src.")
    if isinstance(error, ValueError) and not ours:
        return f"bare {type(error).__name__}", raw[:300]
    if not raw.strip() or "\n" in raw or len(raw) > MESSAGE_LENGTH:
        return "message is not one line", raw[:300]
    if not raw.isprintable():
        return "message is not printable", ascii(raw)[:300]
    if folder.name not in raw:
        return "message names no file", raw[:300]
    return "refused", raw


def run_cases(
    formats: dict[str, Format],
    cases: Sequence[tuple[str, int]],
    seed: int,
    seconds: int = SECONDS,
) -> Iterator[tuple[str, int, str, str]]:
    """Run cases in forked processes, one process at a time.

    Args:
        formats: from :func:`build_formats`.
        cases: format and number of each.
        seed: of all cases.
        seconds: a case's limit.

    Yields:
        Format, number, kind of outcome and detail of each case, in order.
    """
    position = 0
    while position < len(cases):
        batch = cases[position : position + CASES_A_PROCESS]
        finished = 0
        for kind, detail in _forked(formats, batch, seed, seconds):
            yield (*batch[finished], kind, detail)
            finished += 1
        position += finished


def _forked(
    formats: dict[str, Format], batch: Sequence[tuple[str, int]], seed: int, seconds: int
) -> Iterator[tuple[str, str]]:
    """Yield the outcomes of cases run in one process, up to the one that it dies or hangs at."""
    reading, writing = os.pipe()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    child = os.fork()
    if not child:
        status = 1
        with suppress(BaseException):
            os.close(reading)
            _work(formats, batch, seed, seconds, folder, writing)
            status = 0
        os._exit(status)
    os.close(writing)
    finished = 0
    try:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            pending = b""
            while True:
                # The alarm cannot interrupt a library's own code, nor a wait; this can. Twice,
                # because a machine that was paused shows one long silence.
                for _ in range(2):
                    ready, _, _ = select.select([pipe], [], [], 10 * seconds)
                    if ready:
                        break
                piece = pipe.read(1 << 16) if ready else None
                if not piece:
                    break
                pending += piece
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    finished += 1
                    yield tuple(json.loads(line))
            if finished < len(batch):
                if piece is None:
                    os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                child = 0
                ended = f"the process ended with status {status}"
                yield ("hang", "not even an alarm ended it") if piece is None else ("death", ended)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)  # done already, or no longer wanted
            os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _work(
    formats: dict[str, Format],
    batch: Sequence[tuple[str, int]],
    seed: int,
    seconds: int,
    folder: Path,
    writing: int,
) -> None:
    """Run cases, writing each outcome as a line of JSON. Runs in a process of its own."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.fsync = lambda descriptor: None  # nothing here has to survive a power cut
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc") else 0
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def ring(number: int, frame: Any) -> None:
        raise Hang

    # Of the processor's time: how busy the machine is must not matter.
    signal.signal(signal.SIGPROF, ring)
    for name, case in batch:
        files = spoiled_case(formats, name, seed, case)
        place = folder / f"case{case}"
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            kind, detail = outcome(formats[name], files, place)
        except Hang:
            kind, detail = "hang", "while the outcome was being told"
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(place, ignore_errors=True)
        line = json.dumps([kind, detail]).encode("ascii") + b"\n"
        while line:
            line = line[os.write(writing, line) :]


def planned_cases(formats: dict[str, Format], count: int) -> list[tuple[str, int]]:
    """Return ``count`` cases, each format with its share, formats taking turns."""
    most = max(form.weight for form in formats.values())
    turn = [name for round in range(most) for name, form in formats.items() if form.weight > round]
    numbers = dict.fromkeys(formats, 0)
    cases = []
    for position in range(count):
        name = turn[position % len(turn)]
        cases.append((name, numbers[name]))
        numbers[name] += 1
    return cases


def record(tallies: dict[str, Tally], seed: int, seconds: float) -> dict[str, Any]:
    """Return the counts as JSON values."""
    return {
        "schema_version": 1,
        "seed": seed,
        "cases": sum(tally.cases for tally in tallies.values()),
        "faults": sum(len(tally.faults) for tally in tallies.values()),
        "seconds": round(seconds, 1),
        "limits": {"seconds": SECONDS, "memory_bytes": MEMORY_BYTES},
        "formats": {name: asdict(tally) for name, tally in tallies.items()},
    }
