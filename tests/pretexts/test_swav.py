"""SwAV: Sinkhorn-Knopp, the swapped prediction, its queue, its prototypes and its collapse."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.swav import effective_number, sinkhorn
from sslrun.training.device import compute
from sslrun.training.loop import Schedule, Training, train


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def build(**options):
    torch.manual_seed(0)
    backbone = build_backbone("mlp", {"width": 32, "depth": 2}, ImageSpec(16))
    cls = pretexts["swav"]
    cheap = {"hidden": 32, "projection": 8, "prototypes": 6}
    return cls(cls.Options(**{**cheap, **options}), backbone)


def images(count=16):
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator()).byte()


def test_sinkhorn_equals_its_loops():
    scores = unit(5, 4) @ unit(4, 3, seed=1)
    q = [[math.exp(float(s) / 0.2) for s in row] for row in scores]
    for _ in range(3):
        totals = [sum(row[k] for row in q) for k in range(3)]
        q = [[value / totals[k] / 3 for k, value in enumerate(row)] for row in q]
        q = [[value / sum(row) / 5 for value in row] for row in q]
    expected = torch.tensor([[value / sum(row) for value in row] for row in q])
    torch.testing.assert_close(sinkhorn(scores, torch.ones(5), 0.2, 3), expected)


def test_assignments_are_balanced_and_without_iterations_a_softmax():
    scores = torch.rand(64, 4, generator=generator()) * torch.tensor([1.0, 0.1, 0.1, 0.1])
    balanced = sinkhorn(scores, torch.ones(64), 0.05, 50)
    torch.testing.assert_close(balanced.sum(dim=0), torch.full((4,), 16.0), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(balanced.sum(dim=1), torch.ones(64))
    plain = sinkhorn(scores, torch.ones(64), 0.05, 0)
    torch.testing.assert_close(plain, (scores / 0.05).softmax(dim=1))
    assert plain.sum(dim=0)[0] > 40


def test_rows_without_weight_do_not_count():
    scores = unit(7, 4) @ unit(4, 3, seed=1)
    weights = torch.tensor([1.0] * 5 + [0.0] * 2)
    torch.testing.assert_close(
        sinkhorn(scores, weights, 0.05, 3)[:5], sinkhorn(scores[:5], torch.ones(5), 0.05, 3)
    )


def test_extreme_scores_stay_finite():
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    found = sinkhorn(scores, torch.ones(2), 0.02, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))


def test_the_loss_is_the_swapped_prediction_of_all_views():
    pretext = build(crops={"count": 2, "size": 8})
    pretext.before_step(0.0)
    views = pretext.views(Batch(images(), None), generator())
    output = pretext(views)
    twin = build()
    twin.before_step(0.0)
    pooled = [
        *twin.backbone(torch.cat(views[:2])).pooled.chunk(2),
        *twin.backbone(torch.cat(views[2:])).pooled.chunk(2),
    ]
    z = F.normalize(twin.projector(torch.cat(pooled)), dim=1).chunk(4)
    scores = [view @ twin.prototypes.weight.T for view in z]
    total = 0.0
    for target in range(2):
        assigned = sinkhorn(scores[target].detach(), torch.ones(16), 0.05, 3)
        for view in range(4):
            if view == target:
                continue
            for row in range(16):
                probabilities = (scores[view][row] / 0.1).softmax(dim=0)
                total -= float((assigned[row] * probabilities.log()).sum().detach()) / 16
    assert output.loss.item() == pytest.approx(total / 6, rel=1e-4)


def test_prototypes_are_unit_vectors_and_can_be_frozen():
    pretext = build()
    with torch.no_grad():
        pretext.prototypes.weight.mul_(3)
    pretext.before_step(0.5)
    torch.testing.assert_close(pretext.prototypes.weight.norm(dim=1), torch.ones(6))
    start = pretext.prototypes.weight.clone()
    schedule = Schedule(steps=3, batch=16, lr=0.1, optimizer="sgd", freeze_last=2, precision="fp32")
    examples = TensorExamples(images(), None, (), ImageSpec(16))
    moved = []
    for _ in train(Training(pretext, schedule, compute("cpu")), examples, 0):
        moved.append(not torch.allclose(F.normalize(pretext.prototypes.weight, dim=1), start))
    assert moved == [False, False, True]


def test_assignments_get_no_gradient():
    pretext = build()
    pretext.before_step(0.0)
    scores = torch.randn(4, 6, requires_grad=True)
    assert not pretext._assign(scores, 0).requires_grad


def test_a_full_queue_takes_part_in_the_balancing_after_its_start():
    pretext = build(queue=32, queue_from=0.5)
    plain = build()
    views = pretext.views(Batch(images(), None), generator())
    losses = []
    for progress in (0.0, 0.2, 0.6):  # empty; full, but not started; full and started
        for each in (pretext, plain):
            each.before_step(progress)
        losses.append((pretext(views).loss, plain(views).loss))
        if progress == 0.0:
            pretext._pushed.clear()
            pretext.queue.push(unit(32, 2, 8, seed=4))
    assert torch.equal(*losses[0])
    assert torch.equal(*losses[1])
    assert not torch.allclose(*losses[2])
    # Against the formula for the second view.
    scores = torch.randn(4, 6, generator=generator(2)) / 3
    earlier = pretext.queue.vectors[:, 1] @ pretext.prototypes.weight.T
    both = sinkhorn(torch.cat([earlier, scores]), torch.ones(36), 0.05, 3)[-4:]
    torch.testing.assert_close(pretext._assign(scores, 1), both)


def test_the_queue_holds_the_projections_of_each_global_view():
    pretext = build(queue=40)
    for step in range(3):
        pretext(pretext.views(Batch(images(), None), generator(step)))
        newest = pretext._pushed[-1]
        pretext.after_step(0.5)
    assert newest.shape == (16, 2, 8)
    assert int(pretext.queue.place) == 48 % 40
    assert bool(pretext.queue.is_full)
    torch.testing.assert_close(pretext.queue.vectors[:8], newest[-8:])


def trained(**options):
    pretext = build(augmentation={"crop": [0.3, 1.0], "flip": 0.5}, **options)
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=0.01)
    for step in range(25):
        pretext.before_step(step / 25)
        output = pretext(pretext.views(Batch(images(32), None), generator(step)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        pretext.after_step((step + 1) / 25)
    return pretext, {name: value.item() for name, value in output.metrics.items()}


def test_without_balancing_all_images_share_a_prototype_and_the_collapse_is_named():
    pretext, metrics = trained(iterations=0)
    assert "collapse to one prototype" in pretext.diagnose(metrics)
    pretext, metrics = trained()
    assert pretext.diagnose(metrics) is None
    assert pretext.diagnose({}) is None


def test_the_effective_number_of_prototypes():
    assert effective_number(torch.full((3, 5), 0.2)).item() == pytest.approx(5)
    assert effective_number(torch.eye(5)[[2, 2]]).item() == pytest.approx(1)


def test_an_epsilon_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.02"):
        pretexts["swav"].Options(epsilon=0.001)
