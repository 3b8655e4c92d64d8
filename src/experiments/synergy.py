"""Decides the synergy claim from the experiment's tables of single proteins.

docs/EXPERIMENT.md, which was written before the runs, defines the contrasts, the decision rule and
the margins. y is ln(perplexity per residue). Intervals take seeds and test clusters as crossed
random effects and pair the arms (``src.evaluation.statistics.two_way_interval``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from src.common.tables import markdown_lines
from src.evaluation.statistics import Estimate, contrast, holm, is_equivalent
from src.experiments.cells import read_tables
from src.experiments.grids import ARMS

MARGIN = 0.02
"""Nats per residue: a contrast within ±0.02 of 0 counts as no effect."""
PUBLISHED_INTERACTION = -2.16

DESIGNS = {
    "published": ("baseline", "uncertainty", "calibration", "both"),
    "controlled": (
        "baseline",
        "uncertainty_mean_one",
        "calibration_confident",
        "both_controlled",
    ),
}
"""Arms y00, y10, y01 and y11 of the two 2 × 2 designs."""

EXPLANATIONS = {
    "change of alpha": ("weight_matched", "baseline"),
    "emphasis": ("uncertainty", "weight_matched"),
    "emphasis on uncertain rather than random positions": ("uncertainty", "weight_permuted"),
    "emphasis on uncertain rather than certain positions": ("uncertainty", "weight_inverse"),
    "smoothing as such": ("epsilon_matched", "baseline"),
    "smoothing of uncertain rather than all targets": ("calibration", "epsilon_matched"),
    "hard loss alone": ("hard_only", "baseline"),
    "soft loss alone": ("soft_only", "baseline"),
}
"""Exploratory contrasts, first arm less second."""

HOLDS, REFUTED, INCONCLUSIVE = "holds", "refuted", "inconclusive"


@dataclass
class Runs:
    """Measurements of one size's runs on single proteins; S seeds, P proteins.

    Attributes:
        nll: by arm, ``(S, P)``, nats of each protein.
        kl: by arm, ``(S, P)``, KL(teacher‖student) of each protein in nats.
        residues: ``(P,)``.
        clusters: ``(P,)``.
        seeds: ``(S,)``, the seeds that every arm was run with.
    """

    nll: dict[str, np.ndarray]
    kl: dict[str, np.ndarray]
    residues: np.ndarray
    clusters: list[str]
    seeds: list[int]


def read_runs(folder: str | Path, grid: str, split: str = "test") -> dict[str, Runs]:
    """Return a grid's measurements of single proteins, by size.

    Raises:
        ValueError: there is no table or none of the split; a table is broken or empty; an arm has
            several learning rates; or the proteins differ between tables.
    """
    cells: dict[str, dict[tuple[str, int], dict[str, np.ndarray]]] = {}
    rates: dict[tuple[str, str], set[float]] = {}
    texts = ("arm", "size", "split", "protein", "cluster")
    numbers = ("learning_rate", "nll_student", "kl")
    tables = list(read_tables(Path(folder), grid, texts, ("seed", "residues"), numbers))
    if not tables:
        raise ValueError(f"{folder}: no per_protein-{grid}-*.parquet: run the grid first")
    for path, frame in tables:
        frame = frame[frame["split"] == split]
        for (size, arm, seed), rows in frame.groupby(["size", "arm", "seed"], sort=False):
            rates.setdefault((size, arm), set()).update(rows["learning_rate"].unique())
            if len(rates[size, arm]) > 1 or rows["learning_rate"].nunique() > 1:
                raise ValueError(f"{path}: {arm} at {size} has several learning rates")
            rows = rows.sort_values("protein")
            cells.setdefault(size, {})[arm, int(seed)] = {
                name: rows[name].to_numpy()
                for name in ("protein", "cluster", "residues", "nll_student", "kl")
            }
    if not cells:
        raise ValueError(f"{folder}: no table of {grid} holds {split} proteins: pass --split")
    return {size: _runs(size, by_arm) for size, by_arm in cells.items()}


def _runs(size: str, cells: Mapping[tuple[str, int], Mapping[str, np.ndarray]]) -> Runs:
    """Return one size's runs, arms in the order of the grids, with the seeds that all arms have."""
    known = list(ARMS)
    place = {arm: number for number, arm in enumerate(known)}
    arms = sorted({arm for arm, _ in cells}, key=lambda arm: (place.get(arm, len(known)), arm))
    seeds_of_arms = [{seed for a, seed in cells if a == arm} for arm in arms]
    seeds = sorted(set.intersection(*seeds_of_arms))
    first = next(iter(cells.values()))
    for (arm, seed), cell in cells.items():
        if not np.array_equal(cell["protein"], first["protein"]):
            raise ValueError(f"{size}: {arm} of seed {seed} was measured on other proteins")

    nll, kl = (
        {
            arm: np.array([cells[arm, seed][name] for seed in seeds], dtype=np.float64).reshape(
                len(seeds), len(first["protein"])
            )
            for arm in arms
        }
        for name in ("nll_student", "kl")
    )
    return Runs(nll, kl, first["residues"], list(first["cluster"]), seeds)


