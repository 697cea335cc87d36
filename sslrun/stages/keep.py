"""Keep the weights of the feature check with the best diagnostic: `pretrain.keep: best`."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sslrun.errors import UserError
from sslrun.files import read_metadata, read_tensors, write_tensors
from sslrun.tasks.diagnostics import COSTS, Diagnostic

PREFIX = "best-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestWeights:
    """The weights of the best feature check so far, in a folder.

    A file best-N.safetensors holds the weights at step N and the check's record. A run that resumes
    at an earlier step repeats its checks, so the files that an earlier step needs are kept, too.
    """

    folder: Path
    """The folder of the run's checkpoints."""
    diagnostic: Diagnostic

    def consider(self, step: int, record: Mapping[str, float], network: nn.Module) -> None:
        """Keep the network's weights if its check at `step` is better than all checks before it.

        Of equal checks the first is kept. Files of later steps, which a run wrote before it was
        killed, are removed.
        """
        for path in self._files():
            if _step_of(path) >= step:
                path.unlink()
        cost, best = self._cost(record), self.record
        if math.isinf(cost) or (best is not None and cost >= self._cost(best)):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{PREFIX}{step:09d}.safetensors"
        write_tensors(path, network.state_dict(), {"record": json.dumps(dict(record))})
        self._remove_unneeded()

    @property
    def step(self) -> int | None:
        """The step of the best check; None if no check had the diagnostic."""
        files = self._files()
        return _step_of(files[-1]) if files else None

    @property
    def record(self) -> dict[str, float] | None:
        """The record of the best check; None if no check had the diagnostic."""
        files = self._files()
        if not files:
            return None
        record: dict[str, float] = json.loads(read_metadata(files[-1])["record"])
        return record

    def load_into(self, network: nn.Module) -> None:
        """Load the weights of the best check, if there is one."""
        files = self._files()
        if files:
            content = read_tensors(files[-1])
            if content is None:
                raise UserError(
                    f"{files[-1]}: damaged; give the same command again to go back before it"
                )
            network.load_state_dict(content[0])

    def forget_damaged(self) -> None:
        """Remove damaged weights and the checkpoints that need them.

        Training then resumes from an earlier checkpoint, or begins again.
        """
        for path in self._files():
            if read_tensors(path) is None:
                log.warning("%s: damaged; going back to a checkpoint before it", path)
                for checkpoint in self.folder.glob("step-*"):
                    if _step_of(checkpoint) >= _step_of(path):
                        shutil.rmtree(checkpoint)
                path.unlink()

    def _cost(self, record: Mapping[str, float]) -> float:
        """The diagnostic as a cost; infinite if it is missing or not a number."""
        cost = COSTS[self.diagnostic](record.get(self.diagnostic, math.nan))
        return cost if math.isfinite(cost) else math.inf

    def _files(self) -> list[Path]:
        """The files of best checks, oldest first; each is better than those before it."""
        return sorted(self.folder.glob(f"{PREFIX}*.safetensors"))

    def _remove_unneeded(self) -> None:
        """Remove all files except the last one and the best of each checkpoint's past."""
        files = self._files()
        needed = {files[-1]}
        for checkpoint in self.folder.glob("step-*"):
            earlier = [path for path in files if _step_of(path) <= _step_of(checkpoint)]
            needed.update(earlier[-1:])
        for path in files:
            if path not in needed:
                path.unlink()


def _step_of(path: Path) -> int:
    """The step in the name of a file or of a checkpoint's folder."""
    return int(path.stem.partition("-")[2])
