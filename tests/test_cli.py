"""The commands as people type them: what they print, where, and how they end."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from steadynorm.cli import app
from steadynorm.cli.output import as_json, worded
from steadynorm.errors import InputError

HEALTHY = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

def batches(split, batch_size, seed):
    generator = torch.Generator().manual_seed(seed if split == "train" else 99)
    for _ in range(8 if split == "train" else 2):
        target = torch.randint(3, (batch_size,), generator=generator)
        yield torch.randn(batch_size, 1, 8, 8, generator=generator) + target.view(-1, 1, 1, 1), target

def loss(output, batch):
    return F.cross_entropy(output, batch[1])

def metrics(output, batch):
    return {"accuracy": (output.argmax(1) == batch[1]).float().mean().item()}
"""


def ran(*arguments):
    """The ended command; nothing but an exit may have stopped it, and no traceback is ever shown unasked."""
    ended = CliRunner().invoke(app, [str(each) for each in arguments])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), repr(ended.exception)
    if "--traceback" not in arguments:
        assert "Traceback" not in ended.output
    return ended


def refused(*arguments):
    """The one sentence with which a command was refused."""
    ended = ran(*arguments)
    assert ended.exit_code == 2, ended.output
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("steadynorm: ")
    assert lines[0].endswith(".")
    return lines[0]


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe into an empty folder and gives its path."""

    def write(source=HEALTHY, name="mine.py"):
        folder = tmp_path / "recipe"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(source)
        return folder / name

    return write


def test_backends_lists_every_kernel_and_where_it_runs():
    ended = ran("backends")
    assert ended.exit_code == 0
    assert "numba" in ended.stdout
    assert "any device and dtype" in ended.stdout


def test_help_and_version_do_not_wait_for_torch():
    code = "import sys; from steadynorm.cli import app; app(['--version'], standalone_mode=False); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, has_torch = ended.stdout.split("\n")[:2]
    assert version.startswith("steadynorm 0.")
    assert has_torch == "False"


def test_a_missing_extra_is_said_with_the_command_that_brings_it():
    code = "import sys; sys.modules['typer'] = None; import steadynorm.cli"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "steadynorm: the command line needs typer and rich: pip install 'steadynorm[cli]'\n"


def test_json_is_readable_for_every_parser():
    data = {"loss": float("nan"), "rows": [{"highest": float("inf"), "n": 3}], "text": "1 ± 2"}
    assert json.loads(as_json(data)) == {"loss": "nan", "rows": [{"highest": "inf", "n": 3}], "text": "1 ± 2"}


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("this is wrong."), 2, "steadynorm: this is wrong."),
        (OSError(28, "No space left on device", "a.html"), 2, "No space left on device"),
        (SystemExit(0), 2, "the recipe called exit(0)"),
        (KeyboardInterrupt(), 130, "stopped. Nothing was written."),
        (ZeroDivisionError("division by zero"), 3, "unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_stops_a_command_has_its_exit_code_and_sentence(capsys, error, code, sentence):
    import typer

    with pytest.raises(typer.Exit) as ended, worded(show_traceback=False):
        raise error
    assert ended.value.exit_code == code
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


def test_a_reader_that_went_away_is_no_error(recipe):
    command = f"{sys.executable} -c 'from steadynorm.cli import main; main()' backends | true"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.stderr == ""
