"""Writes the page on an adapted model, its specialist and the candidates that it proposes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from src.common.cli import duration
from src.common.runs import RUN_FILE, read_run
from src.evaluation.filters import WHY
from src.evaluation.metrics import GENERATION_METRICS
from src.evaluation.results import with_interval
from src.proteins.layouts import lines_of
from src.publishing import plots
from src.publishing.report import Cell, Drawing, make_drawing, short_name, split_cell, template
from src.trainer.callbacks import read_metrics
from src.trainer.early_stopping import outcome_line

SHOWN = 25
"""Candidates in the table of the page."""
EXAMPLES = 3
TRAINED = {"adapted": "adapted", "random": "from random weights", "specialist": "specialist"}
"""Names on the page of the directories of models."""
SET_LABELS = {
    "sampled": "samples",
    "kept": "best candidates",
    "natural": "held-out members",
    "shuffled": "the same, shuffled",
}
METRIC_LABELS = {
    "teacher_perplexity_per_residue": "the adapted model's perplexity per residue",
    "families.hit_share": "hit by the profile",
    "kl_from_natural": "composition KL from held-out members",
}


def build_page(folder: Path, judgement: Mapping[str, Any]) -> str:
    """Return the page on one family's run.

    Args:
        folder: of the run.
        judgement: of :func:`src.experiments.family_run.judge_models`.
    """
    family, found = judgement["family"], judgement["candidates"]
    with (folder / "candidates" / "candidates.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    best = [row for row in table if row["rank"]]
    sets = found["sets"]
    content = {
        "name": short_name(family["name"]),
        "summary": _summary(judgement),
        "tiles": _tiles(judgement),
        "notes": family["notes"],
        "judged": _judged(judgement),
        "training": _training(judgement),
        "curves": _curves(folder),
        "profile": judgement["profile"],
        "dropped": [(r, f"{n:,}", WHY.get(r, "")) for r, n in found["dropped"].items()],
        "temperature": f"{found['temperature']:g}",
        "limits": [(r, f"{100 * v:.0f} %") for r, v in found["limits"].items()],
        "set_heads": [(SET_LABELS[s], s, f"{sets[s]['sequences']:,} proteins") for s in sets],
        "set_rows": _set_rows(sets),
        "composition": _composition(sets),
        "scatter": _scatter(table),
        "candidates": [_candidate_row(row) for row in best[:SHOWN]],
        "examples": [
            (f"{row['name']}, rank {row['rank']}", lines_of(row["sequence"]))
            for row in best[:EXAMPLES]
        ],
        "files": _files(folder),
        "location": short_name(folder),
    }
    page = template("family.html.jinja").render(content)
    return page.encode("utf-8", "replace").decode("utf-8")


def _summary(judgement: Mapping[str, Any]) -> str:
    family, found = judgement["family"], judgement["candidates"]
    made = sum(found["dropped"].values())
    text = (
        f"{short_name(judgement['model'])}, adapted to {family['train']:,} members of this family "
        f"({family['validation']:,} more decided when to stop, {family['test']:,} were held out), "
        f"sampled {made:,} proteins; {found['dropped']['kept']:,} of them are candidates."
    )
    return text


def _tiles(judgement: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the main figures: label, cell, and how to read it."""
    tiles = []
    figures = judgement["held_out"] or {}
    if figures:
        unadapted = with_interval(figures, "nats.unadapted")
        tiles.append(
            {
                "label": "nats per residue, adapted",
                "cell": split_cell(with_interval(figures, "nats.adapted")),
                "note": f"unadapted {unadapted}; lower is better",
            }
        )
    if figures.get("kept") is not None:
        tiles.append(
            {
                "label": "of that gain, kept by the specialist",
                "cell": split_cell(with_interval(figures, "kept")),
                "note": "1 is the adapted model, 0 the unadapted one",
            }
        )
    sampled = judgement["candidates"]["sets"].get("sampled")
    if sampled:
        tiles.append(
            {
                "label": "of samples hit by the profile",
                "cell": split_cell(with_interval(sampled, "families.hit_share")),
                "note": judgement["profile"]["counted"],
            }
        )
    dropped = judgement["candidates"]["dropped"]
    tiles.append(
        {
            "label": "candidates",
            "cell": Cell(f"{dropped['kept']:,}"),
            "note": f"of {sum(dropped.values()):,} samples",
        }
    )
    return tiles


