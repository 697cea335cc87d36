"""Draw the attention of a backbone's last layer: on images that of [CLS], on text all of it."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.backbones.image import patch_attention
from sslrun.data.image.augment import resize, to_float
from sslrun.data.image.images import Decoder, EncodedFiles, UnreadableError
from sslrun.data.specs import ImageSpec, TextSpec
from sslrun.data.splits import load_splits
from sslrun.data.stores import IMAGE_SUFFIXES, find_files
from sslrun.data.text.sequences import build_labeled
from sslrun.errors import UserError
from sslrun.protocols.attend import heaviest
from sslrun.recipe import Recipe
from sslrun.runs import check_output
from sslrun.stages.pictures import write_matrices, write_sheet
from sslrun.stages.subject import open_backbone
from sslrun.training.device import Compute

CONTACT = "contact-sheet"
"""Name of the picture that shows all images."""
LISTED = 64
"""Largest number of images on the contact sheet."""
THUMBNAIL = 112
"""Largest side of an image on the contact sheet, in pixels."""
DIM = 0.3
"""Brightness of an image outside a mask."""
OUTLIER = 5.0
"""Ratio of the largest to the median token norm from which a map is reported as doubtful."""


@dataclass(frozen=True)
class Request:
    """What to draw, the backbone, and where to write."""

    reference: str
    """See `open_backbone`."""
    inputs: tuple[str, ...]
    """Images and folders of images; or sentences."""
    output: Path
    examples: int = 0
    """Number of images to draw from the recipe's test split."""
    size: int | None = None
    """Side of the images, in pixels; None: that of training."""
    mass: float = 0.6
    """Share of a head's attention that its mask holds."""
    seed: int = 0
    runs: Path = Path("runs")
    overrides: tuple[str, ...] = ()
    """Changes to the recipe."""
    sentences: tuple[str, ...] = ()
    """Further sentences."""


def attend(request: Request, compute: Compute) -> list[str]:
    """Draw the attention of the last layer, and return what to report, line by line.

    Raises UserError for a backbone without attention weights, and for inputs that it cannot read.
    """
    check_output(request.output, is_folder=True)
    backbone, recipe = open_backbone(
        request.reference,
        request.overrides,
        reads_images=any(Path(path).exists() for path in request.inputs),
        size=request.size,
        seed=request.seed,
        runs=request.runs,
    )
    backbone.require("attention", "sslrun attend")
    compute.put(backbone).eval()
    if isinstance(backbone.spec, TextSpec):
        return _draw_sentences(backbone, request, compute.device)
    if not isinstance(backbone.spec, ImageSpec):
        raise UserError(
            f"sslrun attend draws images and sentences, but '{backbone.name}' takes "
            f"{backbone.spec.kind} data"
        )
    if request.sentences:
        raise UserError(f"--text is for backbones of text, but '{backbone.name}' takes images")
    size = _check_size(backbone, request.size or backbone.spec.size)
    images = dict(_read_images(request, size))
    if request.examples:
        images |= _read_examples(recipe, request.examples, size)
    if not images:
        raise UserError("nothing to draw: name images or a folder of images, or give --examples 8")
    return _draw_images(backbone, images, request, compute.device)


# ---------------------------------------------------------------- images


