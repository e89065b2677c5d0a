"""Is a model ready to be exported? Nothing in it may use, or move, the statistics of the batch that it is given."""

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from steadynorm import models
from steadynorm.errors import InputError
from steadynorm.training.evaluation import unwrapped

LISTED = 3
BATCH_STATISTICS = "aten.batch_norm.default"
TRAINING_ARGUMENT = 5
"""Of aten.batch_norm(input, weight, bias, running_mean, running_var, training, ...)."""
OURS = "steadynorm"


def require_evaluation(model: nn.Module) -> None:
    """Raise InputError for a wrapped model, one in training mode, or a norm that uses its batch in evaluation too."""
    if unwrapped(model) is not model:
        raise InputError(f"export got a {type(model).__name__}: give the model inside of it.")
    if missing := models.unmade_parts(model):
        raise InputError(f"export found parameters without values ({listed(missing)}): run a batch through the model.")
    training = {path: module for path, module in model.named_modules() if module.training}
    if training:
        of_effect = [path for path, module in training.items() if _minds_the_mode(module)]
        raise InputError(
            f"export found modules in training mode ({listed(of_effect or list(training))}): call model.eval() first."
        )
    dependent = [path for path, module in model.named_modules() if models.uses_batch_statistics(module)]
    if dependent:
        raise InputError(_depends(dependent))


def require_constant_statistics(program: Any) -> None:
    """Raise InputError where the graph of a program normalizes by its batch, in whatever code that was written.

    Args:
        program: a `torch.export.ExportedProgram`.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    dependent = [_path(node) for node in nodes if str(node.target) == BATCH_STATISTICS and _is_training(node)]
    if dependent:
        raise InputError(_depends(list(dict.fromkeys(dependent))))
    ours = [_path(node) for node in nodes if str(node.target).startswith(f"{OURS}.")]
    if ours:
        raise InputError(
            f"export found operators of steadynorm in the graph ({listed(ours)}), which no other engine has: call the"
            " layer in place of the function."
        )


def listed(paths: list[str]) -> str:
    """The first few paths; the rest are counted."""
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(path or "the model itself" for path in paths[:LISTED]) + more


def _depends(paths: list[str]) -> str:
    one = len(paths) == 1
    return (
        f"{listed(paths)} {'normalizes' if one else 'normalize'} by the statistics of the batch in evaluation too, so"
        " that what the model says of a sample hangs on its neighbours: give it running statistics, or a norm within"
        " the sample."
    )


def _minds_the_mode(module: nn.Module) -> bool:
    return models.norm_kind(module) is not None or isinstance(module, _DropoutNd)


def _is_training(node: Any) -> bool:
    return len(node.args) > TRAINING_ARGUMENT and node.args[TRAINING_ARGUMENT] is True


def _path(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""
