from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from steadynorm import grouping as grouping_
from steadynorm.kernels import numba_cpu, numba_small
from steadynorm.kernels.batch_plans import is_readable
from tests import cases
from tests.kernels.contract import everything

pytestmark = pytest.mark.skipif(bool(numba_cpu.why_not()), reason=numba_cpu.why_not() or "runs")


def tensors(shape, layout="plain", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, dy = (cases.laid_out(torch.randn(shape, generator=generator), layout) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return x, dy, weight, bias


def all_of(x, dy, weight, bias, **options):
    return everything(numba_cpu, x, dy, grouping_.batch(x)[1], weight=weight, bias=bias, **options)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((32, 256), "plain"),
        ((33, 5), "plain"),
        ((2, 3), "plain"),
        ((4, 6, 5, 7), "plain"),
        ((4, 3, 5, 7), "channels_last"),
    ],
)
@pytest.mark.parametrize("is_affine", [True, False])
def test_small_calls_give_the_bits_of_large_ones(shape, layout, is_affine, monkeypatch):
    """The other way of calling the same kernels: numba_cpu.Call, which a smaller threshold gives."""
    x, dy, weight, bias = tensors(shape, layout)
    if not is_affine:
        weight = bias = None
    assert numba_cpu._is_small(x, weight, bias)
    small = all_of(x, dy, weight, bias, activation="relu")
    monkeypatch.setattr(numba_cpu, "SERIAL_BELOW", 0)
    large = all_of(x, dy, weight, bias, activation="relu")
    for first, second in zip(small, large, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(33, 5), (4, 3, 5, 7)], ids=["rows", "planes"])
def test_given_statistics_and_rounded_gradients_have_the_bits_of_large_calls(shape, dtype, monkeypatch):
    """What small calls convert themselves and large ones leave to PyTorch."""
    x, dy, weight, bias = tensors(shape)
    grouping = grouping_.batch(x)[1]
    mean, var = torch.randn(shape[1], dtype=dtype), torch.rand(shape[1], dtype=dtype) + 0.1

    def results(weight, bias):
        given = numba_cpu.normalize(x, grouping, mean, var, weight, bias, x, eps=1e-3, activation="relu")
        return given, *numba_cpu.backward(dy, x, grouping, mean, var, weight, bias, eps=1e-3, is_given=True)[:3]

    cases = [(weight, bias), (weight.double(), bias), (weight, None), (None, bias.double()), (None, None)]
    small = [results(*parameters) for parameters in cases]
    assert numba_small._prepared.cache_info().currsize
    monkeypatch.setattr(numba_cpu, "SERIAL_BELOW", 0)
    for parameters, found in zip(cases, small, strict=True):
        for first, second in zip(found, results(*parameters), strict=True):
            assert first.dtype == second.dtype
            assert torch.equal(first, second)


def test_threads_do_not_share_arguments():
    """The same sizes and settings in eight threads at once: each has addresses and scratch memory of its own."""
    given = [tensors((64, 96), seed=seed) for seed in range(8)]
    expected = [all_of(*each) for each in given]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(lambda each: all_of(*each), given), expected, strict=True):
                for first, second in zip(found, wanted, strict=True):
                    assert torch.equal(first, second)


def test_a_call_does_not_remember_the_parameters_of_the_one_before():
    x, dy, weight, bias = tensors((32, 256))
    plain = all_of(x, dy, None, None)
    all_of(x, dy, weight, bias)
    for first, second in zip(all_of(x, dy, None, None), plain, strict=True):
        assert torch.equal(first, second)


def test_what_is_kept_is_bounded():
    for length in range(2, numba_small.KEPT_CALLS + 20):
        numba_cpu.forward(x := torch.randn(2, 4, length), grouping_.batch(x)[1])
    assert numba_small._prepared.cache_info().currsize <= numba_small.KEPT_CALLS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_that_kernels_cannot_read_take_the_other_way(dtype):
    x, dy, weight, bias = tensors((32, 256))
    strided = torch.stack([weight, bias], 1)[:, 0]
    assert not is_readable(strided)
    assert is_readable(weight.to(dtype)) == (dtype is torch.float64)
    for first, second in zip(all_of(x, dy, strided, bias), all_of(x, dy, weight, bias), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("size", [8, 200], ids=["small", "large"])
def test_the_default_device_is_for_others(size):
    x, dy, weight, bias = tensors((6, 8, size, size))
    expected = all_of(x, dy, weight, bias)
    numba_small._prepared.cache_clear()
    with torch.device("meta"):
        found = all_of(x, dy, weight, bias)
    for first, second in zip(found, expected, strict=True):
        assert torch.equal(first, second)
