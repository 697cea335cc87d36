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


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
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
"""What torch's counter takes for nothing: LSTMs as a whole (as of 2.15), and a CPU's attention (as of 2.14)."""


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
