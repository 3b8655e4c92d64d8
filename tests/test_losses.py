"""The pure loss functions against a float64 reference, closed forms and differences."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch

from src.common.settings import (
    DIVERGENCES,
    SMOOTHINGS,
    WEIGHTINGS,
    LossSettings,
    StudentSettings,
    TrainSettings,
    as_recorded,
    default_run_name,
)
from src.loss.divergences import TABLE
from src.loss.reference import (
    distillation_loss,
    divergence,
    entropy,
    position_weights,
    published_weights,
    segments_from_positions,
    smooth_log_probs,
    smoothing_epsilon,
    valid_positions,
)
from tests.loss_cases import random_settings

BOTH = LossSettings(use_uncertainty_weighting=True, use_calibration_smoothing=True)


def random_batch(seed: int, dtype=torch.float64, packed: bool = False):
    """Return logits, labels, mask and segments of random shape, padding side and ignored labels."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, width, vocabulary = rng.randint(1, 4), rng.randint(2, 12), rng.randint(2, 20)
    student = torch.randn(rows, width, vocabulary, dtype=dtype) * rng.choice([0.1, 1, 5])
    teacher = torch.randn(rows, width, vocabulary, dtype=dtype) * rng.choice([0.1, 1, 5])
    labels = torch.randint(0, vocabulary, (rows, width))
    mask = torch.ones(rows, width, dtype=torch.long)
    segments = None
    if packed:
        segments = torch.zeros(rows, width, dtype=torch.long)
        for row in range(rows):
            cuts = sorted(rng.sample(range(1, width), min(width - 1, rng.randint(0, 3))))
            for cut in cuts:
                segments[row, cut:] += 1
                labels[row, cut] = -100
        mask = None
    else:
        for row in range(rows):
            padding = rng.randint(0, width)
            if rng.random() < 0.5:
                mask[row, width - padding :] = 0
            else:
                mask[row, :padding] = 0
        labels = labels.masked_fill(mask == 0, -100) if rng.random() < 0.5 else labels
    ignored = torch.rand(rows, width) < 0.15
    labels = labels.masked_fill(ignored, -100)
    return student, teacher, labels, mask, segments


def softmax64(z):
    z = np.asarray(z, dtype=np.float64)
    e = np.exp(z - z.max())
    return e / e.sum()


def reference_loss(student, teacher, labels, mask, segments, settings: LossSettings):
    """The loss by loops over positions in numpy float64, written from the formulas alone."""
    student, teacher, labels = student.double().numpy(), teacher.double().numpy(), labels.numpy()
    rows, width, vocabulary = student.shape
    T, lam, beta = settings.temperature, settings.smoothing_factor, settings.divergence_weight
    positions = []
    for b, t in itertools.product(range(rows), range(width - 1)):
        if labels[b, t + 1] == -100:
            continue
        if mask is not None and not (mask[b, t] and mask[b, t + 1]):
            continue
        if segments is not None and segments[b, t] != segments[b, t + 1]:
            continue
        group = (b, 0 if segments is None else int(segments[b, t]))
        p1 = softmax64(teacher[b, t])
        h = -sum(x * math.log(x) for x in p1 if x > 0)
        positions.append({"b": b, "t": t, "group": group, "H": h})
    if not positions:
        return {"loss": 0.0, "hard": 0.0, "soft": 0.0}
    by_group: dict = {}
    for x in positions:
        by_group.setdefault(x["group"], []).append(x["H"])
    for x in positions:
        low, high = min(by_group[x["group"]]), max(by_group[x["group"]])
        x["w"] = 0.5 + (0.5 * (x["H"] - low) / (high - low) if high - low > 1e-6 else 0.0)
        x["p"] = softmax64(teacher[x["b"], x["t"]] / T)
        x["doubt"] = 1 - x["p"].max()
    mean_w = np.mean([x["w"] for x in positions])
    mean_doubt = np.mean([x["doubt"] for x in positions])
    hard = soft = 0.0
    for x in positions:
        w = 1.0
        if settings.use_uncertainty_weighting:
            w = {
                "published": x["w"], "mean_one": x["w"] / mean_w, "inverse": 1.5 - x["w"],
                "matched": mean_w,
            }[settings.weighting]  # fmt: skip
        p = x["p"]
        if settings.use_calibration_smoothing:
            e = lam * {
                "published": x["doubt"], "confident": 1 - x["doubt"], "constant": 1.0,
                "matched": mean_doubt,
            }[settings.smoothing]  # fmt: skip
            p = (1 - e) * p + e / vocabulary
        q = softmax64(student[x["b"], x["t"]] / T)

        def kl(a, b):
            return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

        m = beta * p + (1 - beta) * q
        d = {
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
            "skew_kl": kl(p, m),
        }[settings.divergence]
        soft += w * d
        target = labels[x["b"], x["t"] + 1]
        hard -= math.log(softmax64(student[x["b"], x["t"]])[target])
    hard, soft = hard / len(positions), soft / len(positions)
    loss = settings.alpha * hard + (1 - settings.alpha) * T**2 * soft
    return {"loss": loss, "hard": hard, "soft": soft}


