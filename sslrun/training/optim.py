"""Optimizers, their parameter groups, and the learning-rate schedule."""

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
    """Options of an optimizer."""

    optimizer: Literal["adamw", "sgd", "lars", "muon"] = "adamw"
    """Optimizer. muon: Muon (Jordan et al. 2024) for hidden matrices, and AdamW for all other
    parameters, including convolutions."""
    lr: float = Field(0.001, gt=0)
    """Highest learning rate, which is not scaled by the batch size."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of matrices and convolutions; norms, biases and other vectors have none. It is
    decoupled in adamw and muon, and an L2 penalty in sgd and lars, as in their papers."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd, lars and muon."""
    nesterov: bool = False
    """Use Nesterov momentum in sgd."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the moments of adamw, also of the AdamW that accompanies muon."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each layer of the backbone to the one below it (BEiT, Bao et
    al. 2022)."""


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as SimCLR, BYOL and Barlow Twins use it.

    The step of a tensor w with gradient g' = g + weight_decay w is scaled by trust ||w|| / ||g'||.
    Parameter groups with `adapt=False` (norms, biases) take plain momentum steps.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float, trust: float = 0.001
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True},
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Tensor] = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            grads: Any = [param.grad for param in params]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            if group["adapt"]:
                norms = zip(torch._foreach_norm(params), torch._foreach_norm(grads), strict=True)
                scales = [
                    torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0) for w, g in norms
                ]
                grads = torch._foreach_mul(grads, scales)
            for param in params:
                if "momentum" not in self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
            buffers = [self.state[param]["momentum"] for param in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def optimizers(
    module: nn.Module, options: OptimizerOptions, layers: list[list[nn.Parameter]]
) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a module's trainable parameters: one, or two for muon.

    Each parameter group has `lr_scale`, its factor on the learning rate. `layers` holds the
    backbone's parameters from input to output, for `layer_decay`; parameters in none of them, such
    as heads, count as above all layers.
    """
    scales = {
        parameter: options.layer_decay ** (len(layers) - depth)
        for depth, layer in enumerate(layers)
        for parameter in layer
    }
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not _is_token_embedding(name)
            hidden = parameter.ndim == 2 and decays and parameter in scales and "embed" not in name
            key = (scales.get(parameter, 1.0), decays, hidden and options.optimizer == "muon")
            groups.setdefault(key, []).append(parameter)
    built: list[torch.optim.Optimizer] = []
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
            built.append(_build("muon" if matrices else options.optimizer, chosen, options))
    return built


def _is_token_embedding(name: str) -> bool:
    """Whether a parameter is a position embedding or a special token.

    These are stored as matrices, but are not linear maps.
    """
    return any(part in name for part in ("pos_embed", "cls_token", "reg_token", "mask_token"))


def _build(
    name: str, groups: list[dict[str, Any]], options: OptimizerOptions
) -> torch.optim.Optimizer:
    """Build one optimizer of the parameter groups; "muon" is AdamW if some are not matrices."""
    match name:
        case "sgd":
            nesterov = options.nesterov and options.momentum > 0
            return torch.optim.SGD(
                groups, lr=options.lr, momentum=options.momentum, nesterov=nesterov, fused=True
            )
        case "lars":
            return Lars(groups, lr=options.lr, momentum=options.momentum)
        case "muon" if all(param.ndim == 2 for group in groups for param in group["params"]):
            # match_rms_adamw: updates as large as AdamW's, so that one learning rate suits both.
            return torch.optim.Muon(
                groups, lr=options.lr, momentum=options.momentum, adjust_lr_fn="match_rms_adamw"
            )
        case _:
            return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)


def lr_factor(
    step: int, total: int, warmup: int, shape: Shape, milestones: tuple[float, ...], gamma: float
) -> float:
    """The learning rate at `step` (0 to `total` - 1), as a share of the highest.

    It rises linearly over `warmup` steps. Then it falls to 0 at `total` along a cosine or a line,
    stays constant, or is multiplied by `gamma` at each of `milestones`, which are shares of
    `total`.
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
