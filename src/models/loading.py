"""Loads teachers and tokenizers, and builds students."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from src.common.cli import printable, size
from src.common.devices import machine_memory
from src.common.files import read_json
from src.common.settings import StudentSettings
from src.models.forward import head_form, stated_positions
from src.models.inspection import (
    count_parameters,
    explain_loading,
    refuse_code,
    require_fitting_weights,
    require_model_directory,
)
from src.models.recognition import candidates, settle_layout, writes
from src.models.sizes import gpt2_parameters
from src.proteins.encoding import Spelling, encode, require_known, token_letters
from src.proteins.layouts import (
    STANDARD_RESIDUES,
    Layout,
    guess_layout,
    layout_of,
    set_layout,
    spelt_out,
    stated_layout,
)

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class NoTokenizerError(ValueError):
    """A model has no tokenizer of proteins."""


_BLOCK = re.compile(r"\.(\d+)\.")
NOT_TAKEN = "are longer than the model takes, or hold what its tokenizer does not know"
"""Why :meth:`ProteinModel.rows` cannot give proteins to a model, for messages."""


class ProteinModel(NamedTuple):
    """A causal model of proteins, teacher or student, with its tokenizer in the model's layout.

    What the model makes of its head's input is with the model
    (:func:`src.models.forward.output_head`), the layout and its markers are with the tokenizer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        layout: str | None = None,
        announce: Callable[[str], None] = lambda line: None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> ProteinModel:
        """Load a model and its tokenizer, and find the layout that it was trained on.

        Args:
            name: directory or hub id.
            device: of the weights, which are in float32.
            layout: name of a layout, or a template; None: what the tokenizer says, or what natural
                proteins show (:func:`src.models.recognition.settle_layout`).
            announce: called with a line about a layout that is not ProtGPT2's.
            tokenizer: the model's, where it is loaded already.

        Raises:
            ValueError: either is missing or broken, or the model is not causal.
        """
        tokenizer = tokenizer or load_tokenizer(name, layout=layout)
        model = load_causal_lm(name, device=device)
        settle_layout(model, tokenizer, announce)
        return cls(model, tokenizer)

    @property
    def layout(self) -> Layout:
        """How a protein is written for it."""
        return layout_of(self.tokenizer)

    def rows(
        self, proteins: Sequence[str], whole: Sequence[bool] | None = None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the tokens of laid-out proteins, and which of them the model can take.

        A protein is too long for it, or its tokens do not spell it, which would be another's.

        Args:
            proteins: residues of each.
            whole: of each, whether its end is written; None: of all.

        Returns:
            ``(T,)`` for each of P proteins, and ``(P,)`` bool.

        Raises:
            ValueError: the model does not know a token, or a protein lacks the layout's tag.
        """
        rows = [np.asarray(row) for row in encode(self.tokenizer, proteins, whole)]
        limit, spelling = stated_positions(self.model.config), Spelling(self.tokenizer)
        fits = [
            len(row) <= (limit or len(row)) and spelling.spells(row, protein)
            for row, protein in zip(rows, proteins, strict=True)
        ]
        known = max((int(row.max()) for row, fit in zip(rows, fits, strict=True) if fit), default=0)
        require_known(known, int(self.model.config.vocab_size))
        return rows, np.array(fits, dtype=bool)


def load_tokenizer(name: str | Path, layout: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer; without a padding token it pads with the end-of-text marker.

    It carries a layout (:func:`src.proteins.layouts.layout_of`): the one given, by name or as a
    template, the one that it was saved with, or the first of the table that it can write.

    Raises:
        NoTokenizerError: the model has no tokenizer.
        ValueError: it is missing or broken, or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    alone = Path(name, "tokenizer.json").is_file() and not Path(name, "config.json").exists()
    if alone or require_model_directory(name):
        _check_tokenizer_files(Path(name))
    with explain_loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
        _keep_no_words(tokenizer)
    if layout is not None:
        set_layout(tokenizer, chosen := spelt_out(layout, tokenizer), stated=True)
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
        tokenizer.add_special_tokens({"eos_token": after})


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
    refuse_code(read_json(path) if path.is_file() else {}, path)
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
    layout = layout_of(tokenizer).untagged
    ids = tokenizer(layout.text(STANDARD_RESIDUES), add_special_tokens=False)["input_ids"]
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
) -> PreTrainedModel:
    """Load a causal language model in eval mode, and try it out on a few tokens.

    Without safetensors PyTorch's own files are read, with its ``weights_only`` loader, which runs
    no code.

    Raises:
        ValueError: the model is missing or broken, lacks weights, is no causal language model, or
            contains code; or the hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    if require_model_directory(name):
        require_fitting_weights(Path(name))
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    # Else transformers asks the hub to convert a model of its own that has no safetensors.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    with explain_loading("model", name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(name), weights_only=True, **options)
        model, information = loaded
        if missing := sorted(information["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
        blocks = getattr(model.config, "num_hidden_layers", None)
        numbers = (int(n) for k in information["unexpected_keys"] for n in _BLOCK.findall(k)[:1])
        if blocks is not None and (highest := max(numbers, default=0)) >= blocks:
            raise ValueError(
                f"its weights have {highest + 1} blocks and its configuration {blocks}: one of "
                "them is another model's"
            )
        fuse_gelu(model)
        model = model.to(device).eval()
        require_runnable(model)
    return model


def fuse_gelu(model: nn.Module) -> None:
    """Put PyTorch's fused tanh GELU in the place of transformers' ``gelu_new``, in place.

    Both compute 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))) (Hendrycks & Gimpel, arXiv:1606.08415).
    transformers does it in seven operations over the widest tensors of a block, the fused one is a
    single operation. ProtGPT2 and GPT-2 name ``gelu_new``. The configuration stays as it is.
    """
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


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


def config_of(name: str | Path) -> Any:
    """Return a model's configuration. Raises ``ValueError`` if it is missing or broken."""
    from transformers import AutoConfig

    require_model_directory(name)
    with explain_loading("model", name):
        return AutoConfig.from_pretrained(str(name), trust_remote_code=False)


def described_parameters(config: Any) -> int:
    """Return the number of parameters of the model that a configuration describes."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(config))


def random_like(name: str | Path, seed: int) -> PreTrainedModel:
    """Return a model of another one's class and shape with random weights, in float32.

    The caller's random generator is not changed. Raises ``ValueError`` like :func:`config_of`.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    with explain_loading("model", name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fuse_gelu(model)
    return model


def gpt2_shape(name: str | Path) -> StudentSettings | None:
    """Return the shape of a GPT-2 in a directory or on the hub; None of a model of another class.

    Raises:
        ValueError: the model is missing.
    """
    config = config_of(name)
    if config.model_type != "gpt2":
        return None
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