def _judged(judgement: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the table of models on held-out members."""
    figures = judgement["held_out"]
    if not figures:
        return None
    rows = []
    for name in figures["nats"]:
        model = judgement["models"].get(name, {})
        speed = model.get("proteins_per_second")
        rows.append(
            (
                name,
                split_cell(with_interval(figures, f"nats.{name}")),
                split_cell(with_interval(figures, f"gain.{name}")),
                f"{model['parameters']:,}" if model else "",
                f"{speed:.1f}" if speed else "",
            )
        )
    counts = f"{figures['proteins']:,} members in {figures['clusters']:,} clusters"
    if figures["not_fitting"]:
        counts += f"; {figures['not_fitting']:,} more do not fit a model"
    if figures["not_recognised_by_profile"]:
        counts += (
            f"; the profile does not recognise {figures['not_recognised_by_profile']:,}, which get "
            "its background"
        )
    return {"rows": rows, "counts": counts}


def _training(judgement: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for label, key in (("adaptation", "adaptation"), ("distillation", "distillation")):
        fit = judgement[key]
        if fit:
            text = f"{fit['optimizer']}, learning rate {fit['learning_rate']:g}, "
            text += f"{duration(fit['seconds'])}; {outcome_line(fit)}"
            rows.append((label, text))
    return rows


def _curves(folder: Path) -> list[Drawing]:
    runs = {
        label: read_metrics(folder / name)
        for name, label in TRAINED.items()
        if (folder / name / RUN_FILE).is_file()
    }
    drawings = []
    fits = {label: records for label, records in runs.items() if label != "specialist"}
    caption = "Cross-entropy with training members, thin, and with validation members, thick."
    drawings.append(
        make_drawing(
            lambda: plots.learning_curves(fits, "hard_loss", "nats per token"), "fit", caption
        )
    )
    if "specialist" in runs:
        caption = "The specialist's divergence from the adapted model."
        only = {"specialist": runs["specialist"]}
        drawings.append(
            make_drawing(
                lambda: plots.learning_curves(only, "soft_loss", "divergence, nats per token"),
                "distil",
                caption,
            )
        )
    return drawings


def _set_rows(sets: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Cell]]]:
    """Return label and cells of each figure that some set has."""
    rows = []
    for metric in GENERATION_METRICS:
        cells = [with_interval(record, metric.name) for record in sets.values()]
        label = METRIC_LABELS.get(metric.name, metric.label)
        if label and any(cells):
            rows.append((label, [split_cell(cell) for cell in cells]))
    return rows


def _composition(sets: Mapping[str, Mapping[str, Any]]) -> Drawing:
    shown = {SET_LABELS[s]: sets[s]["composition"] for s in sets if s in ("sampled", "kept")}
    shown["natural"] = sets["natural"]["composition"]
    caption = "Amino-acid composition; lines: natural members."
    return make_drawing(lambda: plots.composition_bars(shown), "composition", caption)


def _scatter(table: Sequence[Mapping[str, str]]) -> Drawing:
    """Draw every sample by the two scores that rank it."""

    @plots.styled
    def draw() -> Figure:
        figure = Figure(figsize=(plots.WIDTH, 3.0), layout="constrained")
        axes = figure.subplots()
        for label, colour, marker, wanted in (
            ("dropped", plots.COLOURS["shuffled"], "x", False),
            ("candidates", plots.COLOURS["student"], "o", True),
        ):
            points = [
                (float(r["nats_per_residue"]), float(r["profile_bits"]) / int(r["residues"]))
                for r in table
                if bool(r["rank"]) == wanted and r["profile_bits"]
            ]
            if points:
                x, y = np.array(points).T
                axes.scatter(x, y, s=9, c=colour, marker=marker, label=label, linewidths=0.8)
        axes.set_xlabel("nats per residue under the adapted model")
        axes.set_ylabel("profile score, bits per residue")
        axes.legend(fontsize=8)
        return figure

    caption = "The two scores that rank a candidate: best are those at the upper left."
    return make_drawing(draw, "scores", caption)


def _candidate_row(row: Mapping[str, str]) -> list[str]:
    numbers = (float(row["nats_per_residue"]), float(row["profile_bits"] or "nan"))
    return [
        row["rank"],
        row["name"],
        row["residues"],
        f"{numbers[0]:.3f}",
        f"{numbers[1]:.0f}",
        f"{float(row['nearest_identity']):.0%}",
        row["nearest_member"],
    ]


def _files(folder: Path) -> list[tuple[str, str]]:
    models = [
        (f"{name}/", f"model {label}: {read_run(folder / name)['student']['parameters']:,} weights")
        for name, label in TRAINED.items()
        if (folder / name / RUN_FILE).is_file()
    ]
    return [
        ("candidates/candidates.fasta", "the candidates, the best first"),
        ("candidates/candidates.csv", "every sample, its figures, and why it was dropped"),
        *models,
        ("profile/", "profiles of the family, for HMMER 3"),
        ("judgement/", "every figure of this page, and those of single members"),
    ]
