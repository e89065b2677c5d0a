"""The page as a browser shows it. Skipped, and counted as such, where there is no Chromium."""

import re
import shutil
import subprocess

import pytest

from steadynorm.report import html
from tests.report.documents import FINDINGS, NETWORK, STUDY, hostile

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


def opened(folder, page, fragment=""):
    """(document as it stands after its scripts ran, console messages)."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [BROWSER, *FLAGS, profile, f"file://{folder / 'page.html'}{fragment}"]
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


def test_the_charts_of_a_layer_are_drawn_when_it_is_looked_at(tmp_path):
    dom, messages = opened(tmp_path, html.render([NETWORK], NETWORK.title), "#the-network-3")
    assert messages == []
    # The faulty layer, which is open, and the healthy one that the address asks for; the third is closed.
    assert dom.count('<div class="plot-container') == 2
    assert len(re.findall(r'<g class="trace scatter', dom)) == 5  # with the lines on which both axes are equal
    assert re.search(r'<details class="part" id="the-network-3" open=""', dom)
    assert not re.search(r'<details class="part" id="the-network-4" open', dom)


PHONE = """<!DOCTYPE html><body style="margin:0"><iframe src="page.html" width="390" height="6000"></iframe><script>
addEventListener("load", () => setTimeout(() => {
  const page = document.querySelector("iframe").contentDocument.documentElement;
  document.title = `wide ${page.scrollWidth} of ${page.clientWidth}`;
}, 1500));
</script></body>"""


def test_nothing_sticks_out_on_a_phone(tmp_path):
    """In a frame, since a window of this browser has a least width; files may not look into one another by default."""
    (tmp_path / "page.html").write_text(html.render([NETWORK, FINDINGS], "A report"), encoding="utf-8")
    (tmp_path / "phone.html").write_text(PHONE, encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, *FLAGS, "--allow-file-access-from-files", profile, f"file://{tmp_path / 'phone.html'}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    (found,) = re.findall(r"<title>wide (\d+) of (\d+)</title>", ended.stdout)
    assert int(found[1]) <= 390
    assert int(found[0]) <= int(found[1])
