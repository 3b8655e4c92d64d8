#!/usr/bin/env python3
r"""Score proteins by their likelihood, and compare the scores with measured fitness.

Examples:
  python scripts/score.py --model models/demo --input proteins.fasta --output scores.csv
  python scripts/score.py --model models/demo --teacher_model data/small_teacher \
      --input BLAT_ECOLX_Stiffler_2015.csv --output scores.csv --correlations spearman.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, natural, positive_int, run_script, say
from src.common.files import check_outputs
from src.evaluation.results import put_estimate, with_interval


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what to score").add_argument
    add("--model", required=True, help="directory or hub id")
    add("--teacher_model", help="a second model, to score beside it")
    add("--input", type=Path, required=True, help="FASTA, text, CSV or TSV, gzipped or not")
    add("--sequence_column", help="of a table (default: mutated_sequence or sequence)")
    add("--score_column", help="measured fitness (default: DMS_score where there is one)")

    add = parser.add_argument_group("how").add_argument
    add("--batch_size", type=positive_int, default=32, help="proteins of a batch, at most")
    add("--bootstrap", type=natural, default=2000, help="replicates for intervals; 0: none")
    add("--seed", type=natural, default=0, help="of the bootstrap")
    add("--device", default="auto", help="auto, cpu or cuda")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="CSV: the input's columns, then the scores")
    add("--correlations", type=Path, help="JSON with Spearman's correlations and what made them")
    add("--overwrite", action="store_true", help="replace these files")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Score, compare, write. Returns what was summary."""
    outputs = (args.output, args.correlations)
    check_outputs(*outputs, overwrite=args.overwrite, inputs=[args.input])
    from src.evaluation import fitness as f

    variants = f.read_variants(args.input, args.sequence_column, args.score_column)
    if args.correlations:
        f.require_comparable(variants)
    names = {"": args.model} | ({"teacher_": args.teacher_model} if args.teacher_model else {})
    kinds = ("log_likelihood", "log_likelihood_per_residue")
    f.check_columns(variants, [prefix + kind for prefix in names for kind in kinds])
    from src.common.cli import quiet_libraries
    from src.common.devices import choose_device
    from src.common.files import sha256_file, write_json
    from src.common.runs import provenance
    from src.models.loading import load_causal_lm, load_tokenizer, model_fingerprint

    quiet_libraries()
    device = choose_device(args.device)
    models = {
        prefix: (load_causal_lm(name, device=device), load_tokenizer(name))
        for prefix, name in names.items()
    }
    say(f"{args.input}: {len(variants.rows):,} proteins")
    scores = f.score_columns(models, variants.residues, args.batch_size)
    columns = {"student": scores[kinds[1]]}
    if args.teacher_model:
        columns["teacher"] = scores[f"teacher_{kinds[1]}"]
    if args.correlations:  # before anything is written
        f.require_comparable(variants, *columns.values())
    f.write_scores(args.output, variants, scores)
    lost = int(sum(~f.comparable(*columns.values())))
    if lost:
        say(
            f"{lost:,} proteins are longer than a model takes, or have residues that its tokenizer "
            "does not know: their scores are empty"
        )
    say(f"written: {args.output}")
    summary: dict[str, Any] = {"proteins": len(variants.rows), "not_scored": lost}
    if variants.measured is None:
        return summary
    if sum(f.comparable(variants.measured, *columns.values())) < f.LEAST_COMPARED:
        say(f"no correlation: fewer than {f.LEAST_COMPARED} variants have measurement and score")
        return summary
    estimates, count = f.spearman(
        columns, variants.measured, variants.clusters, args.bootstrap, args.seed
    )
    summary |= {"compared": count, "clusters": len(set(variants.clusters)), "intervals": {}}
    for name, estimate in estimates.items():
        put_estimate(summary, f"spearman.{name}", estimate)
        shown = with_interval(summary, f"spearman.{name}")
        say(f"Spearman, {name}: {shown} over {count:,} variants")
    if args.correlations:
        summary["run"] = {
            **provenance(),
            "models": {n: model_fingerprint(models[p][0]) for p, n in names.items()},
            "input": {"name": args.input.name, "sha256": sha256_file(args.input)},
            "device": device.type,
        }
        write_json(args.correlations, summary)
        say(f"written: {args.correlations}")
    return summary


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
