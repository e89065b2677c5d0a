"""Model classes of transformers and monai, from their configurations: every batch norm is converted, and comes back."""

from __future__ import annotations

import copy

import pytest
import torch

from steadynorm import layers
from steadynorm.convert import convert_
from steadynorm.models import norm_kind
from tests.convert.test_convert import identities
from tests.deploy.architectures import ARCHITECTURES, made

# The same numbers in evaluation, from another kernel: what rounding makes of that behind up to 89 layers.
TOLERANCE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_batch_norm_is_converted(name):
    model, batches = made(name)
    norms = [one for one in model.modules() if norm_kind(one) in ("batch", "sync")]
    before, state = identities(model), {key: value.clone() for key, value in model.state_dict().items()}
    for to, options in (("frozen", {}), ("ghost", {"ghost_size": 2}), ("renorm", {})):
        change = convert_(model, to, **options, batches=batches)
        assert len([one for one in change.log if "Frozen" not in one.before]) == len(norms)
        assert max(change.difference.relative) < TOLERANCE
        foreign = [one.paths[0] for one in change.log if "Frozen" in one.before]
        if foreign:
            convert_(model, "torch", only=foreign)
        convert_(model, "batch")
        assert identities(model) == before
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fitted = copy.deepcopy(model)
    change = convert_(fitted, "layer", batches=batches)
    assert len(change.log) == len(norms)
    carried = convert_(model, "layer", batches=batches, method=None)
    assert all(one.error is not None or one.note.endswith("never called") for one in change.log)
    # The goal is the output of every layer; that of the model follows, if no layer before was far off.
    errors = [one.error for one in change.log if one.error is not None]
    if errors and max(errors) < 0.5:
        assert max(change.difference.relative) < max(carried.difference.relative)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ConvNeXt", "ConvNeXtV2"])
def test_norms_with_a_forward_of_their_own_become_ours_as_told(name):
    """ConvNeXt has its channels first or last, by an attribute."""
    model, batches = made(name)

    def told(layer):
        kind = layers.ChannelLayerNorm if layer.data_format == "channels_first" else layers.LayerNorm
        return kind(layer.normalized_shape[0], eps=layer.eps)

    own = {
        type(one) for one in model.modules() if type(one).__name__.endswith("LayerNorm") and hasattr(one, "data_format")
    }
    change = convert_(model, "steadynorm", as_=dict.fromkeys(own, told), batches=batches)
    assert {one.after for one in change.log} == {"steadynorm.ChannelLayerNorm", "steadynorm.LayerNorm"}
    assert max(change.difference.relative) < TOLERANCE
