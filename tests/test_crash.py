"""tests/stress/crash.py: what it compares, and where it kills. scripts/test.sh runs a session."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.conftest import run_python
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
        done = run_python("-c", code, variables={crash.VARIABLE: wanted})
        assert len(done.stdout.split()) == lines
        assert done.returncode == (0 if lines == 5 else -signal.SIGKILL)


def test_every_point_of_a_scenario_is_in_the_code():
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for scenario in crash.SCENARIOS.values():
        for point in scenario.points:
            assert point.startswith("write:") or f'crash_point("{point}")' in code, point
