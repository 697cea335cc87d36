"""Residual networks (He et al. 2016), torchvision's."""

from __future__ import annotations

from typing import Literal

import torchvision
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.images import ImageBackbone
from sslrun.data.examples import InputSpec
from sslrun.registry import Options


class _Network(torchvision.models.ResNet):
    """torchvision's, with stages of any width, no classifier, and a stem for small images."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int], options: ResNet.Options) -> None:
        self._share = options.channels / 64
        super().__init__(block, layers, zero_init_residual=options.zero_init_residual)
        if options.channels != 64 or options.stem == "small":
            small = options.stem == "small"
            self.conv1 = nn.Conv2d(
                3, options.channels, 3 if small else 7, stride=1 if small else 2, padding=1 if small else 3, bias=False
            )
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(options.channels)
        if options.stem == "small":
            self.maxpool = nn.Identity()
        self.width = self.fc.in_features if options.channels == 64 else self.inplanes
        self.fc = nn.Identity()

    def _make_layer(self, block: type, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == 64:
            self.inplanes = round(64 * self._share)
        return super()._make_layer(block, round(planes * self._share), blocks, stride, dilate)

    def grid(self, images: Tensor) -> Tensor:
        images = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(images))))


class ResNet(ImageBackbone):
    """A residual network; pooled features are the global average of the last stage's."""

    class Options(Options):
        stem: Literal["imagenet", "small"] = "imagenet"
        """small, for images of 32 pixels or so: 3x3 first convolution, no max-pool (SimCLR, Chen et al. 2020, B.9)."""
        channels: int = Field(default=64, ge=4, multiple_of=4)
        """Width of the first stage; each of the three after it is twice as wide as the one before."""
        zero_init_residual: bool = False
        """Start every residual branch at zero (Goyal et al. 2017)."""

    block: type[BasicBlock | Bottleneck]
    blocks: tuple[int, int, int, int]

    def __init__(self, options: ResNet.Options, spec: InputSpec) -> None:
        super().__init__(options, spec)
        self.network = _Network(self.block, list(self.blocks), options)
        self.width = self.network.width

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, 3, H, W) in [0, 1] of any size."""
        grid = self.network.grid(self.normalize(inputs))
        return Features(grid.mean(dim=(2, 3)), grid.flatten(2).transpose(1, 2), grid)

    def layers(self) -> list[list[nn.Parameter]]:
        net = self.network
        stages = [block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage]
        return [[*net.conv1.parameters(), *net.bn1.parameters()], *(list(block.parameters()) for block in stages)]


@backbones.register("resnet18", modality="image")
class ResNet18(ResNet):
    """ResNet-18 (He et al. 2016): 11.2 M parameters without a classifier."""

    block, blocks = BasicBlock, (2, 2, 2, 2)


@backbones.register("resnet34", modality="image")
class ResNet34(ResNet):
    """ResNet-34 (He et al. 2016): 21.3 M parameters without a classifier."""

    block, blocks = BasicBlock, (3, 4, 6, 3)


@backbones.register("resnet50", modality="image")
class ResNet50(ResNet):
    """ResNet-50 (He et al. 2016): 23.5 M parameters without a classifier."""

    block, blocks = Bottleneck, (3, 4, 6, 3)
