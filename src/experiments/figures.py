"""Makes the figures and tables of experiments on the synergy claim from their results.

An experiment is a directory that scripts/ablation.py and scripts/analyse_ablation.py wrote to. A
figure or table whose files are missing is left out, with the command that makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.common.cli import one_line, say
from src.common.files import read_json, write_text
from src.common.tables import latex_lines, markdown_lines
from src.evaluation.results import interval_of, lookup
from src.experiments import charts
from src.experiments.cells import cell_files, read_cell
from src.experiments.synergy import ANALYSIS_FILE, EXPLANATIONS, MARGIN, shown
from src.publishing import plots

SIZE_NAMES = {"s27": "27 %", "s11": "11 %", "s05": "5 %"}
PUBLISHED_ARMS = ("baseline", "uncertainty", "calibration", "both")
Cells = list[dict[str, Any]]
Table = tuple[list[str], list[list[str]]]


class Missing(Exception):
    """Results that a figure needs are missing; the message says how to make them."""


def read_cells(folder: Path) -> Cells:
    """Return the results of an experiment's finished cells, without those that tuned its rates.

    Raises:
        Missing: there are no such cells.
        ValueError: a cell is broken.
    """
    cells = []
    for file in cell_files(folder):
        results = read_cell(folder, file)
        assert results is not None
        if str(lookup(results, "settings.grid")).endswith("-tuning"):
            continue
        cells.append(results)
    if not cells:
        raise Missing(f"{folder}: no cells: python scripts/ablation.py --results {folder} ...")
    return cells


def read_analyses(results: Path) -> dict[Path, dict[str, Any]]:
    """Return the record of each size in the analyses in a directory and the ones in it.

    Raises:
        Missing: there are none.
        ValueError: a file is broken.
    """
    paths = [*results.glob(ANALYSIS_FILE), *results.glob(f"*/{ANALYSIS_FILE}")]
    if not paths:
        how = "python scripts/analyse_ablation.py --results ..."
        raise Missing(f"{results}: no {ANALYSIS_FILE}: {how}")
    folders = [path.parent for path in paths]
    # cut-400 before cut-1200
    folders.sort(key=lambda folder: (folder.name.split("-")[0], len(folder.name), folder.name))
    return {folder: read_json(folder / ANALYSIS_FILE)["sizes"] for folder in folders}


def _title(size: str, experiment: str) -> str:
    start, _, steps = experiment.removesuffix(f"-{size}").partition("-")
    size = SIZE_NAMES.get(size, size)
    return (
        f"{size}, {start}, {int(steps):,} steps" if steps.isdecimal() else f"{size}, {experiment}"
    )


# Figures -------------------------------------------------------------------------------------


def effects(results: Path) -> Iterator[tuple[str, Any]]:
    """Yield the effect of every arm and the contrasts of the claim."""
    sizes = {
        _title(size, folder.name): record
        for folder, analysis in read_analyses(results).items()
        for size, record in analysis.items()
    }
    yield "effects", charts.effects_figure(sizes, MARGIN)


def curves(results: Path) -> Iterator[tuple[str, Any]]:
    """Yield learning curves of the four published arms."""
    panels: dict[str, dict[str, tuple[list[float], list[list[float]]]]] = {}
    for folder in read_analyses(results):
        for cell in read_cells(folder):
            arm, size, seed = (cell["settings"][name] for name in ("arm", "size", "seed"))
            if arm not in PUBLISHED_ARMS:
                continue
            curve = [point for point in cell["training"]["curve"] if "eval_hard_loss" in point]
            panel = panels.setdefault(_title(size, folder.name), {})
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
    drawn = charts.arm_curves(ordered, "validation hard loss, nats per token")
    yield "learning_curves", drawn


def calibration(results: Path) -> Iterator[tuple[str, Any]]:
    """Yield the reliability of the teacher and the published arms, for each experiment and size."""
    for folder in read_analyses(results):
        cells = read_cells(folder)
        for size in dict.fromkeys(cell["settings"]["size"] for cell in cells):
            own = _of_size(cells, size)
            models = {"teacher": [_calibration_of(own[0], "teacher")]} | {
                arm: [_calibration_of(c, "student") for c in own if c["settings"]["arm"] == arm]
                for arm in PUBLISHED_ARMS
            }
            drawn = charts.calibration_figure({n: m for n, m in models.items() if m})
            yield f"calibration_{folder.name}_{size}", drawn


def _calibration_of(cell: Mapping[str, Any], model: str) -> dict[str, Any]:
    return cell[f"{model}_ece"] | {"interval": interval_of(cell, f"{model}_ece.ece")}


FIGURES = (effects, curves, calibration)

# Tables --------------------------------------------------------------------------------------


def arms_tables(results: Path) -> Iterator[tuple[str, Table]]:
    """Yield a table of every arm: means over seeds, with the analysis' interval of nats."""
    for folder, analysis in read_analyses(results).items():
        cells = read_cells(folder)
        for size, record in analysis.items():
            yield f"arms_{folder.name}_{size}", arms_table(record, _of_size(cells, size))


