"""Means over seeds and pooled calibration are drawn, and tables escape what would be read."""

from __future__ import annotations

import numpy as np
import pytest

from src.common import tables
from src.experiments import charts


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
