"""scripts/train.py as a user types it: settings, names, refusals, planning, and a whole run."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from scripts import train as script
from src.common.settings import (
    PRESETS,
    LossSettings,
    StudentSettings,
    TrainSettings,
    default_run_name,
)

ROOT = Path(__file__).resolve().parents[1]


def settings_of(*arguments: str) -> TrainSettings:
    parser = script.with_recipe(script.build_parser(), arguments)
    return script.build_settings(parser.parse_args(arguments))


def test_default_name_is_the_designs():
    name = default_run_name(settings_of())
    assert name == "protgpt2-distilled-t2.0-a0.5-l4-h4-e256-p0.1-lr1e-03.uniprot"


def test_the_owners_command():
    typed = (
        "--temperature 2.0 --alpha 0.5 --n_layer 4 --n_head 4 --n_embd 512 --train_size_prop 0.1 "
        "--learning_rate 1e-3 --use_uncertainty_weighting --use_calibration_smoothing "
        "--output_dir ./models/synergy-tiny"
    )
    settings = settings_of(*typed.split())
    assert settings.student == StudentSettings(4, 4, 512)
    assert settings.loss == LossSettings(
        use_uncertainty_weighting=True, use_calibration_smoothing=True
    )
    assert settings.data == "nferruz/UR50_2021_04"
    assert settings.teacher_model == "nferruz/ProtGPT2"


def test_a_recipe_sets_flags_and_those_given_win_wherever_they_stand():
    recommended = settings_of("--recipe", "recommended", "--teacher_model", "T")
    assert recommended.init_from == "T"
    assert (recommended.loss.temperature, recommended.loss.alpha) == (1.0, 0.0)
    assert recommended.optimizer == "muon"
    assert recommended.lr_schedule == "warmup_stable_decay"
    assert settings_of("--recipe", "recommended", "--optimizer", "adamw").optimizer == "adamw"
    assert recommended.student == StudentSettings()
    both = settings_of("--recipe=published").loss
    assert both.use_uncertainty_weighting
    assert both.use_calibration_smoothing
    for typed in ("--alpha 0.5 --recipe recommended", "--recipe recommended --alpha 0.5"):
        assert settings_of(*typed.split()).loss.alpha == 0.5
    assert settings_of("--init_from", "teacher").init_from == "nferruz/ProtGPT2"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_set_shape_and_rate_and_flags_win(preset):
    settings = settings_of("--preset", preset)
    assert settings.student == PRESETS[preset].student
    assert settings.learning_rate == PRESETS[preset].learning_rate
    changed = settings_of("--preset", preset, "--n_layer", "3", "--learning_rate", "2e-4")
    assert changed.student is not None
    assert changed.student.n_layer == 3
    assert changed.learning_rate == 2e-4


CHANGES = (
    """
