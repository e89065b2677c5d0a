"""`steadynorm recalibrate`, `fold`, `convert`, `export` and `verify`: from a recipe's model to one that is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steadynorm.cli.options import (
    BatchSizeOption,
    FormatOption,
    OutOption,
    RecipeName,
    TracebackOption,
    WeightsOption,
    words,
)
from steadynorm.cli.output import CLEAN, FINDINGS, PLAIN, Format, Output, output, say, worded, working
from steadynorm.cli.usage import format_among, positive, whole
from steadynorm.errors import DifferenceError, InputError

if TYPE_CHECKING:
    from torch import nn

    from steadynorm.deploy import Exported
    from steadynorm.recipe import Recipe

METHODS = ("one_pass", "layer_by_layer")

WrittenOption = Annotated[Path | None, typer.Option("--out", help="The file to write.")]
ReportFormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        parser=format_among(PLAIN),
        metavar="FORMAT",
        help="Of the report: text, json or html; text unless --report ends in .json or .html.",
    ),
]
ReportOption = Annotated[Path | None, typer.Option("--report", help="Write the report to this file.")]
BatchesOption = Annotated[
    int, typer.Option(parser=whole(1), metavar="NUMBER", help="How many batches of the test data are run.")
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(parser=positive, metavar="NUMBER", help="Largest relative difference; else half of the digits."),
]
OpsetOption = Annotated[int | None, typer.Option(parser=whole(1), metavar="NUMBER", help="Of ONNX's operators.")]
LeaveOption = Annotated[str, typer.Option(help="Norms to leave as they are: backbone,head.*")]
OnlyOption = Annotated[str, typer.Option(help="Only these norms: backbone,head.*")]


@contextmanager
def deploying(show_traceback: bool) -> Iterator[None]:
    """What stops a command, in one sentence; a difference over the tolerance is a finding, not misuse."""
    with worded(show_traceback):
        try:
            yield
        except DifferenceError as error:
            say(str(error))
            raise typer.Exit(FINDINGS) from None


def recalibrate(
    recipe: RecipeName,
    weights: WeightsOption = None,
    out: WrittenOption = None,
    samples: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="NUMBER", help="Of the training data; else all of it.")
    ] = None,
    method: Annotated[str, typer.Option(help="one_pass or layer_by_layer.")] = METHODS[0],
    batch_size: BatchSizeOption = 32,
    format: ReportFormatOption = None,
    report: ReportOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Take the running statistics of the batch norms anew from the training data, and write the weights."""
    with deploying(traceback):
        from steadynorm.cli import deployed, written
        from steadynorm.recipe import evaluate
        from steadynorm.training import recalibrate_
        from steadynorm.weights import first_few

        if method not in METHODS:
            raise InputError(f"--method got {method!r}: expected {' or '.join(METHODS)}.")
        target = written.ensure_possible("recalibrate", out, written.WEIGHTS)
        result = output(format, report, f"recalibrate-{Path(recipe).stem}")
        with working(f"recalibrate {recipe}", "batches") as advance:
            loaded, model, remarks = _loaded(recipe, weights, may_lack_statistics=True)
            lacking = _lacking(loaded, model)
            is_measured = loaded.loss is not None or loaded.metrics is not None
            before = evaluate(model, loaded) if is_measured else {}
            moved = recalibrate_(
                model,
                lambda: loaded.batches("train", batch_size, 0),
                method=method,  # type: ignore[arg-type]
                samples=samples,
                progress=lambda done, total: advance(done, total or 0) if total else None,
            )
            refused = [path for path in lacking if path not in moved.layers]
            if refused:
                raise InputError(
                    f"the weights in {weights} hold no running statistics of {first_few(refused)}, and recalibration"
                    f" leaves {'it' if len(refused) == 1 else 'them'} as"
                    f" {'it is' if len(refused) == 1 else 'they are'}: give weights that hold them."
                )
            after = evaluate(model, loaded) if is_measured else {}
            written.write_weights(model.state_dict(), target)
        say(f"the weights are in {target}.")
        if lacking:
            shown = f"The weights held no running statistics of {first_few(lacking)}: before, those of a new model."
            remarks = (*remarks, shown)
        scores = [(name, before[name], after[name]) for name in after]
        document = deployed.of_statistics(f"Recalibrated {loaded.name}", moved, scores, remarks)
        result.write([document], deployed.statistics_to_dict(moved, scores, target), document.title)
        raise typer.Exit(CLEAN)


