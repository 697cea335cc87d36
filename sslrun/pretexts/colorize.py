"""Colorization (Zhang, Isola & Efros, ECCV 2016, arXiv:1603.08511)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import Augmentation, resize, to_float
from sslrun.data.image.lab import LightnessExamples, lab_to_rgb, lightness, rgb_to_lab
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import NormOptions, Pretext, is_random_or_unsynchronized, pretexts
from sslrun.training.learner import Output

SCALE = 4
"""Colors are predicted at every fourth pixel of a row and of a column."""
GRAY = 5.0
"""An image is gray if no |a| or |b| of its targets exceeds this."""
SAMPLE = 2000
"""Largest number of images from which the bins and their frequencies are computed."""
PIXELS = 2**16
"""Pixels whose nearest bins are searched at a time, to limit memory."""
UNIT = 10.0
"""Unit of ab in which the squared error of `target: ab` is measured."""
THRESHOLDS = 150
"""The area under the curve of correct pixels covers errors up to this, in units of ab."""


class ColorTargets(NamedTuple):
    """Inputs and targets of a batch; h and w are a quarter of the sides."""

    inputs: Tensor
    """(B, 3, H, W): L / 100 in three equal channels."""
    ab: Tensor
    """(B, 2, h, w): a and b of every fourth pixel."""
    bins: Tensor
    """(B, K, h, w): each pixel's K nearest bins, the nearest first."""
    shares: Tensor
    """(B, K, h, w): the soft target of these bins; sums to 1 over K."""
    portions: Tensor
    """(B, 1, 1): weight of an image's pixels in the mean over the pixels of colored images."""

    def over(self, colored: Tensor) -> ColorTargets:
        """Divide the portions by the number of colored images and of their pixels."""
        pixels = self.ab.shape[2] * self.ab.shape[3]
        return self._replace(portions=self.portions / (colored * pixels).clamp(min=1e-6))


