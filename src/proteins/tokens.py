"""Tokenises proteins once into a store on disk (:mod:`src.proteins.store`).

A store's name is a hash of everything that decides its content. It is built under a temporary name
and renamed when complete; a damaged store is built again. Reading and cleaning of sources:
:mod:`src.proteins.sources`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from src.common.cli import progress, say, unheard
from src.common.files import (
    atomic_folder,
    names_full_disk,
    remove_temporaries_of,
    sha256_file,
    write_json,
)
from src.common.manifest import file_entry, signature
from src.proteins.encoding import Spelling, encode, require_layout, tokenizer_fingerprint
from src.proteins.hashes import SeenHashes, chosen, hashes_of
from src.proteins.reading import ReadReport
from src.proteins.sources import (
    CUT_IN_SOURCE,
    DUPLICATE,
    SAME_NAMES,
    Protein,
    clean_name,
    local_files,
    read_proteins,
)
from src.proteins.store import (
    ARRAYS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    StoreWriter,
    TokenisedProteins,
    open_store,
)

BATCH_PROTEINS = 1024
BATCH_RESIDUES = 1 << 18
"""Most residues tokenised together: a tokenizer needs some hundred bytes of memory a token."""
SMALL_BYTES = 1 << 26
"""Smaller sources are identified by their content, larger ones by path, size and time."""
BEYOND = "beyond --max_proteins"
LONGER_THAN = "longer than"
"""How the reason begins for which ``long_proteins="drop"`` leaves out too long a protein."""
UNKNOWN_RESIDUES = "residues, or a tag, that the tokenizer does not know"


def default_cache_dir() -> Path:
    """Return the directory of stores: ``$DISTILL_CACHE``, else ``~/.cache/protein-lm-distill``."""
    return Path(os.environ.get("DISTILL_CACHE") or "~/.cache/protein-lm-distill").expanduser()


def source_identity(source: str | Path, split: str | None) -> list[Any]:
    """Return values that change when a source changes.

    These are the SHA-256 of each file if all are small, else path, size and modification time. A
    data set on the hub has only its id: delete the cache if the data set changes.

    Raises:
        ValueError: the source is missing.
    """
    files = local_files(source, split)
    if files is None:
        return ["hub", str(source), split]
    states = [path.stat() for path in files]
    if sum(state.st_size for state in states) <= SMALL_BYTES:
        # The suffix decides how a file is read.
        return [[path.name, sha256_file(path)] for path in files]
    return [
        [str(path.resolve()), state.st_size, state.st_mtime_ns]
        for path, state in zip(files, states, strict=True)
    ]


def tokenise(
    source: str | Path,
    split: str | None,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | Path | None = None,
    *,
    proportion: float = 1.0,
    seed: int = 0,
    long_proteins: str = "cut",
    max_proteins: int | None = None,
    sequence_column: str | None = None,
    quiet: bool = False,
) -> TokenisedProteins:
    """Return a source's tokenised proteins in its order, each sequence once.

    The store on disk is used if it was made before. Memory grows by 8 bytes a protein, for finding
    duplicates.

    Args:
        source: directory of parts, file or hub id (:mod:`src.proteins.sources`).
        split: the part; None for a single file.
        tokenizer: of the teacher and the student.
        max_length: the longest row, in tokens.
        cache_dir: of the stores; None: :func:`default_cache_dir`.
        proportion: share of the distinct proteins, by :func:`chosen`.
        seed: of that share.
        long_proteins: ``cut`` keeps the first ``max_length`` tokens of a longer protein (training),
            ``drop`` leaves it out (evaluation, where every protein must be whole).
        max_proteins: stop reading after this number of kept proteins.
        sequence_column: of a table; None: a usual one.
        quiet: print nothing.

    Raises:
        ValueError: the source is missing, broken or without a usable protein; a setting is wrong;
            or the tokenizer does not know the layout.
    """
    if max_length < 4:
        raise ValueError(f"--max_length must be at least 4 tokens, got {max_length}")
    require_layout(tokenizer)
    settings = {
        "format_version": FORMAT_VERSION,
        "source": source_identity(source, split),
        "split": split,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_length": max_length,
        "proportion": proportion,
        "seed": seed if proportion < 1 else None,
        "long_proteins": long_proteins,
        "max_proteins": max_proteins,
        "keep_ambiguous": False,  # kept, so that stores made with it are found
        "sequence_column": sequence_column,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = root / key
    with contextlib.suppress(ValueError):
        return open_store(folder)

    def build(temporary: Path) -> None:
        report = ReadReport()
        entries = read_proteins(
            source,
            split=split,
            report=report,
            tokenizer=tokenizer,
            sequence_column=sequence_column,
        )
        _build(temporary, entries, report, tokenizer, settings, quiet)

    return _open_or_build(folder, build, unheard if quiet else say)


def _open_or_build(
    folder: Path, build: Callable[[Path], None], announce: Callable[[str], None]
) -> TokenisedProteins:
    """Open a store that another process has built meanwhile, or build it."""
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    advice = "make space, or choose another --cache_dir"
    with names_full_disk(root, advice), _only_builder(folder, announce):
        if folder.exists():
            try:
                return open_store(folder)
            except ValueError as error:
                announce(
                    f"tokenised proteins in the cache are damaged ({error}): building them again"
                )
        remove_temporaries_of(folder)
        with atomic_folder(folder) as temporary:
            build(temporary)
            if folder.exists():
                shutil.rmtree(folder)  # damaged, as read above
    return open_store(folder, thorough=False)


@contextlib.contextmanager
def _only_builder(folder: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Lock a store; wait if another process is building it."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce("another process tokenises the same proteins: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(
    folder: Path,
    entries: Iterator[Protein],
    report: ReadReport,
    tokenizer: Any,
    settings: dict[str, Any],
    quiet: bool,
) -> None:
    """Write a store's files and manifest into an empty directory."""
    spelling = Spelling(tokenizer)
    letters = spelling.letters
    dtype = np.dtype("<u2" if len(letters) <= 1 << 16 else "<u4")
    writer = StoreWriter(folder, dtype)
    seen, named = SeenHashes(), SeenHashes()
    shown = entries if quiet else progress(entries, description="tokenising", unit="proteins")
    try:
        for batch in _batches(shown):
            _append_batch(writer, seen, named, batch, report, tokenizer, spelling, settings)
            limit = settings["max_proteins"]
            if limit is not None and writer.proteins >= limit:
                break
        if not writer.proteins:
            raise ValueError(_nothing_left(report, settings))
        files = writer.close()
    finally:
        writer.abandon()
    (folder / "letters.json").write_text(json.dumps(letters))
    files["letters.json"] = file_entry(folder / "letters.json")
    report.kept, report.residues = writer.proteins, writer.residues
    content = [dtype.str, *(files[n]["sha256"] for n in ("tokens.bin", *sorted(ARRAYS)[:-1]))]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "settings": settings,
        "dtype": dtype.str,
        "vocab_size": len(letters),
        "proteins": writer.proteins,
        "tokens": writer.tokens,
        "residues": writer.residues,
        "report": report.as_dict(),
        "files": files,
        "fingerprint": hashlib.sha256("\n".join(content).encode()).hexdigest(),
    }
    manifest["check"] = signature(manifest)
    write_json(folder / MANIFEST, manifest)


