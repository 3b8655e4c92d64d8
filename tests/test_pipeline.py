from __future__ import annotations

import inspect
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import pipeline as script
from src.common.runs import locked, write_run
from src.evaluation.results import write_results
from src.experiments import pipeline as p
from tests.test_comparison import results

ROOT = Path(__file__).resolve().parents[1]


def fake_stage(folder: Path, name: str, code: str = "", optional: bool = False) -> p.Stage:
    """A stage that runs code and then leaves a file; each start is counted in another."""
    output = folder / name
    whole = (
        f"open({str(folder / (name + '.starts'))!r}, 'a').write('x')\n"
        f"print('this is', {name!r}, flush=True)\n{code}\nopen({str(output)!r}, 'w').close()"
    )
    return p.Stage(
        name,
        (sys.executable, "-c", whole),
        lambda: "finished" if output.exists() else "new",
        output,
        optional=optional,
    )


def starts(folder: Path, name: str) -> int:
    path = folder / f"{name}.starts"
    return len(path.read_text()) if path.exists() else 0


def run(folder: Path, *stages: p.Stage, conclude: Any = list, **commands: Any) -> int:
    return p.Runner(p.Plan("test", list(stages), conclude), folder / "log").run(**commands)


def status_of(folder: Path) -> str:
    return (folder / "log" / "pipeline.status").read_text()


def wait_for(condition, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# Running stages


def test_stages_run_in_order_with_banners_and_a_log(tmp_path, capsys):
    assert run(tmp_path, fake_stage(tmp_path, "a"), fake_stage(tmp_path, "b")) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "log" / "pipeline.log").read_text() == shown
    order = ["[1/2] a: started", "this is a", "[1/2] a: finished", "[2/2] b: started", "this is b"]
    positions = [shown.index(text) for text in order]
    assert positions == sorted(positions)
    status = status_of(tmp_path)
    assert status.startswith("SUCCESS: pipeline test, 2")
    assert str(tmp_path / "b") in status
    state = json.loads((tmp_path / "log" / "pipeline.json").read_text())
    assert state["stages"]["a"]["status"] == "finished"
    assert state["stages"]["a"]["exit_status"] == 0


def test_the_first_failure_stops_and_the_next_start_goes_on(tmp_path, capsys):
    guard = tmp_path / "mended"
    broken = f"import os, sys\nif not os.path.exists({str(guard)!r}): sys.exit('no such teacher')"
    stages = [
        fake_stage(tmp_path, "a"),
        fake_stage(tmp_path, "b", broken),
        fake_stage(tmp_path, "c"),
    ]
    assert run(tmp_path, *stages) == 1
    assert [starts(tmp_path, name) for name in "abc"] == [1, 1, 0]
    status = status_of(tmp_path)
    assert status.startswith("FAILED: pipeline test")
    assert "stage 2 of 3 (b), exit status 1" in status
    assert "no such teacher" in status
    guard.touch()
    assert run(tmp_path, *stages) == 0
    assert [starts(tmp_path, name) for name in "abc"] == [1, 2, 1]
    assert "a: finished before" in capsys.readouterr().out
    assert run(tmp_path, *stages) == 0
    assert [starts(tmp_path, name) for name in "abc"] == [1, 2, 1]


def test_what_was_removed_is_made_again(tmp_path):
    stages = [fake_stage(tmp_path, "a"), fake_stage(tmp_path, "b")]
    assert run(tmp_path, *stages) == 0
    (tmp_path / "a").unlink()
    assert run(tmp_path, *stages) == 0
    assert [starts(tmp_path, name) for name in "ab"] == [2, 1]


def test_success_without_output_is_a_failure(tmp_path):
    stage = p.Stage("a", (sys.executable, "-c", ""), lambda: "new", tmp_path / "a")
    assert run(tmp_path, stage, fake_stage(tmp_path, "b")) == 1
    assert f"{tmp_path / 'a'} is not made" in status_of(tmp_path)
    assert starts(tmp_path, "b") == 0


def test_the_exit_status_of_a_signal(tmp_path):
    killed = "import os; os.kill(os.getpid(), 9)"
    assert run(tmp_path, fake_stage(tmp_path, "a", killed)) == 128 + 9
    assert "exit status 137" in status_of(tmp_path)


