"""The commands as people type them: what they print, where, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
from typer.testing import CliRunner

from steadynorm.cli import app
from steadynorm.cli.output import as_json, worded
from steadynorm.doctor.rules import RULES, advice_of, code_of
from steadynorm.errors import InputError
from steadynorm.recipe import load

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

# Without a loss a model is examined as it was made: its statistics are as they were broken.
UNTRAINED = HEALTHY.replace("def loss", "def unused")
BROKEN_STATISTICS = (
    UNTRAINED.replace("nn.BatchNorm2d(4)", "broken(nn.BatchNorm2d(4))")
    + """
def broken(norm):
    norm.running_var[2] = float("nan")
    return norm
"""
)
STALE = (
    UNTRAINED.replace("nn.BatchNorm2d(4)", "stale(nn.BatchNorm2d(4))").replace(", bias=False", "")
    + """
def stale(norm):
    norm.running_mean += 5
    return norm
"""
)


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
    assert lines[0].endswith((".", "?"))
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
    code = (
        "import sys; from steadynorm.cli import app; "
        "app(['--version'], standalone_mode=False); print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, has_torch = ended.stdout.split("\n")[:2]
    assert version.startswith("steadynorm 0.")
    assert has_torch == "False"


def test_a_missing_extra_is_said_with_the_command_that_brings_it():
    code = "import sys; sys.modules['typer'] = None; import steadynorm.cli"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    assert (
        ended.stderr == "steadynorm: the command line needs typer and rich, the extra [cli]: pip install typer rich\n"
    )


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


def test_a_healthy_recipe_is_clean_and_its_text_goes_to_standard_output(recipe):
    ended = ran("doctor", recipe())
    assert ended.exit_code == 0, ended.output
    assert "No faults found" in ended.stdout
    assert ended.stderr == ""  # no progress where nobody watches


def test_findings_have_their_own_exit_code(recipe):
    ended = ran("doctor", recipe(BROKEN_STATISTICS))
    assert ended.exit_code == 1, ended.output
    assert "SN202" in ended.stdout
    assert "1" in ended.stdout


def test_only_the_rules_that_were_asked_for_are_checked(recipe):
    path = recipe(BROKEN_STATISTICS)
    chosen = json.loads(ran("doctor", path, "--select", "SN104,sn2", "--ignore", "SN203", "--format", "json").stdout)
    assert "SN203" not in chosen["checked"]
    assert all(code == "SN104" or code.startswith("SN2") for code in chosen["checked"])
    assert {"SN104", "SN202"} <= set(chosen["checked"])
    assert {finding["code"] for finding in chosen["findings"]} == {"SN202"}
    assert ran("doctor", path, "--ignore", "SN2").exit_code == 0


def test_a_diagnosis_as_json_is_data_alone(recipe):
    ended = ran("doctor", recipe(BROKEN_STATISTICS + "print('loading')"), "--format", "json")
    found = json.loads(ended.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["schema_version"] == 2
    assert found["findings"][0]["where"] == "1"
    assert ended.stderr == "loading\n"  # what a recipe prints is no result


def test_a_page_is_written_and_its_path_is_what_is_printed(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = ran("doctor", recipe(), "--format", "html")
    assert ended.stdout.strip() == str(tmp_path / "reports" / "doctor-mine.html")
    assert os.listdir(tmp_path / "reports") == ["doctor-mine.html"]
    assert "No faults found" in (tmp_path / "reports" / "doctor-mine.html").read_text()


def test_the_suffix_chooses_the_format(recipe, tmp_path):
    for name, start in (("a.html", "<!DOCTYPE html>"), ("a.json", "{"), ("a.txt", "✔")):
        assert ran("doctor", recipe(), "--out", tmp_path / name, "--select", "SN104").exit_code == 0
        assert (tmp_path / name).read_text().startswith(start)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_repaired_weights_fit_the_recipe_and_are_clean(recipe, tmp_path, suffix):
    path, fixed = recipe(STALE), tmp_path / f"fixed{suffix}"
    ended = ran("doctor", path, "--fix", fixed, "--format", "json")
    assert ended.exit_code == 0, ended.output
    data = json.loads(ended.stdout)
    assert {finding["code"] for finding in data["findings"]} == {"SN104", "SN203"}
    assert len(data["repair"]["sentences"]) == 2
    assert data["repair"]["after"]["is_clean"]
    again = ran("doctor", path, "--weights", fixed, "--select", "SN2")
    assert again.exit_code == 0, again.output
    # The layer still has the bias, folded away: it is zeros, and the model computes the same.
    assert torch.count_nonzero(load(str(path), fixed).model()[0].bias) == 0


def test_every_rule_explains_itself():
    for rule in RULES:
        ended = ran("explain", code_of(rule))
        assert ended.exit_code == 0
        assert advice_of(rule) in " ".join(ended.stdout.split())
        assert "Good:" in ended.stdout
        assert max(map(len, ended.stdout.splitlines())) <= 80


LAB = ("--batch-sizes", "4,8", "--norms", "batch,group", "--seeds", "2", "--steps", "4", "--workers", "1")


def test_the_lab_stores_its_cells_and_skips_them_the_next_time(recipe, tmp_path):
    command = ("lab", recipe(), *LAB, "--store", tmp_path / "rows.jsonl", "--out", tmp_path / "lab.json")
    assert ran(*command).exit_code == 0
    first = json.loads((tmp_path / "lab.json").read_text())
    assert len(first["rows"]) == 8
    assert first["verdict"]["sentence"]
    lines = (tmp_path / "rows.jsonl").read_text()
    assert ran(*command).exit_code == 0
    assert (tmp_path / "rows.jsonl").read_text() == lines
    assert json.loads((tmp_path / "lab.json").read_text())["verdict"] == first["verdict"]


def test_the_lab_takes_a_learning_rate_and_knows_rows_of_another_one(recipe, tmp_path):
    command = ("lab", recipe(), *LAB, "--store", tmp_path / "rows.jsonl", "--format", "json")
    own, other = (json.loads(ran(*command, *more).stdout) for more in ((), ("--lr", "0.5")))
    assert own["budget"]["lr"] == load(str(recipe())).lr == 0.05
    assert other["budget"]["lr"] == 0.5
    assert {row["budget"]["lr"] for row in other["rows"]} == {0.5}
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 16
    assert own["rows"][0]["numbers"] != other["rows"][0]["numbers"]


@pytest.mark.slow
def test_a_stopped_lab_goes_on_where_it_was(recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    arguments = [
        "lab",
        str(recipe()),
        "--batch-sizes",
        "4",
        "--norms",
        "batch",
        "--seeds",
        "5000",
        "--store",
        str(rows),
    ]
    arguments += ["--steps", "4"]
    command = [sys.executable, "-c", "from steadynorm.cli import main; main()", *arguments]
    # A test run in the background of a shell inherits SIGINT ignored, and would hand that on.
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while not (rows.exists() and rows.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=120)
    assert started.returncode == 130, stderr
    assert stdout == ""
    assert stderr == f"steadynorm: stopped. Finished cells are in {rows}: the same command goes on from there.\n"
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert kept
    assert not any(row["error"] for row in kept)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", ("does not define model", "def model() -> nn.Module")),
        (HEALTHY.replace("def batches", "def other"), ("does not define batches", "Iterable")),
        (HEALTHY.replace("def model():", "def model(width):"), ("model(width)",)),
        (HEALTHY.replace("return nn.Sequential", "return len"), ("model()", "TypeError", "mine.py:")),
        ("import nothing_of_that_name", ("cannot be imported", "nothing_of_that_name", "mine.py:1")),
        ("def model(:", ("cannot be imported", "SyntaxError", "mine.py:1")),
        ("raise SystemExit(0)", ("cannot be imported", "SystemExit")),
        (HEALTHY.replace("range(8 if", "range(0 if").replace("else 2)", "else 0)"), ("empty",)),
        (HEALTHY.replace("for _ in range", "for _ in 1 / 0 or range"), ("batches()", "ZeroDivisionError", "mine.py:")),
    ],
    ids=["no model", "no batches", "signature", "model raises", "import", "syntax", "exit", "empty", "loader raises"],
)
@pytest.mark.parametrize("command", [("doctor",), ("lab", *LAB)], ids=["doctor", "lab"])
def test_a_broken_recipe_is_refused_in_one_sentence(recipe, tmp_path, monkeypatch, command, source, words):
    monkeypatch.chdir(tmp_path)
    sentence = refused(command[0], recipe(source), *command[1:], "--format", "html")
    for word in words:
        assert word in sentence
    assert os.listdir(tmp_path) == ["recipe"]  # nothing half-written


def test_a_forward_that_raises_is_a_finding_of_the_doctor_and_stops_the_lab(recipe, tmp_path):
    path = recipe(HEALTHY.replace("nn.Linear(144, 3)", "nn.Linear(7, 3)"))
    ended = ran("doctor", path)
    assert ended.exit_code == 1
    assert "SN001" in ended.stdout
    assert "RuntimeError" in refused("lab", path, *LAB, "--store", tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_batches_that_hold_nan_are_a_finding(recipe):
    ended = ran("doctor", recipe(HEALTHY.replace("+ target.view(-1, 1, 1, 1)", "* float('nan')")))
    assert ended.exit_code == 1
    assert "SN002" in ended.stdout


@pytest.mark.parametrize("name", ["weights.pt", "weights.pkl", "missing.pt", "other.safetensors"])
def test_weights_that_cannot_be_trusted_or_read_are_refused(recipe, tmp_path, name):
    proof = tmp_path / "it ran"
    if name.startswith("weights"):
        torch.save(Bomb(proof), tmp_path / name)
    elif name.startswith("other"):
        (tmp_path / name).write_text("no weights")
    assert name in refused("doctor", recipe(), "--weights", tmp_path / name)
    assert not proof.exists()


class Bomb:
    """What a hostile pickle does when it is opened."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("lab", "digits", "--batch-sizes", "2,x"), "'2,x'"),
        (("lab", "digits", "--batch-sizes", ""), "--batch-sizes"),
        (("lab", "digits", "--batch-sizes", "0,2"), "batch size of 0"),
        (("lab", "digits", "--norms", "batch,grup"), "'grup'"),
        (("doctor", "digits", "--select", "SN999"), "SN999"),
        (("doctor", "digits", "--ignore", "nonsense"), "nonsense"),
        (("doctor", "no_such_recipe"), "no_such_recipe"),
        (("doctor", "no/such/recipe.py"), "no/such/recipe.py"),
        (("doctor", "digits", "--fix", "weights.bin"), "weights.bin"),
        (("doctor", "digits", "--weights", "none.pt"), "none.pt"),
        (("explain", "SN999"), "SN999"),
        (("lab", "digits", "--seeds", "many"), "--seeds got 'many': expected a whole number from 1 on."),
        (("lab", "digits", "--seeds", "0"), "--seeds got '0': expected a whole number from 1 on."),
        (("lab", "digits", "--steps", "1.5"), "--steps got '1.5': expected a whole number from 1 on."),
        (("lab", "digits", "--workers=-1"), "--workers got '-1': expected a whole number from 1 on."),
        (("lab", "digits", "--lr", "fast"), "--lr got 'fast': expected a number above 0, such as 0.05."),
        (("lab", "digits", "--lr", "-0.1"), "--lr got '-0.1': expected a number above 0"),
        (("lab", "digits", "--lr", "nan"), "--lr got 'nan': expected a number above 0"),
        (("lab", "digits", "--seeds"), "--seeds got no value"),
        (("lab", "digits", "--seed", "3"), "lab has no option --seed (did you mean --seeds?)"),
        (("lab", "digits", "--bogus", "3"), "lab has no option --bogus: steadynorm lab --help"),
        (("lab", "digits", "--batch-sizes", "2,", "4"), "lab got more than it takes, '4'"),
        (("doctor", "digits", "--batch-size", "x"), "--batch-size got 'x': expected a whole number from 1 on."),
        (("doctor", "digits", "--seed", "-1"), "--seed got '-1': expected a whole number from 0 on."),
        (("doctor", "digits", "--format", "pdf"), "--format got 'pdf': expected text, json, html, sarif or github."),
        (("doctor", "digits", "--traceback=3"), "--traceback got a value"),
        (("doctor",), "doctor got no RECIPE: expected a shipped recipe (digits), a .py file or a module."),
        (("explain",), "explain got no CODE: expected the code of a rule, such as SN104."),
        (("docter", "digits"), "there is no command 'docter' (did you mean doctor?): expected one of doctor, lab"),
        (("nonsense",), "there is no command 'nonsense': expected one of doctor, lab"),
        (("--bogus",), "steadynorm has no option --bogus: steadynorm --help"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_in_one_sentence(tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    assert word in refused(*arguments)
    assert os.listdir(tmp_path) == []


def test_without_a_command_the_help_is_shown():
    ended = ran()
    assert ended.exit_code == 0
    assert "doctor" in ended.stdout
    assert ended.stdout.strip() == ran("--help").stdout.strip()


def test_options_that_are_read_by_us_show_their_defaults():
    shown = " ".join(ran("lab", "--help").stdout.replace("│", " ").split())
    assert "How many times each cell is trained. [default: 3]" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "digits", "--out"),
        ("doctor", "digits", "--fix"),
        ("lab", "digits", "--out"),
        ("lab", "digits", "--store"),
        ("demo", "--folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_before_the_work(monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("steadynorm.recipe.train", lambda *_, **__: pytest.fail("the work had begun"))
    # A file system that takes no files, whoever asks: permission bits do not stop the superuser.
    assert "cannot write /proc/" in refused(*arguments, "/proc/report.safetensors")
    assert os.listdir(tmp_path) == []


def test_the_whole_traceback_is_shown_when_asked_for(recipe):
    ended = ran("doctor", recipe(HEALTHY.replace("return nn.Sequential", "return len")), "--traceback")
    assert ended.exit_code == 2
    assert "Traceback (most recent call last)" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("steadynorm: model() of the recipe raised TypeError")


@pytest.mark.slow
def test_the_demo_runs_and_ends_with_the_path_of_its_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = ran("demo")
    assert ended.exit_code == 0
    assert ended.stdout.splitlines()[-1] == str(tmp_path / "demo" / "report.html")
    assert sorted(os.listdir(tmp_path / "demo")) == ["lab-digits.jsonl", "report.html"]
