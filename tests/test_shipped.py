"""Shipped recipes: found by name from any folder, and inside the wheel."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sslrun import cli, shipped
from sslrun.errors import UserError
from sslrun.recipe import load, load_sweep

ROOT = Path(__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_is_listed_with_its_description(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sslrun", "recipes", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    listed = {row["name"]: row["about"] for row in json.loads(capsys.readouterr().out)}
    files = [path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "claims"]
    assert len(listed) == len(files) > 30
    assert all(listed.values())
    assert listed["image/byol-cifar10"] == "BYOL (Grill et al., NeurIPS 2020) on CIFAR-10."
    monkeypatch.setattr(sys, "argv", ["sslrun", "recipes"])
    with pytest.raises(SystemExit):
        cli.main()
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(listed)  # no name is truncated, however long its description


def test_a_recipe_is_found_by_its_name_from_any_folder(elsewhere):
    assert load(Path("image/simclr-cifar10")) == load(Path("simclr-cifar10"))
    assert load(Path("simclr-cifar10"), ["pretrain.epochs=3"]).pretrain.epochs == 3
    assert load_sweep(Path("quickstart")).name == "quickstart"
    own = elsewhere / "quickstart"
    own.write_text((ROOT / "recipes/image/simclr-cifar10.yaml").read_text())
    assert load(Path("quickstart")).name == "simclr-cifar10"  # a file of that name has priority


def test_an_unknown_name_is_an_error(elsewhere, monkeypatch):
    with pytest.raises(UserError, match="Did you mean 'simclr-cifar10'"):
        shipped.find(Path("simclr-cifar"))
    with pytest.raises(UserError, match="`sslrun recipes` lists those that ship"):
        shipped.find(Path("xyzzy"))
    with pytest.raises(UserError, match=r"quickstart\.yaml: no such file"):
        load_sweep(Path("quickstart.yaml"))
    monkeypatch.setattr(shipped, "names", lambda: {"a/mine": Path("1"), "b/mine": Path("2")})
    assert shipped.find(Path("b/mine")) == Path("2")
    with pytest.raises(UserError, match="a/mine, b/mine; name one in full"):
        shipped.find(Path("mine"))


def test_local_claims_replace_the_shipped_ones(elsewhere):
    assert shipped.claims_folder().resolve() == (ROOT / "recipes/claims").resolve()
    (elsewhere / "recipes" / "claims").mkdir(parents=True)
    assert shipped.claims_folder() == Path("recipes/claims")


def test_the_wheel_holds_the_recipes_and_finds_them(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "sslrun", "recipes"):
        (source / name).symlink_to(ROOT / name)
    wheels = tmp_path / "wheels"
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])",
            wheels,
        ],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    inside = {
        path.relative_to(tmp_path / "installed/sslrun")
        for path in tmp_path.glob("installed/sslrun/recipes/**/*.yaml")
    }
    assert inside == {path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml")}
    code = (
        "from sslrun import shipped; from pathlib import Path; "
        "print(shipped.__file__, shipped.find(Path('quickstart')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "installed")},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    installed = tmp_path / "installed/sslrun"
    recipe = installed / "recipes/quickstart.yaml"
    assert done.stdout.split() == [str(installed / "shipped.py"), str(recipe)]
    assert load_sweep(recipe) == load_sweep(ROOT / "recipes/quickstart.yaml")
