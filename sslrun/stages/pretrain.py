"""Stage 1: train a backbone on a pretext task, and watch its features on the way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from sslrun import distributed
from sslrun.backbones import build_backbone, save_backbone
from sslrun.backbones.weights import WEIGHTS
from sslrun.data.examples import Examples
from sslrun.data.specs import TextSpec
from sslrun.data.splits import load_splits
from sslrun.pretexts.base import pretexts
from sslrun.recipe import Named, Pretrain, Recipe
from sslrun.runs import Run
from sslrun.stages.context import Context, perform
from sslrun.stages.fit import fit
from sslrun.stages.logging import logs
from sslrun.stages.watch import Watcher
from sslrun.tasks.base import TaskOptions
from sslrun.training.loop import Training


@dataclass(frozen=True)
class Pretraining:
    """Stage 1 of a recipe with one seed: a job that produces a run."""

    recipe: Recipe
    given_seed: int
    root: Path

    needs: tuple[Any, ...] = ()

    @property
    def seed(self) -> int:
        return self.given_seed if self.schedule.seed is None else self.schedule.seed

    @property
    def title(self) -> str:
        return f"{self.recipe.name} · {self.recipe.backbone.name} · pretrain {self.pretext.name} · seed {self.seed}"

    @property
    def pretext(self) -> Named:
        assert self.recipe.pretext is not None
        return self.recipe.pretext

    @property
    def schedule(self) -> Pretrain:
        assert self.recipe.pretrain is not None
        return self.recipe.pretrain

    @property
    def run(self) -> Run:
        recipe = self.recipe
        identity = {
            "backbone": recipe.backbone.identity(),
            "pretext": self.pretext.identity(),
            "data": recipe.data.identity(),
            "pretrain": self.schedule.non_defaults(exclude={"seed"}),
            "seed": self.seed,
        }
        return Run(self.root, recipe.name, "pretrain", identity)

    @property
    def reads(self) -> tuple[Named, ...]:
        """The data sets that the job reads."""
        return (self.recipe.data,)

    @property
    def weights(self) -> Path:
        return self.run.path / WEIGHTS

    def execute(self, context: Context) -> dict[str, Any]:
        """Pretrain unless the run is finished, and return its result."""
        return perform(self.run, self.recipe.resolved(), context, partial(self._body, context))

    def _body(self, context: Context) -> dict[str, Any]:
        recipe, run = self.recipe, self.run
        with context.reporter.reading() as progress, context.stop.reading():
            splits = load_splits(recipe.data.name, recipe.data.options, progress=progress)
            raw, _ = splits.pretrain, splits.val  # read while the progress of reading is shown
        torch.manual_seed(self.seed)
        task = pretexts[self.pretext.name]
        spec = task.backbone_spec(self.pretext.options, splits.spec)
        backbone = build_backbone(recipe.backbone.name, recipe.backbone.options, spec)
        for evaluation in recipe.evaluate.values():
            options = cast(TaskOptions, evaluation.task.options)
            options.check_depth(backbone.depth)  # reported now, not after pretraining
        backbone.fit_inputs(raw)
        pretext = task(self.pretext.options, backbone)
        examples = context.compute.place(pretext.arrange(raw, self.seed))
        training = Training(pretext, self.schedule, context.compute)
        watcher = Watcher(splits, pretext, recipe.watch, context.compute, self.seed)
        epoch = self.schedule.steps_an_epoch(len(examples))

        def looks(steps: int) -> float:
            """Number of looks within `steps` steps: a function of the steps alone, so that resuming changes nothing."""
            return steps / epoch // recipe.watch.every

        with logs(run, recipe.watch.to) as log:
            for step in fit(
                training,
                examples,
                self.seed,
                run,
                context,
                self.title,
                log,
                minutes=recipe.watch.checkpoint,
            ):
                if step.last or looks(step.step) > looks(step.step - 1):
                    look = watcher.look(training.averaged, step.step / step.total)
                    log({"step": step.step, "epoch": round(step.epoch, 4), **look.record})
                    if look.warning:
                        context.reporter.say(f"{self.title}: step {step.step}: {look.warning}")
        backbone = training.averaged.kept
        if distributed.is_main():
            save_backbone(self.weights, backbone, {"recipe": recipe.name, "run": run.hash})
        return {
            "stage": "pretrain",
            "recipe": recipe.name,
            "backbone": recipe.backbone.name,
            "pretext": self.pretext.name,
            "seed": self.seed,
            "watched": look.record,
            "steps": step.step,
            "examples": step.examples,
            "tokens": _tokens(examples, step.examples),
            "flops": None if training.flops is None else training.flops * step.step,
            "seconds": round(training.seconds, 3),
            "parameters": sum(each.numel() for each in backbone.parameters()),
        }


def _tokens(examples: Examples, count: int) -> int | None:
    """Tokens of `count` examples on average, without padding; None for data that is not text."""
    if not isinstance(examples.spec, TextSpec):
        return None
    lengths = examples.lengths
    if lengths is None:
        return count * examples.spec.length
    return round(count * lengths.double().mean().item())
