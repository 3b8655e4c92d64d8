"""SIGTERM and SIGINT while training: write a checkpoint, then end with the signal's exit status.

Outside the training loop a signal ends the program at once, because nothing would be lost. Inside
the loop the first signal is noted, and the Trainer leaves at the next place from which the run
resumes to the same bits. A second signal ends the process at once.
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


class LeaveNow(Exception):  # noqa: N818
    """A signal came: leave the step or the validation unfinished."""


class _Signals:
    """The signal this process received, and whether a checkpoint is to be written first."""

    deferred = False
    received: int | None = None


def exit_status(number: int) -> int:
    """Return the exit status of a program that a signal ended: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + number


def requested() -> int | None:
    """Return the signal that asked this process to stop, or None."""
    return _Signals.received


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a first signal wait: the body checks :func:`requested` and leaves by itself."""
    before, _Signals.deferred = _Signals.deferred, True
    try:
        yield
    finally:
        _Signals.deferred = before


def stops_on_signals(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that SIGTERM and SIGINT end it as this module describes.

    Outside the main thread, where Python handles no signals, the function is not changed.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        owner = os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:
                return  # a forked worker: its parent decides
            if _Signals.received is not None:
                signal.signal(number, signal.SIG_DFL)
                os.kill(owner, number)
                return
            _Signals.received = number
            name = signal.Signals(number).name
            if not _Signals.deferred:
                print(f"stopped by {name}", file=sys.stderr, flush=True)
                raise SystemExit(exit_status(number))
            line = f"{name}: stopping after a checkpoint; a second signal ends at once"
            print(line, file=sys.stderr, flush=True)

        _Signals.received = None
        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            return function(*args, **kwargs)
        finally:
            _Signals.received = None
            for number, handler in before.items():
                signal.signal(number, handler)

    return wrapped


def quiet_workers(loader: Any) -> Any:
    """Return a DataLoader whose workers ignore signals.

    Ctrl-C and many schedulers signal every process of a run. A worker that died of it would end
    the step, and the checkpoint could not be written.
    """
    if getattr(loader, "num_workers", 0):
        loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
    return loader


def _start_worker(initialise: Callable[[int], Any] | None, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialise is not None:
        initialise(worker)
