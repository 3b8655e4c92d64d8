"""Coordinates the processes of one script, started by ``torchrun`` or ``accelerate launch``.

The launcher sets each process's rank and their number in the environment. Rank 0 claims and locks
directories, writes records and prints. It broadcasts decisions and failures over a separate gloo
group with a 14-day timeout, which is longer than capturing a teacher cache takes.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr
from datetime import timedelta
from typing import Any, TypeVar

from src.common import cli
from src.common.cli import USER_ERROR

T = TypeVar("T")
PATIENCE = timedelta(days=14)
POLL_SECONDS = 0.2
_group: Any = None


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def count() -> int:
    """Return how many processes run together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Return whether this process has rank 0, which does the work that is done once."""
    return rank() == 0


def join(device_name: str = "auto") -> None:
    """Join the process group and select this process's GPU; with one process, do nothing."""
    global _group
    if count() == 1 or _group is not None:
        return
    from accelerate import PartialState
    from torch import distributed

    from src.common.devices import choose_device

    PartialState(cpu=choose_device(device_name).type == "cpu")
    _group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    atexit.register(distributed.destroy_process_group)


def agreed(function: Callable[[], T]) -> T:
    """Call a function in rank 0 and return its result in all processes.

    Raises:
        SystemExit: in the other processes, if the function raised in rank 0.
    """
    return _broadcast(0, function)


def in_turn(function: Callable[[], T]) -> T:
    """Call a function in one process after the other, and return each process's own result.

    Raises:
        SystemExit: in the other processes, if the function raised in one.
    """
    results: list[T] = []
    for turn in range(count()):
        _broadcast(turn, lambda: results.append(function()))
    return results[0]


def say(line: str = "") -> None:
    """Print one line, in rank 0."""
    if is_first():
        cli.say(line)


def mine(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of items: each of them belongs to one process."""
    return items[rank() :: count()]


def gathered(value: T) -> list[T]:
    """Return what all processes hand over, by rank: all must call this together."""
    if count() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value, group=_group)
    return values


def alike(function: Callable[[], T]) -> T:
    """Call a function in all processes; only rank 0 prints and reports the user's errors.

    Raises:
        SystemExit: in the other processes, if the function raised ``ValueError``.
    """
    if is_first():
        return function()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        try:
            return function()
        except ValueError:
            raise SystemExit(USER_ERROR) from None


def _broadcast(turn: int, function: Callable[[], T]) -> T:
    """Call a function in one process and return its result in all."""
    if count() == 1:
        return function()
    from torch import distributed

    answer: list[Any] = [None, None]
    try:
        if rank() == turn:
            answer = ["done", function()]
    finally:
        distributed.broadcast_object_list(answer, src=turn, group=_group)
    if answer[0] != "done":
        raise SystemExit(USER_ERROR)
    return answer[1]


@contextmanager
def first_holds(hold: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter a context in rank 0; the other processes wait until it is entered."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(hold())

        agreed(enter)
        yield


def wait_until(there: Callable[[], bool]) -> None:
    """Wait until a condition holds. If the process that fulfils it dies, the launcher ends all."""
    while not there():
        time.sleep(POLL_SECONDS)
