#!/usr/bin/env python3
r"""Generate proteins with a causal protein language model and write them as FASTA.

A run that was stopped goes on where it was. Started by torchrun, the processes share the proteins;
the file is that of one process.

Examples:
  python scripts/generate.py --model models/demo --num_sequences 100 --output new.fasta
  python scripts/generate.py --model models/demo --prompt MKT --min_length 100 --max_length 300 \
      --rank_by_perplexity --scorer data/small_teacher --output ranked.fasta
  python scripts/generate.py --model models/demo --num_sequences 1000 --length 80-120 \
      --ban_residues C --drop_repeats --distinct --max_identity 0.7 --against train.fasta \
      --output wanted.fasta
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common import processes
from src.common.cli import (
    LAYOUT_HELP,
    HelpFormatter,
    natural,
    positive_float,
    positive_int,
    run_script,
    share,
)
from src.common.files import check_outputs, names_full_disk
from src.common.processes import say

if TYPE_CHECKING:
    from src.evaluation.generation import GeneratedProtein

SHOWN_FAMILIES = 20


def residue_range(text: str) -> tuple[int, int]:
    """Argparse type: two numbers of residues with a dash between them, or one for both."""
    ends = text.split("-")
    if len(ends) > 2 or not all(map(str.isdecimal, ends)):
        raise argparse.ArgumentTypeError(f"must be a range such as 80-120, got {text!r}")
    return positive_int(ends[0]), positive_int(ends[-1])


def residues(text: str) -> str:
    """Argparse type: letters of residues, in either case, perhaps with commas or blanks between."""
    return re.sub(r"[\s,]", "", text).upper()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what to generate").add_argument
    add("--model", required=True, help="directory or hub id")
    add("--layout", help=LAYOUT_HELP)
    add("--num_sequences", type=positive_int, default=10, help="how many proteins")
    add("--min_length", type=positive_int, default=1, help="residues; shorter ones are discarded")
    add("--max_length", type=positive_int, help="residues; longer ones are discarded")
    add("--length", type=residue_range, metavar="80-120", help="both, in one flag")
    add("--prompt", default="", help="first residues of every protein")
    add("--tag", default="", help="what the layout's tag says, such as an EC number")
    add(
        "--ban_residues",
        type=residues,
        default="",
        metavar="C",
        help="residues that no protein holds",
    )
    add(
        "--allow_unfinished",
        action="store_true",
        help="keep proteins that the model did not end, cut at --max_length",
    )
    add("--max_attempts", type=positive_int, help="give up after (default: 20 a protein, or 200)")
    add("--drop_repeats", action="store_true", help="discard proteins with tandem repeats")
    add("--distinct", action="store_true", help="keep the first of equal proteins")
    add(
        "--max_identity",
        type=share,
        help="discard proteins closer than this to one of --against (of the 10 likeliest)",
    )
    add("--against", type=Path, help="known proteins: FASTA or another file of proteins")

    add = parser.add_argument_group("sampling").add_argument
    add("--top_k", type=natural, default=950, help="among so many likeliest tokens; 0: all")
    add("--top_p", type=share, default=1.0, help="among the tokens with this share")
    add(
        "--repetition_penalty",
        type=positive_float,
        help="1: none (default: 1.2, or 1 where tokens are single residues)",
    )
    add("--temperature", type=positive_float, default=1.0, help="divides the logits")
    add("--seed", type=natural, default=0, help="of all random numbers")
    add("--batch_size", type=positive_int, default=64, help="at a time; does not change the result")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="FASTA file")
    add("--rank_by_perplexity", action="store_true", help="most likely proteins first")
    add("--profiles", type=Path, help="HMM file: name the family that each protein is hit by")
    add("--scorer", help="model that gives the perplexities (default: the model itself)")
    add("--overwrite", action="store_true", help="replace the file")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Generate, score and write. Returns the counts."""
    inputs = (args.against, args.profiles)
    check_outputs(args.output, overwrite=args.overwrite, inputs=inputs)
    if args.scorer and args.scorer == args.model:
        args.scorer = None
    from src.common.cli import quiet_libraries
    from src.common.devices import choose_device
    from src.evaluation import generation as g
    from src.evaluation.filters import Filters
    from src.models.loading import ProteinModel
    from src.proteins.fasta import write_fasta
    from src.proteins.relatives import check_profiles, family_hits
    from src.proteins.sources import read_proteins

    quiet_libraries()
    if args.profiles:
        check_profiles(args.profiles)
    if args.length:
        if args.min_length != 1 or args.max_length:
            raise ValueError("--length sets both: leave out --min_length and --max_length")
        args.min_length, args.max_length = args.length
    settings = g.GenerationSettings(
        **{k: v for k, v in vars(args).items() if k in g.GenerationSettings.__dataclass_fields__},
        whole_only=not args.allow_unfinished,
    )
    known = args.against and [p.residues for p in read_proteins(args.against, keep_ambiguous=True)]
    filters = Filters(args.drop_repeats, args.max_identity, known or (), args.distinct)
    processes.join(args.device)
    device = choose_device(args.device)
    scorer = loaded = ProteinModel.load(args.model, device, args.layout, say)
    if args.scorer:  # before the sampling: what is wrong with it shows at once
        scorer = ProteinModel.load(args.scorer, device, announce=say)
    begun = g.Begun(args.output.with_name(f"{args.output.name}.begun"), loaded, settings, filters)
    with names_full_disk(begun.path, "make space, or name another --output"):
        result = g.sample_proteins(*loaded, settings, filters, say, True, begun)
    lost = result.tally.reasons
    say(f"{result.tally.attempts:,} attempts: {result.tally.kept:,} kept" + (lost and f", {lost}"))
    if len(result.proteins) < args.num_sequences:
        few = (
            f"only {len(result.proteins)} of {args.num_sequences} proteins found: widen "
            "--length, loosen the filters, pass --allow_unfinished or raise --max_attempts"
        )
        if not result.proteins:
            raise ValueError(f"{few} ({lost})")
        say(few)
    if sampled := len(result.proteins) - result.begun:
        say(
            f"{sampled / result.seconds:.1f} proteins/s, "
            f"{result.tally.tokens / result.seconds:,.0f} tokens/s"
        )
    values = g.perplexities(*scorer, result.proteins)
    if not processes.is_first():
        return {}
    scored = list(zip(result.proteins, values, strict=True))
    if args.rank_by_perplexity:
        scored.sort(key=lambda pair: float("inf") if pair[1] is None else pair[1])
    names = {"model": Path(args.model).name or args.model}
    if args.scorer:
        names["scorer"] = Path(args.scorer).name or args.scorer
    families = None
    if args.profiles:
        hits = family_hits([protein.residues for protein, _ in scored], args.profiles)
        families = hits["names"]
        show_families(scored, hits)
    with names_full_disk(args.output, "make space, or name another --output"):
        write_fasta(
            args.output,
            g.fasta_records(scored, args.seed, names, loaded.layout.tag, families),
        )
    begun.remove()
    say(f"written: {args.output}")
    return result.counts


def show_families(scored: Sequence[tuple[GeneratedProtein, float | None]], hits: dict) -> None:
    """Print which family each protein is recognised as, and how many are."""
    for number, ((protein, _), family) in enumerate(zip(scored, hits["names"], strict=True), 1):
        if number > SHOWN_FAMILIES:
            say(f"... and {len(scored) - SHOWN_FAMILIES:,} more, in the file")
            break
        say(f"{number:6d}  {len(protein.residues):5d} residues  {family or 'no known family'}")
    say(
        f"{sum(hits['hit']):,} of {len(scored):,} proteins hit a known family, {hits['families']} "
        f"of the {hits['profiles']:,} families are hit (threshold: {hits['threshold']})"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
