"""The pipeline runs stages in turn, goes on where it stopped, and tells what happened."""

from __future__ import annotations

import inspect
import json
import os
import pty
import shlex
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
from tests.conftest import run_python, write_parts
from tests.test_comparison import results

ROOT = Path(__file__).resolve().parents[1]
OPTIONS: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


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
        optional,
    )


def starts(folder: Path, names: str) -> list[int]:
    paths = [folder / f"{name}.starts" for name in names]
    return [len(path.read_text()) if path.exists() else 0 for path in paths]


def run(folder: Path, *stages: p.Stage, on_success: str | None = None) -> int:
    return p.Pipeline("test", stages, folder / "log").run(on_success)


def status_of(folder: Path) -> str:
    return (folder / "log" / "pipeline.status").read_text()


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# Running stages


def test_stages_run_in_order_into_one_log_and_a_status(tmp_path, capfd):
    stages = [fake_stage(tmp_path, "a"), p.Stage("b", (sys.executable, "-c", "print('T = 2')"))]
    assert run(tmp_path, *stages, on_success="echo good night") == 0
    shown = capfd.readouterr().out
    assert (tmp_path / "log" / "pipeline.log").read_text() == shown
    order = ["[1/2] a: started", "this is a", "[1/2] a: finished", "[2/2] b: started", "T = 2"]
    order += ["SUCCESS: pipeline test, 2", "--on_success: echo", "good night"]
    positions = [shown.index(text) for text in order]
    assert positions == sorted(positions)
    status = status_of(tmp_path)
    assert str(tmp_path / "a") in status
    assert "       T = 2\n" in status  # a stage without output shows its last lines


def test_the_first_failure_stops_and_the_next_start_goes_on(tmp_path, capfd):
    mended = tmp_path / "mended"
    broken = f"import os, sys\nif not os.path.exists({str(mended)!r}): sys.exit('no such teacher')"
    codes = {"a": "", "b": broken, "c": ""}
    stages = [fake_stage(tmp_path, name, code) for name, code in codes.items()]
    assert run(tmp_path, *stages, on_success=f"touch {tmp_path}/off") == 1
    assert starts(tmp_path, "abc") == [1, 1, 0]
    status = status_of(tmp_path)
    assert status.startswith("FAILED: pipeline test")
    assert "exit status 1\n       this is b\n       no such teacher" in status
    assert not (tmp_path / "off").exists()
    mended.touch()
    assert run(tmp_path, *stages) == 0
    assert starts(tmp_path, "abc") == [1, 2, 1]
    assert "a: finished before" in capfd.readouterr().out
    (tmp_path / "a").unlink()
    assert run(tmp_path, *stages) == 0
    assert starts(tmp_path, "abc") == [2, 2, 1]


def test_the_exit_status_of_a_signal_and_of_the_last_command(tmp_path):
    assert run(tmp_path, fake_stage(tmp_path, "a", "import os; os.kill(os.getpid(), 9)")) == 137
    assert "exit status 137" in status_of(tmp_path)
    assert run(tmp_path, fake_stage(tmp_path, "b"), on_success="exit 5") == 5


def test_an_optional_stage_may_fail(tmp_path):
    fails = fake_stage(tmp_path, "a", "raise SystemExit('the hub is away')", optional=True)
    assert run(tmp_path, fails, fake_stage(tmp_path, "b")) == 0
    assert status_of(tmp_path).startswith("SUCCESS")
    assert "not made, and not needed: the hub is away" in status_of(tmp_path)


def test_an_occupied_output_is_told_before_anything_starts(tmp_path):
    def occupied() -> str:
        raise ValueError("models/x holds a thesis")

    with pytest.raises(ValueError, match="thesis"):
        run(tmp_path, fake_stage(tmp_path, "a"), p.Stage("b", (), occupied, tmp_path))
    assert starts(tmp_path, "a") == [0]
    with locked(tmp_path / "log"), pytest.raises(ValueError, match="--log_dir"):
        run(tmp_path, fake_stage(tmp_path, "a"))


def test_what_is_replaced_gets_the_flag(tmp_path):
    code = "import sys; print(sys.argv[1:])"
    assert run(tmp_path, p.Stage("a", (sys.executable, "-c", code), lambda: p.REPLACE)) == 0
    assert "['--overwrite']" in status_of(tmp_path)


