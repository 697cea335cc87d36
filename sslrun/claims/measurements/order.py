"""What reveals the order of frames: motion, or light that drifts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from sslrun.backbones import build_backbone
from sslrun.backbones.base import backbones
from sslrun.claims.measurements.base import Measurement, measurements, short_schedule, train_to_end
from sslrun.data.splits import Splits, load_splits
from sslrun.data.video.sources import MovingDigits
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.pretexts.order import Order
from sslrun.registry import Options
from sslrun.results.address import Column, Row
from sslrun.results.table import Table
from sslrun.training.device import Compute

ACCURACY = Column(metric=Metric("accuracy"))
STILL: dict[str, Any] = {"speed": 0.0, "camera": 0.0, "turning": 0.0}
"""Options of films in which nothing moves."""


class Backbone(Options):
    """A backbone by name."""

    name: str
    """Name of a backbone for images."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its options."""

    @model_validator(mode="after")
    def _check(self) -> Backbone:
        try:
            backbones[self.name].Options.model_validate(self.options)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self


@measurements.register("order")
class FrameOrder(Measurement):
    """Accuracy of the pretext task `order` on held-out films: moving, still, and still in drifting
    light.

    Films of moving digits, and the same films without motion. In some, the brightness rises from
    frame to frame, which orders frames without motion. The defense of the task gives each frame a
    random brightness and contrast in place of its own. One network is trained for each row, from
    the same initial weights, and tested on films of other digits. Guessing four frames' order is
    right once in twelve times.
    """

    class Options(Options):
        films: MovingDigits.Options = MovingDigits.Options(labels="pattern")
        """Options of `moving-digits`, of moving films in even light."""
        task: Order.Options = Order.Options(drift=0.2)
        """Options of `order`, with its defense `drift` on."""
        rise: float = Field(0.08, gt=0, le=1)
        """Share by which the brightness rises with each frame, where it drifts."""
        backbone: Backbone = Backbone(name="mlp", options={"width": 256, "depth": 2})
        """The backbone, by `name`, with its `options`."""
        steps: int = Field(400, ge=1)
        """Training steps of each network."""
        batch: int = Field(32, ge=2)
        """Clips per step."""
        lr: float = Field(0.003, gt=0)
        """Peak learning rate."""
        draws: int = Field(4, ge=1)
        """Number of times that each test film is shown, in random orders."""

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        drifting = {**STILL, "drift": self.options.rise}
        rows: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "moving": ({}, {}),
            "still": (STILL, {}),
            "still, drifting": (drifting, {"drift": 0.0}),
            "still, drifting, defended": (drifting, {}),
        }
        table = Table("order of frames on held-out films", marks_best=False)
        for row, (films, task) in rows.items():
            accuracy = self._measure(films, task, seed, compute, check)
            table.add(Row(row), ACCURACY, accuracy, str(seed))
        table.note(
            f"% of {self.options.films.test_films:,} test films, each shown {self.options.draws} "
            f"times; {self.options.steps} steps"
        )
        return table

    def _measure(
        self,
        films: dict[str, Any],
        task: dict[str, Any],
        seed: int,
        compute: Compute,
        check: Callable[[], None],
    ) -> float:
        """Train on films, and return the accuracy on test films, in %.

        `films` and `task` change the options.
        """
        options = self.options
        splits = load_splits("moving-digits", options.films.model_copy(update=films))
        chosen = options.task.model_copy(update=task)
        torch.manual_seed(seed)
        named = options.backbone
        spec = Order.backbone_spec(chosen, splits.spec)
        pretext = Order(chosen, build_backbone(named.name, named.options, spec))
        pretext.backbone.fit_inputs(splits.train)
        schedule = short_schedule(options.steps, options.batch, options.lr)
        trained = train_to_end(pretext, splits.train, schedule, seed, compute, check)
        return _accuracy(trained, splits, options.draws, compute)


@torch.inference_mode()
def _accuracy(pretext: Order, splits: Splits, draws: int, compute: Compute) -> float:
    """Accuracy in % on all test films, each shown `draws` times, always in the same orders."""
    generator = compute.generator()
    generator.manual_seed(0)
    (batch,) = splits.test.batches([torch.arange(len(splits.test))], compute.device)
    records = [pretext.held_out(batch, generator) for _ in range(draws)]
    return 100 * torch.stack([record["held_out_accuracy"] for record in records]).mean().item()
