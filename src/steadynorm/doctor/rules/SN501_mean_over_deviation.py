"""What lies far from zero loses its digits in half precision, and a norm shows what is left.

Why: a norm subtracts the mean and divides by the deviation, and what was rounded before is divided too. Where the mean
is 32 deviations, the normalised output is off by 6 % in bfloat16 (0.7 % in float16), at 200 by 28 %. It is the layer
before that rounds: a raw feature, a large bias, a sum over a residual stream.

Bad:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)).bfloat16()
    batches = [(1000 + torch.randn(64, 8)).bfloat16()]

Good:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)).bfloat16()
    batches = [torch.randn(64, 8).bfloat16()]

Source: Higham, Accuracy and Stability of Numerical Algorithms, section 1.9.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)

# Error of a normalised output for each deviation that the mean is away from zero, root mean square, measured: 0.018 at
# 10 and 0.28 at 200 in bfloat16, 0.007 at 32 and 0.14 at 1000 in float16.
ERROR_PER_DEVIATION = {"bfloat16": 1.8e-3, "float16": 2.2e-4}
WARNING, ERROR = 0.05, 0.25


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm with such an input."""
    worst: dict[str, tuple[float, float, str]] = {}
    for call in facts.calls:
        if call.offset is not None and call.path in facts.norms:
            off = ERROR_PER_DEVIATION.get(call.input_dtype, 0.0) * call.offset
            worst[call.path] = max((off, call.offset, call.input_dtype), worst.get(call.path, (0.0, 0.0, "")))
    for path, (off, offset, dtype) in worst.items():
        if off <= WARNING:
            continue
        yield Finding(
            code="SN501",
            severity="error" if off > ERROR else "warning",
            confidence="measured",
            where=path,
            message=(
                f"The mean of what this layer is given is {offset:.3g} times its deviation, in {dtype}: about "
                f"{min(off, 1):.0%} of its output is rounding."
            ),
            evidence={"mean over deviation": offset, "error of the output": off, "threshold": WARNING, "dtype": dtype},
            fix=Fix("Compute what comes right before in float32, or take the mean out where the data is made."),
        )
