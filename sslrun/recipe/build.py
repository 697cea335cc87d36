"""Build recipes and sweeps from YAML files; errors name file, line and key.

A recipe is one experiment; a sweep is a base recipe and named changes to it. Changes (a sweep's
rows, `key=value` on the command line) address keys by dotted paths. A mapping is merged into the
section that it changes. If it names another component (`pretext: {name: byol}`), it replaces the
section, since the old options belong to the old component.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

import sslrun.backbones
import sslrun.pretexts
import sslrun.protocols
import sslrun.tasks  # noqa: F401 (importing fills the registries)
from sslrun.backbones.base import backbones
from sslrun.data.image.corruptions import CORRUPTIONS
from sslrun.data.shifts import Shift
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.protocols.base import inheritance, protocols
from sslrun.recipe.axes import Axes, Range, name_point
from sslrun.recipe.fit import misfit, unreadable
from sslrun.recipe.places import Keys, Located, override, places_under, read_yaml, same_place
from sslrun.recipe.schema import Evaluation, Named, Pretrain, Recipe, Sweep, Watch
from sslrun.registry import Options, Registry, did_you_mean
from sslrun.shipped import find
from sslrun.tasks.base import tasks
from sslrun.tasks.diagnostics import COSTS

Model = TypeVar("Model", bound=BaseModel)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or the shipped one of that name, with `key=value` overrides.

    Raises UserError for any mistake, with its file, line and key.
    """
    source = read_yaml(find(path))
    if _is_sweep(source):
        raise UserError(f"{path}: is a sweep: run it with `sslrun sweep {path}`")
    override(source, overrides)
    return parse(source)


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep from a file, or the shipped one of that name; a recipe is a sweep of one row.

    Overrides change the base before the rows do. Raises UserError for any mistake, with its file,
    line and key.
    """
    path = find(path)
    source = read_yaml(path)
    if not _is_sweep(source):
        override(source, overrides)
        recipe = parse(source)
        return Sweep(name=recipe.name, rows={recipe.name: recipe})
    base = _read_base(source, path.parent)
    override(base, overrides)
    sources = _expand_rows(base, source, _read_axes(source))
    rows = {row: parse(written.copy()) for row, written in sources.items()}
    values = {**source.without("base").value, "rows": rows}
    sweep = validated(Sweep, Located(values, source.places), "a sweep")
    sweep._against_at = source.places.get(("against",))
    if sweep.search is not None:
        sweep._sources = sources
        space = source.section("search", "space")
        sweep._search_at = {key: space.places[(key,)] for key in sweep.search.space}
        for row in rows:
            _check_search(source, sweep, row)
    return sweep


def vary(sweep: Sweep, row: str, values: Mapping[str, Any]) -> Recipe:
    """Build the recipe of a row with other values of the keys that the sweep's search varies.

    Raises UserError for any mistake, with the place in the search's space.
    """
    source = sweep._sources[row].copy()
    for key, value in values.items():
        source.change(key, value, same_place(value, sweep._search_at[key]))
    return parse(source)


def _is_sweep(source: Located) -> bool:
    """Return whether a file is a sweep, not a recipe."""
    return not {"rows", "base", *Axes.model_fields}.isdisjoint(source.value)


def _read_axes(sweep: Located) -> Axes:
    """Read what makes rows. Raises UserError if two axes vary the same key."""
    values = {key: sweep.value[key] for key in Axes.model_fields if sweep.value.get(key)}
    axes = validated(Axes, Located(values, sweep.places), "a sweep")
    keys: list[str] = []
    for place, key in axes.keys().items():
        if key in keys:
            raise sweep.error(place, "another axis varies this key already: leave one out")
        keys.append(key)
    return axes


def _expand_rows(base: Located, sweep: Located, axes: Axes) -> dict[str, Located]:
    """Row -> its recipe, for each written row and each point of the axes."""
    places = {key: sweep.places[place] for place, key in axes.keys().items()}
    written = sweep.section("rows").value or {"": {}}
    rows: dict[str, Located] = {}
    for row, point in itertools.product(written, axes.points()):
        recipe = _change_row(base, sweep, row) if row else base.copy()
        for key, value in point.items():
            recipe.change(key, value, same_place(value, places[key]))
        name = ", ".join(filter(None, (row, name_point(point)))) or str(sweep.value.get("name"))
        if name in rows:
            raise sweep.error((), f"two rows would be named '{name}': give their values names")
        rows[name] = recipe
    return rows


def _check_search(source: Located, sweep: Sweep, row: str) -> None:
    """Check the objective of a search, and the ends of its space one by one, for a row.

    Raises:
        UserError: The row has no such cell, no validation split, or no such key.
    """
    search, recipe = sweep.search, sweep.rows[row]
    assert search is not None
    at, objective = ("search", "objective"), search.objective
    evaluation = recipe.evaluate.get(objective.task)
    if evaluation is None:
        hint = did_you_mean(objective.task, list(recipe.evaluate))
        raise source.error((*at, "task"), f"row '{row}' has no such task.{hint}")
    if objective.protocol not in evaluation.protocols:
        hint = did_you_mean(objective.protocol, list(evaluation.protocols))
        raise source.error((*at, "protocol"), f"row '{row}' does not have it for this task.{hint}")
    amounts = evaluation.labels_of(objective.protocol)
    if objective.labels is not None and objective.labels not in amounts:
        listed = ", ".join(f"{amount:g}" for amount in amounts)
        raise source.error((*at, "labels"), f"row '{row}' has {listed}: choose one of them")
    if not evaluation.has_val:
        raise source.error(
            at,
            f"a search compares trials on validation, but evaluate.{objective.task}.data has "
            "validation: 0: give a share such as validation: 0.1",
        )
    if search.prune is not None and recipe.pretext is None:
        raise source.error(("search", "prune"), f"row '{row}' pretrains nothing: leave it out")
    for key, values in search.space.items():
        ends = values.ends if isinstance(values, Range) else (values[0], values[-1])
        for value in ends:
            whole = isinstance(values, Range) and values.integer
            vary(sweep, row, {key: int(value) if whole else value})


def _read_base(sweep: Located, folder: Path) -> Located:
    """Read the base recipe of a sweep: a file in `folder`, or the recipe itself."""
    base = sweep.value.get("base")
    if isinstance(base, str):
        return read_yaml(folder / base)
    if not isinstance(base, dict):
        raise sweep.error(
            ("base",), "should be the recipe that the rows change: a file, or the recipe itself"
        )
    source = sweep.section("base")
    source.path = ()
    source.value.setdefault("name", sweep.value.get("name"))
    return source


def _change_row(base: Located, sweep: Located, row: str) -> Located:
    """Return the recipe of a row: the base with the row's changes."""
    changes = sweep.section("rows", row)
    recipe = base.copy()
    for dotted, value in changes.value.items():
        recipe.change(dotted, value, places_under(changes.places, dotted))
    return recipe


