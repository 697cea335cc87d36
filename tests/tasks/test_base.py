"""Task learners: which parameters learn, which stay, and tasks on tokens and on images."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.backbones.base import Backbone, Features
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskLearner, TaskOptions

GENERATOR = torch.Generator()


class Words(Backbone):
    """Map token ids (B, T) to one vector per token, with every kind of backbone state."""

    def __init__(self) -> None:
        super().__init__(None, ImageSpec(1))
        self.width = 6
        self.embedding = nn.Embedding(9, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, inputs: Tensor) -> Features:
        tokens = self.norm(self.dropout(self.embedding(inputs)).transpose(1, 2)).transpose(1, 2)
        return Features(tokens.mean(1) - self.mean, tokens)


class Parity(Task):
    """Tagging: is each token odd? Ids of 0 are padding."""

    Options = TaskOptions
    name = "parity"
    metrics = (Metric("accuracy"),)
    linear = False

    def head(self, width: int, depth: int = 0) -> nn.Linear:
        return nn.Linear(width, 2)

    def readout(self, features: Features) -> Tensor:
        assert features.tokens is not None
        return features.tokens

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=-100)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        real = targets != -100
        return {"accuracy": 100 * (outputs.argmax(-1) == targets)[real].double().mean().item()}


class Whole(Parity):
    """Classification of the whole: are most tokens odd?"""

    linear = True

    def readout(self, features: Features) -> Tensor:
        return features.pooled


def batch(task: type[Task]) -> Batch:
    ids = torch.randint(9, (32, 5), generator=torch.Generator().manual_seed(0))
    tags = torch.where(ids == 0, -100, ids % 2)
    return Batch(ids, tags if task is Parity else ((ids % 2).sum(1) > 2).long())


def learner(task: type[Task] = Parity, **options: Any) -> TaskLearner:
    torch.manual_seed(0)
    backbone = Words()
    backbone.norm.running_mean = torch.rand(6)
    return TaskLearner(backbone, task(TaskOptions(), backbone.spec, ("even", "odd")), **options)


def train(model: TaskLearner, task: type[Task] = Parity, steps: int = 20) -> None:
    # Weight decay and momentum move every parameter with a gradient, even a zero one.
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=1.0, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        output = model(model.views(batch(task), GENERATOR))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step((step + 1) / steps)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed_names(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {
        name for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    }


def test_a_frozen_backbone_does_not_change_by_a_bit() -> None:
    model = learner(frozen=True)
    before, head = state(model.backbone), state(model.head)
    model.eval()
    model.train()
    train(model)
    assert changed_names(model.backbone, before) == set()
    assert changed_names(model.head, head) == {"weight", "bias"}
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_a_frozen_backbone_has_no_dropout_while_the_head_learns() -> None:
    model = learner(frozen=True)
    views = model.views(batch(Parity), GENERATOR)
    assert torch.equal(model(views).loss, model(views).loss)


def test_everything_learns_when_nothing_is_frozen() -> None:
    model = learner()
    before = state(model.backbone)
    train(model)
    assert changed_names(model.backbone, before) == set(before) - {"mean"}


def test_frozen_norm_keeps_the_statistics_and_trains_the_rest() -> None:
    model = learner(frozen_norm=True)
    before = state(model.backbone)
    model.eval()
    model.train()
    train(model)
    assert changed_names(model.backbone, before) == {"embedding.weight", "norm.weight", "norm.bias"}
    assert model.backbone.dropout.training


@pytest.mark.parametrize("task", [Parity, Whole])
def test_tasks_on_tokens_and_on_whole_examples_are_learned(task: type[Task]) -> None:
    model = learner(task)
    ids, targets = batch(task)
    examples = TensorExamples(ids, targets, ("even", "odd"), ImageSpec(1))
    train(model, task, steps=100)
    model.eval()
    outputs = model.predict(batch(task))
    assert outputs.shape == ((32, 5, 2) if task is Parity else (32, 2))
    assert model.task.measure(outputs, model.task.targets(examples))["accuracy"] > 90


def test_learning_starts_from_the_head_passed_in() -> None:
    head = nn.Linear(6, 2)
    model = learner(head=head)
    assert model.head is head


@pytest.mark.parametrize("task", [Parity, Whole])
def test_one_pass_returns_predictions_and_one_vector_per_example(task: type[Task]) -> None:
    model, examples = learner(task).eval(), batch(task)
    outputs, vectors = model.predict_and_read(examples)
    features = model.backbone(model.task.inputs(examples))
    assert torch.equal(outputs, model.predict(examples))
    assert torch.equal(
        vectors, model.task.readout(features) if model.task.linear else features.pooled
    )
    assert vectors.shape == (32, 6)


def test_predictions_do_not_depend_on_the_batch_and_require_eval_mode() -> None:
    model = learner()
    whole = batch(Parity)
    with pytest.raises(ValueError, match="eval"):
        model.predict(whole)
    model.eval()
    parts = [model.predict(Batch(ids, None)) for ids in whole.inputs.split(5)]
    torch.testing.assert_close(torch.cat(parts), model.predict(whole))


def test_a_split_without_labels_is_rejected() -> None:
    examples = TensorExamples(torch.zeros(3, 5), None, (), ImageSpec(1))
    with pytest.raises(UserError, match="'parity' needs labels"):
        learner().task.targets(examples)
