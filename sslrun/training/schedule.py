"""The schedule of a training: its length, its batches and its learning rate."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from sslrun import distributed
from sslrun.errors import UserError
from sslrun.training.device import Compile, Precision
from sslrun.training.optim import OptimizerOptions, Shape


class Schedule(OptimizerOptions):
    """The schedule of a training: its length, its batches and its learning rate."""

    epochs: float | None = Field(None, gt=0)
    """Number of passes over the data. Give this or `steps`."""
    steps: int | None = Field(None, ge=1)
    """Number of optimizer steps. Give this or `epochs`."""
    batch: int = Field(256, ge=1)
    """Number of examples in an optimizer step, over all devices."""
    by_length: bool = True
    """Batch examples of similar length together, to waste less compute on padding."""
    accumulate: int = Field(1, ge=1)
    """Number of parts that a batch is split into to save memory; they are computed one after the
    other. A contrastive loss then compares examples of the same part only."""
    warmup: float = Field(0.0, ge=0)
    """Linear learning-rate warmup, in epochs; capped at the length of training."""
    schedule: Shape = "cosine"
    """Shape of the learning rate after the warmup."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """With `schedule: step`: shares of training, in (0, 1), after which the learning rate drops."""
    gamma: float = Field(0.1, gt=0, lt=1)
    """With `schedule: step`: factor on the learning rate at each milestone."""
    lr_end: float = Field(0.0, ge=0)
    """Learning rate at the end of `schedule: cosine` or `linear`."""
    clip: float | None = Field(None, gt=0)
    """Largest global norm of the gradient; larger gradients are scaled down to it. Default: no
    clipping."""
    clip_each: float | None = Field(None, gt=0)
    """Largest norm of each parameter tensor's gradient, as in DINO (Caron et al. 2021); larger ones
    are scaled down to it. Default: no clipping."""
    freeze_last: float = Field(0.0, ge=0)
    """Epochs at the start in which the last layer of the pretext task's head does not learn, as in
    DINO and SwAV."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is evaluated and saved instead of the last
    weights; 0: off."""
    precision: Precision = "auto"
    """Precision of the forward pass. auto: bf16 autocast where the device multiplies natively in
    bf16, else fp32."""
    compile: Compile = "auto"
    """Whether to use torch.compile. auto: on CUDA, if training is long enough to repay the
    compilation."""

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        given = [value for value in self._lengths.values() if value is not None]
        if len(given) != 1:
            remedy = "; set the other one to null" if given else ""
            raise ValueError(f"give either {' or '.join(self._lengths)}{remedy}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch ({self.batch}) is not a multiple of accumulate ({self.accumulate})"
            )
        lowest = min(self.lr) if isinstance(self.lr, tuple) else self.lr
        if self.lr_end > lowest:
            raise ValueError(f"lr_end ({self.lr_end:g}) is higher than lr ({lowest:g}): lower it")
        if self.clip is not None and self.clip_each is not None:
            raise ValueError("clip and clip_each contradict each other: set one")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("schedule: step and milestones go together: set both or neither")
        return self

    @property
    def seconds(self) -> float | None:
        """Seconds of training; None: epochs or steps give its length."""
        return None

    @property
    def _lengths(self) -> dict[str, float | None]:
        """The options that may give the length of training; one of them must."""
        return {"epochs": self.epochs, "steps": self.steps}

    def steps_an_epoch(self, examples: int) -> int:
        """Number of whole batches in an epoch of `examples` examples.

        Raises:
            UserError: the batch is larger than the data.
        """
        if self.batch > examples:
            lower = 2 ** (examples.bit_length() - 1)
            raise UserError(
                f"a batch of {self.batch} is larger than the {examples} examples: "
                f"lower batch to {lower}"
            )
        return examples // self.batch

    def within(self, examples: int) -> Schedule:
        """The same schedule with a batch of at most `examples`.

        The parts of the batch do not grow, and devices share them evenly.
        """
        if self.batch <= examples:
            return self
        parts = math.ceil(examples / (self.batch // self.accumulate))
        batch = examples - examples % (parts * distributed.world_size())
        return self.model_copy(
            update={"batch": batch or examples, "accumulate": parts if batch else 1}
        )

    def planned_steps(self, examples: int) -> int | None:
        """Number of optimizer steps of the training; None if the time decides (`seconds`)."""
        return None if self.seconds is not None else self.total_steps(examples)

    def total_steps(self, examples: int) -> int:
        """Number of optimizer steps of the training on `examples` examples.

        Raises:
            UserError: the batch is larger than the data.
        """
        epoch = self.steps_an_epoch(examples)
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * epoch))
