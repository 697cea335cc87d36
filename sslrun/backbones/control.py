"""The base class of backbones that decide on actions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sslrun.backbones.base import Backbone, Features
from sslrun.data.specs import ControlSpec
from sslrun.errors import UserError

Condition = Literal["return", "goal", "none"]


class ControlBackbone(Backbone):
    """A network over windows of trajectories, which predicts the action after each state."""

    takes = ControlSpec
    offers = frozenset({"actions"})
    spec: ControlSpec
    middle: Tensor
    half_range: Tensor
    conditions: Tensor

    def __init__(self, options: Any, spec: ControlSpec) -> None:
        super().__init__(options, spec)
        low, high = torch.tensor(spec.low or ()), torch.tensor(spec.high or ())
        self.register_buffer("middle", (low + high) / 2, persistent=False)
        self.register_buffer("half_range", (high - low) / 2, persistent=False)
        # Weights of the return and of the goal; a buffer, so that rollouts know.
        self.register_buffer("conditions", torch.tensor([1.0, 0.0]))

    def predict_actions(self, features: Features) -> Tensor:
        """Scores (B, K, A) of discrete actions, or actions in [-1, 1], after each of K states."""
        raise NotImplementedError

    def set_condition(self, condition: Condition) -> None:
        """Choose what actions depend on in addition to states and earlier actions."""
        weights = [float(condition == kind) for kind in ("return", "goal")]
        self.conditions.copy_(torch.tensor(weights))

    @property
    def condition(self) -> Condition:
        """What was set by `set_condition`, also for loaded weights."""
        by_return, by_goal = self.conditions.tolist()
        return "return" if by_return else "goal" if by_goal else "none"

    def scale_actions(self, actions: Tensor) -> Tensor:
        """Scale vectors from the environment's bounds to [-1, 1]; discrete actions stay."""
        return actions if self.spec.is_discrete else (actions - self.middle) / self.half_range

    def unscale_actions(self, actions: Tensor) -> Tensor:
        """The reverse of `scale_actions`."""
        return actions if self.spec.is_discrete else actions * self.half_range + self.middle


def require_actions(backbone: Backbone, user: str) -> ControlBackbone:
    """Return a backbone as one that decides on actions, which `user` needs.

    Raises:
        UserError: it does not offer "actions", or offers them without the base class.
    """
    backbone.require("actions", user)
    if not isinstance(backbone, ControlBackbone):
        raise UserError(
            f"{user}: '{backbone.name}' offers 'actions', but its class is no ControlBackbone: "
            "derive it from sslrun.backbones.control.ControlBackbone"
        )
    return backbone
