"""A gradient for each sample alone does not exist where a norm mixes the samples.

Why: differentially private training clips the gradient of every sample by itself, and so do influence functions and
gradient-based sampling. Behind a batch norm in training mode there is no such gradient: what one sample did to the
statistics is in the outputs of all, the guarantee does not hold, and `torch.func.vmap` refuses to move the running
statistics. Running statistics that move, also those of an instance norm, release averages of the data besides. Read off
the layers. Off by default: it is a fault only where somebody trains so.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    batches = [torch.randn(16, 1, 8, 8)]

Source: Yousefpour et al., Opacus, arXiv 2109.12298, section 2 (its ModuleValidator refuses the same layers).
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)
is_optional = True


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm that, in training, normalises by the batch or remembers it."""
    for path, norm in facts.norms.items():
        mixes = norm.kind in ("batch", "sync") and not norm.is_frozen
        if not mixes and not norm.learns:
            continue
        what = "normalises each sample by all of its batch" if mixes else "keeps running statistics of the samples"
        yield Finding(
            code="SN805",
            severity="error" if mixes else "warning",
            confidence="proved",
            where=path,
            message=f"In training this {norm.class_name} {what}: no gradient is that of one sample alone.",
            evidence={"class": norm.class_name},
            fix=Fix(
                "Take group norm (steadynorm.convert_(model, 'group')), or freeze the layer."
                if mixes
                else "Construct the layer with track_running_stats=False."
            ),
        )
