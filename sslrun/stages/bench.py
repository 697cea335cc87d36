"""The bench of a cell: cached features, new backbones, training, scoring, and saved weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sslrun import distributed
from sslrun.backbones import build_backbone, build_empty, load_into, save_backbone
from sslrun.backbones.base import Backbone, Features
from sslrun.backbones.weights import WEIGHTS, read
from sslrun.data.examples import Batch, Examples, TensorExamples
from sslrun.data.shifts import Part, Shift, make_parts
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec
from sslrun.data.splits import Splits, load_splits, select_labeled
from sslrun.errors import UserError
from sslrun.files import read_metadata, read_tensors, replacing, write_tensors
from sslrun.metric import ID
from sslrun.pretexts.weights import KeptModules, find_kept
from sslrun.protocols import Bench, base
from sslrun.protocols.features import extract
from sslrun.protocols.layers import LayerReader
from sslrun.recipe import Evaluation, Named, Recipe
from sslrun.results.record import ANSWERS
from sslrun.runs import Run
from sslrun.stages.context import Context
from sslrun.stages.fit import Checkpoints, fit
from sslrun.stages.logging import logs
from sslrun.stages.pictures import write_sheet
from sslrun.stages.predictions import (
    Predictions,
    predictions_of,
    write_predictions,
    write_shown,
)
from sslrun.stages.weights import InitialWeights
from sslrun.tasks.answers import MarkedAnswer
from sslrun.tasks.base import Task, TaskLearner, outputs_of, tasks
from sslrun.training.flops import flop_counter
from sslrun.training.loop import Training
from sslrun.training.schedule import Schedule

HEAD = "head.safetensors"
BEST = "best.safetensors"
EVAL_BATCH = 256
"""Batch size when nothing is trained."""


class Assignment(Protocol):
    """What the bench needs to know about a cell."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def evaluation(self) -> Evaluation: ...
    @property
    def protocol(self) -> str: ...
    @property
    def labels(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def training_seed(self) -> int: ...
    @property
    def origin(self) -> InitialWeights: ...
    @property
    def title(self) -> str: ...
    @property
    def run(self) -> Run: ...
    @property
    def refits(self) -> bool: ...
    @property
    def validation_only(self) -> bool: ...
    def followed(self, context: Context, split: str) -> Path:
        """Return the finished run of the protocol that this one follows, learned from a split."""
        ...


class Tested(NamedTuple):
    """What was predicted on the test split, with its scores."""

    scores: dict[str, float]
    predictions: Predictions | None
    answers: list[MarkedAnswer]


class CellBench(Bench):
    """The bench of one cell."""

    def __init__(self, cell: Assignment, context: Context) -> None:
        """Load the data. Raises UserError if it is not available."""
        self.cell = cell
        self.context = context
        self.evaluation = cell.evaluation
        self.method = cell.evaluation.protocol(cell.protocol)
        self.splits = _loaded_splits(cell.evaluation.data)
        named = cell.evaluation.task
        self.task: Task = tasks[named.name](named.options, self.splits.spec, self.splits.classes)
        self.has_val, self.refit = self.splits.has_val, cell.refits
        self._chosen: dict[str, Tensor] = {}
        self._tests: list[Tested] = []
        self.shifted = {} if cell.validation_only else _loaded_shifts(cell.evaluation)
        self.seed = cell.training_seed
        if self.task.linear or self.task.numbers:
            labels = self.task.targets(self._whole("train"))
            self.task.fit_labels(labels[self.chosen("train")])
        self.device = context.compute.device
        self.costs: dict[str, float | None] = {}
        """Attempt, or "features" -> FLOPs of the passes over training examples; None if unknown."""
        self.seconds_before_resume = 0.0
        """Seconds that the trainings took before they were interrupted."""

    def chosen(self, split: str) -> Tensor:
        """Return the labeled examples of a split by index; all if the protocol learns nothing."""
        if split not in self._chosen:
            examples, cell = self._whole(split), self.cell
            self._chosen[split] = (
                select_labeled(examples, cell.labels, cell.seed, per_class=self.method.per_class)
                if self.method.learns
                else torch.arange(len(examples))
            )
        return self._chosen[split]

    # ------------------------------------------------------------ splits

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Every part of every shift, by the name of its split."""
        return {
            _split_of(shift, name): part
            for shift, parts in self.shifted.items()
            for name, part in parts.items()
        }

    @cached_property
    def shift_of(self) -> dict[str, str]:
        """The shift of every part, by the name of the part's split."""
        return {
            _split_of(shift, name): shift for shift, parts in self.shifted.items() for name in parts
        }

    @property
    def tests(self) -> tuple[str, ...]:
        return () if self.cell.validation_only else ("test", *self.parts)

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """Shift -> class -> number of examples left out because the task lacks that class."""
        parts = {shift: part for shift, parts in self.shifted.items() for part in parts.values()}
        return {shift: dict(part.dropped) for shift, part in parts.items() if part.dropped}

    def over_parts(self, values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Average the values of the parts of each shift."""
        means = {}
        for shift, parts in self.shifted.items():
            of_parts = [values[_split_of(shift, name)] for name in parts]
            means[shift] = _mean_values(of_parts)
        return means

    def by_shift(self, values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        return {ID: dict(values["test"]), **self.over_parts(values)}

    def examples(self, split: str) -> Examples:
        whole = self._whole(split)
        return whole.subset(self.chosen(split)) if split in base.LEARNED else whole

    def _whole(self, split: str) -> Examples:
        """Return all examples of a split, labeled or not."""
        if split in self.parts:
            return self.parts[split].examples
        match split:
            case "train":
                return self.splits.train
            case base.TRAIN_AND_VAL:
                return self.splits.train_and_val
            case "val":
                return self.splits.val
            case "test" if not self.cell.validation_only:
                return self.splits.test
        raise ValueError(f"no such split: '{split}'; choose train, val, {', '.join(self.tests)}")

    # ------------------------------------------------------------ frozen features

    @cached_property
    def layer_widths(self) -> tuple[int, ...]:
        return self.backbone().layer_widths

    def vectors(self, split: str, layers: tuple[int, ...] = ()) -> Tensor:
        x, _ = self._extracted(split, layers)
        return x[self.chosen(split)] if split in base.LEARNED else x

    def features(self, split: str, layers: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        x, flops = self._extracted(split, layers)
        y = self.task.targets(self._whole(split)).to(x.device)
        if split not in base.LEARNED:
            return x, y
        chosen = self.chosen(split)
        self.costs["features"] = flops * len(chosen)
        return x[chosen], y[chosen]

    def _extracted(self, split: str, layers: tuple[int, ...]) -> tuple[Tensor, float]:
        """Return a split's features (N, D) before any training, and the FLOPs of one example.

        They are cached for the next cell of the same backbone, data and task. One pass computes all
        layers that the protocol reads.
        """
        if split == base.TRAIN_AND_VAL:
            return self._join_extracted(layers)
        read = self.method.read_layers(len(self.layer_widths)) if layers else ()
        x, flops = self._extract(split, read)
        if layers == read:
            return x, flops
        # A task may read several vectors side by side, each with all layers: (N, vectors, layers).
        widths = [self.layer_widths[layer] for layer in read]
        parts = x.unflatten(1, (-1, sum(widths))).split(widths, dim=2)
        return torch.cat([parts[read.index(layer)] for layer in layers], dim=2).flatten(1), flops

    def _extract(self, split: str, read: tuple[int, ...]) -> tuple[Tensor, float]:
        """Compute or load the features (N, D) of the layers `read`, and the FLOPs of one example.

        Without layers, they are what the task reads.
        """
        definition = (
            repr(self.evaluation.shifts[self.shift_of[split]]) if split in self.parts else ""
        )
        same = repr(self.cell.origin), repr(self.evaluation.data), repr(self.evaluation.task)
        precision = self.method.precision
        key = (*same, split, definition, precision, repr(read))
        kept = self.context.features
        if key not in kept:
            for other in [other for other in kept if other[:3] != same]:
                del kept[other]
            backbone, compute = self.backbone(), self.context.compute
            if read:
                backbone = LayerReader(backbone, read)
            examples, counter = self._whole(split), flop_counter()
            with compute.autocast(precision):
                x = extract(
                    backbone, examples, self.task.inputs, compute.device, EVAL_BATCH,
                    self._joined if read else self.task.vector, counter,
                )  # fmt: skip
            kept[key] = x, counter.get_total_flops() / min(EVAL_BATCH, len(examples))
        return kept[key]

    def _joined(self, features: Features) -> Tensor:
        """The pooled features of whole examples."""
        return self.task.join(features).pooled

    def _join_extracted(self, layers: tuple[int, ...]) -> tuple[Tensor, float]:
        """Return the features of "train+val", put together from those of both splits."""
        places = self.splits.positions
        parts = {split: self._extracted(split, layers) for split in places}
        first, flops = parts["train"]
        joined = first.new_empty(len(self.splits.train_and_val), first.shape[1])
        for split, (x, _) in parts.items():
            joined[places[split].to(x.device)] = x
        return joined, flops

    def tokens(self, split: str, most: int) -> Examples | None:
        examples, backbone = self.examples(split), self.backbone().eval()
        if examples.lengths is not None:
            return None
        counter = flop_counter()

        def run(batch: Batch) -> tuple[Tensor]:
            tokens = self.task.join(backbone(self.task.inputs(batch))).tokens
            assert tokens is not None
            return (tokens.float(),)

        def compute(part: Examples) -> Tensor:
            with self.context.compute.autocast(self.method.precision), torch.inference_mode():
                return outputs_of(part, run, self.device, EVAL_BATCH)[0]

        if compute(examples.subset(torch.arange(1))).nbytes * len(examples) > most:
            return None
        with counter:
            tokens = compute(examples).clone()  # outside inference mode, to be trained on
        self.costs["features"] = counter.get_total_flops()
        targets = self.task.targets(examples)
        return TensorExamples(tokens, targets, examples.classes, examples.spec)

    # ------------------------------------------------------------ training

    def backbone(self, drop_path: float | None = None) -> Backbone:
        named, weights = self.cell.recipe.backbone, self.cell.origin.weights
        changes: dict[str, Any] = {} if drop_path is None else {"drop_path": drop_path}
        if self.method.initial and "pretrained" in type(named.options).model_fields:
            changes["pretrained"] = False
        options = named.options.model_copy(update=changes) if changes else named.options
        # Random weights differ between restarts; pretrained ones do not.
        torch.manual_seed(self.seed if self.method.initial else self.cell.seed)
        build = build_backbone if weights is None else build_empty
        backbone = build(named.name, options, self.task.backbone_spec)
        if weights is None:
            self.task.fit_inputs(backbone, self.splits.train)
        else:
            load_into(backbone, weights)
            for name, values in self.cell.origin.normalization.items():
                buffer = backbone.get_buffer(name)
                if len(values) != len(buffer):
                    raise UserError(
                        f"weights.{name}: has {len(values)} numbers, but the images have "
                        f"{len(buffer)} channels"
                    )
                buffer.copy_(torch.tensor(values))
        return backbone.to(self.device)

    def kept(self) -> KeptModules | None:
        weights = self.cell.origin.weights
        return None if weights is None else find_kept(weights)

    def head(self, split: str) -> dict[str, Tensor]:
        return read(self.cell.followed(self.context, split) / HEAD)[0]

    def train(
        self,
        learner: TaskLearner,
        schedule: Schedule,
        attempt: str,
        *,
        split: str = "train",
        keep_best: bool = False,
        examples: Examples | None = None,
    ) -> TaskLearner:
        compute, run = self.context.compute, self.cell.run
        examples = compute.place(self.examples(split) if examples is None else examples)
        schedule = schedule.within(len(examples))
        torch.manual_seed(self.seed)
        training = Training(learner, schedule, compute)
        folder, minutes = run.checkpoints / attempt, self.cell.recipe.watch.checkpoint
        checkpoints = Checkpoints(folder, minutes, attempt=attempt)
        epoch, best = schedule.steps_an_epoch(len(examples)), checkpoints.folder / BEST
        if best.exists() and read_tensors(best) is None and distributed.is_main():
            self.say(f"{best}: damaged; trains from the beginning")
            shutil.rmtree(checkpoints.folder)
        with logs(run, ()) as log, self.context.stop.saving():
            for step in fit(
                training, examples, self.seed, run, self.context, self.cell.title,
                lambda record: log({"attempt": attempt, **record}), checkpoints,
            ):  # fmt: skip
                epoch_ends = step.last or step.step % epoch == 0
                if keep_best and epoch_ends and distributed.is_main():
                    self.keep_if_best(training.averaged, best)
                    training.learner.train()
        steps = schedule.total_steps(len(examples))
        self.costs[attempt] = None if training.flops is None else training.flops * steps
        self.seconds_before_resume += training.seconds_before_resume
        if keep_best:
            distributed.wait()  # until the first process has written the best weights
            content = read_tensors(best)
            if content is None:
                raise UserError(f"{best}: damaged; give the same command again to train again")
            training.averaged.load_state_dict(content[0])
        averaged: TaskLearner = training.averaged.eval()
        return averaged

    @property
    def flops(self) -> float | None:
        """FLOPs of all passes over training examples.

        None if unknown: if a protocol runs the backbone itself, its FLOPs are not counted.
        """
        known = [cost for cost in self.costs.values() if cost is not None]
        return sum(known) if known and len(known) == len(self.costs) else None

    def keep_if_best(self, learner: TaskLearner, path: Path) -> None:
        """Write a learner's weights to `path` if they beat the weights there on validation.

        The file outlives the process, so that a run that resumes from a checkpoint finds the best
        of all earlier epochs.
        """
        primary = self.task.primary
        score = self.evaluate(learner.eval(), "val")[primary.name]
        if path.exists() and primary.is_as_good(float(read_metadata(path)["score"]), score):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, learner.state_dict(), {"score": repr(score)})

    # ------------------------------------------------------------ scoring

    def outputs(self, split: str, run: Callable[[Batch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        with self.context.compute.autocast(self.method.precision):
            return outputs_of(self._whole(split), run, self.device, EVAL_BATCH)

    def score(self, split: str, outputs: Tensor) -> dict[str, float]:
        if split in self.parts:
            outputs = self.parts[split].merge_classes(outputs)
        scores = self.task.score(outputs, self._whole(split))
        if split == "test":
            examples = self._whole(split)
            predictions = predictions_of(self.task, outputs, examples)
            self._tests.append(Tested(scores, predictions, self.task.answers(outputs, examples)))
        return scores

    def keep_predictions(self, scores: Mapping[str, float]) -> None:
        """Write the predictions on the test split that have these scores, if there are any.

        A protocol may score several layers or heads before it chooses one.
        """
        matching = [test for test in self._tests if scores.items() >= test.scores.items()]
        if not matching or not distributed.is_main():
            return
        _, predictions, answers = matching[-1]
        if predictions is not None:
            write_predictions(self.cell.run.path, predictions, self.task.classes)
        if answers:
            write_shown(self.cell.run.path / ANSWERS, answers)

    # ------------------------------------------------------------ saved weights

    def keep_head(self, head: nn.Module) -> None:
        if distributed.is_main():
            state = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
            with replacing(self.cell.run.path / HEAD) as temporary:
                save_file(state, temporary)

    def keep_backbone(self, backbone: Backbone) -> None:
        if distributed.is_main():
            recipe = self.cell.recipe.name
            save_backbone(self.cell.run.path / WEIGHTS, backbone, {"recipe": recipe})

    def keep_pictures(self, columns: Mapping[str, Tensor]) -> None:
        if distributed.is_main():
            write_sheet(self.cell.run.path / "pictures" / f"{self.cell.protocol}.png", columns)

    def say(self, message: str) -> None:
        self.context.reporter.say(f"{self.cell.title}: {message}")


def _mean_values(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the values of each key; all mappings have the same keys."""
    means = {}
    for name in values[0]:
        means[name] = fmean(part[name] for part in values)
    return means


def _split_of(shift: str, part: str) -> str:
    """Return the name of the split for a part of a shift."""
    return f"{shift}: {part}"


# ---------------------------------------------------------------- data, loaded once for many cells


def _loaded_splits(data: Named) -> Splits:
    """Load the splits of a data set, once for consecutive cells that read it."""
    return _load_splits(data.name, data.options.model_dump_json())


def _loaded_shifts(evaluation: Evaluation) -> dict[str, dict[str, Part]]:
    """Load shift -> name -> part, once for consecutive cells that are scored on them."""
    shifts = {name: shift.as_dict() for name, shift in evaluation.shifts.items()}
    if not shifts:
        return {}
    data = evaluation.data
    return _load_parts(data.name, data.options.model_dump_json(), json.dumps(shifts))


@lru_cache(maxsize=2)
def _load_parts(name: str, options: str, shifts: str) -> dict[str, dict[str, Part]]:
    own = _load_splits(name, options)
    parts = {}
    for shift, settings in json.loads(shifts).items():
        other = settings.get("data")
        if other is not None and isinstance(own.spec, ImageSpec):
            # Overrides the size of the shifted data set.
            other["size"] = own.spec.size if own.spec.is_square else own.spec.shape
        splits = other and _load_splits(other.pop("name"), json.dumps(other))
        parts[shift] = make_parts(shift, Shift(**settings), own, splits)
    return parts


@lru_cache(maxsize=8)
def _load_splits(name: str, options: str) -> Splits:
    return load_splits(name, sources[name].Options.model_validate_json(options))
