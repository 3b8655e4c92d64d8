"""Writes the model card of a teacher that was trained from random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.files import read_json
from src.common.runs import RUN_FILE, read_run

OLDER_FILE = "training.json"
"""Record of teachers that were made before scripts/train.py made them."""


def training_facts(folder: Path) -> dict[str, Any]:
    """Return what a teacher's record says of its training: parameters, shape and one sentence.

    Raises:
        ValueError: there is no record, or it lacks something.
    """
    older = not (folder / RUN_FILE).exists()
    record = read_json(folder / OLDER_FILE) if older else read_run(folder)
    try:
        return _older_facts(record) if older else _facts(record, folder)
    except (KeyError, TypeError) as error:
        file = OLDER_FILE if older else RUN_FILE
        raise ValueError(f"{folder / file}: {error} is missing or wrong") from None


def _facts(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the facts of a run of scripts/train.py."""
    settings, config = record["settings"], read_json(folder / "config.json")
    rate = f"{settings['learning_rate']:g}"
    optimizer = f"AdamW (rate {rate})"
    if settings.get("optimizer") == "muon":
        other = settings.get("other_learning_rate") or settings["learning_rate"]
        optimizer = f"matrices with Muon (rate {rate}), the rest with AdamW ({other:g})"
    rows = settings["batch_size"] * settings["gradient_accumulation_steps"] * record["processes"]
    return {
        "parameters": record["student"]["parameters"],
        "vocab_size": config["vocab_size"],
        "n_positions": config["n_positions"],
        **{name: settings["student"][name] for name in ("n_layer", "n_head", "n_embd")},
        "file": RUN_FILE,
        "training": f"{record['steps']:,} steps of {rows} proteins from "
        f"{record['data']['train']['proteins']:,} training proteins, {optimizer}, seed "
        f"{settings['seed']}, in {record['precision']}",
    }


def _older_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a teacher's older record."""
    settings = record["settings"]
    shape = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    return {
        "parameters": record["parameters"],
        **{name: settings[name] for name in shape},
        "file": OLDER_FILE,
        "training": f"{settings['total_tokens']:,} tokens, about {settings['batch_tokens']:,} in "
        f"a step, matrices with Muon (rate {settings['matrix_learning_rate']:g}), the rest with "
        f"AdamW ({settings['learning_rate']:g}), seed {settings['seed']}, in "
        f"{settings['precision']} on a CPU",
    }


def score_rows(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table's rows: the floors and the teacher on each held-out part."""
    rows = []
    for part, results in parts.items():
        floors = results["floors"]
        teacher = {
            f"{name}_per_residue": results[f"teacher_{name}_per_residue"]
            for name in ("nats", "perplexity")
        }
        for name, values, interval in (
            ("uniform over 20 residues, end excluded", floors["uniform"], None),
            *((n, floors[n], f"floors.{n}.nats_per_residue") for n in ("unigram", "trigram")),
            ("**this model**", teacher, "teacher_nats_per_residue"),
        ):
            bounds = results["intervals"].get(interval) if interval else None
            shown = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
            rows.append(
                f"| {part} | {name} | {values['perplexity_per_residue']:.2f} "
                f"| {values['nats_per_residue']:.3f}{shown} |"
            )
    return "\n".join(rows)


def teacher_card(facts: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a small teacher's model card in Markdown, with the metadata that the hub reads.

    Args:
        facts: from :func:`training_facts`.
        parts: the results of an evaluation for each held-out part; the card's scores are theirs.
    """
    first = next(iter(parts.values()))
    mixed = first["gates"]["shuffled_minus_natural"]
    shape = "{n_layer} layers, {n_head} heads, {n_embd} wide, vocabulary {vocab_size}".format(
        **facts
    )
    return f"""---
license: cc-by-4.0
library_name: transformers
pipeline_tag: text-generation
tags: [protein, gpt2, test-fixture]
---

# The small teacher of protein-lm-distill

A GPT-2 of {facts["parameters"]:,} parameters ({shape}, {facts["n_positions"]} positions) with
a byte-pair tokenizer in ProtGPT2's layout. The project's tests, its quickstart and its controlled
experiment use it, so that they run on a CPU without a model hub. It knows something of protein
families, and far less than ProtGPT2: do not use it to design proteins.

## Training

UniProtKB/Swiss-Prot 2014_01 at 90 % identity, 30 to 512 residues, the training part of a homology
split (`scripts/split_data.py`, seed 0): {facts["training"]}.
All settings are in `{facts["file"]}`. `docs/TEACHER.md` says how to make it again.

## How good it is

Perplexity for each residue, line breaks and end counted, over whole proteins; 95 % intervals from a
bootstrap over clusters. `test`: no relative at 30 % identity in train. `test_in_family`: members of
families that are in train. Floors were fitted on {first["floors"]["fitted_proteins"]:,} training
proteins. All of it is in `evaluation.json`.

| part | model | perplexity per residue | nats per residue |
|---|---|---|---|
{score_rows(parts)}

Natural proteins against the same residues shuffled: {mixed["mean"]:.3f} nats per residue more for
the shuffled ones [{mixed["low"]:.3f}, {mixed["high"]:.3f}], {mixed["pairs"]} pairs.

## Source and licence

The proteins are from UniProtKB/Swiss-Prot (The UniProt Consortium, www.uniprot.org, CC BY 4.0).
"""
