"""Figures from plain data: what is drawn is what was given."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from src.proteins.layouts import STANDARD_RESIDUES
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


def test_learning_curves_show_training_and_validation_of_each_run():
    axes = plots.learning_curves({"a": records(), "b": records(0.2)}).axes[0]
    assert [line.get_label() for line in axes.lines] == [
        "a, training", "a, validation", "b, training", "b, validation",
    ]  # fmt: skip
    assert np.asarray(axes.lines[1].get_xydata()).tolist() == [[50, 3.1], [100, 3.1]]
    low, high = axes.get_ylim()
    assert low <= 3.005
    assert high > 3.4
    assert plots.learning_curves({"demo": records()}).axes[0].lines[0].get_label() == "training"


def test_a_diverged_run_is_drawn_and_an_empty_one_refused():
    broken = [*records(), {"step": 110, "loss": float("nan")}]
    assert np.size(plots.learning_curves({"a": broken}).axes[0].lines[0].get_xdata()) == 10
    with pytest.raises(ValueError, match="soft_loss"):
        plots.learning_curves({"a": records()}, "soft_loss")


def test_reliability_diagram_marks_bins_with_few_tokens():
    student, histogram = plots.reliability_diagram("student", calibration([500, 200, 0, 20])).axes
    points = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in student.lines}
    assert points["student"] == [[0.125, 0.1125], [0.375, 0.3375]]
    assert points["fewer than 100 tokens"] == [[0.875, 0.7875]]
    many = plots.reliability_diagram("teacher", calibration([500, 200, 100, 100])).axes[0]
    assert "fewer than 100 tokens" not in {line.get_label() for line in many.lines}
    heights = [bar.get_height() for bar in histogram.patches]  # type: ignore[attr-defined]
    assert heights == pytest.approx([500 / 720, 200 / 720, 0, 20 / 720])
    assert "0.050" in student.get_title(loc="left")


def test_composition_is_ordered_by_the_natural_one():
    natural = {letter: (i + 1) / 210 for i, letter in enumerate(STANDARD_RESIDUES)}
    student = dict.fromkeys(STANDARD_RESIDUES, 0.05)
    figure = plots.composition_bars({"student": student, "teacher": natural, "natural": natural})
    letters = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
    assert "".join(letters) == STANDARD_RESIDUES[::-1]
    assert len(figure.axes[0].patches) == 20
    with pytest.raises(ValueError, match="--num_samples"):
        plots.composition_bars({"natural": natural})


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
