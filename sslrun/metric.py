"""Metrics as values: a name, a unit, the better direction, and the format of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

ID, MEAN_SHIFT = "ID", "mean OOD"
"""Names of test sets beside the shifts: the task's own test split, and the mean over the shifts."""


@dataclass(frozen=True)
class Metric:
    """The meaning of a number. The task or measurement that reports the number declares it."""

    name: str
    """Name in results and tables: "accuracy", "f1", "mae"."""
    unit: str = "%"
    """Unit of its values: "%", "eV", "s"; empty for a pure number."""
    better: Literal["higher", "lower"] = "higher"
    """Direction of improvement, for selection, bold cells, verdicts and comparisons."""
    digits: int = 1
    """Decimal places in tables."""

    @property
    def title(self) -> str:
        """The name in words: "macro f1"."""
        return self.name.replace("_", " ")

    def is_as_good(self, new: float, old: float) -> bool:
        """Return whether `new` is at least as good as `old`; False if either is NaN."""
        return new >= old if self.better == "higher" else new <= old

    def gain(self, new: float, old: float) -> float:
        """Return how much better `new` is than `old`; positive if it is better."""
        return new - old if self.better == "higher" else old - new

    def best(self, values: Iterable[float]) -> float:
        """Return the best of some values. Raises ValueError if there are none."""
        return max(values) if self.better == "higher" else min(values)

    def text(self, value: float, sign: str = "") -> str:
        """Format a value without its unit; `sign` "+" prints its sign."""
        return f"{value:{sign}.{self.digits}f}"

    def as_dict(self) -> dict[str, Any]:
        """Return the metric as JSON values; `Metric(**values)` restores it."""
        return asdict(self)
