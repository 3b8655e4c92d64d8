"""Reads parquet files in batches, and says what is broken in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.proteins.formats import BOMB, FREE_EXPANSION_BYTES, MAX_EXPANSION, reason

ROWS_TOGETHER = 512


def open_parquet(path: Path) -> tuple[list[str], Any]:
    """Open a parquet file.

    Returns:
        Names of the columns, and a function that yields batches of ``ROWS_TOGETHER`` rows of some
        of them; every fault of the file is a ``ValueError`` with the number of the row. If
        ``typed``, the first of them has to hold text, or whole numbers for tokens.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError, LookupError)
    row = 0

    def problem(error: BaseException) -> ValueError:
        return ValueError(f"{path}: row {row + 1}: broken parquet ({reason(error)})")

    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        schema = file.schema_arrow
    except broken as error:
        raise problem(error) from None

    def batches(columns: Sequence[str], typed: bool = False) -> Iterator[Any]:
        nonlocal row
        with file:
            if typed:
                _require_type(pa, schema.field(columns[0]).type, columns[0], path)
            try:
                _require_bounded_expansion(file.metadata, path)
                stream = file.iter_batches(batch_size=ROWS_TOGETHER, columns=list(columns))
            except broken as error:
                raise problem(error) from None
            while True:
                try:
                    batch = next(stream, None)
                except broken as error:
                    raise problem(error) from None
                if batch is None:
                    return
                yield batch
                row += len(batch)

    return schema.names, batches


def _require_bounded_expansion(metadata: Any, path: Path) -> None:
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    unpacked = max((group.total_byte_size for group in groups), default=0)
    if unpacked > FREE_EXPANSION_BYTES and unpacked > MAX_EXPANSION * path.stat().st_size:
        raise ValueError(f"unpacks to more than {MAX_EXPANSION} times its size: {BOMB}")


def batch_cells(batch: Any, kind: str) -> tuple[list, list[list[str]]]:
    """Return a batch's first column, tokens as ``(T,)`` each, and the others as text."""
    column = batch.column(0)
    if kind == "input_ids":
        values = column.flatten()
        if values.null_count:
            raise ValueError("a token is null")
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        cells = np.split(values.to_numpy(zero_copy_only=False), np.cumsum(lengths)[:-1])
    else:
        cells = [cell or "" for cell in column.to_pylist()]
    others = (column.to_pylist() for column in batch.columns[1:])
    return cells, [["" if v is None else str(v) for v in column] for column in others]


def _require_type(pa: Any, actual: Any, column: str, path: Path) -> None:
    types = pa.types
    if column.strip().lower() == "input_ids":
        is_list = types.is_list(actual) or types.is_large_list(actual)
        right = (is_list or types.is_fixed_size_list(actual)) and types.is_integer(
            actual.value_type
        )
        wanted = "lists of whole numbers"
    else:
        text = actual.value_type if types.is_dictionary(actual) else actual
        right = types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)
        wanted = "text"
    if not right:
        raise ValueError(f"{path}: the column {column} holds {actual}, not {wanted}")
