"""Figures as files and within a page: one element, no requests, the same bytes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from src.publishing import plots


def records(shift: float = 0.0) -> list[dict]:
    """Return what a run of 100 steps logs."""
    found: list[dict] = []
    for step in range(10, 101, 10):
        found.append({"step": step, "loss": 3 + 50 / step**2 + shift, "learning_rate": 1e-3})
        if step % 50 == 0:
            found.append({"step": step, "eval_loss": 3.1 + shift})
    return found


def calibration(counts: list[int]) -> dict:
    edges = np.linspace(0, 1, len(counts) + 1)
    middle = [float(m) if n else None for m, n in zip((edges[1:] + edges[:-1]) / 2, counts)]  # noqa: B905
    return {
        "ece": 0.05,
        "reliability": {
            "edges": edges.tolist(),
            "count": counts,
            "confidence": middle,
            "accuracy": [m and m * 0.9 for m in middle],
        },
    }


def test_inline_svg_is_one_element_without_requests():
    text = plots.inline_svg(plots.learning_curves({"a": records()}), "f1", 'a "<&" b')
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert root.attrib["aria-label"] == 'a "<&" b'
    assert "width" not in root.attrib
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert ids
    assert all(i.startswith("f1-") for i in ids)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name.endswith("href"):
                assert value[1:] in ids
    assert "currentColor" in text
    assert "var(--student" in text
    assert plots.INK not in text
    assert "font-family" not in text


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, ending):
    for name in ("a", "b"):
        figure = plots.learning_curves({"a": records()})
        plots.save_figure(figure, tmp_path / f"{name}.{ending}")
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    with pytest.raises(ValueError, match=r"\.png"):
        plots.save_figure(plots.learning_curves({"a": records()}), tmp_path / "a.txt")


def test_a_session_keeps_its_own_style():
    before = matplotlib.rcParams["font.size"]
    plots.learning_curves({"a": records()})
    assert matplotlib.rcParams["font.size"] == before
