"""The fused loss against the plain one: values, gradients, and everything that must not matter."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from src.common.settings import DIVERGENCES, LossSettings
from src.loss import elementwise
from src.loss.chunks import OutputHead
from src.loss.divergences import Divergence
from src.loss.elementwise import Scratch
from src.loss.fused import (
    KERNELS_VARIABLE,
    StudentStates,
    elementwise_for,
    fused_distillation_losses,
    teacher_statistics,
)
from src.loss.reference import (
    distillation_loss,
    divergence,
    entropy,
    smooth_log_probs,
    smoothing_epsilon,
    valid_positions,
)
from tests.loss_cases import random_settings, settings_with

PARTS = ("loss", "hard", "soft", "mean_weight", "mean_epsilon", "teacher_entropy")


@dataclasses.dataclass
class Batch:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    teacher: tuple[Any, Any]
    shape: tuple
    labels: torch.Tensor
    mask: torch.Tensor | None
    segments: torch.Tensor | None

    def student(self, settings: LossSettings, dtype=None) -> StudentStates:
        """Leaves of their own, so that gradients do not mix."""
        tensors = [
            None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_()
            for t in (self.hidden, self.weight, self.bias)
        ]
        hidden, weight, bias = tensors
        assert hidden is not None
        return StudentStates(hidden, OutputHead(weight, bias, *self.shape), settings)

    def reference(self, student: StudentStates, **options):
        return distillation_loss(
            plain_logits(student.hidden, student.head),
            plain_logits(*self.teacher),
            self.labels,
            self.mask,
            student.settings,
            segments=self.segments,
            **options,
        )

    def fused(self, student: StudentStates, **options):
        (parts,) = self.fused_all([student], **options)
        return parts

    def fused_all(self, students: list[StudentStates], **options):
        hidden, head = self.teacher
        return fused_distillation_losses(
            students,
            hidden,
            head,
            self.labels,
            self.mask,
            segments=self.segments,
            **options,
        )


def plain_logits(hidden, head: OutputHead):
    """The definition, in one line of its own."""
    z = hidden if head.weight is None else F.linear(hidden, head.weight, head.bias) * head.scale
    return z if head.cap is None else head.cap * torch.tanh(z / head.cap)


def random_batch(seed: int, dtype=torch.float64, vocabulary: int | None = None) -> Batch:
    """Random shape, bias, padding on either side, ignored labels; every third one is packed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, width = rng.randint(1, 4), rng.randint(2, 14)
    vocabulary = vocabulary or rng.randint(2, 24)
    features, teacher_features = rng.randint(1, 8), rng.randint(1, 8)
    scale = rng.choice([0.1, 1.0, 3.0])

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype)

    hidden, weight = normal(rows, width, features), normal(vocabulary, features) * scale
    teacher = (normal(rows, width, teacher_features), normal(vocabulary, teacher_features))
    bias, teacher_bias = (normal(vocabulary) if rng.random() < 0.4 else None for _ in range(2))
    labels = torch.randint(0, vocabulary, (rows, width))
    labels = labels.masked_fill(torch.rand(rows, width) < 0.1, -100)
    mask = segments = None
    if seed % 3 == 0:
        cuts = torch.rand(rows, width) < 0.25
        segments = cuts.long().cumsum(-1)
        labels = labels.masked_fill(cuts, -100)
    else:
        mask = torch.ones(rows, width, dtype=torch.long)
        for row in range(rows):
            padding = rng.randint(0, width)
            mask[row, width - padding :] = 0
            if rng.random() < 0.5:
                mask[row] = mask[row].flip(0)
    # Every fifth student and every seventh teacher has a scaled and capped head.
    shape, teacher_shape = (
        (0.7, 2.0) if seed % every == 1 else (1.3, None) if seed % every == 2 else (1.0, None)
        for every in (5, 7)
    )
    teacher_head = OutputHead(teacher[1], teacher_bias, *teacher_shape)
    return Batch(hidden, weight, bias, (teacher[0], teacher_head), shape, labels, mask, segments)


