"""The decision rule on made-up experiments whose truth is known."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts import analyse_ablation as script
from src.evaluation.statistics import Estimate
from src.experiments.grids import ARMS
from src.experiments.synergy import (
    DESIGNS,
    EXPLANATIONS,
    HOLDS,
    INCONCLUSIVE,
    MARGIN,
    REFUTED,
    analyse,
    claim_verdict,
    part_verdict,
    read_runs,
)

PROTEINS, SEEDS = 60, (1, 2, 3, 4, 5)


def write_experiment(folder, effects, noise=0.002, sizes=("s",), seed=0):
    """Write tables in which y of each arm is 2.8 + its effect, plus noise of seeds and proteins."""
    rng = np.random.default_rng(seed)
    residues = rng.integers(50, 400, PROTEINS)
    proteins = [f"p{i}" for i in range(PROTEINS)]
    base = rng.normal(0, 0.1, PROTEINS)
    for size, run in itertools.product(sizes, SEEDS):
        shared = rng.normal(0, 0.05)  # paired arms share it
        tables = []
        for arm, effect in effects.items():
            y = 2.8 + effect + shared + base + rng.normal(0, noise, PROTEINS)
            y += rng.normal(0, noise)
            tables.append(
                pa.table(
                    {
                        "arm": [arm] * PROTEINS,
                        "seed": [run] * PROTEINS,
                        "size": [size] * PROTEINS,
                        "learning_rate": [1e-3] * PROTEINS,
                        "split": ["test"] * PROTEINS,
                        "protein": proteins,
                        "cluster": proteins,
                        "residues": residues,
                        "tokens": residues,
                        "nll_student": (y * residues).astype(np.float32),
                        "nll_teacher": (2.7 * residues).astype(np.float32),
                        "kl": (0.1 * residues).astype(np.float32),
                    }
                )
            )
        pq.write_table(
            pa.concat_tables(tables), folder / f"per_protein-synergy-{size}-seed{run}.parquet"
        )


CLAIM = {"baseline": 0.0, "uncertainty": 0.3, "calibration": 0.4, "both": -0.2}


@pytest.mark.parametrize(
    ("effects", "verdict", "interaction"),
    [
        (CLAIM, HOLDS, -0.9),
        ({"baseline": 0, "uncertainty": 0.3, "calibration": 0.4, "both": 0.7}, REFUTED, 0.0),
        ({"baseline": 0, "uncertainty": 0, "calibration": 0, "both": 0}, REFUTED, 0.0),
        ({"baseline": 0, "uncertainty": -0.1, "calibration": 0.1, "both": -0.3}, REFUTED, -0.3),
    ],
)
def test_known_truths_are_told(tmp_path, effects, verdict, interaction):
    write_experiment(tmp_path, effects)
    record = analyse(read_runs(tmp_path, "synergy"))["s"]
    found = record["designs"]["published"]
    assert found["verdict"] == verdict
    low, high = found["contrasts"]["I"]["interval"]
    assert low < found["contrasts"]["I"]["estimate"] < high
    assert found["contrasts"]["I"]["estimate"] == pytest.approx(interaction, abs=0.02)
    assert found["published_interaction_excluded"]
    assert record["seeds"] == list(SEEDS)


def test_arms_are_compared_with_a_reference(tmp_path):
    """Against made-up effects, and with Holm's correction from its definition."""
    effects = {**CLAIM, "equal": 0.001, "better": -0.03}
    write_experiment(tmp_path, effects)
    runs = read_runs(tmp_path, "synergy")
    record = analyse(runs, ("baseline", "both"))["s"]["against"]
    for reference, arms in record.items():
        assert set(arms) == set(effects) - {reference}
        for arm, found in arms.items():
            truth = effects[arm] - effects[reference]
            low, high = found["nats"]["interval"]
            assert low - 0.003 < truth < high + 0.003
            assert found["kl"]["estimate"] == pytest.approx(0, abs=1e-6)
        ordered = sorted(arms.values(), key=lambda e: e["p_value"])
        largest = 0.0
        for rank, found in enumerate(ordered):
            largest = max(largest, min(1.0, found["p_value"] * (len(ordered) - rank)))
            assert found["p_holm"] == pytest.approx(largest)
    assert record["baseline"]["better"]["p_holm"] < 0.05
    assert record["baseline"]["equal"]["nats"]["interval"][0] < 0.001
    with pytest.raises(ValueError, match="there is no arm nonsense"):
        analyse(runs, ("nonsense",))


def test_much_noise_is_inconclusive(tmp_path):
    write_experiment(tmp_path, CLAIM, noise=0.5, seed=1)
    found = analyse(read_runs(tmp_path, "synergy"))["s"]["designs"]["published"]
    assert found["verdict"] == INCONCLUSIVE
    assert found["interaction_half_width"] > 0.05


