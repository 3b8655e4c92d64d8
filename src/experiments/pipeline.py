"""Runs commands one after another, unattended, with one log and a short status file.

Files decide what is finished: a model by its run record, a results file by the arguments and the
weights that it names. The first stage that fails stops the pipeline, and the same pipeline started
again goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from src.common.cli import duration
from src.common.files import write_text
from src.common.privacy import known_secrets, publishable, without_secrets
from src.common.runs import FINISHED, locked, read_run, relative_paths
from src.common.settings import PUBLISHED_STUDENTS
from src.evaluation.results import lookup, read_results, with_interval
from src.publishing.comparison import threshold_cell

STATUS_FILE = "pipeline.status"
LOG_FILE = "pipeline.log"
NEW, REPLACE = "new", "replace"
TAIL_LINES = 12
"""Last lines of a stage that the status file shows."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
IGNORED = ("overwrite", "device", "cache_dir", "output", "per_protein")
"""Arguments of an evaluation that do not decide its numbers."""


def always() -> str:
    """Return the state of a stage that is run every time."""
    return NEW


@dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    Attributes:
        title: for the log and the status; unique.
        command: what is run.
        state: returns ``finished``, ``new``, ``resume`` or ``replace`` (the command gets
            ``--overwrite``); raises ``ValueError`` where the output holds something else.
        output: what the status names; None: the status shows the stage's last lines instead.
        optional: a failure is reported and does not stop the pipeline.
    """

    title: str
    command: tuple[str, ...]
    state: Callable[[], str] = always
    output: Path | None = None
    optional: bool = False


def shown_command(command: Sequence[str]) -> str:
    """Return a command as it may be logged: secrets masked, paths relative."""
    return shlex.join(relative_paths(without_secrets(command, known_secrets())))


def evaluation_state(
    path: Path, expected: Mapping[str, Any], student: str | Path, overwrite: bool = False
) -> str:
    """Return ``finished``, ``new`` or ``replace`` for the results file of an evaluation.

    ``expected`` are the arguments of scripts/evaluate.py as the file would record them; with
    ``overwrite`` results of another evaluation may be replaced.

    Raises:
        ValueError: the file is broken or of another evaluation, and may not be replaced.
    """
    if not path.exists():
        return NEW
    try:
        results = read_results(path)
        problem = _difference(results, expected, student)
    except ValueError as error:
        results, problem = {}, f"cannot be used ({error})"
    if problem is None:
        # The table of single proteins is written last: without it the evaluation was cut off.
        table = lookup(results, "run.arguments.per_protein")
        return REPLACE if table and not Path(expected["per_protein"]).exists() else FINISHED
    if overwrite:
        return REPLACE
    raise ValueError(f"{path} {problem}: move it away, or pass --overwrite to replace it")


def _difference(
    results: Mapping[str, Any], expected: Mapping[str, Any], student: str | Path
) -> str | None:
    """Return how results differ from the expected ones, or None."""
    published = str(student) in PUBLISHED_STUDENTS.values()
    # A local student is known by its weights, however its path is spelt.
    ignored = IGNORED if published else (*IGNORED, "student_model")
    # Results are written without private paths, so paths are compared without them.
    recorded = publishable(lookup(results, "run.arguments") or {})
    changed = [
        name
        for name, value in publishable(expected).items()
        if name not in ignored and name in recorded and recorded[name] != value
    ]
    if not recorded or changed:
        return f"is of another evaluation ({', '.join(changed) or 'of an older version'})"
    if published:
        return None
    if not Path(student).is_dir():
        return f"exists, but its model {student} does not"
    weights = lookup(read_run(student), "student.fingerprint")
    if weights != lookup(results, "run.student.fingerprint"):
        return f"is of other weights than {student} holds now"
    return None


class Pipeline:
    """Runs stages in order, and keeps their log and status in one folder."""

    def __init__(self, name: str, stages: Sequence[Stage], folder: Path) -> None:
        self.name, self.stages, self.folder = name, stages, folder
        self._reports = {stage.title: "waiting" for stage in stages}
        self._tails: dict[str, Sequence[str]] = {}
        self._child: subprocess.Popen | None = None
        self._signal: int | None = None
        self._secrets = known_secrets()
        self._log: BinaryIO

    def run(self, on_success: str | None = None) -> int:
        """Run what is not finished and, if all succeeded, the shell command ``on_success``.

        Returns:
            0; the exit status of the stage, or of ``on_success``, that failed; 128 plus the number
            of the signal that ended the pipeline.

        Raises:
            ValueError: an output holds something else; nothing was started then.
        """
        with (
            locked(self.folder, "--log_dir"),
            (self.folder / LOG_FILE).open("ab", buffering=0) as self._log,
            self._signals_forwarded(),
        ):
            for stage in self.stages:
                stage.state()
            status = 0
            for number, stage in enumerate(self.stages, start=1):
                status = self._run_stage(f"[{number}/{len(self.stages)}] {stage.title}", stage)
                if status or self._signal:
                    break
            outcome = "failed" if status else "success"
            if self._signal:
                outcome, status = "interrupted", 128 + self._signal
            self._write_status(outcome)
            self._say(f"\n{(self.folder / STATUS_FILE).read_text(encoding='utf-8').rstrip()}")
            if on_success and outcome == "success":
                self._say(f"== --on_success: {on_success}")
                status, _ = self._execute(on_success, shell=True)
                self._say(f"== --on_success: exit status {status}")
            return status

    def _run_stage(self, label: str, stage: Stage) -> int:
        """Run one stage unless it is finished; return its exit status, 0 if it is optional."""
        try:
            state = stage.state()  # again, because earlier stages may have changed it
        except ValueError as error:
            self._say(f"== {label}: {error}")
            self._report(stage, "failed", [str(error)])
            return 2
        if state == FINISHED:
            self._say(f"== {label}: finished before, {stage.output}")
            self._report(stage, "finished before")
            return 0
        command = [*stage.command, *(["--overwrite"] if state == REPLACE else [])]
        self._say(f"\n== {label}: started {_clock()}\n   {shown_command(command)}")
        self._report(stage, f"running since {_clock()}")
        started = time.monotonic()
        status, tail = self._execute(command)
        took = duration(time.monotonic() - started)
        if self._signal:
            report = f"interrupted after {took}"
        elif status and stage.optional:
            report, status = f"not made, and not needed: {' '.join(tail[-1:])}", 0
        elif status:
            report = f"failed after {took}, exit status {status}"
        else:
            report = f"finished after {took}"
        self._say(f"== {label}: {report}, {_clock()}")
        self._report(stage, report, tail if status or stage.output is None else ())
        return status

    def _execute(self, command: str | Sequence[str], shell: bool = False) -> tuple[int, list[str]]:
        """Run a command into the log; return its exit status and its last lines."""
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        with subprocess.Popen(
            command,
            shell=shell,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            # A session of its own: Ctrl-C in a terminal reaches it once, through this process.
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as self._child:
            if self._signal:
                self._child.send_signal(self._signal)
            assert self._child.stdout is not None
            for line in self._child.stdout:
                self._say(line.rstrip("\n"))
                if line.strip():
                    tail.append(without_secrets(line.rstrip(), self._secrets)[:300])
        status = self._child.returncode
        return (status if status >= 0 else 128 - status), list(tail)

    @contextlib.contextmanager
    def _signals_forwarded(self) -> Iterator[None]:
        """Pass signals that stop on to the running stage, and ignore SIGHUP, in the body."""

        def forward(number: int, frame: Any) -> None:
            self._signal = number
            if self._child is not None:
                self._child.send_signal(number)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say(self, text: str) -> None:
        """Write lines to the log and the terminal; a closed terminal or a full disk is ignored."""
        piece = without_secrets(f"{text}\n", self._secrets).encode(errors="replace")
        for write in (self._log.write, lambda data: os.write(1, data)):
            with contextlib.suppress(OSError):
                write(piece)

    def _report(self, stage: Stage, report: str, tail: Sequence[str] = ()) -> None:
        self._reports[stage.title], self._tails[stage.title] = report, tail
        self._write_status("running")

    def _write_status(self, outcome: str) -> None:
        lines = [f"{outcome.upper()}: pipeline {self.name}, {_clock()}, process {os.getpid()}", ""]
        for number, stage in enumerate(self.stages, start=1):
            report = self._reports[stage.title]
            line = f"{number:>3}  {stage.title:<28} {report}"
            if stage.output and report.startswith("finished"):
                evaluated = stage.output.suffix == ".json"
                line += f": {numbers_line(stage.output) if evaluated else stage.output}"
            lines += [line, *(f"       {last}" for last in self._tails.get(stage.title, ()))]
        lines += ["", f"log: {self.folder / LOG_FILE}"]
        if outcome != "success":
            lines.append("if that process has ended, the same command goes on where it stopped")
        text = without_secrets("\n".join(lines) + "\n", self._secrets)
        write_text(self.folder / STATUS_FILE, text)


def numbers_line(path: Path) -> str:
    """Return the main numbers of a results file in a line."""
    try:
        results = read_results(path)
    except ValueError as error:
        return str(error)
    names = {"ratio": "perplexity_ratio", "KL": "kl_divergence", "ECE": "student_ece.ece"}
    parts = [
        f"{label} {with_interval(results, name)}"
        for label, name in names.items()
        if lookup(results, name) is not None
    ]
    return ", ".join([*parts, f"threshold {threshold_cell(results)}"])


def _clock() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
