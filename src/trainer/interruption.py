"""SIGTERM and SIGINT while training: a checkpoint first, then the exit status that belongs to them.

A signal that arrives before or after the training loop ends the program at once, because nothing
would be lost. Inside the loop it is noted, and the Trainer leaves at the next place from which the
run resumes to the same bits. A second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Standing:
    """What this process knows of signals: whether they wait for a checkpoint, and which came."""

    deferred = False
    received: int | None = None


_standing = _Standing()


def exit_status(number: int) -> int:
    """Return the exit status of a program that a signal ended: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + number


def requested() -> int | None:
    """Return the signal that asked this process to stop, or None."""
    return _standing.received


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a first signal wait: the body looks at :func:`requested` and leaves by itself."""
    before, _standing.deferred = _standing.deferred, True
    try:
        yield
    finally:
        _standing.deferred = before


def stops_on_signals(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that SIGTERM and SIGINT end it as this module says.

    Outside the main thread, where Python takes no signals, it changes nothing.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        owner = os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:
                return  # a forked worker: the process that made it decides
            if _standing.received is not None:
                signal.signal(number, signal.SIG_DFL)
                os.kill(owner, number)
                return
            _standing.received = number
            name = signal.Signals(number).name
            if not _standing.deferred:
                print(f"stopped by {name}", file=sys.stderr, flush=True)
                raise SystemExit(exit_status(number))
            print(
                f"{name}: stopping after a checkpoint; a second signal ends at once",
                file=sys.stderr,
                flush=True,
            )

        _standing.received = None
        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            return function(*args, **kwargs)
        finally:
            _standing.received = None
            for number, handler in before.items():
                signal.signal(number, handler)

    return wrapped


def leave_signals_to_parent(initialise: Callable[[int], Any] | None, worker: int) -> None:
    """Start a DataLoader worker that ignores signals, then do what it would have done at its start.

    Ctrl-C and many schedulers reach every process of a run. A worker that died of it would take the
    step down with it, and with the step the checkpoint.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialise is not None:
        initialise(worker)
