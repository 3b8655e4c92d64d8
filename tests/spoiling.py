"""Records with one thing wrong: every place, each with some values that it must not have."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WRONG = (None, "x", [], {}, -1, 10**30, 10**400, "a\0b", "\ud800")
"""Beside being missing, what a value of a broken record may be."""


def places(value: Any, where: tuple = ()) -> Iterator[tuple]:
    """Yield the way to everything that stands in a record; of a list to its first entry."""
    if where:
        yield where
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, each in entries:
        if isinstance(each, dict | list):
            yield from places(each, (*where, key))
        else:
            yield (*where, key)


def spoiled(record: Any, where: tuple, wrong: Any) -> Any:
    """Return a copy of a record with one value wrong, or missing where ``wrong`` is ..."""
    copied = copy.deepcopy(record)
    place = copied
    for key in where[:-1]:
        place = place[key]
    if wrong is ...:
        del place[where[-1]]
    else:
        place[where[-1]] = wrong
    return copied


def refusals(
    record: Any, path: Path, read: Callable[[], Any], of_each: int, share: float = 1.0
) -> list[str]:
    """Spoil every place of a record in some ways, read each, and return what was refused why.

    ``of_each`` is how many of a place's ways are tried, ``share`` that of the places, drawn.
    Each spoiled record is written to ``path``; whatever ``read`` raises but ``ValueError`` passes
    through.
    """
    rng = random.Random(0)
    messages = []
    for where in places(record):
        if rng.random() >= share:
            continue
        for wrong in rng.sample((..., *WRONG), of_each):
            path.write_text(json.dumps(spoiled(record, where, wrong)))
            try:
                read()
            except ValueError as error:
                messages.append(str(error))
            except Exception as error:
                raise AssertionError(f"{where} = {wrong!r:.40}: {error!r}") from error
    return messages
