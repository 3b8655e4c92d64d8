"""Makes the project's figures and tables from the files in ``results/``.

A figure or table whose files are missing is left out, with the command that makes them.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.common.cli import say
from src.common.files import replace_section, write_text
from src.common.tables import latex_lines, markdown_lines
from src.evaluation.metrics import MODELS
from src.evaluation.results import interval_of, lookup, read_results
from src.evaluation.schema import (
    Number,
    Object,
    Positive,
    Share,
    check_record,
    maybe,
    object_type,
    record_type,
)  # fmt: skip
from src.experiments import charts, synergy
from src.experiments.cells import cell_files, read_cell
from src.experiments.grids import read_rates
from src.experiments.synergy import EXPLANATIONS, MARGIN, shown
from src.publishing import plots

STRATA = {"cut": ("synergy", "synergy"), "random": ("synergy_random", "synergy-random")}
"""Directory and grid of each stratum of the experiment."""
SIZE_NAMES = {"s27": "27 %", "s11": "11 %", "s05": "5 %"}
PUBLISHED_ARMS = ("baseline", "uncertainty", "calibration", "both")
GENERATION = "generation"
"""Directory of evaluations with generated proteins."""
HOW_TO_GENERATE = "python scripts/evaluate.py --num_samples 100 --generation_metrics --output ..."
COMPARED_SETS = ("teacher", "natural", "shuffled")
"""Sets of proteins that the students' generated ones are compared with."""
SWEEPS = ("temperature", "alpha", "smoothing")
"""Grids that sweep one setting; the directories of their results have the same names."""
SECTION = "experiment tables"
"""Name of the generated section of docs/WEAK_TEACHER.md."""

POINT = object_type({"step": Number, "eval_hard_loss": maybe(Number), "grad_norm": maybe(Number)})
CELL = record_type(
    {
        **{f"settings.{name}": str for name in ("arm", "size")},
        **{f"settings.{name}": Number for name in ("seed", "learning_rate", "train.max_steps")},
        "training.curve": list[POINT],
        "share_of_teacher": Positive,
        "teacher_nats_per_residue": Number,
        "student_nats_per_residue": Number,
        "kl_per_residue": Number,
        "floors.unigram.nats_per_residue": Number,
        **{f"{model}_ece.ece": Share for model in MODELS},
        **{f"{model}_ece.reliability": Object for model in MODELS},
    },
    required=True,
)
"""Values that figures and tables need of a cell, beside those of all results files."""

Cells = list[dict[str, Any]]
Table = tuple[list[str], list[list[str]]]


class Missing(Exception):
    """Results that a figure needs are missing; the message says how to make them."""


def read_cells(folder: Path, grid: str) -> Cells:
    """Return the results of a grid's finished cells.

    Raises:
        Missing: there are no such cells.
        ValueError: a cell lacks a value that figures need.
    """
    cells = []
    advice = "move it away and run scripts/ablation.py again"
    for file in cell_files(folder):
        results, path = read_cell(folder, file), folder / file
        assert results is not None
        if lookup(results, "settings.grid") != grid:
            continue
        check_record(results, CELL, path, advice)
        cells.append(results)
    if not cells:
        raise Missing(f"{folder}: no cells of {grid}: python scripts/ablation.py --grid {grid}")
    return cells


def read_analysis(folder: Path, grid: str) -> dict[str, Any]:
    """Return the record of each size in a grid's analysis.

    Raises:
        Missing: the grid was not analysed yet.
        ValueError: the file is broken.
    """
    path = folder / "analysis.json"
    if not path.exists():
        raise Missing(
            f"{path}: python scripts/analyse_ablation.py --results {folder} --grid {grid}"
        )
    return synergy.read_analysis(path)


def _strata(results: Path) -> dict[str, tuple[Path, str]]:
    """Return folder and grid of the strata that were analysed, of one at least.

    Beside those of :data:`STRATA` these are directories that are named by start and steps, such as
    ``cut-1200``.
    """
    folders = {name: (results / folder, grid) for name, (folder, grid) in STRATA.items()}
    for folder in results.glob("*-*"):
        start, _, steps = folder.name.partition("-")
        if start in STRATA and steps.isdecimal():
            folders[folder.name] = folder, STRATA[start][1]
    analysed = {n: f for n, f in folders.items() if (f[0] / "analysis.json").exists()}
    order = sorted(analysed, key=lambda name: (name.split("-")[0], len(name), name))
    return {name: analysed[name] for name in order} or {"cut": folders["cut"]}


def _title(size: str, stratum: str) -> str:
    start, _, steps = stratum.partition("-")
    return f"{SIZE_NAMES.get(size, size)}, {start}" + (f", {int(steps):,} steps" if steps else "")