def fold(
    recipe: RecipeName,
    weights: WeightsOption = None,
    out: WrittenOption = None,
    leave: LeaveOption = "",
    tolerance: ToleranceOption = None,
    opset: OpsetOption = None,
    batch_size: BatchSizeOption = 32,
    batches: BatchesOption = 4,
    format: ReportFormatOption = None,
    report: ReportOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Fold the batch norms into the layers beside them, where that is exact, and export the model (.onnx, .pt2)."""
    with deploying(traceback):
        from steadynorm import deploy
        from steadynorm.cli import deployed, written

        target = written.ensure_possible("fold", out, written.ARTEFACTS, FOLDED_WEIGHTS)
        result = output(format, report, f"fold-{Path(recipe).stem}")
        with working(f"fold {recipe}") as advance:
            loaded, model, remarks = _loaded(recipe, weights)
            examples = _examples(loaded, batch_size, batches)
            model.eval()
            change = deploy.fold(model, examples, leave=words(leave) or None, tolerance=tolerance)
            exported = deploy.export(
                change.model, examples, target, opset=opset, tolerance=tolerance, reference=model, progress=advance
            )
        document = deployed.of_change(f"Folded {loaded.name}", change, remarks)
        second = deployed.of_exported("Exported", exported, ())
        data = {**deployed.change_to_dict(change), "export": exported.to_dict(), "out": str(target)}
        _end(result, [document, second], data, exported)


FOLDED_WEIGHTS = "folded layers are not the recipe's, so that weights alone would fit no model that you have"


def convert(
    recipe: RecipeName,
    to: Annotated[str, typer.Argument(metavar="TO", help="A normalization: steadynorm, torch, group, frozen, none …")],
    weights: WeightsOption = None,
    out: WrittenOption = None,
    only: OnlyOption = "",
    leave: LeaveOption = "",
    groups: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="NUMBER", help="To group: how many; else chosen.")
    ] = None,
    ghost_size: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="NUMBER", help="To ghost: samples of a slice.")
    ] = None,
    dims: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="NUMBER", help="Of SyncBatchNorm, to batch: 1, 2 or 3.")
    ] = None,
    batch_size: BatchSizeOption = 32,
    batches: BatchesOption = 4,
    format: ReportFormatOption = None,
    report: ReportOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Make the normalizations of a model others, and write its weights, or the model itself (.onnx, .pt2)."""
    with deploying(traceback):
        from steadynorm import deploy
        from steadynorm.cli import deployed, written
        from steadynorm.convert import convert_

        target = written.ensure_possible("convert", out, (*written.WEIGHTS, *written.ARTEFACTS))
        result = output(format, report, f"convert-{Path(recipe).stem}")
        exported = None
        with working(f"convert {recipe}") as advance:
            loaded, model, remarks = _loaded(recipe, weights)
            examples = _examples(loaded, batch_size, batches)
            change = convert_(
                model,
                to,  # type: ignore[arg-type]
                only=words(only) or None,
                leave=words(leave) or None,
                batches=examples,
                loss=loaded.loss,
                dims=dims,  # type: ignore[arg-type]
                ghost_size=ghost_size,
                groups=groups,
            )
            if target.suffix in written.ARTEFACTS:
                exported = deploy.export(model.eval(), examples, target, progress=advance)
            else:
                written.write_weights(model.state_dict(), target)
        documents = [deployed.of_change(f"Converted {loaded.name} to {to}", change, remarks)]
        data = {**deployed.change_to_dict(change), "to": to, "out": str(target)}
        if exported is not None:
            documents.append(deployed.of_exported("Exported", exported, ()))
            data["export"] = exported.to_dict()
        else:
            say(f"the weights are in {target}.")
        _end(result, documents, data, exported)


def export(
    recipe: RecipeName,
    weights: WeightsOption = None,
    out: WrittenOption = None,
    opset: OpsetOption = None,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="For batches of --batch-size only.")] = False,
    tolerance: ToleranceOption = None,
    batch_size: BatchSizeOption = 32,
    batches: BatchesOption = 4,
    format: ReportFormatOption = None,
    report: ReportOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Write a model as .onnx or .pt2, after another engine ran it and gave what the model gives."""
    with deploying(traceback):
        from steadynorm import deploy
        from steadynorm.cli import deployed, written

        target = written.ensure_possible("export", out, written.ARTEFACTS, EXPORTED_WEIGHTS)
        result = output(format, report, f"export-{Path(recipe).stem}")
        with working(f"export {recipe}") as advance:
            loaded, model, remarks = _loaded(recipe, weights)
            examples = _examples(loaded, batch_size, 1 if fixed_batch else batches)
            exported = deploy.export(
                model.eval(),
                examples,
                target,
                opset=opset,
                dynamic_batch=not fixed_batch,
                tolerance=tolerance,
                progress=advance,
            )
        document = deployed.of_exported(f"Exported {loaded.name}", exported, remarks)
        _end(result, [document], {**exported.to_dict(), "out": str(target)}, exported)


EXPORTED_WEIGHTS = "weights are no model that runs by itself"


def verify(
    recipe: RecipeName,
    weights: WeightsOption = None,
    against: Annotated[
        str, typer.Option(metavar="WHAT", help="Weights, an .onnx or .pt2 file, or another recipe.")
    ] = "",
    against_weights: Annotated[
        Path | None, typer.Option(help="A .safetensors or .pt file for the other recipe's model.")
    ] = None,
    tolerance: ToleranceOption = None,
    batch_size: BatchSizeOption = 32,
    batches: BatchesOption = 4,
    format: FormatOption = None,
    out: OutOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Run two models on the test data: how far are they apart, and at which layer do they part? Exit code 1 if so."""
    with deploying(traceback):
        from steadynorm import deploy
        from steadynorm.cli import deployed

        if not against:
            raise InputError(
                "verify got no --against: expected weights for the same recipe (.safetensors, .pt), an artefact"
                " (.onnx, .pt2) or another recipe."
            )
        result = output(format, out, f"verify-{Path(recipe).stem}")
        with working(f"verify {recipe}"):
            loaded, model, _ = _loaded(recipe, weights)
            other = _other(recipe, against, against_weights)
            examples = _examples(loaded, batch_size, batches)
            comparison = deploy.verify(model, other, examples, tolerance=tolerance)
        names = (Path(weights).name if weights else loaded.name, Path(against).name)
        document = deployed.of_comparison(f"{names[0]} against {names[1]}", comparison, names, len(examples))
        result.write([document], deployed.comparison_to_dict(comparison), document.title)
        raise typer.Exit(CLEAN if comparison.agrees else FINDINGS)