def _batches(entries: Iterator[Protein]) -> Iterator[list[Protein]]:
    batch: list[Protein] = []
    residues = 0
    for entry in entries:
        batch.append(entry)
        residues += len(entry.residues)
        if len(batch) >= BATCH_PROTEINS or residues >= BATCH_RESIDUES:
            yield batch
            batch, residues = [], 0
    if batch:
        yield batch


def _append_batch(
    writer: StoreWriter,
    seen: SeenHashes,
    named: SeenHashes,
    batch: list[Protein],
    report: ReadReport,
    tokenizer: Any,
    spelling: Spelling,
    settings: dict[str, Any],
) -> None:
    """Append the proteins of a batch that are new and chosen, tokenised, under different names."""
    hashes = hashes_of([entry.residues for entry in batch])
    new = seen.add(hashes)
    for index in np.flatnonzero(~new):
        report.drop(DUPLICATE, batch[index].name)
    wanted = new & chosen(hashes, settings["proportion"], settings["seed"] or 0)
    report.not_chosen += int((new & ~wanted).sum())
    selected = [batch[i] for i in np.flatnonzero(wanted)]
    encoded = iter(encode(tokenizer, [e.residues for e in selected if e.ids is None]))
    limit, max_proteins = settings["max_length"], settings["max_proteins"]
    names, titles, rows, residues, kept = [], [], [], [], []
    for entry, number in zip(selected, hashes[wanted], strict=True):
        if max_proteins is not None and writer.proteins + len(rows) >= max_proteins:
            report.drop(BEYOND, entry.name)
            continue
        row = np.array(next(encoded)) if entry.ids is None else entry.ids
        too_long = len(row) > limit
        if not spelling.spells(row, entry.residues):
            report.drop(UNKNOWN_RESIDUES, entry.name)
        elif settings["long_proteins"] == "drop" and (too_long or not entry.whole):
            reason = f"{LONGER_THAN} {limit:,} tokens" if too_long else CUT_IN_SOURCE
            report.drop(reason, entry.name)
        else:
            if too_long:
                report.fix(f"cut to {limit:,} tokens", entry.name)
                row = row[:limit]
            names.append(entry.name)
            titles.append(clean_name(entry.title or entry.name))
            rows.append(row)
            residues.append(int(spelling.sizes(row).sum()))
            kept.append(int(number))
    for index in np.flatnonzero(~named.add(hashes_of(names))):
        name = title = titles[index]
        if not named.add(hashes_of([title]))[0]:
            name = f"{title}_{writer.proteins + index + 1}"
        report.fix(SAME_NAMES, name)
        names[index] = name
    writer.append(names, rows, residues, kept)


def _nothing_left(report: ReadReport, settings: dict[str, Any]) -> str:
    if report.not_chosen:
        return (
            f"{report.source}: none of {report.kept:,} proteins falls into the share "
            f"{settings['proportion']}: raise --train_size_prop"
        )
    return (
        f"{report.source}: none of {report.kept:,} proteins fits: "
        + "; ".join(f"{e['count']:,} {kind}" for kind, e in report.dropped.items())
        + ": raise --max_length or use another tokenizer"
    )


# Summary


def data_summary(proteins: TokenisedProteins, title: str) -> list[str]:
    """Return lines that describe proteins: counts and lengths."""
    lengths, residues = proteins.lengths, proteins.residues
    total, tokens = int(residues.sum(dtype=np.int64)), int(lengths.sum(dtype=np.int64))
    return [
        *proteins.report.lines(),
        f"{title}: {len(proteins):,} proteins, {total:,} residues, {tokens:,} tokens "
        f"({total / tokens:.2f} residues a token)",
        f"  residues a protein: {_quartiles(residues)}",
        f"  tokens a protein:   {_quartiles(lengths)}",
    ]


def _quartiles(values: np.ndarray) -> str:
    low, q1, q2, q3, high = np.percentile(values, [0, 25, 50, 75, 100]).astype(int)
    return f"{low:,} to {high:,}, quartiles {q1:,} / {q2:,} / {q3:,}"