# Figures -------------------------------------------------------------------------------------


def effects(results: Path) -> Any:
    """Return figure 1: the effect of every arm, and the interaction."""
    sizes = {
        _title(size, stratum): record
        for stratum, (folder, grid) in _strata(results).items()
        for size, record in read_analysis(folder, grid).items()
    }
    return charts.effects_figure(sizes, MARGIN)


def scaling(results: Path) -> Any:
    """Return figure 2: quality over sizes."""
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    lines: dict[str, float] = {}
    for stratum, (folder, grid) in _strata(results).items():
        analysis = read_analysis(folder, grid)
        cells = read_cells(folder, grid)
        lines["teacher"] = lookup(cells[0], "teacher_nats_per_residue")
        lines["unigram"] = lookup(cells[0], "floors.unigram.nats_per_residue")
        shares = {c["settings"]["size"]: lookup(c, "share_of_teacher") for c in cells}
        for arm in ("baseline", "both"):
            series[f"{arm}, {stratum}"] = [
                (shares[size], entry["estimate"], *entry["interval"])
                for size, record in analysis.items()
                if size in shares and (entry := record["arms"].get(arm))
            ]
    return charts.scaling_figure(series, lines)


def curves(results: Path) -> Any:
    """Return figure 3: learning curves of the four published arms."""
    panels: dict[str, dict[str, tuple[list[float], list[list[float]]]]] = {}
    for stratum, (folder, grid) in _strata(results).items():
        for cell in read_cells(folder, grid):
            arm, size, seed = (cell["settings"][name] for name in ("arm", "size", "seed"))
            if arm not in PUBLISHED_ARMS:
                continue
            curve = [point for point in cell["training"]["curve"] if "eval_hard_loss" in point]
            panel = panels.setdefault(_title(size, stratum), {})
            own_steps = [point["step"] for point in curve]
            steps, values = panel.setdefault(arm, (own_steps, []))
            if own_steps != steps:
                raise ValueError(
                    f"{folder}: {arm} at {size}: seed {seed} was validated at other steps than the "
                    "seed before: run its cells again"
                )
            values.append([point["eval_hard_loss"] for point in curve])
    ordered = {
        title: {arm: arms[arm] for arm in PUBLISHED_ARMS if arm in arms}
        for title, arms in panels.items()
    }
    return charts.arm_curves(ordered, "validation hard loss, nats per token")


def composition(results: Path) -> Any:
    """Return figure 4: amino acids of generated proteins."""
    sets: dict[str, Mapping[str, float]] = {}
    for path in sorted((results / GENERATION).glob("*.json")):
        evaluation = read_results(path)
        for name, key in ((path.stem, "student"), ("teacher", "teacher")):
            shares = lookup(evaluation, f"generation.{key}.composition")
            if shares and name not in sets:
                sets[name] = shares
        natural = lookup(evaluation, "generation.reference.composition")
        if natural:
            sets["natural"] = natural
    if not sets:
        raise Missing(f"{results / GENERATION}: {HOW_TO_GENERATE}")
    return plots.composition_bars(sets)


def calibration(results: Path) -> Any:
    """Return figure 5: reliability of the teacher and the published arms at the larger size."""
    folder, grid = STRATA["cut"]
    models: dict[str, list[dict[str, Any]]] = {"teacher": [], **{arm: [] for arm in PUBLISHED_ARMS}}
    for cell in read_cells(results / folder, grid):
        arm = cell["settings"]["arm"]
        if cell["settings"]["size"] != "s27" or arm not in PUBLISHED_ARMS:
            continue
        models[arm].append(_calibration_of(cell, "student"))
        if not models["teacher"]:
            models["teacher"].append(_calibration_of(cell, "teacher"))
    return charts.calibration_figure({n: m for n, m in models.items() if m})


def _calibration_of(cell: Mapping[str, Any], model: str) -> dict[str, Any]:
    return cell[f"{model}_ece"] | {"interval": interval_of(cell, f"{model}_ece.ece")}