def _loaded(
    recipe: str, weights: Path | None, *, may_lack_statistics: bool = False
) -> tuple["Recipe", "nn.Module", tuple[str, ...]]:
    """The recipe, its model, and what is to be said about it."""
    from steadynorm.recipe import load, seeded

    loaded = load(recipe, weights, may_lack_statistics=may_lack_statistics)
    with seeded(0):
        model = loaded.model()
    remark = "No --weights were given: the model is as the recipe makes it."
    return loaded, model, () if loaded.has_weights else (remark,)


def _lacking(recipe: "Recipe", model: "nn.Module") -> list[str]:
    """Layers of which the weights that were loaded hold no running mean or variance."""
    if recipe.state is None:
        return []
    names = (name.rpartition(".") for name in model.state_dict() if name not in recipe.state)
    return list(dict.fromkeys(path for path, _, kind in names if kind in ("running_mean", "running_var")))


def _other(recipe: str, against: str, weights: Path | None) -> "nn.Module":
    """The second model: an artefact, the recipe's with other weights, or that of another recipe."""
    from steadynorm.cli import written
    from steadynorm.deploy import load

    suffix = Path(against).suffix
    if weights is not None and suffix in (*written.ARTEFACTS, *written.WEIGHTS):
        raise InputError(f"--against-weights are for another recipe, and --against got {against}.")
    if suffix in written.ARTEFACTS:
        return load(against)
    return _loaded(recipe, Path(against))[1] if suffix in written.WEIGHTS else _loaded(against, weights)[1]


def _examples(recipe: "Recipe", batch_size: int, count: int) -> list[Any]:
    found = list(islice(recipe.batches("test", batch_size, 0), count))
    if not found:
        raise InputError(f"batches('test', {batch_size}, 0) of the recipe {recipe.name} is empty: nothing to run.")
    return found


def _end(result: Output, documents: list[Any], data: dict[str, Any], exported: "Exported | None") -> None:
    """Write the report; an artefact that depends on the batch is a finding."""
    if exported is not None:
        say(f"the model is in {exported.path}, what was measured on it in {exported.report.name}.")
    result.write(documents, data, documents[0].title)
    is_clean = exported is None or exported.invariance is None or exported.invariance.holds
    raise typer.Exit(CLEAN if is_clean else FINDINGS)


VERBS = (recalibrate, fold, convert, export, verify)
