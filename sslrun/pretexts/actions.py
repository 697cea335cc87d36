"""Predict the actions of trajectories, given the return they led to (Decision Transformer)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.backbones.control import Condition, ControlBackbone, require_actions
from sslrun.data.control.environments import make_environment
from sslrun.data.control.trajectories import Trajectories
from sslrun.data.examples import Batch
from sslrun.data.specs import ControlSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext, PretextOptions, pretexts
from sslrun.training.learner import Output


class ActionsOptions(PretextOptions):
    """Options of the prediction of actions."""

    condition: Condition = "return"
    """What actions are predicted from in addition to states and earlier actions. return: the sum of
    the rewards still to come (Decision Transformer). goal: the last state of the trajectory. none:
    nothing, which is behavior cloning by the same network."""


@pretexts.register("actions")
class Actions(Pretext):
    """Predict each action of a trajectory from its return, states and earlier actions (DT).

    Chen et al., NeurIPS 2021 (arXiv:2106.01345). Loss: cross-entropy of discrete actions, or mean
    squared error of vectors, scaled to [-1, 1], over the real steps of windows. The top 10 % of
    the data are an option of the data: top: 0.1.
    """

    Options = ActionsOptions
    reads = ControlSpec
    needs = ("actions",)
    backbone: ControlBackbone

    def __init__(self, options: ActionsOptions, backbone: Backbone) -> None:
        """Raises UserError for a backbone that does not decide on actions, and for condition: goal
        in an environment without goals."""
        super().__init__(options, require_actions(backbone, "pretext 'actions'"))
        if options.condition == "goal":
            environment = make_environment(self.backbone.spec.environment)
            if not environment.has_goals:
                raise UserError(
                    f"pretext.condition: goal: {environment.title} has no goal states: take "
                    "condition: return or none"
                )
        self.backbone.set_condition(options.condition)

    @classmethod
    def depends_on_devices(
        cls, options: Any, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        return backbone.draws(backbone_options)

    def views(self, batch: Batch, generator: torch.Generator) -> Trajectories:
        trajectories: Trajectories = batch.inputs
        return trajectories

    def forward(self, views: Trajectories) -> Output:
        predicted = self.backbone.predict_actions(self.backbone(views)).float()
        targets = self.backbone.scale_actions(views.actions)
        real = views.real.float()
        if self.backbone.spec.is_discrete:
            losses = F.cross_entropy(predicted.transpose(1, 2), targets, reduction="none")
            right = (predicted.argmax(dim=-1) == targets).float()
            return Output(_mean(losses, real), {"accuracy": _mean(right, real).detach()})
        return Output(_mean((predicted - targets).square().mean(dim=-1), real))

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        output = self(self.views(batch, generator))
        return {
            "held_out_loss": output.loss,
            **{f"held_out_{name}": value for name, value in output.metrics.items()},
        }


def _mean(values: Tensor, real: Tensor) -> Tensor:
    """The mean of values (B, K) over real steps."""
    return (values * real).sum() / real.sum().clamp(min=1)
