#!/usr/bin/env python3
r"""Measure a student beside its teacher on held-out proteins.

Examples:
  python scripts/evaluate.py --student_model ./models/synergy-tiny --num_samples 100 \
      --compute_ece --output results/eval_synergy_tiny.json
  python scripts/evaluate.py --student_model models/demo --teacher_model data/small_teacher \
      --data data/proteins --output results/demo.json --per_protein results/demo.parquet
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common import processes
from src.common.cli import (
    LAYOUT_HELP,
    HelpFormatter,
    add_data_flags,
    folder,
    natural,
    positive_int,
    run_script,
    say,
)
from src.common.files import check_outputs


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what to measure").add_argument
    add("--student_model", required=True, help="directory or hub id")
    add("--teacher_model", help="(default: the student's, from its run.json)")
    add_data_flags(add, "held-out proteins (default: what the student's run.json names)")
    add("--split", help="part of the data (default: test, else validation, else the whole file)")
    add("--max_proteins", type=positive_int, help="the first so many (default: all)")
    add("--layout", help=LAYOUT_HELP)
    add("--max_length", type=positive_int, help="tokens (default: what both models can take)")

    add = parser.add_argument_group("how").add_argument
    add("--compute_ece", action="store_true", help="measure calibration")
    add("--bootstrap", type=natural, default=2000, help="replicates for intervals; 0: none")
    add("--batch_size", type=positive_int, default=32, help="proteins of a batch, at most")
    add("--seed", type=natural, default=0, help="of samples, shuffles and bootstrap")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")
    add("--skip_teacher_check", action="store_true", help="measure even a nonsensical teacher")

    add = parser.add_argument_group("generated proteins").add_argument
    add("--num_samples", type=natural, default=0, help="of each model; with the next flag: 200")
    add("--generation_metrics", action="store_true", help="also diversity, novelty, controls")
    add("--profiles", type=Path, help="with that: families hit, by an HMM file such as Pfam-A.hmm")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="results file, JSON")
    add("--per_protein", type=Path, help="parquet file with the figures of single proteins")
    add("--overwrite", action="store_true", help="replace these files")
    return parser


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as a results file records them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def described_model(name: str, model: Any) -> dict[str, Any]:
    """Return a model's name and the fingerprint of its weights, as a results file records them."""
    from src.models.loading import model_fingerprint

    return {"name": name, "fingerprint": model_fingerprint(model)}


def held_out_and_training(
    args: argparse.Namespace, inputs: Any, tokenizer: Any, longest: int, thorough: bool
) -> tuple[Any, list[str] | None]:
    """Return the tokenised proteins to measure on, and residues of training proteins to compare.

    More training proteins are read where the evaluation is ``thorough``, which measures novelty.
    """
    from src.evaluation.gates import FLOOR_PROTEINS
    from src.evaluation.sequence_quality import NOVELTY_PROTEINS
    from src.proteins.sources import read_proteins
    from src.proteins.tokens import tokenise

    test = tokenise(
        inputs.source, inputs.part, tokenizer, longest, args.cache_dir, long_proteins="drop",
        max_proteins=args.max_proteins, sequence_column=inputs.column,
    )  # fmt: skip
    for line in test.report.lines():
        say(line)
    if not inputs.has_train:
        return test, None
    reader = read_proteins(
        inputs.source, split="train", tokenizer=tokenizer, sequence_column=inputs.column
    )
    count = NOVELTY_PROTEINS if thorough else FLOOR_PROTEINS
    return test, [protein.residues for protein in islice(reader, count)]


def run(args: argparse.Namespace) -> dict:
    """Evaluate, write the results and print a table. Returns the results.

    Of several processes the first does it: one GPU measures a student in minutes.
    """
    if not processes.is_first():
        return {}
    inputs_given = (*(args.data or "").split(","), args.profiles)
    check_outputs(args.output, args.per_protein, overwrite=args.overwrite, inputs=inputs_given)
    from src.common.cli import quiet_libraries
    from src.common.devices import choose_device
    from src.common.runs import provenance
    from src.evaluation import gates, student_record
    from src.evaluation import sequence_quality as q
    from src.evaluation.measurement import evaluate
    from src.evaluation.per_protein import write_per_protein
    from src.evaluation.results import print_table, write_results
    from src.evaluation.scoring import EvaluationSettings
    from src.models.decoding import sampling_room
    from src.models.loading import load_causal_lm
    from src.models.recognition import settle_layout

    quiet_libraries()
    description = q.DescriptionSettings(
        args.generation_metrics, args.profiles, bootstrap=args.bootstrap, seed=args.seed
    )
    inputs = student_record.settle_inputs(
        args.student_model, args.teacher_model, args.data, args.sequence_column, args.split
    )
    device = choose_device(args.device)
    tokenizer = student_record.shared_tokenizer(args.student_model, inputs.teacher, args.layout)
    student = load_causal_lm(args.student_model, device=device)
    teacher = load_causal_lm(inputs.teacher, device=device)
    settle_layout(teacher, tokenizer)
    samples = args.num_samples or (q.THOROUGH_SAMPLES if description.thorough else 0)
    if samples:  # before an hour of measuring: what cannot be sampled shows at once
        for model in (student, teacher):
            sampling_room(model, args.max_length)
    settings = EvaluationSettings(
        batch_size=args.batch_size, max_length=args.max_length, compute_ece=args.compute_ece,
        bootstrap=args.bootstrap, seed=args.seed, check=not args.skip_teacher_check,
    )  # fmt: skip
    longest = student_record.longest(student, teacher, settings)
    test, train = held_out_and_training(args, inputs, tokenizer, longest, description.thorough)
    measured = evaluate(
        student, teacher, tokenizer, test, settings,
        train=train and train[: gates.FLOOR_PROTEINS],
        clusters=student_record.clusters_of(inputs.source),
        cluster_kind=student_record.cluster_kind(inputs.source), announce=say,
    )  # fmt: skip
    results: dict[str, Any] = measured.results
    results["run"] = {
        **provenance(),
        "arguments": recorded(args),
        "student": described_model(args.student_model, student),
        "teacher": described_model(inputs.teacher, teacher),
        "data": {
            "source": inputs.source,
            "split": inputs.part,
            "fingerprint": test.fingerprint,
            "trained_on": inputs.seen,
        },
        "device": str(device),
        "seed": args.seed,
    }
    write_results(args.output, results, args.overwrite)
    if args.per_protein:
        write_per_protein(args.per_protein, measured.per_protein)
    if samples:
        say(f"written, without generated proteins yet: {args.output}")
        q.measure_generation(
            results, {"student": student, "teacher": teacher}, tokenizer,
            gates.residues_of_tokens(test, tokenizer), samples, description,
            batch_size=args.batch_size, max_length=args.max_length, train=train,
            clusters=measured.per_protein["cluster"],
        )  # fmt: skip
        write_results(args.output, results, overwrite=True)
    print_table(results)
    for path in filter(None, (args.output, args.per_protein)):
        say(f"written: {path}")
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
