"""Fixtures for plug-in files: the command line in this process and in its own folder."""

import json
import sys

import pytest

from sslrun import cli, plugins
from sslrun.data.specs import InputSpec
from sslrun.registry import Registry
from sslrun.results.formats import table_formats


@pytest.fixture
def registered():
    """Undo all registrations of a test."""
    registries = [(registry, dict(registry._classes)) for registry in Registry.kinds.values()]
    kinds, formats = dict(InputSpec.kinds), dict(table_formats._functions)
    commands, files = list(cli.app.registered_commands), set(plugins._modules)
    yield
    for registry, classes in registries:
        registry._classes = classes
    InputSpec.kinds.clear()
    InputSpec.kinds.update(kinds)
    table_formats._functions = formats
    cli.app.registered_commands[:] = commands
    for path in set(plugins._modules) - files:
        del sys.modules[plugins._modules.pop(path)]


@pytest.fixture
def sslrun(registered, tmp_path, monkeypatch, capsys):
    """Run a command; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sslrun", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err

    return run


@pytest.fixture
def outside(sslrun):
    """Run a command that ends with `code`; returns all of its output."""

    def run(*words, code=0):
        ended, out, err = sslrun(*words)
        assert ended == code, err
        return out + err

    return run


@pytest.fixture
def result(tmp_path):
    """Return the result and the folder of the only run of a stage."""

    def read(stage):
        (path,) = tmp_path.glob(f"runs/*/{stage}-*/result.json")
        return json.loads(path.read_text()), path.parent

    return read
