#!/usr/bin/env python3
"""Kill runs of the scripts at random moments and at named points, resume them, and compare bits.

A run is killed up to 12 times and resumed each time; then it may finish, and every file that it
leaves, apart from times, must equal that of an undisturbed run. Half of the kills come at a random
moment, half at a named point of a save (src/common/crash_points.py). With --stops, runs also get
SIGTERM or SIGINT and must exit with 143 or 130 within 30 seconds. One undisturbed run is started in
a new Python process and must equal the forked one. The last line is "kills N, differing bytes M";
the exit status is 1 if M is not 0.

Examples:
  python tests/stress/crash.py --kills 2 --seed 0
  python tests/stress/crash.py --kills 1000 --seed 1 --record results/reliability/crash_test.json
"""

from __future__ import annotations

import argparse
import gc
import gzip
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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    # Before PyTorch is imported. With one thread a process can be forked, and sums have one order.
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from src.common.cli import HelpFormatter, natural, positive_int, quiet_libraries, run_script, say
from src.common.crash_points import VARIABLE
from src.common.files import check_outputs, read_json, write_json
from src.common.settings import BUNDLED_TEACHER, StudentSettings, TrainSettings
from src.experiments.grids import ARMS, GRIDS, Grid

FORK = get_context("fork")
"""Importing PyTorch takes longer than a run, so each run is forked from a process that has it."""
TIME_PARTS = ("runtime", "per_second", "data_wait_share")
TIME_NAMES = ("seconds", "waited")
"""Parts of names, and whole names, of JSON entries that measure time."""
MOST_ENDINGS = 12
STOPPED = {128 + number: number for number in (signal.SIGTERM, signal.SIGINT)}
"""Exit statuses of runs that were asked to stop, and the signals."""
STOP_SECONDS = 30.0
PATIENCE = 300.0
"""Seconds after which a run counts as hanging."""
Outcome = dict[str, bytes]


class Failed(Exception):  # noqa: N818
    """A run neither was killed nor finished well."""


# What a run leaves --------------------------------------------------------------------------------


def timeless(value: Any) -> Any:
    """Return JSON values without the entries that measure time."""
    if isinstance(value, dict):
        names = [
            name
            for name in value
            if name not in TIME_NAMES and not any(part in name for part in TIME_PARTS)
        ]
        return {name: timeless(value[name]) for name in names}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def timeless_bytes(value: Any) -> bytes:
    """Return JSON values as bytes, without times."""
    return json.dumps(timeless(value), sort_keys=True, indent=0).encode()


def outcome_of_training(folder: Path) -> Outcome:
    """Return what a finished training leaves: weights, optimiser, states, log."""
    from src.trainer.checkpoints import checkpoints_of

    outcome = {}
    for path in [*folder.iterdir(), *checkpoints_of(folder)[0].iterdir()]:
        if path.is_dir() or path.name in (".lock", "manifest.json"):
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            data = timeless_bytes([json.loads(line) for line in data.decode().splitlines()])
        elif path.name in ("trainer_state.json", "training_state.json"):
            data = timeless_bytes(json.loads(data))
        elif path.name == "run.json":
            run = json.loads(data)
            data = timeless_bytes({k: run[k] for k in ("status", "settings", "student", "final")})
        outcome[str(path.relative_to(folder))] = data
    return outcome


def outcome_with_cache(folder: Path) -> Outcome:
    """Return what a training leaves, with the teacher cache beside it."""
    paths = (folder.parent / "teacher").rglob("*")
    files = [path for path in paths if path.is_file() and not path.name.endswith(".lock")]
    cache = {str(path.relative_to(folder.parent)): path.read_bytes() for path in files}
    return outcome_of_training(folder) | cache


def outcome_of_grid(folder: Path) -> Outcome:
    """Return what a finished grid leaves: results, tables, and each group's last checkpoint."""
    import pyarrow.parquet as pq

    outcome = {}
    for path in (folder / "results").iterdir():
        if path.suffix == ".parquet":
            # Compare rows: how the file is cut into pages depends on which rows came together.
            value = pq.read_table(path).to_pydict()
        else:
            value = json.loads(path.read_text())
            value.pop("performance")
            value["run"] = {name: value["run"][name] for name in ("student", "teacher", "data")}
        outcome[f"results/{path.name}"] = timeless_bytes(value)
    for group in (folder / "work").glob("*/group.json"):
        inner = outcome_of_training(group.parent)
        outcome |= {f"{group.parent.name}/{name}": data for name, data in inner.items()}
    return outcome


