"""Stage 2: learn one task from a backbone with one protocol and one amount of labels.

The smallest unit of work is a `Cell`, which becomes one cell of a table. A protocol gets everything
that it needs from its bench (`stages/bench.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sslrun import distributed
from sslrun.backbones.base import backbones
from sslrun.data.source import sources
from sslrun.errors import UserError
from sslrun.protocols import Scores, protocols
from sslrun.recipe import Evaluation, Named, Recipe
from sslrun.recipe.fit import unreadable
from sslrun.runs import Run, component_identity
from sslrun.seeds import LARGEST_SEED
from sslrun.stages.bench import CellBench
from sslrun.stages.context import Context, perform
from sslrun.stages.devices import devices_identity, on_known_devices
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.weights import InitialWeights
from sslrun.tasks.base import TaskOptions

RESTART = LARGEST_SEED + 1
"""Distance between the seeds of two restarts: larger than any seed of a sweep."""


@dataclass(frozen=True)
class Cell:
    """One job: a recipe's task, a protocol, an amount of labels, a seed and a restart."""

    recipe: Recipe
    task: str
    protocol: str
    labels: float
    """A share of the labels in (0, 1], or a number per class."""
    seed: int
    origin: InitialWeights
    root: Path
    restart: int = 0
    devices: int = field(default_factory=distributed.device_count)
    """The number of devices to train on."""
    choosing: bool = False
    """Whether it learns from the training split alone although the evaluation refits, so that a
    cell that follows it can choose on validation."""
    validation_only: bool = False
    """Whether it is scored on validation alone, for a search; its test split is never read."""

    @property
    def refits(self) -> bool:
        """Whether the tested model learns from the training and the validation split."""
        return self.evaluation.refit and not (self.choosing or self.validation_only)

    @property
    def evaluation(self) -> Evaluation:
        return self.recipe.evaluate[self.task]

    @property
    def title(self) -> str:
        options, is_initial = self.recipe.backbone.options, protocols[self.protocol].initial
        brings_weights = not is_initial and getattr(options, "pretrained", False)
        initial = "pretrained" if brings_weights else "no pretraining"
        parts = (
            f"{self.task} {self.labels:.4g}",
            self.recipe.backbone.name,
            self.pretext or initial,
            self.protocol,
            f"seed {self.seed}" + (f".{self.restart}" if self.restart else ""),
        )
        return " · ".join(parts)

    @property
    def pretext(self) -> str | None:
        """The backbone's pretext task, or its file of weights; None if not pretrained."""
        if protocols[self.protocol].initial:
            return None
        if self.recipe.pretext is not None:
            return self.recipe.pretext.name
        return None if self.origin.weights is None else self.origin.weights.name

    @property
    def needs(self) -> tuple[Pretraining | Cell, ...]:
        """The jobs that must run first: pretraining, and the cells that this one follows."""
        before = (self.origin.pretraining, self.follows, self.chooses_from)
        return tuple(job for job in before if job is not None)

    @property
    def reads(self) -> tuple[Named, ...]:
        """The data sets that the job reads."""
        return self.evaluation.reads

    @cached_property
    def follows(self) -> Cell | None:
        """The cell whose head this one starts from: the same features, labels, seed and restart."""
        name = protocols[self.protocol].follows
        if name is None:
            return None
        restart = min(self.restart, self.evaluation.restarts_of(name) - 1)
        followed = replace(self, protocol=name, restart=restart)
        return followed.on_known_devices()

    @property
    def _trains(self) -> bool:
        """Whether anything is trained in steps.

        If so, each device draws its own views and dropout and has its own batch norm, so that their
        number may change the result.
        """
        return self.evaluation.protocol(self.protocol).trains(self._task_options)

    @property
    def _task_options(self) -> TaskOptions:
        options = self.evaluation.task.options
        assert isinstance(options, TaskOptions)
        return options

    def on_known_devices(self) -> Cell:
        """This cell, or the one for another number of devices if only that is finished."""
        return on_known_devices(
            lambda devices: replace(self, devices=devices), self.root / self.recipe.name
        )

    @property
    def chooses_from(self) -> Cell | None:
        """The cell that this one follows while it chooses on validation, if it refits later."""
        if self.follows is None or not self.refits:
            return None
        chooses = self.evaluation.protocol(self.protocol).chooses(self._task_options)
        return replace(self.follows, choosing=True) if chooses else None

    def followed(self, context: Context, split: str) -> Path:
        """Return the run's folder of a cell that this one follows; evaluate it if needed.

        `split` is what that cell learned from.
        """
        cell = self.chooses_from if self.refits and split == "train" else self.follows
        if cell is None:
            raise ValueError(
                f"protocol '{self.protocol}' follows no other: it has no head to start from"
            )
        cell.execute(context)
        return cell.run.path

    @property
    def training_seed(self) -> int:
        """The seed of a new head and of the order of the data."""
        return self.seed + RESTART * self.restart

    @cached_property
    def run(self) -> Run:
        evaluation = self.evaluation
        protocol = evaluation.protocol(self.protocol)
        identity = {
            "origin": self.origin.identity,
            "backbone": self.recipe.backbone.identity(),
            "data": evaluation.data.identity(),
            "task": evaluation.task.identity(),
            "labels": self.labels,
            "options": {**protocol.identity(), **component_identity(type(protocol))} or None,
            "head": None if self.follows is None else self.follows.run.hash,
            "seed": self.training_seed,
            **devices_identity(self.devices, self._trains),
        }
        if self.refits:
            identity["refit"] = True
        if self.validation_only:
            identity["validation_only"] = True
        elif evaluation.shifts:
            shifts = evaluation.shifts.items()
            identity["shifts"] = {name: shift.identity() for name, shift in shifts}
        return Run(self.root, self.recipe.name, self.protocol, identity)

    def execute(self, context: Context) -> dict[str, Any]:
        """Evaluate unless the run is finished, and return its result.

        Raises UserError if the pretrained checkpoint is missing.
        """
        if not self.origin.exists:
            raise UserError(
                f"no pretrained checkpoint for recipe '{self.recipe.name}' (seed {self.seed}): "
                f"{self.origin.weights} is missing; remove its folder, and pretrain again"
            )
        body = partial(self._body, context)
        return perform(self.run, self.recipe.resolved(), context, body, self.reads)

    def _body(self, context: Context) -> dict[str, Any]:
        began = time.monotonic()
        with context.stop.unsaved():
            bench = CellBench(self, context)
        for name, classes in bench.dropped.items():
            counts = ", ".join(f"{label} ({count})" for label, count in classes.items())
            bench.say(
                f"{name}: examples of classes that the task does not have are left out: {counts}"
            )
        if colors := self._describe_rounding():
            bench.say(colors)
        with context.stop.unsaved():
            scores = bench.method.run(bench)
        self._check(scores, bench)
        metrics = scores.metrics
        if not self.validation_only:
            bench.keep_predictions(metrics["test"])
        return {
            "stage": self.protocol,
            "protocol": self.protocol,
            "recipe": self.recipe.name,
            "backbone": self.recipe.backbone.name,
            "pretext": self.pretext,
            "task": self.task,
            "suite": sources[self.evaluation.data.name].suite,
            "labels": self.labels,
            "labelled": len(bench.chosen(bench.learned)) if bench.method.learns else 0,
            "seed": self.seed,
            "restart": self.restart,
            "metric": bench.task.primary.as_dict(),
            "metrics": {split: metrics[split] for split in ("val", "test") if split in metrics},
            **({"shifts": bench.over_parts(metrics)} if bench.shifted else {}),
            **({"dropped": bench.dropped} if bench.dropped else {}),
            **scores.details,
            "flops": bench.flops,
            "seconds": round(time.monotonic() - began + bench.seconds_before_resume, 3),
        }

    def _describe_rounding(self) -> str | None:
        """Warn of an augmentation whose colors the backbone rounds to those of its palette."""
        settings = self._task_options.recoloring
        name = self.recipe.backbone.name
        if not settings or "palette" not in backbones[name].offers:
            return None
        if not self.evaluation.protocol(self.protocol).trains(self._task_options):
            return None
        return (
            f"task.{', task.'.join(settings)} makes colors that may not be in the palette of "
            f"'{name}', which rounds them: leave it out"
        )

    def _check(self, scores: Scores, bench: CellBench) -> None:
        """Raise UserError unless every split that counts has the task's primary metric."""
        metric = bench.task.primary.name
        if self.validation_only and metric not in scores.metrics.get("val", {}):
            raise UserError(
                f"search.objective: protocol '{self.protocol}' gives no {metric} on validation: "
                "choose another protocol"
            )
        missing = [split for split in bench.tests if metric not in scores.metrics.get(split, {})]
        if missing:
            raise UserError(
                f"protocol '{self.protocol}' returned no '{metric}' for {', '.join(missing)}: "
                "its Scores should hold the task's first metric for every split of bench.tests"
            )


