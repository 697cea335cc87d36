"""Pictures of an environment under random actions: images whose labels are the states."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sslrun.data.control.environments import Environment, make_environment
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.image.images import convert_arrays
from sslrun.data.image.sources import Side
from sslrun.data.source import Source, SourceOptions, sources
from sslrun.data.specs import ImageSpec
from sslrun.data.stores import Split
from sslrun.seeds import derive_seed

PARALLEL = 50
"""Episodes played at a time."""


@sources.register("pictures")
class PicturesSource(Source):
    """Pictures of an environment under random actions, as in pictures:point: no download.

    Labels are the states, such as positions, which the task numbers predicts. The first stage of
    imagined goals learns from the pictures (Nair et al., NeurIPS 2018, arXiv:1807.04742).
    """

    gives = ImageSpec
    task = "reach"
    shorthand = "environment"
    splits = ("train", "val", "test")

    class Options(SourceOptions):
        environment: str = "point"
        """Environment to picture, such as point, point:wall or gymnasium:Pendulum-v1."""
        pictures: int = Field(2000, ge=20)
        """Number of pictures to train on; a tenth as many more are for validation and test."""
        every: int = Field(10, ge=1)
        """Number of steps between two pictures of an episode; the first shows its beginning."""
        size: Side | None = None
        """Side of the pictures, in pixels; default: the environment's."""
        seed: int = Field(0, ge=0)
        """Seed of the episodes."""

    options: PicturesSource.Options

    @cached_property
    def environment(self) -> Environment:
        """Raises UserError if it cannot be made."""
        return make_environment(self.options.environment)

    def check_available(self) -> None:
        """Raises UserError if the environment cannot be made or has no pictures."""
        self.sketch(1)

    def load(self, split: Split) -> TensorExamples:
        options, number = self.options, self.splits.index(split)
        count = options.pictures if number == 0 else options.pictures // 10
        seed = derive_seed(options.seed, number)
        images, states = take_pictures(self.environment, count, options.every, seed, options.size)
        return TensorExamples(images, states, (), ImageSpec.of(images.shape))

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        """Raises UserError if the environment cannot be made or has no pictures."""
        self.environment.reset(list(range(count)))
        images = render(self.environment, self.options.size)
        return ImageSpec.of(images.shape), Batch(images, None)

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 2,000 pictures, and a tenth as many for validation and test",
            "made": "by seeded random actions, in seconds",
            "labels": "the states; the default task is reach, and numbers predicts them",
            "license": "none needed",
        }


def render(environment: Environment, size: int | None = None) -> Tensor:
    """Pictures (B, 3, size, size) uint8 of the current states; default: in their own size.

    Raises:
        UserError: the environment has no pictures, or they are not square and no size is given.
    """
    return convert_arrays(environment.picture().transpose(0, 2, 3, 1), size)


def take_pictures(
    environment: Environment, count: int, every: int, seed: int, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Take pictures in episodes of random actions, at each `every`-th step.

    Returns pictures (N, 3, size, size) uint8 and the states (N, S) float32 that they show. Each
    episode follows from `seed` and its number.
    """
    images: list[Tensor] = []
    states: list[np.ndarray] = []
    episode = found = 0
    while found < count:
        seeds = [derive_seed(seed, number) for number in range(episode, episode + PARALLEL)]
        episode += PARALLEL
        draws = np.stack([_draw_actions(environment, one) for one in seeds], axis=1)
        state, done = environment.reset(seeds), np.zeros(PARALLEL, bool)
        for time, uniform in enumerate(draws):
            if time % every == 0:
                images.append(render(environment, size)[torch.from_numpy(~done)])
                states.append(state[~done])
                found += len(states[-1])
            state, _, done = environment.step(environment.random_actions(uniform))
            if done.all() or found >= count:
                break
    return torch.cat(images)[:count], torch.from_numpy(np.concatenate(states)[:count])


def _draw_actions(environment: Environment, seed: int) -> np.ndarray:
    """The draws (horizon, A) of an episode's actions, apart from the environment's own."""
    return np.random.default_rng(derive_seed(seed, 1)).random(
        (environment.horizon, environment.actions)
    )
