"""Recipes and sweeps: YAML files, read into typed objects, with every mistake named by file, line and key.

A recipe is one experiment; a sweep is a base recipe and named changes to it. Changes (a sweep's rows, the command
line's `key=value`) address keys by dotted paths. A mapping given for a section is merged into it, unless it names
another component (`pretext: {name: byol}`): then it takes the section's place, since the old options were the other's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

import sslrun.backbones
import sslrun.pretexts
import sslrun.tasks  # noqa: F401 (importing fills the registries)
from sslrun.backbones.base import backbones
from sslrun.data.corruptions import CORRUPTIONS
from sslrun.data.shifts import ID, MEAN_SHIFT, Shift
from sslrun.data.sources import sources
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.protocols import PROTOCOLS, Protocols
from sslrun.registry import Options, Registry, did_you_mean
from sslrun.runs import contents
from sslrun.tasks.base import TaskOptions, tasks
from sslrun.training.loop import Schedule

Model = TypeVar("Model", bound=BaseModel)
Keys = tuple[str | int, ...]


# ---------------------------------------------------------------- what a recipe says


class Named(BaseModel):
    """A component by name, with its options checked against the class of that name."""

    model_config = ConfigDict(frozen=True)
    name: str
    options: SerializeAsAny[Options]

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.options.model_dump(mode="json")}

    def identity(self) -> dict[str, Any]:
        """What tells it from another in a run's hash: its options, and what is in the files that they name."""
        found = [digest for path in self.options.files() if (digest := contents(path)) is not None]
        return {**self.as_dict(), "files": found} if found else self.as_dict()


class Pretrain(Schedule):
    """Stage 1: the schedule of pretraining."""

    seed: int | None = Field(None, ge=0)
    """The seed of pretraining, that evaluations of every seed start from one checkpoint; default: each from its own."""


class Watch(Options):
    """What is seen of a run while it goes on. Nothing here changes a result, so nothing here is part of its hash."""

    every: float = Field(10.0, gt=0)
    """Epochs between two looks at the features: online kNN, deviation, effective rank."""
    examples: int = Field(2000, ge=64)
    """Held-out examples, and as many training examples, that a look reads at most."""
    checkpoint: float = Field(10.0, gt=0)
    """Minutes between two checkpoints."""
    to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides metrics.jsonl; each an optional extra of the package."""


def _share_or_count(labels: float) -> float:
    if not (0 < labels <= 1 or (labels > 1 and labels == int(labels))):
        raise ValueError("should be a share in (0, 1], or a whole number of labels a class")
    return labels


def _shift_name(name: str) -> str:
    if not name or re.search("[·,:]", name):
        raise ValueError("a shift's name should have neither '·' nor ',' nor ':', which separate the parts of a column")
    if name in (ID, MEAN_SHIFT):
        raise ValueError(f"'{name}' is a column of the table already; name the shift otherwise")
    return name


class Evaluation(BaseModel):
    """One task of a recipe: its data, how it is learned, and from how many labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    data: Named
    task: Named
    protocols: tuple[str, ...]
    labels: tuple[Annotated[float, AfterValidator(_share_or_count)], ...] = Field((1.0,), min_length=1)
    """Shares of the training labels, class-balanced and nested; a whole number above 1 is labels a class."""
    restarts: int = Field(1, ge=1)
    """Times that whatever is trained from labels is trained, from the same pretrained weights: with a new head and in
    another order of the data (BERT's fine-tuning restarts). What has one solution, as a probe by L-BFGS, is not."""
    shifts: dict[Annotated[str, AfterValidator(_shift_name)], Shift] = {}
    """Test sets out of distribution, by name: every protocol is scored on them too, and chooses nothing by them."""
    options: Protocols
    """The recipe's protocol options with this task's own changes."""

    @property
    def reads(self) -> tuple[Named, ...]:
        """The data sets that it reads: its own, and those of its shifts."""
        return (self.data, *(each.data for each in self.shifts.values() if each.data is not None))

    def restarts_of(self, protocol: str) -> int:
        """How often a protocol is run."""
        stepwise = self.options.probe.solver == "sgd" or not cast(TaskOptions, self.task.options).linear
        trained = protocol in ("finetune", "lpft", "scratch") or (protocol == "probe" and stepwise)
        return self.restarts if trained else 1

    def labels_of(self, protocol: str) -> tuple[float, ...]:
        """From how many labels a protocol learns: `labels`; a class's, where it is few-shot learning."""
        return self.options.fewshot.shots if protocol == "fewshot" else self.labels


