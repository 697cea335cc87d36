"""Recipes and sweeps as typed objects."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    SerializeAsAny,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from sslrun.backbones.weights import WEIGHTS
from sslrun.data.shifts import Shift
from sslrun.data.source import SourceOptions
from sslrun.metric import ID, MEAN_SHIFT
from sslrun.protocols.base import Protocol, protocols, unsupported
from sslrun.recipe.axes import Axes
from sslrun.recipe.places import Located
from sslrun.registry import Options, expand_option
from sslrun.runs import component_identity, hash_contents
from sslrun.seeds import LARGEST_SEED
from sslrun.tasks.base import TaskOptions, tasks
from sslrun.tasks.diagnostics import Diagnostic
from sslrun.training.schedule import Schedule

HUB = "hub:"
"""Prefix of a repository on the Hugging Face hub that `pretrain.init` names."""


class Named(BaseModel):
    """A component by name, with its options checked against the class of that name."""

    model_config = ConfigDict(frozen=True)
    name: str
    options: SerializeAsAny[Options]
    component: type[Any] | None = Field(None, exclude=True, repr=False)
    """The class of that name; its version and, for a plug-in, its source are part of a run's
    hash."""

    def as_dict(self) -> dict[str, Any]:
        """Return the component as a recipe writes it, with every default."""
        return {"name": self.name, **self.options.model_dump(mode="json")}

    def identity(self) -> dict[str, Any]:
        """Return the component's part of a run's hash, as JSON values.

        It holds the name, the options that differ from the defaults, digests of the files that the
        options name, and the class's `component_identity`. No option can collide with keys that
        contain a dot.
        """
        digests = [
            digest for path in self.options.files() if (digest := hash_contents(path)) is not None
        ]
        return {
            "name": self.name,
            **self.options.non_defaults(),
            **({"component.files": digests} if digests else {}),
            **(component_identity(self.component) if self.component else {}),
        }


UNITS = {"s": 1, "m": 60, "h": 3600}


def _parse_duration(value: Any) -> Any:
    """Convert text such as 30m to seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("should be a time such as 90s, 30m or 1.5h")
    return float(match[1]) * UNITS[match[2]]


Duration = Annotated[
    float,
    BeforeValidator(_parse_duration),
    Field(gt=0),
    PlainSerializer(lambda seconds: f"{seconds:.15g}s", return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)?[smh]$"}),
]
"""Seconds, written as text with a unit."""


class Pretrain(Schedule):
    """Stage 1: the schedule of pretraining."""

    budget: Duration | None = None
    """Time of training, such as 90s, 30m or 2h, in place of `epochs` and `steps`. The schedules of
    the learning rate and of the pretext task follow the clock, and `warmup` is a share of the
    budget. Feature checks, checkpoints and interruptions do not count. Repeating such a run does
    not give the same bits."""
    seed: Seed | None = None
    """Fixed pretraining seed, shared by evaluations of all seeds; default: each evaluation uses its
    own seed."""
    init: str | None = None
    """Weights of the backbone to start from, for continued pretraining: the folder of a run, a file
    with the names of sslrun, timm, torchvision or transformers, or hub:OWNER/NAME, which downloads
    that model.safetensors; default: random weights. Heads and teachers are always new."""

    keep: Literal["last", "best"] = "last"
    """Weights to keep. last: those of the last step. best: those of the feature check with the best
    `keep_by`; checks happen every `watch.every` epochs and at the end."""
    keep_by: Diagnostic = "rankme"
    """With `keep: best`: the diagnostic that decides. Higher is better for rankme, lidar and knn
    (which needs labels), lower for held_out_loss, and closer to 1 for alpha_req. RankMe and LiDAR
    were made to compare trained models: early checks may have the highest ranks."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several devices share the work. ddp: each has all parameters. fsdp: each keeps a part of
    the parameters, gradients and optimizer states, for models that do not fit (FSDP, Zhao et al.
    2023). Both give the same result up to rounding."""
    checkpoint_activations: bool = False
    """Keep only the inputs of a Transformer's blocks for the backward pass, and compute the rest
    again: less memory for about a third more time. The result is the same."""

    @field_validator("init")
    @classmethod
    def _check_init(cls, init: str | None) -> str | None:
        if init is not None and not init.startswith(HUB):
            path = expand_option(init)
            if not (path / WEIGHTS if path.is_dir() else path).is_file():
                raise ValueError(
                    f"no checkpoint at {init}: name a run's folder, a file of weights, or "
                    f"{HUB}OWNER/NAME"
                )
        return init

    @property
    def seconds(self) -> float | None:
        return self.budget

    @property
    def _lengths(self) -> dict[str, float | None]:
        return {**super()._lengths, "budget": self.budget}

    @model_validator(mode="after")
    def _warmup_within_budget(self) -> Pretrain:
        if self.budget is not None and self.warmup >= 1:
            raise ValueError("with budget, warmup is a share of it: set it below 1, as in 0.05")
        return self

    @model_validator(mode="after")
    def _keep_by_with_best(self) -> Pretrain:
        if self.keep != "best" and self.keep_by != "rankme":
            raise ValueError(f"keep_by: {self.keep_by} needs keep: best")
        return self


