"""Options of practice."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sslrun.registry import Options


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
