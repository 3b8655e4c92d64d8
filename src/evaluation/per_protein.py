"""Writes and reads parquet tables with a row for each single protein."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.common.files import atomic_write


def write_per_protein(path: str | Path, table: Mapping[str, Any]) -> None:
    """Write the columns of a table, atomically."""
    import pyarrow as pa

    write_parquet(path, pa.table({name: pa.array(values) for name, values in table.items()}))


def write_parquet(path: str | Path, table: Any, **options: Any) -> None:
    """Write a ``pyarrow.Table`` atomically; the options are those of pyarrow's ``write_table``."""
    import pyarrow.parquet as pq

    with atomic_write(path, "wb") as handle:
        pq.write_table(table, handle, **options)


def replace_rows(path: Path, new: Any, keys: Sequence[str]) -> Any:
    """Return a file's rows with those of ``new`` in the place of the ones of equal keys.

    The file need not exist; ``new`` is a ``pyarrow.Table`` with the same columns.

    Returns:
        A ``pyarrow.Table``, sorted by the keys; rows of equal keys stay in their order.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def rows(table: Any) -> list[tuple[Any, ...]]:
        return list(zip(*(table[name].to_pylist() for name in keys), strict=True))

    if path.exists():
        old, replaced = pq.read_table(path), {*rows(new)}
        kept = old.filter(pa.array([row not in replaced for row in rows(old)], pa.bool_()))
        new = pa.concat_tables([kept, new], promote_options="default")
    return new.sort_by([(name, "ascending") for name in keys])


def read_per_protein(
    path: Path, texts: Iterable[str], counts: Iterable[str], numbers: Iterable[str]
) -> Any:
    """Return the named columns as a data frame: texts, int64 and float64.

    Raises:
        ValueError: the file is no such table or empty, a value is missing or not finite, or a
            protein has no residues.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {**dict.fromkeys(texts, pa.string()), **dict.fromkeys(counts, pa.int64())}
    schema = pa.schema({**types, **dict.fromkeys(numbers, pa.float64())}.items())
    try:
        table = pq.read_table(path, columns=schema.names).select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError, OSError):
        raise ValueError(f"{path}: broken, or not a table of single proteins") from None
    if not len(table):
        raise ValueError(f"{path}: holds no proteins")
    if any(column.null_count for column in table.columns):
        raise ValueError(f"{path}: a value is missing")
    frame = table.to_pandas()
    if not np.isfinite(frame[list(numbers)]).all(axis=None) or (frame["residues"] < 1).any():
        raise ValueError(f"{path}: a number is not finite, or a protein has no residues")
    return frame
