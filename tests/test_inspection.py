"""Models as people have them: which files are read, and what is said of the others."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors

from src.models.inspection import explain_loading, require_model_directory
from src.models.loading import load_causal_lm, load_tokenizer, model_fingerprint


@pytest.fixture
def folder(saved_model, tmp_path) -> Path:
    return saved_model(tmp_path / "model")


def refused(action, *arguments) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def pickled(folder: Path, tiny_lm, **options) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_lm().state_dict(), folder / "pytorch_model.bin", **options)


@pytest.mark.parametrize("modern", [True, False])
def test_pytorchs_own_file_gives_the_same_model(folder, tiny_lm, modern):
    expected = model_fingerprint(load_causal_lm(folder))
    pickled(folder, tiny_lm, _use_new_zipfile_serialization=modern)
    assert model_fingerprint(load_causal_lm(folder)) == expected


def test_a_file_that_is_too_small_for_its_configuration(folder, tiny_lm):
    """A tensor that repeats one number is as large as what is stored of it."""
    (folder / "model.safetensors").unlink()
    weights = {name: torch.zeros(1).expand(t.shape) for name, t in tiny_lm().state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    assert "asks for" in refused(load_causal_lm, folder)


def test_a_table_of_something_else(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weights": {"a": torch.zeros(3)}}, folder / "pytorch_model.bin")
    assert "no table of tensors" in refused(load_causal_lm, folder)


def test_an_adapter_is_named(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "nferruz/ProtGPT2"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    for load in (load_causal_lm, load_tokenizer):
        message = refused(load, adapter)
        assert "is a PEFT adapter of nferruz/ProtGPT2" in message
        assert "merge_and_unload" in message
    (folder / "adapter_config.json").write_text("{}")  # beside a merged model it means nothing
    if find_spec("peft"):  # but would be applied by peft
        assert "lies beside a whole model" in refused(load_causal_lm, folder)
    else:
        load_causal_lm(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_is_named(folder, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (folder / name).write_text(pointer)
    message = refused(load_causal_lm, folder)
    assert f"{name}: is a Git LFS pointer" in message
    assert "git lfs pull" in message


def test_a_missing_configuration(folder):
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(require_model_directory, folder)
    shutil.rmtree(folder)
    assert "no such directory" in refused(require_model_directory, folder)


def hub_error(kind: type[BaseException]) -> OSError:
    """As transformers raises it: an OSError because of the client's error."""
    error = OSError("We couldn't load it")
    error.__cause__ = kind.__new__(kind)  # the client's own answer is not needed
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub_error(errors.GatedRepoError), "is gated: accept its terms"),
        (hub_error(errors.RepositoryNotFoundError), "the hub has no model"),
        (hub_error(errors.LocalEntryNotFoundError), "there is no network: connect to it"),
        (hub_error(errors.OfflineModeIsEnabled), "there is no network: connect to it"),
        (TimeoutError("timed out"), "there is no network: connect to it"),
        (OSError("503 Server Error"), "cannot be loaded (503 Server Error)"),
        (ValueError("custom code: set trust_remote_code=True"), "code of its own"),
        (OSError("x/y does not appear to have a file named config.json"), "without config.json"),
        (OSError("x/y does not appear to have a file named pytorch_model.bin"), "without weights"),
    ],
)
def test_each_failure_of_the_hub_has_its_own_line(error, said, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def load():
        with explain_loading("model", "x/y"):
            raise error

    message = refused(load)
    assert said in message
    assert "trust_remote_code" not in message
    assert ("no network" in message) == ("no network" in said)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ("HF_HUB_OFFLINE is set: unset it" in refused(load)) == ("no network" in said)


def test_weights_with_more_blocks_than_the_configuration_are_refused(tmp_path, tiny_lm):
    tiny_lm(n_layer=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(ValueError, match="have 3 blocks and its configuration 2"):
        load_causal_lm(tmp_path)


def test_large_numbers_that_are_no_sizes_are_harmless(tmp_path, tiny_lm):
    tiny_lm().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    more = {"n_params": 774030080, "seed": 1234567890, "rotary_emb_base": 10_000_000}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    load_causal_lm(tmp_path)
