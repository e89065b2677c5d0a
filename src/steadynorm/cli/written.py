"""What commands write beside their report: weights; and which files are possible at all, found before the work."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from steadynorm.cli.output import writing
from steadynorm.deploy.artefact import FORMATS
from steadynorm.deploy.exported import REPORT_SUFFIX
from steadynorm.errors import InputError
from steadynorm.report import ensure_writable
from steadynorm.report.files import replacing
from steadynorm.weights import SUFFIXES as WEIGHTS

__all__ = ["ARTEFACTS", "WEIGHTS", "ensure_possible", "write_weights"]

ARTEFACTS = tuple(FORMATS)


def ensure_possible(command: str, path: Path | None, suffixes: Sequence[str], why: str = "") -> Path:
    """The file of `--out`, found to be given, of a kind that the command writes, and possible to write.

    Args:
        why: for a known kind that this command does not write.

    Raises:
        InputError: it is none of that.
    """
    kinds = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
    if path is None:
        raise InputError(f"{command} got no --out: expected the file to write, which ends in {kinds}.")
    if path.suffix not in suffixes:
        known = f"{why}; " if why and path.suffix in WEIGHTS else ""
        raise InputError(f"{command} got --out {path}: {known}expected a file that ends in {kinds}.")
    for one in (path, *([path.with_name(path.name + REPORT_SUFFIX)] if path.suffix in ARTEFACTS else [])):
        with writing(one):
            ensure_writable(one)
    return path


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write the tensors of a state_dict as safetensors, or by torch.save, whole or not at all."""
    # Copies: safetensors refuses tensors that share memory, and tied weights do.
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    with writing(path), replacing(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(whole, temporary)
        else:
            torch.save(whole, temporary)
