"""The base of downstream tasks, and the learner that a task and a backbone form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslrun.backbones.base import Backbone, Features
from sslrun.data.examples import Batch, Examples
from sslrun.data.specs import InputSpec
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.registry import Options, Registry
from sslrun.training.learner import Learner, Output


class TaskOptions(Options):
    """Options that all tasks share."""

    @property
    def linear(self) -> bool:
        """Whether the head is a linear map of one vector per example."""
        return True

    def check_depth(self, depth: int) -> None:
        """UserError: a backbone of that `depth` lacks what the head reads. By default every backbone has it."""


class Task:
    """A downstream task: its head, its loss and its metrics.

    A task has no parameters; its heads have. Outputs are what a head returns, one per example (B,
    C) or one per token (B, T, C). Targets are what `loss` and `measure` compare them with.
    """

    Options: ClassVar[type[TaskOptions]] = TaskOptions
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Increase it when the same options lead to another result."""
    reads: ClassVar[type[InputSpec]]
    """Type of the data that the task reads."""
    gives: ClassVar[type[InputSpec] | None] = None
    """Type of the inputs that the backbone gets; None: the same as `reads`."""
    metrics: tuple[Metric, ...]
    """What `measure` reports; the first chooses hyperparameters and stands in tables."""

    def __init__(self, options: Any, spec: InputSpec, classes: tuple[str, ...]) -> None:
        self.options = options
        self.spec = spec
        self.classes = classes

    @property
    def primary(self) -> Metric:
        """The metric that chooses hyperparameters and stands in tables."""
        return self.metrics[0]

    @property
    def backbone_spec(self) -> InputSpec:
        """The spec to build the backbone for, an instance of `gives`; by default the data's."""
        return self.spec

    @property
    def linear(self) -> bool:
        """Whether the head is a linear classifier of one vector per example, which can be fitted to frozen features."""
        return bool(self.options.linear)

    def head(self, width: int, depth: int = 0) -> nn.Module:
        """A fresh head: from what `readout` gives of a backbone of that `width` (and `depth`), to outputs."""
        raise NotImplementedError

    def readout(self, features: Features) -> Any:
        """Select what the head reads from the features; by default one vector per example."""
        return features.pooled

    def vector(self, features: Features) -> Tensor:
        """One vector per example (B, D): the head's input; the backbone's pooled features if that is more than a vector."""
        return cast(Tensor, self.readout(features)) if self.linear else features.pooled

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Any, Any]:
        """Inputs for the backbone and targets for `loss`, augmented, to train on. By default `inputs` and labels."""
        return self.inputs(batch), batch.labels

    def inputs(self, batch: Batch) -> Any:
        """Inputs for the backbone, to evaluate on, the same at every call. By default the batch's own."""
        return batch.inputs

    def targets(self, examples: Examples) -> Tensor:
        """What `measure` compares the outputs of a whole split with; by default its labels. UserError without any."""
        if examples.labels is None:
            raise UserError(
                f"the task '{self.name}' needs labels, but this split has none: choose a labeled one"
            )
        return examples.labels

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """0-d, mean over the batch."""
        raise NotImplementedError

    def measure(self, outputs: Tensor, targets: Any) -> dict[str, float]:
        """The values of `metrics` by name, of a whole split's outputs; the primary one is always among them."""
        raise NotImplementedError

    def score(self, outputs: Tensor, examples: Examples) -> dict[str, float]:
        """`measure` the outputs for all of a split's examples."""
        return self.measure(outputs, self.targets(examples).to(outputs.device))


tasks: Registry[Task] = Registry("task")


def stacked(outputs: Sequence[Tensor]) -> Tensor:
    """Join the outputs of several batches; outputs per token (B, T, C) are padded with -inf to the longest."""
    if outputs[0].ndim < 3:
        return torch.cat(list(outputs))
    longest = max(each.shape[1] for each in outputs)
    return torch.cat(
        [F.pad(each, (0, 0, 0, longest - each.shape[1]), value=float("-inf")) for each in outputs]
    )


def outputs_of(
    examples: Examples,
    run: Callable[[Batch], tuple[Tensor, ...]],
    device: torch.device,
    batch: int,
    counter: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, ...]:
    """Apply `run` to all examples in one pass, and return its outputs in the order of examples.

    Examples of similar length run together. `counter` is entered around the middle batch, whose
    length is typical, to count its FLOPs.
    """
    lengths = examples.lengths
    order = torch.arange(len(examples)) if lengths is None else lengths.argsort(stable=True)
    places = order.split(batch)
    found = []
    for at, raw in enumerate(examples.batches(places, device)):
        with counter if counter is not None and at == (len(places) - 1) // 2 else nullcontext():
            found.append(run(raw))
    every = tuple(stacked(each) for each in zip(*found, strict=True))
    return (
        every if lengths is None else tuple(each[order.argsort().to(each.device)] for each in every)
    )


class TaskLearner(Learner):
    """A backbone with a task's head on it: a learner (see `sslrun.training.learner`).

    `head` is the head to start from, as LP-FT starts from that of a linear probe; default: a new
    one. `frozen` keeps the backbone's parameters and buffers: it runs in eval mode, and its
    parameters require no gradients any more, here or elsewhere. `frozen_norm` lets batch norms use
    and keep their running statistics, while their scales and shifts learn. Kumar et al. (ICLR 2022)
    fine-tune in this way, so that a head starts on the features that it was fitted to.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        head: nn.Module | None = None,
        *,
        frozen: bool = False,
        frozen_norm: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.task = task
        self.head = task.head(backbone.width, backbone.depth) if head is None else head
        self.frozen = frozen
        self.frozen_norm = frozen_norm
        if frozen:
            backbone.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> TaskLearner:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        elif self.frozen_norm:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Any, Any]:
        """See `Task.views`."""
        return self.task.views(batch, generator)

    def forward(self, views: tuple[Any, Any]) -> Output:
        """The task's loss on inputs and targets."""
        inputs, targets = views
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(inputs)
        return Output(self.task.loss(self._apply_head(features), targets))

    def _apply_head(self, features: Features) -> Tensor:
        """The head's outputs in float32, outside autocast, as a probe's head is fitted.

        Only then do fine-tuning from a probe's head and the probe itself start from equal scores.
        """
        with torch.autocast(features.pooled.device.type, enabled=False):
            return self.head(self.task.readout(features.float())).float()

    def layers(self) -> list[list[nn.Parameter]]:
        return self.backbone.layers()

    @torch.inference_mode()
    def predict(self, batch: Batch) -> Tensor:
        """Outputs for a raw batch, as `Task.measure` takes them. ValueError: the learner is in training mode."""
        return self.predict_and_read(batch)[0]

    @torch.inference_mode()
    def predict_and_read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The outputs of `predict` and the vectors of `Task.vector`, from one pass. ValueError: in training mode."""
        if self.training:
            raise ValueError(
                "predict in training mode would use and move batch statistics: call eval() first"
            )
        features = self.backbone(self.task.inputs(batch))
        return self._apply_head(features), self.task.vector(features).float()
