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
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, folder, run_script, say

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


def run(args: argparse.Namespace) -> dict:
    """Evaluate and write ``evaluation.json`` and ``README.md`` into the model's directory."""
    import torch

    from src.common.cli import quiet_libraries
    from src.common.files import write_json, write_text
    from src.common.runs import provenance
    from src.evaluation.gates import FLOOR_PROTEINS
    from src.evaluation.measurement import evaluate
    from src.evaluation.scoring import EvaluationSettings
    from src.evaluation.student_record import cluster_kind, clusters_of
    from src.models.loading import ProteinModel, load_causal_lm, max_positions, model_fingerprint
    from src.proteins.sources import has_split, read_proteins
    from src.proteins.tokens import tokenise
    from src.publishing.teacher_card import teacher_card, training_facts

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
