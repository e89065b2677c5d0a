"""quantize: a model in 8-bit integers by PyTorch's own static path (PT2E), and how far that is from it."""

import importlib
import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.blame import in_a_line
from steadynorm.deploy import ready
from steadynorm.deploy.artefact import quiet
from steadynorm.deploy.difference import OutputDifference, compare, distances, named_tensors, run
from steadynorm.deploy.program import inputs_only, trace
from steadynorm.errors import DifferenceError, InputError
from steadynorm.training.evaluation import call, evaluation

INT8 = "quantized_decomposed."
LAYERS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv_transpose", "aten.linear")


@dataclass(frozen=True, repr=False)
class Quantized:
    """A model in 8-bit integers; printed, it is a short report.

    Args:
        model: a graph of PyTorch in which values are rounded to the integers they would be; `torch.compile` and
            `export` make integer kernels of it. It takes what the model took.
        outputs: how far each output is from the model's, at the worst place.
        noise: of each output by its name, sqrt(Σ |int8 − model|² / Σ |model|²).
        layers: convolutions and linear layers whose weights are integers, and how many there are.
    """

    model: nn.Module
    outputs: tuple[OutputDifference, ...]
    noise: dict[str, float]
    layers: tuple[int, int]

    def __repr__(self) -> str:
        lines = [f"{self.layers[0]} of {self.layers[1]} convolutions and linear layers in int8"]
        lines += [f"  {output}, noise {self.noise[output.name]:.1e}" for output in self.outputs]
        return "\n".join(lines)


def quantize(
    model: nn.Module, batches: Iterable[Any], *, reduce_range: bool = False, tolerance: float | None = None
) -> Quantized:
    """A copy of `model` with static int8 activations and weights, calibrated and measured on `batches`.

    By torchao's PT2E with its quantizer for CPUs: activations in uint8 with one scale each, weights in int8 with one
    for each output channel. Fold first: a batch norm that still stands is folded here too, but without a proof.

    Args:
        model: in evaluation mode; it is not changed.
        batches: examples, tensors, tuples that begin with the input, or dictionaries of arguments.
        reduce_range: 7 bits for activations. Processors without VNNI instructions add products of 8 bits in 16, which
            overflows without a word: onnxruntime then gives wrong numbers (21 % off where 2 % are meant).
        tolerance: the largest relative difference of an output; none by default, since rounding is meant here.

    Raises:
        InputError: a model that is not ready, or that cannot be exported or quantized.
        DifferenceError: over the tolerance.
        ImportError: torchao is not installed.
    """
    ready.require_evaluation(model)
    given = [inputs_only(batch) for batch in batches]
    if not given:
        raise InputError("quantize got no batch: give examples, from which the scales are taken.")
    prepare, convert, quantizer = _torchao(reduce_range)
    program = trace(model, given, dynamic_batch=True)
    ready.require_constant_statistics(program)
    try:
        with quiet(), torch.no_grad():
            observed = prepare(program.module(), quantizer)
            for batch in given:
                run(observed, batch, call)
            made = convert(observed)
    except Exception as error:
        raise InputError(f"torchao cannot quantize the model: {in_a_line(error)}.") from error
    for module in made.modules():  # a graph has no train() or eval(), and begins as training
        module.training = False
    with evaluation(model, ()):
        outputs = compare(model, made, given, call)
        noise = _noise(model, made, given)
    over = [output for output in outputs if tolerance is not None and not output.is_within(tolerance)]
    if over:
        raise DifferenceError(f"int8 differs from the model by more than {tolerance:.1e}: {over[0]}.")
    return Quantized(made, outputs, noise, _layers(made))


def _torchao(reduce_range: bool) -> tuple[Any, Any, Any]:
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("int8 needs torchao, not installed here: pip install torchao.")
    with quiet():
        steps = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
        x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=reduce_range))
    return steps.prepare_pt2e, steps.convert_pt2e, quantizer


def _noise(model: nn.Module, made: nn.Module, batches: Sequence[Any]) -> dict[str, float]:
    squares: dict[str, list[float]] = {}
    for batch in batches:
        others = dict(named_tensors(run(made, batch, call)))
        for name, tensor in named_tensors(run(model, batch, call)):
            sums = squares.setdefault(name, [0.0, 0.0])
            sums[0] += _squared(distances(tensor, others[name]))
            sums[1] += _squared(tensor)
    return {name: math.sqrt(error / size) if size else float(error > 0) for name, (error, size) in squares.items()}


def _squared(tensor: Tensor) -> float:
    return float(tensor.abs().double().square().sum())


def _layers(graph: Any) -> tuple[int, int]:
    """Layers whose weight comes from integers, and all of them."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and str(n.target).startswith(LAYERS)]
    weights = [str(node.args[1].target) for node in nodes]
    return sum(target.startswith(INT8) for target in weights), len(nodes)
