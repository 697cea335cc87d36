"""Draw films of objects that move over backgrounds, with exact masks.

Objects are pictures with alpha. Each moves on a path of its own, turns, bounces off the borders and
may be hidden by the objects above it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.data.image.augment import patches
from sslrun.data.video.films import VOID

PATTERNS = ("right", "left", "down", "up", "clockwise", "counterclockwise", "zigzag", "growing")
"""Kinds of motion; the class of a clip whose labels are patterns."""
POINTS = 5
"""Number of points of an object."""
OPAQUE = 0.5
"""Alpha from which on a pixel belongs to an object."""


@dataclass(frozen=True)
class Motion:
    """The motion of one object in each of B films: places, sizes and angles in T frames."""

    centers: Tensor
    """(B, T, 2): x and y in [-1, 1], where -1 and 1 are the borders of the frame."""
    scales: Tensor
    """(B, T): half of the object's side, in the same unit."""
    angles: Tensor
    """(B, T): counterclockwise turn, in radians."""

    def locate(self, points: Tensor) -> Tensor:
        """Places (B, T, P, 2) in the frames of points (B, P, 2) of the object, all in [-1, 1]."""
        cos, sin = self.angles.cos(), self.angles.sin()
        turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], dim=-2)
        turned = (turn[:, :, None] @ points[:, None, :, :, None])[..., 0]
        return self.centers[:, :, None] + self.scales[:, :, None, None] * turned


def draw_motion(
    patterns: Tensor, frames: int, speed: float, scale: tuple[float, float], turning: float,
    generator: torch.Generator,
) -> Motion:  # fmt: skip
    """Draw a motion for each film from its pattern (B,) int64 of `PATTERNS`.

    `speed` is the distance from frame to frame, and `scale` the smallest and largest half side of
    an object, all in half sides of the frame. `turning` is the largest turn from frame to frame, in
    radians. Objects bounce off the borders.
    """
    count = len(patterns)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    time = torch.arange(frames, dtype=torch.float32).expand(count, -1)
    half = uniform(*scale, 1)
    steps = speed * uniform(0.5, 1.0, 1) * time
    start = uniform(-0.7, 0.7, 2)
    offset = torch.stack(_paths(steps, uniform(0, 2 * math.pi, 1), speed), dim=1)
    chosen = offset.gather(1, patterns[:, None, None, None].expand(-1, 1, frames, 2))[:, 0]
    growth = torch.where((patterns == PATTERNS.index("growing"))[:, None], 1 + 1.5 * steps, 1.0)
    scales = (half * growth).clamp(max=0.9)
    centers = _reflect(start[:, None] + chosen, 1 - scales.clamp(max=0.8)[..., None])
    angles = uniform(0, 2 * math.pi, 1) + uniform(-turning, turning, 1) * time
    return Motion(centers, scales, angles)


def _paths(steps: Tensor, phase: Tensor, speed: float) -> list[Tensor]:
    """Offsets (B, T, 2) from the start for each of `PATTERNS`, after a distance `steps` (B, T)."""
    zero = torch.zeros_like(steps)
    radius = max(3 * speed, 0.1)
    angle = steps / radius
    zigzag = (steps / (2 * radius)).remainder(2) - 1

    def circle(direction: int) -> Tensor:
        turned = phase + direction * angle
        points = torch.stack([turned.cos() - phase.cos(), turned.sin() - phase.sin()], dim=-1)
        return radius * points

    return [
        torch.stack([steps, zero], dim=-1),
        torch.stack([-steps, zero], dim=-1),
        torch.stack([zero, steps], dim=-1),
        torch.stack([zero, -steps], dim=-1),
        circle(1),
        circle(-1),
        torch.stack([steps * 0.7, 2 * radius * zigzag.abs()], dim=-1),
        torch.stack([zero, zero], dim=-1),
    ]


