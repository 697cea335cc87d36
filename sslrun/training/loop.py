"""The training loop for every pretext task and every protocol, on any device.

No random state carries over from step to step. The order of an epoch is a function of the seed and
the epoch; random numbers within a step (views, dropout) are a function of the seed and the step. A
run that is resumed at any step therefore ends with the same bits as a run that was never stopped,
except on GPUs with kernels that add in no fixed order. Code that evaluates or logs between steps
cannot change the result.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from sslrun import distributed
from sslrun.data.examples import Batch, Examples
from sslrun.errors import UserError
from sslrun.seeds import derive_seed
from sslrun.training.clock import Clock
from sslrun.training.device import Compute
from sslrun.training.flops import FlopMeter, flop_counter, is_counted
from sslrun.training.learner import Learner, Output
from sslrun.training.norm import synchronize_norms
from sslrun.training.optim import half_cosine, lr_factor, optimizers, set_rates, skip_update
from sslrun.training.order import indices
from sslrun.training.schedule import Schedule
from sslrun.training.shard import copy_whole, shard, whole

FINITE_EVERY = 50
"""Number of steps between two checks that loss and gradient are finite, on devices that run
asynchronously, where a check waits for the device."""

AnyLearner = TypeVar("AnyLearner", bound=Learner)


class NonFinite(UserError):
    """The loss or its gradient is infinite or not a number."""


@dataclass(frozen=True)
class Step:
    """The result of one optimizer step."""

    step: int
    """Number of steps done, including this one."""
    total: int
    """Number of steps of the whole training; an estimate if its time is limited."""
    progress: float
    """Share of the training that is done; 1 after the last step."""
    epoch: float
    """Number of epochs done."""
    examples: int
    """Number of examples read so far, over all devices."""
    lr: float
    loss: Tensor
    """0-d, on the device: reading it may wait for the device."""
    metrics: dict[str, Tensor]
    grad_norm: Tensor
    """0-d, on the device: global norm of the gradient, before clipping."""
    data_seconds: float
    """Seconds that this step spent on its batch and views."""

    @property
    def last(self) -> bool:
        """Whether this is the training's last step."""
        return self.progress >= 1

    def record(self) -> dict[str, Any]:
        """The step as plain numbers, to log."""
        numbers = {name: round(value.item(), 6) for name, value in self.metrics.items()}
        return {
            "step": self.step,
            "epoch": round(self.epoch, 4),
            "lr": self.lr,
            "loss": self.loss.item(),
            "grad_norm": round(self.grad_norm.item(), 6),
            **numbers,
        }


