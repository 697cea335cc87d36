"""Practice reaching imagined goals, and be tested on goals in held-out pictures."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.data.control.environments import Environment
from sslrun.data.examples import Batch, Examples, to_device
from sslrun.data.specs import InputSpec
from sslrun.errors import UserError
from sslrun.pretexts.autoencoder import Autoencoder
from sslrun.pretexts.base import Pretext
from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.protocols.rollout import episode_seeds
from sslrun.registry import Options
from sslrun.seeds import derive_seed
from sslrun.tasks.base import Task, TaskOptions
from sslrun.tasks.reach import BINS, Cells, Reach, describe_codes, entropy

PRACTICE = 2_000
"""Distinguishes the seeds of episodes of practice from those of tests and data."""
SKEW_BINS = {"latent": 5, "state": BINS}
"""Number of cells along each axis by which the density of visited codes is estimated."""
HIDDEN = 64
"""Width of the two hidden layers of every network; the authors have 400 and 300."""
EMBEDDING = 16
"""Width of the embeddings that contrastive learning compares; the authors have 64."""
NOISE = 0.2
"""Deviation of the exploration, as a share of an action's largest size."""
TARGET_NOISE, TARGET_CLIP = 0.2, 0.5
"""Deviation and limit of the noise on a target's actions, in the same unit (TD3)."""
ACTOR_EVERY = 2
"""Critic updates for each update of the actor and the targets (TD3)."""
TAU = 0.005
"""Share by which targets move to their networks (TD3)."""
LOGSUMEXP = 0.1
"""Weight of the squared logsumexp in the contrastive loss."""
ENCODED = 256
"""Pictures encoded at a time."""
OWN_METRICS = ("final_distance", "coverage_entropy", "neighbor_r2", "rank_correlation")
"""Metrics with columns of their own. The last three are the protocol's: the entropy of the cells
that practice visited, and what `describe_codes` measures on the codes that the policy sees."""
REMEDY = "take pretext: {name: autoencoder, latent: 4, beta: 0.1}"
"""How to get a latent space."""
DRAWN = 8
"""Number of test episodes that are drawn."""


class Relabel(Options):
    """Shares of replayed steps whose goal is replaced; the others keep the goal of their episode.

    The defaults are those of Skew-Fit's configuration for pushing (Pong et al., ICML 2020).
    """

    goals: float = Field(0.5, ge=0, le=1)
    """Share that gets a new goal from the distribution of goals."""
    future: float = Field(0.3, ge=0, le=1)
    """Share that gets a code that its own episode reached later."""

    @model_validator(mode="after")
    def _check_sum(self) -> Relabel:
        if self.goals + self.future > 1:
            raise ValueError(
                f"shares of {self.goals:g} and {self.future:g} are more than all steps: lower one"
            )
        return self


class PracticeOptions(Options):
    """Practice with goals, with networks of two hidden layers of 64."""

    space: Literal["latent", "state"] = "latent"
    """What the policy sees. latent: codes of pictures, by the pretext task's encoder. state: the
    true states, as an oracle; a backbone is not needed."""
    learner: Literal["td3", "contrastive", "random"] = "td3"
    """td3: TD3, rewarded by minus the distance of codes (RIG). contrastive: contrastive
    reinforcement learning, without a reward. random: random actions, and nothing is learned."""
    goals: Literal["prior", "fitted", "data", "skew"] = "prior"
    """Distribution of the goals of practice. prior: the standard normal distribution of codes.
    fitted: a normal distribution with the mean and deviation of the training pictures' codes. data:
    codes of training pictures. skew: codes that practice has reached, with weights
    density^alpha."""
    alpha: float = Field(-1.0, ge=-1, le=0)
    """Exponent of the density for `goals: skew`. 0: as often as they were reached; -1: evenly over
    all cells that were reached (Skew-Fit)."""
    relabel: Relabel = Relabel()
    """Shares of replayed steps with a new goal; for td3."""
    steps: int = Field(10_000, ge=1)
    """Steps in the environment to practice for, rounded up to whole rounds."""
    updates: float = Field(1.0, gt=0)
    """Gradient steps for each step in the environment."""
    parallel: int = Field(10, ge=1)
    """Number of episodes in a round. They are played together, then the networks learn."""
    warmup: int = Field(1000, ge=0)
    """Steps of random actions at the beginning."""
    horizon: int | None = Field(None, ge=2)
    """Steps in an episode; default: the environment's."""
    start: tuple[float, ...] | None = None
    """State in which all episodes begin; default: as the environment has it."""
    batch: int = Field(128, ge=2)
    """Number of replayed steps in a gradient step."""
    lr: float = Field(0.001, gt=0)
    """Learning rate of Adam."""
    discount: float = Field(0.99, gt=0, lt=1)
    """Discount of rewards in a step; for contrastive learning also of future states."""
    episodes: int = Field(100, ge=1)
    """Number of test episodes; their goals are the first pictures of the test split."""

    @model_validator(mode="after")
    def _check_goals(self) -> PracticeOptions:
        if self.space == "state" and self.goals in ("prior", "fitted"):
            raise ValueError(f"goals: {self.goals} is for space: latent: take goals: data or skew")
        return self


