"""The training loop: resuming to the same bits, schedules, batches and errors."""

import math

import pytest
import torch
from torch import nn

from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.training import checkpoint
from sslrun.training.device import compute
from sslrun.training.learner import Learner, Output
from sslrun.training.loop import NonFinite, Training, train
from sslrun.training.optim import Lars, lr_factor, optimizers
from sslrun.training.order import indices
from sslrun.training.schedule import Schedule

CPU = compute("cpu")


class Toy(Learner):
    """A small network with dropout and random views, which depends on every random state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 16),
            nn.Dropout(),
        )
        self.head = nn.Linear(16, 4)
        self.explode_at, self.calls, self.progress = -1, 0, 0.0

    def views(self, batch, generator):
        return batch.inputs / 255 + torch.rand(
            batch.inputs.shape, generator=generator
        ), batch.labels

    def forward(self, views):
        self.calls += 1
        loss = nn.functional.cross_entropy(self.head(self.backbone(views[0])), views[1])
        return Output(loss * (torch.inf if self.calls == self.explode_at else 1.0))

    def layers(self):
        return [list(self.backbone[:2].parameters()), list(self.backbone[4].parameters())]

    def after_step(self, progress):
        self.progress = progress


def examples(count=40):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TensorExamples(
        images, torch.randint(0, 4, (count,), generator=generator), tuple("abcd"), ImageSpec(8)
    )


def run(schedule, until=None, training=None, seed=3):
    training = training or Training(Toy(), schedule, CPU)
    for step in train(training, examples(), seed):
        if step.step == until:
            break
    return training


def state(training):
    both = [training.learner, training.averaged]
    return [tensor for part in both for tensor in part.state_dict().values()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "muon"])
def test_resumed_run_equals_one_never_stopped_bit_for_bit(optimizer, tmp_path):
    schedule = Schedule(
        epochs=3,
        batch=8,
        optimizer=optimizer,
        lr=0.05,
        weight_decay=0.1,
        ema=0.9,
        clip=1.0,
        warmup=1,
    )
    whole = run(schedule)
    checkpoint.save(run(schedule, until=7), tmp_path)
    resumed = Training(Toy(), schedule, CPU)
    checkpoint.restore(resumed, checkpoint.latest(tmp_path))
    assert resumed.step == 7
    run(schedule, training=resumed)
    assert resumed.step == whole.step == 15
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))
    assert not all(
        torch.equal(a, b) for a, b in zip(state(whole), state(run(schedule, seed=4)), strict=True)
    )


def test_each_epoch_visits_every_example_once_in_a_new_order():
    visited = []

    class Recorder(Toy):
        def views(self, batch, generator):
            visited.append(batch.inputs[:, 0, 0, 0])
            return super().views(batch, generator)

    data = examples(40)
    data.inputs[:, 0, 0, 0] = torch.arange(40)
    list(train(Training(Recorder(), Schedule(epochs=2, batch=8, lr=0.1), CPU), data, 0))
    first, second = torch.cat(visited[:5]), torch.cat(visited[5:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(40))
    assert not torch.equal(first, second)


def test_batches_group_similar_lengths_and_epochs_visit_all_examples():
    lengths = torch.randint(8, 129, (2000,), generator=torch.Generator().manual_seed(0))

    class Ragged(TensorExamples):
        @property
        def lengths(self):
            return lengths

    ragged = Ragged(torch.zeros(2000, 1), None, (), ImageSpec(8))

    def epochs(by_length):
        schedule = Schedule(epochs=2, batch=16, lr=0.1, by_length=by_length)
        return list(indices(ragged, schedule, 0, 0, 250))

    def padded(batches):
        return (
            sum(len(batch) * int(lengths[batch].max()) for batch in batches)
            / int(lengths.sum())
            / 2
        )

    grouped, plain = epochs(True), epochs(False)
    assert (
        torch.cat(grouped[:125]).sort().values.tolist()
        == torch.cat(grouped[125:]).sort().values.tolist()
        == [*range(2000)]
    )
    assert padded(grouped) < 1.1 < 1.5 < padded(plain)
    means = torch.tensor([lengths[batch].float().mean() for batch in grouped[:125]])
    assert means[:60].mean().item() == pytest.approx(
        means[60:].mean().item(), rel=0.2
    )  # short and long batches alternate
    assert not torch.equal(grouped[0], grouped[125])
    rest = list(indices(ragged, Schedule(epochs=2, batch=16, lr=0.1), 0, 130, 250))
    assert all(torch.equal(a, b) for a, b in zip(rest, grouped[130:], strict=True))
    parts = list(indices(ragged, Schedule(epochs=2, batch=400, accumulate=4, lr=0.1), 0, 0, 4))
    for batch in zip(
        *[iter(parts)] * 4, strict=True
    ):  # the examples left over are not the long ones, which would lower the mean
        means = torch.tensor([lengths[part].float().mean() for part in batch])
        assert means.max() < 1.03 * means.min()


def test_lengths_are_not_read_at_every_step():
    asked = []

    class Ragged(TensorExamples):
        @property
        def lengths(self):
            asked.append(len(self))
            return torch.arange(len(self))

    data = examples()
    ragged = Ragged(data.inputs, data.labels, data.classes, data.spec)
    list(train(Training(Toy(), Schedule(steps=12, batch=10, lr=0.1), CPU), ragged, 0))
    assert len(asked) <= 2


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    class Plain(Toy):
        def __init__(self):
            super().__init__()
            self.backbone[1] = (
                nn.Identity()
            )  # batch statistics and dropout depend on the split into parts
            self.backbone[5] = nn.Identity()

        def views(self, batch, generator):
            return batch.inputs / 255, batch.labels

    learned = []
    for parts in (1, 4):
        schedule = Schedule(
            steps=2, batch=16, accumulate=parts, optimizer="sgd", lr=0.5, precision="fp32"
        )
        training = Training(Plain(), schedule, CPU)
        list(train(training, examples(), 0))
        learned.append(training.learner.head.weight.detach())
    torch.testing.assert_close(*learned)


def test_the_weight_average_equals_its_closed_form():
    training = Training(Toy(), Schedule(steps=3, batch=8, optimizer="sgd", lr=0.1, ema=0.5), CPU)
    expected = training.learner.head.weight.detach().clone()
    for _ in train(training, examples(), 0):
        expected = 0.5 * expected + 0.5 * training.learner.head.weight.detach()
    torch.testing.assert_close(training.averaged.head.weight, expected)


def test_the_learning_rate_equals_values_by_hand():
    def course(shape, warmup=0, **more):
        return [lr_factor(t, 8, warmup, shape, more.get("milestones", ()), 0.1) for t in range(8)]

    assert course("constant", warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert course("linear")[4] == 0.5
    assert course("cosine")[4] == pytest.approx(0.5)
    assert course("cosine")[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 8)))
    assert course("step", milestones=(0.5, 0.75)) == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)


def test_the_end_of_the_learning_rate_and_of_weight_decay_follow_half_a_cosine():
    schedule = Schedule(
        steps=4, batch=8, schedule="cosine", lr=0.1, lr_end=0.02,
        weight_decay=0.04, weight_decay_end=0.4,
    )  # fmt: skip
    training = Training(Toy(), schedule, CPU)
    for step in train(training, examples(), 0):
        share = (step.step - 1) / 4
        fallen = (1 - math.cos(math.pi * share)) / 2
        assert step.lr == pytest.approx(0.1 - 0.08 * fallen)
        decays = {group["weight_decay"] for group in training.optimizers[0].param_groups}
        assert sorted(decays) == pytest.approx([0.0, 0.04 + 0.36 * fallen])


def test_the_gradient_of_each_tensor_is_clipped_by_itself():
    def changes(**options):
        learner = Toy()
        before = [parameter.detach().clone() for parameter in learner.parameters()]
        schedule = Schedule(steps=1, batch=8, optimizer="sgd", momentum=0, lr=1.0, **options)
        list(train(Training(learner, schedule, CPU), examples(), 0))
        return [old - new.detach() for old, new in zip(before, learner.parameters(), strict=True)]

    plain = changes()
    bound = sorted(change.norm().item() for change in plain)[len(plain) // 2]
    clipped = changes(clip_each=bound)
    for free, held in zip(plain, clipped, strict=True):
        torch.testing.assert_close(held, free * min(1.0, bound / (free.norm().item() + 1e-6)))
    assert any(not torch.equal(*pair) for pair in zip(plain, clipped, strict=True))


def test_the_last_layer_is_frozen_for_the_first_epochs():
    class Frozen(Toy):
        def last_layer(self):
            return [self.head.weight]

    learner = Frozen()
    start = learner.head.weight.detach().clone()
    schedule = Schedule(epochs=2, batch=8, lr=0.01, weight_decay=0.1, freeze_last=1)
    moved = [
        not torch.equal(learner.head.weight, start)
        for _ in train(Training(learner, schedule, CPU), examples(), 0)
    ]
    assert moved == [False] * 5 + [True] * 5
    assert not torch.equal(learner.head.bias, Toy().head.bias)


def test_ends_and_clips_that_contradict_each_other_are_errors():
    with pytest.raises(ValueError, match=r"lr_end \(1\) is higher than lr \(0.1\)"):
        Schedule(steps=1, lr=0.1, lr_end=1)
    with pytest.raises(ValueError, match="clip and clip_each contradict each other"):
        Schedule(steps=1, clip=1.0, clip_each=3.0)


def test_lars_equals_its_formula_and_skips_vectors():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    lars = Lars(
        [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "adapt": False}],
        0.2,
        momentum=0.9,
    )
    w, v = matrix.detach().double(), vector.detach().double()
    m, n = torch.zeros_like(w), torch.zeros_like(v)
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn(4, 3), torch.randn(3)
        lars.step()
        g = matrix.grad.double() + 0.1 * w
        m = 0.9 * m + 0.001 * w.norm() / g.norm() * g
        n = 0.9 * n + vector.grad.double()
        w, v = w - 0.2 * m, v - 0.2 * n
    torch.testing.assert_close(matrix.detach().double(), w, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(vector.detach().double(), v, rtol=1e-6, atol=1e-7)


def test_clipped_lars_is_its_formula_and_never_steps_farther_than_sgd():
    torch.manual_seed(0)
    small, large = nn.Parameter(torch.randn(4, 3)), nn.Parameter(1e4 * torch.randn(4, 3))
    lars = Lars([{"params": [small, large], "weight_decay": 0.1}], 0.2, 0.9, trust=0.02, clip=True)
    weights = [each.detach().double() for each in (small, large)]
    momenta = [torch.zeros_like(w) for w in weights]
    factors = []
    for lr in (0.2, 0.1, 0.05):
        lars.param_groups[0]["lr"] = lr
        for parameter in (small, large):
            parameter.grad = 10 * torch.randn(4, 3)
        lars.step()
        for i, parameter in enumerate((small, large)):
            g = parameter.grad.double() + 0.1 * weights[i]
            factors.append(min(0.02 * (weights[i].norm() / g.norm()).item() / lr, 1.0))
            momenta[i] = 0.9 * momenta[i] + factors[-1] * g
            weights[i] = weights[i] - lr * momenta[i]
    # Both sides of the limit are reached.
    assert factors[0] < 0.1
    assert factors[-1] == 1.0
    torch.testing.assert_close(small.detach().double(), weights[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(large.detach().double(), weights[1], rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("clip", [False, True])
def test_lars_steps_plainly_from_a_tensor_of_zeros(clip):
    zeros = nn.Parameter(torch.zeros(2, 2))
    zeros.grad = torch.ones(2, 2)
    Lars([zeros], 0.5, momentum=0.9, clip=clip).step()
    torch.testing.assert_close(zeros.detach(), torch.full((2, 2), -0.5))


def grouped(**options):
    """The toy's parameter groups by the name of the parameter."""
    toy = Toy()
    schedule = Schedule(steps=1, **options)
    names = {id(parameter): name for name, parameter in toy.named_parameters()}
    return {
        names[id(parameter)]: group
        for optimizer in optimizers(toy, schedule, toy.layers())
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


MATRICES = {"backbone.0.weight", "backbone.4.weight", "head.weight"}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "muon"])
def test_norms_and_biases_have_a_rate_of_their_own(optimizer):
    groups = grouped(optimizer=optimizer, lr=0.2, lr_bias=0.0048, layer_decay=0.5)
    assert len(groups) == len(list(Toy().parameters()))
    for name, group in groups.items():
        depth = 2 if name.startswith(("backbone.0", "backbone.1")) else name.startswith("backbone")
        rate = 0.2 if name in MATRICES else 0.0048
        assert 0.2 * group["lr_scale"] == pytest.approx(rate * 0.5**depth)


