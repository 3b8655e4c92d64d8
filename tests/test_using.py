"""What docs/USING.md shows is what works."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_block_for_transformers_runs(tiny_lm, tiny_tokenizer, tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    text = (ROOT / "docs" / "USING.md").read_text()
    block = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    assert '"models/demo"' in block
    names: dict = {}
    exec(block.replace('"models/demo"', repr(str(tmp_path))), names)  # our own text
    assert len(names["proteins"]) == 3
    assert any(names["proteins"])
    assert all(p == "" or (p.isalpha() and p.isupper()) for p in names["proteins"])


def test_the_block_for_python_runs(tiny_lm, tiny_tokenizer, tmp_path, capsys):
    tiny_lm(initializer_range=0.1).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    text = (ROOT / "docs" / "USING.md").read_text()
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "Tally" in b
    )
    exec(block.replace('"models/demo"', repr(str(tmp_path))), {})  # our own text
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
