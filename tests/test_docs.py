"""The documentation names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_documentation_names_exists():
    documented = set()
    for page in (ROOT / "docs").glob("*.md"):
        documented |= set(re.findall(r"`(test_[a-z0-9_]+)`", page.read_text(encoding="utf-8")))
    sources = (ROOT / "tests").rglob("test_*.py")
    defined = {
        name
        for source in sources
        for name in re.findall(r"^def (test_\w+)", source.read_text(encoding="utf-8"), re.M)
    }
    assert documented
    assert documented <= defined, documented - defined
