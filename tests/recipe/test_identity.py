"""Run hashes: non-default options, versions, files and the source of plug-ins."""

import sys
from types import ModuleType
from typing import ClassVar

import pytest

from sslrun.pretexts.base import pretexts
from sslrun.recipe import Named, parse
from sslrun.recipe.places import Located
from sslrun.registry import Options
from sslrun.runs import component_identity, hash_contents
from sslrun.stages.evaluate import cells
from sslrun.stages.pretrain import Pretraining


class Crop(Options):
    size: int = 8
    flip: float = 0.5


class LaterCrop(Crop):
    blur: float = 0.0


class Before(Options):
    rate: float = 0.1
    crop: Crop = Crop(size=16)


class After(Options):
    rate: float = 0.1
    layers: int = 3
    crop: LaterCrop = LaterCrop(size=16)


RECIPE = {
    "name": "mine",
    "backbone": {"name": "resnet18", "stem": "small"},
    "pretext": {"name": "simclr", "temperature": 0.2},
    "data": {"name": "digits", "size": 16},
    "pretrain": {"epochs": 2, "batch": 64},
    "evaluate": {"digits": {"protocols": ["probe"]}},
}


def hashes(tmp_path, **changes):
    """Return the hashes of a recipe's pretraining and of its probe."""
    recipe = parse(Located({**RECIPE, **changes}, {(): "mine.yaml:1"}))
    (probe,) = cells(recipe, 0, tmp_path)
    return Pretraining(recipe, 0, tmp_path).run.hash, probe.run.hash


@pytest.mark.parametrize(
    "options",
    [{}, {"rate": 0.2}, {"crop": {"size": 4}}, {"crop": {"size": 8}}, {"crop": {"flip": 1}}],
)
def test_a_new_option_with_a_default_changes_no_identity(options):
    before, after = (
        Named(name="x", options=cls.model_validate(options)).identity() for cls in (Before, After)
    )
    assert before == after


def test_only_what_differs_from_the_defaults_is_in_the_identity():
    def identity_of(**options):
        return Named(name="x", options=Before.model_validate(options)).identity()

    assert identity_of() == identity_of(rate=0.1, crop={"size": 16, "flip": 0.5}) == {"name": "x"}
    assert identity_of(rate=0.2, crop={"size": 4}) == {
        "name": "x",
        "rate": 0.2,
        "crop": {"size": 4},
    }
    assert identity_of(crop={"size": 8}) == {
        "name": "x",
        "crop": {},
    }  # the default of the class, but not of the field


def test_a_changed_value_changes_the_hashes_and_a_default_that_is_written_out_does_not(tmp_path):
    first = hashes(tmp_path)
    assert hashes(tmp_path, pretext={"name": "simclr", "temperature": 0.3}) != first
    assert hashes(tmp_path, pretrain={"epochs": 2, "batch": 64, "clip": None, "warmup": 0}) == first
    pretrained, probed = hashes(tmp_path, probe={"l2_count": 3})
    assert pretrained == first[0]
    assert probed != first[1]


def test_the_order_of_keys_does_not_matter(tmp_path):
    turned = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value
        for key, value in RECIPE.items()
    }
    assert hashes(tmp_path, **dict(reversed(turned.items()))) == hashes(tmp_path)


def test_a_raised_version_changes_the_hashes(tmp_path, monkeypatch):
    first = hashes(tmp_path)
    monkeypatch.setattr(pretexts["simclr"], "version", 2)
    second = hashes(tmp_path)
    assert second[0] != first[0]
    assert second[1] != first[1]  # a probe's identity includes its pretraining


def test_a_plug_in_is_identified_by_the_content_of_its_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("a = 1\n")
    module = ModuleType("mine_of_a_test")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Mine:
        version: ClassVar[int] = 1

    Mine.__module__ = module.__name__
    first = component_identity(Mine)
    assert set(first) == {"component.source"}
    path.write_text("a = 2\n")
    hash_contents.cache_clear()  # one process reads a file once
    assert component_identity(Mine) != first
    assert component_identity(pretexts["simclr"]) == {}
