"""layer_norm, rms_norm, group_norm and instance_norm against the oracle, torch, and one another."""

from __future__ import annotations

import pytest

from steadynorm import functional as S
from steadynorm.errors import BackendError
from steadynorm.functional.layer import normalize_positions
from tests import sample_cases
from tests.sample_agree import assert_agrees


def ours(case, inputs):
    """(y, x + addend or None)."""
    x, weight, bias, addend = inputs.x, inputs.weight, inputs.bias, inputs.addend
    fused = {"residual": inputs.residual, "activation": case.activation, "mask": inputs.mask}
    match case.norm:
        case "group":
            return S.group_norm(x, case.size, weight, bias, case.eps, **fused), None
        case "instance":
            return S.instance_norm(x, weight=weight, bias=bias, eps=case.eps, **fused), None
        case "channel":
            return normalize_positions(x, weight, bias, eps=case.eps), None
        case "layer":
            found = S.layer_norm(x, case.weight_shape, weight, bias, case.eps, addend=addend)
        case _:
            convention = "torch" if case.norm == "rms" else "gemma"
            found = S.rms_norm(x, case.weight_shape, weight, case.eps, addend=addend, convention=convention)
    return found if addend is not None else (found, None)


@pytest.mark.parametrize("case", sample_cases.ALL, ids=str)
def test_agrees_with_the_oracle(backend, case):
    try:
        assert_agrees(ours, case)
    except BackendError as error:
        pytest.skip(str(error))