def test_secrets_are_masked_wherever_the_pipeline_writes(tmp_path, capfd, monkeypatch):
    token, value = "hf" + "_" + "b2" * 17, "canary-of-the-environment"
    monkeypatch.setenv("SOME_TOKEN", value)
    code = f"import sys; print({value!r}); sys.exit({value!r})"
    stages = [fake_stage(tmp_path, "a", code, optional=True), fake_stage(tmp_path, "b")]
    assert run(tmp_path, *stages, on_success=f"echo {token} {value}; exit 4") == 4
    shown = capfd.readouterr().out
    texts = [shown, *(path.read_text() for path in (tmp_path / "log").iterdir())]
    assert not any(secret in text for secret in (token, value) for text in texts)
    assert "== --on_success: echo (secret) (secret); exit 4" in shown
    assert "not needed: (secret)" in status_of(tmp_path)


def test_a_shown_command_has_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = (f"{tmp_path}/.venv/bin/python", f"{tmp_path}/scripts/train.py", "--data=d")
    assert p.shown_command(command) == ".venv/bin/python scripts/train.py --data=d"


# Terminals and signals: the pipeline as a process of its own

DRIVER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from src.experiments import pipeline as p
{fake_stage}
folder = Path({folder!r})
slow = "import time\\n" + {body!r}
stages = [fake_stage(folder, 'a'), fake_stage(folder, 'b', slow), fake_stage(folder, 'c')]
raise SystemExit(p.Pipeline('test', stages, folder / 'log').run('touch ' + {off!r}))
"""
UNTIL_GO = "import os\nwhile not os.path.exists({go!r}): time.sleep(0.05)"


def driver(folder: Path, before: str = "") -> list[str]:
    """Return the command of a pipeline whose second stage waits for the file ``go``."""
    code = DRIVER.format(
        root=str(ROOT),
        folder=str(folder),
        body=before + UNTIL_GO.format(go=str(folder / "go")),
        off=str(folder / "off"),
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
    wait_for(lambda: starts(tmp_path, "b") == [1])
    os.close(terminal)  # the kernel hangs up on everything in the session
    time.sleep(0.3)
    (tmp_path / "go").touch()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert status_of(tmp_path).startswith("SUCCESS")
    assert "[3/3] c: finished" in (tmp_path / "log" / "pipeline.log").read_text()


def test_a_closed_pipe_does_not_stop_it(tmp_path, start):
    process = start(driver(tmp_path), stdout=subprocess.PIPE)
    wait_for(lambda: starts(tmp_path, "b") == [1])
    assert process.stdout is not None
    process.stdout.close()
    (tmp_path / "go").touch()
    assert process.wait(60) == 0
    assert status_of(tmp_path).startswith("SUCCESS")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_the_stage_and_a_new_start_finishes(tmp_path, start, signum, code):
    before = (
        f"import signal, sys\n"
        f"def end(*_): open({str(tmp_path / 'told')!r}, 'w').close(); sys.exit(0)\n"
        f"signal.signal({int(signum)}, end)\nopen({str(tmp_path / 'ready')!r}, 'w').close()\n"
    )
    process = start(driver(tmp_path, before), **OPTIONS)
    wait_for((tmp_path / "ready").exists)
    assert status_of(tmp_path).startswith("RUNNING")
    process.send_signal(signum)
    assert process.wait(60) == code
    assert (tmp_path / "told").exists()
    assert status_of(tmp_path).startswith("INTERRUPTED")
    assert not (tmp_path / "off").exists()
    assert starts(tmp_path, "abc") == [1, 1, 0]
    (tmp_path / "go").touch()
    assert subprocess.run(driver(tmp_path), check=False, **OPTIONS).returncode == 0
    assert starts(tmp_path, "abc") == [1, 2, 1]
    assert (tmp_path / "off").exists()


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
    assert p.evaluation_state(output, arguments, model) == "finished"

    with pytest.raises(ValueError, match=r"another evaluation \(num_samples\).*--overwrite"):
        p.evaluation_state(output, {**arguments, "num_samples": 4}, model)
    assert p.evaluation_state(output, {**arguments, "num_samples": 4}, model, True) == "replace"

    write_run(model, {"settings": {}, "student": {"fingerprint": "other"}})
    with pytest.raises(ValueError, match="other weights"):
        p.evaluation_state(output, arguments, model)
    shutil.rmtree(model)
    with pytest.raises(ValueError, match="its model .* does not"):
        p.evaluation_state(output, arguments, model)


def test_results_are_known_though_their_paths_were_shortened(evaluated, tmp_path):
    model, output, arguments = evaluated
    theirs = tmp_path / "alice" / "home"
    asked = {**arguments, "data": str(theirs / "proteins"), "teacher_model": "~/models/big"}
    made = {"arguments": asked, "student": {"fingerprint": "w"}}
    write_results(output, results(run=made), overwrite=True)
    assert "alice" not in output.read_text()
    assert p.evaluation_state(output, asked, model) == "finished"
    with pytest.raises(ValueError, match=r"another evaluation \(data\)"):
        p.evaluation_state(output, {**asked, "data": str(theirs / "others")}, model)


def test_half_an_evaluation_is_made_again_and_one_by_hand_counts(evaluated):
    """By hand the owner types ./models/x and no --per_protein."""
    model, output, arguments = evaluated
    output.with_suffix(".parquet").unlink()
    assert p.evaluation_state(output, arguments, model) == "replace"
    output.unlink()
    assert p.evaluation_state(output, arguments, model) == "new"
    typed = {**arguments, "student_model": f"./{model}", "output": "./x.json", "per_protein": None}
    run_record = {"arguments": typed, "student": {"fingerprint": "w"}}
    write_results(output, results(run=run_record))
    assert p.evaluation_state(output, arguments, model) == "finished"


def test_a_published_student_is_known_by_its_name(evaluated):
    _, output, arguments = evaluated
    tiny, small = (f"littleworth/protgpt2-distilled-{size}" for size in ("tiny", "small"))
    made = {**arguments, "student_model": tiny}
    write_results(output, results(run={"arguments": made}), overwrite=True)
    assert p.evaluation_state(output, made, tiny) == "finished"
    with pytest.raises(ValueError, match="student_model"):
        p.evaluation_state(output, {**made, "student_model": small}, small)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"perplexity_ratio": 3.0}', "older version"), ("{", "not valid JSON")],
)
def test_results_of_others_are_left_alone(evaluated, content, message):
    model, output, arguments = evaluated
    output.write_text(content)
    with pytest.raises(ValueError, match=message):
        p.evaluation_state(output, arguments, model)
    assert p.evaluation_state(output, arguments, model, overwrite=True) == "replace"


# Plans


def stages_of(*arguments: str) -> list[p.Stage]:
    return script.build_stages(script.build_parser().parse_args(list(arguments)))[1]


def commands(*arguments: str) -> list[str]:
    return [" ".join(stage.command[2:]) for stage in stages_of(*arguments)]


def test_the_default_is_the_owners_pipeline():
    assert [str(stage.output) for stage in stages_of()] == [
        path
        for size in ("tiny", "small", "medium")
        for path in (f"models/synergy-{size}", f"results/eval_synergy_{size}.json")
    ]
    train, evaluate = commands()[:2]
    assert "--preset hf-tiny --use_uncertainty_weighting --use_calibration_smoothing" in train
    assert train.endswith("--resume")
    assert evaluate.startswith(
        "--student_model models/synergy-tiny --num_samples 100 --compute_ece --max_proteins 5000"
    )


def test_baselines_are_one_command():
    stages = stages_of("--baselines")
    sizes = ("xs", "tiny", "small", "medium")
    assert [s.title for s in stages][::2] == [f"train {size}" for size in sizes]
    assert str(stages[1].output) == "results/eval_baseline_xs.json"
    assert not any("--use_" in command for command in commands("--baselines"))


def test_arguments_reach_their_scripts(tmp_path):
    (tmp_path / "test.fasta").write_text(">a\nMKV\n")
    train, evaluate = commands(
        "--presets", "xs", "--data", str(tmp_path), "--device", "cpu", "--models_dir", "m",
        "--evaluate_args", "--num_samples 5 --seed 7", "--results_dir", "r", "--name", "n",
        "--", "--max_steps", "3",
    )  # fmt: skip
    assert train.startswith(f"--data {tmp_path} --device cpu --max_steps 3 --preset xs --use_unc")
    assert "--output_dir m/n-xs" in train
    assert "--num_samples 5 --seed 7 --output r/eval_n_xs.json" in evaluate
    assert "--max_proteins" not in evaluate  # proteins on this machine are all evaluated
    template = "{EC}<sep><start>{residues}<end>"
    for sweep in ((), ("--sweep", "alpha")):
        asked = commands("--presets", "xs", "--data", str(tmp_path), "--layout", template, *sweep)
        assert all(f"--layout {template}" in command for command in asked[:2])


def test_references_are_optional_stages_on_the_same_data():
    extra = stages_of("--references", "--data", "d")[6:]
    assert [str(s.output) for s in extra][::2] == [
        f"results/eval_hf_{n}_old.json" for n in ("tiny", "small", "medium")
    ]
    assert all(stage.optional for stage in extra)
    evaluate, compare = commands("--references", "--data", "d")[6:8]
    assert evaluate.startswith(
        "--student_model littleworth/protgpt2-distilled-tiny --data d "
        "--teacher_model nferruz/ProtGPT2 "
    )
    assert compare == "results/eval_synergy_tiny.json --reference results/eval_hf_tiny_old.json"


@pytest.mark.parametrize(
    ("parameter", "values"),
    [("temperature", (1, 2, 4, 6, 8, 10)), ("alpha", (0.1, 0.3, 0.5, 0.7, 0.9))],
)
def test_sweeps_are_grids_around_the_owners_run(parameter, values):
    """With ProtGPT2, and each cell the run of the owner's loop over scripts/train.py."""
    train, choose, compare = commands("--sweep", parameter)
    assert choose == train.replace(" -- ", " --choose -- ")
    assert "--max_proteins 5000" in train
    grid = script.ablation.chosen(script.ablation.build_parser().parse_args(train.split()))
    assert [getattr(loss, parameter) for loss in grid.arms.values()] == list(values)
    assert grid.split == "validation"
    assert len(grid.cells()) == len(compare.split()) == len(values)
    loop = "--n_layer 4 --n_head 4 --n_embd 256 --train_size_prop 0.1 --learning_rate 1e-3 "
    loop += "--use_uncertainty_weighting --use_calibration_smoothing --temperature 2.0 --alpha 0.5"
    wanted = script.train_settings(loop.split())
    assert wanted in [grid.settings(cell) for cell in grid.cells()]
    assert wanted.teacher_model == "nferruz/ProtGPT2"


