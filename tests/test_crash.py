"""tests/stress/crash.py: what it compares, and a session of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stress import crash

ROOT = Path(__file__).resolve().parents[1]


def test_differing_bytes_are_counted():
    one = {"same": b"abc", "changed": b"abcd", "longer": b"ab", "missing": b"abc"}
    other = {"same": b"abc", "changed": b"xbcy", "longer": b"abcde", "new": b"a"}
    assert crash.differing_bytes(one, other) == {"changed": 2, "longer": 3, "missing": 3, "new": 1}
    assert crash.differing_bytes(one, dict(one)) == {}


def finished_run(folder: Path, **changes) -> Path:
    """Write what a finished run leaves, in small."""
    values = {"loss": 1.5, "seconds": 3.0, "weights": b"w" * 50, "random": b"r" * 20, **changes}
    last = folder / "checkpoint-10"
    last.mkdir(parents=True)
    (folder / "checkpoint-8").mkdir()
    record = {"step": 10, "loss": values["loss"], "tokens_per_second": values["seconds"]}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    run = {"status": "finished", "settings": {}, "student": {}, "started": values["seconds"]}
    (folder / "run.json").write_text(json.dumps({**run, "final": {"eval_loss": values["loss"]}}))
    (last / "trainer_state.json").write_text(json.dumps({"log_history": [record]}))
    state = {
        "trainer": {"tally": {"seconds": values["seconds"], "waited": values["seconds"]}},
        "optimizer": {"lr": 1},
    }
    (last / "training_state.json").write_text(json.dumps(state))
    (last / "model.safetensors").write_bytes(values["weights"])
    (last / "process-0.safetensors").write_bytes(values["random"])
    return folder


def test_times_may_differ_and_nothing_else(tmp_path):
    one = crash.outcome_of_training(finished_run(tmp_path / "one"))
    later = crash.outcome_of_training(finished_run(tmp_path / "later", seconds=4.0))
    assert crash.differing_bytes(one, later) == {}
    for number, change in enumerate(
        ({"loss": 1.5000000000000002}, {"weights": b"w" * 49 + b"x"}, {"random": b"r" * 19})
    ):
        other = crash.outcome_of_training(finished_run(tmp_path / str(number), **change))
        assert crash.differing_bytes(one, other)


def test_points_end_the_process_and_cost_nothing_otherwise():
    code = (
        "from src.common.crash_points import crash_point\n"
        "for i in range(5):\n"
        "    crash_point('other'); crash_point('here'); print(i, flush=True)\n"
    )
    for wanted, lines in (("here", 0), ("here#3", 2), ("nowhere", 5), (None, 5)):
        environment = {k: v for k, v in os.environ.items() if k != crash.VARIABLE}
        if wanted:
            environment[crash.VARIABLE] = wanted
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert len(done.stdout.split()) == lines
        assert done.returncode == (0 if lines == 5 else -signal.SIGKILL)


def test_every_point_of_a_scenario_is_in_the_code():
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for scenario in crash.SCENARIOS.values():
        for point in scenario.points:
            assert point.startswith("write:") or f'crash_point("{point}")' in code, point


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "0"], "must be at least 1"),
        (["--only", "nothing"], "no such scenario"),
        (["--work_dir", "/no/such/place"], "No such file"),
    ],
)
def test_user_errors_are_one_line(arguments, message, capsys):
    try:
        status = crash.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_kills_and_stops_leave_no_trace(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, "tests/stress/crash.py", "--kills", "10", "--stops", "3"]
    for seed in ("0", "1"):
        done = subprocess.run(
            [*command, "--seed", seed, "--record", str(record), "--work_dir", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "kills 10, differing bytes 0"
    sessions = json.loads(record.read_text())["sessions"]
    assert [(s["kills"], s["stops"], s["differing_bytes"]) for s in sessions] == [(10, 3, 0)] * 2
    assert {"commit", "dirty"} <= sessions[0]["git"].keys()
    assert sum(sessions[0]["places"].values()) == 13


@pytest.mark.parametrize("content", ["{}", "[]", '{"sessions": 3}', '{"sessions": [3]}', "x"])
def test_what_is_no_record_is_refused_before_the_first_kill(tmp_path, monkeypatch, capsys, content):
    def session(*arguments):
        raise AssertionError("a run was killed")

    monkeypatch.setattr(crash, "session", session)
    path = tmp_path / "record.json"
    path.write_text(content)
    assert crash.main(["--record", str(path), "--work_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: " in error
    assert error.count("\n") == 1
    assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]