--teacher_model other | --data other | --train_size_prop 0.5 | --data_seed 3 | --max_length 100
--sequence_column seq | --layout plain
--n_layer 3 | --n_head 2 | --n_embd 64 | --dropout 0.1 | --temperature 3 | --alpha 0.25
--use_uncertainty_weighting | --use_calibration_smoothing | --smoothing_factor 0.2
--weighting mean_one | --smoothing confident | --divergence jsd | --divergence_weight 0.3
--loss_impl reference | --teacher_cache caches | --learning_rate 5e-4 | --optimizer muon
--lr_schedule cosine | --warmup_steps 7 | --weight_decay 0.1 | --max_grad_norm 2 | --batch_size 4
--gradient_accumulation_steps 2 | --num_train_epochs 1 | --max_steps 5 | --batching packed
--precision fp32 | --seed 1 | --skip_loss_spikes 3 | --early_stopping | --recipe published
--eval_steps 3 | --save_steps 3 | --validation_proteins 10
""".strip()
    .replace("\n", " | ")
    .split(" | ")
)
BESIDE = """
--preset --output_dir --resume --report_to --device --num_workers --init_from --tokenizer
--other_learning_rate --cache_dir --shard_teacher --skip_teacher_check --dry_run --compile --help -h
"""


@pytest.mark.parametrize("change", CHANGES)
def test_every_flag_changes_the_settings(change):
    assert settings_of(*change.split()) != settings_of()


def test_no_flag_is_forgotten_here():
    options = {o for a in script.build_parser()._actions for o in a.option_strings}
    assert options == {change.split()[0] for change in CHANGES} | set(BESIDE.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n_embd", "250"], "--n_embd 250 is not divisible by --n_head 4"),
        (["--preset", "huge"], "--preset"),
        (["--alpha", "2"], "--alpha must be in [0, 1]"),
        (["--temperature", "0"], "--temperature"),
        (["--train_size_prop", "0"], "--train_size_prop"),
        (["--teacher_model", "no/such/place"], "there is no such directory"),
        (["--teacher_model", "models/mistyped"], "there is no such directory"),
        (["--teacher_model", "data/small_teacher", "--data", "missing.fasta"], "missing.fasta"),
        (["--device", "cuda", "--teacher_model", "data/small_teacher"], "--device"),
        (["--data", "data/proteins"], "data/small_teacher"),
        (["--data", "", "--teacher_model", "data/small_teacher"], "--data is an empty name"),
        (["--num_workers", "1" + "0" * 30], "argument --num_workers: must be at most"),
        (["--n_layer", "1000000000"], "--n_layer must be from 1 to 4800"),
        (["--n_embd", "1000000000", "--n_head", "1"], "--n_embd must be from 1 to 160000"),
        (["--n_head", "1000000000", "--n_embd", "1"], "--n_head must be from 1 to 2500"),
        (["--num_train_epochs", "1e308"], "--num_train_epochs: must be above 0 and at most 1e+12"),
        (["--temperature", "1e308"], "--temperature: must be above 0 and at most 1e+12"),
        (["--temperature", "1e-320"], "--temperature must be above 0, from 0.0001 to 10000"),
        (["--temperature", "1e6"], "--temperature must be above 0, from 0.0001 to 10000"),
        (["--learning_rate", "1e39"], "--learning_rate: must be above 0 and at most 1e+12"),
        (["--learning_rate", "1e-300"], "--learning_rate must be above 0, from 1e-12"),
        (["--max_grad_norm", "1e39"], "--max_grad_norm"),
        (["--weight_decay", "1e39"], "--weight_decay must be from 0 to 1e+12"),
        (["--weight_decay", "nan"], "--weight_decay must be from 0 to 1e+12"),
        (["--skip_loss_spikes", "1e39"], "--skip_loss_spikes"),
        (["--seed", "4294967296"], "--seed: must be at most 4294967295"),
        (["--batch_size", "9" * 30], "--batch_size: must be at most 4294967295"),
        (["--max_steps", "0"], "--max_steps must be from 1 to 4294967295, or -1 for what the"),
        (["--max_steps", "-5"], "--max_steps must be from 1"),
        (["--max_steps", "9" * 30], "--max_steps must be from 1"),
        (["--cache_dir", "/dev/null"], "--cache_dir: must be a directory, and /dev/null is none"),
        (["--device", "meta", "--teacher_model", "data/small_teacher"], "cpu, cuda, cuda:N or mps"),
        (["--tokenizer", "data/small_teacher"], "--tokenizer: is for training from random"),
        (
            ["--tokenizer", "data/small_teacher", "--alpha", "1", "--init_from", "models/x"]
            + ["--n_layer", "1"],
            "--tokenizer: is for training from random",
        ),
        (["--other_learning_rate", "1e-3"], "--other_learning_rate: needs --optimizer muon"),
    ],
)
def test_user_errors_are_one_line(arguments, message, refusal, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    if "cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    output = str(tmp_path / "run")
    assert message in refusal(lambda: script.main([*arguments, "--output_dir", output]))
    assert not (tmp_path / "run").exists()


def tiny_run(teacher, proteins, output, cache, *more: str, check: bool = False) -> int:
    """Train; without ``check`` the bundled teacher is not judged first, which takes seconds."""
    return script.main(
        f"--teacher_model {teacher} --data {proteins} --output_dir {output} --cache_dir {cache} "
        "--n_layer 1 --n_head 2 --n_embd 16 --max_steps 6 --batch_size 4 --eval_steps 3 "
        "--save_steps 2 --validation_proteins 8 --train_size_prop 0.01 --dropout 0.1 "
        "--use_uncertainty_weighting --use_calibration_smoothing --device cpu".split()
        + ["--skip_teacher_check"] * (not check)
        + list(more)
    )


@pytest.fixture(scope="module")
def train(small_teacher_dir, proteins_dir, tmp_path_factory):
    """Return a function that trains in a directory with the small teacher and one cache."""
    cache = tmp_path_factory.mktemp("cache")

    def train(run, *more: str, check: bool = False) -> int:
        return tiny_run(small_teacher_dir, proteins_dir, run, cache, *more, check=check)

    return train


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("train") / "run"
    assert train(run, check=True) == 0
    return run


@pytest.fixture
def interrupted(monkeypatch):
    """Return a function that runs a training and interrupts it at its fifth step."""
    from src.distillation import DistillationTrainer

    original = DistillationTrainer.training_step

    def stop(self, *arguments, **options):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    def interrupted(train, *arguments: str) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(DistillationTrainer, "training_step", stop)
            assert train(*arguments) == 130

    return interrupted


def test_a_run_leaves_a_finished_model(finished, small_teacher_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((finished / "run.json").read_text())
    assert record["status"] == "finished"
    assert Path(record["teacher"]["name"]).resolve() == small_teacher_dir
    assert record["data"]["train"]["proteins"] > 0
    assert record["final"]["eval_loss"] > 0
    assert {"commit", "dirty"} <= record["git"].keys()
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert model.config.vocab_size == len(tokenizer)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "hard_loss", "soft_loss", "learning_rate", "grad_norm"} <= lines[0].keys()
    assert sum("eval_loss" in line for line in lines) == 2
    suffixes = {p.suffix for p in finished.rglob("*") if p.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}


def test_a_finished_run_is_not_run_again(finished, train, capsys):
    before = (finished / "run.json").stat().st_mtime_ns
    assert train(finished) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert train(finished, "--seed", "1") == 2
    assert "other settings (seed)" in capsys.readouterr().err
    assert (finished / "run.json").stat().st_mtime_ns == before


def test_a_disk_that_is_full_at_the_start_is_named(tmp_path, train, capsys, full_disk):
    full_disk("src.training.stages.locked")
    assert train(tmp_path / "run") == 2
    assert f"{tmp_path}/run: no space left on the disk; make space" in capsys.readouterr().err


def test_foreign_files_are_left_alone(tmp_path, train, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert train(tmp_path) == 2
    assert "no run of ours" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_killed_run_goes_on_to_the_same_weights(finished, tmp_path, train, capsys, interrupted):
    cut = tmp_path / "run"
    interrupted(train, cut)
    assert train(cut) == 2
    assert "--resume" in capsys.readouterr().err
    assert train(cut, "--resume") == 0
    assert "going on from checkpoint-4" in capsys.readouterr().out
    weights = [(run / "model.safetensors").read_bytes() for run in (cut, finished)]
    assert weights[0] == weights[1]


def test_a_model_is_trained_from_a_tokenizer_alone_and_resumes_to_the_same_bits(
    tmp_path, small_teacher_dir, proteins_dir, capsys, interrupted
):
    """How the small teacher is made: no teacher, random weights, Muon."""
    from scripts import evaluate

    def untaught(name: str, *more: str) -> int:
        return script.main(
            f"--tokenizer {small_teacher_dir} --alpha 1 --optimizer muon --data {proteins_dir} "
            f"--other_learning_rate 2e-3 --output_dir {tmp_path / name} --max_length 64 "
            f"--cache_dir {tmp_path / 'cache'} --n_layer 1 --n_head 2 --n_embd 16 --max_steps 6 "
            "--batch_size 4 --eval_steps 3 --save_steps 2 --validation_proteins 8 --device cpu "
            "--train_size_prop 0.01 --lr_schedule warmup_stable_decay".split()
            + list(more)
        )

    assert untaught("whole") == 0
    shown = capsys.readouterr().out
    assert "no teacher; model 1L/2H/16E" in shown
    assert "soft" not in shown
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["teacher"] is None
    assert record["compression"] is None
    interrupted(untaught, "cut")
    assert untaught("cut", "--resume") == 0
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut")]
    assert weights[0] == weights[1]
    command = f"--student_model {tmp_path / 'whole'} --data {proteins_dir} --output"
    assert evaluate.main([*command.split(), str(tmp_path / "results.json")]) == 2
    assert "was trained without a teacher: pass --teacher_model" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["teacher's weights", "training proteins"])
def test_a_run_does_not_go_on_with_another_teacher_or_other_proteins(
    changed, tmp_path, small_teacher_dir, proteins_dir, capsys, interrupted
):
    from safetensors.torch import load_file, save_file

    teacher, data, run = (tmp_path / name for name in ("teacher", "proteins.fasta", "run"))
    shutil.copytree(small_teacher_dir, teacher)
    entries = gzip.decompress((proteins_dir / "test.fasta.gz").read_bytes()).split(b">")[1:101]
    data.write_bytes(b"".join(b">" + entry for entry in entries))
    where = [teacher, data, run, tmp_path / "cache", "--train_size_prop", "1.0"]
    where += ["--skip_teacher_check"]
    interrupted(tiny_run, *where)
    before = (run / "run.json").read_bytes()
    if changed == "teacher's weights":
        weights = load_file(teacher / "model.safetensors")
        scaled = {name: tensor * 1.01 for name, tensor in weights.items()}
        save_file(scaled, teacher / "model.safetensors", {"format": "pt"})
    else:
        data.write_bytes(b"".join(b">" + entry for entry in entries[10:]))
    assert tiny_run(*where, "--resume") == 2
    assert f"was begun with other {changed}" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == before


def test_a_run_that_another_process_finished_meanwhile_is_not_begun_anew(
    finished, tmp_path, train, capsys, monkeypatch, interrupted
):
    from src.training import stages

    run = tmp_path / "run"
    interrupted(train, run)
    gather = stages.gather

    def gather_slowly(*arguments):
        shutil.rmtree(run)
        shutil.copytree(finished, run)  # as the other process left it
        return gather(*arguments)

    monkeypatch.setattr(stages, "gather", gather_slowly)
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    assert train(run, "--resume") == 0
    assert "finished: nothing to do" in capsys.readouterr().out
    after = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert {**after, ".lock": b""} == {**before, ".lock": b""}


def test_a_launchers_precision_does_not_win_over_the_runs(finished, tmp_path, train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(tmp_path / "run") == 0
    weights = [(r / "model.safetensors").read_bytes() for r in (tmp_path / "run", finished)]
    assert weights[0] == weights[1]


def test_a_finished_run_without_its_weights_is_named(finished, tmp_path, train, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert train(tmp_path / "run") == 2
    assert "its weights are gone" in capsys.readouterr().err


def test_dry_run_trains_nothing(tmp_path, small_teacher_dir, proteins_dir, capsys):
    arguments = ["--dry_run", "--teacher_model", str(small_teacher_dir), "--data"]
    arguments += [str(proteins_dir), "--cache_dir", str(tmp_path / "cache"), "--preset", "tiny"]
    arguments += ["--batch_size", "2"]  # a quick one to time
    assert script.main([*arguments, "--output_dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "tiny " in shown
    assert "xs " in shown
    assert "left out, because larger than the teacher: small, medium, hf-tiny, hf-" in shown
    assert not re.search(r"\d,?\d\d\d\.\d%", shown)
    assert f"output: {tmp_path / 'run'}" in shown
    assert re.search(r"disk: [\d.]+ MB \(2 checkpoints kept and one being written", shown)
    assert re.search(r"tiny on this machine: about .* left .* peak memory", shown)
    assert "nothing was trained" in shown
    assert not (tmp_path / "run").exists()


def test_dry_run_knows_the_cache_and_a_run_without_a_teacher(
    tmp_path, small_teacher_dir, proteins_dir, capsys
):
    common = f"--dry_run --data {proteins_dir} --cache_dir {tmp_path / 'cache'} --device cpu "
    common += f"--output_dir {tmp_path / 'run'} --train_size_prop 0.01 --preset xs --max_steps 20 "
    cached = f"--teacher_model {small_teacher_dir} --teacher_cache {tmp_path / 'kept'}"
    assert script.main((common + cached).split()) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"teacher cache: [\d.]+ .B in {tmp_path / 'kept'}; .* free", shown)
    assert "time: not measured" in shown
    assert script.main((common + f"--tokenizer {small_teacher_dir} --alpha 1").split()) == 0
    shown = capsys.readouterr().out
    assert f"no teacher; tokenizer {small_teacher_dir}: 28 tokens" in shown
    assert "xs on this machine: about " in shown
    assert not list(tmp_path.glob("run*"))


def test_planning_knows_the_default_teacher(capsys):
    assert script.main(["--dry_run", "--preset", "hf-tiny"]) == 0
    shown = capsys.readouterr().out
    assert "774,030,080" in shown
    assert "38,866,432" in shown


def test_a_student_beyond_the_machines_memory_is_not_built(monkeypatch):
    from types import SimpleNamespace

    from src.models import loading as models

    teacher = SimpleNamespace(vocab_size=512, n_positions=512, bos_token_id=0, eos_token_id=0)
    config = models.student_config(StudentSettings(1, 2, 16), teacher)
    needed = 4 * models.gpt2_parameters(1, 16, 512, 512)
    monkeypatch.setattr(models, "machine_memory", lambda: needed)
    models.build_student(config, 0)
    monkeypatch.setattr(models, "machine_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"takes 78.8 kB, .* lower --n_layer or --n_embd"):
        models.build_student(config, 0)
    wide = models.student_config(StudentSettings(4800, 1, 160_000), teacher)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"parameters takes [\d.]+ TB"):
        models.build_student(wide, 0)


def test_parameter_formula_equals_the_models():
    from types import SimpleNamespace

    import torch
    from transformers import GPT2LMHeadModel

    from src.models.inspection import count_parameters
    from src.models.loading import student_config
    from src.models.sizes import gpt2_parameters

    teacher = SimpleNamespace(vocab_size=777, n_positions=99, bos_token_id=0, eos_token_id=0)
    for preset in PRESETS.values():
        s = preset.student
        with torch.device("meta"):
            expected = count_parameters(GPT2LMHeadModel(student_config(s, teacher)))
        assert gpt2_parameters(s.n_layer, s.n_embd, 777, 99) == expected


def test_a_model_of_another_class_is_fine_tuned_as_it_is(
    tmp_path, tiny_llama, saved_model, random_proteins
):
    from transformers import AutoConfig

    folder, data = saved_model(tmp_path / "llama", tiny_llama()), tmp_path / "family.fasta"
    data.write_text("".join(f">{i}\n{p}\n" for i, p in enumerate(random_proteins(30, 20, 40))))
    wanted = [
        "--alpha", "1", "--init_from", str(folder), "--data", str(data), "--train_size_prop", "1",
        "--max_steps", "2", "--skip_teacher_check",
    ]  # fmt: skip
    settings = settings_of(*wanted)
    assert settings.student is None
    assert "-init-llama" in default_run_name(settings)
    assert script.main([*wanted, "--output_dir", str(tmp_path / "adapted"), "--dry_run"]) == 0
    assert script.main([*wanted, "--output_dir", str(tmp_path / "adapted")]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "adapted").model_type == "llama"
    assert script.main([*wanted, "--dropout", "0.1"]) == 2
