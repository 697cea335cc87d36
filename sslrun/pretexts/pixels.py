"""Generative pretraining from pixels (Chen et al., ICML 2020)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.backbones.igpt import IGpt
from sslrun.backbones.image import SAMPLE
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import Augmentation, side_of, to_float
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext, PretextOptions, pretexts
from sslrun.training.learner import Output


class PixelViews(NamedTuple):
    """Images as sequences of T pixels."""

    ids: Tensor
    """(B, T): palette ids."""
    hidden: Tensor | None
    """(B, T) bool: the pixels to predict; None if all are."""


@pretexts.register("pixels")
class PredictPixels(Pretext):
    """Predict the color of each pixel, from earlier pixels or from those that are not hidden.

    Chen et al., "Generative Pretraining from Pixels", ICML 2020. The loss is the mean cross-entropy
    over the palette, in nats. With `order: causal`, every pixel is predicted from the earlier ones.
    With `order: masked`, the embeddings of random pixels are set to zero, and the loss covers these
    alone (the paper's BERT objective). The output table is separate from the embeddings and starts
    at zero, so that the first loss is ln(colors), as in the authors' code
    (github.com/openai/image-gpt).

    Deviation: the masked loss is a mean over all hidden pixels of a batch. The authors' code
    averages over the hidden pixels of each image first, which divides by zero if an image has none.
    """

    reads = ImageSpec
    needs = ("palette",)

    class Options(PretextOptions):
        order: Literal["causal", "masked"] = "causal"
        """causal: predict each pixel from the earlier ones; needs a backbone with `causal: true`.
        masked: predict hidden pixels from all others; needs a backbone with `causal: false`."""
        rate: float = Field(default=0.15, gt=0, lt=1)
        """Probability that a pixel is hidden; only with `order: masked`."""
        augmentation: Augmentation = Augmentation()
        """Augmentation of the images; none by default."""

    options: Options
    backbone: IGpt

    def __init__(self, options: Options, backbone: Backbone) -> None:
        """Raises UserError for a backbone whose attention does not suit the order."""
        super().__init__(options, backbone)
        backbone.require("palette", "pretext 'pixels'")
        causal = options.order == "causal"
        if self.backbone.options.causal != causal:
            raise UserError(
                f"pretext 'pixels' with order: {options.order} needs a backbone with "
                f"causal: {str(causal).lower()}: set it under backbone, or change pretext.order"
            )
        self.head = nn.Linear(backbone.width, self.backbone.options.colors, bias=False)
        nn.init.zeros_(self.head.weight)

    @classmethod
    def depends_on_devices(
        cls, options: Options, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        """True if images are augmented or pixels are hidden at random."""
        return options.augmentation.is_random or options.order == "masked"

    def views(self, batch: Batch, generator: torch.Generator) -> PixelViews:
        images = self.options.augmentation(batch.inputs, side_of(batch.inputs), generator)
        return self._hide(self.backbone.color_ids(images), generator)

    def forward(self, views: PixelViews) -> Output:
        logits = self.head(self.backbone.encode_ids(views.ids, views.hidden)).float()
        losses = F.cross_entropy(logits.flatten(0, 1), views.ids.flatten(), reduction="none")
        correct = (logits.detach().argmax(dim=-1) == views.ids).flatten().float()
        if views.hidden is None:
            return Output(losses.mean(), {"accuracy": correct.mean()})
        counted = views.hidden.flatten().float()
        count = counted.sum().clamp_min(1)
        loss = (losses * counted).sum() / count
        return Output(loss, {"accuracy": (correct * counted).sum() / count})

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Loss in nats per predicted pixel, and accuracy, without augmentation."""
        views = self._hide(self.backbone.color_ids(to_float(batch.inputs)), generator)
        output = self(views)
        return {"held_out_loss": output.loss, "held_out_accuracy": output.metrics["accuracy"]}

    @torch.no_grad()
    def floor(self, examples: Examples) -> float:
        """The entropy of the palette's shares in at most `SAMPLE` training images, in nats."""
        device = self.backbone.palette.device
        counts = torch.zeros(self.backbone.options.colors, dtype=torch.float64)
        indices = torch.arange(0, len(examples), -(-len(examples) // SAMPLE)).split(256)
        for batch in examples.batches(indices, device):
            ids = self.backbone.color_ids(to_float(batch.inputs))
            counts += ids.flatten().bincount(minlength=len(counts)).cpu()
        return torch.special.entr(counts / counts.sum()).sum().item()

    @torch.no_grad()
    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The images in the palette, and what the model makes of a part of them.

        With `order: causal` the lower half is sampled, pixel by pixel. With `order: masked` the
        hidden pixels are sampled; they are mid-gray in the second column.
        """
        ids = self.backbone.color_ids(to_float(batch.inputs))
        pictures = {"palette": self.backbone.decode(ids)}
        if self.options.order == "causal":
            completed = self.complete(ids, ids.shape[1] // 2, generator)
            return pictures | {"completion": self.backbone.decode(completed)}
        views = self._hide(ids, generator)
        assert views.hidden is not None
        logits = self.head(self.backbone.encode_ids(*views))
        sampled = torch.where(views.hidden, _sample(logits, generator), ids)
        side = self.backbone.options.side
        covered = views.hidden.unflatten(1, (side, side))[:, None]
        return pictures | {
            "hidden": pictures["palette"].masked_fill(covered, 0.5),
            "filled": self.backbone.decode(sampled),
        }

    def complete(self, ids: Tensor, kept: int, generator: torch.Generator) -> Tensor:
        """Keep the first `kept` of the pixels (B, T) and sample the others, one after another."""
        ids = ids.clone()
        for place in range(kept, ids.shape[1]):
            logits = self.head(self.backbone.encode_ids(ids[:, : place + 1])[:, -1:])
            ids[:, place : place + 1] = _sample(logits, generator)
        return ids

    def _hide(self, ids: Tensor, generator: torch.Generator) -> PixelViews:
        if self.options.order == "causal":
            return PixelViews(ids, None)
        noise = torch.rand(ids.shape, generator=generator, device=ids.device)
        return PixelViews(ids, noise < self.options.rate)


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample ids (B, T) from logits (B, T, K)."""
    shares = logits.float().softmax(dim=-1)
    return torch.multinomial(shares.flatten(0, 1), 1, generator=generator).view(logits.shape[:2])
