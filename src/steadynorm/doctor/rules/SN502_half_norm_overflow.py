"""A norm that squares what it is given in float16 loses everything above 255.

Why: 256 squared is more than float16 can hold. The sum of squares becomes infinite, the inverse root zero, and so the
output, for the very samples that are large; a variance becomes infinite minus infinite. PyTorch's own norms compute in
float32; those that are written by hand in a few lines often do not. Each norm of another class that is given such
values is run once more in float32, and the two outputs are compared.

Bad:
    class RootMeanSquareNorm(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    model = nn.Sequential(RootMeanSquareNorm(), nn.Linear(8, 4)).half()
    batches = [(400 * torch.randn(16, 8)).half()]

Good:
    class RootMeanSquareNorm(nn.Module):
        def forward(self, x):
            y = x.float()
            return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).type_as(x)

    model = nn.Sequential(RootMeanSquareNorm(), nn.Linear(8, 4)).half()
    batches = [(400 * torch.randn(16, 8)).half()]

Source: https://github.com/pytorch/pytorch/issues/66707
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm whose output is lost."""
    for found in facts.overflows:
        yield Finding(
            code="SN502",
            severity="error",
            confidence="proved",
            where=found.path,
            message=(
                f"This {found.class_name} is given values up to {found.largest:.3g} in float16, which has no room for "
                "their squares: run in float32 it gives another output."
            ),
            evidence={
                "largest value": found.largest,
                "largest that can be squared": 255.9,
                "change of its output in float32": found.change,
            },
            fix=Fix("Compute the statistics in float32 inside the norm, or take torch.nn.RMSNorm or steadynorm's."),
        )
