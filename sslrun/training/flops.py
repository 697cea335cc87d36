"""FLOPs, counted by torch's own counter (a multiplication and an addition are two), with formulas for what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def _rnn(inputs: Shape, matrices: Sequence[Shape], packed: bool) -> int:
    """Each of the gates' matrices multiplies every token once."""
    tokens = inputs[0] if packed else inputs[0] * inputs[1]
    return 2 * tokens * sum(prod(each) for each in matrices if len(each) == 2)


def _mkldnn_rnn(inputs: Shape, of_input: Shape, of_state: Shape, *args: Any, **kwargs: Any) -> int:
    return _rnn(inputs, (of_input, of_state), packed=False)


def _cudnn_rnn(inputs: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    return _rnn(inputs, weights, packed=len(inputs) == 2)


def _twice(forward: Callable[..., int]) -> Callable[..., int]:
    """The backward pass: once for the gradient of the inputs, once for that of the weights."""
    return lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Scores, and what they mix."""
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any
) -> int:
    """The scores anew, and the gradients of the four that were multiplied."""
    return sdpa_backward_flop_count(gradient, query, key, value)


LACKING = {
    torch.ops.aten.mkldnn_rnn_layer: _mkldnn_rnn,
    torch.ops.aten.mkldnn_rnn_layer_backward: _twice(_mkldnn_rnn),
    torch.ops.aten._cudnn_rnn: _cudnn_rnn,
    torch.ops.aten._cudnn_rnn_backward: _twice(_cudnn_rnn),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's counter takes for nothing: LSTMs as a whole (as of 2.15), and a CPU's attention (as
of 2.14)."""


class _Untracked:
    """In place of torch's tracker of modules, whose hooks cost time and fail in inference mode: all is one module."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def flop_counter() -> FlopCounterMode:
    """Counts what runs while it is entered, in both directions: `get_total_flops()`."""
    counter = FlopCounterMode(display=False, custom_mapping=LACKING)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    return counter


COUNTED_STEPS = 4
"""Steps, about, whose FLOPs are counted where examples differ in length."""


def is_counted(step: int, total: int, lengths_differ: bool) -> bool:
    """Whether a step's FLOPs are counted, which takes about as long again as a step of a small model.

    The first step is; where examples differ in length, steps at even distances are, since FLOPs are
    not quite proportional to length. Depends on the step alone, so that a resumed run takes every
    step in the same way as one that was never stopped.
    """
    return step % max(1, total // COUNTED_STEPS) == 0 if lengths_differ else step == 0


class FlopMeter:
    """FLOPs of a training, extrapolated from a few counted steps by the number of inputs."""

    def __init__(self) -> None:
        self.counted: list[tuple[float, int]] = []
        """FLOPs (forward and backward, over all devices) and this device's numbers of input, for
        each counted step."""
        self.input_count = 0
        """Numbers of input (pixels, tokens) of all steps on this device, padding included."""

    def add(self, numbers: int, flops: float | None) -> None:
        """Record a step of `numbers` inputs; `flops`: None unless they were counted."""
        if flops is not None:
            self.counted.append((flops, numbers))
        self.input_count += numbers

    def per_step(self, steps: int) -> float | None:
        """Mean FLOPs of a step after `steps` steps; None before any was counted."""
        if not self.counted:
            return None
        flops, numbers = (
            sum(column) / len(self.counted) for column in zip(*self.counted, strict=True)
        )
        return flops * (
            self.input_count / steps / numbers
        )  # a factor of exactly 1 where all batches have one size

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted, "input_count": self.input_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counted, self.input_count = state["counted"], state["input_count"]