def test_the_rate_of_biases_is_absolute_and_follows_the_schedule():
    toy = Toy()
    schedule = Schedule(steps=4, batch=8, optimizer="sgd", lr=0.2, lr_bias=0.05, schedule="linear")
    training = Training(toy, schedule, CPU)
    for step in train(training, examples(), 3):
        rates = {group["lr"] for group in training.optimizers[0].param_groups}
        share = 1 - (step.step - 1) / 4
        assert sorted(rates) == pytest.approx([0.05 * share, 0.2 * share])


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_weight_decay_of_matrices_or_of_all(optimizer):
    some = grouped(optimizer=optimizer, weight_decay=0.3)
    assert {name for name, group in some.items() if group["weight_decay"] == 0.3} == MATRICES
    whole = grouped(optimizer=optimizer, weight_decay=0.3, decay="all")
    assert all(group["weight_decay"] == 0.3 for group in whole.values())
    if optimizer == "lars":
        assert {name for name, group in some.items() if group["adapt"]} == MATRICES
        assert all(group["adapt"] for group in whole.values())


def test_sgd_with_decay_of_all_is_torchs():
    ours, torchs = Toy(), Toy()
    torchs.load_state_dict(ours.state_dict())
    options = Schedule(steps=1, optimizer="sgd", lr=0.1, weight_decay=0.3, decay="all")
    (optimizer,) = optimizers(ours, options, ours.layers())
    plain = torch.optim.SGD(torchs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3)
    for _ in range(3):
        for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        plain.step()
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_options_of_lars_reach_it():
    (group, *_) = grouped(optimizer="lars", trust=0.02, lars_clip=True).values()
    assert (group["trust"], group["clip"]) == (0.02, True)


