"""Policies that learn from replayed steps: TD3 and contrastive reinforcement learning."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.protocols.practice.options import PracticeOptions
from sslrun.protocols.practice.replay import Goals, Replay, Transitions, future_offsets, relabel

HIDDEN = 64
"""Width of the two hidden layers of every network; the authors have 400 and 300."""
EMBEDDING = 16
"""Width of the embeddings that contrastive learning compares; the authors have 64."""
TARGET_NOISE, TARGET_CLIP = 0.2, 0.5
"""Deviation and limit of the noise on a target's actions, as shares of an action's largest size
(TD3)."""
ACTOR_EVERY = 2
"""Critic updates for each update of the actor and the targets (TD3)."""
TAU = 0.005
"""Share by which targets move to their networks (TD3)."""
LOGSUMEXP = 0.1
"""Weight of the squared logsumexp in the contrastive loss."""


def _network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, outputs),
    )  # fmt: skip


class PolicyLearner(ABC):
    """A policy that learns from replayed steps."""

    def __init__(self, width: int, actions: int, options: PracticeOptions) -> None:
        self.options = options
        self.actor = nn.Sequential(_network(2 * width, actions), nn.Tanh())
        self.steps = 0

    def act(self, codes: Tensor, goals: Tensor) -> Tensor:
        """Actions (B, A) in [-1, 1] toward goals (B, D)."""
        actions: Tensor = self.actor(torch.cat([codes, goals], dim=1))
        return actions

    @abstractmethod
    def read(self, replay: Replay, steps: Tensor, goals: Goals) -> Transitions:
        """Read steps (B,) of the replay with the goals to learn from."""

    @abstractmethod
    def learn(self, batch: Transitions, noise: Tensor) -> None:
        """Take a gradient step; `noise` (B, A) is standard normal."""

    def _adam(self, *networks: nn.Module) -> torch.optim.Adam:
        parameters = [one for network in networks for one in network.parameters()]
        return torch.optim.Adam(parameters, self.options.lr, foreach=True)

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Change only the optimizer's own parameters."""
        optimizer.zero_grad()
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        loss.backward(inputs=parameters)
        optimizer.step()


class Td3(PolicyLearner):
    """TD3 (Fujimoto et al., ICML 2018, arXiv:1802.09477), rewarded by minus the distance of codes.

    The end of an episode is a limit of time, so that values do not end there.
    """

    def __init__(
        self, width: int, actions: int, options: PracticeOptions, generator: torch.Generator
    ) -> None:
        super().__init__(width, actions, options)
        self.generator = generator
        self.critics = nn.ModuleList(_network(2 * width + actions, 1) for _ in range(2))
        self.networks = nn.ModuleList([self.actor, self.critics])
        self.targets = copy.deepcopy(self.networks).requires_grad_(False)
        self.actor_optimizer = self._adam(self.actor)
        self.critic_optimizer = torch.optim.Adam(
            self.critics.parameters(), options.lr, foreach=True
        )

    def read(self, replay: Replay, steps: Tensor, goals: Goals) -> Transitions:
        return relabel(replay, steps, self.options.relabel, goals, self.generator)

    def learn(self, batch: Transitions, noise: Tensor) -> None:
        self.steps += 1
        target = self._target(batch, noise)
        inputs = torch.cat([batch.codes, batch.goals, batch.actions], dim=1)
        losses = [F.mse_loss(critic(inputs)[:, 0], target) for critic in self.critics]
        self._descend(losses[0] + losses[1], self.critic_optimizer)
        if self.steps % ACTOR_EVERY:
            return
        actions = self.act(batch.codes, batch.goals)
        value = self.critics[0](torch.cat([batch.codes, batch.goals, actions], dim=1))
        self._descend(-value.mean(), self.actor_optimizer)
        with torch.no_grad():
            learned: list[Tensor] = list(self.networks.parameters())
            torch._foreach_lerp_(list(self.targets.parameters()), learned, TAU)

    @torch.no_grad()
    def _target(self, batch: Transitions, noise: Tensor) -> Tensor:
        """The value (B,) that critics should have: the reward, and the lower of both targets."""
        actor, critics = self.targets[0], self.targets[1]
        seen = torch.cat([batch.next_codes, batch.goals], dim=1)
        actions = actor(seen) + (TARGET_NOISE * noise).clamp(-TARGET_CLIP, TARGET_CLIP)
        inputs = torch.cat([seen, actions.clamp(-1, 1)], dim=1)
        lower = torch.minimum(*[critic(inputs)[:, 0] for critic in critics.children()])
        return batch.rewards() + self.options.discount * lower


class Contrastive(PolicyLearner):
    """Contrastive reinforcement learning: f(s, a, g) = -||phi(s, a) - psi(g)||, without a reward.

    Goals are codes that the same episode reached later, at offsets that are geometric.
    """

    def __init__(
        self, width: int, actions: int, options: PracticeOptions, generator: torch.Generator
    ) -> None:
        super().__init__(width, actions, options)
        self.generator = generator
        self.phi, self.psi = _network(width + actions, EMBEDDING), _network(width, EMBEDDING)
        self.networks = nn.ModuleList([self.actor, self.phi, self.psi])
        self.actor_optimizer = self._adam(self.actor)
        self.critic_optimizer = self._adam(self.phi, self.psi)

    def read(self, replay: Replay, steps: Tensor, goals: Goals) -> Transitions:
        offsets = future_offsets(replay.left(steps), self.options.discount, self.generator)
        return replay.read(steps)._replace(goals=replay.codes(steps, offsets))

    def learn(self, batch: Transitions, noise: Tensor) -> None:
        self.steps += 1
        future = self.psi(batch.goals)
        logits = similarities(self._embed(batch.codes, batch.actions), future)
        penalty = LOGSUMEXP * logits.logsumexp(dim=1).square().mean()
        self._descend(infonce(logits) + penalty, self.critic_optimizer)
        actions = self.act(batch.codes, batch.goals)
        distances = self._embed(batch.codes, actions) - self.psi(batch.goals).detach()
        self._descend(distances.norm(dim=1).mean(), self.actor_optimizer)

    def _embed(self, codes: Tensor, actions: Tensor) -> Tensor:
        embedded: Tensor = self.phi(torch.cat([codes, actions], dim=1))
        return embedded


def similarities(steps: Tensor, goals: Tensor) -> Tensor:
    """Minus the distances (B, B) of each embedded step (B, E) from each embedded goal (B, E)."""
    return -torch.cdist(steps, goals, compute_mode="donot_use_mm_for_euclid_dist")


def infonce(logits: Tensor) -> Tensor:
    """InfoNCE of logits (B, B): each step should find its own goal, on the diagonal."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
