"""Draws the experiments' figures: effects of the arms, curves, calibration, families.

Every function takes numbers from results files and returns a figure, as in
:mod:`src.publishing.plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from src.publishing.plots import COLOURS, FAINT, INK, series_look, styled

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
"""Numbers of a logarithmic axis, written out."""
SHIFT = 0.16
"""Distance of the seeds' points below the estimate in a forest plot, in rows."""


def _row_of_panels(count: int, margin: float = 0.8, **options: Any) -> tuple[Figure, Any]:
    """Return a figure with panels side by side, and room of a margin in inches beside them."""
    figure = Figure(figsize=(margin + 2.9 * count, 3.3), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


@styled
def effects_figure(sizes: Mapping[str, Mapping[str, Any]], margin: float) -> Figure:
    """Draw every arm less the baseline, and below it the contrasts U, C, B and I of the claim.

    Each size, a record of ``analysis.json`` by its title, has a column. Small marks are single
    seeds. The band of differences that count as none is ±``margin``.

    Raises:
        ValueError: there is nothing to draw, or the sizes were not analysed alike.
    """
    if not sizes:
        raise ValueError("no analysis to draw")
    first = next(iter(sizes.values()))
    arms = [arm for arm in first["arms"] if arm != "baseline"]
    designs = "published" in first["designs"]
    for title, record in sizes.items():
        compared = record["against"].get("baseline", {})
        if not set(arms) <= set(compared) or ("published" in record["designs"]) != designs:
            raise ValueError(
                f"the analysis of {title} lacks arms or designs of others, or the comparison with "
                "baseline: run scripts/analyse_ablation.py for all, --against baseline"
            )
    heights = [len(arms) + 1, 5.5] if designs else [len(arms) + 1]
    figure = Figure(
        figsize=(2.2 + 2.7 * len(sizes), 0.24 * sum(heights) + 1.4), layout="constrained"
    )
    grid = figure.subplots(
        len(heights), len(sizes), squeeze=False, sharex="col", sharey="row",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for column, (title, record) in enumerate(sizes.items()):
        by_seed = {arm: np.asarray(entry["by_seed"]) for arm, entry in record["arms"].items()}
        others = record["against"]["baseline"]
        rows = [(a, others[a]["nats"], by_seed[a] - by_seed["baseline"]) for a in arms]
        _forest(grid[0, column], rows, margin)
        grid[0, column].set_title(title)
        if designs:
            design = record["designs"]["published"]
            y00, y10, y01, y11 = (by_seed[arm] for arm in design["arms"])
            contrasts = {
                "U": ("uncertainty alone (U)", y10 - y00),
                "C": ("calibration alone (C)", y01 - y00),
                "B": ("both (B)", y11 - y00),
                "I": ("interaction (I)", y11 - y10 - y01 + y00),
            }
            rows = [
                (contrasts[key][0], entry, contrasts[key][1])
                for key, entry in design["contrasts"].items()
            ]
            _forest(grid[1, column], rows, margin)
        grid[-1, column].set_xlabel("difference in ln(perplexity\nper residue)")
        grid[-1, column].xaxis.set_major_locator(MaxNLocator(4))
    grid[0, 0].set_ylabel("arm less baseline")
    if designs:
        grid[1, 0].set_ylabel("the claim's contrasts")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def _forest(
    axes: Axes, rows: Sequence[tuple[str, Mapping[str, Any], np.ndarray]], margin: float
) -> None:
    """Draw estimates with intervals from the top down, each with its seeds below it."""
    axes.axvspan(-margin, margin, color=FAINT, alpha=0.18, linewidth=0, label=f"within ±{margin:g}")
    axes.axvline(0, color=INK, linewidth=0.8)
    places = -np.arange(len(rows), dtype=float)
    estimates = np.array([entry["estimate"] for _, entry, _ in rows])
    ends = np.array([entry["interval"] for _, entry, _ in rows])
    axes.errorbar(
        estimates, places, xerr=np.abs(ends.T - estimates), fmt="o", color=COLOURS["student"],
        capsize=2.5, label="mean, 95 % interval",
    )  # fmt: skip
    for index, (place, (_, _, seeds)) in enumerate(zip(places, rows, strict=True)):
        below = np.full(len(seeds), place - 2 * SHIFT)
        label = None if index else "single seeds"
        axes.plot(seeds, below, "|", color=FAINT, markersize=5, label=label)
    axes.set_yticks(places - SHIFT / 2, [name.replace("_", " ") for name, _, _ in rows])
    axes.set_ylim(places[-1] - 0.8, 0.6)
    axes.grid(visible=False, axis="y")


@styled
def arm_curves(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]],
    label: str,
) -> Figure:
    """Draw validation values against optimiser steps: each arm's mean over seeds and its range.

    Args:
        panels: by title of the panel and arm, steps (K,) and values (seeds, K).
        label: of the vertical axis.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(panels.values()):
        raise ValueError("no learning curves to draw")
    figure, grid = _row_of_panels(len(panels))
    for axes, (title, arms) in zip(grid, panels.items(), strict=True):
        for index, (arm, (steps, values)) in enumerate(arms.items()):
            table = np.asarray(values, dtype=float)
            look = series_look(index)
            low, high = table.min(0), table.max(0)
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.15, lw=0)
            axes.plot(steps, table.mean(0), **look, label=arm.replace("_", " "))
        axes.set_title(title)
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    grid[0].set_ylabel(label)
    handles, labels = grid[0].get_legend_handles_labels()
    columns = min(len(labels), 2 * len(panels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


@styled
def compute_figure(panels: Mapping[str, Mapping[str, Sequence[Sequence[Any]]]]) -> Figure:
    """Draw how close students come to their teacher against the seconds of their training.

    Args:
        panels: by size and recipe, for each seed its points with ``seconds`` and
            ``kl_per_residue``.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(panels.values()):
        raise ValueError("no runs to draw")
    figure, grid = _row_of_panels(len(panels), sharey=True)
    for axes, (title, recipes) in zip(grid, panels.items(), strict=True):
        for index, (recipe, seeds) in enumerate(recipes.items()):
            for number, points in enumerate(seeds):
                seconds = [point["seconds"] for point in points]
                kl = [point["kl_per_residue"] for point in points]
                label = None if number else recipe.replace("_", " ")
                axes.loglog(seconds, kl, **series_look(index), label=label)
        axes.set_title(title)
        axes.set_xlabel("seconds of training")
        axes.legend(fontsize=8)
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(PLAIN)
    grid[0].set_ylabel("KL(teacher‖student) on validation,\nnats per residue")
    return figure


