"""The page as a browser shows it. Skipped, and counted as such, where there is no Chromium."""

import re
import shutil
import subprocess

import pytest

from steadynorm.report import html
from tests.report.documents import FINDINGS, STUDY, hostile

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
    "--dump-dom",
)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: the page is not seen by a browser"
)


def opened(folder, page):
    """(document as it stands after its scripts ran, console messages)."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'page.html'}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


def test_charts_are_drawn_without_errors_or_requests(tmp_path):
    # The policy of the page makes the browser report every request it was asked for (the next test shows that it does).
    dom, messages = opened(tmp_path, html.render([FINDINGS, STUDY, hostile()], "A report"))
    assert messages == []
    assert dom.count('<div class="plot-container') == 3
    assert len(re.findall(r'<g class="trace scatter', dom)) == 2
    # What the note of the chart calls bars are error bars: one at each of the five points that have a value.
    assert len(re.findall(r'<path class="yerror', dom)) == 5
    assert "<title>A report</title>" in dom


def test_a_smuggled_request_or_script_is_refused_and_reported(tmp_path):
    smuggled = "<img src='https://example.invalid/x.png'><script>document.title = 'owned'</script></body>"
    dom, messages = opened(tmp_path, html.render([STUDY], "A report").replace("</body>", smuggled))
    assert any("example.invalid" in message for message in messages)
    assert any("script" in message for message in messages)
    assert "<title>A report</title>" in dom
