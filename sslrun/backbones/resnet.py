"""Residual networks (He et al., CVPR 2016, arXiv:1512.03385).

Parameters have torchvision's names and order, so that its weights can be loaded. The blocks are
written out here because importing torchvision takes longer than importing torch.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones import conversion
from sslrun.backbones.base import Exported, Features, backbones
from sslrun.backbones.image import ImageBackbone
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.registry import Options

Stride = Annotated[int, Field(ge=1, le=2)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual connection."""

    expansion = 1
    """Width of the output, as a multiple of `planes`."""

    def __init__(
        self, before: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        """`downsample` maps the input to the output's shape; None if it has it already."""
        super().__init__()
        self.conv1 = nn.Conv2d(before, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """A 1x1 convolution to fewer channels, a 3x3, a 1x1 to more, and a residual connection.

    Deviation from the paper, as in torchvision: the 3x3 convolution has the stride (ResNet v1.5).
    """

    expansion = 4
    """Width of the output, as a multiple of `planes`."""

    def __init__(
        self, before: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        """`downsample` maps the input to the output's shape; None if it has it already."""
        super().__init__()
        after = self.expansion * planes
        self.conv1 = nn.Conv2d(before, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(ImageBackbone):
    """Residual network; pooled features are the global average of the last stage."""

    offers = frozenset({"tokens", "grid", "dense", "layers"})
    exports = ("transformers", "timm", "torchvision")

    class Options(Options):
        stem: Literal["imagenet", "small"] = "imagenet"
        """First layers. imagenet: 7x7 convolution with stride 2, then a max-pool. small: 3x3
        convolution without max-pool, for images of about 32 pixels (SimCLR, Chen et al. 2020,
        B.9)."""
        channels: int = Field(default=64, ge=4, multiple_of=4)
        """Width of the first stage; the width doubles at each of the three later stages."""
        strides: tuple[Stride, Stride, Stride, Stride] = (1, 2, 2, 2)
        """Stride of each stage. The contrastive random walk (Jabri et al. 2020) has 1, 2, 1, 1, for
        a finer grid."""
        padding: Literal["zeros", "reflect"] = "zeros"
        """Padding of convolutions. From zeros a network learns where the borders are; the
        contrastive random walk reflects the image instead."""
        zero_init_residual: bool = False
        """Initialize the last scale of each residual branch with zero (Goyal et al. 2017)."""

    options: Options
    bottleneck: ClassVar[bool] = False
    """Whether blocks are bottlenecks of three convolutions, instead of two convolutions."""
    blocks: ClassVar[tuple[int, int, int, int]]
    """Number of blocks in each stage."""

    def __init__(self, options: ResNet.Options, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        block: type[BasicBlock | Bottleneck] = Bottleneck if self.bottleneck else BasicBlock
        planes = [options.channels * 2**stage for stage in range(4)]
        widths = [count * block.expansion for count in planes]
        small = options.stem == "small"
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(
            spec.channels, planes[0], kernel, stride, padding=kernel // 2, bias=False
        )
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = [planes[0], *widths[:-1]]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(block, *sizes)
            for sizes in zip(inputs, planes, self.blocks, options.strides, strict=True)
        )
        self.width = widths[-1]
        self.layer_widths = tuple(widths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = options.padding
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif options.zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, C, H, W) in [0, 1] of any size."""
        x = self._stages(inputs)[-1]
        return Features(x.mean(dim=(2, 3)), x.flatten(2).transpose(1, 2), x)

    def pooled_layers(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The global average (B, D) of each of the four stages."""
        return tuple(grid.mean(dim=(2, 3)) for grid in self._stages(inputs))

    def dense(self, inputs: Tensor, layer: int | None = None) -> Tensor:
        """Features (B, D, H, W) after stage `layer`, 1 to 4."""
        if layer is not None and not 1 <= layer <= 4:
            raise UserError(f"'{self.name}' has no layer {layer}: give a stage from 1 to 4")
        return self._stages(inputs, layer or 4)[-1]

    def _stages(self, inputs: Tensor, count: int = 4) -> list[Tensor]:
        """The grids (B, D, H, W) after each of the first `count` stages."""
        self._check_reflection(min(inputs.shape[-2:]), count)
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalize(inputs)))))
        grids = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[:count]:
            unsafe = x.device.type == "cpu" and x.shape[-2:] == (1, 1)
            x = _in_float(stage, x) if unsafe else stage(x)
            grids.append(x)
        return grids

    def _check_reflection(self, side: int, count: int) -> None:
        """Raise UserError if a grid of the first `count` stages has no second place to reflect."""
        if self.options.padding == "zeros":
            return
        stem = 1 if self.options.stem == "small" else 4
        total = math.prod((stem, *self.options.strides[:count]))
        if side <= total:
            raise UserError(
                f"'{self.name}': padding: reflect needs a grid of 2x2 places, but a side of {side} "
                f"pixels gives one with a stride of {total}: take lower strides, larger images or "
                "patches, or padding: zeros"
            )

    def export(self, library: str) -> Exported:
        converters = {
            "timm": conversion.resnet_to_timm,
            "torchvision": conversion.resnet_to_torchvision,
            "transformers": conversion.resnet_to_transformers,
        }
        return converters[library](self)

    def layers(self) -> list[list[nn.Parameter]]:
        """The stem, then each residual block."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        blocks = [list(block.parameters()) for stage in stages for block in stage]
        return [[*self.conv1.parameters(), *self.bn1.parameters()], *blocks]


def _in_float(stage: nn.Module, x: Tensor) -> Tensor:
    """Run a stage in float32, on a CPU and for inputs of a single position.

    In bf16 oneDNN's gradient of a strided convolution reads memory out of bounds for such inputs
    (torch 2.14).
    """
    with torch.autocast("cpu", enabled=False):
        return stage(x.float())


def _stage(
    block: type[BasicBlock | Bottleneck], before: int, planes: int, count: int, stride: int
) -> nn.Sequential:
    """Build a stage of `count` blocks, the first with the stride.

    It maps `before` channels to `planes` times the block's expansion.
    """
    after = planes * block.expansion
    shortcut = None
    if stride != 1 or before != after:
        shortcut = nn.Sequential(
            nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
        )
    return nn.Sequential(
        block(before, planes, stride, shortcut), *(block(after, planes) for _ in range(count - 1))
    )


@backbones.register("resnet18")
class ResNet18(ResNet):
    """ResNet-18 (He et al. 2016): 11.2 M parameters without a classifier."""

    blocks = (2, 2, 2, 2)


@backbones.register("resnet34")
class ResNet34(ResNet):
    """ResNet-34 (He et al. 2016): 21.3 M parameters without a classifier."""

    blocks = (3, 4, 6, 3)


@backbones.register("resnet50")
class ResNet50(ResNet):
    """ResNet-50 (He et al. 2016): 23.5 M parameters without a classifier."""

    bottleneck, blocks = True, (3, 4, 6, 3)