def parse(source: Located) -> Recipe:
    """Build a recipe from its mapping. Raises UserError for any mistake, with its place."""
    data = _named(sources, source, "data")
    pretext = None if source.value.get("pretext") is None else _named(pretexts, source, "pretext")
    backbone = _read_backbone(source, data, pretext)
    if pretext is not None:
        _check_pretext(source, data, backbone, pretext)
    pretrain = validated(Pretrain, source.section("pretrain"), "'pretrain'") if pretext else None
    evaluate = {key: _evaluation(source, key, data) for key in source.section("evaluate").value}
    network = backbones[backbone.name]
    if pretext is None and not evaluate and (wrong := misfit(sources[data.name], None, network)):
        raise source.error(("backbone",), wrong.reason)
    for key, evaluation in evaluate.items():
        task = tasks[evaluation.task.name]
        if wrong := misfit(sources[evaluation.data.name], task, network):
            raise source.error(("evaluate", key), wrong.reason)
        for protocol in evaluation.protocols:
            if reason := unreadable(evaluation.protocol(protocol), network):
                raise source.error(("evaluate", key, "protocols"), reason)
    _check_lengths(source, ("data",), data, backbone)
    for key, evaluation in evaluate.items():
        _check_lengths(source, ("evaluate", key, "data"), evaluation.data, backbone)
    typed = {
        "backbone": backbone,
        "pretext": pretext,
        "data": data,
        "pretrain": pretrain,
        "evaluate": evaluate,
    }
    rest = source.without(*protocols)
    located = Located({**rest.value, **typed}, source.places)
    recipe = validated(Recipe, located, "a recipe", protocols)
    if pretext is not None and pretrain is not None:
        _check_kept(source, pretext, pretrain, recipe.watch)
    return recipe


