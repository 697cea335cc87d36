"""Measure pretraining, fine-tuning and a probe on one GPU, each beside a plain PyTorch step.

python benchmarks/gpu.py                            # under nine minutes, writes gpu.json, gpu.md
python benchmarks/gpu.py --rows simclr-cifar10 --compile off
python benchmarks/gpu.py --device cpu --quick       # tiny networks: checks the script

The rows are shipped recipes on random inputs of their shapes, with a batch that suits one GPU.
They need no data and no network. For each row, blocks of three kinds of steps alternate:

- sslrun: the training loop as `sslrun pretrain` runs it.
- plain: forward, backward and a fused optimizer in a bare loop, on views made in advance. It has
  the same network, precision and compilation; it has no augmentation, no clipping, no checks and no
  update of a teacher.
- views: the augmentation or masking alone.

`share` is the FLOP/s of sslrun's steps, forward and backward as torch counts them, relative to the
fastest of several square bf16 matrix products, measured before and after the row. `waiting` is what
is left of sslrun's step after views, forward, backward and optimizer: Python between kernels,
clipping, checks, teachers, data. The probe's plain side is torch's L-BFGS, one strength at a time.

Each row runs in a process of its own for its share of the time; a row that fails, for lack of
memory or of time, is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from blocks import time_blocks
from torch import Tensor, nn

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.source import sources
from sslrun.data.specs import TextSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.protocols.logistic import LogisticOptions, LogisticRegression
from sslrun.recipe import Named, Recipe, load
from sslrun.shipped import find
from sslrun.stages.check import backbone_spec
from sslrun.tasks.base import tasks
from sslrun.training.device import Compile, Compute, compute, memory_in_use
from sslrun.training.learner import Learner
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

STEPS = 10**6
"""Length of the schedule in steps, far more than are run."""
WARM_UP = 3
"""Steps that are not timed: FLOPs are counted in the first, and the second compiles."""
MOST_STEPS = 50
"""Largest number of timed steps in a block."""
BLOCKS = 3
TIMED_SECONDS = 8.0
"""Seconds that the timed blocks of a row take, if there is time."""


class Row(NamedTuple):
    """A recipe to measure."""

    recipe: str
    batch: int
    """Examples per step on a GPU."""
    overrides: tuple[str, ...] = ()
    """Changes to the recipe."""
    quick: tuple[str, ...] = ()
    """More changes for --quick."""
    evaluation: str | None = None
    """Fine-tune on this evaluation of the recipe; None: pretrain."""


TINY_VIT = ("backbone.depth=1", "backbone.width=32", "backbone.heads=2", "data.size=32")
TINY_DINO = (*TINY_VIT, "pretext.outputs=16", "pretext.hidden=16")
TINY_MAE = (*TINY_VIT, "pretext={name: mae, depth: 1, width: 16, heads: 2}")
TINY_BERT = ("backbone.depth=1", "backbone.width=32", "data.tokenizer.vocab=100")
TINY_MLM = (*TINY_BERT, "data.length=16")
TINY_RESNET = ("backbone.name=resnet18", "backbone.channels=4", "data.size=32")
TINY_CROPS = (*TINY_DINO, "pretext.crops={count: 2, size: 16}")
NO_CROPS = "pretext.crops=null"
ROWS = {
    "simclr-cifar10": Row(
        "simclr-cifar10", 512, ("pretrain.epochs=200",), ("backbone.channels=4",)
    ),
    "bert-base-128": Row("mlm-wikipedia", 256, ("data.length=128",), TINY_MLM),
    "bert-base-512": Row("mlm-wikipedia", 64, (), TINY_MLM),
    "resnet50": Row("simclr-imagenet", 256, (), TINY_RESNET),
    "vit-small": Row("dino-imagenet", 128, (NO_CROPS,), TINY_DINO),
    "vit-small, multi-crop": Row("dino-imagenet", 64, (), TINY_CROPS),
    "vit-base": Row("dino-imagenet", 64, ("backbone.name=vit-base", NO_CROPS), TINY_DINO),
    "mae vit-base": Row("mae-imagenet", 256, (), TINY_MAE),
    "fine-tune bert-base": Row("mlm-wikipedia", 32, (), TINY_BERT, "sst2"),
    "fine-tune vit-base": Row("mae-imagenet", 128, (), TINY_VIT, "imagenet-1k-tuned"),
}
PROBE = "probe"
"""The row that fits logistic regression."""
NAMES = (*ROWS, PROBE)
PHASES = ("views", "forward", "backward", "optimizer", "waiting")


@dataclass(frozen=True)
class Settings:
    """What all rows share."""

    device: str
    compile: Compile
    quick: bool


class Repeated(Examples):
    """A data set in which every batch is the same."""

    labels = None
    classes = ()

    def __init__(self, batch: Batch, spec: Any, size: int) -> None:
        self.batch, self.spec, self.size = batch, spec, size

    def __len__(self) -> int:
        return self.size

    def subset(self, indices: Tensor) -> Examples:
        return Repeated(self.batch, self.spec, len(indices))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        batch = self.batch.to(device)
        for _ in indices:
            yield batch


class Clock:
    """Seconds of the phases of steps. On a GPU its events measure them, and nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Measure the block as a part of `phase`."""
        start = self._now()
        yield
        self.spans.append((phase, start, self._now()))

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def medians(self) -> dict[str, float]:
        """Median seconds of each phase. Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, list[float]] = {}
        for phase, start, end in self.spans:
            spent = start.elapsed_time(end) / 1000 if self.on_gpu else end - start
            seconds.setdefault(phase, []).append(spent)
        return {phase: statistics.median(values) for phase, values in seconds.items()}


