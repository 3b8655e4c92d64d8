"""What docs/USING.md shows is what works: its blocks are run, with the bundled teacher."""

from __future__ import annotations

import csv
import importlib
import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest

from src.common.settings import BUNDLED_DATA, BUNDLED_TEACHER
from src.proteins.fasta import FastaRecord, write_fasta
from src.proteins.sources import read_proteins

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "USING.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    line
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.replace("\\\n", " ").splitlines()
]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
ELSEWHERE = {
    "pip install": "installs",
    "torchrun": "test_distributed.py",
    "--preset hf-": "takes the model hub: test_train_script.py, test_initialisation.py",
    "scripts/specialise.py": "test_specialist.py",
    "--profiles": "needs Pfam and minutes: test_sequence_quality.py",
    "scripts/compare.py": "test_comparison.py",
    "scripts/report.py": "test_report.py",
    "tools/upload_to_hf.py": "test_hub.py",
    "scripts/pipeline.sh": "test_pipeline.py",
}
"""What is run by other tests, or by none."""
SHORTER = {
    "--num_sequences 1000": "--num_sequences 1",
    "--num_sequences 100": "--num_sequences 2",
    "--num_train_epochs 20": "--num_train_epochs 1",
}
WILD = "MKTAGIAKQRQAFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAV"  # G5, A12, D45
RUN = [c for c in COMMANDS if not any(part in c for part in ELSEWHERE)]
TUNING = [c for c in RUN if "models/family" in c]


def run(command: str) -> None:
    """Run a command of the guide in this process, with less to do."""
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    _python, script, *arguments = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    assert module.main(arguments) == 0, command
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else None
    assert output is None or Path(output).stat().st_size > 0


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Enter a directory that has the files which the guide names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    shutil.copytree(ROOT / BUNDLED_TEACHER, tmp_path / "models" / "demo")
    short = (
        p for p in read_proteins(str(ROOT / BUNDLED_DATA), split="train") if len(p.residues) < 150
    )
    for name, count in (("proteins", 8), ("train", 8), ("family", 60), ("family_test", 30)):
        some = itertools.islice(short, count)
        write_fasta(f"{name}.fasta", [FastaRecord(p.name, p.residues, {}) for p in some])
    write_fasta("wild.fasta", [FastaRecord("wild", WILD, {})])
    with open("BLAT_ECOLX_Stiffler_2015.csv", "w", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(["mutant", "mutated_sequence", "DMS_score"])
        for place, new in enumerate("ACDEFGHI", start=20):
            mutant = f"{WILD[place - 1]}{place}{new}"
            table.writerow([mutant, WILD[: place - 1] + new + WILD[place:], place % 5])
    return tmp_path


def test_the_guides_commands_are_known():
    """A new command is run, or the table says who runs it; a table's entry is still needed."""
    assert len(RUN) >= 9
    for part in ELSEWHERE:
        assert any(part in command for command in COMMANDS), part
    for part in SHORTER:
        assert any(part in command for command in RUN), part
    assert [next(iter(re.findall("vllm|Tally|pipeline", block))) for block in PYTHON] == [
        "pipeline", "Tally", "vllm",
    ]  # fmt: skip


@pytest.mark.parametrize("command", [c for c in RUN if c not in TUNING])
def test_a_command_runs(here, command):
    run(command)


@pytest.mark.slow
def test_tuning_by_hand_runs(here):
    assert [command.split()[1] for command in TUNING] == ["scripts/train.py", "scripts/evaluate.py"]
    for command in TUNING:
        run(command)


def test_the_block_for_transformers_runs(here):
    names: dict = {}
    exec(PYTHON[0], names)  # our own text
    assert len(names["proteins"]) == 3
    assert any(names["proteins"])
    assert all(p == "" or (p.isalpha() and p.isupper()) for p in names["proteins"])


def test_the_block_for_python_runs(here, capsys):
    exec(PYTHON[1], {})  # our own text
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert not any("C" in line.split()[0] for line in lines)


def test_every_flag_in_the_guides_is_one_of_its_script():
    """Commands in the guides must not outlive the flags that they use."""
    cli = (ROOT / "docs" / "CLI.md").read_text()
    sections = {part.split("\n")[0]: part for part in cli.split("\n## ")[1:]}
    seen = 0
    for name in ("USING.md", "TROUBLESHOOTING.md"):
        text = (ROOT / "docs" / name).read_text().replace("\\\n", " ")
        for script, rest in re.findall(r"python (scripts/\w+\.py)([^\n]*)", text):
            for flag in re.findall(r"(?<= )--?[a-z_]+", rest):
                assert re.search(rf"[`\s]{flag}[`\s,]", sections[script]), (name, script, flag)
                seen += 1
        for flag in re.findall(r"`(--[a-z_]+)", text):
            assert f"`{flag}" in cli, (name, flag)
            seen += 1
    assert seen > 40
