"""Properties of whole graphs: classes, several yes-or-no labels, or numbers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.data.examples import Examples
from sslrun.data.specs import GraphSpec
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks import metrics as measures
from sslrun.tasks.base import Task, TaskOptions, tasks
from sslrun.tasks.text import DroppedLinear

ERRORS = ("mae", "rmse")
"""Metrics of numbers."""


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


@tasks.register("graphs")
class GraphProperties(Task):
    """Predict the class of a graph; several yes-or-no labels; or numbers, if labels are numbers.

    ROC-AUC, accuracy and balanced accuracy: these metrics are in percent. MAE and RMSE are in the
    units of the labels, and lower is better. Numbers are standardized by the labels that are
    learned from. Labels that are NaN, and columns with one class only, do not count; of several
    columns the metric is the mean.
    """

    class Options(TaskOptions):
        metric: Literal["roc_auc", "accuracy", "mean_class_accuracy", "mae", "rmse"] | None = None
        """Metric for model selection and tables; default: roc_auc for two classes, accuracy for
        more, mae for numbers."""
        columns: int = Field(1, ge=1)
        """Number of labels of a graph."""
        loss: Literal["l1", "l2"] | None = None
        """Loss of numbers; default: l2 if the metric is rmse, else l1."""
        unit: str = ""
        """Unit of the numbers, for tables."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """Dropout rate on the input of the head."""

        @model_validator(mode="after")
        def _loss_of_numbers(self) -> GraphProperties.Options:
            if self.loss is not None and self.metric not in (None, *ERRORS):
                raise ValueError(f"loss: {self.loss} is for numbers, {self.metric} is for classes")
            return self

    reads = GraphSpec
    options: Options

    def __init__(self, options: Options, spec: Any, classes: tuple[str, ...]) -> None:
        super().__init__(options, spec, classes)
        columns = options.columns
        if classes and columns > 1 and len(classes) != 2:
            raise UserError(f"{columns} columns of labels need two classes, not {len(classes)}")
        names: tuple[str, ...] = ERRORS
        if classes:
            names = ("accuracy",) if columns > 1 else ("accuracy", "mean_class_accuracy")
            names = ("roc_auc", *names) if len(classes) == 2 else names
        primary = options.metric or names[0]
        if primary not in names:
            raise UserError(
                f"metric {primary} does not suit these labels: choose from {', '.join(names)}"
            )
        self.metrics = tuple(
            Metric(name, options.unit, "lower", 3) if name in ERRORS else Metric(name)
            for name in dict.fromkeys((primary, *names))
        )
        self.loss_of_numbers = options.loss or ("l2" if primary == "rmse" else "l1")
        self.mean, self.deviation = torch.zeros(columns), torch.ones(columns)

    @property
    def numbers(self) -> bool:
        return not self.classes

    @property
    def linear(self) -> bool:
        """Several yes-or-no labels are not classes of one vector."""
        return self.numbers or self.options.columns == 1

    def fit_labels(self, labels: Tensor) -> None:
        """Measure the mean and the deviation of each column of labels (N,) or (N, t)."""
        columns = self._columns(labels).double()
        known = ~columns.isnan()
        counts = known.sum(dim=0)
        if (counts == 0).any():
            raise UserError(f"label column {int(counts.argmin())} is empty: leave it out")
        mean = columns.nan_to_num().sum(dim=0) / counts
        variance = torch.where(known, (columns - mean).square(), 0).sum(dim=0) / counts
        deviation = torch.where(variance > 0, variance.sqrt(), 1.0)
        self.mean, self.deviation = mean.float(), deviation.float()

    def head(self, width: int, depth: int = 0) -> nn.Module:
        if self.numbers:
            return NumberHead(width, self.mean, self.deviation, self.options.dropout)
        outputs = len(self.classes) if self.options.columns == 1 else self.options.columns
        return DroppedLinear(width, outputs, self.options.dropout)

    @torch.no_grad()
    def as_head(self, linear: nn.Linear) -> nn.Module:
        """Turn a linear map of features to outputs into a head with the same outputs."""
        if not self.numbers:
            return linear
        head = NumberHead(linear.in_features, self.mean, self.deviation, self.options.dropout)
        head = head.to(linear.weight.device)
        head.weight.copy_(linear.weight / head.deviation[:, None])
        head.bias.copy_((linear.bias - head.mean) / head.deviation)
        return head.eval()

    def targets(self, examples: Examples) -> Tensor:
        """Labels, of one shape with the outputs if they are not classes."""
        labels = super().targets(examples)
        return self._columns(labels) if self.numbers or self.options.columns > 1 else labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of classes, or the mean loss of the labels that are known."""
        if not self.numbers and self.options.columns == 1:
            return F.cross_entropy(outputs, targets)
        targets = self._columns(targets)
        known = ~targets.isnan()
        values = targets.nan_to_num().to(outputs.dtype)
        if self.numbers:
            errors = (outputs - values) / self.deviation.to(outputs.device)
            losses = errors.abs() if self.loss_of_numbers == "l1" else errors.square()
        else:
            losses = F.binary_cross_entropy_with_logits(outputs, values, reduction="none")
        return torch.where(known, losses, 0).sum() / known.sum().clamp_min(1)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        if self.numbers:
            errors = (outputs - self._columns(targets)).double()
            return {
                "mae": errors.abs().nanmean(dim=0).mean().item(),
                "rmse": errors.square().nanmean(dim=0).sqrt().mean().item(),
            }
        if self.options.columns > 1:
            return self._measure_columns(outputs, self._columns(targets))
        values = {
            "accuracy": measures.accuracy(outputs, targets),
            "mean_class_accuracy": measures.mean_class_accuracy(outputs, targets),
        }
        if len(self.classes) == 2:
            values["roc_auc"] = measures.roc_auc(outputs[:, 1] - outputs[:, 0], targets == 1)
        return values

    def _measure_columns(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Mean over columns with both classes of the metrics of the labels that are known."""
        areas, accuracies = [], []
        for scores, truth in zip(outputs.T, targets.T, strict=True):
            known = ~truth.isnan()
            scores, positive = scores[known], truth[known] == 1
            if positive.unique().numel() == 2:
                areas.append(measures.roc_auc(scores, positive))
                accuracies.append(100 * ((scores > 0) == positive).double().mean().item())
        if not areas:
            raise UserError("no label column has both classes, so that ROC-AUC is undefined")
        return {
            "roc_auc": sum(areas) / len(areas),
            "accuracy": sum(accuracies) / len(accuracies),
        }

    def _columns(self, labels: Tensor) -> Tensor:
        """Labels (N, columns) of labels (N,) or (N, t).

        Raises:
            UserError: There are not `columns` labels per graph.
        """
        columns = labels[:, None] if labels.ndim == 1 else labels
        if columns.shape[1] != self.options.columns:
            raise UserError(
                f"the graphs have {columns.shape[1]} labels each: set task.columns to "
                f"{columns.shape[1]}, not {self.options.columns}"
            )
        return columns
