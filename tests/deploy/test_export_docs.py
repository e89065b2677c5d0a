"""The examples of docs/export.md run, and what they say they print they print."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
TORCHAO = "# needs torchao"


@pytest.mark.slow
def test_the_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    if importlib.util.find_spec("torchao") is None:
        blocks = [block for block in blocks if TORCHAO not in block]
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    expected = [
        line for block in blocks for line in re.findall(r"^(?:print\(.*\)  )?# (.*)$", block, flags=re.MULTILINE)
    ]
    assert len(expected) > 5
    for line in expected:
        assert line in TORCHAO or re.search(re.escape(line).replace(r"\.\.\.", r"\S+"), shown), line
