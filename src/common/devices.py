"""Chooses device and precision, and measures memory."""

from __future__ import annotations

import os
import re
import resource
import sys
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` is CUDA if available, else the GPU of a Mac (``mps``), else the CPU.

    Raises:
        ValueError: the name is another, or this machine does not have the device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("--device mps: PyTorch sees no GPU of a Mac; pass --device cpu")
        return torch.device(name)
    match = re.fullmatch(r"cuda(?::(0|[1-9][0-9]{0,3}))?", name)
    if match is None:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name[:40]!r}")
    if not count:
        raise ValueError(f"--device {name}: PyTorch sees no CUDA device; pass --device cpu or auto")
    if int(match[1] or 0) >= count:
        raise ValueError(f"--device {name}: there are cpu and cuda:0 to cuda:{count - 1}")
    return torch.device(name)


def require_one_gpu(device_name: str) -> None:
    """Refuse to train with several visible GPUs in one process, before anything is loaded.

    Raises:
        ValueError: one process would drive several GPUs.
    """
    if device_name == "cpu" or not torch.cuda.is_available():
        return
    if (count := torch.cuda.device_count()) > 1:
        raise ValueError(
            f"one process would drive {count} GPUs: start it with 'torchrun --nproc_per_node "
            f"{count} scripts/train.py ...', or choose one with CUDA_VISIBLE_DEVICES=0"
        )


def machine_memory() -> int:
    """Return the memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_precision(name: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16.

    ``auto`` is bf16 on a CUDA device that computes in it (T4 and V100 only emulate it), fp16 on
    another CUDA device, and fp32 elsewhere.

    Raises:
        ValueError: fp16 on a CPU, where small gradients vanish without loss scaling.
    """
    if name == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device.type != "cuda":
        raise ValueError("--precision fp16 needs a CUDA device: use bf16 or fp32 here")
    return name


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return type and name of a device, for a run's record."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": device.type, "threads": torch.get_num_threads()}
