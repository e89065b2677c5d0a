import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from steadynorm import lab, recipe
from steadynorm.errors import InputError, RecipeError
from steadynorm.lab.store import Store
from steadynorm.report import Document, terminal
from tests.lab.toy import TOY


@pytest.fixture
def written(tmp_path):
    def write(text=TOY):
        (tmp_path / "toy.py").write_text(text)
        return recipe.load(str(tmp_path / "toy.py"))

    return write


@pytest.fixture
def store(tmp_path):
    return tmp_path / "rows.jsonl"


def run(made, store, **changes):
    options = {"batch_sizes": [8, 32], "norms": ["batch", "group"], "seeds": 2, "steps": 5, "workers": 1}
    return lab.run(made, store=store, **{**options, **changes})


def test_a_study_has_a_row_for_every_cell(written, store):
    study = run(written(), store)
    assert len(study.rows) == 8
    assert {(row["parameters"]["norm"], row["parameters"]["batch_size"], row["seed"]) for row in study.rows} == {
        (norm, size, seed) for norm in ("batch", "group") for size in (8, 32) for seed in (0, 1)
    }
    for row in study.rows:
        assert row["recipe"] == "toy"
        assert row["error"] is None
        assert list(row["numbers"]) == ["loss", "accuracy"]
        assert row["seconds"] > 0
        assert row["machine"]["torch"]
        assert row["budget"] == {"steps": 5, "lr": 0.05, "lr_scaling": "linear"}
    assert Store(store).rows() == list(study.rows)
    assert run(written(), store).rows == study.rows  # read back, not measured again


def test_what_is_done_is_skipped_and_a_larger_grid_only_adds(written, store):
    made, seen = written(), []
    first = run(made, store)
    again = run(made, store, on_progress=seen.append)
    assert [row["finished"] for row in again.rows] == [row["finished"] for row in first.rows]
    assert (len(seen), seen[0].skipped, seen[0].done, seen[0].seconds_left) == (1, 8, 8, 0.0)
    more = run(made, store, seeds=3)
    assert (len(more.rows), len(Store(store).rows())) == (12, 12)


@pytest.mark.parametrize("change", [{"steps": 6}, {"lr": 0.3}, {"lr_scaling": "sqrt"}])
def test_another_budget_is_another_measurement(written, store, change):
    made = written()
    run(made, store, seeds=1)
    study = run(made, store, seeds=1, **change)
    assert len(study.rows) == 4
    assert len(Store(store).rows()) == 8


def test_a_changed_recipe_is_measured_again(written, store):
    run(written(), store, seeds=1)
    run(written(TOY + "\n# another\n"), store, seeds=1)
    assert len(Store(store).rows()) == 8


def test_progress_counts_up_and_estimates(written, store):
    seen = []
    run(written(), store, on_progress=seen.append)
    assert [each.done for each in seen] == list(range(9))
    assert {each.total for each in seen} == {8}
    assert seen[0].seconds_left is None
    assert all(each.seconds_left > 0 for each in seen[1:-1])
    assert seen[-1].seconds_left == 0
    assert seen[1].cell == "batch norm, batch size 8, seed 0"


# Batch norm cannot train at batch size 1; at batch size 500 the data do not fill a batch.
def test_a_cell_that_fails_is_a_row_and_is_tried_again(written, store):
    made = written()
    study = run(made, store, batch_sizes=[1, 8, 500], seeds=1)
    errors = {(row["parameters"]["norm"], row["parameters"]["batch_size"]): row["error"] for row in study.rows}
    assert "Expected more than 1 value per channel" in errors["batch", 1]
    assert "batches('train', 500, …) of the recipe toy is empty" in errors["group", 500]
    assert errors["group", 1] is errors["batch", 8] is None
    seen = []
    run(made, store, batch_sizes=[1, 8, 500], seeds=1, on_progress=seen.append)
    assert (seen[0].skipped, seen[-1].failed) == (3, 3)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {"norms": ["bach"]}, "there is no norm 'bach'"),
        ("", {"workers": 0}, "0 workers were given"),
        ("", {"steps": 0}, "0 steps were given"),
        ("loss = None", {}, "cannot be trained without a loss"),
        ("def model():\n    return nn.Linear(6, 2)", {}, "the model has no batch norm that group norm"),
        ("def model():\n    raise KeyError('x')", {}, r"model\(\) of the recipe raised KeyError"),
        ("def batches(*a):\n    return []", {}, r"batches\('train', 32, …\) of the recipe toy is empty"),
    ],
)
def test_what_would_fail_in_every_cell_is_said_before_anything_is_stored(written, store, text, options, message):
    with pytest.raises(InputError, match=message):
        run(written(f"{TOY}\n{text}\n"), store, **options)
    assert not store.exists()


