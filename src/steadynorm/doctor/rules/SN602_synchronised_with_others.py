"""A synchronised norm has to see the batches of the processes that train the model, all of them and no others.

Why: whose batches are one batch is settled layer by layer, and whose gradients are averaged is settled by
DistributedDataParallel, when the model is wrapped. A group of one synchronises nothing; a group that is larger than the
wrapper's takes in, and waits for, processes that train something else. A norm that is made after the wrapping, by a
conversion that copies its parameters or by hand, has a weight and a bias that the wrapper does not know: each process
learns its own, or the wrapper stops because the old ones get no gradient. (`convert_sync_batchnorm` keeps the
parameters, and may come after.) Where only some processes convert, a training step waits for ever;
`examine(..., across_ranks=True)` on every process sees that. Read off the layers and the process groups. What a
conversion made of a class of somebody's own can no longer be seen: `steadynorm.convert_` refuses such a class,
`convert_sync_batchnorm` replaces it by a plain norm without a word.

Bad:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.parallel.DistributedDataParallel(net)
    net[1] = steadynorm.SyncBatchNorm(8)
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    net[1] = steadynorm.SyncBatchNorm(8)
    model = nn.parallel.DistributedDataParallel(net)
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html, "before wrapping Network with DDP";
https://github.com/pytorch/pytorch/issues/62967
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.training_facts import Ranks

needs: tuple[Part, ...] = ("state",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm whose processes are not those that train it, or whose parameters are not averaged."""
    if facts.ranks is None:
        return
    for path in facts.norms:
        if path in (facts.ranks.synchronised_on or {}):
            yield _on_some(path, facts.ranks)
        elif path in facts.ranks.synchronised:
            yield from _with_others(path, facts.ranks)
        if path in facts.ranks.unreduced:
            yield _unreduced(path, facts.ranks)


def _on_some(path: str, ranks: Ranks) -> Finding:
    count = (ranks.synchronised_on or {})[path]
    return Finding(
        code="SN602",
        severity="error",
        confidence="proved",
        where=path,
        message=(
            f"The norm is synchronised on {count} of {ranks.processes} processes: in training these wait here for the "
            "others, for ever."
        ),
        evidence={"processes": ranks.processes, "synchronised on": count},
        fix=Fix("Convert the model on every process, before it is wrapped."),
    )


def _with_others(path: str, ranks: Ranks) -> Iterator[Finding]:
    group, trained = ranks.synchronised[path], ranks.trained.get(path)
    evidence: dict[str, float | int | str] = {"processes": ranks.processes, "synchronised over": _words(group)}
    if trained is not None:
        evidence["gradients averaged over"] = _words(trained)
    strangers = () if trained is None else tuple(rank for rank in group if rank not in trained)
    if strangers:
        message = (
            f"The norm takes in the batches of processes that do not train this model ({_words(strangers)}), and waits "
            "for them in every step."
        )
    elif len(group) == 1 and (ranks.processes if trained is None else len(trained)) > 1:
        message = "The norm is synchronised over a group of one process: it normalises by its own part of the batch."
    else:
        return
    yield Finding(
        code="SN602",
        severity="warning",
        # Without a wrapper it is not known which processes train one model.
        confidence="heuristic" if trained is None else "proved",
        where=path,
        message=message,
        evidence=evidence,
        fix=Fix(
            "Give the norm the process group that the model is wrapped for, or a part of it: steadynorm.sync_group."
        ),
    )


def _unreduced(path: str, ranks: Ranks) -> Finding:
    names = " and ".join(ranks.unreduced[path])
    return Finding(
        code="SN602",
        severity="error" if ranks.processes > 1 else "warning",
        confidence="proved",
        where=path,
        message=(
            f"The norm was made after the model was wrapped: its {names} get the gradient of their own process alone, "
            "and the models of the processes part."
        ),
        evidence={"processes": ranks.processes, "not averaged": names},
        fix=Fix("Make or convert the norms first, then wrap the model in DistributedDataParallel."),
    )


def _words(ranks: tuple[int, ...]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
