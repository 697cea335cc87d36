"""timm's ViT: its weights give the same features here. Skipped without timm."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import Normalize

from sslrun.backbones import build_backbone, load_into
from sslrun.backbones.image import IMAGENET_MEAN, IMAGENET_STD
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.bench import CellBench
from sslrun.stages.context import Context
from sslrun.stages.evaluate import cells
from sslrun.training.device import compute

SHAPE = {"patch": 4, "depth": 3, "width": 48, "heads": 4}


@pytest.fixture(scope="module")
def vision_transformer():
    return pytest.importorskip(
        "timm.models.vision_transformer", reason="timm is not installed"
    ).VisionTransformer


def theirs(vision_transformer, **options):
    """Return a small ViT of timm with random weights and a classifier."""
    torch.manual_seed(0)
    model = vision_transformer(
        img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=4, num_classes=7, **options
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("options", "theirs_has"),
    [
        ({}, {}),
        ({"pool": "mean"}, {"global_pool": "avg", "fc_norm": False}),
        ({"registers": 2}, {"reg_tokens": 2}),
        ({"registers": 2}, {"reg_tokens": 2, "no_embed_class": True}),
    ],
    ids=["cls", "mean", "registers", "registers, positions of patches alone"],
)
def test_weights_of_timm_give_the_features_of_timm(
    vision_transformer, tmp_path, options, theirs_has
):
    model = theirs(vision_transformer, **theirs_has)
    path = tmp_path / "vit.safetensors"
    save_file(model.state_dict(), path)
    recipe_ = {
        "name": "tiny",
        "backbone": {"name": "vit-tiny", **SHAPE, **options},
        "data": {"name": "digits", "size": 16},
        "evaluate": {"digits": {"protocols": ["knn"]}},
    }
    # As in `sslrun knn tiny.yaml --from vit.safetensors`.
    (cell,) = cells(parse(Located(recipe_, {(): "tiny.yaml:1"})), 0, tmp_path / "runs", source=path)
    ours = CellBench(cell, Context(tmp_path, compute("cpu"))).backbone().eval()
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        tokens = model.forward_features(Normalize(IMAGENET_MEAN, IMAGENET_STD)(images))
        features = ours(images)
        torch.testing.assert_close(features.tokens, tokens[:, -16:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            features.pooled, model.forward_head(tokens, pre_logits=True), atol=1e-5, rtol=1e-5
        )


def test_a_timm_network_that_normalizes_after_pooling_is_recognized(vision_transformer, tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(theirs(vision_transformer, global_pool="avg").state_dict(), path)
    with pytest.raises(UserError, match=r"norm.*in 'vit-tiny' as configured"):
        load_into(build_backbone("vit-tiny", {**SHAPE, "pool": "mean"}, ImageSpec(16)), path)
