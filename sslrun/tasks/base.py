"""The type of every downstream task, and the learner that a task and a backbone make."""

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
        """Whether the head is linear, of one vector an example."""
        return True

    def check_depth(self, depth: int) -> None:
        """UserError: a backbone of that `depth` has not what the head is to read. By default any has it."""


class Task:
    """A downstream task: its head, its loss and its metrics.

    Has no parameters: a head has, and whoever made it keeps it. Outputs are whatever the head gives, one for an
    example (B, C) or one for a token (B, T, C); targets are what `loss` and `measure` compare them with.
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
        """Whether the head is a linear classifier of one vector an example: such are fitted to frozen features."""
        return bool(self.options.linear)

    def head(self, width: int, depth: int = 0) -> nn.Module:
        """A fresh head: from what `readout` gives of a backbone of that `width` (and `depth`), to outputs."""
        raise NotImplementedError

    def readout(self, features: Features) -> Any:
        """What of the features the head is given; by default one vector an example."""
        return features.pooled

    def vector(self, features: Features) -> Tensor:
        """One vector an example (B, D): what the head is given; the backbone's own where that is more than one."""
        return cast(Tensor, self.readout(features)) if self.linear else features.pooled

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Any, Any]:
        """Inputs for the backbone and targets for `loss`, to train on: augmented. By default `inputs` and labels."""
        return self.inputs(batch), batch.labels

    def inputs(self, batch: Batch) -> Any:
        """Inputs for the backbone, to evaluate on: the same at every call. By default the batch's own."""
        return batch.inputs

    def targets(self, examples: Examples) -> Tensor:
        """What `measure` compares the outputs of a whole split with; by default its labels. UserError without any."""
        if examples.labels is None:
            raise UserError(f"the task '{self.name}' needs labels, and this split has none: name a labelled one")
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
    """The outputs of batch after batch as one tensor; where there is one a token, short sequences are padded by -inf."""
    if outputs[0].ndim < 3:
        return torch.cat(list(outputs))
    longest = max(each.shape[1] for each in outputs)
    return torch.cat([F.pad(each, (0, 0, 0, longest - each.shape[1]), value=float("-inf")) for each in outputs])


def outputs_of(
    examples: Examples,
    run: Callable[[Batch], tuple[Tensor, ...]],
    device: torch.device,
    batch: int,
    counter: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, ...]:
    """What `run` gives for every example, in their order, of one pass; those of like length run together.

    `counter`: entered around the batch in the middle, which is of middling length, to count its FLOPs.
    """
    lengths = examples.lengths
    order = torch.arange(len(examples)) if lengths is None else lengths.argsort(stable=True)
    places = order.split(batch)
    found = []
    for at, raw in enumerate(examples.batches(places, device)):
        with counter if counter is not None and at == (len(places) - 1) // 2 else nullcontext():
            found.append(run(raw))
    every = tuple(stacked(each) for each in zip(*found, strict=True))
    return every if lengths is None else tuple(each[order.argsort().to(each.device)] for each in every)


class TaskLearner(Learner):
    """A backbone with a task's head on it: a learner (see `sslrun.training.learner`).

    `head`: one to start from, as LP-FT starts from a linear probe's; default: a fresh one.
    `frozen`: the backbone stays as it is, parameters and buffers: it runs in eval mode, and its parameters no longer
    require gradients, here or wherever else it is used.
    `frozen_norm`: batch norms use and keep their running statistics; their scales and shifts learn. Kumar et al.
    (ICLR 2022) fine-tune so, that the features the head was fitted to are those it starts on.
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
            features = self.task.readout(self.backbone(inputs))
        return Output(self.task.loss(self.head(features), targets))

    def layers(self) -> list[list[nn.Parameter]]:
        return self.backbone.layers()

    @torch.inference_mode()
    def predict(self, batch: Batch) -> Tensor:
        """Outputs for a raw batch, as `Task.measure` takes them. ValueError in training mode."""
        return self.predict_and_read(batch)[0]

    @torch.inference_mode()
    def predict_and_read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What `predict` gives, and of the same pass what `Task.vector` does. ValueError in training mode."""
        if self.training:
            raise ValueError("predict in training mode would use and move batch statistics: call eval() first")
        features = self.backbone(self.task.inputs(batch))
        return self.head(self.task.readout(features)).float(), self.task.vector(features).float()
