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
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.lib.stride_tricks import sliding_window_view

from src.common.cli import progress, say, unheard
from src.common.files import atomic_folder, names_full_disk, sha256_file, write_json
from src.common.manifest import file_entry, signature
from src.proteins.layouts import PROTGPT2, Layout, layout_of
from src.proteins.report import ReadReport
from src.proteins.sources import (
    CUT_IN_SOURCE,
    DUPLICATE,
    SAME_NAMES,
    SourceProtein,
    clean_name,
    local_files,
    read_entries,
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
_MARKER = re.compile(r"<.*>|\[.*\]")
LONG_PROTEINS = ("cut", "drop")
BEYOND = "beyond --max_proteins"
UNKNOWN_RESIDUES = "residues, or a tag, that the tokenizer does not know"


# Sequences as numbers: duplicates and nested subsets


def sequence_hash(residues: str) -> int:
    """Return 64 bits of BLAKE2b of a protein's residues, as an unsigned number.

    Two of n different proteins collide with probability n² / 2⁶⁵: 6 in 100,000 for UniRef50.
    """
    return int.from_bytes(hashlib.blake2b(residues.encode(), digest_size=8).digest(), "little")


def chosen(hashes: np.ndarray, proportion: float, seed: int = 0) -> np.ndarray:
    """Return which proteins belong to a share, ``(proteins,)`` bool, by a seeded hash.

    With the same seed a smaller share is a subset of a larger one; the order of the proteins does
    not matter, and equal sequences are chosen together. Different seeds choose independently.

    Args:
        hashes: ``(proteins,)`` from :func:`sequence_hash`.
        proportion: the share, in (0, 1].
        seed: of the choice.

    Raises:
        ValueError: the share is outside (0, 1].
    """
    if not 0 < proportion <= 1:
        raise ValueError(f"--train_size_prop must be above 0 and at most 1, got {proportion}")
    hashes = np.asarray(hashes, dtype=np.uint64)
    if proportion == 1:
        return np.ones(len(hashes), dtype=bool)
    salt = _mixed(np.array([seed % 2**64], dtype=np.uint64))
    return _mixed(hashes ^ salt) < np.uint64(int(proportion * 2.0**64))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return a bijective scramble of 64-bit numbers (SplitMix64: Steele et al. 2014, OOPSLA)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class SeenHashes:
    """A growing set of 64-bit hashes that takes 8 bytes a hash; a Python set takes about 60.

    Sorted runs are merged when the last is as long as the one before, so n hashes need O(log n)
    runs and O(n log n) work.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes and return which are new, ``(n,)`` bool; of repeats only the first is."""
        distinct, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(distinct), dtype=bool)
        for run in self.runs:
            place = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            known |= run[place] == distinct
        new = np.zeros(len(hashes), dtype=bool)
        new[first[~known]] = True
        if not known.all():
            self.runs.append(distinct[~known])
        while len(self.runs) > 1 and len(self.runs[-1]) >= len(self.runs[-2]):
            last = self.runs.pop()
            merged = np.concatenate([self.runs.pop(), last])
            merged.sort(kind="stable")
            self.runs.append(merged)
        return new


# Tokenizers


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of the rules that decide a tokenizer's output on laid-out proteins."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # These two are changed by calls, and not used by tokenise().
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    parts = [rules, tokenizer.eos_token_id]
    if layout_of(tokenizer) != PROTGPT2:
        parts.append(layout_of(tokenizer).template)
    state = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()


def require_known(token: int, vocabulary: int) -> None:
    """Raise ``ValueError`` where a token has no place in a model's vocabulary."""
    if token >= vocabulary:
        raise ValueError("the tokenizer has more tokens than the model: is it another model's?")


