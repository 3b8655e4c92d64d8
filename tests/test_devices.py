"""Which devices there are."""

from __future__ import annotations

import pytest
import torch

from src.common import devices


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize(
    "name", ["meta", "xpu", "mps:0", "cpu:1", "cuda:", "cuda:-1", "cuda:01", ""]
)
def test_other_devices_are_refused(monkeypatch, count, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match="must be auto, cpu, cuda, cuda:N or mps, got"):
        devices.choose_device(name)


def test_those_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = {name: str(devices.choose_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")}
    assert chosen == {"auto": "cuda", "cpu": "cpu", "cuda": "cuda", "cuda:1": "cuda:1"}
    with pytest.raises(ValueError, match="--device cuda:2: there are cpu and cuda:0 to cuda:1"):
        devices.choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(devices.choose_device("auto")) == "cpu"
    with pytest.raises(ValueError, match="--device cuda:0: PyTorch sees no CUDA device"):
        devices.choose_device("cuda:0")


def test_mps_is_a_device_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: PyTorch sees no GPU of a Mac"):
        devices.choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [devices.choose_device(name).type for name in ("auto", "mps", "cpu")] == [
        "mps",
        "mps",
        "cpu",
    ]
    assert devices.choose_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_bf16_is_chosen_only_where_it_is_native(monkeypatch, native, chosen):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert devices.choose_precision("auto", torch.device("cuda")) == chosen


def test_several_gpus_in_one_process_are_answered_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        devices.require_one_gpu("auto")
    devices.require_one_gpu("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    devices.require_one_gpu("auto")


def test_the_memory_of_this_machine():
    assert 1 << 28 < devices.machine_memory() < 1 << 50
