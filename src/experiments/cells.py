"""Where a grid keeps what its cells measured: files for each while it runs, then two for all.

==================================  ===============================================================
``CELL.json``                       a cell's results (:mod:`src.evaluation.results`)
``per_protein-GRID-GROUP.parquet``  single proteins of the cells of a group
``cells.parquet``                   packed: a row for each cell, with its results as JSON text
``per_protein.parquet``             packed: single proteins of all cells
==================================  ===============================================================

A cell that is there in both forms counts as its own file says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.evaluation.per_protein import read_per_protein, replace_rows, write_parquet
from src.evaluation.results import brought_up, lookup, read_results

CELLS, PROTEINS = "cells.parquet", "per_protein.parquet"
LOOSE = "*-seed*-lr*.json"
KEYS = ("grid", "size", "seed", "arm", "learning_rate")
"""Settings that name a cell: columns of both packed files."""
SMALL = {"compression": "zstd", "compression_level": 12}
FIGURES = ("student_nats_per_residue", "kl_per_residue", "kept_advantage", "perplexity_ratio")
"""Results of a cell that have a column of their own."""


def read_cell(folder: Path, file: str) -> dict[str, Any] | None:
    """Return a cell's results by the name of its file; None: there are none.

    Raises:
        ValueError: the file is broken.
    """
    path = folder / file
    if path.exists():
        return read_results(path)
    text = _packed(folder).get(path.stem)
    return None if text is None else brought_up(json.loads(text), folder / CELLS)


def cell_files(folder: Path) -> list[str]:
    """Return the names of all cells' files, those that are packed too."""
    return sorted(
        {path.name for path in folder.glob(LOOSE)} | {f"{n}.json" for n in _packed(folder)}
    )


def read_tables(
    folder: Path, grid: str, texts: Sequence[str], counts: Sequence[str], numbers: Sequence[str]
) -> Iterator[tuple[Path, Any]]:
    """Yield each table of a grid's single proteins with the named columns, as a data frame.

    Raises:
        ValueError: a table is broken (:func:`src.evaluation.per_protein.read_per_protein`).
    """

    def read(path: Path, *more: str) -> Any:
        try:
            return read_per_protein(path, (*more, *texts), counts, numbers)
        except ValueError as error:
            advice = f"move it away and run scripts/ablation.py --grid {grid} again"
            raise ValueError(f"{error}: {advice}") from None

    packed = folder / PROTEINS
    if packed.exists():
        frame = read(packed, "grid")
        if (own := frame["grid"] == grid).any():
            yield packed, frame[own]
    for path in sorted(folder.glob(f"per_protein-{grid}-*.parquet")):
        yield path, read(path)


def pack(folder: Path, grid: str, tables: Sequence[Path]) -> int:
    """Move a grid's finished cells into the two packed files; return how many there were.

    ``tables`` are those of the single proteins of its groups; no other process may write them.

    Raises:
        ValueError: a file is broken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    own = {path: read_results(path) for path in sorted(folder.glob(LOOSE))}
    own = {path: cell for path, cell in own.items() if lookup(cell, "settings.grid") == grid}
    if not own:
        return 0
    cells = {name: json.loads(text) for name, text in _packed(folder).items()}
    cells |= {path.stem: cell for path, cell in own.items()}
    ordered = [cells[name] for name in sorted(cells)]
    columns: dict[str, list[Any]] = {"cell": sorted(cells)}
    columns |= {name: [lookup(c, f"settings.{name}") for c in ordered] for name in KEYS}
    columns |= {name: [lookup(c, name) for c in ordered] for name in FIGURES}
    columns["results"] = [json.dumps(cell, separators=(",", ":")) for cell in ordered]

    if loose := [pq.read_table(path) for path in tables if path.exists()]:
        new = pa.concat_tables(loose, promote_options="default")
        new = new.add_column(0, "grid", pa.array([grid] * len(new)))
        proteins = replace_rows(folder / PROTEINS, new.sort_by("protein"), KEYS)
        write_parquet(folder / PROTEINS, proteins, **SMALL)
    write_parquet(folder / CELLS, pa.table(columns), **SMALL)
    for path in (*own, *tables):
        path.unlink(missing_ok=True)
    return len(own)


def _packed(folder: Path) -> dict[str, str]:
    """Return the JSON text of each packed cell, by its name."""
    path = folder / CELLS
    return _texts(path, path.stat().st_mtime_ns) if path.exists() else {}


@lru_cache(maxsize=8)
def _texts(path: Path, _: int) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["cell", "results"])
        return dict(zip(table["cell"].to_pylist(), table["results"].to_pylist(), strict=True))
    except (pa.ArrowException, KeyError, OSError):
        raise ValueError(f"{path}: broken, or not a table of cells") from None
