"""Examples: what every source yields and every stage reads, whatever the kind of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslrun.data.specs import InputSpec
from sslrun.seeds import derive_seed


class Batch(NamedTuple):
    """Raw examples on the device, as stored: uint8 images, token ids."""

    inputs: Any
    labels: Tensor | None
    """(B,) int64 class ids, or what else the task compares with; None where the set has no labels."""

    def to(self, device: torch.device) -> Batch:
        inputs = sent(self.inputs, device) if isinstance(self.inputs, Tensor) else self.inputs.to(device)
        return Batch(inputs, self.labels if self.labels is None else sent(self.labels, device))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A GPU fetches it from pinned memory, for which nobody has to wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Examples(ABC):
    """A split of a data set: a length, labels, and batches drawn by index.

    Batches are asked for by index, so that the order of an epoch is a pure function of seed and epoch and a resumed
    run starts at any batch at no cost.
    """

    spec: InputSpec
    labels: Tensor | None
    """(N, ...) on the CPU, int64 class ids as a rule; None where the set has no labels."""
    classes: tuple[str, ...]

    @property
    def strata(self) -> Tensor | None:
        """(N,) int64: the classes that splits and shares of the labels keep in balance; None without labels."""
        return self.labels

    @property
    def lengths(self) -> Tensor | None:
        """(N,) how long each example is, where they differ and a batch is padded to its longest; None: all are alike."""
        return None

    @property
    def nbytes(self) -> int | None:
        """What it takes on a device; None: it can't lie there."""
        return None

    def to(self, device: torch.device) -> Examples:
        """The same set on `device`, where batches are then drawn without a transfer. By default it can't."""
        raise NotImplementedError

    def order(self, seed: int, epoch: int) -> Tensor:
        """(N,) int64: the order in which an epoch visits the examples; by default a random one.

        A function of seed and epoch, and of `state_dict` where there is state: examples that are collected or
        reweighted while training answer anew for each epoch.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        return torch.randperm(len(self), generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """What `order` depends on besides seed and epoch: tensors and plain values, kept in checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave at the beginning of an epoch."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def subset(self, indices: Tensor) -> Examples:
        """The examples at `indices` (M,) int64, in that order."""

    @abstractmethod
    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """One batch on `device` for each tensor (B,) of indices."""


@dataclass(frozen=True)
class TensorExamples(Examples):
    """A set small enough to lie in memory as one tensor: (N, ...) on the CPU or on the device."""

    inputs: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    spec: InputSpec

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, indices: Tensor) -> TensorExamples:
        labels = self.labels if self.labels is None else self.labels[indices]
        return replace(self, inputs=self.inputs[indices.to(self.inputs.device)], labels=labels)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes

    def to(self, device: torch.device) -> TensorExamples:
        return replace(self, inputs=self.inputs.to(device))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            labels = None if self.labels is None else self.labels[chosen]
            yield Batch(self.inputs[sent(chosen, self.inputs.device)], labels).to(device)
