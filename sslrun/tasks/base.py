"""The base class of downstream tasks, and the learner of a task on a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast

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

if TYPE_CHECKING:
    from sslrun.tasks.answers import MarkedAnswer


class TaskOptions(Options):
    """Options that all tasks share."""

    @property
    def linear(self) -> bool:
        """Whether the head is a linear map of one vector per example."""
        return True

    @property
    def recoloring(self) -> tuple[str, ...]:
        """Settings under which training images have colors that the data do not have."""
        return ()

    @property
    def reads_order(self) -> bool:
        """Whether the head reads the parts of an example in order, as the frames of a clip side by
        side, so that its vectors are wider than the backbone's."""
        return False

    def check_depth(self, depth: int) -> None:
        """Check that the head can read the layers of a backbone; by default it can.

        Raises:
            UserError: a backbone of that `depth` does not have the layers.
        """


class Task:
    """A downstream task: its head, its loss and its metrics.

    A task has no parameters; its heads have. Outputs are what a head returns: (B, C) for examples,
    or (B, T, C) for tokens. `loss` and `measure` compare them with targets.

    The values of metrics are in the units that `metrics` declares. Accuracies, F1, precision,
    recall, exact match and correlations are in percent.
    """

    Options: ClassVar[type[TaskOptions]] = TaskOptions
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Increase it when the same options lead to another result."""
    reads: ClassVar[type[InputSpec]]
    """Type of the data that the task reads."""
    gives: ClassVar[type[InputSpec] | None] = None
    """Type of the inputs that the backbone gets; None: the same as `reads`."""
    has_head: ClassVar[bool] = True
    """Whether it has a head and a loss, so that protocols can learn it from labels."""
    decodes: ClassVar[bool] = False
    """Whether its head is a decoder, which is trained together with the backbone only."""
    metrics: tuple[Metric, ...]
    """The metrics that `score` returns, with their units; the first is the primary one."""
    conditional: ClassVar[frozenset[str]] = frozenset()
    """Names of metrics that `score` leaves out if the data do not define them, such as the F1 at
    the best threshold if every question has an answer."""

    def __init__(self, options: Any, spec: InputSpec, classes: tuple[str, ...]) -> None:
        self.options = options
        self.spec = spec
        self.classes = classes

    @property
    def primary(self) -> Metric:
        """The metric for model selection and tables."""
        return self.metrics[0]

    @property
    def backbone_spec(self) -> InputSpec:
        """The spec to build the backbone for, an instance of `gives`; by default the data's."""
        return self.spec

    @property
    def linear(self) -> bool:
        """Whether the head is a linear classifier of one vector per example.

        Such a head can be fitted to frozen features.
        """
        return bool(self.options.linear)

    @property
    def numbers(self) -> bool:
        """Whether targets are numbers (N, t), NaN where unknown, in place of classes.

        Then `linear` heads are fitted by least squares.
        """
        return False

    def fit_labels(self, labels: Tensor) -> None:
        """Measure the scale of the labels that are learned from, before heads are built.

        Called for `linear` tasks and for `numbers`, so that labels of another kind are reported
        before anything is trained.
        """

    def as_head(self, linear: nn.Linear) -> nn.Module:
        """Turn a linear map from vectors to outputs into a head; by default it is one."""
        return linear

    def head(self, width: int, depth: int = 0) -> nn.Module:
        """Build a new head, which maps the result of `readout` to outputs.

        `width` and `depth` are those of the backbone.
        """
        raise NotImplementedError

    def join(self, features: Features) -> Features:
        """Join the features of the parts of each example, such as frames; by default unchanged."""
        return features

    @property
    def starts_from(self) -> str | None:
        """Name of the pretext task's module that fine-tuning starts the head from, if it was kept.

        An option of the task has the same name, and turns this off if it is "new".
        """
        return None

    def learner(self, backbone: Backbone, frozen_norm: bool = False) -> TaskLearner:
        """Build the learner of backbone and head, to train both; see `TaskLearner`."""
        return TaskLearner(backbone, self, frozen_norm=frozen_norm)

    def readout(self, features: Features) -> Any:
        """Select what the head reads from the features; by default one vector per example."""
        return self.join(features).pooled

    def vector(self, features: Features) -> Tensor:
        """One vector per example (B, D).

        It is the head's input if that is one vector, else the backbone's pooled features.
        """
        return cast(Tensor, self.readout(features)) if self.linear else features.pooled

    def fit_inputs(self, backbone: Backbone, examples: Examples) -> None:
        """Fit the normalization of an untrained backbone to training examples, as `inputs` are."""
        backbone.fit_inputs(examples)

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Any, Any]:
        """Inputs for the backbone and targets for `loss`, augmented, to train on.

        By default `inputs` and labels.
        """
        return self.inputs(batch), batch.labels

    def inputs(self, batch: Batch) -> Any:
        """Inputs for the backbone to evaluate on, not random; by default the batch's own."""
        return batch.inputs

    def targets(self, examples: Examples) -> Tensor:
        """The targets for `measure` on a whole split; by default its labels.

        Raises:
            UserError: the split has no labels.
        """
        if examples.labels is None:
            raise UserError(
                f"the task '{self.name}' needs labels, but this split has none: "
                "choose a labeled one"
            )
        return examples.labels

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """Compute the loss, 0-d: the mean over the batch."""
        raise NotImplementedError

    def measure(self, outputs: Tensor, targets: Any) -> dict[str, float]:
        """Compute the values of `metrics`, by name, from a whole split's outputs.

        Tasks that need more than targets override `score` instead.
        """
        raise NotImplementedError

    def score(self, outputs: Tensor, examples: Examples) -> dict[str, float]:
        """Compute the metrics of the outputs for all examples of a split; see `measure`."""
        return self.measure(outputs, self.targets(examples).to(outputs.device))

    def answers(self, outputs: Tensor, examples: Examples) -> list[MarkedAnswer]:
        """A few right and wrong answers to show to people, for questions about passages.

        `outputs` are those for all examples of a split. None by default.
        """
        return []


