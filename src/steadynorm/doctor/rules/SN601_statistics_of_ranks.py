"""In distributed training each process normalises by its own part of the batch, unless it is told otherwise.

Why: eight processes with two samples each train with statistics of two, and keep eight sets of running ones; what is
saved is the first. Synchronised norms see the whole batch, but only those that were converted: a norm that was made or
replaced afterwards goes on by itself, in one network with the others. Read off the layers, and off the process group
where there is one. Where every process calls `examine(..., across_ranks=True)`, the running statistics of each are held
against those of the first.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.SyncBatchNorm(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.SyncBatchNorm(8), nn.Conv2d(8, 8, 3), nn.SyncBatchNorm(8))
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/pytorch/pytorch/issues/30718; https://github.com/pytorch/pytorch/issues/22095
"""

from collections.abc import Iterator, Mapping
from statistics import mode

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import MATERIAL_DIVERGENCE

needs: tuple[Part, ...] = ("state",)

# Independent values per statistic below which the mean alone is off by a quarter of a deviation.
FEW_VALUES = 16


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each plain norm among synchronised ones, or for the layer with the fewest values on a rank.

    And one where statistics of ranks were compared, at the layer where they are farthest apart.
    """
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
    if facts.ranks is not None and facts.ranks.apart:
        yield from _parted(facts.ranks.processes, facts.ranks.apart)
    if plain and not synchronised and facts.ranks is not None:
        yield from _on_ranks(facts)


def _parted(processes: int, apart: Mapping[str, float]) -> Iterator[Finding]:
    where = max(apart, key=lambda path: apart[path])
    if apart[where] <= MATERIAL_DIVERGENCE:
        return
    yield Finding(
        code="SN601",
        severity="warning",
        confidence="measured",
        where=where,
        message=(
            "The running statistics of the processes have parted, here the farthest: each evaluates another model, and "
            "what is saved is that of one."
        ),
        evidence={
            "processes": processes,
            "layers that have parted": sum(value > MATERIAL_DIVERGENCE for value in apart.values()),
            "divergence from the first process": apart[where],
            "threshold": MATERIAL_DIVERGENCE,
        },
        fix=Fix("Merge them on all processes before evaluating or saving: steadynorm.training.merge_ranks_(model)."),
    )


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
    may_part = ranks.keeps_buffers_apart and ranks.apart is None
    if ranks.processes < 2 or not (is_few or may_part):
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
