"""What an export made and measured: the value that `export` returns, and the JSON that lies beside the artefact."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steadynorm.deploy.artefact import Format
from steadynorm.deploy.batch_sizes import Invariance
from steadynorm.deploy.difference import OutputDifference, default_tolerance

SCHEMA_VERSION = 1
REPORT_SUFFIX = ".json"


@dataclass(frozen=True, repr=False)
class Exported:
    """An artefact on disk and what was measured on it; printed, it is a short report.

    Args:
        path: of the artefact. Beside it, with ".json" added to its name, all of this as data.
        format: "onnx" or "torch".
        engine: what ran it, with its version.
        opset: of ONNX, else None.
        size: in bytes.
        sha256: of its content, so that the report says which file it speaks of.
        operators: how many of each kind are in its graph.
        outputs: how far it is from the model, over the example batches and then those of `batch_sizes`, which is how
            `batch` counts.
        batches: how many example batches there were.
        batch_sizes: at which it was run besides.
        invariance: whether a sample's output depends on its batch; None where that could not be seen.
        tolerance: what the relative differences were held to; None is that of each dtype.
        machine: where this was measured.
    """

    path: Path
    format: Format
    engine: str
    opset: int | None
    size: int
    sha256: str
    operators: dict[str, int]
    outputs: tuple[OutputDifference, ...]
    batches: int
    batch_sizes: tuple[int, ...]
    invariance: Invariance | None
    tolerance: float | None
    machine: dict[str, str]

    @property
    def report(self) -> Path:
        """The JSON beside the artefact."""
        return self.path.with_name(self.path.name + REPORT_SUFFIX)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that can be written as JSON."""
        entries = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        invariance = self.invariance
        return (
            {"schema_version": SCHEMA_VERSION}
            | entries
            | {
                "path": self.path.name,
                "outputs": [output_to_dict(output, self.tolerance) for output in self.outputs],
                "batch_sizes": list(self.batch_sizes),
                "invariance": invariance and {**dataclasses.asdict(invariance), "holds": invariance.holds},
            }
        )

    def __repr__(self) -> str:
        kind = f"ONNX, opset {self.opset}" if self.opset is not None else "torch.export"
        count = sum(self.operators.values())
        lines = [f"exported to {self.path} ({kind}, {self.size / 1e6:.2f} MB, {count} operators)"]
        lines += [f"  {self.engine}: {output}" for output in self.outputs]
        ran = f"run with {self.batches} batch{'es' if self.batches != 1 else ''}"
        sizes = ", ".join(map(str, self.batch_sizes))
        lines.append(f"  {ran}, and with {sizes} samples" if sizes else f"  {ran}")
        lines += [f"  {self.invariance}"] if self.invariance is not None else []
        return "\n".join(lines)


def output_to_dict(output: OutputDifference, tolerance: float | None) -> dict[str, Any]:
    """One measured difference as plain data, with what it was held to."""
    bar = default_tolerance(output.dtype) if tolerance is None else tolerance
    dtype = str(output.dtype).removeprefix("torch.")
    return {**dataclasses.asdict(output), "dtype": dtype, "tolerance": bar}
