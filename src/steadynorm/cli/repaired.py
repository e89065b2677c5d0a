"""`steadynorm doctor --fix`: the repairs, a second look, weights that the recipe's model takes, and back again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import doctor
from steadynorm.cli.output import writing
from steadynorm.cli.written import write_weights
from steadynorm.doctor import Diagnosis, Repair, Suppression
from steadynorm.doctor import undo as undoing
from steadynorm.errors import InputError
from steadynorm.recipe import Recipe
from steadynorm.report import Block, Document, Heading, Paragraph, ensure_writable
from steadynorm.weights import SUFFIXES, read_weights


@dataclass(frozen=True)
class Repaired:
    """What was repaired, what a second examination found, and how many repairs were not asked for."""

    repairs: tuple[Repair, ...]
    after: Diagnosis
    hidden: int = 0

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was done, and what could be."""
        done = tuple(map(str, self.repairs)) or ("Nothing: no finding has a repair that may be done.",)
        if not self.hidden:
            return done
        what = "1 more repair changes" if self.hidden == 1 else f"{self.hidden} more repairs change"
        return (*done, f"{what} what the model computes or how it trains: --unsafe-fixes does them too.")

    def document(self, before: Document) -> Document:
        """The document of the first examination, with the repairs at its end."""
        blocks: list[Block] = [*before.blocks, Heading("Repairs"), *map(Paragraph, self.sentences)]
        blocks.append(Paragraph(f"Examined again: {self.after.summary}"))
        return replace(before, blocks=tuple(blocks))

    def page(self, before: Diagnosis) -> Document:
        """The page of the first examination, with what the second found beside it."""
        return before.page(self.after, self.sentences)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that can be written as JSON."""
        done = [
            {
                "code": each.finding.code,
                "where": each.finding.where,
                "is_done": each.is_done,
                "why_not": each.why_not,
                "loss": list(each.loss) if each.loss else None,
                "in_code": each.in_code,
            }
            for each in self.repairs
        ]
        return {"sentences": list(self.sentences), "repairs": done, "after": self.after.to_dict()}


def ensure_possible(path: Path, undo: Path | None = None) -> None:
    """Find out before the work that weights can be written to `path`, and what takes the repair back to `undo`.

    Raises:
        InputError: they cannot, or not in this format.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"--fix got {path}: expected a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}."
        )
    if undo is not None and (undo.suffix != ".safetensors" or undo.resolve() == path.resolve()):
        raise InputError(f"--undo got {undo}: expected another file than --fix, one that ends in .safetensors.")
    for file in (path, undo):
        if file is not None:
            with writing(file):
                ensure_writable(file)


def repair(
    model: nn.Module,
    diagnosis: Diagnosis,
    recipe: Recipe,
    path: Path,
    *,
    batch_size: int,
    unsafe: bool = False,
    undo: Path | None = None,
    keep: Sequence[Suppression] = (),
) -> Repaired:
    """Repair `model` in place as far as that may be done, examine it again, and write its weights to `path`."""

    def batches() -> Any:
        return recipe.batches("test", batch_size, 0)

    asked = diagnosis.judgement
    repairs = doctor.repair(model, diagnosis, batches, unsafe=unsafe, undo=undo)
    after = doctor.examine(
        model,
        batches,
        train_batches=asked.train_batches,
        loss=asked.loss,
        metrics=asked.metrics,
        optimizer=asked.optimizer,
        step=asked.step,
        select=(*diagnosis.checked, *diagnosis.unchecked),
    )
    write_weights(_weights(model, recipe), path)
    fixes = [finding.fix for finding in diagnosis.findings if finding.fix is not None]
    hidden = 0 if unsafe else sum(fix.apply is not None and not fix.is_safe for fix in fixes)
    return Repaired(repairs, doctor.suppress(after, keep), hidden)


def take_back(undo: Path, weights: Path, out: Path) -> tuple[int, list[str]]:
    """Write `weights` to `out` as they were before the repair of `undo`.

    Returns: how many tensors changed, and the attributes that the code has to say as before.

    Raises:
        InputError: a file cannot be used, or the weights are not as the repair left them.
    """
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out got {out}: expected a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    what = undoing.read(undo)
    with writing(out):
        ensure_writable(out)
    write_weights(undoing.undone(read_weights(weights), what, str(weights)), out)
    in_code = [f"{path}.{key} = {value!r}" for path, each in what.attributes.items() for key, value in each.items()]
    return len(what.tensors), in_code


def _weights(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """The weights of `model` under the names of the recipe's model: a bias that was folded away is zeros there."""
    state = dict(model.state_dict())
    for name, tensor in recipe.model().state_dict().items():
        if name not in state:
            state[name] = torch.zeros_like(tensor)
    return state
