"""The tensors of sharded trainings in checkpoints, read by any number of processes.

Importing torch.distributed.checkpoint takes seconds, so that only sharded trainings do.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sslrun import distributed
from sslrun.training.loop import Training
from sslrun.training.shard import is_sharded


def save_shards(training: Training[Any], folder: Path) -> None:
    """Write this process's part of a sharded training's tensors as safetensors.

    Tensors that are not sharded, such as buffers, are the first process's.
    """
    tensors = {
        name: tensor
        for name, tensor in _tensors(training).items()
        if distributed.is_main() or is_sharded(tensor)
    }
    try:
        # Its other formats hold pickles, which can run code when they are read.
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(tensors, storage_writer=writer, no_dist=distributed.world_size() == 1)
    except CheckpointException as error:  # no Exception, but one of each process that failed
        raise RuntimeError(str(error)) from None


def _tensors(training: Training[Any]) -> dict[str, Tensor]:
    """The tensors of a sharded training's learner, average and optimizers, by name."""
    tensors = {f"learner.{name}": value for name, value in training.learner.state_dict().items()}
    if training.average is not None:
        averages = training.average.state_dict()
        tensors |= {f"average.{name}": value for name, value in averages.items()}
    names = {parameter: name for name, parameter in training.learner.named_parameters()}
    for optimizer in training.optimizers:
        for parameter, state in optimizer.state.items():
            slots = {f"optimizer.{names[parameter]}.{slot}": state[slot] for slot in state}
            tensors |= {name: value for name, value in slots.items() if value is not None}
    return tensors


def load_shards(training: Training[Any], folder: Path) -> None:
    """Load the tensors of `save_shards`, of any number of processes, in place."""
    reader = HuggingFaceStorageReader(str(folder))
    parameters = dict(training.learner.named_parameters())
    states = {
        parameter: optimizer.state[parameter]
        for optimizer in training.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, saved in reader.read_metadata().state_dict_metadata.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer" and isinstance(saved, TensorStorageMetadata):
            path, _, slot = rest.rpartition(".")
            like = parameters[path]
            states[like][slot] = (
                torch.zeros_like(like)
                if saved.size == like.shape
                else torch.zeros(saved.size, device=like.device)
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads
        load(_tensors(training), storage_reader=reader, no_dist=distributed.world_size() == 1)
