"""The answers of the experiment on specialists, against sums written out by hand and SciPy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from src.evaluation.statistics import mean_interval
from src.experiments import family_analysis as f
from src.experiments.charts import families_figure
from src.experiments.family_grid import TABLE, read_rows
from src.experiments.synergy import HOLDS, INCONCLUSIVE, REFUTED

ROOT = Path(__file__).resolve().parents[1]
MEMBERS, FAMILIES, DRAWS = (10, 100), 12, 2


def table(y, **more):
    """Return a row for each start, N, family and draw; ``y(start, n, family, draw)``."""
    rows = []
    for start in (f.TEACHER, f.PUBLISHED, f.STUDENT, f.SPECIALIST, f.PROFILE):
        for n in MEMBERS:
            for family in range(FAMILIES):
                for draw in range(DRAWS):
                    row = {
                        "start": start, "members": n, "family": f"F{family}", "draw": draw,
                        "rate": None, "residues": 1000, "train_seconds": 1.0,
                        "nll": 1000 * y(start, n, family, draw),
                    }  # fmt: skip
                    if start != f.PROFILE:
                        row |= {"samples": 200, "hits": 50, "proteins_per_second": 10.0}
                    if start == f.TEACHER:
                        row["nll_before"] = 1000 * 5.0
                    rows.append({**row, **more.get(start.replace("-", "_"), {})})
    return rows


def noisy(shift, start, n, family, draw):
    generator = np.random.default_rng([n, family, draw, len(start)])
    return 2.0 + shift.get(start, 0.0) + 0.1 * family + 0.01 * generator.standard_normal()


def test_the_mean_and_its_interval_are_those_of_scipy():
    values = np.random.default_rng(0).standard_normal(9)
    found = mean_interval(values)
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0.0)[1])
    interval = stats.t.interval(0.95, 8, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(interval)
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([1.0])


def test_a_contrast_pairs_by_family_and_draw():
    rows = table(lambda *key: noisy({}, *key))
    nats = f.measured(rows)["nats"]
    wanted = [
        np.mean(
            [
                noisy({}, f.STUDENT, n, family, draw) - noisy({}, f.TEACHER, n, family, draw)
                for n in MEMBERS
                for draw in range(DRAWS)
            ]
        )
        for family in range(FAMILIES)
    ]
    found = f.contrast(nats, f.less(f.STUDENT, f.TEACHER, MEMBERS))
    assert found is not None
    assert found.estimate == pytest.approx(np.mean(wanted))
    assert found.p_value == pytest.approx(stats.ttest_1samp(wanted, 0.0)[1])


def test_a_draw_that_one_side_lacks_is_left_out_on_both():
    rows = table(lambda start, n, family, draw: 2.0 + family + 5.0 * draw)
    rows = [
        row
        for row in rows
        if not (row["start"] == f.STUDENT and row["draw"] == 1 and row["family"] != "F3")
        and not (row["start"] == f.TEACHER and row["family"] == "F4" and row["members"] == 10)
    ]
    figures = f.by_family(f.measured(rows)["nats"], f.less(f.STUDENT, f.TEACHER, MEMBERS))
    assert set(figures) == {f"F{i}" for i in range(FAMILIES)} - {"F4"}
    assert all(abs(value) < 1e-12 for value in figures.values())


def test_verdicts_follow_the_estimates():
    shift = {f.STUDENT: -0.2, f.PUBLISHED: 0.2, f.SPECIALIST: -0.3, f.PROFILE: -0.9}
    rows = table(
        lambda *key: noisy(shift, *key),
        specialist27={"proteins_per_second": 40.0},
        student27={"hits": 100},
    )
    rows.append({**rows[0], "rate": 1e-3, "nll": 1e9})  # of the tuning: not counted
    analysis = f.analyse(rows, MEMBERS)
    asked = analysis["questions"]
    assert asked[f.LOWER][f.STUDENT]["verdict"] == HOLDS
    assert asked[f.LOWER][f.STUDENT]["estimate"] == pytest.approx(-0.2, abs=0.01)
    assert asked[f.LOWER][f.STUDENT]["families"] == FAMILIES
    assert asked[f.LOWER][f.PUBLISHED]["verdict"] == REFUTED
    assert asked[f.MORE_HITS][f.STUDENT]["estimate"] == pytest.approx(0.25)
    assert asked[f.MORE_HITS][f.PUBLISHED]["verdict"] == REFUTED  # equivalent to 0
    assert asked[f.RECIPE][f.STUDENT]["estimate"] == pytest.approx(-0.4, abs=0.01)
    assert asked[f.BEATS_DIRECT]["N = 100"]["verdict"] == HOLDS
    assert "p_holm" not in asked[f.BEATS_DIRECT]["N = 100"]
    assert asked[f.HITS_A_SECOND]["N = 10"]["estimate"] == pytest.approx(math.log(4))
    assert asked[f.BEATS_PROFILE]["specialist27, N = 100"]["verdict"] == REFUTED
    assert asked[f.FASTER]["specialist27, N = 100"]["verdict"] == f.SHOWN
    assert asked[f.FASTER]["student27, N = 100"]["verdict"] == f.MISSED
    gains = [
        np.mean([5.0 - noisy(shift, f.SPECIALIST, 100, i, d) for d in range(DRAWS)])
        / np.mean([5.0 - noisy(shift, f.TEACHER, 100, i, d) for d in range(DRAWS)])
        for i in range(FAMILIES)
    ]
    assert asked[f.KEEPS]["specialist27, N = 100"]["estimate"] == pytest.approx(np.mean(gains))
    assert analysis["means"]["student27 10"]["families"] == FAMILIES
    assert analysis["claims"][f.THE_CLAIM] == REFUTED
    assert analysis["claims"][f.THE_GOAL] == f.SHOWN
    text = "\n".join(f.analysis_lines(analysis))
    assert "specialist27 100" in text
    assert f.LOWER in text


def test_points_are_contrasts_with_the_teacher():
    panels = f.points(table(lambda *key: noisy({f.STUDENT: -0.2}, *key)), MEMBERS)
    nats, hits, _ = panels.values()
    assert set(nats) == {f.PUBLISHED, f.STUDENT, f.SPECIALIST, f.PROFILE}
    n, estimate, low, high = nats[f.STUDENT][1]
    assert n == 100
    assert low < estimate < high
    assert estimate == pytest.approx(-0.2, abs=0.01)
    assert hits[f.TEACHER] == [(10, 0.25, 0.25, 0.25), (100, 0.25, 0.25, 0.25)]
    assert families_figure(panels, "members").axes[0].get_xlabel() == "members"
    with pytest.raises(ValueError, match="no cells"):
        families_figure({"a": {}}, "members")


def test_holm_takes_back_what_one_of_many_shows():
    spread = np.linspace(-1, 1, FAMILIES)
    spread -= 2.5 * spread.std(ddof=1) / math.sqrt(FAMILIES)  # t = -2.5, p = 0.03

    def y(start, n, family, draw):
        return 2.0 + (spread[family] if start == f.STUDENT else 0.0)

    asked = f.analyse(table(y), MEMBERS)["questions"]
    for n in MEMBERS:
        entry = asked[f.LOWER_AT_N][f"student27, N = {n}"]
        assert entry["interval"][1] < 0
        assert entry["p_holm"] == pytest.approx(4 * entry["p"])
        assert entry["verdict"] == INCONCLUSIVE
    assert asked[f.BEATS_DIRECT]["N = 100"]["verdict"] == REFUTED  # the student is the lower one


def test_the_other_sign_is_corrected_too():
    """A shift that one of four shows against the claim does not refute it; a small one does."""
    spread = np.linspace(-1, 1, FAMILIES)
    spread += 2.5 * spread.std(ddof=1) / math.sqrt(FAMILIES)

    def y(start, n, family, draw):
        return 2.0 + (spread[family] if start == f.STUDENT else 0.0)

    asked = f.analyse(table(y), MEMBERS)["questions"][f.LOWER_AT_N]
    assert asked["student27, N = 10"]["verdict"] == INCONCLUSIVE
    assert asked["student27-published, N = 10"]["verdict"] == REFUTED  # equivalent to 0


def test_only_the_wanted_numbers_of_members_are_asked_about():
    rows = table(lambda start, n, family, draw: 2.0 + 0.01 * family + (n == 10))
    rows = [row for row in rows if row["members"] == 100 or row["family"] == "F1"]
    entry = f.analyse(rows, [100])["questions"][f.LOWER][f.STUDENT]
    assert entry["families"] == FAMILIES
    assert f.LOWER_AT_N not in f.analyse(rows, [100])["questions"]


def test_starts_that_were_judged_on_other_members_are_refused():
    rows = table(lambda *key: 2.0)
    rows[3]["residues"] = 999
    with pytest.raises(ValueError, match="judged on other members"):
        f.analyse(rows, MEMBERS)


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, REFUTED], REFUTED),
        ([HOLDS, INCONCLUSIVE], INCONCLUSIVE),
        ([f.SHOWN, f.NOT_SHOWN], f.NOT_SHOWN),
        ([f.SHOWN, f.MISSED], f.MISSED),
        ([HOLDS, None], "not asked yet"),
    ],
)
def test_verdicts_are_joined(verdicts, wanted):
    questions = {str(i): {"a": {"verdict": v}} for i, v in enumerate(verdicts) if v}
    assert f.joined(questions, [(str(i), "a") for i in range(len(verdicts))]) == wanted


def test_an_experiment_without_cells_is_told():
    with pytest.raises(ValueError, match="no cell of the experiment is finished"):
        f.analyse([], MEMBERS)


def test_the_page_says_what_the_committed_cells_say():
    folder = ROOT / "results" / "specialists"
    analysis = f.analyse(read_rows(folder / TABLE), [10, 30, 100])
    assert analysis["questions"] == json.loads((folder / "analysis.json").read_text())["questions"]
    page = (ROOT / "docs" / "RESULTS.md").read_text().replace("−", "-")
    asked = analysis["questions"]

    def shown(entry, digits, sign="", of: Callable[[float], float] = float):
        low, high = (f"{of(x):{sign}.{digits}f}" for x in entry["interval"])
        return f"{of(entry['estimate']):{sign}.{digits}f}", f"[{low}, {high}]"

    assert set(asked[f.LOWER]) <= set(f.STUDENTS)
    assert len(asked[f.LOWER_AT_N]) == 3 * len(asked[f.LOWER]) + 1  # one student at N = 100 alone
    for entry in (*asked[f.LOWER].values(), *asked[f.LOWER_AT_N].values()):
        assert "{} {}".format(*shown(entry, 3, "+")) in " ".join(page.split())
    name = f"{f.SPECIALIST}, N = 100"
    assert "{} {}".format(*shown(asked[f.KEEPS][name], 3)) in page
    assert "{} times {}".format(*shown(asked[f.FASTER][name], 2, of=math.exp)) in page
    assert "{} times {}".format(*shown(asked[f.HITS_A_SECOND]["N = 100"], 2, of=math.exp)) in page
    for name, means in analysis["means"].items():
        if name.startswith(f.PROFILE) or not means["families"]:
            continue
        speed = math.exp(means["log_speed"])
        assert f"| {means['nats']:.3f} | {means['hits']:.0%} |".replace("%", " %") in page
        assert f"| {speed:.1f} |" in page
