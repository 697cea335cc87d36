"""Stage 1: train a backbone on a pretext task, and check its features during training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sslrun import distributed
from sslrun.backbones import build_backbone, save_backbone
from sslrun.backbones.base import backbones
from sslrun.backbones.transformer import checkpoint_activations
from sslrun.backbones.weights import WEIGHTS, load_into
from sslrun.data.examples import Examples
from sslrun.data.specs import InputSpec, TextSpec
from sslrun.data.splits import load_splits
from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.pretexts.base import Pretext, pretexts
from sslrun.pretexts.weights import KEPT, save_kept
from sslrun.recipe import Named, Pretrain, Recipe
from sslrun.results.record import GUESSES
from sslrun.runs import Run, find_broken
from sslrun.stages.context import Context, holding, perform
from sslrun.stages.devices import describe_begun, devices_identity
from sslrun.stages.fit import Checkpoints, fit
from sslrun.stages.keep import BestWeights
from sslrun.stages.lineage import (
    EXTENDS,
    find_extended,
    find_init,
    find_shorter,
    init_identity,
)
from sslrun.stages.logging import logs
from sslrun.stages.pictures import write_sheet
from sslrun.stages.predictions import write_shown
from sslrun.stages.watch import FeatureCheck, Watcher
from sslrun.tasks.base import TaskOptions
from sslrun.training.checkpoint import latest, save
from sslrun.training.loop import Step, Training

SAMPLES = "samples.txt"
"""Name of the file with a pretext task's samples of text, one per line."""