def test_vectors_have_no_decay_and_layers_near_the_input_lower_rates():
    toy = Toy()
    options = Schedule(steps=1, weight_decay=0.3, layer_decay=0.5)
    (optimizer,) = optimizers(toy, options, toy.layers())
    group_of = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    assert group_of[id(toy.backbone[0].weight)]["lr_scale"] == 0.25
    assert group_of[id(toy.backbone[4].weight)]["lr_scale"] == 0.5
    assert group_of[id(toy.head.weight)]["lr_scale"] == 1.0
    assert group_of[id(toy.head.weight)]["weight_decay"] == 0.3
    assert (
        group_of[id(toy.head.bias)]["weight_decay"]
        == group_of[id(toy.backbone[1].weight)]["weight_decay"]
        == 0
    )


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    training = Training(Toy(), Schedule(epochs=3, batch=8, lr=0.1), CPU)
    training.learner.explode_at = 4
    with pytest.raises(NonFinite, match=r"the loss is not finite at step 4 \(learning rate 0\.0"):
        list(train(training, examples(), 0))
    assert training.step == 3


def spoil_gradient(training, step):
    def spoiled(gradient):
        return gradient * (torch.nan if training.step + 1 == step else 1.0)

    training.learner.head.weight.register_hook(spoiled)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_is_named_before_it_spoils_the_weights(clip):
    training = Training(Toy(), Schedule(epochs=3, batch=8, lr=0.1, clip=clip), CPU)
    spoil_gradient(training, step=4)
    with pytest.raises(
        NonFinite, match=r"the gradient is not finite at step 4 \(learning rate 0\.0905\)"
    ):
        list(train(training, examples(), 0))
    assert training.step == 3
    assert all(parameter.isfinite().all() for parameter in training.learner.parameters())


