"""No secret of the environment and no path of a home directory stands in what a run leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GITHUB_TOKEN",
    "OPENAI_API_KEY",
    "PIP_INDEX_URL",
    "DATABASE_PASSWORD",
)
USER = "canaryuser"
COLLEAGUE = "canarycolleague"


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return an environment with a canary in each secret; keys have the form that wandb wants."""
    kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    secrets = {name: f"{number:02d}{'c0ffee' * 7}"[:40] for number, name in enumerate(SECRETS)}
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        **secrets,
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


DRIVER = """
import json, sys
from importlib import import_module
sys.path.insert(0, sys.argv[1])
for name, *arguments in json.loads(sys.argv[2]):
    sys.argv = [f"scripts/{name}.py", *arguments]
    status = import_module(f"scripts.{name}").main()
    if status:
        sys.exit(status)
"""
"""Runs scripts one after the other in one process: importing takes most of the time."""


def run(home: Path, work: Path, *commands: str, **more: str) -> str:
    """Run scripts in ``work`` as a user with that home; return all that they printed."""
    typed = json.dumps([command.split() for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(ROOT), typed],
        cwd=work,
        env=environment(home, **more),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def places_of(needles: list[str], folder: Path) -> list[str]:
    """Return the files below a folder with one of the texts in content, name or link."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path).encode() if path.is_symlink() else b""
        if path.is_file():
            content += path.read_bytes()
        content += path.relative_to(folder).as_posix().encode()
        found += [f"{path}: {n}" for n in needles if n.encode() in content]
    return found


def canaries() -> list[str]:
    return [value for name, value in environment(Path("/")).items() if name in SECRETS]


@pytest.fixture
def project(tmp_path, tiny_lm, tiny_tokenizer, random_proteins):
    """A home with a teacher and proteins in it, as absolute paths, and a working directory."""
    home = tmp_path / USER
    work = home / "project"
    work.mkdir(parents=True)
    teacher = home / "models" / "teacher"
    tiny_lm().save_pretrained(teacher)
    tiny_tokenizer.save_pretrained(teacher)
    data = home / "data"
    data.mkdir()
    for number, part in enumerate(("train", "validation", "test")):
        names = enumerate(random_proteins(40, 20, 60, seed=number))
        (data / f"{part}.fasta").write_text("".join(f">{part}{i}\n{p}\n" for i, p in names))
    return home, work, teacher, data


def train_command(work: Path, teacher: Path, data: Path) -> str:
    command = f"train --teacher_model {teacher} --data {data} --train_size_prop 1.0 --n_layer 1 "
    command += "--n_head 2 --n_embd 16 --max_steps 3 --batch_size 4 --skip_teacher_check "
    command += "--save_steps 2 --eval_steps 3 --max_length 64 "
    return f"{command} --output_dir {work}/models/student"


def test_no_secret_and_no_home_in_what_a_run_leaves(project):
    home, work, teacher, data = project
    train = train_command(work, teacher, data)
    student, cache = work / "models" / "student", home.parent / COLLEAGUE / "home" / "cache"
    evaluate = (
        f"evaluate --student_model {student} --compute_ece --skip_teacher_check --bootstrap 20 "
    )
    evaluate += f"--cache_dir={cache} --output {work}/results/r.json "
    evaluate += f"--per_protein {work}/results/r.parquet"
    generate = f"generate --model {student} --num_sequences 2 --max_length 30 --allow_unfinished "
    generate += f"--output {work}/results/new.fasta --top_k 0 --max_attempts 20"
    shown = run(home, work, train, evaluate, generate)

    assert places_of(canaries(), home) == []
    assert not any(canary in shown for canary in canaries())
    # Of another user's machine nothing is known; the run's record still names its sources.
    assert places_of([USER], student) == []
    assert places_of([USER, COLLEAGUE], work / "results") == []
    record = json.loads((student / "run.json").read_text())
    assert record["settings"]["teacher_model"] == "~/models/teacher"
    assert record["data"]["source"] == "~/data"
    assert "models/student" in record["command"]
    results = json.loads((work / "results" / "r.json").read_text())
    assert results["run"]["student"]["name"] == "models/student"
    assert "--cache_dir=cache" in results["run"]["command"]
    # What evaluation needs was found through those relative names.
    assert record["teacher"]["name"] == "~/models/teacher"
    assert results["run"]["teacher"]["name"] == "teacher"


@pytest.mark.slow
def test_no_secret_in_an_offline_wandb_directory(project):
    pytest.importorskip("wandb")
    home, work, teacher, data = project
    train = f"{train_command(work, teacher, data)} --report_to wandb"
    shown = run(home, work, train, WANDB_MODE="offline")
    runs = list((work / "wandb").glob("offline-run-*/*.wandb"))
    assert runs, "wandb wrote its offline file"
    assert any(path.stat().st_size > 0 for path in runs)
    assert places_of(canaries(), home) == []
    assert not any(canary in shown for canary in canaries())
    # W&B's debug logs name their own directory; they are not among what it sends.
    for path in (work / "wandb").rglob("*"):
        if path.name == "logs":
            shutil.rmtree(path)
        elif path.is_symlink():
            path.unlink()
    # The host's name, which may be as short as to stand in any bytes: test_tracking.py.
    private = [USER, str(home), str(ROOT), sys.prefix, "scripts/train.py", "github"]
    assert places_of(private, work / "wandb") == []
    (run_file,) = (work / "wandb").glob("offline-run-*/*.wandb")
    assert re.findall(rb"[\w.=-]*/(?:tmp|home|root|usr)/[\w./-]*", run_file.read_bytes()) == []


def test_the_search_finds_what_it_looks_for(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.txt").write_bytes(b"\x00 key=" + canaries()[0].encode())
    assert len(places_of(canaries(), tmp_path)) == 1


def test_relative_paths(tmp_path, monkeypatch):
    from src.common.runs import relative_paths

    home = tmp_path / "home" / "u"
    (home / "project").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "project")
    given = {
        "inside": f"{home}/project/data/x",
        "home": f"{home}/data",
        "outside": str(tmp_path / "other"),
        "flag": [f"--data={home}/data", f"-o={home}/project/y"],
        "path": home / "project" / "z",
        "kept": ["data/x", "owner/name", 3, None, "--alpha=0.5", ""],
    }
    assert relative_paths(given) == {
        "inside": "data/x",
        "home": "~/data",
        "outside": "../../../other",
        "flag": ["--data=~/data", "-o=y"],
        "path": "z",
        "kept": ["data/x", "owner/name", 3, None, "--alpha=0.5", ""],
    }