class Training(Generic[AnyLearner]):
    """The state of a training, which checkpoints hold."""

    def __init__(
        self, learner: AnyLearner, schedule: Schedule, compute: Compute, sharded: bool = False
    ) -> None:
        """Prepare a training; `sharded`: each device keeps a part of the parameters (FSDP)."""
        several = distributed.world_size() > 1
        if learner.sync_norm and several:
            synchronize_norms(learner, compute.device)
        # Only contiguous parameters can be sharded, not those in channels_last.
        put = learner.to(compute.device) if sharded and several else compute.put(learner)
        self.learner = cast(AnyLearner, put)
        self.schedule = schedule
        self.compute = compute
        self.sharded = sharded
        self.average = copy.deepcopy(learner).requires_grad_(False) if schedule.ema else None
        self._template: AnyLearner | None = None
        """The learner on the meta device, to gather sharded parameters into; None: they are whole.
        """
        if sharded and several:
            self._template = copy.deepcopy(learner).to("meta")
            for each in filter(None, (learner, self.average)):
                shard(each, compute.device)
        self.optimizers = optimizers(learner, schedule, learner.layers())
        self.clock = None if schedule.seconds is None else Clock(schedule.seconds, compute.device)
        """The time that is used of a schedule with a budget; None: steps end the training."""
        self.step = 0
        self.first_step = 0
        """The step at which the learning rate's schedule starts: that of a warm restart."""
        self.meter = FlopMeter()
        self.examples_state: dict[str, Any] = {}
        """State of the examples at the beginning of the current epoch."""
        self.seconds_before_resume = 0.0
        self.check_every = 1 if compute.device.type == "cpu" else FINITE_EVERY
        self._non_finite = torch.zeros((), dtype=torch.int64, device=compute.device)
        """0, or the number of the first step that was not finite: positive if the loss was not,
        negative if only the gradient was not."""
        self._rates: dict[int, float] = {}
        """Learning rates of the steps since the last check."""
        self._start = time.monotonic()

    @property
    def flops(self) -> float | None:
        """Mean FLOPs per step, forward and backward, over all devices; None if not yet counted."""
        return self.meter.per_step(self.step) if self.step else None

    def progress(self, total: int | None) -> float:
        """The share of the training that is done, of `total` steps or of the budget of time."""
        if self.clock is not None:
            return self.clock.share
        assert total is not None
        return self.step / total

    def paused(self) -> AbstractContextManager[None]:
        """A context whose time does not count against a budget, such as a feature check's."""
        return nullcontext() if self.clock is None else self.clock.paused()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this training, including those before an interruption."""
        return self.seconds_before_resume + time.monotonic() - self._start

    @property
    def averaged(self) -> AnyLearner:
        """The learner with the weights to evaluate and save: the moving average if there is one.

        Sharded parameters are gathered, into a copy: all devices must ask for it together.
        """
        kept = self.learner if self.average is None else self.average
        return kept if self._template is None else copy_whole(kept, self._template)

    def check_finite(self) -> None:
        """Check that all losses and gradients so far were finite.

        Raises:
            NonFinite: one was not; the message has its step and learning rate.
        """
        bad = int(self._non_finite)
        if bad:
            quantity, step = "loss" if bad > 0 else "gradient", abs(bad)
            rate = self._rates[step]
            raise NonFinite(
                f"the {quantity} is not finite at step {step} (learning rate {rate:.3g})"
            )
        self._rates.clear()

    def watch_finite(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        """Record whether the coming step's loss and gradient norm are finite.

        Checks them, which waits for the device, only every `check_every` steps.
        """
        step = self.step + 1
        self._rates[step] = lr
        bad = torch.where(loss.isfinite(), torch.where(norm.isfinite(), 0, -step), step)
        self._non_finite = torch.where(self._non_finite == 0, bad, self._non_finite)
        if self.step % self.check_every == 0:
            self.check_finite()

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average toward the weights, and copy the buffers."""
        if self.average is not None:
            averages: list[Tensor] = list(self.average.parameters())
            weights: list[Tensor] = list(self.learner.parameters())
            torch._foreach_lerp_(averages, weights, 1 - self.schedule.ema)
            for average, buffer in zip(self.average.buffers(), self.learner.buffers(), strict=True):
                average.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to resume, except the learner's weights."""
        return {
            **self.counters(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": None if self.average is None else self.average.state_dict(),
        }

    def counters(self) -> dict[str, Any]:
        """The state without what has the shape of parameters."""
        return {
            "step": self.step,
            "first_step": self.first_step,
            "flops": self.meter.state_dict(),
            "examples": self.examples_state,
            "seconds": self.seconds,
            "used": 0.0 if self.clock is None else self.clock.used,
        }

    def restart(self) -> None:
        """Start the learning rate's schedule again at this step, for the steps that are left."""
        self.first_step = self.step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.load_counters(state)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def load_counters(self, state: dict[str, Any]) -> None:
        """Restore what `counters` returned."""
        self.step, self.seconds_before_resume = state["step"], state["seconds"]
        self.first_step = state.get("first_step", 0)  # 0 in checkpoints of earlier versions
        self.meter.load_state_dict(state["flops"])
        if self.clock is not None:
            self.clock.used = state["used"]
        self.examples_state = state["examples"]


def train(training: Training[Any], examples: Examples, seed: int) -> Iterator[Step]:
    """Train from the training's step to the end of its schedule, and yield after every step.

    Between steps the caller can log, evaluate, save or stop.

    Raises:
        NonFinite: the loss or the gradient is not finite.
        UserError: the batch is larger than the data or than the device's memory, or its parts do
            not suit the learner.
    """
    schedule, compute, learner = training.schedule, training.compute, training.learner
    _check_parts(schedule, learner)
    epoch_steps = schedule.steps_an_epoch(len(examples))
    total = schedule.planned_steps(len(examples))
    frozen_steps = round(schedule.freeze_last * epoch_steps)
    lengths_differ = examples.lengths is not None  # read once: slow for millions of examples
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    passes = _Passes(training, total, seed)
    batches = examples.batches(_remaining_indices(training, examples, seed, total), compute.device)
    learner.train()
    if training.clock is not None:
        training.clock.start()
    while (share := training.progress(total)) < 1:
        lr = _set_rates(training, total, epoch_steps)
        learner.before_step(share)
        with explain_out_of_memory(schedule, compute):
            done = passes.run(batches, is_counted(training.step, total, lengths_differ))
        if training.step < frozen_steps:
            skip_update(training.optimizers, learner.last_layer())
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        _clip(parameters, norm, schedule)
        training.watch_finite(done.loss, norm, lr)
        with explain_out_of_memory(schedule, compute):  # the first step allocates state
            for optimizer in training.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        training.meter.add(done.numbers, done.flops)
        training.step += 1
        if training.clock is not None:
            training.clock.tick()
        share = training.progress(total)
        learner.after_step(share)
        training.update_average()
        if share >= 1:
            training.check_finite()
        yield Step(
            step=training.step,
            total=total or max(training.step, round(training.step / share)),
            progress=share,
            epoch=training.step / epoch_steps,
            examples=training.step * schedule.batch,
            lr=lr,
            loss=done.loss,
            metrics=done.metrics,
            grad_norm=norm,
            data_seconds=done.data_seconds,
        )
        learner.train()


def _check_parts(schedule: Schedule, learner: Learner) -> None:
    """Raise UserError if a device's part of the batch is no multiple that the learner needs."""
    parts = schedule.accumulate * distributed.world_size()
    multiple = learner.batch_multiple
    if schedule.batch % (parts * multiple):
        raise UserError(
            f"a batch of {schedule.batch} in {parts} part(s) cannot be split by {multiple} "
            f"batch norms: make it a multiple of {parts * multiple}"
        )


def _remaining_indices(
    training: Training[Any], examples: Examples, seed: int, total: int | None
) -> Iterator[Tensor]:
    """Yield the indices of all parts of batches from the training's step on.

    First restores the state that the examples had when the step's epoch began; see `indices`.
    """

    def remember() -> None:
        training.examples_state = examples.state_dict()

    if training.examples_state:
        examples.load_state_dict(training.examples_state)
    return indices(examples, training.schedule, seed, training.step, total, remember)


def _set_rates(training: Training[Any], total: int | None, epoch_steps: int) -> float:
    """Set the optimizers' rates for the coming step, and return the learning rate.

    The learning rate's schedule spans the steps from the training's first one, after which a warm
    restart began; or the budget of time, which it follows by the clock.
    """
    schedule, share = training.schedule, training.progress(total)
    if total is None:
        place: tuple[float, float, float] = (share, 1.0, schedule.warmup)
    else:
        first = training.first_step
        place = (training.step - first, total - first, round(schedule.warmup * epoch_steps))
    factor = lr_factor(
        *place,
        schedule.schedule,
        schedule.milestones,
        schedule.gamma,
        schedule.lr_end / schedule.lr,
        ahead=0 if total is None else 1,
    )
    weight_decay = schedule.weight_decay
    if schedule.weight_decay_end is not None:
        weight_decay = half_cosine(weight_decay, schedule.weight_decay_end, share)
    set_rates(training.optimizers, schedule.lr * factor, weight_decay)
    return schedule.lr * factor


@torch.no_grad()
def _clip(parameters: list[nn.Parameter], norm: Tensor, schedule: Schedule) -> None:
    """Clip the gradients as the schedule says; `norm` is their global norm."""
    if schedule.clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, schedule.clip, norm)
    if schedule.clip_each is not None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if grads:
            scales = [
                (schedule.clip_each / (one + 1e-6)).clamp(max=1.0)
                for one in torch._foreach_norm(grads)
            ]
            torch._foreach_mul_(grads, scales)


