"""Stage 2: one task learned from a backbone by one protocol, from a share of the labels.

The smallest piece of work is a `Cell`, which becomes one cell of a table. Frozen backbones run once: their features
are kept for the next cell that reads the same ones.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sslrun import distributed
from sslrun.backbones import build_backbone, load_into, save_backbone
from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.shifts import ID, Part, Shift, make_parts
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec
from sslrun.data.splits import Splits, load_splits, select_labeled
from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.protocols.frozen_math import (
    Classifier,
    LogisticRegression,
    classical,
    extract,
    least_squares,
    weighted_knn,
)
from sslrun.protocols.options import CLASSICAL, Finetune
from sslrun.recipe import Evaluation, Named, Recipe
from sslrun.runs import Run
from sslrun.stages.context import Context, perform
from sslrun.stages.fit import fit
from sslrun.stages.logging import logs
from sslrun.stages.pretrain import WEIGHTS, Pretraining
from sslrun.tasks.base import Task, TaskLearner, outputs_of, tasks
from sslrun.training.flops import flop_counter
from sslrun.training.loop import NonFinite, Training
from sslrun.training.schedule import Schedule

HEAD = "head.safetensors"
BEST = "best.safetensors"
RESTART = 10_000
"""Between the seeds of two restarts: no seed of a sweep is that large."""
EVAL_BATCH = 256
"""Examples run at a time where nothing is trained."""


@dataclass(frozen=True)
class InitialWeights:
    """Where an evaluation's backbone comes from."""

    identity: dict[str, Any]
    """What determines its weights."""
    weights: Path | None = None
    """None: as initialised by the seed."""
    pretraining: Pretraining | None = None
    """The job that makes the weights, where the recipe has one."""
    normalisation: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """`mean` and `std` of the images' channels, in place of what the weights say."""

    @property
    def exists(self) -> bool:
        """Whether the weights are there, or none are needed."""
        return self.weights is None or self.weights.is_file()

    @classmethod
    def initial(cls, recipe: Recipe, seed: int) -> InitialWeights:
        return cls({"initial": recipe.backbone.identity(), "seed": seed})

    @classmethod
    def pretrained(cls, recipe: Recipe, seed: int, root: Path) -> InitialWeights:
        """The recipe's own pretraining, or the weights it names; the initial ones where it names neither."""
        if recipe.weights is not None:
            return cls.file(recipe.weights.file, recipe.weights.model_dump(include={"mean", "std"}, exclude_none=True))
        if recipe.pretext is None:
            return cls.initial(recipe, seed)
        job = Pretraining(recipe, seed, root)
        return cls({"pretrain": job.run.hash}, job.weights, job)

    @classmethod
    def file(cls, path: Path, normalisation: dict[str, tuple[float, ...]] | None = None) -> InitialWeights:
        """A run's folder or a file of weights. UserError: there is none."""
        weights, normalisation = path / WEIGHTS if path.is_dir() else path, normalisation or {}
        if not weights.is_file():
            raise UserError(f"{path}: no checkpoint there; name a pretraining run's folder or its {WEIGHTS}")
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls({"checkpoint": digest, **normalisation}, weights, normalisation=normalisation)


