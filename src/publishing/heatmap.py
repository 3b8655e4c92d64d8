"""Draws a saturation scan: every substitution of a protein by its log-likelihood ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from src.evaluation.mutants import Substitution
from src.proteins.layouts import STANDARD_RESIDUES
from src.publishing.plots import styled

ROW = 60
"""Positions in a row of the map, as in a line of FASTA."""


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
    rows = -(-len(residues) // ROW)
    known = np.abs(ratios[np.isfinite(ratios)])
    limit = float(np.quantile(known, 0.98)) if len(known) else 1.0
    figure = Figure(figsize=(10, 0.6 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for row, ax in enumerate(axes):
        start, stop = row * ROW, min((row + 1) * ROW, len(residues))
        image = ax.imshow(
            table[:, start:stop], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto",
            extent=(start + 0.5, stop + 0.5, len(STANDARD_RESIDUES) - 0.5, -0.5),
        )  # fmt: skip
        ax.plot(
            range(start + 1, stop + 1),
            [STANDARD_RESIDUES.find(letter) for letter in residues[start:stop]],
            linestyle="", marker=".", markersize=2.5, color="black",
        )  # fmt: skip
        ax.set(xlim=(start + 0.5, start + ROW + 0.5), ylim=(len(STANDARD_RESIDUES) - 0.5, -0.5))
        ax.set_yticks(range(len(STANDARD_RESIDUES)), list(STANDARD_RESIDUES), fontsize=6)
        ax.grid(False)
    axes[-1].set_xlabel("position (dots: the wild type)")
    figure.colorbar(
        image, ax=list(axes), label="log p(mutant) − log p(wild type), nats", fraction=0.02
    )
    return figure
