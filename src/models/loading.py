"""Loads teachers and tokenizers, and builds students.

Files from elsewhere may be hostile: no code in them is run, files that transformers would read
without limits are checked first, and a configuration is compared with its weights before a model of
that size is built.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from src.common.cli import one_line, printable, size
from src.common.devices import machine_memory
from src.common.files import read_json
from src.common.settings import BUNDLED_TEACHER, StudentSettings
from src.models.forward import head_form, stated_positions
from src.models.recognition import candidates, writes
from src.models.sizes import gpt2_parameters
from src.proteins.layouts import (
    STANDARD_RESIDUES,
    TaggedProtein,
    guess_layout,
    layout_of,
    set_layout,
    spelt_out,
    stated_layout,
)
from src.proteins.tokens import token_letters

MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_NUMBER = 1 << 20
"""transformers makes lists as long as a configuration says. The largest vocabularies have about
260,000 tokens; inputs of protein models are much shorter."""
MAX_LABELS = 10_000
"""Language models have no labels; transformers makes two names for each label."""
if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class NoTokenizerError(ValueError):
    """A model has no tokenizer of proteins."""


def load_tokenizer(
    name: str | Path, revision: str | None = None, layout: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; without a padding token it pads with the end-of-text marker.

    It carries a layout (:func:`src.proteins.layouts.layout_of`): the one given, the one that it was
    saved with, or the first of the table that it can write.

    Args:
        name: directory or hub id.
        revision: branch, tag or commit on the hub.
        layout: name of a layout, or a template.

    Raises:
        NoTokenizerError: the model has no tokenizer.
        ValueError: it is missing or broken, or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    alone = Path(name, "tokenizer.json").is_file() and not Path(name, "config.json").exists()
    if alone or require_model_directory(name):
        _check_tokenizer_files(Path(name))
    with explain_loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(
            str(name), revision=revision or "main", trust_remote_code=False
        )
        _keep_no_words(tokenizer)
    if layout is not None:
        set_layout(tokenizer, chosen := spelt_out(layout, tokenizer))
        if not writes(tokenizer, chosen):
            raise ValueError(f"--layout {layout!r}: the tokenizer of {name} has no tokens for it")
    with explain_loading("tokenizer", name):
        _choose_layout(tokenizer)
    if tokenizer.eos_token is None:
        raise ValueError(f"{name}: its tokenizer has no end-of-text token")
    with explain_loading("tokenizer", name):
        decoded = _try_out(tokenizer)
    if decoded != STANDARD_RESIDUES:
        raise (ValueError if decoded else NoTokenizerError)(
            f"{name}: of the residues {STANDARD_RESIDUES} its tokenizer gives back "
            f"{printable(decoded)[:40] or 'none'}: it is not one of proteins"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _choose_layout(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer carry a layout, and know the marker at its end."""
    if stated_layout(tokenizer) is None and (possible := candidates(tokenizer)):
        guess_layout(tokenizer, possible[0])
    after = layout_of(tokenizer).parts[1].strip()
    if tokenizer.eos_token is None and after in tokenizer.get_vocab():
        tokenizer.eos_token = after


def _keep_no_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Switch off a BPE tokenizer's cache of 10,000 words, tens of MB that are never freed.

    The words of proteins are lines of 60 residues, which do not repeat: the cache saves no time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    resize = getattr(getattr(backend, "model", None), "_resize_cache", None)
    if resize is not None:
        resize(0)


def _check_tokenizer_files(folder: Path) -> None:
    """Check the files of a tokenizer before transformers reads them.

    Raises:
        NoTokenizerError: there is no vocabulary.
        ValueError: a file is broken or brings code.
    """
    path = folder / "tokenizer_config.json"
    _refuse_code(read_json(path) if path.is_file() else {}, path)
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    # tokenizer_config.json may name another file tokenizer.VERSION.json.
    for path in sorted(folder.glob("tokenizer*.json")):
        if path.name != "tokenizer_config.json":
            read_json(path)
    # Without a vocabulary transformers makes an empty GPT-2 tokenizer.
    vocabularies = ("tokenizer.*json", "vocab.*", "*.model")
    if not any(path.is_file() for pattern in vocabularies for path in folder.glob(pattern)):
        raise NoTokenizerError(
            f"no tokenizer in {folder}: copy tokenizer.json and tokenizer_config.json there from "
            "the model that it was made from"
        )


def _try_out(tokenizer: PreTrainedTokenizerBase) -> str:
    """Encode and decode the standard residues, and return what comes back.

    Raises:
        ValueError: token ids are out of range, or the decoded text is no protein. A broken
            tokenizer may raise any other error.
    """
    protein = TaggedProtein(STANDARD_RESIDUES, "1.1.1.1")
    layout = layout_of(tokenizer)
    ids = tokenizer(layout.text(protein), add_special_tokens=False)["input_ids"]
    text: Any = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    known = [*tokenizer.all_special_ids, *ids]
    if not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in known):
        raise ValueError("its token ids do not run from 0 to the size of its vocabulary")
    letters = token_letters(tokenizer)
    spelt = "".join(letters[i] for i in ids)
    return spelt if spelt != STANDARD_RESIDUES else str(layout.read(text))


