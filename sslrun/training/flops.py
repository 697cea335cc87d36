"""Count FLOPs by torch's counter, with formulas for the operators that it lacks.

A multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch

# torch.utils.flop_counter is imported where it is used: it imports triton, which is slow.
if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def _rnn(inputs: Shape, matrices: Sequence[Shape], packed: bool) -> int:
    """FLOPs of a recurrent layer: each matrix of the gates multiplies every token once.

    `inputs` is (T, B, C), or (tokens, C) if `packed`; biases among `matrices` do not count.
    """
    tokens = inputs[0] if packed else inputs[0] * inputs[1]
    return 2 * tokens * sum(prod(shape) for shape in matrices if len(shape) == 2)


def _mkldnn_rnn(
    inputs: Shape, input_weight: Shape, state_weight: Shape, *args: Any, **kwargs: Any
) -> int:
    """Forward FLOPs of oneDNN's recurrent layer."""
    return _rnn(inputs, (input_weight, state_weight), packed=False)


def _cudnn_rnn(inputs: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    """Forward FLOPs of cuDNN's recurrent layers."""
    return _rnn(inputs, weights, packed=len(inputs) == 2)


def _twice(forward: Callable[..., int]) -> Callable[..., int]:
    """FLOPs of a backward pass: the gradients of inputs and of weights each cost a forward pass."""
    return lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Forward FLOPs of attention: the scores, and the weighted sums of values."""
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any
) -> int:
    """Backward FLOPs of attention: the scores once more, and four matrix products for gradients."""
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(gradient, query, key, value)


MISSING_FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: _mkldnn_rnn,
    torch.ops.aten.mkldnn_rnn_layer_backward: _twice(_mkldnn_rnn),
    torch.ops.aten._cudnn_rnn: _cudnn_rnn,
    torch.ops.aten._cudnn_rnn_backward: _twice(_cudnn_rnn),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Formulas for operators that torch's counter counts as zero: LSTMs (torch 2.15), and attention on
CPUs (torch 2.14)."""


class _Untracked:
    """A module tracker that attributes all FLOPs to one module.

    It replaces torch's tracker, whose hooks take time and fail in inference mode.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def flop_counter() -> FlopCounterMode:
    """A context manager that counts FLOPs, forward and backward, for `get_total_flops()`."""
    from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

    # torch wraps this method to hide it from the compiler, and imports the compiler at the first
    # call, which takes longer than importing torch. Nothing is compiled while FLOPs are counted.
    dispatch = getattr(_FlopCounterMode.__torch_dispatch__, "__wrapped__", None)
    if dispatch is not None and not hasattr(dispatch, "__dynamo_disable"):
        setattr(dispatch, "__dynamo_disable", dispatch)
    counter = FlopCounterMode(display=False, custom_mapping=MISSING_FORMULAS)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    return counter


COUNTED_STEPS = 4
"""Approximate number of steps whose FLOPs are counted if examples differ in length."""


STRIDE = 1000
"""Steps between two counted ones if examples differ in length and time decides how many there
are."""


def is_counted(step: int, total: int | None, lengths_differ: bool) -> bool:
    """Whether to count the FLOPs of a step, which about doubles the time of a small model's step.

    The first step is counted. If examples differ in length, evenly spaced steps are counted,
    because FLOPs are not quite proportional to length. The decision depends on the step alone, so
    that a resumed run treats every step like a run that was never stopped.
    """
    stride = STRIDE if total is None else max(1, total // COUNTED_STEPS)
    return step % stride == 0 if lengths_differ else step == 0


class FlopMeter:
    """FLOPs of a training, extrapolated from a few counted steps by the number of inputs."""

    def __init__(self) -> None:
        self.counted: list[tuple[float, int]] = []
        """For each counted step: FLOPs (forward and backward, over all devices), and how many
        numbers this device read."""
        self.input_count = 0
        """How many numbers (pixels or tokens, with padding) this device read in all steps."""

    def add(self, numbers: int, flops: float | None) -> None:
        """Record a step that read `numbers` numbers; `flops` is None if they were not counted."""
        if flops is not None:
            self.counted.append((flops, numbers))
        self.input_count += numbers

    def per_step(self, steps: int) -> float | None:
        """Mean FLOPs per step after `steps` steps; None if no step has been counted."""
        if not self.counted:
            return None
        flops = sum(step_flops for step_flops, _ in self.counted) / len(self.counted)
        numbers = sum(step_numbers for _, step_numbers in self.counted) / len(self.counted)
        # The factor is exactly 1 if all batches have the same size.
        return flops * (self.input_count / steps / numbers)

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted, "input_count": self.input_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counted, self.input_count = state["counted"], state["input_count"]
