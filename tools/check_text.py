"""Check text files: one newline at the end, no trailing spaces, valid YAML.

python tools/check_text.py FILE...
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml


def find_mistakes(path: Path) -> list[str]:
    """List what is wrong with a file, each as `file:line: message`."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    mistakes = [
        f"{path}:{number}: trailing spaces; remove them"
        for number, line in enumerate(lines, 1)
        if line != line.rstrip()
    ]
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        mistakes.append(f"{path}:{len(lines)}: must end with exactly one newline")
    if path.suffix in (".yaml", ".yml", ".cff"):
        try:
            yaml.safe_load(text)
        except yaml.YAMLError as error:
            mistakes.append(f"{path}: invalid YAML: {' '.join(str(error).split())}")
    return mistakes


if __name__ == "__main__":
    failed = False
    for name in sys.argv[1:]:
        for mistake in find_mistakes(Path(name)):
            failed = True
            sys.stderr.write(f"{mistake}\n")
    sys.exit(failed)
