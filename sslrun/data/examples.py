"""Examples: what every source returns and every stage reads, for every kind of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslrun.data.specs import InputSpec
from sslrun.seeds import derive_seed

ProgressCallback = Callable[[str, int, int], None]
"""Called while data is read: (what is read, number done, total number; 0 if unknown) -> None."""


class Batch(NamedTuple):
    """Raw examples on the device, as they are stored: uint8 images or token ids."""

    inputs: Any
    labels: Tensor | None
    """(B,) int64 class ids, or other targets of the task; None if the set has no labels."""

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to `device`."""
        inputs = self.inputs
        inputs = to_device(inputs, device) if isinstance(inputs, Tensor) else inputs.to(device)
        return Batch(inputs, None if self.labels is None else to_device(self.labels, device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device`; a GPU copies from pinned memory, so that the CPU does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def shuffle(count: int, generator: torch.Generator) -> Tensor:
    """Return the numbers (N,) below `count` in random order.

    They are int32 if they fit, in half of the memory; the order is the same in either type.
    """
    dtype = torch.int32 if count < 2**31 else torch.int64
    return torch.randperm(count, generator=generator, dtype=dtype)


class Examples(ABC):
    """A split of a data set: its length, its labels, and batches drawn by index.

    Batches are drawn by index so that the order of an epoch is a pure function of seed and epoch
    and a resumed run can start at any batch at no cost.
    """

    spec: InputSpec
    labels: Tensor | None
    """(N, ...) on the CPU: int64 class ids, or float32 numbers, NaN where unknown, or other targets
    of a task; None if the set has no labels."""
    classes: tuple[str, ...]

    @property
    def strata(self) -> Tensor | None:
        """(N,) int64 classes that splits and label fractions balance; None if unlabeled.

        Examples whose labels are numbers all count as one class.
        """
        if self.labels is None or not self.labels.is_floating_point():
            return self.labels
        return torch.zeros(len(self), dtype=torch.int64)

    def divide(self, amount: float) -> tuple[Tensor, Tensor] | None:
        """Split positions into what remains and what is carved off, so that no two are akin.

        None, the default: examples are independent, and may be carved off at random. `amount` is a
        share below 1, or a number of examples.
        """
        return None

    @property
    def lengths(self) -> Tensor | None:
        """(N,) lengths of examples that batches are padded to; None if all are equal."""
        return None

    @property
    def nbytes(self) -> int | None:
        """Bytes that the set takes on a device; None if it cannot be placed there."""
        return None

    def to(self, device: torch.device) -> Examples:
        """Return the set placed on `device`, where batches are drawn without a transfer.

        Raises:
            NotImplementedError: The set cannot be placed on a device (`nbytes` is None).
        """
        raise NotImplementedError

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the order (N,) in which an epoch visits the examples; the default is random.

        It is int32 or int64, and a function of seed, epoch and `state_dict`. A set whose examples
        are collected or reweighted during training returns an order that reflects their state.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        return shuffle(len(self), generator)

    def state_dict(self) -> dict[str, Any]:
        """Return what `order` depends on in addition to seed and epoch, for checkpoints.

        It holds tensors and plain values.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned at the beginning of an epoch."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def subset(self, indices: Tensor) -> Examples:
        """Return the examples at `indices` (M,) int64, in that order."""

    @abstractmethod
    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """Yield one batch on `device` for each tensor (B,) of indices."""


@dataclass(frozen=True)
class TensorExamples(Examples):
    """A set that fits into memory as one tensor (N, ...), on the CPU or on the device."""

    inputs: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    spec: InputSpec

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, indices: Tensor) -> TensorExamples:
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, inputs=self.inputs[indices.to(self.inputs.device)], labels=labels)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes

    def to(self, device: torch.device) -> TensorExamples:
        return replace(self, inputs=self.inputs.to(device))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for batch in indices:
            labels = None if self.labels is None else self.labels[batch]
            yield Batch(self.inputs[to_device(batch, self.inputs.device)], labels).to(device)
