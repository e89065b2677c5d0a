"""Which normalizations a model has, under which paths, and which are out of reach."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from steadynorm import models
from steadynorm.convert.classes import is_ours
from steadynorm.convert.targets import EARLIER, Rule
from steadynorm.errors import InputError
from steadynorm.layers.weight.target import own_class

# Of a module: what named_modules has been through, and hooks, which belong to no model.
PLACES = {name for name in vars(nn.Module()) if name.startswith("_")}
UNSEEN = "not among the modules of the model, where .to() and state_dict() would see it"


def norms(model: nn.Module, also: tuple[type[nn.Module], ...] = ()) -> list[tuple[str, nn.Module]]:
    """The normalizations of torch.nn's family and ours, and what is one of `also`, under every path to them."""
    named = model.named_modules(remove_duplicate=False)
    return [(path, one) for path, one in named if is_norm(one) or isinstance(one, also)]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization of torch.nn's family or ours, a frozen one of another library, or was one."""
    # Statistics by domain or step, which are ours, are of no one kind.
    return models.norm_kind(module) is not None or is_ours(own_class(module)) or EARLIER in vars(module)


def paths(model: nn.Module) -> dict[int, list[str]]:
    """All paths of every module, by its id."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


def unseen(model: nn.Module, rule: Rule, known: dict[int, list[str]]) -> dict[str, str]:
    """What the rule would change if it were one of the model's modules: held in a plain list, dict or attribute."""
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in PLACES:
                continue
            for where, held in _held(value, ".".join(filter(None, (path, name))), set()):
                left |= {
                    ".".join(filter(None, (where, inner))): UNSEEN
                    for inner, norm in held.named_modules()
                    if id(norm) not in known and is_norm(norm) and _applies(rule, norm)
                }
    return left


def _held(value: Any, where: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a plain attribute, also inside of lists, tuples, sets and dicts."""
    if isinstance(value, nn.Module):
        yield where, value
    elif isinstance(value, list | tuple | set | frozenset | dict) and id(value) not in seen:
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _held(item, f"{where}[{key!r}]", seen)


def _applies(rule: Rule, norm: nn.Module) -> bool:
    try:
        return rule(norm) is not None
    except InputError:
        return True
