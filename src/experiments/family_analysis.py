"""Answers the questions of the experiment on specialists (docs/EXPERIMENT.md, "Specialists").

Families are the unit. A contrast is taken within family, number of members N and draw, so that
both sides had the same members; a family's figure is its mean over the draws, and the interval is
Student's over families.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.common.tables import markdown_lines
from src.evaluation.statistics import Estimate, holm, is_equivalent, mean_interval
from src.experiments.family_grid import PROFILE
from src.experiments.synergy import INCONCLUSIVE, REFUTED, part_verdict, shown

TEACHER, PUBLISHED, STUDENT, SPECIALIST = (
    "teacher",
    "student27-published",
    "student27",
    "specialist27",
)
STUDENTS = (PUBLISHED, STUDENT, "student11", "student11-three-layers")
"""Names of the starting points that the questions are about."""
MARGIN_NATS, MARGIN_HITS, ALPHA = 0.02, 0.05, 0.05
GOAL_KEPT, GOAL_SPEED = 0.9, 3.0
SHOWN, NOT_SHOWN, MISSED = "reached", "reached, not shown", "missed"
LOWER = "Students are better starting points: nats per residue, student less teacher"
MORE_HITS = "Students' samples hit the profile more often: share, student less teacher"
LOWER_AT_N = "The same at each N: nats per residue, student less teacher"
DEPENDS = "It depends on N: the difference at the smallest N less that at the largest"
RECIPE = "The recipe matters: nats per residue, recommended less published"
BEATS_DIRECT = "The specialist beats the adapted student: nats per residue, specialist less student"
HITS_A_SECOND = "It beats the teacher in hits a second: ln of the ratio"
BEATS_PROFILE = "A model beats the profile HMM: nats per residue, model less profile"
KEEPS = "Share of the teacher's gain by adaptation that is kept (goal: 0.9)"
FASTER = "Speed of sampling against the adapted teacher: ln of the ratio (goal: ln 3 = 1.099)"

THE_CLAIM = "The published claim (both of its parts for the student of the published recipe)"
THE_GOAL = "The goal of the tool (90 % kept and three times the speed)"
NOTES = (
    "Each family counts the same. The profile HMM knows the length of the protein that it scores, "
    "which is worth a few nats a protein to it. A specialist's training is its distillation alone."
)

Terms = Mapping[tuple[str, int], float]
"""Coefficient of each start and N in a contrast."""
Values = Mapping[tuple[str, int], Mapping[tuple[str, int], float]]
"""For each start and N: the value of each family and draw."""


def measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
    """Return each measure by start and N, then by family and draw.

    Rows of the tuning, which have a rate, are left out.

    Returns:
        ``nats`` per residue of held-out members; ``nats_before``, the same before adaptation;
        ``hits``, share of the samples; ``log_hits_per_second``, ln of (different hits + 1/2) /
        (samples + 1) times proteins a second, which is finite where nothing hits; ``log_speed``;
        and ``identity``, ``distinct_share``, ``distinct_4mers``, ``train_seconds``.

    Raises:
        ValueError: two starting points were not judged on the same members.
    """
    values: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    judged: dict[str, int] = {}
    for row in rows:
        if row["rate"] is not None:
            continue
        start, unit = (row["start"], row["members"]), (row["family"], row["draw"])
        if judged.setdefault(row["family"], row["residues"]) != row["residues"]:
            raise ValueError(f"{row['family']}: {start[0]} was judged on other members than others")
        measures = {
            name: row.get(name)
            for name in ("identity", "distinct_share", "distinct_4mers", "train_seconds")
        }
        measures["nats"] = row["nll"] / row["residues"]
        if row.get("nll_before") is not None:
            measures["nats_before"] = row["nll_before"] / row["residues"]
        if row.get("samples"):
            # Cells of the first four families lack the count; all of their samples differ.
            hits = row["hits"] if row.get("distinct_hits") is None else row["distinct_hits"]
            share = (hits + 0.5) / (row["samples"] + 1)
            measures["hits"] = row["hits"] / row["samples"]
            measures["log_speed"] = math.log(row["proteins_per_second"])
            measures["log_hits_per_second"] = math.log(share) + measures["log_speed"]
        elif row.get("samples") == 0:
            measures["hits"] = 0.0
        for name, value in measures.items():
            if value is not None:
                values[name][start][unit] = float(value)
    return values


def by_family(values: Values, coefficients: Terms) -> dict[str, float]:
    """Return Σ c · value of each family, as its mean over the draws.

    Returns:
        The figure of each family that has, for every N, a draw that all its terms were run with.
    """
    figures: dict[str, float] = defaultdict(float)
    families = {family for term in coefficients for family, _ in values.get(term, {})}
    for n in {n for _, n in coefficients}:
        terms = {term: c for term, c in coefficients.items() if term[1] == n}
        units = set.intersection(*(set(values.get(term, {})) for term in terms))
        draws = defaultdict(list)
        for unit in units:
            draws[unit[0]].append(sum(c * values[term][unit] for term, c in terms.items()))
        families &= set(draws)
        for family, each in draws.items():
            figures[family] += float(np.mean(each))
    return {family: figures[family] for family in sorted(families)}


def contrast(values: Values, coefficients: Terms) -> Estimate | None:
    """Return the mean of :func:`by_family` with its interval; None below two families."""
    figures = list(by_family(values, coefficients).values())
    return mean_interval(figures) if len(figures) > 1 else None


def less(a: str, b: str, members: Sequence[int]) -> dict[tuple[str, int], float]:
    """Return the coefficients of a - b over the mean of some N."""
    share = 1 / len(members)
    return {(start, n): c for n in members for start, c in ((a, share), (b, -share))}


def kept_shares(nats: Values, before: Values, start: str, n: int) -> dict[str, float]:
    """Return a start's share of the teacher's gain by adaptation, by family.

    A family's share is (y of the unadapted teacher - y of the start) / (the same of the adapted
    teacher), each the mean over its draws.
    """
    both = {**nats, ("before", n): before.get((TEACHER, n), {})}
    gained = by_family(both, {("before", n): 1.0, (TEACHER, n): -1.0})
    own = by_family(both, {("before", n): 1.0, (start, n): -1.0})
    return {family: own[family] / gained[family] for family in own if family in gained}


def goal_verdict(estimate: Estimate, goal: float) -> str:
    """Return whether a value reaches a goal, and whether its interval does."""
    if estimate.low >= goal:
        return SHOWN
    return NOT_SHOWN if estimate.estimate >= goal else MISSED


def analyse(rows: Sequence[Mapping[str, Any]], members: Sequence[int]) -> dict[str, Any]:
    """Return the answers that the cells of a table (``specialists.parquet``) allow for some N.

    Returns:
        ``members``; ``means`` by ``START N``, each family counting the same, with their number;
        ``questions``, by question and name: estimate, interval, number of families, p-value
        (``p_holm`` where a rule asks several contrasts) and verdict; and ``claims``, the
        verdicts that several of these make together.

    Raises:
        ValueError: no cell of the experiment is finished.
    """
    members = sorted(members)
    values = measured([row for row in rows if row["members"] in members])
    if not values:
        raise ValueError("no cell of the experiment is finished")
    nats, hits, speed = values["nats"], values["hits"], values["log_speed"]
    starts = list(dict.fromkeys(start for start, _ in nats))
    most = members[-1]
    questions: dict[str, dict[str, Any]] = {}

    def put(question: str, name: str, value: Estimate, judged: str, p: float | None) -> None:
        questions.setdefault(question, {})[name] = {
            "estimate": value.estimate,
            "interval": [value.low, value.high],
            "families": int(value.degrees_of_freedom) + 1,
            "p": p,
            "verdict": judged,
        }

    def ask(
        question: str, values: Values, pairs: Mapping[str, Terms], sign: int, margin: float | None
    ) -> None:
        """Judge contrasts of one question together."""
        contrasts = {name: contrast(values, terms) for name, terms in pairs.items()}
        estimates = {name: value for name, value in contrasts.items() if value is not None}
        adjusted = holm({name: value.p_value for name, value in estimates.items()})
        for name, value in estimates.items():
            judged = part_verdict(value, sign, margin)
            within = margin is not None and is_equivalent(value, margin)
            if adjusted[name] >= ALPHA and not within:
                judged = INCONCLUSIVE
            put(question, name, value, judged, value.p_value)
            if len(estimates) > 1:
                questions[question][name]["p_holm"] = adjusted[name]

    students = [start for start in STUDENTS if start in starts]
    over_all = {student: less(student, TEACHER, members) for student in students}
    ask(LOWER, nats, over_all, -1, MARGIN_NATS)
    for some in ([PUBLISHED], [s for s in students if s != PUBLISHED]):
        ask(MORE_HITS, hits, {s: over_all[s] for s in some if s in over_all}, 1, MARGIN_HITS)
    if len(members) > 1:
        single = {f"{s}, N = {n}": less(s, TEACHER, [n]) for s in students for n in members}
        ask(LOWER_AT_N, nats, single, -1, MARGIN_NATS)
        ends = {s: {**less(s, TEACHER, [members[0]]), **less(TEACHER, s, [most])} for s in students}
        ask(DEPENDS, nats, ends, 0, None)
    ask(RECIPE, nats, {STUDENT: less(STUDENT, PUBLISHED, members)}, 0, None)
    for of in ([most], members[:-1]):
        direct = {f"N = {n}": less(SPECIALIST, STUDENT, [n]) for n in of}
        ask(BEATS_DIRECT, nats, direct, -1, None)
        taught = {f"N = {n}": less(SPECIALIST, TEACHER, [n]) for n in of}
        ask(HITS_A_SECOND, values["log_hits_per_second"], taught, 1, None)
    models = [start for start in starts if start != PROFILE]
    beaten = {f"{m}, N = {n}": less(m, PROFILE, [n]) for m in models for n in members}
    ask(BEATS_PROFILE, nats, beaten, -1, None)
    for model in models:
        for n in members:
            shares = list(kept_shares(nats, values["nats_before"], model, n).values())
            if model != TEACHER and len(shares) > 1:
                value = mean_interval(shares)
                put(KEEPS, f"{model}, N = {n}", value, goal_verdict(value, GOAL_KEPT), None)
            value = contrast(speed, less(model, TEACHER, [n])) if model != TEACHER else None
            if value is not None:
                judged = SHOWN if value.low >= math.log(GOAL_SPEED) else MISSED
                put(FASTER, f"{model}, N = {n}", value, judged, None)
    means = {
        f"{start} {n}": {
            name: float(np.mean(list(by_family(values[name], {(start, n): 1.0}).values())))
            for name in sorted(values)
            if (start, n) in values[name]
        }
        | {"families": len(by_family(nats, {(start, n): 1.0}))}
        for start in starts
        for n in members
    }
    claims = {
        THE_CLAIM: joined(questions, [(LOWER, PUBLISHED), (MORE_HITS, PUBLISHED)]),
        THE_GOAL: joined(questions, [(q, f"{SPECIALIST}, N = {most}") for q in (KEEPS, FASTER)]),
    }
    return {"members": members, "means": means, "questions": questions, "claims": claims}


def joined(questions: Mapping[str, Any], parts: Sequence[tuple[str, str]]) -> str:
    """Return what the verdicts of several questions make together."""
    verdicts = [
        questions.get(question, {}).get(name, {}).get("verdict") for question, name in parts
    ]
    if None in verdicts:
        return "not asked yet"
    if len(set(verdicts)) == 1:
        return verdicts[0]
    for worst in (REFUTED, MISSED, INCONCLUSIVE):
        if worst in verdicts:
            return worst
    return NOT_SHOWN


def points(
    rows: Sequence[Mapping[str, Any]], members: Sequence[int]
) -> dict[str, dict[str, list[tuple[float, ...]]]]:
    """Return what :func:`src.experiments.charts.families_figure` draws against N.

    Returns:
        By panel that has any, and start: (N, estimate, low, high) with intervals over families.
    """
    values = measured(rows)
    panels: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    wanted = {
        "nats per residue, less the teacher's": ("nats", True),
        "share of samples that hit the profile": ("hits", False),
        "seconds of training": ("train_seconds", False),
    }
    for title, (name, paired) in wanted.items():
        panel: dict[str, list[tuple[float, ...]]] = {}
        for start in dict.fromkeys(start for start, _ in values[name]):
            if paired and start == TEACHER:
                continue
            for n in sorted(members):
                terms = less(start, TEACHER, [n]) if paired else {(start, n): 1.0}
                if estimate := contrast(values[name], terms):
                    point = (n, estimate.estimate, estimate.low, estimate.high)
                    panel.setdefault(start, []).append(point)
        if panel:
            panels[title] = panel
    return panels


def analysis_lines(analysis: Mapping[str, Any]) -> list[str]:
    """Return the analysis as Markdown."""
    shown_means = {
        "families": "families",
        "nats": "nats per residue",
        "hits": "hits",
        "identity": "identity to training",
        "distinct_share": "distinct",
        "train_seconds": "training, s",
        "log_speed": "proteins a second",
    }
    rows = []
    for name, means in analysis["means"].items():
        cells = {key: f"{value:.3f}" for key, value in means.items()}
        cells["families"] = str(means["families"])
        if "log_speed" in means:
            cells["log_speed"] = f"{math.exp(means['log_speed']):.1f}"
        if "train_seconds" in means:
            cells["train_seconds"] = f"{means['train_seconds']:.0f}"
        rows.append([name, *(cells.get(key, "") for key in shown_means)])
    lines = [*markdown_lines(["start and N", *shown_means.values()], rows), "", NOTES, ""]
    lines += [f"{name}: {judged}." for name, judged in analysis["claims"].items()] + [""]
    for question, entries in analysis["questions"].items():
        rows = []
        for name, entry in entries.items():
            p = "" if entry["p"] is None else f"{entry['p']:.2g}"
            p += f" ({entry['p_holm']:.2g})" if "p_holm" in entry else ""
            rows.append([name, shown(entry), str(entry["families"]), p, entry["verdict"]])
        headings = ["", "estimate", "families", "p (Holm)", "verdict"]
        lines += [f"### {question}", "", *markdown_lines(headings, rows), ""]
    return lines