def differing_bytes(expected: Outcome, actual: Outcome) -> dict[str, int]:
    """Return how many bytes differ, for each file in which any does."""
    different = {}
    for name in sorted({*expected, *actual}):
        a, b = expected.get(name, b""), actual.get(name, b"")
        if a != b:
            different[name] = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    return different


# What is killed -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A command that must survive being killed.

    Attributes:
        script: module whose ``main`` is run.
        arguments: its arguments; ``{work}`` holds the inputs, ``{out}`` is the directory written.
        outcome: reads that directory; must be the same for all runs.
        points: crash points that the command passes.
        resume: arguments added after a kill; a grid resumes when the same command is given.
    """

    script: str
    arguments: str
    outcome: Callable[[Path], Outcome]
    points: tuple[str, ...]
    resume: str = "--resume"

    def typed(self, work: Path, out: Path) -> list[str]:
        """Return the command line, which resumes a run that has begun."""
        parts = [part.format(work=work, out=out) for part in self.arguments.split()]
        return parts + (self.resume.split() if (out / "run.json").exists() else [])


TRAINING_POINTS = (
    "checkpoint:begin",
    "checkpoint:after_weights",
    "checkpoint:after_optimizer",
    "checkpoint:before_manifest",
    "write:manifest.json",
    "checkpoint:after_manifest",
    "checkpoint:after_rename",
    "checkpoint:after_pruning",
    "write:run.json",
    "model:written",
    "model:moved",
)
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
GRID_POINTS = (
    "checkpoint:after_weights",
    "checkpoint:before_manifest",
    "checkpoint:after_rename",
    "write:group.json",
    *(f"write:{GRID.file_of(cell)}" for cell in GRID.cells()),
    *(f"write:per_protein-{GRID.name}-s-seed{seed}.parquet" for seed in GRID.seeds),
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
        # So long that a log line covers two steps, with checkpoints between.
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
    """Write the random teacher and the random proteins that all scenarios use."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from src.models.loading import load_tokenizer

    quiet_libraries()
    rng = random.Random(0)
    lines = [
        f">protein{i}\n{''.join(rng.choices('ACDEFGHIKLMNPQRSTVWY', k=rng.randint(10, 50)))}\n"
        for i in range(160)
    ]
    (work / "proteins.fasta").write_text("".join(lines))
    (work / "parts").mkdir()
    for part, some in (("train", lines[:80]), ("validation", lines[80:100]), ("test", lines[100:])):
        (work / "parts" / f"{part}.fasta.gz").write_bytes(gzip.compress("".join(some).encode()))
    tokenizer = load_tokenizer(str(ROOT / BUNDLED_TEACHER))
    tokenizer.model_max_length = 64
    end: Any = tokenizer.eos_token_id
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "n_positions": 64,
        "n_layer": 1,
        "n_head": 2,
    }
    teacher = GPT2LMHeadModel(GPT2Config(**shape, n_embd=16, bos_token_id=end, eos_token_id=end))
    teacher.save_pretrained(work / "teacher")
    tokenizer.save_pretrained(work / "teacher")


# Running and killing ------------------------------------------------------------------------------


def run_in_child(scenario: Scenario, work: Path, out: Path, point: str | None) -> None:
    """Run a scenario in this process, a forked one, and exit with its status."""
    with suppress(OSError):
        os.setpgid(0, 0)
    try:
        log = os.open(out.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if point is not None:
            os.environ[VARIABLE] = point
        status = importlib.import_module(scenario.script).main(scenario.typed(work, out))
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def start(scenario: Scenario, work: Path, out: Path, point: str | None = None) -> Any:
    """Start a scenario in a process of a process group of its own, and return the process."""
    process: Any = FORK.Process(target=run_in_child, args=(scenario, work, out, point))
    process.start()
    with suppress(OSError):  # here too, or a kill could come before the child has its group
        os.setpgid(process.pid, process.pid)
    return process


def finished(process: Any, out: Path, seconds: float) -> int:
    """Return the exit status of a process. Raises ``Failed`` if it takes longer than that."""
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        raise Failed(f"no exit within {seconds:.0f} s\n{out.with_name('log.txt').read_text()}")
    return process.exitcode


def new_output(work: Path) -> Path:
    """Return a free path for what a run writes, in a directory of its own."""
    return Path(tempfile.mkdtemp(prefix="run-", dir=work)) / "run"


def undisturbed(name: str, work: Path, afresh: bool = False) -> tuple[Outcome, float]:
    """Run a scenario to its end, forked or as a user would; return its outcome and its seconds."""
    scenario, out, started = SCENARIOS[name], new_output(work), time.monotonic()
    log = out.with_name("log.txt")
    if afresh:
        script = ROOT / f"{scenario.script.replace('.', '/')}.py"
        command = [sys.executable, str(script), *scenario.typed(work, out)]
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, timeout=PATIENCE)
        status = done.returncode
    else:
        status = finished(start(scenario, work, out), out, PATIENCE)
    if status:
        raise Failed(f"{name}: the undisturbed run ended with {status}\n{log.read_text()}")
    return scenario.outcome(out), time.monotonic() - started


