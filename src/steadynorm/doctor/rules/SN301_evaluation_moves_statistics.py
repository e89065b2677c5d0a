"""Evaluation must not move the running statistics.

Why: each evaluation then changes the model: results depend on what was evaluated before and in which order, the test
data leaks into the checkpoint, and the best checkpoint is not the one that was measured. A layer that eval() leaves in
training mode does it, and so does F.batch_norm(..., training=True) with the layer's own buffers.

Bad:
    class Hard(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)

    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), Hard(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/DLR-RM/stable-baselines3/issues/553
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each module whose statistics one forward in evaluation mode changed."""
    for path in facts.moved:
        norm = facts.norms.get(path)
        is_meant = norm is not None and norm.updates_always
        advice = "Look in its forward for F.batch_norm(..., training=True), or for an average that asks no mode."
        if is_meant:
            advice = "None needed while it adapts: update_running=True says so. Set it to None before results count."
        elif norm is not None and norm.trains_in_evaluation:
            advice = "eval() leaves this layer in training mode: mend the train() that overrides PyTorch's."
        yield Finding(
            code="SN301",
            severity="note" if is_meant else "error",
            confidence="proved",
            where=path,
            message=(
                "One forward in evaluation mode changed its running statistics: results depend on what was evaluated "
                "before."
            ),
            evidence={"forwards": 1, "switch": "update_running=True" if is_meant else "none"},
            fix=Fix(advice),
        )