class Job(NamedTuple):
    """What a row trains, and on what."""

    recipe: Recipe
    learner: Learner
    schedule: Schedule
    batch: Batch
    spec: Any


def build(row: Row, settings: Settings) -> Job:
    """Build a row's network, schedule and random batch."""
    overrides = (*row.overrides, *(row.quick if settings.quick else ()))
    recipe = load(find(Path(row.recipe)), overrides)
    count = 4 if settings.quick else row.batch
    torch.manual_seed(0)
    if row.evaluation is not None:
        return _build_tuning(recipe, row.evaluation, count, settings)
    assert recipe.pretext is not None
    assert recipe.pretrain is not None
    spec, batch = _sketch(recipe.data, count)
    backbone = build_backbone(
        recipe.backbone.name, recipe.backbone.options, backbone_spec(recipe, spec)
    )
    learner = pretexts[recipe.pretext.name](recipe.pretext.options, backbone)
    return Job(recipe, learner, _adapt(recipe.pretrain, count, settings), batch, spec)


def _build_tuning(recipe: Recipe, name: str, count: int, settings: Settings) -> Job:
    """Build the fine-tuning of an evaluation."""
    evaluation = recipe.evaluate[name]
    spec, batch = _sketch(evaluation.data, count)
    classes = tuple(map(str, range(2 if isinstance(spec, TextSpec) else 1000)))
    task = tasks[evaluation.task.name](evaluation.task.options, spec, classes)
    backbone = build_backbone(recipe.backbone.name, recipe.backbone.options, task.backbone_spec)
    options = evaluation.protocol("finetune").options
    assert isinstance(options, Schedule)
    batch = Batch(batch.inputs, torch.randint(0, len(classes), (count,)))
    return Job(recipe, task.learner(backbone), _adapt(options, count, settings), batch, spec)


def _sketch(data: Named, count: int) -> tuple[Any, Batch]:
    """Return the spec and a random batch of a data set, which is not read."""
    return sources[data.name](data.options).sketch(count)


def _adapt(schedule: Schedule, batch: int, settings: Settings) -> Schedule:
    """Adapt a recipe's schedule to one GPU: its batch and a small rate change, nothing else."""
    update = {"epochs": None, "steps": STEPS, "batch": batch, "accumulate": 1, "freeze_last": 0.0}
    return schedule.model_copy(
        update={**update, "lr": 1e-4, "lr_end": 0.0, "warmup": 0.0, "compile": settings.compile}
    )


