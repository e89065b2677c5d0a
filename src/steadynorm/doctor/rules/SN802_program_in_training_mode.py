"""A program that was traced or exported in training mode normalises by its batch for good.

Why: torch.jit.trace and torch.export write the mode of the moment into the program as a constant, and `eval()` on the
result changes nothing: answers depend on the batch mates, and in some runtimes the statistics of the program move. A
batch norm without running statistics is exported so in evaluation mode too. Read off the program itself.

Bad:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]
    model = torch.export.export(net, (batches[0],)).module()

Good:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]
    model = torch.export.export(net.eval(), (batches[0],)).module()

Source: https://github.com/pytorch/pytorch/issues/75252
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("program",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each batch norm in a program that normalises by the batch."""
    for program in facts.programs:
        for path in program.training:
            where = ".".join(part for part in (program.path, path) if part)
            yield Finding(
                code="SN802",
                severity="error" if program.is_fixed else "warning",
                confidence="proved",
                where=where,
                message=(
                    f"In this program of {program.kind} batch norm normalises by the batch"
                    + ("; eval() does not change it." if program.is_fixed else ": it was left in training mode.")
                ),
                evidence={"made by": program.kind, "training": "True", "batch norms that train": len(program.training)},
                fix=Fix("Call eval() on the model, recalibrate if needed, and export it again."),
            )
