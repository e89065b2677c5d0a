"""The examples of the pages on layers run, and the tables of docs/layers.md name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import steadynorm
from steadynorm.functional import ACTIVATIONS
from steadynorm.layers.switches import DEFAULTS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "layers.md").read_text(encoding="utf-8")


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    shown = re.search(r"print\(norm\)  # \.\.\., (.*)", PAGE)
    assert shown is not None
    assert shown[1] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["choosing", "input", "saving", "weight"])
def test_the_examples_of_other_pages_run(name):
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {"steadynorm": steadynorm, "torch": torch, "nn": torch.nn}
    for block in blocks:
        exec(block, names)


def test_every_activation_and_switch_is_named():
    for name in (*ACTIVATIONS, *DEFAULTS):
        assert f"`{name}`" in PAGE