@dataclass(frozen=True)
class Pretraining:
    """Stage 1 of a recipe with one seed: a job that produces a run."""

    recipe: Recipe
    evaluation_seed: int
    """The seed of the evaluations; the schedule may fix another one for pretraining."""
    root: Path
    devices: int = field(default_factory=distributed.device_count)
    """The number of devices to train on."""

    parent: Run | None = None
    """The finished, shorter run that this one extends; None: it begins at step 0."""

    needs: tuple[Any, ...] = ()

    @property
    def seed(self) -> int:
        return self.evaluation_seed if self.schedule.seed is None else self.schedule.seed

    @property
    def title(self) -> str:
        recipe = self.recipe
        pretext = f"pretrain {self.pretext.name}"
        return f"{recipe.name} · {recipe.backbone.name} · {pretext} · seed {self.seed}"

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
            "pretrain": self.schedule.non_defaults(exclude={"seed", "init"}),
            "seed": self.seed,
            **self._checks_identity,
            **devices_identity(self.devices, self._depends_on_devices),
            **init_identity(self.schedule.init),
            **({} if self.parent is None else {EXTENDS: self.parent.hash}),
        }
        return Run(self.root, recipe.name, "pretrain", identity)

    def extending(self) -> Pretraining:
        """This job as an extension of the longest finished run of a shorter schedule.

        Raises UserError if there is none, or if it kept no state.
        """
        parent = find_shorter(self.run)
        if parent is None:
            raise UserError(
                f"--extend: there is no finished run of recipe '{self.recipe.name}' with seed "
                f"{self.seed} that differs in a shorter pretraining only: leave --extend out"
            )
        if latest(parent.last_state) is None:
            raise UserError(
                f"--extend: {parent.path} kept no state to start from (watch.keep_state: false): "
                f"give --from {parent.path} instead, which starts from its backbone alone"
            )
        return replace(self, parent=parent)

    def known(self) -> Pretraining:
        """This job, or a finished extension of a shorter run to the same length."""
        if self.run.finished:
            return self
        parent = find_extended(self.run)
        return self if parent is None else replace(self, parent=parent)

    @property
    def _checks_identity(self) -> dict[str, Any]:
        """The options of feature checks, if these choose the weights to keep."""
        if self.schedule.keep == "last":
            return {}
        watch = self.recipe.watch.non_defaults(exclude={"checkpoint", "keep_state", "to"})
        return {"watch": watch} if watch else {}

    @property
    def _depends_on_devices(self) -> bool:
        """Whether the number of devices changes the result."""
        named = self.recipe.backbone
        if self.schedule.budget is not None:  # more devices do more steps
            return True
        return pretexts[self.pretext.name].depends_on_devices(
            self.pretext.options, backbones[named.name], named.options
        )

    @property
    def reads(self) -> tuple[Named, ...]:
        """The data sets that the job reads."""
        return (self.recipe.data,)

    @property
    def weights(self) -> Path:
        return self.run.path / WEIGHTS

    def reopen(self, context: Context) -> None:
        """Clear the finished run if its weights are missing or damaged, so that it trains again."""
        run = self.run
        if distributed.is_main() and run.finished:
            broken = find_broken(run.path, ".safetensors")
            if broken is None and not self.weights.is_file():
                broken = WEIGHTS  # of a version without checksums
            if broken is not None:
                context.reporter.say(f"{run.path / broken}: missing or damaged: pretraining again")
                with holding(run):
                    run.clear()
        distributed.wait()

    def execute(self, context: Context) -> dict[str, Any]:
        """Pretrain unless the run is finished, and return its result."""
        run = self.run
        if self.parent is None and not run.finished and (shorter := find_shorter(run)):
            context.reporter.say(
                f"{shorter.path} is a finished, shorter run of this recipe: --extend continues it"
            )
        begun = describe_begun(lambda count: replace(self, devices=count), run.path.parent)
        if begun is not None:
            context.reporter.say(begun)
        return perform(
            run, self.recipe.resolved(), context, partial(self._body, context), self.reads
        )

    def _body(self, context: Context) -> dict[str, Any]:
        recipe = self.recipe
        with context.reporter.reading() as progress, context.stop.unsaved():
            splits = load_splits(recipe.data.name, recipe.data.options, progress=progress)
            # Both are read here, where the progress of reading is shown.
            raw, _ = splits.pretrain, splits.monitored
        torch.manual_seed(self.seed)
        with context.stop.unsaved():
            pretext = self._build_pretext(splits.spec, raw)
        examples = context.compute.place(pretext.arrange(raw, self.seed))
        if self.schedule.checkpoint_activations and not checkpoint_activations(pretext):
            raise UserError(
                f"pretrain.checkpoint_activations: backbone '{recipe.backbone.name}' has no blocks "
                "to compute again: leave it out, or choose a Transformer such as vit-small"
            )
        sharded = self.schedule.parallel == "fsdp"
        training = Training(pretext, self.schedule, context.compute, sharded)
        watcher = Watcher(splits, pretext, recipe.watch, context.compute, self.seed)
        best = None
        if self.schedule.keep == "best":
            watcher.require(pretext, self.schedule.keep_by)
            best = BestWeights(self.run.checkpoints, self.schedule.keep_by)
            if distributed.is_main():
                best.forget_damaged()
        step, watched = self._train(training, examples, watcher, context, best)
        learned = training.averaged
        backbone = learned.kept
        if distributed.is_main():
            if best is not None:
                best.load_into(_saved(learned))
            about = {"recipe": recipe.name, "run": self.run.hash}
            about |= save_kept(self.weights.parent / KEPT, learned)
            save_backbone(self.weights, backbone, about)
        return {
            "stage": "pretrain",
            "recipe": recipe.name,
            "backbone": recipe.backbone.name,
            "pretext": self.pretext.name,
            "seed": self.seed,
            **({} if self.schedule.init is None else {"init": self.schedule.init}),
            **({} if self.parent is None else {EXTENDS: self.parent.hash}),
            "watched": watched,
            **self._describe_kept(best, step.step),
            "steps": step.step,
            "examples": step.examples,
            "tokens": _count_tokens(examples, step.examples),
            "flops": None if training.flops is None else training.flops * step.step,
            "seconds": round(training.seconds, 3),
            **({} if training.clock is None else {"budget_used": round(training.clock.used, 3)}),
            "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        }

    def _describe_kept(self, best: BestWeights | None, last: int) -> dict[str, Any]:
        """The step of the saved weights and its check, if a diagnostic chose them."""
        if best is None or not distributed.is_main():
            return {}
        step = best.step
        if step is None:
            return {"kept": {"step": last, "by": None}}
        return {"kept": {"step": step, "by": best.diagnostic, **(best.record or {})}}

    def _build_pretext(self, spec: InputSpec, examples: Examples) -> Pretext:
        """Build the pretext task with a new backbone; its weights follow from torch's seed.

        Raises UserError if an evaluation reads a layer that the backbone does not have: reported
        now, not after pretraining.
        """
        cls, recipe = pretexts[self.pretext.name], self.recipe
        backbone_spec = cls.backbone_spec(self.pretext.options, spec)
        backbone = build_backbone(recipe.backbone.name, recipe.backbone.options, backbone_spec)
        for evaluation in recipe.evaluate.values():
            cast(TaskOptions, evaluation.task.options).check_depth(backbone.depth)
            for protocol in evaluation.protocols:
                evaluation.protocol(protocol).check_backbone(backbone)
        if self.schedule.init is None:
            backbone.fit_inputs(examples)
        else:  # inputs are prepared as in the training that the weights are from
            load_into(backbone, find_init(self.schedule.init))
        pretext = cls(self.pretext.options, backbone)
        for evaluation in recipe.evaluate.values():
            for protocol in evaluation.protocols:
                evaluation.protocol(protocol).check_pretext(pretext)
        pretext.fit(examples)
        return pretext

    def _train(
        self,
        training: Training[Any],
        examples: Examples,
        watcher: Watcher,
        context: Context,
        best: BestWeights | None,
    ) -> tuple[Step, dict[str, float]]:
        """Train to the end; return the last step and the record of the last feature check."""
        run, watch = self.run, self.recipe.watch
        epoch = self.schedule.steps_an_epoch(len(examples))

        def count_checks(steps: int) -> float:
            """Count the checks in `steps` steps; nothing else counts, so resuming is exact."""
            return steps / epoch // watch.every

        extended = None if self.parent is None else latest(self.parent.last_state)
        checkpoints = Checkpoints(run.checkpoints, watch.checkpoint, extended)
        with logs(run, watch.to) as log:
            for step in fit(
                training, examples, self.seed, run, context, self.title, log, checkpoints
            ):
                if step.last or count_checks(step.step) > count_checks(step.step - 1):
                    with training.paused():
                        check = self._check(step, training.averaged, watcher, best)
                    log({"step": step.step, "epoch": round(step.epoch, 4), **check.record})
                    if context.on_check is not None:
                        context.on_check(step, check.record)
                    if check.warning:
                        context.reporter.say(f"{self.title}: step {step.step}: {check.warning}")
        if watch.keep_state:
            save(training, run.last_state)
        return step, check.record

    def _check(
        self, step: Step, pretext: Pretext, watcher: Watcher, best: BestWeights | None
    ) -> FeatureCheck:
        """Check the features, write what the check shows, and keep the weights if it is the best.

        All processes compute the check, and the first one writes.
        """
        check = watcher.check(pretext, step.progress, step.metrics)
        if distributed.is_main():
            if columns := watcher.pictures(pretext):
                write_sheet(self.run.path / "pictures" / "pretext.png", columns)
            if lines := watcher.samples(pretext):
                with replacing(self.run.path / SAMPLES) as temporary:
                    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            if guesses := watcher.guesses(pretext):
                write_shown(self.run.path / GUESSES, guesses)
            if best is not None:
                best.consider(step.step, check.record, _saved(pretext))
        return check


def _saved(pretext: Pretext) -> nn.Module:
    """What a pretraining saves: the backbone, and the modules that the task keeps."""
    return nn.ModuleList([pretext.kept, *pretext.kept_modules.values()])


def _count_tokens(examples: Examples, count: int) -> int | None:
    """Count the tokens of `count` average examples, without padding; None if they are not text."""
    if not isinstance(examples.spec, TextSpec):
        return None
    lengths = examples.lengths
    if lengths is None:
        return count * examples.spec.length
    return round(count * (lengths.sum().item() / len(lengths)))
