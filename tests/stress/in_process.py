"""Run a script in this process, to its end or to a signal within its training."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def stopped_at(step: int | None) -> Iterator[None]:
    """Send this process SIGTERM when a training has made so many steps; None: never."""
    from transformers import TrainerCallback, trainer

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    callbacks.append(Stop)
    try:
        yield
    finally:
        callbacks.remove(Stop)


def run_main(
    main: Callable[[list[str]], int], arguments: Sequence[str], stop_at: int | None = None
) -> None:
    """Run a script's ``main``, and stop it after a step.

    Raises:
        RuntimeError: it ends with another exit status than expected; the message has its output.
    """
    output = io.StringIO()
    with (
        stopped_at(stop_at),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            status: Any = main(list(arguments))
        except SystemExit as ended:
            status = ended.code or 0
    if status != (128 + signal.SIGTERM if stop_at else 0):
        words = " ".join(arguments)
        raise RuntimeError(f"exit status {status} of {words}\n{output.getvalue()[-2000:]}")
