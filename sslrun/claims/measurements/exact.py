"""Measurements of claims that are theorems: their constructions, checked numerically in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from sslrun import registry
from sslrun.claims.measurements.base import Measurement, measurements
from sslrun.claims.theory import convolution, distortion
from sslrun.results.table import Table
from sslrun.training.device import Compute


@measurements.register("convolution")
class Convolution(Measurement):
    """Largest difference between conv2d and self-attention with a convolution's weights.

    The weights are those of Theorem 1 of Cordonnier, Loukas and Jaggi, ICLR 2020. Images and
    kernels are random, in float64.
    """

    class Options(registry.Options):
        kernels: tuple[Annotated[int, Field(ge=1)], ...] = (1, 3, 5)
        """Kernel sizes, in pixels; each must be odd."""
        alphas: tuple[Annotated[float, Field(gt=0)], ...] = (5.0, 20.0, 60.0)
        """Inverse widths of a head's attention; the limit, one pixel per head, is always added."""
        size: int = Field(11, ge=3)
        """Side of the images, in pixels."""

        @model_validator(mode="after")
        def _check_kernels(self) -> Convolution.Options:
            for kernel in self.kernels:
                if kernel % 2 == 0 or kernel > self.size:
                    raise ValueError(
                        f"a kernel of {kernel} should be odd and "
                        f"no larger than the images ({self.size})"
                    )
            return self

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        table = Table("self-attention as a convolution", format_spec=".1e", marks_best=False)
        table.second = "kernel"
        size = self.options.size
        for kernel in self.options.kernels:
            alphas = (*self.options.alphas, math.inf)
            errors = convolution.measure_errors(alphas, kernel, size, seed)
            convolution.add_errors(table, errors, seed, f"{kernel} x {kernel}")
        table.note(
            "largest absolute difference from conv2d in float64, for random kernels and images of "
            f"{size} x {size}; a K x K kernel takes K² heads; bound: computed from the attention "
            "that misses its pixel"
        )
        return table


@measurements.register("distortion")
class Distortion(Measurement):
    """Errors and feature change of LP, FT and LP-FT in two-layer linear networks.

    Linear probing, fine-tuning and their sequence are solved numerically, beside what the theorems
    of Kumar et al., ICLR 2022, predict. Also draws a plot, if matplotlib is installed.
    """

    class Options(registry.Options):
        dimensions: int = Field(100, ge=4)
        """Dimension of the inputs."""
        features: int = Field(10, ge=1)
        """Number of features: the width of the first layer."""
        span: int = Field(40, ge=1)
        """Dimension of the subspace that contains the examples."""
        examples: int = Field(80, ge=1)
        """Number of training examples."""

        @model_validator(mode="after")
        def _check_sizes(self) -> Distortion.Options:
            if not self.features < self.span < self.dimensions - self.features:
                raise ValueError("the theorem needs features < span < dimensions - features")
            if self.examples < self.span:
                raise ValueError(f"{self.examples} examples don't span {self.span} dimensions")
            return self

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        sizes = self.options.model_dump()
        table = distortion.make_table([seed], **sizes)
        table.notes = [
            "theorems: FT's OOD error is never below the column 'OOD error at least'; from "
            "perfect features, LP and LP-FT end at 0; features of inputs orthogonal to the "
            "examples' span don't change; mean ± standard deviation over random problems",
            distortion.plot(folder / "distortion.png", seed=seed, **sizes),
        ]
        return table
