"""Draws figures from plain data: learning curves, reliability, composition, quality against size.

Every function takes results or records as they stand in the project's files and returns a
matplotlib figure; nothing is computed here that is not drawn, and no window is ever opened.
Colours are those of Okabe and Ito (2008), which the colour-blind tell apart; series differ in
markers, dashes or hatching too, so that a print in grey is still read.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, PercentFormatter

from src.common.files import atomic_write
from src.evaluation.results import lookup
from src.proteins.layouts import STANDARD_RESIDUES

Parameters = ParamSpec("Parameters")

INK = "#1b1c1e"
FAINT = "#8a8d91"
COLOURS = {
    "student": "#0072b2",
    "teacher": "#d55e00",
    "natural": "#4d4f53",
    "shuffled": "#cc79a7",
}
CYCLE = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4f53")
"""Of series without a colour of their own, the teacher's left out."""
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)))
FEW_TOKENS = 100
"""A bin of a reliability diagram with fewer is drawn hollow."""
WIDTH = 4.4
"""Inches of a figure: it fills a phone's screen, or half a page, with text of nine points."""
LAST_PART = 0.6
"""Share of a run whose losses a learning curve's axis must show; earlier ones may leave it."""

STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
    # Text stays text: searchable, and drawn in the page's own font.
    "svg.fonttype": "none",
    "svg.hashsalt": "protein-lm-distill",
    "pdf.fonttype": 42,
}


def styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Draw in the project's style, whatever style the caller's session has."""

    @functools.wraps(draw)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return wrapped


def series_look(index: int) -> dict[str, Any]:
    """Return colour, marker and dashes of a series by its number."""
    return {
        "color": CYCLE[index % len(CYCLE)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def _colour(label: str, index: int) -> str:
    return COLOURS.get(label, CYCLE[index % len(CYCLE)])


@styled
def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    quantity: str = "loss",
    label: str | None = None,
) -> Figure:
    """Draw a loss in training (thin) and in validation (thick, marked) against the steps.

    Args:
        runs: records of ``metrics.jsonl`` by name of the run.
        quantity: ``loss``, ``hard_loss`` or ``soft_loss``.
        label: of the axis.

    Returns:
        The figure. The first losses of a run may leave the axis at the top: what matters is where
        it goes.

    Raises:
        ValueError: no run has the quantity.
    """
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = figure.subplots()
    late: list[float] = []
    for index, (name, records) in enumerate(runs.items()):
        colour = _colour("student" if len(runs) == 1 else name, index)
        whole = max((r["step"] for r in records), default=0)
        for prefix in ("", "eval_"):
            points = [(r["step"], r[prefix + quantity]) for r in records if prefix + quantity in r]
            points = [(float(s), float(v)) for s, v in points if v is not None]
            points = [(s, v) for s, v in points if np.isfinite(v)]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            late += [v for s, v in points if s >= (1 - LAST_PART) * whole]
            kind = "validation" if prefix else "training"
            options: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.75}
            if prefix:
                options = {"marker": MARKERS[index % len(MARKERS)]}
            axes.plot(
                steps,
                values,
                color=colour,
                linestyle=DASHES[index % len(DASHES)],
                label=kind if len(runs) == 1 else f"{name}, {kind}",
                **options,
            )
    if not late:
        raise ValueError(f"no record of {quantity} to draw a learning curve of")
    span = max(late) - min(late) or abs(late[0]) or 1.0
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, min(late) - 0.15 * span), min(high, max(late) + 1.2 * span))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(label or quantity.replace("_", " "))
    axes.legend(fontsize=8)
    return figure


@styled
def reliability_diagram(calibrations: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw accuracy against confidence, and how many tokens have which confidence.

    Args:
        calibrations: ``student_ece`` and such of a results file, by name of the model; each with
            its ``reliability`` curve.

    Returns:
        The figure, one column for each model: above, each bin's accuracy at its mean confidence,
        with the gap to the diagonal shaded and bins of fewer than 100 tokens hollow; below, the
        share of tokens in each bin.

    Raises:
        ValueError: there is no curve to draw.
    """
    models = {name: c for name, c in calibrations.items() if (c or {}).get("reliability")}
    if not models:
        raise ValueError("no reliability curve: evaluate with --compute_ece")
    columns = len(models)
    figure = Figure(figsize=(WIDTH if columns == 1 else 3.1 * columns, 4.3), layout="constrained")
    grid = figure.subplots(
        2,
        columns,
        squeeze=False,
        sharex=True,
        sharey="row",
        gridspec_kw={"height_ratios": [3, 1]},
    )
    for column, (name, record) in enumerate(models.items()):
        colour = _colour(name, column)
        _reliability(grid[0, column], record, name, colour, MARKERS[column % len(MARKERS)])
        curve = record["reliability"]
        edges, counts = np.array(curve["edges"]), np.array(curve["count"], dtype=float)
        below: Axes = grid[1, column]
        below.bar(
            edges[:-1],
            counts / max(counts.sum(), 1),
            width=np.diff(edges),
            align="edge",
            color=colour,
            alpha=0.75,
            edgecolor=INK,
            linewidth=0.5,
        )
        below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        below.set_xlabel("confidence")
        if column == 0:
            grid[0, 0].set_ylabel("accuracy")
            below.set_ylabel("tokens")
    return figure


