"""The protocol `practice`: learn to reach imagined goals, and be tested on goals in pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from sslrun.data.examples import Examples
from sslrun.errors import UserError
from sslrun.pretexts.autoencoder import Autoencoder
from sslrun.pretexts.base import Pretext
from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.protocols.practice.episodes import Arena, Episodes
from sslrun.protocols.practice.options import PracticeOptions
from sslrun.protocols.practice.session import PRACTICE, Session
from sslrun.protocols.practice.spaces import LatentSpace, Space, StateSpace
from sslrun.protocols.rollout import episode_seeds
from sslrun.seeds import derive_seed
from sslrun.tasks.base import Task, TaskOptions
from sslrun.tasks.reach import BINS, Cells, Reach, describe_codes, entropy

OWN_METRICS = ("final_distance", "coverage_entropy", "neighbor_r2", "rank_correlation")
"""Metrics with columns of their own. The last three are the protocol's: the entropy of the cells
that practice visited, and what `describe_codes` measures on the codes that the policy sees."""
REMEDY = "take pretext: {name: autoencoder, latent: 4, beta: 0.1}"
"""How to get a latent space."""
DRAWN = 8
"""Number of test episodes that are drawn."""


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
