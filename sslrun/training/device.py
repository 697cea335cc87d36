"""The device that training runs on: precision, memory format, compilation, and where data lies."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import nn

from sslrun.data.examples import Examples
from sslrun.errors import UserError

Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]

COMPILE_STEPS = 2000
"""What `compile: auto` compiles from: a minute of compilation is earned back at 30 ms saved a
step."""


@dataclass(frozen=True)
class Compute:
    """A device and how its arithmetic is done."""

    device: torch.device

    def __str__(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)"

    def autocast(self, precision: Precision = "auto") -> AbstractContextManager[None]:
        """bf16 where it is asked for, or by `auto` where the device is fast at it; else float32."""
        bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(self.device))
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def put(self, module: nn.Module) -> nn.Module:
        """Move the module to the device, in channels_last where its convolutions are faster and safe in it."""
        convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        module.to(self.device)
        unsafe = self.device.type == "cpu" and any(map(_corrupts_memory, convolutions))
        if not convolutions or unsafe:
            return module
        return module.to(memory_format=torch.channels_last)

    def place(self, examples: Examples) -> Examples:
        """The examples on the device, where they can lie there and take less than half of its free memory."""
        if self.device.type != "cuda" or examples.nbytes is None:
            return examples
        free, _ = torch.cuda.mem_get_info(self.device)
        return examples.to(self.device) if examples.nbytes < free / 2 else examples

    def use_threads(self, count: int) -> None:
        """Take so many of the CPU's cores, where other processes take the others."""
        torch.set_num_threads(count)

    def seed(self, seed: int) -> None:
        """Seed torch's own generators, of the CPU and of this device.

        As torch.manual_seed, which for every kind of device that is not in use keeps a trace of the
        stack: on a CPU a millisecond, thousands of times.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device)

    def compiles(self, choice: Compile, steps: int) -> bool:
        """Whether to compile a training of so many steps.

        By number of steps, not by a measured time: the same run must be compiled, and rounded, the
        same way twice.
        """
        if choice != "auto":
            return choice == "on"
        return (
            self.device.type == "cuda" and shutil.which("cc") is not None and steps >= COMPILE_STEPS
        )


def compute(name: str = "auto") -> Compute:
    """The device of a name: auto, cpu, cuda, cuda:1, mps. UserError: not on this machine."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name}: not on this machine; there is: {', '.join(_devices())}"
        ) from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return Compute(device)


def _devices() -> list[str]:
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


SAFE_CHANNELS = 16
"""Input channels from which a strided 1x1 convolution is safe in channels_last on every CPU: see
below."""


def _corrupts_memory(layer: nn.Conv2d) -> bool:
    """Whether oneDNN writes outside its workspace in the backward pass of this layer in channels_last.

    The weight gradient of a 1x1 convolution with a stride copies its input into a workspace first,
    and spaces the copies by the vector's length (8 float32 numbers with AVX2, 16 with AVX-512),
    although the workspace was sized by the real number of channels
    (https://github.com/uxlfoundation/oneDNN/issues/6035; torch 2.14). With fewer channels than
    that, the process aborts, hangs or trains on wrong gradients: a ResNet-18 with `channels: 4`
    aborts with AVX2 and, on larger images, with AVX-512. Other kernel sizes, unit strides, groups
    and the contiguous format are not affected. One limit for every CPU, so that a recipe is
    computed in the same format on each.
    """
    pointwise = layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.groups == 1
    return pointwise and layer.in_channels < SAFE_CHANNELS


NO_BF16_INSTRUCTIONS = {"AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ONEDNN_MAX_CPU_ISA with which oneDNN has bf16 kernels that emulate the arithmetic in
float32."""


@cache
def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices natively, faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # Three questions, since no one of them is enough. oneDNN says whether its bf16 kernels may run,
    # and honors ONEDNN_MAX_CPU_ISA, but says yes to emulation too. torch's own kernels honor
    # ATEN_CPU_CAPABILITY alone. The instructions of the hardware honor neither.
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in NO_BF16_INSTRUCTIONS
    if limited or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far; on a CPU the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