def cells(
    recipe: Recipe,
    seed: int,
    root: Path,
    only: Sequence[str] | None = None,
    source: Path | None = None,
) -> list[Cell]:
    """List the cells of a recipe.

    `only` limits them to some protocols. `source` is a file or a run's folder whose weights replace
    the recipe's own. Raises UserError if one of these protocols cannot learn one of the tasks.
    """
    pretrained = (
        InitialWeights.file(source)
        if source is not None
        else InitialWeights.pretrained(recipe, seed, root)
    )
    planned: list[Cell] = []
    for task, evaluation in recipe.evaluate.items():
        for protocol in only or evaluation.protocols:
            check_supported(recipe, task, protocol)
            initial = protocols[protocol].initial
            origin = InitialWeights.initial(recipe, seed) if initial else pretrained
            planned += [
                Cell(recipe, task, protocol, labels, seed, origin, root, restart).on_known_devices()
                for labels in evaluation.labels_of(protocol)
                for restart in range(evaluation.restarts_of(protocol))
            ]
    return planned


def check_supported(recipe: Recipe, task: str, protocol: str) -> None:
    """Raise UserError if a protocol cannot learn a task of a recipe."""
    evaluation = recipe.evaluate[task]
    reason = evaluation.obstacle(protocol) or unreadable(
        evaluation.protocol(protocol), backbones[recipe.backbone.name]
    )
    if reason:
        raise UserError(f"{recipe.name}: evaluate.{task}: {reason}")
