"""Schema of claims: a sentence of the lecture, the variants that test it, and their inequalities.

A claim is a YAML file. Its variants test it at different cost. A variant runs a measurement or a
sweep. Of a sweep, only the cells that the inequalities name are computed. A cell is named by the
headings of its row and column in the table: `[row, protocol, task, labels]`, and the shift's name
for a shifted test set. Blank headings are left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from rich.table import Table as RichTable
from rich.text import Text

from sslrun.claims.measurements.base import measurements
from sslrun.claims.verdict import Gain, Inequality, Term
from sslrun.errors import UserError
from sslrun.recipe import Named, Sweep, load_sweep, validated
from sslrun.recipe.places import Keys, Located, read_yaml
from sslrun.registry import did_you_mean
from sslrun.results.address import Place, join_titles, place_parts
from sslrun.shipped import claims_folder

CellName = tuple[str, ...]
"""A cell by the headings of its row and column, blank ones left out."""


class Difference(BaseModel):
    """The difference of one cell over another."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    gain: CellName
    over: CellName


def _parse_side(value: Any) -> Any:
    """Check that a side is a cell, a difference or a number, and turn a cell into a tuple."""
    cell = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (cell or number or isinstance(value, dict)):
        raise ValueError(
            "should be a cell, such as [row, protocol, task, 10 %] or [row, protocol, task, 10 %, "
            "shift] with all names as text, or {gain: a cell, over: a cell}, or a number"
        )
    return tuple(value) if cell else value


Side = Annotated[CellName | float | Difference, BeforeValidator(_parse_side)]
"""One side of an inequality."""


class Ordering(BaseModel):
    """An inequality as the file has it: which side must exceed which, and by how much.

    `greater` and `lesser` compare numbers; `better` and `worse` compare by the metric's direction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    greater: Side | None = None
    lesser: Side | None = None
    better: Side | None = None
    worse: Side | None = None
    margin: float = 0.0
    """Minimum difference: as a number, or as an improvement in the metric's unit."""
    reported: bool = False
    """Whether the inequality is only printed and does not affect the verdict."""

    @model_validator(mode="after")
    def _check_sides(self) -> Ordering:
        keys = ("greater", "lesser", "better", "worse")
        present = [key for key in keys if getattr(self, key) is not None]
        if present not in (["greater", "lesser"], ["better", "worse"]):
            raise ValueError(
                "should have greater and lesser (compared as numbers), "
                "or better and worse (compared by the metric's direction)"
            )
        if all(isinstance(side, float) for _, side in self.sides):
            raise ValueError("compares two numbers; at least one side should be a cell")
        return self

    @property
    def by_metric(self) -> bool:
        """Whether sides are compared by the metric's direction."""
        return self.better is not None

    @property
    def sides(self) -> list[tuple[str, CellName | float | Difference]]:
        """Both sides with their keys, the side that must exceed first."""
        keys = ("better", "worse") if self.by_metric else ("greater", "lesser")
        return [(key, getattr(self, key)) for key in keys]


class Variant(BaseModel):
    """One test of a claim: a sweep or a measurement, with its inequalities and its cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    minutes: float = Field(gt=0)
    """Minutes that the variant takes if none of its runs is finished."""
    measured: str | None = None
    """Machine on which the minutes were measured; None: the minutes are a guess."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The least capable device on which the variant can run."""
    sweep: Path | None = None
    """The sweep's file, relative to the claim's folder."""
    measure: Named | None = None
    """The measurement, if there is no sweep."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, min_length=1)
    """Seeds; default: the sweep's own, or three for a measurement."""
    inequalities: tuple[Ordering, ...] = Field(min_length=1)


COST_FIELDS = {"minutes", "measured", "device"}
"""The fields of a variant that describe its cost."""


