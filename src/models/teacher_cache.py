"""Keeps a teacher's final hidden states on disk, so that it runs once for any number of students.

Each token has the input of the teacher's output head (the hidden state after the last norm, in the
dtype it was computed in; where the head is not linear, the logits) and three statistics of the
distribution at T = 1: entropy, largest logit and log-sum-exp. The head gives the exact logits, so
one cache serves every temperature, α, weighting, smoothing, divergence, student and seed. For
ProtGPT2 it takes 2,560 bytes a token in bfloat16; the logits would take 100,514.

A cache is a directory ``<teacher>-<data>-<dtype>`` of shards and a manifest. Shards are written
atomically, so a killed capture continues at the shard it was writing.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from src.common.manifest import first_fault, is_record, signature
from src.common.runs import locked
from src.loss.fused import teacher_statistics
from src.models.forward import final_hidden_states, head_form, output_head, states_shape
from src.models.loading import model_fingerprint
from src.models.sharding import in_step
from src.proteins.batching import PaddingCollator, cut_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
SHARD_BYTES = 256 << 20
STATISTICS = ("entropy", "max_logit", "log_sum_exp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NUMPY_DTYPES = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<u2"}
"""NumPy has no bfloat16: its bits are read as integers."""
MAX_MANIFEST_BYTES = 1 << 30
"""A manifest has about 13 bytes a protein."""
DISK_RESERVE = 1 << 30
"""Bytes that a capture leaves free on the disk."""

ADVICE = "scripts/cache_teacher.py captures again what is broken"


def cache_key(teacher: str, data: str, dtype: str) -> str:
    """Return the name of a cache's directory for a teacher's and the data's fingerprints."""
    return f"{teacher[:16]}-{data[:16]}-{dtype}"


def needed_bytes(tokens: int, width: int, dtype: torch.dtype) -> int:
    """Return the size of a cache: hidden states and three float32 statistics for each token."""
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
    """A cache's own files are missing, cut short or altered; :func:`capture` replaces them."""