def token_letters(tokenizer: Any) -> list[str]:
    """Return the residues of each token id; empty for markers and line breaks."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [
        ""
        if i in special or token is None or _MARKER.fullmatch(token)
        else "".join(c for c in token if "A" <= c <= "Z")
        for i, token in enumerate(tokens)
    ]


class Spelling:
    """Tells which tokens of a laid-out protein are residues: the letters of its tag are none.

    Attributes:
        letters: residues of each token id (:func:`token_letters`).
    """

    def __init__(self, tokenizer: Any, layout: Layout | None = None) -> None:
        self.letters = token_letters(tokenizer)
        self._counts = np.array([len(letters) for letters in self.letters], dtype=np.int64)
        self._unknown = tokenizer.unk_token_id
        layout = layout or layout_of(tokenizer)
        self._opening: list[int] = []
        if layout.tag is not None:
            self._opening = tokenizer(layout.opening, add_special_tokens=False)["input_ids"]

    def _start(self, row: Sequence[int] | np.ndarray) -> int:
        """Return where the residues begin: behind the last marker that opens them, or at the end.

        Without a tag that is the row's beginning.
        """
        if not self._opening:
            return 0
        size = len(self._opening)
        if len(row) < size:
            return len(row)
        found = (sliding_window_view(np.asarray(row), size) == self._opening).all(-1)
        return int(np.flatnonzero(found)[-1]) + size if found.any() else len(row)

    def sizes(self, row: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the residues of each token of a row, ``(T,)``."""
        sizes = self._counts[row]
        sizes[: self._start(row)] = 0
        return sizes

    def spells(self, row: Sequence[int] | np.ndarray, residues: str) -> bool:
        """Return whether the tokens say all of a protein: its residues and its tag."""
        known = self._unknown in self._opening or self._unknown not in row[: self._start(row)]
        return bool(known) and int(self.sizes(row).sum()) == len(residues)


