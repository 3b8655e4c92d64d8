#!/usr/bin/env python3
"""Kill runs of the scripts with SIGKILL, resume them, compare with undisturbed runs, bit by bit.

A run is killed at random moments and at named points of its saves (``src/crash_points.py``), some
times over, resumed with --resume each time, and at last left to finish. Then every file that a
run leaves, apart from times, must equal that of an undisturbed run. With --stops, runs are also
asked to stop by SIGTERM and SIGINT, and have to leave with 143 or 130 within 30 seconds. The last
line printed is ``kills N, differing bytes M``; the exit status is 1 where M is not 0.

PyTorch is imported once; each run is a process forked from that, because importing takes longer
than a run. One undisturbed run is started afresh, as a user would, and must equal the forked one.

Examples:
  python tools/crash_test.py --kills 2 --seed 0
  python tools/crash_test.py --kills 1000 --seed 1 --record results/reliability/crash_test.json
"""

from __future__ import annotations

import argparse
import contextlib
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Before PyTorch is imported. One thread: forked processes are whole, and sums have one order.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from src.cli import HelpFormatter, natural, positive_int, run_script, say
from src.crash_points import VARIABLE
from src.files import read_json, write_json

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
        resume: arguments added after a kill.
    """

    script: str
    arguments: str
    outcome: Callable[[Path], dict[str, bytes]]
    points: tuple[str, ...]
    resume: str = "--resume"


def outcome_of_training(folder: Path) -> dict[str, bytes]:
    """Return what a finished training leaves, without times: weights, optimiser, states, log."""
    found = {}
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in [*folder.iterdir(), *last.iterdir()]:
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
}


def make_inputs(work: Path) -> None:
    """Write the small teacher and the proteins that all scenarios use."""
    import torch
    from transformers import GPT2LMHeadModel

    from src.pretraining import PretrainSettings, teacher_config, train_tokenizer

    rng = random.Random(0)
    proteins = [
        "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(10, 50))) for _ in range(160)
    ]
    lines = [f">protein{i}\n{protein}\n" for i, protein in enumerate(proteins)]
    (work / "proteins.fasta").write_text("".join(lines))
    settings = PretrainSettings(vocab_size=64, n_layer=1, n_head=2, n_embd=16, n_positions=64)
    tokenizer = train_tokenizer(proteins, settings.vocab_size, settings.n_positions)
    torch.manual_seed(0)
    end_of_text: Any = tokenizer.eos_token_id
    teacher = GPT2LMHeadModel(teacher_config(settings, end_of_text))
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
    if any(out.glob("*.unfinished")):
        return "while saving"
    if any(out.glob("checkpoint-*")):
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Kill, resume, compare, and record. Exits with 1 where anything differs."""
    work = Path(tempfile.mkdtemp(prefix="crash-test-", dir=args.work_dir))
    try:
        record = crash_test(args, work)
    except Failed as error:
        say(str(error))
        say(f"kept for a look: {work}")
        raise SystemExit(1) from None
    if record["differences"]:
        for name, number in sorted(record["differences"].items()):
            say(f"differs: {name}, {number:,} bytes")
        say(f"kept for a look: {work}")
    else:
        shutil.rmtree(work)
    for place, number in record["places"].items():
        say(f"  {number:6,}  {place}")
    if args.record:
        earlier = read_json(args.record)["sessions"] if args.record.exists() else []
        write_json(args.record, {"schema_version": 1, "sessions": [*earlier, record]})
    say(f"kills {record['kills']}, differing bytes {record['differing_bytes']}")
    if record["differing_bytes"]:
        raise SystemExit(1)
    return record


def crash_test(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return the record of one session: kills, places, runs, differences, versions, commit."""
    started = time.monotonic()
    names = [name for name in SCENARIOS if args.only in name]
    if not names:
        raise ValueError(f"--only {args.only}: no such scenario; there are {', '.join(SCENARIOS)}")
    # Everything that a run imports, once; none of it computes, so that forked processes are whole.
    import gc

    inputs = in_process(lambda: make_inputs(work), work / "inputs.json")
    import src.training  # noqa: F401
    from src.runs import provenance

    made_by = provenance()  # of the code that is run, not of what a long session ends beside
    for scenario in SCENARIOS.values():
        importlib.import_module(scenario.script)
    gc.freeze()
    if wait(inputs, PATIENCE) != 0:
        raise Failed("the inputs could not be made")

    lanes = min(args.jobs, args.kills + args.stops)
    rng = random.Random(args.seed)
    rng.shuffle(names)
    names = names[: args.kills + args.stops]
    fresh = names[0]
    command = [sys.executable, str(ROOT / f"{SCENARIOS[fresh].script.replace('.', '/')}.py")]
    fresh_out = work / "fresh" / "run"
    fresh_out.parent.mkdir()
    references = undisturbed(names, work, args.jobs)
    with (fresh_out.parent / "log.txt").open("w") as log:
        afresh = subprocess.Popen(
            [*command, *arguments_of(SCENARIOS[fresh], work, fresh_out, resume=False)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    say(
        f"{len(names)} undisturbed runs, "
        f"{sum(r['seconds'] for r in references.values()) / len(names):.1f} s each"
    )
    processes = {}
    for lane in range(lanes):
        wanted = {
            "kill": args.kills // lanes + (lane < args.kills % lanes),
            # From the other end, so that one kill and one stop go to two lanes.
            "stop": args.stops // lanes + (lanes - 1 - lane < args.stops % lanes),
        }
        answer = work / f"lane-{lane}.json"
        seed = f"{args.seed} {lane}"
        processes[answer] = in_process(
            lambda lane=lane, seed=seed, wanted=wanted: work_through(
                work, lane, seed, wanted, names, references
            ),
            answer,
        )
    statuses = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes.values()]
    if any(statuses):
        raise Failed("a run failed (see above)")
    answers = [read_json(answer) for answer in processes]
    if afresh.wait(PATIENCE) != 0:
        raise Failed(f"{fresh}: fails\n{(fresh_out.parent / 'log.txt').read_text()}")
    differences = Counter(
        {
            f"{fresh}, started afresh: {file}": number
            for file, number in differing_bytes(
                references[fresh]["outcome"], SCENARIOS[fresh].outcome(fresh_out)
            ).items()
        }
    )
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
        "runs_compared": sum(answer["runs"] for answer in answers) + 1,
        "places": dict(sorted(places.items())),
        "scenarios": dict(sorted(scenarios.items())),
        "differences": dict(differences),
        "seed": args.seed,
        "seconds": round(time.monotonic() - started, 1),
        **{key: made_by[key] for key in ("git", "versions", "platform", "started")},
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--kills", type=positive_int, default=20, help="how many runs are killed")
    add("--stops", type=natural, default=0, help="how many are asked to stop (SIGTERM, SIGINT)")
    add("--seed", type=natural, default=0, help="of the choice of moments, points and scenarios")
    add("--only", default="", help="scenarios whose name contains this")
    add("--jobs", type=positive_int, default=os.cpu_count(), help="runs at a time")
    add("--record", type=Path, help="JSON file to which the session is appended")
    add("--work_dir", type=Path, help="where runs are made (default: the system's temporary)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
