"""Tokenised proteins on disk: reading, checking and writing stores, and selecting proteins.

A store is a directory of plain little-endian arrays and a manifest with their SHA-256:

- ``tokens.bin``: the ids of all proteins, one after the other, 16 or 32 bits each
- ``offsets.bin``: where each protein begins, and the end, int64
- ``residues.bin``: residues in those tokens, int32
- ``hashes.bin``: 64 bits of BLAKE2b of the whole protein's residues, uint64
- ``names.bin``, ``name_offsets.bin``: UTF-8 names
- ``letters.json``: the residues of each token id

:mod:`src.proteins.tokens` builds stores.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.common.files import read_json
from src.common.manifest import first_fault, signature
from src.proteins.reading import ReadReport

FORMAT = "protein-lm-distill tokens"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
ARRAYS = {
    "offsets.bin": np.dtype("<i8"),
    "residues.bin": np.dtype("<i4"),
    "hashes.bin": np.dtype("<u8"),
    "name_offsets.bin": np.dtype("<i8"),
}
CHECKED_BYTES = 1 << 28
"""Smaller stores are hashed whenever they are opened; of larger ones only sizes are checked."""


class Names(Sequence[str]):
    """Names of proteins, read from the store on access."""

    def __init__(self, proteins: TokenisedProteins) -> None:
        self._proteins = proteins

    def __len__(self) -> int:
        return len(self._proteins)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._proteins.row(index)
        start, end = self._proteins.array("name_offsets.bin")[row : row + 2]
        return bytes(self._proteins.array("names.bin")[start:end]).decode()


class TokenisedProteins:
    """Tokenised proteins on disk, or a selection of them in any order.

    Arrays are mapped into memory on first use. A pickled copy, as for a DataLoader worker, contains
    only the selection and maps the same files.

    Attributes:
        folder: of the store.
        manifest: settings, counts, report and hashes.
        indices: the selected rows, or None for all.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], indices: np.ndarray | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.indices = indices
        self._arrays: dict[str, np.ndarray] = {}
        self._cached: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "indices": self.indices}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return self.manifest["proteins"] if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a protein's token ids, ``(T,)`` int64."""
        row = self.row(index)
        start, end = self.array("offsets.bin")[row : row + 2]
        return self.array("tokens.bin")[start:end].astype(np.int64)

    def row(self, index: int) -> int:
        """Return the row in the store of a protein of the selection. Raises ``IndexError``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"protein {index} of {len(self)}")
        index = int(index) % len(self)
        return index if self.indices is None else int(self.indices[index])

    def array(self, name: str) -> np.ndarray:
        """Return one of the store's files, mapped read-only."""
        if name not in self._arrays:
            kinds = {"tokens.bin": np.dtype(self.manifest["dtype"]), "names.bin": np.dtype("u1")}
            kind = {**ARRAYS, **kinds}[name]
            # asarray: slicing np.memmap runs slow Python code.
            self._arrays[name] = np.asarray(np.memmap(self.folder / name, dtype=kind, mode="r"))
        return self._arrays[name]

    def _selected(self, name: str) -> np.ndarray:
        return self.array(name) if self.indices is None else self.array(name)[self.indices]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each protein with both markers, ``(proteins,)`` int32."""
        if "lengths" not in self._cached:
            lengths = np.diff(self.array("offsets.bin")).astype(np.int32)
            self._cached["lengths"] = lengths if self.indices is None else lengths[self.indices]
        return self._cached["lengths"]

    @property
    def residues(self) -> np.ndarray:
        """Residues in each protein's tokens, ``(proteins,)`` int32."""
        return self._selected("residues.bin")

    @property
    def hashes(self) -> np.ndarray:
        """``src.proteins.hashes.sequence_hash`` of each whole protein, ``(proteins,)`` uint64."""
        return self._selected("hashes.bin")

    @property
    def names(self) -> Names:
        """Names of the proteins."""
        return Names(self)

    @property
    def report(self) -> ReadReport:
        """Report of reading the source."""
        return ReadReport.from_dict(self.manifest["report"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tokens, the order and the selection."""
        whole = self.manifest["fingerprint"]
        if self.indices is None:
            return whole
        if "fingerprint" not in self._cached:
            state = whole.encode() + np.ascontiguousarray(self.indices, dtype="<i8").tobytes()
            self._cached["fingerprint"] = hashlib.sha256(state).hexdigest()
        return self._cached["fingerprint"]

    def subset(self, indices: Sequence[int] | np.ndarray) -> TokenisedProteins:
        """Return a selection, in the order given. Raises ``IndexError`` for a wrong index."""
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted) and not -len(self) <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"indices reach outside of {len(self)} proteins")
        wanted = wanted % max(1, len(self))
        rows = wanted if self.indices is None else self.indices[wanted]
        return TokenisedProteins(self.folder, self.manifest, rows)

    def sequence(self, index: int) -> str:
        """Return the residues in a protein's tokens."""
        if "letters" not in self._cached:
            self._cached["letters"] = read_json(self.folder / "letters.json")
        letters = self._cached["letters"]
        spelt = "".join(letters[i] for i in self[index])
        return spelt[len(spelt) - int(self.residues[index]) :]  # a tag stands before them


def open_store(folder: Path, thorough: bool | None = None) -> TokenisedProteins:
    """Open a store with all its proteins, and check that it is complete.

    The SHA-256 of every file is compared if ``thorough``; None: if the store is small.

    Raises:
        ValueError: the store is missing, of another version, or damaged.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: not the record of tokenised proteins")
    if manifest.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder}: of version {manifest.get('version')!r:.40}, not {FORMAT_VERSION}"
        )
    if manifest.get("check") != signature(manifest):
        raise ValueError(f"{folder / MANIFEST}: was altered")
    sizes = sum(entry["bytes"] for entry in manifest["files"].values())
    if thorough is None:
        thorough = sizes <= CHECKED_BYTES
    if fault := first_fault(folder, manifest["files"], hashes=thorough):
        raise ValueError(fault)
    return TokenisedProteins(folder, manifest)


class StoreWriter:
    """Appends proteins to the files of a store and hashes them."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        names = ["tokens.bin", "names.bin", *ARRAYS]
        self.handles = {name: (folder / name).open("wb") for name in names}
        self.digests = {name: hashlib.sha256() for name in names}
        self.proteins = self.tokens = self.residues = self.name_bytes = 0
        self._write("offsets.bin", np.zeros(1, ARRAYS["offsets.bin"]).tobytes())
        self._write("name_offsets.bin", np.zeros(1, ARRAYS["name_offsets.bin"]).tobytes())

    def _write(self, name: str, data: bytes) -> None:
        self.handles[name].write(data)
        self.digests[name].update(data)

    def append(
        self, names: list[str], rows: list[np.ndarray], residues: list[int], hashes: list[int]
    ) -> None:
        """Append proteins: names, token ids, numbers of residues, hashes."""
        if not rows:
            return
        encoded = [name.encode("utf-8", errors="replace") for name in names]
        ends = self.tokens + np.cumsum([len(row) for row in rows])
        name_ends = self.name_bytes + np.cumsum([len(name) for name in encoded])
        self._write("tokens.bin", np.concatenate(rows).astype(self.dtype).tobytes())
        self._write("names.bin", b"".join(encoded))
        for name, values in (
            ("offsets.bin", ends),
            ("name_offsets.bin", name_ends),
            ("residues.bin", residues),
            ("hashes.bin", np.array(hashes, dtype=np.uint64)),
        ):
            self._write(name, np.asarray(values).astype(ARRAYS[name]).tobytes())
        self.proteins += len(rows)
        self.residues += sum(residues)
        self.tokens, self.name_bytes = int(ends[-1]), int(name_ends[-1])

    def close(self) -> dict[str, dict[str, Any]]:
        """Flush everything to disk and return the size and SHA-256 of each file."""
        files = {}
        for name, handle in self.handles.items():
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
            files[name] = {
                "bytes": (self.folder / name).stat().st_size,
                "sha256": self.digests[name].hexdigest(),
            }
        return files

    def abandon(self) -> None:
        """Close the files; errors are ignored."""
        for handle in self.handles.values():
            with contextlib.suppress(OSError):
                handle.close()
