"""Import layers: a file imports only from lower floors and from its own room.

The order is that of docs/design.md. To allow another import, move the code to the floor where it
belongs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import sslrun

PACKAGE = Path(sslrun.__file__).parent
FLOORS = [
    {
        "registry",
        "runs",
        "files",
        "errors",
        "hub",
        "distributed",
        "seeds",
        "metric",
        "shipped",
        "plugins",
        "__init__",
    },
    {"data"},
    {"training", "backbones"},
    {"pretexts", "tasks"},
    {"protocols"},
    {"results", "recipe"},
    {"launch"},
    {"stages"},
    {"claims", "report"},
    {"cli"},
    {"__main__"},
]
"""Rooms (packages, or modules right in the package), from the ground floor to the top."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """Return the room of a module: "sslrun.data.image" -> "data"; "sslrun" -> "__init__"."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Return (line, dotted name) of every import of sslrun in a file, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                (node.lineno, name.name)
                for name in node.names
                if name.name.split(".")[0] == "sslrun"
            )
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level + is_package or None]
                source = ".".join([*package, *filter(None, [node.module])])
            if source == "sslrun":  # from sslrun import errors
                yield from ((node.lineno, f"sslrun.{name.name}") for name in node.names)
            elif source.startswith("sslrun."):
                yield node.lineno, source


def violations(root: Path) -> list[str]:
    """Return every import from a higher floor or from another room of the same floor.

    The package's own __init__.py is left out: it gives users the names of upper floors, and imports
    them when they are first used (tests/test_load.py).
    """
    wrong = []
    for path in sorted(root.rglob("*.py")):
        if path == root / "__init__.py":
            continue
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(["sslrun", *parts]).removesuffix(".__init__")
        room = parts[0]
        for line, target in imports(
            ast.parse(path.read_text()), module, path.name == "__init__.py"
        ):
            other = (
                room_of(target) if room_of(target) in FLOOR else "__init__"
            )  # a name that sslrun/__init__.py defines
            up = FLOOR[other] > FLOOR[room]
            beside = FLOOR[other] == FLOOR[room] > 0 and other != room
            if up or beside:
                where = "above" if up else "beside"
                wrong.append(
                    f"{path.relative_to(root)}:{line} imports {target}, which is {where} it"
                )
    return wrong


def test_every_room_has_a_floor():
    rooms = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms == set(FLOOR)


def test_no_file_imports_from_a_higher_floor_or_a_neighboring_room():
    assert violations(PACKAGE) == []


def test_a_violation_names_both_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.py").write_text(
        "def f():\n    from sslrun.backbones.vit import ViT\n    from sslrun import errors\n"
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "bad.py").write_text(
        "from ..pretexts import base\nfrom sslrun.tasks import text\n"
    )
    assert violations(tmp_path) == [
        "data/bad.py:2 imports sslrun.backbones.vit, which is above it",
        "tasks/bad.py:1 imports sslrun.pretexts, which is beside it",
    ]


def test_every_name_in_the_list_of_slow_tests_matches_a_test(unmatched_slow_names):
    assert unmatched_slow_names == []