def test_with_rare_checks_the_first_bad_step_is_still_named():
    training = Training(Toy(), Schedule(epochs=3, batch=8, lr=0.1), CPU)
    training.check_every = 50  # as on a device where reading the loss would wait
    spoil_gradient(training, step=4)
    with pytest.raises(
        NonFinite, match=r"the gradient is not finite at step 4 \(learning rate 0\.0905\)"
    ):
        list(train(training, examples(), 0))
    assert training.step == 15


def test_a_batch_larger_than_the_data_is_an_error():
    with pytest.raises(
        UserError, match="batch of 64 is larger than the 40 examples: lower batch to 32"
    ):
        list(train(Training(Toy(), Schedule(epochs=1, batch=64), CPU), examples(), 0))


@pytest.mark.parametrize(
    ("batch", "parts", "devices", "labels", "expected"),
    [
        (128, 1, 1, 200, (128, 1)),
        (128, 1, 1, 13, (13, 1)),
        (128, 16, 1, 10, (10, 2)),  # in parts of at most 8, as configured
        (128, 16, 1, 27, (24, 4)),
        (128, 1, 2, 13, (12, 1)),
        (128, 4, 2, 50, (48, 2)),
    ],
)
def test_a_batch_is_capped_at_the_data_and_split_evenly_over_devices(
    batch, parts, devices, labels, expected, monkeypatch
):
    monkeypatch.setattr("sslrun.training.schedule.distributed.world_size", lambda: devices)
    schedule = Schedule(epochs=1, batch=batch, accumulate=parts).within(labels)
    assert (schedule.batch, schedule.accumulate) == expected


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize(
    ("batch", "parts", "remedy"),
    [
        (8, 1, "lower batch from 8 to 4, or set accumulate to 2"),
        (9, 1, "lower batch from 9 to 4, or set accumulate to 3"),
        (8, 8, "one example at a time: choose a smaller backbone"),
    ],
)
def test_out_of_memory_says_what_to_lower(error, batch, parts, remedy, monkeypatch):
    training = Training(Toy(), Schedule(epochs=1, batch=batch, accumulate=parts), CPU)

    def full(*_):
        raise error

    monkeypatch.setattr(training.learner, "views", full)
    with pytest.raises(UserError, match=remedy):
        list(train(training, examples(), 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either epochs or steps"),
        (
            {"epochs": 1, "steps": 1},
            "either epochs or steps; set the other one to null",
        ),
        ({"steps": 1, "batch": 10, "accumulate": 3}, "not a multiple"),
        ({"steps": 1, "schedule": "step"}, "milestones go together"),
    ],
)
def test_invalid_schedules_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def test_a_damaged_checkpoint_is_skipped(tmp_path):
    training = run(Schedule(epochs=3, batch=8, lr=0.1), until=2)
    path = checkpoint.save(training, tmp_path)
    (path / checkpoint.STATE).write_bytes(b"half")
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.latest(tmp_path) is None


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_costs_only_the_steps_since_the_other(
    tmp_path,
):
    schedule = Schedule(epochs=3, batch=8, lr=0.1)
    training = Training(Toy(), schedule, CPU)
    saved = [checkpoint.save(training, tmp_path) for _ in train(training, examples(), 3)]
    assert sorted(tmp_path.iterdir()) == saved[-2:]
    (saved[-1] / checkpoint.WEIGHTS).write_bytes(b"half")
    with pytest.warns(UserWarning, match="using the one before it"):
        fallback = checkpoint.latest(tmp_path)
    assert fallback == saved[-2]
    resumed = Training(Toy(), schedule, CPU)
    checkpoint.restore(resumed, fallback)
    run(schedule, training=resumed)
    assert all(torch.equal(a, b) for a, b in zip(state(training), state(resumed), strict=True))


