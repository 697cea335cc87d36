"""What a policy sees: codes of pictures, or true states."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from sslrun.data.control.environments import Environment
from sslrun.data.examples import Batch, Examples
from sslrun.pretexts.autoencoder import Autoencoder
from sslrun.tasks.reach import Reach

ENCODED = 256
"""Pictures encoded at a time."""


class Space(ABC):
    """The space of codes (B, D) float32, in which goals are set."""

    def __init__(self, task: Reach) -> None:
        self.task = task

    @abstractmethod
    def encode(self, examples: Examples) -> Tensor:
        """Encode pictures of a data set to codes (N, D)."""

    @abstractmethod
    def observe(self, environment: Environment, states: np.ndarray) -> Tensor:
        """Encode the current states (B, S) of an environment to codes (B, D)."""

    def decode(self, codes: Tensor) -> Tensor | None:
        """Pictures (B, 3, H, W) in [0, 1] that codes stand for; None if they cannot be drawn."""
        return None


class StateSpace(Space):
    """True states as codes: the oracle."""

    def encode(self, examples: Examples) -> Tensor:
        return self.task.targets(examples)

    def observe(self, environment: Environment, states: np.ndarray) -> Tensor:
        return torch.from_numpy(states)


class LatentSpace(Space):
    """Codes of pictures: the means of an autoencoder's latent distribution."""

    def __init__(self, task: Reach, autoencoder: Autoencoder, device: torch.device) -> None:
        super().__init__(task)
        self.autoencoder, self.device = autoencoder.requires_grad_(False).eval(), device

    def encode(self, examples: Examples) -> Tensor:
        indices = torch.arange(len(examples)).split(ENCODED)
        parts = [self._encode(batch) for batch in examples.batches(indices, self.device)]
        return torch.cat(parts)

    def observe(self, environment: Environment, states: np.ndarray) -> Tensor:
        return self._encode(Batch(self.task.observe(environment), None).to(self.device))

    def _encode(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.encode(self.task.inputs(batch)).mean.cpu()

    def decode(self, codes: Tensor) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.decode(codes.to(self.device)).cpu()
