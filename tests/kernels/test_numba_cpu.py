from __future__ import annotations

import platform

import pytest
import torch

from steadynorm import grouping as grouping_
from steadynorm.kernels import numba_cpu
from tests import cases
from tests.kernels.contract import assert_keeps_contract, everything

TRIED = (*cases.ALL, *cases.WIDTHS, *cases.COLUMNS)


def needs(x: torch.Tensor, *, masked: bool = False) -> None:
    reason = numba_cpu.why_not(x, masked=masked)
    if reason:
        pytest.skip(reason)


@pytest.mark.skipif(platform.system() != "Linux", reason="promised on Linux")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_runs_here(dtype):
    assert numba_cpu.why_not() == ""
    assert numba_cpu.why_not(torch.ones(4, 8, 16, 16, dtype=dtype)) == ""


@pytest.mark.parametrize("case", TRIED, ids=str)
@pytest.mark.parametrize("is_small", [True, False], ids=["small", "large"])
def test_keeps_the_contract(case, is_small, monkeypatch):
    """Both ways of calling the kernels: `numba_small`, and `Call` as for tensors above SERIAL_BELOW."""
    needs(case.inputs().x, masked=case.mask is not None)
    if not is_small:
        monkeypatch.setattr(numba_cpu, "SERIAL_BELOW", 0)
    assert_keeps_contract(numba_cpu, case)


LARGE = {
    "plain": ((6, 10, 56, 56), "plain"),
    "small images": ((64, 96, 7, 7), "plain"),
    "channels last": ((6, 40, 40, 40), "channels_last"),
    "three channels last": ((8, 3, 64, 64), "channels_last"),
    "rows": ((3001, 70), "plain"),
    "one channel": ((2, 1, 300, 300), "plain"),
    "one sample": ((1, 2, 400, 401), "plain"),
}


@pytest.mark.parametrize(("dtype", "activation"), [(torch.float32, "silu"), (torch.bfloat16, None)])
@pytest.mark.parametrize("name", LARGE)
def test_bits_do_not_depend_on_the_number_of_threads(name, dtype, activation, threads):
    shape, layout = LARGE[name]
    x, dy = (cases.laid_out(torch.randn(shape).to(dtype), layout) for _ in range(2))
    x, grouping = grouping_.batch(x)
    needs(x)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    found = []
    for n in (1, 2, 3, 1):
        threads(n)
        found.append(everything(numba_cpu, x, dy, grouping, weight=weight, bias=bias, activation=activation))
    for other in found[1:]:
        for first, again in zip(found[0], other, strict=True):
            assert torch.equal(first, again)


def test_not_finite_values_reach_the_statistics_and_the_output():
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(4, 6, 20, 20)
        x[1, 3, 5, 7] = bad
        x, grouping = grouping_.batch(x)
        needs(x)
        y, mean, var = numba_cpu.forward(x, grouping)
        sound = [c for c in range(6) if c != 3]
        assert not torch.isfinite(mean[3])
        assert torch.isnan(var[3])
        assert torch.isfinite(mean[sound]).all()
        assert torch.isfinite(var[sound]).all()
        assert torch.isfinite(y[:, sound]).all()
        assert torch.isnan(y[:, 3]).all()


@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
def test_nan_is_not_swallowed_by_an_activation(activation):
    x = torch.randn(4, 6, 9, 9)
    x[0, 2, 0, 0] = torch.nan
    x, grouping = grouping_.batch(x)
    needs(x)
    y = numba_cpu.normalize(x, grouping, torch.zeros(6).double(), torch.ones(6).double(), activation=activation)
    assert torch.isnan(y[0, 2, 0, 0])
    assert torch.isnan(y).sum() == 1


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5), (3, 4, 0), (0, 4, 2, 2)])
def test_empty(shape):
    x, grouping = grouping_.batch(torch.zeros(shape))
    needs(x)
    y, mean, var = numba_cpu.forward(x, grouping)
    assert y.shape == shape
    assert mean.eq(0).all()
    assert var.eq(0).all()
    dx, dweight, dbias, _ = numba_cpu.backward(torch.zeros(shape), x, grouping, mean, var)
    assert dx.shape == shape
    assert dweight.eq(0).all()
    assert dbias.eq(0).all()


def test_a_channel_whose_variance_is_zero_has_no_noise():
    for x in (torch.full((32, 2, 7, 7), 12345.678), torch.full((900, 5), 12345.678)):
        x, grouping = grouping_.batch(x)
        needs(x)
        y, _, _ = numba_cpu.forward(x, grouping)
        assert y.abs().max() < 1e-3
