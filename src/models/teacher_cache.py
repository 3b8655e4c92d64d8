"""Keeps the teacher's final hidden states on disk, so that it runs once for any number of students.

What is stored for each token is what the teacher's head is applied to: hidden states after the last
norm, in the dtype they were computed in, and three figures of the distribution at T = 1 (entropy,
largest logit, log-sum-exp). Logits are the head applied to them, so nothing is approximated: the
cache serves every temperature, α, weighting, smoothing, divergence, student and seed. For ProtGPT2
that is 2,560 bytes a token in bfloat16, against 100,514 for its logits.

A cache is a directory ``<teacher>-<data>-<dtype>`` of shards and a manifest. A shard is written
under a temporary name, synced, hashed and renamed, so a capture that was killed goes on at the
shard it was writing.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from src.common import processes
from src.common.cli import one_line, progress, say, size
from src.common.files import (
    atomic_write,
    names_full_disk,
    read_json,
    remove_unfinished,
    write_json,
)
from src.common.manifest import first_fault, is_record
from src.common.runs import locked
from src.loss.fused import teacher_statistics
from src.models.loading import final_hidden_states, model_fingerprint, output_head
from src.models.sharding import in_step
from src.proteins.batching import PaddingCollator, cut_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
SHARD_BYTES = 256 << 20
STATISTICS = ("entropy", "max_logit", "log_sum_exp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_MANIFEST_BYTES = 1 << 30
"""A manifest has some 13 bytes a protein."""
DISK_RESERVE = 1 << 30
"""Bytes that a capture leaves free on the disk."""


WAY_OUT = "scripts/cache_teacher.py captures again what is broken"


def cache_key(teacher: str, data: str, dtype: str) -> str:
    """Return the name of a cache's directory for a teacher's and the data's fingerprints."""
    return f"{teacher[:16]}-{data[:16]}-{dtype}"


def needed_bytes(tokens: int, width: int, dtype: torch.dtype) -> int:
    """Return the size of a cache: hidden states and three float32 figures for each token."""
    return tokens * (width * dtype.itemsize + 4 * len(STATISTICS))


def shard_ranges(lengths: np.ndarray, token_bytes: int, shard_bytes: int) -> list[tuple[int, int]]:
    """Return ranges of proteins whose tokens fill shards of about ``shard_bytes``."""
    ranges, first, filled = [], 0, 0
    for index, length in enumerate(lengths.tolist()):
        if filled and filled + length * token_bytes > shard_bytes:
            ranges.append((first, index))
            first, filled = index, 0
        filled += length * token_bytes
    if filled:
        ranges.append((first, len(lengths)))
    return ranges


class BrokenCacheError(ValueError):
    """A cache's own files are missing, cut short or altered: :func:`capture` makes them anew."""


