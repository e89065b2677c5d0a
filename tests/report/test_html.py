import copy
import json
import re
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise

import pytest
from rich.console import Console

from steadynorm.report import Document, html, terminal
from tests.report.documents import FINDINGS, HOSTILE, NETWORK, STUDY, hostile

VOID = {"meta", "br", "img", "link", "input", "hr"}
FETCHING = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """A parsed page: every element, and an error where one is not closed in its order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data.strip())

    def tags(self, *names):
        return [attributes for tag, attributes in self.elements if tag in names]


@pytest.fixture(scope="module")
def page():
    return Page(html.render([FINDINGS, STUDY], "A report"))


def test_the_spread_is_explained_where_it_is_drawn_and_not_in_the_terminal(page):
    assert "Mean of 3 seeds. Bars at the points: lowest and highest seed." in page.texts
    stream = StringIO()
    terminal.show(STUDY, Console(file=stream, width=100))
    assert "Mean of 3 seeds." in stream.getvalue()
    assert "Bars" not in stream.getvalue()


def test_the_page_is_well_formed_and_has_the_numbers(page):
    for text in ("A report", "1 error in 3 layers.", "2.312", "0.5000", "0.7500", "stages.1.block.0.norm2", "2.13.0"):
        assert text in page.texts, text
    charts = [json.loads(element["data-chart"]) for element in page.tags("div") if "data-chart" in element]
    assert [chart["kind"] for chart in charts] == ["bar", "line"]
    assert charts[1]["series"][1] == {
        "name": "group",
        "x": [2.0, 4.0, 8.0],
        "y": [0.9, None, 0.95],
        "low": [0.89, None, 0.94],
        "high": [0.91, None, 0.96],
    }


def test_the_numbers_of_a_chart_are_in_a_table_too(page):
    rows = page.texts
    at = rows.index("batch (low)")
    assert "0.4500" in rows[at:]


def test_nothing_is_fetched(page):
    for tag, attributes in page.elements:
        for name in FETCHING & set(attributes):
            assert attributes[name].startswith("#"), f"<{tag} {name}={attributes[name]}>"
    assert "url(" not in html._asset("page.css")
    assert "@import" not in html._asset("page.css")
    policy = next(each["content"] for each in page.tags("meta") if each.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert policy.count("'sha256-") == len(page.tags("script")) == 2


def test_headings_descend_one_level_at_a_time():
    for documents in ([FINDINGS], [FINDINGS, STUDY]):
        page = Page(html.render(documents, FINDINGS.title))
        levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_a_reader_without_eyes_or_mouse_is_served(page):
    assert all(each.get("scope") in ("col", "row") for each in page.tags("th"))
    assert all(each["aria-label"] for each in page.tags("div") if each.get("role") in ("img", "region"))
    assert all(each.get("tabindex") == "0" for each in page.tags("div") if each.get("role") == "region")
    assert page.tags("html") == [{"lang": "en"}]
    assert [each["content"] for each in page.tags("meta") if each.get("name") == "viewport"]
    # The status is a word, not a colour alone.
    assert {"✕ error", "✓ ok"} <= set(page.texts)


def test_shared_facts_stand_once_and_own_facts_with_their_document(page):
    assert page.texts.count("Example 9000") == 1
    assert page.texts.index("small") < page.texts.index("Lab: small", page.texts.index("Findings"))
    assert "other" in page.texts


def test_plotly_is_there_once_and_only_for_charts():
    without = html.render([Document("Clean", "Nothing found.")], "Clean")
    assert len(without) < 20_000
    assert "script-src 'none'" in without
    assert "<script" not in without
    assert html.render([FINDINGS, STUDY], "Both").count("Copyright 2012") == 1


def test_hostile_strings_stay_text():
    page = Page(html.render([hostile()], HOSTILE[0]))
    assert len(page.tags("script")) == 2  # Plotly and the page's own
    assert len(page.tags("b")) == 4  # fix and cause of two cards
    assert not page.tags("img")
    joined = " ".join(page.texts)
    for string in HOSTILE:
        assert string in joined
    chart = json.loads(next(each["data-chart"] for each in page.tags("div") if "data-chart" in each))
    assert chart["xLabel"] == " ".join(HOSTILE)


def test_the_same_documents_give_the_same_page():
    assert html.render([FINDINGS, STUDY], "A") == html.render([FINDINGS, STUDY], "A")


def themes():
    """The colours of the style sheet by name: in light, and in dark."""
    blocks = re.findall(r":root \{(.*?)\}", html._asset("page.css"), re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#\w{6})\b", block)) for block in blocks]


def luminance(colour):
    """Relative luminance of "#rrggbb". Source: WCAG 2.2, definition of relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", themes(), ids=["light", "dark"])
def test_text_stands_out_from_its_ground(colours):
    pairs = [(text, ground) for text in ("ink", "soft", "accent") for ground in ("ground", "paper")]
    pairs += [(status, f"{status}-ground") for status in ("ok", "note", "warning", "error")]
    for text, ground in pairs:
        lighter, darker = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{text} on {ground}"


def test_parts_are_listed_and_those_with_something_to_show_are_linked():
    page = Page(html.render([NETWORK], NETWORK.title))
    targets = {each["id"] for each in page.tags("details") if "id" in each}
    links = [each["href"] for each in page.tags("a")]
    assert links == ["#the-network-2", "#the-network-3", "#the-network-4"]
    assert targets == {link.removeprefix("#") for link in links}
    opened = [each["id"] for each in page.tags("details") if "open" in each]
    assert opened == ["the-network-2"]  # what is healthy is closed
    assert page.texts.index("stem.0") < page.texts.index("stem.1") < page.texts.index("head.norm")
    assert [each["title"] for each in page.tags("span") if "title" in each] == ["error", "ok", "ok"] * 2
    assert {"Too slow.", "net.py:7", "Recalibrate."} <= set(page.texts)


def test_no_two_things_of_a_page_have_one_address():
    page = Page(html.render([NETWORK, copy.deepcopy(NETWORK), hostile()], "Three"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {each["href"].removeprefix("#") for each in page.tags("a")} <= set(ids)


def test_a_chart_inside_a_part_brings_the_script():
    assert "script-src 'none'" not in html.render([NETWORK], NETWORK.title)
