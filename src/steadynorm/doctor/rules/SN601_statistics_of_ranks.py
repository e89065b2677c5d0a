"""In distributed training each process normalises by its own part of the batch, unless it is told otherwise.

Why: eight processes with two samples each train with statistics of two, and keep eight sets of running ones; what is
saved is the first. Synchronised norms see the whole batch, but only those that were converted: a norm that was made or
replaced afterwards goes on by itself, in one network with the others. Read off the layers, and off the process group
where there is one. Whether the running statistics of ranks have parted is not looked at.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.SyncBatchNorm(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.SyncBatchNorm(8), nn.Conv2d(8, 8, 3), nn.SyncBatchNorm(8))
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/pytorch/pytorch/issues/30718; https://github.com/pytorch/pytorch/issues/22095
"""

from collections.abc import Iterator
from statistics import mode

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)

# Independent values per statistic below which the mean alone is off by a quarter of a deviation.
FEW_VALUES = 16


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each plain norm among synchronised ones, or for the layer with the fewest values on a rank."""
    plain = [norm for norm in facts.norms.values() if norm.kind == "batch" and norm.learns]
    synchronised = [norm for norm in facts.norms.values() if norm.kind == "sync"]
    for norm in plain if synchronised else ():
        yield Finding(
            code="SN601",
            severity="warning",
            confidence="proved",
            where=norm.path,
            message=(
                f"{len(synchronised)} norm layers of the model are synchronised over processes, and this one is not: "
                "on several processes it normalises by its own part of the batch."
            ),
            evidence={"synchronised": len(synchronised), "not synchronised": len(plain)},
            fix=Fix("Convert the model after its last layer was made: steadynorm.convert_, or convert_sync_batchnorm."),
        )
    if plain and not synchronised and facts.ranks is not None:
        yield from _on_ranks(facts)


def _on_ranks(facts: Facts) -> Iterator[Finding]:
    ranks, batches = facts.ranks, facts.train_batches
    assert ranks is not None
    values = {
        path: found.independent_per_sample or found.per_sample
        for path, found in facts.values.items()
        if facts.norms[path].learns
    }
    size = mode(batches.sizes) if batches is not None and batches.sizes else None
    where = min(values, key=lambda path: values[path]) if values else ""
    is_few = bool(values) and size is not None and values[where] * size < FEW_VALUES
    if ranks.processes < 2 or not (is_few or ranks.keeps_buffers_apart):
        return
    evidence: dict[str, float | int | str] = {"processes": ranks.processes}
    if is_few and size is not None:
        evidence |= {"samples on a process": size, "independent values on a process": values[where] * size}
    apart = "Each process keeps running statistics of its own, and what is saved is those of one"
    few = f"On each of {ranks.processes} processes its statistics are those of {size} samples"
    yield Finding(
        code="SN601",
        severity="warning" if is_few else "note",
        confidence="heuristic",
        where=where if is_few else "",
        message=f"{few if is_few else apart}.",
        evidence=evidence,
        fix=Fix("Synchronise the norms (steadynorm.SyncBatchNorm), and merge the statistics before they are saved."),
    )
