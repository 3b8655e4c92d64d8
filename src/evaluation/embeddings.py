"""Hidden states of a model as embeddings of proteins and residues.

The rule from tokens to residues: **a residue gets the hidden state of the token that holds it**.
Residues that share a token share its vector; markers and line breaks stand for no residue. ``mean``
is the mean over residues, so a token weighs as many times as it has residues. ``last`` is the
vector of the last residue, which, in a causal model, has seen the whole protein; that of an early
residue has seen only what stands before it.

Proteins are worked through in parts of about 1,000, each written when it is done. A run that was
stopped goes on at the next part; several processes share the parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from src.common import processes
from src.common.cli import progress
from src.common.files import atomic_write, read_json, remove_folder, write_json
from src.evaluation.scoring import BATCH_TOKENS, length_batches
from src.models.forward import accepts
from src.models.loading import NOT_TAKEN, ProteinModel
from src.proteins.batching import padded
from src.proteins.encoding import Spelling
from src.proteins.sources import Protein

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART = 1000
"""Proteins of a part."""
MANIFEST = "parts.json"
FORMATS = (".parquet", ".npz")


@dataclass(frozen=True)
class EmbeddingSettings:
    """Layer, kind and batches of embeddings.

    Attributes:
        layer: 0: the input of the first block; n: the output of the n-th; -1: of the last, after
            the final norm where the model has one.
        per_residue: a vector for each residue, in place of ``mean`` and ``last``.
        batch_size: proteins of a batch, at most.
    """

    layer: int = -1
    per_residue: bool = False
    batch_size: int = 64


def check_layer(model: PreTrainedModel, layer: int) -> None:
    """Raise ``ValueError`` where the model has no such layer."""
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    if not -layers - 1 <= layer <= layers:
        raise ValueError(f"--layer {layer}: the model has layers 0 to {layers}, or -1 for the last")


@torch.inference_mode()
def residue_embeddings(
    loaded: ProteinModel,
    proteins: Sequence[str],
    settings: EmbeddingSettings | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the index of each protein and the vectors of its residues, ``(L, E)`` in float32.

    Proteins come in batches by length, not in their order.

    Raises:
        ValueError: the model has no such layer, or cannot take a protein.
    """
    settings = settings or EmbeddingSettings()
    model, tokenizer = loaded
    check_layer(model, settings.layer)
    rows, fits = loaded.rows(proteins)
    if not fits.all():
        protein = proteins[int(fits.argmin())]
        raise ValueError(f"proteins ({protein[:20]}..., {len(protein):,} residues) {NOT_TAKEN}")
    spelling = Spelling(tokenizer)
    lengths = np.array([len(row) for row in rows])
    tokens = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    last = settings.layer == -1
    for batch in length_batches(lengths, settings.batch_size, tokens):
        ids, mask = (t.to(model.device) for t in padded([rows[i] for i in batch]))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if accepts(model, "use_cache"):
            inputs["use_cache"] = False
        out = model.base_model(**inputs, output_hidden_states=not last)
        states = out.last_hidden_state if last else out.hidden_states[settings.layer]  # (B, T, E)
        states = states.float().cpu().numpy()
        for index, row in zip(batch, states, strict=True):
            yield int(index), np.repeat(row[: lengths[index]], spelling.sizes(rows[index]), axis=0)


