"""Whole images of different shapes: stored one after the other, cropped on their device.

Shape legend: B images in a batch, N in a set, P pixels of all images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples, to_device
from sslrun.data.specs import ImageSpec


@dataclass(frozen=True)
class WholeImages:
    """A batch of images of different shapes.

    Sizes are also kept on the CPU, so that no operation waits for the device to learn how much
    memory it needs.
    """

    pixels: Tensor
    """(P, 3) uint8: the pixels of all images, row by row; possibly those of other images, too."""
    places: Tensor
    """(B, 3) int64, on the device of `pixels`: first pixel, height and width of each image."""
    sizes: Tensor
    """(B, 2) int64, on the CPU: height and width of each image."""
    side: int
    """Side of the square that stands for an image if it is not cropped at random."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def numel(self) -> int:
        """Return the number of values of all images."""
        return 3 * int(self.sizes.prod(dim=1).sum())

    def to(self, device: torch.device) -> WholeImages:
        return replace(
            self, pixels=to_device(self.pixels, device), places=to_device(self.places, device)
        )

    def pin_memory(self) -> WholeImages:
        """Copy to pinned memory, which a `DataLoader` calls."""
        return replace(self, pixels=self.pixels.pin_memory(), places=self.places.pin_memory())

    def split(self, count: int) -> list[WholeImages]:
        """Split into batches of at most `count` images."""
        parts = zip(self.places.split(count), self.sizes.split(count), strict=True)
        return [replace(self, places=places, sizes=sizes) for places, sizes in parts]

    def join(self, other: WholeImages, order: Tensor) -> WholeImages:
        """Join with the images of `other`, and sort them by `order` (B,) on their device."""
        first = torch.tensor([len(self.pixels), 0, 0])
        moved = other.places + to_device(first, self.device)
        return WholeImages(
            torch.cat([self.pixels, other.pixels]),
            torch.cat([self.places, moved])[order],
            torch.cat([self.sizes, other.sizes])[order.cpu()],
            self.side,
        )

    def windows(self, corners: Tensor, height: int, width: int) -> Tensor:
        """Cut windows (B, 3, height, width) uint8, whose first pixels are at `corners` (B, 2).

        Where a window leaves its image, the nearest pixel of the image is repeated.
        """
        starts, heights, widths = self.places.T[:, :, None]
        rows = corners[:, :1] + torch.arange(height, device=self.device)
        columns = corners[:, 1:] + torch.arange(width, device=self.device)
        rows = torch.minimum(rows.clamp(min=0), heights - 1)
        columns = torch.minimum(columns.clamp(min=0), widths - 1)
        pixels = (starts + rows * widths)[:, :, None] + columns[:, None]
        return self.pixels[pixels].permute(0, 3, 1, 2)

    def centers(self) -> Tensor:
        """Return the central squares (B, 3, side, side) uint8, as torchvision's CenterCrop."""
        corners = ((self.places[:, 1:] - self.side) / 2).round().long()
        return self.windows(corners, self.side, self.side)


def pack(images: Sequence[np.ndarray], side: int) -> WholeImages:
    """Pack images (H, W, 3) uint8 of different shapes; there may be none."""
    none = np.empty((0, 3), dtype=np.uint8)
    pixels = torch.from_numpy(np.concatenate([none, *(image.reshape(-1, 3) for image in images)]))
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64).view(-1, 2)
    return WholeImages(pixels, locate(sizes), sizes, side)


def locate(sizes: Tensor) -> Tensor:
    """Return the places (N, 3) of images of these sizes (N, 2) that lie one after the other."""
    counts = sizes.prod(dim=1)
    return torch.cat([(counts.cumsum(0) - counts)[:, None], sizes], dim=1)


@dataclass(frozen=True)
class WholeImageExamples(Examples):
    """A set of whole images as one flat tensor, in memory, mapped from a file, or on the device."""

    pixels: Tensor
    """(P, 3) uint8."""
    places: Tensor
    """(N, 3) int64, on the CPU: first pixel, height and width of each image."""
    labels: Tensor | None
    classes: tuple[str, ...]
    spec: ImageSpec

    def __len__(self) -> int:
        return len(self.places)

    def subset(self, indices: Tensor) -> WholeImageExamples:
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, places=self.places[indices], labels=labels)

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    def to(self, device: torch.device) -> WholeImageExamples:
        return replace(self, pixels=self.pixels.to(device))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for batch in indices:
            labels = None if self.labels is None else self.labels[batch]
            yield Batch(self._images(self.places[batch]), labels).to(device)

    def _images(self, places: Tensor) -> WholeImages:
        """Return the images at these places; only their pixels are copied from a CPU."""
        sizes = places[:, 1:]
        if self.pixels.device.type != "cpu":
            places = to_device(places, self.pixels.device)
            return WholeImages(self.pixels, places, sizes, self.spec.size)
        ranges = zip(places[:, 0].tolist(), sizes.prod(dim=1).tolist(), strict=True)
        parts = [self.pixels[start : start + count] for start, count in ranges]
        pixels = torch.cat([self.pixels[:0], *parts])  # there may be no part
        return WholeImages(pixels, locate(sizes), sizes, self.spec.size)
