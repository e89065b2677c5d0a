"""Write the README's speed table from measured rows: python -m benchmarks.readme benchmarks/results/FILE.jsonl."""

import sys
from pathlib import Path
from typing import Any

from benchmarks.batch_norm import Case
from benchmarks.interleaved import geometric_mean, ratio
from steadynorm.lab.store import Store

README = Path("README.md")
START, END = "<!-- speed -->", "<!-- /speed -->"
FAMILIES = {"resnet": "ResNet-50, batch 8 and 32", "unet": "U-Net", "mlp": "MLP"}
LAYOUTS = {"nchw": "plain", "nhwc": "channels-last", "rows": "(N, C)"}


def over_floor(row: dict[str, Any]) -> float:
    """Our time, forward and backward, over a copy of the bytes that must move."""
    case = Case(row["family"], tuple(row["shape"]), row["layout"], row["residual"])
    floor = row["copy"] / 2 * (case.forward_passes + case.backward_passes)
    return float((row["ours_forward"] + row["ours_backward"]) / floor)


def table(rows: list[dict[str, Any]]) -> str:
    """A line per family, layout and memory setting, and what they were measured on."""
    lines = [
        "| shapes | memory order | freed memory | over torch eager: mean, least, most | over the floor: mean, most |",
        "|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["family"], r["layout"], r["memory"]) for r in rows):
        these = [r for r in rows if (r["family"], r["layout"], r["memory"]) == key]
        eager, floor = [ratio(r, "eager") for r in these], [over_floor(r) for r in these]
        means = f"{geometric_mean(eager):.2f}, {min(eager):.2f}, {max(eager):.2f}"
        floors = f"{geometric_mean(floor):.2f}, {max(floor):.2f}"
        lines.append(f"| {FAMILIES[key[0]]} | {LAYOUTS[key[1]]} | {key[2]} | {means} | {floors} |")
    machine = rows[-1]["machine"]
    about = ", ".join(machine[name] for name in ("cpu", "system")) + f", {machine['threads']} threads"
    return "\n".join([*lines, "", f"Measured on {about}, torch {machine['torch']}, commit {machine['commit']}."])


def main() -> None:
    """Put the table of the named file between the README's markers."""
    text = README.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    words = (
        "## Speed\n\nBatchNorm + ReLU, with and without a residual, training, float32, forward and backward together,"
        " interleaved\nwith torch eager in one process. Above 1, ours is faster; the floor is a copy of the bytes that"
        " must move. `make bench`\nmeasures it where you are, with torch.compile beside it.\n\n"
    )
    README.write_text(f"{before}{START}\n{words}{table(Store(Path(sys.argv[1])).rows())}\n{END}{after}")


if __name__ == "__main__":
    main()
