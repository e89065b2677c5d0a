from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from steadynorm.functional import batch_norm
from tests import agree, cases, oracles
from tests.agree import assert_agrees
from tests.cases import Case


@pytest.mark.parametrize("case", [*cases.ALL, *cases.WIDTHS, *cases.COLUMNS], ids=str)
def test_agrees_with_the_oracle(backend, case):
    backend.needs(case.inputs().x)
    assert_agrees(batch_norm, oracles.batch_norm, case)


def torch_batch_norm(x, *arguments, residual=None, activation=None):
    y = F.batch_norm(x, *arguments)
    y = y if residual is None else y + residual
    return y if activation is None else getattr(F, activation)(y)


def errors(candidate, case: Case) -> dict[str, agree.Error]:
    inputs = case.inputs()
    expectation = agree.ask(oracles.batch_norm, inputs, case)
    dy = agree.cotangent(expectation, inputs, case)
    expected = agree.bounds(expectation, inputs, case, dy)
    return agree.errors(agree.run(candidate, inputs, case, dy), expected)


WITNESSED = [case for case in cases.ALL if case.mask is None and case.dtype == torch.float32]
# In half ulps of what a number is made of: normalize, scale, shift, add, activate, store each round once.
ALLOWANCE = 4.0


@pytest.mark.parametrize("case", WITNESSED, ids=str)
def test_no_further_from_the_oracle_than_torch(backend, case):
    backend.needs(case.inputs().x)
    ours, theirs = errors(batch_norm, case), errors(torch_batch_norm, case)
    for name, error in ours.items():
        limit = theirs[name].roundings + ALLOWANCE
        assert error.roundings <= limit, f"{name}: {error.roundings:.2f} half ulps, torch {theirs[name].roundings:.2f}"


@pytest.mark.parametrize("name", ["offset 1e4", "offset 1e4, rows", "offset 1e4, channels last", "offset 1e6"])
def test_far_closer_than_torch_at_a_large_offset(backend, name):
    case = cases.BY_NAME[name]
    backend.needs(case.inputs().x)
    ours, theirs = errors(batch_norm, case), errors(torch_batch_norm, case)
    assert ours["y"].roundings <= 4
    assert ours["y"].largest * 20 <= theirs["y"].largest


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_bits_do_not_depend_on_the_number_of_threads(backend, layout, threads):
    case = Case("threads", (8, 12, 40, 40), layout=layout, activation="silu", has_residual=True)
    if backend.name == "reference":
        pytest.skip("torch's own sums are split by thread")
    found = []
    for n in (1, 2, 1, 2):
        threads(n)
        inputs = case.inputs()
        expectation = agree.ask(oracles.batch_norm, inputs, case)
        outcome = agree.run(batch_norm, inputs, case, agree.cotangent(expectation, inputs, case))
        found.append(outcome.tensors)
    for other in found[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, found[0][name]), name
