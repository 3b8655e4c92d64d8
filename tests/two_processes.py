"""Trains on one and on two processes (gloo, CPU); run by tests of what they do together.

PyTorch is imported once, and each rank is a process forked from this one with the environment that
``torchrun`` would give it. Usage: ``python tests/two_processes.py FOLDER JOB...``
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from small_runs import Tokens, make_trainer, resume
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from src.common.cli import USER_ERROR
from src.trainer.interruption import stops_on_signals
from src.trainer.safeguards import NotFinite
from tests.stress.crash import make_inputs


def tiny_lm(n_layer: int = 2, n_embd: int = 16, seed: int = 0, **config):
    """Return a tiny model in float64, so that orders of summation cannot hide differences."""
    torch.manual_seed(seed)
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    settings = {**dict.fromkeys(names, 0.0), "initializer_range": 0.4, **config}
    shape = {"n_layer": n_layer, "n_head": 2, "n_embd": n_embd, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(n_positions=256, **shape, **settings)).double().eval()


def tell(line: str) -> None:
    """Print a line in one piece: ranks share the pipe."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


class At(TrainerCallback):
    """Does something in one rank when a step begins, counted from 1."""

    def __init__(self, step: int, rank: int, act):
        self.step, self.rank, self.act = step, rank, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and args.process_index == self.rank:
            self.act()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def trainer_of(folder: Path, processes: int, dropout: float = 0.0, **options) -> Any:
    loss = {"weighting": "mean_one", "smoothing": "matched"}
    return make_trainer(
        tiny_lm,
        folder,
        dropout=dropout,
        loss=loss,
        gradient_accumulation_steps=2 // processes,
        **options,
    )


def train(folder, processes, **options):
    trainer = trainer_of(folder, processes, **options)
    stops_on_signals(resume)(trainer)


def train_and(folder, processes, at, **options):
    trainer = trainer_of(folder, processes, **options)
    trainer.add_callback(At(*at))
    stops_on_signals(resume)(trainer)


def train_to_nan(folder, processes):
    trainer = trainer_of(folder, processes)

    def spoil():
        with torch.no_grad():
            trainer.model.transformer.ln_f.bias[0] = float("nan")

    trainer.add_callback(At(6, 1, spoil))
    resume(trainer)


TRAIN = (
    "--teacher_model {base}/teacher --data {base}/proteins.fasta --cache_dir {base}/tokens "
    "--train_size_prop 1.0 --validation_proteins 8 --max_length 64 --n_layer 1 --n_head 2 "
    "--n_embd 16 --batch_size 6 --num_train_epochs 1 --eval_steps 8 --save_steps 5 --device cpu "
    "--skip_teacher_check --output_dir {folder} --use_uncertainty_weighting --weighting mean_one "
)


def script(folder, processes, name, typed, point=None):
    """Run a script, killed at a crash point where one is given."""
    if point:
        os.environ["DISTILL_FAIL_AT"] = point
    parts = [part.format(base=folder.parent, folder=folder) for part in typed.split()]
    raise SystemExit(importlib.import_module(f"scripts.{name}").main(parts))


def shared_out(teacher):
    """Return a teacher of which this process holds its share."""
    from src.models.sharding import load_sharded

    return load_sharded(lambda: (teacher, None), torch.device("cpu"))[0]


def capture_shards(folder, processes, sharded=False):
    """Capture a teacher's hidden states in many shards; the ranks tell how many each ran."""
    from src.common import processes as p
    from src.models import teacher_cache

    tokens: Any = Tokens(40)
    tokens.fingerprint = "tokens"
    p.join("cpu")
    captured = []
    whole = teacher_cache._capture_range

    def counted(*arguments):
        captured.append(arguments[3])
        return whole(*arguments)

    teacher_cache._capture_range = counted
    teacher = tiny_lm(seed=2).float()
    if sharded:
        teacher = shared_out(teacher)
    options = {"shard_bytes": 2000, "batch_tokens": 40, "fingerprint": "t" * 16}
    teacher_cache.capture(teacher, tokens, folder, **options)
    tell(f"rank {p.rank()}: {len(captured)} shards")


