"""Sampling against ``model.generate`` and CTranslate2, in turn in one run."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.common.settings import PRESETS, StudentSettings
from src.evaluation.generation import GenerationSettings, sample_proteins
from src.models.loading import build_student, load_causal_lm, student_config
from src.proteins.layouts import PROTGPT2
from src.publishing.exports import (
    compare,
    ctranslate2_log_probs,
    to_ctranslate2,
    torch_log_probs,
)
from tools.benchmark.workbench import Workbench, interleave, ratio, require_same

STUDENT = Path(__file__).resolve().parents[2] / "results/students/models/student27"
TOP_K = 500
LARGEST_TOKENS = 24
"""Tokens of a protein of the largest model."""
TOLERANCE = 1e-3
"""Nats up to which two engines give a token the same log-probability."""


def models(bench: Workbench) -> dict[str, Any]:
    """Return the small teacher, its student of 27 %, and ``hf-tiny`` with random weights.

    The student is the one that the repository keeps; for another teacher's vocabulary one of its
    shape with random weights.
    """
    teacher = bench.small_teacher
    student: Any = load_causal_lm(STUDENT, device=bench.device)
    if student.config.vocab_size != teacher.config.vocab_size:
        shape = StudentSettings(
            student.config.n_layer, student.config.n_head, student.config.n_embd
        )
        student = build_student(student_config(shape, teacher.config), seed=0).eval()
    large = student_config(PRESETS["hf-tiny"].student, teacher.config)
    large.vocab_size = bench.scale.vocabulary
    hf_tiny: Any = build_student(large, seed=0).eval()
    found = {"teacher": teacher, "student": student, "hf_tiny": hf_tiny}
    return {name: model.to(bench.device) for name, model in found.items()}


def generation_section(bench: Workbench) -> dict[str, Any]:
    """Compare the seconds for each token of three engines, for every model and number of rows.

    All sample as many proteins as there are rows, at once, up to so many tokens, with top-k 500 and
    without a penalty, each with random numbers of its own. CTranslate2 computes in float32. What is
    checked before is that it gives a protein the log-probabilities of PyTorch, and that ours
    samples the same proteins alone and in a batch.
    """
    found: dict[str, Any] = {"top_k": TOP_K, "checks": {}, "measured": {}, "tokens_per_second": {}}
    for name, model in models(bench).items():
        positions = model.config.n_positions
        try:
            with tempfile.TemporaryDirectory() as folder:
                _one_model(bench, name, model, Path(folder), found)
        finally:
            model.config.n_positions = positions
    return found


def _one_model(
    bench: Workbench, name: str, model: Any, folder: Path, found: dict[str, Any]
) -> None:
    tokenizer = bench.tokenizer
    prompt = tokenizer(PROTGPT2.prompt(), add_special_tokens=False)["input_ids"]
    size = bench.scale.sampled_tokens
    if name == "hf_tiny":  # random weights do not end a protein
        size = min(size, LARGEST_TOKENS)
    engine = None
    if importlib.util.find_spec("ctranslate2") and bench.device.type == "cpu":
        to_ctranslate2(model, tokenizer, folder / "model")
        protein = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV"]
        reference, other = torch_log_probs(model), ctranslate2_log_probs(folder / "model")
        difference = compare(reference, other, tokenizer, protein)["largest_difference"]
        require_same("CTranslate2", {"a log-probability": difference}, TOLERANCE)
        found["checks"][f"{name}: largest difference to CTranslate2"] = difference
        import ctranslate2  # pyright: ignore[reportMissingImports]

        engine = ctranslate2.Generator(
            str(folder / "model"), compute_type="float32", inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )  # fmt: skip
    model.config.n_positions = len(prompt) + size
    found["checks"][f"{name}: the same proteins in a batch and alone"] = _same(model, tokenizer)
    # With one thread the time of the processor is that of a quiet machine's clock.
    alone = bench.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    found["clock"] = clock.__name__
    for rows in bench.scale.sampled_rows:
        sides, amounts = _sides(model, tokenizer, engine, prompt, rows, size)
        seconds = interleave(
            sides, bench.scale.slow_rounds, bench.synchronise, warm=rows < 100, amounts=amounts,
            clock=clock,
        )  # fmt: skip
        rates = {side: float(1 / np.median(values)) for side, values in seconds.items()}
        found["tokens_per_second"][f"{name}, {rows} rows"] = rates
        for side in set(sides) - {"ours"}:
            key = f"generation_{name}_{rows}_{side}"
            found["measured"][key] = ratio(seconds[side], seconds["ours"]) | {
                "unit": "seconds for each token"
            }


def _same(model: Any, tokenizer: Any) -> float:
    """Return 1 after checking that batches do not change what is sampled."""
    found = [
        sample_proteins(
            model, tokenizer, GenerationSettings(4, whole_only=False, batch_size=batch)
        ).sequences
        for batch in (1, 4)
    ]
    require_same("proteins sampled in a batch", {"their order": float(found[0] != found[1])}, 0.0)
    return 1.0


def _sides(
    model: Any, tokenizer: Any, engine: Any, prompt: list[int], rows: int, size: int
) -> tuple[Mapping[str, Callable[[], None]], dict[str, float]]:
    """Return the engines, and how many tokens each sampled in its last run."""
    amounts: dict[str, float] = {}
    seeds = iter(range(1 << 30))

    def ours() -> None:
        settings = GenerationSettings(
            rows, top_k=TOP_K, repetition_penalty=1.0, seed=next(seeds), batch_size=rows,
            whole_only=False,
        )  # fmt: skip
        amounts["ours"] = sample_proteins(model, tokenizer, settings).tally.tokens

    @torch.inference_mode()
    def generate() -> None:
        ids = torch.tensor([prompt] * rows, device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=TOP_K,
            max_new_tokens=size, pad_token_id=tokenizer.eos_token_id,
        )[:, len(prompt) :]  # fmt: skip
        ends = (out == tokenizer.eos_token_id).cumsum(1)
        amounts["generate"] = int((ends == 0).sum() + (ends[:, -1] > 0).sum())

    candidates = min(TOP_K, model.config.vocab_size)  # CTranslate2 takes no more

    def ctranslate2() -> None:
        names = tokenizer.convert_ids_to_tokens(prompt)
        results = engine.generate_batch(
            [names] * rows, max_length=size, sampling_topk=candidates, max_batch_size=rows,
            include_prompt_in_result=False, return_end_token=True,
        )  # fmt: skip
        amounts["ctranslate2"] = sum(len(result.sequences_ids[0]) for result in results)

    sides = {"ours": ours, "generate": generate}
    return (sides | {"ctranslate2": ctranslate2} if engine else sides), amounts
