"""The device that training runs on: precision, memory format, compilation, placement of data."""

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
"""Number of steps from which `compile: auto` compiles: if it saves 30 ms per step, they repay a
minute of compilation."""

COMPILE_SECONDS = 600
"""Budget from which `compile: auto` compiles: a tenth saved repays a minute of compilation."""


@dataclass(frozen=True)
class Compute:
    """A device, and how to compute on it."""

    device: torch.device

    def __str__(self) -> str:
        """The name of the device's hardware."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)"

    def autocast(self, precision: Precision = "auto") -> AbstractContextManager[None]:
        """Autocast to bf16 if it is chosen, or if `auto` is and the device has fast bf16."""
        bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(self.device))
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def put(self, module: nn.Module) -> nn.Module:
        """Move the module to the device, and to channels_last if it has convolutions.

        On a CPU it stays contiguous if channels_last is not safe for one of its convolutions.
        """
        convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        module.to(self.device)
        unsafe = self.device.type == "cpu" and any(map(_corrupts_memory, convolutions))
        if not convolutions or unsafe:
            return module
        return module.to(memory_format=torch.channels_last)

    def place(self, examples: Examples) -> Examples:
        """Move the examples to a GPU if they take less than half of its free memory."""
        if self.device.type != "cuda" or examples.nbytes is None:
            return examples
        free, _ = torch.cuda.mem_get_info(self.device)
        return examples.to(self.device) if examples.nbytes < free / 2 else examples

    def use_threads(self, count: int) -> None:
        """Use `count` of the CPU's cores, and leave the others to other processes."""
        torch.set_num_threads(count)

    def seed(self, seed: int) -> None:
        """Seed torch's global generators of the CPU and of this device.

        torch.manual_seed does the same for all kinds of devices, but records a stack trace for each
        kind that is not in use. That takes a millisecond on a CPU, and would be paid at every step.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def generator(self) -> torch.Generator:
        """A new random generator on the device."""
        return torch.Generator(self.device)

    def compiles(self, choice: Compile, steps: int | None, seconds: float | None = None) -> bool:
        """Whether to compile a training of `steps` steps, or of a budget in seconds.

        The length of training decides, not a measured time, so that a repeated run is compiled, and
        rounds, in the same way.
        """
        if choice != "auto":
            return choice == "on"
        is_long = (steps or 0) >= COMPILE_STEPS or (seconds or 0) >= COMPILE_SECONDS
        return self.device.type == "cuda" and shutil.which("cc") is not None and is_long


def compute(name: str = "auto") -> Compute:
    """Return the device of a name such as auto, cpu, cuda, cuda:1 or mps.

    Raises:
        UserError: this machine does not have the device.
    """
    if name == "auto":
        name = _default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which "meta" cannot do
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            f"--device {name}: not on this machine; choose from: {', '.join(_devices())}"
        ) from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return Compute(device)


def _default_device() -> str:
    """The fastest kind of device on this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _devices() -> list[str]:
    """The names of all devices on this machine."""
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


SAFE_CHANNELS = 16
"""Number of input channels from which a strided 1x1 convolution is safe in channels_last on every
CPU; see `_corrupts_memory`."""


def _corrupts_memory(layer: nn.Conv2d) -> bool:
    """Whether oneDNN writes out of bounds in this layer's backward pass in channels_last.

    To compute the weight gradient of a strided 1x1 convolution, oneDNN copies the input into a
    workspace. The copies are spaced by the vector length (8 float32 numbers with AVX2, 16 with
    AVX-512), but the workspace is sized by the number of channels
    (https://github.com/uxlfoundation/oneDNN/issues/6035; torch 2.14). If there are fewer channels
    than that, the process aborts, hangs or trains on wrong gradients: a ResNet-18 with `channels:
    4` aborts with AVX2 and, on larger images, with AVX-512. Other kernel sizes, unit strides,
    groups and the contiguous format are not affected. The limit is the same for every CPU, so that
    all compute a recipe in the same format.
    """
    pointwise = layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.groups == 1
    return pointwise and layer.in_channels < SAFE_CHANNELS


NO_BF16_INSTRUCTIONS = {"AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ONEDNN_MAX_CPU_ISA for which oneDNN's bf16 kernels emulate the arithmetic in
float32."""


@cache
def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices natively, and so faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # Three checks are needed. oneDNN's own check honors ONEDNN_MAX_CPU_ISA, but also passes if the
    # kernels emulate bf16. torch's CPU capability honors only ATEN_CPU_CAPABILITY. The checks of
    # the hardware's instructions honor neither.
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in NO_BF16_INSTRUCTIONS
    if limited or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def memory_in_use(device: torch.device) -> int:
    """Peak memory in bytes: of tensors on a GPU, of the process on a CPU; mps: the current one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
