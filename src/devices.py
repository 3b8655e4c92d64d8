"""Where a model runs, in what precision, and how much memory it has held there."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device; pass --device cpu or auto")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; ``auto`` is bf16 on a CUDA device that has it, else fp32.

    Raises:
        ValueError: fp16 is asked for on a CPU, where gradients of a small loss vanish unscaled.
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    return name


def weights_dtype(precision: str) -> torch.dtype:
    """Return the dtype in which a teacher is held."""
    return DTYPES[precision]


def peak_memory(device: torch.device) -> int:
    """Return the most memory held so far, in bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return what a device is, for the record."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": device.type, "threads": torch.get_num_threads()}
