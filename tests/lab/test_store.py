import subprocess
import sys

import pytest

from steadynorm.errors import InputError
from steadynorm.lab.store import Store, key


def row(seed=0, **changes):
    named = {"recipe": "toy", "fingerprint": "f", "parameters": {"norm": "batch", "batch_size": 2}}
    return {**named, "seed": seed, "budget": {"steps": 3}, "numbers": {"accuracy": 0.5}, "error": None, **changes}


def stored(store):
    return [each["seed"] for each in store.rows()]


def test_rows_come_back_in_order_and_whole(tmp_path):
    store = Store(tmp_path / "new" / "rows.jsonl")
    assert store.rows() == []
    for seed in range(3):
        store.append(row(seed))
    again = Store(store.path).rows()
    assert stored(store) == [0, 1, 2]
    assert again[0] == {"schema_version": 1, **row(0)}


@pytest.mark.parametrize("kept", [1, 10, 18, 60, -2, -1])
def test_a_torn_last_line_is_ignored_and_the_next_row_is_whole(tmp_path, kept):
    store = Store(tmp_path / "rows.jsonl")
    store.append(row(0))
    first = store.path.read_bytes()
    store.append(row(1))
    torn = store.path.read_bytes()[len(first) :][:kept]
    store.path.write_bytes(first + torn)
    whole = [0, 1] if kept == -1 else [0]  # only the newline is missing: nothing is lost
    assert stored(Store(store.path)) == whole
    Store(store.path).append(row(2))
    assert stored(Store(store.path)) == [*whole, 2]


def test_the_last_of_equal_measurements_counts(tmp_path):
    store = Store(tmp_path / "rows.jsonl")
    store.append(row(0, error="failed", numbers={}))
    store.append(row(0))
    assert store.latest() == {key(row(0)): {"schema_version": 1, **row(0)}}


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "other"},
        {"fingerprint": "g"},
        {"parameters": {"norm": "group", "batch_size": 2}},
        {"seed": 1},
        {"budget": {"steps": 4}},
    ],
)
def test_what_was_measured_decides_which_rows_are_the_same(change):
    assert key(row(0, numbers={}, error="x")) == key(row(0))
    assert key({**row(), **change}) != key(row(0))


@pytest.mark.parametrize("content", ["# Notes\n", '{"my": "data"}\n', '{"schema_version": 2}\n', "x"])
def test_somebody_elses_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.md"
    path.write_text(content)
    with pytest.raises(InputError, match=r"notes\.md holds something else than results"):
        Store(path)
    assert path.read_text() == content


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read: Is a directory"):
        Store(tmp_path)


WRITER = """
import sys
from pathlib import Path
from steadynorm.lab.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for seed in range(200):
    store.append({"writer": sys.argv[2], "seed": seed, "numbers": {"x" * 300: 0.5}})
"""


def test_two_processes_do_not_mix_their_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    rows = Store(path).rows()
    for name in "ab":
        assert [row["seed"] for row in rows if row["writer"] == name] == list(range(200))
    assert path.read_text().count("\n") == 400
