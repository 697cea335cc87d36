"""Measurements: what a claim can rest on other than a sweep. Each gives cells of a table, seed by seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from sslrun.registry import Options, Registry
from sslrun.results.table import Table
from sslrun.training.device import Compute


class Measurement:
    """Something measured that is not a sweep. `table(seed, ...)` is one seed's; those of all seeds are put together."""

    Options: ClassVar[type[Options]] = Options
    name: ClassVar[str]

    def __init__(self, options: Any) -> None:
        self.options = options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        """The seed's values, on a device. `folder`: where pictures go. `check`: to call now and then; raises where the
        user asked to stop."""
        raise NotImplementedError


measurements: Registry[Measurement] = Registry("measurement")
