"""What a repair changed, in a file that takes it back bit for bit."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.errors import InputError
from steadynorm.report.files import replacing

VERSION = "1"
MARK, CONTENT = "steadynorm_undo", "content"
Attributes = dict[str, dict[str, Any]]
"""Plain attributes by module path and name: a momentum, a switch."""


@dataclass
class Undo:
    """What a model held before a repair, of all that the repair changed.

    Args:
        tensors: by name, as they were.
        after: by name, a hash of what the repair made of them; "" where it took them out.
        buffers: names of those that were no parameters.
        attributes: as they were.
        changed: the same attributes as they are now, for the one who has to write them into the code.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    attributes: Attributes = field(default_factory=dict)
    changed: Attributes = field(default_factory=dict)


def remembered(model: nn.Module) -> Callable[[], Undo]:
    """A function that says what changed since now."""
    tensors = {name: tensor.detach().clone() for name, tensor in _named(model).items()}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    attributes = _attributes(model)

    def undo() -> Undo:
        now = {name: hash_of(tensor) for name, tensor in _named(model).items()}
        changed = {name: tensor for name, tensor in tensors.items() if now.get(name) != hash_of(tensor)}
        later = _attributes(model)
        found = Undo(changed, {name: now.get(name, "") for name in changed}, [n for n in changed if n in buffers])
        for path, before in attributes.items():
            different = {key for key in before if later.get(path, {}).get(key, before[key]) != before[key]}
            if different:
                found.attributes[path] = {key: before[key] for key in different}
                found.changed[path] = {key: later[path][key] for key in different}
        return found

    return undo


def write(undo: Undo, file: Path) -> None:
    """Write an undo file, whole or not at all.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    content = {"after": undo.after, "buffers": undo.buffers, "attributes": undo.attributes, "changed": undo.changed}
    tensors = {name: tensor.clone().contiguous().cpu() for name, tensor in undo.tensors.items()}
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata={MARK: VERSION, CONTENT: json.dumps(content)})


def read(file: Path) -> Undo:
    """The content of an undo file.

    Raises:
        InputError: it is not there, or no undo file.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InputError(f"there is no undo file {file}: doctor --fix FILE --undo FILE writes one.")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read as an undo file: {' '.join(str(error).split())}.") from error
    if metadata.get(MARK) != VERSION:
        raise InputError(f"{file} is no undo file of version {VERSION}: give the one that doctor --undo wrote.")
    return Undo(tensors, **json.loads(metadata[CONTENT]))


def undo_(model: nn.Module, file: str | Path) -> tuple[str, ...]:
    """Take a repair back in place, from the file that `repair` wrote; names of what is as it was again.

    Raises:
        InputError: the file cannot be used, or the model is not as the repair left it; nothing is changed then.
    """
    undo = read(Path(file))
    current = _named(model)
    _ensure_as_left(undo, {name: hash_of(tensor) for name, tensor in current.items()}, "the model")
    for path in undo.attributes:
        _module(model, path, "the model")
    with torch.no_grad():
        for name, tensor in undo.tensors.items():
            _put(model, name, tensor, current.get(name), name in undo.buffers)
    for path, attributes in undo.attributes.items():
        for key, value in attributes.items():
            setattr(model.get_submodule(path), key, value)
    return (*undo.tensors, *(f"{path}.{key}" for path, found in undo.attributes.items() for key in found))


def undone(state: Mapping[str, Tensor], undo: Undo, name: str) -> dict[str, Tensor]:
    """The weights `state` of a repaired model as they were before; `name` is what errors call them.

    A tensor that the repair took out stands as zeros in weights for the recipe's model.

    Raises:
        InputError: the weights are not as the repair left them.
    """
    hashes = {key: hash_of(tensor) for key, tensor in state.items()}
    for key, tensor in undo.tensors.items():
        if undo.after[key] == "" and hashes.get(key) == hash_of(torch.zeros_like(tensor)):
            hashes.pop(key)
    _ensure_as_left(undo, hashes, name)
    return {**state, **undo.tensors}


def hash_of(tensor: Tensor) -> str:
    """Of the bits of a tensor, its dtype and its shape."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


def _named(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def _attributes(model: nn.Module) -> Attributes:
    plain = bool | int | float | str | None
    return {
        path: {k: v for k, v in vars(module).items() if isinstance(v, plain) and not k.startswith("_")}
        for path, module in model.named_modules()
    }


def _ensure_as_left(undo: Undo, hashes: Mapping[str, str], what: str) -> None:
    different = [name for name, left in undo.after.items() if hashes.get(name, "") != left]
    if different:
        raise InputError(
            f"{what} is not as the repair left it ({', '.join(different[:3])}{', …' if len(different) > 3 else ''}): "
            "an undo file takes back the repair that it was written for, before anything else is changed."
        )


def _module(model: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"{what} has no module {path}: give the model that was repaired.") from error


def _put(model: nn.Module, name: str, tensor: Tensor, current: Tensor | None, is_buffer: bool) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if current is not None and current.dtype == tensor.dtype and current.shape == tensor.shape:
        current.copy_(tensor)
    elif current is not None:
        current.data = tensor.to(current.device)
    elif is_buffer:
        module.register_buffer(key, tensor)
    else:
        module.register_parameter(key, nn.Parameter(tensor))
