"""Charts as inline SVG that follow the colors of the page, light or dark.

Matplotlib draws; lines and points carry a title that browsers show on hover.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sslrun.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
"""Stands for the page's text color, which replaces it in the SVG."""
PALETTE = (
    "#3b82c4", "#e07b39", "#2e9e73", "#c8507f", "#8c6bd1", "#a98a1d", "#20a4b8", "#9a6a4f",
    "#d1495b", "#6a8f2f",
)  # fmt: skip
"""Colors of series, of similar contrast on white and on black."""
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}
"""Marker of matplotlib -> the letter that stands for it in legends; one per round of colors."""
DASHES = ("-", "--", ":", "-.", (0, (8, 2)))
"""Styles of lines; one per round of colors."""
WIDE, HIGH = 5.2, 3.1
"""Size of a chart in inches; on a phone, its text is then not much smaller than the page's."""
LISTED = 24
"""Largest number of names in a legend that is open."""
POINTS = 200
"""Largest number of points of a curve; longer ones are thinned evenly."""
FEW = 20
"""Largest number of points of a series that are marked and have titles of their own."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sslrun",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Series:
    """A line or a group of points with a name; series of one name have one color."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    """Lower ends of the intervals of `y`; empty without intervals."""
    high: Sequence[float] = ()
    label: str = ""
    """What the line or point is, shown on hover; blank: the name."""


@dataclass(frozen=True)
class Chart:
    """A chart of series over common axes."""

    title: str
    x: str
    """Label of the horizontal axis."""
    y: str
    """Label of the vertical axis; blank if the title says it."""
    series: Sequence[Series]
    log_x: bool = False
    lines: bool = True
    """Whether to connect the points of a series."""
    percent_x: bool = False
    diagonal: bool = False
    """Whether to draw the line y = x."""
    front: Sequence[tuple[float, float]] = field(default=())
    """Points of a line of the best, drawn behind the series."""

    @property
    def names(self) -> list[str]:
        """The names of the series, each once."""
        return list(dict.fromkeys(series.name for series in self.series))

    def html(self) -> str:
        """Draw the chart as SVG, with a legend below. Raises UserError without matplotlib."""
        with _figure() as (axes, tips):
            _draw(self, axes, tips)
            return _finish(axes, tips) + legend(self.names)


def legend(names: Sequence[str]) -> str:
    """Return the legend of series in the order of their colors; a long one opens by a click."""
    entries = []
    for index, name in enumerate(names):
        swatch = f'<i style="color:{color_of(index)}">{MARKERS[marker_of(index)]}</i>'
        entries.append(f"<li>{swatch}{html.escape(name)}</li>")
    listed = f'<ul class="legend">{"".join(entries)}</ul>'
    if len(names) <= LISTED:
        return listed
    return f"<details><summary>legend of {len(names)}</summary>{listed}</details>"


def require_matplotlib() -> None:
    """Raise UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "sslrun report: matplotlib is not installed: pip install 'sslrun[plot]'"
        ) from None


@contextmanager
def _figure(long_labels: bool = False) -> Iterator[tuple[Axes, dict[str, str]]]:
    """Yield the axes of a new figure, and a mapping to fill: id of an element -> its title.

    Margins that fit `long_labels` take a second drawing, and such figures are higher.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        if long_labels:
            figure = Figure(figsize=(WIDE, 0.8 * WIDE), layout="constrained")
        else:
            figure = Figure(figsize=(WIDE, HIGH))
            figure.subplots_adjust(left=0.13, right=0.98, bottom=0.15, top=0.96)
        yield figure.add_subplot(), {}


def color_of(index: int) -> str:
    """Return the color of a series by its number; colors repeat."""
    return PALETTE[index % len(PALETTE)]


def marker_of(index: int) -> str:
    """Return the marker of a series by its number."""
    return list(MARKERS)[round_of(index)]


def round_of(index: int) -> int:
    """Return how often the colors were used before a series; markers and dashes repeat, too."""
    return index // len(PALETTE) % len(MARKERS)


def _draw(chart: Chart, axes: Axes, tips: dict[str, str]) -> None:
    for series in chart.series:
        _draw_series(chart, chart.names.index(series.name), series, axes, tips)
    if chart.front:
        x, y = zip(*chart.front, strict=True)
        axes.step(x, y, where="post", color=INK, alpha=0.4, linestyle="--", zorder=0)
    if chart.diagonal:
        low = max(axes.get_xlim()[0], axes.get_ylim()[0])
        high = min(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([low, high], [low, high], color=INK, alpha=0.4, linestyle="--", zorder=0)
    places = [value for series in chart.series for value in series.x]
    if chart.log_x and max(places) >= 10 * min(places):  # else no power of ten may be in view
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    if chart.percent_x:
        ticks = sorted(set(places))
        axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)


def _draw_series(
    chart: Chart, index: int, series: Series, axes: Axes, tips: dict[str, str]
) -> None:
    color, marker = color_of(index), marker_of(index)
    if series.low:
        axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.15, linewidth=0)
    few, title = len(series.x) <= FEW, series.label or series.name
    if chart.lines:
        x, y = thin(series.x), thin(series.y)
        (line,) = axes.plot(x, y, color=color, linestyle=DASHES[round_of(index)])
        _tip(line, tips, title)
    for a, b in zip(series.x, series.y, strict=True) if few else ():
        (point,) = axes.plot(a, b, color=color, marker=marker, markersize=5, linestyle="")
        _tip(point, tips, f"{title}: {b:.4g} at {a:.4g}")


def thin(values: Sequence[float]) -> Sequence[float]:
    """Keep at most `POINTS` of the values, evenly spread, first and last included."""
    if len(values) <= POINTS:
        return values
    step = (len(values) - 1) / (POINTS - 1)
    return [values[round(number * step)] for number in range(POINTS)]


def heat_map(values: Sequence[Sequence[float]], names: Sequence[str], x: str, y: str) -> str:
    """Draw a square matrix in [0, 1] with a name for each row and column."""
    with _figure(long_labels=True) as (axes, tips):
        axes.grid(False)
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 40:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        if len(names) <= 12:
            for row, line in enumerate(values):
                for column, value in enumerate(line):
                    dark = "white" if value > 0.5 else "black"
                    axes.text(
                        column, row, f"{100 * value:.0f}", ha="center", va="center",
                        color=dark,
                    )  # fmt: skip
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        return _finish(axes, tips)


def scatter_map(points: Any, classes: Sequence[int], names: Sequence[str]) -> str:
    """Draw points (N, 2) in the colors of their classes; the axes have no meaning."""
    with _figure() as (axes, tips):
        axes.set_axis_off()
        axes.set_aspect("equal", "datalim")
        for index, name in enumerate(names):
            members = [number for number, label in enumerate(classes) if label == index]
            (group,) = axes.plot(
                points[members, 0], points[members, 1], color=color_of(index), linestyle="",
                marker=marker_of(index), markersize=3, label=name,
            )  # fmt: skip
            _tip(group, tips, name)
        return _finish(axes, tips) + legend(names[:FEW])


def _tip(artist: Any, tips: dict[str, str], title: str) -> None:
    name = f"tip{len(tips)}"
    artist.set_gid(name)
    tips[name] = title


def _finish(axes: Axes, tips: Mapping[str, str]) -> str:
    """Return the figure as an SVG element: colors of the page, titles, unique ids."""
    out = io.StringIO()
    figure: Any = axes.figure
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, title in tips.items():
        svg = svg.replace(
            f'<g id="{name}">', f'<g class="tip"><title>{html.escape(title)}</title>', 1
        )
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1
    )