class TeacherCache:
    """A teacher's hidden states for every token of a set of proteins, read from disk.

    Files are mapped into memory when first used, each after its hash was compared with the
    manifest's. A copy in another process maps the same files. What is broken :func:`capture` makes
    anew.

    Args:
        folder: the cache's directory.
        teacher: fingerprint of the teacher that is expected.
        data: fingerprint of the tokenised proteins that are expected.
        verify: compare hashes; without it only sizes are.

    Raises:
        ValueError: it is another teacher's or of other proteins.
        BrokenCacheError: there is no finished cache, or it is broken.
    """

    def __init__(self, folder: str | Path, teacher: str, data: str, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.verify = verify
        try:
            manifest = read_json(self.folder / "manifest.json", MAX_MANIFEST_BYTES)
        except ValueError as error:
            raise BrokenCacheError(f"{error}; {WAY_OUT}") from None
        try:
            self._check(manifest, teacher, data)
            self.width = manifest["width"]
            self.dtype = DTYPES[manifest["dtype"]]
            self.shards: list[dict[str, Any]] = manifest["shards"]
            problem = shards_problem(self.shards, self.width, self.dtype)
        except (KeyError, TypeError, AttributeError) as error:
            problem = one_line(error)[:100]
        if problem:
            raise BrokenCacheError(
                f"{self.folder}: the cache's manifest is broken ({problem}); {WAY_OUT}"
            )
        self.starts = np.array([shard["first"] for shard in self.shards])
        self.proteins = self.shards[-1]["first"] + len(self.shards[-1]["lengths"])
        self._maps: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for shard in self.shards:
            self._require_whole(shard, hashes=False)

    def _check(self, manifest: Mapping[str, Any], teacher: str, data: str) -> None:
        for key, expected, what in (
            ("format", FORMAT, "of another version of this program"),
            ("teacher", teacher, "another teacher's"),
            ("data", data, "of other proteins"),
        ):
            if manifest[key] != expected:
                raise ValueError(f"{self.folder}: the cache is {what}; choose another directory")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a protein's hidden states ``(T, E)`` and figures ``(T, 3)`` float32."""
        if not 0 <= index < self.proteins:
            raise BrokenCacheError(
                f"{self.folder}: protein {index} is not among the {self.proteins} of the cache; "
                + WAY_OUT
            )
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        hidden, figures, offsets = self._mapped(number)
        row = index - self.shards[number]["first"]
        place = slice(int(offsets[row]), int(offsets[row + 1]))
        states = torch.from_numpy(np.array(hidden[place]))
        if self.dtype == torch.bfloat16:
            states = states.view(torch.bfloat16)
        return states, torch.from_numpy(np.array(figures[place]))

    def _require_whole(self, shard: Mapping[str, Any], hashes: bool) -> None:
        if fault := first_fault(self.folder, shard["files"], hashes):
            raise BrokenCacheError(f"{fault}; {WAY_OUT}")

    def _mapped(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if number not in self._maps:
            shard = self.shards[number]
            hidden_file, figures_file = (self.folder / name for name in shard["files"])
            if self.verify:
                self._require_whole(shard, hashes=True)
            kind = np.dtype("<u2") if self.dtype == torch.bfloat16 else numpy_dtype(self.dtype)
            self._maps[number] = (
                np.memmap(hidden_file, kind, "r").reshape(-1, self.width),
                np.memmap(figures_file, "<f4", "r").reshape(-1, len(STATISTICS)),
                np.cumsum([0, *shard["lengths"]]),
            )
        return self._maps[number]


def shards_problem(shards: Any, width: Any, dtype: torch.dtype) -> str | None:
    """Return what is wrong with the shards of a manifest, or None.

    Names stay inside the cache's directory, and sizes follow from lengths: what is mapped later is
    what the proteins need. Raises ``KeyError`` or ``TypeError`` for what is no record of shards.
    """
    if not isinstance(width, int) or not 0 < width < 1 << 24:
        return "width"
    if not isinstance(shards, list) or not shards:
        return "it names no shard"
    first = 0
    for number, shard in enumerate(shards):
        lengths, files = shard["lengths"], shard["files"]
        if type(shard["first"]) is not int or shard["first"] != first or not lengths:
            return f"shard {number} does not follow the one before"
        if not all(type(length) is int and 0 < length < 1 << 32 for length in lengths):
            return f"lengths of shard {number}"
        tokens = sum(lengths)
        sizes = [tokens * width * dtype.itemsize, tokens * 4 * len(STATISTICS)]
        if not is_record(files) or len(files) != len(sizes):
            return f"files of shard {number}"
        for entry, size_ in zip(files.values(), sizes, strict=True):
            if entry["bytes"] != size_:
                return f"sizes of shard {number}"
        first += len(lengths)
    return None


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """Return NumPy's name for a PyTorch dtype that both have."""
    return np.dtype({torch.float32: "<f4", torch.float16: "<f2"}[dtype])


def capture(
    teacher: PreTrainedModel,
    proteins: Any,
    directory: str | Path,
    *,
    batch_tokens: int = 8192,
    shard_bytes: int = SHARD_BYTES,
    announce: Callable[[str], None] = say,
    fingerprint: str | None = None,
    thorough: bool = False,
    flag: str = "--teacher_cache",
) -> TeacherCache:
    """Run the teacher over all proteins once and keep its hidden states, or find them kept.

    What is broken of a cache that is there is captured again, the rest kept. Of several processes
    each runs every so-many-th shard; the first makes the cache of them.

    Args:
        teacher: in eval mode, on the device and in the dtype it is to be run in.
        proteins: tokenised proteins: token ids by index, ``lengths`` and ``fingerprint``.
        directory: where caches are kept; this one gets a directory of its own in it.
        batch_tokens: padded tokens of a batch.
        shard_bytes: about the size of a shard.
        announce: called with each line for a person.
        fingerprint: the teacher's, where it is known already: hashing a large one takes seconds.
        thorough: find what is broken by the hashes of all files, not by their sizes alone.
        flag: with which the user chooses another directory, for messages.

    Returns:
        The cache, opened.

    Raises:
        ValueError: the disk is too small, another process is capturing, or what is there is another
            teacher's or of other proteins.
    """
    weight, _ = output_head(teacher)
    dtype = next(name for name, kind in DTYPES.items() if kind == weight.dtype)
    teacher_print, data_print = fingerprint or model_fingerprint(teacher), proteins.fingerprint
    folder = Path(directory) / cache_key(teacher_print, data_print, dtype)
    manifest = folder / "manifest.json"
    lengths = np.asarray(proteins.lengths)

    def opened() -> TeacherCache | None:
        try:
            cache = TeacherCache(folder, teacher_print, data_print)
        except BrokenCacheError:
            return None
        whole = cache.proteins == len(lengths) and (
            not thorough or not any(first_fault(folder, shard["files"]) for shard in cache.shards)
        )
        return cache if whole else None

    broken = processes.agreed(manifest.exists)
    found = processes.agreed(opened) if broken else None
    if found is not None:
        announce(f"teacher cache found in {folder}")
        return found
    width = weight.shape[1]
    token_bytes = needed_bytes(1, width, weight.dtype)
    ranges = shard_ranges(lengths, token_bytes, shard_bytes)

    def record_of(number: int, thorough: bool = False) -> dict[str, Any] | None:
        first, last = ranges[number]
        return _shard_record(folder, number, first, lengths[first:last].tolist(), thorough)

    def kept_before() -> list[dict[str, Any] | None]:
        remove_unfinished(folder)
        records = [record_of(number, broken) for number in range(len(ranges))]
        if broken:
            lost = [number for number, record in enumerate(records) if record is None]
            # No process may take what is to be replaced for what replaces it.
            for name in ("manifest.json", *map(_record_name, lost)):
                (folder / name).unlink(missing_ok=True)
            what = f"shards {', '.join(map(str, lost))} are" if lost else "its manifest is"
            announce(f"teacher cache in {folder} is broken: {what} made again")
        return records

    way_out = f"make space and give the same command again, or choose another {flag}"
    with names_full_disk(folder, way_out), processes.first_holds(lambda: locked(folder, flag)):
        kept = processes.agreed(kept_before)
        missing = [number for number, record in enumerate(kept) if record is None]
        need = sum(int(lengths[slice(*ranges[number])].sum()) for number in missing) * token_bytes
        free = shutil.disk_usage(folder).free
        announce(
            f"teacher cache: {int(lengths.sum()):,} tokens of {width} x {dtype}, "
            f"{size(int(lengths.sum()) * token_bytes)} in {folder} ({size(free)} free)"
        )
        if need + DISK_RESERVE > free:
            raise ValueError(
                f"{folder}: the teacher cache needs {size(need + DISK_RESERVE)} with the reserve, "
                f"{size(free)} are free: choose another {flag} or fewer proteins"
            )
        own = [number for number in missing if number % processes.count() == processes.rank()]
        batches = sum(len(_batches(lengths[slice(*ranges[n])], batch_tokens)) for n in own)
        with in_step(teacher, batches):
            for number in progress(own, len(own), "capturing the teacher", "shards"):
                first, last = ranges[number]
                states = _capture_range(teacher, proteins, lengths, first, last, batch_tokens)
                kept[number] = _write_shard(folder, number, first, lengths[first:last], *states)
        if not processes.is_first():
            processes.wait_until(manifest.exists)
            return TeacherCache(folder, teacher_print, data_print)
        for number in missing:
            processes.wait_until(lambda number=number: record_of(number) is not None)
            kept[number] = record_of(number)
        write_json(
            manifest,
            {
                "format": FORMAT,
                "teacher": teacher_print,
                "data": data_print,
                "dtype": dtype,
                "width": width,
                "figures": STATISTICS,
                "shards": kept,
            },
        )
    return TeacherCache(folder, teacher_print, data_print, verify=False)


def _record_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def _shard_record(
    folder: Path, number: int, first: int, lengths: list[int], thorough: bool
) -> dict[str, Any] | None:
    """Return the record of a shard of these proteins that was captured whole before, or None."""
    try:
        record = read_json(folder / _record_name(number))
        whole = (
            (record["first"], record["lengths"]) == (first, lengths)
            and is_record(record["files"])
            and first_fault(folder, record["files"], hashes=thorough) is None
        )
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def _batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Return the rows of each batch: by rising length, as many as the padded tokens allow."""
    return cut_batches(lengths, np.argsort(lengths, kind="stable"), tokens=batch_tokens)


@torch.no_grad()
def _capture_range(
    teacher: PreTrainedModel,
    proteins: Any,
    lengths: np.ndarray,
    first: int,
    last: int,
    batch_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Return hidden states ``(tokens, E)`` and figures ``(tokens, 3)`` of some proteins."""
    weight, bias = output_head(teacher)
    offsets = np.cumsum([0, *lengths[first:last]])
    hidden = torch.empty(int(offsets[-1]), weight.shape[1], dtype=weight.dtype)
    figures = torch.empty(int(offsets[-1]), len(STATISTICS))
    collate = PaddingCollator(0)
    for rows in _batches(lengths[first:last], batch_tokens):
        batch = collate([{"input_ids": proteins[int(first + row)]} for row in rows])
        batch = {name: value.to(weight.device) for name, value in batch.items()}
        mask = batch["attention_mask"]
        states = final_hidden_states(teacher, batch["input_ids"], mask)
        found = teacher_statistics(states, weight, bias, mask.bool())
        each = torch.stack([getattr(found, name) for name in STATISTICS], -1)
        for place, row in enumerate(rows):
            where = slice(int(offsets[row]), int(offsets[row + 1]))
            hidden[where] = states[place, : lengths[first + row]].to(hidden.dtype).cpu()
            figures[where] = each[place, : lengths[first + row]].float().cpu()
    return hidden, figures


def _write_shard(
    folder: Path,
    number: int,
    first: int,
    lengths: np.ndarray,
    hidden: Tensor,
    figures: Tensor,
) -> dict[str, Any]:
    """Write a shard's files and then its record, each atomically. Returns the record."""
    files = {}
    for kind, tensor in (("hidden", hidden), ("figures", figures)):
        name = f"{kind}-{number:05d}.bin"
        raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        with atomic_write(folder / name, "wb") as handle:
            handle.write(raw.data)
        files[name] = {"bytes": raw.nbytes, "sha256": hashlib.sha256(raw.data).hexdigest()}
    record = {"first": first, "lengths": lengths.tolist(), "files": files}
    write_json(folder / _record_name(number), record)
    return record


class CachedCollator:
    """Adds a teacher's hidden states and entropies, which each row carries, to a batch.

    ``teacher_hidden_states`` ``(B, T, E)`` and ``teacher_entropy`` ``(B, T)`` stand where the
    tokens of ``input_ids`` stand, and are 0 at padding.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch with the teacher's part."""
        batch = self.collator(rows)
        shape = batch["input_ids"].shape
        some, _ = rows[0]["teacher"][0]
        hidden = torch.zeros(*shape, some.shape[-1], dtype=some.dtype)
        entropies = torch.zeros(shape)
        mask = batch.get("attention_mask")
        for number, row in enumerate(rows):
            start = 0 if mask is None else int(mask[number].argmax())
            for states, figures in row["teacher"]:
                place = slice(start, start + len(states))
                hidden[number, place] = states
                entropies[number, place] = figures[:, 0]
                start = place.stop
        return batch | {"teacher_hidden_states": hidden, "teacher_entropy": entropies}
