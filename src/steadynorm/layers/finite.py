"""`guard="raise"`: stop at the first batch whose statistics are not finite, also inside a compiled graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from steadynorm.errors import NonFiniteStatisticsError

CHANNELS_NAMED = 5
"""Channels listed in the message; the rest are counted."""

LIBRARY = torch.library.Library("steadynorm", "FRAGMENT")
# A compiler drops a node that returns nothing and writes nothing; said to write to the buffer it protects, it stays.
LIBRARY.define("require_finite(Tensor mean, Tensor var, Tensor(a!) running_mean, str where) -> ()")


def require_finite(mean: Tensor, var: Tensor, where: Callable[[], str]) -> None:
    """Raise where a mean (C,) or a variance (C,) is not finite. Waits for the device.

    Args:
        mean, var: (C,), statistics of a batch.
        where: what to call the layer; asked only when there is something to raise.

    Raises:
        NonFiniteStatisticsError: names the layer and the channels.
    """
    finite = torch.isfinite(mean) & torch.isfinite(var)
    if bool(finite.all()):
        return
    channels = (~finite).nonzero().flatten().tolist()
    first = channels[0]
    listed = ", ".join(str(channel) for channel in channels[:CHANNELS_NAMED])
    more = f" and {len(channels) - CHANNELS_NAMED} more" if len(channels) > CHANNELS_NAMED else ""
    raise NonFiniteStatisticsError(
        f"{where()} got a batch whose statistics are not finite in {'channel' if len(channels) == 1 else 'channels'}"
        f" {listed}{more} (channel {first}: mean {mean[first].item():g}, variance {var[first].item():g}): look for"
        " NaN, inf or overflow in its input, or step over such batches with guard='skip'."
    )


def _require_finite(mean: Tensor, var: Tensor, running_mean: Tensor, where: str) -> None:
    require_finite(mean, var, lambda: where)


LIBRARY.impl("require_finite", _require_finite, "CompositeExplicitAutograd")
torch.library.register_fake("steadynorm::require_finite", lambda mean, var, running_mean, where: None)
