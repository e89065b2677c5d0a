"""StepBatchNorm1d: batch normalization in a recurrence, with statistics for each time step."""

from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.errors import InputError
from steadynorm.layers import checks
from steadynorm.layers.batch import as_leaf
from steadynorm.layers.rows import Rows


class StepBatchNorm1d(Rows):
    """Batch normalization over (N, C) or (N, C, L) at one time step, with running statistics for each step.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    What a recurrence sees at its first steps is nothing like what it sees later, so each step up to `steps` has
    running statistics of its own, (steps, C); later ones share the last. Weight and bias are shared by all steps.
    The state_dict of a plain batch norm loads: every step starts from it.

    Args:
        num_features, ...: as `BatchNorm2d`.
        steps: how many steps have statistics of their own, by keyword; positive.
        initial_weight: what weight starts from. A weight of 1 in a recurrence saturates its activation and lets
            gradients vanish; 0.1 does not.

    Source: Cooijmans et al., Recurrent Batch Normalization (2017), sections 3 and 4.
    """

    ranks = (2, 3)
    steps: int = 0
    initial_weight: float = 0.1
    shown = ("steps", "initial_weight", *Rows.shown)

    def __init__(self, num_features: int, *args: Any, steps: int, initial_weight: float = 0.1, **kwargs: Any) -> None:
        self.steps = self.rows = steps  # before the settings are checked
        self.initial_weight = initial_weight
        super().__init__(num_features, *args, **kwargs)

    def reset_parameters(self) -> None:
        """Everything as it was constructed, weight at `initial_weight`."""
        super().reset_parameters()
        if self.weight is not None:
            nn.init.constant_(self.weight, self.initial_weight)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        step: int,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalise what step number `step`, from 0, computes; the rest as `BatchNorm2d`.

        Raises:
            InputError: also for a step that is no number from 0 on.
        """
        if isinstance(input, torch.fx.Proxy):
            return as_leaf(self, input, step=step, residual=residual, mask=mask, lengths=lengths)
        mask = self._checked(input, mask, lengths)
        if not isinstance(step, int | torch.SymInt) or isinstance(step, bool) or step < 0:
            raise InputError(f"{checks.name(self)} expected a step, an integer from 0 on, got {step!r}.")
        running = self._row(min(step, self.steps - 1))
        y, moments = self._normalize(input, residual, mask, running, self.weight, self.bias)
        if running is not None and moments is not None:
            self._require_finite(running, moments)
            self._remember(running, moments)
        return y

    def _check_settings(self) -> None:
        super()._check_settings()
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise InputError(
                f"{checks.name(self)}: steps must be a positive integer, the steps with statistics of their own, got"
                f" {self.steps!r}."
            )
