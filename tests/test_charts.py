"""The experiment's figures draw what they were given, and its tables say it."""

from __future__ import annotations

import numpy as np
import pytest

from src.common import tables
from src.experiments import charts


def entry(estimate: float, half: float = 0.01) -> dict:
    return {"estimate": estimate, "interval": [estimate - half, estimate + half]}


def size_record(shift: float = 0.0) -> dict:
    """A record of analysis.json with four arms and two seeds."""
    means = {"baseline": 2.9, "uncertainty": 2.92, "calibration": 2.93 + shift, "both": 2.88}
    arms = {arm: entry(y) | {"by_seed": [y - 0.002, y + 0.002]} for arm, y in means.items()}
    against = {a: {"nats": entry(y - 2.9)} for a, y in means.items() if a != "baseline"}
    contrasts = {"U": 0.02, "C": 0.03 + shift, "B": -0.02, "I": -0.07 - shift}
    return {
        "arms": arms,
        "against": {"baseline": against},
        "designs": {
            "published": {
                "arms": list(means),
                "contrasts": {key: entry(value) for key, value in contrasts.items()},
            }
        },
    }


def test_effects_show_estimates_intervals_and_seeds():
    figure = charts.effects_figure({"a": size_record(), "b": size_record(0.1)}, 0.02)
    upper, _, lower, _ = figure.axes
    points = np.concatenate([np.asarray(line.get_xydata()) for line in upper.lines])
    for value in (0.02, 0.03, -0.02):
        assert np.isclose(points[:, 0], value).any()
    names = [label.get_text() for label in upper.get_yticklabels()]
    assert names == ["uncertainty", "calibration", "both"]
    drawn = np.concatenate([np.asarray(line.get_xydata()) for line in lower.lines])
    assert np.isclose(drawn[:, 0], -0.07).any()
    # Arms share their seeds' spread, so that it cancels in every contrast.
    assert "interaction (I)" in [label.get_text() for label in lower.get_yticklabels()]


def test_effects_without_the_design_and_without_anything():
    record = size_record() | {"designs": {}}
    assert len(charts.effects_figure({"a": record}, 0.02).axes) == 1
    with pytest.raises(ValueError, match="no analysis"):
        charts.effects_figure({}, 0.02)


def test_curves_are_means_over_seeds():
    arms = {"baseline": ([1, 2], [[5.0, 4.0], [7.0, 6.0]])}
    axes = charts.arm_curves({"x": arms}, "loss").axes[0]
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [6.0, 5.0]
    with pytest.raises(ValueError, match="no learning curves"):
        charts.arm_curves({}, "loss")


def test_calibration_pools_seeds_by_their_counts():
    def curve(counts, accuracy):
        return {
            "edges": [0.0, 0.5, 1.0],
            "count": counts,
            "confidence": [0.25, 0.75 if counts[1] else None],
            "accuracy": accuracy,
        }

    seeds = [
        {"ece": 0.1, "interval": [0.05, 0.15], "reliability": curve([300, 100], [0.2, 0.5])},
        {"ece": 0.2, "interval": None, "reliability": curve([100, 0], [0.6, None])},
    ]
    figure = charts.calibration_figure({"baseline": seeds})
    gap = figure.axes[0].lines[1]
    assert np.allclose(np.asarray(gap.get_xydata()), [[0.25, 0.3 - 0.25], [0.75, -0.25]])
    with pytest.raises(ValueError, match="no reliability"):
        charts.calibration_figure({})


def test_tables_escape_what_would_be_read():
    rows = [["a|b", "5 % − 1"], ["x_y", "<2"]]
    assert tables.markdown_lines(["arm", "KL"], rows)[2] == "| a\\|b | 5 % − 1 |"
    text = "\n".join(tables.latex_lines(["arm", "KL"], rows))
    assert r"x\_y & $<$2 \\" in text
    assert r"5 \% $-$ 1" in text
    assert r"\begin{tabular}{lr}" in text