@dataclass
class _PassResult:
    """Result of the forward and backward passes of one step."""

    loss: Tensor
    metrics: dict[str, Tensor]
    numbers: int = 0
    """How many numbers this device read."""
    flops: float | None = None
    """FLOPs over all devices; None if they were not counted."""
    data_seconds: float = 0.0

    def average(self) -> None:
        """Replace the loss and the metrics by their means over all devices."""
        world = distributed.world_size()
        if world > 1:
            values = torch.stack([self.loss, *self.metrics.values()]).float()
            distributed.add_up(values)
            self.loss, *metrics = (values / world).unbind()
            self.metrics = dict(zip(self.metrics, metrics, strict=True))


class _Passes:
    """Run the forward and backward passes of a step, one part of its batch after the other."""

    def __init__(self, training: Training[Any], total: int | None, seed: int) -> None:
        self.training = training
        self.seed = seed
        self.plain, self.compiled = _wrap(training, total)
        self.first = training.step
        self.generator = training.compute.generator()

    def run(self, batches: Iterator[Batch], counted: bool) -> _PassResult:
        """Compute the gradients of the next step, and leave them in the parameters."""
        schedule, compute = self.training.schedule, self.training.compute
        done = _PassResult(torch.zeros((), device=compute.device), {})
        counter = flop_counter() if counted else None
        for part in range(schedule.accumulate):
            batch, views = self._views(batches, part, done)
            done.numbers += batch.inputs.numel()
            # Devices sum their gradients at the last part only, except in the first step, from
            # which DDP learns a static graph.
            synchronize = part == schedule.accumulate - 1 or self.training.step == self.first
            # FLOPs of a compiled model cannot be counted.
            model = self.compiled if counter is None else self.plain
            with counter or nullcontext(), nullcontext() if synchronize else _no_sync(self.plain):
                with compute.autocast(schedule.precision):
                    output: Output = model(views)
                (output.loss / schedule.accumulate).backward()
            if counter is not None:
                counted_flops = counter.get_total_flops() * distributed.world_size()
                done.flops = (done.flops or 0.0) + counted_flops
            done.loss = done.loss + output.loss.detach() / schedule.accumulate
            done.metrics = output.metrics
        done.average()
        return done

    def _views(self, batches: Iterator[Batch], part: int, done: _PassResult) -> tuple[Batch, Any]:
        """Make the views of the next batch, with generators seeded by the step and the part."""
        start = time.perf_counter()
        seed = derive_seed(self.seed, self.training.step, part, distributed.rank())
        self.training.compute.seed(seed)
        self.generator.manual_seed(seed)
        with torch.no_grad():
            batch = next(batches)
            views = self.training.learner.views(batch, self.generator)
        done.data_seconds += time.perf_counter() - start
        return batch, views