@protocols.register("practice")
class Practice(Protocol):
    """Practice reaching imagined goals with a frozen encoder, then reach those of test pictures.

    RIG (Nair et al., NeurIPS 2018, arXiv:1807.04742): each episode has a goal in the latent space
    of a variational autoencoder, the reward is minus the distance of codes, and replayed steps get
    new goals. Skew-Fit (Pong et al., ICML 2020, arXiv:1903.03698): rare states become goals more
    often. Contrastive reinforcement learning (Eysenbach et al., NeurIPS 2022, arXiv:2206.07568):
    the critic tells the future of a state and action from that of others.

    An interrupted practice begins again and gives the same result: every draw follows from the
    seed. Deviations: networks of 64-64. Skew-Fit trains the autoencoder on the reweighted states
    and takes goals from its prior; here the autoencoder is frozen, and goals are the reweighted
    states, with the density counted over cells of codes. Contrastive learning has TD3's actor with
    noise instead of an entropy bonus, and the forward InfoNCE.
    """

    Options = PracticeOptions
    options: PracticeOptions
    learns = False

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        if issubclass(task, Reach):
            return None
        return f"practices reaching goals, which '{task.name}' does not have: take task: reach"

    def refit_obstacle(self) -> str | None:
        return "learns from no labels"

    def trains(self, options: TaskOptions) -> bool:
        return self.options.learner != "random"

    def describe_budget(self) -> str:
        options, steps = self.options, f"{self.options.steps:,} steps in the environment"
        if options.learner == "random":
            return steps
        return f"{steps}, {round(options.updates * options.steps):,} gradient steps"

    def own_metrics(self) -> tuple[str, ...]:
        return OWN_METRICS

    def check_pretext(self, pretext: Pretext) -> None:
        if self.options.space == "latent":
            _latents_of(pretext)

    def run(self, bench: Bench) -> Scores:
        """Raises UserError if the environment or its goals do not suit."""
        task, options = bench.task, self.options
        assert isinstance(task, Reach)
        arena = Arena.of(task, options)
        for split in bench.tests:
            task.check_goals(task.targets(bench.examples(split)), arena.environment)
        space = self._space(bench, task)
        known = space.encode(bench.examples("train"))
        torch.manual_seed(derive_seed(bench.seed, PRACTICE))
        session = Session(options, arena, space, known, bench.seed, bench.device)
        session.practice()
        states = task.targets(bench.examples("train"))
        coverage = entropy(Cells(states, BINS)(session.visited))
        metrics = {}
        for split in bench.tests:
            goals = bench.examples(split)
            count = min(options.episodes, len(goals))
            goals = goals.subset(torch.arange(count))
            codes, targets = space.encode(goals), task.targets(goals)
            episodes = arena.play(space, episode_seeds(bench.seed, count), session.policy(codes))
            metrics[split] = {
                **task.score(episodes.states[:, -1], goals),
                "coverage_entropy": coverage,
                **describe_codes(known, states, codes, targets),
            }
            if split == "test":
                bench.keep_pictures(self._draw(episodes, goals, task, space, session))
        return Scores(metrics, {"practice": session.describe()})

    def _space(self, bench: Bench, task: Reach) -> Space:
        if self.options.space == "state":
            return StateSpace(task)
        kept = bench.kept()
        if kept is None:
            raise UserError(
                "practice.space: latent needs the latent layer of an autoencoder, and none was "
                f"kept beside the backbone: {REMEDY}"
            )
        autoencoder = _latents_of(kept.rebuild(bench.backbone()))
        return LatentSpace(task, autoencoder.to(bench.device), bench.device)

    def _draw(
        self, episodes: Episodes, goals: Examples, task: Reach, space: Space, session: Session
    ) -> dict[str, Tensor]:
        """Pictures of test episodes: where they begin, their goals, and what they reach."""
        (batch,) = goals.batches([torch.arange(min(DRAWN, len(goals)))], torch.device("cpu"))
        columns = {
            "start": episodes.first_pictures[:DRAWN],
            "goal": task.inputs(batch),
            "reached": episodes.last_pictures[:DRAWN],
        }
        imagined = space.decode(session.goals.draw(DRAWN))
        return columns if imagined is None else {**columns, "goals of practice": imagined}


