#!/usr/bin/env python3
"""Publish a finished student on a model hub, privately unless told otherwise.

The token is what `hf auth login` saved, or HF_TOKEN. Sent are weights in safetensors,
configuration, tokenizer, a generated card and the run's record without private paths; nothing else.
Afterwards everything is downloaded and compared. A broken upload goes on when the same command is
given again. Against a hub without Xet storage, set HF_HUB_DISABLE_XET=1.

Examples:
  python tools/upload_to_hf.py --model_dir models/demo --repo_id me/demo --dry_run
  python tools/upload_to_hf.py --model_dir models/demo --repo_id me/demo --results results/demo.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, run_script, say, size


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="a finished run's directory")
    parser.add_argument("--repo_id", required=True, help="owner/name on the hub")
    parser.add_argument("--results", type=Path, help="results file of this model, for the card")
    parser.add_argument("--license", help="of the student (default: its teacher's, where known)")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument(
        "--private", action="store_true", help="only you can see it (what happens without --public)"
    )
    seen.add_argument("--public", action="store_true", help="everybody can see it")
    parser.add_argument("--revision", default="main", help="branch; created where it is missing")
    parser.add_argument("--create_pr", action="store_true", help="propose by a pull request")
    parser.add_argument("--dry_run", action="store_true", help="print what would be sent, and stop")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Check, send and verify. Returns the revision and the files' hashes."""
    from src.publishing import hub

    hub.check_repo_id(args.repo_id)
    package = hub.pack(args.model_dir, args.repo_id, args.results, args.license)
    for file in package.files:
        say(f"{size(file.size):>10}  {file.name}")
    say(f"{size(sum(file.size for file in package.files)):>10}  in {len(package.files)} files")
    if package.left_behind:
        say(f"not sent: {', '.join(package.left_behind)}")
    if args.dry_run:
        say(f"\n{package.card}")
        say(f"nothing was sent to {args.repo_id}")
        return {"files": {file.name: file.sha256 for file in package.files}}
    done = hub.upload(
        package,
        args.repo_id,
        private=not args.public,
        create_pr=args.create_pr,
        revision=args.revision,
    )
    say("verified: all hashes equal, the same logits on a protein")
    say(f"{done['pull_request'] or done['url']}")
    say(f"revision {done['revision']}")
    return done


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
