"""Optimizers, their parameter groups, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.registry import Options

Shape = Literal["cosine", "linear", "step", "constant"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerOptions(Options):
    """An optimizer and its settings."""

    optimizer: Literal["adamw", "sgd", "lars", "muon"] = "adamw"
    """muon: Muon (Jordan et al. 2024) for the hidden matrices, AdamW for everything else, convolutions included."""
    lr: float = Field(0.001, gt=0)
    """Highest learning rate, as the optimizer is given it: not scaled by the batch."""
    weight_decay: float = Field(0.0, ge=0)
    """Never on norms, biases and other vectors. Decoupled in adamw and muon, L2 in sgd and lars, as their papers have it."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd, lars and muon."""
    nesterov: bool = False
    """Of sgd."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of adamw, also beside muon."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each layer of the backbone to the one below it (Bao et al., BEiT, 2022)."""


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as SimCLR, BYOL and Barlow Twins use it.

    The step of a tensor w with gradient g' = g + weight_decay w is scaled by trust ||w|| / ||g'||. Groups with
    `adapt=False` (norms, biases) take plain momentum steps.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, trust: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Tensor] = [each for each in group["params"] if each.grad is not None]
            if not params:
                continue
            grads: Any = [each.grad for each in params]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            if group["adapt"]:
                sizes, slopes = torch._foreach_norm(params), torch._foreach_norm(grads)
                scales = [
                    torch.where((size > 0) & (slope > 0), group["trust"] * size / slope, 1.0)
                    for size, slope in zip(sizes, slopes, strict=True)
                ]
                grads = torch._foreach_mul(grads, scales)
            for each in params:
                if "momentum" not in self.state[each]:
                    self.state[each]["momentum"] = torch.zeros_like(each)
            buffers = [self.state[each]["momentum"] for each in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def optimizers(
    module: nn.Module, options: OptimizerOptions, layers: list[list[nn.Parameter]]
) -> list[torch.optim.Optimizer]:
    """The optimizers of a module's trainable parameters; each group has `lr_scale`, its share of the learning rate.

    `layers`: the backbone's parameters from input to output, for `layer_decay`; what is in none is above them all.
    """
    scales = {
        parameter: options.layer_decay ** (len(layers) - depth)
        for depth, layer in enumerate(layers)
        for parameter in layer
    }
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not _embedding(name)
            hidden = parameter.ndim == 2 and decays and parameter in scales and "embed" not in name
            key = (scales.get(parameter, 1.0), decays, hidden and options.optimizer == "muon")
            groups.setdefault(key, []).append(parameter)
    made: list[torch.optim.Optimizer] = []
    for matrices in (False, True):
        chosen = [
            {
                "params": parameters,
                "weight_decay": options.weight_decay if decays else 0.0,
                "lr_scale": scale,
                **({"adapt": decays} if options.optimizer == "lars" else {}),
            }
            for (scale, decays, hidden), parameters in groups.items()
            if hidden == matrices
        ]
        if chosen:
            made.append(_optimizer("muon" if matrices else options.optimizer, chosen, options))
    return made


def _embedding(name: str) -> bool:
    """Position embeddings and class tokens are no matrices that act on features, though they have their shape."""
    return any(part in name for part in ("pos_embed", "cls_token", "reg_token", "mask_token"))


def _optimizer(name: str, groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    match name:
        case "sgd":
            nesterov = options.nesterov and options.momentum > 0
            return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=nesterov, fused=True)
        case "lars":
            return Lars(groups, lr=options.lr, momentum=options.momentum)
        case "muon" if all(each.ndim == 2 for group in groups for each in group["params"]):
            # match_rms_adamw: an update as large as AdamW's, so that one learning rate serves both.
            return torch.optim.Muon(groups, lr=options.lr, momentum=options.momentum, adjust_lr_fn="match_rms_adamw")
        case _:
            return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)


def lr_factor(step: int, total: int, warmup: int, shape: Shape, milestones: tuple[float, ...], gamma: float) -> float:
    """The learning rate of step 0, 1, ... `total` - 1 as a share of the highest.

    Rises linearly over `warmup` steps; then cosine or linear to 0 at `total`, constant, or times `gamma` at each of
    `milestones`, which are shares of `total`.
    """
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    match shape:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return 1 - share
        case "step":
            return gamma ** sum(step >= milestone * total for milestone in milestones)
        case "constant":
            return 1.0