def _reflect(centers: Tensor, bound: Tensor) -> Tensor:
    """Fold coordinates into [-bound, bound], as an object that bounces off the borders moves."""
    shifted = (centers + bound).remainder(4 * bound)
    return torch.where(shifted > 2 * bound, 4 * bound - shifted, shifted) - bound


def cross(motion: Motion, other: Motion, chosen: Tensor, generator: torch.Generator) -> Motion:
    """Shift the paths of `chosen` (B,) bool, so that the two centers meet in a frame.

    It is a random frame after the first.
    """
    films, frames = torch.arange(len(chosen)), motion.centers.shape[1]
    meeting = torch.randint(1, frames, (len(chosen),), generator=generator)
    shift = (other.centers - motion.centers)[films, meeting] * chosen[:, None]
    return replace(motion, centers=motion.centers + shift[:, None])


def compose(
    backgrounds: Tensor, objects: list[Tensor], motions: list[Motion]
) -> tuple[Tensor, Tensor]:
    """Draw objects over backgrounds; later objects hide earlier ones.

    `backgrounds` (B, T, 3, S, S) in [0, 1]; each of `objects` (B, 4, h, h): color and alpha in
    [0, 1]. Returns frames (B, T, 3, S, S) in [0, 1], and masks (B, T, S, S) uint8 in which the k-th
    object has the number k + 1; one that the first frame hides is void in the others.
    """
    count, frames, _, size, _ = backgrounds.shape
    canvas = backgrounds.flatten(0, 1).clone()
    masks = torch.zeros(count * frames, size, size, dtype=torch.uint8)
    for number, (pictures, motion) in enumerate(zip(objects, motions, strict=True), start=1):
        placed = _place(pictures.repeat_interleave(frames, dim=0), motion, size)
        color, alpha = placed[:, :3], placed[:, 3:]
        canvas = canvas * (1 - alpha) + color * alpha
        masks[alpha[:, 0] >= OPAQUE] = number
    drawn, masks = (x.unflatten(0, (count, frames)) for x in (canvas.clamp(0, 1), masks))
    for number in range(1, len(objects) + 1):
        unseen = ~(masks[:, 0] == number).flatten(1).any(dim=1)
        masks[(masks == number) & unseen[:, None, None, None]] = VOID
    return drawn, masks


def pick_points(alpha: Tensor) -> Tensor:
    """Pick `POINTS` points (B, POINTS, 2) of objects from their alpha (B, h, h): x, y in [-1, 1].

    They are the opaque pixels nearest to the center, and farthest to the upper left, upper right,
    lower left and lower right; two pixels at the border of the object are left out if any remain.
    """
    opaque = alpha >= OPAQUE
    inner = -F.max_pool2d(-opaque.float()[:, None], 5, stride=1, padding=2)[:, 0] > 0
    opaque = torch.where(inner.flatten(1).any(dim=1)[:, None, None], inner, opaque).flatten(1)
    places = (torch.arange(alpha.shape[-1]) + 0.5) * 2 / alpha.shape[-1] - 1
    x, y = places.repeat(len(places)), places.repeat_interleave(len(places))
    scores = torch.stack([-(x**2) - y**2, -x - y, x - y, y - x, x + y])
    masked = torch.where(opaque[:, None], scores, -torch.inf)
    return torch.stack([x, y], dim=1)[masked.argmax(dim=2)]


def draw_points(objects: list[Tensor], motions: list[Motion], masks: Tensor) -> Tensor:
    """Where points of objects are: (B, T, objects * POINTS, 2) in pixels; see `pick_points`.

    NaN where an object is absent, and where a point is out of the frame or hidden by an object, as
    `masks` (B, T, S, S) have it.
    """
    size = masks.shape[-1]
    films, frames = (torch.arange(side) for side in masks.shape[:2])
    parts = []
    for number, (pictures, motion) in enumerate(zip(objects, motions, strict=True), start=1):
        points = ((motion.locate(pick_points(pictures[:, 3])) + 1) * size - 1) / 2
        column, row = points.round().long().clamp(0, size - 1).unbind(dim=-1)
        hidden = masks[films[:, None, None], frames[:, None], row, column] > number
        outside = ((points < -0.5) | (points > size - 0.5)).any(dim=-1)
        absent = (pictures[:, 3] < OPAQUE).flatten(1).all(dim=1)[:, None, None]
        parts.append(torch.where((hidden | outside | absent)[..., None], torch.nan, points))
    return torch.cat(parts, dim=2)


