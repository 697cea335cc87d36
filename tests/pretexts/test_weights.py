import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.weights import PRETEXT_WEIGHTS, load_pretext, save_pretext


def build(width=8, seed=0, **options):
    torch.manual_seed(seed)
    backbone = build_backbone("mlp", {"width": width, "depth": 1}, ImageSpec(8))
    cls = pretexts["autoencoder"]
    return cls(cls.Options(**options), backbone).eval()


def test_a_task_is_rebuilt_with_its_latent_layer_and_decoder(tmp_path):
    saved = build(latent=3, beta=0.5, channels=8)
    path = tmp_path / PRETEXT_WEIGHTS
    save_pretext(path, saved)
    backbone = build(seed=1).backbone
    backbone.load_state_dict(saved.backbone.state_dict())
    loaded = load_pretext(path, backbone).eval()
    images = torch.rand(4, 3, 8, 8)
    assert loaded.options == saved.options
    for one, other in zip(loaded.encode(images), saved.encode(images), strict=True):
        assert torch.equal(one, other)
    codes = torch.randn(4, 3)
    assert torch.equal(loaded.decode(codes), saved.decode(codes))


def test_the_file_holds_no_second_copy_of_the_backbone(tmp_path):
    from safetensors.torch import load_file

    save_pretext(tmp_path / PRETEXT_WEIGHTS, build(latent=3))
    names = load_file(tmp_path / PRETEXT_WEIGHTS)
    assert {name.partition(".")[0] for name in names} == {"to_code", "decoder"}


def test_another_backbone_or_file_is_one_line(tmp_path):
    path = tmp_path / PRETEXT_WEIGHTS
    save_pretext(path, build(latent=3))
    with pytest.raises(UserError, match="does not fit 'mlp' as configured: size mismatch"):
        load_pretext(path, build(width=9).backbone)
    with pytest.raises(UserError, match="no such file"):
        load_pretext(tmp_path / "none", build().backbone)
    from sslrun.backbones import save_backbone

    save_backbone(tmp_path / "backbone.safetensors", build().backbone)
    with pytest.raises(UserError, match="holds no pretext task"):
        load_pretext(tmp_path / "backbone.safetensors", build().backbone)