def _reliability(
    axes: Axes, record: Mapping[str, Any], name: str, colour: str, marker: str
) -> None:
    """Draw the upper part of a reliability diagram."""
    curve = record["reliability"]
    filled = [i for i, count in enumerate(curve["count"]) if count]
    confidence = np.array([curve["confidence"][i] for i in filled])
    accuracy = np.array([curve["accuracy"][i] for i in filled])
    many = np.array([curve["count"][i] >= FEW_TOKENS for i in filled])
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1, label="calibrated")
    axes.fill_between(confidence, confidence, accuracy, color=colour, alpha=0.18, linewidth=0)
    axes.plot(confidence, accuracy, color=colour, linewidth=1.2)
    for chosen, fill, label in (
        (many, colour, name),
        (~many, "white", f"fewer than {FEW_TOKENS} tokens"),
    ):
        if chosen.any():
            axes.plot(
                confidence[chosen],
                accuracy[chosen],
                linestyle="",
                marker=marker,
                color=colour,
                markerfacecolor=fill,
                label=label,
            )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    error = record.get("ece")
    axes.set_title(name if error is None else f"{name}: ECE {error:.3f}")
    axes.legend(loc="upper left", fontsize=8)


@styled
def composition_bars(sets: Mapping[str, Mapping[str, float]], rows: int = 2) -> Figure:
    """Draw amino-acid compositions side by side, the most frequent residues first.

    Args:
        sets: share of each residue by name of the set; one called ``natural`` is the reference,
            drawn as a line across the bars, and decides the order.
        rows: that the 20 residues are spread over.

    Returns:
        The figure.

    Raises:
        ValueError: there is nothing to draw.
    """
    reference = sets.get("natural")
    bars = {name: shares for name, shares in sets.items() if name != "natural"}
    if not bars:
        raise ValueError("no composition of generated proteins: evaluate with --num_samples")
    guide = reference or next(iter(bars.values()))
    order = sorted(STANDARD_RESIDUES, key=lambda letter: -guide.get(letter, 0.0))
    in_row = -(-len(order) // rows)
    figure = Figure(figsize=(WIDTH, 1.7 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 1, squeeze=False, sharey=True)[:, 0]
    width = 0.8 / len(bars)
    for row, axes in enumerate(grid):
        letters = order[row * in_row : (row + 1) * in_row]
        places = np.arange(len(letters))
        for index, (name, shares) in enumerate(bars.items()):
            axes.bar(
                places + (index - (len(bars) - 1) / 2) * width,
                [shares.get(letter, 0.0) for letter in letters],
                width,
                label=name,
                color=_colour(name, index),
                hatch=("", "////", "....", "xxxx")[index % 4],
                edgecolor=INK,
                linewidth=0.4,
            )
        if reference:
            axes.hlines(
                [reference.get(letter, 0.0) for letter in letters],
                places - 0.46,
                places + 0.46,
                color=INK,
                linewidth=1.8,
                label="natural",
            )
        axes.set_xticks(places, letters)
        axes.set_xlim(-0.6, in_row - 0.4)
        axes.grid(visible=False, axis="x")
        # No step of 2.5 %: labels have no decimals.
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.supylabel("share of residues", fontsize=9)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


@styled
def quality_against_compression(
    results: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]],
) -> Figure:
    """Draw perplexity ratio and KL divergence of students against how much smaller they are.

    Args:
        results: results files as read, by name of the student; or several, of students of one kind
            and of different sizes, by name of the kind.

    Returns:
        The figure, with intervals, and the ratio that each size must stay below where the files
        name it. Where several kinds have one size, they stand side by side.

    Raises:
        ValueError: no file has a compression ratio and a figure to draw.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, given in results.items():
        records = [given] if isinstance(given, Mapping) else list(given)
        drawn = [
            r
            for r in records
            if r.get("compression_ratio") and r.get("perplexity_ratio") is not None
        ]
        if drawn:
            kinds[name] = sorted(drawn, key=lambda r: float(r["compression_ratio"]))
    if not kinds:
        raise ValueError("no results with compression_ratio and perplexity_ratio to draw")
    figure = Figure(figsize=(WIDTH * 1.5, 3.2), layout="constrained")
    grid = figure.subplots(1, 2)
    every = [record for records in kinds.values() for record in records]
    sizes = [float(record["compression_ratio"]) for record in every]
    middle = (len(kinds) - 1) / 2
    panels = (
        ("perplexity_ratio", "perplexity, student / teacher"),
        ("kl_divergence", "KL(teacher‖student), nats per token"),
    )
    for axes, (key, label) in zip(grid, panels, strict=True):
        for index, (name, records) in enumerate(kinds.items()):
            shown = [r for r in records if lookup(r, key) is not None]
            if not shown:
                continue
            values = np.array([lookup(r, key) for r in shown], dtype=float)
            ends = [(r.get("intervals") or {}).get(key) for r in shown]
            low, high = np.array(
                [e or (v, v) for e, v in zip(ends, values, strict=True)], dtype=float
            ).reshape(-1, 2).T  # fmt: skip
            shift = 1 + 0.03 * (index - middle) * (max(map(len, kinds.values())) > 1)
            axes.errorbar(
                [float(r["compression_ratio"]) * shift for r in shown],
                values,
                yerr=np.maximum([values - low, high - values], 0),
                **series_look(index) | ({} if len(shown) > 1 else {"linestyle": ""}),
                linewidth=1,
                capsize=3,
                label=name,
            )
        axes.set_xscale("log")
        ticks = _nice_sizes(sizes)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}×" for tick in ticks]))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
        axes.set_xlabel("times smaller than the teacher")
        axes.set_title(label, fontweight="normal")
    grid[0].axhline(1, color=COLOURS["teacher"], linewidth=1, label="teacher")
    bounds = sorted(
        {
            (float(record["compression_ratio"]), bound)
            for record in every
            if (bound := lookup(record, "threshold.perplexity_ratio_below")) is not None
        }
    )
    if bounds:
        places, limits = zip(*bounds, strict=True)
        # One student gives one bound, and a line needs two ends.
        ends_of_line = (places[0] / 1.12, *places, places[-1] * 1.12)
        grid[0].plot(
            ends_of_line,
            (limits[0], *limits, limits[-1]),
            color=FAINT,
            linestyle="--",
            linewidth=1,
            label="to stay below",
        )
    low, high = grid[0].get_ylim()
    grid[0].set_ylim(min(low, 1 - 0.05 * (high - 1)), high)
    grid[1].set_ylim(bottom=0)
    handles, labels = grid[0].get_legend_handles_labels()
    columns = min(len(labels), 4 if max(map(len, labels)) < 24 else 2)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _nice_sizes(values: Sequence[float]) -> list[float]:
    """Return round compression ratios that enclose those given."""
    steps = [s * 10.0**power for power in range(-2, 6) for s in (1, 2, 5)]
    low = max((s for s in steps if s <= min(values)), default=steps[0])
    high = min((s for s in steps if s >= max(values)), default=steps[-1])
    chosen = [s for s in steps if low <= s <= high]
    return chosen if len(chosen) > 1 else [low / 2, low, low * 2]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, in the format of the name's ending; the same figure gives the same bytes.

    Raises:
        ValueError: the ending is none of ``.png``, ``.pdf`` and ``.svg``.
    """
    kind = Path(path).suffix[1:].lower()
    undated: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    }
    if kind not in undated:
        raise ValueError(f"{path}: a figure ends in .png, .pdf or .svg")
    with matplotlib.rc_context(STYLE), atomic_write(path, "wb") as handle:
        figure.savefig(handle, format=kind, metadata=undated[kind])


def _font_parts(match: re.Match[str]) -> str:
    """Spell a font shorthand out without its family, which the shorthand cannot leave out."""
    *weight, size = match[1].split()
    bold = [f"font-weight: {w}" for w in weight]
    return "; ".join([*bold, f"font-size: {size}"])


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an SVG element to stand in a page.

    Args:
        figure: any of this module.
        name: prefix of its ids, which must differ between the figures of a page.
        description: for those who cannot see it.

    Returns:
        The element: it takes the width that it is given, the page's text colour, and, where the
        page defines ``--student`` and so on, its colours.
    """
    buffer = io.StringIO()
    undated = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=undated)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
    text = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", text, count=1)
    text = text.replace(INK, "currentColor").replace("#ffffff", "var(--page, #ffffff)")
    for series, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{series}, {colour})")
    # matplotlib names its own fonts; the page's is as good and certain to be there.
    text = re.sub(r"font-family: [^;\"]+;?", "", text)
    text = re.sub(r"font: ([^;\"']*?[\d.]+px) '[^;\"]+", _font_parts, text)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