def test_a_sweep_of_alpha_takes_the_best_temperature():
    (train, *_) = commands("--sweep", "alpha", "--values", "0.1", "--", "--temperature", "4")
    grid = script.ablation.chosen(script.ablation.build_parser().parse_args(train.split()))
    assert [(loss.alpha, loss.temperature) for loss in grid.arms.values()] == [(0.1, 4)]


def test_one_file_is_not_both_trained_on_and_evaluated(tmp_path, refusal):
    (tmp_path / "my.fasta").write_text(">a\nMKV\n")
    (tmp_path / "train.fasta").write_text(">a\nMKV\n")
    given = ["--presets", "xs", "--models_dir", str(tmp_path / "m"), "--data"]
    for data in (tmp_path / "my.fasta", tmp_path):
        message = refusal(script.main([*given, str(data)]))
        assert f"--data {data} has no test or validation part to measure students on" in message
    assert not (tmp_path / "m").exists()
    other = ["--evaluate_args", f"--data {tmp_path}/other.fasta"]
    assert stages_of(*given[2:], str(tmp_path / "my.fasta"), *other)


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
        (["--sweep", "alpha", "--", "--report_to", "wandb"], "--report_to after --"),
        (["--sweep", "alpha", "--", "--early_stopping"], "--early_stopping: not in a sweep"),
        (["--sweep", "alpha", "--values", "0.1", "0.1"], "the same value twice"),
        (["--sweep", "alpha", "--values", "1.5"], "--alpha must be in"),
        (["--sweep", "alpha", "--evaluate_args", "--seed 1"], "--evaluate_args"),
        (["--sweep", "alpha", "--references"], "--sweep"),
        (["--values", "1"], "--values"),
        (["--references", "--presets", "xs"], "--references"),
    ],
)
def test_user_errors_are_one_line(arguments, message, tmp_path, refusal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(script.main(arguments))
    assert not list(tmp_path.iterdir())


def test_an_occupied_directory_names_this_scripts_flags(tmp_path, refusal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "synergy-xs").mkdir(parents=True)
    (tmp_path / "models" / "synergy-xs" / "thesis.txt").touch()
    error = refusal(script.main(["--presets", "xs"]))
    assert "choose another --name or --models_dir" in error


# With real trainings: a teacher that knows its proteins, and students of a few steps

TINY = "--n_layer 1 --n_head 2 --n_embd 16 --batch_size 4 --validation_proteins 10 "
TINY += "--train_size_prop 1.0"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkout as a user stands in it, with a trained teacher and divided proteins."""
    from src.proteins.tokenizer import train_tokenizer
    from tests.test_evaluation import ordered_proteins, trained

    root = tmp_path_factory.mktemp("workplace")
    for name in ("scripts", "src"):
        (root / name).symlink_to(ROOT / name)
    tokenizer = train_tokenizer(ordered_proteins(200, seed=1), 64, n_positions=256)
    trained(tokenizer, width=32, steps=150).save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    counts = {"train": (200, 4), "validation": (40, 5), "test": (40, 3)}
    write_parts(root / "proteins", {p: ordered_proteins(*given) for p, given in counts.items()})
    return root


def pipeline(root: Path, *arguments: str) -> list[str]:
    own = f"--teacher_model {root}/teacher --data {root}/proteins --device cpu --name e2e "
    own += f"--models_dir {root}/models --results_dir {root}/results --log_dir {root}/log "
    own += f"--cache_dir {root}/cache"
    evaluate = ["--evaluate_args", "--num_samples 2 --bootstrap 50"]
    return ["bash", str(ROOT / "scripts" / "pipeline.sh"), *own.split(), *evaluate, *arguments]


@pytest.mark.slow
def test_end_to_end_with_a_kill_and_a_signal(workplace, start):
    from src.common.files import sha256_file

    models, status = workplace / "models", workplace / "log/pipeline.status"
    command = pipeline(workplace, "--presets", "xs", "tiny", "--", *TINY.split())
    command += ["--max_steps", "60", "--save_steps", "10", "--eval_steps", "30", "--dropout", ".1"]

    # The training is killed, as when memory runs out.
    process = start(command, **OPTIONS)
    wait_for((models / "e2e-xs/checkpoint-20").exists, 300)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children), signal.SIGKILL)
    assert process.wait(120) == 137
    assert "train xs                     failed after" in status.read_text()

    # The pipeline is stopped while the second student is trained.
    process = start(command, **OPTIONS)
    wait_for((models / "e2e-tiny/checkpoint-10").exists, 300)
    process.terminate()
    assert process.wait(120) == 143
    assert "going on from checkpoint-" in (workplace / "log/pipeline.log").read_text()
    assert (workplace / "results/eval_e2e_xs.json").exists()

    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "[2/4] evaluate xs: finished before" in done.stdout
    assert status.read_text().startswith("SUCCESS")
    assert status.read_text().count("ratio ") == 2

    # Nothing is left to do, and no interruption changed a weight.
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert again.stdout.count("== [") == again.stdout.count(": finished before, ") == 4
    command.insert(command.index("--"), "--dry_run")
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    straight = shlex.split(next(x for x in shown.stdout.splitlines() if "e2e-tiny --resume" in x))
    straight[straight.index("--output_dir") + 1] = str(models / "straight")
    subprocess.run(straight, check=True, timeout=600, cwd=ROOT, **OPTIONS)
    weights = [sha256_file(models / n / "model.safetensors") for n in ("e2e-tiny", "straight")]
    assert weights[0] == weights[1]


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

    sweep = ["--sweep", "temperature", "--values", "1", "2", "--device", "cpu", "--"]
    sweep += small.replace(" --device cpu", "").split()
    swept = run_python("scripts/pipeline.py", *sweep, cwd=workplace)
    assert swept.returncode == 0, swept.stdout[-2000:] + swept.stderr
    assert "best on validation at tiny: temperature" in swept.stdout
    record = json.loads((workplace / "results/sweep_temperature/learning_rates.json").read_text())
    assert record["best_arm"]["tiny"] in ("temperature1", "temperature2")
