"""Properties of whole graphs: classes, several yes-or-no labels, or numbers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.data.specs import GraphSpec
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks import metrics as measures
from sslrun.tasks.base import tasks
from sslrun.tasks.numbers import ERRORS, NumberOptions, NumberTask, mean_of_known
from sslrun.tasks.text import DroppedLinear


@tasks.register("graphs")
class GraphProperties(NumberTask):
    """Predict the class of a graph; several yes-or-no labels; or numbers, if labels are numbers.

    ROC-AUC, accuracy and balanced accuracy: these metrics are in percent. MAE and RMSE are in the
    units of the labels, and lower is better. Numbers are standardized by the labels that are
    learned from. Labels that are NaN, and columns with one class only, do not count; of several
    columns the metric is the mean.
    """

    class Options(NumberOptions):
        metric: Literal["roc_auc", "accuracy", "mean_class_accuracy", "mae", "rmse"] | None = None
        """Metric for model selection and tables; default: roc_auc for two classes, accuracy for
        more, mae for numbers."""
        columns: int = Field(1, ge=1)
        """Number of labels of a graph."""

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
            self.error_metric(name) if name in ERRORS else Metric(name)
            for name in dict.fromkeys((primary, *names))
        )
        self.mean, self.deviation = torch.zeros(columns), torch.ones(columns)

    @property
    def numbers(self) -> bool:
        return not self.classes

    @property
    def linear(self) -> bool:
        """Several yes-or-no labels are not classes of one vector."""
        return self.numbers or self.options.columns == 1

    def head(self, width: int, depth: int = 0) -> nn.Module:
        if self.numbers:
            return super().head(width, depth)
        outputs = len(self.classes) if self.options.columns == 1 else self.options.columns
        return DroppedLinear(width, outputs, self.options.dropout)

    def as_head(self, linear: nn.Linear) -> nn.Module:
        return super().as_head(linear) if self.numbers else linear

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of classes, or the mean loss of the labels that are known."""
        if self.numbers:
            return super().loss(outputs, targets)
        if self.options.columns == 1:
            return F.cross_entropy(outputs, targets)
        targets = self.as_columns(targets)
        values = targets.nan_to_num().to(outputs.dtype)
        losses = F.binary_cross_entropy_with_logits(outputs, values, reduction="none")
        return mean_of_known(losses, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        if self.numbers:
            return super().measure(outputs, targets)
        if self.options.columns > 1:
            return self._measure_columns(outputs, self.as_columns(targets))
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

    def as_columns(self, labels: Tensor) -> Tensor:
        """Labels (N, columns) of labels (N,) or (N, t); classes (N,) are left as they are.

        Raises:
            UserError: There are not `columns` labels per graph.
        """
        if self.classes and self.options.columns == 1:
            return labels
        columns = super().as_columns(labels)
        if columns.shape[1] != self.options.columns:
            raise UserError(
                f"the graphs have {columns.shape[1]} labels each: set task.columns to "
                f"{columns.shape[1]}, not {self.options.columns}"
            )
        return columns