def test_an_optional_stage_may_fail(tmp_path):
    stages = [
        fake_stage(tmp_path, "a", "raise SystemExit('the hub cannot be reached')", optional=True),
        fake_stage(tmp_path, "b"),
    ]
    assert run(tmp_path, *stages) == 0
    status = status_of(tmp_path)
    assert status.startswith("SUCCESS")
    assert "not made" in status
    assert "the hub cannot be reached" in status


def test_something_in_the_way_is_told_before_anything_starts(tmp_path):
    def in_the_way() -> str:
        raise ValueError("models/x holds a thesis")

    stages = [fake_stage(tmp_path, "a"), p.Stage("b", (), in_the_way, tmp_path)]
    mark = tmp_path / "ran"
    with pytest.raises(ValueError, match="thesis"):
        run(tmp_path, *stages, on_exit=f"touch {mark}")
    assert starts(tmp_path, "a") == 0
    assert not mark.exists()


def test_what_is_written_over_gets_the_flag(tmp_path):
    seen = tmp_path / "seen"
    code = f"import sys; open({str(seen)!r}, 'w').write(' '.join(sys.argv[1:]))"
    standing = lambda: "finished" if seen.exists() else p.REPLACE  # noqa: E731
    assert run(tmp_path, p.Stage("a", (sys.executable, "-c", code), standing, seen)) == 0
    assert seen.read_text() == "--overwrite"


@pytest.mark.parametrize(
    ("code", "outcome", "success_runs"),
    [("", "success", True), ("raise SystemExit(3)", "failed", False)],
)
def test_commands_at_the_end(tmp_path, code, outcome, success_runs):
    commands = {
        "on_success": f"touch {tmp_path}/succeeded",
        "on_exit": f'echo "$PIPELINE_OUTCOME" > {tmp_path}/exited; head -1 "$PIPELINE_STATUS_FILE"',
    }
    assert run(tmp_path, fake_stage(tmp_path, "a", code), **commands) == (0 if success_runs else 3)
    assert (tmp_path / "succeeded").exists() == success_runs
    assert (tmp_path / "exited").read_text().strip() == outcome
    assert f"\n{outcome.upper()}: pipeline" in (tmp_path / "log" / "pipeline.log").read_text()


def test_secrets_are_masked_wherever_the_pipeline_writes(tmp_path, capsys, monkeypatch):
    token, value = "hf" + "_" + "b2" * 17, "canary-of-the-environment"
    monkeypatch.setenv("SOME_TOKEN", value)
    # Cut in two, as a pipe may deliver it.
    code = (
        f"import sys, time\nprint({value[:9]!r}, end='', flush=True)\ntime.sleep(0.3)\n"
        f"print({value[9:]!r})\nsys.exit({value!r})"
    )
    curl = f"echo {token} {value}; exit 4"
    assert run(tmp_path, fake_stage(tmp_path, "a", code), on_exit=curl) == 4
    shown = capsys.readouterr().out
    texts = [path.read_text() for path in (tmp_path / "log").iterdir()]
    assert not any(each in text for each in (token, value) for text in [shown, *texts])
    assert "== --on_exit: echo (secret) (secret); exit 4" in shown
    assert "--on_exit echo (secret) (secret); exit 4: exit status 4" in status_of(tmp_path)


def test_the_state_names_python_and_scripts_by_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = (f"{tmp_path}/.venv/bin/python", f"{tmp_path}/scripts/train.py", "--data=d")
    assert p.shown_command(command) == [".venv/bin/python", "scripts/train.py", "--data=d"]
    assert run(tmp_path, fake_stage(tmp_path, "a")) == 0
    state = json.loads((tmp_path / "log" / "pipeline.json").read_text())
    assert not os.path.isabs(state["stages"]["a"]["command"][0])


def test_a_failing_command_is_told(tmp_path):
    assert run(tmp_path, fake_stage(tmp_path, "a"), on_success="echo oh; exit 5") == 5
    assert "--on_success echo oh; exit 5: exit status 5" in status_of(tmp_path)


