"""Looks at a model's files before transformers reads them, and says why one cannot be loaded.

Files from elsewhere may be hostile: no code in them is run, files that transformers would read
without limits are checked first, and a configuration is compared with its weights before a model of
that size is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.common.cli import one_line, printable
from src.common.files import read_json
from src.common.hub_errors import CODE, GATED, OTHER, hub_advice, hub_fault
from src.common.settings import BUNDLED_TEACHER

MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_NUMBER = 1 << 20
"""transformers makes lists as long as a configuration says. The largest vocabularies have about
260,000 tokens; inputs of protein models are much shorter."""
_NO_SIZE = re.compile(r"theta$|base$|seed|param|flos")
"""Names of numbers that nothing is made as long as, the base of rotary positions among them."""
MAX_LABELS = 10_000
"""Language models have no labels; transformers makes two names for each label."""
MAX_POINTER_BYTES = 1024
POINTER = b"version https://git-lfs"


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def require_fitting_weights(folder: Path) -> None:
    """Check that a directory's weights are enough for its configuration, without loading them.

    Raises:
        ValueError: there are no weights, a file is broken, or the configuration has more blocks or
            parameters than the weights.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("generation_config.json", "model.safetensors.index.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    tensors, numbers = 0, 0
    with explain_loading("model", folder):
        files = sorted(folder.glob("model*.safetensors"))
        pickled = [] if files else sorted(folder.glob("pytorch_model*.bin"))
        if not files and not pickled:
            raise ValueError("it holds neither model.safetensors nor pytorch_model.bin")
        for path in files:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    tensors += 1
                    numbers += math.prod(weights.get_slice(key).get_shape())
        for path in pickled:
            sizes = _pickled_sizes(path)
            tensors, numbers = tensors + len(sizes), numbers + sum(sizes)
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        blocks = getattr(config, "num_hidden_layers", 0)
        if not isinstance(blocks, int) or not 0 <= blocks <= tensors:
            raise ValueError(
                f"config.json has {blocks!r:.40} blocks, the weights {tensors} tensors"
            )
        with torch.device("meta"):
            wanted = count_parameters(AutoModelForCausalLM.from_config(config))
        if wanted > numbers:
            raise ValueError(
                f"config.json asks for {wanted:,} numbers, the weights hold {numbers:,}"
            )


def _pickled_sizes(path: Path) -> list[int]:
    """Return how many numbers each tensor of a PyTorch file holds, without reading them.

    Raises:
        ValueError: the file has something else than tensors; PyTorch's ``weights_only`` loader,
            which runs no code, stops there.
    """
    try:
        try:
            held = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except RuntimeError:  # the form before PyTorch 1.6 cannot be mapped
            held = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # damaged files raise errors of many types
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(
            f"{path.name} holds more than tensors, which may be code and is never run "
            f"({one_line(error)[:60]}): ask for model.safetensors"
        ) from None
    if not isinstance(held, dict) or not all(isinstance(t, torch.Tensor) for t in held.values()):
        raise ValueError(f"{path.name} is no table of tensors: ask for model.safetensors")
    # A tensor may repeat a few numbers: what is stored counts.
    return [min(t.numel(), t.untyped_storage().nbytes() // t.element_size()) for t in held.values()]


def refuse_code(config: Any, path: Path) -> None:
    """Raise ``ValueError`` if a configuration names code: ``auto_map``, or a kernel of the hub."""
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object at the top")
    if config.get("auto_map"):
        raise ValueError(
            f"{path}: names code of its own (auto_map), which is never run: give a model of an "
            "architecture that transformers has, or take the entry out"
        )
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(key)):
            raise ValueError(f"{path}: names code from elsewhere ({key}), which is never run")


def _refuse_absurd(value: Any, path: Path, name: str = "") -> None:
    """Raise ``ValueError`` if a number in a configuration is larger than that of any model."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_absurd(inner, path, key)
    elif isinstance(value, list):
        for inner in value:
            _refuse_absurd(inner, path, name)
    elif isinstance(value, int) and not _NO_SIZE.search(name):
        most = MAX_LABELS if name == "num_labels" else MAX_CONFIG_NUMBER
        if abs(value) > most:
            raise ValueError(
                f"{path}: {printable(name)[:40]} is {str(value)[:20]}: no protein language model "
                f"has over {most:,} there"
            )


def _refuse_pointer(path: Path) -> None:
    """Raise ``ValueError`` if a file is the pointer that git leaves in place of a large file."""
    if path.is_file() and path.stat().st_size < MAX_POINTER_BYTES:
        with path.open("rb") as handle:
            pointer = handle.read(len(POINTER)) == POINTER
        if pointer:
            raise ValueError(
                f"{path}: is a Git LFS pointer, not the file: fetch that with git lfs pull"
            )


def _refuse_adapter(folder: Path) -> None:
    """Raise ``ValueError`` if a directory holds a PEFT adapter in place of a model's weights."""
    adapter = folder / "adapter_config.json"
    whole = any(
        path for kind in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(kind)
    )
    if adapter.is_file() and whole and find_spec("peft"):
        raise ValueError(
            f"{adapter}: lies beside a whole model, and peft, which is installed, would apply it "
            "again: move it away if it is merged already"
        )
    if adapter.is_file() and not whole:
        base = read_json(adapter, MAX_CONFIG_BYTES)
        base = base.get("base_model_name_or_path") if isinstance(base, dict) else None
        raise ValueError(
            f"{folder}: is a PEFT adapter of {printable(str(base))[:100]}, not a whole model: "
            f"merge it with peft, AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
            ".merge_and_unload().save_pretrained('merged'), copy the base model's tokenizer there, "
            "and pass that directory"
        )


def require_model_directory(name: str | Path) -> bool:
    """Return whether ``name`` is a local directory with a safe configuration, not a hub id.

    Raises:
        ValueError: ``name`` looks like a path but is no directory with a ``config.json``; that file
            is broken, names code or has absurd numbers; or the directory has a pipe or a device,
            whose reading may not end.
    """
    path = Path(name)
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if entry.exists() and not (entry.is_file() or entry.is_dir()):
                raise ValueError(f"{entry}: is no file: take it out of the model's directory")
            _refuse_pointer(entry)
        _refuse_adapter(path)
        config = path / "config.json"
        if not config.is_file():
            raise ValueError(
                f"{name}: no finished model (config.json is missing): copy it there from where the "
                "weights come from"
            )
        settings = read_json(config, MAX_CONFIG_BYTES)
        refuse_code(settings, config)
        _refuse_absurd(settings, config)
        return True
    text = str(name)
    if path.exists():
        raise ValueError(f"{name}: is a file; a model is a directory or a hub id")
    # models/ holds this project's students; the hub has no owner of that name.
    if text.startswith((".", "/", "~", "models/")) or text.count("/") > 1:
        raise ValueError(f"{name}: there is no such directory")
    return False


@contextmanager
def explain_loading(kind: str, name: str | Path) -> Iterator[None]:
    """Turn every error of a loader into a ``ValueError`` that says what to do."""
    try:
        yield
    except BaseException as error:  # broken files raise errors of any kind
        # A panic in tokenizers' Rust code is no Exception; interrupts are passed on.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(_why_not_loaded(kind, name, error)) from error


def _why_not_loaded(kind: str, name: str | Path, error: BaseException) -> str:
    """Return why a model or tokenizer was not loaded and what to do."""
    if Path(name).is_dir():
        return f"{name}: the {kind} cannot be loaded ({one_line(error)[:300]})"
    other = f"pass a directory instead, for example {BUNDLED_TEACHER}"
    fault, texts = hub_fault(error)
    missing = "does not appear to have a file named" in texts or "EntryNotFoundError" in texts
    if missing and fault == OTHER:
        what = "config.json" if "config.json" in texts or kind == "tokenizer" else "weights"
        return (
            f"the {kind} {name!r} is on the hub without {what} that transformers reads (an "
            f"adapter, GGUF or another format?): {other}"
        )
    if fault == CODE:
        other = "pass one of an architecture that transformers has"
    advice = hub_advice(fault, kind, name)
    if advice is None:
        return f"the {kind} {name!r} cannot be loaded ({one_line(error)[:300]}): {other}"
    return advice if fault == GATED else f"{advice}; or {other}"
