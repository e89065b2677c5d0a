"""The examples of docs/layers.md run, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

from steadynorm.functional import ACTIVATIONS
from steadynorm.layers.switches import DEFAULTS

PAGE = (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="utf-8")


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    shown = re.search(r"print\(norm\)  # \.\.\., (.*)", PAGE)
    assert shown is not None
    assert shown[1] in capsys.readouterr().out


def test_every_activation_and_switch_is_named():
    for name in (*ACTIVATIONS, *DEFAULTS):
        assert f"`{name}`" in PAGE