def run_plain(job: Job, views: Any, hardware: Compute, clock: Clock) -> Iterator[None]:
    """Train with a plain PyTorch loop, one step each time the iterator is advanced.

    The learner is sslrun's own, so that its compiled code is used again.
    """
    learner, schedule = job.learner, job.schedule
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if schedule.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    else:
        optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, fused=True)
    compiled = hardware.compiles(schedule.compile, STEPS)
    model: nn.Module = torch.compile(learner) if compiled else learner  # type: ignore[assignment]
    while True:
        with clock.span("forward"), hardware.autocast(schedule.precision):
            loss = model(views).loss
        with clock.span("backward"):
            loss.backward()
        with clock.span("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        yield


@torch.no_grad()
def make_views(learner: Learner, batch: Batch, generator: torch.Generator) -> Iterator[None]:
    """Make the views of a batch each time the iterator is advanced."""
    while True:
        learner.views(batch, generator)
        yield


def run_sslrun(training: Training[Any], examples: Examples) -> Iterator[None]:
    """Train with sslrun, one step each time the iterator is advanced."""
    for _ in train(training, examples, 0):
        yield


def measure(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
    """Measure a row within about `seconds`; an error is part of the result."""
    end = time.monotonic() + seconds
    try:
        if name == PROBE:
            return {"row": name, **measure_probe(settings)}
        return {"row": name, **measure_training(ROWS[name], settings, end)}
    except (UserError, RuntimeError) as error:  # RuntimeError: out of memory, or a kernel fails
        return {"row": name, "error": str(error).strip().splitlines()[0]}


def measure_training(row: Row, settings: Settings, end: float) -> dict[str, Any]:
    """Measure the training of a row; `end` is the time by which it should be done."""
    hardware = compute(settings.device)
    device = hardware.device
    matrix = [measure_matrix_rate(hardware, settings.quick)]
    job = build(row, settings)
    training = Training(job.learner, job.schedule, hardware)
    batch, generator = job.batch.to(device), hardware.generator()
    with torch.no_grad():
        views = job.learner.views(batch, generator)
    clock = Clock(device)
    size = max(50_000, 2 * job.schedule.batch)
    runs = {
        "sslrun": run_sslrun(training, Repeated(batch, job.spec, size)),
        "plain": run_plain(job, views, hardware, clock),
        "views": make_views(job.learner, batch, generator),
    }
    startup = _warm_up(runs["sslrun"], device)
    memory = memory_in_use(device)
    for run in ("plain", "views"):
        _warm_up(runs[run], device)
    clock.spans.clear()
    once = sum(time_blocks(runs, 1, 1, settings.device).values())
    left = min(TIMED_SECONDS, max(0.0, end - time.monotonic()))
    steps = 1 if settings.quick else max(1, min(MOST_STEPS, int(left / once / (BLOCKS + 1))))
    medians = time_blocks(runs, steps, 1 if settings.quick else BLOCKS, settings.device)
    matrix.append(measure_matrix_rate(hardware, settings.quick))
    assert training.flops is not None
    flops = training.flops / medians["sslrun"]
    phases = {"views": medians["views"], **clock.medians()}
    phases["waiting"] = max(0.0, medians["sslrun"] - sum(phases.values()))
    length = job.spec.length if isinstance(job.spec, TextSpec) else 1
    rate = job.schedule.batch * length / medians["sslrun"]
    result: dict[str, Any] = {
        "batch": job.schedule.batch,
        "unit": "images/s" if length == 1 else "tokens/s",
        "rate": rate,
        "plain": job.schedule.batch * length / medians["plain"],
        "ratio": medians["plain"] / medians["sslrun"],
        "tflops": flops / 1e12,
        "matrix_rate": statistics.fmean(matrix),
        "share": flops / statistics.fmean(matrix),
        "step_seconds": medians["sslrun"],
        "phases": phases,
        "memory": memory,
        "startup_seconds": startup,
        "compiled": hardware.compiles(job.schedule.compile, STEPS),
    }
    if row.evaluation is None:
        examples = _count_examples(job.recipe)
        result["run_seconds"] = startup + examples * length / rate
    return result


def _warm_up(steps: Iterator[None], device: torch.device) -> float:
    """Run the steps that are not timed, and return their seconds."""
    start = time.perf_counter()
    for _ in range(WARM_UP):
        next(steps)
    _synchronize(device)
    return time.perf_counter() - start


def _count_examples(recipe: Recipe) -> int:
    """Count the examples that the recipe's pretraining reads, each time it reads them."""
    assert recipe.pretrain is not None
    count = sources[recipe.data.name](recipe.data.options).count()
    return recipe.pretrain.total_steps(count or recipe.pretrain.batch) * recipe.pretrain.batch


def measure_matrix_rate(hardware: Compute, quick: bool) -> float:
    """Measure the FLOP/s of the fastest of several square bf16 matrix products."""
    device = hardware.device
    sides = (2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 2048)
    best = 0.0
    for side in (64,) if quick else sides:
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        a @ b  # warms up
        for _ in range(5):
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            _synchronize(device)
            best = max(best, 4 * 2 * side**3 / (time.perf_counter() - start))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_probe(settings: Settings) -> dict[str, Any]:
    """Fit logistic regression at 15 strengths to 50,000 features of width 2,048 and 10 classes."""
    device = compute(settings.device).device
    count, width, classes = (200, 8, 3) if settings.quick else (50_000, 2048, 10)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, width, generator=generator)
    y = torch.randint(0, classes, (count,), generator=generator)
    x = 0.1 * centers[y] + torch.randn(count, width, generator=generator)
    x, y = x.to(device), y.to(device)
    options = LogisticOptions()
    seconds = {}
    for name in ("sslrun", "plain"):
        _synchronize(device)
        start = time.perf_counter()
        if name == "sslrun":
            LogisticRegression(options).fit((x, y), (x[:1000], y[:1000]), classes)
        else:
            for strength in options.strengths():
                fit_plain_probe(x, y, classes, strength, options)
        _synchronize(device)
        seconds[name] = time.perf_counter() - start
    return {
        "batch": count,
        "unit": "features/s",
        "rate": count / seconds["sslrun"],
        "plain": count / seconds["plain"],
        "ratio": seconds["plain"] / seconds["sslrun"],
        "run_seconds": seconds["sslrun"],
    }


def fit_plain_probe(
    x: Tensor, y: Tensor, classes: int, strength: float, options: LogisticOptions
) -> nn.Linear:
    """Fit logistic regression with one L2 strength by torch's L-BFGS."""
    head = nn.Linear(x.shape[1], classes, device=x.device)
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=options.iterations,
        tolerance_grad=options.tolerance,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(x), y) + strength / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(evaluate)
    return head


