"""Batch norm over the batches of several devices, and over parts of one device's batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslrun import distributed
from sslrun.errors import UserError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""The classes that can be replaced; a subclass may compute more than batch norm."""


class _AnyDimensions(_BatchNorm):
    """A batch norm of inputs (B, C, ...) with any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Allow any number of dimensions."""


class SyncedBatchNorm(_AnyDimensions):
    """Batch norm with the statistics of the batches of all devices together.

    Computes the same as torch's SyncBatchNorm, which runs on GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, ...) in its own dtype."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        # As in LSTMs: a decorator would import torch's compiler, which takes seconds.
        compiling = torch.compiler.is_compiling()
        normalize = torch.compiler.disable(_normalize) if compiling else _normalize
        normalized, mean, variance, count = normalize(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._update(mean, variance, count)
        return normalized

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics toward those of the batch, with the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        rate = _count_batch(self)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        unbiased = variance * count / (count - 1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)


class SplitBatchNorm(_AnyDimensions):
    """Batch norm of each of `splits` parts of the batch, as if each were on a device of its own.

    Part i holds the examples i, i + splits, i + 2 splits, and so on. The running statistics move
    toward the mean over parts of the parts' statistics. Follows the batch norm of MoCo's CIFAR
    demonstration (He et al., github.com/facebookresearch/moco, colab/moco_cifar10_demo.ipynb).
    """

    def __init__(self, splits: int, features: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, ...); in training, B must be a multiple of `splits`."""
        if not self.training:
            return super().forward(input)
        # Parts become channels: (B, C, ...) -> (B / splits, splits * C, ...).
        parts = input.unflatten(0, (-1, self.splits)).flatten(1, 2)
        weight, bias, mean, variance = (
            None if values is None else values.repeat(self.splits)
            for values in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        rate = _count_batch(self) if self.track_running_stats else 0.0
        normalized = F.batch_norm(parts, mean, variance, weight, bias, True, rate, self.eps)
        if self.track_running_stats:
            self._update(mean, variance)
        return normalized.unflatten(1, (self.splits, -1)).flatten(0, 1)

    @torch.no_grad()
    def _update(self, mean: Tensor | None, variance: Tensor | None) -> None:
        """Set the running statistics to the mean over parts, each (splits * C,)."""
        for running, parts in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            assert parts is not None
            running.copy_(parts.view(self.splits, -1).mean(dim=0))


def _count_batch(norm: _BatchNorm) -> float:
    """Count one more batch; return how far the running statistics move toward it, in (0, 1]."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None:  # the mean over all batches so far
        return 1 / norm.num_batches_tracked.item()
    return norm.momentum


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a batch norm is among a module's parts."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def synchronize_norms(module: nn.Module, device: torch.device) -> None:
    """Replace a module's batch norms by synchronized ones, with the same parameters and names.

    On CUDA they are torch's.

    Raises:
        UserError: one of them is of a class that cannot be replaced.
    """

    def build(norm: _BatchNorm) -> _BatchNorm:
        cls = nn.SyncBatchNorm if device.type == "cuda" else SyncedBatchNorm
        return cls(norm.num_features, **_options(norm))

    _replace(module, build, "cannot be synchronized over devices: set pretext.sync_norm: false")


def split_norms(module: nn.Module, splits: int) -> None:
    """Replace a module's batch norms by `SplitBatchNorm`, with the same parameters and names.

    Raises:
        UserError: one of them is of a class that cannot be replaced.
    """

    def build(norm: _BatchNorm) -> _BatchNorm:
        return SplitBatchNorm(splits, norm.num_features, **_options(norm))

    _replace(module, build, "cannot be split: set pretext.norm_splits: 1")


def _options(norm: _BatchNorm) -> dict[str, Any]:
    """The options that a batch norm was built with."""
    return {
        "eps": norm.eps,
        "momentum": norm.momentum,
        "affine": norm.affine,
        "track_running_stats": norm.track_running_stats,
    }


def _replace(module: nn.Module, build: Callable[[_BatchNorm], _BatchNorm], problem: str) -> None:
    """Replace each batch norm below a module by the one that `build` makes of it."""
    for name, child in module.named_children():
        if not isinstance(child, _BatchNorm):
            _replace(child, build, problem)
        elif type(child) in PLAIN:
            norm = build(child)
            norm.weight, norm.bias = child.weight, child.bias
            norm.running_mean, norm.running_var = child.running_mean, child.running_var
            norm.num_batches_tracked = child.num_batches_tracked
            module.add_module(name, norm.train(child.training))
        else:
            raise UserError(f"batch norm of the class {type(child).__name__} {problem}")


def _normalize(
    inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize (B, C, ...) by all devices' mean and variance (C,), which are returned as well.

    The last result is the number of values in a channel, over all devices, as a 0-d tensor.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _Normalize.apply(inputs, weight, bias, eps)
    return result


class _Normalize(torch.autograd.Function):
    """Normalize by the mean and variance over all devices.

    With u = (x - mean) / deviation and y = w u + b, over the n values of a channel on all devices,

        dx = w / deviation (dy - sum(dy) / n - u sum(dy u) / n)

    The gradients of w and b are this device's own sums; data-parallel training averages them, as it
    does those of every parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        mean, variance, count = _moments(values)
        scale = (variance + eps).rsqrt()
        output = (values - _channels(mean, inputs)) * _channels(scale, inputs)
        if weight is not None and bias is not None:
            output = output * _channels(weight, inputs) + _channels(bias, inputs)
        ctx.save_for_backward(inputs, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(inputs.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale, count = ctx.saved_tensors
        gradient = gradient.to(mean.dtype)
        unit = (inputs.to(mean.dtype) - _channels(mean, inputs)) * _channels(scale, inputs)
        axes = _all_but_channels(inputs)
        sums = torch.stack([gradient.sum(axes), (gradient * unit).sum(axes)])
        own = sums.clone()
        distributed.add_up(sums)
        means = sums / count
        inner = gradient - _channels(means[0], inputs) - unit * _channels(means[1], inputs)
        factor = scale if weight is None else scale * weight
        inner = (inner * _channels(factor, inputs)).to(inputs.dtype)
        if weight is None:
            return inner, None, None, None
        return inner, own[1].to(weight.dtype), own[0].to(weight.dtype), None


def _moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (C,) of each channel over all devices, and the number of values, 0-d.

    Devices exchange counts, means and sums of squared deviations, which lose no digits where a
    channel's mean is large (Chan, Golub & LeVeque 1983).
    """
    axes = _all_but_channels(values)
    mean = values.mean(axes)
    squares = (values - _channels(mean, values)).square().sum(axes)
    count = torch.full_like(mean, values.numel() / len(mean))
    counts, means, squared = distributed.gather(torch.stack([count, mean, squares])[None]).unbind(1)
    total = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / total
    squares = (squared + counts * (means - mean).square()).sum(dim=0)
    return mean, squares / total, total[0]


def _all_but_channels(values: Tensor) -> list[int]:
    """The axes of (B, C, ...) except that of channels."""
    return [0, *range(2, values.ndim)]


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    """View a vector (C,) as (C, 1, ...), to combine it with `like` (B, C, ...)."""
    return vector.view(-1, *[1] * (like.ndim - 2))
