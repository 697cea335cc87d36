"""What a recipe and a sweep say, as typed objects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from sslrun.data.shifts import ID, MEAN_SHIFT, Shift
from sslrun.protocols.base import Protocol, protocols
from sslrun.registry import Options
from sslrun.runs import component_identity, hash_contents
from sslrun.tasks.base import TaskOptions
from sslrun.training.schedule import Schedule


class Named(BaseModel):
    """A component by name, with its options checked against the class of that name."""

    model_config = ConfigDict(frozen=True)
    name: str
    options: SerializeAsAny[Options]
    component: type[Any] | None = Field(None, exclude=True, repr=False)
    """The class that the name stands for; its version and, for a plug-in, its source are part of a
    run's hash."""

    def as_dict(self) -> dict[str, Any]:
        """The component as a recipe writes it, with every default."""
        return {"name": self.name, **self.options.model_dump(mode="json")}

    def identity(self) -> dict[str, Any]:
        """What the component adds to a run's hash, as JSON values.

        Its name, the options that differ from the defaults, digests of the files that they name,
        and what `component_identity` says of its class. Keys with a dot cannot be mistaken for
        options.
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


class Pretrain(Schedule):
    """Stage 1: the schedule of pretraining."""

    seed: int | None = Field(None, ge=0)
    """Fixed pretraining seed, shared by evaluations of all seeds; default: each evaluation uses its
    own seed."""


class Watch(Options):
    """Monitoring during a run. These options never change a result, so the run's hash excludes them."""

    every: float = Field(10.0, gt=0)
    """Epochs between two feature checks: online kNN, standard deviation, effective rank."""
    examples: int = Field(2000, ge=64)
    """Maximum number of held-out examples per feature check, and of training examples."""
    checkpoint: float = Field(10.0, gt=0)
    """Minutes between two checkpoints."""
    to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers in addition to metrics.jsonl; each needs the optional extra of the same name."""


def _share_or_count(labels: float) -> float:
    if not (0 < labels <= 1 or (labels > 1 and labels == int(labels))):
        raise ValueError("should be a share in (0, 1], or a whole number of labels a class")
    return labels


def _shift_name(name: str) -> str:
    if not name:
        raise ValueError("a shift's name should not be empty")
    if name in (ID, MEAN_SHIFT):
        raise ValueError(f"'{name}' is a column of the table already; name the shift otherwise")
    return name


class Evaluation(BaseModel):
    """One task of a recipe: its data, how it is learned, and from how many labels."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    data: Named
    """Labeled data; default: the data set that the evaluation is named after."""
    task: Named
    """What is learned from the labels; default: the task that the data's labels are for."""
    protocols: tuple[str, ...]
    """Ways to learn the task; see `sslrun show protocol`."""
    labels: tuple[Annotated[float, AfterValidator(_share_or_count)], ...] = Field(
        (1.0,), min_length=1
    )
    """Shares of the training labels, class-balanced and nested; a whole number above 1 is a number
    of labels per class."""
    restarts: int = Field(1, ge=1)
    """Times that each protocol which trains step by step is run from the same pretrained weights,
    each with a new head and another order of the data (BERT's fine-tuning restarts). A protocol
    with one solution is run once."""
    shifts: dict[Annotated[str, AfterValidator(_shift_name)], Shift] = {}
    """Test sets out of distribution, by name: every protocol reports them too, but never uses them
    for model selection."""
    options: dict[str, SerializeAsAny[Options]]
    """Protocol -> its options: the recipe's, with this task's own changes. Holds every registered
    protocol."""

    @property
    def reads(self) -> tuple[Named, ...]:
        """The data sets that it reads: its own, and those of its shifts."""
        return (self.data, *(each.data for each in self.shifts.values() if each.data is not None))

    def protocol(self, name: str) -> Protocol:
        """A protocol with its options for this task."""
        return protocols[name](self.options[name])

    def restarts_of(self, protocol: str) -> int:
        """How often a protocol is run."""
        assert isinstance(self.task.options, TaskOptions)
        return self.restarts if self.protocol(protocol).trains(self.task.options) else 1

    def labels_of(self, protocol: str) -> tuple[float, ...]:
        """The amounts of labels that a protocol learns from."""
        return self.protocol(protocol).labels(self.labels)


