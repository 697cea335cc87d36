"""The device that training runs on: precision, memory format, compilation, and where data lies."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sslrun.data.examples import Examples
from sslrun.errors import UserError

Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]

COMPILE_STEPS = 2000
"""What `compile: auto` compiles from: a minute of compilation is earned back at 30 ms saved a step."""


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
        """The module on the device; channels last where it has convolutions, which are faster so."""
        convolutional = any(isinstance(each, nn.Conv2d) for each in module.modules())
        module.to(self.device)
        return module.to(memory_format=torch.channels_last) if convolutional else module

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

        As torch.manual_seed, which for every kind of device that is not in use keeps a trace of the stack: on a CPU a
        millisecond, thousands of times.
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

        By number of steps, not by a measured time: the same run must be compiled, and rounded, the same way twice.
        """
        if choice != "auto":
            return choice == "on"
        return self.device.type == "cuda" and shutil.which("cc") is not None and steps >= COMPILE_STEPS


def compute(name: str = "auto") -> Compute:
    """The device of a name: auto, cpu, cuda, cuda:1, mps. UserError: not on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not on this machine; there is: {', '.join(_devices())}") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return Compute(device)


def _devices() -> list[str]:
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


@cache
def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices faster than float32 ones, natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    except OSError:
        return _measured(torch.bfloat16) < 0.7 * _measured(torch.float32)


def _measured(dtype: torch.dtype) -> float:
    """Seconds that a product of matrices takes on the CPU, the best of a few."""
    a = torch.ones(512, 512, dtype=dtype)
    a @ a
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return min(times)


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far; on a CPU the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
