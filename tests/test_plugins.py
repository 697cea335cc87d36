"""Plug-ins: user files that are imported on request and named in every error."""

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from sslrun import cli, plugins
from sslrun.errors import UserError

PRETEXT = '''\
"""Regress the mean brightness of an image."""

import torch.nn.functional as F
from torch import nn

from sslrun.data.image.augment import Augmentation
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import Pretext, PretextOptions, pretexts
from sslrun.training.learner import Output


@pretexts.register("brightness")
class Brightness(Pretext):
    """Predict the mean brightness of each image."""

    reads = ImageSpec

    class Options(PretextOptions):
        scale: float = 1.0
        """Weight of the loss."""

    def __init__(self, options, backbone):
        super().__init__(options, backbone)
        self.head = nn.Linear(backbone.width, 1)

    def views(self, batch, generator):
        images = Augmentation()(batch.inputs, batch.inputs.shape[-1], generator)
        return images, images.mean(dim=(1, 2, 3))

    def forward(self, views):
        images, means = views
        predictions = self.head(self.backbone(images).pooled)[:, 0]
        return Output(self.options.scale * F.mse_loss(predictions, means), {})
'''
RECIPE = """\
name: tiny
backbone: {name: resnet18, stem: small, channels: 8}
pretext: brightness
data: {name: digits, size: 8}
pretrain: {steps: 2, batch: 32}
evaluate:
  digits: {protocols: [knn], labels: [0.1]}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_pretext.py").write_text(PRETEXT)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def run_here(folder, monkeypatch):
    """Run a command in this process and in the folder; returns its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plugins, "_modules", {})

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sslrun", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code

    return call


def test_a_pretext_task_in_a_file_of_ones_own(folder, sslrun):
    unknown = sslrun("pretrain", "tiny.yaml", cwd=folder, code=2).stderr
    assert "tiny.yaml:3" in unknown  # a recipe does not import plug-ins
    assert "no such pretext: 'brightness'" in unknown
    path = Path(
        folder
        / sslrun("pretrain", "tiny.yaml", "--import", "my_pretext.py", cwd=folder).stdout.strip()
    )
    identity = json.loads((path / "identity.json").read_text())
    assert set(identity["pretext"]) == {"name", "component.source"}


@pytest.mark.parametrize("command", [["sweep", "tiny.yaml"], ["claims", "frozen"]])
def test_workers_import_the_plug_in_too(command, folder, run_here, monkeypatch):
    commands = []
    monkeypatch.setattr(
        "sslrun.stages.sweep.launch",
        lambda plans, context, engine, workers: commands.extend(workers.arguments) or [],
    )
    (folder / "mine.py").write_text("loaded = True\n")
    (folder / "tiny.yaml").write_text(RECIPE.replace("brightness", "rotation"))
    recipes = Path(cli.__file__).parents[2] / "recipes" / "claims"
    where = [f"--recipes={recipes}"] if command[0] == "claims" else []
    assert run_here(*command, *where, "--import", "mine.py") == 0
    assert commands[0] == command[0]
    assert f"--import={folder}/mine.py" in commands


def test_a_command_that_is_suggested_imports_it_too(folder, run_here, capsys):
    (folder / "mine.py").write_text("loaded = True\n")
    (folder / "tiny.yaml").write_text(RECIPE.replace("brightness", "rotation"))
    assert run_here("knn", "tiny.yaml", "--import", "mine.py") == 2
    assert (
        f"run `sslrun pretrain tiny.yaml --import={folder}/mine.py` first"
        in capsys.readouterr().err
    )


