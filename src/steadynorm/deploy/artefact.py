"""Exported models as modules: an artefact, run by the engine that it is for, is compared like any other model."""

import importlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.blame import in_a_line
from steadynorm.errors import InputError
from steadynorm.samples import tensors_in

Format = Literal["onnx", "torch"]
FORMATS: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch"}
"""By suffix: ONNX, run by onnxruntime; a program of torch.export, run by PyTorch."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LOGGERS = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "torch.utils", "torchao", "onnxscript", "onnx_ir")
OUTPUT_NAMES = "steadynorm.outputs"
"""In the metadata of an ONNX file: where each output is in what the model gives."""


def format_of(path: Path) -> Format:
    """What a file is, by its suffix.

    Raises:
        InputError: neither of the two.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path} is no format to export to: expected a file that ends in {' or '.join(FORMATS)}.")
    return FORMATS[path.suffix]


def load(path: str | Path) -> nn.Module:
    """An exported model as a module that takes what the model took: for `verify`, or to be run.

    Args:
        path: an ``.onnx`` file, run by onnxruntime, or a ``.pt2`` file. PyTorch may run code that is inside of a
            ``.pt2`` file: open those that you trust.

    Raises:
        InputError: the file is missing or broken, or the engine cannot run it.
        ImportError: onnxruntime is not installed.
    """
    path = Path(path)
    kind = format_of(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: give one that was exported.")
    try:
        return from_bytes(path.read_bytes(), kind)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def from_bytes(content: bytes, kind: Format) -> nn.Module:
    """The module of an artefact in memory."""
    if kind == "onnx":
        return OnnxModel(content)
    try:
        with quiet():
            return torch.export.load(io.BytesIO(content)).module()
    except Exception as error:
        raise InputError(f"torch.export.load cannot read it: {in_a_line(error)}.") from error


class OnnxModel(nn.Module):
    """An ONNX model in onnxruntime on the CPU; tensors in, a dictionary of tensors by their place in the output."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        require("onnxruntime")
        onnxruntime: Any = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that wait for work by spinning would take the processor from PyTorch's, in between two runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(f"onnxruntime cannot run it: {_first_line(error)}.") from error
        self.input_names = [entry.name for entry in self.session.get_inputs()]
        named = self.session.get_modelmeta().custom_metadata_map.get(OUTPUT_NAMES)
        names = [entry.name for entry in self.session.get_outputs()]
        self.output_names: list[str] = json.loads(named) if named else names if len(names) > 1 else [""]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What the model gives for these tensors, arguments by their order or by the names in the file."""
        if kwargs and set(kwargs) <= set(self.input_names) and not args:
            given = {name: tensor for name, tensor in kwargs.items() if isinstance(tensor, Tensor)}
        else:
            tensors = [*tensors_in(args), *tensors_in(kwargs)]
            if len(tensors) != len(self.input_names):
                names = ", ".join(self.input_names)
                raise InputError(f"the ONNX model takes {len(self.input_names)} tensors ({names}), got {len(tensors)}.")
            given = dict(zip(self.input_names, tensors, strict=True))
        try:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
            found = self.session.run(None, arrays)
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
            raise InputError(f"onnxruntime stopped at {shapes}: {_first_line(error)}.") from error
        device = next((tensor.device for tensor in given.values()), torch.device("cpu"))
        # A copy: onnxruntime may own the memory, and a 0-dimensional output is no array.
        tensors = [torch.from_numpy(np.array(value)).to(device) for value in found]
        return dict(zip(self.output_names, tensors, strict=True))


def require(*packages: str) -> None:
    """Raise ImportError where one of the packages that ONNX needs is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX needs {', '.join(missing)}, not installed here: pip install {' '.join(missing)}.")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of exporters: on their own deprecated calls, on what else could be installed, and tracebacks
    of errors that they pass over. What stops them is raised.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
