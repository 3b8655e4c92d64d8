"""Spreads a frozen teacher's blocks over processes, if it does not fit one device.

The weights of each block are split evenly (fully sharded data parallel, Zhao et al. 2023,
arXiv:2304.11277): gathered before the block runs and dropped after it. A process holds 1/N of the
blocks and one or two whole blocks at a time. Embeddings and output head stay whole, because the
loss reads the head. The teacher's outputs are the same to the bit.

All processes must run the teacher equally often, because each gathering needs all of them. If their
shares differ, :func:`in_step` runs the teacher on single tokens in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from src.common import processes
from src.models.forward import block_lists, final_hidden_states, states_shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

T = TypeVar("T")


def load_sharded(
    load: Callable[[], tuple[PreTrainedModel, T]], device: torch.device
) -> tuple[PreTrainedModel, T]:
    """Load a teacher in one process after the other, and keep one share on each ``device``.

    The machine's memory holds only one whole copy at a time, and a device none. ``load`` returns
    the teacher, on the CPU, and a second value computed while it is whole.

    Returns:
        The teacher, and the second value of ``load``.

    Raises:
        ValueError: there is only one process, or the model has no list of blocks.
    """
    if processes.count() == 1:
        raise ValueError(
            "--shard_teacher spreads the teacher over several processes: start them with torchrun"
        )
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (processes.count(),))

    def load_share() -> tuple[PreTrainedModel, T]:
        whole, more = load()
        shard(whole, mesh, device)
        return whole, more

    teacher, more = processes.in_turn(load_share)
    # The first run makes the buffers that blocks are gathered into. If that were an evaluation, in
    # inference mode, training could not use them.
    run_idle(teacher, 1)
    return teacher, more


def shard(teacher: PreTrainedModel, mesh: DeviceMesh, device: torch.device) -> None:
    """Freeze a teacher, keep this process's share of its blocks, and move it to a device.

    Blocks are moved one after the other, so the device holds at most its share, one whole block and
    the weights outside of blocks.

    Raises:
        ValueError: the model has no list of blocks.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = [block for blocks in block_lists(teacher).values() for block in blocks]
    if not blocks:
        raise ValueError(f"--shard_teacher: {type(teacher).__name__} has no list of blocks")
    teacher.requires_grad_(False)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    whole = {parameter for parameter in teacher.parameters() if parameter not in inside}
    # Wrapping the root lets a block be gathered while the one before it runs.
    fully_shard(teacher.base_model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    teacher.to(device)  # type: ignore[arg-type]


def is_sharded(model: PreTrainedModel) -> bool:
    """Return whether a model's blocks are spread over processes."""
    if processes.count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    blocks = (block for blocks in block_lists(model).values() for block in blocks)
    return any(isinstance(block, FSDPModule) for block in blocks)


@torch.no_grad()
def run_idle(teacher: PreTrainedModel, times: int) -> None:
    """Run a teacher on a single token, so that all processes gather its blocks."""
    token = torch.zeros(1, 1, dtype=torch.long, device=states_shape(teacher)[2])
    for _ in range(times):
        final_hidden_states(teacher, token)


@contextmanager
def in_step(teacher: PreTrainedModel | None, runs: int) -> Iterator[None]:
    """After the body, run a sharded teacher until all processes have run it equally often.

    ``runs`` is how often the body runs it in this process. Without a sharded teacher nothing is
    done.
    """
    if teacher is None or not is_sharded(teacher):
        yield
        return
    missing = max(processes.gathered(runs)) - runs
    yield
    run_idle(teacher, missing)