def test_data_that_are_not_numbers_end_in_a_verdict(written, store):
    study = run(written(TOY + "\nX = X * float('nan')\n"), store, seeds=1)
    assert study.verdict.status == "error"
    assert "the training diverged: loss on the test split is nan" in study.verdict.sentence


def test_a_recipe_made_in_python_needs_a_fingerprint_and_runs_here(written, store):
    made = replace(written(), spec="", fingerprint="")
    with pytest.raises(InputError, match="has no fingerprint"):
        run(made, store)
    assert len(run(replace(made, fingerprint="mine"), store, workers=None, seeds=1).rows) == 4
    with pytest.raises(InputError, match="other processes need a file to load it from"):
        run(replace(made, fingerprint="mine"), store, workers=2, seeds=3)


def test_a_store_that_is_something_else_is_refused(written, store):
    store.write_text("my notes\n")
    with pytest.raises(InputError, match="something else than results"):
        run(written(), store)
    assert store.read_text() == "my notes\n"


def test_a_study_shows_itself(written, store):
    study = run(written(), store, batch_sizes=[1, 8, 32], seeds=3)
    document = study.document()
    assert document.summary == study.verdict.sentence
    assert document.status == study.verdict.status
    chart, table = document.blocks[:2]
    assert [series.name for series in chart.series] == ["batch norm", "group norm"]
    assert chart.log_x
    assert (chart.note, chart.spread) == (
        "Mean over 3 seeds.",
        "The bars at the points reach from the lowest seed to the highest.",
    )
    for series in chart.series:
        assert all(low <= y <= high for low, y, high in zip(series.low, series.y, series.high, strict=True))
    assert [row[:2] for row in table.rows] == [
        [n, s] for n, sizes in (("batch", [8, 32]), ("group", [1, 8, 32])) for s in sizes
    ]
    texts = " ".join(getattr(block, "text", "") for block in document.blocks)
    assert "batch size 32, in proportion to the batch size" in texts
    assert document.blocks[-1].title == "Cells that failed"
    assert document.facts["recipe"] == "toy"
    assert document.facts["cpu"]
    assert json.loads(json.dumps(study.to_dict(), allow_nan=False))["schema_version"] == 1


def test_the_table_of_cells_fits_a_terminal_of_80_columns(written, store):
    study = run(written(), store, batch_sizes=[2, 32], seeds=2)
    table = study.document().blocks[1]
    stream = StringIO()
    terminal.show(Document("t", "s", blocks=[table]), Console(file=stream, width=80))
    rows = [line for line in stream.getvalue().splitlines() if line.startswith(("batch ", "group "))]
    assert len(rows) == 4  # no row goes on in a second line
    assert all(row.split()[0] in ("batch", "group") and row.split()[1] in ("2", "32") for row in rows)
    assert all("within" not in line or "within noise" in line for line in stream.getvalue().splitlines())
    assert "0.003125" in stream.getvalue()  # the learning rate itself, not a rounding of it


KILLED = """
import sys
from pathlib import Path
from steadynorm import lab, recipe
lab.run(recipe.load(sys.argv[1]), batch_sizes=[2, 4, 8], norms=["batch", "group"], seeds=20, steps=10,
        store=Path(sys.argv[2]), workers=2)
"""


def test_a_killed_run_goes_on_where_it_was(written, store, tmp_path):
    made = written()
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "toy.py", store])
    deadline = time.monotonic() + 60
    while not (store.exists() and store.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with store.open("ab") as file:
        file.write(b'{"schema_version": 1, "recipe": "to')  # the worst that a kill can leave
    before = Store(store).rows()
    assert 3 <= len(before) < 120
    seen = []
    options = {"batch_sizes": [2, 4, 8], "norms": ["batch", "group"], "seeds": 4, "steps": 10}
    study = run(made, store, **options, on_progress=seen.append)
    kept = {row["finished"] for row in before} & {row["finished"] for row in study.rows}
    assert seen[0].skipped == len(kept) == min(len(before), 24)
    assert len(study.rows) == 24
    assert all(row["error"] is None for row in study.rows)


def test_errors_of_a_recipe_are_recipe_errors(written, store):
    with pytest.raises(RecipeError):
        run(written(TOY + "\ndef model():\n    raise KeyError('x')\n"), store)
