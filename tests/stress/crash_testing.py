"""Kills and stops runs of the scripts, resumes them, and compares what they leave, bit by bit.

A run is ended early at random moments and at named points of its saves (:mod:`src.common.crash_points`),
some times over, resumed each time, and at last left to finish. Then all that it leaves, apart from
times, must equal what an undisturbed run leaves.

PyTorch is imported once; each run is a process forked from that, because importing takes longer
than a run. One undisturbed run is started afresh, as a user would, and must equal the forked one.
So whoever uses this module sets ``OMP_NUM_THREADS=1`` before PyTorch is imported: forked processes
are whole, and sums have one order.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.common.cli import say
from src.common.crash_points import VARIABLE
from src.common.files import read_json, write_json
from src.common.settings import StudentSettings, TrainSettings
from src.experiments.grids import ARMS, GRIDS, Grid
from src.trainer.checkpoints import checkpoints_of

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("runtime", "per_second", "data_wait_share")
"""Parts of the names of records that measure time, which no two runs share."""
MOST_ENDINGS = 12
"""Times that one run is killed or stopped, at most."""
STOPPED = {128 + number: number for number in (signal.SIGTERM, signal.SIGINT)}
"""Exit statuses of runs that were asked to stop, and the signals that ask."""
STOP_SECONDS = 30.0
"""Seconds in which a run that is asked to stop has to write its checkpoint and leave."""
PATIENCE = 300.0
"""Seconds after which a run that neither ended nor was killed counts as hanging."""


# What is killed -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """Something that must survive being killed.

    Attributes:
        script: the module whose ``main`` is run.
        arguments: its arguments; ``{work}`` is the common inputs, ``{out}`` the directory written.
        outcome: reads that directory into named byte strings, which must be the same for all runs.
        points: crash points that it passes.
        resume: arguments added after a kill; a grid goes on when the same command is given.
    """

    script: str
    arguments: str
    outcome: Callable[[Path], dict[str, bytes]]
    points: tuple[str, ...]
    resume: str = "--resume"


def outcome_of_training(folder: Path) -> dict[str, bytes]:
    """Return what a finished training leaves, without times: weights, optimiser, states, log."""
    found = {}
    for path in [*folder.iterdir(), *checkpoints_of(folder)[0].iterdir()]:
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in (".lock", "manifest.json"):
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            data = _json([_timeless(json.loads(line)) for line in data.decode().splitlines()])
        elif path.name == "trainer_state.json":
            data = _json(_timeless(json.loads(data)))
        elif path.name == "training_state.json":
            state = json.loads(data)
            for name in ("seconds", "waited"):
                state["trainer"]["tally"].pop(name)
            data = _json(state)
        elif path.name == "run.json":
            run = json.loads(data)
            data = _json({k: _timeless(run[k]) for k in ("status", "settings", "student", "final")})
        found[name] = data
    return found


def outcome_with_cache(folder: Path) -> dict[str, bytes]:
    """Return what a training leaves that keeps its teacher's hidden states beside it."""
    kept = [path for path in (folder.parent / "teacher").rglob("*") if path.is_file()]
    cache = {str(path.relative_to(folder.parent)): path.read_bytes() for path in kept}
    cache = {name: data for name, data in cache.items() if not name.endswith(".lock")}
    return outcome_of_training(folder) | cache


def outcome_of_grid(folder: Path) -> dict[str, bytes]:
    """Return what a finished grid leaves: results, tables, and each group's last checkpoint."""
    import pyarrow.parquet as pq

    found = {}
    for path in (folder / "results").iterdir():
        if path.suffix == ".parquet":
            # Its rows: which of them were written at once decides how the file is cut.
            value = pq.read_table(path).to_pydict()
        else:
            value = json.loads(path.read_text())
            value["training"].pop("seconds")
            value.pop("performance")  # how long it took, in how much memory
            value["run"] = {name: value["run"][name] for name in ("student", "teacher", "data")}
        found[f"results/{path.name}"] = _json(_timeless(value))
    for group in (folder / "work").glob("*/group.json"):
        inner = outcome_of_training(group.parent)
        found |= {f"{group.parent.name}/{name}": data for name, data in inner.items()}
    return found


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=0).encode()