@pytest.fixture
def imported(tmp_path):
    """Import a file with this text; returns the one-line error message."""

    def call(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as error:
            plugins.load_files([tmp_path / name])
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix(f"{tmp_path}/")

    return call


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\n1 / 0\n", "mine.py:2: cannot be imported: ZeroDivisionError: division by zero"),
        ("a = 1\nb = = 2\n", "mine.py:2: cannot be imported: SyntaxError: invalid syntax"),
        (
            "import nothing_of_that_name\n",
            "mine.py:1: cannot be imported: "
            "ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        (
            "def f():\n    raise KeyError('x')\n\nf()\n",
            "mine.py:2: cannot be imported: KeyError: 'x'",
        ),
        ("import sys\nsys.exit(3)\n", "mine.py:2: cannot be imported: SystemExit: 3"),
        (
            "from sslrun.pretexts.base import pretexts\n\n"
            "@pretexts.register('simclr')\nclass Mine: pass\n",
            "mine.py:3: cannot be imported: the pretext 'simclr' is defined already, "
            "in sslrun.pretexts.simclr; choose another name",
        ),
    ],
)
def test_a_plug_in_that_cannot_be_imported_is_named_with_its_line(imported, text, message):
    import sslrun.recipe  # noqa: F401

    assert imported(text) == message


def test_files_that_are_no_plug_ins(imported, tmp_path):
    assert (
        imported("", "mine.txt")
        == "mine.txt: is not a Python file (.py); --import and SSLRUN_IMPORT name Python files"
    )
    with pytest.raises(UserError, match=r"none\.py: no such file"):
        plugins.load_files([tmp_path / "none.py"])


def test_a_file_is_imported_once_and_two_of_one_name_are_two_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_modules", {})
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"import sys\nsys.stderr.write('{folder} ')\n")
    files = [tmp_path / folder / "mine.py" for folder in ("one", "two")]
    plugins.load_files([*files, files[0]])
    plugins.load_files([tmp_path / "one" / ".." / "one" / "mine.py"])
    assert plugins.list_loaded() == files
    assert len(set(plugins._modules.values())) == 2


def test_what_a_command_line_and_the_environment_name(monkeypatch):
    monkeypatch.setenv("SSLRUN_IMPORT", "a.py:b.py")
    arguments = [
        "pretrain",
        "x.yaml",
        "--import",
        "c.py",
        "--import=d.py",
        "--",
        "--import",
        "e.py",
    ]
    assert plugins.list_requested(arguments) == ["a.py", "b.py", "c.py", "d.py"]
    monkeypatch.delenv("SSLRUN_IMPORT")
    assert plugins.list_requested(["pretrain", "x.yaml", "--import"]) == []


def test_a_package_brings_plug_ins_by_its_entry_points(tmp_path, monkeypatch):
    (tmp_path / "brings_plugins.py").write_text("loaded = True\n")
    (tmp_path / "brings_mistakes.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("good", "brings_plugins", plugins.GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    plugins.load_entry_points()
    assert sys.modules["brings_plugins"].loaded
    points.append(EntryPoint("bad", "brings_mistakes", plugins.GROUP))
    with pytest.raises(
        UserError, match=r"plug-in 'bad' \(brings_mistakes\): ZeroDivisionError: division by zero"
    ):
        plugins.load_entry_points()


def test_the_traceback_is_printed_when_it_is_asked_for(folder, run_here, capsys, monkeypatch):
    (folder / "broken.py").write_text("def f():\n    return 1 / 0\n\n\nf()\n")
    assert run_here("check", "tiny.yaml", "--import", "broken.py") == 2
    plain = capsys.readouterr().err
    assert plain == "sslrun: broken.py:2: cannot be imported: ZeroDivisionError: division by zero\n"
    monkeypatch.setenv("SSLRUN_DEBUG", "1")
    assert run_here("check", "tiny.yaml", "--import", "broken.py") == 2
    long = capsys.readouterr().err
    assert long.startswith(plain)
    assert "Traceback (most recent call last)" in long
    assert "return 1 / 0" in long
    assert run_here("check", "none.yaml") == 2
    assert "FileNotFoundError" in capsys.readouterr().err  # although the error is raised from None
