#!/usr/bin/env python3
"""Feed hostile files to every reader of the project and count what goes wrong.

Hypothesis spoils valid files and shrinks what fails. A reader must either return a result that
accounts for everything in the file, or raise ValueError or OSError with one line that names the
file. Anything else is a fault: another exception, several lines, unprintable characters, a missing
protein, the death of the process, or more than 10 s of processor time or 3 GiB of memory. The exit
status is 1 if there is a fault; --keep then has the smallest file that was found for it.

Examples:
  python tests/stress/fuzz.py --cases 12000 --seed 1 --output results/reliability/fuzz.json
  python tests/stress/fuzz.py --format CSV --seed 1 --keep /tmp/faults
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from src.common.cli import (
    HelpFormatter,
    duration,
    natural,
    one_line,
    positive_int,
    quiet_libraries,
    run_script,
    say,
)
from src.common.files import check_outputs, write_json
from tests.stress import crash

SECONDS = 60
"""Processor time of a case."""
MEMORY_BYTES = 3 << 30
"""Address space that a case may take beyond what its process had at its start."""
MESSAGE_LENGTH = 1000
Files = dict[str, bytes]


class Fault(AssertionError):
    """A reader did something wrong with a file."""


class Vanished(Exception):
    """A reader's result does not account for everything in its input."""


class Hang(BaseException):
    """A case took too long. Not an ``Exception``, so that no reader takes it for a broken file."""


# How files are spoiled ----------------------------------------------------------------------------

NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, math.nan)
TEXTS = (
    *("", " ", "\0", "a\0b", "a\nb", "\x1b[2J\x1b]0;title\x07", "\ud800", "\u202egnirts"),
    *("NaN", "1e999", "../../../../etc/passwd", "/etc/passwd", "..", "C:\\Windows", "a" * 5000),
    *("%s%n{0.__class__}", "<|endoftext|>", "\U0001f9ec" * 50),
)
PIECES = (
    *(text.encode(errors="surrogatepass") for text in TEXTS),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3\x28", b">", b"\n>\n", b"\n\n", b"\r", b"*", b"-", b'"'),
    *(b'"""', b",", b"\t", b"{", b"]", b"\x1f\x8b", b"PAR1", b"ACDXBZ*acd-."),
)
HUGE = st.builds(
    lambda piece, size: piece * (size // len(piece)),
    st.sampled_from((b"A", b"[", b"9", b"\n", b" ", b">", b"ACDEFG\n")),
    st.sampled_from((70_000, 140_000, (1 << 20) + 1, 5 << 20)),
)
WHOLE_FILE: tuple[Callable[[bytes], bytes], ...] = (
    lambda raw: b"",
    lambda raw: raw.swapcase(),
    *(
        lambda raw, end=end: raw.replace(b"\n", end)
        for end in (b"\r\n", b"\r", b"\n\n", b"", b"\0\n", b"\v", b"\x85")
    ),
    *(
        lambda raw, code=code: raw.decode(errors="replace").encode(code, errors="replace")
        for code in ("utf-16", "utf-32", "utf-8-sig", "utf-7")
    ),
)


@st.composite
def spoiled_bytes(draw: Any, raw: bytes) -> bytes:
    """Replace one to three ranges of bytes, or change the whole file."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(WHOLE_FILE))(raw)
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(raw)))
        last = draw(st.one_of(st.just(len(raw)), st.integers(first, min(first + 8, len(raw)))))
        again = raw[first:last] * draw(st.sampled_from((2, 20)))
        pieces = (st.just(b""), st.binary(max_size=50), st.sampled_from(PIECES), st.just(again))
        raw = raw[:first] + draw(st.one_of(*pieces, HUGE)) + raw[last:]
    return raw


def nested(depth: int) -> Any:
    """Return objects and lists inside one another."""
    return json.loads('{"a":[' * depth + "]}" * depth)


HOSTILE = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from((None, True, False, [], {}, [[]], [{}], {"": {}}, [None], nested(2))),
    st.integers(),
    st.floats(),
    st.builds(nested, st.sampled_from((60, 250))),
)


@st.composite
def spoiled_json(draw: Any, raw: bytes) -> bytes:
    """Change, add, rename or remove one to three values, or spoil the bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(spoiled_bytes(raw))
    value = json.loads(raw)
    for _ in range(draw(st.integers(1, 3))):
        places = list(containers(value))
        # Shallow places hold what matters; deep ones are many.
        place = draw(st.sampled_from(places[: draw(st.sampled_from((3, 20, len(places))))]))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        action = draw(st.sampled_from(("add", "remove", "rename", "double", "set", "set")))
        if not keys or action == "add":
            if isinstance(place, dict):
                place[draw(st.sampled_from(TEXTS))] = draw(HOSTILE)
            else:
                place.append(draw(HOSTILE))
            continue
        key = draw(st.sampled_from(keys))
        if action == "remove":
            del place[key]
        elif action == "rename" and isinstance(place, dict):
            place[draw(st.sampled_from(TEXTS))] = place.pop(key)
        elif action == "double" and isinstance(place[key], int | float | str):
            place[key] *= 2
        else:
            place[key] = draw(HOSTILE)
    text = json.dumps(value)
    if isinstance(value, dict) and value and draw(st.integers(0, 6)) == 0:  # a key twice
        text = f"{{{json.dumps(next(iter(value)))}: {json.dumps(draw(HOSTILE))}, {text[1:]}"
    return text.encode(errors="surrogatepass")


def containers(value: Any) -> Iterator[Any]:
    """Yield every object and list of a JSON value, outermost first."""
    queue = [value]
    for item in queue:
        if isinstance(item, dict | list) and len(queue) < 5000:
            yield item
            queue += item.values() if isinstance(item, dict) else item


@st.composite
def spoiled_gzip(draw: Any, raw: bytes) -> bytes:
    """Break the compression or what is compressed, or return a small decompression bomb."""
    action = draw(st.integers(0, 9))
    if action == 0:
        piece = draw(st.sampled_from((b"A", b"\n", b">a\n" + b"ACDEFGHIK\n" * 20)))
        return gzip.compress(piece * ((40 << 20) // len(piece)), 1)
    if action == 1:
        return raw + draw(st.sampled_from((b"\0" * 100, raw, b"rubbish", raw[:20])))
    if action < 5:
        return draw(spoiled_bytes(raw))
    return gzip.compress(draw(spoiled_bytes(gzip.decompress(raw))), 1)


@st.composite
def spoiled_safetensors(draw: Any, raw: bytes) -> bytes:
    """Spoil the header or its length, or the bytes."""
    if draw(st.integers(0, 2)) == 0:
        return draw(spoiled_bytes(raw))
    size = int.from_bytes(raw[:8], "little")
    header = draw(spoiled_json(raw[8 : 8 + size]))
    length = draw(st.sampled_from((len(header),) * 9 + (0, 2**40, 2**63, len(raw))))
    return length.to_bytes(8, "little") + header + raw[8 + size :]


@st.composite
def spoiled_parquet(draw: Any, raw: bytes) -> bytes:
    """Spoil the bytes, or return a table of strange columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if draw(st.booleans()):
        return draw(spoiled_bytes(raw))
    rows = draw(st.sampled_from((0, 1, 5, 600)))
    texts = (None, "MKT", "MKTAY*", "mk\r\n", "A" * 3000, *TEXTS[:5])
    tokens = ([], None, [0, 5, 6, 0], [0] * 2000, [0, 64, 0], [0, -1, 0], [5])
    kinds = [(pa.string(), texts), (pa.list_(pa.int32()), tokens), (pa.binary(), (b"\xff", None))]
    names = ("sequence", "input_ids", "text", "name", "Sequence ", "id", "a\0b", "")
    columns = {}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True)):
        kind, cells = draw(st.sampled_from(kinds))
        some = draw(st.lists(st.sampled_from(cells), min_size=1, max_size=6))
        columns[name] = pa.array(list(islice(cycle(some), rows)), kind)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=max(1, rows // 2))
    return sink.getvalue()


SPOILERS = {".json": spoiled_json, ".gz": spoiled_gzip, ".safetensors": spoiled_safetensors}
SPOILERS |= {".parquet": spoiled_parquet}


@dataclass
class Format:
    """A kind of input: valid files, those of them that are spoiled, and what reads them."""

    files: Files
    spoiled: Sequence[str]
    read: Callable[[Path, Files], Any]

    def cases(self) -> st.SearchStrategy[Files]:
        """Return sets of files with one of them spoiled or, seldom, missing."""

        @st.composite
        def case(draw: Any) -> Files:
            name = draw(st.sampled_from(self.spoiled))
            if draw(st.integers(0, 50)) == 50:
                return {key: raw for key, raw in self.files.items() if key != name}
            spoiler = SPOILERS.get(Path(name).suffix, spoiled_bytes)
            return {**self.files, name: draw(spoiler(self.files[name]))}

        return case()


# What reads them ----------------------------------------------------------------------------------


def entries_in(name: str, raw: bytes) -> int | None:
    """Count the proteins of a file without the project's readers; None if that is unclear.

    Raises:
        Vanished: the gzip is broken, and yet it was read.
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
        columns = [column.strip().lower() for column in file.schema_arrow.names]
        return file.metadata.num_rows if "sequence" in columns else None
    text = raw.decode(errors="replace")
    if name.endswith((".csv", ".tsv")):
        lines = io.StringIO(text.replace("\r\n", "\n"))
        rows = [row for row in csv.reader(lines, delimiter="," if "csv" in name else "\t") if row]
        return len(rows) - 1 if "sequence" in [c.strip().lower() for c in rows[0]] else None
    filled = [line for line in text.split("\n") if line.strip()]
    if name.endswith(".fasta") or filled[0].startswith(">"):
        return sum(line.startswith(">") for line in filled)
    return len(filled)


def accounted(report: Any) -> bool:
    """Return whether each protein that was read is counted as kept or dropped."""
    return report.read == report.kept + sum(entry["count"] for entry in report.dropped.values())


def read_source(folder: Path, files: Files, name: str, tokenizer: Any) -> None:
    """Read a file of proteins as training does, and account for each of them."""
    from src.proteins.sources import ReadReport, read_proteins
    from src.proteins.tokens import tokenise

    report = ReadReport()
    entries = list(read_proteins(folder / name, report=report, tokenizer=tokenizer))
    if not accounted(report) or len(entries) != report.kept:
        raise Vanished(f"{report.as_dict()} with {len(entries)} proteins")
    expected = entries_in(name, files[name])
    if expected is not None and expected != report.read:
        raise Vanished(f"{expected} proteins are in the file, {report.read} were read")
    if len(files[name]) % 3:
        return  # tokenising costs more than all the rest, so do it for a third of the cases
    store = tokenise(folder / name, None, tokenizer, 64, folder / "cache", quiet=True)
    of_store = store.report
    if of_store.read != report.read or not accounted(of_store):
        raise Vanished(f"the store's report: {of_store.as_dict()}")
    require_whole(store, [entry.residues for entry in entries])


def require_whole(store: Any, proteins: Sequence[str]) -> None:
    """Raise ``Vanished`` unless a store holds these proteins, or the beginnings of long ones."""
    known = set(proteins)
    for sequence in map(store.sequence, range(len(store))):
        if sequence not in known and not any(p.startswith(sequence) for p in known):
            raise Vanished("the store holds other proteins")


def read_tokenizer(folder: Path, files: Files, proteins: Sequence[str]) -> None:
    """Load a tokenizer and tokenise proteins with it."""
    from src.models.loading import load_tokenizer
    from src.proteins.tokens import tokenise

    tokenizer = load_tokenizer(folder)
    (folder / "a.txt").write_text("\n".join(proteins))
    store = tokenise(folder / "a.txt", None, tokenizer, 64, folder / "cache", quiet=True)
    if len(store) != store.report.kept or store.report.read != len(proteins):
        raise Vanished(f"{store.report.as_dict()}")
    require_whole(store, proteins)


def read_model(folder: Path, files: Files) -> None:
    """Load a model and run it on a few tokens."""
    import torch

    from src.models.loading import load_causal_lm, max_positions

    model = load_causal_lm(folder)
    length = min(5, max_positions(model.config))
    with torch.inference_mode():
        model(torch.arange(1, length + 1)[None] % model.config.vocab_size)
    # Finite weights may still overflow for some input: evaluation refuses that when it meets it.
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise Vanished("a model whose weights are not finite was loaded")


def read_run_record(folder: Path, files: Files, settings: dict[str, Any]) -> None:
    """Read a run's record as training, evaluation and the report do."""
    from src.common.runs import claim_folder
    from src.evaluation.student_record import named_data, named_teacher, run_of
    from src.publishing.report import build_report

    record = run_of(folder)
    for name in (named_teacher(record), named_data(record)):
        if name is not None:
            Path(name).is_dir()
    build_report(folder).encode()
    claim_folder(folder, settings, resume=True)


def read_split_record(folder: Path, files: Files) -> None:
    """Read a split's record and show it."""
    from src.proteins.split_files import read_split, record_lines

    record_lines(read_split(folder))


def read_cluster_table(folder: Path, files: Files) -> None:
    """Read a table of clusters."""
    from src.proteins.homology import read_clusters

    clusters = read_clusters(folder / "c.tsv.gz")
    entries_in("c.txt.gz", files["c.tsv.gz"])
    if not all(clusters) or not all(clusters.values()):
        raise Vanished("a cluster or protein without a name")


def read_checkpoint(folder: Path, files: Files, valid: Files) -> None:
    """Choose the checkpoint to resume from; it must not be one that was altered."""
    from src.trainer.checkpoints import newest_valid, read_tensors

    chosen = newest_valid(folder, lambda line: None)
    if chosen is None:
        raise Vanished("the older checkpoint was whole")
    altered = [name for name in valid if files.get(name) != valid[name] and "manifest" not in name]
    if any(name.startswith(f"{chosen.name}/") for name in altered):
        raise Vanished(f"{altered} altered, and {chosen.name} chosen")
    read_tensors(chosen / "model.safetensors")


def read_cache(folder: Path, files: Files, valid: Files) -> None:
    """Open a teacher cache and read every protein of it."""
    from src.models.teacher_cache import TeacherCache

    manifest = json.loads(valid["manifest.json"])
    cache = TeacherCache(folder, manifest["teacher"], manifest["data"])
    lengths = [length for shard in manifest["shards"] for length in shard["lengths"]]
    for index, length in enumerate(lengths):
        states, _ = cache[index]
        if states.shape != (length, manifest["width"]):
            raise Vanished(f"protein {index} came out as {tuple(states.shape)}")


def read_store(folder: Path, files: Files) -> None:
    """Open a store of tokenised proteins and read every protein of it."""
    from src.proteins.tokens import open_store

    store = open_store(folder)
    for index in range(len(store)):
        if not store.sequence(index) or not store.names[index]:
            raise Vanished("an empty protein or name")


# Valid files --------------------------------------------------------------------------------------


def folder_files(folder: Path) -> Files:
    """Return the files below a folder, by relative name."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def build_formats(folder: Path) -> dict[str, Format]:
    """Make valid files of every format in an empty folder: train a tiny student, for example."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from scripts import train
    from src.models.loading import load_tokenizer
    from src.proteins.encoding import encode

    crash.make_inputs(folder)
    typed = crash.TRAINING.format(work=folder, out=folder / "run").split()
    typed += f"--max_steps 8 --batch_size 8 --teacher_cache {folder / 'teacher_cache'}".split()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if train.main(typed):
            raise RuntimeError(printed.getvalue())
    tokenizer = load_tokenizer(folder / "teacher")
    lines = (folder / "proteins.fasta").read_text().split()
    proteins = [*lines[1:12:2], "".join(lines[13:24:2])]  # the last one is long
    fasta = "".join(f">p{i} some words\n{p[:60]}\n{p[60:]}\n" for i, p in enumerate(proteins))
    table = "name,sequence,score\n" + "".join(f"p{i},{p},{i / 3}\n" for i, p in enumerate(proteins))
    sources = {
        "FASTA": ("a.fasta", fasta.encode()),
        "FASTA.gz": ("a.fasta.gz", gzip.compress(fasta.encode(), mtime=0)),
        "text": ("a.txt", "\n".join(proteins).encode()),
        "CSV": ("a.csv", table.encode()),
        "TSV": ("a.tsv", table.replace(",", "\t").encode()),
    }
    columns = {"sequence": proteins, "input_ids": encode(tokenizer, proteins)}
    for label, column in (("parquet", "sequence"), ("parquet of tokens", "input_ids")):
        sink = io.BytesIO()
        names = [f"p{i}" for i in range(len(proteins))]
        pq.write_table(pa.table({column: columns[column], "name": names}), sink)
        sources[label] = ("a.parquet", sink.getvalue())
    formats = {
        label: Format({name: raw}, [name], partial(read_source, name=name, tokenizer=tokenizer))
        for label, (name, raw) in sources.items()
    }
    run = {**json.loads((folder / "run" / "run.json").read_bytes()), "status": "running"}
    model = folder_files(folder / "teacher")
    saved = {k: v for k, v in folder_files(folder / "run").items() if k.startswith("checkpoint-")}
    newest = max((name.split("/")[0] for name in saved), key=lambda name: int(name[11:]))
    to_spoil = ("manifest.json", "manifest.json", "model.safetensors", "training_state.json")
    cache = folder_files(next((folder / "teacher_cache").iterdir()))
    store = folder_files(next(p.parent for p in (folder / "cache").rglob("letters.json")))
    split = (ROOT / "data" / "proteins" / "split.json").read_bytes()
    clusters = gzip.compress(b"protein\tcluster\n" + b"".join(b"p%d\tc1\n" % i for i in range(6)))
    return formats | {
        "run.json": Format(
            {"run.json": json.dumps(run).encode()},
            ["run.json"],
            partial(read_run_record, settings=run["settings"]),
        ),
        "tokenizer": Format(
            model,
            ["tokenizer.json", "tokenizer.json", "tokenizer_config.json"],
            partial(read_tokenizer, proteins=proteins),
        ),
        "config.json": Format(model, ["config.json"], read_model),
        "weights": Format(model, ["model.safetensors"], read_model),
        "split record": Format({"split.json": split}, ["split.json"], read_split_record),
        "clusters": Format({"c.tsv.gz": clusters}, ["c.tsv.gz"], read_cluster_table),
        "checkpoint": Format(
            saved, [f"{newest}/{name}" for name in to_spoil], partial(read_checkpoint, valid=saved)
        ),
        "teacher cache": Format(
            cache,
            ["manifest.json", "manifest.json", "hidden-00000.bin"],
            partial(read_cache, valid=cache),
        ),
        "token store": Format(store, ["manifest.json", "letters.json"], read_store),
    }


# Running the cases --------------------------------------------------------------------------------


def write_files(folder: Path, files: Files) -> None:
    """Write files below a folder, in place of what it held."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)


def outcome(form: Format, files: Files, folder: Path) -> tuple[str, str]:
    """Read a case; return ``read`` or ``refused`` with the message. Raises ``Fault``."""
    write_files(folder, files)
    try:
        form.read(folder, files)
    except (ValueError, OSError) as error:
        message = one_line(error) if isinstance(error, OSError) else str(error)
        ours = type(error) is ValueError or type(error).__module__.startswith("src.")
        faults = {
            f"bare {type(error).__name__}": isinstance(error, ValueError) and not ours,
            "message is not one line": not 0 < len(message.strip()) <= MESSAGE_LENGTH
            or "\n" in message,
            "message is not printable": not message.isprintable(),
            "message names no file": folder.name not in message,
        }
        for fault, is_there in faults.items():
            if is_there:
                raise Fault(f"{fault}: {ascii(message)[:300]}") from None
        return "refused", message
    except Hang:
        where = "".join(traceback.format_exc(limit=-3).splitlines(keepends=True)[-7:])
        raise Fault(f"hang: {where}") from None
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise Fault(f"{type(error).__name__}: {where}: {str(error)[:300]}") from None
    return "read", ""


def work(
    form: Format, cases: int, seed: int, seconds: int, folder: Path, told: Callable[[str], None]
) -> None:
    """Run the cases of a format in this process, a forked one; tell the end of each."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.fsync = lambda descriptor: None  # nothing here has to survive a power cut
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc") else 0
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def ring(number: int, frame: Any) -> None:
        raise Hang

    # Processor time, so that a busy machine does not matter.
    signal.signal(signal.SIGPROF, ring)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        suppress_health_check=tuple(hypothesis.HealthCheck),  # type: ignore[arg-type]
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        report_multiple_bugs=False,
    )
    @hypothesis.given(form.cases())
    def case(files: Files) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            told(outcome(form, files, folder)[0])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    try:
        case()
        told("")
    except BaseException as error:
        told(f"{type(error).__name__}: {error}".removeprefix("Fault: "))


def run_format(
    form: Format, cases: int, seed: int, folder: Path, seconds: int = SECONDS
) -> tuple[Counter[str], str]:
    """Run cases of a format in a process of their own.

    Args:
        form: from :func:`build_formats`.
        cases: how many.
        seed: the same seed makes the same cases.
        folder: where they are written; after a fault it has the case.
        seconds: processor time of a case.

    Returns:
        How many were ``read`` and ``refused``, and the fault or "".
    """
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(form, cases, seed, seconds, folder, send.send))
    process.start()
    send.close()
    ends: Counter[str] = Counter()
    fault = ""
    try:
        # The alarm cannot interrupt a library's own code, nor a wait: then the process is killed.
        # Wait twice, because a machine that was paused shows one long silence.
        while receive.poll(10 * seconds) or receive.poll(10 * seconds):
            message = receive.recv()
            if message not in ("read", "refused"):
                fault = message
                break
            ends[message] += 1
        else:
            process.kill()
            fault = "hang: not even an alarm ended it"
    except EOFError:
        process.join()
        fault = f"death: the process ended with status {process.exitcode}"
    process.join()
    return ends, fault


# Command line -------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--cases", type=positive_int, default=10_000, help="how many files, of all formats")
    add("--seed", type=natural, default=0, help="the same seed makes the same files")
    add("--format", help="only this format (default: all)")
    add("--keep", type=Path, help="directory for the files of every fault")
    add("--output", type=Path, help="JSON file for the counts")
    add("--overwrite", action="store_true", help="replace --output")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the cases and print a table. Returns the counts; exits with 1 if there is a fault."""
    import torch

    from src.common.runs import provenance

    check_outputs(args.output, overwrite=args.overwrite)
    torch.set_num_threads(1)  # threads do not survive a fork
    quiet_libraries()
    started = time.monotonic()
    counts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        (Path(temporary) / "valid").mkdir()
        formats = build_formats(Path(temporary) / "valid")
        names = [args.format] if args.format else list(formats)
        if args.format and args.format not in formats:
            raise ValueError(f"--format must be one of {', '.join(formats)}, got {args.format!r}")
        say(f"{'format':<20}{'cases':>8}{'read':>8}{'refused':>9}  fault")
        for number, name in enumerate(names):
            cases = args.cases // len(names) + (number < args.cases % len(names))
            if not cases:
                continue
            folder = Path(temporary) / f"case-{number}"
            ends, fault = run_format(formats[name], cases, args.seed, folder)
            counts[name] = {"cases": ends.total() + bool(fault), **ends, "fault": fault}
            if fault and args.keep:
                shutil.copytree(folder, args.keep / name.replace(" ", "-"), dirs_exist_ok=True)
            done = [counts[name]["cases"], ends["read"], ends["refused"]]
            say(f"{name:<20}{done[0]:>8,}{done[1]:>8,}{done[2]:>9,}  {fault}")
    seconds = time.monotonic() - started
    record = {
        "schema_version": 2,
        "seed": args.seed,
        "cases": sum(count["cases"] for count in counts.values()),
        "faults": sum(bool(count["fault"]) for count in counts.values()),
        "seconds": round(seconds, 1),
        "limits": {"seconds": SECONDS, "memory_bytes": MEMORY_BYTES},
        "formats": counts,
    }
    if args.output:
        write_json(args.output, {**record, "run": provenance()})
    say(f"in {duration(seconds)}; cases {record['cases']}, formats with faults {record['faults']}")
    if record["faults"]:
        raise SystemExit(1)
    return record


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