def compression(results: Path) -> Any:
    """Return figure 6: quality against compression, of one seed."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for arm in ("baseline", "both"):
        paths = [results / f"first_{size}_{arm}.json" for size in ("27", "11")]
        first = [read_results(path) for path in paths if path.exists()]
        if first:
            kinds[f"{arm}, random, 1,200 steps of 32"] = first
    for stratum, (folder, grid) in _strata(results).items():
        cells = [c for c in read_cells(folder, grid) if c["settings"]["seed"] == 1]
        steps = {c["settings"]["train"]["max_steps"] for c in cells}
        for arm in ("baseline", "both"):
            own = [c for c in cells if c["settings"]["arm"] == arm]
            kinds[f"{arm}, {stratum}, {'/'.join(map(str, sorted(steps)))} steps of 16"] = own
    return charts.quality_against_compression(kinds)


def recipes(results: Path) -> Any:
    """Return figure 7: each recipe less plain distillation of the same student."""
    sizes = {}
    for size, record in read_analysis(results / "recipe", "recipe").items():
        # Random weights are so much worse that the differences of the others would not show.
        arms = {arm: entry for arm, entry in record["arms"].items() if arm != "baseline"}
        sizes[_title(size, "cut")] = record | {"arms": arms}
    return charts.effects_figure(sizes, MARGIN, "cut")


FIGURES: dict[str, Callable[[Path], Any]] = {
    "1_effects": effects,
    "2_scaling": scaling,
    "3_learning_curves": curves,
    "4_composition": composition,
    "5_calibration": calibration,
    "6_compression": compression,
    "7_recipes": recipes,
}

# Tables --------------------------------------------------------------------------------------


def arms_tables(results: Path) -> Iterator[tuple[str, Table]]:
    """Yield a table of every arm: means over seeds, with the analysis' interval of nats."""
    for stratum, (folder, grid) in _strata(results).items():
        analysis = read_analysis(folder, grid)
        cells = read_cells(folder, grid)
        for size, record in analysis.items():
            yield f"arms_{stratum}_{size}", arms_table(record, _of_size(cells, size))


def recipe_tables(results: Path) -> Iterator[tuple[str, Table]]:
    """Yield a table of every recipe, and of its differences from ``baseline`` and ``cut``."""
    folder = results / "recipe"
    cells = read_cells(folder, "recipe")
    for size, record in read_analysis(folder, "recipe").items():
        yield f"recipe_{size}", arms_table(record, _of_size(cells, size))
        for reference, arms in record["against"].items():
            headings = ["arm", f"ln PPL less {reference}", "p (Holm)", f"KL less {reference}"]
            rows = [
                [arm, shown(e["nats"]), f"{e['p_holm']:.2g}", shown(e["kl"])]
                for arm, e in arms.items()
            ]
            yield f"recipe_{size}_against_{reference}", (headings, rows)


def contrast_tables(results: Path) -> Iterator[tuple[str, Table]]:
    """Yield the contrasts of both designs with their verdicts, and the exploratory contrasts."""
    for stratum, (folder, grid) in _strata(results).items():
        rows: list[list[str]] = []
        explained: list[list[str]] = []
        for size, record in read_analysis(folder, grid).items():
            for name, design in record["designs"].items():
                for key, entry in design["contrasts"].items():
                    verdict = design["parts"][key]
                    rows.append([f"{size} {name} {key}", shown(entry), verdict])
                rows.append([f"{size} {name}: the claim", "", design["verdict"]])
            for name, entry in record["explanations"].items():
                arms = " less ".join(EXPLANATIONS[name])
                cells = [f"{size} {name}", arms, shown(entry), f"{entry['p_holm']:.2g}"]
                explained.append(cells)
        yield f"contrasts_{stratum}", (["contrast", "estimate [95 %]", "the claim's part"], rows)
        headings = ["contrast", "arms", "estimate [95 %]", "p (Holm)"]
        yield f"explanations_{stratum}", (headings, explained)


GENERATED = (
    ("length", "length.mean", ".0f"),
    ("valid", "valid_share", ".0%"),
    ("distinct 4-mers", "distinct_4mers", ".3f"),
    ("over 30 % identity to train", "novelty.share_over_30", ".0%"),
    ("low complexity", "repetitiveness.low_complexity_share", ".3f"),
    ("KL from natural", "kl_from_natural", ".4f"),
    ("teacher's perplexity per residue", "teacher_perplexity_per_residue", ".2f"),
)
"""Columns of the table of generated proteins: heading, name of the value, format."""


def generation_tables(results: Path) -> Iterator[tuple[str, Table]]:
    """Yield a table of generated proteins of students and teacher, natural and shuffled ones."""
    rows: dict[str, list[str]] = {}
    for path in sorted((results / GENERATION).glob("*.json")):
        evaluation = read_results(path)
        for name, key in ((path.stem, "student"), *((k, k) for k in COMPARED_SETS)):
            described = lookup(evaluation, f"generation.{key}")
            if described and name not in rows:
                rows[name] = [
                    "---" if (value := lookup(described, column)) is None else format(value, spec)
                    for _, column, spec in GENERATED
                ]
    if not rows:
        raise Missing(f"{results / GENERATION}: {HOW_TO_GENERATE}")
    headings = ["proteins of", *(heading for heading, _, _ in GENERATED)]
    last = [name for name in COMPARED_SETS if name in rows]
    ordered = [name for name in rows if name not in last] + last
    yield "generated", (headings, [[name, *rows[name]] for name in ordered])


