"""InputNorm: exactly pooled, missing and constant columns, kept with the model, folded where that is exact."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from steadynorm.errors import InputError
from steadynorm.layers import InputNorm, weight_norm
from tests import oracles

SHAPES = [(50, 4), (9, 3, 7), (6, 3, 5, 4), (4, 2, 3, 3, 3)]
ROUNDINGS = 16


def assert_fits(fit, x, batches, **options):
    """`fit` over `batches` against the oracle over all of x: statistics, and what a call gives."""
    norm = fit(batches, **options)
    mean, deviation, expected = oracles.input_norm(x.double().numpy())
    unit = torch.finfo(norm.mean.dtype).eps / 2
    size = np.abs(mean) + deviation
    error = np.abs(norm.mean.double().numpy() - mean)
    assert (error <= ROUNDINGS * unit * size).all(), f"mean is off by {error.max():.3g}"
    error = np.abs(norm.deviation.double().numpy() - deviation)
    assert (error <= ROUNDINGS * unit * size).all(), f"deviation is off by {error.max():.3g}"
    z = norm(x)
    assert z.dtype == x.dtype
    assert z.shape == x.shape
    condition = 1 + size / np.where(deviation > 0, deviation, 1)
    allowed = ROUNDINGS * unit * oracles.spread(condition, x.dim()) * (1 + np.abs(expected))
    error = np.abs(z.double().numpy() - expected)
    assert (error <= allowed).all(), f"output is off by {error.max():.3g}"
    return norm


def data(shape, dtype=torch.float64, offset=3.0):
    per_column = (1, -1, *(1,) * (len(shape) - 2))
    scale = torch.logspace(-3, 3, shape[1], dtype=torch.float64).view(per_column)
    return (offset + scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_oracle(shape, dtype):
    x = data(shape, dtype)
    norm = assert_fits(InputNorm.fit, x, x.split(3))
    assert norm.mean.dtype == dtype
    z = norm(x).double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(shape[1]).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_a_large_mean_does_not_spoil_the_deviation(offset):
    assert_fits(InputNorm.fit, x := data((500, 3), offset=offset), x.split(7))


@given(cuts=st.lists(st.integers(0, 40), max_size=6), holes=st.integers(0, 40))
def test_any_batching_gives_the_same(cuts, holes):
    generator = torch.Generator().manual_seed(holes)
    x = 100 + torch.randn(40, 3, dtype=torch.float64, generator=generator)
    x[torch.randperm(40, generator=generator)[:holes], 1] = math.nan
    edges = [0, *sorted(cuts), 40]
    batches = [x[a:b] for a, b in itertools.pairwise(edges)]  # empty ones too
    norm = assert_fits(InputNorm.fit, x, batches, missing="mean")
    assert norm.num_values.tolist() == [40, 40 - holes, 40]
    assert norm.num_missing.tolist() == [0, holes, 0]


@pytest.mark.parametrize("load", [load_diabetes, load_breast_cancer])
def test_real_data_as_scikit_learn_scales_it(load):
    x, target = load(return_X_y=True)
    loader = DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(target)), batch_size=37, shuffle=True)
    norm = assert_fits(InputNorm.fit, torch.from_numpy(x), loader)
    torch.testing.assert_close(norm(torch.from_numpy(x)), torch.from_numpy(StandardScaler().fit_transform(x)))
    assert norm.report().startswith(f"InputNorm over {x.shape[1]} columns, {len(x)} values in each")


def test_missing_values_are_left_out_and_become_the_mean():
    x = data((60, 4))
    x[::7, 0] = math.nan
    x[5:50, 2] = math.nan
    x[:, 3] = math.nan
    norm = assert_fits(InputNorm.fit, x, x.split(11), missing="mean")
    assert (norm(x)[x.isnan()] == 0).all()
    back = norm.inverse(norm(x))
    torch.testing.assert_close(back[~x.isnan()], x[~x.isnan()])
    assert (back[::7, 0] == norm.mean[0]).all()
    report = norm.report()
    assert "0 to 60 values in each" in report
    assert "without any value, left at 0: column 3" in report
    assert "missing: 114 values (47.5%), in columns 0, 2, 3" in report
    assert "114 missing" in repr(norm)


def test_nan_stays_nan_unless_it_is_to_be_filled():
    x = data((20, 3))
    norm = InputNorm.fit([x])
    x[2, 1] = math.nan
    assert norm(x).isnan().sum() == 1


@pytest.mark.parametrize("value", [0.0, 0.1, -1e9, 1e-200])
def test_constant_columns_are_centred_and_reported(value):
    x = data((70, 3))
    x[:, 1] = value
    norm = assert_fits(InputNorm.fit, x, x.split(9))
    assert norm.deviation[1] == 0
    assert (norm(x)[:, 1] == 0).all()
    x[0, 1] += 2.5
    assert norm(x)[0, 1] == x[0, 1] - value
    assert (norm.inverse(norm(x))[:, 1] == x[:, 1]).all()
    assert "constant, only centred: column 1" in norm.report()
    assert "constant: column 1" in repr(norm)


def test_many_columns_are_counted():
    assert "columns 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more" in InputNorm.fit([torch.ones(5, 30)]).report()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers(dtype):
    x = torch.randint(0, 255, (8, 3, 6, 6)).to(dtype)
    norm = InputNorm.fit(x.split(2))
    z = norm(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, torch.from_numpy(oracles.input_norm(x.double().numpy())[2]).float())


def test_a_tensor_alone_is_one_batch_and_batches_are_gone_through_once():
    x = data((12, 3, 5))
    assert torch.equal(InputNorm.fit(x).mean, InputNorm.fit(iter([(x, 0)])).mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    x = data((64, 3), torch.float32, offset=0)
    model = nn.Sequential(InputNorm.fit([x]), nn.Linear(3, 2))
    before = model[0].mean.clone()
    model.to(dtype)
    assert torch.equal(model[0].mean, before)
    assert model[0].deviation.dtype == torch.float32
    # Squares of 1000 and what is below 1e-4 are beyond float16: computed wide, rounded once.
    z = model[0](x.to(dtype))
    assert z.dtype == dtype
    torch.testing.assert_close(z, model[0](x.to(dtype).float()).to(dtype))
    assert InputNorm.fit([x.to(dtype)]).mean.dtype == torch.float32
    model[0].load_state_dict({name: value.to(dtype) for name, value in model[0].state_dict().items()}, assign=True)
    assert model[0].deviation.dtype == torch.float32


def test_double_and_back_again():
    norm = InputNorm.fit([data((20, 3), torch.float32)])
    assert norm.double().mean.dtype == torch.float64
    assert norm.float().mean.dtype == torch.float32


def test_it_is_saved_with_the_model_and_cannot_be_forgotten():
    x = data((40, 3), torch.float32)
    model = nn.Sequential(InputNorm.fit([x]), nn.Linear(3, 2))
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    torch.save(model.state_dict(), file := io.BytesIO())
    file.seek(0)
    fresh = nn.Sequential(InputNorm(3), nn.Linear(3, 2))
    with pytest.raises(InputError, match=r"InputNorm at 0 has no statistics: make it with InputNorm.fit"):
        fresh(x)
    assert "not fitted" in repr(fresh)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(fresh(x), y)
    assert not list(fresh[0].parameters())


def test_statistics_that_come_another_way_count_too():
    x = data((40, 3))
    fitted, fresh = InputNorm.fit([x]), InputNorm(3, dtype=torch.float64)
    for mine, theirs in zip(fresh.buffers(), fitted.buffers(), strict=True):
        mine.copy_(theirs)  # as a broadcast does
    assert torch.equal(fresh(x), fitted(x))


def test_gradients_pass():
    norm = InputNorm.fit([data((40, 3))])
    x = data((4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)


def test_compiles_and_exports_and_maps():
    x = data((40, 3), torch.float32)
    x[3, 1] = math.nan
    norm = InputNorm.fit([x], missing="mean")
    expected = norm(x)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(norm, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.vmap(norm)(x.view(4, 10, 3)), expected.view(4, 10, 3))


LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), (50, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 4, bias=False), (50, 6)),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2), (9, 6, 12)),
    "Conv2d, grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (5, 6, 8, 8)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, bias=False), (5, 6, 8, 8)),
    "Conv2d, dilated": (lambda: nn.Conv2d(6, 4, 3, dilation=2), (5, 6, 8, 8)),
    "Conv2d, valid": (lambda: nn.Conv2d(6, 4, 3, padding="valid"), (5, 6, 8, 8)),
    "Conv2d, 1x1, same": (lambda: nn.Conv2d(6, 4, 1, padding="same"), (5, 6, 8, 8)),
    "Conv3d": (lambda: nn.Conv3d(6, 4, 2), (3, 6, 4, 4, 4)),
    **{
        f"Conv2d, {mode}": (
            lambda mode=mode: nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode=mode),
            (5, 6, 8, 8),
        )
        for mode in ("reflect", "replicate", "circular")
    },
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_folds_exactly(make, shape):
    x, layer = data(shape), make().double()
    norm = InputNorm.fit([x])
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    folded = norm.fold_into(layer)
    assert type(folded) is type(layer)
    torch.testing.assert_close(folded(x), layer(norm(x)), rtol=1e-11, atol=1e-11)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    assert (layer.bias is None) == ("bias" not in state)


def test_folds_with_a_constant_column():
    x, layer = data((50, 6)), nn.Linear(6, 4).double()
    x[:, 2] = 7.3
    norm = InputNorm.fit([x])
    torch.testing.assert_close(norm.fold_into(layer)(x + 1), layer(norm(x + 1)), rtol=1e-11, atol=1e-11)


def test_folds_into_zero_padding_only_without_a_mean():
    layer = nn.Conv2d(6, 4, 3, padding=1).double()
    x = data((5, 6, 8, 8))
    norm = InputNorm.fit([x])
    with pytest.raises(InputError, match="pads with zeros: after folding its border would be padded with 0 of the raw"):
        norm.fold_into(layer)
    norm = InputNorm.fit([x, -x])
    norm.mean.zero_()
    torch.testing.assert_close(norm.fold_into(layer)(x), layer(norm(x)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Conv2d(3, 4, 3, padding="same"), "pads with zeros"),
        (lambda: nn.Conv2d(4, 4, 3), "InputNorm of 3 columns got a Conv2d for 4 inputs"),
        (lambda: nn.Linear(9, 4), "InputNorm of 3 columns got a Linear for 9 inputs"),
        (lambda: nn.ConvTranspose2d(3, 4, 3), "folds into one of Linear, Conv1d, Conv2d, Conv3d, got ConvTranspose2d"),
        (lambda: weight_norm(nn.Linear(3, 4)), "got ParametrizedLinear: make_plain comes first"),
        (lambda: nn.LazyLinear(4), "got LazyLinear"),
    ],
)
def test_what_does_not_fold(make, match):
    with pytest.raises(InputError, match=match):
        InputNorm.fit([data((9, 3))]).fold_into(make())


def test_what_is_filled_or_not_fitted_does_not_fold():
    with pytest.raises(InputError, match="fills missing values, which a Linear cannot"):
        InputNorm.fit([data((9, 3))], missing="mean").fold_into(nn.Linear(3, 2))
    with pytest.raises(InputError, match="no statistics to fold"):
        InputNorm(3).fold_into(nn.Linear(3, 2))


def with_value(value):
    x = data((9, 4))
    x[3, 2] = value
    return x


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "got no values: give batches"),
        ([torch.ones(0, 3)], "got no values"),
        ([torch.full((4, 2), math.nan)], r"missing values \(NaN\) in columns 0, 1 of batch 0"),
        ([torch.ones(5)], r"expected \(N, F\) or \(N, C, \*\) of numbers, got \(5,\) .* in batch 0: one sample needs"),
        ([torch.ones(5, 2), torch.ones(5, 3)], r"expected 2 columns, as in the first batch, got 3 in batch 1"),
        ([data((9, 4)), with_value(math.inf)], "infinite values in column 2 of batch 1: look for overflow"),
        ([with_value(-math.inf)], "infinite values in column 2 of batch 0"),
        (
            [with_value(math.nan)],
            r"missing values \(NaN\) in column 2 of batch 0: leave them out, or use missing='mean'",
        ),
        ([np.ones((5, 2))], "expected tensors, got ndarray in batch 0: torch.from_numpy makes one"),
        ([{"x": 1}], "expected tensors, got dict in batch 0"),
        ([torch.ones(5, 2, dtype=torch.bool)], "of numbers, got .* of torch.bool"),
    ],
)
def test_bad_data(batches, match):
    with pytest.raises(InputError, match=match):
        InputNorm.fit(batches)


def test_bad_options_and_calls():
    with pytest.raises(InputError, match="missing must be one of 'error', 'mean', got 'median'"):
        InputNorm.fit([data((9, 3))], missing="median")
    with pytest.raises(InputError, match="num_features must be at least 1, got 0"):
        InputNorm(0)
    norm = InputNorm.fit([data((9, 3))])
    for call in (norm, norm.inverse):
        with pytest.raises(InputError, match=r"expected .* with 3 columns in dimension 1, got \(9, 4\)"):
            call(torch.ones(9, 4))


def mean_of_batch_means(batches):
    norm = InputNorm.fit(batches)
    norm.mean.copy_(torch.stack([b.mean(0) for b in batches]).mean(0))
    return norm


def deviation_within_batches(batches):
    norm = InputNorm.fit(batches)
    norm.deviation.copy_(torch.stack([b.var(0, correction=0) for b in batches]).mean(0).sqrt())
    return norm


def unbiased(batches):
    norm = InputNorm.fit(batches)
    norm.deviation.mul_(math.sqrt(20 / 19))
    return norm


def in_single_precision(batches):
    return InputNorm.fit([b.float() for b in batches]).double()


@pytest.mark.parametrize(
    ("saboteur", "reason"),
    [
        (mean_of_batch_means, "mean is off"),
        (deviation_within_batches, "deviation is off"),
        (unbiased, "deviation is off"),
        (in_single_precision, "mean is off"),
    ],
)
def test_the_comparison_rejects_what_is_wrong(saboteur, reason):
    x = data((20, 3))
    with pytest.raises(AssertionError, match=reason):
        assert_fits(saboteur, x, x.split(7))


def test_the_examples_of_the_page_run(capsys):
    page = (Path(__file__).parents[2] / "docs" / "input.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in (blocks := re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)):
        exec(block, names)
    assert len(blocks) == 2
    assert capsys.readouterr().out.strip() == re.search(r"report\(\)\)  # (.*)", page)[1]
