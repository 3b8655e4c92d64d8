"""Writes the page on an adapted model, its specialist and the candidates that it proposes."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from src.common.cli import duration
from src.common.runs import RUN_FILE, read_run
from src.evaluation.filters import WHY
from src.evaluation.metrics import GENERATION_METRICS
from src.evaluation.results import few_clusters, with_interval
from src.proteins.layouts import lines_of
from src.publishing import plots
from src.publishing.pages import Cell, Drawing, make_drawing, render, short_name, split_cell
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
    """Return the page on one family's run, from :func:`src.experiments.family_run.judge_models`."""
    family, candidates = judgement["family"], judgement["candidates"]
    with (folder / "candidates" / "candidates.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    best = [row for row in table if row["rank"]]
    sets = candidates["sets"]
    content = {
        "name": short_name(family["name"]),
        "summary": _summary(judgement),
        "tiles": _tiles(judgement),
        "notes": family["notes"],
        "judged": _judged(judgement),
        "training": _training(judgement),
        "curves": _curves(folder),
        "profile": judgement["profile"],
        "dropped": [(r, f"{n:,}", WHY.get(r, "")) for r, n in candidates["dropped"].items()],
        "temperature": f"{candidates['temperature']:g}",
        "limits": [(r, f"{100 * v:.0f} %") for r, v in candidates["limits"].items()],
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
    return render("family.html.jinja", content)


def _summary(judgement: Mapping[str, Any]) -> str:
    family, candidates = judgement["family"], judgement["candidates"]
    made = sum(candidates["dropped"].values())
    return (
        f"{short_name(judgement['model'])}, adapted to {family['train']:,} members of this family "
        f"({family['validation']:,} more decided when to stop, {family['test']:,} were held out), "
        f"sampled {made:,} proteins; {candidates['dropped']['kept']:,} of them are candidates."
    )


def _tiles(judgement: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the main numbers: label, cell, and a note on how to read it."""
    held_out = judgement["held_out"] or {}
    sampled = judgement["candidates"]["sets"].get("sampled") or {}
    dropped = judgement["candidates"]["dropped"]
    tiles = [
        ("nats per residue, adapted", with_interval(held_out, "nats.adapted"),
         f"unadapted {with_interval(held_out, 'nats.unadapted')}; lower is better"),
        ("of that gain, kept by the specialist", with_interval(held_out, "kept"),
         "1 is the adapted model, 0 the unadapted one"),
        ("of samples hit by the profile", with_interval(sampled, "families.hit_share"),
         judgement["profile"]["counted"]),
        ("candidates", f"{dropped['kept']:,}", f"of {sum(dropped.values()):,} samples"),
    ]  # fmt: skip
    return [{"label": t[0], "cell": split_cell(t[1]), "note": t[2]} for t in tiles if t[1]]


def _judged(judgement: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the table of models on held-out members."""
    held_out = judgement["held_out"]
    if not held_out:
        return None
    rows = []
    for name in held_out["nats"]:
        model = judgement["models"].get(name, {})
        nats, gain = (split_cell(with_interval(held_out, f"{k}.{name}")) for k in ("nats", "gain"))
        speed = model.get("proteins_per_second")
        parameters = f"{model['parameters']:,}" if model else ""
        rows.append((name, nats, gain, parameters, f"{speed:.1f}" if speed else ""))
    counts = f"{held_out['proteins']:,} members in {held_out['clusters']:,} clusters"
    for warning in few_clusters(held_out["clusters"]):
        counts += f"; {warning}"
    if held_out["not_fitting"]:
        counts += f"; {held_out['not_fitting']:,} more do not fit a model"
    if unknown := held_out["not_recognised_by_profile"]:
        counts += f"; the profile does not recognise {unknown:,}, which get its background"
    return {"rows": rows, "counts": counts}


def _training(judgement: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            stage,
            f"{fit['optimizer']}, learning rate {fit['learning_rate']:g}, "
            f"{duration(fit['seconds'])}; {outcome_line(fit)}",
        )
        for stage in ("adaptation", "distillation")
        if (fit := judgement[stage])
    ]


def _curves(folder: Path) -> list[Drawing]:
    runs = {
        label: read_metrics(folder / name)
        for name, label in TRAINED.items()
        if (folder / name / RUN_FILE).is_file()
    }
    specialist = runs.pop("specialist", None)
    draw = functools.partial(plots.learning_curves, runs, "hard_loss", "nats per token")
    caption = "Cross-entropy with training members, thin, and with validation members, thick."
    drawings = [make_drawing(draw, "fit", caption)]
    if specialist is not None:
        draw = functools.partial(
            plots.learning_curves, {"specialist": specialist}, "soft_loss",
            "divergence, nats per token",
        )  # fmt: skip
        caption = "The specialist's divergence from the adapted model."
        drawings.append(make_drawing(draw, "distil", caption))
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
        if axes.collections:
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
