"""The Triton kernels against plain PyTorch: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.common.settings import DIVERGENCES, LossSettings
from src.loss import elementwise, fused
from src.loss.chunks import OutputHead
from src.loss.divergences import Divergence
from src.loss.elementwise import Scratch
from src.loss.fused import StudentStates, fused_distillation_losses, teacher_statistics
from tests import loss_cases
from tests.conftest import run_python

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton = pytest.importorskip("triton")
if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("without a GPU they need Triton's interpreter", allow_module_level=True)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def kernels():
    from src.loss import kernels

    return kernels


@pytest.fixture
def forced(kernels, monkeypatch):
    monkeypatch.setenv(fused.KERNELS_VARIABLE, "triton")
    return kernels


def random_settings(seed: int, **fixed) -> LossSettings:
    """Return random settings without permuted weights: ranks may differ in the last digits."""
    settings = loss_cases.random_settings(seed, **fixed)
    if settings.weighting == "permuted":
        return loss_cases.random_settings(seed, **{**fixed, "weighting": "inverse"})
    return settings


def random_chunk(seed: int, vocabulary: int | None = None, dtype=torch.float32) -> SimpleNamespace:
    """Logits whose rows have room behind them or not, some far from zero, as those of GPT-2 are."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = rng.randint(1, 5)
    vocabulary = vocabulary or rng.choice([2, 17, 64, 323, 5003])

    def logits(spread: float, offset: float) -> torch.Tensor:
        room = vocabulary if rng.random() < 0.3 else -(-vocabulary // 64) * 64
        values = torch.randn(rows, room) * spread + offset
        return values.to(dtype).to(DEVICE)[:, :vocabulary]

    return SimpleNamespace(
        student=logits(rng.choice([0.1, 1.0, 5.0]), rng.choice([-80.0, 0.0, 30.0])),
        teacher=logits(rng.choice([0.1, 1.0, 5.0]), rng.choice([-80.0, 0.0, 30.0])),
        targets=torch.randint(0, vocabulary, (rows,), device=DEVICE),
        weights=torch.rand(rows, device=DEVICE) + 0.5,
    )


def results(module, chunk, settings, with_gradient=True, exact=False):
    """Losses and the gradient written over a copy of the logits that keeps their strides."""
    kind = torch.float64 if exact else None
    backing = chunk.student if chunk.student._base is None else chunk.student._base
    assert backing is not None
    copy = backing.detach().clone().to(kind)
    student = copy[:, : chunk.student.shape[1]]
    teacher = None if settings.alpha == 1.0 else chunk.teacher.to(kind)
    given = (student, teacher, chunk.targets, chunk.weights.to(kind))
    losses = module.chunk_losses(*given, settings, 0.3, with_gradient, Scratch())
    return losses, student, copy


@pytest.mark.parametrize("seed", range(24))
def test_losses_and_gradients_equal_plain_pytorch(kernels, seed):
    chunk, settings = random_chunk(seed), random_settings(seed)
    found, dz, _ = results(kernels, chunk, settings)
    expected, exact, _ = results(elementwise, chunk, settings, exact=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=3e-6)
    assert (dz.double() - exact).norm() <= 1e-5 * exact.norm() + 1e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("smooth", [False, True])
def test_the_vocabulary_of_protgpt2(kernels, divergence, smooth):
    """50,257 is no power of two: the last of 13 blocks is mostly empty."""
    settings = LossSettings(use_calibration_smoothing=smooth, divergence=divergence)
    chunk = random_chunk(3, vocabulary=50_257)
    found, dz, _ = results(kernels, chunk, settings)
    expected, exact, _ = results(elementwise, chunk, settings, exact=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=3e-6)
    assert (dz.double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(2))
def test_half_precision_logits_are_worked_on_in_float32(kernels, dtype, seed):
    chunk = random_chunk(seed, 323, dtype)
    settings = random_settings(seed, alpha=0.4)
    found, dz, _ = results(kernels, chunk, settings)
    expected, exact, _ = results(elementwise, chunk, settings, exact=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=3e-6)
    # Rounded once, where it is written; float16 knows nothing below 6e-8.
    rounding = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * 1e-3
    assert ((dz.double() - exact).abs() <= rounding + 1e-6).all()


@pytest.mark.parametrize("seed", range(3))
def test_without_a_gradient_the_logits_are_left_alone(kernels, seed):
    chunk, settings = random_chunk(seed), random_settings(seed)
    with_gradient, _, _ = results(kernels, chunk, settings)
    without, student, _ = results(kernels, chunk, settings, with_gradient=False)
    assert torch.equal(student, chunk.student)
    for ours, theirs in zip(without, with_gradient, strict=True):
        assert torch.equal(ours, theirs)


def test_what_stands_behind_a_row_is_left_alone(kernels):
    chunk = random_chunk(1, 323)
    wider = torch.randn(4, 384, device=DEVICE)
    chunk.student = wider[:, :323]
    chunk.teacher = torch.randn(4, 323, device=DEVICE)
    chunk.targets, chunk.weights = (t[:1].repeat(4) for t in (chunk.targets, chunk.weights))
    behind = wider[:, 323:].clone()
    _, dz, whole = results(kernels, chunk, LossSettings())
    assert torch.equal(whole[:, 323:], behind)
    assert not torch.equal(dz, chunk.student)


@pytest.mark.parametrize("seed", range(3))
def test_statistics_of_the_teacher(kernels, seed):
    logits = random_chunk(seed).teacher
    temperature = [1.0, 2.0, 0.7][seed % 3]
    found = kernels.distribution_statistics(logits, temperature, Scratch())
    expected = elementwise.distribution_statistics(logits.double(), temperature, Scratch())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_fused_loss_with_the_kernels(forced, monkeypatch, seed):
    """The whole loss, with weights and means over the batch, gives what it gives without them."""
    settings = random_settings(seed, alpha=[0.5, 1.0][seed % 4 == 0])
    torch.manual_seed(seed)
    labels = torch.randint(0, 37, (3, 11), device=DEVICE)
    teacher = (torch.randn(3, 11, 5, device=DEVICE), OutputHead(torch.randn(37, 5, device=DEVICE)))
    found = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv(fused.KERNELS_VARIABLE, choice)
        torch.manual_seed(seed)
        hidden = torch.randn(3, 11, 6, device=DEVICE, requires_grad=True)
        weight = torch.randn(37, 6, device=DEVICE, requires_grad=True)
        student = StudentStates(hidden, OutputHead(weight), settings)
        (parts,) = fused_distillation_losses([student], *teacher, labels)
        parts.loss.backward()
        means = (parts.loss, parts.mean_weight, parts.mean_epsilon, parts.teacher_entropy)
        assert hidden.grad is not None
        assert weight.grad is not None
        found.append([t.detach() for t in (*means, hidden.grad, weight.grad)])
        statistics = teacher_statistics(*teacher, temperature=2.0)
        found[-1] += [statistics.entropy, statistics.max_prob]
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_rows(kernels):
    empty = torch.empty(0, 9, device=DEVICE)
    losses = kernels.chunk_losses(
        empty, empty, empty[:, 0].long(), empty[:, 0], LossSettings(), None, True, Scratch()
    )
    assert [len(column) for column in losses] == [0, 0, 0]
    assert len(kernels.distribution_statistics(empty, 1.0, Scratch()).entropy) == 0


def test_a_divergence_without_a_kernel_is_refused(kernels, monkeypatch):
    z = torch.zeros(1, 9, device=DEVICE)
    for name, entry, message in (
        ("made_up", None, "divergence must be one of .*, got 'made_up'"),
        ("new", Divergence(lambda log_p, log_q, weight: log_p[..., 0]), "no Triton kernel"),
    ):
        settings = loss_cases.settings_with(monkeypatch, name, entry)
        with pytest.raises(ValueError, match=message):
            kernels.chunk_losses(z, z, z[:, 0].long(), z[:, 0], settings, None, True, Scratch())


def test_the_kernels_check_themselves(kernels, monkeypatch):
    kernels.check_against_torch(torch.device(DEVICE))
    monkeypatch.setattr(kernels, "_smoothing", lambda settings, mean: (0.2, 0.0))
    with pytest.raises(RuntimeError, match="differ"):
        kernels.check_against_torch(torch.device(DEVICE))


def test_what_is_chosen(forced, monkeypatch):
    single, double = (torch.zeros(1, 4, dtype=d, device=DEVICE) for d in (None, torch.float64))
    assert fused.elementwise_for(single, None) is forced
    assert fused.elementwise_for(single, double) is elementwise
    monkeypatch.setenv(fused.KERNELS_VARIABLE, "torch")
    assert fused.elementwise_for(single) is elementwise
    monkeypatch.delenv(fused.KERNELS_VARIABLE)
    assert fused.elementwise_for(single) is (forced if DEVICE == "cuda" else elementwise)
    monkeypatch.setenv(fused.KERNELS_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="one of auto, torch, triton, got 'cuda'"):
        fused.elementwise_for(single)


def test_forcing_them_where_they_cannot_run_is_refused(forced, monkeypatch):
    logits = torch.zeros(1, 4)
    monkeypatch.setattr(forced, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        fused.elementwise_for(logits)
    monkeypatch.delitem(sys.modules, "src.loss.kernels")
    monkeypatch.delattr("src.loss.kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="Triton cannot be imported"):
        fused.elementwise_for(logits)


def test_kernels_that_fail_leave_the_loss_to_pytorch_with_a_warning(forced, monkeypatch):
    def fail(device):
        raise OSError("no C compiler")

    monkeypatch.setattr(forced, "check_against_torch", fail)
    fused._kernels_that_agree.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch: no C compiler"):
        assert fused._kernels_that_agree(torch.device(DEVICE)) is None
    fused._kernels_that_agree.cache_clear()


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from src.loss import kernels

KIND = int(sys.argv[1])
LOSSES = {"KIND": KIND, "SMOOTH": True, "GRADIENT": True, "POWER": 2}

def kind(name):
    if name in ("student_ptr", "teacher_ptr", "logits_ptr"):
        return "*bf16"
    if name.endswith("_ptr"):
        return "*i64" if name == "targets_ptr" else "*fp32"
    whole = name.endswith(("stride", "width")) or name in ("rows", "vocabulary")
    return "i32" if whole else "fp32"

for kernel, fixed in ((kernels._losses, LOSSES), (kernels._statistics, {})):
    fixed = {**fixed, "BLOCK": kernels.BLOCK}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in fixed else kind(n) for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if n.endswith(("_ptr", "stride", "width"))}
    constants = {(names.index(n),): value for n, value in fixed.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 80, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]
    narrow = ptx.count("ld.global.b16") + ptx.count("st.global.b16")
    print(narrow, ptx.count("ld.global.v4"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(5))
def test_they_compile_for_a_gpu_that_is_not_there(kind):
    """Down to machine code, and with wide loads although 50,257 is odd: one logit is read alone."""
    done = run_python("-c", COMPILE, kind, variables={"TRITON_INTERPRET": None})
    assert done.returncode == 0, done.stderr[-2000:]
    losses, statistics = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert losses[0] == 1
    assert statistics[0] == 0
    assert losses[1] > 0 < statistics[1]


@pytest.mark.gpu
def test_the_true_shape_on_a_gpu(monkeypatch):
    """8,192 positions of ProtGPT2's vocabulary in bfloat16: as plain PyTorch has it."""
    torch.manual_seed(0)
    labels = torch.randint(0, 50_257, (16, 512), device="cuda")
    make = {"device": "cuda", "dtype": torch.bfloat16}
    teacher = (
        torch.randn(16, 512, 1280, **make),
        OutputHead(torch.randn(50_257, 1280, **make) / 36),
    )
    settings = LossSettings(use_uncertainty_weighting=True, use_calibration_smoothing=True)
    found = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv(fused.KERNELS_VARIABLE, choice)
        torch.manual_seed(1)
        hidden = torch.randn(16, 512, 512, **make, requires_grad=True)
        weight = (torch.randn(50_257, 512, **make) / 22).requires_grad_()
        student = StudentStates(hidden, OutputHead(weight), settings)
        (parts,) = fused_distillation_losses([student], *teacher, labels)
        parts.loss.backward()
        found.append([parts.loss.detach(), hidden.grad, weight.grad])
    for ours, theirs in zip(*found, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 2e-3 * theirs.float().norm()
