"""Estimates of `sslrun check`: cells, memory, FLOPs and time."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages import check, scale
from sslrun.stages.check import Budget, _kept_for_backward, _state_bytes, estimate, render
from sslrun.training.device import compute

CPU = compute("cpu")


def recipe(evaluate=None, **pretrain):
    options = {
        "evaluate": evaluate or {},
        "name": "tiny",
        "backbone": {"name": "resnet18", "stem": "small", "channels": 4},
        "pretext": "rotation",
        "data": {"name": "digits", "size": 8},
        "pretrain": {
            "steps": 5,
            "batch": 64,
            "optimizer": "sgd",
            "lr": 0.1,
            "precision": "fp32",
            **pretrain,
        },
    }
    return parse(Located(options, {(): "tiny.yaml:1"}))


def test_saved_activations_are_counted_once_and_without_weights():
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(10, 16)
    with _kept_for_backward(net) as kept:
        net(x).sum()
    assert sum(kept.values()) == 4 * (
        10 * 16 + 10 * 32
    )  # the input and the ReLU's output, which two layers read and which is kept once


def test_cells_count_restarts_and_missing_data_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    digits = {"protocols": ["knn", "finetune"], "labels": [0.1, 1.0], "restarts": 3}
    shifted = {"protocols": ["knn"], "shifts": ["cifar10.1"]}
    estimated = estimate("", recipe({"digits": digits, "cifar10": shifted}), CPU)
    assert estimated["cells"] == 2 * (1 + 3) + 1
    assert [lack.partition(":")[0] for lack in estimated["lacking"]] == ["cifar10", "cifar10.1"]
    console = Console(file=io.StringIO(), width=200)
    console.print(render([estimated, estimated]))
    assert (
        console.file.getvalue().count(
            "not there yet: cifar10: not on this machine and the hub cannot be reached"
        )
        == 1
    )


def test_memory_is_estimated_for_the_part_of_a_batch_computed_at_once():
    small, large, parts = (
        estimate("", recipe_, CPU)
        for recipe_ in (recipe(), recipe(batch=128), recipe(accumulate=2))
    )
    assert 1.9 < large["activation_bytes"] / small["activation_bytes"] < 2.1
    assert 0.4 < parts["activation_bytes"] / small["activation_bytes"] < 0.6
    assert small["state_bytes"] == large["state_bytes"] > 3 * 4 * small["parameters"]
    assert small["memory_bytes"] == small["state_bytes"] + small["activation_bytes"]


def test_memory_includes_the_optimizer_and_the_weight_average():
    net = nn.Linear(9, 10)
    net.bias.requires_grad_(False)
    sgd, adamw, averaged = (
        _state_bytes(net, recipe_.pretrain)
        for recipe_ in (recipe(), recipe(optimizer="adamw"), recipe(ema=0.9))
    )
    assert sgd == 4 * (100 + 90 + 90)  # weights, gradients, momentum
    assert adamw == sgd + 4 * 90
    assert averaged == sgd + 4 * 100


def test_a_budget_is_the_time_and_its_steps_are_estimated():
    estimated = estimate("mine", recipe(steps=None, budget="1.5h"), CPU)
    assert estimated["seconds"] == 5400
    per_step = 64 / estimated["examples_a_second"]
    assert estimated["steps"] == pytest.approx(5400 / per_step, rel=0.01)
    expected = estimated["steps"] * 64 * estimated["flops_an_example"]
    assert estimated["flops"] == pytest.approx(expected)
    console = Console(file=io.StringIO(), width=300)
    console.print(render([estimated]))
    assert " 90.0 min " in console.file.getvalue()
    assert "where the time is a budget, its steps and FLOPs are" in console.file.getvalue()
    assert scale.forecast(estimated, 8) is None  # the steps of another machine


def test_a_budget_is_known_where_nothing_was_measured():
    estimated = estimate("", recipe(steps=None, budget="10s"), CPU, Budget(seconds=0))
    assert (estimated["measured_on"], estimated["budget"], estimated["steps"]) == (0, 10, None)
    console = Console(file=io.StringIO(), width=300)
    console.print(render([estimated]))
    assert " 10 s " in console.file.getvalue()


def slowed(monkeypatch, seconds):
    """Simulate `seconds` per example forward and twice that backward; returns the clock."""
    clock, real = [0.0], check.pretexts["rotation"]
    forward = real.forward

    def counted(self, views):
        output = forward(self, views)
        took = seconds * len(views[0]) / 4  # four turns of each image
        clock[0] += took

        def backward(gradient):
            clock[0] += 2 * took

        output.loss.register_hook(backward)
        return output

    monkeypatch.setattr(real, "forward", counted)
    monkeypatch.setattr("sslrun.stages.check.time.perf_counter", lambda: clock[0])
    return clock


@pytest.mark.parametrize(
    ("seconds", "count"), [(0.01, 8), (0.1, 8), (0.5, 8), (0.9, 4), (1.4, 2), (2.9, 2), (7.0, 2)]
)
def test_a_slow_network_is_measured_on_fewer_examples(monkeypatch, seconds, count):
    slowed(monkeypatch, 0.001)
    quick = estimate("", recipe(), CPU)
    clock = slowed(monkeypatch, seconds)
    slow = estimate("", recipe(), CPU)
    assert clock[0] <= max(15, 2 * seconds)
    assert (quick["measured_on"], slow["measured_on"]) == (8, count)
    assert slow["flops"] == pytest.approx(quick["flops"], rel=0.05)
    assert slow["memory_bytes"] == pytest.approx(quick["memory_bytes"], rel=0.2)
    console = Console(file=io.StringIO(), width=400)
    console.print(render([slow]))
    assert f"the time by measuring {count} examples on this device" in console.file.getvalue()


def test_a_sweep_stops_measuring_after_its_time_limit_and_reports_it(monkeypatch):
    clock = slowed(monkeypatch, 0.3)
    recipes = [recipe(steps=steps) for steps in (5, 10)]
    other = recipes[0].model_copy(update={"name": "other", "pretext": recipe().pretext})
    budget = Budget(3)
    first, second = (estimate("", recipe_, CPU, budget) for recipe_ in recipes)
    assert second["flops"] == 2 * first["flops"]  # the network is the same and is measured once
    budget.measured.clear()
    clock[0] = 21.0
    third = estimate("", other, CPU, budget)
    assert third["measured_on"] == 0
    assert "seconds" not in third
    assert third["state_bytes"] == first["state_bytes"]
    assert clock[0] == 21.0
    console = Console(file=io.StringIO(), width=400)
    console.print(render([first, third]))
    assert "4 examples (recipes not measured, since 15 s had passed: 1)" in console.file.getvalue()


def test_the_time_of_a_check_is_divided_evenly_among_recipes(monkeypatch):
    clock = slowed(monkeypatch, 0.0)
    budget = Budget(2, seconds=10.0)
    assert budget.next() == 5.0
    clock[0] = 3.0
    assert budget.next() == 7.0
    assert Budget(1, seconds=0.0).next() == 0.0
