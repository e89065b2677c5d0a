"""Gradients accumulate over micro-batches; the statistics of a batch norm do not.

Why: four micro-batches of 8 give the gradient of 32 samples, but each is normalised by its own 8, and the running
average moves four times per step. Where the micro-batches are large nothing is lost; where they are small, the
statistics are those of the small batch that was to be avoided. Seen in a training step that is given as `step`.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(model, batch):
        for part in batch.chunk(4):
            model(part).square().mean().backward()
        sgd.step()

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(model, batch):
        model(batch).square().mean().backward()
        sgd.step()

Source: https://github.com/Lightning-AI/pytorch-lightning/issues/17446
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("audit",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for the whole model, where one step of the optimizer follows several backward passes."""
    audit = facts.audit
    if audit is None or not audit.is_users or not audit.optimizer_steps:
        return
    parts = audit.backwards / audit.optimizer_steps
    moving = [norm for norm in audit.norms.values() if norm.updates.get("forward", 0) > 1]
    if parts < 2 or audit.forwards < audit.backwards or not moving:
        return
    yield Finding(
        code="SN309",
        severity="note",
        confidence="proved",
        where="",
        message=(
            f"One step of the optimizer follows {parts:.3g} backward passes: batch norm sees micro-batches, not the "
            "batch that the gradient is of."
        ),
        evidence={
            "forwards": audit.forwards,
            "backward passes": audit.backwards,
            "optimizer steps": audit.optimizer_steps,
            "layers": len(moving),
        },
        fix=Fix(
            "Where micro-batches are small: steadynorm.training.microbatch gives the statistics of the whole batch."
        ),
    )
