"""Run directories: locks between real processes, and what may be done where something stands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.common.runs import claim_folder, locked, read_run, write_run

ROOT = Path(__file__).resolve().parents[1]
HOLD = (
    "import os, sys, time\n"
    "from pathlib import Path\n"
    "from src.common.runs import locked\n"
    "with locked(Path(sys.argv[1])):\n"
    "    worker = os.fork() if 'fork' in sys.argv else 1\n"
    "    if worker: print(worker, flush=True)\n"
    "    time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path):
    """Return a function that starts a process which holds a run directory."""
    processes = []

    def begin(*options):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path, holder):
    process, _ = holder()
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on .*--output_dir"):
        locked(tmp_path / "run").__enter__()
    # Being refused must not free the other's lock.
    with pytest.raises(ValueError, match="in use"):
        locked(tmp_path / "run").__enter__()


def test_the_lock_of_a_killed_run_does_not_stand_in_the_way(tmp_path, holder):
    process, _ = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / ".lock").read_text()
    with locked(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / ".lock").read_text()


def test_workers_that_outlive_a_killed_run_hold_no_lock(tmp_path, holder):
    process, worker = holder("fork")
    time.sleep(0.2)
    with pytest.raises(ValueError, match="in use"):
        locked(tmp_path / "run").__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        os.kill(worker, 0)  # it lives
        with locked(tmp_path / "run"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_is_free_after_use(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("kind", ["notes", "link", "pipe", "folder"])
def test_a_file_of_others_that_is_named_like_a_lock_is_left_alone(tmp_path, kind):
    run, lock, notes = tmp_path / "run", tmp_path / "run" / ".lock", tmp_path / "notes.txt"
    run.mkdir()
    notes.write_text("years of work")
    if kind == "notes":
        lock.write_text("years of work")
    elif kind == "link":
        lock.symlink_to(notes)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(ValueError, match="no lock that we wrote"):
        locked(run).__enter__()
    with pytest.raises(ValueError, match="no run of ours wrote"):
        claim_folder(run, SETTINGS, resume=False)
    assert notes.read_text() == "years of work"
    assert kind != "notes" or lock.read_text() == "years of work"


SETTINGS = {"seed": 1, "student": {"n_layer": 2}}


def run_of(folder, **record):
    folder.mkdir()
    write_run(folder, {"settings": SETTINGS, "status": "running", **record})
    return folder


def test_what_may_be_done_with_a_directory(tmp_path):
    assert claim_folder(tmp_path / "absent", SETTINGS, resume=False) == "new"
    (tmp_path / "empty").mkdir()
    assert claim_folder(tmp_path / "empty", SETTINGS, resume=True) == "new"
    unfinished = run_of(tmp_path / "unfinished")
    assert claim_folder(unfinished, SETTINGS, resume=True) == "resume"
    with pytest.raises(ValueError, match="pass --resume"):
        claim_folder(unfinished, SETTINGS, resume=False)
    finished = run_of(tmp_path / "finished", status="finished")
    assert claim_folder(finished, SETTINGS, resume=False) == "finished"


@pytest.mark.parametrize("resume", [False, True])
def test_other_settings_are_named_and_nothing_is_touched(tmp_path, resume):
    folder = run_of(tmp_path / "run")
    (folder / "model.safetensors").write_bytes(b"a day of work")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"other settings \(student.n_layer\).*--output_dir"):
        claim_folder(folder, {"seed": 1, "student": {"n_layer": 3}}, resume)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_path_is_the_same_however_it_is_spelt_and_wherever_a_run_goes_on(tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project / "models", project / "data", elsewhere / "data"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(project)
    several = run_of(
        project / "models" / "several", settings={"tokenizer": "models", "data": "data,models"}
    )
    for data, tokenizer in (("./data,models", "./models"), (f"data/,{project}/models", "models")):
        now = {"tokenizer": tokenizer, "data": data}
        assert claim_folder(several, now, resume=True) == "resume"
    run = run_of(project / "models" / "run", settings={"data": "data", "seed": 1})
    for spelling in ("data", "./data/", "models/../data", str(project / "data")):
        assert claim_folder(run, {"data": spelling, "seed": 1}, resume=True) == "resume"
    for other in ("models", "hub/data", str(elsewhere / "data")):
        with pytest.raises(ValueError, match=r"other settings \(data\)"):
            claim_folder(run, {"data": other, "seed": 1}, resume=True)
    monkeypatch.chdir(elsewhere)
    for spelling in (str(project / "data"), "../project/data"):
        assert claim_folder(run, {"data": spelling, "seed": 1}, resume=True) == "resume"
    with pytest.raises(ValueError, match=r"other settings \(data\)"):
        claim_folder(run, {"data": "data", "seed": 1}, resume=True)


def test_a_record_names_no_directory_that_is_not_above_the_run(tmp_path, monkeypatch):
    for name, place in (("run", ".."), ("deep/run", "../..")):
        monkeypatch.chdir(tmp_path)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        assert read_run(run_of(tmp_path / name))["directory"] == place
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    assert "directory" not in read_run(run_of(tmp_path / "outside"))


@pytest.mark.parametrize(
    "name", ["thesis.txt", ".git", "notes.tmp", ".x.tmp", ".run.json.abcdefgh.tmp"]
)
def test_files_of_others_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("years of work")
    with pytest.raises(ValueError, match="no run of ours"):
        claim_folder(tmp_path, SETTINGS, resume=True)
    assert (tmp_path / name).read_text() == "years of work"


def test_a_run_killed_before_its_first_record_can_begin_again(tmp_path):
    """Found by killing at ``write:run.json``: the half-written record looked like user data."""
    (tmp_path / ".lock").write_text("process 1 on here")
    (tmp_path / ".run.json.abcdefgh.unfinished").write_text("{")
    assert claim_folder(tmp_path, SETTINGS, resume=False) == "new"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"status": "running"}'])
def test_a_broken_record_is_said_so(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        claim_folder(tmp_path, SETTINGS, resume=True)