class Palette(nn.Module):
    """Bins of colors on a grid in ab, with their frequencies and weights in the loss."""

    centers: Tensor
    """(Q, 2): a and b."""
    frequencies: Tensor
    """(Q,): share of each bin in the training images, smoothed; sums to 1."""
    rarity: Tensor
    """(Q,): weight that grows as the frequency falls; its mean over pixels is 1."""

    def __init__(self, centers: Tensor, counts: Tensor, sigma: float, balance: float) -> None:
        """`counts` (Q,) are numbers of pixels; see `Colorize.Options` for `sigma` and `balance`."""
        super().__init__()
        distances = torch.cdist(centers.double(), centers.double())
        # Each column spreads the mass of one bin.
        spread = (-(distances**2) / (2 * sigma**2)).softmax(dim=0)
        frequencies = spread @ (counts.double() / counts.sum())
        rarity = 1 / ((1 - balance) * frequencies + balance / len(centers))
        self.sigma = sigma
        self.register_buffer("centers", centers.float())
        self.register_buffer("frequencies", frequencies.float())
        self.register_buffer("rarity", (rarity / (frequencies * rarity).sum()).float())

    @classmethod
    def of_pixels(cls, ab: Tensor, grid: float, sigma: float, balance: float) -> Palette:
        """The bins of a grid that colors (N, 2) fall into, with the frequencies of the colors."""
        cells, counts = (ab / grid).round().unique(dim=0, return_counts=True)
        return cls(cells * grid, counts, sigma, balance)

    @classmethod
    def of_srgb(cls, grid: float, sigma: float, balance: float) -> Palette:
        """The bins that any sRGB color falls into."""
        levels = torch.linspace(0, 1, 33, device="cpu")  # recipes are checked on "meta"
        cube = torch.cartesian_prod(levels, levels, levels)[:, :, None, None]
        return cls.of_pixels(rgb_to_lab(cube)[:, 1:, 0, 0], grid, sigma, balance)

    def __len__(self) -> int:
        return len(self.centers)

    def encode(self, ab: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
        """The nearest bins (N, K) of colors (N, 2) and their shares (N, K), nearest first.

        The shares are Gaussian in the distance, and sum to 1.
        """
        count = min(neighbors, len(self))
        found = []
        for part in ab.split(PIXELS):
            # Without the matrix product of cdist, which autocast would compute in bf16.
            squares = sum((part[:, axis, None] - self.centers[:, axis]) ** 2 for axis in range(2))
            assert isinstance(squares, Tensor)
            found.append(squares.topk(count, largest=False))
        nearest, bins = (torch.cat(parts) for parts in zip(*found, strict=True))
        return bins, (-nearest / (2 * self.sigma**2)).softmax(dim=1)

    def decode(self, scores: Tensor, temperature: float) -> Tensor:
        """Colors (B, 2, h, w) of scores (B, Q, h, w): the annealed mean."""
        shares = (scores / temperature).softmax(dim=1)
        return torch.stack(
            [(shares * axis[:, None, None]).sum(dim=1) for axis in self.centers.T], 1
        )


@pretexts.register("colorize")
class Colorize(Pretext):
    """Predict the colors of an image from its lightness.

    Zhang et al., ECCV 2016 (arXiv:1603.08511). Targets are a and b of CIE Lab at every fourth
    pixel, as a distribution over bins of a grid. Rare colors get a higher weight, since most pixels
    of photographs are nearly gray; an answer that weighs all pixels alike is then gray as well.
    Gray images are not counted.

    The bins are those that colors of at most 2,000 training images fall into; their number Q is the
    metric `bins`. The authors ship an array of 313 bins for ImageNet. The backbone sees L / 100 in
    three equal channels and normalizes it by the statistics of lightness over the training images.
    Downstream tasks show it the same with `task: {color: lightness}`; without that it sees RGB
    images, normalized by the statistics of lightness.

    Deviations: any backbone with a grid of features, and a head that ends at a quarter of the
    image's side, in place of the authors' network; 5 nearest bins as in the paper, where the code
    takes 10. Weights divide by the number of pixels of colored images.
    """

    reads = ImageSpec
    needs_square = True
    needs_color = True
    needs = ("grid",)

    class Options(NormOptions):
        target: Literal["bins", "ab"] = "bins"
        """What to predict. bins: a distribution over bins of colors. ab: the two coordinates, by
        squared error, the paper's baseline "L2"."""
        grid: float = Field(default=10.0, gt=0)
        """Side of a bin, in units of ab."""
        neighbors: int = Field(default=5, ge=1)
        """Number of nearest bins among which the target of a pixel is spread."""
        sigma: float = Field(default=5.0, gt=0)
        """Standard deviation of the Gaussian, in units of ab, that spreads targets over bins, and
        that smooths the frequencies of bins."""
        balance: float = Field(default=0.5, ge=0, le=1)
        """Share of the uniform distribution in the mix with the bins' frequencies, by whose inverse
        the pixels are weighted. 0: weigh all pixels alike (the paper's classification without
        rebalancing)."""
        temperature: float = Field(default=0.38, gt=0)
        """Temperature of the annealed mean, which turns scores of bins into a color: 1 gives the
        mean, values toward 0 the mode."""
        augmentation: Augmentation = Augmentation(flip=0.5)
        """Augmentation of the images. The paper crops 176 of 256 pixels, and flips."""
        size: int | None = Field(default=None, ge=4)
        """Side of the augmented images, in pixels; default: the side of the images."""
        hidden: int = Field(default=256, ge=1)
        """Number of channels of the head; 256 in the paper's last block."""

    options: Options

    @classmethod
    def depends_on_devices(
        cls, options: Options, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        """True if views or the network are random, or if each device has its own batch norm."""
        return is_random_or_unsynchronized(
            options, [options.augmentation], backbone, backbone_options
        )

    def __init__(self, options: Options, backbone: Backbone) -> None:
        """Raises UserError for images or a backbone that do not fit."""
        super().__init__(options, backbone)
        backbone.require("grid", "'colorize'")
        self.size = _check_images(backbone, options.size)
        self.head = upsampler(backbone, self.size, self.size // SCALE, options.hidden)
        # Until `fit`, the bins are those of all colors.
        self._set_palette(
            Palette.of_srgb(options.grid, options.sigma, options.balance or DEFAULT_BALANCE)
        )

    def _set_palette(self, palette: Palette) -> None:
        """Set the bins, and build a new last layer for them."""
        self.palette = palette
        outputs = len(palette) if self.options.target == "bins" else 2
        self.last = nn.Conv2d(self.options.hidden, outputs, 1)

    def fit(self, examples: Examples) -> None:
        """Compute the bins and their frequencies, and fit the normalization to lightness.

        Raises:
            UserError: all images are gray.
        """
        options = self.options
        ab = self._sample_colors(examples)
        if not len(ab):
            count = min(len(examples), SAMPLE)
            raise UserError(
                f"pretext 'colorize': all of the {count:,} images that were looked at are gray: "
                "choose a data set of color images, or another pretext task"
            )
        balance = options.balance or DEFAULT_BALANCE
        self._set_palette(Palette.of_pixels(ab, options.grid, options.sigma, balance))
        self.backbone.fit_inputs(LightnessExamples(examples))

    def _sample_colors(self, examples: Examples) -> Tensor:
        """The targets (N, 2) of the colored ones among at most `SAMPLE` evenly spaced images."""
        stride = -(-len(examples) // SAMPLE)
        indices = torch.arange(0, len(examples), stride).split(64)
        colors = []
        for batch in examples.batches(indices, torch.device("cpu")):
            _, ab = self._split(resize(to_float(batch.inputs), self.size))
            colors.append(ab[is_colored(ab)].transpose(0, 1).flatten(1).T)
        return torch.cat(colors)

    @staticmethod
    def _split(images: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's inputs (B, 3, H, W), and a and b (B, 2, h, w) of every fourth pixel."""
        return lightness(images), rgb_to_lab(images[:, :, ::SCALE, ::SCALE])[:, 1:]

    def watched_inputs(self, inputs: Tensor) -> Tensor:
        return lightness(inputs)

    def views(self, batch: Batch, generator: torch.Generator) -> ColorTargets:
        """Lightness and colors of augmented images; means are over the images of all devices."""
        targets = self._targets(self.options.augmentation(batch.inputs, self.size, generator))
        colored = targets.portions.sum()
        distributed.add_up(colored)
        # The loop averages gradients over devices.
        return targets.over(colored / distributed.world_size())

    def _targets(self, images: Tensor) -> ColorTargets:
        """Inputs and targets of images; the portions are 1 for colored ones, and 0 for gray."""
        inputs, ab = self._split(images)
        bins, shares = self.palette.encode(
            ab.permute(0, 2, 3, 1).flatten(0, 2), self.options.neighbors
        )
        places = (len(ab), *ab.shape[2:], -1)
        return ColorTargets(
            inputs,
            ab,
            bins.view(places).permute(0, 3, 1, 2),
            shares.view(places).permute(0, 3, 1, 2),
            is_colored(ab)[:, None, None].float(),
        )

    def forward(self, views: ColorTargets) -> Output:
        targets = ColorTargets(*views)
        errors = self._errors(self._scores(targets.inputs), targets) * targets.portions
        if self.options.target == "ab" or not self.options.balance:
            return Output(errors.sum())
        weights = self.palette.rarity[targets.bins[:, 0]]
        return Output((errors * weights).sum(), {"unweighted": errors.detach().sum()})

    def _scores(self, inputs: Tensor) -> Tensor:
        """What the head predicts, (B, Q, h, w) or (B, 2, h, w), in float32."""
        grid = self.backbone(inputs).grid
        assert grid is not None
        return self.last(self.head(grid)).float()

    def _errors(self, scores: Tensor, targets: ColorTargets) -> Tensor:
        """The loss of each pixel (B, h, w), unweighted."""
        if self.options.target == "ab":
            return (scores - targets.ab / UNIT).square().sum(dim=1)
        return soft_cross_entropy(scores, targets.bins, targets.shares)

    def colors(self, scores: Tensor) -> Tensor:
        """The predicted a and b (B, 2, h, w)."""
        if self.options.target == "ab":
            return scores * UNIT
        return self.palette.decode(scores, self.options.temperature)

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The unweighted loss on colored images, errors of colors, and those of the gray answer."""
        targets = self._targets(resize(to_float(batch.inputs), self.size))
        scores = self._scores(targets.inputs)
        targets = targets.over(targets.portions.sum())
        rarity = self.palette.rarity[targets.bins[:, 0]]
        gray = color_metrics(torch.zeros_like(targets.ab), targets.ab, rarity)
        return {
            "held_out_loss": (self._errors(scores, targets) * targets.portions).sum(),
            **color_metrics(self.colors(scores), targets.ab, rarity),
            "true_chroma": targets.ab.norm(dim=1).mean(),
            "auc_of_gray": gray["auc"],
            "weighted_auc_of_gray": gray["weighted_auc"],
            "bins": torch.tensor(float(len(self.palette))),
        }

    def floor(self, examples: Examples) -> float | None:
        """Unweighted loss of the best answer without context.

        With `target: ab` this is the variance. Without rebalancing it is the entropy of the mean
        target. With it the best answer is the weighted mean, whose unweighted loss is higher: a
        rebalanced network that learns may stay above that entropy.
        """
        ab = self._sample_colors(examples)
        if not len(ab):
            return None
        ab = ab[:: -(-len(ab) // PIXELS)].to(self.palette.centers.device)
        if self.options.target == "ab":
            return float((ab / UNIT).var(dim=0, correction=0).sum())
        bins, shares = self.palette.encode(ab, self.options.neighbors)
        mean = self._mean_target(bins, shares)
        answer = mean
        if self.options.balance:
            answer = self._mean_target(bins, shares * self.palette.rarity[bins[:, :1]])
        return -float(torch.special.xlogy(mean, answer).sum())

    def _mean_target(self, bins: Tensor, shares: Tensor) -> Tensor:
        """The mean (Q,) of soft targets (N, K); sums to 1 also if the shares are weighted."""
        total = torch.zeros_like(self.palette.frequencies)
        total.index_add_(0, bins.flatten(), shares.flatten())
        return total / total.sum()

    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The input, the input with the predicted colors, and the original."""
        images = resize(to_float(batch.inputs), self.size)
        inputs = lightness(images)
        ab = F.interpolate(self.colors(self._scores(inputs)), images.shape[-2:], mode="bilinear")
        colorized = lab_to_rgb(torch.cat([100 * inputs[:, :1], ab], dim=1))
        return {"gray": inputs, "colorized": colorized, "original": images}


DEFAULT_BALANCE = 0.5
"""Share of the uniform distribution in the weights of errors where the loss has no weights."""


def _check_images(backbone: Backbone, size: int | None) -> int:
    """The side of the images. Raises UserError if it, or the number of channels, does not fit."""
    spec = backbone.spec
    assert isinstance(spec, ImageSpec)
    if spec.channels != 3:
        raise UserError(
            f"pretext 'colorize': images of {spec.channels} channels have no colors: choose a data "
            "set of RGB images, or another pretext task"
        )
    side, key = (spec.size, "data.size") if size is None else (size, "pretext.size")
    if side % SCALE:
        raise UserError(
            f"pretext 'colorize': the side of images, {side} pixels, is not a multiple of {SCALE}, "
            f"as colors at a quarter of it need: set {key}: {-(-side // SCALE) * SCALE}"
        )
    return side


def upsampler(backbone: Backbone, side: int, target: int, hidden: int) -> nn.Sequential:
    """Map the grid of images of a `side` to `hidden` channels on a grid of side `target`.

    A 3x3 convolution, then transposed convolutions that double the side until it reaches the
    target; what remains is resized. A grid that is larger at first is averaged to the target.
    """
    grid = grid_side(backbone, side)
    layers: list[nn.Module] = []
    if grid > target:
        layers.append(nn.AdaptiveAvgPool2d(target))
        grid = target
    layers += [nn.Conv2d(backbone.width, hidden, 3, padding=1, bias=False), *_norm(hidden)]
    while grid < target:
        layers += [nn.ConvTranspose2d(hidden, hidden, 4, 2, padding=1, bias=False), *_norm(hidden)]
        grid *= 2
    if grid != target:
        layers.append(nn.UpsamplingBilinear2d((target, target)))
    return nn.Sequential(*layers)


def _norm(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU()


@torch.no_grad()
def grid_side(backbone: Backbone, side: int) -> int:
    """Side of the grid of features of images of a `side`, found by a pass in eval mode."""
    training, device = backbone.training, next(backbone.parameters()).device
    grid = backbone.eval()(torch.zeros(1, 3, side, side, device=device)).grid
    backbone.train(training)
    return grid.shape[-1]


def is_colored(ab: Tensor) -> Tensor:
    """Whether any target of each image (B, 2, h, w) differs from gray; (B,) bool."""
    return (ab.abs() > GRAY).flatten(1).any(dim=1)


def soft_cross_entropy(scores: Tensor, bins: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy (B, h, w) of scores (B, Q, h, w) with targets at K bins (B, K, h, w).

    Equals - sum over q of target_q log softmax(scores)_q without a dense target, since the shares
    sum to 1: log sum exp(scores) - sum over k of share_k scores at bin_k.
    """
    return scores.logsumexp(dim=1) - (shares * scores.gather(1, bins)).sum(dim=1)


def color_metrics(predicted: Tensor, truth: Tensor, rarity: Tensor) -> dict[str, Tensor]:
    """Compare colors (B, 2, h, w), given the weights (B, h, w) of the true ones.

    Returns the mean distance and the mean chroma, in units of ab, and the area under the curve of
    pixels within a threshold of 0 to 150, in percent, plain and weighted by rarity (Zhang et al.,
    section 3.1; there the weights are the inverse frequencies, without a uniform share).
    """
    distance = (predicted - truth).norm(dim=1)
    # A distance is within the whole thresholds from its ceiling on.
    area = 100 * (THRESHOLDS + 1 - distance.ceil()).clamp(min=0) / (THRESHOLDS + 1)
    return {
        "ab_error": distance.mean(),
        "chroma": predicted.norm(dim=1).mean(),
        "auc": area.mean(),
        "weighted_auc": (area * rarity).sum() / rarity.sum(),
    }
