"""Single frames of films as images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor

from sslrun.data.examples import Batch, Examples
from sslrun.data.source import Source, SourceOptions, sources
from sslrun.data.specs import ImageSpec, VideoSpec
from sslrun.data.splits import Splits, load_splits
from sslrun.data.stores import Split
from sslrun.data.video.films import ClipExamples
from sslrun.errors import UserError
from sslrun.registry import Options


class FramesOptions(SourceOptions):
    """Options of single frames of films."""

    of: dict[str, Any] = Field(default_factory=lambda: {"name": "moving-digits"})
    """The data set of films, by `name`, with its options. Its own `validation` says which films are
    held out."""

    @field_validator("of", mode="before")
    @classmethod
    def _check_films(cls, of: Any) -> Any:
        """Check the films' options, and keep those that differ from the defaults."""
        named = {"name": of} if isinstance(of, str) else of
        if not isinstance(named, dict) or "name" not in named:
            raise ValueError("should name a data set of films, as in of: moving-digits")
        name = str(named["name"])
        try:
            films = sources[name]
            options = films.Options.model_validate(_without_name(named))
        except UserError as error:
            raise ValueError(str(error)) from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"'{name}' does not take {key}: {first['msg']}") from None
        if not issubclass(films.gives, VideoSpec):
            raise ValueError(f"'{name}' is {films.gives.kind} data: name a data set of films")
        return {"name": name, **options.non_defaults()}

    @property
    def films(self) -> tuple[str, Options]:
        """The name and the options of the data set of films."""
        name = str(self.of["name"])
        return name, sources[name].Options.model_validate(_without_name(self.of))

    def files(self) -> list[Path]:
        return super().files() + self.films[1].files()


def _without_name(named: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in named.items() if key != "name"}


@sources.register("frames")
class Frames(Source):
    """Single frames of films, as images: for pretext tasks and tasks that read images.

    A source of its own, so that the types of data, tasks and backbones say what fits, and any
    image pretext task learns from films without a change. Films and not frames are held out for
    validation and the test. Frames have the classes of their clips, if clips have classes.
    """

    Options = FramesOptions
    gives = ImageSpec
    shorthand = "of"
    options: FramesOptions

    @cached_property
    def _films(self) -> Splits:
        name, options = self.options.films
        return load_splits(name, options, self.progress)

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("train", "val", "test") if self._films.has_val else ("train", "test")

    def load(self, split: Split) -> FrameExamples:
        films = self._films
        clips = {"train": lambda: films.train, "val": lambda: films.val, "test": lambda: films.test}
        examples = clips[split]()
        assert isinstance(examples, ClipExamples)
        return frames_of(examples)

    def check_available(self) -> None:
        self._films.source.check_available()

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        spec, batch = self._films.source.sketch(count)
        assert isinstance(spec, VideoSpec)
        return spec.frame, Batch(batch.inputs[:, 0], None)

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "those of the films",
            "labels": "the classes of the clips, if they have classes",
            "homepage": "that of the films, see `of`",
            "license": "that of the films",
        }


@dataclass(frozen=True)
class FrameExamples(Examples):
    """Clips of one frame each, as images (C, H, W) uint8."""

    clips: ClipExamples

    @property
    def spec(self) -> ImageSpec:  # type: ignore[override]
        return self.clips.spec.frame

    @property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        return self.clips.clip_labels

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.clips.classes

    @property
    def nbytes(self) -> int | None:
        return self.clips.nbytes

    def to(self, device: torch.device) -> FrameExamples:
        return FrameExamples(self.clips.to(device))

    def __len__(self) -> int:
        return len(self.clips)

    def subset(self, indices: Tensor) -> FrameExamples:
        return FrameExamples(self.clips.subset(indices))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for batch in self.clips.batches(indices, device):
            labels = batch.labels if self.clips.clip_labels is not None else None
            yield Batch(batch.inputs.flatten(0, 1), labels)


def frames_of(clips: ClipExamples) -> FrameExamples:
    """List every frame of clips once, with the class of the first clip that shows it."""
    films = clips.clips[:, :1].expand(-1, clips.spec.frames)
    numbers = clips.frame_numbers(torch.arange(len(clips)))
    pairs = torch.stack([films.flatten(), numbers.flatten()], dim=1)
    unique, owner = pairs.unique(dim=0, return_inverse=True)
    first = torch.empty(len(unique), dtype=torch.int64)
    first.scatter_reduce_(0, owner, torch.arange(len(pairs)), "amin", include_self=False)
    labels = None if clips.clip_labels is None else clips.clip_labels[first // clips.spec.frames]
    singles = torch.cat([unique, torch.ones(len(unique), 1, dtype=torch.int64)], dim=1)
    spec = replace(clips.spec, frames=1)
    return FrameExamples(ClipExamples(clips.films, singles, spec, labels, clips.classes))
