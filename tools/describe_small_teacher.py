#!/usr/bin/env python3
"""Measure a small teacher on held-out proteins and write its model card.

The card's figures come from the evaluation that is written beside it: uniform, unigram, bigram and
trigram floors, natural against shuffled proteins, known and new families.

Example:
  python tools/describe_small_teacher.py --model models/teacher --data data/proteins --half
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, folder, run_script, say
from src.common.files import read_json, write_json, write_text
from src.common.runs import provenance, read_run, rows_of_step

PARTS = ("test", "test_new")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of the teacher")
    add("--data", required=True, help="directory of parts: train, test, test_new")
    add("--half", action="store_true", help="first write its weights in half precision (fp16)")
    add("--weights", help="of which steps they are, for the card (default: the last)")
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")
    return parser


def training_facts(folder: Path) -> dict[str, Any]:
    """Return what a teacher's record says of its training: parameters, shape and one sentence."""
    record = read_run(folder)
    settings, config = record["settings"], read_json(folder / "config.json")
    rate = f"{settings['learning_rate']:g}"
    optimizer = f"AdamW (rate {rate})"
    if settings.get("optimizer") == "muon":
        other = settings.get("other_learning_rate") or settings["learning_rate"]
        optimizer = f"matrices with Muon (rate {rate}), the rest with AdamW ({other:g})"
    return {
        "parameters": record["student"]["parameters"],
        "vocab_size": config["vocab_size"],
        "n_positions": config["n_positions"],
        **{name: settings["student"][name] for name in ("n_layer", "n_head", "n_embd")},
        "training": f"{record['steps']:,} steps of {rows_of_step(record)} proteins from "
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
        counted += f" in {mixed['groups']} groups of relatives, each of which counts the same"
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


def run(args: argparse.Namespace) -> dict:
    """Evaluate and write ``evaluation.json`` and ``README.md`` into the model's directory."""
    import torch

    from src.common.cli import quiet_libraries
    from src.evaluation.gates import FLOOR_PROTEINS
    from src.evaluation.measurement import evaluate
    from src.evaluation.scoring import EvaluationSettings
    from src.evaluation.student_record import cluster_kind, clusters_of
    from src.models.loading import ProteinModel, load_causal_lm, max_positions, model_fingerprint
    from src.proteins.sources import has_split, read_proteins
    from src.proteins.tokens import tokenise

    quiet_libraries()
    facts = training_facts(args.model)
    if args.weights:
        facts["training"] += f"; {args.weights}"
    if args.half:
        load_causal_lm(args.model, dtype=torch.float16).save_pretrained(args.model)
    model, tokenizer = ProteinModel.load(args.model)
    limit = max_positions(model.config)
    reader = read_proteins(args.data, split="train")
    train = [protein.residues for protein in islice(reader, FLOOR_PROTEINS)]
    results: dict[str, Any] = {}
    for part in PARTS:
        if not has_split(args.data, part):
            continue
        proteins = tokenise(
            args.data, part, tokenizer, limit, args.cache_dir, long_proteins="drop", quiet=True
        )
        measured = evaluate(
            model,
            model,
            tokenizer,
            proteins,
            # Of new families a teacher may know less than frequencies do: that is a result there.
            EvaluationSettings(check=part == "test"),
            train=train,
            clusters=clusters_of(args.data),
            cluster_kind=cluster_kind(args.data),
            announce=say,
        ).results
        results[part] = {k: v for k, v in measured.items() if k not in ("student_ece", "threshold")}
    record = {"parts": results, "run": {**provenance(), "fingerprint": model_fingerprint(model)}}
    write_json(args.model / "evaluation.json", record)
    write_text(args.model / "README.md", teacher_card(facts, results))
    say(f"written: {args.model / 'README.md'} and evaluation.json")
    return record


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
