#!/usr/bin/env python3
r"""Export a model to CTranslate2 or ONNX, compare it there with PyTorch, and sample a protein.

The packages are optional: pip install ctranslate2, or onnx onnxscript onnxruntime. Why GGUF is not
offered, and how to get it: docs/RUNTIMES.md.

Examples:
  python tools/export.py --model models/demo --to ctranslate2 --output demo-ct2
  python tools/export.py --model models/demo --to ctranslate2 --int8 --output demo-ct2-int8
  python tools/export.py --model models/demo --to onnx --output demo.onnx
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common import settings as s
from src.common.cli import HelpFormatter, positive_int, run_script, say

TOLERANCE = 1e-3
"""Nats by which a token's log-probability in float32 may differ from PyTorch's."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--to", required=True, choices=("ctranslate2", "onnx"), help="the runtime")
    parser.add_argument("--int8", action="store_true", help="weights in 8 bits (CTranslate2)")
    parser.add_argument("--data", default=s.BUNDLED_DATA, help="held-out proteins to compare on")
    parser.add_argument("--proteins", type=positive_int, default=50, help="of these")
    parser.add_argument("--output", type=Path, required=True, help="a directory; ONNX: a file")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Export, compare, keep. Returns the comparison."""
    if args.output.exists():
        raise ValueError(f"--output {args.output}: exists: name another, or delete it")
    if args.int8 and args.to != "ctranslate2":
        raise ValueError("--int8 is CTranslate2's: --to ctranslate2")
    from src.common.cli import quiet_libraries
    from src.evaluation.student_record import choose_split
    from src.models.forward import stated_positions
    from src.models.loading import ProteinModel
    from src.proteins.layouts import stop_token
    from src.proteins.sources import read_proteins
    from src.publishing import exports as x

    quiet_libraries()
    model, tokenizer = loaded = ProteinModel.load(args.model)
    split, _ = choose_split(args.data, None)
    every = (p.residues for p in read_proteins(args.data, split=split, tokenizer=tokenizer))
    proteins = list(islice((p for p in every if loaded.rows([p])[1][0]), args.proteins))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".export-") as work:
        made = Path(work) / (args.output.name or "export")
        if args.to == "onnx":
            x.to_onnx(model, made)
            other = x.onnx_log_probs(made)
            draw = x.stepwise_draw(other, stop_token(tokenizer))
        else:
            x.to_ctranslate2(model, tokenizer, made, "int8" if args.int8 else None)
            other = x.ctranslate2_log_probs(made)
            draw = x.ctranslate2_draw(made, tokenizer)
        found = x.compare(x.torch_log_probs(model), other, tokenizer, proteins)
        if not args.int8 and not found["largest_difference"] <= TOLERANCE:
            raise ValueError(
                f"{args.to} gives a token another log-probability than PyTorch, by "
                f"{found['largest_difference']:.2g} nats: the export was not kept"
            )
        longest = min(x.SAMPLED_TOKENS, stated_positions(model.config) or x.SAMPLED_TOKENS)
        sampled = x.sample_protein(draw, tokenizer, longest)
        made.rename(args.output)
    factor = math.exp(found["nll"] - found["reference_nll"])
    say(
        f"{len(proteins)} proteins, {found['tokens']:,} tokens: largest difference of a token's "
        f"log-probability {found['largest_difference']:.2g} nats, KL {found['kl']:.2g} nats a "
        f"token, perplexity x {factor:.5f}"
    )
    say(f"sampled there: {sampled or f'no protein ended within {longest} tokens'}")
    say(f"written: {args.output}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
