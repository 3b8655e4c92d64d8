#!/usr/bin/env python3
"""Measure the memory and time that tokenising a large FASTA file takes.

Writes made-up proteins (uniform residues, 30 to 530 long) to a file, tokenises it in a process of
its own, prints the peak memory (resident, with and without what belongs to files) and the time of
that process, and deletes file and store.

Example:
  python tools/memory_of_data.py --gigabytes 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.common.cli import (
    HelpFormatter,
    natural,
    positive_float,
    positive_int,
    run_script,
    say,
    size,
)

BLOCK = 2000


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--gigabytes", type=positive_float, default=1.0, help="size of the file")
    add("--tokenizer", default="data/small_teacher", help="directory of a tokenizer")
    add("--max_length", type=positive_int, default=512, help="tokens")
    add("--seed", type=natural, default=0, help="of the made-up proteins")
    add("--work_dir", type=Path, help="where file and store lie meanwhile")
    add("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def write_made_up_fasta(path: Path, target_bytes: int, seed: int) -> int:
    """Write made-up proteins until the file has about that many bytes; return their number."""
    import numpy as np

    from src.proteins.fasta import FastaRecord, fasta_text

    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)
    written = count = 0
    with path.open("w") as handle:
        while written < target_bytes:
            lengths = rng.integers(30, 531, BLOCK)
            residues = letters[rng.integers(0, 20, lengths.sum())].tobytes().decode()
            start, entries = 0, []
            for length in lengths:
                count += 1
                made_up = FastaRecord(f"protein{count}", residues[start : start + length])
                entries.append(fasta_text(made_up))
                start += length
            written += handle.write("".join(entries))
    return count


def tokenise_alone(args: argparse.Namespace) -> dict:
    """Tokenise ``args.child`` in this process and return what that took. Linux only."""
    from transformers import PreTrainedTokenizerFast

    from src.proteins.tokens import tokenise

    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    before = peak_memory()
    started = time.monotonic()
    proteins = tokenise(
        args.child, None, tokenizer, args.max_length, args.child.parent / "cache", quiet=True
    )
    record = {
        "proteins": len(proteins),
        "tokens": proteins.manifest["tokens"],
        "seconds": time.monotonic() - started,
        "peak_before": before,
        "peak_bytes": peak_memory(),
    }
    print(json.dumps(record))
    return record


def peak_memory() -> int:
    """Return the highest resident memory of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("the peak memory of a process is only known on Linux")


def run(args: argparse.Namespace) -> dict:
    """Make the file, tokenise it in a process of its own, report. Returns the figures."""
    if args.child:
        return tokenise_alone(args)
    if args.work_dir:
        args.work_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="memory-", dir=args.work_dir))
    try:
        path = work / "made_up.fasta"
        count = write_made_up_fasta(path, int(args.gigabytes * 1e9), args.seed)
        say(f"{path.name}: {size(path.stat().st_size)}, {count:,} proteins")
        command = [sys.executable, __file__, "--child", str(path), "--tokenizer", args.tokenizer]
        done = subprocess.run(
            [*command, "--max_length", str(args.max_length)], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"tokenising failed: {done.stderr.strip()[-300:]}")
        record = json.loads(done.stdout.splitlines()[-1])
        say(
            f"peak memory {size(record['peak_bytes'])}, of which {size(record['peak_before'])} "
            f"for Python and its packages before the first protein; {record['seconds']:.0f} s, "
            f"{record['tokens']:,} tokens"
        )
        return record
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Run the script. Returns the exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