def gradients(parts, student: StudentStates) -> list[torch.Tensor]:
    leaves = [t for t in (student.hidden, *student.head[:2]) if t is not None]
    return list(torch.autograd.grad(parts.loss, leaves))


def assert_same(ours, theirs, rtol: float, atol: float = 0.0) -> None:
    """Gradients are compared by their norms: single elements may cancel to nothing."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        distance = (one.double() - other.double()).norm()
        assert distance <= rtol * other.double().norm() + atol


def assert_same_parts(ours, theirs, rtol: float, atol: float = 0.0, names=PARTS) -> None:
    for name in names:
        expected = getattr(theirs, name).item()
        assert getattr(ours, name).item() == pytest.approx(expected, rel=rtol, abs=atol), name
    assert ours.positions.item() == theirs.positions.item()


def names_for(settings: LossSettings) -> tuple[str, ...]:
    """With α = 1 the teacher is not looked at, so its figures are not reported."""
    return ("loss", "hard") if settings.alpha == 1.0 else PARTS


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_plain_loss_in_float64(seed):
    batch, settings = random_batch(seed), random_settings(seed)
    mine, plain = batch.student(settings), batch.student(settings)
    options = {} if seed % 2 else {"num_positions": 100, "weight_mean": 0.7}
    ours = batch.fused(mine, chunk_tokens=[None, 1, 5][seed % 3], **options)
    theirs = batch.reference(plain, **options)
    assert_same_parts(ours, theirs, 1e-9, 1e-12, names_for(settings))
    assert_same(gradients(ours, mine), gradients(theirs, plain), 1e-9, 1e-13)


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_plain_loss_in_float32(seed):
    batch = random_batch(seed, torch.float32)
    settings = random_settings(seed)
    mine, exact = batch.student(settings), batch.student(settings, torch.float64)
    ours = batch.fused(mine)
    batch.teacher = tuple(t.to(torch.float64) for t in batch.teacher)
    theirs = batch.reference(exact)
    assert ours.loss.dtype == torch.float32
    assert_same_parts(ours, theirs, 1e-5, 1e-6, names_for(settings))
    expected = [g.float() for g in gradients(theirs, exact)]
    assert_same(gradients(ours, mine), expected, 2e-5, 1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_half_precision_products_are_summed_in_float32(seed):
    """bfloat16 inputs: only the logits and the products with dz are rounded, never the sums."""
    batch = random_batch(seed, torch.float32)
    settings = random_settings(seed, weighting="published", smoothing="published")
    teacher_hidden, teacher_head = batch.teacher
    for tensors in (batch.hidden, batch.weight, teacher_hidden, *teacher_head[:2]):
        if tensors is not None:
            tensors.copy_(tensors.bfloat16().float())
    half = batch.student(settings, torch.bfloat16)
    exact = batch.student(settings, torch.float64)
    single = batch.teacher
    batch.teacher = tuple(t.to(torch.bfloat16) for t in single)
    ours = batch.fused(half)
    batch.teacher = tuple(t.to(torch.float64) for t in single)
    theirs = batch.reference(exact)
    assert ours.loss.dtype == torch.float32
    names = tuple(n for n in ("loss", "hard", "soft") if n in names_for(settings))
    assert_same_parts(ours, theirs, 0.03, 0.03, names)
    found = [g.float() for g in gradients(ours, half)]
    expected = [g.float() for g in gradients(theirs, exact)]
    assert_same(found, expected, 0.06, 0.02)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("seed", range(2))
def test_gradcheck(divergence, seed):
    batch = random_batch(100 + seed, vocabulary=5)
    for name in ("hidden", "labels", "mask", "segments"):
        value = getattr(batch, name)
        setattr(batch, name, None if value is None else value[:2])
    batch.teacher = (batch.teacher[0][:2], *batch.teacher[1:])
    settings = random_settings(seed, divergence=divergence, alpha=0.4)
    student = batch.student(settings)
    leaves = [t for t in (student.hidden, *student.head[:2]) if t is not None]

    def loss(hidden, weight, bias=None):
        head = OutputHead(weight, bias, *batch.shape)
        return batch.fused(StudentStates(hidden, head, settings), chunk_tokens=3).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("seed", range(4))
def test_students_that_share_a_pass_get_the_bits_of_students_alone(seed):
    batch = random_batch(seed, torch.float32, vocabulary=37)
    kinds = [random_settings(seed * 10 + k) for k in range(4)]
    together, alone = ([batch.student(s) for s in kinds] for _ in range(2))
    # A wider student beside them: sizes may differ.
    wide = StudentStates(
        torch.randn(*batch.labels.shape, 11, requires_grad=True),
        OutputHead(torch.randn(37, 11, requires_grad=True)),
        kinds[0],
    )
    shared = batch.fused_all([*together, wide])
    for parts, one, other in zip(shared, together, alone, strict=False):
        single = batch.fused(other)
        for name in PARTS:
            assert torch.equal(getattr(parts, name), getattr(single, name)), name
        for a, b in zip(gradients(parts, one), gradients(single, other), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7])
def test_statistics_by_chunks(chunk_tokens):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(4, 9, 6), torch.randn(21, 6), torch.randn(21)
    logits = F.linear(hidden, weight, bias)
    valid = torch.rand(4, 9) < 0.7
    found = teacher_statistics(
        hidden, OutputHead(weight, bias), valid, 2.0, chunk_tokens=chunk_tokens
    )
    for ours, theirs in (
        (found.entropy, entropy(logits.log_softmax(-1))),
        (found.max_logit, logits.amax(-1)),
        (found.log_sum_exp, logits.logsumexp(-1)),
        (found.max_prob, (logits / 2.0).softmax(-1).amax(-1)),
    ):
        assert torch.allclose(ours, torch.where(valid, theirs, 0.0), atol=1e-5)


def test_cached_entropies_give_the_same_loss():
    for seed in range(8):
        batch = random_batch(seed)
        settings = random_settings(seed, use_uncertainty_weighting=True, alpha=0.5)
        figures = teacher_statistics(*batch.teacher)
        one, other = batch.student(settings), batch.student(settings)
        plain = batch.fused(one)
        cached = batch.fused(other, teacher_entropy=figures.entropy)
        assert_same_parts(cached, plain, 1e-9, 1e-12)


def test_no_tensor_of_the_batchs_logits_is_made():
    """Of 512 positions and 4,096 tokens nothing as large as a quarter of the logits exists."""
    batch = random_batch(1, torch.float32, vocabulary=4096)
    rows, width = 4, 128
    batch.hidden, batch.labels = torch.randn(rows, width, 8), torch.randint(0, 4096, (rows, width))
    batch.weight, batch.bias, batch.mask, batch.segments = torch.randn(4096, 8), None, None, None
    batch.shape = (1.0, None)
    batch.teacher = (torch.randn(rows, width, 8), OutputHead(torch.randn(4096, 8)))
    student = batch.student(LossSettings())
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        batch.fused(student, chunk_tokens=64).loss.backward()
    assert 0 < largest < rows * width * 4096 * 4 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((2, 5), 99)}, "outside the vocabulary"),
        ({"labels": torch.zeros(2, 6, dtype=torch.long)}, "do not fit labels"),
        ({"teacher_hidden": None}, "needed unless alpha is 1"),
        ({"teacher_head": OutputHead(torch.randn(8, 3))}, "vocabulary of"),
        ({"student_weight": torch.randn(9, 2)}, "features, their head"),
        ({"teacher_entropy": torch.zeros(3, 3)}, "do not fit a batch"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    inputs = {
        "teacher_hidden": torch.randn(2, 5, 3),
        "teacher_head": OutputHead(torch.randn(9, 3)),
        "labels": torch.randint(0, 9, (2, 5)),
    }
    head = change.pop("student_weight", torch.randn(9, 4))
    student = StudentStates(torch.randn(2, 5, 4), OutputHead(head), LossSettings())
    with pytest.raises(ValueError, match=message):
        fused_distillation_losses([student], **{**inputs, **change})


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_batch_without_a_valid_position_costs_nothing(alpha):
    student = StudentStates(
        torch.randn(2, 5, 4, requires_grad=True),
        OutputHead(torch.randn(9, 4, requires_grad=True)),
        LossSettings(alpha=alpha),
    )
    labels = torch.full((2, 5), -100)
    teacher = (torch.randn(2, 5, 3), OutputHead(torch.randn(9, 3)))
    (parts,) = fused_distillation_losses([student], *teacher, labels)
    assert parts.loss.item() == 0
    assert valid_positions(labels).sum() == 0
    assert all((g == 0).all() for g in gradients(parts, student))


def total_variation(log_p, log_q, weight):
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def scaled_kl(log_p, log_q, weight):
    return weight * (log_p.exp() * (log_p - log_q)).sum(-1)


def scaled_kl_gradient(log_p, log_q, q, weight):
    value = scaled_kl(log_p, log_q, weight).unsqueeze(-1)
    return value.double(), weight * (q - log_p.exp())


@pytest.mark.parametrize(
    ("value", "gradient"),
    [(total_variation, None), (scaled_kl, None), (scaled_kl, scaled_kl_gradient)],
)
@pytest.mark.parametrize("smooth", [False, True])
def test_a_new_entry_of_the_table_works_in_every_form(value, gradient, smooth, monkeypatch):
    entry = Divergence(value, gradient)
    settings = settings_with(monkeypatch, "new", entry, alpha=0.3, use_calibration_smoothing=smooth)
    batch = random_batch(1)
    mine, plain = batch.student(settings), batch.student(settings)
    ours, theirs = batch.fused(mine, chunk_tokens=5), batch.reference(plain)
    assert theirs.soft > 0
    assert_same_parts(ours, theirs, 1e-9, 1e-12)
    assert_same(gradients(ours, mine), gradients(theirs, plain), 1e-9, 1e-13)
    # The element-wise form against the formula itself, in float64.
    z, taught = torch.randn(2, 6, 11, dtype=torch.float64)
    z.requires_grad_()
    log_p, log_q = (taught / 2).log_softmax(-1), (z / 2).log_softmax(-1)
    everywhere = torch.ones(6, dtype=torch.bool)
    if smooth:
        log_p = smooth_log_probs(log_p, smoothing_epsilon(log_p.amax(-1).exp(), everywhere, 0.1))
    soft = value(log_p, log_q, 0.5)
    assert torch.equal(divergence(log_p, log_q, "new"), soft)
    targets = torch.arange(6)
    hard = F.cross_entropy(z, targets, reduction="none")
    (expected,) = torch.autograd.grad((0.3 * hard + 0.7 * 4 * soft).sum(), z)
    dz = z.detach().clone()
    weights = torch.ones(6, dtype=torch.float64)
    losses = elementwise.chunk_losses(dz, taught, targets, weights, settings, None, True, Scratch())
    torch.testing.assert_close(losses.soft, soft)
    torch.testing.assert_close(dz, expected)
    # It has no kernel: where kernels are used, and even demanded, plain PyTorch does the work.
    monkeypatch.setenv(KERNELS_VARIABLE, "triton")
    assert elementwise_for(dz.float(), divergence="new") is elementwise


def test_a_divergence_that_the_table_lacks_is_refused_in_every_form(monkeypatch):
    settings = settings_with(monkeypatch, "made_up", None)
    batch = random_batch(1)
    student = batch.student(settings)
    z, targets, weights = torch.randn(3, 5), torch.arange(3), torch.ones(3)
    options = (settings, None, True, Scratch())
    for form in (
        lambda: divergence(z, z, "made_up"),
        lambda: batch.reference(student),
        lambda: elementwise.chunk_losses(z, z, targets, weights, *options),
        lambda: batch.fused(student),
    ):
        with pytest.raises(ValueError, match="divergence must be one of .*, got 'made_up'"):
            form()