@pytest.mark.parametrize("seed", range(60))
def test_loss_equals_float64_reference(seed):
    student, teacher, labels, mask, segments = random_batch(seed, packed=seed % 3 == 0)
    settings = random_settings(seed)
    if settings.weighting == "permuted":
        settings = dataclasses.replace(settings, weighting="inverse")
    ours = distillation_loss(student, teacher, labels, mask, settings, segments=segments)
    theirs = reference_loss(student, teacher, labels, mask, segments, settings)
    for name in ("loss", "hard", "soft"):
        assert getattr(ours, name).item() == pytest.approx(theirs[name], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_float32_is_close_to_float64(seed):
    student, teacher, labels, mask, segments = random_batch(seed)
    settings = random_settings(seed)
    exact = distillation_loss(student, teacher, labels, mask, settings).loss
    single = distillation_loss(student.float(), teacher.float(), labels, mask, settings).loss
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(exact.item(), rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    student, teacher, labels, mask, _ = random_batch(5, torch.float32)
    half = distillation_loss(student.to(dtype), teacher.to(dtype), labels, mask, BOTH).loss
    same = distillation_loss(
        student.to(dtype).float(), teacher.to(dtype).float(), labels, mask, BOTH
    ).loss
    assert half.dtype == torch.float32
    assert torch.equal(half, same)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradcheck(seed, kind):
    student, teacher, labels, mask, segments = random_batch(seed + 40, packed=seed % 2 == 0)
    settings = dataclasses.replace(
        random_settings(seed), divergence=kind, alpha=0.4, use_calibration_smoothing=True
    )
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(z, teacher, labels, mask, settings, segments=segments).loss,
        student,
    )


@pytest.mark.parametrize("seed", range(4))
def test_closed_form_gradient(seed):
    """dz = α (softmax(z) - onehot)/N + (1 - α) T w (q - p̄)/N: the formula of the fused loss."""
    student, teacher, labels, mask, segments = random_batch(seed + 7)
    settings = dataclasses.replace(BOTH, alpha=0.3)
    valid = valid_positions(labels, mask)
    if not valid.any():
        pytest.skip("nothing to train on")
    student.requires_grad_(True)
    distillation_loss(student, teacher, labels, mask, settings).loss.backward()
    z_s, z_t = student.detach()[:, :-1], teacher[:, :-1]
    log_p = (z_t / 2).log_softmax(-1)
    epsilon = smoothing_epsilon(log_p.amax(-1).exp(), valid, 0.1)
    target = smooth_log_probs(log_p, epsilon).exp()
    weights = published_weights(entropy(z_t.log_softmax(-1)), valid)
    onehot = torch.zeros_like(z_s)
    onehot.scatter_(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1), 1.0)
    hard = z_s.softmax(-1) - onehot
    soft = weights.unsqueeze(-1) * 2 * ((z_s / 2).softmax(-1) - target)
    expected = torch.where(valid.unsqueeze(-1), 0.3 * hard + 0.7 * soft, 0.0) / valid.sum()
    assert student.grad is not None
    torch.testing.assert_close(student.grad[:, :-1], expected, rtol=1e-9, atol=1e-13)
    assert not student.grad[:, -1].any()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_equals_its_teacher_has_no_soft_loss(kind):
    student, _, labels, mask, _ = random_batch(3)
    settings = LossSettings(alpha=0.0, divergence=kind)
    loss = distillation_loss(student, student.clone(), labels, mask, settings).loss
    assert loss.item() == pytest.approx(0.0, abs=1e-14)


