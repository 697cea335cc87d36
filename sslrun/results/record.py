"""Records of runs, read from their folders.

Tables, costs, comparisons, claims and reports read runs only through this module.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from sslrun.errors import UserError
from sslrun.files import SUMS
from sslrun.metric import Metric
from sslrun.results.address import Labels, Row
from sslrun.results.known_protocols import counts_per_class
from sslrun.runs import FAILURE, RESULT, check_file, damaged, read_json, read_result, read_text

YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader of libyaml if PyYAML has it, since it is about ten times faster."""

PREDICTIONS = "predictions.safetensors"
"""Name of the file in an evaluation's folder with the predicted class of each test example."""
GUESSES = "guesses.json"
"""Name of the file in a pretraining's folder with a masked language model's guesses."""
ANSWERS = "answers.json"
"""Name of the file in an evaluation's folder with answers to questions, right and wrong ones."""
log = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".gif")

T = TypeVar("T")
Scores = Mapping[str, float]
"""Metric's name -> value."""


@dataclass(frozen=True)
class Predictions:
    """What an evaluation predicted for each example of its test split."""

    truth: np.ndarray
    """(N,) class by index."""
    predicted: np.ndarray
    """(N,) class by index."""
    margin: np.ndarray
    """(N,) by how much the output of the predicted class exceeds the next one."""
    classes: tuple[str, ...]

    @property
    def correct(self) -> np.ndarray:
        """(N,) whether the predicted class is the true one."""
        return np.equal(self.truth, self.predicted)


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder.

    Each file is read once, at first use, so that the record of an unfinished run is a snapshot.
    Properties of the result raise UserError if the run is not finished or its result.json is
    damaged.
    """

    folder: Path
    row_name: str | None = None
    """The row of the run in a sweep's table; None: named after its recipe."""

    # ------------------------------------------------------------ files

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """The contents of recipe.yaml; empty if missing."""
        path = self.folder / "recipe.yaml"
        try:
            return _parse_yaml(read_text(path) or "")
        except (yaml.YAMLError, TypeError):
            raise damaged(path) from None

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The contents of identity.json, from which the hash is made; empty if missing."""
        return read_json(self.folder / "identity.json")

    @cached_property
    def environment(self) -> Mapping[str, Any]:
        """The contents of environment.json, such as device and versions; empty if missing."""
        return read_json(self.folder / "environment.json")

    @cached_property
    def result(self) -> Mapping[str, Any]:
        """The contents of result.json. Raises UserError if it is missing or damaged."""
        return read_result(self.folder)

    def check(self) -> None:
        """Raise UserError if a file of the finished run is damaged."""
        try:
            _ = self.identity, self.environment, self.result
            if (self.folder / SUMS).is_file():
                check_file(self.folder / "recipe.yaml")  # parsing takes longer than all the rest
            else:
                _ = self.recipe
            if self.is_evaluation:
                _ = self.row, self.labels, self.metric, self.test, self.seed_key
        except (AttributeError, KeyError, TypeError, ValueError):
            raise damaged(self.folder / RESULT) from None

    def log(self) -> Iterator[Mapping[str, Any]]:
        """Read metrics.jsonl line by line; skip a line that a killed process left unfinished."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError):
                    yield json.loads(line)

    @cached_property
    def predictions(self) -> Predictions | None:
        """The predictions on the test split; None if the task has no classes, or for old runs.

        Raises UserError if the file is damaged.
        """
        path = self.folder / PREDICTIONS
        if not path.is_file():
            return None
        check_file(path)
        try:
            with safe_open(path, "np") as file:
                names = ("truth", "predicted", "margin")
                arrays = {name: file.get_tensor(name) for name in names}
                return Predictions(**arrays, classes=tuple(json.loads(file.metadata()["classes"])))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise damaged(path) from error

    def read_shown(self, name: str, kind: type[T]) -> list[T]:
        """Read a file of dataclasses, such as `GUESSES`; empty if it is missing.

        Raises UserError if it is damaged.
        """
        path = self.folder / name
        text = read_text(path)
        try:
            return [] if text is None else TypeAdapter(list[kind]).validate_json(text)  # type: ignore[valid-type]
        except ValidationError:
            raise damaged(path) from None

    @property
    def pictures(self) -> list[Path]:
        """The images in the folder and in its subfolder `pictures`, in alphabetical order."""
        files = [*self.folder.glob("*"), *(self.folder / "pictures").rglob("*")]
        return sorted(path for path in files if path.suffix.lower() in PICTURES)

    # ------------------------------------------------------------ the run

    @property
    def name(self) -> str:
        """The names of the recipe's and the run's folder: "mine/probe-0123456789ab"."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return (self.folder / "result.json").is_file()

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed; None if it did not, or the run is finished."""
        path = self.folder / FAILURE
        return path.read_text(encoding="utf-8") if path.is_file() and not self.finished else None

    @property
    def stage(self) -> str:
        """ "pretrain", "measure", or an evaluation's protocol; blank if unknown."""
        stage = self.identity.get("stage") or (self.result.get("stage") if self.finished else "")
        return str(stage or "")

    @cached_property
    def pretraining(self) -> RunRecord | None:
        """The finished pretraining that an evaluation started from, in the folder beside it."""
        return self._beside("pretrain", self.identity.get("origin", {}).get("pretrain"))

    @cached_property
    def probe(self) -> RunRecord | None:
        """The finished probe whose head LP-FT started from, in the folder beside it."""
        return self._beside("probe", self.identity.get("head"))

    def _beside(self, stage: str, digest: str | None) -> RunRecord | None:
        record = RunRecord(self.folder.parent / f"{stage}-{digest}")
        return record if digest and record.finished else None

    @property
    def pretrained_elsewhere(self) -> bool:
        """Whether an evaluation started from weights of a file or a hub, not of a run."""
        origin = self.identity.get("origin", {})
        # Read `pretrained` from the recipe: an identity leaves out options at their default.
        brings_weights = "initial" in origin and self.recipe.get("backbone", {}).get(
            "pretrained", False
        )
        return ("checkpoint" in origin or bool(brings_weights)) and self.stage != "scratch"

    @property
    def device(self) -> str:
        """A description of the device; "unknown" if not recorded."""
        return str(self.environment.get("device", "unknown"))

    @property
    def devices(self) -> int:
        """The number of devices."""
        return int(self.environment.get("devices", 1))

    @property
    def threads(self) -> int | None:
        """The number of CPU threads; None on another device."""
        return int(self.environment["threads"]) if self.device.endswith("threads)") else None

    # ------------------------------------------------------------ every stage's result

    @property
    def seconds(self) -> float:
        """Wall-clock seconds, including those before an interruption."""
        return float(self.result["seconds"])

    @property
    def flops(self) -> float | None:
        """Floating-point operations; None if they were not counted."""
        return self.result.get("flops")

    @property
    def steps(self) -> int | None:
        """Optimizer steps of a pretraining; None for other runs."""
        return self.result.get("steps")

    @property
    def parameters(self) -> int | None:
        """Number of parameters of a pretraining's backbone; None for other runs."""
        return self.result.get("parameters")

    @property
    def tokens(self) -> int | None:
        """Number of tokens that a pretraining on text read; None for other data."""
        return self.result.get("tokens")

    # ------------------------------------------------------------ an evaluation's result

    @property
    def is_evaluation(self) -> bool:
        """Whether the run is an evaluation with test numbers, which has a cell in tables."""
        return "protocol" in self.result and "test" in self.result["metrics"]

    @property
    def protocol(self) -> str:
        return str(self.result["protocol"])

    @property
    def task(self) -> str:
        return str(self.result["task"])

    @property
    def suite(self) -> tuple[str, int] | None:
        """The benchmark of the task's data and its number of data sets; None if there is none."""
        suite = self.result.get("suite")
        return None if not suite else (str(suite[0]), int(suite[1]))

    @cached_property
    def labels(self) -> Labels:
        """The labels that the task was learned from."""
        return Labels.of(self.result["labels"], counts_per_class(self.protocol))

    @property
    def labeled(self) -> int:
        """The number of labeled examples."""
        return int(self.result["labelled"])

    @property
    def seed(self) -> int:
        return int(self.result["seed"])

    @property
    def restart(self) -> int:
        """The number of the restart, from 0. Restarts share their pretrained weights."""
        return int(self.result.get("restart", 0))

    @property
    def seed_key(self) -> str:
        """The key of a value in a cell: the seed, and the restart if not 0, as "0.1"."""
        return f"{self.seed}.{self.restart}" if self.restart else str(self.seed)

    @property
    def pretraining_key(self) -> str:
        """The pretraining that the result rests on, equal for results that are not independent.

        It is the seed of the weights, which restarts share. A recipe that fixes `pretrain.seed`
        shares it over all its seeds, as do weights that no run here made.
        """
        if self.pretrained_elsewhere:
            return "weights"
        if "pretrain" not in self.identity.get("origin", {}):
            return str(self.seed)
        fixed = self.recipe.get("pretrain", {}).get("seed")
        return str(self.seed if fixed is None else fixed)

    @property
    def backbone(self) -> str:
        return str(self.result["backbone"])

    @property
    def pretext(self) -> str | None:
        """The pretext task, or the file of the weights; None if not pretrained."""
        return self.result["pretext"]

    @cached_property
    def row(self) -> Row:
        """The row of the evaluation in a table."""
        initial = "pretrained" if self.pretrained_elsewhere else "no pretraining"
        pretext = self.pretext or initial
        name = self.row_name or f"{self.result['recipe']} ({self.backbone} · {pretext})"
        return Row(name, self.protocol)

    @cached_property
    def metric(self) -> Metric:
        """The task's primary metric."""
        return Metric(**self.result["metric"])

    @property
    def validation(self) -> Scores:
        """The metrics of the validation split; empty if not recorded."""
        return self.result["metrics"].get("val", {})

    @property
    def test(self) -> Scores:
        """The metrics of the task's own test split."""
        return self.result["metrics"]["test"]

    @property
    def shifts(self) -> Mapping[str, Scores]:
        """Shift -> the metrics of the shifted test set."""
        return self.result.get("shifts", {})

    @property
    def dropped(self) -> Mapping[str, Mapping[str, int]]:
        """Shift -> class -> number of examples that were left out of the shifted test set."""
        return self.result.get("dropped", {})

    @property
    def distortion(self) -> Scores | None:
        """Test set ("ID" or shift) -> how far training moved its features; None if not measured."""
        return self.result.get("distortion")

    @property
    def layers(self) -> Mapping[str, Mapping[str, float]]:
        """Layer -> "val" and "test" -> its score; empty if no layer was chosen."""
        return self.result.get("layers", {})

    @property
    def feature_length(self) -> float | None:
        """Mean length of the test features before training; None if not measured."""
        return self.result.get("feature_length")


