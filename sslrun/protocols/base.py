"""The base class of protocols, and the bench, which gives a protocol everything it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.pretexts.base import Pretext
from sslrun.pretexts.weights import KeptModules
from sslrun.registry import Options, Registry
from sslrun.tasks.base import Task, TaskLearner, TaskOptions, tasks
from sslrun.training.device import Precision
from sslrun.training.schedule import Schedule

TRAIN_AND_VAL = "train+val"
"""The split of a refit: as many labels as in "train", drawn from the training and the validation
examples together."""
LEARNED = ("train", TRAIN_AND_VAL)
"""The splits in which a protocol sees labeled examples only."""


@dataclass(frozen=True)
class Scores:
    """What a protocol returns."""

    metrics: dict[str, dict[str, float]]
    """Split -> metric -> value. Holds every split of `Bench.tests`, and "val" if it was used to
    choose anything."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further JSON values for result.json, such as chosen hyperparameters or feature distortion."""


class Bench(ABC):
    """Everything that a protocol needs: one task, one backbone, one amount of labels, one seed.

    Strings name the splits: "train" (only the labeled examples), "val" and "test" are the task's
    own; `tests` are "test" and the parts of every shift. A protocol chooses hyperparameters on
    "val" and never on a test split. With `refit`, it then learns once more from "train+val", with
    what it has chosen, and is tested so.
    """

    task: Task
    """The task to learn; `score` returns its metrics."""
    seed: int
    """Seed of a new head, the order of the data, and all other random draws of the protocol."""
    device: torch.device
    """The device of the backbone and its inputs."""
    has_val: bool = True
    """Whether there is a split "val"."""
    refit: bool = False
    """Whether the model that is tested learns from "train+val"."""

    @property
    def learned(self) -> str:
        """The split that the tested model learns from."""
        return TRAIN_AND_VAL if self.refit else "train"

    @property
    def scored(self) -> tuple[str, ...]:
        """The splits to score the tested model on: `tests`, and "val" unless it learned from it."""
        return ("val", *self.tests) if self.has_val and not self.refit else self.tests

    @property
    @abstractmethod
    def tests(self) -> tuple[str, ...]:
        """The splits to score at the end: "test", and one for each part of each shift.

        Empty for a trial of a search, which is scored on "val" alone.
        """

    @abstractmethod
    def examples(self, split: str) -> Examples:
        """Return the raw examples of a split; those to learn from hold only the labeled ones."""

    @abstractmethod
    def backbone(self, drop_path: float | None = None) -> Backbone:
        """Build a backbone on the device, with the weights that the evaluation starts from.

        `drop_path` replaces the backbone's own rate of stochastic depth.
        """

    @abstractmethod
    def kept(self) -> KeptModules | None:
        """Return what the pretext task kept beside the backbone; None if it kept nothing.

        Raises UserError if it is missing or damaged.
        """

    @property
    @abstractmethod
    def layer_widths(self) -> tuple[int, ...]:
        """Widths of the pooled features of the backbone's layers; see `Backbone.pooled_layers`."""

    @abstractmethod
    def vectors(self, split: str, layers: tuple[int, ...] = ()) -> Tensor:
        """Compute the frozen features (N, D) float32 of a split, one vector per example.

        `layers` reads the pooled features of these layers, side by side, which must be among those
        of `Protocol.read_layers`; default: what the task reads. The features are cached for other
        protocols that need them.

        Raises UserError if a feature is not finite.
        """

    @abstractmethod
    def features(self, split: str, layers: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Return the `vectors` of a split and its targets (N, ...), both on the device.

        Raises UserError for a split without labels.
        """

    @abstractmethod
    def tokens(self, split: str, most: int) -> Examples | None:
        """Compute the frozen tokens (N, T, D) float32 of the examples of a split, and its targets.

        None if they take more than `most` bytes, or if the examples differ in length.

        Raises UserError for a split without labels.
        """

    @abstractmethod
    def head(self, split: str) -> dict[str, Tensor]:
        """Load the head that the protocol in `follows` learned from the labels of a split."""

    @abstractmethod
    def train(
        self,
        learner: TaskLearner,
        schedule: Schedule,
        attempt: str,
        *,
        split: str = "train",
        keep_best: bool = False,
        examples: Examples | None = None,
    ) -> TaskLearner:
        """Train on the labeled examples of a split, or on `examples` made from them.

        The `attempt` of that name is resumed if it was interrupted. Returns the learner to
        evaluate, in eval mode: the averaged weights if `schedule.ema` is set. `keep_best` returns
        the weights of the epoch whose validation score was best (ties: the first). The batch is
        lowered to the number of labels, so that one schedule serves any amount of them.

        Raises NonFinite if the loss diverges.
        """

    @abstractmethod
    def outputs(self, split: str, run: Callable[[Batch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Apply `run` to the raw batches of a split, in the protocol's `precision`.

        `run` returns tensors (B, ...). Returns one tensor (N, ...) for each, in the order of
        examples.
        """

    @abstractmethod
    def score(self, split: str, outputs: Tensor) -> dict[str, float]:
        """Compute the task's metrics of outputs (N, ...) for all examples of a split, in order.

        Classes that a shifted test set does not distinguish count as one.
        """

    @abstractmethod
    def by_shift(self, values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Average over the parts of each shift: {"ID": values of "test", shift: mean, ...}."""

    @abstractmethod
    def keep_head(self, head: nn.Module) -> None:
        """Write the head into the run, for a protocol that follows this one."""

    @abstractmethod
    def keep_backbone(self, backbone: Backbone) -> None:
        """Write the trained backbone into the run, so that it can be loaded later."""

    @abstractmethod
    def keep_pictures(self, columns: Mapping[str, Tensor]) -> None:
        """Draw columns of images (B, 3, H, W) in [0, 1] under their titles, into the run."""

    @abstractmethod
    def say(self, message: str) -> None:
        """Report one line to the user."""

    def evaluate(self, learner: TaskLearner, split: str) -> dict[str, float]:
        """Compute the task's metrics of a trained learner in eval mode on a whole split."""
        (outputs,) = self.outputs(split, lambda batch: (learner.predict(batch),))
        return self.score(split, outputs)

    def score_vectors(self, predict: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
        """Score `predict`, from vectors (N, D) to outputs (N, C), on all `scored` splits."""
        return {split: self.score(split, predict(self.vectors(split))) for split in self.scored}


class Protocol:
    """A way to learn a task from a backbone and to score it; a class, registered by name.

    The first line of the docstring is the help on the command line and in `sslrun show`.
    """

    Options: ClassVar[type[Options]] = Options
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Increased whenever the same options give a different result than before."""
    synonyms: ClassVar[tuple[str, ...]] = ()
    """Names of the protocol in published tables."""
    inherits: ClassVar[str | None] = None
    """The protocol whose options in the recipe apply before its own."""
    follows: ClassVar[str | None] = None
    """The protocol that must run first, with the same labels and seed; `Bench.head` loads its
    head."""
    initial: ClassVar[bool] = False
    """Whether it starts from random weights instead of pretrained ones."""
    learns: ClassVar[bool] = True
    """Whether it learns from labels of the training split. If not, it runs once, not per amount."""
    per_class: ClassVar[bool] = False
    """Whether its amounts of labels are always numbers per class, even 1."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        """Explain why it cannot learn such a task, as words after its name; None if it can.

        Called when a recipe is read, before any data are.
        """
        return None

    def labels(self, labels: tuple[float, ...]) -> tuple[float, ...]:
        """Return the amounts of labels to learn from, one run each; default: the evaluation's.

        An amount is a share in (0, 1] or a whole number per class.
        """
        return labels if self.learns else (1.0,)

    def trains(self, options: TaskOptions) -> bool:
        """Return whether it trains such a task in steps, so that restarts differ."""
        return False

    def chooses(self, options: TaskOptions) -> str | None:
        """Name what it chooses on validation for such a task, as in "its learning rate".

        None if it chooses nothing, so that it needs no validation split.
        """
        return None

    def needs(self) -> tuple[str, ...]:
        """Capabilities that the backbone must have; names of `Backbone.offers`."""
        return ()

    def check_backbone(self, backbone: Backbone) -> None:
        """Check that it can read a backbone as its options say; called before pretraining.

        Raises UserError if it cannot.
        """

    def check_pretext(self, pretext: Pretext) -> None:
        """Check that it can use the pretext task as its options say; called before pretraining.

        Raises UserError if it cannot.
        """

    def describe_budget(self) -> str | None:
        """Describe what it trains in addition to a head, for `sslrun check`; None if nothing."""
        return None

    def read_layers(self, count: int) -> tuple[int, ...]:
        """List the layers, of `count`, that it reads one by one or side by side; default: none."""
        return ()

    def own_metrics(self) -> tuple[str, ...]:
        """List metrics that it adds to those of the task; tables may have columns for them."""
        return ()

    def head_obstacle(self) -> str | None:
        """Explain why no protocol can start from its head, as words after its name; None if one
        can."""
        return None

    def refit_obstacle(self) -> str | None:
        """Explain why it cannot learn once more from "train+val", as words after its name.

        None if it can: then its `run` follows `Bench.refit`.
        """
        return "does not support refit"

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the result of one run, as JSON values."""
        return self.options.non_defaults()

    @property
    def precision(self) -> Precision:
        """Precision of the backbone's forward pass in evaluation."""
        return "auto"

    def run(self, bench: Bench) -> Scores:
        """Learn the task and score it.

        Raises UserError for a task, data or labels that it cannot learn from.
        """
        raise NotImplementedError


protocols: Registry[Protocol] = Registry("protocol")


def unsupported(protocol: str, task: type[Task], options: Options) -> str | None:
    """Explain why a protocol, or one that it follows, cannot learn a task; None if it can."""
    assert isinstance(options, TaskOptions)
    if protocols[protocol].learns and not task.has_head:
        able = [
            name
            for name in protocols.in_order
            if not protocols[name].learns and protocols[name].supports(task, options) is None
        ]
        remedy = f"take {' or '.join(able)}"
        same = [name for name in tasks if tasks[name].reads is task.reads]
        if others := [name for name in same if tasks[name].has_head]:
            remedy += f", or another task ({' or '.join(others)})"
        return (
            f"{protocol} learns from labels, but the task '{task.name}' has nothing to learn: "
            f"{remedy}"
        )
    name: str | None = protocol
    while name is not None:
        if reason := protocols[name].supports(task, options):
            return f"{name} {reason}"
        name = protocols[name].follows
    return None


def inheritance(protocol: str) -> list[str]:
    """List the protocols whose options a protocol takes, in this order; itself last."""
    parent = protocols[protocol].inherits
    return [*(inheritance(parent) if parent else ()), protocol]
