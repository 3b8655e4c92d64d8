"""The table of measured memory is up to date in the document, and a cell can be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import memory_table
from tools.benchmark.memory import comparison_line, table

ROOT = Path(__file__).resolve().parents[1]


def test_the_document_holds_the_committed_measurements():
    record = json.loads((ROOT / "results" / "memory_cpu.json").read_text())
    text = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text()
    assert table(record) in text
    assert comparison_line(record) in text


@pytest.mark.slow
def test_a_cell_is_measured_in_a_process_of_its_own(tmp_path):
    """Of random embeddings of 50,257 tokens alone a student of width 128 needs 26 MB four times."""
    output = tmp_path / "memory.json"
    typed = f"--presets xs --batch_sizes 1 --teachers cached --max_length 32 --output {output}"
    assert memory_table.main(typed.split()) == 0
    (cell,) = json.loads(output.read_text())["cells"]
    took = cell["peak_bytes"] - cell["base_bytes"]
    assert 0.5 < cell["planned_bytes"] / took < 2
    assert took > 4 * 26e6