class Watch(Options):
    """Monitoring during a run. It changes no result, so the run's hash excludes it, except which
    weights `pretrain.keep: best` keeps."""

    every: float = Field(10.0, gt=0)
    """Epochs between two feature checks: online kNN, standard deviation, effective rank."""
    examples: int = Field(2000, ge=64)
    """Maximum number of held-out examples per feature check, and of training examples."""
    views: int | None = Field(10, ge=2)
    """Number of random views of each of at most 1000 held-out images, from which feature checks
    compute LiDAR if the pretext task compares views; null: skip it."""
    checkpoint: float = Field(10.0, gt=0)
    """Minutes between two checkpoints."""
    keep_state: bool = True
    """Keep the last state of a finished pretraining (heads, teachers, optimizer) in its folder, as
    `sslrun pretrain --extend` needs it. It takes a few times the space of the weights."""
    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Loggers in addition to metrics.jsonl; each needs the optional extra of the same name."""


def _share_or_count(labels: float) -> float:
    if not (0 < labels <= 1 or (1 < labels < math.inf and labels == int(labels))):
        raise ValueError("should be a share in (0, 1], or a whole number of labels a class")
    return labels


def _heading(text: str) -> str:
    """Check text that tables show: in terminals, Markdown, and spreadsheets, which run formulas."""
    if not text.strip() or not text.isprintable() or text[0] in "=@" or len(text) > 200:
        raise ValueError("should be at most 200 printable characters, and not begin with = or @")
    return text


Heading = Annotated[str, AfterValidator(_heading)]
"""Text that tables show."""
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""Text that names a folder: letters, digits, '.', '_' and '-'."""
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


def _shift_name(name: str) -> str:
    if not name:
        raise ValueError("a shift's name should not be empty")
    _heading(name)
    if name in (ID, MEAN_SHIFT):
        raise ValueError(f"'{name}' is a column of the table already; name the shift otherwise")
    return name


class Evaluation(BaseModel):
    """One task of a recipe: its data, how it is learned, and from how many labels."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    data: Named
    """Labeled data; default: the data set that the evaluation is named after."""
    task: Named
    """The task to learn from the labels; default: the task of the data's labels."""
    protocols: tuple[str, ...] = Field(min_length=1)
    """Ways to learn the task; see `sslrun show protocol`."""
    labels: tuple[Annotated[float, AfterValidator(_share_or_count)], ...] = Field(
        (1.0,), min_length=1
    )
    """Shares of the training labels, class-balanced and nested; a whole number above 1 is a number
    of labels per class."""
    restarts: int = Field(1, ge=1)
    """Number of runs of each protocol that trains in steps, from the same pretrained weights, each
    with a new head and another order of the data (BERT's fine-tuning restarts). A protocol with a
    unique solution runs once."""
    refit: bool = False
    """Test a model that learned from the training and the validation split, with the same amount of
    labels and the hyperparameters chosen before; protocols that choose nothing learn only once."""
    shifts: dict[Annotated[str, AfterValidator(_shift_name)], Shift] = {}
    """Test sets out of distribution, by name: every protocol reports them, but none uses them for
    model selection."""
    options: dict[str, SerializeAsAny[Options]]
    """Protocol -> its options: the recipe's, with the changes of this evaluation. Holds every
    registered protocol."""

    @property
    def reads(self) -> tuple[Named, ...]:
        """The data sets that the evaluation reads: its own, and those of its shifts."""
        shifted = [shift.data for shift in self.shifts.values() if shift.data is not None]
        return (self.data, *shifted)

    @property
    def has_val(self) -> bool:
        """Whether the data have a validation split."""
        options = self.data.options
        return not isinstance(options, SourceOptions) or options.validation != 0

    def protocol(self, name: str) -> Protocol:
        """Create a protocol with its options for this task."""
        return protocols[name](self.options[name])

    def restarts_of(self, protocol: str) -> int:
        """Return the number of runs of a protocol."""
        assert isinstance(self.task.options, TaskOptions)
        return self.restarts if self.protocol(protocol).trains(self.task.options) else 1

    def labels_of(self, protocol: str) -> tuple[float, ...]:
        """Return the amounts of labels that a protocol learns from."""
        return self.protocol(protocol).labels(self.labels)

    def obstacle(self, protocol: str) -> str | None:
        """Explain why a protocol, or one that it follows, cannot learn the task; None if it can."""
        if reason := unsupported(protocol, tasks[self.task.name], self.task.options):
            return reason
        has_val = self.has_val
        if self.refit and not has_val:
            return "refit adds the validation split, but data.validation is 0: remove refit"
        name: str | None = protocol
        while name is not None:
            if reason := self._obstacle_of_validation(name, has_val):
                return reason
            if name != protocol and (reason := self.protocol(name).head_obstacle()):
                return f"{protocol} starts from the head of {name}, which {reason}"
            name = protocols[name].follows
        return None

    def _obstacle_of_validation(self, protocol: str, has_val: bool) -> str | None:
        """Explain why a protocol cannot do with the validation split as the recipe has it."""
        assert isinstance(self.task.options, TaskOptions)
        method = self.protocol(protocol)
        chosen = method.chooses(self.task.options)
        if chosen and not has_val:
            return (
                f"{protocol} chooses {chosen} on validation, but data.validation is 0: give one "
                "value, or a share such as validation: 0.1"
            )
        if self.refit and (reason := method.refit_obstacle()):
            return f"{protocol} {reason}, or remove refit"
        return None

    def resolved(self) -> dict[str, Any]:
        """Return the evaluation as a mapping with every default."""
        options = {
            protocol: options.model_dump(mode="json")
            for protocol, options in self.options.items()
            if type(options).model_fields
        }
        shifts = {name: shift.as_dict() for name, shift in self.shifts.items()}
        return {
            "data": self.data.as_dict(),
            "task": self.task.as_dict(),
            "protocols": list(self.protocols),
            "labels": list(self.labels),
            "restarts": self.restarts,
            "refit": self.refit,
            "shifts": shifts,
            **options,
        }


