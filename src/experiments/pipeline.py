"""Runs trainings and evaluations one after another, unattended, and goes on where it stopped.

What stands on disk decides what is finished: a model directory by its own record, a results file
by the arguments and the model that it names. The state file beside the log only remembers times
and what was running. Stages are processes of their own; one that fails stops the pipeline.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.common.cli import duration
from src.common.files import read_json, write_json, write_text
from src.common.privacy import known_secrets, publishable, without_secrets
from src.common.runs import FINISHED, claim_folder, locked, provenance, read_run, relative_paths
from src.common.settings import (
    PRESETS,
    PUBLISHED_STUDENTS,
    TrainSettings,
    as_recorded,
    default_run_name,
)
from src.evaluation.results import lookup, read_results, with_interval
from src.proteins.sources import has_split
from src.publishing import comparison

ROOT = Path(__file__).resolve().parents[2]
STATE_FILE = "pipeline.json"
STATUS_FILE = "pipeline.status"
LOG_FILE = "pipeline.log"
SCHEMA_VERSION = 1
REPLACE = "replace"
"""Standing of a stage whose output is there but is to be made again."""
ORPHAN_SECONDS = 90
"""How long a new start waits for a stage that an earlier, killed start left running."""
TAIL_LINES = 12
"""Last lines of a failed stage that the status file shows."""
SYNERGY = ("hf-tiny", "hf-small", "hf-medium")
BASELINES = ("xs", "tiny", "small", "medium")
SWEEPS = {
    "temperature": (1.0, 2.0, 4.0, 6.0, 8.0, 10.0),
    "alpha": (0.1, 0.3, 0.5, 0.7, 0.9),
}
ENHANCEMENTS = {
    "both": ("--use_uncertainty_weighting", "--use_calibration_smoothing"),
    "uncertainty": ("--use_uncertainty_weighting",),
    "calibration": ("--use_calibration_smoothing",),
    "none": (),
}
CHOSEN_BY = "student_perplexity_per_residue"
"""What a sweep is judged by. The loss itself depends on T and alpha, so that its values cannot be
compared between runs; perplexity on validation proteins is measured at T = 1 for all of them."""
BESIDE_THE_POINT = ("overwrite", "device", "cache_dir", "output", "per_protein")
"""Arguments of an evaluation that do not decide its figures. Nor does how a local student's path
is spelt: its weights do."""


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        title: for banners; unique.
        command: the process, without what resuming or replacing adds.
        standing: tells ``finished``, ``new``, ``resume`` or ``replace`` by what stands on disk;
            raises ``ValueError`` where something else is in the way.
        output: what it makes.
        results: the results file that it makes, if it is an evaluation.
        optional: its failure is told and does not stop the pipeline.
    """

    title: str
    command: tuple[str, ...]
    standing: Callable[[], str]
    output: Path
    results: Path | None = None
    optional: bool = False


@dataclass(frozen=True)
class Parsers:
    """How the two scripts read their arguments: settings of a training, arguments of a result."""

    train: Callable[[Sequence[str]], TrainSettings]
    evaluate: Callable[[Sequence[str]], dict[str, Any]]


@dataclass
class Plan:
    """Stages in their order, and what is said when all are done."""

    name: str
    stages: list[Stage]
    conclude: Callable[[], list[str]] = field(default=list)


# Stages


