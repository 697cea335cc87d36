"""The protocol `attend`: masks of the heaviest patches, weights, and scores of known attention."""

import math

import pytest
import torch
from torch import nn

from sslrun.backbones import build_backbone
from sslrun.backbones.base import Backbone, backbones
from sslrun.backbones.image import patch_attention
from sslrun.data.image.masks import MaskedImages
from sslrun.data.specs import ImageSpec, TextSpec
from sslrun.data.text.sequences import build_labeled
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.errors import UserError
from sslrun.protocols.attend import heaviest
from sslrun.protocols.base import protocols, unsupported
from sslrun.recipe import load
from sslrun.tasks.base import tasks

SMALL = {"patch": 4, "depth": 2, "width": 24, "heads": 3}


@pytest.mark.parametrize("count", [4, 10, 49, 144, 900])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_attention_keeps_the_fewest_patches_that_hold_the_mass(count, dtype):
    maps = torch.full((1, 2, 1, count), 0.7 / count, dtype=dtype)  # [CLS] has the rest
    assert heaviest(maps, 0.6).sum(dim=-1).flatten().tolist() == [math.ceil(0.6 * count)] * 2
    assert heaviest(maps, 1.0).all()


def test_the_mask_equals_that_of_ascending_sums_in_the_paper_s_procedure():
    maps = torch.rand(3, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masks = heaviest(maps, 0.6)
    for values, mask in zip(maps.flatten(0, 1), masks.flatten(0, 1), strict=True):
        total, running, expected = values.sum().item(), 0.0, set()
        for index in values.flatten().argsort().tolist():  # ascending
            running += values.flatten()[index].item() / total
            if running > 1 - 0.6:
                expected.add(index)
        assert set(mask.flatten().nonzero()[:, 0].tolist()) == expected


def test_one_patch_with_all_attention_is_the_mask():
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 1, 2] = 0.3
    assert torch.equal(heaviest(maps, 0.6), maps > 0)


@pytest.mark.parametrize(("size", "options"), [(16, {}), (24, {}), (16, {"registers": 2})])
def test_weights_of_patches_equal_a_naive_softmax(size, options):
    torch.manual_seed(0)
    vit = build_backbone("vit-tiny", {**SMALL, **options}, ImageSpec(16)).double().eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    with torch.inference_mode():
        x = vit.blocks[0](vit._with_special(vit.embed(images)))
        block = vit.blocks[1]
        q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        found = patch_attention(vit, images)
        weights = vit.attention(images)
    side, special = size // 4, 1 + options.get("registers", 0)
    assert found.shape == (2, 3, side, side)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(()).double(), atol=1e-12)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        scores = torch.einsum("bqd,bkd->bqk", q[..., part], k[..., part]) / math.sqrt(8)
        naive = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        expected = naive[:, 0, special:].unflatten(-1, (side, side))
        assert torch.allclose(found[:, head].double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert-tiny", {}),
        ("bert-tiny", {"causal": True}),
        ("bert-tiny", {"fast": True}),
        ("gpt-tiny", {}),
    ],
)
def test_text_backbones_give_the_weights_that_their_last_block_uses(name, options):
    torch.manual_seed(0)
    if name not in backbones:
        name = next(other for other in backbones if other.startswith("gpt"))
    spec = TextSpec(blank_tokenizer(60), 12)
    model = build_backbone(name, {"depth": 2, "width": 64, **options}, spec).eval()
    examples = build_labeled([[7, 8, 9], [10, 11, 12, 13, 14]], None, None, (), spec)
    (batch,) = examples.batches([torch.arange(2)], torch.device("cpu"))
    with torch.inference_mode():
        weights = model.attention(batch.inputs)
        before = model(batch.inputs).layers[-2]
        block = model.blocks[-1]
        x = block.norm1(before) if block.pre else before
        values = block.attn._qkv(x, None)[2]
        mixed = block.attn.proj((weights @ values).transpose(1, 2).flatten(2))
        expected = block.attn(x, mask=batch.inputs.attendable(), causal=model.causal)
    assert torch.allclose(mixed, expected, atol=1e-5)
    real = batch.inputs.real
    assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-5)
    assert weights[0, :, :, ~real[0]].abs().max() == 0  # nothing attends to padding
    if model.causal:
        assert weights.triu(1).abs().max() == 0