def _read_backbone(source: Located, data: Named, pretext: Named | None) -> Named:
    """Build the backbone, or its counterpart if only that takes the recipe's inputs."""
    backbone = _named(backbones, source, "backbone")
    network = backbones[backbone.name]
    if network.counterpart is None:
        return backbone
    task = pretexts[pretext.name] if pretext else None
    other = backbones[network.counterpart]
    given = sources[data.name]
    if misfit(given, task, network) is None or misfit(given, task, other) is not None:
        return backbone
    section = source.value["backbone"]
    _, colon, rest = str(section["name"]).partition(":")
    section["name"] = f"{other.name}{colon}{rest}"
    return _named(backbones, source, "backbone")


def _check_pretext(source: Located, data: Named, backbone: Named, pretext: Named) -> None:
    """Raise UserError if the pretext task does not fit the rest of the recipe."""
    task, network = pretexts[pretext.name], backbones[backbone.name]
    if wrong := misfit(sources[data.name], task, network):
        key = "backbone" if wrong.culprit == "backbone" else "pretext"
        raise source.error((key,), wrong.reason)
    if source.value.get("weights"):
        raise source.error(
            ("weights",), "can't be combined with pretraining: give either them or 'pretext'"
        )
    if not source.value.get("pretrain"):
        raise source.error(
            (),
            "'pretrain' is missing: the schedule of the pretext task, "
            "such as {epochs: 100, batch: 256, lr: 0.001}",
        )


def _check_kept(source: Located, pretext: Named, pretrain: Pretrain, watch: Watch) -> None:
    """Raise UserError if no feature check computes the diagnostic that chooses the weights."""
    if pretrain.keep == "last":
        return
    diagnostic, keys = pretrain.keep_by, ("pretrain", "keep_by")
    if not pretexts[pretext.name].measures(diagnostic):
        able = [other for other in COSTS if pretexts[pretext.name].measures(other)]
        raise source.error(
            keys,
            f"feature checks of '{pretext.name}' do not compute {diagnostic}; "
            f"choose from: {', '.join(able)}",
        )
    if diagnostic == "lidar" and watch.views is None:
        raise source.error(keys, "lidar needs views: set watch.views, as in views: 10")


def _check_lengths(source: Located, keys: Keys, data: Named, backbone: Named) -> None:
    """Raise UserError if sequences of a data set are too long for the backbone.

    The check runs when the recipe is read, so that the error does not come after pretraining.
    `keys` is the place of the data set in the recipe.
    """
    for option, most in backbones[backbone.name].limits(backbone.options).items():
        length = getattr(data.options, option, 0)
        if length > most:
            raise source.error(
                (*keys, option),
                f"sequences of {length} tokens are longer than the {most} positions of "
                f"'{backbone.name}': lower it to {most}, or raise backbone.positions before "
                "pretraining",
            )