def test_a_conclusion_stands_in_the_status(tmp_path):
    assert run(tmp_path, fake_stage(tmp_path, "a"), conclude=lambda: ["T = 2 is best"]) == 0
    assert "T = 2 is best" in status_of(tmp_path)

    def fails() -> list[str]:
        raise ValueError("nothing to conclude from")

    assert run(tmp_path, fake_stage(tmp_path, "a"), conclude=fails) == 1
    assert "nothing to conclude from" in status_of(tmp_path)


def test_two_pipelines_do_not_share_a_folder(tmp_path):
    with locked(tmp_path / "log"), pytest.raises(ValueError, match="--log_dir"):
        run(tmp_path, fake_stage(tmp_path, "a"))
    assert starts(tmp_path, "a") == 0


def test_a_broken_state_file_is_told(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "pipeline.json").write_text("[]")
    with pytest.raises(ValueError, match=r"pipeline\.json"):
        run(tmp_path, fake_stage(tmp_path, "a"))


def test_bars_and_broken_text_in_the_output(tmp_path):
    code = r"import sys; sys.stdout.buffer.write(b'10%\r100% \xff\xfe done'); sys.exit(1)"
    assert run(tmp_path, fake_stage(tmp_path, "a", code)) == 1
    assert "    100% \ufffd\ufffd done" in status_of(tmp_path)


# Terminals, signals and kills: the pipeline as a process of its own

