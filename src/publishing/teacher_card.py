"""Writes the model card of a teacher that was trained from random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.files import read_json
from src.common.runs import RUN_FILE, read_run


def training_facts(folder: Path) -> dict[str, Any]:
    """Return what a teacher's record says of its training: parameters, shape and one sentence.

    Raises:
        ValueError: there is no record, or it lacks something.
    """
    record = read_run(folder)
    try:
        return _facts(record, folder)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / RUN_FILE}: {error} is missing or wrong") from None


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
        "training": f"{record['steps']:,} steps of {rows} proteins from "
        f"{record['data']['train']['proteins']:,} training proteins, {optimizer}, seed "
        f"{settings['seed']}, in {record['precision']}",
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

    ``facts`` are from :func:`training_facts`, ``parts`` the results for each held-out part, which
    are the card's scores.
    """
    first = next(iter(parts.values()))
    mixed = first["gates"]["shuffled_minus_natural"]
    accuracy, floor = first["teacher_accuracy"], first["teacher_ece"]["accuracy_floor"]
    counted = f"{mixed['pairs']} pairs"
    if "groups" in mixed:  # the first records took relatives one by one
        counted += f" in {mixed['groups']} groups of relatives"
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

The training part of `data/proteins`: members of protein families, and as a quarter of all other
proteins of UniProtKB/Swiss-Prot 2014_01. {facts["training"]}.
All settings are in `run.json`. `docs/TEACHER.md` says how to make it again.

## How good it is

Perplexity for each residue, line breaks and end counted, over whole proteins; 95 % intervals from a
bootstrap over families. `test`: members of families that are in train, without a relative in train
at 50 % identity over half their length. `test_new`: families that are not in train. Floors
were fitted on {first["floors"]["fitted_proteins"]:,} training proteins. All of it is in
`evaluation.json`.

| part | model | perplexity per residue | nats per residue |
|---|---|---|---|
{score_rows(parts)}

Natural proteins against the same residues shuffled: {mixed["mean"]:.3f} nats per residue more for
the shuffled ones [{mixed["low"]:.3f}, {mixed["high"]:.3f}], {counted}.
The likeliest token is the right one for {accuracy:.1%} of the tokens of `test`; the most
frequent one for {floor:.1%}.

## Source and licence

The proteins are from UniProtKB/Swiss-Prot (The UniProt Consortium, www.uniprot.org, CC BY 4.0).
"""
