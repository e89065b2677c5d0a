"""Compiled programs in place of modules: they cannot be watched, but what they were compiled to do can be read."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from steadynorm.probe.training_facts import Program

# Position of the flag among the arguments, by the last part of the name of torch's batch norms.
FLAGS = {
    "batch_norm": 5,
    "native_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "_native_batch_norm_legit_functional": 5,
}
ALWAYS = ("_batch_norm_with_update", "_batch_norm_with_update_functional")


def programs(model: nn.Module) -> tuple[Program, ...]:
    """The outermost programs of torch.jit and torch.export in `model`, and the batch norms in them that train."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        is_inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if not is_inside and (isinstance(module, torch.jit.ScriptModule) or _is_exported(module)):
            found[path] = module
    return tuple(
        Program(path, "torch.jit" if isinstance(module, torch.jit.ScriptModule) else "torch.export", *_training(module))
        for path, module in found.items()
    )


def _is_exported(module: nn.Module) -> bool:
    """Whether a graph came from torch.export: its modes are fixed, and it says so by a train() of its own."""
    return isinstance(module, fx.GraphModule) and "train" in vars(module)


def _training(module: nn.Module) -> tuple[tuple[str, ...], bool]:
    if isinstance(module, fx.GraphModule):
        nodes = [node for node in module.graph.nodes if node.op == "call_function" and _is_trained(node)]
        return tuple(_module_of(node) for node in nodes), True
    graph: Any = module.inlined_graph
    found, asks_mode = [], False
    for node in graph.findAllNodes("aten::batch_norm"):
        flag = list(node.inputs())[5].toIValue()
        if flag is True or (flag is None and module.training):
            scope = node.scopeName().rpartition("/")[2].removeprefix("__module").removeprefix(".")
            found.append(scope)
            asks_mode = asks_mode or flag is None
    return tuple(found), not asks_mode


def _is_trained(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    if name in ALWAYS:
        return True
    place = FLAGS.get(name)
    return place is not None and len(node.args) > place and node.args[place] is True


def _module_of(node: fx.Node) -> str:
    def stack() -> Iterator[str]:
        for entry in node.meta.get("nn_module_stack", {}).values():
            yield str(entry[0]).removeprefix("L['self']").lstrip(".")

    return next(iter(list(stack())[-1:]), node.name)
