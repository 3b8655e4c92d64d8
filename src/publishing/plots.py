"""Draws learning curves, reliability diagrams, compositions and scans as matplotlib figures.

Every function takes records as they are in the project's files. Colours are those of Okabe and Ito
(2008), which the colour-blind tell apart; series also differ in markers, dashes or hatching, so
that a print in grey can be read.
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
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.common.files import atomic_write
from src.evaluation.mutants import Substitution
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
"""Colours of other series: all but the teacher's."""
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)))
FEW_TOKENS = 100
"""A bin of a reliability diagram with fewer is drawn hollow."""
WIDTH = 4.4
"""Inches of a figure: it fills a phone's screen, or half a page, with text of nine points."""
MAP_ROW = 60
"""Positions in a row of a scan's map, as in a line of FASTA."""
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
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), INK),
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


UNDATED: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": dict.fromkeys(("CreationDate", "Producer", "Creator")),
    "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
}
"""Metadata without dates and versions, so that the same figure gives the same bytes."""


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

    ``runs`` are records of ``metrics.jsonl`` by name; ``quantity`` is ``loss``, ``hard_loss`` or
    ``soft_loss``. The first losses of a run may lie above the axis, so that its end is seen in
    detail.

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
            values = [(r["step"], r.get(prefix + quantity)) for r in records]
            points = [(float(s), float(v)) for s, v in values if v is not None and np.isfinite(v)]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            late += [v for s, v in points if s >= (1 - LAST_PART) * whole]
            kind = "validation" if prefix else "training"
            options: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.75}
            if prefix:
                options = {"marker": MARKERS[index % len(MARKERS)]}
            label_of_line = kind if len(runs) == 1 else f"{name}, {kind}"
            dashes = DASHES[index % len(DASHES)]
            axes.plot(steps, values, color=colour, linestyle=dashes, label=label_of_line, **options)
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
def reliability_diagram(name: str, calibration: Mapping[str, Any]) -> Figure:
    """Draw accuracy against confidence, and below it the share of tokens in each bin.

    Args:
        name: of the model.
        calibration: ``student_ece`` or ``teacher_ece`` of a results file, with its ``reliability``
            curve. The gap to the diagonal is shaded; bins of fewer than 100 tokens are hollow.
    """
    curve = calibration["reliability"]
    colour = _colour(name, 0)
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    filled = [i for i, count in enumerate(curve["count"]) if count]
    confidence = np.array([curve["confidence"][i] for i in filled])
    accuracy = np.array([curve["accuracy"][i] for i in filled])
    many = np.array([curve["count"][i] >= FEW_TOKENS for i in filled])
    above.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1, label="calibrated")
    above.fill_between(confidence, confidence, accuracy, color=colour, alpha=0.18, linewidth=0)
    above.plot(confidence, accuracy, color=colour, linewidth=1.2)
    few_label = f"fewer than {FEW_TOKENS} tokens"
    for chosen, fill, label in ((many, colour, name), (~many, "white", few_label)):
        if chosen.any():
            above.plot(
                confidence[chosen], accuracy[chosen], linestyle="", marker=MARKERS[0],
                color=colour, markerfacecolor=fill, label=label,
            )  # fmt: skip
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    error = calibration.get("ece")
    above.set_title(name if error is None else f"{name}: ECE {error:.3f}")
    above.legend(loc="upper left", fontsize=8)
    edges, counts = np.array(curve["edges"]), np.array(curve["count"], dtype=float)
    below.bar(
        edges[:-1], counts / max(counts.sum(), 1), width=np.diff(edges), align="edge",
        color=colour, alpha=0.75, edgecolor=INK, linewidth=0.5,
    )  # fmt: skip
    below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    below.set(xlabel="confidence", ylabel="tokens")
    return figure