def _check_size(backbone: Backbone, size: int) -> int:
    """Raise UserError unless patches divide images of `size` pixels."""
    patch = backbone.patch
    if size % patch:
        lower = max(patch, size // patch * patch)
        raise UserError(
            f"--size {size}: is no multiple of the patch of '{backbone.name}', {patch}: take "
            f"{lower} or {lower + patch}"
        )
    return size


def _read_images(request: Request, size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield name -> image (3, size, size) in [0, 1] for each file: its central square.

    Names are those of the files, with a number if several have the same. Raises UserError for a
    missing or unreadable file.
    """
    names = {CONTACT}
    decoder = Decoder(size)
    for path in _list_images(request.inputs):
        try:
            pixels = decoder(EncodedFiles([str(path)]), 0)
        except UnreadableError:
            raise UserError(f"{path}: is no image that can be decoded: remove it") from None
        name, number = path.stem, 1
        while name in names:
            number += 1
            name = f"{path.stem}-{number}"
        names.add(name)
        yield name, torch.tensor(pixels).permute(2, 0, 1) / 255


def _list_images(inputs: Sequence[str]) -> list[Path]:
    """List the image files among `inputs` and in the folders among them."""
    files = []
    for path in map(Path, inputs):
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise UserError(f"{path}: no such image or folder")
        found = sorted(map(Path, find_files(path, IMAGE_SUFFIXES)))
        if not found:
            raise UserError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        files += found
    return files


def _read_examples(recipe: Recipe | None, count: int, size: int) -> dict[str, Tensor]:
    """Read the first images of the recipe's test split, by name."""
    if recipe is None:
        raise UserError(
            "--examples draws a recipe's test split, but no recipe is known: name images"
        )
    examples = load_splits(recipe.data.name, recipe.data.options).test
    chosen = torch.arange(min(count, len(examples)))
    (batch,) = examples.batches([chosen], torch.device("cpu"))
    images = resize(to_float(batch.inputs), size)
    return {f"test-{index}": image for index, image in enumerate(images)}


def _draw_images(
    backbone: Backbone, images: dict[str, Tensor], request: Request, device: torch.device
) -> list[str]:
    """Write a picture of each image and the contact sheet; return what to report."""
    lines = []
    sheet: dict[str, list[Tensor]] = {}
    for name, image in images.items():
        with torch.inference_mode():
            batch = image[None].to(device)
            maps = patch_attention(backbone, batch)[0].cpu()
            norms = _last_norms(backbone, batch)
        picture = ImagePicture(image, maps, heaviest(maps, request.mass))
        write_sheet(request.output / f"{name}.png", picture.columns)
        lines.append(f"{name}: {_describe(norms)}" if norms is not None else name)
        for title, drawn in picture.summary.items():
            sheet.setdefault(title, []).append(_shrink(drawn))
    listed = {title: torch.stack(column[:LISTED]) for title, column in sheet.items()}
    write_sheet(request.output / f"{CONTACT}.png", listed)
    heads, rows, columns = maps.shape
    more = f", the first {LISTED} of them" if len(images) > LISTED else ""
    return [
        f"'{backbone.name}', {heads} heads of the last layer, {rows}x{columns} patches; masks hold "
        f"{request.mass:.0%} of a head's attention",
        *lines,
        f"{request.output}: {len(images)} pictures, and {CONTACT}.png of all{more}",
    ]


@dataclass(frozen=True)
class ImagePicture:
    """The drawings of one image."""

    image: Tensor
    """(3, H, W) in [0, 1]."""
    maps: Tensor
    """(heads, h, w): the attention of [CLS] to patches."""
    masks: Tensor
    """(heads, h, w) bool: the patches that hold most of each head's attention."""
    colors: Tensor = field(init=False)
    """(heads, 3) in [0, 1]: one color for each head."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "colors", head_colors(len(self.maps)))

    @property
    def columns(self) -> dict[str, Tensor]:
        """Title -> two images: the attention above, the masks on the image below."""
        columns = {"image": torch.stack([self.image, self.image])}
        for head, drawn in enumerate(self.overlays, start=1):
            columns[f"head {head}"] = torch.stack([self._gray(head - 1), drawn])
        columns["all heads"] = torch.stack([self.painted, self.all_masks])
        return columns

    @property
    def summary(self) -> dict[str, Tensor]:
        """Title -> one image, for the contact sheet."""
        heads = {f"head {head}": drawn for head, drawn in enumerate(self.overlays, start=1)}
        return {"image": self.image, "all heads": self.painted, **heads}

    @property
    def strengths(self) -> Tensor:
        """(heads, h, w): the attention of each head, as a share of its largest weight."""
        return self.maps / self.maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)

    @property
    def painted(self) -> Tensor:
        """All heads in one picture: each patch in the color of the head that is strongest there."""
        strength, head = self.strengths.max(dim=0)
        return self._enlarge(self.colors[head].permute(2, 0, 1) * strength)

    @property
    def overlays(self) -> list[Tensor]:
        """For each head the image, dark outside the head's mask and tinted inside."""
        heads = zip(self.masks, self.colors, strict=True)
        return [self._tint(mask, color[:, None, None]) for mask, color in heads]

    @property
    def all_masks(self) -> Tensor:
        """The image with all masks, in the color of the strongest head whose mask it is."""
        head = torch.where(self.masks, self.strengths, -1.0).argmax(dim=0)
        colors = self._enlarge(self.colors[head].permute(2, 0, 1))
        return self._tint(self.masks.any(dim=0), colors)

    def _tint(self, mask: Tensor, color: Tensor) -> Tensor:
        """The image, dark outside of `mask` (h, w), and tinted in `color` (3, ., .) inside."""
        inside = self._enlarge(mask.float()[None])
        return torch.where(inside > 0.5, 0.6 * self.image + 0.4 * color, DIM * self.image)

    def _gray(self, head: int) -> Tensor:
        """The attention of a head, white where it is largest."""
        return self._enlarge(self.strengths[head].expand(3, -1, -1))

    def _enlarge(self, patches: Tensor) -> Tensor:
        """Enlarge (C, h, w) to the size of the image, without smoothing."""
        return F.interpolate(patches[None], self.image.shape[-2:], mode="nearest-exact")[0]


def head_colors(count: int) -> Tensor:
    """Colors (count, 3) in [0, 1] of evenly spaced hues."""
    return torch.tensor([colorsys.hsv_to_rgb(head / count, 0.85, 1.0) for head in range(count)])


def _shrink(image: Tensor) -> Tensor:
    """Shrink an image (3, H, W) for the contact sheet."""
    side = min(THUMBNAIL, image.shape[-1])
    return resize(image[None], side)[0]


def _last_norms(backbone: Backbone, images: Tensor) -> Tensor | None:
    """Norms (T,) of the first image's tokens before the last LayerNorm; None if there is none.

    The last norm hides how long tokens are, so that its output would not show outliers.
    """
    seen: list[Tensor] = []

    def remember(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = inputs[:1]

    layers = [layer for layer in backbone.modules() if isinstance(layer, nn.LayerNorm)]
    hooks = [layer.register_forward_pre_hook(remember) for layer in layers]
    try:
        backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen or seen[0].ndim != 3:
        return None
    return seen[0][0].float().norm(dim=-1).cpu()


def _describe(norms: Tensor) -> str:
    """Describe the largest token norm beside the median.

    A few tokens that are much longer than all others take the attention of large ViTs that were
    trained long without registers (Darcet et al., ICLR 2024, arXiv:2309.16588).
    """
    largest, median = norms.max().item(), norms.median().item()
    text = f"largest token norm {largest:.3g}, median {median:.3g}"
    if largest > OUTLIER * median:
        text += ": an outlier, which may take the attention instead of an object"
    return text


# ---------------------------------------------------------------- sentences


def _draw_sentences(backbone: Backbone, request: Request, device: torch.device) -> list[str]:
    """Write a picture of each sentence: a matrix for each head; return what to report."""
    if request.examples or request.size:
        option = "--examples" if request.examples else "--size"
        raise UserError(f"{option} is for images, but '{backbone.name}' takes text")
    sentences = [*request.inputs, *request.sentences]
    if not sentences:
        raise UserError('nothing to draw: give a sentence, as in --text "The cat sat on the mat."')
    assert isinstance(backbone.spec, TextSpec)
    tokenizer = backbone.spec.tokenizer
    examples = build_labeled(tokenizer.encode(sentences), None, None, (), backbone.spec)
    places = torch.arange(len(sentences)).split(1)
    lines = []
    for number, batch in enumerate(examples.batches(places, device), start=1):
        with torch.inference_mode():
            weights = backbone.attention(batch.inputs)[0].float().cpu()
        labels = [tokenizer.strings[token] for token in batch.inputs.ids[0].tolist()]
        matrices = {f"head {head}": matrix for head, matrix in enumerate(weights, start=1)}
        path = request.output / f"sentence-{number}.png"
        write_matrices(path, matrices, labels)
        lines.append(f"{path}: {len(labels)} tokens, {len(weights)} heads of the last layer")
    return lines
