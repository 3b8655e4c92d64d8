"""The table of measured memory: from its record alone, and up to date in the document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.common.settings import TrainSettings
from src.models.sizes import PROTGPT2, gpt2_parameters
from tools import memory_table
from tools.benchmark.memory import Cell, comparison_line, planned, table

ROOT = Path(__file__).resolve().parents[1]
RECORD = {
    "tokens": 512,
    "cells": [
        {"preset": "hf-small", "teacher": "online", "batch_size": 4, "peak_bytes": 6_500_000_000},
        {"preset": "hf-tiny", "teacher": "cached", "batch_size": 1, "peak_bytes": 1_500_000_000},
    ],
}


def with_plans(record, base: int, ratios: tuple[float, float]):
    cells = [
        {**cell, "base_bytes": base, "planned_bytes": int(ratio * (cell["peak_bytes"] - base))}
        for cell, ratio in zip(record["cells"], ratios, strict=True)
    ]
    return {**record, "cells": cells}


def test_a_line_for_each_preset_and_teacher_and_a_dash_for_what_was_not_measured():
    assert table(RECORD).splitlines() == [
        "| preset | teacher | 1 × 512 | 4 × 512 |",
        "|---|---|---:|---:|",
        "| `hf-tiny` | cached | 1.5 GB | – |",
        "| `hf-small` | online | – | 6.5 GB |",
    ]


def test_the_estimate_is_held_against_what_the_models_took():
    line = comparison_line(with_plans(RECORD, 500_000_000, (0.9, 1.25)))
    assert "0.90 to 1.25 times" in line
    assert "(500.0 MB) left out" in line
    assert "left out" not in comparison_line(with_plans(RECORD, 0, (1.0, 1.0)))


def test_a_cached_teacher_costs_its_head_alone():
    online, cached = (planned(Cell("hf-tiny", 4, teacher)) for teacher in ("online", "cached"))
    shape = PROTGPT2["n_embd"], PROTGPT2["vocab_size"], PROTGPT2["n_positions"]
    blocks = gpt2_parameters(PROTGPT2["n_layer"], *shape) - gpt2_parameters(0, *shape)
    assert online - cached == 4 * blocks
    assert TrainSettings().max_length == Cell("hf-tiny", 4, "cached").tokens


def test_the_document_holds_the_committed_measurements():
    record = json.loads((ROOT / "results" / "memory_cpu.json").read_text())
    text = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text()
    assert table(record) in text
    assert comparison_line(record) in text


def test_user_errors_are_one_line(tmp_path, refusal):
    output = tmp_path / "memory.json"
    error = refusal(memory_table.main(["--update", "--output", str(output)]))
    assert "nothing was measured yet" in error
    output.write_text(json.dumps({**measured(), "tokens": 256}))
    error = refusal(memory_table.main(["--output", str(output)]))
    assert "holds other measurements: choose another --output" in error


def measured() -> dict:
    return json.loads((ROOT / "results" / "memory_cpu.json").read_text())


def test_what_is_no_record_is_refused_with_its_file(tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(memory_table, "DOCUMENT", tmp_path / "doc.md")
    (tmp_path / "doc.md").write_text("<!-- memory -->\n<!-- /memory -->\n")
    output = tmp_path / "memory.json"
    typed = ["--update", "--output", str(output)]
    for content in ("{}", "[]", '{"cells": [3]}', '{"cells": [{}]}', json.dumps(RECORD)):
        output.write_text(content)
        error = refusal(memory_table.main(typed))
        assert f"{output}: " in error
        assert "choose another --output" in error


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