@styled
def composition_bars(sets: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw amino-acid compositions side by side, the most frequent residues first.

    Args:
        sets: share of each residue by name of the set; one called ``natural`` is the reference,
            drawn as a line across the bars, and decides the order.

    Raises:
        ValueError: there is nothing to draw.
    """
    reference = sets.get("natural")
    bars = {name: shares for name, shares in sets.items() if name != "natural"}
    if not bars:
        raise ValueError("no composition of generated proteins: evaluate with --num_samples")
    guide = reference or next(iter(bars.values()))
    order = sorted(STANDARD_RESIDUES, key=lambda letter: -guide.get(letter, 0.0))
    in_row = len(order) // 2
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    grid = figure.subplots(2, 1, sharey=True)
    width = 0.8 / len(bars)
    for row, axes in enumerate(grid):
        letters = order[row * in_row : (row + 1) * in_row]
        places = np.arange(len(letters))
        for index, (name, shares) in enumerate(bars.items()):
            axes.bar(
                places + (index - (len(bars) - 1) / 2) * width,
                [shares.get(letter, 0.0) for letter in letters], width, label=name,
                color=_colour(name, index), hatch=("", "////", "....", "xxxx")[index % 4],
                edgecolor=INK, linewidth=0.4,
            )  # fmt: skip
        if reference:
            heights = [reference.get(letter, 0.0) for letter in letters]
            ends = places - 0.46, places + 0.46
            axes.hlines(heights, *ends, color=INK, linewidth=1.8, label="natural")
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


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, in the format of the name's ending; the same figure gives the same bytes.

    Raises:
        ValueError: the ending is none of ``.png``, ``.pdf`` and ``.svg``.
    """
    kind = figure_kind(path)
    with matplotlib.rc_context(STYLE), atomic_write(path, "wb") as handle:
        figure.savefig(handle, format=kind, metadata=UNDATED[kind])


def figure_kind(path: str | Path) -> str:
    """Return a figure's kind, by its ending. Raises ``ValueError`` where it cannot be drawn."""
    kind = Path(path).suffix[1:].lower()
    if kind not in UNDATED:
        raise ValueError(f"{path}: a figure ends in .png, .pdf or .svg")
    return kind


def _font_parts(match: re.Match[str]) -> str:
    """Spell a font shorthand out without its family, which the shorthand cannot leave out."""
    *weight, size = match[1].split()
    bold = [f"font-weight: {w}" for w in weight]
    return "; ".join([*bold, f"font-size: {size}"])


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an SVG element for an HTML page.

    It fills the width of its container and takes the page's text colour, and the page's colours
    where it defines ``--student`` and so on. ``name`` is a prefix of its ids, which must differ
    between the figures of a page; the description is for those who cannot see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=UNDATED["svg"])
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
    for attribute in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    text = text.replace(INK, "currentColor").replace("#ffffff", "var(--page, #ffffff)")
    for series, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{series}, {colour})")
    # matplotlib names its own fonts; the page's is as good and certain to be there.
    text = re.sub(r"font-family: [^;\"]+;?", "", text)
    text = re.sub(r"font: ([^;\"']*?[\d.]+px) '[^;\"]+", _font_parts, text)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


@styled
def scan_map(residues: str, scan: Sequence[Substitution], ratios: np.ndarray) -> Figure:
    """Return a map of positions × residues, in rows of 60 positions.

    Args:
        residues: the wild type.
        scan: substitutions, numbered from 1.
        ratios: ``(P,)`` log p(mutant) - log p(wild type), in nats. The colours end at the value
            that 98 % of the sizes are below.
    """
    table = np.full((len(STANDARD_RESIDUES), len(residues)), np.nan)
    for substitution, value in zip(scan, ratios, strict=True):
        table[STANDARD_RESIDUES.index(substitution.new), substitution.number - 1] = value
    rows = -(-len(residues) // MAP_ROW)
    known = np.abs(ratios[np.isfinite(ratios)])
    limit = float(np.quantile(known, 0.98)) if len(known) else 1.0
    figure = Figure(figsize=(10, 0.6 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for row, ax in enumerate(axes):
        start, stop = row * MAP_ROW, min((row + 1) * MAP_ROW, len(residues))
        image = ax.imshow(
            table[:, start:stop], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto",
            extent=(start + 0.5, stop + 0.5, len(STANDARD_RESIDUES) - 0.5, -0.5),
        )  # fmt: skip
        ax.plot(
            range(start + 1, stop + 1),
            [STANDARD_RESIDUES.find(letter) for letter in residues[start:stop]],
            linestyle="", marker=".", markersize=2.5, color="black",
        )  # fmt: skip
        ax.set(xlim=(start + 0.5, start + MAP_ROW + 0.5), ylim=(len(STANDARD_RESIDUES) - 0.5, -0.5))
        ax.set_yticks(range(len(STANDARD_RESIDUES)), list(STANDARD_RESIDUES), fontsize=6)
        ax.grid(False)
    axes[-1].set_xlabel("position (dots: the wild type)")
    figure.colorbar(
        image, ax=list(axes), label="log p(mutant) − log p(wild type), nats", fraction=0.02
    )
    return figure
