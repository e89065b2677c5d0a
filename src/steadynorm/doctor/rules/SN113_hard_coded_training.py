"""`F.batch_norm(..., training=True)` normalises by the batch whatever mode the model is in.

Why: the flag is a constant where `self.training` was meant. Evaluation then depends on the batch mates and on the batch
size, and where running statistics are handed over, it moves them too. Caught in the act: the call is seen in a pass in
which the module that makes it is in evaluation mode. Sampling by the batch on purpose, as in MC batch norm, does the
same.

Bad:
    class Hard(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True)

    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), Hard(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    class Soft(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=self.training)

    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), Soft(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://pytorch.org/docs/stable/generated/torch.nn.functional.batch_norm.html
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each module that was seen to do so."""
    for path in facts.hard_coded:
        yield Finding(
            code="SN113",
            severity="error",
            confidence="proved",
            where=path,
            message="In evaluation mode this module calls batch norm with training=True: it normalises by the batch.",
            evidence={"mode of the module": "evaluation", "training": "True"},
            fix=Fix("Pass training=self.training, and the running statistics with it."),
        )
