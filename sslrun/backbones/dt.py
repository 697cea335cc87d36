"""Decision Transformer (Chen et al., NeurIPS 2021): a causal Transformer over trajectories."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.control import ControlBackbone
from sslrun.backbones.text import check_heads
from sslrun.backbones.transformer import Block, BlockStyle, Stack, initialize
from sslrun.data.control.trajectories import Trajectories, WindowExamples
from sslrun.data.examples import Examples
from sslrun.data.specs import ControlSpec
from sslrun.errors import UserError
from sslrun.registry import Options

DT_STYLE = BlockStyle(eps=1e-5, activation=F.relu)
"""The block of GPT-2 with ReLU, as in the authors' code."""
CONSTANT = 1e-6
"""Standard deviation up to which a number of the state counts as constant."""


class Dt(ControlBackbone):
    """Causal Transformer over (return, state, action) of each step (Chen et al. 2021).

    The three tokens of a step are linear maps of the return to go, the state and the action, plus
    an embedding of the step's number in the episode. A norm and the blocks of GPT-2 without
    positions follow, as in the authors' code (gym/models/decision_transformer.py). Actions are
    predicted from the tokens of states; heads that the code has for states and returns are never
    trained there, and are left out. The first token may be a goal instead of the return, or
    nothing: see `set_condition`. Features are those of the tokens of states, and pooled features
    their mean over real steps.

    Deviations: windows are padded at their end, where causality keeps them out of real steps, and
    not at their start; a number of the state that is constant in the data is only centered.
    """

    class Options(Options):
        dropout: float = Field(0.1, ge=0, lt=1)
        """Dropout rate on attention weights and the output of each branch."""
        positions: int = Field(1000, ge=1)
        """Number of times in an episode that have an embedding of their own; later ones share the
        last. The longest window has as many steps."""
        depth: int | None = Field(None, ge=1)
        """Number of layers; default: the named model's."""
        width: int | None = Field(None, ge=1)
        """Width of a token; default: the named model's."""
        heads: int | None = Field(None, ge=1)
        """Number of attention heads; default: the named model's."""

    offers = frozenset({"tokens", "actions"})
    shape: ClassVar[tuple[int, int, int]]
    """Depth, width and heads of the named model."""
    options: Options
    state_mean: Tensor
    state_std: Tensor

    def __init__(self, options: Options, spec: ControlSpec) -> None:
        """Raises UserError if windows are longer than the positions."""
        super().__init__(options, spec)
        if spec.context > options.positions:
            raise UserError(
                f"{self.name}: windows of {spec.context} steps are longer than its "
                f"{options.positions} positions: lower data.context to {options.positions}, or "
                "raise backbone.positions before pretraining"
            )
        depth = options.depth or self.shape[0]
        self.width = width = options.width or self.shape[1]
        heads = options.heads or self.shape[2]
        check_heads(self.name, width, heads)
        self.depth = depth + 1
        self.return_embed = nn.Linear(1, width)
        self.goal_embed = nn.Linear(spec.states, width)
        self.state_embed = nn.Linear(spec.states, width)
        self.action_embed: nn.Module = (
            nn.Embedding(spec.actions, width)
            if spec.is_discrete
            else nn.Linear(spec.actions, width)
        )
        self.time_embed = nn.Embedding(options.positions, width)
        self.norm_embed = nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = Stack(
            Block(width, heads, DT_STYLE, dropout=options.dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.action_head = nn.Linear(width, spec.actions)
        initialize(self.blocks)
        self.register_buffer("state_mean", torch.zeros(spec.states))
        self.register_buffer("state_std", torch.ones(spec.states))

    @classmethod
    def limits(cls, options: Options) -> dict[str, int]:
        return {"context": options.positions}

    def fit_inputs(self, examples: Examples) -> None:
        """Standardize states by those of the training trajectories."""
        assert isinstance(examples, WindowExamples)
        states = examples.episodes.states.double()
        std = states.std(dim=0, correction=0)
        self.state_mean.copy_(states.mean(dim=0))
        self.state_std.copy_(torch.where(std > CONSTANT, std, 1.0))

    def forward(self, inputs: Trajectories) -> Features:
        tokens = self.norm(self.blocks(self._embed(inputs), causal=True))
        tokens = tokens.unflatten(1, (-1, 3))[:, :, 1]
        weights = inputs.real / inputs.real.sum(dim=1, keepdim=True)
        return Features((tokens * weights[..., None]).sum(dim=1), tokens, mask=inputs.real)

    def _embed(self, inputs: Trajectories) -> Tensor:
        """Embed the return or goal, the state and the action of each step in turn: (B, 3 K, D).

        Without a condition, only the time of the first is embedded.
        """
        times = self.time_embed(inputs.times.clamp(max=self.options.positions - 1))
        by_return, by_goal = self.conditions
        wanted = by_return * self.return_embed(inputs.returns[..., None] / self.spec.scale)
        wanted = wanted + by_goal * self.goal_embed(self._standardize(inputs.goals))[:, None]
        states = self.state_embed(self._standardize(inputs.states))
        actions = self.action_embed(self.scale_actions(inputs.actions))
        steps = torch.stack([wanted + times, states + times, actions + times], dim=2)
        return self.dropout(self.norm_embed(steps.flatten(1, 2)))

    def _standardize(self, states: Tensor) -> Tensor:
        return (states - self.state_mean) / self.state_std

    def predict_actions(self, features: Features) -> Tensor:
        outputs = self.action_head(features.tokens)
        return outputs if self.spec.is_discrete else outputs.tanh()


def _dt(name: str, shape: tuple[int, int, int], about: str) -> None:
    tags = {"__doc__": about, "__module__": __name__, "shape": shape}
    backbones.register(name)(type(name, (Dt,), tags))


_dt(
    "dt-tiny",
    (3, 128, 1),
    "Decision Transformer of 3 layers, 128 wide, 1 head, as for Gym (Chen et al. 2021).",
)
_dt(
    "dt-base",
    (6, 128, 8),
    "Decision Transformer of 6 layers, 128 wide, 8 heads, as for Atari (Chen et al. 2021).",
)
