"""Classification of clips, with an image backbone on each frame."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sslrun.backbones.base import Features
from sslrun.data.examples import Batch
from sslrun.data.specs import ImageSpec, VideoSpec
from sslrun.errors import UserError
from sslrun.tasks.base import tasks
from sslrun.tasks.classification import Classification


@tasks.register("clips")
class Clips(Classification):
    """Classify clips by the features of their frames. All metrics are in percent.

    The backbone reads each frame alone. With `pool: mean` a linear head gives the mean of its
    scores of the frames, as action recognition with image networks is tested (Misra et al. 2016).
    All frames of a clip are augmented by the same random draws.
    """

    class Options(Classification.Options):
        pool: Literal["mean", "concat"] = "mean"
        """How the features of frames become those of a clip. mean: their mean, which does not
        depend on their order. concat: side by side in time's order, so that a head can read
        motion."""

        @property
        def reads_order(self) -> bool:
            return self.pool == "concat"

    reads, gives = VideoSpec, ImageSpec
    options: Clips.Options

    def __init__(self, options: Clips.Options, spec: VideoSpec, classes: tuple[str, ...]) -> None:
        super().__init__(options, spec.frame, classes)
        self.frames = spec.frames

    def head(self, width: int, depth: int = 0) -> nn.Linear:
        return super().head(width * self.frames if self.options.reads_order else width, depth)

    def join(self, features: Features) -> Features:
        """Features of clips (B, D) from those of frames (B * T, D): their mean, or (B, T * D).

        Tokens of all frames follow one another: (B, T * P, D).
        """
        pooled = features.pooled.unflatten(0, (-1, self.frames))
        pooled = pooled.flatten(1) if self.options.reads_order else pooled.mean(dim=1)
        tokens = features.tokens
        if tokens is not None:
            tokens = tokens.unflatten(0, (-1, self.frames)).flatten(1, 2)
        return Features(pooled, tokens)

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented frames (B * T, C, H, W), and targets of clips (B, ...)."""
        state = generator.get_state()
        views = []
        for frame in self._checked(batch.inputs).unbind(dim=1):
            generator.set_state(state)  # the same draws for every frame of a clip
            views.append(super().views(Batch(frame, batch.labels), generator))
        images, targets = zip(*views, strict=True)
        return torch.stack(images, dim=1).flatten(0, 1), targets[0]

    def inputs(self, batch: Batch) -> Tensor:
        """All frames (B * T, C, H, W) of clips."""
        return super().inputs(Batch(self._checked(batch.inputs).flatten(0, 1), None))

    def _checked(self, clips: Any) -> Tensor:
        """Return clips (B, T, C, H, W). Raises UserError if T is not that of training clips."""
        assert isinstance(clips, Tensor)
        if clips.shape[1] != self.frames:
            raise UserError(
                f"the task '{self.name}' needs clips of one length, but these have "
                f"{clips.shape[1]} frames and those of training {self.frames}: set "
                f"data.test_frames: {self.frames}"
            )
        return clips