def _place(pictures: Tensor, motion: Motion, size: int) -> Tensor:
    """Draw pictures (N, 4, h, h) on transparent canvases (N, 4, size, size), by bilinear sampling.

    A point p of the canvas shows the point R (p - center) / scale of the picture, both in [-1, 1],
    where R turns by minus the angle.
    """
    center, scale = motion.centers.flatten(0, 1), motion.scales.flatten()
    angle = motion.angles.flatten()
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = torch.stack([torch.stack([cos, sin], dim=-1), torch.stack([-sin, cos], dim=-1)], dim=1)
    matrix = torch.cat([rows, -(rows @ center[..., None])], dim=-1)
    grid = F.affine_grid(matrix, [len(pictures), 4, size, size], align_corners=False)
    # Colors are weighted by alpha, so that transparent pixels do not darken the edges.
    weighted = torch.cat([pictures[:, :3] * pictures[:, 3:], pictures[:, 3:]], dim=1)
    sampled = F.grid_sample(weighted, grid, align_corners=False)
    alpha = sampled[:, 3:]
    return torch.cat([sampled[:, :3] / alpha.clamp(min=1e-4), alpha], dim=1)


def draw_textures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw smooth random color textures (count, 3, size, size) in [0, 1], of several scales."""
    total = torch.zeros(count, 3, size, size)
    for cells, weight in ((3, 1.0), (7, 0.6), (15, 0.4)):
        noise = torch.rand(count, 3, cells, cells, generator=generator) - 0.5
        total += weight * F.interpolate(noise, (size, size), mode="bilinear")
    return (0.5 + 0.5 * total).clamp(0, 1)


def relight(
    films: Tensor, change: float, drift: float, noise: float, generator: torch.Generator
) -> Tensor:
    """Change the light of films (B, T, 3, S, S) in [0, 1], and add noise.

    Brightness and the logarithm of contrast each take a random walk over the frames, by at most
    `change` a step, from a start within three steps. `drift` multiplies the brightness of frame t
    by 1 + drift * t. `noise` is the standard deviation of independent noise in each value.
    """
    count, frames = films.shape[:2]
    steps = torch.rand(2, count, frames, generator=generator) * 2 - 1
    steps[..., 0] *= 3
    contrast, brightness = (change * steps).cumsum(dim=2)[..., None, None, None]
    rise = 1 + drift * torch.arange(frames)[:, None, None, None]
    lit = ((films - 0.5) * contrast.exp() + 0.5 + brightness) * rise
    return (lit + noise * torch.randn(films.shape, generator=generator)).clamp(0, 1)


def pan(
    pictures: Tensor, frames: int, size: int, speed: float, generator: torch.Generator
) -> Tensor:
    """Move a window of `size` over each picture (B, 3, H, H): frames (B, T, 3, size, size).

    It moves in a straight line by at most `speed` half sides a frame, as a camera would, and stays
    within the picture.
    """
    spare = pictures.shape[-1] - size
    direction = torch.randn(len(pictures), 2, generator=generator)
    direction = F.normalize(direction, dim=1) * min(speed * size / 2, spare / max(1, frames - 1))
    start = torch.rand(len(pictures), 2, generator=generator) * spare
    time = torch.arange(frames)[None, :, None]
    bound = torch.full_like(start, spare / 2)[:, None]
    places = _reflect(start[:, None] - bound + direction[:, None] * time, bound.clamp(min=0.5))
    corners = (places + bound).clamp(0, spare).round().long().flatten(0, 1)
    windows = patches(pictures.repeat_interleave(frames, dim=0), corners.flip(1), size)
    return windows.unflatten(0, (-1, frames))
