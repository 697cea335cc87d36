"""Logs of metrics: metrics.jsonl always; TensorBoard, Weights & Biases, Trackio by choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from sslrun import distributed
from sslrun.errors import UserError
from sslrun.runs import Run

Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def logs(run: Run, to: Iterable[str]) -> Iterator[Log]:
    """Yield a function that logs a record to the run and to the loggers named in `to`.

    A record is {"step": int, name: number, ...}. Only the main process logs.
    """
    if not distributed.is_main():
        yield lambda record: None
        return
    with ExitStack() as stack:
        sinks: list[Log] = [run.log, *(stack.enter_context(_SINKS[name](run)) for name in to)]

        def log(record: Mapping[str, Any]) -> None:
            for sink in sinks:
                sink(record)

        yield log


@contextmanager
def _tensorboard(run: Run) -> Iterator[Log]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "watch.to: tensorboard is not installed: pip install 'sslrun[tensorboard]'"
        ) from None
    writer = SummaryWriter(str(run.path / "tensorboard"))
    try:

        def log(record: Mapping[str, Any]) -> None:
            for name, value in _numbers(record):
                writer.add_scalar(name, value, record["step"])

        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(run: Run) -> Iterator[Log]:
    try:
        import wandb
    except ImportError:
        raise UserError("watch.to: wandb is not installed: pip install 'sslrun[wandb]'") from None
    try:
        board = wandb.init(
            project="sslrun", group=run.recipe, name=run.path.name, id=run.hash, resume="allow",
            config=dict(run.identity), dir=str(run.path),
        )  # fmt: skip
    except wandb.Error as error:
        raise UserError(f"watch.to: wandb: {error} Or set WANDB_MODE=offline") from None
    with board:  # an error inside marks the run there as failed
        yield lambda record: board.log(dict(_numbers(record)), step=record["step"])


@contextmanager
def _trackio(run: Run) -> Iterator[Log]:
    try:
        import trackio
    except ImportError:
        raise UserError(
            "watch.to: trackio is not installed: pip install 'sslrun[trackio]'"
        ) from None
    board = trackio.init(
        project="sslrun", group=run.recipe, name=run.path.name, config=dict(run.identity),
        resume="allow", embed=False,
    )  # fmt: skip
    try:
        yield lambda record: board.log(dict(_numbers(record)), step=record["step"])
    finally:
        board.finish()


def _numbers(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [
        (name, value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    ]


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
