#!/usr/bin/env python3
r"""Score proteins by their likelihood, and compare the scores with measured fitness.

Started by torchrun, the processes share the proteins.

Examples:
  python scripts/score.py --model models/demo --input proteins.fasta --output scores.csv
  python scripts/score.py --model models/demo --teacher_model data/small_teacher \
      --input BLAT_ECOLX_Stiffler_2015.csv --output scores.csv --correlations spearman.json
  python scripts/score.py --model models/demo --wildtype wild.fasta --mutants A12C:D45E,G5A \
      --output scores.csv
  python scripts/score.py --model models/demo --wildtype wild.fasta --scan --heat_map scan.png \
      --output scan.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common import processes
from src.common.cli import LAYOUT_HELP, HelpFormatter, natural, positive_int, run_script
from src.common.files import check_outputs
from src.common.processes import say
from src.evaluation.results import few_clusters, put_estimate, with_interval


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what to score").add_argument
    add("--model", required=True, help="directory or hub id")
    add("--teacher_model", help="a second model, to score beside it")
    add("--input", type=Path, help="proteins: FASTA, text, CSV, TSV, Excel and others")
    add(
        "--wildtype",
        help="residues, or a file with one protein: of the next two flags, or of a table in "
        "--input that has mutants and no sequences",
    )
    add("--mutants", help="of it: A12C:D45E,G5A, or a file with one on each line")
    add("--scan", action="store_true", help="every single substitution of it")
    add("--layout", help=LAYOUT_HELP)
    add("--sequence_column", help="column of the residues in a table (default: a usual name)")
    add("--score_column", help="measured fitness (default: DMS_score where there is one)")

    add = parser.add_argument_group("how").add_argument
    add(
        "--windows",
        action="store_true",
        help="longer than the model: in overlapping windows; with --wildtype all, if one is",
    )
    add("--batch_size", type=positive_int, default=32, help="proteins of a batch, at most")
    add("--bootstrap", type=natural, default=2000, help="replicates for intervals; 0: none")
    add("--seed", type=natural, default=0, help="of the bootstrap")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="CSV: the input's columns, then the scores")
    add("--correlations", type=Path, help="JSON with Spearman's correlations and what made them")
    add("--heat_map", type=Path, help="PNG of a scan, by the (first) model")
    add("--overwrite", action="store_true", help="replace these files")
    return parser


def chosen_variants(args: argparse.Namespace, tag: str | None) -> tuple[Any, str | None]:
    """Return what is to be scored, with the layout's tag, and its wild type if there is one."""
    from src.evaluation import fitness as f
    from src.evaluation import mutants as m

    if not args.input and not args.wildtype:
        raise ValueError("give --input, or --wildtype with --mutants or --scan")
    if args.input and (args.mutants or args.scan):
        raise ValueError("--input holds what is scored: without --mutants and --scan")
    if args.heat_map and not args.scan:
        raise ValueError("--heat_map is of a scan: pass --scan")
    if args.heat_map:
        from src.publishing.plots import figure_kind

        figure_kind(args.heat_map)
    if args.input:
        wild = f.wild_type(args.wildtype, tag) if args.wildtype else None
        columns = args.sequence_column, args.score_column
        return f.read_variants(args.input, *columns, wild, tag), wild
    if args.mutants and args.scan:
        raise ValueError("--mutants and --scan: pass one of them")
    if not args.mutants and not args.scan:
        raise ValueError("--wildtype: of which mutants? pass --mutants or --scan")
    wild = f.wild_type(args.wildtype, tag)
    if args.scan:
        scan = m.every_substitution(wild)
        names = [f"{s.wild}{s.number}{s.new}" for s in scan]
        return f.mutant_variants(wild, [[s] for s in scan], names), wild
    names = m.read_mutants(args.mutants)
    parsed = [m.parse_mutant(name) for name in names]
    begin = m.numbering(parsed, wild)
    say(f"mutants: {begin}")
    return f.mutant_variants(wild, parsed, names, begin.first), wild


