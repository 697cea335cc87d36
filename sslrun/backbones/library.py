"""The base class of image backbones that another library builds, and what they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Features
from sslrun.backbones.image import ImageBackbone
from sslrun.backbones.weights import check_fit, read
from sslrun.data.examples import Examples
from sslrun.errors import UserError
from sslrun.registry import Options

Normalization = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of the channels, for images in [0, 1]."""


class LibraryOptions(Options):
    """Options of every image backbone that another library builds."""

    model: str = Field(min_length=1)
    """Name of the network in the library, or a folder that holds one."""
    pretrained: bool = True
    """Whether to load the pretrained weights. False: random weights in the same architecture;
    `scratch` sets this."""
    size: int | None = Field(default=None, ge=1)
    """Side that images are resized to first, in pixels. Default: the library's own if the network
    reads one size only, as a ViT does; else images keep their size."""

    def files(self) -> list[Path]:
        """The file of weights, if there is one, and the model's folder, if `model` is one."""
        folder = Path(self.model)
        return [*super().files(), *([folder] if folder.is_dir() else [])]


class LibraryBackbone(ImageBackbone):
    """An image network of another library: its weights, its normalization, its features.

    Dropout and stochastic depth of the library's own configuration are switched off, so that
    features depend on the images alone in training, too.
    """

    Options = LibraryOptions
    shorthand = "model"
    library: ClassVar[str]
    """Name of the package, which is also its extra."""
    offers = frozenset({"tokens", "grid", "dense", "attention"})
    options: LibraryOptions
    network: nn.Module
    size: int | None
    """Side that images are resized to, in pixels; None: they keep their size."""
    missing: tuple[str, ...]
    """Capabilities in `offers` that this network does not have."""

    def measure(self, default: int) -> None:
        """Set the width and what is missing, from a black image of `size` or `default` pixels.

        Raises:
            UserError: the network cannot read such an image.
        """
        size = self.size or default
        with self.reading(size), torch.no_grad():
            features = self(torch.zeros(1, 3, size, size))
        self.width = features.pooled.shape[1]
        present = {
            "tokens": features.tokens is not None,
            "grid": features.grid is not None,
            "attention": self.attends,
        }
        self.missing = tuple(name for name, offered in present.items() if not offered)

    @contextmanager
    def reading(self, size: int) -> Iterator[None]:
        """Switch to evaluation mode; report an error as one about images of `size` pixels."""
        training = self.training
        self.eval()
        try:
            yield
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            raise UserError(
                f"{self.options.model}: can't read images of {size} pixels: {one_line(error)}; "
                "set backbone.size"
            ) from None
        finally:
            self.train(training)

    def load_file(self, path: Path) -> None:
        """Load weights of the library, with or without its classifier.

        Raises:
            UserError: the file does not exist, or is one of another architecture.
        """
        tensors, _ = read(path)
        self.load_tensors(tensors, path)

    def load_tensors(self, tensors: dict[str, Tensor], origin: Path | str) -> None:
        """Load the library's weights; `origin` is their place in messages."""
        state = self.fit_weights(self.own_names(tensors))
        check_fit(state, self, self.name, origin)
        self.load_state_dict(state)

    def set_normalization(self, normalization: Normalization) -> None:
        """Normalize images by these numbers."""
        for buffer, values in zip((self.mean, self.std), normalization, strict=True):
            buffer.copy_(torch.tensor(list(values)))

    def fit_inputs(self, examples: Examples) -> None:
        """Fit the normalization of a random network; pretrained weights keep their own."""
        if not self.options.pretrained:
            super().fit_inputs(examples)

    def own_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Use the library's own names, without the classifier."""
        kept = keep_features(self.network, tensors, self.classifiers())
        named = {f"network.{name}": tensor for name, tensor in kept.items()}
        return named | {"mean": self.mean, "std": self.std}

    def classifiers(self) -> tuple[str, ...]:
        """Beginnings of the names of the classifier's parameters in the library's files."""
        return ()

    def disabled(self) -> dict[str, str]:
        return dict.fromkeys(self.missing, "another model, such as a ViT")

    @property
    def attends(self) -> bool:
        """Whether `attention` can compute the weights of the last block."""
        return False

    def prepare(self, images: Tensor) -> Tensor:
        """Resize images (B, 3, H, W) in [0, 1] to the network's size, and normalize them."""
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = nn.functional.interpolate(
                images, (self.size, self.size), mode="bilinear", antialias=True
            )
        return self.normalize(images)

    def blocks(self) -> Sequence[nn.Module]:
        """The network's blocks from input to output; empty if they are unknown."""
        lists = [module for module in self.network.modules() if isinstance(module, nn.ModuleList)]
        sizes = [sum(parameter.numel() for parameter in blocks.parameters()) for blocks in lists]
        return list(lists[sizes.index(max(sizes))]) if lists else []

    def layers(self) -> list[list[nn.Parameter]]:
        """What comes before the blocks, then each block; what comes after joins the last one."""
        return group_by_depth(self.network, self.blocks())


