"""Estimate what pretraining takes on GPUs that are not there, from FLOPs and stated assumptions.

Nothing here is measured except the FLOPs of a step. docs/scale.md explains the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PEAK = 312e12
"""Dense bf16 FLOP/s of a GPU: NVIDIA's data sheet of the A100."""
CONVOLUTIONS = 0.19
"""Share of the peak that a convolutional network reaches. From 2,470 images/s of ResNet-50 in mixed
precision on one A100 80GB (README of ResNet50 v1.5 in NVIDIA/DeepLearningExamples, 291f0d0), at
three times 8.2 GFLOPs an image."""
TRANSFORMERS = 0.29
"""Share of the peak that a Transformer reaches. From GPT-2 (124M) in about 4 days on eight A100
40GB (README of karpathy/nanoGPT): 600,000 steps of 491,520 tokens (its config/train_gpt2.py), at
857 MFLOPs a token."""
NODE = 8
"""GPUs in a node."""
NODE_BANDWIDTH = 300e9
"""Bytes/s between GPUs of a node, in each direction: NVLink in the A100's data sheet."""
BANDWIDTH = 25e9
"""Bytes/s of a GPU to other nodes. Our assumption: one link of 200 Gbit/s for each GPU."""
DISK = 1e9
"""Bytes/s at which a checkpoint is written. Our assumption."""
GRADIENT_BYTES = 4
"""Bytes of a gradient, which devices sum in float32."""


@dataclass(frozen=True)
class Forecast:
    """Estimated cost of a pretraining on several GPUs."""

    gpus: int
    compute_seconds: float
    """Seconds of a step's forward and backward pass."""
    reduce_seconds: float
    """Seconds to sum the gradients of a step, which overlap with the backward pass."""
    steps: int
    batch: int
    """Examples in a step, on all GPUs together."""
    examples_a_second: float
    """Examples/s that all data loaders together must deliver."""
    checkpoint_bytes: int

    @property
    def step_seconds(self) -> float:
        """Seconds of a step. Of computing and communicating, the slower counts: they overlap."""
        return max(self.compute_seconds, self.reduce_seconds)

    @property
    def seconds(self) -> float:
        """Seconds of the whole pretraining."""
        return self.steps * self.step_seconds

    @property
    def limit(self) -> str:
        """What a step waits for."""
        return "network" if self.reduce_seconds > self.compute_seconds else "compute"

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast as plain values."""
        return {**asdict(self), "seconds": self.seconds, "limit": self.limit}


def forecast(costs: Mapping[str, Any], gpus: int) -> Forecast | None:
    """Forecast a pretraining on `gpus` GPUs from what `estimate` returns for a recipe.

    None if the recipe pretrains nothing, if its FLOPs or its length are unknown, or if a budget of
    time decides the length.
    """
    if not costs.get("flops") or costs.get("budget"):
        return None
    steps = costs["steps"]
    share = CONVOLUTIONS if costs["convolutional"] else TRANSFORMERS
    compute = costs["flops"] / steps / (gpus * PEAK * share)
    gradients = GRADIENT_BYTES * costs["trained_parameters"]
    bandwidth = BANDWIDTH if gpus > NODE else NODE_BANDWIDTH
    # Each device of a ring sends and receives every gradient about twice.
    reduce = 2 * (gpus - 1) / gpus * gradients / bandwidth
    batch = round(costs["flops"] / steps / costs["flops_an_example"])
    return Forecast(
        gpus, compute, reduce, steps, batch, batch / max(compute, reduce), costs["state_bytes"]
    )


def describe(row: str, forecast: Forecast, length: int | None = None) -> str:
    """Describe a forecast in a line; `length` is that of a text in tokens, if it reads text."""
    rate = forecast.examples_a_second * (length or 1)
    unit = "examples/s" if length is None else "tokens/s"
    writing = forecast.checkpoint_bytes / DISK
    return (
        f"{row}: on {forecast.gpus} GPU(s) about {forecast.seconds / 3600:,.1f} hours "
        f"({forecast.steps:,} steps of {1000 * forecast.step_seconds:,.1f} ms, limited by "
        f"{forecast.limit}; gradients {1000 * forecast.reduce_seconds:,.1f} ms; "
        f"{forecast.batch / forecast.gpus:,.0f} examples a GPU), data at "
        f"{rate:,.0f} {unit}, checkpoints of {forecast.checkpoint_bytes / 1e9:,.1f} GB in "
        f"{writing:,.0f} s"
    )


def assumptions() -> str:
    """State the assumptions of all forecasts in a line."""
    return (
        f"estimated, not measured: {PEAK / 1e12:.0f} TFLOP/s a GPU (A100's data sheet), and "
        f"{CONVOLUTIONS:.0%} of it reached by convolutions and {TRANSFORMERS:.0%} by Transformers, "
        f"gradients at {NODE_BANDWIDTH / 1e9:.0f} GB/s in a node of {NODE} and "
        f"{BANDWIDTH / 1e9:.0f} GB/s between nodes, disk at {DISK / 1e9:.0f} GB/s; see "
        "docs/scale.md"
    )


def describe_all(rows: Sequence[Mapping[str, Any]], gpus: int) -> list[str]:
    """Describe the forecasts of recipes, and the assumptions."""
    forecasts = [(costs, forecast(costs, gpus)) for costs in rows]
    lines = [describe(costs["row"], found, costs["length"]) for costs, found in forecasts if found]
    return [*lines, assumptions()]
