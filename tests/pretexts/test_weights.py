import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sslrun.backbones import build_backbone, save_backbone
from sslrun.backbones.weights import WEIGHTS
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext, pretexts
from sslrun.pretexts.weights import KEPT, find_kept, save_kept


def build(width=8, seed=0, **options):
    torch.manual_seed(seed)
    backbone = build_backbone("mlp", {"width": width, "depth": 1}, ImageSpec(8))
    cls = pretexts["autoencoder"]
    return cls(cls.Options(**options), backbone).eval()


def save(folder, pretext):
    """Write what a pretraining writes; return the file of the backbone."""
    folder.mkdir(exist_ok=True)
    save_backbone(folder / WEIGHTS, pretext.backbone, save_kept(folder / KEPT, pretext))
    return folder / WEIGHTS


def test_a_task_is_rebuilt_with_its_latent_layer_and_decoder(tmp_path):
    saved = build(latent=3, beta=0.5, channels=8)
    backbone = build(seed=1).backbone
    backbone.load_state_dict(saved.backbone.state_dict())
    loaded = find_kept(save(tmp_path, saved)).rebuild(backbone).eval()
    images = torch.rand(4, 3, 8, 8)
    assert loaded.options == saved.options
    for one, other in zip(loaded.encode(images), saved.encode(images), strict=True):
        assert torch.equal(one, other)
    codes = torch.randn(4, 3)
    assert torch.equal(loaded.decode(codes), saved.decode(codes))


def test_the_file_holds_the_named_modules_alone(tmp_path):
    save(tmp_path, build(latent=3))
    names = {name.partition("/")[0] for name in load_file(tmp_path / KEPT)}
    assert names == {"to_code", "decoder"}
    plain = find_kept(save(tmp_path / "plain", build()))
    assert set(plain.modules) == {"decoder"}  # it has no latent layer

    class Nested(Pretext):
        name, keeps = "nested", ("teacher.1",)

        def __init__(self, backbone):
            super().__init__(self.Options(), backbone)
            self.teacher = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))

    nested = Nested(build().backbone)
    kept = find_kept(save(tmp_path / "nested", nested))
    assert set(kept.modules) == {"teacher.1"}
    copy = nn.Linear(3, 4)
    kept.load_into("teacher.1", copy, "test")
    assert torch.equal(copy.weight, nested.teacher[1].weight)
    with pytest.raises(UserError, match=r"task 'nested', which is not known here: .*--import"):
        kept.rebuild(nested.backbone)


def test_nothing_is_found_where_nothing_was_kept(tmp_path):
    backbone = build().backbone
    rotation = pretexts["rotation"](pretexts["rotation"].Options(), backbone)
    assert find_kept(save(tmp_path, rotation)) is None
    assert not (tmp_path / KEPT).exists()
    torch.save(backbone.state_dict(), tmp_path / "other.pt")
    assert find_kept(tmp_path / "other.pt") is None


def test_a_missing_damaged_or_unfit_file_is_one_line(tmp_path):
    weights = save(tmp_path, build(latent=3))
    kept = find_kept(weights)
    with pytest.raises(UserError, match=r"parameter 'weight' has shape .* 'autoencoder on mlp'"):
        kept.rebuild(build(width=9).backbone)
    path = tmp_path / KEPT
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"damaged, or not the one of backbone.*--fresh"):
        find_kept(weights)
    path.write_bytes(content)
    assert set(find_kept(weights).modules) == {"to_code", "decoder"}
    save(tmp_path / "other", build(seed=1, latent=3))
    path.write_bytes((tmp_path / "other" / KEPT).read_bytes())
    with pytest.raises(UserError, match="not the one of backbone"):
        find_kept(weights)
    path.unlink()
    with pytest.raises(UserError, match=r"no such file, but backbone\.safetensors needs it: copy"):
        find_kept(weights)