def contrast_tables(results: Path) -> Iterator[tuple[str, Table]]:
    """Yield the contrasts of both designs with their verdicts, and the exploratory contrasts."""
    for folder, analysis in read_analyses(results).items():
        rows: list[list[str]] = []
        explained: list[list[str]] = []
        for size, record in analysis.items():
            for name, design in record["designs"].items():
                for key, entry in design["contrasts"].items():
                    verdict = str(design["parts"][key])
                    rows.append([f"{size} {name} {key}", shown(entry), verdict])
                rows.append([f"{size} {name}: the claim", "", str(design["verdict"])])
            for name, entry in record["explanations"].items():
                arms = " less ".join(EXPLANATIONS[name])
                cells = [f"{size} {name}", arms, shown(entry), f"{entry['p_holm']:.2g}"]
                explained.append(cells)
        yield (
            f"contrasts_{folder.name}",
            (["contrast", "estimate [95 %]", "the claim's part"], rows),
        )
        headings = ["contrast", "arms", "estimate [95 %]", "p (Holm)"]
        if explained:
            yield f"explanations_{folder.name}", (headings, explained)


TABLES = (arms_tables, contrast_tables)


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


def make_all(results: Path, output: Path) -> dict[str, Sequence[str]]:
    """Write every figure (PNG and PDF) and table (Markdown and LaTeX) that can be made.

    Files of the same names are replaced.

    Returns:
        ``written`` and ``missing``.

    Raises:
        ValueError: a cell or an analysis lacks what a figure needs.
    """
    written: list[str] = []
    missing: list[str] = []

    def made(maker: Callable[[Path], Iterator[tuple[str, Any]]]) -> list[tuple[str, Any]]:
        try:
            return list(maker(results))
        except Missing as why:
            missing.append(f"{maker.__name__}: {why}")
            return []
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{results}: {maker.__name__} cannot be made ({one_line(error)[:200]}): run "
                "scripts/ablation.py and scripts/analyse_ablation.py again"
            ) from None

    for name, drawn in (pair for maker in FIGURES for pair in made(maker)):
        for ending in (".png", ".pdf"):
            plots.save_figure(drawn, output / f"{name}{ending}")
            written.append(str(output / f"{name}{ending}"))
    tables = [table for maker in TABLES for table in made(maker)]
    for name, lines, title in (
        ("tables.md", markdown_lines, "## {}\n"),
        ("tables.tex", latex_lines, "% {}"),
    ):
        if tables:
            parts = [[title.format(key), *lines(*table), ""] for key, table in tables]
            write_text(output / name, "\n".join(line for part in parts for line in part))
            written.append(str(output / name))
    for path in written:
        say(f"written: {path}")
    for line in missing:
        say(f"left out: {line}")
    return {"written": written, "missing": missing}