DRIVER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from src.experiments import pipeline as p
{fake_stage}
folder = Path({folder!r})
slow = "import time\\n" + {body!r}
stages = [fake_stage(folder, 'a'), fake_stage(folder, 'b', slow), fake_stage(folder, 'c')]
raise SystemExit(p.Runner(p.Plan('test', stages), folder / 'log').run(on_exit={on_exit!r}))
"""
UNTIL_GO = "import os\nwhile not os.path.exists({go!r}): time.sleep(0.05)"


def driver(folder: Path, body: str | None = None) -> list[str]:
    body = body or UNTIL_GO.format(go=str(folder / "go"))
    code = DRIVER.format(
        root=str(ROOT),
        folder=str(folder),
        body=body,
        on_exit=f"touch {folder}/exited",
        fake_stage=inspect.getsource(fake_stage),
    )
    return [sys.executable, "-c", code]


@pytest.fixture
def start():
    """Start processes that a failing test does not leave behind."""
    started = []

    def start(command: list[str], **options) -> subprocess.Popen:
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_closed_terminal_does_not_stop_it(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, driver(tmp_path))
    wait_for(lambda: starts(tmp_path, "b"), 30)
    os.close(terminal)  # the kernel hangs up on everything in the session
    time.sleep(0.3)
    (tmp_path / "go").touch()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "c").exists()
    assert status_of(tmp_path).startswith("SUCCESS")
    assert "[3/3] c: finished" in (tmp_path / "log" / "pipeline.log").read_text()


def test_a_closed_pipe_does_not_stop_it(tmp_path, start):
    process = start(driver(tmp_path), stdout=subprocess.PIPE)
    wait_for(lambda: starts(tmp_path, "b"), 30)
    assert process.stdout is not None
    process.stdout.close()
    (tmp_path / "go").touch()
    assert process.wait(30) == 0
    assert status_of(tmp_path).startswith("SUCCESS")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_the_stage_and_are_told(tmp_path, start, signum, code):
    body = (
        f"import signal, sys\n"
        f"def end(*_): open({str(tmp_path / 'told')!r}, 'w').close(); sys.exit(0)\n"
        f"signal.signal({int(signum)}, end)\n" + UNTIL_GO.format(go=str(tmp_path / "go"))
    )
    process = start(driver(tmp_path, body), stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "log" / "pipeline.status").exists() and starts(tmp_path, "b"), 30)
    time.sleep(0.5)
    process.send_signal(signum)
    assert process.wait(30) == code
    assert (tmp_path / "told").exists()
    assert status_of(tmp_path).startswith("INTERRUPTED")
    assert not (tmp_path / "exited").exists()
    assert starts(tmp_path, "c") == 0


def test_after_kill_9_the_stage_ends_too_and_a_new_start_finishes(tmp_path, start):
    process = start(driver(tmp_path), stdout=subprocess.DEVNULL)
    state = tmp_path / "log" / "pipeline.json"

    def stage_pid() -> int | None:
        return starts(tmp_path, "b") and json.loads(state.read_text())["stages"]["b"]["pid"]

    wait_for(stage_pid, 30)
    pid = stage_pid()
    assert pid
    process.kill()
    process.wait()
    wait_for(lambda: p.process_started(pid) is None)
    assert status_of(tmp_path).startswith("RUNNING")
    (tmp_path / "go").touch()
    done = subprocess.run(driver(tmp_path), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [starts(tmp_path, name) for name in "abc"] == [1, 2, 1]
    assert status_of(tmp_path).startswith("SUCCESS")


def test_a_stage_that_outlived_its_pipeline_is_waited_for(tmp_path, capsys, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as left:
        record = {"pid": left.pid, "pid_started": p.process_started(left.pid), "starts": 1}
        (tmp_path / "log").mkdir()
        state = {"schema_version": 1, "stages": {"a": {**record, "seconds": 0.0}}}
        (tmp_path / "log" / "pipeline.json").write_text(json.dumps(state))
        monkeypatch.setattr(p, "ORPHAN_SECONDS", 0.2)
        with pytest.raises(ValueError, match=f"process {left.pid} of an earlier start"):
            run(tmp_path, fake_stage(tmp_path, "a"))
        left.kill()
    assert run(tmp_path, fake_stage(tmp_path, "a")) == 0
    assert "waiting for process" in capsys.readouterr().out


# What stands on disk


@pytest.fixture
def evaluated(tmp_path):
    """A finished model, and an evaluation of it as the pipeline asks for it."""
    model, output = tmp_path / "models" / "m", tmp_path / "m.json"
    model.mkdir(parents=True)
    write_run(model, {"settings": {}, "status": "finished", "student": {"fingerprint": "w"}})
    arguments = script.evaluate_arguments(
        ["--student_model", str(model), "--num_samples", "3", "--output", str(output)]
        + ["--per_protein", str(output.with_suffix(".parquet"))]
    )
    made = {**arguments, "device": "cuda", "overwrite": True}
    write_results(output, results(run={"arguments": made, "student": {"fingerprint": "w"}}))
    output.with_suffix(".parquet").touch()
    return model, output, arguments


def test_a_results_file_is_known_by_arguments_and_weights(evaluated):
    model, output, arguments = evaluated
    assert p.results_standing(output, arguments, model) == "finished"

    with pytest.raises(ValueError, match=r"another evaluation \(num_samples\).*--overwrite"):
        p.results_standing(output, {**arguments, "num_samples": 4}, model)
    assert p.results_standing(output, {**arguments, "num_samples": 4}, model, True) == "replace"

    write_run(model, {"settings": {}, "student": {"fingerprint": "other"}})
    with pytest.raises(ValueError, match="other weights"):
        p.results_standing(output, arguments, model)
    shutil.rmtree(model)
    with pytest.raises(ValueError, match="its model .* is not"):
        p.results_standing(output, arguments, model)


def test_results_are_known_though_their_paths_were_shortened(evaluated, tmp_path):
    model, output, arguments = evaluated
    theirs = tmp_path / "alice" / "home"
    asked = {**arguments, "data": str(theirs / "proteins"), "teacher_model": "~/models/big"}
    made = {"arguments": asked, "student": {"fingerprint": "w"}}
    write_results(output, results(run=made), overwrite=True)
    assert "alice" not in output.read_text()
    assert p.results_standing(output, asked, model) == "finished"
    with pytest.raises(ValueError, match=r"another evaluation \(data\)"):
        p.results_standing(output, {**asked, "data": str(theirs / "others")}, model)


def test_an_evaluation_by_hand_counts(evaluated):
    """The owner types ./models/x and no --per_protein."""
    model, output, arguments = evaluated
    typed = {**arguments, "student_model": f"./{model}", "output": "./x.json", "per_protein": None}
    run_record = {"arguments": typed, "student": {"fingerprint": "w"}}
    write_results(output, results(run=run_record), overwrite=True)
    output.with_suffix(".parquet").unlink()
    assert p.results_standing(output, arguments, model) == "finished"


def test_a_published_student_is_known_by_its_name(evaluated):
    _, output, arguments = evaluated
    tiny, small = (f"littleworth/protgpt2-distilled-{size}" for size in ("tiny", "small"))
    made = {**arguments, "student_model": tiny}
    write_results(output, results(run={"arguments": made}), overwrite=True)
    assert p.results_standing(output, made, tiny) == "finished"
    with pytest.raises(ValueError, match="student_model"):
        p.results_standing(output, {**made, "student_model": small}, small)


def test_half_an_evaluation_is_made_again(evaluated):
    model, output, arguments = evaluated
    output.with_suffix(".parquet").unlink()
    assert p.results_standing(output, arguments, model) == "replace"
    output.unlink()
    assert p.results_standing(output, arguments, model) == "new"
    output.with_suffix(".parquet").touch()
    with pytest.raises(ValueError, match="--overwrite"):
        p.results_standing(output, arguments, model)


def test_foreign_and_broken_results_are_left_alone(evaluated):
    model, output, arguments = evaluated
    output.write_text('{"perplexity_ratio": 3.0}')
    with pytest.raises(ValueError, match="older version"):
        p.results_standing(output, arguments, model)
    output.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        p.results_standing(output, arguments, model)
    assert p.results_standing(output, arguments, model, overwrite=True) == "replace"


# Plans


def plan_of(*arguments: str) -> p.Plan:
    return script.build_plan(script.build_parser().parse_args(list(arguments)))


def commands(plan: p.Plan) -> list[str]:
    return [" ".join(stage.command[2:]) for stage in plan.stages]


def test_the_default_is_the_owners_pipeline():
    plan = plan_of()
    assert [str(stage.output) for stage in plan.stages] == [
        "models/synergy-tiny",
        "results/eval_synergy_tiny.json",
        "models/synergy-small",
        "results/eval_synergy_small.json",
        "models/synergy-medium",
        "results/eval_synergy_medium.json",
    ]
    train, evaluate = commands(plan)[:2]
    assert "--preset hf-tiny --use_uncertainty_weighting --use_calibration_smoothing" in train
    assert train.endswith("--resume")
    assert evaluate.startswith(
        "--student_model models/synergy-tiny --num_samples 100 --compute_ece"
    )


def test_baselines_are_one_command():
    plan = plan_of("--baselines")
    assert plan.name == "baseline"
    assert [s.title for s in plan.stages][::2] == [
        f"train {n}" for n in ("xs", "tiny", "small", "medium")
    ]
    assert str(plan.stages[1].output) == "results/eval_baseline_xs.json"
    assert not any("--use_" in command for command in commands(plan))


def test_arguments_reach_their_scripts():
    plan = plan_of(
        "--presets", "xs", "--data", "d", "--device", "cpu", "--enhancements", "calibration",
        "--evaluate_args", "--num_samples 5 --max_proteins 7", "--models_dir", "m",
        "--results_dir", "r", "--name", "n", "--", "--max_steps", "3",
    )  # fmt: skip
    train, evaluate = commands(plan)
    assert train.startswith("--data d --device cpu --max_steps 3 --preset xs --use_calibration_")
    assert "--output_dir m/n-xs" in train
    assert "--num_samples 5 --max_proteins 7 --output r/eval_n_xs.json" in evaluate
    assert script.evaluate_arguments(plan.stages[1].command[2:])["num_samples"] == 5


def test_local_proteins_are_all_evaluated(tmp_path):
    (tmp_path / "test.fasta").write_text(">a\nMKV\n")
    assert "--max_proteins" not in commands(plan_of("--data", str(tmp_path)))[1]


def test_references_are_optional_stages_on_the_same_data():
    plan = plan_of("--references", "--data", "d")
    extra = plan.stages[6:]
    assert [str(s.output) for s in extra] == [
        f"results/eval_hf_{n}_old.json" for n in ("tiny", "small", "medium")
    ]
    assert all(stage.optional for stage in extra)
    assert commands(plan)[6].startswith(
        "--student_model littleworth/protgpt2-distilled-tiny --data d "
        "--teacher_model nferruz/ProtGPT2 "
    )


@pytest.mark.parametrize(
    ("parameter", "names"),
    [
        ("temperature", [f"t{t}.0-a0.5" for t in (1, 2, 4, 6, 8, 10)]),
        ("alpha", [f"t2.0-a{a}" for a in (0.1, 0.3, 0.5, 0.7, 0.9)]),
    ],
)
def test_sweeps_are_one_command_and_meet_the_owners_loops(parameter, names):
    plan = plan_of("--sweep", parameter)
    assert [stage.output.name for stage in plan.stages][::2] == [
        f"protgpt2-distilled-{name}-l4-h4-e256-p0.1-lr1e-03.uniprot-uncertainty-calibration"
        for name in names
    ]
    assert all("--split validation" in command for command in commands(plan)[1::2])
    loop = ["--alpha", "0.5", "--n_layer", "4", "--n_head", "4", "--n_embd", "256"]
    loop += ["--train_size_prop", "0.1", "--learning_rate", "1e-3", "--use_uncertainty_weighting"]
    loop += ["--use_calibration_smoothing", "--temperature", "2.0"]
    mine = next(s for s in plan.stages if "t2.0-a0.5" in s.output.name)
    assert script.train_settings(loop) == script.train_settings(mine.command[2:])


def test_a_sweep_of_alpha_takes_the_best_temperature():
    plan = plan_of("--sweep", "alpha", "--values", "0.1", "--", "--temperature", "4")
    assert "t4.0-a0.1" in plan.stages[0].output.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "huge"], "--presets huge"),
        (["--presets", "tiny", "hf-tiny"], "same directory"),
        (["--", "--output_dir", "x"], "--output_dir after --"),
        (["--", "--preset", "xs"], "--preset after --"),
        (["--", "--dry_run"], "--dry_run after --"),
        (["--", "--learning_rte", "1"], "scripts/train.py would refuse"),
        (["--", "--alpha", "7"], "--alpha must be in [0, 1]"),
        (["--evaluate_args", "--output x"], "--output"),
        (["--evaluate_args", "--bootstrap few"], "scripts/evaluate.py would refuse"),
        (["--sweep", "alpha", "--", "--alpha", "0.2"], "--alpha after --"),
        (["--sweep", "alpha", "--values", "0.1", "0.1"], "the same value twice"),
        (["--sweep", "alpha", "--values", "1.5"], "--alpha must be in"),
        (["--sweep", "alpha", "--evaluate_args", "--split test"], "--split"),
        (["--sweep", "alpha", "--baselines"], "--sweep"),
        (["--sweep", "alpha", "--data", "{file}"], "no validation part"),
        (["--values", "1"], "--values"),
        (["--references", "--presets", "xs"], "--references"),
    ],
)
def test_user_errors_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.fasta").write_text(">a\nMKV\n")
    assert script.main([a.format(file="one.fasta") for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert sorted(x.name for x in tmp_path.iterdir()) == ["one.fasta"]


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (["--presets", "xs"], "choose another --name or --models_dir"),
        (["--sweep", "alpha", "--values", "0.5"], "choose another --models_dir"),
    ],
)
def test_what_is_in_the_way_names_this_scripts_flags(
    arguments, flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    output = plan_of(*arguments).stages[0].output
    output.mkdir(parents=True)
    (output / "thesis.txt").touch()
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert flags in error
    assert "--output_dir" not in error


def test_dry_run_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script.main(["--dry_run", "--baselines"]) == 0
    assert "[8/8] evaluate medium: new" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_help_and_planning_need_no_torch():
    for arguments in (["--help"], ["--dry_run"]):
        code = (
            f"import runpy, sys; sys.argv = ['pipeline.py', *{arguments!r}]\n"
            "try: runpy.run_path('scripts/pipeline.py', run_name='__main__')\n"
            "except SystemExit as done: assert not done.code\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


# What a sweep concludes


def sweep_file(folder: Path, value: str, perplexity: float, kl: float, split: str = "validation"):
    path = folder / f"sweep_alpha_{value}.json"
    record = results(ratio=perplexity / 10, kl=kl, spread=0.004)
    record["student_perplexity_per_residue"] = perplexity
    record["run"]["data"] = {"split": split}
    write_results(path, record)
    return path


def test_the_best_of_a_sweep_is_chosen_on_validation(tmp_path):
    outputs = {
        value: sweep_file(tmp_path, value, perplexity, kl)
        for value, perplexity, kl in (("0.1", 14.0, 0.2), ("0.5", 12.0, 0.3), ("0.9", 12.05, 0.4))
    }
    lines = p.conclude_sweep("alpha", outputs, tmp_path / "sweep_alpha.json")
    assert "best on validation: alpha 0.5" in lines
    assert "not shown to be worse, or within the margin: 0.9" in lines
    assert "the KL divergence is lowest at alpha 0.1" in lines
    record = json.loads((tmp_path / "sweep_alpha.json").read_text())
    assert record["best"] == 0.5
    assert record["split"] == "validation"
    assert [row["against_best"] for row in record["runs"]] == ["higher", "best", "equivalent"]


def test_a_sweep_never_chooses_on_test(tmp_path):
    outputs = {"0.1": sweep_file(tmp_path, "0.1", 12.0, 0.2, split="test")}
    with pytest.raises(ValueError, match="validation"):
        p.conclude_sweep("alpha", outputs, tmp_path / "sweep_alpha.json")
    assert not (tmp_path / "sweep_alpha.json").exists()


# With real trainings: a teacher that knows its proteins, and students of a few steps

TINY = "--n_layer 1 --n_head 2 --n_embd 16 --batch_size 4 --validation_proteins 10 "
TINY += "--train_size_prop 1.0"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkout as a user stands in it, with a trained teacher and divided proteins."""
    import gzip

    from src.proteins.batching import PaddingCollator
    from src.proteins.tokenizer import train_tokenizer
    from tests.test_evaluation import ordered_proteins, trained

    root = tmp_path_factory.mktemp("workplace")
    for name in ("scripts", "src"):
        (root / name).symlink_to(ROOT / name)
    tokenizer = train_tokenizer(ordered_proteins(200, seed=1), 64, n_positions=256)
    trained(tokenizer, PaddingCollator(0), width=32, steps=150).save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    (root / "proteins").mkdir()
    for part, count, seed in (("train", 200, 4), ("validation", 40, 5), ("test", 40, 3)):
        with gzip.open(root / "proteins" / f"{part}.fasta.gz", "wt") as handle:
            for i, residues in enumerate(ordered_proteins(count, seed=seed)):
                handle.write(f">{part}{i}\n{residues}\n")
    return root


