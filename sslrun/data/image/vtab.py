"""VTAB-1k, the Visual Task Adaptation Benchmark with 1,000 examples per task.

Zhai et al. 2019, arXiv:1910.04867.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import Field

from sslrun.data.examples import Examples
from sslrun.data.image.images import EncodedSplit, EncodedSubset, load_images
from sslrun.data.image.sources import ImageOptions, ImageSource
from sslrun.data.source import sources
from sslrun.data.stores import (
    Hub,
    HubStore,
    Split,
    Store,
    explain_download,
    find_local_folder,
    open_local_store,
)
from sslrun.errors import UserError

VtabSet = Literal[
    "caltech101", "cifar100", "dtd", "flowers", "pets", "sun397", "svhn",
    "pcam", "eurosat", "resisc45", "diabetic_retinopathy",
    "clevr_count_all", "clevr_closest_object_distance", "dmlab", "kitti_closest_vehicle_distance",
    "dsprites_label_x_position", "dsprites_label_orientation", "smallnorb_label_azimuth",
    "smallnorb_label_elevation",
]  # fmt: skip
"""Names of the natural, the specialized and the structured sets."""
EXAMPLES, VAL = 1000, 200
"""Number of examples to learn from, and how many of them select hyperparameters."""
TRAIN_AND_TEST: Mapping[Split, str] = {"train": "train", "test": "test"}


def locate_on_hub(name: str) -> tuple[Hub, str]:
    """Return where a set is on the hub, and its column of labels.

    The labels are those of VTAB's own loaders, as CLIP benchmark published them. SUN397 is from
    another repository, because CLIP benchmark has no training images of it.
    """
    if name == "sun397":
        return Hub("dpdl-benchmark/sun397", TRAIN_AND_TEST), "label"
    return Hub(f"clip-benchmark/wds_vtab-{name}", TRAIN_AND_TEST), "cls"


@sources.register("vtab")
class Vtab(ImageSource):
    """One of VTAB's 19 sets: 800 images to train on, 200 to select by, the whole test split.

    Images are resized to a square and not cropped, as in VTAB.

    Deviation: the 1,000 images are drawn at random from the training split, always the same ones,
    without regard to classes, because only a training and a test split are read. VTAB takes the
    first 800 of its training split and the first 200 of its validation split.
    """

    class Options(ImageOptions):
        set: VtabSet
        """Name of the set."""
        size: int = Field(224, ge=4, le=1024)
        """Side of the stored square images, in pixels."""

    suite = ("VTAB", len(get_args(VtabSet)))

    @classmethod
    def found(cls, options: Options) -> Path | None:
        return find_local_folder(f"vtab/{options.set}")

    @property
    def title(self) -> str:
        return f"vtab-{self.options.set}"

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("train", "val", "test")

    @cached_property
    def store(self) -> Store:
        path = f"vtab/{self.options.set}"
        folder = find_local_folder(path)
        if folder is not None:
            return open_local_store(folder)
        hub, label = locate_on_hub(self.options.set)
        return HubStore(self.title, hub, explain_download(path, "vtab"), label=label)

    def load(self, split: Split) -> Examples:
        stored: Split = "test" if split == "test" else "train"
        if stored not in self.store.splits:
            raise UserError(f"{self.title}: has no {stored} split: put one beside the others")
        return load_images(
            f"{self.title}-{split}",
            {"split": split, "vtab": [EXAMPLES, VAL], **self.store.identity(stored)},
            lambda: self._select(split, self.store.open(stored)),
            self.options.size,
            self.options.skip_corrupt,
            self.progress,
            squash=True,
        )

    @staticmethod
    def _select(split: Split, whole: EncodedSplit) -> EncodedSplit:
        """Return the images of `split` among the 1,000 drawn; the whole test split."""
        if split == "test":
            return whole
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(len(whole.images), generator=generator)[:EXAMPLES]
        val_count = len(drawn) * VAL // EXAMPLES
        selected = drawn[:val_count] if split == "val" else drawn[val_count:]
        labels = None if whole.labels is None else whole.labels[selected]
        images = EncodedSubset(whole.images, selected.tolist())
        return replace(whole, images=images, labels=labels)

    @classmethod
    def expected_side(cls) -> int | None:
        return 224

    @classmethod
    def count(cls) -> int | None:
        return EXAMPLES - VAL

    @classmethod
    def describe(cls) -> dict[str, str]:
        names = get_args(VtabSet)
        places = "; ".join(f"{name}: {_describe_place(name)}" for name in names)
        return {
            "sets": ", ".join(names),
            "splits": f"train {EXAMPLES - VAL}, val {VAL}, test as in VTAB",
            "homepage": "https://google-research.github.io/task_adaptation",
            "searched": f"SSLRUN_DATA/vtab/<set>, data/vtab/<set>, then the hub: {places}",
        }


def _describe_place(name: str) -> str:
    """Say where a set is found: its local folder, or else its page on the hub."""
    folder = find_local_folder(f"vtab/{name}")
    if folder is not None:
        return f"found at {folder}"
    return f"https://huggingface.co/datasets/{locate_on_hub(name)[0].repository}"