class Bench:
    """Four images with one object, and a backbone with known attention."""

    tests = ("test",)

    def __init__(self, maps, labels):
        self.task = tasks["objects"](tasks["objects"].Options(), ImageSpec(8), ())
        images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
        self.examples = MaskedImages(images, labels, (), ImageSpec(8))
        self.maps = maps

    def backbone(self):
        return Known(self.maps)

    def outputs(self, split, run):
        (batch,) = self.examples.batches([torch.arange(len(self.examples))], torch.device("cpu"))
        return run(batch)

    def score(self, split, outputs):
        return self.task.score(outputs, self.examples)


class Known(Backbone):
    """Attention of [CLS] to itself is 0.5; that to patches is given."""

    name = "known"
    takes = ImageSpec
    offers = frozenset({"attention"})
    patch = 2

    def __init__(self, maps):
        super().__init__(None, ImageSpec(8))
        self.maps = maps

    def attention(self, inputs):
        patches = self.maps.flatten(2)
        weights = torch.zeros(*patches.shape[:2], 17, 17)
        weights[:, :, 0, 0], weights[:, :, 0, 1:] = 0.5, patches / 2
        return weights


def run(maps, labels, **options):
    cls = protocols["attend"]
    return cls(cls.Options(**options)).run(Bench(maps, labels))


def test_known_attention_has_its_exact_score_and_best_is_at_least_mean():
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    labels[:, 2:4, 4:6] = 1  # the patch in row 1, column 2
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, 0, 1, 2] = 1  # the object
    maps[:, 1, 1, 2], maps[:, 1, 0, 0] = 0.5, 0.5  # the object and a patch beside it
    maps[:, 2, 3, 3] = 1  # background
    best = run(maps, labels)
    assert best.metrics["test"]["jaccard"] == 100
    assert best.details["jaccard_by_head"] == [100, 50, 0]
    assert best.details["patches"] == [4, 4]
    mean = run(maps, labels, head="mean")
    assert mean.metrics["test"]["jaccard"] == pytest.approx(50)
    assert mean.metrics["test"]["everything"] == best.metrics["test"]["everything"]
    half = run(maps, labels, mass=0.5)  # one of the two patches suffices
    assert half.details["jaccard_by_head"] == [100, 0, 0]
    random = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    scores = [
        run(random, labels, head=head).metrics["test"]["jaccard"] for head in ("best", "mean")
    ]
    assert scores[0] > scores[1]


def test_a_backbone_without_cls_is_refused():
    model = Known(torch.rand(1, 1, 4, 4))
    model.patch = 1
    with pytest.raises(UserError, match=r"'known' has no \[CLS\]"):
        patch_attention(model, torch.zeros(1, 3, 8, 8))


def test_attend_and_other_protocols_refuse_each_other_s_tasks():
    of_objects = tasks["objects"].Options()
    of_classes = tasks["classification"].Options()
    assert unsupported("attend", tasks["objects"], of_objects) is None
    assert "take task: objects" in unsupported("attend", tasks["classification"], of_classes)
    for protocol in protocols:
        if protocol != "attend":
            assert unsupported(protocol, tasks["objects"], of_objects)
    assert "nothing to learn: take attend" in unsupported("lpft", tasks["objects"], of_objects)


RECIPE = """\
name: mine
backbone: {backbone}
data: {{name: stamps, size: 32}}
evaluate:
  stamps:
    protocols: [{protocol}]
"""


@pytest.mark.parametrize(
    ("backbone", "protocol", "message"),
    [
        ("resnet18", "attend", r"mine.yaml:6: evaluate.stamps.protocols: .*'attention', which "
         r"'resnet18' does not offer: choose one that has it: .*vit-tiny"),
        ("vit-tiny", "knn", r"mine.yaml:6: .*knn .* take attend"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_attend_is_one_line(backbone, protocol, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.format(backbone=backbone, protocol=protocol))
    with pytest.raises(UserError, match=message):
        load(path)