def load_causal_lm(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model in eval mode, and try it out on a few tokens.

    Directories must hold safetensors. A hub model without them is read with PyTorch's
    ``weights_only`` loader, which runs no code.

    Args:
        name: directory or hub id.
        dtype: of the weights in memory.
        device: of the weights.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: the model is missing or broken, lacks weights, is no causal language model, or
            contains code; or the hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    local = require_model_directory(name)
    if local:
        require_fitting_weights(Path(name))
    options: dict[str, Any] = {
        "dtype": dtype,
        "revision": revision or "main",
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    with explain_loading("model", name):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(name), use_safetensors=True, **options
            )
        except OSError as error:
            if local or "safetensors" not in str(error):
                raise
            loaded = AutoModelForCausalLM.from_pretrained(
                str(name), use_safetensors=False, weights_only=True, **options
            )
        model, information = loaded
        if missing := sorted(information["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
        model = model.to(device).eval()
        require_runnable(model)
    return model


def require_runnable(model: PreTrainedModel) -> None:
    """Check that every weight is finite, and what the model computes (:mod:`src.models.forward`).

    Raises:
        ValueError: a weight or an output is not finite, or the model is not causal. A broken model
            may raise any other error.
    """
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"{name} has a value that is no finite number: the weights are damaged"
            )
    head_form(model)


def require_fitting_weights(folder: Path) -> None:
    """Check that a directory's weights are enough for its configuration, without loading them.

    Raises:
        ValueError: there are no safetensors, a file is broken, or the configuration has more
            blocks or parameters than the weights.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("generation_config.json", "model.safetensors.index.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    tensors, numbers = 0, 0
    with explain_loading("model", folder):
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise ValueError("it holds no safetensors; pickled weights are not read")
        for path in files:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    tensors += 1
                    numbers += math.prod(weights.get_slice(key).get_shape())
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


def _refuse_code(config: Any, path: Path) -> None:
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
    elif isinstance(value, int) and not name.endswith("theta"):  # rotary base
        most = MAX_LABELS if name == "num_labels" else MAX_CONFIG_NUMBER
        if abs(value) > most:
            raise ValueError(
                f"{path}: {printable(name)[:40]} is {str(value)[:20]}: no protein language model "
                f"has over {most:,} there"
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
        config = path / "config.json"
        if not config.is_file():
            raise ValueError(f"{name}: no finished model (config.json is missing)")
        settings = read_json(config, MAX_CONFIG_BYTES)
        _refuse_code(settings, config)
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
        reason = one_line(error)[:200]
        return f"{name}: the {kind} cannot be loaded ({reason})"
    return (
        f"the {kind} {name!r} is neither a directory here nor to be had from the hub (no network, "
        f"or no such model): pass a directory instead, for example {BUNDLED_TEACHER}"
    )


def shape_of(name: str | Path) -> StudentSettings:
    """Return the shape of a GPT-2 in a directory or on the hub.

    Raises:
        ValueError: the model is missing, or no GPT-2.
    """
    from transformers import AutoConfig

    require_model_directory(name)
    with explain_loading("model", name):
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    if config.model_type != "gpt2":
        raise ValueError(f"{name}: is a {config.model_type}, not a GPT-2")
    return StudentSettings(config.n_layer, config.n_head, config.n_embd)


MOST_POSITIONS = 4096
"""A student has its teacher's positions, but beyond these only what its proteins need."""


def student_positions(config: Any, max_length: int) -> int:
    """Return a student's longest input for a teacher's configuration and the run's proteins."""
    stated = stated_positions(config) or max_length
    return stated if stated <= MOST_POSITIONS else max(max_length, MOST_POSITIONS)


def student_config(
    student: StudentSettings, teacher_config: Any, n_positions: int | None = None
) -> GPT2Config:
    """Return a student's GPT-2 configuration, with the vocabulary and markers of its teacher.

    The activation is GPT-2's tanh GELU, in PyTorch's fused form.
    """
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=teacher_config.vocab_size,
        n_positions=n_positions or max_positions(teacher_config),
        n_embd=student.n_embd,
        n_layer=student.n_layer,
        n_head=student.n_head,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=student.dropout,
        embd_pdrop=student.dropout,
        attn_pdrop=student.dropout,
        bos_token_id=teacher_config.bos_token_id,
        eos_token_id=teacher_config.eos_token_id,
    )


def build_student(config: GPT2Config, seed: int) -> GPT2LMHeadModel:
    """Build a student in float32 and train mode; its weights depend on shape and ``seed`` alone.

    The caller's random generator is not changed.

    Raises:
        ValueError: the weights do not fit this machine's memory.
    """
    from transformers import GPT2LMHeadModel

    parameters = gpt2_parameters(
        config.n_layer, config.n_embd, config.vocab_size, config.n_positions
    )
    if 4 * parameters > (memory := machine_memory()):
        raise ValueError(
            f"a student of {parameters:,} parameters takes {size(4 * parameters)}, and this "
            f"machine has {size(memory)}: lower --n_layer or --n_embd"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).train()


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def max_positions(config: Any, wanted: int | None = None) -> int:
    """Return the longest input of a model in tokens, and at most ``wanted``.

    Raises:
        ValueError: neither is known.
    """
    known = [value for value in (stated_positions(config), wanted) if value]
    if not known:
        raise ValueError(
            f"a {config.model_type} model states no longest input (it has none): pass --max_length"
        )
    return min(known)


def model_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights: names, dtypes, shapes and bytes, tied ones once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout probability of a GPT-2."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(model.config, name, probability)


def has_dropout(model: nn.Module) -> bool:
    """Return whether a model uses dropout in train mode."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()) or (
        getattr(getattr(model, "config", None), "attn_pdrop", 0.0) > 0
    )
