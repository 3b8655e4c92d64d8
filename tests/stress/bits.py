#!/usr/bin/env python3
"""Run short trainings, evaluations, generations and grids, and compare their bits with a table.

``bits.json`` holds the SHA-256 of weights, losses and results of the runs in ``bits_runs.py``, as
they were when it was recorded last. Runs are command lines of ``scripts/``, so any commit of the
project can make them. Bits depend on the CPU and on the version of PyTorch:
the table says which it was recorded with, and a comparison says where these differ.

Examples:
  python tests/stress/bits.py
  python tests/stress/bits.py --only resume grid
  python tests/stress/bits.py --root ../older_checkout --record /tmp/older.json
  python tests/stress/bits.py --table /tmp/older.json
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.stress.bits_runs import RUNS  # noqa: E402
from tests.stress.in_process import run_main  # noqa: E402

TABLE = Path(__file__).with_suffix(".json")
PROTEINS = {"train": 400, "validation": 24, "test": 24}
"""Proteins of each bundled part that the runs use."""

PASSED_OVER = re.compile(r"checkpoint-\d+|cache|teacher_cache")
"""Directories whose files are not compared: what is read from them shows in the outcomes."""
VARIES = re.compile(
    r"seconds|runtime|per_second|wait|memory|date|time|^run$|^performance$|^rule$|^summary$"
)
"""Entries of a results file that differ between runs of the same code, or are sentences."""


def fixed(value: Any) -> Any:
    """Return JSON values without the entries that legitimately vary."""
    if isinstance(value, dict):
        return {k: fixed(v) for k, v in value.items() if not VARIES.search(k)}
    return [fixed(item) for item in value] if isinstance(value, list) else value


def sha256(value: Any) -> str:
    """Return the SHA-256 of bytes, or of a value written as JSON with sorted keys."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(value).hexdigest()


def parts_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is compared of a file: the name of each part and its value."""
    if path.suffix in (".fasta", ".csv") or path.name == "model.safetensors":
        yield "", path.read_bytes()
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield "", pq.read_table(path).to_pydict()
    elif path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for key in ("loss", "eval_loss"):
            yield f" {key}", [(line["step"], line[key]) for line in lines if key in line]
    elif path.name == "run.json":
        yield " settings", json.loads(path.read_text())["settings"]
    elif path.suffix == ".json":
        record = json.loads(path.read_text())
        if not (path.parent / "config.json").exists():  # not one of a model's own files
            yield " settings", record.pop("settings", None)
            yield " weights", record.get("run", {}).get("student", {}).get("fingerprint")
            yield "", fixed(record)


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every outcome below the folder of a run."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(map(PASSED_OVER.fullmatch, name.parts)):
            parts = parts_of(path)
            hashes |= {f"{name}{part}": sha256(value) for part, value in parts if value is not None}
    return hashes


def make_inputs(root: Path, work: Path) -> None:
    """Write the proteins that all runs use, from the bundled ones of a checkout."""
    (work / "data").symlink_to(root / "data")
    (work / "parts").mkdir()
    bundled = root / "data" / "proteins"
    shutil.copy(bundled / "clusters.tsv.gz", work / "parts")
    proteins: list[str] = []
    for part, count in PROTEINS.items():
        with gzip.open(bundled / f"{part}.fasta.gz", "rt") as file:
            proteins = file.read().split(">")[1 : count + 1]
        text = "".join(f">{protein}" for protein in proteins)
        (work / "parts" / f"{part}.fasta.gz").write_bytes(gzip.compress(text.encode()))
    with (work / "variants.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mutant", "mutated_sequence", "DMS_score"])
        residues = "".join(proteins[0].splitlines()[1:])[:80]
        for i, letter in enumerate(islice("ACDEFGHIKLMNPQRSTVWY" * 2, 30)):
            writer.writerow([i, residues[:i] + letter + residues[i + 1 :], i * 7 % 11])


def execute(command: str) -> None:
    """Run one command line of ``scripts/`` in this process, to a signal where it names a step."""
    stop = re.match(r"SIGTERM@(\d+) ", command)
    script, *arguments = command[stop.end() if stop else 0 :].split()
    main = importlib.import_module(f"scripts.{script}").main
    run_main(main, arguments, int(stop[1]) if stop else None)


def make_run(folder: Path, commands: Sequence[str]) -> dict[str, str]:
    """Execute the commands of a run in a new directory and return the hashes of what they leave."""
    folder.mkdir()
    os.chdir(folder)
    for command in commands:
        execute(command)
    return hashes_of(folder)


def differences(expected: dict[str, str], hashes: dict[str, str]) -> list[str]:
    """Return what differs from the table, and what an interruption changed."""
    different = [n for n in {**expected, **hashes} if expected.get(n) != hashes.get(n)]
    pairs = {n: n.replace("undisturbed", "disturbed") for n in hashes if "undisturbed" in n}
    return different + [f"{n} (resumed)" for a, n in pairs.items() if hashes[a] != hashes.get(n)]


def environment() -> dict[str, str]:
    """Return what bits depend on besides the code: versions, and the instructions of the CPU."""
    import torch
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = sorted(set(re.findall(r"\b(?:avx|amx|fma)\w*", text)))
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "instructions": " ".join(flags),
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME", help="these")
    add("--root", type=Path, default=ROOT, help="the checkout to run (default: this one)")
    add("--table", type=Path, default=TABLE, help="compare with it (default: bits.json)")
    add("--record", type=Path, metavar="TABLE", help="write the hashes there, compare nothing")
    add("--keep", type=Path, help="a new directory, which keeps the files of the runs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Make the runs, record or compare; return 1 where bits differ or a command fails."""
    args = build_parser().parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before PyTorch is imported
    root, record = args.root.resolve(), args.record and args.record.resolve()
    expected = None if record else json.loads(args.table.read_text())
    sys.path[0] = str(root)
    recorded_with = environment()
    for key, then in (expected["recorded_with"] if expected else {}).items():
        if then != (now := recorded_with.get(key)):
            print(f"recorded with {key} {then}, here it is {now}")
    if args.keep:
        args.keep.mkdir(parents=True)
    failed = 0
    table: dict[str, dict[str, str]] = {}
    with contextlib.ExitStack() as stack:
        work = (args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        make_inputs(root, work)
        for name in args.only:
            started = time.monotonic()
            try:
                table[name] = hashes = make_run(work / name, RUNS[name])
                faults = differences(expected["runs"].get(name, {}) if expected else hashes, hashes)
            except RuntimeError as error:
                faults = [str(error)]
            failed += bool(faults)
            verdict = f"DIFFERENT: {', '.join(faults)}" if faults else "equal"
            print(f"{name}: {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    if record and not failed:
        before = json.loads(record.read_text()) if record.exists() else {}
        if before.get("recorded_with") == recorded_with:  # replaces some of the runs
            table = before["runs"] | table
        content = {"recorded_with": recorded_with, "runs": table}
        record.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {record}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
