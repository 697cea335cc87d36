"""Recipes and sweeps: YAML files, read into typed objects, with every mistake named by file, line and key.

A recipe is one experiment; a sweep is a base recipe and named changes to it. Changes (a sweep's
rows, the command line's `key=value`) address keys by dotted paths. A mapping given for a section is
merged into it, unless it names another component (`pretext: {name: byol}`): then it takes the
section's place, since the old options were the other's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

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
from sslrun.protocols.base import inheritance, protocols, unsupported
from sslrun.recipe.fit import misfit
from sslrun.recipe.places import Keys, Located, override, read_yaml
from sslrun.recipe.schema import Evaluation, Named, Pretrain, Recipe, Sweep
from sslrun.recipe.shipped import find
from sslrun.registry import Options, Registry, did_you_mean
from sslrun.tasks.base import tasks

Model = TypeVar("Model", bound=BaseModel)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe in a file, or the shipped one of that name, with `key=value` overrides.

    UserError: any mistake, with its file, line and key.
    """
    source = read_yaml(find(path))
    if "rows" in source.value:
        raise UserError(f"{path}: is a sweep: run it with `sslrun sweep {path}`")
    override(source, overrides)
    return parse(source)


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read the sweep in a file, or the shipped one of that name; a recipe counts as a sweep of one row.

    Overrides change the base, before the rows do. UserError: any mistake, with its file, line and
    key.
    """
    path = find(path)
    source = read_yaml(path)
    if "rows" not in source.value:
        override(source, overrides)
        recipe = parse(source)
        return Sweep(name=recipe.name, rows={recipe.name: recipe})
    base = source.value.get("base")
    if isinstance(base, str):
        base_source = read_yaml(path.parent / base)
    elif isinstance(base, dict):
        base_source = source.section("base")
        base_source.at = ()
        base_source.value.setdefault("name", source.value.get("name"))
    else:
        raise source.error(
            ("base",), "should be the recipe that the rows change: a file, or the recipe itself"
        )
    override(base_source, overrides)
    rows = {}
    for row in source.section("rows").value:
        changes = source.section("rows", row)
        recipe_source = base_source.copy()
        for dotted, value in changes.value.items():
            inside = {
                keys[1:]: place for keys, place in changes.places.items() if keys[:1] == (dotted,)
            }
            recipe_source.change(dotted, value, inside)
        rows[row] = parse(recipe_source)
    sweep = validated(
        Sweep, Located({**source.without("base").value, "rows": rows}, source.places), "a sweep"
    )
    sweep._against_at = source.places.get(("against",))
    return sweep


def parse(source: Located) -> Recipe:
    """Build a recipe from its mapping. UserError: any mistake, with its place."""
    data = _named(sources, source, "data")
    backbone = _named(backbones, source, "backbone")
    pretext = None if source.value.get("pretext") is None else _named(pretexts, source, "pretext")
    network = backbones[backbone.name]
    pretraining = None if pretext is None else pretexts[pretext.name]
    if pretraining is not None and (wrong := misfit(sources[data.name], pretraining, network)):
        raise source.error(
            ("backbone" if wrong.culprit == "backbone" else "pretext",), wrong.reason
        )
    if pretext and source.value.get("weights"):
        raise source.error(
            ("weights",), "stand in place of pretraining: give either them or 'pretext'"
        )
    if pretext and not source.value.get("pretrain"):
        raise source.error(
            (),
            "'pretrain' is missing: the schedule of the pretext task, as {epochs: 100, batch: 256, lr: 0.001}",
        )
    pretrain = validated(Pretrain, source.section("pretrain"), "'pretrain'") if pretext else None
    evaluate = {key: _evaluation(source, key, data) for key in source.section("evaluate").value}
    if (
        pretraining is None
        and not evaluate
        and (wrong := misfit(sources[data.name], None, network))
    ):
        raise source.error(("backbone",), wrong.reason)
    for key, evaluation in evaluate.items():
        task = tasks[evaluation.task.name]
        if wrong := misfit(sources[evaluation.data.name], task, network):
            raise source.error(("evaluate", key), wrong.reason)
    limits = network.limits(backbone.options)
    read: dict[Keys, Named] = {
        ("data",): data,
        **{("evaluate", key, "data"): each.data for key, each in evaluate.items()},
    }
    for keys, named in read.items():
        for option, most in limits.items():
            if getattr(named.options, option, 0) > most:  # reported now, not after pretraining
                raise source.error(
                    (*keys, option),
                    f"sequences of {getattr(named.options, option)} tokens are longer than the {most} positions of "
                    f"'{backbone.name}': lower it to {most}, or raise backbone.positions before pretraining",
                )
    typed = {
        "backbone": backbone,
        "pretext": pretext,
        "data": data,
        "pretrain": pretrain,
        "evaluate": evaluate,
    }
    rest = source.without(*protocols)
    return validated(Recipe, Located({**rest.value, **typed}, source.places), "a recipe", protocols)


def _evaluation(source: Located, key: str, data: Named) -> Evaluation:
    section = source.section("evaluate", key)
    if section.value.get("data") is None:
        # The same set as pretraining's is the same in every option.
        section.value["data"] = data.as_dict() if key == data.name else {"name": key}
    evaluation_data = _named(sources, section, "data", like=data)
    task = _named(tasks, section, "task", default=sources[evaluation_data.name].task)
    options = {name: _protocol_options(name, source, section) for name in protocols.in_order}
    given = {
        **section.without(*protocols).value,
        "shifts": {name: _shift(section, name, evaluation_data) for name in _named_shifts(section)},
        "data": evaluation_data,
        "task": task,
        "options": options,
    }
    evaluation = validated(
        Evaluation, Located(given, section.places, section.at), f"'evaluate.{key}'", protocols
    )
    for protocol in evaluation.protocols:
        if protocol not in protocols:
            hint = did_you_mean(protocol, protocols.in_order)
            raise section.error(("protocols",), f"no such protocol: '{protocol}'.{hint}")
        if reason := unsupported(protocol, tasks[task.name], task.options):
            raise section.error(("protocols",), reason)
    return evaluation


def _named_shifts(evaluation: Located) -> dict[str, Any]:
    """The shifts by name, each a mapping; a list, or a name alone, names data sets and corruptions."""
    given = evaluation.value.get("shifts") or {}
    if isinstance(given, list) and all(isinstance(each, str) for each in given):
        given = {each: each for each in given}
    if isinstance(given, dict):
        given = {
            name: {"corruption" if each in CORRUPTIONS else "data": each}
            if isinstance(each, str)
            else each
            for name, each in given.items()
            if each is not None  # taken away by a row or an override
        }
    evaluation.value["shifts"] = given
    return evaluation.section("shifts").value


def _shift(evaluation: Located, name: str, own: Named) -> Shift:
    section = evaluation.section("shifts", name)
    kind = sources[own.name].gives.kind
    if section.value.get("data") is not None:
        section.value["data"] = other = _named(sources, section, "data", like=own)
        if sources[other.name].gives is not sources[own.name].gives:
            theirs = sources[other.name].gives.kind
            raise section.error(
                ("data",), f"'{other.name}' is {theirs} data, but '{own.name}' is {kind} data"
            )
    elif not issubclass(sources[own.name].gives, ImageSpec):
        raise section.error(
            (), f"'{own.name}' is {kind} data: only images can be corrupted; name other data"
        )
    return validated(Shift, section, f"the shift '{name}'")


def _protocol_options(name: str, recipe: Located, evaluation: Located) -> Options:
    """A protocol's options: the recipe's section, then the evaluation's; before them those of the protocol it inherits
    from.

    `epochs` and `steps` replace each other.
    """
    merged = Located({}, {(): recipe.places[()]}, (name,))
    for section in (
        each.section(key) for key in inheritance(name) for each in (recipe, evaluation)
    ):
        if {"epochs", "steps"} & section.value.keys():
            merged.value = {
                key: value for key, value in merged.value.items() if key not in ("epochs", "steps")
            }
        for key, value in section.value.items():
            inside = {
                keys[1:]: place for keys, place in section.places.items() if keys[:1] == (key,)
            }
            merged.change(key, value, inside or {(): section.places[()]})
    return validated(protocols[name].Options, merged, f"'{name}'")


def _named(
    registry: Registry[Any],
    source: Located,
    key: str,
    default: str | None = None,
    like: Named | None = None,
) -> Named:
    """The component that `source` names under `key`: `name`, `{name: ..., option: ...}`, or `hf:bert-base-uncased`.

    What follows a colon is the option that the class names as its `shorthand`. `like`: the recipe's
    data set, whose options the component shares (see `Source.inherit_options`).
    """
    if isinstance(source.value.get(key), str):
        source.value[key] = {"name": source.value[key]}
    section = source.section(key)
    name = section.value.get("name", default)
    if name is None:
        raise source.error((key,), f"name a {registry.kind}, one of: {', '.join(registry)}")
    given = section.without("name")
    kind, _, rest = str(name).partition(":")
    if rest and kind in registry and (shorthand := registry[kind].shorthand):
        name, given.value = kind, {shorthand: rest, **given.value}
    try:
        cls = registry[str(name)]
    except UserError as error:
        raise section.error((), str(error)) from None
    if like is not None and sources[like.name].gives is cls.gives:
        given.value = {**given.value, **cls.inherit_options(like.as_dict(), given.value)}
    return Named(name=str(name), options=validated(cls.Options, given, f"'{name}'"), component=cls)


def validated(model: type[Model], source: Located, owner: str, also: Iterable[str] = ()) -> Model:
    """Validate `source.value` as a `model`. UserError: the first mistake, with its place.

    `also`: keys that `owner` may have in addition to the model's fields, to suggest in place of an
    unknown one.
    """
    try:
        return model.model_validate(source.value)
    except ValidationError as error:
        # Unknown keys first: a misspelt key often makes another one look missing.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        if first["type"].endswith(
            "_type"
        ):  # of several allowed types, report the one that was written
            written = _written(tuple(first["loc"]), source.value)
            same = (
                each for each in error.errors() if tuple(each["loc"])[: len(written)] == written
            )
            first = min(same, key=lambda each: each["type"].endswith("_type"))
    keys: Keys = tuple(first["loc"])
    if first["type"] == "extra_forbidden":
        known = [*_fields(model, keys[:-1]), *(also if len(keys) == 1 else ())]
        raise source.error(keys, f"no such option of {owner}.{did_you_mean(str(keys[-1]), known)}")
    written = _written(keys, source.value)
    if first["type"] == "missing":
        raise source.error(written, f"'{keys[-1]}' is missing")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = first.get("input")
    shown = (
        f", not {given!r}" if written and isinstance(given, str | int | float | bool | list) else ""
    )
    raise source.error(written, message + shown)


def _fields(model: type[BaseModel], keys: Keys) -> Iterator[str]:
    """The option names that `model` has under `keys`."""
    for key in keys:
        annotation = (
            model.model_fields[key].annotation
            if isinstance(key, str) and key in model.model_fields
            else None
        )
        for each in get_args(annotation) or (annotation,):
            if isinstance(each, type) and issubclass(each, BaseModel):
                model = each
    return iter(model.model_fields)


def _written(keys: Keys, value: Any) -> Keys:
    """The leading part of `keys` that the user wrote: pydantic appends the members of unions to it."""
    for end, key in enumerate(keys):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return keys[:end]
    return keys