def script_command(script: str, arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the command of one of our scripts under this interpreter."""
    return (sys.executable, str(ROOT / "scripts" / script), *arguments)


def shown_command(command: Sequence[str]) -> list[str]:
    """Return a command as a log may hold it: secrets masked, paths relative."""
    return relative_paths(without_secrets(command, known_secrets()))


def train_stage(
    title: str,
    arguments: Sequence[str],
    output: Path,
    parsers: Parsers,
    flag: str = "--name or --models_dir",
) -> Stage:
    """Return a training; ``--resume`` goes on with what an earlier start left.

    Args:
        title: for banners.
        arguments: of scripts/train.py, without the output.
        output: the model's directory.
        parsers: of the scripts.
        flag: with which the user chooses another directory, for messages.
    """
    arguments = [*arguments, "--output_dir", str(output)]
    settings = as_recorded(parsers.train(arguments))
    return Stage(
        title,
        script_command("train.py", [*arguments, "--resume"]),
        lambda: claim_folder(output, settings, resume=True, flag=flag),
        output,
    )


def evaluate_stage(
    title: str,
    student: str | Path,
    arguments: Sequence[str],
    output: Path,
    parsers: Parsers,
    overwrite: bool = False,
    optional: bool = False,
) -> Stage:
    """Return an evaluation, with its table of single proteins beside it.

    Args:
        title: for banners.
        student: a directory of ours, or a hub id.
        arguments: of scripts/evaluate.py, without the student and the output.
        output: the results file.
        parsers: of the scripts.
        overwrite: replace results that are of something else.
        optional: may fail.
    """
    arguments = ["--student_model", str(student), *arguments, "--output", str(output)]
    arguments += ["--per_protein", str(output.with_suffix(".parquet"))]
    expected = parsers.evaluate(arguments)
    return Stage(
        title,
        script_command("evaluate.py", arguments),
        lambda: results_standing(output, expected, student, overwrite),
        output,
        output,
        optional,
    )


def results_standing(
    path: Path, expected: Mapping[str, Any], student: str | Path, overwrite: bool = False
) -> str:
    """Return whether a results file is the wanted one: ``finished``, ``new`` or ``replace``.

    Args:
        path: the file.
        expected: arguments of the evaluation as the file would record them.
        student: the model's directory, whose record names its weights, or a hub id.
        overwrite: whether files of another evaluation may be replaced.

    Raises:
        ValueError: the file is of another evaluation, or broken, and may not be replaced.
    """
    table = Path(expected["per_protein"])
    if not path.exists():
        if not table.exists():
            return "new"
        problem = f"is not there, but {table} is"
    else:
        try:
            results = read_results(path)
            problem = _other_evaluation(results, expected, student)
            if problem is None:
                # A kill between the two files leaves the first alone: it is made again.
                half = lookup(results, "run.arguments.per_protein") and not table.exists()
                return REPLACE if half else FINISHED
        except ValueError:
            if not overwrite:
                raise
            problem = "is broken"
    if overwrite:
        return REPLACE
    raise ValueError(f"{path} {problem}: move it away, or pass --overwrite to replace it")


def _other_evaluation(
    results: Mapping[str, Any], expected: Mapping[str, Any], student: str | Path
) -> str | None:
    """Return how results differ from the wanted ones, or None."""
    published = str(student) in PUBLISHED_STUDENTS.values()
    ignored = BESIDE_THE_POINT if published else (*BESIDE_THE_POINT, "student_model")
    recorded = lookup(results, "run.arguments") or {}
    # As the file holds them; one written by an older version was not cleaned as much.
    wanted, found = publishable(expected), publishable(recorded)
    changed = [
        name
        for name, value in wanted.items()
        if name not in ignored and name in found and found[name] != value
    ]
    if not recorded or changed:
        return f"is of another evaluation ({', '.join(changed) or 'of an older version'})"
    if published:
        return None
    if not Path(student).is_dir():
        return f"is there, but its model {student} is not"
    if lookup(read_run(student), "student.fingerprint") != lookup(
        results, "run.student.fingerprint"
    ):
        return f"is of other weights than {student} holds now"
    return None


# Plans


@dataclass(frozen=True)
class Choices:
    """What the user chose for a whole pipeline; argument lists are those of the two scripts."""

    train: Sequence[str] = ()
    evaluate: Sequence[str] = ()
    models: Path = Path("models")
    results: Path = Path("results")
    overwrite: bool = False


def presets_plan(
    name: str,
    presets: Sequence[str],
    enhancements: str,
    choices: Choices,
    parsers: Parsers,
    references: bool = False,
) -> Plan:
    """Train and evaluate presets in order, then the published students if asked.

    Args:
        name: of the plan, in ``models/NAME-tiny`` and ``results/eval_NAME_tiny.json``.
        presets: names in ``src.common.settings``.
        enhancements: a key of ``ENHANCEMENTS``.
        choices: of the user.
        parsers: of the scripts.
        references: evaluate the published students of the same shapes as well; needs the hub.

    Raises:
        ValueError: two presets would have one name, or an argument is wrong.
    """
    unknown = [preset for preset in presets if preset not in PRESETS]
    if unknown:
        raise ValueError(f"--presets {unknown[0]}: choose among {', '.join(sorted(PRESETS))}")
    sizes = [preset.removeprefix("hf-") for preset in presets]
    if len(set(sizes)) < len(sizes):
        raise ValueError("--presets: two of them would be written to the same directory")
    stages, pairs = [], []
    for preset, size in zip(presets, sizes, strict=True):
        model = choices.models / f"{name}-{size}"
        output = choices.results / f"eval_{name}_{size}.json"
        arguments = [*choices.train, "--preset", preset, *ENHANCEMENTS[enhancements]]
        stages += [
            train_stage(f"train {preset}", arguments, model, parsers),
            evaluate_stage(
                f"evaluate {preset}", model, choices.evaluate, output, parsers, choices.overwrite
            ),
        ]
        pairs.append((output, preset))
    judged = []
    if references:
        missing = [preset for preset in presets if preset not in PUBLISHED_STUDENTS]
        if missing:
            raise ValueError(f"--references: no published student has the shape of {missing[0]}")
        settings = parsers.train(choices.train)
        same = ["--data", settings.data, "--teacher_model", settings.teacher_model]
        for (output, preset), size in zip(pairs, sizes, strict=True):
            reference = choices.results / f"eval_hf_{size}_old.json"
            stages.append(
                evaluate_stage(
                    f"evaluate the published {size}",
                    PUBLISHED_STUDENTS[preset],
                    [*same, *choices.evaluate],
                    reference,
                    parsers,
                    choices.overwrite,
                    optional=True,
                )
            )
            judged.append((output, reference))
    return Plan(name, stages, lambda: _judgements(judged))


def _judgements(pairs: Sequence[tuple[Path, Path]]) -> list[str]:
    """Return the verdict of each student against its reference, or why there is none."""
    lines = []
    for candidate, reference in pairs:
        entries, notes = comparison.read_entries([candidate, reference])
        verdicts, problem = comparison.judge_all(entries, reference)
        for verdict in verdicts:
            first, *rest = comparison.verdict_lines(verdict)
            lines += [first, *(f"  {line}" for line in rest)]
        lines += notes or ([problem] if problem else [])
    return lines


def sweep_plan(
    parameter: str,
    values: Sequence[float],
    preset: str,
    enhancements: str,
    choices: Choices,
    parsers: Parsers,
) -> Plan:
    """Train a preset at each value, evaluate on validation proteins, and choose the best.

    Models have the default names of scripts/train.py, so that a loop over scripts/train.py and a
    sweep make, and find, the same directories.

    Raises:
        ValueError: the data has no validation part, or an argument is wrong.
    """
    source = parsers.train(choices.train).data
    # A hub data set is asked for its parts by the evaluation: here there may be no network.
    if Path(source).exists() and not has_split(source, "validation"):
        raise ValueError(
            f"--data {source} has no validation part, which a sweep is judged on: divide it with "
            "scripts/split_data.py"
        )
    if len(set(values)) < len(values):
        raise ValueError("--values: the same value twice")
    stages, outputs = [], {}
    for number in values:
        value = str(number)  # as in the names of runs
        arguments = [*choices.train, "--preset", preset, *ENHANCEMENTS[enhancements]]
        arguments += [f"--{parameter}", value]
        model = choices.models / default_run_name(parsers.train(arguments))
        output = choices.results / f"sweep_{parameter}_{value}.json"
        evaluate = [*choices.evaluate, "--split", "validation"]
        stages += [
            train_stage(
                f"train {preset} at {parameter} {value}", arguments, model, parsers, "--models_dir"
            ),
            evaluate_stage(
                f"evaluate {parameter} {value}", model, evaluate, output, parsers, choices.overwrite
            ),
        ]
        outputs[value] = output
    summary = choices.results / f"sweep_{parameter}.json"
    return Plan(f"sweep-{parameter}", stages, lambda: conclude_sweep(parameter, outputs, summary))


def conclude_sweep(parameter: str, outputs: Mapping[str, Path], summary: Path) -> list[str]:
    """Choose the value with the lowest validation perplexity, and say how sure that is.

    Args:
        parameter: ``temperature`` or ``alpha``.
        outputs: results file of each value.
        summary: file that is written with the choice; made from the others, so always replaced.

    Returns:
        Lines for a person.

    Raises:
        ValueError: a file was not measured on validation proteins, or lacks the figure.
    """
    found = {value: read_results(path) for value, path in outputs.items()}
    for value, results in found.items():
        if lookup(results, "run.data.split") != "validation":
            raise ValueError(f"{outputs[value]}: not measured on validation proteins")
        if lookup(results, CHOSEN_BY) is None:
            raise ValueError(f"{outputs[value]}: {CHOSEN_BY} is missing")
    best = min(found, key=lambda value: lookup(found[value], CHOSEN_BY))
    entries, _ = comparison.read_entries(list(outputs.values()))
    verdicts, _ = comparison.judge_all(entries, outputs[best])
    by_name = {verdict.candidate: verdict for verdict in verdicts}
    rows, lines = [], [f"{parameter}: validation perplexity per residue, and KL at T = 1"]
    close = []
    for (value, results), entry in zip(found.items(), entries, strict=True):
        verdict = by_name.get(entry.name)
        outcome = verdict.differences["perplexity"].outcome if verdict else "best"
        if outcome in ("unclear", "unknown", "equivalent"):
            close.append(value)
        lines.append(
            f"  {value:>5}  {with_interval(results, CHOSEN_BY)}  KL "
            f"{with_interval(results, 'kl_divergence')}  {outcome}"
        )
        rows.append(
            {
                parameter: float(value),
                CHOSEN_BY: lookup(results, CHOSEN_BY),
                "kl_divergence": lookup(results, "kl_divergence"),
                "against_best": outcome,
                "results": outputs[value].name,
            }
        )
    lines.append(f"best on validation: {parameter} {best}")
    lines.append("  one training seed each; each is compared with the best at 95 %, not corrected")
    if close:
        lines.append(f"not shown to be worse, or within the margin: {', '.join(close)}")
    lowest_kl = min(found, key=lambda value: lookup(found[value], "kl_divergence"))
    if lowest_kl != best:
        lines.append(f"the KL divergence is lowest at {parameter} {lowest_kl}")
    record = {
        "sweep": parameter,
        "best": float(best),
        "chosen_by": CHOSEN_BY,
        "split": "validation",
        "not_shown_to_be_worse": [float(value) for value in close],
        "runs": rows,
        "run": provenance(),
    }
    write_json(summary, record)
    return [*lines, f"written: {summary}"]


# Running


class Tee:
    """Writes to the log and to the terminal; neither a closed terminal nor a full disk stops it.

    Secrets are masked in whatever passes.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.log = path.open("ab", buffering=0)
        self.terminal = True
        self.known = known_secrets()

    def masked(self, piece: bytes) -> bytes:
        """Return bytes without secrets; those that are no text stay as they are."""
        text = without_secrets(piece.decode(errors="surrogateescape"), self.known)
        return text.encode(errors="surrogateescape")

    def write(self, piece: bytes) -> None:
        """Write bytes to both; a line that may hold a secret is given whole."""
        piece = self.masked(piece)
        with contextlib.suppress(OSError):
            self.log.write(piece)
        if not self.terminal:
            return
        try:
            sys.stdout.write(piece.decode(errors="replace"))
            sys.stdout.flush()
        except (OSError, ValueError):
            self.terminal = False
            # What is still buffered must go somewhere, or Python fails when it ends.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def say(self, line: str = "") -> None:
        """Write one line."""
        self.write(f"{line}\n".encode())

    def close(self) -> None:
        """Close the log."""
        self.log.close()


class Interruption:
    """Passes SIGINT and SIGTERM on to the stage that runs, and ignores SIGHUP meanwhile.

    A second signal ends the stage at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.process: subprocess.Popen | None = None

    def _handle(self, signum: int, frame: Any) -> None:
        again, self.received = self.received is not None, signum
        if self.process is not None:
            signal_group(self.process.pid, signal.SIGKILL if again else signum)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals while the body runs, then as before."""
        wanted = {signal.SIGINT: self._handle, signal.SIGTERM: self._handle}
        before = {signum: signal.signal(signum, handler) for signum, handler in wanted.items()}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def signal_group(pid: int, signum: int) -> None:
    """Signal a process that leads a group, and all of that group; nothing where it has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def _die_with_parent() -> Callable[[], None] | None:
    """Return what makes a child receive SIGTERM when this process is killed (Linux alone)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_parent_death_signal = 1
    return lambda: prctl(set_parent_death_signal, signal.SIGTERM)


def process_started(pid: int) -> str | None:
    """Return when a process started, in the system's own units; None where it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


class Runner:
    """Runs a plan: keeps its state, its log and the short status file, all in one folder."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.state: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "stages": {}}
        self.interruption = Interruption()
        self.notes: list[str] = []
        self.started = time.time()

    def run(self, on_success: str | None = None, on_exit: str | None = None) -> int:
        """Run what is not finished.

        Args:
            on_success: shell command after all stages succeeded.
            on_exit: shell command after success or failure, but not after a signal.

        Returns:
            0; the status of the stage (or of ``on_success``) that failed; 128 plus the signal that
            ended the pipeline.

        Raises:
            ValueError: something stands in the way; nothing was started then, no command either.
        """
        with locked(self.folder, "--log_dir"), self.interruption.installed():
            self._read_state()
            self.tee = Tee(self.folder / LOG_FILE)
            try:
                self._wait_for_orphan()
                standings = [stage.standing() for stage in self.plan.stages]
                return self._run(standings, on_success, on_exit)
            finally:
                self.tee.close()

    def _run(self, standings: Sequence[str], on_success: str | None, on_exit: str | None) -> int:
        stages = self.plan.stages
        done = sum(standing == FINISHED for standing in standings)
        self.tee.say(
            f"pipeline {self.plan.name}: {len(stages)} stages, {done} finished before; "
            f"log {self.folder / LOG_FILE}"
        )
        status = 0
        for number, stage in enumerate(stages, start=1):
            status = self._stage(number, stage)
            if status or self.interruption.received:
                break
        if not status and not self.interruption.received:
            try:
                self.notes += self.plan.conclude()
            except ValueError as error:
                self.notes.append(f"no conclusion: {error}")
                status = 1
        outcome = "failed" if status else "success"
        if self.interruption.received:
            status = 128 + self.interruption.received
            outcome = "interrupted"
        self._write_status(outcome)
        self.tee.say()
        self.tee.say((self.folder / STATUS_FILE).read_text().rstrip())
        if on_success and outcome == "success":
            status = self._command("--on_success", on_success, outcome)
        if on_exit and outcome != "interrupted":
            status = self._command("--on_exit", on_exit, outcome) or status
        return status

    def _stage(self, number: int, stage: Stage) -> int:
        """Run one stage unless it is finished; return its status, 0 where it may fail."""
        label = f"[{number}/{len(self.plan.stages)}] {stage.title}"
        record = self.state["stages"].setdefault(stage.title, {"starts": 0, "seconds": 0.0})
        # Asked again, because the stages before may have changed what it depends on.
        try:
            standing = stage.standing()
        except ValueError as error:
            self.tee.say(f"== {label}: {error}")
            record.update(status="failed", exit_status=2, tail=[str(error)])
            self._write_state()
            return 2
        if standing == FINISHED:
            self.tee.say(f"== {label}: finished before, {stage.output}")
            record["status"] = FINISHED
            self._write_state()
            return 0
        command = [*stage.command, *(["--overwrite"] if standing == REPLACE else [])]
        shown = shown_command(command)
        self.tee.say()
        self.tee.say(f"== {label}: started {_clock()}")
        self.tee.say(f"   {shlex.join(shown)}")
        record.update(status="running", command=shown, started=_clock(), ended=None, pid=None)
        record["starts"] += 1
        self._write_state()
        began = time.monotonic()
        status, tail = self._process(command, record)
        record["seconds"] = round(record["seconds"] + time.monotonic() - began, 1)
        record.update(ended=_clock(), exit_status=status, pid=None, tail=[])
        took = duration(time.monotonic() - began)
        if status == 0 and not self.interruption.received:
            problem = _not_made(stage)
            if problem:
                status, tail = 1, [*tail, problem]
                record["exit_status"] = status
        if status == 0 and not self.interruption.received:
            record["status"] = FINISHED
            self.tee.say(f"== {label}: finished {_clock()} after {took}")
        elif stage.optional and not self.interruption.received:
            record.update(status="not made", tail=tail[-1:])
            self.tee.say(f"== {label}: not made, and not needed: {' '.join(tail[-1:])}")
            status = 0
        else:
            interrupted = self.interruption.received is not None
            record.update(status="interrupted" if interrupted else "failed", tail=tail)
            how = f"exit status {status}"
            self.tee.say(f"== {label}: {record['status']} {_clock()} after {took}, {how}")
            status = status or 1
        self._write_state()
        return status

    def _process(self, command: Sequence[str], record: dict[str, Any]) -> tuple[int, list[str]]:
        """Run a command into the log; return its status and its last lines."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A session of its own: what a terminal sends reaches it through us alone.
            start_new_session=True,
            preexec_fn=_die_with_parent(),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.interruption.process = process
        if self.interruption.received:
            signal_group(process.pid, self.interruption.received)
        record.update(pid=process.pid, pid_started=process_started(process.pid))
        self._write_state()
        self._write_status("running")
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        unfinished = waiting = b""
        assert process.stdout is not None
        source = process.stdout.fileno()
        while True:
            ready, _, _ = select.select([source], [], [], 1.0)
            if ready:
                piece = os.read(source, 1 << 16)
                if not piece:
                    break
                *whole, unfinished = (unfinished + piece).split(b"\n")
                tail.extend(self._last_words(line) for line in whole if line.strip())
                # What has no end yet waits for it: a secret may be cut in two there.
                waiting += piece
                end = max(waiting.rfind(b"\n"), waiting.rfind(b"\r")) + 1
                self.tee.write(waiting[:end])
                waiting = waiting[end:]
            elif process.poll() is not None:
                break  # a process that it left behind holds the pipe open
        status = process.wait()
        self.interruption.process = None
        signal_group(process.pid, signal.SIGKILL)
        process.stdout.close()
        self.tee.write(waiting)
        if unfinished.strip():
            tail.append(self._last_words(unfinished))
            self.tee.say()
        return (status if status >= 0 else 128 - status), list(tail)

    def _last_words(self, line: bytes) -> str:
        """Return the last state of a line of a terminal, masked and then shortened."""
        return self.tee.masked(line).decode(errors="replace").rstrip().rpartition("\r")[2][:300]

    def _command(self, flag: str, command: str, outcome: str) -> int:
        """Run what the user wants done at the end; return its status."""
        self.tee.say(f"== {flag}: {command}")
        environment = {"PIPELINE_OUTCOME": outcome, "PIPELINE_STATUS_FILE": str(self._status_path)}
        done = subprocess.run(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            check=False,
        )
        self.tee.write(done.stdout)
        if done.returncode:
            self.notes.append(f"{flag} {command}: exit status {done.returncode}")
            self._write_status(outcome)
            self.tee.say(self.notes[-1])
        return done.returncode if done.returncode >= 0 else 128 - done.returncode

    # State and status

    @property
    def _status_path(self) -> Path:
        return self.folder / STATUS_FILE

    def _read_state(self) -> None:
        path = self.folder / STATE_FILE
        if path.exists():
            state = read_json(path)
            stages = state.get("stages") if isinstance(state, dict) else None
            if not isinstance(stages, dict) or state.get("schema_version") != SCHEMA_VERSION:
                raise ValueError(f"{path}: not the state of a pipeline: move it away")
            self.state = state

    def _write_state(self) -> None:
        write_json(self.folder / STATE_FILE, without_secrets(self.state, self.tee.known))

    def _wait_for_orphan(self) -> None:
        """Wait until a stage that a killed start left behind has ended."""
        for title, record in self.state["stages"].items():
            pid, started = record.get("pid"), record.get("pid_started")
            if not pid or started is None:
                continue
            told, deadline = False, time.monotonic() + ORPHAN_SECONDS
            while process_started(pid) == started:
                if not told:
                    self.tee.say(f"waiting for process {pid} of an earlier start ({title})")
                    told = True
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"process {pid} of an earlier start ({title}) still runs: "
                        "end it, then start again"
                    )
                time.sleep(0.5)

    def _write_status(self, outcome: str) -> None:
        text = "\n".join(self.status_lines(outcome)) + "\n"
        write_text(self._status_path, without_secrets(text, self.tee.known))

    def status_lines(self, outcome: str) -> list[str]:
        """Return what happened, for a glance: the outcome, a line a stage, and what to do next."""
        stages, records = self.plan.stages, self.state["stages"]
        lines = []
        failed = None
        for number, stage in enumerate(stages, start=1):
            record = records.get(stage.title, {})
            state = record.get("status", "waiting")
            took = duration(record["seconds"]) if record.get("seconds") else ""
            what = str(stage.output)
            if state == FINISHED and stage.results:
                what = figures_line(stage.results)
            elif state == "not made":
                what = " ".join(record.get("tail", []))
            elif state == "running":
                took, what = "", f"since {record['started']}, process {record.get('pid')}"
            if state in ("failed", "interrupted"):
                failed = failed or (number, stage, record)
            lines.append(f"{number:>3}  {stage.title:<28} {state:<11} {took:<13} {what}".rstrip())
        head = f"{outcome.upper()}: pipeline {self.plan.name}, {_clock()}"
        if failed:
            number, stage, record = failed
            head += f", stage {number} of {len(stages)} ({stage.title}), exit status "
            head += str(record.get("exit_status"))
            lines += ["", "its last lines:", *(f"    {line}" for line in record.get("tail", []))]
        if self.notes:
            lines += ["", *self.notes]
        after = {
            "running": f"RUNNING with process {os.getpid()} gone: it was killed; the same command "
            "goes on where it was",
            "success": "",
        }.get(outcome, "the same command goes on where it stopped")
        tail = [f"log: {self.folder / LOG_FILE}", *([after] if after else [])]
        return [head, "", *lines, "", *tail]


def _not_made(stage: Stage) -> str | None:
    """Return what is wrong with the output of a process that reported success, or None."""
    try:
        standing = stage.standing()
    except ValueError as error:
        return str(error)
    return None if standing == FINISHED else f"it reported success, but {stage.output} is not made"


def figures_line(path: Path) -> str:
    """Return the main figures of a results file in a line."""
    try:
        results = read_results(path)
    except ValueError as error:
        return str(error)
    parts = [
        f"{label} {with_interval(results, name)}"
        for label, name in (
            ("ratio", "perplexity_ratio"),
            ("KL", "kl_divergence"),
            ("ECE", "student_ece.ece"),
        )
        if lookup(results, name) is not None
    ]
    return ", ".join([*parts, f"threshold {comparison.threshold_cell(results)}"])


def _clock() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
