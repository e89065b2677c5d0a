"""Weight files, read without running any code that they may hold."""

import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.errors import InputError

SUFFIXES = (".safetensors", ".pt", ".pth")

# Where training scripts put the weights inside a checkpoint, and what wrappers put before each name.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

# The buffers in which layers keep running statistics.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

KEYS_SHOWN = 3


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a ``.pt`` or ``.pth`` one opened with ``weights_only=True``.

    A checkpoint that holds the weights under ``state_dict`` or ``model`` is unpacked, and the prefixes that
    DistributedDataParallel and ``torch.compile`` put before every name are taken off.

    Raises:
        InputError: the file is missing, of another kind, broken, or holds more than tensors.
    """
    if not path.is_file():
        raise InputError(f"there is no weights file {path}: give a {_kinds()} file.")
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path} is refused: of the files that hold weights only {_kinds()} can be opened without running code "
            "that may be inside; save with torch.save(model.state_dict(), 'weights.pt')."
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    return _without_wrapping(_tensors(content, path))


def unpacked(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, see `read_weights`, or of a state_dict or checkpoint that is in memory, unwrapped alike.

    Raises:
        InputError: a file cannot be used, or there are no names and tensors.
    """
    if isinstance(checkpoint, Mapping):
        return _without_wrapping(_tensors(checkpoint, "the checkpoint"))
    return read_weights(Path(checkpoint))


def wrapping(names: Collection[str]) -> str:
    """What wrappers put before every one of `names`."""
    for prefix in WRAPPER_PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return prefix + wrapping([name.removeprefix(prefix) for name in names])
    return ""


def weights_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    may_lack_statistics: bool = False,
    may_hold_more: bool = False,
) -> None:
    """Load `state` into `model`, every key and shape of it.

    Args:
        may_lack_statistics: running statistics may be missing, for whoever says so or takes them anew; parameters may
            not.
        may_hold_more: names that the model does not have may be left over, for whoever looks in order to say so.

    Raises:
        InputError: the names or shapes do not fit; the message has the first few.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    if may_lack_statistics:
        missing = [key for key in missing if key.rpartition(".")[2] not in STATISTICS]
    if may_hold_more:
        unknown = []
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and isinstance(own[key], Tensor) and own[key].shape != state[key].shape
    ]
    faults = [
        f"{label} {first_few(keys)}"
        for label, keys in (("missing:", missing), ("not in the model:", unknown), ("of another shape:", shapes))
        if keys
    ]
    if faults:
        advice = "give weights that were saved from the same model"
        if not unknown and not shapes and all(key.rpartition(".")[2] in STATISTICS for key in missing):
            advice = (
                "they lack running statistics alone: steadynorm doctor says what that costs, and steadynorm recalibrate"
                " takes them from the data"
            )
        raise InputError(f"the weights in {source} do not fit the recipe's model: {'; '.join(faults)}; {advice}.")
    try:
        model.load_state_dict(dict(state), strict=not (may_lack_statistics or may_hold_more))
    except RuntimeError as error:  # shapes of lazy modules, or a hook of the model's own
        raise InputError(f"the weights in {source} do not fit the recipe's model: {_in_a_line(error)}.") from error


def _kinds() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def first_few(keys: list[str]) -> str:
    """Some names, and how many more there are."""
    rest = len(keys) - KEYS_SHOWN
    return ", ".join(keys[:KEYS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs safetensors, the extra [cli]: pip install safetensors.") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {_in_a_line(error)}.") from error


def _read_pt(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # of pickle protocols other than its own: what cannot be read is refused below, in our words
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it holds more than tensors, and opening it could run code that is inside; "
            "save only the weights with torch.save(model.state_dict(), 'weights.pt')."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as weights: {_in_a_line(error)}.") from error


def _tensors(content: Any, path: Path | str) -> dict[str, Tensor]:
    """The mapping of names to tensors inside `content`, or inside one of the usual keys of a checkpoint."""
    for mapping in _mappings(content):
        if mapping and all(isinstance(value, Tensor) for value in mapping.values()):
            return {str(key): value for key, value in mapping.items()}
    raise InputError(
        f"{path} holds {_held(content)}: expected a state_dict, names and tensors, "
        f"at the top or under {' or '.join(CHECKPOINT_KEYS)}."
    )


def _mappings(content: Any) -> Iterator[Mapping[Any, Any]]:
    if isinstance(content, Mapping):
        yield content
        for key in CHECKPOINT_KEYS:
            if isinstance(content.get(key), Mapping):
                yield content[key]


def _held(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"the keys {first_few([str(key) for key in content])}" if content else "nothing"
    return type(content).__name__


def _without_wrapping(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = wrapping(state)
    return {key.removeprefix(prefix): value for key, value in state.items()}
