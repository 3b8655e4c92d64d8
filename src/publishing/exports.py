"""Carries a student into other runtimes, and checks there that it is still the same model.

A runtime's package is needed only by whoever exports to it. Every export is verified by the
log-probabilities of proteins, token by token, against PyTorch's, and by a protein sampled from it.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from src.proteins.encoding import decode, encode
from src.proteins.layouts import stop_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LogProbs = Callable[[Sequence[int]], np.ndarray]
"""From the T token ids of a protein to the log-probabilities of the tokens after the first and of
all others in their places, ``(T - 1, V)``."""

Draw = Callable[[list[int], int, int], list[int]]
"""From a prompt's token ids, the most tokens of a row and a seed to the ids drawn after them."""
SAMPLED_TOKENS = 256
"""Most tokens of a sampled protein: a runtime without a cache computes all of them at each step."""
ATTEMPTS = 20


def require(package: str, install: str) -> Any:
    """Return a package. Raises ``ValueError`` with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"this needs {package}: pip install {install}") from None


def torch_log_probs(model: PreTrainedModel) -> LogProbs:
    """Return the log-probabilities of a model in PyTorch."""

    @torch.inference_mode()
    def log_probs(ids: Sequence[int]) -> np.ndarray:
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1]
        return logits.float().log_softmax(-1).numpy()

    return log_probs


def to_ctranslate2(
    model: PreTrainedModel, tokenizer: Any, folder: Path, quantization: str | None = None
) -> None:
    """Write a model for CTranslate2 into a folder, which must not exist.

    Tokens that the model has beside the tokenizer get names. ``quantization`` is ``int8``,
    ``float16``, ...; None: float32.

    Raises:
        ValueError: CTranslate2 is not installed, or does not know the model.
    """
    require("ctranslate2", "ctranslate2")
    from ctranslate2.converters import (  # pyright: ignore[reportMissingImports]
        TransformersConverter,
    )

    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work)
        if (beyond := int(model.config.vocab_size) - len(tokenizer)) > 0:
            tokenizer.save_pretrained(work)
            tokenizer = type(tokenizer).from_pretrained(work)  # a copy, to add tokens to
            tokenizer.add_tokens([f"<unused{i}>" for i in range(beyond)])
        tokenizer.save_pretrained(work)
        TransformersConverter(work).convert(str(folder), quantization=quantization)


def ctranslate2_log_probs(folder: Path) -> LogProbs:
    """Return the log-probabilities of a model that CTranslate2 runs on the CPU."""
    engine = require("ctranslate2", "ctranslate2").Generator(str(folder))

    def log_probs(ids: Sequence[int]) -> np.ndarray:
        batch = engine.forward_batch([list(map(int, ids))], return_log_probs=True)
        return np.array(batch)[0, :-1]

    return log_probs


def to_onnx(model: PreTrainedModel, path: Path) -> None:
    """Write a model as ONNX: ``input_ids`` ``(B, T)`` to ``logits`` ``(B, T, V)``, without a cache.

    It scores and embeds proteins; sampling with it would compute every token anew.

    Raises:
        ValueError: a package is missing.
    """
    require("onnx", "onnx onnxscript")
    require("onnxscript", "onnx onnxscript")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    torch.onnx.export(
        Logits().eval(), (torch.zeros((2, 7), dtype=torch.long),), path, dynamo=True,
        input_names=["input_ids"], output_names=["logits"], external_data=False, verbose=False,
        dynamic_shapes={"input_ids": {0: batch, 1: tokens}},
    )  # fmt: skip


def onnx_log_probs(path: Path) -> LogProbs:
    """Return the log-probabilities of a model that ONNX Runtime runs on the CPU."""
    runtime = require("onnxruntime", "onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def log_probs(ids: Sequence[int]) -> np.ndarray:
        (logits,) = session.run(None, {"input_ids": np.array([list(ids)], dtype=np.int64)})
        return torch.from_numpy(logits)[0, :-1].log_softmax(-1).numpy()

    return log_probs


def ctranslate2_draw(folder: Path, tokenizer: Any) -> Draw:
    """Return a sampler of CTranslate2's own generation, from all tokens at temperature 1."""
    package = require("ctranslate2", "ctranslate2")
    engine = package.Generator(str(folder))

    def draw(prompt: list[int], longest: int, seed: int) -> list[int]:
        package.set_random_seed(seed)
        (result,) = engine.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt)], sampling_topk=0, beam_size=1,
            max_length=longest - len(prompt), include_prompt_in_result=False, return_end_token=True,
        )  # fmt: skip
        return list(result.sequences_ids[0])

    return draw


def stepwise_draw(log_probs: LogProbs, end: int) -> Draw:
    """Return a sampler of single tokens, for a runtime that has no generation of its own."""

    def draw(prompt: list[int], longest: int, seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        ids = list(prompt)
        while len(ids) < longest and ids[len(prompt) :][-1:] != [end]:
            # The last row holds the prediction from all tokens but the last: any token serves.
            shares = np.exp(log_probs([*ids, end])[-1].astype(np.float64))
            ids.append(int(rng.choice(len(shares), p=shares / shares.sum())))
        return ids[len(prompt) :]

    return draw


def sample_protein(draw: Draw, tokenizer: Any, longest: int = SAMPLED_TOKENS) -> str:
    """Return the residues of the first whole protein among 20 attempts.

    Returns:
        Nothing where no attempt ended within ``longest`` tokens: proteins of a specialist may all
        be longer.

    Raises:
        ValueError: some ended, and none is a protein.
    """
    end, (prompt,) = stop_token(tokenizer), encode(tokenizer, [""], [False])
    ended = 0
    for seed in range(ATTEMPTS):
        ids = draw(prompt, longest, seed)
        if ids[-1:] != [end]:
            continue
        ended += 1
        try:
            residues = decode(tokenizer, [*prompt, *ids])
        except ValueError:
            continue
        if residues:
            return residues
    if ended:
        raise ValueError(f"no protein among {ended} samples that ended: the export was not kept")
    return ""


def compare(
    reference: LogProbs, other: LogProbs, tokenizer: Any, proteins: Sequence[str]
) -> dict[str, float]:
    """Compare a model in two runtimes on proteins.

    Returns:
        ``largest_difference`` of a token's log-probability (of those that came), ``kl``
        KL(reference‖other) and ``nll`` and ``reference_nll``, in nats a token.
    """
    largest = kl = nll = reference_nll = 0.0
    count = 0
    for ids in encode(tokenizer, proteins):
        ours, theirs = reference(ids).astype(np.float64), other(ids).astype(np.float64)
        came = np.arange(len(ids) - 1), np.array(ids[1:])
        largest = max(largest, float(np.abs(ours[came] - theirs[came]).max()))
        kl += float((np.exp(ours) * (ours - theirs)).sum())
        nll -= float(theirs[came].sum())
        reference_nll -= float(ours[came].sum())
        count += len(ids) - 1
    if not count:
        raise ValueError("--data: no protein fits the model, so nothing can be compared")
    return {
        "largest_difference": largest,
        "kl": kl / count,
        "nll": nll / count,
        "reference_nll": reference_nll / count,
        "tokens": count,
    }
