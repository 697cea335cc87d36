"""Claims: a sentence of the lecture, what tests it, and the inequalities that must hold; and how it came out.

A claim is a YAML file. Its variants test it at different expense: a sweep, of which those cells alone are computed that
the inequalities name, or a measurement. A cell is named as it stands in its table, from left to right and downwards:
`[row, protocol, task, labels]`, without what the table leaves blank; out of distribution with the shift's name behind.
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
from sslrun.claims.verdict import Gain, Inequality, Place, Term
from sslrun.errors import UserError
from sslrun.recipe import Named, Sweep, load_sweep, validated
from sslrun.recipe.places import Keys, Located, read_yaml
from sslrun.recipe.shipped import claims_folder
from sslrun.registry import did_you_mean

Labels = tuple[str, ...]
"""A cell by its names, those that are not blank."""


class Difference(BaseModel):
    """What a cell gains over another."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    gain: Labels
    over: Labels


def _term(given: Any) -> Any:
    cell = isinstance(given, list) and given and all(isinstance(each, str) for each in given)
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not (cell or number or isinstance(given, dict)):
        raise ValueError(
            "should be a cell, as [row, protocol, task, 10 %] or [row, protocol, task, 10 %, shift], {gain: a cell, over: a cell}, or a number; all names text"
        )
    return tuple(given) if cell else given


Side = Annotated[Labels | float | Difference, BeforeValidator(_term)]


class Ordering(BaseModel):
    """What must be greater than what, and by how much."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    greater: Side
    lesser: Side
    margin: float = 0.0
    reported: bool = False
    """Told, and not counted in the verdict."""

    @model_validator(mode="after")
    def _has_a_cell(self) -> Ordering:
        if isinstance(self.greater, float) and isinstance(self.lesser, float):
            raise ValueError("compares two numbers; one side at least should be a cell")
        return self


class Variant(BaseModel):
    """A test of a claim at some expense."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    minutes: float = Field(gt=0)
    """What it takes where nothing of it is done yet."""
    measured: str | None = None
    """On what its minutes were measured; None: they are a guess."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What it needs at least."""
    sweep: Path | None = None
    """From the claim's own folder."""
    measure: Named | None = None
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, min_length=1)
    """Default: the sweep's."""
    inequalities: tuple[Ordering, ...] = Field(min_length=1)


EXPENSE = {"minutes", "measured", "device"}
"""Of a variant, what it takes."""


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
    """What might explain that it comes out contradicted."""

    _path: Path = PrivateAttr()
    _source: Located = PrivateAttr()

    @property
    def name(self) -> str:
        return self._path.stem

    def described(self) -> dict[str, Any]:
        """What `--list` says of it."""
        variants = {name: each.model_dump(mode="json", include=EXPENSE) for name, each in self.variants.items()}
        return {"number": self.number, "name": self.name, "title": self.title, "says": list(self.says), "source": self.source, "variants": variants}  # fmt: skip

    def sweep(self, variant: str) -> Sweep | None:
        """The variant's sweep, with the variant's seeds. UserError: any mistake in its file."""
        chosen = self.variants[variant]
        if chosen.sweep is None:
            return None
        sweep = load_sweep(self._path.parent / chosen.sweep)
        return sweep if chosen.seeds is None else sweep.model_copy(update={"seeds": chosen.seeds})

    def inequalities(self, variant: str, places: Collection[Place]) -> list[Inequality]:
        """The variant's inequalities, between cells of `places`. UserError: one of another name."""
        known = {labels_of(place): place for place in places}

        def side(given: Labels | float | Difference, *keys: str | int) -> Term:
            at = ("variants", variant, "inequalities", *keys)
            if isinstance(given, Difference):
                return Gain(self._cell(given.gain, known, (*at, "gain")), self._cell(given.over, known, (*at, "over")))
            return given if isinstance(given, int | float) else self._cell(given, known, at)

        return [
            Inequality(side(each.greater, at, "greater"), side(each.lesser, at, "lesser"), each.margin)
            for at, each in enumerate(self.variants[variant].inequalities)
        ]

    def _cell(self, labels: Labels, known: Mapping[Labels, Place], keys: Keys) -> Place:
        if labels in known:
            return known[labels]
        cells = [" · ".join(each) for each in known]
        raise self._source.error(
            keys, f"no such cell of the table: '{' · '.join(labels)}'.{did_you_mean(' · '.join(labels), cells)}"
        )

    def choose(self, budget: float, cuda: bool) -> str | None:
        """The most expensive variant of at most `budget` minutes that this machine can run; None: there is none."""
        fitting = [
            name for name, each in self.variants.items() if each.minutes <= budget and (cuda or each.device == "cpu")
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
        named = self.name if self._path.parent == claims_folder() else shlex.quote(str(self._path))
        return f"sslrun claims {named} --budget {following.minutes:g}{gpu}"


def labels_of(place: Place) -> Labels:
    row, (task, what) = place
    return tuple(filter(None, [*row, task, *what.split(" · ")]))


def load_claim(path: Path) -> Claim:
    """The claim in a file. UserError: any mistake, with its file, line and key."""
    source = read_yaml(path)
    variants = {name: _variant(source.section("variants", name)) for name in source.section("variants").value}
    # Their mistakes are found before the claim's own.
    source = Located({**source.value, **({"variants": variants} if variants else {})}, source.places)
    claim = validated(Claim, source, "a claim")
    claim._path, claim._source = path, source
    return claim


def _variant(source: Located) -> Variant:
    given = dict(source.value)
    if ("measure" in given) == ("sweep" in given):
        raise source.error((), "give either sweep, a file, or measure, a measurement")
    if "measure" in given:
        given["measure"] = _measurement(source)
    return validated(Variant, Located(given, source.places, source.at), "a variant")


def _measurement(variant: Located) -> Named:
    """The measurement that a variant names, `name` or `{name: ..., option: ...}`."""
    given = variant.value["measure"]
    name, options = given, Located({}, {(): variant.places[("measure",)]}, (*variant.at, "measure"))
    if isinstance(given, dict):
        section = variant.section("measure")
        name, options = given.get("name"), section.without("name")
    try:
        cls = measurements[str(name)]
    except UserError as error:
        raise variant.error(("measure",), str(error)) from None
    return Named(name=str(name), options=validated(cls.Options, options, f"'{name}'"), component=cls)


def load_claims(names: Sequence[str], folder: Path) -> list[Claim]:
    """The claims of these names in a folder, or of files; all of the folder's without names, as numbered.

    UserError: no such claim.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not paths and not all(name.endswith(".yaml") for name in names or ["all"]):
        raise UserError(f"{folder}: no claims there; name a folder of claims with --recipes, or claims' files")
    chosen = []
    for name in names or paths:
        if not name.endswith(".yaml") and name not in paths:
            raise UserError(f"no such claim: '{name}'.{did_you_mean(name, list(paths))}")
        chosen.append(load_claim(paths.get(name, Path(name))))
    return sorted(chosen, key=lambda each: (each.number, each.name))


def listing(claims: Sequence[Claim]) -> RichTable:
    """Claims and their variants, for the terminal."""
    table = RichTable("", "claim", "", "variants", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for claim in claims:
        variants = ", ".join(
            f"{name} {each.minutes:g} min{'' if each.measured else ' (a guess)'}{' (GPU)' if each.device == 'cuda' else ''}"
            for name, each in claim.variants.items()
        )
        table.add_row(str(claim.number), Text(claim.name, style="bold"), Text(claim.title), Text(variants))
    return table