@lru_cache(maxsize=1024)
def _parse_yaml(text: str) -> Mapping[str, Any]:
    """Parse a mapping. Cached, because many runs share their recipe and parsing is slow."""
    content = yaml.load(text, YAML_LOADER) or {}
    if not isinstance(content, dict):
        raise TypeError("not a mapping")
    return content


def find_records(folder: Path) -> list[RunRecord]:
    """Find the finished runs in a folder and its subfolders, in the order of completion.

    Damaged runs are skipped with a warning.
    """
    return drop_damaged(list_records(folder))


def list_records(folder: Path) -> list[RunRecord]:
    """Find the runs with a result in a folder, in the order of completion; some may be damaged."""
    times: dict[Path, float] = {}
    for path in folder.rglob(RESULT):
        with suppress(FileNotFoundError):  # deleted since
            times[path] = path.stat().st_mtime
    return [RunRecord(path.parent) for path in sorted(times, key=times.__getitem__)]


def drop_damaged(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the finished runs that can be read; warn of each other one."""
    intact, damaged = split_damaged(records)
    for reason in damaged.values():
        log.warning("skipped: %s", reason)
    return intact


def split_damaged(records: Iterable[RunRecord]) -> tuple[list[RunRecord], dict[str, str]]:
    """Return the finished runs that can be read, and the name of each other one -> the reason."""
    intact: list[RunRecord] = []
    damaged: dict[str, str] = {}
    for record in records:
        try:
            record.check()
        except UserError as error:
            damaged[record.name] = str(error)
        else:
            intact.append(record)
    return intact, damaged
