"""Metrics as values: a name, a unit, which direction is better, and how a number is printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """What a number means. Declared by the task or measurement that reports it."""

    name: str
    """As in results and tables: "accuracy", "f1", "mae"."""
    unit: str = "%"
    """Unit of its values: "%", "eV", "s"; empty for a pure number."""
    better: Literal["higher", "lower"] = "higher"
    """The direction of improvement: selection, bold cells, verdicts and comparisons ask it."""
    digits: int = 1
    """Digits behind the point in tables."""

    @property
    def title(self) -> str:
        """The name in words: "macro f1"."""
        return self.name.replace("_", " ")

    def is_as_good(self, new: float, old: float) -> bool:
        """Whether `new` is at least as good as `old`; False if either is NaN."""
        return new >= old if self.better == "higher" else new <= old

    def gain(self, new: float, old: float) -> float:
        """How much better `new` is than `old`: positive where it improves."""
        return new - old if self.better == "higher" else old - new

    def best(self, values: Iterable[float]) -> float:
        """The best of some values. ValueError: there are none."""
        return max(values) if self.better == "higher" else min(values)

    def text(self, value: float, sign: str = "") -> str:
        """A value as it is printed, without its unit; `sign` "+": with its sign."""
        return f"{value:{sign}.{self.digits}f}"

    def as_dict(self) -> dict[str, Any]:
        """JSON values, from which `Metric(**...)` makes an equal metric."""
        return asdict(self)