def _wrap(training: Training[Any], total: int | None) -> tuple[nn.Module, nn.Module]:
    """Return the learner, wrapped for several devices if there are; and the same, compiled.

    Both are the same if the schedule does not compile.
    """
    model: nn.Module = training.learner
    if distributed.world_size() > 1 and not training.sharded:
        # Static: some parameters may never be used, such as BERT's pooler without next-sentence
        # prediction.
        model = nn.parallel.DistributedDataParallel(model, static_graph=True)
    schedule = training.schedule
    # How compilation goes with the hooks of sharded blocks was not measured: only where asked for.
    is_auto = training.sharded and schedule.compile == "auto"
    if not is_auto and training.compute.compiles(schedule.compile, total, schedule.seconds):
        # torch keeps only a few variants of a function in a process and then falls back to eager
        # mode. Reset it, because the rounding of a run must not depend on the runs before it.
        torch.compiler.reset()
        return model, torch.compile(model)  # type: ignore[return-value]
    return model, model


def _no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Keep gradients on each device; a later part of the batch sums them."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


@contextmanager
def explain_out_of_memory(schedule: Schedule, compute: Compute) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError that says which option to change."""
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator has no error class of its own.
        on_cpu = "can't allocate memory" in str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
            raise
        batch, parts = schedule.batch, schedule.accumulate
        if batch == parts:
            remedy = "even with one example at a time: choose a smaller backbone or image size"
        else:
            more = next(count for count in range(2 * parts, batch + 1) if batch % count == 0)
            remedy = (
                f"lower batch from {batch} to {batch // 2}, "
                f"or set accumulate to {more} and keep the batch"
            )
        raise UserError(f"out of memory on {compute}: {remedy}") from None
