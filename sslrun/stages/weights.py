"""Where the weights of an evaluation's backbone come from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslrun.backbones.weights import WEIGHTS
from sslrun.errors import UserError
from sslrun.recipe import Recipe
from sslrun.stages.pretrain import Pretraining


@dataclass(frozen=True)
class InitialWeights:
    """Where an evaluation's backbone comes from."""

    identity: dict[str, Any]
    """What determines its weights."""
    weights: Path | None = None
    """The file; None: as initialized by the seed."""
    pretraining: Pretraining | None = None
    """The job that writes the file, if the recipe has one."""
    normalization: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """`mean` and `std` of the images' channels, in place of those in the file."""

    @property
    def exists(self) -> bool:
        """Whether the file is there, or none is needed."""
        return self.weights is None or self.weights.is_file()

    @classmethod
    def initial(cls, recipe: Recipe, seed: int) -> InitialWeights:
        """Random weights, or those that the backbone itself brings."""
        return cls({"initial": recipe.backbone.identity(), "seed": seed})

    @classmethod
    def pretrained(cls, recipe: Recipe, seed: int, root: Path) -> InitialWeights:
        """The weights of the recipe's pretraining, or of the file it names, or the initial ones."""
        if recipe.weights is not None:
            given = recipe.weights
            return cls.file(
                given.file, given.model_dump(include={"mean", "std"}, exclude_none=True)
            )
        if recipe.pretext is None:
            return cls.initial(recipe, seed)
        job = Pretraining(recipe, seed, root)
        return cls({"pretrain": job.run.hash}, job.weights, job)

    @classmethod
    def file(
        cls, path: Path, normalization: dict[str, tuple[float, ...]] | None = None
    ) -> InitialWeights:
        """The weights in a run's folder or in a file. Raises UserError if there are none."""
        weights = path / WEIGHTS if path.is_dir() else path
        normalization = normalization or {}
        if not weights.is_file():
            raise UserError(
                f"{path}: no checkpoint there; name a pretraining run's folder or its {WEIGHTS}"
            )
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls({"checkpoint": digest, **normalization}, weights, normalization=normalization)
