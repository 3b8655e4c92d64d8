"""The notebook runs from a clean kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_notebook_runs_from_a_clean_kernel():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "notebooks" / "phase_0_ablation.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("recommended_1500" in str(output) for output in outputs)


def test_the_notebook_is_committed_without_outputs():
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / "phase_0_ablation.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)


def test_the_notebook_finds_the_project_and_what_it_imports(monkeypatch):
    """The slow test runs all of it; this one sees at once that something was moved or renamed."""
    import nbformat

    monkeypatch.chdir(ROOT / "notebooks")
    notebook = nbformat.read(ROOT / "notebooks" / "phase_0_ablation.ipynb", as_version=4)
    first = next(cell["source"] for cell in notebook.cells if cell["cell_type"] == "code")
    lines = [line for line in first.splitlines() if not line.startswith("%")]
    names: dict = {}
    exec("\n".join(lines), names)
    assert names["root"] == ROOT
