"""The lecture's claims that are theorems, checked on their constructions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from sslrun.claims.measurements.base import Measurement, measurements
from sslrun.claims.theory import convolution, distortion
from sslrun.metric import Metric
from sslrun.registry import Options
from sslrun.results.address import Column, Row
from sslrun.results.table import Table
from sslrun.training.device import Compute


@measurements.register("convolution")
class Convolution(Measurement):
    """Self-attention with weights under which it is a convolution: the largest difference from conv2d, in float64."""

    class Options(Options):
        kernels: tuple[Annotated[int, Field(ge=1)], ...] = (1, 3, 5)
        """Kernel sizes, in pixels; each must be odd."""
        alphas: tuple[Annotated[float, Field(gt=0)], ...] = (5.0, 20.0, 60.0)
        """How narrowly a head attends; the limit, one pixel a head, is always there."""
        size: int = Field(11, ge=3)
        """Side of the images, in pixels."""

        @model_validator(mode="after")
        def _fitting(self) -> Convolution.Options:
            for kernel in self.kernels:
                if kernel % 2 == 0 or kernel > self.size:
                    raise ValueError(
                        f"a kernel of {kernel} should be odd and no larger than the images ({self.size})"
                    )
            return self

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        made = Table("self-attention as a convolution", format_spec=".1e", marks_best=False)
        made.second = "kernel"
        for kernel in self.options.kernels:
            found = convolution.errors(
                (*self.options.alphas, math.inf), kernel, self.options.size, seed
            )
            for alpha, row in found.items():
                name = "hard attention" if math.isinf(alpha) else f"alpha {alpha:g}"
                for what, value in row.items():
                    column = Column(metric=Metric(what, unit="", better="lower"))
                    made.add(Row(name, f"{kernel} x {kernel}"), column, value, str(seed))
        made.note(
            f"largest absolute difference from conv2d, float64, random kernels and images of {self.options.size} x "
            f"{self.options.size}; a K x K kernel takes K² heads, and the bound is the attention that misses its pixel"
        )
        return made


@measurements.register("distortion")
class Distortion(Measurement):
    """Two-layer linear networks: errors and features' change of LP, FT and LP-FT, beside what the theorems say."""

    class Options(Options):
        dimensions: int = Field(100, ge=4)
        """Dimension of the inputs."""
        features: int = Field(10, ge=1)
        """Number of features: the width of the first layer."""
        span: int = Field(40, ge=1)
        """Dimension of the subspace that contains the examples."""
        examples: int = Field(80, ge=1)
        """Number of training examples."""

        @model_validator(mode="after")
        def _as_the_theorem_asks(self) -> Distortion.Options:
            if not self.features < self.span < self.dimensions - self.features:
                raise ValueError("the theorem asks for features < span < dimensions - features")
            if self.examples < self.span:
                raise ValueError(f"{self.examples} examples don't span {self.span} dimensions")
            return self

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        sizes = self.options.model_dump()
        made = distortion.table([seed], **sizes)
        made.notes = [
            "theorems: FT's OOD error is nowhere below 'OOD error at least'; from perfect features LP and LP-FT end at 0; "
            "features of what is orthogonal to the examples' span don't change; mean ± standard deviation over random problems",
            distortion.plot(folder / "distortion.png", seed=seed, **sizes),
        ]
        return made
