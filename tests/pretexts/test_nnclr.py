"""NNCLR: neighbors, its loss, and its queue."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.nnclr import distinct_share, nearest, neighbor_nce


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def build(**options):
    torch.manual_seed(0)
    backbone = build_backbone("mlp", {"width": 32, "depth": 2}, ImageSpec(16))
    cls = pretexts["nnclr"]
    cheap = {"hidden": 32, "predictor": 16, "projection": 8, "queue": 40}
    return cls(cls.Options(**{**cheap, **options}), backbone)


def views_of(pretext, seed=0, count=16):
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator()).byte()
    return pretext.views(Batch(images, None), generator(seed))


def test_neighbors_are_the_most_similar_vectors():
    vectors, queue = normal(4, 5), F.normalize(normal(9, 5, seed=1), dim=1)
    for row, index in enumerate(nearest(vectors, queue).tolist()):
        similar = [float(F.cosine_similarity(vectors[row], q, dim=0)) for q in queue]
        assert index == similar.index(max(similar))
    assert nearest(queue[[3, 1]] * 7, queue).tolist() == [3, 1]


def test_the_loss_equals_its_formula():
    neighbors, predicted = F.normalize(normal(6, 5), dim=1), normal(6, 5, seed=1)
    total = 0.0
    for i in range(6):
        similar = [float(F.cosine_similarity(neighbors[i], p, dim=0)) for p in predicted]
        total -= math.log(math.exp(similar[i] / 0.2) / sum(math.exp(s / 0.2) for s in similar))
    loss, _ = neighbor_nce(neighbors, predicted, 0.2)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)
    assert neighbor_nce(neighbors, neighbors * 3, 0.01)[1] == 1


def test_each_views_neighbor_is_compared_with_the_other_views_prediction():
    pretext, twin = build(), build()
    views = views_of(pretext)
    z = [twin.projector(twin.backbone(view).pooled) for view in views]
    p = [twin.predictor(vectors) for vectors in z]
    queue = twin.queue.vectors
    expected = sum(
        neighbor_nce(queue[nearest(z[i], queue)], p[1 - i], 0.1)[0] / 2 for i in range(2)
    )
    output = pretext(views)
    torch.testing.assert_close(output.loss, expected)
    expected_share = len(set(nearest(z[0], queue).tolist())) / 16
    assert output.metrics["neighbors"].item() == pytest.approx(expected_share)


def test_the_queue_takes_the_first_view_of_training_batches_and_is_first_in_first_out():
    pretext = build()
    for step in range(3):
        views = views_of(pretext, step)
        pretext(views)
        newest = pretext._pushed[-1]
        pretext.after_step(0.5)
    assert int(pretext.queue.place) == 48 % 40
    torch.testing.assert_close(pretext.queue.vectors[:8], newest[-8:])
    torch.testing.assert_close(newest.norm(dim=1), torch.ones(16))
    twin = build()
    twin(views)
    expected = F.normalize(build().projector(build().backbone(views[0]).pooled), dim=1)
    torch.testing.assert_close(twin._pushed[-1], expected.detach())
    pretext.eval()
    pretext(views)
    assert not pretext._pushed


def test_a_batch_larger_than_the_queue_leaves_its_last_vectors():
    pretext = build(queue=5)
    pretext.queue.push(torch.arange(8.0)[:, None].expand(8, 8))
    assert sorted(pretext.queue.vectors[:, 0].tolist()) == [3, 4, 5, 6, 7]


def test_the_share_of_distinct_neighbors():
    assert distinct_share(torch.tensor([2, 2, 2, 2]), 5).item() == 0.25
    assert distinct_share(torch.tensor([0, 1, 2, 4]), 5).item() == 1