class Weights(BaseModel):
    """A file of pretrained weights, in place of pretraining."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    file: Path
    """A pretraining run's folder, or a .safetensors file with the names of sslrun, timm,
    torchvision or transformers."""
    mean: tuple[float, float, float] | None = None
    """Per-channel mean that images in [0, 1] are normalized by; default: the file's own, else
    ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation; default: the file's own, else ImageNet's."""

    @model_validator(mode="before")
    @classmethod
    def _a_path_alone(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else given


class Recipe(BaseModel):
    """One experiment: a backbone, a pretext task, data, a schedule, and evaluations."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the folder of the runs: letters, digits, '.', '_' and '-'."""
    backbone: Named
    """The network; see `sslrun show backbone`."""
    pretext: Named | None = None
    """The pretext task; null: no pretraining, evaluations start from the initial weights. See
    `sslrun show pretext`."""
    data: Named
    """The data to pretrain on; see `sslrun show data`."""
    pretrain: Pretrain | None = None
    """The schedule of pretraining; see `sslrun show section pretrain`."""
    weights: Weights | None = None
    """Weights that evaluations start from if nothing is pretrained and --from is not given."""
    watch: Watch = Watch()
    """What is monitored during training; see `sslrun show section watch`."""
    evaluate: dict[str, Evaluation] = {}
    """Evaluations by name; see `sslrun show section evaluation`."""

    @property
    def choices(self) -> list[str]:
        """What its components choose where their papers are silent."""
        named = [
            self.backbone,
            *([self.pretext] if self.pretext else []),
            *(e.task for e in self.evaluate.values()),
        ]
        return list(dict.fromkeys(each for part in named for each in part.options.choices()))

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as a mapping that `parse` reads back to an equal recipe."""
        given: dict[str, Any] = {
            "name": self.name,
            "backbone": self.backbone.as_dict(),
            "pretext": self.pretext.as_dict() if self.pretext else None,
            "data": self.data.as_dict(),
            "pretrain": self.pretrain.model_dump(mode="json") if self.pretrain else None,
            "weights": self.weights.model_dump(mode="json", exclude_none=True)
            if self.weights
            else None,
            "watch": self.watch.model_dump(mode="json"),
            "evaluate": {
                key: {
                    "data": evaluation.data.as_dict(),
                    "task": evaluation.task.as_dict(),
                    "protocols": list(evaluation.protocols),
                    "labels": list(evaluation.labels),
                    "restarts": evaluation.restarts,
                    "shifts": {name: shift.as_dict() for name, shift in evaluation.shifts.items()},
                    **{
                        protocol: options.model_dump(mode="json")
                        for protocol, options in evaluation.options.items()
                        if type(options).model_fields
                    },
                }
                for key, evaluation in self.evaluate.items()
            },
        }
        return {key: value for key, value in given.items() if value is not None}


class Against(BaseModel):
    """A published table that a sweep's stands beside."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    table: str
    """Name of the published table; see `sslrun show table`."""
    columns: dict[str, str] = {}
    """Task of the sweep -> the published column that it stands in for: of the same kind, on other
    data."""


class Sweep(BaseModel):
    """A base recipe, rows (named changes to it), columns (tasks), and seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    name: str
    """Names the folder of the sweep's tables."""
    rows: dict[str, Recipe]
    """Changes to `base` by row of the table; keys may be dotted, as `pretrain.epochs`."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    """Seeds that every row is run with."""
    title: str | None = None
    """Title of the table; default: the name."""
    against: Against | None = None
    """The published table that this sweep's table stands beside: its name, or `{table: ...,
    columns: ...}`."""
    jobs: int = Field(1, ge=1)
    """Worker processes that share the runs; --jobs takes precedence."""

    _against_at: str | None = PrivateAttr(None)

    @property
    def against_at(self) -> str:
        """Where `against` was written, as file:line; the sweep's name if that is unknown."""
        return self._against_at or self.name

    @field_validator("against", mode="before")
    @classmethod
    def _named_alone(cls, given: Any) -> Any:
        return {"table": given} if isinstance(given, str) else given