class Collected(TensorExamples):
    """Data whose order changes in training: each epoch visits the least-drawn examples."""

    def __init__(self, source):
        super().__init__(source.inputs, source.labels, source.classes, source.spec)
        object.__setattr__(self, "visits", torch.zeros(len(self)))

    def order(self, seed, epoch):
        chosen = (
            self.visits
            + torch.rand(len(self), generator=torch.Generator().manual_seed(seed + epoch))
        ).argsort()
        self.visits[chosen[:24]] += 1  # the batches of an epoch read the first 24 of them
        return torch.cat([chosen[:24], chosen[:16]])

    def state_dict(self):
        return {"visits": self.visits.clone()}

    def load_state_dict(self, state):
        self.visits.copy_(state["visits"])


def test_examples_that_change_while_training_resume_to_the_same_bits(tmp_path):
    schedule = Schedule(epochs=3, batch=8, lr=0.1)

    def trained(training, until=None):
        for step in train(training, Collected(examples()), 3):
            if step.step == until:
                checkpoint.save(training, tmp_path)
                break
        return training

    whole = trained(Training(Toy(), schedule, CPU))
    trained(Training(Toy(), schedule, CPU), until=7)  # in the middle of the second epoch
    resumed = Training(Toy(), schedule, CPU)
    checkpoint.restore(resumed, checkpoint.latest(tmp_path))
    assert resumed.examples_state["visits"].sum() == 24
    trained(resumed)
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))


