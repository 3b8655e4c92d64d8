from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from src.evaluation import calibration, composition
from src.evaluation.scoring import model_statistics, token_statistics


def random_logits(rows=200, vocabulary=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(rows, vocabulary, generator=generator)
    teacher = 3 * torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return student, teacher, targets


def outcomes(n=4000, seed=0, shift=0.1):
    """Confidences, and outcomes of a model that is ``shift`` too sure of itself."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2, 3, n)
    correct = (rng.random(n) < np.clip(confidence - shift, 0, 1)).astype(float)
    return confidence, correct


def bins(confidence, correct, edges=None) -> np.ndarray:
    """Return the sums of each bin, by default of 15 equally wide ones."""
    edges = calibration.WIDTH_EDGES if edges is None else edges
    return calibration.bin_sums(confidence, correct, edges, np.zeros(len(correct), int), 1)[0]


def test_token_statistics_against_float64():
    student, teacher, targets = random_logits()
    found = token_statistics(student, teacher, targets)
    q = np.exp(student.double().numpy())
    p = np.exp(teacher.double().numpy())
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    m = (p + q) / 2
    rows = np.arange(len(q))
    one_hot = np.eye(q.shape[1])[targets.numpy()]
    expected = {
        "kl": (p * np.log(p / q)).sum(-1),
        "reverse_kl": (q * np.log(q / p)).sum(-1),
        "js": ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2,
        "agree": p.argmax(-1) == q.argmax(-1),
    }
    for name, d in (("student", q), ("teacher", p)):
        expected[f"nll_{name}"] = -np.log(d[rows, targets.numpy()])
        expected[f"confidence_{name}"] = d.max(-1)
        expected[f"correct_{name}"] = d.argmax(-1) == targets.numpy()
        expected[f"brier_{name}"] = ((d - one_hot) ** 2).sum(-1)
        expected[f"entropy_{name}"] = -(d * np.log(d)).sum(-1)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].shape == (200,)
        np.testing.assert_allclose(found[name].numpy(), values, rtol=2e-5, atol=2e-6, err_msg=name)


def test_equal_models_do_not_diverge_and_half_precision_is_raised():
    logits, _, targets = random_logits()
    found = token_statistics(logits.bfloat16(), logits.bfloat16(), targets)
    for name in ("kl", "reverse_kl", "js"):
        assert found[name].dtype == torch.float32
        assert 0 <= found[name].min() <= found[name].max() < 1e-6
    assert found["agree"].all()


def test_impossible_tokens_do_not_give_nan():
    student, teacher, targets = random_logits(rows=5)
    teacher[:, 3] = -math.inf
    found = token_statistics(student, teacher, torch.full((5,), 2))
    assert found.pop("reverse_kl").isinf().all()  # the student may pick what cannot be
    assert all(torch.isfinite(values).all() for values in found.values())


def test_vocabularies_must_match():
    student, teacher, targets = random_logits()
    with pytest.raises(ValueError, match="vocabulary"):
        token_statistics(student[:, :-1], teacher, targets)


def test_a_uniform_model_over_residues_has_perplexity_twenty_for_each_residue():
    residues = torch.randint(20, (500,))
    found = model_statistics(torch.full((500, 20), 0.0).log_softmax(-1), residues)
    nll = found["nll"].double().sum().item()
    assert math.exp(nll / 500) == pytest.approx(20, rel=1e-6)
    torch.testing.assert_close(found["brier"], torch.full((500,), 0.95))


def test_ece_against_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    student, _, targets = random_logits(rows=3000, vocabulary=6, seed=3)
    probabilities = student.softmax(-1)
    found = model_statistics(student.log_softmax(-1), targets)
    sums = bins(found["confidence"].numpy(), found["correct"].numpy())
    expected = torchmetrics.multiclass_calibration_error(
        probabilities, targets, num_classes=6, n_bins=15, norm="l1"
    )
    assert float(calibration.calibration_error(sums)) == pytest.approx(float(expected), rel=1e-5)


def test_ece_by_hand():
    confidence = np.array([0.3, 0.3, 0.9, 0.9])
    correct = np.array([1.0, 0.0, 1.0, 1.0])
    sums = bins(confidence, correct)
    assert float(calibration.calibration_error(sums)) == pytest.approx(0.5 * 0.2 + 0.5 * 0.1)
    curve = calibration.reliability_curve(sums, calibration.WIDTH_EDGES)
    assert sum(curve["count"]) == 4
    assert [a for a in curve["accuracy"] if a is not None] == [0.5, 1.0]
    assert [c for c in curve["confidence"] if c is not None] == pytest.approx([0.3, 0.9])


def test_edges_belong_to_the_lower_bin_and_none_is_lost():
    confidence = np.array([0.0, 1 / 15, 0.5, 1.0])
    sums = bins(confidence, np.ones(4))
    assert sums[:, 0].sum() == 4
    assert sums[0, 0] == 2
    assert sums[-1, 0] == 1


def test_equal_mass_bins_hold_equal_numbers():
    confidence, correct = outcomes()
    sums = bins(confidence, correct, calibration.equal_mass_edges(confidence))
    assert sums[:, 0].max() - sums[:, 0].min() <= 2
    same = np.full(100, 0.4)
    lumped = bins(same, np.ones(100), calibration.equal_mass_edges(same))
    assert lumped[:, 0].sum() == 100


def test_sums_over_proteins_add_up_to_the_whole():
    confidence, correct = outcomes()
    groups = np.random.default_rng(1).integers(0, 30, len(confidence))
    parts = calibration.CalibrationSums.collect(confidence, correct, groups, 30)
    whole = calibration.CalibrationSums.collect(confidence, correct, np.zeros_like(groups), 1)
    for name, values in parts.arrays("x_").items():
        np.testing.assert_allclose(values.sum(0), whole.arrays("x_")[name][0], atol=1e-9)


def test_debiasing_removes_what_chance_adds_to_a_calibrated_model():
    raw, l1 = [], []
    for seed in range(60):
        confidence, correct = outcomes(n=600, seed=seed, shift=0.0)
        sums = bins(confidence, correct, calibration.equal_mass_edges(confidence))
        raw.append(float(calibration.calibration_error(sums)))
        l1.append(float(calibration.debiased_calibration_error(sums)))
    assert np.mean(raw) > 0.05
    assert np.mean(l1) < 0.6 * np.mean(raw)


def test_debiasing_leaves_a_clear_error_alone():
    confidence, correct = outcomes(n=50_000, shift=0.2)
    sums = bins(confidence, correct, calibration.equal_mass_edges(confidence))
    plain = float(calibration.calibration_error(sums))
    assert float(calibration.debiased_calibration_error(sums)) == pytest.approx(plain, rel=0.01)


def plain_smooth_error(confidence, correct, sigma):
    """Smooth with the reflected Gaussian by summing its images, at every point of a fine grid."""
    grid = (np.arange(1000) + 0.5) / 1000
    smoothed = np.zeros(1000)
    for image in (-2, -1, 0, 1, 2):
        centre = confidence + image if image % 2 == 0 else 1 - confidence + image
        kernel = np.exp(-(((grid[:, None] - centre) / sigma) ** 2) / 2)
        smoothed += kernel @ (correct - confidence) / (sigma * math.sqrt(2 * math.pi))
    return np.abs(smoothed / len(confidence)).mean()


@pytest.mark.parametrize("shift", [0.3, 0.1, 0.02])
def test_smooth_ece_is_the_fixed_point_of_its_definition(shift):
    confidence, correct = outcomes(n=1500, seed=4, shift=shift)
    sums = calibration.residual_sums(confidence, correct, np.zeros(1500, int), 1)
    found = float(calibration.smooth_calibration_error(sums[0], np.array(1500)))
    assert plain_smooth_error(confidence, correct, found) == pytest.approx(found, rel=0.01)


def test_smooth_ece_of_a_constant_forecast_is_near_its_gap():
    confidence = np.full(10_000, 0.7)
    correct = np.zeros(10_000)
    correct[:5000] = 1
    sums = calibration.residual_sums(confidence, correct, np.zeros(10_000, int), 1)
    # |∫ residual| = 0.2 whatever the width, so the fixed point is 0.2 itself.
    found = float(calibration.smooth_calibration_error(sums[0], np.array(10_000)))
    assert found == pytest.approx(0.2, abs=1e-6)


def test_figures_work_on_many_replicates_at_once():
    confidence, correct = outcomes(n=900)
    groups = np.arange(900) % 9
    sums = calibration.CalibrationSums.collect(confidence, correct, groups, 9).arrays("")
    many = {k: f(sums, "") for k, f in calibration.MEASURES.items()}
    for group in range(9):
        one = {n: v[group] for n, v in sums.items()}
        for name, measure in calibration.MEASURES.items():
            assert many[name].shape == (9,)
            assert float(many[name][group]) == pytest.approx(float(measure(one, "")), abs=1e-9)


def test_composition_kl(random_proteins):
    counts = composition.residue_counts(["AAC", "XA"])
    assert counts[0] == 3
    assert counts[1] == 1
    assert counts.sum() == 4
    natural = composition.residue_counts(random_proteins(200))
    assert float(composition.composition_kl(natural, natural)) == 0.0
    one_sided = np.zeros(20)
    one_sided[0] = 10_000
    expected = -math.log(natural[0] / natural.sum())
    kl = float(composition.composition_kl(one_sided, natural))
    assert kl == pytest.approx(expected, rel=0.01)
    fresh = composition.residue_counts(random_proteins(100, seed=9))
    kl = float(composition.composition_kl(fresh, np.full(20, 10**9)))
    assert kl == pytest.approx(19 / (2 * fresh.sum()), rel=1.0)


def test_low_complexity_runs_and_words():
    varied = "MKTAYIAKQRQISFVKSHFS"
    assert composition.low_complexity_share(varied) == 0.0
    assert composition.low_complexity_share("A" * 40) == 1.0
    mixed = composition.low_complexity_share("ACDEFGHIKLMN" * 2 + "A" * 24)
    assert 0.5 <= mixed < 0.7
    assert composition.low_complexity_share("A") == 1.0
    assert composition.low_complexity_share("") == 0.0
    assert composition.longest_run("AACCCA") == 3
    assert composition.longest_run("") == 0
    assert composition.distinct_share(["ABCD", "ABCD"]) == 0.5
    assert composition.distinct_share(["AB"]) == 0.0