def _timeless(value: Any) -> Any:
    """Return JSON values without the entries that measure time."""
    if isinstance(value, dict):
        items = value.items()
        return {k: _timeless(v) for k, v in items if not any(part in k for part in TIMES)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


CHECKPOINT_POINTS = (
    "checkpoint:begin",
    "checkpoint:after_weights",
    "checkpoint:after_optimizer",
    "checkpoint:before_manifest",
    "write:manifest.json",
    "checkpoint:after_manifest",
    "checkpoint:after_rename",
    "checkpoint:after_pruning",
)
TRAINING_POINTS = (*CHECKPOINT_POINTS, "write:run.json", "model:written", "model:moved")
CACHE_POINTS = ("write:shard-00000.json",)
TRAINING = (
    "--teacher_model {work}/teacher --data {work}/proteins.fasta --cache_dir {work}/cache "
    "--output_dir {out} --train_size_prop 1.0 --validation_proteins 8 --max_length 64 "
    "--n_layer 1 --n_head 2 --n_embd 16 --dropout 0.1 --use_uncertainty_weighting "
    "--use_calibration_smoothing --batch_size 2 --gradient_accumulation_steps 2 "
    "--eval_steps 15 --save_steps 4 --device cpu --skip_teacher_check "
)
GRID = Grid(
    "crash-test",
    "two students of three arms each, to be killed",
    {name: ARMS[name] for name in ("baseline", "both", "both_controlled")},
    {"s": StudentSettings(1, 2, 16, dropout=0.1)},
    (1, 2),
    split="test",
    shared=TrainSettings(
        train_size_prop=1.0,
        batch_size=2,
        max_length=64,
        precision="fp32",
        eval_steps=8,
        save_steps=4,
        validation_proteins=8,
        cached_teacher=True,
    ),
)
GROUPS = tuple(f"s-seed{seed}" for seed in GRID.seeds)
GRID_POINTS = (
    "checkpoint:after_weights",
    "checkpoint:before_manifest",
    "checkpoint:after_rename",
    "write:group.json",
    *(f"write:{GRID.file_of(cell)}" for cell in GRID.cells()),
    *(f"write:per_protein-{GRID.name}-{group}.parquet" for group in GROUPS),
)
SCENARIOS = {
    name: Scenario(
        "scripts.train",
        TRAINING + more,
        outcome_with_cache if "cache" in name else outcome_of_training,
        TRAINING_POINTS + (CACHE_POINTS if "cache" in name else ()),
    )
    for name, more in {
        "train, by length, 2 workers": "--max_steps 45 --num_workers 2",
        "train, packed, 2 workers": "--max_steps 25 --batching packed --num_workers 2",
        "train, packed, mean-one weights, spikes skipped": "--max_steps 45 --batching packed "
        "--weighting mean_one --skip_loss_spikes 1.01",
        "train, bf16, teacher cached on the way": "--max_steps 25 --precision bf16 "
        "--teacher_cache {out}/../teacher",
        # So long that the log has one line for two steps, and checkpoints fall between.
        "train, padded, bf16, sparse log": "--max_steps 105 --batching padded --precision bf16 "
        "--batch_size 1 --save_steps 9",
    }.items()
} | {
    "grid of two groups of three students": Scenario(
        "scripts.ablation",
        f"--grid {GRID.name} --teacher_model {{work}}/teacher --data {{work}}/parts "
        "--cache_dir {work}/cache --results {out}/results --work {out}/work --max_steps 18 "
        "--device cpu",
        outcome_of_grid,
        GRID_POINTS,
        resume="",
    )
}


def make_inputs(work: Path) -> None:
    """Write the small teacher and the proteins that all scenarios use."""
    import torch
    from transformers import GPT2LMHeadModel

    from src.common.settings import StudentSettings
    from src.models.loading import student_config
    from src.proteins.tokenizer import train_tokenizer
    from src.training.inputs import shape_without_teacher

    rng = random.Random(0)
    proteins = [
        "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(10, 50))) for _ in range(160)
    ]
    lines = [f">protein{i}\n{protein}\n" for i, protein in enumerate(proteins)]
    (work / "proteins.fasta").write_text("".join(lines))
    (work / "parts").mkdir()
    for part, some in (("train", lines[:80]), ("validation", lines[80:100]), ("test", lines[100:])):
        (work / "parts" / f"{part}.fasta.gz").write_bytes(gzip.compress("".join(some).encode()))
    tokenizer = train_tokenizer(proteins, 64, n_positions=64)
    torch.manual_seed(0)
    shape = shape_without_teacher(tokenizer, 64)
    teacher = GPT2LMHeadModel(student_config(StudentSettings(1, 2, 16), shape))
    teacher.save_pretrained(work / "teacher")
    tokenizer.save_pretrained(work / "teacher")


# Running and killing ------------------------------------------------------------------------------


def arguments_of(scenario: Scenario, work: Path, out: Path, resume: bool) -> list[str]:
    """Return the command line of a scenario."""
    typed = [part.format(work=work, out=out) for part in scenario.arguments.split()]
    return typed + (scenario.resume.split() if resume else [])


def start(scenario: Scenario, work: Path, out: Path, log: Path, point: str | None = None) -> int:
    """Run a scenario in a process forked from this one, and return its number."""
    process = os.fork()
    if process:
        # Here too, or a kill of the group could come before the child has made it.
        with contextlib.suppress(OSError):
            os.setpgid(process, process)
        return process
    status = 70
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if point is not None:
            os.environ[VARIABLE] = point
        main = importlib.import_module(scenario.script).main
        status = main(arguments_of(scenario, work, out, resume=(out / "run.json").exists()))
    except SystemExit as stop:
        status = int(stop.code or 0)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def wait(process: int, seconds: float) -> int | None:
    """Wait for a process; return its status (negative: the signal) or None while it runs."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(min(0.005, max(0.0, end - time.monotonic())))


def kill(process: int, whole_group: bool) -> None:
    """Kill a run: its main process alone, as one out of memory, or with its workers."""
    if whole_group:
        os.killpg(process, signal.SIGKILL)
    else:
        os.kill(process, signal.SIGKILL)


def place_of(out: Path) -> str:
    """Return where a killed run was, judged by what it left."""
    if any(out.rglob("*.unfinished")):
        return "while saving"
    if any(out.glob("results/*.json")):
        return "in a grid with cells done"
    if any(out.rglob("checkpoint-*")):
        return "between two checkpoints, or after the last"
    return "before the first checkpoint"


class Failed(Exception):  # noqa: N818
    """A run did something else than being killed or finishing well."""


def differing_bytes(expected: dict[str, bytes], found: dict[str, bytes]) -> dict[str, int]:
    """Return how many bytes differ, for each name where any does."""
    different = {}
    for name in sorted({*expected, *found}):
        a, b = expected.get(name, b""), found.get(name, b"")
        if hashlib.sha256(a).digest() != hashlib.sha256(b).digest():
            different[name] = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    return different


def disturb(
    name: str,
    work: Path,
    rng: random.Random,
    endings: list[str],
    seconds: float,
    expected: dict[str, bytes],
) -> tuple[Counter[str], dict[str, int], int]:
    """End one run early once for each of ``endings``, let it finish, and compare it.

    Args:
        name: the scenario.
        work: where the inputs are.
        rng: chooses moments and points.
        endings: ``kill`` or ``stop`` (SIGTERM or SIGINT), in their order.
        seconds: how long an undisturbed run takes.
        expected: what it leaves.

    Returns:
        Endings by place, differing bytes by file, and starts that finished before they were ended.
    """
    scenario = SCENARIOS[name]
    out = Path(tempfile.mkdtemp(prefix="run-", dir=work)) / "run"
    log = out.with_name("log.txt")
    places: Counter[str] = Counter()
    endings = list(endings)
    spared = 0
    while True:
        ending = endings[0] if endings else None
        point = None
        moment = PATIENCE
        if ending == "kill" and rng.random() < 0.5:
            point = f"{rng.choice(scenario.points)}#{rng.randint(1, 3)}"
        elif ending is not None:
            moment = rng.uniform(0.0, 0.7 * seconds)
        process = start(scenario, work, out, log, point)
        status = wait(process, moment)
        if status is None and (ending is None or point):
            kill(process, whole_group=True)
            wait(process, PATIENCE)
            raise Failed(f"{name}: hangs\n{log.read_text()}")
        if status is None and ending == "stop":
            status = stop(process, rng.choice(list(STOPPED)), log)
            if status:
                places[f"stopped with {status}, {place_of(out)}"] += 1
        elif status is None:
            kill(process, whole_group=rng.random() < 0.5)
            status = wait(process, PATIENCE)
            if status == -signal.SIGKILL:
                places[f"killed {place_of(out)}"] += 1
        elif status == -signal.SIGKILL and point:
            places[f"killed at {point.split('#')[0]}"] += 1
        if status == 0:
            spared += len(endings)
            break
        if status not in (-signal.SIGKILL, *STOPPED):
            raise Failed(f"{name}: status {status}\n{log.read_text()}")
        endings = endings[1:]
    differences = differing_bytes(expected, scenario.outcome(out))
    if not differences:
        shutil.rmtree(out.parent)
    return places, differences, spared


def stop(process: int, wanted: int, log: Path) -> int:
    """Ask a run to stop with an exit status; return that, or 0 where it had all but finished."""
    number = STOPPED[wanted]
    os.kill(process, number)
    status = wait(process, STOP_SECONDS)
    if status is None:
        kill(process, whole_group=True)
        raise Failed(f"did not stop within {STOP_SECONDS:.0f} s\n{log.read_text()}")
    # A process that has not begun to train knows no better than the system what SIGTERM means.
    if status not in (0, wanted, -number):
        raise Failed(f"signal {number} ended a run with {status}\n{log.read_text()}")
    return wanted if status else 0


def work_through(
    work: Path,
    share: int,
    seed: str,
    wanted: dict[str, int],
    names: list[str],
    references: dict[str, Any],
) -> dict[str, Any]:
    """End runs early until each ending was seen as often as ``wanted``, going round the scenarios.

    Returns:
        ``places`` (kills by scenario and place), ``runs``, ``differences`` and ``spared``.
    """
    rng = random.Random(seed)
    total: dict[str, Any] = {"places": {}, "runs": 0, "differences": {}, "spared": 0}
    left = Counter(wanted)
    while left.total():
        name = names[(share + total["runs"]) % len(names)]
        endings = rng.sample(
            sorted(left.elements()), min(left.total(), rng.randint(1, MOST_ENDINGS))
        )
        reference = references[name]
        places, differences, spared = disturb(
            name, work, rng, endings, reference["seconds"], reference["outcome"]
        )
        total["places"].setdefault(name, Counter()).update(places)
        for place, number in places.items():
            left["kill" if place.startswith("killed") else "stop"] -= number
        total["runs"] += 1
        total["spared"] += spared
        for file, number in differences.items():
            key = f"{name}: {file}"
            total["differences"][key] = total["differences"].get(key, 0) + number
    return total


def in_process(function: Callable[[], Any], answer: Path) -> int:
    """Run a function in a forked process that writes its JSON result to a file."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        write_json(answer, function())
        status = 0
    except Failed as error:
        print(error, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def undisturbed(names: list[str], work: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Run scenarios to their end and return the outcome of each and how long it took."""
    waiting, running, done = list(names), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            out = Path(tempfile.mkdtemp(prefix="whole-", dir=work)) / "run"
            process = start(SCENARIOS[name], work, out, out.with_name("log.txt"))
            running[process] = (name, out, time.monotonic())
        process, status = os.waitpid(-1, 0)
        name, out, started = running.pop(process)
        if status:
            log = out.with_name("log.txt").read_text()
            raise Failed(f"{name}: the undisturbed run ended with {status}\n{log}")
        outcome = SCENARIOS[name].outcome(out)
        done[name] = {"seconds": time.monotonic() - started, "outcome": outcome}
    return done


def started_afresh(name: str, work: Path) -> subprocess.Popen[bytes]:
    """Start an undisturbed run as a user would, in ``fresh/run``."""
    out = work / "fresh" / "run"
    out.parent.mkdir()
    script = ROOT / f"{SCENARIOS[name].script.replace('.', '/')}.py"
    typed = arguments_of(SCENARIOS[name], work, out, resume=False)
    with out.with_name("log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(script), *typed], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        )


def session(
    work: Path, kills: int, stops: int, seed: int, only: str = "", jobs: int = 1
) -> dict[str, Any]:
    """End runs early, let them go on, compare them, and return the record of it.

    Args:
        work: an empty directory.
        kills: how often runs are killed.
        stops: how often they are asked to stop.
        seed: of the choice of moments, points and scenarios.
        only: scenarios whose name contains this.
        jobs: runs at a time.

    Returns:
        Kills, stops, places, runs compared, differing bytes, and what code made the record.

    Raises:
        ValueError: no scenario is called so.
        Failed: a run did something else than being ended, or finishing well.
    """
    started = time.monotonic()
    names = [name for name in SCENARIOS if only in name]
    if not names:
        raise ValueError(f"--only {only}: no such scenario; there are {', '.join(SCENARIOS)}")
    GRIDS[GRID.name] = GRID  # forked processes find it under this name
    # Everything that a run imports, once; none of it computes, so that forked processes are whole.
    inputs = in_process(lambda: make_inputs(work), work / "inputs.json")
    import src.experiments.ablation  # noqa: F401  # imports src.training.stages, too
    from src.common.runs import provenance

    made_by = provenance()  # of the code that is run, not of what a long session ends beside
    for scenario in SCENARIOS.values():
        importlib.import_module(scenario.script)
    gc.freeze()
    if wait(inputs, PATIENCE) != 0:
        raise Failed("the inputs could not be made")

    lanes = min(jobs, kills + stops)
    rng = random.Random(seed)
    rng.shuffle(names)
    names = names[: kills + stops]
    # A process of its own does not know the grid above.
    fresh = next((name for name in names if SCENARIOS[name].script == "scripts.train"), None)
    references = undisturbed(names, work, jobs)
    afresh = None if fresh is None else started_afresh(fresh, work)
    say(
        f"{len(names)} undisturbed runs, "
        f"{sum(r['seconds'] for r in references.values()) / len(names):.1f} s each"
    )
    processes = {}
    for lane in range(lanes):
        wanted = {
            "kill": kills // lanes + (lane < kills % lanes),
            # From the other end, so that one kill and one stop go to two lanes.
            "stop": stops // lanes + (lanes - 1 - lane < stops % lanes),
        }
        answer = work / f"lane-{lane}.json"
        lane_seed = f"{seed} {lane}"
        processes[answer] = in_process(
            lambda lane=lane, lane_seed=lane_seed, wanted=wanted: work_through(
                work, lane, lane_seed, wanted, names, references
            ),
            answer,
        )
    statuses = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes.values()]
    if any(statuses):
        raise Failed("a run failed (see above)")
    answers = [read_json(answer) for answer in processes]
    differences: Counter[str] = Counter()
    if fresh is not None and afresh is not None:
        out = work / "fresh" / "run"
        if afresh.wait(PATIENCE) != 0:
            raise Failed(f"{fresh}: fails\n{out.with_name('log.txt').read_text()}")
        found = differing_bytes(references[fresh]["outcome"], SCENARIOS[fresh].outcome(out))
        differences.update({f"{fresh}, started afresh: {file}": n for file, n in found.items()})
    places: Counter[str] = Counter()
    scenarios: Counter[str] = Counter()
    for answer in answers:
        differences.update(answer["differences"])
        for name, counted in answer["places"].items():
            places.update(counted)
            scenarios[name] += sum(counted.values())
    return {
        "kills": sum(n for place, n in places.items() if place.startswith("killed")),
        "stops": sum(n for place, n in places.items() if place.startswith("stopped")),
        "differing_bytes": sum(differences.values()),
        "runs_compared": sum(answer["runs"] for answer in answers) + (fresh is not None),
        "places": dict(sorted(places.items())),
        "scenarios": dict(sorted(scenarios.items())),
        "differences": dict(differences),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        **{key: made_by[key] for key in ("git", "versions", "platform", "started")},
    }