def measure_all(names: Sequence[str], settings: Settings, minutes: float) -> list[dict[str, Any]]:
    """Measure rows, each within its share of the minutes; what one leaves goes to the next."""
    end = time.monotonic() + 60 * minutes
    results = []
    for place, name in enumerate(names):
        share = 2 * (end - time.monotonic()) / (1 + len(names) - place)
        result = _measure_in_time(name, settings, share)
        results.append(result)
        print(describe(result), flush=True)
    return results


def _measure_in_time(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
    """Measure a row in a new process, which is killed after `seconds`."""
    if settings.quick:
        return measure(name, settings, seconds)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply_async(measure, (name, settings, seconds - 5)).get(max(1, seconds))
        except multiprocessing.TimeoutError:
            return {"row": name, "error": f"not done after its {seconds:.0f} s"}


def describe(result: dict[str, Any]) -> str:
    """Describe a row's result in a line."""
    if "error" in result:
        return f"{result['row']}: {result['error']}"
    return (
        f"{result['row']}: {result['rate']:,.0f} {result['unit']}, "
        f"{result['ratio']:.2f} of the plain step's"
    )


def render(report: dict[str, Any]) -> str:
    """Render the report as a Markdown table."""
    lines = [
        f"{report['device']}, torch {report['torch']}, CUDA {report['cuda']}",
        "",
        "| row | batch | rate | plain PyTorch | ratio | share of bf16 | "
        + " | ".join(PHASES)
        + " | memory, GiB | whole run, hours |",
        "|---|" + "---:|" * (7 + len(PHASES)),
    ]
    for result in report["rows"]:
        if "error" in result:
            lines.append(f"| {result['row']} | " + result["error"].replace("|", "/") + " |")
            continue
        shares = [
            f"{result['phases'][phase] / result['step_seconds']:.0%}" if "phases" in result else ""
            for phase in PHASES
        ]
        cells = [
            result["row"],
            f"{result['batch']:,}",
            f"{result['rate']:,.0f} {result['unit']}",
            f"{result['plain']:,.0f}",
            f"{result['ratio']:.2f}",
            f"{result['share']:.1%}" if "share" in result else "",
            *shares,
            f"{result['memory'] / 2**30:.1f}" if "memory" in result else "",
            f"{result['run_seconds'] / 3600:,.2f}" if "run_seconds" in result else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    compilation: tuple[Literal["auto", "on", "off"], ...] = ("auto", "on", "off")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=NAMES, help="rows to measure")
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit of all rows")
    parser.add_argument("--compile", choices=compilation, default="auto", help="torch.compile")
    parser.add_argument("--quick", action="store_true", help="tiny networks, in one process")
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="file without an ending")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    settings = Settings(args.device, args.compile, args.quick)
    report = {
        "device": str(compute(args.device)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "quick": args.quick,
        "rows": measure_all(args.rows, settings, args.minutes),
    }
    table = render(report)
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    main()
