"""The device: safe memory formats and the CPU's abilities as torch reports them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from sslrun.training.device import NO_BF16_INSTRUCTIONS, compute, fast_bf16

CPU = compute("cpu")

STRIDED_POINTWISE = """\
import torch
from torch import nn
from sslrun.backbones import build_backbone
from sslrun.data.specs import ImageSpec
from sslrun.training.device import compute

torch.manual_seed(0)
for options in ({"channels": 4, "stem": "small"}, {"channels": 8, "stem": "small"}):
    network = compute("cpu").put(build_backbone("resnet18", options, ImageSpec(32)))
    for _ in range(3):
        network(torch.rand(32, 3, 32, 32)).pooled.square().mean().backward()
"""

RECURRENT = """\
import json
import torch
from sslrun.backbones.lstm import LstmStack
from sslrun.training.device import compute, fast_bf16

device = compute("cpu")
stack, x = LstmStack(8, 8, 2, 0.0), torch.randn(4, 5, 8, requires_grad=True)
with device.autocast("bf16"):
    states = stack(x)[-1]
states.float().sum().backward()
with torch.no_grad():
    exact = stack(x)[-1]
error = float((states - exact).abs().max())
print(json.dumps({"dtype": str(states.dtype), "error": error, "fast": fast_bf16(device.device)}))
"""


def run_limited(program, onednn, aten):
    """Run a program on this CPU as if it had fewer instructions, and return what it prints."""
    limits = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env={**os.environ, **limits}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def channels_last(*layers):
    network = CPU.put(nn.Sequential(nn.Conv2d(3, 16, 3), *layers))
    return network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_few_channels_in_a_strided_pointwise_convolution_keep_the_contiguous_format():
    assert not channels_last(nn.Conv2d(15, 32, 1, stride=2))
    assert not channels_last(nn.Conv2d(4, 8, 1, stride=(1, 2)))
    assert channels_last(nn.Conv2d(16, 32, 1, stride=2))
    assert channels_last(nn.Conv2d(4, 8, 1))
    assert channels_last(nn.Conv2d(4, 8, 3, stride=2))
    assert channels_last(nn.Conv2d(8, 8, 1, stride=2, groups=8))
    linear = nn.Linear(3, 3)
    assert CPU.put(linear) is linear


@pytest.fixture(scope="module")
def printed_on_avx2():
    """Run both programs in one process with AVX2 alone, and return what they print."""
    return json.loads(run_limited(STRIDED_POINTWISE + RECURRENT, "AVX2", "avx2"))


def test_narrow_resnets_train_without_corrupting_memory(printed_on_avx2):
    run_limited(STRIDED_POINTWISE, "DEFAULT", "")


def test_an_lstm_falls_back_to_float32_where_onednn_has_no_bf16(printed_on_avx2):
    printed = printed_on_avx2
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in (
        "AVX2",
        "AVX512",
    ):
        assert printed["dtype"] == "torch.float32"
        assert printed["error"] < 1e-5
    assert not printed["fast"]


@pytest.mark.parametrize("instruction", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("limit", [None, *sorted(NO_BF16_INSTRUCTIONS), "AVX512_CORE_BF16"])
def test_bf16_is_fast_if_cpu_and_library_support_it(
    monkeypatch, instruction, kernels, capability, limit
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instruction)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    expected = (
        instruction and kernels and capability == "AVX512" and limit not in NO_BF16_INSTRUCTIONS
    )
    assert fast_bf16.__wrapped__(torch.device("cpu")) is expected