def test_alpha_one_is_plain_cross_entropy():
    student, teacher, labels, _, _ = random_batch(4)
    loss = distillation_loss(student, teacher, labels, None, LossSettings(alpha=1.0)).loss
    expected = torch.nn.functional.cross_entropy(
        student[:, :-1].reshape(-1, student.shape[-1]), labels[:, 1:].reshape(-1)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_high_temperature_limit():
    """T² KL → (1/2V) Σ_v (ẑ_T - ẑ_S)² with centred logits (Hinton et al. 2015, eq. 4)."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 2, 9, dtype=torch.float64)
    labels = torch.zeros(1, 2, dtype=torch.long)
    loss = distillation_loss(
        student, teacher, labels, None, LossSettings(temperature=1e4, alpha=0.0)
    ).loss
    difference = (teacher - student)[0, 0]
    difference = difference - difference.mean()
    assert loss.item() == pytest.approx((difference**2).sum().item() / (2 * 9), rel=1e-3)


@pytest.mark.parametrize("kind", SMOOTHINGS)
def test_no_smoothing_factor_means_no_smoothing(kind):
    student, teacher, labels, mask, _ = random_batch(6)
    plain = distillation_loss(student, teacher, labels, mask, LossSettings()).loss
    settings = LossSettings(use_calibration_smoothing=True, smoothing_factor=0.0, smoothing=kind)
    assert torch.equal(distillation_loss(student, teacher, labels, mask, settings).loss, plain)


def test_constant_entropy_gives_the_lowest_weight_everywhere():
    entropies = torch.full((2, 5), 1.3)
    valid = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(position_weights(entropies, valid), torch.full((2, 5), 0.5))
    assert torch.equal(position_weights(entropies, valid, "mean_one"), torch.ones(2, 5))


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_weights_properties(kind):
    torch.manual_seed(1)
    entropies = torch.rand(4, 30, dtype=torch.float64)
    valid = torch.rand(4, 30) < 0.8
    valid[2] = False
    weights = position_weights(entropies, valid, kind)
    assert not weights[~valid].any()
    assert weights.isfinite().all()
    published = position_weights(entropies, valid)
    if kind == "mean_one":
        assert weights.sum().item() == pytest.approx(valid.sum().item())
        torch.testing.assert_close(weights * published.sum() / valid.sum(), published)
    if kind == "matched":
        assert weights[valid].unique().numel() == 1
        assert weights.sum().item() == pytest.approx(published.sum().item())
    if kind == "permuted":
        torch.testing.assert_close(weights.sort(-1).values, published.sort(-1).values)
        assert not torch.equal(weights, published)
        assert torch.equal(weights, position_weights(entropies, valid, kind))
    if kind == "inverse":
        torch.testing.assert_close(
            (weights + published)[valid], torch.full_like(weights, 1.5)[valid]
        )
    if kind in ("published", "inverse"):
        rows = valid.any(-1)
        assert torch.equal(weights[rows].amax(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_permuted_control_depends_on_ranks_alone(dtype):
    torch.manual_seed(5)
    entropies = torch.stack([torch.randperm(40) for _ in range(3)]).double() / 10
    valid = torch.rand(3, 40) < 0.9
    segments = (torch.arange(40) // 15).expand(3, 40)
    noise = (torch.rand(3, 40, dtype=torch.float64) - 0.5) * 1e-4  # the gaps are 0.1
    exact = position_weights(entropies, valid, "permuted", segments)
    noisy = position_weights((entropies + noise).to(dtype), valid, "permuted", segments)
    torch.testing.assert_close(noisy.double(), exact, rtol=0, atol=1e-4)
    swapped = entropies.clone()
    first, second = valid[0].nonzero().squeeze(-1)[:2].tolist()
    swapped[0, [first, second]] = swapped[0, [second, first]]
    other = position_weights(swapped, valid, "permuted", segments)
    assert (other - exact).abs()[0].max() > 1e-2
    assert torch.equal(other[1:], exact[1:])


def test_packed_weights_equal_those_of_separate_rows():
    torch.manual_seed(2)
    a, b = torch.rand(7), torch.rand(5)
    packed = torch.cat([a, b]).unsqueeze(0)
    segments = torch.tensor([[0] * 7 + [1] * 5])
    weights = position_weights(packed, torch.ones(1, 12, dtype=torch.bool), segments=segments)
    for values, got in ((a, weights[0, :7]), (b, weights[0, 7:])):
        alone = position_weights(values[None], torch.ones(1, len(values), dtype=torch.bool))
        assert torch.equal(alone[0], got)


@pytest.mark.parametrize(
    ("kind", "expected"), [("published", 0.03), ("confident", 0.07), ("constant", 0.1)]
)
def test_epsilon(kind, expected):
    valid = torch.tensor([[True, False]])
    epsilon = smoothing_epsilon(torch.tensor([[0.7, 0.2]]), valid, 0.1, kind)
    assert epsilon[0, 0].item() == pytest.approx(expected)
    assert epsilon[0, 1] == 0


def test_smoothed_distribution_is_a_mixture():
    torch.manual_seed(3)
    log_probs = torch.randn(5, 11, dtype=torch.float64).log_softmax(-1)
    epsilon = torch.rand(5, dtype=torch.float64) * 0.9
    mixed = smooth_log_probs(log_probs, epsilon).exp()
    expected = (1 - epsilon[:, None]) * log_probs.exp() + epsilon[:, None] / 11
    torch.testing.assert_close(mixed, expected)
    assert torch.equal(smooth_log_probs(log_probs, torch.zeros(5).double()), log_probs)


def test_divergences_are_positive_and_ordered():
    torch.manual_seed(4)
    p, q = torch.randn(2, 50, 13, dtype=torch.float64).log_softmax(-1)
    for kind in DIVERGENCES:
        assert (divergence(p, q, kind) > 0).all()
    assert (divergence(p, q, "jsd") <= math.log(2)).all()
    torch.testing.assert_close(divergence(p, q, "reverse_kl"), divergence(q, p))
    # The limits that the papers state: a small skew is the plain KL.
    torch.testing.assert_close(
        divergence(p, q, "skew_kl", 1e-9), divergence(p, q), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.gradient])
def test_written_gradients_equal_autograds(name):
    torch.manual_seed(7)
    log_p, log_q = torch.randn(2, 6, 13, dtype=torch.float64).mul(3).log_softmax(-1)
    ours, theirs = (
        entry.value_and_gradient(log_p.clone(), log_q.clone(), log_q.exp(), 0.3)
        for entry in (TABLE[name], TABLE[name]._replace(gradient=None))
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_zero_probability_adds_nothing():
    p = torch.tensor([0.0, -math.inf]).double()
    q = torch.tensor([0.5, 0.5]).double().log()
    assert divergence(p, q).item() == pytest.approx(math.log(2))
    assert entropy(p).item() == 0


def test_valid_positions_by_hand():
    labels = torch.tensor([[5, 6, 7, -100, 8], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expected = torch.tensor([[True, True, False, True], [False, False, True, True]])
    assert torch.equal(valid_positions(labels, mask), expected)
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    expected = torch.tensor([[True, False, False, True], [True, True, True, False]])
    assert torch.equal(valid_positions(labels, None, segments), expected)


def test_what_stands_in_masked_positions_does_not_matter():
    student, teacher, labels, mask, _ = random_batch(11)
    clean = student.clone().requires_grad_(True)
    loss = distillation_loss(clean, teacher, labels, mask, BOTH).loss
    loss.backward()
    dead = ~torch.nn.functional.pad(valid_positions(labels, mask), (0, 1))
    dirty = student.masked_fill(dead.unsqueeze(-1), math.nan).requires_grad_(True)
    hostile = teacher.masked_fill(dead.unsqueeze(-1), math.inf)
    other = distillation_loss(dirty, hostile, labels, mask, BOTH).loss
    other.backward()
    assert torch.equal(loss, other)
    assert clean.grad is not None
    assert dirty.grad is not None
    assert torch.equal(clean.grad, dirty.grad)


def test_a_batch_without_valid_positions_has_loss_zero_and_no_gradient():
    student = torch.randn(2, 4, 5, requires_grad=True)
    labels = torch.full((2, 4), -100)
    parts = distillation_loss(student, torch.randn(2, 4, 5), labels, None, BOTH)
    parts.loss.backward()
    assert parts.loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_one_batch_of_eight_equals_eight_batches_of_one():
    torch.manual_seed(8)
    student, teacher = torch.randn(2, 8, 10, 12, dtype=torch.float64)
    labels = torch.randint(0, 12, (8, 10))
    mask = torch.ones(8, 10, dtype=torch.long)
    for row in range(8):
        mask[row, 10 - row :] = 0
    for kind, smoothing in itertools.product(WEIGHTINGS, SMOOTHINGS):
        settings = dataclasses.replace(BOTH, weighting=kind, smoothing=smoothing)
        together = student.clone().requires_grad_(True)
        whole = distillation_loss(together, teacher, labels, mask, settings)
        whole.loss.backward()
        valid = valid_positions(labels, mask)
        weights = published_weights(entropy(teacher[:, :-1].log_softmax(-1)), valid)
        doubt = 1 - (teacher[:, :-1] / 2).softmax(-1).amax(-1)
        apart = student.clone().requires_grad_(True)
        for row in range(8):
            one = slice(row, row + 1)
            distillation_loss(
                apart[one],
                teacher[one],
                labels[one],
                mask[one],
                settings,
                num_positions=valid.sum(),
                weight_mean=weights.sum() / valid.sum(),
                uncertainty_mean=doubt[valid].mean(),
            ).loss.backward()
        torch.testing.assert_close(together.grad, apart.grad, rtol=1e-9, atol=1e-14)


def test_segments_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    expected = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    assert torch.equal(segments_from_positions(positions), expected)


def test_vocabularies_must_agree():
    with pytest.raises(ValueError, match="one tokenizer"):
        distillation_loss(
            torch.zeros(1, 2, 5), torch.zeros(1, 2, 6), torch.zeros(1, 2, dtype=torch.long)
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", math.inf),
        ("alpha", 1.5),
        ("smoothing_factor", 1.0),
        ("divergence_weight", 0.0),
        ("weighting", "heavier"),
        ("smoothing", "rough"),
        ("divergence", "distance"),
    ],
)
def test_bad_settings_name_the_flag(name, value):
    with pytest.raises(ValueError, match=f"--{name} must be"):
        LossSettings(**{name: value})


def test_unknown_weightings_and_smoothings_are_refused():
    values, valid = torch.rand(1, 3), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="weighting must be one of published"):
        position_weights(values, valid, "heavier")
    with pytest.raises(ValueError, match="smoothing must be one of published"):
        smoothing_epsilon(values, valid, 0.1, "rough")


@pytest.mark.parametrize(
    ("changes", "suffix"),
    [
        ({"optimizer": "muon", "other_learning_rate": 1e-3}, "-muon"),
        ({"early_stopping": 4}, "-stop4"),
        ({"tokenizer": "t", "teacher_model": None, "loss": LossSettings(alpha=1.0)}, "-untaught"),
        ({"student": StudentSettings(dropout=0.1), "init_from": "a/b/"}, "-drop0.1-init-b"),
        ({"loss": LossSettings(divergence="jsd"), "seed": 1}, "-jsd0.5-s1"),
    ],
)
def test_records_and_names_of_runs(changes, suffix):
    """A setting that older records lack is recorded only where it is not the default."""
    settings = TrainSettings(**changes)
    added = {"optimizer", "other_learning_rate", "tokenizer", "early_stopping"}
    assert added & set(as_recorded(settings)) == added & set(changes)
    assert default_run_name(settings).endswith(f".uniprot{suffix}")


def test_the_hard_loss_alone_needs_no_means_of_the_teacher():
    weighted = LossSettings(use_uncertainty_weighting=True, weighting="mean_one")
    assert weighted.needs_batch_means
    assert not dataclasses.replace(weighted, alpha=1.0).needs_batch_means


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"other_learning_rate": 1e-3}, "--other_learning_rate: needs --optimizer muon"),
        ({"tokenizer": "t"}, "--tokenizer: .* give --alpha 1"),
        ({"max_steps": 0}, "--max_steps must be from 1 to .*, or -1"),
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"skip_loss_spikes": 1.0}, "--skip_loss_spikes must be above 1, got"),
        ({"skip_loss_spikes": math.nan}, "--skip_loss_spikes must be above 1, got"),
        ({"early_stopping": 0}, "--early_stopping must be at least 1"),
        ({"seed": 1 << 32}, "--seed must be"),
        ({"data_seed": -1}, "--data_seed must be"),
        ({"num_train_epochs": 1e300}, "--num_train_epochs must be"),
        ({"train_size_prop": 0.0}, r"--train_size_prop must be in \(0, 1\], got 0.0"),
        ({"weight_decay": math.nan}, "--weight_decay must be from 0 to"),
        ({"precision": "fp8"}, "--precision must be one of auto, fp32"),
    ],
)
def test_bad_training_settings_name_the_flag(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**changes)
