"""Normalization within a sample: the largest errors of ours and of torch's against float64, over many seeds.

    python -m benchmarks.sample_errors [--only rms] [--dtypes float32,bfloat16] [--seeds 8] [--largest 1e6] [--out FILE]

The cases of `benchmarks.sample_norm`. An error is of the largest value of the exact result, which float64 makes of the
same inputs; forward y, backward dx, dweight and dbias. Two results that are both rounded once differ by chance in the
largest of their errors, one seed this way, the next the other: so means over seeds are compared.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.sample_norm import OURS, Case, Inputs, cases, eager, ours
from steadynorm import machine
from steadynorm.lab.store import Store
from steadynorm.report import Document, Table, terminal

DTYPES = ("float32", "bfloat16", "float16")


def drawn(case: Case, dtype: torch.dtype, seed: int) -> Inputs:
    """Inputs of a case that are exact in `dtype`."""
    torch.manual_seed(seed)
    inputs = Inputs(case)
    for leaf in inputs.leaves:
        leaf.data = leaf.data.to(dtype).float()
    inputs.cotangents = [t.to(dtype).float() for t in inputs.cotangents]
    return inputs


def largest(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Of every result, the largest error over the largest value."""
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]


def errors(case: Case, dtype: torch.dtype, seeds: int) -> Iterator[dict[str, str | float]]:
    """For y and every gradient: mean errors of ours and of torch's, and in how many seeds ours is larger."""
    mine, theirs = [], []
    for seed in range(seeds):
        inputs = drawn(case, dtype, seed)
        exact = inputs.results(eager(case), torch.float64)
        mine.append(largest(inputs.results(ours(case), dtype), exact))
        theirs.append(largest(inputs.results(eager(case), dtype), exact))
    names = ["y", "dx", "dweight", "dbias"][: len(mine[0])]
    for name, own, other in zip(names, zip(*mine, strict=True), zip(*theirs, strict=True), strict=True):
        larger = sum(a > b for a, b in zip(own, other, strict=True))
        yield {"of": name, "error": statistics.fmean(own), "torch_error": statistics.fmean(other), "larger": larger}


def main() -> None:
    """Compare, write the rows, draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("all", *OURS), default="all")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--largest", type=float, default=math.inf, help="cases of up to so many values")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.jsonl"))
    options = parser.parse_args()
    store, rows = Store(options.out), []
    for case in cases(options.only, False):
        for name in options.dtypes.split(",") if math.prod(case.shape) <= options.largest else ():
            for found in errors(case, getattr(torch, name), options.seeds):
                named = {"family": case.family, "shape": list(case.shape), "layout": case.layout, "dtype": name}
                own = {"benchmark": "sample_errors", **named, **found, "seeds": options.seeds}
                store.append({**own, "machine": machine.describe()})
                ratio = float(found["error"]) / float(found["torch_error"])
                shape = "x".join(map(str, case.shape))
                values = [f"{found[key]:.2e}" for key in ("error", "torch_error")]
                rows.append(
                    (case.family, shape, case.layout, name, found["of"], *values, f"{ratio:.2f}", found["larger"])
                )
    columns = ("norm", "shape", "layout", "dtype", "of", "ours", "torch's", "ratio", "seeds in which ours is larger")
    summary = "Largest error over the largest value, mean over seeds."
    document = Document(
        title="Errors of normalization within a sample against float64",
        summary=summary,
        blocks=(Table("Errors", columns, tuple(rows)),),
        facts=machine.describe(),
    )
    terminal.show(document, Console(width=130))


if __name__ == "__main__":
    main()
