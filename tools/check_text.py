"""Check text files: one newline at the end, no spaces at the end of lines, YAML that can be read.

python tools/check_text.py FILE...
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml


def mistakes(path: Path) -> list[str]:
    """What is wrong with a file, as file:line: message."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = [
        f"{path}:{number}: spaces at the end"
        for number, line in enumerate(lines, 1)
        if line != line.rstrip()
    ]
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        found.append(f"{path}:{len(lines)}: should end with one newline")
    if path.suffix in (".yaml", ".yml", ".cff"):
        try:
            yaml.safe_load(text)
        except yaml.YAMLError as error:
            found.append(f"{path}: is not valid YAML: {' '.join(str(error).split())}")
    return found


if __name__ == "__main__":
    every = [mistake for name in sys.argv[1:] for mistake in mistakes(Path(name))]
    sys.stderr.writelines(f"{mistake}\n" for mistake in every)
    sys.exit(bool(every))
