"""From a model to the bytes of an artefact: the graph of torch.export, and what is made of it."""

import inspect
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from steadynorm import models
from steadynorm.blame import in_a_line
from steadynorm.deploy.artefact import ONNX_PACKAGES, OUTPUT_NAMES, quiet, require
from steadynorm.errors import InputError
from steadynorm.samples import map_tensors, sample_count, tensors_in

LARGEST_ONNX = 2**31 - 1
"""Bytes of one ONNX file: the limit of its format, protobuf."""
SIZE_IS_FIXED = "onstraints violated"
"""In what torch.export says of a size that it was told to leave free."""
PRIVATE = "stack_trace"
"""Of a node of a graph: lines and paths of the machine where it was made, which nobody else needs to read."""


@dataclass(frozen=True)
class Content:
    """An artefact in memory.

    Args:
        data: what will be in the file.
        opset: of ONNX, else None.
        operators: how many of each kind are in the graph.
    """

    data: bytes
    opset: int | None
    operators: dict[str, int]


def trace(model: nn.Module, batches: Sequence[Any], dynamic_batch: bool) -> Any:
    """The `torch.export.ExportedProgram` of a model; sizes that differ between batches may be any in it.

    Args:
        batches: as ``(inputs,)``.
        dynamic_batch: whether the first size may be any too, where all tensors share it.

    Raises:
        InputError: torch.export cannot follow the model, or a size is fixed in its code.
    """
    example = _example(batches, dynamic_batch)
    args, kwargs = arguments(example)
    shapes = [[tensor.shape for tensor in tensors_in(batch)] for batch in batches]
    if len({tuple(map(len, one)) for one in shapes}) > 1:
        raise InputError("export got batches of different structure: give batches with the same tensors in each.")
    is_shared = dynamic_batch and sample_count(example) is not None
    free: dict[int, dict[int, Any]] = {}
    for tensor, seen in zip(tensors_in(example), zip(*shapes, strict=True), strict=True):
        varied = {dim for dim in range(tensor.dim()) if len({shape[dim] for shape in seen}) > 1}
        varied |= {0} if is_shared and tensor.dim() else set()
        free[id(tensor)] = dict.fromkeys(sorted(varied), torch.export.Dim.DYNAMIC)
    try:
        # Where it fails it prints the whole graph so far.
        with models.undisturbed(model), torch.no_grad(), quiet(), redirect_stderr(io.StringIO()):
            given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
            dynamic = {name: _like(lambda tensor: free[id(tensor)], value) for name, value in given.items()}
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic)
    except Exception as error:
        is_fixed = dynamic_batch and SIZE_IS_FIXED in str(error)
        hint = " Its code fixes a size; if that is the batch's, dynamic_batch=False exports it so." if is_fixed else ""
        raise InputError(f"torch.export cannot follow the model: {in_a_line(error)}.{hint}") from error
    for node in program.graph.nodes:
        node.meta.pop(PRIVATE, None)
    return program


def inputs_only(batch: Any) -> tuple[Any, ...]:
    """A batch as ``(inputs,)``: targets are no part of a graph."""
    return (batch[0],) if isinstance(batch, tuple | list) and batch else (batch,)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, for a batch ``(inputs,)``."""
    inputs = batch[0]
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}


def _example(batches: Sequence[Any], dynamic_batch: bool) -> Any:
    """The batch that is traced: torch.export takes a size of 1 for a constant, so a batch of one sample is doubled."""

    def least(batch: Any) -> int:
        return min((size for tensor in tensors_in(batch) for size in tensor.shape), default=0)

    example = max(batches, key=least)
    if dynamic_batch and sample_count(example) == 1:
        return map_tensors(lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor, example)
    return example


def _like(function: Any, value: Any) -> Any:
    """The nested value with `function` applied to tensors, and None in place of all else."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _like(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_like(function, item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return None


def as_torch(program: Any) -> Content:
    """The bytes of a ``.pt2`` file."""
    stream = io.BytesIO()
    with quiet():
        torch.export.save(program, stream)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return Content(stream.getvalue(), None, dict(Counter(targets)))


def as_onnx(program: Any, outputs: Sequence[str], opset: int | None) -> Content:
    """The bytes of an ``.onnx`` file, weights included.

    Args:
        outputs: where each output is in what the model gives.
        opset: the version of ONNX's operators; None is that of torch's exporter.

    Raises:
        InputError: an operator has no form in ONNX, or the result is none that one file can hold.
    """
    require(*ONNX_PACKAGES)
    inputs = _names(program.graph_signature.input_specs, InputKind.USER_INPUT)
    given = _names(program.graph_signature.output_specs, OutputKind.USER_OUTPUT)
    if len(given) != len(outputs):
        raise InputError(
            f"the model gives {len(outputs)} tensors and its graph {len(given)}: return tensors only from its forward."
        )
    try:
        with quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=inputs,
                output_names=output_names(outputs, inputs),
            )
            assert made is not None
            _name_first_sizes(made)
            proto = made.model_proto
    except Exception as error:
        raise InputError(f"torch.onnx cannot write the model: {in_a_line(_cause(error))}.") from error
    version = next(entry.version for entry in proto.opset_import if not entry.domain)
    if opset is not None and version != opset:
        raise InputError(f"export got opset={opset}, which torch's exporter does not write: it wrote {version}.")
    # A path of the machine where it was made is in the metadata of every node.
    for node in proto.graph.node:
        kept = [entry for entry in node.metadata_props if PRIVATE not in entry.key]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    proto.metadata_props.add(key=OUTPUT_NAMES, value=json.dumps(list(outputs)))
    if proto.ByteSize() > LARGEST_ONNX:
        raise InputError(
            f"the model has {proto.ByteSize() / 1e9:.1f} GB, and one ONNX file can hold 2.1: export to a .pt2 file."
        )
    return Content(proto.SerializeToString(), version, dict(Counter(node.op_type for node in proto.graph.node)))


def _cause(error: BaseException) -> BaseException:
    """What went wrong first: around it torch.onnx puts advice, in colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def output_names(places: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """Names for outputs by their place ("", "logits", "0.1"), different from one another and from the inputs."""
    taken, names = set(inputs), list[str]()
    for place in places:
        wanted = name = place if place[:1].isalpha() else f"output_{place}".rstrip("_")
        number = 1
        while name in taken:
            number += 1
            name = f"{wanted}_{number}"
        taken.add(name)
        names.append(name)
    return names


def _names(specs: Any, kind: Any) -> list[str]:
    return [one.arg.name for one in specs if one.kind == kind and isinstance(one.arg, TensorArgument)]


def _name_first_sizes(made: Any) -> None:
    """Call the first size of the inputs "batch" in place of "s77"."""
    sizes = [entry.shape[0].value for entry in made.model.graph.inputs if entry.shape is not None and entry.shape]
    symbols = {size for size in sizes if isinstance(size, str)}
    if len(symbols) == 1:
        made.rename_axes({symbols.pop(): "batch"})
