"""A task whose metric is better if lower: predict ordered classes, such as star ratings."""

import torch.nn.functional as F
from torch import nn

from sslrun.data.image.augment import resize, to_float
from sslrun.data.specs import ImageSpec
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskOptions, tasks


@tasks.register("ordinal")
class Ordinal(Task):
    """Predict the index of an ordered class by regression, scored by the mean absolute error."""

    reads = ImageSpec
    metrics = (Metric("mae", unit="classes", better="lower", digits=2),)

    class Options(TaskOptions):
        @property
        def linear(self):
            """False: one output is no vector of class scores, so knn and probe do not apply."""
            return False

    def head(self, width, depth=0):
        return nn.Linear(width, 1)

    def inputs(self, batch):
        return resize(to_float(batch.inputs), self.spec.size)

    def loss(self, outputs, targets):
        return F.l1_loss(outputs.squeeze(1), targets.float())

    def measure(self, outputs, targets):
        return {"mae": F.l1_loss(outputs.squeeze(1), targets.float()).item()}
