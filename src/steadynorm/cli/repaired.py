"""`steadynorm doctor --fix`: the safe repairs, a second look, and weights that the recipe's model takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import doctor
from steadynorm.cli.output import writing
from steadynorm.doctor import Diagnosis
from steadynorm.errors import InputError
from steadynorm.recipe import Recipe
from steadynorm.report import Block, Document, Heading, Paragraph, ensure_writable
from steadynorm.report.files import replacing

SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Repair:
    """What was repaired, and what a second examination found."""

    sentences: tuple[str, ...]
    after: Diagnosis

    def document(self, before: Document) -> Document:
        """The document of the first examination, with the repairs at its end."""
        done = self.sentences or ("Nothing: no finding has a repair that is safe.",)
        blocks: list[Block] = [*before.blocks, Heading("Repairs")]
        blocks += [Paragraph(sentence) for sentence in done]
        blocks.append(Paragraph(f"Examined again: {self.after.summary}"))
        return replace(before, blocks=tuple(blocks))

    def to_dict(self) -> dict[str, Any]:
        """As plain data that can be written as JSON."""
        return {"sentences": list(self.sentences), "after": self.after.to_dict()}


def ensure_possible(path: Path) -> None:
    """Find out before the work that weights can be written to `path`.

    Raises:
        InputError: they cannot, or not in this format.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"--fix got {path}: expected a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}."
        )
    with writing(path):
        ensure_writable(path)


def repair(
    model: nn.Module,
    diagnosis: Diagnosis,
    recipe: Recipe,
    path: Path,
    *,
    batch_size: int,
    select: Sequence[str],
    ignore: Sequence[str],
) -> Repair:
    """Repair `model` in place as far as that is safe, examine it again, and write its weights to `path`."""

    def batches() -> Any:
        return recipe.batches("test", batch_size, 0)

    asked = diagnosis.judgement
    sentences = doctor.repair(model, diagnosis, batches)
    after = doctor.examine(
        model,
        batches,
        train_batches=asked.train_batches,
        loss=asked.loss,
        metrics=asked.metrics,
        select=select,
        ignore=ignore,
    )
    _write(_weights(model, recipe), path)
    return Repair(sentences, after)


def _weights(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """The weights of `model` under the names of the recipe's model: a bias that was folded away is zeros there."""
    state = dict(model.state_dict())
    for name, tensor in recipe.model().state_dict().items():
        if name not in state:
            state[name] = torch.zeros_like(tensor)
    return state


def _write(state: Mapping[str, Tensor], path: Path) -> None:
    # Copies: safetensors refuses tensors that share memory, and tied weights do.
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    with writing(path), replacing(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(whole, temporary)
        else:
            torch.save(whole, temporary)
