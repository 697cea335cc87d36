"""MoCo v3: its loss, its teacher, and the frozen projection of patches."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.mocov3 import batch_info_nce


def build(backbone="vit-tiny", **options):
    torch.manual_seed(0)
    shape = (
        {"patch": 8, "depth": 1, "width": 24, "heads": 3}
        if backbone == "vit-tiny"
        else {"channels": 8}
    )
    cls = pretexts["mocov3"]
    cheap = {"hidden": 32, "projection": 8}
    return cls(cls.Options(**{**cheap, **options}), build_backbone(backbone, shape, ImageSpec(32)))


def views_of(pretext, count=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator).byte()
    return pretext.views(Batch(images, None), generator)


def test_info_nce_equals_its_formula_and_keys_get_no_gradient():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 5, generator=generator).unbind()
    total = hits = 0.0
    for i in range(6):
        similar = [float(F.cosine_similarity(q[i], k[j], dim=0)) for j in range(6)]
        total -= math.log(math.exp(similar[i] / 0.3) / sum(math.exp(s / 0.3) for s in similar))
        hits += max(similar) == similar[i]
    q.requires_grad_()
    k.requires_grad_()
    loss, accuracy = batch_info_nce(q, k, 0.3)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)
    assert accuracy.item() == pytest.approx(hits / 6)
    loss.backward()
    assert k.grad is None
    assert q.grad.abs().sum() > 0


def test_the_loss_is_symmetric_and_scaled_by_the_temperature():
    pretext = build(temperature=0.5)
    views = views_of(pretext)
    twin = build(temperature=0.5)
    queries = [twin.predictor(twin.projector(twin.backbone(view).pooled)) for view in views]
    keys = [twin.teacher(view) for view in views]
    expected = sum(batch_info_nce(queries[i], keys[1 - i], 0.5)[0] for i in range(2))
    torch.testing.assert_close(pretext(views).loss, 2 * 0.5 * expected)


def test_the_teacher_follows_its_closed_form_without_gradient():
    pretext = build(momentum=0.9)
    pretext(views_of(pretext)).loss.backward()
    assert all(parameter.grad is None for parameter in pretext.teacher.parameters())
    before = pretext.teacher.head[0].weight.clone()
    with torch.no_grad():
        pretext.projector[0].weight.add_(1.0)
    pretext.after_step(0.25)
    momentum = 1 - 0.1 * (math.cos(math.pi * 0.25) + 1) / 2
    expected = momentum * before + (1 - momentum) * pretext.projector[0].weight
    torch.testing.assert_close(pretext.teacher.head[0].weight, expected.detach())


def test_frozen_patches_stay_while_the_rest_learns():
    pretext = build(freeze_patches=True)
    start = pretext.backbone.patch_embed.proj.weight.clone()
    optimizer = torch.optim.SGD([p for p in pretext.parameters() if p.requires_grad], lr=0.1)
    pretext(views_of(pretext)).loss.backward()
    optimizer.step()
    assert pretext.backbone.patch_embed.proj.weight.grad is None
    assert torch.equal(pretext.backbone.patch_embed.proj.weight, start)
    assert pretext.backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert build().backbone.patch_embed.proj.weight.requires_grad


def test_a_backbone_without_patches_cannot_freeze_them():
    with pytest.raises(UserError, match="'resnet18' has no projection of patches to freeze"):
        build("resnet18", freeze_patches=True)