@dataclass(frozen=True)
class Cell:
    """A task of a recipe, a protocol, a share of the labels (few-shot: a number a class), a seed and a restart: a job
    that makes a run."""

    recipe: Recipe
    task: str
    protocol: str
    labels: float
    seed: int
    origin: InitialWeights
    root: Path
    restart: int = 0

    @property
    def evaluation(self) -> Evaluation:
        return self.recipe.evaluate[self.task]

    @property
    def title(self) -> str:
        return (
            f"{self.task} {self.labels:.4g} · {self.recipe.backbone.name} · {self.pretext or 'no pretraining'} · {self.protocol} · seed {self.seed}"
            + (f".{self.restart}" if self.restart else "")
        )

    @property
    def pretext(self) -> str | None:
        """What the backbone was pretrained on: a pretext task, or the file its weights are from; None where on nothing."""
        if self.protocol == "scratch":
            return None
        if self.recipe.pretext is not None:
            return self.recipe.pretext.name
        return None if self.origin.weights is None else self.origin.weights.name

    @property
    def options(self) -> Any:
        """The protocol's options; None where it has none."""
        return getattr(self.evaluation.options, self.protocol, None)

    @property
    def needs(self) -> tuple[Pretraining | Cell, ...]:
        """The jobs that come before: pretraining; for lpft the probe that gives the head."""
        before = () if self.origin.pretraining is None else (self.origin.pretraining,)
        return (*before, self.probe) if self.protocol == "lpft" else before

    @property
    def reads(self) -> tuple[Named, ...]:
        """The data sets that it reads."""
        return self.evaluation.reads

    @property
    def probe(self) -> Cell:
        """The probe of the same features from the same labels; the same restart's, if it has any."""
        return replace(self, protocol="probe", restart=min(self.restart, self.evaluation.restarts_of("probe") - 1))

    @property
    def training_seed(self) -> int:
        """The seed of a fresh head and of the order of the data."""
        return self.seed + RESTART * self.restart

    @cached_property
    def run(self) -> Run:
        evaluation = self.evaluation
        identity = {
            "origin": self.origin.identity,
            "backbone": self.recipe.backbone.identity(),
            "data": evaluation.data.identity(),
            "task": evaluation.task.identity(),
            "labels": self.labels,
            "options": None if self.options is None else self.options.model_dump(mode="json", exclude={"shots"}),
            "head": self.probe.run.hash if self.protocol == "lpft" else None,
            "seed": self.training_seed,
        }
        if evaluation.shifts:
            identity["shifts"] = {name: shift.identity() for name, shift in evaluation.shifts.items()}
        return Run(self.root, self.recipe.name, self.protocol, identity)

    def execute(self, context: Context) -> dict[str, Any]:
        """Evaluate, unless it is done, and return the run's result. UserError: no pretrained checkpoint."""
        if not self.origin.exists:
            raise UserError(f"no pretrained checkpoint for recipe '{self.recipe.name}' (seed {self.seed})")
        return perform(self.run, self.recipe.resolved(), context, partial(self._body, context))

    def _body(self, context: Context) -> dict[str, Any]:
        began = time.monotonic()
        with context.stop.reading():
            splits = _splits(self.evaluation.data)
            task = tasks[self.evaluation.task.name](self.evaluation.task.options, splits.spec, splits.classes)
            chosen = select_labeled(splits.train, self.labels, self.seed, per_class=self.protocol == "fewshot")
            work = Work(self, context, splits, task, chosen, _shifted(self.evaluation))
        for name, classes in work.dropped.items():
            told = ", ".join(f"{each} ({count})" for each, count in classes.items())
            context.reporter.say(
                f"{self.title}: {name}: examples of classes that the task has not are left out: {told}"
            )
        context.stop.check()
        metrics, details = work.classical() if self.protocol in CLASSICAL else getattr(work, self.protocol)()
        return {
            "stage": self.protocol,
            "protocol": self.protocol,
            "recipe": self.recipe.name,
            "backbone": self.recipe.backbone.name,
            "pretext": self.pretext,
            "task": self.task,
            "suite": sources[self.evaluation.data.name].suite,
            "labels": self.labels,
            "labelled": len(chosen),
            "seed": self.seed,
            "restart": self.restart,
            "metric": task.primary.name,
            "metrics": {split: metrics[split] for split in ("val", "test")},
            **({"shifts": work.of_shifts(metrics)} if work.shifted else {}),
            **({"dropped": work.dropped} if work.dropped else {}),
            **details,
            "flops": work.flops,
            "seconds": round(time.monotonic() - began + work.earlier, 3),
        }


def cells(
    recipe: Recipe, seed: int, root: Path, protocols: Sequence[str] | None = None, source: Path | None = None
) -> list[Cell]:
    """All cells of a recipe; of some protocols only, or from given weights, where asked."""
    pretrained = InitialWeights.pretrained(recipe, seed, root) if source is None else InitialWeights.file(source)
    return [
        Cell(
            recipe,
            task,
            protocol,
            labels,
            seed,
            InitialWeights.initial(recipe, seed) if protocol == "scratch" else pretrained,
            root,
            restart,
        )
        for task, evaluation in recipe.evaluate.items()
        for protocol in protocols or evaluation.protocols
        for labels in evaluation.labels_of(protocol)
        for restart in range(evaluation.restarts_of(protocol))
    ]


def _splits(data: Named) -> Splits:
    """A data set's splits, loaded once for all cells that follow one another on it."""
    return _loaded(data.name, data.options.model_dump_json())


def _shifted(evaluation: Evaluation) -> dict[str, dict[str, Part]]:
    """Of each shift its parts, loaded once for all cells that follow one another on them."""
    given = {name: shift.as_dict() for name, shift in evaluation.shifts.items()}
    return _parts(evaluation.data.name, evaluation.data.options.model_dump_json(), json.dumps(given)) if given else {}


