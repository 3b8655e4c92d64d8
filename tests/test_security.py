"""What comes as data never runs: no pickle, no remote code, no name that leads outside."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from src.evaluation import student_record
from src.models.loading import gpt2_shape, load_causal_lm, load_tokenizer
from src.proteins.layouts import END_OF_TEXT
from src.trainer.checkpoints import MANIFEST, NEEDED_FILES, fault_of, newest_valid, write_manifest
from src.training.dry_run import teacher_shape

ROOT = Path(__file__).resolve().parents[1]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = str(proof)

    def __reduce__(self):
        return open, (self.proof, "w")


@pytest.fixture
def proof(tmp_path):
    """A file that stands there only where a payload ran."""
    path = tmp_path / "the-payload-ran"
    pickle.loads(pickle.dumps(Payload(path))).close()
    assert path.exists(), "the payload works"
    path.unlink()
    yield path
    assert not path.exists(), "the payload ran"


@pytest.fixture
def model_folder(tmp_path, saved_model):
    return saved_model(tmp_path / "model")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(action, folder: Path) -> str:
    """Return the one line with which an action is refused."""
    with pytest.raises(ValueError, match=re.escape(folder.name)) as caught:
        action(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt", "model.ckpt"])
@pytest.mark.parametrize("legacy", [True, False])
def test_pickled_weights_are_refused(model_folder, proof, name, legacy):
    (model_folder / "model.safetensors").unlink()
    torch.save(
        {"transformer.wte.weight": Payload(proof)},
        model_folder / name,
        _use_new_zipfile_serialization=not legacy,
    )
    assert "safetensors" in refused(load_causal_lm, model_folder)


def test_a_pickle_named_safetensors_is_refused(model_folder, proof):
    (model_folder / "model.safetensors").write_bytes(pickle.dumps(Payload(proof)))
    refused(load_causal_lm, model_folder)


def test_pickles_beside_safetensors_are_not_read(model_folder, proof):
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt"):
        torch.save(Payload(proof), model_folder / name)
    load_causal_lm(model_folder)
    load_tokenizer(model_folder)


CODE = "open({!r}, 'w')\nclass Model: pass\nclass Config: pass\nclass Tokenizer: pass\n"


@pytest.mark.parametrize("model_type", ["gpt2", "evil"])
def test_code_beside_a_configuration_is_refused(model_folder, proof, model_type):
    (model_folder / "code.py").write_text(CODE.format(str(proof)))
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit(model_folder / "config.json", model_type=model_type, auto_map=names)
    message = refused(load_causal_lm, model_folder)
    assert "auto_map" in message
    assert "trust_remote_code" not in message, "what is not offered is not named"


def test_code_beside_a_tokenizer_is_refused(model_folder, proof):
    (model_folder / "code.py").write_text(CODE.format(str(proof)))
    names = {"AutoTokenizer": ["code.Tokenizer", None]}
    path = model_folder / "tokenizer_config.json"
    edit(path, tokenizer_class="Tokenizer", auto_map=names)
    assert "auto_map" in refused(load_tokenizer, model_folder)


def test_code_for_generation_is_not_read(model_folder, proof):
    (model_folder / "custom_generate").mkdir()
    (model_folder / "custom_generate" / "generate.py").write_text(CODE.format(str(proof)))
    load_causal_lm(model_folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_from_elsewhere_are_refused(model_folder, key):
    edit(model_folder / "config.json", **{key: "someone/kernels"})
    assert key in refused(load_causal_lm, model_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 1 << 20}, "blocks"),
        ({"n_layer": 3}, "asks for"),
        ({"n_embd": 1 << 20}, "asks for"),
        ({"n_positions": 1 << 20}, "asks for"),
        ({"vocab_size": 1 << 20}, "asks for"),
        ({"n_layer": "many"}, ""),
        ({"model_type": "bert"}, ""),
        ({"activation_function": "os.system"}, ""),
        ({"n_head": -2}, ""),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights(model_folder, change, message):
    edit(model_folder / "config.json", **change)
    assert message in refused(load_causal_lm, model_folder)


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer, gpt2_shape, teacher_shape])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_labels": 300_000_000}, "num_labels"),
        ({"num_labels": 10_001}, "num_labels"),
        ({"n_layer": 10**4000}, "n_layer"),
        ({"task": {"lengths": [1, -(1 << 40)]}}, "lengths"),
    ],
)
def test_a_configuration_with_absurd_numbers_reaches_no_other_library(
    model_folder, monkeypatch, load, change, name
):
    """transformers makes a name for each label before anything can be compared."""
    from transformers import PretrainedConfig

    monkeypatch.setattr(PretrainedConfig, "__init__", lambda *args, **more: pytest.fail("reached"))
    edit(model_folder / "config.json", **change)
    message = refused(load, model_folder)
    assert f"config.json: {name} is" in message
    assert "tokenizer" not in message


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "merges.txt"])
def test_a_pipe_in_a_models_directory_is_not_waited_for(model_folder, load, name):
    (model_folder / name).unlink(missing_ok=True)
    os.mkfifo(model_folder / name)
    assert f"{name}: is no file" in refused(load, model_folder)


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors.index.json"])
def test_a_broken_file_beside_the_weights_is_named(model_folder, name):
    (model_folder / name).write_text("[" * 100_000)
    assert f"{name}: not valid JSON" in refused(load_causal_lm, model_folder)


def replace_tryptophan(folder: Path, content: str) -> None:
    rule = {"type": "Replace", "pattern": {"String": "W"}, "content": content}
    edit(folder / "tokenizer.json", normalizer=rule)


@pytest.mark.parametrize("content", ["", "A"])
def test_a_tokenizer_that_loses_or_replaces_a_residue_is_refused(model_folder, content):
    replace_tryptophan(model_folder, content)
    assert f"gives back ACDEFGHIKLMNPQRSTV{content}Y" in refused(load_tokenizer, model_folder)


def test_a_residue_as_the_end_is_refused(model_folder):
    edit(model_folder / "tokenizer_config.json", eos_token="A")
    assert "gives back CDEFGHIKLMNPQRSTVWY" in refused(load_tokenizer, model_folder)


def test_a_tokenizer_from_the_hub_is_tried_out_too(monkeypatch, tiny_tokenizer):
    """What is wrong with it is told, not that the hub cannot be reached."""
    import transformers

    copy = type(tiny_tokenizer)(vocab={END_OF_TEXT: 0}, merges=[], eos_token=END_OF_TEXT)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **more: copy)
    with pytest.raises(ValueError, match="someone/model: of the residues .* gives back none"):
        load_tokenizer("someone/model")


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]])
def test_a_model_without_a_tokenizer_gets_no_other(model_folder, left):
    """transformers makes an empty GPT-2 tokenizer, under which every protein scores alike."""
    for path in model_folder.iterdir():
        if path.name not in (*left, "config.json", "model.safetensors"):
            path.unlink()
    assert "no tokenizer in" in refused(load_tokenizer, model_folder)


def test_a_broken_tokenizer_of_a_student_is_not_replaced_by_its_teachers(model_folder, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(model_folder, teacher)
    assert student_record.shared_tokenizer(str(model_folder), str(teacher)).eos_token == END_OF_TEXT
    replace_tryptophan(model_folder, "")
    with pytest.raises(ValueError, match="gives back"):
        student_record.shared_tokenizer(str(model_folder), str(teacher))
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    assert student_record.shared_tokenizer(str(model_folder), str(teacher)).eos_token == END_OF_TEXT


def test_a_large_base_of_rotary_positions_is_no_absurd_number(model_folder):
    edit(model_folder / "config.json", rope_theta=10_000_000)
    load_causal_lm(model_folder)


def test_weights_that_are_missing_or_no_numbers_are_refused(model_folder, tiny_lm):
    from safetensors.torch import load_file, save_file

    path = model_folder / "model.safetensors"
    whole = load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    # Padding keeps the count of numbers, so that only the name is missing.
    save_file(
        {**{k: v for k, v in whole.items() if k != name}, "x": whole[name]}, path, {"format": "pt"}
    )
    assert name in refused(load_causal_lm, model_folder)
    whole["transformer.wpe.weight"][7, 0] = float("nan")  # far from the token that is tried
    save_file(whole, path, {"format": "pt"})
    assert "finite" in refused(load_causal_lm, model_folder)


def test_a_checkpoint_cannot_name_files_outside(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("a.json", *NEEDED_FILES):
            (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
        write_manifest(tmp_path / f"checkpoint-{step}")
    newest = tmp_path / "checkpoint-2"
    assert newest_valid(tmp_path, print) == newest
    record = json.loads((newest / MANIFEST).read_text())["files"]["a.json"]
    for name in ("../checkpoint-1/a.json", str(tmp_path / "checkpoint-1" / "a.json"), "..", "a\0"):
        (newest / MANIFEST).write_text(json.dumps({"files": {name: record}}))
        fault = fault_of(newest)
        assert fault is not None
        assert fault.isprintable()
    (newest / MANIFEST).write_text('{"files": {}}')
    assert fault_of(newest) == f"{MANIFEST} does not name {NEEDED_FILES[0]}"
    assert newest_valid(tmp_path, lambda line: None) == tmp_path / "checkpoint-1"


def test_a_split_cannot_name_files_outside(tmp_path):
    from src.proteins.split_files import SPLIT_FILE, check_split

    for part in ("../a", "/etc/passwd", "a/../../b"):
        entry = {"proteins": 1, "residues": 1, "clusters": 1, "hash": ""}
        record = {"schema_version": 1, "parts": {part: entry}, "leakage": {}, "split_hash": ""}
        (tmp_path / SPLIT_FILE).write_text(json.dumps(record))
        with pytest.raises(ValueError, match="parts names"):
            check_split(tmp_path)


FORBIDDEN = {
    r"\btorch\.load\((?![^)]*weights_only=True)": "torch.load without weights_only=True",
    r"\b(import|from) (pickle|dill|joblib|marshal|shelve|cloudpickle)\b": "pickle",
    r"\b(pickle|dill|joblib|marshal)\.loads?\(": "pickle",
    r"allow_pickle\s*=\s*True": "NumPy's pickles",
    r"trust_remote_code\s*=\s*(?!False\b)": "remote code",
    r"weights_only\s*=\s*False": "pickled weights",
    r"(?<![\w.])(eval|exec)\(": "eval or exec",
    r"shell\s*=\s*True": "a shell",
    r"\bos\.(system|popen)\(": "a shell",
    r"\byaml\.(load|unsafe_load|full_load)\(": "YAML that builds objects",
}


ALLOWED = {"src/experiments/pipeline.py": ["a shell"]}
"""The command that the user gives to be run when a pipeline ends: typed, never read from data."""


def faults_of(text: str) -> list[str]:
    return [what for pattern, what in FORBIDDEN.items() if re.search(pattern, text)]


def test_no_source_reads_pickles_or_runs_text():
    sources = [p for d in ("src", "scripts", "tools") for p in (ROOT / d).rglob("*.py")]
    assert len(sources) > 30
    found = {str(p.relative_to(ROOT)): f for p in sources if (f := faults_of(p.read_text()))}
    assert found == ALLOWED


def test_the_search_finds_what_it_looks_for():
    for line in (
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle",
        "from dill import loads",
        "np.load(p, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "eval(text)",
        "run(c, shell=True)",
    ):
        assert faults_of(line), line
    assert not faults_of("model.eval(); torch.load(p, weights_only=True); trust_remote_code=False")


def test_two_models_in_one_folder_do_not_mix(model_folder, tiny_llama, tmp_path):
    """Weights of one architecture under another's configuration are no model."""
    tiny_llama().save_pretrained(tmp_path / "llama")
    shutil.copy(tmp_path / "llama" / "config.json", model_folder / "config.json")
    assert "missing" in refused(load_causal_lm, model_folder)
