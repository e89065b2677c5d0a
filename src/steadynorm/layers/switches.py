"""The three switches of a layer with running statistics.

    normalize_by     "batch", "running", or None: the batch in training, the running statistics in evaluation
    update_running   True, False, or None: they move in training only
    train_affine     False: no gradient reaches weight and bias, whatever their requires_grad says

They do not know each other, and `.train()` and `.eval()` do not touch them. The defaults are what torch.nn does.

In a state_dict the switches that are set travel in its metadata (as the version of a layer does), so that its keys
are those of torch.nn. Loading sets what the metadata names and nothing else: a checkpoint never unfreezes a layer.
"""

from typing import Any, Literal, Self

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from steadynorm.errors import InputError
from steadynorm.layers.checks import name

DEFAULTS: dict[str, Any] = {"normalize_by": None, "update_running": None, "train_affine": True}
METADATA = "steadynorm"
"""Key of the switches in the metadata of a layer in a state_dict."""


class Switches(_NormBase):
    """A normalization of torch.nn that has running statistics, with switches."""

    # Defaults stand on the class: a torch.nn layer whose __class__ is set to ours, or an old pickle, has them too.
    normalize_by: Literal["batch", "running"] | None = None
    update_running: bool | None = None
    _train_affine: bool = True

    @property
    def train_affine(self) -> bool:
        """Whether weight and bias train. Setting it sets their requires_grad, which optimizers and DDP look at."""
        return self._train_affine

    @train_affine.setter
    def train_affine(self, value: bool) -> None:
        self._train_affine = value
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad = value
                if not value:
                    # A gradient from before would still move them, or their weight decay would.
                    parameter.grad = None

    def freeze_(self, affine: bool = True) -> Self:
        """Normalise by the running statistics and keep them as they are, in training too.

        Args:
            affine: also stop weight and bias from training.

        Returns: the layer.

        Raises:
            InputError: the layer has no running statistics.
        """
        if self.running_mean is None:
            raise InputError(
                f"{name(self)} has no running statistics to freeze: construct it with track_running_stats=True."
            )
        self.normalize_by = "running"
        self.update_running = False
        if affine:
            self.train_affine = False
        return self

    def unfreeze_(self) -> Self:
        """Set the three switches to their defaults: what torch.nn does.

        Returns: the layer.
        """
        for switch, default in DEFAULTS.items():
            setattr(self, switch, default)
        return self

    def switches(self) -> dict[str, Any]:
        """The switches that are not at their default, by name."""
        return {switch: getattr(self, switch) for switch in DEFAULTS if getattr(self, switch) != DEFAULTS[switch]}

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batches counted; nothing where ``update_running`` is False: frozen is frozen."""
        if self.update_running is not False:
            super().reset_running_stats()

    def reset_parameters(self) -> None:
        """Everything as it was constructed: fresh memory must not stay in a layer because it is frozen."""
        super().reset_parameters()
        super().reset_running_stats()

    def _trained(self, parameter: Tensor | None) -> Tensor | None:
        """`parameter`, out of reach of gradients where weight and bias do not train."""
        return parameter if parameter is None or self._train_affine else parameter.detach()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        switches = self.switches()
        if switches and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][METADATA] = switches

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        stored = local_metadata.get(METADATA, {})
        for switch in DEFAULTS:
            if switch in stored:
                setattr(self, switch, stored[switch])