def group_by_depth(network: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Group a network's parameters by depth.

    Parameters that are registered before the first block form the first group; the others outside
    the blocks join the last block.
    """
    groups = [list(block.parameters()) for block in blocks]
    if not groups:
        return [list(network.parameters())]
    inside = {parameter for group in groups for parameter in group}
    before: list[nn.Parameter] = []
    after: list[nn.Parameter] = []
    seen = False
    for parameter in network.parameters():
        if parameter in inside:
            seen = True
        else:
            (after if seen else before).append(parameter)
    groups[-1] += after
    return [group for group in (before, *groups) if group]


def as_features(
    pooled: Tensor, output: Tensor, special: int = 0, channels_last: bool = False
) -> Features:
    """Build features from a library's output: tokens (B, special + T, D), or a grid.

    A grid is (B, D, H, W), or (B, H, W, D) with `channels_last`. Tokens get a grid if they fill a
    square. Output of another width than `pooled` (B, D) is left out.
    """
    if output.ndim == 4:
        grid = output.permute(0, 3, 1, 2) if channels_last else output
        if grid.shape[1] != pooled.shape[1]:
            return Features(pooled)
        return Features(pooled, grid.flatten(2).transpose(1, 2), grid)
    tokens = output[:, special:]
    if tokens.shape[2] != pooled.shape[1]:
        return Features(pooled)
    side = round(tokens.shape[1] ** 0.5)
    if side**2 != tokens.shape[1]:
        return Features(pooled, tokens)
    return Features(pooled, tokens, tokens.transpose(1, 2).unflatten(2, (side, side)))


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights (B, heads, T, T) of queries and keys (B, heads, T, d)."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def switch_off_dropout(network: nn.Module) -> None:
    """Set the rates of dropout and of stochastic depth to zero, whatever library wrote them."""
    for module in network.modules():
        name = type(module).__name__.lower()
        if "drop" not in name and "stochasticdepth" not in name:
            continue
        for rate in ("p", "drop_prob"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)


def keep_features(
    network: nn.Module, tensors: Mapping[str, Tensor], classifiers: tuple[str, ...]
) -> dict[str, Tensor]:
    """Leave out the tensors of a classifier that `network` does not have."""
    expected = network.state_dict()
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected or not name.startswith(classifiers)
    }


def one_line(error: BaseException) -> str:
    """The message of another library's error, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Report the errors of a library that loads `model` as one line.

    Raises:
        UserError: the library does not know the model, or cannot read or download it.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{model}: can't be loaded: {one_line(error)}") from None


def extra_missing(backbone: str, library: str) -> UserError:
    """The error for a library that is not installed."""
    return UserError(f"backbone '{backbone}' needs {library}: pip install 'sslrun[{library}]'")