@lru_cache(maxsize=2)
def _parts(name: str, options: str, shifts: str) -> dict[str, dict[str, Part]]:
    own = _loaded(name, options)
    found = {}
    for shift, given in json.loads(shifts).items():
        other = given.get("data")
        if other is not None and isinstance(own.spec, ImageSpec):
            other["size"] = own.spec.size  # whatever size it has of its own
        splits = other and _loaded(other.pop("name"), json.dumps(other))
        found[shift] = make_parts(shift, Shift(**given), own, splits)
    return found


@lru_cache(maxsize=8)
def _loaded(name: str, options: str) -> Splits:
    return load_splits(name, sources[name].Options.model_validate_json(options))


Scores = tuple[dict[str, dict[str, float]], dict[str, Any]]
"""Metrics by split, and what else is worth keeping of how they came about."""


@dataclass
class Work:
    """A cell at work: each protocol is a method, and gives metrics by split and what else is worth keeping."""

    cell: Cell
    context: Context
    splits: Splits
    task: Task
    chosen: Tensor
    """Indices of the labelled training examples."""
    shifted: dict[str, dict[str, Part]]
    """What else it is scored on, by shift and part."""
    flops: float | None = 0.0
    """Of all passes over training examples; None where it isn't known."""
    earlier: float = 0.0
    """Seconds that its trainings took before they were interrupted."""

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Every part of every shift, by a name of its own."""
        return {f"{shift}: {part}": made for shift, parts in self.shifted.items() for part, made in parts.items()}

    @property
    def tests(self) -> tuple[str, ...]:
        """What is scored once all is chosen."""
        return ("test", *self.parts)

    def of_shifts(self, metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Metrics of each shift: the mean over its parts."""
        found = {}
        for shift, parts in self.shifted.items():
            scores = [metrics[f"{shift}: {part}"] for part in parts]
            found[shift] = {name: fmean(each[name] for each in scores) for name in scores[0]}
        return found

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """Of each shift how many examples of which classes are left out."""
        parts = {shift: part for shift, parts in self.shifted.items() for part in parts.values()}
        return {shift: dict(part.dropped) for shift, part in parts.items() if part.dropped}

    # ------------------------------------------------------------ frozen backbones

    def knn(self) -> Scores:
        self._needs_vectors()
        options = self.cell.options
        bank, labels = self._features("train")

        def outputs(queries: Tensor) -> Tensor:
            return weighted_knn(bank, labels, queries, options.k, options.temperature, len(self.task.classes))

        return self._frozen_scores(outputs), {}

    def probe(self) -> Scores:
        options = self.cell.options
        if options.solver == "sgd" or not self.task.linear:
            learner = self._train(TaskLearner(self._backbone(), self.task, frozen=True), options.sgd, "probe")
            self._keep_head(learner.head)
            return {split: self._scores(learner, split) for split in ("val", *self.tests)}, {}
        fit = LogisticRegression(options).fit(
            *self._features("train"), *self._features("val"), len(self.task.classes), self._primary
        )
        self._keep_head(fit.head)
        with torch.inference_mode():
            return self._frozen_scores(fit.head), {"l2": fit.l2}

    def fewshot(self) -> Scores:
        self._needs_vectors()
        head = least_squares(*self._features("train"), len(self.task.classes), self.cell.options.l2)
        self._keep_head(head)
        with torch.inference_mode():
            return self._frozen_scores(head), {}

    def _needs_vectors(self) -> None:
        if not self.task.linear:
            raise UserError(
                f"{self.cell.protocol} needs one vector and one class an example, which the task "
                f"'{self.cell.evaluation.task.name}' of '{self.cell.task}' has not: take probe, finetune, lpft or scratch"
            )

    def classical(self) -> Scores:
        self._needs_vectors()
        tests = {split: self._features(split) for split in self.tests}
        fit = classical(
            cast(Classifier, self.cell.protocol), *self._features("train"), *self._features("val"),
            torch.cat([x for x, _ in tests.values()]), len(self.task.classes), self.cell.seed,
        )  # fmt: skip
        scores = fit.scores.split([len(y) for _, y in tests.values()])
        metrics = {"val": {"accuracy": fit.accuracy}}
        for (split, (_, y)), each in zip(tests.items(), scores, strict=True):
            metrics[split] = self.task.measure(self._told(split, each), y.cpu())
        return metrics, {"chosen": fit.chosen}

    def _frozen_scores(self, outputs: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
        """Metrics of `outputs` of frozen features on validation and whatever is tested."""
        found = {split: self._features(split) for split in ("val", *self.tests)}
        return {split: self.task.measure(self._told(split, outputs(x)), y) for split, (x, y) in found.items()}

    def _told(self, split: str, outputs: Tensor) -> Tensor:
        """The outputs in the classes that a split tells apart."""
        return self.parts[split].merge_classes(outputs) if split in self.parts else outputs

    def _primary(self, outputs: Tensor, targets: Tensor) -> float:
        return self.task.measure(outputs, targets)[self.task.primary.name]

    def _features(self, split: str) -> tuple[Tensor, Tensor]:
        """Frozen features (N, D) and labels (N,) of a split; of train the labelled examples alone."""
        x, flops = self._before(split)
        y = self.task.targets(self._split(split)).to(x.device)
        if split != "train":
            return x, y
        self.flops = flops * len(self.chosen)
        return x[self.chosen], y[self.chosen]

    def _before(self, split: str) -> tuple[Tensor, float]:
        """Of the backbone before any training one vector an example (N, D), and the FLOPs of an example's."""
        told = split.split(":")[0]
        of = (split, repr(self.cell.evaluation.shifts[told]) if split in self.parts else "")
        key = (repr(self.cell.origin), repr(self.cell.evaluation.data), repr(self.cell.evaluation.task), *of)
        kept = self.context.features
        if key not in kept:
            for other in [each for each in kept if each[:3] != key[:3]]:
                del kept[other]
            backbone, compute = self._backbone(), self.context.compute
            examples, counter = self._split(split), flop_counter()
            with compute.autocast():
                x = extract(backbone, examples, self.task.inputs, compute.device, EVAL_BATCH, self.task.vector, counter)
            kept[key] = x, counter.get_total_flops() / min(EVAL_BATCH, len(examples))
        return kept[key]

    # ------------------------------------------------------------ trained backbones

    def finetune(self) -> Scores:
        return self._finetuned(None)

    def scratch(self) -> Scores:
        return self._finetuned(None)

    def lpft(self) -> Scores:
        self.cell.probe.execute(self.context)
        return self._finetuned(load_file(self.cell.probe.run.path / HEAD))

    def _finetuned(self, head: dict[str, Tensor] | None) -> Scores:
        """Train everything with each learning rate; the one that is best on validation (of equals the last) is kept and
        tested. One of several at which training diverges is no candidate. NonFinite: it does at all of them."""
        options: Finetune = self.cell.options
        rates = options.lr if isinstance(options.lr, tuple) else (options.lr,)
        tried: dict[float, float | None] = {}
        best: TaskLearner | None = None
        val: dict[str, float] = {}
        diverged: NonFinite | None = None
        for lr in rates:
            backbone = self._backbone(options.drop_path)
            torch.manual_seed(self.cell.training_seed)
            learner = TaskLearner(backbone, self.task, frozen_norm=options.frozen_norm)
            if head is not None:
                learner.head.load_state_dict(head)
            schedule = options.model_copy(update={"lr": lr})
            try:
                learner = self._train(learner, schedule, f"lr-{lr:g}", best=options.keep == "best")
            except NonFinite as error:
                diverged, tried[lr] = error, None
                continue
            scores = self._scores(learner, "val")
            tried[lr] = scores[self.task.primary.name]
            if best is None or scores[self.task.primary.name] >= val[self.task.primary.name]:
                best, val, chosen = learner, scores, lr
        if best is None:
            assert diverged is not None
            raise diverged
        if distributed.is_main():
            save_backbone(self.cell.run.path / WEIGHTS, best.backbone, {"recipe": self.cell.recipe.name})
            self.splits.spec.save(self.cell.run.path)
        self._keep_head(best.head)
        details: dict[str, Any] = {"lr": chosen, "tried": {f"{lr:g}": v for lr, v in tried.items()}}
        metrics, moved = self._tested(best)
        if moved:
            id_, shifted = moved["test"], self.of_shifts(moved)
            details["distortion"] = {ID: id_["distance"]} | {name: each["distance"] for name, each in shifted.items()}
            details["feature_length"] = id_["length"]
        return {"val": val, **metrics}, details

    def _tested(self, learner: TaskLearner) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """Metrics of each test, and how far training moved its features; of those that began at random nothing.

        The distance is the mean Euclidean one between an example's features before and after (Kumar et al., ICLR 2022,
        section 4.3); the length is the mean of those before.
        """
        metrics, moved = {}, {}
        for split in self.tests:
            outputs, after = self._outputs(split, learner.predict_and_read)
            metrics[split] = self.task.score(outputs, self._split(split))
            if self.cell.protocol != "scratch":
                before, _ = self._before(split)
                distance, length = (each.norm(dim=1).mean().item() for each in (after - before, before))
                moved[split] = {"distance": distance, "length": length}
        return metrics, moved

    def _train(self, learner: TaskLearner, schedule: Schedule, attempt: str, best: bool = False) -> TaskLearner:
        """Train on the labelled examples; returns what to evaluate, in eval mode (the averaged weights, if averaged).

        `best`: as it was at whichever epoch's end it was best on validation. A batch holds no more than there are labels:
        one recipe serves every share of them.
        """
        examples = self.context.compute.place(self._split("train").subset(self.chosen))
        schedule = schedule.within(len(examples))
        torch.manual_seed(self.cell.training_seed)
        training = Training(learner, schedule, self.context.compute)
        run = self.cell.run
        folder = run.checkpoints / attempt
        minutes = self.cell.recipe.watch.checkpoint
        epoch, kept = schedule.steps_an_epoch(len(examples)), folder / BEST
        with logs(run, ()) as log:
            for step in fit(
                training, examples, self.cell.training_seed, run, self.context, self.cell.title, log,
                minutes=minutes, folder=folder,
            ):  # fmt: skip
                if best and distributed.is_main() and (step.last or step.step % epoch == 0):
                    self._keep_best(training.averaged, kept)
                    training.learner.train()
        total = schedule.total_steps(len(examples))
        self.flops = None if self.flops is None or training.flops is None else self.flops + training.flops * total
        self.earlier += training.seconds_before_resume
        if best:
            distributed.wait()  # the first process has written them
            training.averaged.load_state_dict(load_file(kept))
        return training.averaged.eval()

    def _keep_best(self, learner: TaskLearner, path: Path) -> None:
        """Write a learner's weights, unless those that lie there score as well on validation.

        They outlive the process: one that resumes from a checkpoint has looked at every epoch before it.
        """
        score = self._scores(learner.eval(), "val")[self.task.primary.name]
        if path.exists():
            with safe_open(path, "pt") as file:
                if float(file.metadata()["score"]) >= score:
                    return
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: each.detach().clone().contiguous() for name, each in learner.state_dict().items()}
        with replacing(path) as temporary:
            save_file(whole, temporary, {"score": repr(score)})

    def _scores(self, learner: TaskLearner, split: str) -> dict[str, float]:
        """Metrics of a trained learner on a whole split."""
        (outputs,) = self._outputs(split, lambda batch: (learner.predict(batch),))
        return self.task.score(outputs, self._split(split))

    def _outputs(self, split: str, run: Callable[[Batch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `run` gives for every example of a split, the first of it in the classes that the split tells apart."""
        compute = self.context.compute
        with compute.autocast():
            outputs, *rest = outputs_of(self._split(split), run, compute.device, EVAL_BATCH)
        return self._told(split, outputs), *rest

    # ------------------------------------------------------------ shared

    def _split(self, split: str) -> Examples:
        examples: Examples = self.parts[split].examples if split in self.parts else getattr(self.splits, split)
        return examples

    def _backbone(self, drop_path: float | None = None) -> Backbone:
        """The backbone of the cell's origin, on the device."""
        named, weights = self.cell.recipe.backbone, self.cell.origin.weights
        options = named.options if drop_path is None else named.options.model_copy(update={"drop_path": drop_path})
        if self.cell.protocol == "scratch" and "pretrained" in type(options).model_fields:
            options = options.model_copy(update={"pretrained": False})
        torch.manual_seed(self.cell.training_seed if self.cell.protocol == "scratch" else self.cell.seed)
        backbone = build_backbone(named.name, options, self.task.backbone_spec)
        if weights is None:
            backbone.fit_inputs(self.splits.train)
        else:
            load_into(backbone, weights)
            for name, values in self.cell.origin.normalisation.items():
                backbone.get_buffer(name).copy_(torch.tensor(values))
        return backbone.to(self.context.compute.device)

    def _keep_head(self, head: nn.Module) -> None:
        if distributed.is_main():
            with replacing(self.cell.run.path / HEAD) as temporary:
                save_file({name: each.contiguous() for name, each in head.state_dict().items()}, temporary)