def pooled(vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Return ``mean`` and ``last`` ``(E,)`` of the vectors ``(L, E)`` of a protein's residues."""
    return {"mean": vectors.mean(0, dtype=np.float64).astype(np.float32), "last": vectors[-1]}


# Files ---------------------------------------------------------------------------------------


def write_embeddings(
    path: Path,
    loaded: ProteinModel,
    proteins: Sequence[Protein],
    settings: EmbeddingSettings,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Embed proteins and write them to a file, part by part.

    Args:
        path: ``.parquet`` with a row for each protein (``name``, ``residues``, and lists ``mean``
            and ``last``, or ``embeddings`` with L x E numbers row after row), or ``.npz`` (arrays
            ``names``, ``residues``, ``mean`` and ``last`` ``(P, E)``; or ``embeddings`` ``(ΣL, E)``
            and ``offsets`` ``(P + 1,)``).
        loaded: the model, in eval mode, and its tokenizer.
        proteins: names and residues.
        settings: of the embeddings.
        identity: what decides the result beside settings and proteins: of the model and its
            layout. Parts with another identity are not used.
        say: called with lines for a person, in the first process.

    Raises:
        ValueError: unfinished parts beside ``path`` are of other settings or proteins.
    """
    check_layer(loaded.model, settings.layer)
    folder = path.with_name(f"{path.name}.parts")
    starts = range(0, len(proteins), PART)
    # The batch size is left out: one who ran out of memory goes on with smaller batches.
    kind = {"layer": settings.layer, "per_residue": settings.per_residue}
    wanted = json.loads(
        json.dumps(
            {"settings": kind, "part": PART, "proteins": proteins_sha256(proteins), **identity}
        )
    )
    if processes.is_first():
        manifest = folder / MANIFEST
        if manifest.exists() and read_json(manifest) != wanted:
            raise ValueError(
                f"{folder}: parts of other settings, another model or other proteins: delete it"
            )
        write_json(manifest, wanted)
    processes.wait_until((folder / MANIFEST).exists)
    files = [folder / f"{number:06d}.npz" for number in range(len(starts))]
    mine = processes.mine(range(len(starts)))
    left = [n for n in mine if not files[n].exists()]
    if len(left) < len(mine):
        say(f"{folder}: going on after {len(mine) - len(left)} of {len(mine)} parts")
    for number in progress(left, len(left), "embedding", f"parts of {PART:,}"):
        part = proteins[starts[number] : starts[number] + PART]
        arrays = _arrays(loaded, part, settings)
        with atomic_write(files[number], "wb") as handle:
            np.savez(handle, allow_pickle=False, **arrays)
    if processes.is_first():
        processes.wait_until(lambda: all(file.exists() for file in files))
        (_join_parquet if path.suffix == ".parquet" else _join_npz)(path, files)
        remove_folder(folder)


def proteins_sha256(proteins: Sequence[Protein]) -> str:
    """Return the SHA-256 of names and residues, with their tags, in their order."""
    digest = hashlib.sha256()
    for name, residues, *_ in proteins:
        digest.update(json.dumps([name, residues, getattr(residues, "tag", "")]).encode())
    return digest.hexdigest()


def _arrays(
    loaded: ProteinModel, entries: Sequence[Protein], settings: EmbeddingSettings
) -> dict[str, np.ndarray]:
    residues = [entry.residues for entry in entries]
    values: list[Any] = [None] * len(entries)
    for index, vectors in residue_embeddings(loaded, residues, settings):
        values[index] = vectors if settings.per_residue else pooled(vectors)
    arrays = {
        "names": np.array([entry.name for entry in entries]),
        "residues": np.array([len(r) for r in residues]),
    }
    if settings.per_residue:
        return arrays | {"embeddings": np.concatenate(values)}
    return arrays | {key: np.stack([v[key] for v in values]) for key in ("mean", "last")}


def _join_npz(path: Path, files: Sequence[Path]) -> None:
    parts = [np.load(file) for file in files]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}
    if "embeddings" in joined:
        joined["offsets"] = np.concatenate([[0], np.cumsum(joined["residues"])])
    with atomic_write(path, "wb") as handle:
        np.savez(handle, allow_pickle=False, **joined)


def _join_parquet(path: Path, files: Sequence[Path]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    with atomic_write(path, "wb") as handle:
        writer = None
        for file in files:
            part = np.load(file)
            columns: dict[str, Any] = {
                "name": pa.array(part["names"].tolist()),
                "residues": pa.array(part["residues"]),
            }
            for key in ("mean", "last"):
                if key in part.files:
                    size = part[key].shape[1]
                    columns[key] = pa.FixedSizeListArray.from_arrays(part[key].ravel(), size)
            if "embeddings" in part.files:
                vectors = part["embeddings"]
                offsets = np.concatenate([[0], np.cumsum(part["residues"])]) * vectors.shape[1]
                columns["embeddings"] = pa.LargeListArray.from_arrays(offsets, vectors.ravel())
            table = pa.table(columns)
            writer = writer or parquet.ParquetWriter(handle, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
