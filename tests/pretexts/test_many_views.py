"""More than two views and local crops: each loss against loops over views, and over processes."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.barlow import barlow_loss
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.byol import byol_loss
from sslrun.pretexts.mocov3 import batch_info_nce
from sslrun.pretexts.nnclr import nearest, neighbor_nce
from sslrun.pretexts.simclr import contrast, nt_xent
from sslrun.pretexts.simsiam import simsiam_loss
from sslrun.pretexts.vicreg import vicreg_terms
from sslrun.pretexts.views import cross_pairs, symmetric_pairs
from sslrun.training.norm import synchronize_norms

CHEAP = {
    "simclr": {},
    "byol": {"hidden": 16, "projection": 8},
    "simsiam": {"hidden": 16, "bottleneck": 8},
    "barlow": {"width": 16},
    "vicreg": {"width": 16},
    "mocov3": {"hidden": 16, "projection": 8},
    "nnclr": {"hidden": 16, "predictor": 16, "projection": 8, "queue": 12},
    "swav": {"hidden": 16, "projection": 8, "prototypes": 6, "queue": 12},
    "lejepa": {"hidden": 16, "directions": 8, "projection": 8},
}
PLAIN = {"augmentation": {}, "views": 2}


def build(name, **options):
    torch.manual_seed(0)
    backbone = build_backbone("mlp", {"width": 24, "depth": 1}, ImageSpec(8))
    cls = pretexts[name]
    return cls(cls.Options(**{**PLAIN, **CHEAP[name], **options}), backbone)


def views_of(pretext, count=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).byte()
    return pretext.views(Batch(images, None), generator)


def projections(count, rows=5, width=4):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, rows, width, generator=generator).unbind()


def test_pairs_leave_out_a_view_with_itself_and_local_targets():
    assert cross_pairs(2, 2) == [(0, 1), (1, 0)]
    assert cross_pairs(2, 3) == [(0, 1), (1, 0), (2, 0), (2, 1)]
    assert symmetric_pairs(2, 3) == [(0, 1, 2), (0, 2, 1), (1, 2, 1)]


@pytest.mark.parametrize(("globals_", "locals_"), [(2, 0), (4, 0), (2, 3), (3, 2)])
def test_contrast_is_the_mean_over_all_pairs_of_views(globals_, locals_):
    views = projections(globals_ + locals_)
    total, pairs, hits = 0.0, 0, 0
    for view, vectors in enumerate(views):
        for row in range(5):
            similar = {
                (key, other): float(F.cosine_similarity(vectors[row], views[key][other], dim=0))
                for key in range(globals_)
                for other in range(5)
                if (key, other) != (view, row)
            }
            denominator = sum(math.exp(value / 0.5) for value in similar.values())
            for key in range(globals_):
                if key != view:
                    total -= math.log(math.exp(similar[key, row] / 0.5) / denominator)
                    pairs += 1
            hits += max(similar, key=similar.get)[1] == row
    loss, accuracy = contrast(views[:globals_], views[globals_:], 0.5)
    assert loss.item() == pytest.approx(total / pairs, rel=1e-5)
    assert accuracy.item() == pytest.approx(hits / (5 * len(views)))


def test_contrast_of_two_views_is_the_cross_entropy_of_nt_xent_bit_for_bit():
    first, second = projections(2)
    z = F.normalize(torch.cat([first, second]), dim=1)
    scores = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(scores, (torch.arange(10) + 5) % 10)
    assert torch.equal(nt_xent(first, second, 0.2)[0], expected)


def naive_loss(name, pretext, views, count):
    """The loss of the views in loops over pairs; the first `count` are global."""
    pairs = [(v, t) for v in range(len(views)) for t in range(count) if v != t]
    z = [getattr(pretext, "projector", pretext.backbone)(pretext.backbone(v).pooled) for v in views]
    if name == "barlow":
        return sum(barlow_loss(z[v], z[t], 0.0051) for v, t in pairs) / len(pairs)
    if name == "vicreg":
        invariance = sum((z[v] - z[t]).square().mean() for v, t in pairs) / len(pairs)
        alone = [vicreg_terms(vectors, vectors) for vectors in z]
        variance = sum(terms[1] for terms in alone) / len(z)
        covariance = sum(terms[2] for terms in alone) / len(z)
        return 25 * invariance + 25 * variance + covariance
    p = [pretext.predictor(vectors) for vectors in z]
    if name == "simsiam":
        total = 0.0
        for v in range(len(views)):
            others = [z[t] for t in range(count) if t != v]
            total += simsiam_loss(p[v], sum(others) / len(others))
        return total / len(views)
    if name == "nnclr":
        queue = pretext.queue.vectors
        terms = [neighbor_nce(queue[nearest(z[t], queue)], p[v], 0.1)[0] for v, t in pairs]
        return sum(terms) / len(pairs)
    teacher = [pretext.teacher(view) for view in views[:count]]
    if name == "mocov3":
        terms = [0.4 * batch_info_nce(p[v], teacher[t], 0.2)[0] for v, t in pairs]
    else:
        terms = [byol_loss(p[v], teacher[t]) for v, t in pairs]
    return 2 * sum(terms) / len(pairs)


@pytest.mark.parametrize("name", ["byol", "simsiam", "barlow", "vicreg", "mocov3", "nnclr"])
@pytest.mark.parametrize(("count", "crops"), [(2, 0), (4, 0), (2, 2)])
def test_losses_equal_loops_over_pairs(name, count, crops):
    options = {
        "views": count,
        "augmentation": {"flip": 0.5},
        "crops": {"count": crops, "size": 4} if crops else None,
    }
    pretext, twin = build(name, **options), build(name, **options)
    views = views_of(pretext)
    assert [view.shape[-1] for view in views] == [8] * count + [4] * crops
    output = pretext(views)
    torch.testing.assert_close(output.loss, naive_loss(name, twin, views, count))
    output.loss.backward()
    assert pretext.backbone.hidden[0][0].weight.grad.isfinite().all()


def test_vicreg_terms_of_two_views_are_the_papers():
    first, second = projections(2)
    invariance, variance, covariance = vicreg_terms(first, second)
    assert torch.equal(invariance, F.mse_loss(first, second))
    alone = [vicreg_terms(view, view) for view in (first, second)]
    torch.testing.assert_close(variance, (alone[0][1] + alone[1][1]) / 2)
    torch.testing.assert_close(covariance, (alone[0][2] + alone[1][2]) / 2)


@pytest.mark.parametrize("name", ["byol", "mocov3"])
def test_local_views_never_reach_the_teacher(name):
    pretext = build(name, crops={"count": 3, "size": 4})
    sizes = []
    pretext.teacher.backbone.register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape[-1])
    )
    pretext(views_of(pretext))
    assert sizes == [8, 8]


def test_moco_compares_two_views():
    backbone = build_backbone("mlp", {"width": 24, "depth": 1}, ImageSpec(8))
    cls = pretexts["moco"]
    for options, message in [({"views": 4}, "set views: 2"), ({"crops": {"count": 1}}, "leave it")]:
        with pytest.raises(UserError, match=message):
            cls(cls.Options(**options), backbone)


def outcome(name, views):
    """The loss and gradients of three views in float64, and what the queue gets."""
    pretext = build(name, views=3).double()
    if dist.is_initialized():
        synchronize_norms(pretext, torch.device("cpu"))
    # Unit vectors are compared in float32.
    for part in ("queue", "prototypes"):
        if hasattr(pretext, part):
            getattr(pretext, part).float()
    pretext.before_step(0.5)
    if name == "swav":
        pretext.queue.push(F.normalize(torch.stack(projections(3, 12, 8), dim=1), dim=2))
    if name == "lejepa":
        generator = torch.Generator().manual_seed(7)
        views = (*views, F.normalize(torch.randn(8, 8, generator=generator), dim=1))
    loss = pretext(views).loss
    loss.backward()
    pretext.after_step(0.5)
    named = pretext.named_parameters()
    found = {key: value.grad for key, value in named if value.grad is not None}
    queue = {"queue": pretext.queue.vectors} if name in ("swav", "nnclr") else {}
    return {"loss": loss.detach(), **found}, queue


def three_views():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 8, 3, 8, 8, generator=generator, dtype=torch.float64).unbind()


def one_of_two(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    outcomes = {}
    for name in CHEAP:
        halves = tuple(view[rank * 4 : rank * 4 + 4] for view in three_views())
        values, queue = outcome(name, halves)
        for value in values.values():
            dist.all_reduce(value.div_(2))  # as data-parallel training does
        outcomes[name] = {**values, **queue}
    if dist.get_rank() == 0:
        torch.save(outcomes, results)
    dist.destroy_process_group()


def test_two_processes_have_the_loss_gradients_and_queue_of_the_whole_batch(run_two, tmp_path):
    run_two(one_of_two, (str(tmp_path / "store"), str(tmp_path / "found")))
    found = torch.load(tmp_path / "found", weights_only=True)
    for name in CHEAP:
        values, queue = outcome(name, three_views())
        torch.testing.assert_close(
            found[name],
            {**values, **queue},
            rtol=1e-5,
            atol=1e-6,
            msg=partial("{}: {}".format, name),
        )
