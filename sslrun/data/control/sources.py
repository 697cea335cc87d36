"""Sources of trajectories: made by scripted policies in seconds, and files of the user."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from sslrun.data.control.collect import Behavior, collect
from sslrun.data.control.environments import Environment, make_environment
from sslrun.data.control.files import read_trajectories
from sslrun.data.control.trajectories import Episodes, Trajectories, WindowExamples
from sslrun.data.examples import Batch
from sslrun.data.source import Source, SourceOptions, Validation, sources
from sslrun.data.specs import ControlSpec
from sslrun.data.splits import VAL_FRACTION, carve
from sslrun.data.stores import Split
from sslrun.seeds import derive_seed


class ControlOptions(SourceOptions):
    """Options of sources of trajectories."""

    validation: Validation = None
    """Trajectories to validate on. 0: none are held out of a file. Default: a tenth of the number
    to train on."""
    context: int = Field(20, ge=1)
    """Number of steps in a window, K."""
    scale: float | None = Field(None, gt=0)
    """Divisor of returns; default: the environment's."""
    top: float = Field(1.0, gt=0, le=1)
    """Share of the steps to keep: those of the trajectories with the highest returns. 0.1 is the
    data of 10 % behavior cloning."""

    @model_validator(mode="after")
    def _validate_on_trajectories(self) -> ControlOptions:
        if self.validation not in (None, 0, "split"):
            raise ValueError(
                "validation takes whole trajectories, always a tenth of their number: leave "
                "validation out, or set 0"
            )
        if self.pretrain_on == "all":
            raise ValueError("pretrain_on: all is for other data: set validation: 0 instead")
        return self


class ControlSource(Source):
    """Windows of trajectories in one environment."""

    gives = ControlSpec
    task = "returns"
    splits = ("train", "val", "test")
    options: ControlOptions

    @property
    def environment_title(self) -> str:
        """The name of the environment."""
        raise NotImplementedError

    def episodes(self, split: Split) -> Episodes:
        """The trajectories of a split."""
        raise NotImplementedError

    @cached_property
    def environment(self) -> Environment:
        """An environment for its shapes. Raises UserError if it cannot be made."""
        return make_environment(self.environment_title)

    @property
    def spec(self) -> ControlSpec:
        environment = self.environment
        return ControlSpec(
            environment=environment.title,
            states=environment.state_size,
            actions=environment.actions,
            low=environment.low,
            high=environment.high,
            horizon=environment.horizon,
            context=self.options.context,
            scale=self.options.scale or environment.scale,
        )

    def load(self, split: Split) -> WindowExamples:
        episodes = self.episodes(split)
        if self.options.top < 1:
            episodes = episodes.best(self.options.top)
        return WindowExamples.of(episodes, self.spec)

    def sketch(self, count: int) -> tuple[ControlSpec, Batch]:
        spec = self.spec
        shape = (count, spec.context)
        actions = (
            torch.randint(0, spec.actions, shape)
            if spec.is_discrete
            else torch.zeros(*shape, spec.actions)
        )
        windows = Trajectories(
            torch.randn(*shape, spec.states),
            actions,
            torch.zeros(shape),
            torch.arange(spec.context).expand(shape),
            torch.ones(shape, dtype=torch.bool),
            torch.randn(count, spec.states),
        )
        return spec, Batch(windows, None)

    @classmethod
    def inherit_options(cls, data: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Windows of an evaluation are as long as those of pretraining, and returns as large."""
        return {"context": data["context"], "scale": data["scale"]}


# ---------------------------------------------------------------- made by scripted policies


class MadeOptions(ControlOptions):
    """Options of trajectories that are made by scripted policies."""

    behavior: Behavior = "random"
    """Policy that collects the trajectories. random: random actions. expert: a scripted expert.
    medium: the expert, with a random action in half of the steps. medium-expert: both in turn.
    replay: the share of random actions falls evenly from 1 to 0 over the trajectories."""
    trajectories: int = Field(1000, ge=10)
    """Number of trajectories to train on; a tenth as many more are for validation."""
    seed: int = Field(0, ge=0)
    """Seed of the trajectories."""


class MadeSource(ControlSource):
    """Trajectories that a scripted policy makes."""

    options: MadeOptions

    @property
    def environment_title(self) -> str:
        return self.name

    def episodes(self, split: Split) -> Episodes:
        options, number = self.options, self.splits.index(split)
        count = options.trajectories if number == 0 else options.trajectories // 10
        seed = derive_seed(options.seed, number)
        return collect(self.environment_title, options.behavior, count, seed)

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 1,000 trajectories, and a tenth as many for validation and test",
            "made": "by seeded random actions and a scripted expert, in seconds, and kept in the "
            "cache",
            "license": "none needed",
        }


@sources.register("paths")
class PathsSource(MadeSource):
    """Walks in a fixed random directed graph of 20 nodes toward one of them: no download.

    The experiment on shortest paths in the appendix of Chen et al. 2021 (arXiv:2106.01345).
    """

    class Options(MadeOptions):
        context: int = Field(10, ge=1)
        """Number of steps in a window, K."""


@sources.register("key-to-door")
class KeyToDoorSource(MadeSource):
    """Trajectories through three rooms, rewarded at the end if a key was taken: no download.

    After Mesnard et al. (ICML 2021), as in Chen et al. 2021 (arXiv:2106.01345).
    """

    class Options(MadeOptions):
        context: int = Field(15, ge=1)
        """Number of steps in a window, K."""


@sources.register("point")
class PointSource(MadeSource):
    """Trajectories of a point that should move to the center of a square: no download."""

    class Options(MadeOptions):
        wall: bool = False
        """Put a U-shaped wall around the center."""

    options: PointSource.Options

    @property
    def environment_title(self) -> str:
        return "point:wall" if self.options.wall else "point"


@sources.register("gymnasium")
class GymnasiumSource(MadeSource):
    """Trajectories in an environment of gymnasium, as in gymnasium:Pendulum-v1.

    Only Pendulum has a scripted expert; the others take behavior: random.
    """

    shorthand = "environment"

    class Options(MadeOptions):
        environment: str = "Pendulum-v1"
        """Name of the environment in gymnasium."""
        trajectories: int = Field(200, ge=10)
        """Number of trajectories to train on; a tenth as many more are for validation."""

    options: GymnasiumSource.Options

    @property
    def environment_title(self) -> str:
        return f"gymnasium:{self.options.environment}"


# ---------------------------------------------------------------- files


@sources.register("trajectories")
class FileSource(ControlSource):
    """Trajectories in a file: D4RL's HDF5, .npz with the same keys, or a folder of Minari."""

    class Options(ControlOptions):
        path: Path
        """An .hdf5 or .npz file with observations, actions, rewards, terminals and timeouts, or a
        Minari data set's folder."""
        environment: str
        """Environment that the trajectories are from, such as gymnasium:Hopper-v5."""

    options: FileSource.Options

    @property
    def environment_title(self) -> str:
        return self.options.environment

    def check_available(self) -> None:
        _ = self.environment
        read_trajectories(self.options.path, self.environment)

    def episodes(self, split: Split) -> Episodes:
        """All trajectories, or without those that are held out; "val" and "test" are the same."""
        episodes = read_trajectories(self.options.path, self.environment)
        if self.options.validation == 0 and split == "train":
            return episodes
        train, held_out = carve(len(episodes), VAL_FRACTION)
        return episodes.select(train if split == "train" else held_out)

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "a tenth of the trajectories is held out for validation",
            "keys": "observations, actions, rewards, terminals, timeouts",
        }
