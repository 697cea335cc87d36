"""Processes of torchrun, one per device: ranks, barriers, and tensors gathered from all."""

from __future__ import annotations

import os
from functools import cache
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return the rank of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device_count() -> int:
    """Return the number of processes that torchrun started; unlike `world_size`, before `setup`."""
    return world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this process is the one that writes files and reports."""
    return rank() == 0


def setup(device: torch.device) -> None:
    """Join torchrun's process group; do nothing without torchrun."""
    if device_count() > 1 and not dist.is_initialized():
        if device.index is not None and device.type == "cuda":
            # A barrier runs on the current device, by default the first one for all processes.
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def has_lost_a_process(error: RuntimeError) -> bool:
    """Return whether an error means that another process has ended: that one says why."""
    is_collective = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    return world_size() > 1 and is_collective


def wait() -> None:
    """Block until all processes reach this call."""
    if dist.is_initialized():
        dist.barrier()


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by the sum over ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def copy_from_main(tensor: Tensor) -> None:
    """Replace a tensor by that of the first rank."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


@cache
def _processors() -> dist.ProcessGroup:
    """The processes as a group that talks over their CPUs, without waiting for the devices."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def decide(number: float) -> float:
    """Return the first rank's number, on every rank. No device is waited for."""
    if world_size() == 1:
        return number
    decision = torch.tensor([number], dtype=torch.float64)
    dist.broadcast(decision, 0, group=_processors())
    return decision.item()


def share(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor (world * B, ...), as `gather` concatenates it."""
    return tensor.chunk(world_size())[rank()]


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors (B, ...) of all ranks to (world * B, ...), in the order of ranks.

    Gradients flow back: the tensor of a rank gets the sum of the gradients of all ranks' losses.
    Data-parallel training then averages the gradients of parameters over ranks. If the loss of each
    rank is the mean over its own examples, the result is the gradient of the mean over all.
    """
    return _Gather.apply(tensor) if world_size() > 1 else tensor


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients over ranks and returns this rank's part."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return share(total)