def _evaluation(source: Located, key: str, data: Named) -> Evaluation:
    """Build the evaluation `key` of a recipe that pretrains on `data`."""
    section = source.section("evaluate", key)
    if section.value.get("data") is None:
        # The data set of pretraining is used with all of its options.
        section.value["data"] = data.as_dict() if key == data.name else {"name": key}
    evaluation_data = _named(sources, section, "data", like=data)
    default_task = sources[evaluation_data.name].default_task(evaluation_data.options)
    task = _named(tasks, section, "task", default=default_task)
    options = {name: _protocol_options(name, source, section) for name in protocols.in_order}
    shifts = {name: _shift(section, name, evaluation_data) for name in _named_shifts(section)}
    values = {
        **section.without(*protocols).value,
        "shifts": shifts,
        "data": evaluation_data,
        "task": task,
        "options": options,
    }
    evaluation = validated(
        Evaluation, Located(values, section.places, section.path), f"'evaluate.{key}'", protocols
    )
    for protocol in evaluation.protocols:
        if protocol not in protocols:
            hint = did_you_mean(protocol, protocols.in_order)
            raise section.error(("protocols",), f"no such protocol: '{protocol}'.{hint}")
        if reason := evaluation.obstacle(protocol):
            raise section.error(("protocols",), reason)
    return evaluation


def _named_shifts(evaluation: Located) -> dict[str, Any]:
    """Return the shifts by name, each as a mapping.

    A string, also in a list, is the name of a data set or a corruption.
    """
    shifts = evaluation.value.get("shifts") or {}
    if isinstance(shifts, list) and all(isinstance(name, str) for name in shifts):
        shifts = {name: name for name in shifts}
    if isinstance(shifts, dict):
        shifts = {
            name: _spell_out_shift(shift)
            for name, shift in shifts.items()
            if shift is not None  # removed by a row or an override
        }
    evaluation.value["shifts"] = shifts
    return evaluation.section("shifts").value


def _spell_out_shift(shift: Any) -> Any:
    """Turn the name of a corruption or a data set into a mapping."""
    if not isinstance(shift, str):
        return shift
    return {"corruption" if shift in CORRUPTIONS else "data": shift}


def _shift(evaluation: Located, name: str, own: Named) -> Shift:
    """Build a shift of an evaluation whose own data are `own`."""
    section = evaluation.section("shifts", name)
    kind = sources[own.name].gives.kind
    if section.value.get("data") is not None:
        section.value["data"] = other = _named(sources, section, "data", like=own)
        if sources[other.name].gives is not sources[own.name].gives:
            other_kind = sources[other.name].gives.kind
            raise section.error(
                ("data",), f"'{other.name}' is {other_kind} data, but '{own.name}' is {kind} data"
            )
    elif not issubclass(sources[own.name].gives, ImageSpec):
        raise section.error(
            (), f"'{own.name}' is {kind} data: only images can be corrupted; name other data"
        )
    return validated(Shift, section, f"the shift '{name}'")


def _protocol_options(name: str, recipe: Located, evaluation: Located) -> Options:
    """Merge a protocol's options from the recipe and the evaluation, in this order.

    The options of a protocol that it inherits from come first. `epochs` and `steps` replace each
    other.
    """
    merged = Located({}, {(): recipe.places[()]}, (name,))
    sections = [place.section(key) for key in inheritance(name) for place in (recipe, evaluation)]
    for section in sections:
        if {"epochs", "steps"} & section.value.keys():
            merged.value = merged.without("epochs", "steps").value
        for key, value in section.value.items():
            places = places_under(section.places, key)
            merged.change(key, value, places or {(): section.places[()]})
    return validated(protocols[name].Options, merged, f"'{name}'")


