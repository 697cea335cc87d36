"""Several processes, one per device, as torchrun starts them: ranks, and tensors gathered from all."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return the rank of this process; 0 if there is only one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and reports."""
    return rank() == 0


def setup(device: torch.device) -> None:
    """Join torchrun's process group; do nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(
                device
            )  # where a barrier waits: else all processes take the first one
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def wait() -> None:
    """Block until all processes reach this call."""
    if dist.is_initialized():
        dist.barrier()


def gather(tensor: Tensor) -> Tensor:
    """The tensors (B, ...) of all ranks as one (world * B, ...), rank by rank, through which gradients flow back.

    A rank's tensor gets the sum of the gradients of all ranks' losses. Data-parallel training then
    averages parameters' gradients over ranks: if each rank's loss is its share's mean, that is the
    gradient of the mean over all.
    """
    return _Gather.apply(tensor) if world_size() > 1 else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]
