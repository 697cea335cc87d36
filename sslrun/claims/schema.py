"""Claims: a sentence of the lecture, what tests it, and the inequalities that must hold.

A claim is a YAML file. Its variants test it at different expense. Each is a measurement or a sweep;
in a sweep, only the cells that the inequalities name are computed. A cell is named by what leads to
it in its table, from left to right and downwards, without blank names: `[row, protocol, task,
labels]`, and out of distribution the shift's name after it.
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
from sslrun.recipe.shipped import claims_folder
from sslrun.registry import did_you_mean
from sslrun.results.address import Place, join_titles, place_parts

CellName = tuple[str, ...]
"""A cell by the names that lead to it."""


class Difference(BaseModel):
    """What a cell gains over another."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    gain: CellName
    over: CellName


def _parse_term(value: Any) -> Any:
    cell = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (cell or number or isinstance(value, dict)):
        raise ValueError(
            "should be a cell, as [row, protocol, task, 10 %] or [row, protocol, task, 10 %, shift], "
            "{gain: a cell, over: a cell}, or a number; all names text"
        )
    return tuple(value) if cell else value


Side = Annotated[CellName | float | Difference, BeforeValidator(_parse_term)]


class Ordering(BaseModel):
    """What must exceed what, and by how much: `greater` and `lesser` as numbers, or `better` and `worse` by the metric."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    greater: Side | None = None
    lesser: Side | None = None
    better: Side | None = None
    worse: Side | None = None
    margin: float = 0.0
    """How much greater as a number, or how much better in the metric's unit."""
    reported: bool = False
    """Print the inequality, and leave it out of the verdict."""

    @model_validator(mode="after")
    def _check_sides(self) -> Ordering:
        given = [
            key
            for key in ("greater", "lesser", "better", "worse")
            if getattr(self, key) is not None
        ]
        if given not in (["greater", "lesser"], ["better", "worse"]):
            raise ValueError(
                "should have greater and lesser (numbers), or better and worse (by the metric's direction)"
            )
        if all(isinstance(side, float) for _, side in self.sides):
            raise ValueError("compares two numbers; one side at least should be a cell")
        return self

    @property
    def by_metric(self) -> bool:
        """Whether the metric's direction decides, not the number."""
        return self.better is not None

    @property
    def sides(self) -> list[tuple[str, CellName | float | Difference]]:
        """The key and the term of both sides, the one that must exceed first."""
        keys = ("better", "worse") if self.by_metric else ("greater", "lesser")
        return [(key, getattr(self, key)) for key in keys]


class Variant(BaseModel):
    """A test of a claim at some expense."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    minutes: float = Field(gt=0)
    """Minutes that it takes if no run of it is finished yet."""
    measured: str | None = None
    """The machine that the minutes were measured on; None: they are a guess."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The least device that it needs."""
    sweep: Path | None = None
    """The sweep's file, relative to the claim's folder."""
    measure: Named | None = None
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, min_length=1)
    """Seeds; default: the sweep's."""
    inequalities: tuple[Ordering, ...] = Field(min_length=1)


EXPENSE = {"minutes", "measured", "device"}
"""The fields of a variant that say what it takes."""