def run(args: argparse.Namespace) -> dict:
    """Score, compare, write. Returns what was summary."""
    outputs = (args.output, args.correlations, args.heat_map)
    if args.output.suffix in (".parquet", ".xlsx", ".npz"):
        raise ValueError(f"--output {args.output}: is written as CSV: name it .csv or .csv.gz")
    inputs = [path for path in (args.input, args.wildtype, args.mutants) if path]
    check_outputs(*outputs, overwrite=args.overwrite, inputs=inputs)
    from src.common.cli import quiet_libraries
    from src.common.devices import choose_device
    from src.common.files import sha256_file, write_json
    from src.common.runs import provenance
    from src.evaluation import fitness as f
    from src.models.loading import NOT_TAKEN, ProteinModel, load_tokenizer, model_fingerprint
    from src.proteins.layouts import layout_of

    quiet_libraries()
    processes.join(args.device)
    names = {"": args.model} | ({"teacher_": args.teacher_model} if args.teacher_model else {})
    tokenizers = {p: load_tokenizer(name, layout=args.layout) for p, name in names.items()}
    tags = (layout_of(tokenizer).tag for tokenizer in tokenizers.values())
    variants, wild = chosen_variants(args, next(filter(None, tags), None))
    report = variants.report.lines() if args.input else [f"{len(variants.rows):,} mutants"]
    for line in report:
        say(line)
    if args.correlations:
        f.require_measured(variants)
    kinds = ["log_likelihood", "log_likelihood_per_residue"]
    if wild is not None:
        kinds.append("log_ratio")
    long = "" if args.windows else " (--windows scores long ones)"
    f.check_columns(variants, [prefix + kind for prefix in names for kind in kinds])
    device = choose_device(args.device)
    models = {
        prefix: ProteinModel.load(name, device, announce=say, tokenizer=tokenizers[prefix])
        for prefix, name in names.items()
    }
    scores = f.score_columns(models, variants.residues, args.batch_size, wild, args.windows, say)
    if not processes.is_first():
        return {}
    columns = of_models(scores, kinds[1])
    scored = f.comparable(*columns.values())
    if not any(scored):
        raise ValueError(f"nothing to write: all proteins {NOT_TAKEN}" + long)
    # Correlations first: where they cannot be had, nothing is written.
    summary: dict[str, Any] = (
        {} if variants.measured is None else correlations(args, variants, scores)
    )
    f.write_scores(args.output, variants, scores)
    empty = variants.residues.count("")
    if empty:
        say(f"{empty:,} rows have no usable sequence, see above: their scores are empty")
    lost = int(sum(~scored)) - empty
    if lost:
        say(f"{lost:,} proteins {NOT_TAKEN}: their scores are empty{long}")
    say(f.which_suits(variants.residues))
    if args.heat_map:
        from src.evaluation.mutants import every_substitution
        from src.publishing.plots import save_figure, scan_map

        save_figure(scan_map(wild, every_substitution(wild), scores["log_ratio"]), args.heat_map)  # type: ignore[arg-type]
        say(f"written: {args.heat_map}")
    say(f"written: {args.output}")
    summary = {"proteins": len(variants.rows), "not_scored": lost + empty, **summary}
    if args.correlations:
        summary["run"] = {
            **provenance(),
            "models": {n: model_fingerprint(models[p].model) for p, n in names.items()},
            "input": {"name": args.input.name, "sha256": sha256_file(args.input)},
            "device": device.type,
        }
        write_json(args.correlations, summary)
        say(f"written: {args.correlations}")
    return summary


def of_models(scores: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return a column of scores for each model that was given, by its role."""
    columns = {"student": kind, "teacher": f"teacher_{kind}"}
    return {name: scores[column] for name, column in columns.items() if column in scores}


def correlations(args: argparse.Namespace, variants: Any, scores: Mapping[str, Any]) -> dict:
    """Print and return rank correlations with the measurements.

    Empty where there are too few, which is an error where a file of them is asked for.
    """
    from src.evaluation import fitness as f

    columns = of_models(scores, "log_likelihood_per_residue")
    compared = f.comparable(variants.measured, *columns.values())
    if sum(compared) < f.LEAST_COMPARED and not args.correlations:
        say(f"no correlation: fewer than {f.LEAST_COMPARED} variants have measurement and score")
        return {}
    estimates, count = f.spearman(
        columns, variants.measured, variants.clusters, args.bootstrap, args.seed
    )
    clusters = {c for c, known in zip(variants.clusters, compared, strict=True) if known}
    found: dict[str, Any] = {
        "compared": count,
        "clusters": len(clusters),
        "intervals": {},
    }
    for name, estimate in estimates.items():
        put_estimate(found, f"spearman.{name}", estimate)
        shown = with_interval(found, f"spearman.{name}")
        say(f"Spearman, {name}: {shown} over {count:,} variants")
    if any(found["intervals"].values()):
        for warning in few_clusters(len(clusters), "mutated positions"):
            say(warning)
    if f.lengths_differ(variants.residues):
        totals = of_models(scores, "log_likelihood")
        by_total, _ = f.spearman(totals, variants.measured, variants.clusters, 0)
        found["spearman_total"] = {n: e.estimate for n, e in by_total.items()}
        shown = ", ".join(f"{n} {e.estimate:+.3f}" for n, e in by_total.items())
        say(f"by the total, which follows the length as well: {shown}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
