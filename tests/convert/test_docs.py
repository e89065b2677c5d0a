"""The examples of the page run, and what they say they print they print."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "convert.md"


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    expected = [line for block in blocks for line in re.findall(r"^# (.*)$", block, flags=re.MULTILINE)]
    assert len(expected) > 8
    for line in expected:
        assert re.search(re.escape(line).replace(r"\.\.\.", r"\S+"), shown), line
