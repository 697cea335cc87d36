"""Help and tables know the protocols without importing torch, and as the classes say."""

from __future__ import annotations

import subprocess
import sys

from sslrun.protocols import protocols
from sslrun.results.known_protocols import SHIPPED, Facts


def test_the_list_is_that_of_the_classes_in_their_order():
    own = [name for name in protocols.in_order if protocols[name].__module__.startswith("sslrun.")]
    assert list(SHIPPED) == own
    assert {name: Facts.of(protocols[name]) for name in own} == SHIPPED


def test_help_lists_and_tables_of_folders_do_not_import_torch(planted, tmp_path):
    first, second = (str(planted(name, 50.0).folder) for name in ("a", "b"))
    code = f"""
import sys
from sslrun.cli import exit_code, app, add_protocol_commands
add_protocol_commands(app)
for command in (
    ["--help"], ["recipes"], ["runs", "ls", "--runs", "."], ["table", "."],
    ["compare", {first!r}, {second!r}],
):
    code = exit_code(lambda: app(command, prog_name="sslrun", standalone_mode=False))
    assert code == 0, command
    assert "torch" not in sys.modules, command
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    assert all(text in done.stdout for text in ("zero-shot", "quickstart", "50.0", "accuracy"))