def test_a_learner_receives_the_progress_before_and_after_each_step():
    class Scheduled(Toy):
        def __init__(self):
            super().__init__()
            self.heard = []

        def before_step(self, progress):
            self.heard.append(("before", progress))

        def after_step(self, progress):
            self.heard.append(("after", progress))

    training = Training(Scheduled(), Schedule(steps=2, batch=8, lr=0.1), CPU)
    list(train(training, examples(), 3))
    assert training.learner.heard == [("before", 0), ("after", 0.5), ("before", 0.5), ("after", 1)]


def test_a_step_reports_the_norm_of_its_gradient():
    training = Training(Toy(), Schedule(steps=1, batch=8, lr=0.1, precision="fp32", clip=1e-3), CPU)
    (step,) = train(training, examples(), 3)
    again = Training(Toy(), Schedule(steps=1, batch=8, lr=0.1, precision="fp32"), CPU)
    norms = []
    for parameter in again.learner.parameters():
        parameter.register_hook(lambda gradient: norms.append(gradient.norm()))
    list(train(again, examples(), 3))
    torch.testing.assert_close(step.grad_norm, torch.stack(norms).norm())
    assert step.record()["grad_norm"] == pytest.approx(step.grad_norm.item(), abs=1e-6)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    schedule = Schedule(epochs=3, batch=8, lr=0.1)
    kept = checkpoint.save(run(schedule, until=2), tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    def full_as_torch_says(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    third = run(schedule, until=3)
    monkeypatch.setattr(checkpoint.torch, "save", full_as_torch_says)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        checkpoint.save(third, tmp_path)  # there is space, so it is something else
    usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    for save in (full, full_as_torch_says):
        monkeypatch.setattr(checkpoint.torch, "save", save)
        with pytest.raises(UserError, match="disk is full"):
            checkpoint.save(third, tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
    assert checkpoint.latest(tmp_path) == kept
