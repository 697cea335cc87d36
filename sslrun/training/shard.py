"""Parameters, gradients and optimizer states that are sharded over devices: FSDP2.

`fully_shard` (torch.distributed.fsdp) keeps a part of each parameter on each device, and gathers
the parameters of one block at a time for its forward and its backward pass. The numbers are those
of data-parallel training up to rounding.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from sslrun import distributed
from sslrun.training.learner import Learner

AnyLearner = TypeVar("AnyLearner", bound=Learner)


def shard(learner: Learner, device: torch.device) -> None:
    """Shard each of a learner's blocks, and then all other parameters, over all devices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in learner.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(learner, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as all devices together hold it; all must call this at the same point."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def is_sharded(tensor: Tensor) -> bool:
    """Whether each device holds a part of the tensor."""
    if distributed.world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def copy_whole(learner: AnyLearner, template: AnyLearner) -> AnyLearner:
    """Return a learner with whole parameters; its buffers are those of the sharded `learner`.

    `template` is a copy of the learner, made before it was sharded; its parameters may be on the
    meta device. All devices must call this at the same point.
    """
    parameters = {
        parameter: nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
        for parameter in learner.parameters()
    }
    complete = copy.deepcopy(template)
    for module, sharded in zip(complete.modules(), learner.modules(), strict=True):
        for name, parameter in sharded.named_parameters(recurse=False):
            module.register_parameter(name, parameters[parameter])
        for name, buffer in sharded.named_buffers(recurse=False):
            setattr(module, name, buffer)
    return complete.train(learner.training)
