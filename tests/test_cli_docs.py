"""docs/CLI.md says what the parsers say."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools import write_cli_docs

ROOT = Path(__file__).resolve().parents[1]


def test_the_file_is_up_to_date(capsys):
    status = write_cli_docs.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_an_old_file_is_told(tmp_path, capsys):
    (tmp_path / "CLI.md").write_text("old")
    assert write_cli_docs.main(["--check", "--output", str(tmp_path / "CLI.md")]) == 2
    assert "python tools/write_cli_docs.py" in capsys.readouterr().err
    assert write_cli_docs.main(["--output", str(tmp_path / "CLI.md")]) == 0
    assert (tmp_path / "CLI.md").read_text() == (ROOT / "docs" / "CLI.md").read_text()


def test_every_script_and_flag_is_described():
    text = (ROOT / "docs" / "CLI.md").read_text()
    described = dict(write_cli_docs.parsers())
    assert {"scripts/train.py", "scripts/evaluate.py", "tools/write_cli_docs.py"} <= set(described)
    for name, parser in described.items():
        section = text[text.index(f"## {name}\n") :].split("\n## ")[0]
        for action in parser._actions:
            for flag in action.option_strings:
                hidden = action.help == argparse.SUPPRESS or flag in ("-h", "--help")
                assert (f"`{flag}" in section or f", {flag}" in section) != hidden, (name, flag)
            assert action.help, f"{name} {action.dest} has no help"


def test_a_section_by_hand():
    parser = argparse.ArgumentParser(
        description="Does it.\n\nExamples:\n  do.py --x 1 \\\n      -y\n"
    )
    parser.add_argument("--x", type=int, default=0, help="100 %% of a | b")
    parser.add_argument("-y", choices=("p", "q"), required=True, help="kind")
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    assert write_cli_docs.document("scripts/do.py", parser) == (
        "## scripts/do.py\n\nDoes it.\n\n```bash\ndo.py --x 1 \\\n    -y\n```\n\n"
        "| flag | what it does | default |\n| --- | --- | --- |\n"
        "| `--x N` | 100 % of a \\| b | `0` |\n"
        "| `-y CHOICE` | kind: p, q | required |\n"
    )
