"""A norm that evaluation never calls does nothing there.

Why: it was left behind when the forward was rewritten, its branch is never taken, or its weight is used by a function
that passes its forward by, along with its hooks and its running statistics. Heads that are for training only are meant.

Bad:
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.conv(x).relu()

    model = Forgetful()
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: none; it is what was seen.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm whose forward did not run."""
    called = {call.path for call in facts.calls}
    for path, norm in facts.norms.items():
        if not called or path in called:
            continue
        yield Finding(
            code="SN118",
            severity="note",
            confidence="proved",
            where=path,
            message=f"The forward of this {norm.class_name} is never called in evaluation mode.",
            evidence={"modules called": len(called)},
            fix=Fix("Remove the layer or call it; none is needed if it is for training only."),
        )