def pipeline(root: Path, *arguments: str) -> list[str]:
    own = f"--teacher_model {root}/teacher --data {root}/proteins --device cpu --name e2e "
    own += f"--models_dir {root}/models --results_dir {root}/results --log_dir {root}/log "
    own += f"--cache_dir {root}/cache"
    evaluate = ["--evaluate_args", "--num_samples 2 --bootstrap 50"]
    return ["bash", str(ROOT / "scripts" / "pipeline.sh"), *own.split(), *evaluate, *arguments]


def stage_state(root: Path, title: str) -> dict:
    try:
        return json.loads((root / "log" / "pipeline.json").read_text())["stages"].get(title, {})
    except FileNotFoundError:
        return {}


@pytest.mark.slow
def test_end_to_end_with_kills_in_the_middle(workplace, start):
    from src.common.files import sha256_file

    command = pipeline(workplace, "--presets", "xs", "tiny", "--", *TINY.split())
    command += ["--max_steps", "60", "--save_steps", "10", "--eval_steps", "30", "--dropout", ".1"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    # The training is killed, as when memory runs out.
    process = start(command, **quiet)
    wait_for(lambda: (workplace / "models/e2e-xs/checkpoint-20").exists(), 300)
    os.kill(stage_state(workplace, "train xs")["pid"], signal.SIGKILL)
    assert process.wait(120) == 137
    status = (workplace / "log/pipeline.status").read_text()
    assert "stage 1 of 4 (train xs), exit status 137" in status

    # The pipeline itself is killed while the second student is trained.
    process = start(command, **quiet)
    wait_for(lambda: (workplace / "models/e2e-tiny/checkpoint-10").exists(), 300)
    process.kill()
    process.wait()
    log = (workplace / "log/pipeline.log").read_text()
    assert "going on from checkpoint-" in log
    assert (workplace / "results/eval_e2e_xs.json").exists()

    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "[1/4] train xs: finished before" in done.stdout
    assert "[2/4] evaluate xs: finished before" in done.stdout
    status = (workplace / "log/pipeline.status").read_text()
    assert status.startswith("SUCCESS")
    assert status.count("ratio ") == 2

    # Nothing is left to do, and a kill changed no weight.
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert again.stdout.count("finished before") == 5
    state = stage_state(workplace, "train tiny")
    assert state["starts"] == 2
    straight = list(state["command"])
    position = straight.index("--output_dir") + 1
    straight[position] = str(workplace / "models/straight")
    subprocess.run(straight, check=True, timeout=600, **quiet)
    weights = [
        sha256_file(workplace / "models" / n / "model.safetensors")
        for n in ("e2e-tiny", "straight")
    ]
    assert weights[0] == weights[1]

    compared = subprocess.run(
        [sys.executable, ROOT / "scripts/compare.py", workplace / "results/eval_e2e_xs.json"]
        + ["--reference", workplace / "results/eval_e2e_tiny.json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "paired by protein, 40 clusters" in compared.stdout


@pytest.mark.slow
def test_the_owners_lines_as_typed(workplace):
    """What is added to the typed lines is only what a machine without the hub needs."""
    small = "--teacher_model teacher --data proteins --max_steps 2 --validation_proteins 5"
    small += " --device cpu --batch_size 2"
    lines = f"""
nohup bash -c '
echo "=== Starting Synergy Training Pipeline ===" && \\
echo "=== [1/2] Training Tiny (4L/4H/512E) ===" && \\
python scripts/train.py \\
    --temperature 2.0 --alpha 0.5 \\
    --n_layer 4 --n_head 4 --n_embd 512 \\
    --train_size_prop 0.1 --learning_rate 1e-3 \\
    --gradient_accumulation 2 \\
    --use_uncertainty_weighting --use_calibration_smoothing \\
    --output_dir ./models/synergy-tiny {small} && \\
\\
echo "=== [2/2] Evaluating Tiny ===" && \\
python scripts/evaluate.py \\
    --student_model ./models/synergy-tiny \\
    --num_samples 2 --compute_ece \\
    --output results/eval_synergy_tiny.json && \\
echo "=== Pipeline Complete ==="
' > nohup_synergy_training.out 2>&1 &
wait $!
for temp in 1.0 2.0; do
    python scripts/train.py \\
        --temperature $temp --alpha 0.5 \\
        --n_layer 4 --n_head 4 --n_embd 256 \\
        --train_size_prop 0.1 --learning_rate 1e-3 \\
        --use_uncertainty_weighting --use_calibration_smoothing {small}
done
"""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", lines], cwd=workplace, env=environment, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    log = (workplace / "nohup_synergy_training.out").read_text()
    assert "=== Pipeline Complete ===" in log, log[-2000:]
    found = json.loads((workplace / "results/eval_synergy_tiny.json").read_text())
    assert found["perplexity_ratio"] > 0
    assert 0 <= found["student_ece"]["ece"] <= 1
    runs = sorted(path.name for path in (workplace / "models").glob("protgpt2-distilled-*"))
    assert len(runs) == 2, done.stderr
    assert runs[0].startswith("protgpt2-distilled-t1.0-a0.5-l4-h4-e256-p0.1-lr1e-03.uniprot")

    # The sweep finds what the loop trained, and judges it on validation proteins.
    sweep = [sys.executable, "scripts/pipeline.py", "--sweep", "temperature", "--values", "1", "2"]
    sweep += ["--evaluate_args", "--bootstrap 50", "--", *small.split()]
    swept = subprocess.run(
        sweep, cwd=workplace, capture_output=True, text=True, timeout=600, check=False
    )
    assert swept.returncode == 0, swept.stdout[-2000:] + swept.stderr
    assert swept.stdout.count("finished before, models") == 2
    assert "best on validation: temperature" in swept.stdout
    assert json.loads((workplace / "results/sweep_temperature.json").read_text())["best"] in (1, 2)