@styled
def families_figure(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], x: str
) -> Figure:
    """Draw measures of starting points against the number of members or the cost, with intervals.

    Args:
        panels: by title and start: (x, estimate, low, high) of each point, of ascending x.
        x: title of the axis.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(panels.values()):
        raise ValueError("no cells to draw")
    figure, grid = _row_of_panels(len(panels), margin=2.6)
    names = list(dict.fromkeys(name for starts in panels.values() for name in starts))
    for axes, (title, starts) in zip(grid, panels.items(), strict=True):
        for name, points in starts.items():
            at, value, low, high = np.array(points, dtype=float).T
            look = series_look(names.index(name))
            shift = 1.04 ** (names.index(name) - len(names) / 2)  # points of one N lie side by side
            axes.errorbar(at * shift, value, [value - low, high - value], **look, label=name)
        axes.set_xscale("log")
        ticks = sorted({point[0] for points in starts.values() for point in points})
        axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x)
    handles = {}
    for axes in grid:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles, loc="outside right center", fontsize=8)
    return figure


@styled
def calibration_figure(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw reliability curves of several models, their confidences, and their ECE with intervals.

    On the left: accuracy less confidence of each bin with at least one token in a thousand, and the
    share of tokens in each bin. On the right: the ECE of each seed.

    Args:
        models: by name, ``ece``, ``interval`` and ``reliability`` (edges, count, confidence and
            accuracy of each bin) of each seed. The curve pools all seeds.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not models:
        raise ValueError("no reliability curves to draw")
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    grid = figure.subplot_mosaic(
        [["gap", "ece"], ["tokens", "ece"]], height_ratios=[3, 1.2], width_ratios=[3, 2]
    )
    gap, tokens, ece = grid["gap"], grid["tokens"], grid["ece"]
    gap.axhline(0, color=FAINT, linestyle="--", linewidth=1)
    largest = 0.1
    students = [name for name in models if name not in COLOURS]
    for index, (name, seeds) in enumerate(models.items()):
        # Students keep the colours that they have in the learning curves.
        own = students.index(name) if name in students else len(students)
        look = series_look(own)
        look["color"] = colour = COLOURS.get(name, look["color"])
        count, confidence, accuracy, edges = _pooled([seed["reliability"] for seed in seeds])
        share = count / count.sum()
        shown = share >= 1e-3
        largest = max(largest, float(edges[1:][shown].max()))
        gap.plot(
            confidence[shown], (accuracy - confidence)[shown], **look, label=name.replace("_", " ")
        )
        tokens.stairs(share, edges, color=colour, linestyle=look["linestyle"], lw=1.4)
        places = -index + np.linspace(0.18, -0.18, len(seeds)) if len(seeds) > 1 else [-index]
        for place, seed in zip(places, seeds, strict=True):
            low, high = seed["interval"] or (seed["ece"], seed["ece"])
            ece.plot([low, high], [place, place], color=colour, linewidth=1)
            ece.plot([seed["ece"]], [place], marker=look["marker"], color=colour, markersize=3.5)
    for axes in (gap, tokens):
        axes.set_xlim(0, largest)
    gap.set_ylabel("accuracy − confidence")
    gap.set_title("above 0: less sure than right")
    tokens.set_yscale("log")
    tokens.set_ylabel("share of\ntokens")
    tokens.set_xlabel("confidence of the likeliest token")
    ece.set_yticks([-i for i in range(len(models))], [n.replace("_", " ") for n in models])
    ece.set_ylim(-len(models) + 0.4, 0.6)
    ece.set_xlim(left=0)
    ece.xaxis.set_major_locator(MaxNLocator(4))
    ece.set_title("ECE, each seed")
    ece.set_xlabel("ECE, 15 bins")
    ece.grid(visible=False, axis="y")
    handles, labels = gap.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def _pooled(curves: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, ...]:
    """Return count, mean confidence, mean accuracy and edges of the bins of pooled curves."""
    edges = np.array(curves[0]["edges"], dtype=float)
    count = np.zeros(len(edges) - 1)
    sums = np.zeros((2, len(count)))
    for curve in curves:
        here = np.array(curve["count"], dtype=float)
        count += here
        for row, key in enumerate(("confidence", "accuracy")):
            sums[row] += here * np.array([value or 0.0 for value in curve[key]])
    confidence, accuracy = sums / np.maximum(count, 1)
    return count, confidence, accuracy, edges
