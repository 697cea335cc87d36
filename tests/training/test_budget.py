"""Trainings that end on time: schedules by the clock, pauses and resuming, with a fake clock."""

import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.recipe.schema import Pretrain
from sslrun.training import clock as clock_module
from sslrun.training.checkpoint import restore, save
from sslrun.training.device import compute
from sslrun.training.learner import Learner, Output
from sslrun.training.loop import Training, train


class FakeTime:
    """A clock that only `wait` moves."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


class Slow(Learner):
    """A learner whose steps take one second, and which records the progress that it is given."""

    def __init__(self, time):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 1)
        self.time, self.progress = time, []

    def views(self, batch, generator):
        self.time.wait(1.0)
        return batch.inputs.flatten(1) / 255

    def forward(self, inputs):
        return Output(self.linear(inputs).square().mean())

    def before_step(self, progress):
        self.progress.append(progress)


@pytest.fixture
def time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(monotonic=fake.monotonic))
    return fake


@pytest.fixture
def start(time):
    """Return `start()`, which prepares a training with a budget of ten of its steps."""
    schedule = Pretrain(budget="10s", batch=4, lr=1.0, warmup=0.2, precision="fp32")
    return lambda: Training(Slow(time), schedule, compute("cpu"))


def data():
    images = torch.arange(12 * 12, dtype=torch.uint8).view(12, 3, 2, 2)
    return TensorExamples(images, None, (), ImageSpec(2))


def test_schedules_follow_the_clock_to_the_end_of_the_budget(start):
    training = start()
    steps = list(train(training, data(), 0))
    assert [step.step for step in steps] == list(range(1, 11))
    assert [step.last for step in steps] == [False] * 9 + [True]
    assert [step.total for step in steps] == [10] * 10
    assert training.learner.progress == pytest.approx([share / 10 for share in range(10)])
    cosine = [(1 + math.cos(math.pi * share / 8)) / 2 for share in range(8)]
    assert [step.lr for step in steps] == pytest.approx([0, 0.5, *cosine])


def test_pauses_do_not_count_and_time_between_steps_does(start, time):
    training, waited = start(), 0
    for step in train(training, data(), 0):
        if step.step == 3:
            with training.paused():
                time.wait(100)
        if step.step == 5:
            time.wait(2.5)
            waited += 2.5
    assert step.step == math.ceil(10 - waited)


def test_a_resumed_training_goes_on_with_the_time_it_had_used(start, time, tmp_path):
    whole = [step.lr for step in train(start(), data(), 0)]
    training, rates = start(), []
    for step in train(training, data(), 0):
        rates.append(step.lr)
        if step.step == 4:
            path = save(training, tmp_path)
            break
    time.wait(5000)
    resumed = start()
    restore(resumed, path)
    rates += [step.lr for step in train(resumed, data(), 0)]
    assert rates == pytest.approx(whole)


def test_budgets_are_times_with_a_unit_and_part_of_the_identity():
    assert Pretrain(budget="1.5h").seconds == 5400
    assert Pretrain(budget="30m").non_defaults() == Pretrain(budget="1800s").non_defaults()
    assert Pretrain(**Pretrain(budget="30m").non_defaults()).budget == 1800
    assert "budget" not in Pretrain(epochs=3).non_defaults()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "30"}, "such as 90s, 30m or 1.5h"),
        ({"budget": 30}, "such as 90s, 30m or 1.5h"),
        ({"budget": "0m"}, "greater than 0"),
        (
            {"budget": "30m", "epochs": 2},
            "give either epochs or steps or budget; set the other one",
        ),
        ({"budget": "30m", "warmup": 5}, "warmup is a share"),
        ({}, "give either epochs or steps or budget"),
    ],
)
def test_a_wrong_budget_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Pretrain(**options)
