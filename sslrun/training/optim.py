"""Optimizers, their parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.registry import Options
from sslrun.training.shard import is_sharded

Shape = Literal["cosine", "linear", "step", "constant"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerOptions(Options):
    """Options of an optimizer."""

    optimizer: Literal["adamw", "sgd", "lars", "muon"] = "adamw"
    """Optimizer. muon: Muon (Jordan et al. 2024) for hidden matrices, and AdamW for all other
    parameters, including convolutions."""
    lr: float = Field(0.001, gt=0)
    """Highest learning rate, which is not scaled by the batch size."""
    lr_bias: float | None = Field(None, gt=0)
    """Highest learning rate of norms, biases and other vectors, as in Barlow Twins (Zbontar et al.
    2021); default: `lr`."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay. It is decoupled in adamw and muon, and an L2 penalty in sgd and lars, as in
    their papers."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the end of training, which `weight_decay` approaches along half a cosine, as
    in DINO (Caron et al. 2021); default: constant."""
    decay: Literal["matrices", "all"] = "matrices"
    """Parameters that have weight decay and, in lars, an adaptive learning rate. matrices: matrices
    and convolutions. all: also norms, biases and other vectors, as torch.optim.SGD has it in MoCo
    and SimSiam."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd, lars and muon."""
    nesterov: bool = False
    """Use Nesterov momentum in sgd."""
    trust: float = Field(0.001, gt=0)
    """Trust coefficient of lars: share of a matrix's norm that one step changes at a learning rate
    of 1 and without momentum."""
    lars_clip: bool = False
    """In lars, change no more of a matrix than plain SGD would: limit its adaptive rate to the
    learning rate. solo-learn's CIFAR recipes do so, with a `trust` of 0.02."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the moments of adamw, also of the AdamW that accompanies muon."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each layer of the backbone to the one below it (BEiT, Bao et
    al. 2022)."""


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888).

    The step of a tensor w with gradient g' = g + weight_decay w is scaled by
    q = trust ||w|| / ||g'||, and by 1 if either norm is 0, as in the code of SimCLR, BYOL, Barlow
    Twins and VICReg. Parameter groups with `adapt=False` (norms, biases) take plain momentum steps.
    The learning rate multiplies the momentum, as in the code of the last three; SimCLR's multiplies
    each gradient before momentum, which differs while the rate changes.

    `clip` scales by min(q / lr, 1) instead, as LARC in NVIDIA's apex and solo-learn do: the step is
    then at most that of SGD with the learning rate lr. Deviation from both: they divide by
    ||g|| + weight_decay ||w|| in place of ||g'||, which is at least as large.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float,
        trust: float = 0.001,
        clip: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "clip": clip}
        super().__init__(params, {**defaults, "weight_decay": 0.0, "adapt": True})

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
                grads = torch._foreach_mul(grads, _adaptive_scales(params, grads, group))
            for param in params:
                if "momentum" not in self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
            buffers = [self.state[param]["momentum"] for param in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def _adaptive_scales(
    params: list[Tensor], grads: list[Tensor], group: dict[str, Any]
) -> list[Tensor]:
    """Compute LARS's factor on each gradient (0-d), from the norms of tensors and gradients."""
    scales = []
    for w, g in zip(torch._foreach_norm(params), torch._foreach_norm(grads), strict=True):
        scale = group["trust"] * w / g
        if group["clip"]:
            scale = (scale / group["lr"]).clamp(max=1.0)
        scales.append(torch.where((w > 0) & (g > 0), scale, 1.0))
    return scales


class _Group(NamedTuple):
    """What distinguishes the parameter groups of a module."""

    lr_scale: float
    """Factor on the learning rate."""
    decays: bool
    """Whether its parameters have weight decay and, in lars, an adaptive rate."""
    muon: bool
    """Whether Muon optimizes it."""


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
    bias_scale = 1.0 if options.lr_bias is None else options.lr_bias / options.lr
    groups: dict[_Group, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim > 1 and not _is_token_embedding(name)
        hidden = parameter.ndim == 2 and matrix and parameter in scales and "embed" not in name
        group = _Group(
            lr_scale=scales.get(parameter, 1.0) * (1.0 if matrix else bias_scale),
            decays=matrix or options.decay == "all",
            muon=hidden and options.optimizer == "muon",
        )
        groups.setdefault(group, []).append(parameter)
    built: list[torch.optim.Optimizer] = []
    for muon in (False, True):
        chosen = [
            {
                "params": parameters,
                "weight_decay": options.weight_decay if group.decays else 0.0,
                "decays": group.decays,
                "lr_scale": group.lr_scale,
                **({"adapt": group.decays} if options.optimizer == "lars" else {}),
            }
            for group, parameters in groups.items()
            if group.muon == muon
        ]
        if chosen:
            built.append(_build("muon" if muon else options.optimizer, chosen, options))
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
            return torch.optim.SGD(
                groups,
                lr=options.lr,
                momentum=options.momentum,
                nesterov=options.nesterov and options.momentum > 0,
                # torch's fused SGD does not take sharded parameters (torch 2.14)
                fused=not is_sharded(groups[0]["params"][0]),
            )
        case "lars":
            return Lars(
                groups,
                lr=options.lr,
                momentum=options.momentum,
                trust=options.trust,
                clip=options.lars_clip,
            )
        case "muon" if all(param.ndim == 2 for group in groups for param in group["params"]):
            # match_rms_adamw: updates as large as AdamW's, so that one learning rate suits both.
            return torch.optim.Muon(
                groups, lr=options.lr, momentum=options.momentum, adjust_lr_fn="match_rms_adamw"
            )
        case _:
            return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)


def set_rates(built: Iterable[torch.optim.Optimizer], lr: float, weight_decay: float) -> None:
    """Set the learning rate and the weight decay of each parameter group of `optimizers`.

    The rate is multiplied by the group's `lr_scale`; groups that do not decay keep a decay of 0.
    """
    for optimizer in built:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0


def skip_update(built: Iterable[torch.optim.Optimizer], parameters: Iterable[Tensor]) -> None:
    """Drop the gradients of `parameters`, so that the optimizers' next step leaves them unchanged.

    torch's fused SGD fails if some parameters of a group have momentum and others have none yet.
    Those that are skipped therefore start with a momentum of zero, which gives the same steps.
    """
    for parameter in parameters:
        parameter.grad = None
        for optimizer in built:
            if isinstance(optimizer, torch.optim.SGD):
                optimizer.state[parameter].setdefault(
                    "momentum_buffer", torch.zeros_like(parameter)
                )


def half_cosine(start: float, end: float, progress: float) -> float:
    """Go from `start` at `progress` 0 to `end` at 1 along half a period of a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def lr_factor(
    step: float,
    total: float,
    warmup: float,
    shape: Shape,
    milestones: tuple[float, ...],
    gamma: float,
    end: float = 0.0,
    ahead: int = 1,
) -> float:
    """The learning rate at `step` (0 to `total` - 1), as a share of the highest.

    It rises linearly over `warmup` steps. Then it falls to `end` at `total` along a cosine or a
    line, stays constant, or is multiplied by `gamma` at each of `milestones`, which are shares of
    `total`.

    With `ahead` 0, `step` and `total` may be of any unit, such as seconds, and the warmup starts
    at 0.
    """
    if step < warmup:
        return (step + ahead) / warmup
    share = (step - warmup) / max(ahead, total - warmup)
    match shape:
        case "cosine":
            return half_cosine(1.0, end, share)
        case "linear":
            return 1 - share * (1 - end)
        case "step":
            return gamma ** sum(step >= milestone * total for milestone in milestones)
        case "constant":
            return 1.0
