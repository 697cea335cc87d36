"""The one loop: for every pretext and protocol, on any device.

Nothing random carries over from step to step: the order of an epoch follows from the seed and the epoch, and what is
drawn within a step (views, dropout) from the seed and the step. A run resumed at any step is then equal bit for bit to
one that was never stopped (on a GPU but for kernels that add in no fixed order), and nobody who looks in between can
disturb it.
"""

from __future__ import annotations

import copy
import hashlib
import struct
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslrun import distributed
from sslrun.data.examples import Examples
from sslrun.errors import UserError
from sslrun.training.device import Compute
from sslrun.training.flops import flop_counter
from sslrun.training.optim import lr_factor, optimizers
from sslrun.training.schedule import Schedule

FINITE_EVERY = 50
"""Steps between two looks at whether loss and gradient stayed finite, on devices where a look waits for the device."""


class NonFinite(UserError):
    """The loss or its gradient is infinite or not a number."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int
    """Steps done, this one included."""
    total: int
    epoch: float
    """Epochs done."""
    examples: int
    """Examples seen."""
    lr: float
    loss: Tensor
    """0-d, on the device: reading it may wait for the device."""
    metrics: dict[str, Tensor]

    @property
    def last(self) -> bool:
        return self.step == self.total

    def record(self) -> dict[str, Any]:
        """As plain numbers, to log."""
        numbers = {name: round(value.item(), 6) for name, value in self.metrics.items()}
        return {"step": self.step, "epoch": round(self.epoch, 4), "lr": self.lr, "loss": self.loss.item(), **numbers}


class Training:
    """All the state of a training: what a checkpoint holds."""

    def __init__(self, learner: Any, schedule: Schedule, compute: Compute) -> None:
        self.learner: Any = compute.put(learner)
        self.schedule = schedule
        self.compute = compute
        self.optimizers = optimizers(learner, schedule, learner.backbone.layers())
        self.average = copy.deepcopy(learner).requires_grad_(False) if schedule.ema else None
        self.step = 0
        self._non_finite = torch.zeros((), dtype=torch.int64, device=compute.device)
        """0; or the first step that was not finite: negative where the loss was, and only its gradient was not."""
        self.look_every = 1 if compute.device.type == "cpu" else FINITE_EVERY
        self._rates: dict[int, float] = {}
        """Learning rates of the steps since the last look."""
        self.counted: list[tuple[float, int]] = []
        """Of the steps that were counted: FLOPs, forward and backward, over all devices; and this one's numbers of input."""
        self.input_count = 0
        """Numbers of input of all steps on this device, padding included: pixels, tokens."""
        self.seconds_before_resume = 0.0
        """Seconds that it took before it was interrupted."""
        self._began = time.monotonic()

    @property
    def flops(self) -> float | None:
        """FLOPs of a step so far, on average: of a number of input as many as in the steps that were counted."""
        if not self.counted:
            return None
        flops, numbers = (sum(each) / len(self.counted) for each in zip(*self.counted, strict=True))
        return flops * (self.input_count / self.step / numbers)  # a factor of exactly 1 where all batches have one size

    @property
    def seconds(self) -> float:
        """Since it was made, and what it took before it was interrupted."""
        return self.seconds_before_resume + time.monotonic() - self._began

    @property
    def averaged(self) -> Any:
        """The learner with the weights to evaluate and keep."""
        return self.learner if self.average is None else self.average

    def check_finite(self) -> None:
        """NonFinite if any loss or gradient so far was not finite, naming its step and learning rate."""
        found = int(self._non_finite)
        if found:
            what, step = "loss" if found > 0 else "gradient", abs(found)
            raise NonFinite(f"the {what} is not finite at step {step} (learning rate {self._rates[step]:.3g})")
        self._rates.clear()

    def watch_finite(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        """Take note of the loss and the gradient's norm of the step that follows, before it spoils the weights.

        Without waiting for the device but once in a while.
        """
        at = self.step + 1
        self._rates[at] = lr
        bad = torch.where(loss.isfinite(), torch.where(norm.isfinite(), 0, -at), at)
        self._non_finite = torch.where(self._non_finite == 0, bad, self._non_finite)
        if self.step % self.look_every == 0:
            self.check_finite()

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights; buffers are taken as they are."""
        if self.average is not None:
            kept: list[Tensor] = list(self.average.parameters())
            torch._foreach_lerp_(kept, list(self.learner.parameters()), 1 - self.schedule.ema)
            for mine, its in zip(self.average.buffers(), self.learner.buffers(), strict=True):
                mine.copy_(its)

    def state_dict(self) -> dict[str, Any]:
        """What besides the learner's weights is needed to go on."""
        return {
            "step": self.step,
            "optimizers": [each.state_dict() for each in self.optimizers],
            "average": None if self.average is None else self.average.state_dict(),
            "counted": self.counted,
            "seen": self.input_count,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds_before_resume = state["step"], state["seconds"]
        self.counted, self.input_count = state["counted"], state["seen"]
        for mine, its in zip(self.optimizers, state["optimizers"], strict=True):
            mine.load_state_dict(its)
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def train(training: Training, examples: Examples, seed: int) -> Iterator[Step]:
    """Train from the training's step to its schedule's end, and yield after every step.

    Whoever iterates logs, evaluates, saves or stops. UserError: loss or gradient is not finite (NonFinite), the batch
    is larger than the data, or the device's memory too small for it.
    """
    schedule, compute = training.schedule, training.compute
    learner: Any = training.learner
    epoch_steps, total = schedule.steps_an_epoch(len(examples)), schedule.total_steps(len(examples))
    differ = examples.lengths is not None  # asked once: of millions of examples it takes longer than a step
    warmup = round(schedule.warmup * epoch_steps)
    parameters = [each for each in learner.parameters() if each.requires_grad]
    plain, model = _wrapped(training, total)
    begun = training.step
    generator = compute.generator()
    batches = examples.batches(_order(examples, schedule, seed, training.step, total), compute.device)
    learner.train()
    while training.step < total:
        factor = lr_factor(training.step, total, warmup, schedule.schedule, schedule.milestones, schedule.gamma)
        for group in (group for optimizer in training.optimizers for group in optimizer.param_groups):
            group["lr"] = schedule.lr * factor * group["lr_scale"]
        counter = flop_counter() if _counts(training.step, total, differ) else None
        with explain_out_of_memory(schedule, compute):
            loss = torch.zeros((), device=compute.device)
            metrics: dict[str, Tensor] = {}
            flops, numbers = 0.0, 0
            for part in range(schedule.accumulate):
                at = _hash(seed, training.step, part, distributed.rank())
                compute.seed(at)
                generator.manual_seed(at)
                with torch.no_grad():
                    batch = next(batches)
                    views = learner.views(batch, generator)
                numbers += batch.inputs.numel()
                # Over devices gradients are summed at the last part alone; a static graph is learned from all of a step.
                summed = part == schedule.accumulate - 1 or training.step == begun
                with counter or nullcontext(), nullcontext() if summed else _unsummed(plain):
                    with compute.autocast(schedule.precision):
                        output = model(views) if counter is None else plain(views)
                    (output.loss / schedule.accumulate).backward()
                if counter is not None:
                    flops += counter.get_total_flops()
                loss = loss + output.loss.detach() / schedule.accumulate
                metrics = output.metrics
        norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if schedule.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, schedule.clip, norm)
        training.watch_finite(loss, norm, schedule.lr * factor)
        with explain_out_of_memory(schedule, compute):  # the first step allocates the optimizer's state
            for optimizer in training.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if counter is not None:
            training.counted.append((flops * distributed.world_size(), numbers))
        training.input_count += numbers
        training.step += 1
        learner.after_step(training.step / total)
        training.update_average()
        if training.step == total:
            training.check_finite()
        yield Step(
            training.step, total, training.step / epoch_steps, training.step * schedule.batch,
            schedule.lr * factor, loss, metrics,
        )  # fmt: skip
        learner.train()


STRETCH = 50
"""Batches among which examples of like length are looked for."""


def _order(examples: Examples, schedule: Schedule, seed: int, step: int, total: int) -> Iterator[Tensor]:
    """Indices of every part of every batch from `step` on; this rank's share of them."""
    count = len(examples)
    lengths = examples.lengths if schedule.by_length else None
    world, rank = distributed.world_size(), distributed.rank()
    size = schedule.batch // schedule.accumulate
    if size % world:
        raise UserError(f"a batch of {size} can't be shared evenly by {world} devices: make it a multiple of {world}")
    epoch_steps, shuffled = schedule.steps_an_epoch(count), -1
    for at in range(step, total):
        epoch, place = divmod(at, epoch_steps)
        if epoch != shuffled:
            generator = torch.Generator().manual_seed(_hash(seed, epoch))
            order = torch.randperm(count, generator=generator)
            if lengths is not None:
                order = _by_length(order, lengths, schedule.batch, generator)
            shuffled = epoch
        indices = order[place * schedule.batch : (place + 1) * schedule.batch]
        for part in range(schedule.accumulate):  # dealt, that no part or device gets the longest ones
            yield indices[part :: schedule.accumulate][rank::world]


def _by_length(order: Tensor, lengths: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """The whole batches of a random order, with like lengths together: sorted within stretches of it, in batches that
    follow one another at random."""
    count = len(order) // batch
    order = order[: count * batch]
    stretch = torch.arange(len(order)) // (STRETCH * batch)
    order = order[(stretch * (lengths.max() + 1) + lengths[order]).argsort(stable=True)]
    return order.view(count, batch)[torch.randperm(count, generator=generator)].flatten()


def _hash(*numbers: int) -> int:
    """A seed that differs wherever any of the numbers does; 63 bits."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def _counts(step: int, total: int, differ: bool) -> bool:
    """Whether a step's FLOPs are counted, which takes as long again as a step of a small model: the first one's; where
    examples `differ` in length, those of some steps at even distances, as FLOPs are not quite in proportion to it.

    By the step alone: a resumed run takes every step in the same way as one that was never stopped.
    """
    return step % max(1, total // COUNTED) == 0 if differ else step == 0


COUNTED = 4
"""Steps, about, whose FLOPs are counted where they differ."""


def _wrapped(training: Training, total: int) -> tuple[nn.Module, nn.Module]:
    """The learner as its forward is called: on many devices; and the same compiled, which can't be counted."""
    model: nn.Module = training.learner
    if distributed.world_size() > 1:
        # Static: some parameters may never be used, such as BERT's pooler without next-sentence prediction.
        model = nn.parallel.DistributedDataParallel(model, static_graph=True)
    if training.compute.compiles(training.schedule.compile, total):
        # Each training anew: of one function torch keeps a few variants a process, and takes none but the first few; and
        # how a run is rounded must not depend on those before it.
        torch.compiler.reset()
        return model, torch.compile(model)  # type: ignore[return-value]
    return model, model


def _unsummed(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients stay each device's own, until they are summed together with those of a later part."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


@contextmanager
def explain_out_of_memory(schedule: Schedule, compute: Compute) -> Iterator[None]:
    """Turns a lack of the device's memory into a UserError that says which option to change."""
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator has no error of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        batch, parts = schedule.batch, schedule.accumulate
        if batch == parts:
            remedy = "at one example a time: choose a smaller backbone or image size"
        else:
            more = next(each for each in range(2 * parts, batch + 1) if batch % each == 0)
            remedy = f"lower batch from {batch} to {batch // 2}, or set accumulate to {more} and keep the batch"
        raise UserError(f"out of memory on {compute}: {remedy}") from None
