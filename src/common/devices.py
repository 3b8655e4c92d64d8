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
    """Return the device ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is CUDA if available.

    Raises:
        ValueError: the name is another, or this machine does not have the device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device(name)
    match = re.fullmatch(r"cuda(?::(0|[1-9][0-9]{0,3}))?", name)
    if match is None:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name[:40]!r}")
    if not count:
        raise ValueError(f"--device {name}: PyTorch sees no CUDA device; pass --device cpu or auto")
    if int(match[1] or 0) >= count:
        raise ValueError(f"--device {name}: there are cpu and cuda:0 to cuda:{count - 1}")
    return torch.device(name)


def machine_memory() -> int:
    """Return the memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_precision(name: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; ``auto`` is bf16 on a CUDA device that has it, else fp32.

    Raises:
        ValueError: fp16 on a CPU, where small gradients vanish without loss scaling.
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    return name


def weights_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a teacher's weights."""
    return DTYPES[precision]


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return type and name of a device, for a run's record."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": device.type, "threads": torch.get_num_threads()}
