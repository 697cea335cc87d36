"""Autoencoders: plain, denoising (Vincent et al. 2008) and variational (Kingma & Welling 2014)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import Augmentation, resize, side_of, to_float
from sslrun.data.image.whole import WholeImages
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import NormOptions, Pretext, is_random_or_unsynchronized, pretexts
from sslrun.registry import Options
from sslrun.training.learner import Output

FIRST_SIDE = 4
"""Side of the decoder's first grid."""
FEWEST_CHANNELS = 8
"""The decoder halves its channels at each doubling of the grid, down to this number."""
ACTIVE = 0.01
"""A latent dimension is active if its mean varies by more than this over images (Burda et al.,
ICLR 2016, arXiv:1509.00519, section 5.2)."""
SAMPLE = 2000
"""Largest number of images that statistics of the data are computed from."""


class Noise(Options):
    """Corruption of the input of a denoising autoencoder; the target stays clean."""

    kind: Literal["none", "mask", "salt", "gaussian"] = "none"
    """What happens to the input. mask: pixels are set to 0. salt: pixels are set to 0 or 1, salt
    and pepper. gaussian: noise is added to each value."""
    amount: float = Field(default=0.0, ge=0)
    """Share of the pixels for mask and salt, standard deviation for gaussian. Vincent et al. take
    shares of 0.1, 0.25 and 0.4."""

    @model_validator(mode="after")
    def _check_amount(self) -> Noise:
        if self.kind == "none" and self.amount:
            raise ValueError("amount needs a kind: set kind: mask, salt or gaussian")
        if self.kind in ("mask", "salt") and self.amount > 1:
            raise ValueError(
                f"amount {self.amount:g} is not a share of the pixels: set a value from 0 to 1"
            )
        return self

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Corrupt images (B, 3, H, W) in [0, 1]; a pixel loses all its channels together."""
        if self.kind == "none":
            return images
        if self.kind == "gaussian":
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            return images + self.amount * noise
        shape = (2, len(images), 1, *images.shape[2:])
        chance, value = torch.rand(shape, generator=generator, device=images.device)
        replacement = (value < 0.5).float() if self.kind == "salt" else torch.zeros_like(value)
        return torch.where(chance < self.amount, replacement, images)


class AutoencoderViews(NamedTuple):
    """Inputs, targets and random numbers of a batch."""

    inputs: Tensor
    """(B, 3, H, W): images as the backbone sees them, possibly corrupted."""
    targets: Tensor
    """(B, 3, H, W): the clean images."""
    noise: Tensor
    """(B, latent): standard normal numbers of the posterior; (B, 0) if not variational."""


class Code(NamedTuple):
    """What the encoder says about a batch."""

    mean: Tensor
    """(B, D): the code, or the mean of its distribution."""
    log_variance: Tensor | None
    """(B, D): logarithm of the variance; None if not variational."""


@pretexts.register("autoencoder")
class Autoencoder(Pretext):
    """Reconstruct an image from its pooled features, from a corrupted image, or from a random code.

    The encoder is the backbone, and the decoder sees its pooled features alone. Plain: squared
    error, averaged over pixels and channels. Denoising, with `noise` (Vincent et al., ICML 2008):
    the same target from a corrupted input. Variational, with `beta` (Kingma & Welling, ICLR 2014,
    arXiv:1312.6114; beta-VAE: Higgins et al., ICLR 2017): the negative log likelihood of the image,
    summed over pixels and channels, plus beta times the KL divergence from the standard normal
    distribution, summed over latent dimensions. Sums keep the papers' meaning of beta; with means a
    beta of 1 acts as thousands.

    Downstream tasks read the backbone's pooled features, before the latent layer.

    Deviations: one network trained as a whole, where Vincent et al. train layer by layer; the
    decoder is of transposed convolutions with batch norm (our choice) for every backbone.
    """

    reads = ImageSpec
    needs_square = True
    keeps = ("to_code", "decoder")

    class Options(NormOptions):
        noise: Noise = Noise()
        """Corruption of the input, such as {kind: mask, amount: 0.25}; default: none."""
        latent: int | None = Field(default=None, ge=1)
        """Width of the code between encoder and decoder; default: the backbone's features
        themselves."""
        beta: float | None = Field(default=None, ge=0)
        """Weight of the KL divergence of a variational autoencoder; default: not variational."""
        likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
        """Distribution of a value given the code. gaussian: squared error (variational: half of it,
        for unit variance, without the constant). bernoulli: cross-entropy of values in [0, 1]."""
        augmentation: Augmentation = Augmentation(flip=0.5)
        """Augmentation of the images before they are corrupted."""
        channels: int = Field(default=256, ge=1)
        """Number of channels of the decoder's first grid, which has 4x4 positions."""

        @model_validator(mode="after")
        def _check_latent(self) -> Autoencoder.Options:
            if self.beta is not None and self.latent is None:
                raise ValueError("beta needs latent, the width of the random code: set latent: 64")
            return self

    options: Options

    @classmethod
    def depends_on_devices(
        cls, options: Options, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        """True if views, codes or the network are random, or if devices have their batch norms."""
        draws = options.noise.kind != "none" or options.beta is not None
        return draws or is_random_or_unsynchronized(
            options, [options.augmentation], backbone, backbone_options
        )

    def __init__(self, options: Options, backbone: Backbone) -> None:
        """Raises UserError for a code that is as large as an image."""
        super().__init__(options, backbone)
        spec = backbone.spec
        assert isinstance(spec, ImageSpec)
        values = spec.channels * spec.size**2
        if options.latent is not None and options.latent >= values:
            raise UserError(
                f"pretext.latent: a code of {options.latent} numbers can hold an image of {values} "
                f"values as it is: set latent: {max(1, values // 16)} or less"
            )
        width = backbone.width if options.latent is None else options.latent
        outputs = width if options.beta is None else 2 * width
        self.to_code = None if options.latent is None else nn.Linear(backbone.width, outputs)
        self.decoder = Decoder(width, options.channels, spec.channels, spec.size)

    @property
    def variational(self) -> bool:
        return self.options.beta is not None

    def fit(self, examples: Examples) -> None:
        """Check that the values suit the likelihood.

        Raises:
            UserError: values outside [0, 1] have no Bernoulli likelihood.
        """
        if self.options.likelihood != "bernoulli":
            return
        for batch in _sampled(examples):
            images = to_float(batch.inputs)
            low, high = images.min().item(), images.max().item()
            if low < 0 or high > 1:
                raise UserError(
                    "pretext.likelihood: bernoulli needs values from 0 to 1, but the images have "
                    f"values from {low:.3g} to {high:.3g}: set likelihood: gaussian, or scale them"
                )

    def views(self, batch: Batch, generator: torch.Generator) -> AutoencoderViews:
        """Augmented images, the same corrupted, and the random numbers of a variational code."""
        images = self.options.augmentation(batch.inputs, side_of(batch.inputs), generator)
        return self._corrupt(images, generator)

    def _corrupt(self, images: Tensor, generator: torch.Generator) -> AutoencoderViews:
        width = (self.options.latent or 0) if self.variational else 0
        noise = torch.randn(len(images), width, generator=generator, device=images.device)
        return AutoencoderViews(self.options.noise(images, generator), images, noise)

    def forward(self, views: AutoencoderViews) -> Output:
        inputs, targets, noise = views
        code = self.encode(inputs)
        outputs = self.decoder(self._draw(code, noise))
        with torch.autocast(outputs.device.type, enabled=False):
            losses = self._reconstruction_losses(outputs.float(), targets)
            reconstruction = losses.mean()
            if code.log_variance is None:
                return Output(reconstruction)
            divergence = kl_divergence(code.mean, code.log_variance).mean()
            loss = reconstruction + (self.options.beta or 0.0) * divergence
        metrics = {"reconstruction": reconstruction.detach(), "kl": divergence.detach()}
        return Output(loss, metrics)

    def encode(self, inputs: Tensor) -> Code:
        """The code of images, in float32."""
        pooled = self.backbone(inputs).pooled
        if self.to_code is None:
            return Code(pooled.float(), None)
        code = self.to_code(pooled).float()
        return Code(*code.chunk(2, dim=1)) if self.variational else Code(code, None)

    def decode(self, codes: Tensor) -> Tensor:
        """The images (B, 3, H, W) that codes (B, D) stand for, in float32."""
        return self._images(self.decoder(codes))

    @staticmethod
    def _draw(code: Code, noise: Tensor) -> Tensor:
        """Draw codes (B, D) from their distributions."""
        if code.log_variance is None:
            return code.mean
        return code.mean + (code.log_variance / 2).exp() * noise

    def _reconstruction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss (B,) of each image: a sum over its values if variational, else their mean."""
        if self.options.likelihood == "bernoulli":
            losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        else:
            losses = (outputs - targets).square()
            losses = losses / 2 if self.variational else losses
        flat = losses.flatten(1)
        return flat.sum(dim=1) if self.variational else flat.mean(dim=1)

    def _images(self, outputs: Tensor) -> Tensor:
        """The decoder's outputs (B, 3, H, W) as images: the mean of their likelihood."""
        outputs = outputs.float()
        return outputs.sigmoid() if self.options.likelihood == "bernoulli" else outputs

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The squared error of a value, as `held_out_loss`; variational also KL and active units.

        The error is that of the reconstruction from the code's mean. Active units are counted over
        the batch.
        """
        images = self._clean(batch.inputs)
        code = self.encode(self.options.noise(images, generator))
        error = (self.decode(code.mean) - images).square().mean()
        if code.log_variance is None:
            return {"held_out_loss": error}
        variances = code.mean.var(dim=0, correction=0)
        return {
            "held_out_loss": error,
            "kl": kl_divergence(code.mean, code.log_variance).mean(),
            "active_units": (variances > ACTIVE).sum().float(),
        }

    def _clean(self, images: Tensor | WholeImages) -> Tensor:
        """Images (B, 3, H, W) without augmentation, at the size of the decoder's outputs."""
        return resize(to_float(images), self.decoder.side)

    def floor(self, examples: Examples) -> float | None:
        """Variance of the values around the mean image."""
        total = squares = torch.zeros((), dtype=torch.float64)
        count = 0
        for batch in _sampled(examples):
            images = self._clean(batch.inputs).double()
            total, squares = total + images.sum(dim=0), squares + images.square().sum(dim=0)
            count += len(images)
        return float((squares / count - (total / count) ** 2).mean())

    def diagnose(self, metrics: Mapping[str, float]) -> str | None:
        """Name posterior collapse: the code says nothing about the image."""
        if metrics.get("active_units", math.inf) >= 0.5:
            return None
        return (
            "posterior collapse: no latent dimension varies with the image, and the decoder "
            f"ignores the code: lower pretext.beta ({self.options.beta:g}), or train longer"
        )

    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The image, its corruption, its reconstruction, and images of random codes."""
        images = self._clean(batch.inputs)
        inputs = self.options.noise(images, generator)
        code = self.encode(inputs)
        drawn = {"original": images}
        if self.options.noise.kind != "none":
            drawn["corrupted"] = inputs
        drawn["reconstruction"] = self.decode(code.mean)
        if self.variational:
            prior = torch.randn(code.mean.shape, generator=generator, device=images.device)
            drawn["from the prior"] = self.decode(prior)
        return drawn


class Decoder(nn.Module):
    """Map codes (B, D) to images (B, C, side, side): transposed convolutions, then a resize."""

    def __init__(self, width: int, channels: int, outputs: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.channels = channels
        self.first = nn.Linear(width, channels * FIRST_SIDE**2)
        layers: list[nn.Module] = [nn.BatchNorm2d(channels), nn.ReLU()]
        grid = FIRST_SIDE
        while 2 * grid < side:
            after = max(FEWEST_CHANNELS, channels // 2)
            layers += [
                nn.ConvTranspose2d(channels, after, 4, 2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
            grid, channels = 2 * grid, after
        layers.append(nn.ConvTranspose2d(channels, outputs, 4, 2, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, codes: Tensor) -> Tensor:
        grid = self.first(codes).unflatten(1, (self.channels, FIRST_SIDE, FIRST_SIDE))
        return resize(self.layers(grid).float(), self.side)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence (B,) of N(mean, exp(log_variance)) from N(0, 1), summed over D."""
    terms = 1 + log_variance - mean.square() - log_variance.exp()
    return -terms.sum(dim=1) / 2


def _sampled(examples: Examples) -> Iterator[Batch]:
    """Batches of at most `SAMPLE` evenly spaced images."""
    stride = -(-len(examples) // SAMPLE)
    indices = torch.arange(0, len(examples), stride).split(256)
    return examples.batches(indices, torch.device("cpu"))