def disturbed(
    name: str, work: Path, seed: str, endings: Sequence[str], expected: tuple[Outcome, float]
) -> tuple[Counter[str], dict[str, int]]:
    """End a run early once for each of ``endings``, let it finish, and compare it.

    Args:
        name: the scenario.
        work: where the inputs are.
        seed: chooses moments and points.
        endings: ``killed`` or ``stopped`` (SIGTERM or SIGINT), in their order.
        expected: outcome and seconds of the undisturbed run.

    Returns:
        Endings by place, and differing bytes by file.
    """
    scenario, out, rng = SCENARIOS[name], new_output(work), random.Random(seed)
    places: Counter[str] = Counter()
    for ending in endings:
        point = None
        if ending == "killed" and rng.random() < 0.5:
            point = f"{rng.choice(scenario.points)}#{rng.randint(1, 3)}"
        process = start(scenario, work, out, point)
        if point:
            status = finished(process, out, PATIENCE)
            if status == -signal.SIGKILL:
                places[f"killed at {point.split('#')[0]}"] += 1
        elif ending == "killed":
            process.join(rng.uniform(0.05, 0.7 * expected[1]))
            if process.exitcode is None:
                # Alone, as if out of memory, or with its data workers.
                (os.kill if rng.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
            status = finished(process, out, PATIENCE)
            if status == -signal.SIGKILL:
                places["killed at a random moment"] += 1
        else:
            process.join(rng.uniform(0.05, 0.7 * expected[1]))
            wanted = rng.choice(list(STOPPED))
            if process.exitcode is None:
                os.kill(process.pid, STOPPED[wanted])
            status = finished(process, out, STOP_SECONDS)
            # Before training begins, the system's own handling of SIGTERM applies.
            if status in (wanted, -STOPPED[wanted]):
                places[f"stopped with {wanted}"] += 1
                continue
        if status == 0:
            break
        if status != -signal.SIGKILL:
            log = out.with_name("log.txt").read_text()
            raise Failed(f"{name}: {point or ending}: status {status}\n{log}")
    else:
        status = finished(start(scenario, work, out), out, PATIENCE)
        if status:
            log = out.with_name("log.txt").read_text()
            raise Failed(f"{name}: status {status} after the last resume\n{log}")
    differences = differing_bytes(expected[0], scenario.outcome(out))
    if not differences:
        shutil.rmtree(out.parent)
    return places, {f"{name}: {file}": number for file, number in differences.items()}


def session(
    work: Path, kills: int, stops: int, seed: int, only: str = "", jobs: int = 1
) -> dict[str, Any]:
    """Kill and stop runs, resume and compare them, and return the record.

    Args:
        work: an empty directory.
        kills: how many runs are killed.
        stops: how many are asked to stop.
        seed: of the choice of moments, points and scenarios.
        only: use scenarios whose name contains this.
        jobs: runs at a time.

    Returns:
        Kills, stops, places, runs compared, differing bytes, and the code that was tested.

    Raises:
        ValueError: no scenario has such a name.
        Failed: a run neither was ended nor finished well.
    """
    started = time.monotonic()
    names = [name for name in SCENARIOS if only in name]
    if not names:
        raise ValueError(f"--only {only}: no such scenario; there are {', '.join(SCENARIOS)}")
    GRIDS[GRID.name] = GRID  # forked processes look it up
    # Import everything that a run needs once. Computing here would start threads: no fork then.
    from src.common.runs import provenance

    made_by = provenance()
    for scenario in SCENARIOS.values():
        importlib.import_module(scenario.script)
    importlib.import_module("src.experiments.ablation")
    gc.freeze()
    inputs = FORK.Process(target=make_inputs, args=(work,))
    inputs.start()
    inputs.join()
    if inputs.exitcode:
        raise Failed("the inputs could not be made")
    rng = random.Random(seed)
    rng.shuffle(names)
    names = names[: kills + stops]
    left = Counter(killed=kills, stopped=stops)
    places: Counter[str] = Counter()
    scenarios: Counter[str] = Counter()
    differences: Counter[str] = Counter()
    runs = 0
    with ProcessPoolExecutor(jobs, mp_context=FORK) as pool:
        expected = dict(zip(names, pool.map(undisturbed, names, [work] * len(names)), strict=True))
        say(f"{len(names)} undisturbed runs")
        pending: dict[Any, tuple[str, Counter[str]]] = {}
        # A new Python process does not know the grid above.
        script = next((name for name in names if SCENARIOS[name].script == "scripts.train"), "")
        afresh = script and pool.submit(undisturbed, script, work, True)
        while left.total() or pending:
            while left.total() and len(pending) < jobs:
                name = names[runs % len(names)]
                count = min(left.total(), rng.randint(1, MOST_ENDINGS))
                endings = rng.sample(sorted(left.elements()), count)
                left -= Counter(endings)
                task = (name, work, f"{seed} {runs}", endings, expected[name])
                pending[pool.submit(disturbed, *task)] = (name, Counter(endings))
                runs += 1
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                name, planned = pending.pop(future)
                seen, different = future.result()
                # A run that finished before it was ended leaves its endings to others.
                left += planned - Counter(p.split()[0] for p in seen.elements())
                places.update(seen)
                scenarios[name] += seen.total()
                differences.update(different)
        if afresh:
            different = differing_bytes(expected[script][0], afresh.result()[0])
            differences.update({f"{script}, started afresh: {f}": n for f, n in different.items()})
    ended = Counter(p.split()[0] for p in places.elements())
    return {
        "kills": ended["killed"],
        "stops": ended["stopped"],
        "differing_bytes": differences.total(),
        "runs_compared": runs + bool(afresh),
        "places": dict(sorted(places.items())),
        "scenarios": dict(sorted(scenarios.items())),
        "differences": dict(differences),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        **{key: made_by[key] for key in ("git", "versions", "platform", "started")},
    }


# Command line -------------------------------------------------------------------------------------


def recorded(path: Path | None) -> list[dict[str, Any]]:
    """Return the sessions that this script has written to a file, if there is one."""
    return read_json(path)["sessions"] if path and path.exists() else []


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--kills", type=positive_int, default=20, help="how many runs are killed")
    add("--stops", type=natural, default=0, help="how many are asked to stop (SIGTERM, SIGINT)")
    add("--seed", type=natural, default=0, help="of the choice of moments, points and scenarios")
    add("--only", default="", help="use scenarios whose name contains this")
    add("--jobs", type=positive_int, default=os.cpu_count(), help="runs at a time")
    add("--record", type=Path, help="JSON file to which the session is appended")
    add("--work_dir", type=Path, help="where runs are made (default: the system's temporary)")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Kill, resume, compare, and record. Exits with 1 if anything differs."""
    check_outputs(args.record, overwrite=True)
    recorded(args.record)
    work = Path(tempfile.mkdtemp(prefix="crash-test-", dir=args.work_dir))
    try:
        record = session(work, args.kills, args.stops, args.seed, args.only, args.jobs)
    except Failed as error:
        say(f"{error}\nthe files are kept in {work}")
        raise SystemExit(1) from None
    except ValueError:
        shutil.rmtree(work)
        raise
    for name, number in sorted(record["differences"].items()):
        say(f"differs: {name}, {number:,} bytes")
    if record["differences"]:
        say(f"the files are kept in {work}")
    else:
        shutil.rmtree(work)
    for place, number in record["places"].items():
        say(f"  {number:6,}  {place}")
    if args.record:
        # Read again: another session may have ended meanwhile.
        sessions = [*recorded(args.record), record]
        write_json(args.record, {"schema_version": 1, "sessions": sessions})
    say(f"kills {record['kills']}, differing bytes {record['differing_bytes']}")
    if record["differing_bytes"]:
        raise SystemExit(1)
    return record


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
