"""Which devices there are."""

from __future__ import annotations

import pytest
import torch

from src.common import devices


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", ["meta", "xpu", "mps", "cpu:1", "cuda:", "cuda:-1", "cuda:01", ""])
def test_other_devices_are_refused(monkeypatch, count, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match="must be auto, cpu, cuda or cuda:N, got"):
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


def test_the_memory_of_this_machine():
    assert 1 << 28 < devices.machine_memory() < 1 << 50