class Weights(Options):
    """A file of pretrained weights that replaces pretraining."""

    file: Path
    """A pretraining run's folder, or a .safetensors file with the names of sslrun, timm,
    torchvision or transformers."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean to normalize images in [0, 1]; default: the file's own, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation; default: the file's own, else ImageNet's."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out_file(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value


class Recipe(BaseModel):
    """One experiment: a backbone, a pretext task, data, a schedule, and evaluations."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    name: FileName
    """Name of the recipe and of the runs' folder: letters, digits, '.', '_' and '-'."""
    backbone: Named
    """The network; see `sslrun show backbone`."""
    pretext: Named | None = None
    """The pretext task; null: no pretraining, and evaluations start from the initial weights. See
    `sslrun show pretext`."""
    data: Named
    """The data to pretrain on; see `sslrun show data`."""
    pretrain: Pretrain | None = None
    """The schedule of pretraining; see `sslrun show section pretrain`."""
    weights: Weights | None = None
    """Weights that evaluations start from if nothing is pretrained and --from is not given."""
    watch: Watch = Watch()
    """Monitoring during training; see `sslrun show section watch`."""
    evaluate: dict[Heading, Evaluation] = {}
    """Evaluations by name; see `sslrun show section evaluation`."""

    @property
    def choices(self) -> list[str]:
        """The choices of its components where their papers leave something open."""
        components = [self.backbone, *([self.pretext] if self.pretext else [])]
        components += [evaluation.task for evaluation in self.evaluate.values()]
        choices: dict[str, None] = {}
        for component in components:
            choices |= dict.fromkeys(component.options.choices())
        return list(choices)

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as a mapping with every default; `parse` restores an equal recipe."""
        weights = self.weights
        evaluate = {key: evaluation.resolved() for key, evaluation in self.evaluate.items()}
        values: dict[str, Any] = {
            "name": self.name,
            "backbone": self.backbone.as_dict(),
            "pretext": self.pretext.as_dict() if self.pretext else None,
            "data": self.data.as_dict(),
            "pretrain": self.pretrain.model_dump(mode="json") if self.pretrain else None,
            "weights": weights.model_dump(mode="json", exclude_none=True) if weights else None,
            "watch": self.watch.model_dump(mode="json"),
            "evaluate": evaluate,
        }
        return {key: value for key, value in values.items() if value is not None}


class Against(BaseModel):
    """A published table to compare a sweep's table with."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    table: str
    """Name of the published table; see `sslrun show table`."""
    columns: dict[str, str] = {}
    """Task of the sweep -> the published column (or row, if rows are tasks) that it stands in for,
    with other data of the same kind."""


class Sweep(Axes):
    """A base recipe, rows (named changes to it), columns (tasks), and seeds."""

    name: FileName
    """Name of the sweep and of its tables' folder."""
    rows: dict[Heading, Recipe]
    """Row of the table -> changes to `base`; keys may be dotted, as `pretrain.epochs`. Default: one
    row, the base itself."""
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    """Seeds of the runs of every row."""
    title: Heading | None = None
    """Title of the table; default: the name."""
    against: Against | None = None
    """The published table to compare with: its name, or `{table: ..., columns: ...}`."""
    jobs: int = Field(1, ge=1)
    """Number of worker processes that share the runs; --jobs takes precedence."""

    _against_at: str | None = PrivateAttr(None)
    _sources: dict[str, Located] = PrivateAttr(default_factory=dict)
    """Row -> its recipe as it was written, which a search changes."""
    _search_at: dict[str, str] = PrivateAttr(default_factory=dict)
    """Key of the search's space -> where it was written, as file:line."""

    @property
    def against_at(self) -> str:
        """Where `against` was written, as file:line; the sweep's name if that is unknown."""
        return self._against_at or self.name

    @field_validator("against", mode="before")
    @classmethod
    def _spell_out_table(cls, value: Any) -> Any:
        return {"table": value} if isinstance(value, str) else value