def design_contrasts(arms: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the coefficients of U, C, B and I for a design's four arms."""
    base, weighted, smoothed, both = arms
    return {
        "U": {weighted: 1.0, base: -1.0},
        "C": {smoothed: 1.0, base: -1.0},
        "B": {both: 1.0, base: -1.0},
        "I": {both: 1.0, weighted: -1.0, smoothed: -1.0, base: 1.0},
    }


EXPECTED_SIGN = {"U": 1, "C": 1, "B": -1, "I": -1}
"""The claimed sign of each contrast."""


def part_verdict(estimate: Estimate, sign: int, margin: float | None = MARGIN) -> str:
    """Return whether one part of the claim holds.

    Args:
        estimate: of the contrast.
        sign: the claimed sign of the contrast, 1 or -1; 0: any of both.
        margin: a contrast within this of 0 is too small to matter; None: none is.

    Returns:
        ``refuted`` where the contrast is within the margin of 0, which is too small to matter, or
        its interval lies on the other side of 0; ``holds`` where the interval lies on the claimed
        side; else ``inconclusive``.
    """
    if margin is not None and is_equivalent(estimate, margin):
        return REFUTED
    low, high = sorted(((sign or 1) * estimate.low, (sign or 1) * estimate.high))
    if low > 0 or (sign == 0 and high < 0):
        return HOLDS
    return REFUTED if high < 0 else INCONCLUSIVE


def claim_verdict(parts: Mapping[str, str]) -> str:
    """Return the verdict on the claim: ``holds`` if all parts do, ``refuted`` if any part is."""
    values = set(parts.values())
    if values == {HOLDS}:
        return HOLDS
    return REFUTED if REFUTED in values else INCONCLUSIVE


def analyse(runs: Mapping[str, Runs], references: Sequence[str] = ("baseline",)) -> dict[str, Any]:
    """Return every contrast and verdict, by size, and what every arm gives less each reference.

    Returns:
        For each size ``seeds``, ``clusters``, ``arms`` (mean y of each with its interval, and y of
        each seed), ``designs`` (contrasts, parts, verdict, whether the published interaction is
        excluded), ``explanations``, and ``against`` (every arm less a reference) with Holm's
        correction.

    Raises:
        ValueError: a reference is not an arm.
    """
    return {size: _analyse_size(of_size, references) for size, of_size in runs.items()}


def _analyse_size(runs: Runs, references: Sequence[str]) -> dict[str, Any]:
    def estimate(coefficients: Mapping[str, float]) -> Estimate:
        return contrast(runs.nll, coefficients, runs.residues, runs.clusters)

    record: dict[str, Any] = {
        "seeds": runs.seeds,
        "clusters": len(set(runs.clusters)),
        "proteins": len(runs.residues),
        "arms": {
            arm: _record(estimate({arm: 1.0}))
            | {"by_seed": (nll.sum(axis=1) / runs.residues.sum()).tolist()}
            for arm, nll in runs.nll.items()
        },
        "designs": {},
    }
    for name, contrasts in _contrasts(runs).items():
        parts = {key: part_verdict(e, EXPECTED_SIGN[key]) for key, e in contrasts.items()}
        interaction = contrasts["I"]
        record["designs"][name] = {
            "arms": list(DESIGNS[name]),
            "contrasts": {key: _record(e) for key, e in contrasts.items()},
            "parts": parts,
            "verdict": claim_verdict(parts),
            "interaction_half_width": (interaction.high - interaction.low) / 2,
            "published_interaction_excluded": not (
                interaction.low <= PUBLISHED_INTERACTION <= interaction.high
            ),
        }
    # In other experiments, arms of the same names may differ in more than the loss.
    record["explanations"] = _explanations(runs, estimate) if record["designs"] else {}
    record["against"] = {name: against(runs, name) for name in references}
    return record


def _contrasts(runs: Runs) -> dict[str, dict[str, Estimate]]:
    """Return U, C, B and I of each design whose arms were all run."""
    return {
        name: {
            key: contrast(runs.nll, coefficients, runs.residues, runs.clusters)
            for key, coefficients in design_contrasts(arms).items()
        }
        for name, arms in DESIGNS.items()
        if set(arms) <= set(runs.nll)
    }


def against(runs: Runs, reference: str) -> dict[str, Any]:
    """Return the difference of every arm from a reference.

    Returns:
        For each other arm, with intervals, the difference in y (``nats``) and in
        KL(teacher‖student) per residue at T = 1 (``kl``); ``p_value`` and ``p_holm``, Holm's
        correction over the arms, are of y.

    Raises:
        ValueError: the reference is no arm.
    """
    if reference not in runs.nll:
        raise ValueError(f"there is no arm {reference}: there are {', '.join(runs.nll)}")
    coefficients = {arm: {arm: 1.0, reference: -1.0} for arm in runs.nll if arm != reference}
    nats = {a: contrast(runs.nll, c, runs.residues, runs.clusters) for a, c in coefficients.items()}
    kl = {a: contrast(runs.kl, c, runs.residues, runs.clusters) for a, c in coefficients.items()}
    return {
        arm: {"nats": _record(nats[arm]), "kl": _record(kl[arm]), **p_values}
        for arm, p_values in _p_values(nats).items()
    }


def changes(longer: Mapping[str, Runs], shorter: Mapping[str, Runs]) -> dict[str, dict[str, Any]]:
    """Return how the contrasts of each design changed from a shorter training to a longer one.

    Args:
        longer: result of :func:`read_runs`, by size.
        shorter: the same after fewer steps, on the same proteins.

    Returns:
        For each size that both have, by design, each contrast after the longer training less that
        after the shorter one, paired by seed and protein, with its interval and ``p_holm``, Holm's
        correction over the contrasts of the design.

    Raises:
        ValueError: they were measured on other proteins, or have no seed in common.
    """
    by_size: dict[str, dict[str, Any]] = {}
    for size in (size for size in longer if size in shorter):
        late, early = longer[size], shorter[size]
        seeds = [seed for seed in late.seeds if seed in early.seeds]
        same_proteins = np.array_equal(late.residues, early.residues)
        if not same_proteins or late.clusters != early.clusters or not seeds:
            raise ValueError(f"{size}: the shorter runs have other proteins or other seeds")
        at, before = ([runs.seeds.index(seed) for seed in seeds] for runs in (late, early))
        difference = {
            arm: late.nll[arm][at] - early.nll[arm][before] for arm in late.nll if arm in early.nll
        }
        by_size[size] = {
            name: {
                key: _record(estimates[key]) | p_values
                for key, p_values in _p_values(estimates).items()
            }
            for name, estimates in _contrasts(replace(late, nll=difference)).items()
        }
    return by_size


def change_lines(change: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what :func:`changes` returns as Markdown."""
    lines = []
    for size, designs in change.items():
        for name, entries in designs.items():
            rows = [[key, shown(e), f"{e['p_holm']:.2g}"] for key, e in entries.items()]
            title = f"{size}, {name}: change from the shorter training"
            lines += _section(title, ["contrast", "change", "p (Holm)"], rows)
    return lines


def _p_values(family: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Return ``p_value`` and ``p_holm`` of each estimate, with Holm's correction over all."""
    adjusted = holm({name: e.p_value for name, e in family.items()}) if family else {}
    return {name: {"p_value": e.p_value, "p_holm": adjusted[name]} for name, e in family.items()}


def _explanations(runs: Runs, estimate: Any) -> dict[str, Any]:
    """Return the exploratory contrasts whose arms were run."""
    estimates = {
        name: estimate({one: 1.0, other: -1.0})
        for name, (one, other) in EXPLANATIONS.items()
        if one in runs.nll and other in runs.nll
    }
    return {
        name: {**_record(estimates[name]), "arms": list(EXPLANATIONS[name]), **p_values}
        for name, p_values in _p_values(estimates).items()
    }


def _record(estimate: Estimate) -> dict[str, Any]:
    return {
        "estimate": estimate.estimate,
        "interval": [estimate.low, estimate.high],
        "standard_error": estimate.standard_error,
    }


ANALYSIS_FILE = "analysis.json"


def analysis_lines(analysis: Mapping[str, Any]) -> list[str]:
    """Return the analysis as Markdown, one section for each size."""
    lines = []
    for size, record in analysis.items():
        lines += [
            f"## {size}",
            "",
            f"{len(record['seeds'])} seeds, {record['proteins']:,} proteins in "
            f"{record['clusters']:,} clusters; 95 % intervals.",
            "",
        ]
        arms = [[arm, shown(e)] for arm, e in record["arms"].items()]
        lines += [*markdown_lines(["arm", "ln(perplexity per residue)"], arms), ""]
        for name, design in record["designs"].items():
            rows = [[key, shown(e), design["parts"][key]] for key, e in design["contrasts"].items()]
            verdict = design["verdict"] if design["verdict"] == HOLDS else f"is {design['verdict']}"
            title = f"{name}: the claim {verdict}"
            lines += _section(title, ["contrast", "estimate", "the claim's part"], rows)
        if record["explanations"]:
            rows = [
                [f"{name}: {' − '.join(e['arms'])}", shown(e), f"{e['p_holm']:.2g}"]
                for name, e in record["explanations"].items()
            ]
            headings = ["contrast", "estimate", "p (Holm)"]
            lines += _section("What explains it (exploratory)", headings, rows)
        for reference, others in record["against"].items():
            rows = [
                [arm, shown(e["nats"]), f"{e['p_holm']:.2g}", shown(e["kl"])]
                for arm, e in others.items()
            ]
            headings = ["arm", "ln(perplexity per residue)", "p (Holm)", "KL, nats per residue"]
            lines += _section(f"Every arm less {reference}", headings, rows)
    return lines


def _section(title: str, headings: list[str], rows: list[list[str]]) -> list[str]:
    return [f"### {title}", "", *markdown_lines(headings, rows), ""]


def shown(entry: Mapping[str, Any]) -> str:
    """Return an estimate with its interval as text, with signs and four digits."""
    low, high = entry["interval"]
    return f"{entry['estimate']:+.4f} [{low:+.4f}, {high:+.4f}]"
