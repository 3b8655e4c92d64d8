"""Spreads a frozen teacher's blocks over processes, for a teacher that no single device holds.

The weights of each block are split evenly (fully sharded data parallel, Zhao et al. 2023,
arXiv:2304.11277). Before a block runs they are gathered from all processes, after it they are
dropped. So a process holds 1/N of the blocks and, in passing, one or two blocks whole; embeddings
and output head stay whole, because the loss reads the head itself. Gathering copies: what the
teacher computes is the same to the bit.

Each gathering takes all processes, so all must run the teacher equally often. In training they do;
where their shares differ, :func:`in_step` lets those with less to do run a single token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from src.common import processes
from src.models.loading import block_lists, final_hidden_states, output_head

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

T = TypeVar("T")


def load_sharded(
    load: Callable[[], tuple[PreTrainedModel, T]], device: torch.device
) -> tuple[PreTrainedModel, T]:
    """Load a teacher in one process after the other, and keep in each its share.

    So the machine's memory holds it whole once at a time, and a device never.

    Args:
        load: returns the teacher, on the CPU, and what else is wanted of it while it is whole.
        device: where the shares go.

    Returns:
        The teacher, and what else ``load`` returned.

    Raises:
        ValueError: there is but one process, or the model has no list of blocks.
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
    # The first run makes the tensors into which blocks are gathered ever after. Made by a run in
    # inference mode, as evaluations are, they could not be used outside of it.
    run_idle(teacher, 1)
    return teacher, more


def shard(teacher: PreTrainedModel, mesh: DeviceMesh, device: torch.device) -> None:
    """Freeze a teacher, keep this process's share of its blocks, and move it to a device.

    Blocks are moved one after the other, so the device never holds more than its share, one block
    and what is not in blocks.

    Raises:
        ValueError: the model has no list of blocks.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = [block for each in block_lists(teacher).values() for block in each]
    if not blocks:
        raise ValueError(f"--shard_teacher: {type(teacher).__name__} has no list of blocks")
    teacher.requires_grad_(False)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    whole = {parameter for parameter in teacher.parameters() if parameter not in inside}
    # The root lets a block be gathered while the one before it runs; it shards nothing itself.
    fully_shard(teacher.base_model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    teacher.to(device)  # type: ignore[arg-type]


def is_sharded(model: PreTrainedModel) -> bool:
    """Return whether a model has blocks that are spread over processes."""
    if processes.count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    blocks = (block for each in block_lists(model).values() for block in each)
    return any(isinstance(block, FSDPModule) for block in blocks)


@torch.no_grad()
def run_idle(teacher: PreTrainedModel, times: int) -> None:
    """Run a teacher on a single token, so that all processes gather its blocks."""
    weight, _ = output_head(teacher)
    token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    for _ in range(times):
        final_hidden_states(teacher, token)


@contextmanager
def in_step(teacher: PreTrainedModel | None, runs: int) -> Iterator[None]:
    """Bring the runs of a sharded teacher, after the body, to those of the busiest process.

    Args:
        teacher: where it is not sharded, or None, nothing is done.
        runs: how often the body runs it in this process.
    """
    if teacher is None or not is_sharded(teacher):
        yield
        return
    missing = processes.largest(runs) - runs
    yield
    run_idle(teacher, missing)
