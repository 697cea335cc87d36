"""The initial weights of an evaluation's backbone, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sslrun.backbones.weights import WEIGHTS
from sslrun.errors import UserError
from sslrun.files import checksum
from sslrun.recipe import Recipe
from sslrun.stages.devices import on_known_devices
from sslrun.stages.pretrain import Pretraining


@dataclass(frozen=True)
class InitialWeights:
    """The initial weights of an evaluation's backbone."""

    identity: dict[str, Any]
    """What determines the weights, as JSON values."""
    weights: Path | None = None
    """The file of the weights; None: initialized by the seed."""
    pretraining: Pretraining | None = None
    """The job that writes the file, if the recipe has one."""
    normalization: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """`mean` and `std` of the images' channels; they replace those in the file."""

    @property
    def exists(self) -> bool:
        """Whether the file exists or none is needed."""
        return self.weights is None or self.weights.is_file()

    @classmethod
    def initial(cls, recipe: Recipe, seed: int) -> InitialWeights:
        """Use random weights, or the pretrained weights that the backbone itself brings."""
        return cls({"initial": recipe.backbone.identity(), "seed": seed})

    @classmethod
    def pretrained(cls, recipe: Recipe, seed: int, root: Path) -> InitialWeights:
        """Use the weights of the recipe's pretraining, of its file, or the initial ones."""
        if recipe.weights is not None:
            normalization = recipe.weights.model_dump(include={"mean", "std"}, exclude_none=True)
            return cls.file(recipe.weights.file, normalization)
        if recipe.pretext is None:
            return cls.initial(recipe, seed)
        job = on_known_devices(partial(Pretraining, recipe, seed, root), root / recipe.name)
        job = job.known()
        return cls({"pretrain": job.run.hash}, job.weights, job)

    @classmethod
    def file(
        cls, path: Path, normalization: dict[str, tuple[float, ...]] | None = None
    ) -> InitialWeights:
        """Use the weights in a run's folder or in a file. Raises UserError if there are none."""
        weights = path / WEIGHTS if path.is_dir() else path
        normalization = normalization or {}
        if not weights.is_file():
            raise UserError(
                f"{path}: no checkpoint there; name a pretraining run's folder or its {WEIGHTS}"
            )
        # The checksum covers kept modules, too: the file of the weights holds theirs.
        identity = {"checkpoint": checksum(weights), **normalization}
        return cls(identity, weights, normalization=normalization)