def sweep_tables(results: Path) -> Iterator[tuple[str, Table]]:
    """Yield a table of each sweep of one setting, on validation proteins."""
    for grid in SWEEPS:
        folder = results / grid
        rows = []
        by_arm: dict[str, Cells] = {}
        for cell in read_cells(folder, grid):
            by_arm.setdefault(cell["settings"]["arm"], []).append(cell)
        best = read_rates(folder)["best_arm"]
        # An arm is named by setting and value: temperature2.
        for arm in sorted(by_arm, key=lambda arm: float(arm.lstrip(string.ascii_lowercase + "_"))):
            row = [f"{arm} (best)" if arm in best.values() else arm]
            for name in ("student_nats_per_residue", "kl_per_residue", "student_ece.ece"):
                values = [lookup(cell, name) for cell in by_arm[arm]]
                row.append(f"{np.mean(values):.4f} ({', '.join(f'{v:.4f}' for v in values)})")
            rows.append(row)
        headings = ["setting", "nats per residue (each seed)", "KL per residue", "ECE"]
        yield f"sweep_{grid}", (headings, rows)


TABLES: tuple[Callable[[Path], Iterator[tuple[str, Table]]], ...] = (
    arms_tables,
    contrast_tables,
    recipe_tables,
    generation_tables,
    sweep_tables,
)


def _of_size(cells: Cells, size: str) -> Cells:
    return [cell for cell in cells if cell["settings"]["size"] == size]


def arms_table(record: Mapping[str, Any], cells: Cells) -> Table:
    """Return a row for each arm of one size, from its record in the analysis and its cells."""
    headings = [
        "arm", "learning rate", "nats per residue [95 %]", "KL per residue", "ECE",
        "top-1 agreement", "kept of the teacher", "gradient norm",
    ]  # fmt: skip
    rows = []
    for arm, entry in record["arms"].items():
        own = [cell for cell in cells if cell["settings"]["arm"] == arm]

        points = [point for cell in own for point in cell["training"]["curve"]]
        norms = [point["grad_norm"] for point in points if "grad_norm" in point]
        low, high = entry["interval"]
        means = {
            name: np.mean([v for cell in own if (v := lookup(cell, name)) is not None])
            for name in ("kl_per_residue", "student_ece.ece", "top1_agreement", "kept_advantage")
        }
        rows.append(
            [
                arm,
                ", ".join(sorted({f"{cell['settings']['learning_rate']:g}" for cell in own})),
                f"{entry['estimate']:.4f} [{low:.4f}, {high:.4f}]",
                f"{means['kl_per_residue']:.4f}",
                f"{means['student_ece.ece']:.4f}",
                f"{means['top1_agreement']:.3f}",
                f"{means['kept_advantage']:.2f}",
                f"{float(np.median(norms)):.2f}" if norms else "---",
            ]
        )
    return headings, rows


# All of it -----------------------------------------------------------------------------------


def make_all(
    results: Path,
    output: Path,
    page: Path | None = None,
) -> dict[str, Sequence[str]]:
    """Write every figure (PNG and PDF) and table (Markdown and LaTeX) that can be made.

    Args:
        results: directory of results.
        output: directory to write to; files of the same names are replaced.
        page: a document whose generated section is replaced by the tables.

    Returns:
        ``written`` and ``missing``.

    Raises:
        ValueError: the page has no generated section.
    """
    written: list[str] = []
    missing: list[str] = []
    for name, maker in FIGURES.items():
        try:
            drawn = maker(results)
        except Missing as why:
            missing.append(f"figure {name}: {why}")
            continue
        for ending in (".png", ".pdf"):
            path = output / f"{name}{ending}"
            plots.save_figure(drawn, path)
            written.append(str(path))
    text: list[str] = []
    for maker in TABLES:
        try:
            for name, (headings, rows) in maker(results):
                text += [f"**{name}**", "", *markdown_lines(headings, rows), ""]
                for ending, lines in ((".md", markdown_lines), (".tex", latex_lines)):
                    path = output / f"{name}{ending}"
                    write_text(path, "\n".join(lines(headings, rows)) + "\n")
                    written.append(str(path))
        except Missing as why:
            missing.append(f"{maker.__name__}: {why}")
    if page:
        replace_section(page, SECTION, "\n".join(text))
        written.append(str(page))
    for path in written:
        say(f"written: {path}")
    for line in missing:
        say(f"left out: {line}")
    return {"written": written, "missing": missing}
