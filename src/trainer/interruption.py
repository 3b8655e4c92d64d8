"""Signals while training: write a checkpoint, then end with the signal's exit status.

These are SIGTERM and SIGINT, what SLURM sends before a job's time is over (SIGUSR1, SIGUSR2 or
SIGXCPU), and SIGHUP of a lost terminal, unless it is ignored (nohup). Outside the training loop a
signal ends the program at once, because nothing would be lost. Inside the loop the first signal is
noted, and the Trainer leaves at the next place from which the run resumes to the same bits. A
second SIGTERM or SIGINT ends the process at once; schedulers repeat the others.
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
URGENT = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*URGENT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)


class LeaveNow(Exception):  # noqa: N818
    """A signal came: leave the step or the validation unfinished."""


class _Signals:
    """The signal this process received, and whether a checkpoint is to be written first."""

    deferred = False
    received: int | None = None
    urgent = False
    terminals: tuple[int, ...] = ()


def exit_status(number: int) -> int:
    """Return the exit status of a program that a signal ended: 128 and its number.

    SIGHUP 129, SIGINT 130, SIGUSR1 138, SIGUSR2 140, SIGTERM 143, SIGXCPU 152.
    """
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
    """Decorate a function so that signals end it as this module describes.

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
            if _Signals.urgent and number in URGENT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(owner, number)
                return
            _Signals.urgent |= number in URGENT
            if _Signals.received is not None:
                return
            _Signals.received = number
            name = signal.Signals(number).name
            if not _Signals.deferred:
                _tell(f"stopped by {name}", number)
                raise SystemExit(exit_status(number))
            wait = "; a second signal ends at once" if number in URGENT else ""
            _tell(f"{name}: stopping after a checkpoint{wait}", number)

        _Signals.received, _Signals.urgent = None, False
        _Signals.terminals = tuple(output for output in (1, 2) if os.isatty(output))
        before = {
            number: signal.signal(number, handle)
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            return function(*args, **kwargs)
        finally:
            _Signals.received, _Signals.urgent = None, False
            for number, handler in before.items():
                signal.signal(number, handler)

    return wrapped


def _tell(line: str, number: int) -> None:
    """Print a line on standard error; after SIGHUP write no more to a terminal, which is gone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    if number == signal.SIGHUP:
        sink = os.open(os.devnull, os.O_WRONLY)
        for output in _Signals.terminals:
            os.dup2(sink, output)
        os.close(sink)


def quiet_workers(loader: Any) -> Any:
    """Return a DataLoader whose workers ignore signals, but for SIGTERM of their own parent.

    Ctrl-C and many schedulers signal every process of a run. A worker that died of it would end
    the step, and the checkpoint could not be written. But at its exit a process ends the workers
    that are left by SIGTERM, and waits for them.
    """
    if getattr(loader, "num_workers", 0):
        loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
    return loader


def _end_with_parent() -> None:
    """Wait for a SIGTERM that the parent sent, and end this process."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def _start_worker(initialise: Callable[[int], Any] | None, worker: int) -> None:
    tells_senders = hasattr(signal, "sigwaitinfo")  # macOS does not
    for number in SIGNALS:
        if number != signal.SIGTERM or not tells_senders:
            signal.signal(number, signal.SIG_IGN)
    if tells_senders:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if initialise is not None:
        initialise(worker)