def encode(
    tokenizer: Any, proteins: Sequence[str], whole: Sequence[bool] | None = None
) -> list[list[int]]:
    """Return the token ids of laid-out proteins without padding.

    Args:
        tokenizer: carries the layout.
        proteins: residues of each.
        whole: of each, whether its end is written; None: of all.
    """
    if not proteins:
        return []
    layout = layout_of(tokenizer)
    ends = [True] * len(proteins) if whole is None else whole
    return tokenizer(
        [layout.text(p) if w else layout.prompt(p) for p, w in zip(proteins, ends, strict=True)],
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the residues that tokens spell in the tokenizer's layout.

    Raises:
        ValueError: they are not the tokens of a laid-out protein.
    """
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return layout_of(tokenizer).read(text)


def _require_layout(tokenizer: Any) -> None:
    if layout_of(tokenizer) != PROTGPT2:
        return
    marker = tokenizer.eos_token_id
    name = getattr(tokenizer, "name_or_path", "")
    ids = encode(tokenizer, ["M"])[0]
    if marker is None or not ids or ids[0] != marker or ids[-1] != marker:
        raise ValueError(
            f"{name or 'the tokenizer'}: does not take <|endoftext|> for its end-of-text token: "
            "proteins in ProtGPT2's layout need one that does"
        )


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
    keep_ambiguous: bool = False,
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
        keep_ambiguous: keep proteins with B, J, O, U, X or Z.
        sequence_column: of a table; None: a usual one.
        quiet: print nothing.

    Raises:
        ValueError: the source is missing, broken or without a usable protein; a setting is wrong;
            or the tokenizer does not know the layout.
    """
    if max_length < 4:
        raise ValueError(f"--max_length must be at least 4 tokens, got {max_length}")
    if long_proteins not in LONG_PROTEINS:
        raise ValueError(f"long_proteins must be cut or drop, got {long_proteins!r}")
    if max_proteins is not None and max_proteins < 1:
        raise ValueError(f"--max_proteins must be at least 1, got {max_proteins}")
    chosen(np.zeros(0, np.uint64), proportion, seed)
    _require_layout(tokenizer)
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
        "keep_ambiguous": keep_ambiguous,
        "sequence_column": sequence_column,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = root / key
    with contextlib.suppress(ValueError):
        return open_store(folder)

    def build(temporary: Path) -> None:
        report = ReadReport()
        entries = read_entries(
            source,
            split=split,
            report=report,
            tokenizer=tokenizer,
            keep_ambiguous=keep_ambiguous,
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
        for stale in root.glob(f".{folder.name}.*.tmp"):  # of a killed process: the lock is ours
            shutil.rmtree(stale, ignore_errors=True)
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
    entries: Iterator[SourceProtein],
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


def _batches(entries: Iterator[SourceProtein]) -> Iterator[list[SourceProtein]]:
    batch: list[SourceProtein] = []
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
    batch: list[SourceProtein],
    report: ReadReport,
    tokenizer: Any,
    spelling: Spelling,
    settings: dict[str, Any],
) -> None:
    """Append the proteins of a batch that are new and chosen, tokenised, under different names."""
    hashes = _hashes([entry.residues for entry in batch])
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
            report.drop(f"longer than {limit:,} tokens" if too_long else CUT_IN_SOURCE, entry.name)
        else:
            if too_long:
                report.fix(f"cut to {limit:,} tokens", entry.name)
                row = row[:limit]
            names.append(entry.name)
            titles.append(clean_name(entry.title or entry.name))
            rows.append(row)
            residues.append(int(spelling.sizes(row).sum()))
            kept.append(int(number))
    for index in np.flatnonzero(~named.add(_hashes(names))):
        name = title = titles[index]
        if not named.add(_hashes([title]))[0]:
            name = f"{title}_{writer.proteins + index + 1}"
        report.fix(SAME_NAMES, name)
        names[index] = name
    writer.append(names, rows, residues, kept)


def _hashes(texts: Sequence[str]) -> np.ndarray:
    return np.array([sequence_hash(text) for text in texts], dtype=np.uint64)


def held_out(hashes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which proteins are set aside, ``(proteins,)`` bool: a share, but enough to measure on.

    They are those of :func:`chosen`, and of few proteins the next ones in its order, so that there
    are at least one of four proteins and two of ten.
    """
    aside = chosen(hashes, share, seed)
    least = 2 if len(hashes) >= 10 else int(len(hashes) >= 4)
    if aside.sum() < least:
        rank = _mixed(np.asarray(hashes, np.uint64) ^ _mixed(np.array([seed], np.uint64)))
        aside[np.argsort(rank, kind="stable")[:least]] = True
    return aside


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


def data_summary(proteins: TokenisedProteins, batch_size: int, title: str) -> list[str]:
    """Return lines that describe proteins: counts, lengths, and the share of padding.

    Args:
        proteins: tokenised proteins, or a selection.
        batch_size: rows of a batch, for the share of padding.
        title: name of the proteins.
    """
    from src.proteins.batching import padding_share

    lengths, residues = proteins.lengths, proteins.residues
    total, tokens = int(residues.sum(dtype=np.int64)), int(lengths.sum(dtype=np.int64))
    # A sample bounds the time.
    sample = lengths
    if len(sample) > 100_000:
        sample = sample[np.random.default_rng(0).choice(len(sample), 100_000, replace=False)]
    random, grouped = (padding_share(sample, batch_size, by_length=b) for b in (False, True))
    return [
        *proteins.report.lines(),
        f"{title}: {len(proteins):,} proteins, {total:,} residues, {tokens:,} tokens "
        f"({total / tokens:.2f} residues a token)",
        f"  residues a protein: {_quartiles(residues)}",
        f"  tokens a protein:   {_quartiles(lengths)}",
        f"  padding in batches of {batch_size}: {random:.1%} in random order, {grouped:.1%} with "
        "similar lengths together",
    ]


def _quartiles(values: np.ndarray) -> str:
    low, q1, q2, q3, high = np.percentile(values, [0, 25, 50, 75, 100]).astype(int)
    return f"{low:,} to {high:,}, quartiles {q1:,} / {q2:,} / {q3:,}"
