"""Frame order: Shuffle and Learn (Misra, Zitnick & Hebert, ECCV 2016, arXiv:1603.08561) and OPN
(Lee, Huang, Singh & Yang, ICCV 2017, arXiv:1708.01246)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import flip, patches, to_float
from sslrun.data.specs import ImageSpec, InputSpec, VideoSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import NormOptions, Pretext, pretexts
from sslrun.training.learner import Output

VERIFIED = 5
"""Number of frames a < b < c < d < e that a triple to verify is taken from."""
TRIPLES = ((1, 2, 3), (1, 0, 3), (1, 4, 3))
"""(b, c, d), which is in order, and (b, a, d) and (b, e, d), which are not."""
TRIPLE_SHARES = (0.25, 0.375, 0.375)
"""Shares of the triples in a batch; the paper has a quarter in order."""
JITTER = 1 / 16
"""Default shift of a frame as a share of the side; the authors move 80 pixels by up to 5."""
LEAST_MOTION = 1e-3
"""Motion that is added everywhere, so that still films can be drawn from; pixels are in 0 to
255."""
SAMPLE = 64
"""Number of clips that are looked at to see whether films are gray."""


@pretexts.register("order")
class Order(Pretext):
    """Tell in which order the frames of a film are shown.

    `opn` names the order of four shuffled frames. An order and its reverse are one class, since
    many motions may run backward: 12 classes. Lee et al., ICCV 2017 (arXiv:1708.01246); options and
    head follow the authors' code (github.com/HsinYingLee/OPN). `verify` tells whether three frames
    are in order, forward or backward, or the middle one is from before or after. Misra et al., ECCV
    2016 (arXiv:1603.08561).

    The backbone reads each frame alone, and a head compares the frames (late fusion). Frames can
    also be ordered without motion, by traces of compression or by light that slowly changes. Each
    frame is therefore moved by itself and shows one random channel; `drift` also hides brightness.

    Deviations: frames, and the place of the crop, are drawn with probability in proportion to
    motion, measured by differences of frames; the authors choose both once, by optical flow. The
    crop is the whole frame unless `crop` is set. Frames of `verify` get one layer of the head's
    before they are compared, as those of `opn`; the paper has CaffeNet's two. Batch norm and
    dropout of `opn` also serve `verify`.
    """

    reads, gives = VideoSpec, ImageSpec

    class Options(NormOptions):
        kind: Literal["opn", "verify"] = "opn"
        """opn: name the order of `frames` frames. verify: tell whether three of five are in
        order."""
        frames: int = Field(default=4, ge=3, le=5)
        """Number of frames that `kind: opn` orders; n frames have n!/2 orders."""
        by_motion: bool = True
        """Prefer frames and places with much motion. Otherwise, all are equally likely."""
        crop: int | None = Field(default=None, ge=4)
        """Side of the part of each frame that is shown, in pixels; a multiple of the backbone's
        patch. Default: the largest that leaves room for the jitter. OPN shows 80 pixels."""
        jitter: int | None = Field(default=None, ge=0)
        """Largest random shift of each frame by itself along each axis, in pixels; default: a
        sixteenth of the side, as in OPN."""
        mirror: float = Field(default=0.5, ge=0, le=1)
        """Probability of mirroring all frames of a clip left to right."""
        split_channels: bool = True
        """Show each frame as one of its channels, drawn for each frame, in place of its colors."""
        drift: float = Field(default=0.0, ge=0, lt=1)
        """Strength s of the defense against changing light, which the papers do not have: each
        frame gets the clip's mean and deviation in place of its own, then contrast times 1 - s to
        1 + s, and brightness plus -s to s. 0: off. Simulated films should have it, as in 0.2."""
        features: int = Field(default=1024, ge=1)
        """Width of the head's layer for a single frame."""
        hidden: int = Field(default=512, ge=1)
        """Width of the head's layer for a pair of frames, of `kind: opn`."""
        dropout: float = Field(default=0.5, ge=0, lt=1)
        """Dropout of the head's layers."""

        @model_validator(mode="after")
        def _frames_of_opn(self) -> Order.Options:
            if self.kind == "verify" and self.frames != 4:
                raise ValueError("kind: verify always shows three of five frames: leave out frames")
            return self

        @property
        def drawn(self) -> int:
            """The number of frames that are drawn from a clip."""
            return VERIFIED if self.kind == "verify" else self.frames

    options: Options
    orders: Tensor
    """(K, n) int64: positions, among the drawn frames, of the n frames that are shown."""
    shares: Tensor
    """(K,): probability of each order."""
    classes: Tensor
    """(K,) int64: class of each order, and of its reverse."""
    gray: Tensor
    """0-d bool: whether the films are gray."""

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.crop, self.jitter = _window(options, backbone)
        orders: Sequence[tuple[int, ...]]
        if options.kind == "verify":
            orders, shares, classes = TRIPLES, torch.tensor(TRIPLE_SHARES), [1, 0, 0]
        else:
            orders = list_orders(options.frames)
            shares, classes = torch.ones(len(orders)) / len(orders), list(range(len(orders)))
        self.register_buffer("orders", torch.tensor(orders), persistent=False)
        self.register_buffer("shares", shares, persistent=False)
        self.register_buffer("classes", torch.tensor(classes), persistent=False)
        self.register_buffer("gray", torch.tensor(False))
        head = FrameHead if options.kind == "verify" else PairHead
        self.head = head(backbone.width, len(orders[0]), max(classes) + 1, options)

    @classmethod
    def backbone_spec(cls, options: Options, spec: InputSpec) -> ImageSpec:
        """The spec of a frame. Raises UserError if clips are shorter than the frames to draw."""
        assert isinstance(spec, VideoSpec)
        if spec.frames < options.drawn:
            raise UserError(
                f"pretext 'order' draws {options.drawn} frames from a clip, and these have "
                f"{spec.frames}: set data.frames: {options.drawn} or more"
            )
        return spec.frame

    def fit(self, examples: Examples) -> None:
        """See whether the films are gray, so that splitting channels changes nothing."""
        some = torch.arange(min(SAMPLE, len(examples)))
        (batch,) = examples.batches([some], self.gray.device)
        self.gray.copy_((batch.inputs == batch.inputs[:, :, :1]).all())

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Frames (B, n, C, crop, crop) in the order in which they are shown, and classes (B,)."""
        clips = batch.inputs
        still = torch.zeros_like(clips[:, 1:, 0], dtype=torch.float32)
        motion = motion_of(clips) if self.options.by_motion else still
        motion = motion + LEAST_MOTION
        order, targets = self._draw_order(len(clips), generator)
        chosen = self._draw_frames(motion, generator).gather(1, order)
        shown = clips[torch.arange(len(clips), device=clips.device)[:, None], chosen]
        return self._disguise(self._cut(shown, motion, generator), generator), targets

    def _draw_order(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Positions (B, n) among the drawn frames, forward or backward, and classes (B,)."""
        rows = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        backward = torch.rand(count, 1, generator=generator, device=rows.device) < 0.5
        orders = self.orders[rows]
        return torch.where(backward, orders.flip(1), orders), self.classes[rows]

    def _draw_frames(self, motion: Tensor, generator: torch.Generator) -> Tensor:
        """Different frames (B, drawn) of each clip in time's order, by `motion` (B, T - 1, H, W).

        A frame's motion is that from the frame before and to the one after.
        """
        between = motion.mean(dim=(2, 3))
        weights = F.pad(between, (1, 0)) + F.pad(between, (0, 1))
        drawn = torch.multinomial(weights, self.options.drawn, generator=generator)
        return drawn.sort(dim=1).values

    def _cut(self, frames: Tensor, motion: Tensor, generator: torch.Generator) -> Tensor:
        """Cut the crop out of frames (B, n, C, H, W): at one place per clip, then moved by frame.

        All frames of a clip are mirrored or none. Returns float in [0, 1].
        """
        count, shown = frames.shape[:2]
        extent = self.crop + 2 * self.jitter
        # The motion in every window of that side, (B, places): averaged along rows, then columns.
        windows = F.avg_pool2d(motion.mean(dim=1, keepdim=True), (extent, 1), stride=1)
        windows = F.avg_pool2d(windows, (1, extent), stride=1)[:, 0]
        place = torch.multinomial(windows.flatten(1), 1, generator=generator)
        columns = windows.shape[2]
        corners = torch.stack([place // columns, place % columns], dim=2)
        moves = torch.randint(
            0, 2 * self.jitter + 1, (count, shown, 2), generator=generator, device=frames.device
        )
        cut = patches(frames.flatten(0, 1), (corners + moves).flatten(0, 1), self.crop)
        mirrored = torch.rand(count, generator=generator, device=frames.device)
        mask = (mirrored < self.options.mirror).repeat_interleave(shown)
        return flip(to_float(cut), mask).unflatten(0, (count, shown))

    def _disguise(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Hide what gives the order of frames (B, n, C, s, s) away without motion."""
        if self.options.split_channels:
            frames = split_channels(frames, generator)
        if self.options.drift:
            frames = even_light(frames, self.options.drift, generator)
        return frames

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        frames, targets = views
        pooled = self.backbone(frames.flatten(0, 1)).pooled
        scores = self.head(pooled).float()
        correct = (scores.detach().argmax(dim=1) == targets).float().mean()
        return Output(F.cross_entropy(scores, targets), {"accuracy": correct})

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Loss and accuracy of the order; guessing has the accuracy of the most frequent class."""
        output = self(self.views(batch, generator))
        return {"held_out_loss": output.loss, "held_out_accuracy": output.metrics["accuracy"]}

    def floor(self, examples: Examples) -> float:
        """The entropy of the classes: the loss of guessing."""
        shares = torch.zeros(int(self.classes.max()) + 1, device=self.shares.device)
        shares = shares.index_add(0, self.classes, self.shares)
        return float(-(shares * shares.log()).sum())

    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The frames as the task shows them."""
        frames, _ = self.views(batch, generator)
        pictures = frames.clamp(0, 1).expand(-1, -1, 3, -1, -1).unbind(dim=1)
        return {f"shown {number}": picture for number, picture in enumerate(pictures, start=1)}

    def diagnose(self, metrics: Mapping[str, float]) -> str | None:
        if bool(self.gray) and self.options.split_channels:
            return (
                "the films are gray, so that pretext.split_channels changes nothing: set it to "
                "false, and drift: 0.2 against light that changes"
            )
        return None


class FrameHead(nn.Module):
    """Compare frames side by side: one shared layer for each, then a linear map of all."""

    def __init__(self, width: int, frames: int, classes: int, options: Order.Options) -> None:
        super().__init__()
        self.frames = frames
        self.frame = _layer(width, options.features, options.dropout)
        self.classify = nn.Linear(frames * options.features, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Scores (B, classes) of frames (B * n, D)."""
        return self.classify(self.frame(pooled).unflatten(0, (-1, self.frames)).flatten(1))


class PairHead(nn.Module):
    """Compare all pairs of frames by a shared layer, then classify by a linear map of all pairs."""

    def __init__(self, width: int, frames: int, classes: int, options: Order.Options) -> None:
        super().__init__()
        self.frames = frames
        self.pairs = list(itertools.combinations(range(frames), 2))
        self.frame = _layer(width, options.features, options.dropout)
        self.pair = _layer(2 * options.features, options.hidden, options.dropout)
        self.classify = nn.Linear(len(self.pairs) * options.hidden, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Scores (B, classes) of frames (B * n, D)."""
        frames = self.frame(pooled).unflatten(0, (-1, self.frames))
        # (B, pairs, 2 * features): each pair's features side by side.
        pairs = torch.stack([frames[:, pair].flatten(1) for pair in self.pairs], dim=1)
        compared = self.pair(pairs.flatten(0, 1))
        return self.classify(compared.unflatten(0, (-1, len(self.pairs))).flatten(1))


def _layer(before: int, after: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(before, after, bias=False),
        nn.BatchNorm1d(after),
        nn.ReLU(),
        nn.Dropout(dropout),
    )


def list_orders(frames: int) -> list[tuple[int, ...]]:
    """List one of each permutation and its reverse: 12 for four frames.

    The authors' list names some by the reverse; a class is the same either way.
    """
    return [order for order in itertools.permutations(range(frames)) if order[0] < order[-1]]


def motion_of(clips: Tensor) -> Tensor:
    """Mean difference (B, T - 1, H, W) between neighboring frames of clips (B, T, C, H, W)."""
    return clips.float().diff(dim=1).abs().mean(dim=2)


def split_channels(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Replace each frame (B, n, C, H, W) by one of its channels, drawn at random, C times."""
    count, shown, channels = frames.shape[:3]
    index = torch.randint(
        channels, (count, shown, 1, 1, 1), generator=generator, device=frames.device
    )
    chosen = index.expand(-1, -1, 1, *frames.shape[3:])
    return frames.gather(2, chosen).expand(-1, -1, channels, -1, -1)


def even_light(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Give frames (B, n, C, H, W) random brightness and contrast in place of their own.

    What remains is the frame up to an affine map of its values. The result may leave [0, 1].
    """
    own = (2, 3, 4)
    mean = frames.mean(dim=own, keepdim=True)
    deviation = frames.std(dim=own, keepdim=True, correction=0)
    shape = mean.shape
    gain, offset = 1 + strength * (
        2 * torch.rand(2, *shape, generator=generator, device=frames.device) - 1
    )
    even = (frames - mean) / deviation.clamp(min=1e-3)
    clip_deviation = deviation.mean(dim=1, keepdim=True)
    return even * clip_deviation * gain + mean.mean(dim=1, keepdim=True) + offset - 1


def _window(options: Order.Options, backbone: Backbone) -> tuple[int, int]:
    """Return the side of the crop and the largest shift of a frame, in pixels.

    Raises:
        UserError: they do not fit the frame, or the crop is no multiple of the backbone's patch.
    """
    spec, unit = backbone.spec, backbone.patch
    assert isinstance(spec, ImageSpec)
    side = min(spec.shape)
    jitter = options.jitter
    if jitter is None:
        jitter = round((options.crop or side) * JITTER)
    largest = (side - 2 * jitter) // unit * unit
    if largest < unit:
        raise UserError(
            f"pretext 'order': no patch of {unit} pixels fits frames of {side} with a jitter of "
            f"{jitter}: lower pretext.jitter, or take larger frames"
        )
    crop = largest if options.crop is None else options.crop
    if crop > largest or crop % unit:
        near = min(largest, max(unit, round(crop / unit) * unit))
        raise UserError(
            f"pretext.crop: {crop} does not fit frames of {side} with a jitter of {jitter}, in "
            f"multiples of the backbone's patch, {unit}: set crop: {near}"
        )
    return crop, jitter
