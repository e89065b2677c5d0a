"""How many batch norms of real architectures are folded: by steadynorm, and by other tools on the same models.

    python -m benchmarks.fold [--only TEXT] [--out FILE] [--markdown]

The models are those of tests/deploy/architectures.py. A fold counts where the outputs stay within sqrt(machine epsilon)
of the model's on all batches; a tool that gives something else on any of them, or raises, has folded nothing.
"""

import argparse
import contextlib
import copy
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.fx.experimental import optimization

from steadynorm import deploy, machine, models
from steadynorm.deploy.difference import compare, run
from steadynorm.lab.store import Store
from steadynorm.report import Document, Table, terminal
from steadynorm.training.evaluation import call
from tests.deploy.architectures import ARCHITECTURES, made

Pairs = Sequence[tuple[str, str]]
COLUMNS = ("architecture", "norms", "folded", "float32", "float64", "torch.fx", "torch.ao", "torchao", "torch.jit")
WITHIN = "it normalises within the sample"


def fx_fuse(model: nn.Module, batches: list[Any], pairs: Pairs) -> tuple[nn.Module, int]:
    """torch.fx.experimental.optimization.fuse."""
    fused = optimization.fuse(model)
    return fused, norms_in(model) - norms_in(fused)


def ao_fuse(model: nn.Module, batches: list[Any], pairs: Pairs) -> tuple[nn.Module, int]:
    """torch.ao.quantization.fuse_modules, which has to be told the pairs: those that steadynorm found."""
    fused, count = copy.deepcopy(model), 0
    for layer, norm in pairs:
        # Unknown classes and attributes: it takes exact types only.
        with contextlib.suppress(Exception):
            torch.ao.quantization.fuse_modules(fused, [layer, norm], inplace=True)
            count += 1
    return fused, count


def pt2e(model: nn.Module, batches: list[Any], pairs: Pairs) -> tuple[nn.Module, int]:
    """The graph passes that torchao runs before static quantization, on an exported program."""
    from torchao.quantization.pt2e import utils

    args, kwargs = ((), batches[0]) if isinstance(batches[0], dict) else ((batches[0],), {})
    graph: Any = torch.export.export(model, args, kwargs).module()

    def count() -> int:
        return sum(n.op == "call_function" and "batch_norm" in str(n.target) for n in graph.graph.nodes)

    before = count()
    utils._fuse_conv_bn_(graph)
    utils._fuse_linear_bn_(graph)
    return graph, before - count()


def jit(model: nn.Module, batches: list[Any], pairs: Pairs) -> tuple[nn.Module, int]:
    """torch.jit.trace, freeze and optimize_for_inference."""
    options = {"example_kwarg_inputs": batches[0]} if isinstance(batches[0], dict) else {"example_inputs": batches[0]}
    traced: Any = torch.jit.trace(model, **options, strict=False, check_trace=False)
    optimized: Any = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    count = str(optimized.inlined_graph).count("batch_norm(")
    return optimized, str(traced.inlined_graph).count("batch_norm(") - count


PEERS: dict[str, Callable[..., tuple[nn.Module, int]]] = {
    "torch.fx": fx_fuse,
    "torch.ao": ao_fuse,
    "torchao": pt2e,
    "torch.jit": jit,
}


def norms_in(model: nn.Module) -> int:
    """Batch norms of torch in a model."""
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def of_peer(name: str, model: nn.Module, batches: list[Any], pairs: Pairs) -> dict[str, Any]:
    """How many norms a tool folded, and how far its result is off; why it folded nothing."""
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            fused, count = PEERS[name](copy.deepcopy(model), batches, pairs)
            difference = farthest(model, fused, batches)
    except Exception as error:
        return {"folded": 0, "error": f"{type(error).__name__}: {error}"[:200]}
    is_right = difference <= deploy.default_tolerance(torch.float32)
    return {"folded": count if is_right else 0, "claimed": count, "difference": min(difference, 1e30)}


def farthest(model: nn.Module, other: nn.Module, batches: list[Any]) -> float:
    """The largest relative difference of an output; traced models name their outputs otherwise, so they go by order."""
    if not isinstance(other, torch.jit.ScriptModule):
        return max(one.relative for one in compare(model, other, batches, call))
    worst = 0.0
    for batch in batches:
        ours = [t for _, t in deploy.difference.named_tensors(run(model, batch, call))]
        theirs = [t for _, t in deploy.difference.named_tensors(run(other, batch, call))]
        worst = max([worst, *(float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, theirs, strict=True))])
    return worst


def measure(name: str) -> dict[str, Any]:
    """One row: what was folded, what was left and why, and what the others made of it."""
    model, batches = made(name)
    change = deploy.fold(model, batches)
    folds = [one for one in change.log if one.after.startswith("folded")]
    pairs = [(one.after.rpartition(" ")[2], path) for one in folds for path in one.paths if "forward" not in one.after]
    left = Counter(general(reason) for reason in change.left.values())
    return {
        "architecture": name,
        "norms": sum(models.norm_kind(one) in ("batch", "sync", "frozen") for one in model.modules()),
        "within the sample": sum(count for reason, count in left.items() if reason.startswith(WITHIN)),
        "folded": len(folds),
        "left": {reason: count for reason, count in left.items() if not reason.startswith(WITHIN)},
        "float32": max(one.relative for one in change.difference.outputs),
        "float64": max(one.relative for one in change.difference.float64),
        "peers": {peer: of_peer(peer, model, batches, pairs) for peer in PEERS},
    }


def general(reason: str) -> str:
    """A reason without the names of this model."""
    return re.sub(r"\b[\w]+(\.[\w]+)+\b", "…", reason)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    peers = [row["peers"][name] for name in PEERS]
    shown = [
        "error" if "error" in one else "wrong" if one["folded"] < one["claimed"] else str(one["folded"])
        for one in peers
    ]
    numbers = (str(row["norms"]), str(row["folded"]), f"{row['float32']:.0e}", f"{row['float64']:.0e}")
    return (row["architecture"], *numbers, *shown)


def main() -> None:
    """Measure, write the rows, draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.jsonl"))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    store, rows = Store(options.out), []
    for name in ARCHITECTURES:
        if options.only.lower() in name.lower():
            rows.append(measure(name))
            store.append({"benchmark": "fold", **rows[-1], "machine": machine.describe()})
    lines = [cells(row) for row in rows]
    if options.markdown:
        print("\n".join("| " + " | ".join(line) + " |" for line in (COLUMNS, ("---",) * len(COLUMNS), *lines)))
        return
    title, summary = "Batch norms folded", "wrong: the outputs are not those of the model; error: the tool raised."
    table = Table("By architecture", COLUMNS, tuple(lines))
    terminal.show(Document(title=title, summary=summary, blocks=(table,), facts=machine.describe()), Console(width=130))


if __name__ == "__main__":
    main()
