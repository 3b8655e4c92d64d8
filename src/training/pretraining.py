"""Trains the small teacher: a byte-pair tokenizer of ProtGPT2's layout, then a GPT-2 from scratch.

On a CPU every token counts, so the matrices are trained with Muon (Jordan et al. 2024, in
``torch.optim``) and everything else with AdamW; batches are grouped by length and filled up to a
budget of tokens; the learning rate rises, stays, and falls linearly to zero.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from src.proteins.layouts import END_OF_TEXT, layout

LETTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "Ċ"]
"""Every letter and the newline (as byte-level BPE spells it), so that no protein is unspeakable."""


@dataclass(frozen=True)
class PretrainSettings:
    """What a small teacher is made of and how it is trained. Lengths and budgets are in tokens."""

    vocab_size: int = 512
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    n_positions: int = 512
    total_tokens: int = 24_000_000
    batch_tokens: int = 4096
    matrix_learning_rate: float = 6e-3
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.01
    decay_share: float = 0.5
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        if self.n_embd % self.n_head:
            raise ValueError(f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}")
        if self.vocab_size <= len(LETTERS) + 1:
            raise ValueError(f"--vocab_size must be above {len(LETTERS) + 1}")
        if not 0 <= self.warmup_share + self.decay_share <= 1:
            raise ValueError("--warmup_share and --decay_share must add up to at most 1")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"--precision must be fp32 or bf16, got {self.precision}")


def train_tokenizer(proteins: Iterable[str], vocab_size: int, n_positions: int):
    """Train a GPT-2 style byte-level BPE tokenizer on laid-out proteins.

    Args:
        proteins: residues of each protein.
        vocab_size: tokens in all, with the letters, the newline and the end-of-text marker.
        n_positions: the longest text the model takes, recorded in the tokenizer.

    Returns:
        A ``PreTrainedTokenizerFast`` whose begin, end and padding token is the marker, as in GPT-2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=LETTERS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (layout(p).replace(END_OF_TEXT, "") for p in proteins), trainer=trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=n_positions,
        clean_up_tokenization_spaces=False,
    )


def teacher_config(settings: PretrainSettings, end_of_text: int) -> GPT2Config:
    """Return the GPT-2 configuration of a small teacher: no dropout, the fused form of its GELU."""
    return GPT2Config(
        vocab_size=settings.vocab_size,
        n_positions=settings.n_positions,
        n_embd=settings.n_embd,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )


def batches_of_epoch(
    lengths: np.ndarray, batch_tokens: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Group proteins of similar length into batches of at most ``batch_tokens`` padded tokens.

    Args:
        lengths: tokens of each protein, shape ``(proteins,)``.
        batch_tokens: the budget of a batch: rows × longest row.
        seed: decides the order, together with ``epoch``.
        epoch: counted from 0.

    Returns:
        Indices of the proteins of each batch, in the order of training.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = max(1, 50 * batch_tokens // max(1, int(lengths.mean())))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        chunk = order[start : start + pool]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        first = 0
        while first < len(chunk):
            last = first
            while last < len(chunk) and (last - first + 1) * lengths[chunk[last]] <= batch_tokens:
                last += 1
            last = max(last, first + 1)
            batches.append(chunk[first:last])
            first = last
    return [batches[i] for i in rng.permutation(len(batches))]


def padded_batch(sequences: Sequence[np.ndarray], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids ``(B, T)`` padded on the right and labels ``(B, T)`` with -100 there."""
    width = max(map(len, sequences))
    inputs = torch.full((len(sequences), width), pad, dtype=torch.long)
    labels = torch.full((len(sequences), width), -100, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids = torch.from_numpy(sequence.astype(np.int64))
        inputs[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids
    return inputs, labels


def next_token_nll(
    model: GPT2LMHeadModel, inputs: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the summed negative log-likelihood, in nats, of every token after the first.

    Padding stands on the right and attention is causal, so no mask is needed.
    """
    logits = model(inputs).logits[:, :-1].float()  # (B, T-1, V)
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
    )


def schedule(done: float, warmup_share: float, decay_share: float) -> float:
    """Return the factor of the learning rate at a share ``done`` of the budget: up, flat, down."""
    rise = min(1.0, done / warmup_share) if warmup_share else 1.0
    fall = min(1.0, (1.0 - done) / decay_share) if decay_share else 1.0
    return max(0.0, min(rise, fall))


def build_optimizers(
    model: GPT2LMHeadModel, settings: PretrainSettings
) -> dict[str, torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks and AdamW for all other parameters."""
    blocks = {n: p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2}
    others = [p for n, p in model.named_parameters() if n not in blocks]
    return {
        "muon": torch.optim.Muon(
            blocks.values(),
            lr=settings.matrix_learning_rate,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        "adamw": torch.optim.AdamW(
            others, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        ),
    }


def save_state(
    folder: Path, model: GPT2LMHeadModel, optimizers: dict, progress: dict, settings: dict
) -> None:
    """Write weights, optimiser states and progress to one safetensors file, atomically."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{name}.{index}.{key}"] = torch.as_tensor(value)
    temporary = folder / "state.safetensors.tmp"
    metadata = {"progress": json.dumps(progress), "settings": json.dumps(settings)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, folder / "state.safetensors")


def load_state(path: Path, model: GPT2LMHeadModel, optimizers: dict, settings: dict) -> dict:
    """Restore what :func:`save_state` wrote and return the progress.

    Raises:
        ValueError: the state belongs to other settings (the budget alone may change).
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        saved = json.loads(metadata["settings"])
        changed = {k for k in settings if saved.get(k) != settings[k]} - {"total_tokens"}
        if changed:
            raise ValueError(
                f"{path} was made with other settings ({', '.join(sorted(changed))}): "
                "choose another --work_dir"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    for name, optimizer in optimizers.items():
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith(f"{name}."):
                _, index, entry = key.split(".", 2)
                state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
    return json.loads(metadata["progress"])


def mean_nll_per_residue(
    model: GPT2LMHeadModel, sequences: Sequence[np.ndarray], residues: int, pad: int
) -> float:
    """Return nats for each residue over whole proteins, line breaks and the end counted."""
    lengths = np.array([len(s) for s in sequences])
    total = 0.0
    model.eval()
    with torch.inference_mode():
        for batch in batches_of_epoch(lengths, 16384, 0, 0):
            total += next_token_nll(model, *padded_batch([sequences[i] for i in batch], pad)).item()
    model.train()
    return total / residues


def pretrain(
    train: Sequence[np.ndarray],
    validation: Sequence[np.ndarray],
    validation_residues: int,
    end_of_text: int,
    settings: PretrainSettings,
    work_dir: Path,
    log: Callable[[dict], None],
    save_seconds: float = 300.0,
    log_steps: int = 100,
    validate_steps: int = 500,
) -> GPT2LMHeadModel:
    """Train a GPT-2 from scratch, continuing from ``work_dir`` where a run stands there.

    Args:
        train: token ids of each training protein; longer ones are cut at ``n_positions``.
        validation: token ids of each validation protein.
        validation_residues: residues in them, for nats per residue.
        end_of_text: id of the marker, used to pad.
        settings: model, budget and optimisers.
        work_dir: where the state is kept.
        log: called with one flat record at a time.
        save_seconds: time between saved states.
        log_steps: steps between two training records.
        validate_steps: steps between two validations.

    Returns:
        The trained model, in float32.

    Raises:
        ValueError: ``work_dir`` holds a state of other settings.
    """
    torch.manual_seed(settings.seed)
    model = GPT2LMHeadModel(teacher_config(settings, end_of_text))
    model.train()
    optimizers = build_optimizers(model, settings)
    peaks = {name: o.param_groups[0]["lr"] for name, o in optimizers.items()}
    record = asdict(settings)
    progress = {"epoch": 0, "batch": 0, "step": 0, "tokens": 0, "seconds": 0.0}
    state_file = work_dir / "state.safetensors"
    if state_file.exists():
        progress = load_state(state_file, model, optimizers, record)
        log({"resumed_at_step": progress["step"], "tokens": progress["tokens"]})

    train = [s[: settings.n_positions] for s in train]
    lengths = np.array([len(s) for s in train])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16")
    started = time.monotonic() - progress["seconds"]
    saved = time.monotonic()
    window = {"nll": 0.0, "tokens": 0, "since": time.monotonic()}
    for inputs, labels in training_batches(train, lengths, end_of_text, settings, progress):
        done = progress["tokens"] / settings.total_tokens
        if done >= 1.0:
            break
        factor = schedule(done, settings.warmup_share, settings.decay_share)
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = peaks[name] * max(factor, 1e-4)
        targets = int((labels[:, 1:] != -100).sum())
        with autocast:
            nll = next_token_nll(model, inputs, labels)
        (nll / targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress["step"] += 1
        progress["tokens"] += targets
        progress["seconds"] = time.monotonic() - started
        window["nll"] += nll.item()
        if not math.isfinite(window["nll"]):
            raise ValueError(f"the loss is not finite at step {progress['step']}")
        window["tokens"] += targets
        step = progress["step"]
        if step % log_steps == 0:
            now = time.monotonic()
            rate = window["tokens"] / (now - window["since"])
            log(
                {
                    "step": step,
                    "tokens": progress["tokens"],
                    "train_nll_per_token": round(window["nll"] / window["tokens"], 4),
                    "grad_norm": round(float(norm), 3),
                    "lr_factor": round(factor, 4),
                    "tokens_per_second": round(rate),
                    "minutes_left": round((settings.total_tokens - progress["tokens"]) / rate / 60),
                }
            )
            window = {"nll": 0.0, "tokens": 0, "since": now}
        if step % validate_steps == 0:
            nats = mean_nll_per_residue(model, validation, validation_residues, end_of_text)
            log({"step": step, "tokens": progress["tokens"], "validation_nats_per_residue": nats})
        if time.monotonic() - saved > save_seconds:
            save_state(work_dir, model, optimizers, progress, record)
            saved = time.monotonic()
    save_state(work_dir, model, optimizers, progress, record)
    nats = mean_nll_per_residue(model, validation, validation_residues, end_of_text)
    log({"step": progress["step"], "tokens": progress["tokens"], "final_nats_per_residue": nats})
    return model


def training_batches(
    train: Sequence[np.ndarray],
    lengths: np.ndarray,
    pad: int,
    settings: PretrainSettings,
    progress: dict,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield padded batches for ever, moving ``progress['epoch']`` and ``['batch']`` along."""
    while True:
        batches = batches_of_epoch(lengths, settings.batch_tokens, settings.seed, progress["epoch"])
        while progress["batch"] < len(batches):
            batch = batches[progress["batch"]]
            progress["batch"] += 1
            yield padded_batch([train[i] for i in batch], pad)
        progress["epoch"] += 1
        progress["batch"] = 0


def teacher_card(training: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a small teacher's model card.

    Args:
        training: the record that training left: ``settings`` and ``parameters``.
        parts: the results of an evaluation for each held-out part.

    Returns:
        Markdown with the metadata that the hub reads. Every figure is one of the evaluation's.
    """
    settings = training["settings"]
    rows = []
    for part, results in parts.items():
        floors = results["floors"]
        for name, figures, interval in (
            ("uniform over 20 residues, end excluded", floors["uniform"], None),
            *((n, floors[n], f"floors.{n}.nats_per_residue") for n in ("unigram", "trigram")),
            (
                "**this model**",
                {
                    "nats_per_residue": results["teacher_nats_per_residue"],
                    "perplexity_per_residue": results["teacher_perplexity_per_residue"],
                },
                "teacher_nats_per_residue",
            ),
        ):
            bounds = results["intervals"].get(interval) if interval else None
            shown = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
            rows.append(
                f"| {part} | {name} | {figures['perplexity_per_residue']:.2f} "
                f"| {figures['nats_per_residue']:.3f}{shown} |"
            )
    first = next(iter(parts.values()))
    mixed = first["gates"]["shuffled_minus_natural"]
    shape = "{n_layer} layers, {n_head} heads, {n_embd} wide, vocabulary {vocab_size}".format(
        **settings
    )
    return f"""---
license: cc-by-4.0
library_name: transformers
pipeline_tag: text-generation
tags: [protein, gpt2, test-fixture]
---

# The small teacher of protein-lm-distill

A GPT-2 of {training["parameters"]:,} parameters ({shape}, {settings["n_positions"]} positions) with
a byte-pair tokenizer in ProtGPT2's layout. It exists so that the project's tests, its quickstart
and its controlled experiment run on a CPU without a model hub. It knows something of protein
families, and far less than ProtGPT2: do not use it to design proteins.

## Training

UniProtKB/Swiss-Prot 2014_01 at 90 % identity, 30 to 512 residues, the training part of a homology
split (`scripts/split_data.py`, seed 0): {settings["total_tokens"]:,} tokens, of about
{settings["batch_tokens"]:,} in a step, matrices with Muon (rate
{settings["matrix_learning_rate"]:g}), the rest with AdamW ({settings["learning_rate"]:g}), seed
{settings["seed"]}, in {settings["precision"]} on a CPU; all settings are in `training.json`.
`docs/TEACHER.md` tells what was tried before and how to make it anew.

## How good it is

Perplexity for each residue, line breaks and end counted, over whole proteins; 95 % intervals from a
bootstrap over clusters. `test`: no relative at 30 % identity in train. `test_in_family`: members of
families that are in train. Floors were fitted on {first["floors"]["fitted_proteins"]:,} training
proteins. All of it is in `evaluation.json`.

| part | model | perplexity per residue | nats per residue |
|---|---|---|---|
{chr(10).join(rows)}

Natural proteins against the same residues shuffled: {mixed["mean"]:.3f} nats per residue more for
the shuffled ones [{mixed["low"]:.3f}, {mixed["high"]:.3f}], {mixed["pairs"]} pairs.

## Source and licence

The proteins are from UniProtKB/Swiss-Prot (The UniProt Consortium, www.uniprot.org, CC BY 4.0).
"""
