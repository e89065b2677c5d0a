import math
import subprocess
import sys

import numpy as np
import pytest

from steadynorm.report import Chart, Document, Series, Table
from steadynorm.report.document import column_texts, drawn_columns, is_numeric, text_of
from tests.report.documents import STUDY


def test_a_row_that_does_not_fit_its_columns_is_refused():
    with pytest.raises(ValueError, match="'Cells' has 2 columns, row 1 has 1 cells"):
        Table("Cells", ("a", "b"), ((1, 2), (3,)))


def test_a_series_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match=r"'batch' has sequences of different lengths: \[2, 1\]"):
        Series("batch", (1, 2), (0.5,))
    with pytest.raises(ValueError, match="both ends of the spread"):
        Series("batch", (1,), (0.5,), low=(0.4,))


def test_an_empty_chart_and_an_unknown_status_are_refused():
    with pytest.raises(ValueError, match="no series"):
        Chart("Loss", "x", "y", ())
    with pytest.raises(ValueError, match="'fatal'"):
        Document("Doctor", "", "fatal")  # type: ignore[arg-type]


def test_the_table_of_a_chart_holds_every_number():
    table = STUDY.blocks[1].table()
    assert list(table.columns) == [
        "batch size", "batch", "batch (low)", "batch (high)", "group", "group (low)", "group (high)",
    ]  # fmt: skip
    assert table.rows[0] == [2, 0.5, 0.45, 0.55, 0.9, 0.89, 0.91]
    assert table.rows[1] == [4, 0.75, 0.7, 0.8, None, None, None]


def test_series_with_different_x_meet_in_one_table():
    chart = Chart("Loss", "x", "y", (Series("a", (1, 2), (10, 20)), Series("b", (2, 3), (200, 300))))
    assert chart.table().rows == [[1, 10, None], [2, 20, 200], [3, None, 300]]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1234567"),
        (0.000123456, "0.0001235"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        ("0.50", "0.50"),
    ],
)
def test_a_cell_as_readers_see_it(cell, text):
    assert text_of(cell) == text


def test_a_column_gets_one_number_of_decimals():
    assert column_texts([0.9, 0.95, 0.9444444, None, 2]) == ["0.9000", "0.9500", "0.9444", "–", "2"]
    assert column_texts([12.0, 3.14159, math.nan]) == ["12.00", "3.14", "nan"]
    assert column_texts([0.0, 123.0]) == ["0.0", "123.0"]


def test_small_values_are_not_rounded_away_beside_large_ones():
    assert column_texts([1e-9, 1500.0]) == ["1e-09", "1500"]
    assert column_texts([1e12, 2.0]) == ["1e+12", "2"]


def test_numbers_go_to_the_right():
    assert is_numeric([1, 0.5, None])
    assert is_numeric(["0.93 ± 0.01", "-3", "±0.2"])
    assert not is_numeric(["layer1.0", 3])
    assert not is_numeric([True, False])
    assert not is_numeric([None])


def test_row_labels_that_look_like_numbers_stay_labels():
    table = Table("Layers", ("layer", "loss"), (("1", 0.5), ("1.0", 0.25)))
    assert drawn_columns(table) == [("layer", ["1", "1.0"], False), ("loss", ["0.5000", "0.2500"], True)]
    assert drawn_columns(Table("", ("batch size",), ((2,),)))[0][2]


def test_importing_documents_imports_no_renderer():
    """`doctor` and `lab` describe their results where neither rich nor plotly is installed."""
    code = "import sys, steadynorm.report as r; print(sorted({'rich', 'jinja2', 'plotly'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(("renderer", "packages"), [("terminal", "rich"), ("html", "jinja2 plotly")])
def test_a_missing_extra_is_said_with_the_command_that_brings_it(renderer, packages):
    code = f"import sys; sys.modules.update(rich=None, jinja2=None); import steadynorm.report.{renderer}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.strip().endswith(f"pip install {packages}")
