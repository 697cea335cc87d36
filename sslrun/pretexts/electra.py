"""ELECTRA (Clark et al., ICLR 2020, arXiv:2003.10555)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.text import TextBackbone, gather_tokens
from sslrun.backbones.token_head import TokenHead
from sslrun.backbones.transformer import Block, Stack, initialize
from sslrun.data.examples import Batch, Examples
from sslrun.data.text.sequences import IGNORED, Tokens
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.guesses import MaskedText, hide_few, list_guesses
from sslrun.pretexts.masking import RATE, MaskedOptions, MaskedPretext, MaskedViews
from sslrun.training.learner import Output


class ElectraViews(NamedTuple):
    """Sequences with hidden tokens, and the noise that draws their replacements."""

    masked: MaskedViews
    noise: Tensor
    """(B, K): uniform noise in [0, 1)."""


@pretexts.register("electra")
class Electra(MaskedPretext):
    """Detect the tokens that a small generator has replaced.

    ELECTRA: Clark et al., ICLR 2020 (arXiv:2003.10555). The generator is a narrower network that
    predicts hidden tokens, on the embeddings of the backbone. A token drawn from each prediction
    takes the hidden token's place, and the backbone tells for each token of the result whether it
    is the original, which counts as such if it was drawn. The loss is the generator's plus `weight`
    times that of detection; no gradient passes the draw. The backbone is the discriminator.

    As in the authors' code, 85 % of the chosen tokens become [MASK] and the others do not change;
    the generator has the backbone's depth, heads of 64 and a quarter of its width. Deviation: a
    token is drawn by one uniform number on the cumulative probabilities, not by Gumbel noise on all
    scores; the distribution is the same. Held-out losses are those of detection, which depends on
    the generator: they do not compare networks.
    """

    needs = ("embed",)

    class Options(MaskedOptions):
        mask: float = Field(0.85, ge=0, le=1)
        """Share of the chosen tokens that become [MASK]."""
        replace: float = Field(0.0, ge=0, le=1)
        """Share of the chosen tokens that become a random token; the others do not change."""
        weight: float = Field(50.0, gt=0)
        """Weight of the detection loss; that of the generator's is 1."""
        generator: float = Field(0.25, gt=0, le=1)
        """Width of the generator, as a share of the backbone's. The paper: 1/4 to 1/3."""

    options: Options

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        backbone.require("embed", "pretext 'electra'")
        self.generator = Generator(backbone, options.generator)
        width = backbone.width
        self.detector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        initialize(self.detector)

    def views(self, batch: Batch, generator: torch.Generator) -> ElectraViews:
        return self._draw(batch, generator, self.options.rate)

    def _draw(self, batch: Batch, generator: torch.Generator, rate: float) -> ElectraViews:
        masked = self.hide(self.tokens(batch), generator, rate)
        places = masked.places
        noise = torch.rand(places.shape, generator=generator, device=places.device)
        return ElectraViews(masked, noise)

    def forward(self, views: ElectraViews) -> Output:
        masked = views.masked
        hidden = self.generator(self.backbone, masked)
        table, head = self.backbone.embedding, self.generator.head
        generator_loss, right = head.loss(hidden, table, masked.targets)
        drawn = head.draw(hidden.detach(), table.detach(), views.noise)
        tokens, replaced = replace(masked, drawn)
        features = self.backbone(tokens).tokens
        assert features is not None
        scores, real = self.detector(features)[..., 0].float(), tokens.real.float()
        losses = F.binary_cross_entropy_with_logits(scores, replaced.float(), reduction="none")
        detection_loss = (losses * real).sum() / real.sum()
        found = (scores.detach() > 0) & tokens.real
        metrics = {
            "generator_loss": generator_loss.detach(),
            "generator_accuracy": right,
            "detection_loss": detection_loss.detach(),
            "detection_accuracy": ((found == replaced) * real).sum() / real.sum(),
            "replaced": replaced.sum() / real.sum(),
            "replaced_found": (found & replaced).sum() / replaced.sum().clamp_min(1),
        }
        return Output(generator_loss + self.options.weight * detection_loss, metrics)

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Metrics at BERT's masking rate; the loss is that of detection."""
        metrics = self(self._draw(batch, generator, RATE)).metrics
        return {
            "held_out_loss": metrics["detection_loss"],
            **{f"held_out_{name}": value for name, value in metrics.items()},
        }

    def guesses(self, batch: Batch, generator: torch.Generator) -> list[MaskedText]:
        """Guesses of the generator."""
        views = hide_few(self, batch, generator)
        hidden = self.generator(self.backbone, views)
        return list_guesses(self, views, self.generator.head(hidden, self.backbone.embedding))

    def floor(self, examples: Examples) -> None:
        """None: how well a model without context detects depends on the generator."""


def replace(masked: MaskedViews, drawn: Tensor) -> tuple[Tokens, Tensor]:
    """Put the drawn tokens (B, K) in the places of the hidden ones.

    Returns the sequences, and (B, T) bool: where a token differs from the original.
    """
    ids, places = masked.tokens.ids, masked.places
    chosen = masked.targets != IGNORED
    shown = torch.where(chosen, drawn, ids.gather(1, places))
    differs = torch.zeros_like(ids, dtype=torch.bool)
    differs = differs.scatter(1, places, chosen & (drawn != masked.targets))
    return masked.tokens._replace(ids=ids.scatter(1, places, shown)), differs


class Generator(nn.Module):
    """A narrower network on a backbone's embeddings, with a head over its vocabulary."""

    def __init__(self, backbone: TextBackbone, share: float) -> None:
        """`share` is the width as a share of the backbone's; heads are about 64 wide."""
        super().__init__()
        style, width = backbone.style, max(2, round(backbone.width * share))
        heads = max(1, width // 64)
        width -= width % (2 * heads)  # rotary heads have an even width
        self.narrow = nn.Linear(backbone.width, width)
        dropout = getattr(backbone.options, "dropout", 0.0)
        self.blocks = Stack(
            Block(width, heads, style, dropout=dropout) for _ in range(backbone.depth - 1)
        )
        self.norm = style.make_norm(width) if style.norm == "pre" else nn.Identity()
        initialize(self)
        self.head = TokenHead(width, backbone.spec.vocab, backbone.embedding.shape[1])

    def forward(self, backbone: TextBackbone, masked: MaskedViews) -> Tensor:
        """Features (B, K, D) of the hidden tokens."""
        tokens = masked.tokens
        x = self.blocks(self.narrow(backbone.embed(tokens)), tokens.attendable())
        return gather_tokens(self.norm(x), masked.places)
