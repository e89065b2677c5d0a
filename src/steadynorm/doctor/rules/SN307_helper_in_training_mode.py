"""A network that only helps, a teacher or a target, must not learn statistics on the way.

Why: a teacher, a target or a perceptual loss is called without gradients, which does not stop its batch norms: in
training mode it normalises by the student's batch and its own statistics drift, so that the target moves and the saved
teacher is another one. Some methods do it by intent: a copy that follows the trained network by a moving average, as in
MoCo, is a note. Seen by watching all modules that a training step calls, also those inside a loss.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).requires_grad_(False)
    batches = [torch.randn(16, 1, 8, 8)]

    def loss(output, batch):
        return (output - teacher(batch)).square().mean()

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).requires_grad_(False).eval()
    batches = [torch.randn(16, 1, 8, 8)]

    def loss(output, batch):
        return (output - teacher(batch)).square().mean()

Source: https://github.com/DLR-RM/stable-baselines3/issues/553
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("audit", "forward")


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm of such a network whose statistics a training step moves."""
    if facts.audit is None:
        return
    evaluated = {call.path for call in facts.calls}
    for path, step in {**facts.audit.norms, **facts.audit.helpers}.items():
        norm, is_copy = facts.norms.get(path), path in facts.audit.copies
        if not step.without_gradients or not step.trained or not step.updates:
            continue
        # A part that evaluation uses is no helper: SN302 speaks of frozen backbones.
        if norm is not None and (norm.trains_affine or (path in evaluated and not is_copy)):
            continue
        outside = "" if norm is not None else ", which is no part of the model,"
        yield Finding(
            code="SN307",
            severity="note" if is_copy else "warning",
            confidence="proved",
            where=path,
            message=(
                f"This layer{outside} is called without gradients, in training mode: each training step moves the "
                "statistics of a network that is not trained."
            ),
            evidence={
                "updates in a step": sum(step.updates.values()),
                "a copy of the trained network": "yes" if is_copy else "no",
            },
            fix=Fix("Call eval() on the helping network, and keep it so when model.train() reaches it."),
        )
