"""The examples of the pages on training run, and what they say they print they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    "name",
    ["adapt", "average", "freeze", "merge", "microbatch", "param_groups", "recalibrate", "transaction"],
)
def test_the_examples_run(name, capsys):
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    for block in blocks:
        for expected in re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE):
            assert expected in shown
        for expected in re.findall(r"^# (.*)$", block, flags=re.MULTILINE):
            assert expected in shown