class Weights(BaseModel):
    """A file of pretrained weights, in place of pretraining."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: Path
    """A pretraining's folder, or a file of ours, of timm's, torchvision's or transformers' names; from where sslrun is
    called."""
    mean: tuple[float, float, float] | None = None
    """What its images were centred by, in each channel of [0, 1]; default: what the file says, else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """And divided by."""

    @model_validator(mode="before")
    @classmethod
    def _a_path_alone(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else given


class Recipe(BaseModel):
    """One experiment: a backbone, a pretext task, data, a schedule, and evaluations."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    backbone: Named
    pretext: Named | None = None
    """None: no pretraining; protocols then read the backbone as initialised."""
    data: Named
    pretrain: Pretrain | None = None
    weights: Weights | None = None
    """What evaluations start from, where nothing is pretrained and no --from is given."""
    watch: Watch = Watch()
    evaluate: dict[str, Evaluation] = {}

    @property
    def choices(self) -> list[str]:
        """What it comes to where the papers behind it are silent."""
        named = [self.backbone, *([self.pretext] if self.pretext else []), *(e.task for e in self.evaluate.values())]
        return list(dict.fromkeys(each for part in named for each in part.options.choices()))

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as a mapping that `parse` reads back to an equal recipe."""
        given: dict[str, Any] = {
            "name": self.name,
            "backbone": self.backbone.as_dict(),
            "pretext": self.pretext.as_dict() if self.pretext else None,
            "data": self.data.as_dict(),
            "pretrain": self.pretrain.model_dump(mode="json") if self.pretrain else None,
            "weights": self.weights.model_dump(mode="json", exclude_none=True) if self.weights else None,
            "watch": self.watch.model_dump(mode="json"),
            "evaluate": {
                key: {
                    "data": evaluation.data.as_dict(),
                    "task": evaluation.task.as_dict(),
                    "protocols": list(evaluation.protocols),
                    "labels": list(evaluation.labels),
                    "restarts": evaluation.restarts,
                    "shifts": {name: shift.as_dict() for name, shift in evaluation.shifts.items()},
                    **evaluation.options.model_dump(mode="json"),
                }
                for key, evaluation in self.evaluate.items()
            },
        }
        return {key: value for key, value in given.items() if value is not None}


class Against(BaseModel):
    """A published table that a sweep's stands beside."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    table: str
    columns: dict[str, str] = {}
    """Our tasks -> the published columns that they stand in for: of the same kind, on other data."""


class Sweep(BaseModel):
    """A base recipe, rows (named changes to it), columns (tasks), and seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    rows: dict[str, Recipe]
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    title: str | None = None
    against: Against | None = None
    """The published table that this sweep's table stands beside: its name, or `{table: ..., columns: ...}`."""
    jobs: int = Field(1, ge=1)
    """Worker processes that share the runs, where --jobs does not say."""

    _against_at: str | None = PrivateAttr(None)

    @property
    def against_at(self) -> str:
        """Where `against` was written, as file:line; the sweep's name where that isn't known."""
        return self._against_at or self.name

    @field_validator("against", mode="before")
    @classmethod
    def _named_alone(cls, given: Any) -> Any:
        return {"table": given} if isinstance(given, str) else given


# ---------------------------------------------------------------- where each key stands


@dataclass
class Source:
    """A nested mapping together with the place where each of its keys was written."""

    value: dict[str, Any]
    places: dict[Keys, str]
    """Keys, from the top of `value` -> "file:line", or the override that set them."""
    at: Keys = ()
    """Where in the recipe `value` lies."""

    def error(self, keys: Keys, message: str) -> UserError:
        """The error with its place: that of `keys`, or else of the nearest key around them."""
        place = next(self.places[keys[:end]] for end in range(len(keys), -1, -1) if keys[:end] in self.places)
        path = ".".join(map(str, self.at + keys))
        return UserError(f"{place}: {path}: {message}" if path else f"{place}: {message}")

    def section(self, *keys: str) -> Source:
        """The mapping under `keys` as a source of its own; empty where there is none."""
        value: Any = self.value
        for depth, key in enumerate(keys, start=1):
            value = value.get(key)
            if value is None:
                value = {}
            if not isinstance(value, dict):
                raise self.error(keys[:depth], f"should be a mapping, not {value!r}")
        places = {path[len(keys) :]: place for path, place in self.places.items() if path[: len(keys)] == keys}
        places.setdefault((), self.places[()])
        return Source(value, places, self.at + keys)

    def copy(self) -> Source:
        return copy.deepcopy(self)

    def without(self, *names: str) -> Source:
        """The same but for some keys."""
        return Source({key: value for key, value in self.value.items() if key not in names}, self.places, self.at)

    def change(self, path: str, value: Any, places: Mapping[Keys, str]) -> None:
        """Set the dotted `path` to `value`; `places` says where the value and what lies inside it were written."""
        self._change(tuple(path.split(".")), value, places)

    def _change(self, keys: tuple[str, ...], value: Any, places: Mapping[Keys, str]) -> None:
        """`change`, by keys, which may themselves have dots in them (CIFAR-10.1)."""
        *parents, last = keys
        at = self.value
        for depth, key in enumerate(parents, start=1):
            at[key] = {} if at.get(key) is None else _spelt_out(key, at[key])
            at = at[key]
            if not isinstance(at, dict):
                raise UserError(
                    f"{places[()]}: {'.'.join(keys)}: '{'.'.join(keys[:depth])}' holds a value, not a section"
                )
        old = _spelt_out(last, at.get(last))
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            at[last] = old
            for inner, inner_value in value.items():
                inside = {deep[1:]: place for deep, place in places.items() if deep[:1] == (inner,)}
                self._change((*keys, inner), inner_value, {(): places[()], **inside})
            return
        at[last] = copy.deepcopy(value)
        self.places = {deep: place for deep, place in self.places.items() if deep[: len(keys)] != keys}
        self.places.update({keys + inner: place for inner, place in places.items()})


def _spelt_out(key: str, value: Any) -> Any:
    """`pretext: simclr` as {name: simclr}, of which options can be given."""
    return {"name": value} if key in ("backbone", "data", "pretext", "task") and isinstance(value, str) else value


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number, as everywhere else."""


_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> Source:
    """A YAML file with the line of every key. UserError: missing, unreadable, not YAML, no mapping, a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_near_file(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a recipe in it{_near_file(path / 'x')}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: should be a mapping of keys such as 'name', 'backbone', 'data'")
        places: dict[Keys, str] = {}
        value = _construct(loader, root, (), places, path)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    return Source(value, places)


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder {folder})"
    return "." + did_you_mean(path.name, sorted(each.name for each in folder.glob("*.yaml")))


def _construct(loader: _Loader, node: yaml.Node, keys: Keys, places: dict[Keys, str], path: Path) -> Any:
    places[keys] = f"{path}:{node.start_mark.line + 1}"
    if node.tag not in _COLLECTIONS:
        return loader.construct_object(node, deep=True)  # of any other tag than a scalar's, an error
    if isinstance(node, yaml.MappingNode):
        given: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in given:
                raise UserError(f"{path}:{key_node.start_mark.line + 1}: '{key_node.value}' is given twice")
            given.add(str(key_node.value))
        loader.flatten_mapping(node)  # merges (<<) come first, so that the mapping's own keys win
        value: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            value[key] = _construct(loader, value_node, (*keys, key), places, path)
            places[(*keys, key)] = f"{path}:{key_node.start_mark.line + 1}"
        return value
    assert isinstance(node, yaml.SequenceNode)
    return [_construct(loader, each, (*keys, index), places, path) for index, each in enumerate(node.value)]


# ---------------------------------------------------------------- from mappings to typed objects


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with `key=value` overrides. UserError: any mistake, with its file, line and key."""
    source = read_yaml(path)
    if "rows" in source.value:
        raise UserError(f"{path}: is a sweep: run it with `sslrun sweep {path}`")
    override(source, overrides)
    return parse(source)


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in a file; a recipe counts as a sweep of one row. Overrides change the base, before the rows do."""
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
        raise source.error(("base",), "should be the recipe that the rows change: a file, or the recipe itself")
    override(base_source, overrides)
    rows = {}
    for row in source.section("rows").value:
        changes = source.section("rows", row)
        recipe_source = base_source.copy()
        for dotted, value in changes.value.items():
            inside = {keys[1:]: place for keys, place in changes.places.items() if keys[:1] == (dotted,)}
            recipe_source.change(dotted, value, inside)
        rows[row] = parse(recipe_source)
    sweep = validated(Sweep, Source({**source.without("base").value, "rows": rows}, source.places), "a sweep")
    sweep._against_at = source.places.get(("against",))
    return sweep


def override(source: Source, overrides: Sequence[str]) -> None:
    """Apply `key=value` strings; values are YAML. UserError: no '=', or a value that is not YAML."""
    for each in overrides:
        path, equals, text = each.partition("=")
        if not equals or not re.fullmatch(r"[^.=\s]+(\.[^.=\s]+)*", path):
            raise UserError(f"'{each}': an override is written key=value, as in pretrain.epochs=5")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise UserError(f"{each}: the value is not valid YAML") from None
        source.change(path, value, _same_place(value, f"override {each}"))


def _same_place(value: Any, place: str, at: Keys = ()) -> dict[Keys, str]:
    inner = value.items() if isinstance(value, dict) else ()
    return {at: place, **{k: v for key, each in inner for k, v in _same_place(each, place, (*at, key)).items()}}


def parse(source: Source) -> Recipe:
    """A recipe from its mapping."""
    data = _named(sources, source, "data")
    backbone = _named(backbones, source, "backbone")
    pretext = None if source.value.get("pretext") is None else _named(pretexts, source, "pretext")
    for registry, named, key in ((backbones, backbone, "backbone"), (pretexts, pretext, "pretext")):
        modality = sources[data.name].modality
        if named and registry[named.name].modality != modality:
            raise source.error(
                (key,), f"'{named.name}' is for {registry[named.name].modality} data, '{data.name}' is {modality} data"
            )
    if pretext and source.value.get("weights"):
        raise source.error(("weights",), "stand in place of pretraining: give either them or 'pretext'")
    if pretext and not source.value.get("pretrain"):
        raise source.error(
            (), "'pretrain' is missing: the schedule of the pretext task, as {epochs: 100, batch: 256, lr: 0.001}"
        )
    pretrain = validated(Pretrain, source.section("pretrain"), "'pretrain'") if pretext else None
    evaluate = {key: _evaluation(source, key, data) for key in source.section("evaluate").value}
    longest = getattr(backbone.options, "positions", None) if sources[data.name].modality == "text" else None
    read: dict[Keys, Named] = {
        ("data",): data,
        **{("evaluate", key, "data"): each.data for key, each in evaluate.items()},
    }
    for keys, named in read.items():
        length = getattr(named.options, "length", 0)
        if longest is not None and length > longest:  # told now, not once it is pretrained
            raise source.error(
                (*keys, "length"),
                f"sequences of {length} tokens are longer than the {longest} positions of '{backbone.name}': "
                f"lower it to {longest}, or raise backbone.positions before pretraining",
            )
    typed = {"backbone": backbone, "pretext": pretext, "data": data, "pretrain": pretrain, "evaluate": evaluate}
    rest = source.without(*Protocols.model_fields)
    return validated(Recipe, Source({**rest.value, **typed}, source.places), "a recipe", Protocols.model_fields)


def _evaluation(source: Source, key: str, data: Named) -> Evaluation:
    section = source.section("evaluate", key)
    if section.value.get("data") is None:
        # The same set as pretraining's is the same in every option.
        section.value["data"] = data.as_dict() if key == data.name else {"name": key}
    evaluation_data = _named(sources, section, "data", like=data)
    task = _named(tasks, section, "task", default=sources[evaluation_data.name].task)
    options = Protocols(**{name: _protocol(name, source, section) for name in Protocols.model_fields})
    given = {
        **section.without(*Protocols.model_fields).value,
        "shifts": {name: _shift(section, name, evaluation_data) for name in _named_shifts(section)},
        "data": evaluation_data,
        "task": task,
        "options": options,
    }
    evaluation = validated(
        Evaluation, Source(given, section.places, section.at), f"'evaluate.{key}'", Protocols.model_fields
    )
    for protocol in evaluation.protocols:
        if protocol not in PROTOCOLS:
            raise section.error(
                ("protocols",), f"no such protocol: '{protocol}'.{did_you_mean(protocol, list(PROTOCOLS))}"
            )
    return evaluation


def _named_shifts(evaluation: Source) -> dict[str, Any]:
    """The shifts by name, each a mapping; a list, or a name alone, names data sets and corruptions."""
    given = evaluation.value.get("shifts") or {}
    if isinstance(given, list) and all(isinstance(each, str) for each in given):
        given = {each: each for each in given}
    if isinstance(given, dict):
        given = {
            name: {"corruption" if each in CORRUPTIONS else "data": each} if isinstance(each, str) else each
            for name, each in given.items()
            if each is not None  # taken away by a row or an override
        }
    evaluation.value["shifts"] = given
    return evaluation.section("shifts").value


def _shift(evaluation: Source, name: str, own: Named) -> Shift:
    section = evaluation.section("shifts", name)
    modality = sources[own.name].modality
    if section.value.get("data") is not None:
        section.value["data"] = other = _named(sources, section, "data", like=own)
        if sources[other.name].modality != modality:
            raise section.error(
                ("data",), f"'{other.name}' is {sources[other.name].modality} data, '{own.name}' {modality} data"
            )
    elif modality != "image":
        raise section.error((), f"'{own.name}' is {modality} data: only images can be corrupted; name other data")
    return validated(Shift, section, f"the shift '{name}'")


def _protocol(name: str, recipe: Source, evaluation: Source) -> Options:
    """A protocol's options: the default's, changed by the recipe's section, then the evaluation's; for lpft and scratch
    by those of finetune first."""
    default = Protocols.model_fields[name].default
    merged = Source(default.model_dump(exclude_unset=True), {(): recipe.places[()]}, (name,))
    inherited = ("finetune", name) if name in ("lpft", "scratch") else (name,)
    for section in (each.section(key) for key in inherited for each in (recipe, evaluation)):
        if {"epochs", "steps"} & section.value.keys():
            merged.value = {key: value for key, value in merged.value.items() if key not in ("epochs", "steps")}
        for key, value in section.value.items():
            inside = {keys[1:]: place for keys, place in section.places.items() if keys[:1] == (key,)}
            merged.change(key, value, inside or {(): section.places[()]})
    return validated(type(default), merged, f"'{name}'")


def _named(
    registry: Registry[Any], source: Source, key: str, default: str | None = None, like: Named | None = None
) -> Named:
    """The component that `source` names under `key`: `name`, `{name: ..., option: ...}`, or `hf:bert-base-uncased`.

    What follows a colon is the option that the class is tagged with as its `shorthand`. `like`: a data set that it takes
    options from which both must share.
    """
    if isinstance(source.value.get(key), str):
        source.value[key] = {"name": source.value[key]}
    section = source.section(key)
    name = section.value.get("name", default)
    if name is None:
        raise source.error((key,), f"name a {registry.kind}, one of: {', '.join(registry)}")
    given = section.without("name")
    kind, _, rest = str(name).partition(":")
    if rest and kind in registry and (shorthand := getattr(registry[kind], "shorthand", None)):
        name, given.value = kind, {shorthand: rest, **given.value}
    try:
        cls = registry[str(name)]
    except UserError as error:
        raise section.error((), str(error)) from None
    if like is not None and sources[like.name].modality == cls.modality:
        given.value = {**given.value, **cls.shared_with(like.as_dict(), given.value)}
    return Named(name=str(name), options=validated(cls.Options, given, f"'{name}'"))


def validated(model: type[Model], source: Source, owner: str, also: Iterable[str] = ()) -> Model:
    """`source.value` as a `model`; the first mistake as a UserError with its place.

    `also`: keys that `owner` may have besides the model's fields, to suggest in place of an unknown one.
    """
    try:
        return model.model_validate(source.value)
    except ValidationError as error:
        # Unknown keys first: a misspelt key often makes another one look missing.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        if first["type"].endswith("_type"):  # where several types may stand, the mistake is told of that which does
            written = _written(tuple(first["loc"]), source.value)
            same = (each for each in error.errors() if tuple(each["loc"])[: len(written)] == written)
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
    shown = f", not {given!r}" if written and isinstance(given, str | int | float | bool | list) else ""
    raise source.error(written, message + shown)


def _fields(model: type[BaseModel], keys: Keys) -> Iterator[str]:
    """The option names that `model` has under `keys`."""
    for key in keys:
        annotation = model.model_fields[key].annotation if isinstance(key, str) and key in model.model_fields else None
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