def _named(
    registry: Registry[Any],
    source: Located,
    key: str,
    default: str | None = None,
    like: Named | None = None,
) -> Named:
    """Build the component that `source` names under `key`.

    It is written as `name`, as `{name: ..., option: ...}`, or as `hf:bert-base-uncased`: the text
    after the colon is the option that the class declares as its `shorthand`. `like` is the recipe's
    data set, whose options the component shares (see `Source.inherit_options`).
    """
    if isinstance(source.value.get(key), str):
        source.value[key] = {"name": source.value[key]}
    section = source.section(key)
    name = section.value.get("name", default)
    if name is None:
        raise source.error((key,), f"name a {registry.kind}, one of: {', '.join(registry)}")
    options = section.without("name")
    kind, _, rest = str(name).partition(":")
    if rest and kind in registry and (shorthand := registry[kind].shorthand):
        name, options.value = kind, {shorthand: rest, **options.value}
    try:
        cls = registry[str(name)]
    except UserError as error:
        raise section.error((), str(error)) from None
    if like is not None and sources[like.name].gives is cls.gives:
        inherited = cls.inherit_options(like.as_dict(), options.value)
        options.value = {**options.value, **inherited}
    valid = validated(cls.Options, options, f"'{name}'")
    return Named(name=str(name), options=valid, component=cls)


def validated(model: type[Model], source: Located, owner: str, also: Iterable[str] = ()) -> Model:
    """Validate `source.value` as a `model`.

    `also` lists keys that `owner` may have in addition to the model's fields; they are suggested
    for unknown keys. Raises UserError for the first mistake, with its place.
    """
    try:
        valid = model.model_validate(source.value)
    except ValidationError as error:
        first = _choose_error(error, source.value)
    else:
        if (place := _find_truth(source.value, valid)) is not None:
            raise source.error(place, "should be a number, not true or false")
        return valid
    keys: Keys = tuple(first["loc"])
    if first["type"] == "extra_forbidden":
        known = [*_fields(model, keys[:-1]), *(also if len(keys) == 1 else ())]
        raise source.error(keys, f"no such option of {owner}.{did_you_mean(str(keys[-1]), known)}")
    written = _written(keys, source.value)
    if first["type"] == "missing":
        raise source.error(written, f"'{keys[-1]}' is missing")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = first.get("input")
    if written and isinstance(value, str | int | float | bool | list):
        message += f", not {value!r}"
    raise source.error(written, message)


def _choose_error(error: ValidationError, value: Any) -> ErrorDetails:
    """Choose the mistake to report.

    Unknown keys come first, because a misspelled key often makes another one look missing. If an
    option allows several types, the mistake in the type that the user wrote comes first.
    """
    details = error.errors()
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    if not first["type"].endswith("_type"):
        return first
    written = _written(tuple(first["loc"]), value)
    same = [detail for detail in details if tuple(detail["loc"])[: len(written)] == written]
    return min(same, key=lambda detail: detail["type"].endswith("_type"))


def _find_truth(written: Any, valid: Any) -> Keys | None:
    """The keys of the first true or false that was read as a number; None if there is none."""
    if isinstance(written, bool):
        return () if type(valid) in (int, float) else None
    inner: Iterable[tuple[str | int, Any, Any]] = ()
    if isinstance(written, dict) and isinstance(valid, BaseModel):
        inner = [(key, value, getattr(valid, key, None)) for key, value in written.items()]
    elif isinstance(written, dict) and isinstance(valid, dict):
        inner = [(key, value, valid.get(key)) for key, value in written.items()]
    elif isinstance(written, list) and isinstance(valid, list | tuple):
        inner = [(place, *pair) for place, pair in enumerate(zip(written, valid, strict=False))]
    for key, value, read in inner:
        if (keys := _find_truth(value, read)) is not None:
            return (key, *keys)
    return None


def _fields(model: type[BaseModel], keys: Keys) -> Iterator[str]:
    """List the names of the options that `model` has under `keys`."""
    for key in keys:
        annotation = (
            model.model_fields[key].annotation
            if isinstance(key, str) and key in model.model_fields
            else None
        )
        for member in get_args(annotation) or (annotation,):
            if isinstance(member, type) and issubclass(member, BaseModel):
                model = member
    return iter(model.model_fields)


def _written(keys: Keys, value: Any) -> Keys:
    """Return the leading keys that the user wrote: pydantic appends the members of unions."""
    for end, key in enumerate(keys):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return keys[:end]
    return keys