def held_bytes(model) -> int:
    """Return the bytes of a model's parameters that this process holds between two runs."""
    held = 0
    for parameter in model.parameters():
        own = getattr(parameter, "to_local", lambda p=parameter: p)()
        held += own.numel() * own.element_size()
    return held


def run_sharded(folder, processes):
    """Compare a sharded teacher with the same one whole: hidden states, bytes held, prints."""
    from src.common import processes as p
    from src.models import sharding
    from src.models.forward import final_hidden_states
    from src.models.inspection import count_parameters

    p.join("cpu")
    whole, teacher = (tiny_lm(n_layer=6, seed=3) for _ in range(2))
    teacher = shared_out(teacher)
    assert sharding.is_sharded(teacher)
    assert not sharding.is_sharded(whole)
    assert count_parameters(teacher) == count_parameters(whole)
    every = held_bytes(whole)
    blocks = held_bytes(whole.transformer.h)
    generator = torch.Generator().manual_seed(p.rank())  # each its own proteins, of its own lengths
    for padding in ("left", "right", "left"):
        ids = torch.randint(0, 64, (3, 5 + p.rank()), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        mask = mask if padding == "left" else mask.flip(-1)
        # As a check of the teacher and then a training run it.
        with torch.inference_mode(padding == "left"), torch.no_grad():
            both = [final_hidden_states(model, ids, mask) for model in (whole, teacher)]
        assert torch.equal(*both)
        assert held_bytes(teacher) <= every - 0.49 * blocks
    tell(f"rank {p.rank()}: alike")


def train_to_nan_sharded(folder, processes):
    """Spoil the first of a step's two batches in one process: the other runs both anew."""
    trainer = trainer_of(folder, 1)
    trainer.teacher_model = shared_out(trainer.teacher_model)
    spoiled = []

    def spoil(module, inputs, output):
        ids = inputs[0]
        step = trainer.state.global_step if trainer.model.training else None
        if trainer.args.process_index == 1 and step == 3:
            spoiled[:] = spoiled or [ids.clone()]
            if torch.equal(ids, spoiled[0]):
                return output * float("nan")
        return None

    trainer.model.transformer.wte.register_forward_hook(spoil)
    resume(trainer)


# (name of the directory, processes, function, options): a job is a list of them.
TWICE = TRAIN + "--gradient_accumulation_steps 2"
CACHED = TRAIN + "--teacher_cache {folder}-cache"
RESUMED = {"name": "train", "typed": TRAIN + "--resume"}
SERVED = "--model data/small_teacher --device cpu --output {folder}"
SERVING = {
    "sampled": ("generate", " --num_sequences 12 --length 40-130 --distinct --batch_size 5"),
    "scored": ("score", " --input {base}/in.fasta --windows --batch_size 4"),
    "scanned": ("score", " --wildtype MKTAYIAKQRQISFVKSHFSRQLEERLGLIEV --scan"),
}
KILLED_AT = "checkpoint:after_pruning"
JOBS = {
    "inputs": [("inputs", 1, lambda folder, processes: make_inputs(folder.parent), {})],
    "train": [
        ("train-1", 1, script, {"name": "train", "typed": TWICE}),
        ("train-2", 2, script, {"name": "train", "typed": CACHED}),
    ],
    "fewer": [
        ("fewer", 2, script, {"name": "train", "typed": TRAIN, "point": KILLED_AT}),
        ("fewer", 1, script, RESUMED),
    ],
    "more": [
        ("more", 1, script, {"name": "train", "typed": TWICE, "point": KILLED_AT}),
        ("more", 2, script, {"name": "train", "typed": TWICE + " --resume"}),
    ],
    "odd": [
        ("odd", 1, script, {"name": "train", "typed": TRAIN, "point": KILLED_AT}),
        ("odd", 2, script, RESUMED),
    ],
    "again": [
        ("train-2", 2, script, {"name": "train", "typed": CACHED}),
        ("train-2", 2, script, {"name": "train", "typed": TRAIN + "--seed 7"}),
    ],
    "evaluate": [
        (
            "train-1",
            2,
            script,
            {
                "name": "evaluate",
                "typed": "--student_model {folder} --data {base}/parts --bootstrap 50 "
                "--device cpu --skip_teacher_check --output {base}/results.json",
            },
        )
    ],
    "cache": [
        (
            name,
            processes,
            script,
            {
                "name": "cache_teacher",
                "typed": "--teacher_model {base}/teacher --data {base}/proteins.fasta "
                "--teacher_cache {folder} --train_size_prop 1.0 --max_length 64 --device cpu "
                "--validation_proteins 8",
            },
        )
        for name, processes in (("cache-1", 1), ("cache-2", 2))
    ],
    "serve": [
        (f"{name}-{n}", n, script, {"name": script_name, "typed": SERVED + typed})
        for name, (script_name, typed) in SERVING.items()
        for n in (1, 2)
    ],
    "shards": [(f"shards-{n}", n, capture_shards, {}) for n in (1, 2)],
    "one": [("one", 1, train, {})],
    "two": [("two", 2, train, {})],
    "two then one": [
        ("two then one", 2, train_and, {"at": (6, 0, die)}),
        ("two then one", 1, train, {}),
    ],
    "one then two": [
        ("one then two", 1, train_and, {"at": (6, 0, die)}),
        ("one then two", 2, train, {}),
    ],
    "dropout": [("dropout", 2, train, {"dropout": 0.1})],
    "dropout, killed": [
        ("dropout, killed", 2, train_and, {"dropout": 0.1, "at": (6, 1, die)}),
        ("dropout, killed", 2, train, {"dropout": 0.1}),
    ],
    "dropout, stopped": [
        ("dropout, stopped", 2, train_and, {"dropout": 0.1, "at": (4, 1, ask_to_stop)}),
        ("dropout, stopped", 2, train, {"dropout": 0.1}),
    ],
    "nan": [("nan", 2, train_to_nan, {})],
    "sharded": [("sharded", 2, run_sharded, {})],
    "sharded_shards": [("sharded-shards", 2, capture_shards, {"sharded": True})],
    "sharded_nan": [("sharded-nan", 2, train_to_nan_sharded, {})],
    "sharded_training": [
        ("whole", 2, script, {"name": "train", "typed": TRAIN}),
        ("sharded", 2, script, {"name": "train", "typed": TRAIN + "--shard_teacher"}),
        ("cached", 2, script, {"name": "train", "typed": CACHED + " --shard_teacher"}),
        ("alone", 1, script, {"name": "train", "typed": TRAIN + "--shard_teacher"}),
    ],
}


def run_ranks(folder: Path, processes: int, function, options) -> list[int]:
    """Run a function in so many processes and return their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(processes):
        process = os.fork()
        if process:
            ranks.append(process)
            continue
        status = 1
        try:
            if processes > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                place |= {"LOCAL_WORLD_SIZE": processes}
                os.environ.update({name: str(value) for name, value in place.items()})
            function(folder, processes, **options)
            status = 0
        except NotFinite as error:
            tell(f"rank {rank}: {error}")
            status = USER_ERROR
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    statuses = {}
    lost = False
    while len(statuses) < processes:
        process, status = os.wait()
        statuses[process] = os.waitstatus_to_exitcode(status)
        if statuses[process] == -signal.SIGKILL and not lost:
            # What torchrun does when a process dies: it ends the others. One that notices first
            # that it is alone fails by itself.
            lost = True
            for other in ranks:
                if other not in statuses:
                    os.kill(other, signal.SIGKILL)
    return [-signal.SIGKILL if lost else statuses[process] for process in ranks]


if __name__ == "__main__":
    base = Path(sys.argv[1])
    for job in sys.argv[2:]:
        for name, processes, function, options in JOBS[job]:
            statuses = run_ranks(base / name, processes, function, options)
            print(f"{job}: {[int(status) for status in statuses]}", flush=True)
