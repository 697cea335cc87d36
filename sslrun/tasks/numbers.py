"""Tasks whose labels are numbers: their heads, losses and errors; and numbers of images."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.data.examples import Examples
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskOptions, tasks
from sslrun.tasks.image import ImageTask, ImageTaskOptions
from sslrun.tasks.text import DroppedLinear

ERRORS = ("mae", "rmse")
"""Metrics of numbers."""


class NumberOptions(TaskOptions):
    """Options of tasks whose labels may be numbers."""

    loss: Literal["l1", "l2"] | None = None
    """Loss of numbers; default: l2 if the metric is rmse, else l1."""
    unit: str = ""
    """Unit of the numbers, for tables."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate on the input of the head."""


class NumberHead(DroppedLinear):
    """Dropout and a linear map to standardized numbers; returns them in the labels' units."""

    mean: Tensor
    deviation: Tensor
    """(outputs,)."""

    def __init__(self, width: int, mean: Tensor, deviation: Tensor, dropout: float) -> None:
        super().__init__(width, len(mean), dropout)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("deviation", deviation.clone())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.deviation + self.mean


class NumberTask(Task):
    """Base class of tasks that predict numbers (N, t) from labels (N,) or (N, t).

    Numbers are standardized by the labels that are learned from. Labels that are NaN do not count.
    """

    options: Any
    mean: Tensor
    deviation: Tensor
    """(t,), of the labels that are learned from."""

    @property
    def numbers(self) -> bool:
        return True

    def as_columns(self, labels: Tensor) -> Tensor:
        """Labels of one shape with the outputs (N, t), of labels (N,) or (N, t)."""
        return labels[:, None] if labels.ndim == 1 else labels

    def fit_labels(self, labels: Tensor) -> None:
        """Measure the mean and the deviation of each column of labels (N,) or (N, t)."""
        columns = self.as_columns(labels).double()
        known = ~columns.isnan()
        counts = known.sum(dim=0)
        if (counts == 0).any():
            raise UserError(f"label column {int(counts.argmin())} is empty: leave it out")
        mean = columns.nan_to_num().sum(dim=0) / counts
        variance = torch.where(known, (columns - mean).square(), 0).sum(dim=0) / counts
        deviation = torch.where(variance > 0, variance.sqrt(), 1.0)
        self.mean, self.deviation = mean.float(), deviation.float()

    def head(self, width: int, depth: int = 0) -> nn.Module:
        return NumberHead(width, self.mean, self.deviation, self.options.dropout)

    @torch.no_grad()
    def as_head(self, linear: nn.Linear) -> nn.Module:
        """Turn a linear map of features to numbers into a head with the same outputs."""
        head = NumberHead(linear.in_features, self.mean, self.deviation, self.options.dropout)
        head = head.to(linear.weight.device)
        head.weight.copy_(linear.weight / head.deviation[:, None])
        head.bias.copy_((linear.bias - head.mean) / head.deviation)
        return head.eval()

    def targets(self, examples: Examples) -> Tensor:
        """Labels; see `as_columns`."""
        return self.as_columns(super().targets(examples))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of the standardized numbers that are known."""
        targets = self.as_columns(targets)
        values = targets.nan_to_num().to(outputs.dtype)
        errors = (outputs - values) / self.deviation.to(outputs.device)
        name = self.options.loss or ("l2" if self.primary.name == "rmse" else "l1")
        return mean_of_known(errors.abs() if name == "l1" else errors.square(), targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Errors of the numbers that are known: means over columns, in the units of the labels."""
        errors = (outputs - self.as_columns(targets)).double()
        return {
            "mae": errors.abs().nanmean(dim=0).mean().item(),
            "rmse": errors.square().nanmean(dim=0).sqrt().mean().item(),
        }

    def error_metric(self, name: str) -> Metric:
        """The metric `name`, one of ERRORS."""
        return Metric(name, self.options.unit, "lower", 3)


def mean_of_known(losses: Tensor, targets: Tensor) -> Tensor:
    """Mean of losses (N, t) over the targets that are not NaN."""
    known = ~targets.isnan()
    return torch.where(known, losses, 0).sum() / known.sum().clamp_min(1)


@tasks.register("numbers")
class ImageNumbers(NumberTask, ImageTask):
    """Predict numbers from images, such as positions. RMSE and MAE: lower is better.

    Both are means over the numbers of an image and are in the units of the labels. Labels that are
    NaN do not count.
    """

    class Options(NumberOptions, ImageTaskOptions):
        metric: Literal["rmse", "mae"] = "rmse"
        """Metric for model selection and tables."""

    options: ImageNumbers.Options

    def __init__(self, options: ImageNumbers.Options, spec: Any, classes: tuple[str, ...]) -> None:
        super().__init__(options, spec, classes)
        if classes:
            raise UserError(
                f"the task '{self.name}' needs labels that are numbers, but these are classes "
                f"({', '.join(classes[:3])}, ...): take task: classification, or name the columns "
                "of numbers, as in data: {name: csv-images, path: list.csv, numbers: [x, y]}"
            )
        names = dict.fromkeys((options.metric, *ERRORS))
        self.metrics = tuple(self.error_metric(name) for name in names)
