"""The command line itself: table width, exit codes, signals."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.text import Text

from sslrun import cli
from sslrun.errors import UserError

QUICKSTART = str(Path(__file__).parents[1] / "recipes/quickstart.yaml")


def called(monkeypatch, *arguments):
    """Run a command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["sslrun", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code


@pytest.fixture
def checked(monkeypatch):
    """Replace the measurements of `sslrun check`, which take minutes."""
    from sslrun.stages import check

    row = {
        "backbone": "resnet18",
        "parameters": 11_000_000,
        "pretext": "rotation",
        "steps": 123_456,
        "flops": 1.23e18,
        "memory_bytes": 12 * 2**30,
        "seconds": 1e5,
        "cells": 12,
    }
    monkeypatch.setattr(check, "estimate", lambda name, *_: {"row": name, **row})


def test_tables_are_not_broken_on_a_pipe(checked, monkeypatch, capsys):
    assert called(monkeypatch, "check", QUICKSTART) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "recipe",
        "backbone",
        "parameters",
        "pretext",
        "steps",
        "FLOPs",
        "memory",
        "time",
        "cells",
    ]
    assert "ResNet · no pretraining" in "\n".join(rows)
    assert len(rows) == 7  # 5 of the recipe, an empty line, and the explanation of the numbers
    assert "\x1b" not in head


def test_tables_fit_a_terminal(checked, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    assert called(monkeypatch, "check", QUICKSTART) == 0
    lines = Text.from_ansi(capsys.readouterr().out).plain.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(name in lines[0] for name in ("parameters", "memory", "cells"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain"], "Missing argument 'RECIPE'"),
        (["pretrian"], "No such command 'pretrian'"),
        (["pretrain", "a.yaml", "--devise", "cpu"], "--device"),
        (["sweep", "a.yaml", "--jobs", "0"], "--jobs"),
        (
            ["sweep", "a.yaml", "data={name: x}"],
            "a change to the recipes of a sweep is written --set 'data={name: x}'",
        ),
    ],
)
def test_a_mistyped_command_is_reported_without_a_traceback(arguments, words, monkeypatch, capsys):
    assert called(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err


def test_exit_codes_of_commands(capsys):
    def raising(error):
        def run():
            raise error

        return run

    def endings():
        yield cli.exit_code(lambda: None)
        yield cli.exit_code(lambda: 130)
        for error in (UserError("wrong"), KeyboardInterrupt(), typer.Abort()):
            yield cli.exit_code(raising(error))

    assert list(endings()) == [0, 130, 2, 130, 130]
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "sslrun: wrong"
    assert {lines[0], *lines[2:]} == {"sslrun: stopped; give the same command again to continue"}


def test_no_command_prints_the_help(monkeypatch, capsys):
    assert called(monkeypatch) == 0
    assert "Usage: sslrun" in capsys.readouterr().out


def test_naming_a_set_and_reading_a_recipe_import_no_slow_package():
    code = (
        "import sys, sslrun.data.image.sources; "
        "print(*{'datasets', 'sklearn', 'PIL', 'torchvision'} & sys.modules.keys()); "
        "import sslrun.recipe, sslrun.stages.check; from sslrun.backbones import *; "
        "from sslrun.data.specs import ImageSpec; "
        "network = build_backbone('resnet18', {}, ImageSpec(32)); "
        "from sslrun.training.flops import flop_counter; import torch; "
        "counter = flop_counter(); counter.__enter__(); network(torch.rand(2, 3, 32, 32)); "
        "assert counter.get_total_flops(); "
        "slow = {'torchvision', 'torch._dynamo', 'datasets', 'transformers', 'sympy'}; "
        "print(*slow & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