tasks: Registry[Task] = Registry("task")


def concatenate_outputs(outputs: Sequence[Tensor]) -> Tensor:
    """Concatenate the outputs of batches; outputs per token (B, T, C) are padded with -inf."""
    if outputs[0].ndim < 3:
        return torch.cat(list(outputs))
    longest = max(output.shape[1] for output in outputs)
    padded = [
        F.pad(output, (0, 0, 0, longest - output.shape[1]), value=float("-inf"))
        for output in outputs
    ]
    return torch.cat(padded)


def outputs_of(
    examples: Examples,
    run: Callable[[Batch], tuple[Tensor, ...]],
    device: torch.device,
    batch: int,
    counter: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, ...]:
    """Apply `run` to all examples in one pass, and return its outputs in the order of examples.

    Batches hold examples of similar length. `counter` is entered around the middle batch, whose
    length is typical, to count its FLOPs.
    """
    lengths = examples.lengths
    order = torch.arange(len(examples)) if lengths is None else lengths.argsort(stable=True)
    indices = order.split(batch)
    middle = (len(indices) - 1) // 2
    results = []
    for number, raw in enumerate(examples.batches(indices, device)):
        with counter if counter is not None and number == middle else nullcontext():
            results.append(run(raw))
    outputs = tuple(concatenate_outputs(parts) for parts in zip(*results, strict=True))
    if lengths is None:
        return outputs
    places = order.argsort()
    return tuple(output[places.to(output.device)] for output in outputs)


class TaskLearner(Learner):
    """A learner of a task: a backbone with the task's head.

    `head` is the head to start from, such as a linear probe in LP-FT; default: a new head. `frozen`
    keeps the backbone's parameters and buffers: the backbone runs in eval mode, and its parameters
    no longer require gradients, here or elsewhere. `frozen_norm` makes batch norms use and keep
    their running statistics, while their scales and shifts are trained. Kumar et al. (ICLR 2022)
    fine-tune in this way, so that the head starts on the features that it was fitted to.
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
        """Set training mode, except for what is frozen."""
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
        """Compute the task's loss on inputs and targets."""
        inputs, targets = views
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(inputs)
        return Output(self.task.loss(self._apply_head(features), targets))

    def _apply_head(self, features: Features) -> Tensor:
        """The head's outputs in float32, outside autocast, as a probe's head is fitted.

        Only then do fine-tuning from a probe's head and the probe itself start from equal scores.
        """
        device = features.pooled.device.type
        autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            return self.head(self.readout(features.float())).float()

    def readout(self, features: Features) -> Any:
        """Select what the head reads from the features; by default what the task reads."""
        return self.task.readout(features)

    def layers(self) -> list[list[nn.Parameter]]:
        return self.backbone.layers()

    @torch.inference_mode()
    def predict(self, batch: Batch) -> Tensor:
        """Outputs for a raw batch, for `Task.measure`.

        Raises:
            ValueError: the learner is in training mode.
        """
        return self.predict_and_read(batch)[0]

    @torch.inference_mode()
    def predict_and_read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The outputs of `predict` and the vectors of `Task.vector`, from one pass.

        Raises:
            ValueError: the learner is in training mode.
        """
        if self.training:
            raise ValueError(
                "predict in training mode would use and update batch statistics: call eval() first"
            )
        features = self.backbone(self.task.inputs(batch))
        return self._apply_head(features), self.task.vector(features).float()
