from io import StringIO

import pytest
from rich.console import Console

from steadynorm.report import Chart, Document, Series, Table, terminal
from tests.report.documents import FINDINGS, HOSTILE, NETWORK, STUDY, hostile


def shown(document, width=80, **options):
    stream = StringIO()
    terminal.show(document, Console(file=stream, width=width, _environ={}, **options))
    return stream.getvalue()


def lines_of(document, width=80):
    return [line.rstrip() for line in shown(document, width).splitlines()]


def test_a_finding_as_readers_see_it():
    assert lines_of(FINDINGS, 60) == [
        "",
        "✖ Doctor: small",
        "  1 error in 3 layers.",
        "",
        "Findings",
        "",
        "✖ error  SN301 running statistics far from the data",
        "  stages.1.block.0.norm2",
        "  With this layer's statistics taken from the data the loss",
        "  falls from 2.31 to 0.14.",
        "  loss now  2.312",
        "  channels  16",
        "  Fix: Recalibrate the running statistics.",
        "",
        "Loss by layer",
        "layer                                                   loss",
        "stem.1                  █████████████████████████████  2.000",
        "stages.1.block.0.norm2  ███████▎                       0.500",
        "head                                                       –",
        "",
        "    steadynorm explain SN301",
        "",
        "cpu Example 9000 · torch 2.13.0 · recipe small",
        "",
    ]


def test_a_study_as_readers_see_it():
    assert lines_of(STUDY)[6:20] == [
        "Accuracy by batch size",
        "accuracy  shape  first   last  lowest  highest",
        "──────────────────────────────────────────────",
        "batch     ▁▅█    0.500  1.000   0.500    1.000",
        "group     ▇·▇    0.900  0.950   0.900    0.950",
        "batch size 2, 4, 8; ▁ 0.5, █ 1, · no value",
        "Mean of 3 seeds.",
        "",
        "Cells",
        "norm   batch size  accuracy",
        "───────────────────────────",
        "batch           2    0.5000",
        "batch           4    0.7500",
        "none            8         –",
    ]


@pytest.mark.parametrize("document", [FINDINGS, STUDY, hostile()])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_nothing_is_wider_than_the_console(document, width):
    assert max(map(len, lines_of(document, width))) <= width


def test_strings_are_text_and_never_markup():
    text = shown(hostile(), 400, force_terminal=True, color_system="truecolor")
    assert "[bold red]markup[/bold red] [link=https://example.com]x[/link]" in text
    assert "]8;" not in text  # no hyperlink was made of it
    for string in HOSTILE:
        assert string[:60] in text


def test_control_characters_do_not_reach_the_terminal():
    text = shown(Document("a\x1b[2Jb\x07", "c\rd\x9b31m"))
    assert not set(text) & {"\x1b", "\x07", "\r", "\x9b"}
    assert "a\N{REPLACEMENT CHARACTER}[2Jb" in text


def test_a_flat_and_an_empty_series_can_be_drawn():
    flat = Chart("Flat", "x", "y", (Series("same", (1, 2), (3.0, 3.0)), Series("none", (1, 2), (None, float("nan")))))
    lines = lines_of(Document("t", "s", blocks=(flat,)))
    assert "same  ▁▁     3.000  3.000   3.000    3.000" in lines
    assert "none  ··         –      –       –        –" in lines


def test_where_space_is_short_numbers_stay_whole():
    names = ("layer", "accuracy", "deviation", "lowest value", "highest value", "standing", "steps", "learning rate")
    row = ("stages.1.block.0.norm2", 0.94071, 0.01234, 0.93062, 0.94723, "within noise", 960, 0.003125)
    text = shown(Document("t", "s", blocks=(Table("Cells", names, (row,)),)), 66)
    for number in ("0.9407", "0.01234", "0.9306", "0.9472", "960", "0.003125"):
        assert number in text
    assert "…" not in text


def test_bars_below_zero_go_to_the_left_of_those_above():
    chart = Chart("Drift", "layer", "size", (Series("size", ("a", "b"), (2.0, -1.0)),), kind="bar")
    above, below = lines_of(Document("t", "s", blocks=(chart,)))[6:8]
    assert above.index("█") == below.rindex("█") + 1
    assert above.count("█") == 2 * below.count("█")


def test_long_scales_show_their_ends():
    many = Chart("Loss", "step", "loss", (Series("a", tuple(range(100)), tuple(range(100))),))
    assert "step 0, …, 99; ▁ 0, █ 99" in lines_of(Document("t", "s", blocks=(many,)), 180)


def test_a_thing_that_is_no_block_is_refused():
    with pytest.raises(TypeError, match="got str"):
        shown(Document("t", "s", blocks=("text",)))  # type: ignore[arg-type]


def test_progress_is_silent_where_nobody_watches():
    stream = StringIO()
    with terminal.progress("training", Console(file=stream, _environ={})) as advance:
        advance(1, 2)
    assert stream.getvalue().strip() == ""


def test_progress_shows_what_is_done_and_what_is_left():
    stream = StringIO()
    watched = Console(file=stream, force_terminal=True, width=100, _environ={})
    with terminal.progress("[training]", watched, "cells") as advance:
        advance(1, 2)
    assert "[training]" in stream.getvalue()
    assert "1/2 cells" in stream.getvalue()


def test_progress_without_a_unit_is_a_share():
    stream = StringIO()
    watched = Console(file=stream, force_terminal=True, width=100, _environ={})
    with terminal.progress("doctor", watched) as advance:
        advance(57, 138)
    assert "41%" in stream.getvalue()
    assert "57/138" not in stream.getvalue()


def test_parts_as_readers_see_them():
    lines = lines_of(NETWORK, 60)
    assert lines[4:12] == [
        "The network",
        "  stem.0  Conv2d 8×6×6",
        "✖ stem.1  BatchNorm2d 8×6×6",
        "    ✖ error  SN203 stale",
        "      stem.1  net.py:7",
        "      Stale.",
        "      Why: Too slow.",
        "      Fix: Recalibrate.",
    ]
    assert "✔ head.norm  LayerNorm 8" in lines
    assert "In the order in which they run." in lines