@pytest.mark.parametrize(
    ("estimate", "error", "sign", "margin", "verdict"),
    [
        (0.5, 0.01, 1, MARGIN, HOLDS),
        (0.5, 0.01, -1, MARGIN, REFUTED),
        (-0.5, 0.01, -1, MARGIN, HOLDS),
        (-0.5, 0.05, 0, None, HOLDS),
        (0.001, 0.001, 1, MARGIN, REFUTED),
        (0.01, 0.001, 1, MARGIN, REFUTED),
        (-0.01, 0.001, -1, MARGIN, REFUTED),
        (-0.01, 0.001, -1, None, HOLDS),
        (0.03, 0.1, 1, MARGIN, INCONCLUSIVE),
        (0.5, 0.5, 0, None, INCONCLUSIVE),
    ],
)
def test_parts_of_the_claim(estimate, error, sign, margin, verdict):
    half = 1.96 * error
    found = Estimate(estimate, estimate - half, estimate + half, standard_error=error)
    assert part_verdict(found, sign, margin) == verdict


def test_the_claim_falls_with_any_part():
    parts = {"U": HOLDS, "C": HOLDS, "B": HOLDS, "I": HOLDS}
    assert claim_verdict(parts) == HOLDS
    assert claim_verdict({**parts, "B": INCONCLUSIVE}) == INCONCLUSIVE
    assert claim_verdict({**parts, "B": INCONCLUSIVE, "U": REFUTED}) == REFUTED


def test_a_seed_that_an_arm_lacks_is_left_out_and_mixtures_are_refused(tmp_path):
    write_experiment(tmp_path, CLAIM)
    path = tmp_path / "per_protein-synergy-s-seed3.parquet"
    table = pq.read_table(path).to_pandas()
    pq.write_table(pa.Table.from_pandas(table[table["arm"] != "both"]), path)
    assert read_runs(tmp_path, "synergy")["s"].seeds == [1, 2, 4, 5]
    table["learning_rate"] = 2e-3
    pq.write_table(pa.Table.from_pandas(table), path)
    with pytest.raises(ValueError, match="several learning rates"):
        read_runs(tmp_path, "synergy")
    with pytest.raises(ValueError, match="run the grid first"):
        read_runs(tmp_path, "other")


def test_every_arm_that_is_compared_is_run():
    compared = {arm for arms in DESIGNS.values() for arm in arms}
    compared |= {arm for pair in EXPLANATIONS.values() for arm in pair}
    assert compared == set(ARMS)


def test_the_script_writes_what_it_prints(tmp_path, capsys):
    write_experiment(tmp_path, dict.fromkeys(ARMS, 0.0) | CLAIM, sizes=("s27", "s11"))
    assert script.main(["--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "published: the claim holds" in out
    assert "controlled: the claim is refuted" in out
    written = json.loads((tmp_path / "analysis.json").read_text())["sizes"]
    assert set(written) == {"s27", "s11"}
    assert len(written["s27"]["explanations"]) == len(EXPLANATIONS)
    assert (tmp_path / "analysis.md").read_text().strip() in out
    assert script.main(["--results", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: table.drop_columns(["split"]), "broken, or not a table"),
        (lambda table: table.slice(0, 0), "holds no proteins"),
        (lambda table: table.set_column(11, "kl", pa.array(["x"] * len(table))), "broken, or not"),
        (lambda table: table.set_column(11, "kl", pa.nulls(len(table))), "a value is missing"),
        (lambda table: table.set_column(11, "kl", pa.array([np.nan] * len(table))), "not finite"),
        (lambda table: table.set_column(7, "residues", pa.array([0] * len(table))), "no residues"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_file(tmp_path, refusal, spoil, message):
    write_experiment(tmp_path, CLAIM)
    path = tmp_path / "per_protein-synergy-s-seed3.parquet"
    pq.write_table(spoil(pq.read_table(path)), path)
    error = refusal(script.main(["--results", str(tmp_path)]))
    assert f"{path}: " in error
    assert message in error
    assert "run scripts/ablation.py --grid synergy again" in error
    assert not (tmp_path / "analysis.json").exists()


def test_a_truncated_table_and_another_split_are_told(tmp_path):
    write_experiment(tmp_path, CLAIM)
    with pytest.raises(ValueError, match="no table of synergy holds validation proteins"):
        read_runs(tmp_path, "synergy", "validation")
    path = tmp_path / "per_protein-synergy-s-seed3.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="seed3.parquet: broken, or not a table .*again"):
        read_runs(tmp_path, "synergy")


def test_the_change_from_a_shorter_training_is_told(tmp_path, capsys):
    """Same seed: residues and proteins agree. U grows from 0.3 to 0.4, the others stay."""
    late, early = tmp_path / "late", tmp_path / "early"
    for folder, effects in ((late, CLAIM | {"uncertainty": 0.4}), (early, CLAIM)):
        folder.mkdir()
        write_experiment(folder, effects)
    arguments = ["--results", str(late), "--shorter", str(early)]
    assert script.main(arguments) == 0
    assert "### s, published: change from the shorter training" in capsys.readouterr().out
    change = json.loads((late / "analysis.json").read_text())["changes"]["s"]["published"]
    for name, expected in {"U": 0.1, "C": 0.0, "B": 0.0, "I": -0.1}.items():
        low, high = change[name]["interval"]
        assert low <= expected <= high
        assert high - low < 0.03
        assert change[name]["p_holm"] < 0.05 if expected else change[name]["p_holm"] > 0.05
    other = tmp_path / "other"
    other.mkdir()
    write_experiment(other, CLAIM, seed=1)
    assert script.main(["--results", str(late), "--shorter", str(other)]) == 2
    assert "the shorter runs have other proteins" in capsys.readouterr().err