class Claim(BaseModel):
    """A sentence of the lecture, and how it is tested."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    number: int = Field(ge=1)
    """Position in the list of claims."""
    title: str
    """The claim in one line."""
    says: tuple[str, ...] = Field(min_length=1)
    """Sentences quoted from the lecture."""
    source: str
    """The slide and the paper behind it."""
    variants: dict[str, Variant] = Field(min_length=1)
    """The tests of the claim, by name."""
    otherwise: str
    """Possible explanation, printed if the claim is contradicted."""

    _path: Path = PrivateAttr()
    _source: Located = PrivateAttr()

    @property
    def name(self) -> str:
        return self._path.stem

    def describe(self) -> dict[str, Any]:
        """Describe the claim as `sslrun claims --list --json` prints it."""
        variants = {
            name: variant.model_dump(mode="json", include=COST_FIELDS)
            for name, variant in self.variants.items()
        }
        return {
            "number": self.number,
            "name": self.name,
            "title": self.title,
            "says": list(self.says),
            "source": self.source,
            "variants": variants,
        }

    def sweep(self, variant: str) -> Sweep | None:
        """Load the variant's sweep, with the variant's seeds; None for a measurement.

        Raises UserError for any mistake in the sweep's file.
        """
        chosen = self.variants[variant]
        if chosen.sweep is None:
            return None
        sweep = load_sweep(self._path.parent / chosen.sweep)
        return sweep if chosen.seeds is None else sweep.model_copy(update={"seeds": chosen.seeds})

    def inequalities(self, variant: str, places: Collection[Place]) -> list[Inequality]:
        """Resolve the variant's inequalities to cells of a table, which has `places`.

        Raises UserError, with file and line, for a cell that the table does not have.
        """
        known = {place_parts(place): place for place in places}
        inequalities = []
        for index, ordering in enumerate(self.variants[variant].inequalities):
            keys: Keys = ("variants", variant, "inequalities", index)
            greater, lesser = (
                self._resolve_side(side, known, (*keys, key)) for key, side in ordering.sides
            )
            inequalities.append(Inequality(greater, lesser, ordering.margin, ordering.by_metric))
        return inequalities

    def _resolve_side(
        self, side: CellName | float | Difference, known: Mapping[CellName, Place], keys: Keys
    ) -> Term:
        if isinstance(side, Difference):
            return Gain(
                self._resolve_cell(side.gain, known, (*keys, "gain")),
                self._resolve_cell(side.over, known, (*keys, "over")),
            )
        return side if isinstance(side, int | float) else self._resolve_cell(side, known, keys)

    def _resolve_cell(self, name: CellName, known: Mapping[CellName, Place], keys: Keys) -> Place:
        """Look a cell up by name; `keys` locate the name in the file, for the error message."""
        if name in known:
            return known[name]
        title, titles = join_titles(*name), [join_titles(*other) for other in known]
        raise self._source.error(
            keys, f"no such cell of the table: '{title}'.{did_you_mean(title, titles)}"
        )

    def choose(self, budget: float, cuda: bool) -> str | None:
        """Choose the most expensive variant that fits a budget in minutes and runs on this machine.

        `cuda` is whether the machine has a GPU. Returns None if no variant fits.
        """
        fitting = [
            name
            for name, variant in self.variants.items()
            if variant.minutes <= budget and (cuda or variant.device == "cpu")
        ]
        return max(fitting, key=lambda name: self.variants[name].minutes, default=None)

    def larger(self, chosen: str | None) -> str | None:
        """Return the command for the next larger variant, or None if `chosen` is the largest."""
        minutes = self.variants[chosen].minutes if chosen else 0.0
        larger = [variant for variant in self.variants.values() if variant.minutes > minutes]
        if not larger:
            return None
        following = min(larger, key=lambda variant: variant.minutes)
        gpu = " (needs a GPU)" if following.device == "cuda" else ""
        name = self.name if self._path.parent == claims_folder() else shlex.quote(str(self._path))
        return f"sslrun claims {name} --budget {following.minutes:g}{gpu}"


def load_claim(path: Path) -> Claim:
    """Load a claim from a file.

    Raises UserError for any mistake, with its file, line and key.
    """
    source = read_yaml(path)
    variants = {
        name: _load_variant(source.section("variants", name))
        for name in source.section("variants").value
    }
    # Variants are loaded first, so that a mistake in one is reported before the claim's own.
    source = Located(
        {**source.value, **({"variants": variants} if variants else {})}, source.places
    )
    claim = validated(Claim, source, "a claim")
    claim._path, claim._source = path, source
    return claim


def _load_variant(source: Located) -> Variant:
    values = dict(source.value)
    if ("measure" in values) == ("sweep" in values):
        raise source.error((), "give either sweep (a file) or measure (a measurement), not both")
    if "measure" in values:
        values["measure"] = _load_measurement(source)
    return validated(Variant, Located(values, source.places, source.path), "a variant")


def _load_measurement(variant: Located) -> Named:
    """Load the measurement that a variant names: `name`, or `{name: ..., option: ...}`."""
    value = variant.value["measure"]
    name, options = (
        value,
        Located({}, {(): variant.places[("measure",)]}, (*variant.path, "measure")),
    )
    if isinstance(value, dict):
        section = variant.section("measure")
        name, options = value.get("name"), section.without("name")
    try:
        cls = measurements[str(name)]
    except UserError as error:
        raise variant.error(("measure",), str(error)) from None
    return Named(
        name=str(name), options=validated(cls.Options, options, f"'{name}'"), component=cls
    )


def load_claims(names: Sequence[str], folder: Path) -> list[Claim]:
    """Load claims, ordered by number.

    A name is that of a claim in `folder`, or the path of a .yaml file. Without names, all claims of
    the folder are loaded.
    Raises UserError for a claim that does not exist.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not paths and not all(name.endswith(".yaml") for name in names or ["all"]):
        raise UserError(
            f"{folder}: no claims there; name a folder of claims with --recipes, or a claim's file"
        )
    chosen = []
    for name in names or paths:
        if not name.endswith(".yaml") and name not in paths:
            raise UserError(f"no such claim: '{name}'.{did_you_mean(name, list(paths))}")
        chosen.append(load_claim(paths.get(name, Path(name))))
    return sorted(chosen, key=lambda claim: (claim.number, claim.name))


def render_list(claims: Sequence[Claim]) -> RichTable:
    """Lay claims and their variants out for the terminal."""
    headings = ("", "claim", "", "variants")
    table = RichTable(
        *headings, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold"
    )
    for claim in claims:
        variants = ", ".join(
            _describe_variant(name, variant) for name, variant in claim.variants.items()
        )
        table.add_row(
            str(claim.number), Text(claim.name, style="bold"), Text(claim.title), Text(variants)
        )
    return table


def _describe_variant(name: str, variant: Variant) -> str:
    guess = "" if variant.measured else " (a guess)"
    gpu = " (GPU)" if variant.device == "cuda" else ""
    return f"{name} {variant.minutes:g} min{guess}{gpu}"
