"""The README's first command: what scripts/quickstart.sh runs is run, with fewer steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESS = {
    "scripts/train.py": "--max_steps 4 --eval_steps 2 --save_steps 4 --train_size_prop 0.02 "
    "--validation_proteins 20 --batch_size 4",
    "scripts/evaluate.py": "--max_proteins 40 --num_samples 3",
    "scripts/generate.py": "--num_sequences 2",
}
"""What makes each command short; the last of two equal flags counts."""


def quickstart_commands(out: Path) -> list[list[str]]:
    """Return the Python commands of the script, its variables filled in."""
    text = (ROOT / "scripts" / "quickstart.sh").read_text().replace("\\\n", " ")
    lines = re.findall(r'^"\$python" .*$', text, re.MULTILINE)
    filled = [line.replace("$python", sys.executable).replace("$out", str(out)) for line in lines]
    return [shlex.split(line) for line in filled]


def test_the_script_runs_the_three_and_nothing_else():
    found = [command[1] for command in quickstart_commands(Path("out"))]
    assert found == list(LESS)
    assert not any("$" in word for command in quickstart_commands(Path("out")) for word in command)


@pytest.mark.slow
def test_the_commands_of_the_quickstart(tmp_path):
    out = tmp_path / "quickstart"
    out.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    shown = ""
    for command in quickstart_commands(out):
        done = subprocess.run(
            [*command, *LESS[command[1]].split()],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        shown += done.stdout
    record = json.loads((out / "student" / "run.json").read_text())
    assert record["status"] == "finished"
    results = json.loads((out / "evaluation.json").read_text())
    assert results["perplexity_ratio"] > 1
    assert results["student_ece"]["ece"] >= 0
    assert len(re.findall("^>", (out / "generated.fasta").read_text(), re.MULTILINE)) == 2
    # What the README says that a user sees at the end.
    for words in ("perplexity per token", "perplexity per residue", "kept of the teacher's"):
        assert words in shown, words


def test_the_family_quickstart_takes_fifty_members_of_one_family_and_known_flags():
    from scripts.specialise import build_parser

    text = (ROOT / "scripts" / "quickstart_family.sh").read_text().replace("\\\n", " ")
    (program,) = re.findall(r"awk -v family=\S+\s+'(.*?)'", text)
    entries = [f">a{i} family={'XY'[i % 2]}\nMKT\nAAA\n" for i in range(120)]
    done = subprocess.run(
        ["awk", "-v", "family=family=X", program],
        input="".join(entries),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "".join(entries[:100:2])
    (line,) = re.findall(r'^"\$python" scripts/specialise.py (.*)$', text, re.MULTILINE)
    args = build_parser().parse_args(shlex.split(line))
    assert args.model == "data/small_teacher"
    assert args.n_embd == 176
