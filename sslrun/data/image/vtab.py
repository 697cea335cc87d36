"""The Visual Task Adaptation Benchmark with a thousand examples a task: VTAB-1k (Zhai et al. 2019)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import Field

from sslrun.data.examples import Examples
from sslrun.data.image.images import EncodedSplit, EncodedSubset, load_images
from sslrun.data.image.sources import ImageOptions, ImageSource
from sslrun.data.source import sources
from sslrun.data.stores import Hub, HubStore, Split, Store, local_store
from sslrun.errors import UserError

Set = Literal[
    "caltech101", "cifar100", "dtd", "flowers", "pets", "sun397", "svhn",
    "pcam", "eurosat", "resisc45", "diabetic_retinopathy",
    "clevr_count_all", "clevr_closest_object_distance", "dmlab", "kitti_closest_vehicle_distance",
    "dsprites_label_x_position", "dsprites_label_orientation", "smallnorb_label_azimuth", "smallnorb_label_elevation",
]  # fmt: skip
"""Natural, specialised, structured."""
EXAMPLES, VAL = 1000, 200
"""To learn from, and how many of them choose hyper-parameters."""
TRAIN_AND_TEST: Mapping[Split, str] = {"train": "train", "test": "test"}


def hub(name: str) -> tuple[Hub, str]:
    """Where a set lies, and the column of its labels: those of VTAB's own loaders, as CLIP benchmark published them; that
    has no training images of SUN397."""
    if name == "sun397":
        return Hub("dpdl-benchmark/sun397", TRAIN_AND_TEST), "label"
    return Hub(f"clip-benchmark/wds_vtab-{name}", TRAIN_AND_TEST), "cls"


@sources.register("vtab")
class Vtab(ImageSource):
    """One of VTAB's nineteen sets: 800 images to train on, 200 to choose by, and the whole test split.

    They are drawn from the training split at random, always the same ones, whatever their classes; VTAB's own are the
    first 800 of its training split and the first 200 of its validation split. Images are resized to a square, as
    there, and not cropped.
    """

    class Options(ImageOptions):
        set: Set
        """Which of them."""
        size: int = Field(224, ge=4, le=1024)
        """Side of the stored square images, in pixels."""

    suite = ("VTAB", len(get_args(Set)))

    @property
    def title(self) -> str:
        return f"vtab-{self.options.set}"

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("train", "val", "test")

    @cached_property
    def store(self) -> Store:
        for folder in self._folders(self.options.set):
            if folder.is_dir():
                return local_store(folder)
        remedy = f"Put it at data/vtab/{self.options.set}, or set SSLRUN_DATA; see `sslrun show data vtab`"
        place, label = hub(self.options.set)
        return HubStore(self.title, place, remedy, label=label)

    def load(self, split: Split) -> Examples:
        stored: Split = "test" if split == "test" else "train"
        if stored not in self.store.splits:
            raise UserError(f"{self.title}: has no {stored} split: put one beside the others")
        return load_images(
            f"{self.title}-{split}",
            {"split": split, "vtab": [EXAMPLES, VAL], **self.store.identity(stored)},
            lambda: self._chosen(split, self.store.open(stored)),
            self.options.size,
            self.options.skip_corrupt,
            self.progress,
            squash=True,
        )

    @staticmethod
    def _chosen(split: Split, whole: EncodedSplit) -> EncodedSplit:
        if split == "test":
            return whole
        every = torch.randperm(len(whole.images), generator=torch.Generator().manual_seed(0))[:EXAMPLES]
        val = len(every) * VAL // EXAMPLES
        chosen = every[:val] if split == "val" else every[val:]
        labels = None if whole.labels is None else whole.labels[chosen]
        return replace(whole, images=EncodedSubset(whole.images, chosen.tolist()), labels=labels)

    @staticmethod
    def _folders(name: str) -> list[Path]:
        roots = [os.environ.get("SSLRUN_DATA"), "data"]
        return [Path(root).expanduser() / "vtab" / name for root in roots if root]

    @classmethod
    def side(cls) -> int | None:
        return 224

    @classmethod
    def count(cls) -> int | None:
        return EXAMPLES - VAL

    @classmethod
    def describe(cls) -> dict[str, str]:
        where: dict[str, Any] = {
            name: next((f"found at {each}" for each in cls._folders(name) if each.is_dir()), None)
            or f"https://huggingface.co/datasets/{hub(name)[0].repository}"
            for name in get_args(Set)
        }
        return {
            "sets": ", ".join(where),
            "splits": f"train {EXAMPLES - VAL}, val {VAL}, test as in VTAB",
            "homepage": "https://google-research.github.io/task_adaptation",
            "looked for": "SSLRUN_DATA/vtab/<set>, data/vtab/<set>, then on the hub: "
            + "; ".join(f"{name}: {place}" for name, place in where.items()),
        }
