"""The schedule of a training: its length, its batches, and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from sslrun import distributed
from sslrun.errors import UserError
from sslrun.training.device import Compile, Precision
from sslrun.training.optim import OptimizerOptions, Shape


class Schedule(OptimizerOptions):
    """How long, in what batches and how fast something is trained."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the data; this or `steps`."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; this or `epochs`."""
    batch: int = Field(256, ge=1)
    """Examples an optimizer step, over all devices."""
    by_length: bool = True
    """Where examples differ in length: those of a batch are of like length, that little is computed on padding."""
    accumulate: int = Field(1, ge=1)
    """Parts that a batch is computed in, one after the other. A contrastive loss compares within a part only."""
    warmup: float = Field(0.0, ge=0)
    """Epochs in which the learning rate rises; of a training that is shorter, a trial's `epochs=1`, it rises to the end."""
    schedule: Shape = "cosine"
    """What the learning rate does after that."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """With `schedule: step`: the shares of training at which the learning rate falls."""
    gamma: float = Field(0.1, gt=0, lt=1)
    """With `schedule: step`: what it is multiplied by there."""
    clip: float | None = Field(None, gt=0)
    """Highest global norm of the gradient."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of the moving average of the weights that is evaluated and kept instead of the last ones; 0: none."""
    precision: Precision = "auto"
    """auto: bf16 autocast where the device multiplies natively in it."""
    compile: Compile = "auto"
    """torch.compile; auto: on CUDA, for trainings long enough to earn it."""

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if (self.epochs is None) == (self.steps is None):
            both = "" if self.steps is None else "; to go from one to the other, set the other to null"
            raise ValueError(f"give either epochs or steps{both}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch ({self.batch}) is not a multiple of accumulate ({self.accumulate})")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("schedule: step and milestones go together")
        return self

    def steps_an_epoch(self, examples: int) -> int:
        """Whole batches in an epoch. UserError where there is none."""
        if self.batch > examples:
            lower = 2 ** (examples.bit_length() - 1)
            raise UserError(f"a batch of {self.batch} is larger than the {examples} examples: lower batch to {lower}")
        return examples // self.batch

    def within(self, examples: int) -> Schedule:
        """The same with a batch of at most so many examples; its parts are no larger, and devices share them evenly."""
        if self.batch <= examples:
            return self
        parts = math.ceil(examples / (self.batch // self.accumulate))
        batch = examples - examples % (parts * distributed.world_size())
        return self.model_copy(update={"batch": batch or examples, "accumulate": parts if batch else 1})

    def total_steps(self, examples: int) -> int:
        """Optimizer steps in all. UserError where the data holds no batch."""
        epoch = self.steps_an_epoch(examples)
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * epoch))