def _latents_of(pretext: Pretext) -> Autoencoder:
    """The pretext task as an autoencoder with a latent layer. Raises UserError if it is none."""
    if isinstance(pretext, Autoencoder) and pretext.options.latent is not None:
        return pretext
    raise UserError(
        f"practice.space: latent needs the latent layer of an autoencoder, which '{pretext.name}' "
        f"as configured does not have: {REMEDY}"
    )


# ---------------------------------------------------------------- what a policy sees


class Space(ABC):
    """The space of codes (B, D) float32, in which goals are set."""

    def __init__(self, task: Reach) -> None:
        self.task = task

    @abstractmethod
    def encode(self, examples: Examples) -> Tensor:
        """Encode pictures of a data set to codes (N, D)."""

    @abstractmethod
    def observe(self, environment: Environment, states: np.ndarray) -> Tensor:
        """Encode the current states (B, S) of an environment to codes (B, D)."""

    def decode(self, codes: Tensor) -> Tensor | None:
        """Pictures (B, 3, H, W) in [0, 1] that codes stand for; None if they cannot be drawn."""
        return None


class StateSpace(Space):
    """True states as codes: the oracle."""

    def encode(self, examples: Examples) -> Tensor:
        return self.task.targets(examples)

    def observe(self, environment: Environment, states: np.ndarray) -> Tensor:
        return torch.from_numpy(states)


