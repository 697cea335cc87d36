"""The page in a real browser: no error, pictures load, tables sort."""

import shutil
import threading
import urllib.error
import urllib.request

import pytest

from sslrun.errors import UserError
from sslrun.report import serve
from sslrun.report.build import write_report

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("matplotlib")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_a_browser_shows_the_page_without_errors_and_sorts_its_table(texts, tmp_path, browser):
    (texts / "first" / "pictures").mkdir()
    page_file = write_report([texts], texts, tmp_path / "report.html", 1, ["sslrun"], print)
    errors = []
    page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 400  # a phone does not pan
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    assert page.evaluate(
        "[...document.images].every(image => image.complete && image.naturalWidth)"
    )
    assert page.locator("svg").count() > 3
    bar, track = (page.locator(part).first.bounding_box() for part in (".bar i", ".bar"))
    assert bar["width"] == pytest.approx(0.6 * track["width"], abs=1)
    first_row = page.locator("tbody tr").first
    number = page.locator("thead th.number button").first
    assert first_row.inner_text().startswith("first")
    number.click()  # high to low: the first recipe has the better numbers
    assert first_row.inner_text().startswith("first")
    number.click()
    assert first_row.inner_text().startswith("second")
    page.close()
    assert errors == []


def test_a_served_page_follows_its_runs(planted, plant, monkeypatch, browser):
    monkeypatch.setattr(serve, "SECONDS", 0.1)
    server = serve.open_server(serve.Site([planted], planted, ["sslrun"]), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    errors = []
    with server:
        page = browser.new_page()
        page.on("console", lambda message: errors.append(message.text))
        page.goto(f"http://localhost:{server.server_port}/")
        assert page.get_by_text("a third recipe").count() == 0
        plant(planted, "a third recipe", 0)
        page.get_by_text("a third recipe").first.wait_for(state="attached", timeout=60_000)
        page.locator("thead th.number button").first.click()  # the fresh table sorts, too
        page.close()
        server.shutdown()
    assert errors == []


def test_only_this_machine_may_read_the_page_and_a_taken_port_is_one_line(planted):
    with serve.open_server(serve.Site([planted], planted, ["sslrun"]), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        assert b"<title>" in urllib.request.urlopen(url).read()
        foreign = urllib.request.Request(url, headers={"Host": "evil.example:80"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(foreign)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + "../etc/passwd")
        with pytest.raises(UserError, match="give another port"):
            serve.open_server(server.RequestHandlerClass.site, server.server_port)
        server.shutdown()
