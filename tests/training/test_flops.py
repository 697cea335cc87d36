"""FLOPs of a training step against counts by hand."""

import pytest
import torch
from torch import nn

from sslrun.backbones import build_backbone
from sslrun.backbones.lstm import LstmStack
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.protocols.features import extract
from sslrun.training import checkpoint, loop
from sslrun.training.device import compute
from sslrun.training.flops import flop_counter
from sslrun.training.learner import Learner, Output
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

CPU = compute("cpu")
SCHEDULE = Schedule(steps=4, batch=8, optimizer="sgd", lr=0.01, precision="fp32")
LAYERS = [(12, 5), (5, 7)]


class Perceptron(Learner):
    """Two linear layers with dropout and batch norm between, which count no FLOPs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Flatten(),
            nn.Linear(*LAYERS[0]),
            nn.BatchNorm1d(5),
            nn.Dropout(0.3),
            nn.Linear(*LAYERS[1]),
        )

    def views(self, batch, generator):
        return batch.inputs / 255 + torch.rand(
            batch.inputs.shape, generator=generator
        ), batch.labels

    def forward(self, views):
        return Output(nn.functional.cross_entropy(self.backbone(views[0]), views[1]))

    def layers(self):
        return [list(self.backbone.parameters())]


def examples(count=40):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 2, 2), dtype=torch.uint8, generator=generator)
    return TensorExamples(
        images, torch.randint(0, 7, (count,), generator=generator), tuple("abcdefg"), ImageSpec(2)
    )


def trained(schedule=SCHEDULE, until=None, training=None):
    training = training or Training(Perceptron(), schedule, CPU)
    for step in train(training, examples(), 3):
        if step.step == until:
            break
    return training


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_flops_of_a_step_are_those_of_its_matrix_products(accumulate):
    products = [8 * inputs * outputs for inputs, outputs in LAYERS]
    forward = 2 * sum(products)
    backward = 2 * (
        products[0] + 2 * products[1]
    )  # gradients of weights, and of inputs except the first layer's
    assert (
        trained(SCHEDULE.model_copy(update={"accumulate": accumulate})).flops == forward + backward
    )


def test_counting_flops_changes_no_bit_and_happens_once(monkeypatch, tmp_path):
    counted = trained()
    assert len(counted.meter.counted) == 1
    checkpoint.save(trained(until=2), tmp_path)
    monkeypatch.setattr(loop, "is_counted", lambda step, total, differ: False)
    plain = trained()
    assert plain.flops is None
    for a, b in zip(
        counted.learner.state_dict().values(), plain.learner.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    resumed = Training(Perceptron(), SCHEDULE, CPU)
    checkpoint.restore(resumed, checkpoint.latest(tmp_path))
    assert resumed.flops == counted.flops
    assert resumed.seconds > resumed.seconds_before_resume > 0


class Texts(TensorExamples):
    """Examples, half of them twice as long; a batch is as long as its longest example."""

    @property
    def lengths(self):
        return 1 + torch.arange(len(self)) % 2

    def batches(self, indices, device):
        for batch, chosen in zip(
            super().batches((indices := list(indices)), device), indices, strict=True
        ):
            longest = int(self.lengths[chosen].max())
            yield Batch(batch.inputs.repeat(longest, 1, 1, 1), batch.labels.repeat(longest))


def test_with_unequal_lengths_a_few_steps_are_counted_and_others_scaled(monkeypatch):
    alike = examples()
    texts = Texts(alike.inputs, alike.labels, alike.classes, alike.spec)

    def estimated():
        training = Training(Perceptron(), SCHEDULE.model_copy(update={"steps": 64}), CPU)
        for _ in train(training, texts, 3):
            pass
        return training

    few = estimated()
    assert len(few.meter.counted) == 4
    monkeypatch.setattr(loop, "is_counted", lambda step, total, differ: True)
    counts = [flops for flops, _ in estimated().meter.counted]
    one = trained().flops  # of a batch of short examples, or half of a batch of long ones
    assert set(counts) == {one, 2 * one}
    assert few.flops == pytest.approx(sum(counts) / 64, rel=1e-12)


def test_recurrent_layers_count_their_matrix_products():
    lstm, x = (
        nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True),
        torch.randn(3, 5, 6, requires_grad=True),
    )
    forward = 2 * 15 * 2 * (4 * 8 * (6 + 8) + 4 * 8 * (16 + 8))
    with flop_counter() as counter:
        lstm(x)[0].sum().backward()
    assert counter.get_total_flops() == 3 * forward
    with flop_counter() as counter, torch.inference_mode():
        lstm(x)
    assert counter.get_total_flops() == forward


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recurrent_layers_count_their_matrix_products_in_each_precision(precision):
    stack, x = LstmStack(6, 8, 2, 0.0), torch.randn(3, 5, 6, requires_grad=True)
    with flop_counter() as counter, CPU.autocast(precision):
        stack(x)[-1].float().sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 15 * (4 * 8 * (6 + 8) + 4 * 8 * (8 + 8))


def test_attention_counts_its_products_forward_and_backward():
    q, k, v = (torch.randn(2, 4, tokens, 8, requires_grad=True) for tokens in (5, 7, 7))
    product = 2 * 2 * 4 * 5 * 7 * 8
    with flop_counter() as counter:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * product  # the backward pass recomputes the scores


def test_frozen_features_count_one_forward_pass_of_one_batch():
    backbone = build_backbone(
        "vit-tiny", {"patch": 2, "depth": 2, "width": 8, "heads": 2}, ImageSpec(4)
    )
    images = TensorExamples(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), None, (), ImageSpec(4))
    counter = flop_counter()
    extract(
        backbone,
        images,
        lambda batch: batch.inputs.float(),
        torch.device("cpu"),
        4,
        counter=counter,
    )
    tokens, width = 5, 8
    block = (
        tokens * (4 + 8) * width**2 + 2 * tokens**2 * width
    )  # projections and MLP; attention scores and their products with the values
    assert counter.get_total_flops() == 4 * 2 * (4 * 12 * width + 2 * block)
