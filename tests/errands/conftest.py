"""What a newcomer's file outside the package goes through: the command line, in this process, with --import."""

import json
import sys

import pytest

from sslrun import cli, plugins
from sslrun.data.specs import InputSpec
from sslrun.registry import Registry
from sslrun.results.formats import table_formats


@pytest.fixture
def outside(tmp_path, monkeypatch, capsys):
    """Run commands in a folder outside the package; what files register is taken back in the end.

    Call it with the command's words; returns what it printed. AssertionError unless the exit code is `code`.
    """
    registries = [(registry, dict(registry._classes)) for registry in Registry.kinds.values()]
    kinds, formats = dict(InputSpec.kinds), dict(table_formats._functions)
    commands, modules = list(cli.app.registered_commands), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["sslrun", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert stopped.value.code == code, printed.err
        return printed.out + printed.err

    yield run
    for registry, classes in registries:
        registry._classes = classes
    InputSpec.kinds.clear()
    InputSpec.kinds.update(kinds)
    table_formats._functions = formats
    cli.app.registered_commands[:] = commands
    for path, name in list(plugins._modules.items()):
        if name not in modules:
            del plugins._modules[path], sys.modules[name]


@pytest.fixture
def result(tmp_path):
    """The result of the one run of a stage."""

    def read(stage):
        (path,) = tmp_path.glob(f"runs/*/{stage}-*/result.json")
        return json.loads(path.read_text()), path.parent

    return read