class LatentSpace(Space):
    """Codes of pictures: the means of an autoencoder's latent distribution."""

    def __init__(self, task: Reach, autoencoder: Autoencoder, device: torch.device) -> None:
        super().__init__(task)
        self.autoencoder, self.device = autoencoder.requires_grad_(False).eval(), device

    def encode(self, examples: Examples) -> Tensor:
        indices = torch.arange(len(examples)).split(ENCODED)
        parts = [self._encode(batch) for batch in examples.batches(indices, self.device)]
        return torch.cat(parts)

    def observe(self, environment: Environment, states: np.ndarray) -> Tensor:
        return self._encode(Batch(self.task.observe(environment), None).to(self.device))

    def _encode(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.encode(self.task.inputs(batch)).mean.cpu()

    def decode(self, codes: Tensor) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.decode(codes.to(self.device)).cpu()


# ---------------------------------------------------------------- episodes


class Episodes(NamedTuple):
    """B episodes of H steps."""

    codes: Tensor
    """(B, H + 1, D): codes of all states, from the first to the last."""
    actions: Tensor
    """(B, H, A) float32 in [-1, 1]."""
    states: Tensor
    """(B, H + 1, S)."""
    first_pictures: Tensor
    """(B, 3, H, W) in [0, 1]; empty (0,) if the environment has no pictures."""
    last_pictures: Tensor


Policy = Callable[[Tensor], Tensor]
"""From codes (B, D) to actions (B, A) in [-1, 1]."""


@dataclass(frozen=True)
class Arena:
    """An environment with episodes of a fixed number of steps."""

    task: Reach
    environment: Environment
    horizon: int
    start: tuple[float, ...] | None

    @classmethod
    def of(cls, task: Reach, options: PracticeOptions) -> Arena:
        """Raises UserError if the environment does not suit."""
        environment = task.environment()
        if environment.is_discrete:
            raise UserError(
                f"practice needs actions that are vectors, but those of {environment.title} are "
                "discrete: take task.environment: point"
            )
        horizon = min(options.horizon or environment.horizon, environment.horizon)
        if horizon < 2:
            raise UserError(
                f"{environment.title}: its episodes have {horizon} step, and practice needs 2 or "
                "more: take another environment"
            )
        if options.start is not None:
            size, start = environment.state_size, np.array(options.start, np.float32)
            if len(start) != size or not environment.is_free(start):
                raise UserError(
                    f"practice.start: {list(options.start)} is no free state of "
                    f"{environment.title}, which has {size} numbers"
                )
        return cls(task, environment, horizon, options.start)

    def play(self, space: Space, seeds: Sequence[int], policy: Policy) -> Episodes:
        """Play an episode for each seed."""
        environment, states = self.environment, [self._reset(seeds)]
        first = self._picture()
        codes, actions = [space.observe(environment, states[0])], []
        for _ in range(self.horizon):
            actions.append(policy(codes[-1]))
            states.append(environment.step(self._scale(actions[-1])).states)
            codes.append(space.observe(environment, states[-1]))
        return Episodes(
            torch.stack(codes, dim=1),
            torch.stack(actions, dim=1),
            torch.from_numpy(np.stack(states, axis=1)),
            first,
            self._picture(),
        )

    def _reset(self, seeds: Sequence[int]) -> np.ndarray:
        if self.start is None:
            return self.environment.reset(seeds)
        starts = np.tile(np.array(self.start, np.float32), (len(seeds), 1))
        return self.environment.reset_to(starts)

    def _scale(self, actions: Tensor) -> np.ndarray:
        """Actions (B, A) float32 within the environment's bounds."""
        low, high = np.array([self.environment.low, self.environment.high], np.float32)
        return low + (actions.numpy() + 1) / 2 * (high - low)

    def _picture(self) -> Tensor:
        return self.task.inputs(Batch(self.task.observe(self.environment), None))


# ---------------------------------------------------------------- replayed steps and their goals


class Transitions(NamedTuple):
    """A batch of steps; goals are codes."""

    codes: Tensor
    actions: Tensor
    next_codes: Tensor
    goals: Tensor

    def to(self, device: torch.device) -> Transitions:
        return Transitions(*[to_device(tensor, device) for tensor in self])

    def rewards(self) -> Tensor:
        """Minus the distance (B,) of the next code from the goal."""
        return -(self.next_codes - self.goals).norm(dim=1)


class Replay(Examples):
    """All steps of practice; an example is one step.

    `order` draws steps with replacement, with weights density^alpha of the code that they reach:
    data that are collected and reweighted while a policy learns.
    """

    labels = None
    classes = ()

    def __init__(self, spec: InputSpec, horizon: int, cells: Cells, alpha: float) -> None:
        self.spec, self.horizon, self.cells, self.alpha = spec, horizon, cells, alpha
        self.chosen: Tensor | None = None
        self._state: dict[str, Tensor] = {}

    def add(self, episodes: Episodes, goals: Tensor) -> None:
        """Append episodes, which were played with goals (B, D)."""
        new = {"codes": episodes.codes, "actions": episodes.actions, "goals": goals}
        old = self._state
        self._state = {key: torch.cat([old[key], new[key]]) if old else new[key] for key in new}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        return self._state["actions"].shape[:2].numel() if self._state else 0

    @property
    def steps(self) -> Tensor:
        """(N,) int64: the number of each example's step among all."""
        return torch.arange(len(self)) if self.chosen is None else self.chosen

    def subset(self, indices: Tensor) -> Replay:
        part = copy.copy(self)
        part.chosen = self.steps[indices]
        return part

    @property
    def reached(self) -> Tensor:
        """The codes (N, D) that the steps lead to."""
        return self.codes(self.steps, torch.ones(len(self), dtype=torch.int64))

    def codes(self, steps: Tensor, offsets: Tensor) -> Tensor:
        """The codes (B, D) of the same episodes, `offsets` (B,) after steps (B,)."""
        return self._state["codes"][steps // self.horizon, steps % self.horizon + offsets]

    def left(self, steps: Tensor) -> Tensor:
        """The number (B,) of codes that follow steps (B,) in their episodes, at least 1."""
        return self.horizon - steps % self.horizon

    def order(self, seed: int, epoch: int) -> Tensor:
        weights = skew_weights(self.cells(self.reached), self.alpha)
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        return torch.multinomial(weights, len(self), replacement=True, generator=generator)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            yield Batch(self.read(self.steps[chosen]), None).to(device)

    def read(self, steps: Tensor) -> Transitions:
        """The steps (B,) with the goals of their episodes."""
        episodes, times = steps // self.horizon, steps % self.horizon
        return Transitions(
            self._state["codes"][episodes, times],
            self._state["actions"][episodes, times],
            self._state["codes"][episodes, times + 1],
            self._state["goals"][episodes],
        )


def skew_weights(cells: Tensor, alpha: float) -> Tensor:
    """Weights (N,) float64 of points in cells (N,) int64: density^alpha, with sum 1.

    The density of a point is the share of all points in its cell. Example: three points in one cell
    and one in another have the weights 1/6 1/6 1/6 1/2 if alpha is -1.
    """
    weights = (cells.bincount().double() / len(cells))[cells] ** alpha
    return weights / weights.sum()


def future_offsets(left: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Draw an offset (B,) int64 from 1 to `left` (B,): geometric, P(k) ~ discount^k, truncated."""
    uniform = torch.rand(len(left), generator=generator, dtype=torch.float64)
    mass = 1 - discount ** left.double()
    offsets = (torch.log1p(-uniform * mass) / math.log(discount)).floor().long() + 1
    return offsets.minimum(left)


def relabel(
    replay: Replay, steps: Tensor, shares: Relabel, goals: Goals, generator: torch.Generator
) -> Transitions:
    """Read steps (B,), a share with new goals and a share with codes reached later, evenly drawn.

    A reward follows from a step's codes and its goal, so that it is that of the new goal.
    """
    transitions = replay.read(steps)
    chance, place = torch.rand(2, len(steps), generator=generator)
    offsets = 1 + (place * replay.left(steps)).long().minimum(replay.left(steps) - 1)
    later, drawn = replay.codes(steps, offsets), goals.draw(len(steps))
    new = torch.where((chance < shares.future)[:, None], later, drawn)
    is_new = chance < shares.future + shares.goals
    return transitions._replace(goals=torch.where(is_new[:, None], new, transitions.goals))


class Goals:
    """The distribution of the goals of practice."""

    def __init__(self, kind: str, known: Tensor, generator: torch.Generator) -> None:
        """`known` (N, D) are the codes of the training pictures."""
        self.kind, self.known, self.generator = kind, known, generator
        self.mean, self.deviation = known.mean(dim=0), known.std(dim=0, correction=0)

    def draw(self, count: int) -> Tensor:
        """Draw codes (count, D)."""
        if self.kind in ("data", "skew"):
            return self.known[torch.randint(len(self.known), (count,), generator=self.generator)]
        normal = torch.randn(count, self.known.shape[1], generator=self.generator)
        return normal if self.kind == "prior" else self.mean + self.deviation * normal


# ---------------------------------------------------------------- learners


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


# ---------------------------------------------------------------- practice


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: for such small networks several are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Session:
    """One practice: rounds of episodes, then of learning."""

    def __init__(
        self,
        options: PracticeOptions,
        arena: Arena,
        space: Space,
        known: Tensor,
        seed: int,
        device: torch.device,
    ) -> None:
        """`known` (N, D) are the codes of the training pictures."""
        self.options, self.arena, self.space = options, arena, space
        self.seed, self.device = seed, device
        self.generator = torch.Generator().manual_seed(derive_seed(seed, PRACTICE, 0))
        self.goals = Goals(options.goals, known, self.generator)
        cells = Cells(known, SKEW_BINS[options.space])
        self.replay = Replay(arena.task.spec, arena.horizon, cells, options.alpha)
        self.learner = self._build_learner(known.shape[1])
        self.played: list[Tensor] = []
        self.acting = self.learning = 0.0
        self.gradient_steps = 0

    def _build_learner(self, width: int) -> Td3 | Contrastive | None:
        """Weights follow from torch's seed. None: actions are random."""
        if self.options.learner == "random":
            return None
        cls = Td3 if self.options.learner == "td3" else Contrastive
        learner = cls(width, self.arena.environment.actions, self.options, self.generator)
        learner.networks.to(self.device)
        return learner

    @property
    def visited(self) -> Tensor:
        """The states (N, S) that practice has visited."""
        return torch.cat(self.played).flatten(0, 1)

    def practice(self) -> None:
        """Play and learn until the steps are used up."""
        options = self.options
        per_round = options.parallel * self.arena.horizon
        for number in range(-(-options.steps // per_round)):
            began = time.monotonic()
            self._play(number, explores=number * per_round < options.warmup)
            played = time.monotonic()
            if self.learner is not None:
                with _one_thread():
                    self._learn(self.learner, round(options.updates * per_round))
            self.acting += played - began
            self.learning += time.monotonic() - played

    def _play(self, number: int, explores: bool) -> None:
        """Play a round; if it `explores`, with random actions."""
        goals = self.goals.draw(self.options.parallel)
        first = number * self.options.parallel
        seeds = [derive_seed(PRACTICE, self.seed, first + one) for one in range(len(goals))]
        policy = self._act_randomly if explores else self.policy(goals, explores=True)
        episodes = self.arena.play(self.space, seeds, policy)
        self.replay.add(episodes, goals)
        self.played.append(episodes.states)
        if self.options.goals == "skew":
            self.goals.known = self.replay.reached[self.replay.order(self.seed, number)]

    def _learn(self, learner: Td3 | Contrastive, count: int) -> None:
        for _ in range(count):
            shape = (self.options.batch,)
            steps = torch.randint(len(self.replay), shape, generator=self.generator)
            batch = learner.read(self.replay, steps, self.goals).to(self.device)
            noise = torch.randn(batch.actions.shape, generator=self.generator)
            learner.learn(batch, noise.to(self.device))
        self.gradient_steps += count

    def policy(self, goals: Tensor, explores: bool = False) -> Policy:
        """The policy toward goals (B, D), with noise if it `explores`."""
        learner = self.learner
        if learner is None:
            return self._act_randomly

        @torch.no_grad()
        def act(codes: Tensor) -> Tensor:
            actions = learner.act(codes.to(self.device), goals.to(self.device)).cpu()
            if not explores:
                return actions
            noise = torch.randn(actions.shape, generator=self.generator)
            return (actions + NOISE * noise).clamp(-1, 1)

        return act

    def _act_randomly(self, codes: Tensor) -> Tensor:
        shape = (len(codes), self.arena.environment.actions)
        return 2 * torch.rand(shape, generator=self.generator) - 1

    def describe(self) -> dict[str, Any]:
        """The budget that was used, and the speed, as JSON values."""
        steps = len(self.replay)
        speeds = {"environment_steps_a_second": round(steps / self.acting, 1)}
        if self.learner is not None:
            speeds["gradient_steps_a_second"] = round(self.gradient_steps / self.learning, 1)
        used = {"environment_steps": steps, "gradient_steps": self.gradient_steps}
        return {**used, **speeds, "horizon": self.arena.horizon}
