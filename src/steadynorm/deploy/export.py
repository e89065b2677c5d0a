"""export: a model as ONNX or as a program of torch.export, run and compared before there is a file."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steadynorm import machine
from steadynorm.blame import in_a_line
from steadynorm.deploy import ready
from steadynorm.deploy.artefact import ONNX_PACKAGES, Format, format_of, from_bytes, require
from steadynorm.deploy.batch_sizes import SIZES, Invariance, Rows, Sized, sized
from steadynorm.deploy.difference import OutputDifference, compare, default_tolerance, named_tensors, run
from steadynorm.deploy.exported import REPORT_SUFFIX, Exported
from steadynorm.deploy.program import Content, as_onnx, as_torch, inputs_only, trace
from steadynorm.errors import DifferenceError, InputError
from steadynorm.report.files import ensure_writable, replacing
from steadynorm.training.evaluation import call, evaluation

Progress = Callable[[int, int], None]
STEPS = 4
"""Traced, written, loaded, and run: what `progress` counts."""


def export(
    model: nn.Module,
    batches: Iterable[Any],
    out: str | Path,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    batch_sizes: Sequence[int] = SIZES,
    tolerance: float | None = None,
    reference: nn.Module | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write `model` to a file that another engine runs, after it was run by that engine and agreed with the model.

    The artefact is made in memory, run on all batches and on batches of other sizes, and compared with the model; the
    file is written whole after that, and what was measured beside it, as ``out`` with ".json" added. What fails or is
    stopped before leaves the folder as it was.

    Args:
        model: in evaluation mode; it is not changed.
        batches: examples, tensors, tuples that begin with the input, or dictionaries of arguments. Sizes that differ
            between them may be any in the artefact.
        out: the file; ``.onnx`` is ONNX by torch's dynamo exporter, run by onnxruntime; ``.pt2`` is torch.export.
        opset: the version of ONNX's operators; by default that of the exporter.
        dynamic_batch: whether the artefact takes batches of any size, where all tensors share their first size. Without
            it all batches must be of one size.
        batch_sizes: in which the first sample is sent through both, among others.
        tolerance: the largest relative difference of an output; by default `default_tolerance`, sqrt(machine epsilon)
            of its dtype.
        reference: the model to compare with, where that is another: the one that was folded, or made int8.
        progress: called with how much is done, and of how much.

    Raises:
        InputError: a model that is not ready, cannot be exported, or that the engine cannot run.
        DifferenceError: the artefact does not compute what the model does, with the numbers.
        ImportError: a package that ONNX needs is not installed.
    """
    path, advance = Path(out), progress or (lambda done, total: None)
    kind = _checked(path, opset)
    ready.require_evaluation(model)
    given = [inputs_only(batch) for batch in batches]
    if not given:
        raise InputError("export got no batch: give at least one that the model can take.")
    against = model if reference is None else reference
    places = _places(against, given[0])
    program = trace(model, given, dynamic_batch)
    ready.require_constant_statistics(program)
    advance(1, STEPS)
    content = as_onnx(program, places, opset) if kind == "onnx" else as_torch(program)
    advance(2, STEPS)
    artefact = from_bytes(content.data, kind)
    advance(3, STEPS)
    samples = sized(given, batch_sizes) if dynamic_batch else []
    outputs, invariance = _compared(against, artefact, given, samples)
    over = [output for output in outputs if not output.is_within(tolerance)]
    if over:
        raise DifferenceError(_over(over, len(given), samples, tolerance, kind))
    advance(STEPS, STEPS)
    exported = Exported(
        path,
        kind,
        _engine(kind),
        content.opset,
        len(content.data),
        hashlib.sha256(content.data).hexdigest(),
        content.operators,
        outputs,
        len(given),
        tuple(one.size for one in samples),
        invariance,
        tolerance,
        machine.describe(),
    )
    _write(content, exported)
    return exported


def _checked(path: Path, opset: int | None) -> Format:
    kind = format_of(path)
    if opset is not None and kind != "onnx":
        raise InputError(f"export got opset={opset} for {path.name}: only ONNX has one; end the name in .onnx.")
    if kind == "onnx":
        require(*ONNX_PACKAGES)
    for one in (path, path.with_name(path.name + REPORT_SUFFIX)):
        ensure_writable(one)
    return kind


def _places(model: nn.Module, batch: Any) -> list[str]:
    """Where the tensors are in what the model gives."""
    with evaluation(model, ()):
        try:
            places = [name for name, _ in named_tensors(run(model, batch, call))]
        except Exception as error:
            raise InputError(f"the model raised {in_a_line(error)}, for the first batch.") from error
    if not places:
        raise InputError("export found no tensor in what the model returns: there is nothing to compare.")
    return places


def _compared(
    model: nn.Module, artefact: nn.Module, batches: Sequence[Any], samples: Sequence[Sized]
) -> tuple[tuple[OutputDifference, ...], Invariance | None]:
    """The differences over all batches, and how much one sample's output depends on its batch."""
    everything = [*batches, *(one.batch for one in samples)]
    by_batch = {id(one.batch): one for one in samples}
    rows = {id(model): Rows(), id(artefact): Rows()}

    def forward(which: nn.Module, batch: Any) -> Any:
        try:
            output = call(which, batch)
        except Exception as error:
            raise _raised(which is artefact, by_batch.get(id(batch)), error) from error
        if id(batch) in by_batch:
            rows[id(which)].add(named_tensors(output), by_batch[id(batch)])
        return output

    with evaluation(model, ()), evaluation(artefact, ()):
        outputs = compare(model, artefact, everything, forward)
    ours, theirs = (rows[id(one)].difference(len(samples)) for one in (model, artefact))
    if ours is None or theirs is None:
        return outputs, None
    sizes = tuple(one.size for one in samples)
    return outputs, Invariance(sizes, ours[0], theirs[0], max(ours[1], theirs[1]))


def _raised(is_artefact: bool, one: Sized | None, error: Exception) -> Exception:
    where = "" if one is None else f" for {one.size} sample{'s' if one.size != 1 else ''}"
    what = str(error).rstrip(".") if isinstance(error, InputError) else in_a_line(error)
    if is_artefact:
        return DifferenceError(f"the artefact raised{where}, where the model did not: {what}. Nothing was written.")
    hint = "" if one is None else "; batch_sizes= says which to try"
    return InputError(f"the model raised {what}{where}{hint}. Nothing was written.")


def _over(
    over: list[OutputDifference], batches: int, samples: Sequence[Sized], tolerance: float | None, kind: Format
) -> str:
    worst = max(over, key=lambda output: output.relative)
    bar = default_tolerance(worst.dtype) if tolerance is None else tolerance
    number = worst.batch - batches
    which = "" if number < 0 else f" (a batch of {samples[number].size})"
    shapes = " Its shape is another, or only one of the two is finite." if math.isinf(worst.relative) else ""
    return (
        f"the {'ONNX' if kind == 'onnx' else '.pt2'} artefact differs from the model by more than {bar:.1e}:"
        f" {worst}{which}.{shapes} Nothing was written; tolerance= allows more."
    )


def _engine(kind: Format) -> str:
    return f"onnxruntime {version('onnxruntime')}" if kind == "onnx" else f"torch {torch.__version__}"


def _write(content: Content, exported: Exported) -> None:
    """Write the artefact and what was measured: both are on the disk before either has its name."""
    text = json.dumps(exported.to_dict(), indent=2, ensure_ascii=False) + "\n"
    with replacing(exported.report) as report, replacing(exported.path) as artefact:
        artefact.write_bytes(content.data)
        report.write_text(text, encoding="utf-8")