class Claim(BaseModel):
    """A sentence of the lecture and how it is tested."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    number: int = Field(ge=1)
    """Its place in the list."""
    title: str
    says: tuple[str, ...] = Field(min_length=1)
    """The lecture's own words."""
    source: str
    """The slide, and the paper behind it."""
    variants: dict[str, Variant] = Field(min_length=1)
    otherwise: str
    """What might explain a contradiction."""

    _path: Path = PrivateAttr()
    _source: Located = PrivateAttr()

    @property
    def name(self) -> str:
        return self._path.stem

    def describe(self) -> dict[str, Any]:
        """The claim as `sslrun claims --list --json` prints it."""
        variants = {
            name: each.model_dump(mode="json", include=EXPENSE)
            for name, each in self.variants.items()
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
        """Load the variant's sweep, with the variant's seeds. UserError: any mistake in its file."""
        chosen = self.variants[variant]
        if chosen.sweep is None:
            return None
        sweep = load_sweep(self._path.parent / chosen.sweep)
        return sweep if chosen.seeds is None else sweep.model_copy(update={"seeds": chosen.seeds})

    def inequalities(self, variant: str, places: Collection[Place]) -> list[Inequality]:
        """The variant's inequalities between cells of `places`. UserError: one names another cell."""
        known = {place_parts(place): place for place in places}
        found = []
        for index, ordering in enumerate(self.variants[variant].inequalities):
            at: Keys = ("variants", variant, "inequalities", index)
            greater, lesser = (self._term(side, known, (*at, key)) for key, side in ordering.sides)
            found.append(Inequality(greater, lesser, ordering.margin, ordering.by_metric))
        return found

    def _term(
        self, side: CellName | float | Difference, known: Mapping[CellName, Place], at: Keys
    ) -> Term:
        if isinstance(side, Difference):
            return Gain(
                self._cell(side.gain, known, (*at, "gain")),
                self._cell(side.over, known, (*at, "over")),
            )
        return side if isinstance(side, int | float) else self._cell(side, known, at)

    def _cell(self, name: CellName, known: Mapping[CellName, Place], at: Keys) -> Place:
        if name in known:
            return known[name]
        title, titles = join_titles(*name), [join_titles(*each) for each in known]
        raise self._source.error(
            at, f"no such cell of the table: '{title}'.{did_you_mean(title, titles)}"
        )

    def choose(self, budget: float, cuda: bool) -> str | None:
        """The most expensive variant of at most `budget` minutes that this machine can run; None: there is none."""
        fitting = [
            name
            for name, each in self.variants.items()
            if each.minutes <= budget and (cuda or each.device == "cpu")
        ]
        return max(fitting, key=lambda name: self.variants[name].minutes, default=None)

    def larger(self, chosen: str | None) -> str | None:
        """The command for the next larger variant; None: there is none."""
        least = self.variants[chosen].minutes if chosen else 0.0
        above = [each for each in self.variants.values() if each.minutes > least]
        if not above:
            return None
        following = min(above, key=lambda each: each.minutes)
        gpu = " (needs a GPU)" if following.device == "cuda" else ""
        name = self.name if self._path.parent == claims_folder() else shlex.quote(str(self._path))
        return f"sslrun claims {name} --budget {following.minutes:g}{gpu}"


def load_claim(path: Path) -> Claim:
    """Load the claim in a file. UserError: any mistake, with its file, line and key."""
    source = read_yaml(path)
    variants = {
        name: _load_variant(source.section("variants", name))
        for name in source.section("variants").value
    }
    # Mistakes in variants are reported before the claim's own.
    source = Located(
        {**source.value, **({"variants": variants} if variants else {})}, source.places
    )
    claim = validated(Claim, source, "a claim")
    claim._path, claim._source = path, source
    return claim


def _load_variant(source: Located) -> Variant:
    values = dict(source.value)
    if ("measure" in values) == ("sweep" in values):
        raise source.error((), "give either sweep, a file, or measure, a measurement")
    if "measure" in values:
        values["measure"] = _load_measurement(source)
    return validated(Variant, Located(values, source.places, source.path), "a variant")


def _load_measurement(variant: Located) -> Named:
    """The measurement that a variant names, `name` or `{name: ..., option: ...}`."""
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
    """Load claims by number: those in a folder with these names, or in files of these names; without names, all.

    Raises UserError for a claim that does not exist.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not paths and not all(name.endswith(".yaml") for name in names or ["all"]):
        raise UserError(
            f"{folder}: no claims there; name a folder of claims with --recipes, or claims' files"
        )
    chosen = []
    for name in names or paths:
        if not name.endswith(".yaml") and name not in paths:
            raise UserError(f"no such claim: '{name}'.{did_you_mean(name, list(paths))}")
        chosen.append(load_claim(paths.get(name, Path(name))))
    return sorted(chosen, key=lambda claim: (claim.number, claim.name))


def listing(claims: Sequence[Claim]) -> RichTable:
    """Claims and their variants, for the terminal."""
    table = RichTable(
        "",
        "claim",
        "",
        "variants",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
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
    return f"{name} {variant.minutes:g} min{guess}{' (GPU)' if variant.device == 'cuda' else ''}"
