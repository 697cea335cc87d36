"""How colorful and how correct colorizations are, by the loss that they are trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sslrun.backbones import build_backbone
from sslrun.backbones.base import backbones
from sslrun.claims.measurements.base import Measurement, measurements, short_schedule, train_to_end
from sslrun.data.source import sources
from sslrun.data.splits import Splits, load_splits
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.pretexts.colorize import Colorize
from sslrun.registry import Options
from sslrun.results.address import Column, Row
from sslrun.results.table import Table
from sslrun.training.device import Compute

CHROMA, ERROR, AUC, WEIGHTED_AUC = (
    Column(metric=metric)
    for metric in (
        Metric("chroma", "units of ab", "higher", digits=2),
        Metric("error", "units of ab", "lower", digits=2),
        Metric("AuC"),
        Metric("weighted AuC"),
    )
)
COLUMNS = {"chroma": CHROMA, "ab_error": ERROR, "auc": AUC, "weighted_auc": WEIGHTED_AUC}
"""Column by the name in the pretext task's held-out record."""
LOSSES: dict[str, dict[str, Any]] = {
    "L2": {"target": "ab"},
    "classification": {"balance": 0.0},
    "rebalanced": {},
}
"""Options of `colorize` by the row's name."""


@measurements.register("colors")
class Colors(Measurement):
    """Chroma and errors of colorizations, by the loss: L2, classification, or rebalanced.

    Zhang et al., ECCV 2016 (arXiv:1603.08511), Table 1, at a small scale. One network is trained
    for each loss, from the same initial weights of the backbone, and colorizes test images. Two
    rows need no network: the gray answer, and the true colors. Chroma is the mean length of (a, b).
    AuC is the area under the curve of pixels within an error of 0 to 150, in percent, plain and
    with pixels weighted by the rarity of their true color.
    """

    class Options(Options):
        data: dict[str, Any] = Field({"name": "cifar10"})
        """The data set of color images, by `name`, with its options."""
        backbone: dict[str, Any] = Field({"name": "resnet18", "stem": "small", "channels": 16})
        """The backbone, by `name`, with its options."""
        steps: int = Field(300, ge=1)
        """Training steps of each network."""
        batch: int = Field(64, ge=2)
        """Images per step."""
        lr: float = Field(0.002, gt=0)
        """Peak learning rate."""
        hidden: int = Field(64, ge=1)
        """Number of channels of the head."""
        temperature: float = Field(0.38, gt=0)
        """Temperature of the annealed mean."""
        images: int = Field(500, ge=1)
        """Maximum number of test images."""

        @field_validator("data", "backbone")
        @classmethod
        def _check_names(cls, named: dict[str, Any]) -> dict[str, Any]:
            try:
                registry: Any = backbones if str(named.get("name")) in backbones else sources
                registry[str(named.get("name"))].Options.model_validate(_without_name(named))
            except UserError as error:
                raise ValueError(str(error)) from None
            return named

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        data = self.options.data
        splits = load_splits(
            data["name"], sources[data["name"]].Options.model_validate(_without_name(data))
        )
        table = Table("colorization by loss", marks_best=False)
        for row, options in LOSSES.items():
            record = self._colorize(options, splits, seed, compute, check)
            for name, column in COLUMNS.items():
                table.add(Row(row), column, record[name], str(seed))
        gray = Row("gray answer")
        table.add(gray, CHROMA, 0.0, str(seed))
        table.add(gray, ERROR, record["true_chroma"], str(seed))
        table.add(gray, AUC, record["auc_of_gray"], str(seed))
        table.add(gray, WEIGHTED_AUC, record["weighted_auc_of_gray"], str(seed))
        table.add(Row("true colors"), CHROMA, record["true_chroma"], str(seed))
        count = min(self.options.images, len(splits.test))
        table.note(
            f"{count:,} test images of {data['name']}, {record['bins']:.0f} bins, annealed mean at "
            f"temperature {self.options.temperature:g}; the gray answer is the floor of AuC"
        )
        return table

    def _colorize(
        self,
        loss: dict[str, Any],
        splits: Splits,
        seed: int,
        compute: Compute,
        check: Callable[[], None],
    ) -> dict[str, float]:
        """Train with a loss, and return the held-out record on test images."""
        options = self.options
        named = options.backbone
        torch.manual_seed(seed)
        backbone = build_backbone(named["name"], _without_name(named), splits.spec)
        settings = {"hidden": options.hidden, "temperature": options.temperature, **loss}
        pretext = Colorize(Colorize.Options.model_validate(settings), backbone)
        pretext.fit(splits.train)
        schedule = short_schedule(options.steps, options.batch, options.lr)
        trained = train_to_end(pretext, splits.train, schedule, seed, compute, check)
        return _evaluate(trained, splits, options.images, compute)


@torch.inference_mode()
def _evaluate(pretext: Colorize, splits: Splits, images: int, compute: Compute) -> dict[str, float]:
    """The held-out record on evenly spaced test images, as one batch."""
    stride = -(-len(splits.test) // images)
    (batch,) = splits.test.batches([torch.arange(0, len(splits.test), stride)], compute.device)
    metrics: dict[str, Tensor] = pretext.held_out(batch, compute.generator())
    return {name: value.item() for name, value in metrics.items()}


def _without_name(named: dict[str, Any]) -> dict[str, Any]:
    """The options, without the name."""
    return {key: value for key, value in named.items() if key != "name"}