class TeacherCache:
    """A teacher's hidden states for every token of a set of proteins, read from disk.

    ``teacher`` and ``data`` are the fingerprints of the teacher and of the tokenised proteins that
    are expected. Files are hashed and mapped into memory when first used; without ``verify`` only
    their sizes are compared. A copy in another process maps the same files.

    Raises:
        ValueError: the cache is another teacher's or of other proteins.
        BrokenCacheError: the cache is unfinished or broken.
    """

    def __init__(self, folder: str | Path, teacher: str, data: str, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.verify = verify
        try:
            manifest = read_json(self.folder / "manifest.json", MAX_MANIFEST_BYTES)
        except ValueError as error:
            raise BrokenCacheError(f"{error}; {ADVICE}") from None
        try:
            self._check(manifest, teacher, data)
            self.width = manifest["width"]
            self.dtype = DTYPES[manifest["dtype"]]
            self.shards: list[dict[str, Any]] = manifest["shards"]
            # Caches of before 2026-11-28 have no check.
            altered = manifest.get("check", signature(manifest)) != signature(manifest)
            self.starts = np.array([shard["first"] for shard in self.shards])
            self.proteins = self.shards[-1]["first"] + len(self.shards[-1]["lengths"])
            plain = all(is_record(shard["files"]) for shard in self.shards)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise BrokenCacheError(
                f"{self.folder}: the cache's manifest is broken ({one_line(error)[:100]}); {ADVICE}"
            ) from None
        if altered or not plain:
            raise BrokenCacheError(f"{self.folder}: the cache's manifest was altered; {ADVICE}")
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
        """Return a protein's hidden states ``(T, E)`` and statistics ``(T, 3)`` float32."""
        if not 0 <= index < self.proteins:
            raise BrokenCacheError(
                f"{self.folder}: protein {index} is not among the {self.proteins} of the cache; "
                + ADVICE
            )
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        hidden, statistics, offsets = self._mapped(number)
        row = index - self.shards[number]["first"]
        place = slice(int(offsets[row]), int(offsets[row + 1]))
        states = torch.from_numpy(np.array(hidden[place]))
        if self.dtype == torch.bfloat16:
            states = states.view(torch.bfloat16)
        return states, torch.from_numpy(np.array(statistics[place]))

    def _require_whole(self, shard: Mapping[str, Any], hashes: bool) -> None:
        if fault := first_fault(self.folder, shard["files"], hashes):
            raise BrokenCacheError(f"{fault}; {ADVICE}")

    def _mapped(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if number not in self._maps:
            shard = self.shards[number]
            hidden_file, statistics_file = (self.folder / name for name in shard["files"])
            if self.verify:
                self._require_whole(shard, hashes=True)
            kind = NUMPY_DTYPES[self.dtype]
            self._maps[number] = (
                np.memmap(hidden_file, kind, "r").reshape(-1, self.width),
                np.memmap(statistics_file, "<f4", "r").reshape(-1, len(STATISTICS)),
                np.cumsum([0, *shard["lengths"]]),
            )
        return self._maps[number]


@dataclass(frozen=True)
class _Job:
    """What identifies a cache and how its proteins are divided into shards."""

    folder: Path
    teacher: str
    data: str
    dtype: torch.dtype
    width: int
    lengths: np.ndarray
    ranges: list[tuple[int, int]]

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Return the size of some shards."""
        tokens = sum(int(self.lengths[slice(*self.ranges[number])].sum()) for number in shards)
        return needed_bytes(tokens, self.width, self.dtype)

    def open_whole(self, thorough: bool) -> TeacherCache | None:
        """Open the cache, or return None if it is broken or does not hold all proteins."""
        try:
            cache = TeacherCache(self.folder, self.teacher, self.data)
        except BrokenCacheError:
            return None
        whole = cache.proteins == len(self.lengths) and not (
            thorough and any(first_fault(self.folder, shard["files"]) for shard in cache.shards)
        )
        return cache if whole else None

    def record(self, number: int, thorough: bool = False) -> dict[str, Any] | None:
        """Return the record of a shard that was captured before and is whole, or None."""
        first, last = self.ranges[number]
        try:
            record = read_json(self.folder / _record_name(number))
            whole = (
                (record["first"], record["lengths"]) == (first, self.lengths[first:last].tolist())
                and is_record(record["files"])
                and first_fault(self.folder, record["files"], hashes=thorough) is None
            )
        except (ValueError, OSError, KeyError, TypeError, AttributeError):
            return None
        return record if whole else None

    def records(self, broken: bool, announce: Callable[[str], None]) -> list[dict[str, Any] | None]:
        """Return the record of each shard that is kept; of a broken cache remove the rest."""
        remove_unfinished(self.folder)
        records = [self.record(number, broken) for number in range(len(self.ranges))]
        if broken:
            lost = [number for number, record in enumerate(records) if record is None]
            # Removed first, so that no process reads an old record as that of the new shard.
            for name in ("manifest.json", *map(_record_name, lost)):
                (self.folder / name).unlink(missing_ok=True)
            what = f"shards {', '.join(map(str, lost))} are" if lost else "its manifest is"
            announce(f"teacher cache in {self.folder} is broken: {what} made again")
        return records

    def write_manifest(self, shards: list[dict[str, Any] | None]) -> None:
        """Write the manifest, which makes the cache complete."""
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "teacher": self.teacher,
            "data": self.data,
            "dtype": _name_of(self.dtype),
            "width": self.width,
            "figures": STATISTICS,
            "shards": shards,
        }
        write_json(self.manifest, {**manifest, "check": signature(manifest)})


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, kind in DTYPES.items() if kind == dtype)


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
    """Return the cache of a teacher's hidden states for all proteins; capture what is missing.

    Broken shards of an existing cache are captured again, the others kept. With N processes each
    captures every N-th missing shard, and rank 0 writes the manifest.

    Args:
        teacher: in eval mode, on the device and in the dtype it is to be run in.
        proteins: tokenised proteins: token ids by index, ``lengths`` and ``fingerprint``.
        directory: of all caches; this one gets a directory of its own in it.
        batch_tokens: largest number of padded tokens in a batch.
        shard_bytes: approximate size of a shard.
        announce: called with each line for the user.
        fingerprint: of the teacher, if known: hashing a large one takes seconds.
        thorough: check the hashes of all files of an existing cache, not only their sizes.
        flag: that chooses another directory, for messages.

    Raises:
        ValueError: the disk is too small, another process is capturing, or the directory holds
            another teacher's cache or one of other proteins.
    """
    width, dtype, _ = states_shape(teacher)
    teacher_print = _with_head(fingerprint or model_fingerprint(teacher), teacher)
    data_print = proteins.fingerprint
    folder = Path(directory) / cache_key(teacher_print, data_print, _name_of(dtype))
    lengths = np.asarray(proteins.lengths)
    ranges = shard_ranges(lengths, needed_bytes(1, width, dtype), shard_bytes)
    job = _Job(folder, teacher_print, data_print, dtype, width, lengths, ranges)

    broken = processes.agreed(job.manifest.exists)
    existing = processes.agreed(lambda: job.open_whole(thorough)) if broken else None
    if existing is not None:
        announce(f"teacher cache found in {folder}")
        return existing
    advice = f"make space and give the same command again, or choose another {flag}"
    with (
        names_full_disk(folder, advice),
        processes.first_holds(lambda: locked(folder, flag, announce)),
    ):
        shards = processes.agreed(lambda: job.records(broken, announce))
        missing = [number for number, record in enumerate(shards) if record is None]
        _require_space(job, missing, announce, flag)
        own = [number for number in missing if number % processes.count() == processes.rank()]
        batches = sum(len(_batches(lengths[slice(*ranges[n])], batch_tokens)) for n in own)
        with in_step(teacher, batches):
            for number in progress(own, len(own), "capturing the teacher", "shards"):
                first, last = ranges[number]
                states = _capture_range(teacher, proteins, lengths, first, last, batch_tokens)
                shards[number] = _write_shard(folder, number, first, lengths[first:last], *states)
        if not processes.is_first():
            processes.wait_until(job.manifest.exists)
            return TeacherCache(folder, teacher_print, data_print)
        for number in missing:
            processes.wait_until(lambda number=number: job.record(number) is not None)
            shards[number] = job.record(number)
        job.write_manifest(shards)
    return TeacherCache(folder, teacher_print, data_print, verify=False)


def _with_head(fingerprint: str, teacher: PreTrainedModel) -> str:
    """Return a fingerprint that also tells a head's scale and cap, which decide the statistics.

    That of a plain head is the weights' own, so that caches made before heads had these are found.
    """
    form = head_form(teacher)
    if form.linear and form.scale == 1.0 and form.cap is None:
        return fingerprint
    state = f"{fingerprint} {form.linear} {form.scale!r} {form.cap!r}"
    return hashlib.sha256(state.encode()).hexdigest()


def _require_space(
    job: _Job, missing: Sequence[int], announce: Callable[[str], None], flag: str
) -> None:
    """Announce the size of a cache; raise ``ValueError`` if the missing shards do not fit."""
    free = shutil.disk_usage(job.folder).free
    announce(
        f"teacher cache: {int(job.lengths.sum()):,} tokens of {job.width} x "
        f"{_name_of(job.dtype)}, {size(job.bytes_of(range(len(job.ranges))))} in {job.folder} "
        f"({size(free)} free)"
    )
    need = job.bytes_of(missing) + DISK_RESERVE
    if need > free:
        raise ValueError(
            f"{job.folder}: the teacher cache needs {size(need)} with the reserve, {size(free)} "
            f"are free: choose another {flag} or fewer proteins"
        )


def _record_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def _batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Return the rows of each batch, by rising length."""
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
    """Return hidden states ``(tokens, E)`` and statistics ``(tokens, 3)`` of some proteins."""
    head, (width, dtype, device) = output_head(teacher), states_shape(teacher)
    offsets = np.cumsum([0, *lengths[first:last]])
    hidden = torch.empty(int(offsets[-1]), width, dtype=dtype)
    statistics = torch.empty(int(offsets[-1]), len(STATISTICS))
    collate = PaddingCollator(0)
    for rows in _batches(lengths[first:last], batch_tokens):
        batch = collate([{"input_ids": proteins[int(first + row)]} for row in rows])
        batch = {name: value.to(device) for name, value in batch.items()}
        mask = batch["attention_mask"]
        states = final_hidden_states(teacher, batch["input_ids"], mask)
        computed = teacher_statistics(states, head, mask.bool())
        table = torch.stack([getattr(computed, name) for name in STATISTICS], -1)  # (B, T, 3)
        for place, row in enumerate(rows):
            where = slice(int(offsets[row]), int(offsets[row + 1]))
            hidden[where] = states[place, : lengths[first + row]].to(hidden.dtype).cpu()
            statistics[where] = table[place, : lengths[first + row]].float().cpu()
    return hidden, statistics


def _write_shard(
    folder: Path,
    number: int,
    first: int,
    lengths: np.ndarray,
    hidden: Tensor,
    statistics: Tensor,
) -> dict[str, Any]:
    """Write a shard's files and then its record, each atomically, and return the record."""
    files = {}
    for kind, tensor in (("hidden", hidden), ("figures", statistics)):
        name = f"{kind}-{number:05d}.bin"
        raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        with atomic_write(folder / name, "wb") as handle:
            handle.write(raw.data)
        files[name] = {"bytes": raw.nbytes, "sha256": hashlib.sha256(raw.data).hexdigest()}
    record = {"first": first, "lengths": lengths.tolist(), "files": files}
    write_json(folder / _record_name(number), record)
    return record


class CachedCollator:
    """Adds the teacher's hidden states and entropies of the rows to a batch.

    ``teacher_hidden_states`` ``(B, T, E)`` and ``teacher_entropy`` ``(B, T)`` are aligned with
    ``input_ids``, and 0 at padding.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch with the teacher's part."""
        batch = self.collator(rows)
        shape = batch["input_ids"].shape
        example, _ = rows[0]["teacher"][0]
        hidden = torch.zeros(*shape, example.shape[-1], dtype=example.dtype)
        entropies = torch.zeros(shape)
        mask = batch.get("attention_mask")
        for number, row in enumerate(rows):
            start = 0 if mask is None else int(mask[number].argmax())
            for states, statistics in row["teacher"]:
                place = slice(start, start + len(states))
                hidden[number, place] = states
                entropies[number, place] = statistics[:, 0]
                start = place.stop
        return batch | {"teacher_hidden_states": hidden, "teacher_entropy": entropies}
