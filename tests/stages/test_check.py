"""What a recipe is said to cost."""

import torch
from torch import nn

from sslrun.recipe import Source, parse
from sslrun.stages.check import _kept_for_backward, _state_bytes, checked
from sslrun.training.device import compute

CPU = compute("cpu")


def recipe(**pretrain):
    given = {
        "name": "tiny",
        "backbone": {"name": "resnet18", "stem": "small", "channels": 4},
        "pretext": "rotation",
        "data": {"name": "digits", "size": 8},
        "pretrain": {"steps": 5, "batch": 64, "optimizer": "sgd", "lr": 0.1, "precision": "fp32", **pretrain},
    }
    return parse(Source(given, {(): "tiny.yaml:1"}))


def test_what_the_backward_pass_needs_is_counted_once_and_without_weights():
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(10, 16)
    with _kept_for_backward(net) as kept:
        net(x).sum()
    assert sum(kept.values()) == 4 * (10 * 16 + 10 * 32)  # the input, and the ReLU's output: read twice, kept once


def test_memory_is_of_the_part_of_a_batch_that_is_computed_at_once():
    small, large, parts = (checked("", each, CPU) for each in (recipe(), recipe(batch=128), recipe(accumulate=2)))
    assert 1.9 < large["activation_bytes"] / small["activation_bytes"] < 2.1
    assert 0.4 < parts["activation_bytes"] / small["activation_bytes"] < 0.6
    assert small["state_bytes"] == large["state_bytes"] > 3 * 4 * small["parameters"]
    assert small["memory_bytes"] == small["state_bytes"] + small["activation_bytes"]


def test_memory_counts_what_the_optimizer_and_the_average_keep():
    net = nn.Linear(9, 10)
    net.bias.requires_grad_(False)
    sgd, adamw, averaged = (
        _state_bytes(net, each.pretrain) for each in (recipe(), recipe(optimizer="adamw"), recipe(ema=0.9))
    )
    assert sgd == 4 * (100 + 90 + 90)  # weights, gradients, momentum
    assert adamw == sgd + 4 * 90
    assert averaged == sgd + 4 * 100
