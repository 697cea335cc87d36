"""Draw the screenshots of docs/report.md from two pages that `sslrun report` wrote.

python tools/screenshots.py IMAGES.html TEXT.html docs/_static

The first page is drawn light and wide, the second dark and as narrow as a phone, at its section of
masked guesses. Needs playwright and the distribution's Chromium.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

COLORS = 256


def draw(
    browser: Browser, page_file: Path, size: tuple[int, int], scheme: str, anchor: str
) -> bytes:
    """Return a PNG of what a window of `size` shows of a page, from the section `anchor` on."""
    page = browser.new_page(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page.goto(f"{page_file.absolute().as_uri()}#{anchor}")
    return page.screenshot()


def save(picture: bytes, path: Path) -> None:
    """Write a PNG with few colors, which makes it several times smaller."""
    few = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLORS)
    few.save(path, optimize=True)
    sys.stdout.write(f"{path}: {path.stat().st_size / 1000:.0f} kB\n")


def main() -> None:
    images, text, folder = map(Path, sys.argv[1:])
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        desktop = draw(browser, images, (1200, 1500), "light", "")
        phone = draw(browser, text, (400, 860), "dark", "masked-guesses")
    save(desktop, folder / "report-desktop.png")
    save(phone, folder / "report-phone.png")


if __name__ == "__main__":
    main()
