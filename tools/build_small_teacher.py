#!/usr/bin/env python3
"""Train the small teacher that the repository carries: a BPE tokenizer, then a GPT-2.

A run that was stopped goes on where it was when the same command is given again.

Example:
  python tools/build_small_teacher.py --data split --work_dir work/teacher --output teacher
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, natural, positive_int, run_script, say


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, help="directory with train, validation and test")
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="where the run keeps its state"
    )
    parser.add_argument("--output", type=Path, required=True, help="where the teacher is written")
    model = parser.add_argument_group("model")
    model.add_argument("--vocab_size", type=positive_int, default=512, help="tokens in all")
    model.add_argument("--n_layer", type=positive_int, default=4, help="blocks")
    model.add_argument("--n_head", type=positive_int, default=4, help="attention heads")
    model.add_argument("--n_embd", type=positive_int, default=256, help="width")
    model.add_argument(
        "--n_positions", type=positive_int, default=512, help="longest input, tokens"
    )
    budget = parser.add_argument_group("training")
    budget.add_argument("--total_tokens", type=positive_int, default=24_000_000, help="budget")
    budget.add_argument("--batch_tokens", type=positive_int, default=2048, help="tokens of a step")
    budget.add_argument("--matrix_learning_rate", type=float, default=4e-3, help="of Muon")
    budget.add_argument("--learning_rate", type=float, default=3e-3, help="of AdamW")
    budget.add_argument("--weight_decay", type=float, default=0.05, help="of Muon")
    budget.add_argument("--warmup_share", type=float, default=0.01, help="of the budget")
    budget.add_argument("--decay_share", type=float, default=0.5, help="of the budget")
    budget.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of autocast")
    budget.add_argument("--seed", type=natural, default=0, help="of weights and order")
    budget.add_argument(
        "--tokenizer_proteins", type=positive_int, default=50_000, help="to learn BPE"
    )
    budget.add_argument("--validation_proteins", type=positive_int, default=400, help="watched")
    budget.add_argument(
        "--threads", type=natural, default=0, help="CPU threads; 0: PyTorch's choice"
    )
    return parser


def run(args: argparse.Namespace) -> dict:
    """Train or go on, then write the teacher. Returns the final record."""
    import numpy as np
    import torch

    from src.common.files import write_json
    from src.proteins.layouts import END_OF_TEXT, layout
    from src.proteins.sources import read_proteins
    from src.training.pretraining import PretrainSettings, pretrain, train_tokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = PretrainSettings(
        **{f.name: getattr(args, f.name) for f in fields(PretrainSettings) if hasattr(args, f.name)}
    )
    if (args.output / "config.json").exists():
        raise ValueError(f"{args.output} holds a model already: choose another --output")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    train = [p.residues for p in read_proteins(args.data, split="train")]
    watched = [p.residues for p in read_proteins(args.data, split="validation")]
    watched = watched[: args.validation_proteins]
    say(f"{len(train):,} training proteins, {sum(map(len, train)):,} residues")
    tokenizer = train_tokenizer(
        train[: args.tokenizer_proteins], settings.vocab_size, settings.n_positions
    )

    def encode(proteins: list[str]) -> list[np.ndarray]:
        rows = tokenizer([layout(p) for p in proteins])["input_ids"]
        return [np.array(row, dtype=np.uint16) for row in rows]  # type: ignore[union-attr]

    log_file = (args.work_dir / "log.jsonl").open("a")

    def log(record: dict) -> None:
        record = {"time": time.strftime("%H:%M:%S"), **record}
        print(json.dumps(record), file=log_file, flush=True)
        say(json.dumps(record))

    encoded = encode(train)
    say(f"{sum(map(len, encoded)):,} training tokens")
    model = pretrain(
        encoded,
        encode(watched),
        sum(map(len, watched)),
        tokenizer.convert_tokens_to_ids(END_OF_TEXT),  # type: ignore[arg-type]
        settings,
        args.work_dir,
        log,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(args.output)  # type: ignore[arg-type]
    tokenizer.save_pretrained(args.output)
    record = {"settings": asdict(settings), "parameters": model.num_parameters()}
    write_json(args.output / "training.json", record)
    say(f"teacher of {model.num_parameters():,} parameters written to {args.output}")
    return record


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
