"""Checks JSON records with pydantic; every error is one line that names the file and the key."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import NotRequired, TypedDict

from src.common.cli import printable
from src.common.files import MAX_JSON_DEPTH, is_nested_beyond, is_number

Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Object = dict[Any, Any]


def _check_interval(value: Any) -> Any:
    numbers = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
    if not numbers or value[0] > value[1]:
        raise PydanticCustomError("interval", "must be [low, high]")
    return value


Interval = Annotated[Any, AfterValidator(_check_interval)]
Intervals = dict[Any, Interval | None]

PROBLEMS = {
    "missing": "is missing",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "dict_type": "must be an object",
    "string_type": "must be text",
    "list_type": "must be a list",
}
"""What the message says, by pydantic's type of the error; of other types pydantic's own text."""


def maybe(kind: Any) -> Any:
    """Return the type of a value that may be missing or null."""
    return NotRequired[kind | None]


def object_type(fields: Mapping[str, Any]) -> Any:
    """Return the type of a JSON object that has these values, by key; other keys are allowed."""
    return TypedDict("Record", dict(fields))  # pyright: ignore


def record_type(fields: Mapping[str, Any], required: bool = False) -> TypeAdapter[Any]:
    """Return the pydantic type of a JSON object.

    Args:
        fields: the type of each value by its dotted name, such as ``student_ece.ece``. Other keys
            are allowed.
        required: every value must be there; otherwise it may be missing or null.
    """
    tree: dict[str, Any] = {}
    for name, kind in fields.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node.setdefault(last, kind)

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        types = {key: build(below) for key, below in node.items()}
        return object_type(types if required else {k: maybe(kind) for k, kind in types.items()})

    return TypeAdapter(build(tree))


def check_record(record: Any, kind: TypeAdapter[Any], path: str | Path, advice: str = "") -> None:
    """Check a JSON record: its type, and that it holds only finite numbers.

    The message begins with the ``path`` and ends with the ``advice``.

    Raises:
        ValueError: one line that names the key and what is wrong with it.
    """
    try:
        kind.validate_python(record)
        problem = _unusable(record)
    except ValidationError as error:
        problem = _problem(error)
    if problem:
        raise ValueError(printable(f"{path}: {problem}{advice and ': '}{advice}"))


def _problem(error: ValidationError) -> str:
    """Return the first error in words: ``student_ece.ece must be at most 1, got 2``."""
    first = error.errors(include_url=False)[0]
    name = ""
    for part in first["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{str(part)[:40]}"
    words = PROBLEMS.get(first["type"], first["msg"]).format(**first.get("ctx", {}))
    value = "" if first["type"] == "missing" else f", got {first['input']!r:.40}"
    return f"{name.lstrip('.')} {words}{value}".lstrip()


def _unusable(record: Mapping[str, Any]) -> str | None:
    """Return where a record holds what JSON cannot (NaN, infinity, huge integers), or None."""
    if is_nested_beyond(dict(record), MAX_JSON_DEPTH):
        return f"is nested more than {MAX_JSON_DEPTH} deep"
    stack: list[tuple[str, Any]] = [("", record)]
    while stack:
        name, item = stack.pop()
        if isinstance(item, float) and not math.isfinite(item):
            return f"{name} is not a finite number"
        if isinstance(item, int) and abs(item) > sys.float_info.max:
            return f"{name} is too large a number"
        if isinstance(item, Mapping):
            stack += [(f"{name}.{str(k)[:40]}".lstrip("."), value) for k, value in item.items()]
        elif isinstance(item, list | tuple):
            stack += [(f"{name}[{index}]", value) for index, value in enumerate(item)]
    return None
