import json
import subprocess
from pathlib import Path

import torch

import steadynorm
from steadynorm import machine


def test_the_machine_is_described_in_words():
    facts = machine.describe()
    assert {"cpu", "cores", "threads", "system", "python", "torch", "numpy", "numba", "steadynorm"} <= set(facts)
    assert all(isinstance(value, str) and value for value in facts.values())
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == "1"
    assert json.loads(json.dumps(facts)) == facts


def test_the_commit_is_that_of_our_own_checkout():
    machine._commit.cache_clear()
    here = Path(steadynorm.__file__).parent
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    tracked = subprocess.run(
        ["git", "ls-files", "--error-unmatch", "machine.py"], cwd=here, capture_output=True, check=False
    )
    commit = machine.describe().get("commit")
    if asked.returncode or tracked.returncode:
        assert commit is None
    else:
        assert asked.stdout.startswith(commit.removesuffix("-dirty"))


def test_somebody_elses_repository_around_us_is_not_our_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    inside = tmp_path / "site-packages" / "machine.py"
    inside.parent.mkdir()
    inside.write_text("")
    monkeypatch.setattr(machine, "__file__", str(inside))
    machine._commit.cache_clear()
    try:
        assert "commit" not in machine.describe()
    finally:
        machine._commit.cache_clear()
