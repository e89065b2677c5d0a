"""DomainBatchNorm1d, 2d, 3d: a mixed batch is a batch for each domain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import steadynorm
from steadynorm.errors import DegenerateStatisticsError, InputError, NonFiniteStatisticsError
from steadynorm.layers import BatchNorm1d, BatchNorm2d, DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d
from tests import batch_oracles, cases
from tests.agree import assert_agrees

LAYERS = {2: DomainBatchNorm1d, 3: DomainBatchNorm1d, 4: DomainBatchNorm2d, 5: DomainBatchNorm3d}
CASES = [case for case in cases.TRAINING if case.shape[0] >= 4 and case.mask != "lost sample"]
# Statistics of the domain that is not the one compared.
ELSEWHERE = (3.0, 2.5)


def ids_of(samples: int) -> torch.Tensor:
    return (torch.arange(samples) * 3) % 5 % 2


def through_the_layer(
    x, mean, var, weight, bias, training, momentum, eps, *, activation=None, residual=None, mask=None, ids=ids_of
):
    """The running statistics that are compared are those of domain 0."""
    layer = LAYERS[x.dim()](x.shape[1], eps, momentum, affine=weight is not None, activation=activation, num_domains=2)
    layer.train(training).to(mean.dtype)
    for name, given, other in (("running_mean", mean, ELSEWHERE[0]), ("running_var", var, ELSEWHERE[1])):
        getattr(layer, name).copy_(torch.stack([given, torch.full_like(given, other)]))
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None:
            layer._parameters[name] = given
    y = layer(x, ids(x.shape[0]), residual, mask)
    if training:
        mean.copy_(layer.running_mean[0]), var.copy_(layer.running_var[0])
    return y


def oracle(x, *settings, **options):
    elsewhere = tuple(0 * x[0, :, ...].reshape(x.shape[1], -1)[:, 0] + value for value in ELSEWHERE)
    return batch_oracles.domain(x, *settings, **options, ids=ids_of(x.shape[0]).numpy(), elsewhere=elsewhere)


@pytest.mark.parametrize("case", [*CASES[::3], cases.BY_NAME["plain, evaluation"]], ids=str)
def test_agrees_with_the_formulas(case):
    assert_agrees(through_the_layer, oracle, case)


def domains_mixed(x, mean, var, weight, bias, training, momentum, eps):
    return nn.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def domains_swapped(x, *settings):
    return through_the_layer(x, *settings, ids=lambda samples: 1 - ids_of(samples))


def left_in_the_order_of_the_domains(x, *settings):
    order = torch.argsort(ids_of(x.shape[0]), stable=True)
    return through_the_layer(x, *settings)[order]


@pytest.mark.parametrize(
    ("saboteur", "reason"),
    [(domains_mixed, "y is off"), (domains_swapped, "running_mean is off"), (left_in_the_order_of_the_domains, "y is")],
)
def test_the_comparison_rejects(saboteur, reason):
    with pytest.raises(AssertionError, match=reason):
        assert_agrees(saboteur, oracle, cases.PLAIN)


@pytest.mark.parametrize("options", [{}, {"momentum": None, "activation": "relu"}, {"affine": False}], ids=str)
def test_one_domain_is_a_batch_norm_bit_for_bit(options):
    ours, plain = DomainBatchNorm2d(3, num_domains=1, **options), BatchNorm2d(3, **options)
    for training in (False, True, True, False):
        ours.train(training), plain.train(training)
        x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(leaf, torch.zeros(4, dtype=torch.int64)), plain(other)
        y.backward(dy), expected.backward(dy)
        assert torch.equal(y, expected)
        assert torch.equal(leaf.grad, other.grad)
    for name, buffer in plain.named_buffers():
        assert torch.equal(ours.get_buffer(name)[0], buffer)


@pytest.mark.parametrize("shared", [True, False])
def test_domains_are_batch_norms_of_their_own(shared):
    ours = DomainBatchNorm1d(3, num_domains=3, shared_affine=shared)
    plains = [BatchNorm1d(3) for _ in range(3)]
    with torch.no_grad():
        for row, plain in enumerate(plains):
            plain.weight.copy_(torch.rand(3))
            (ours.weight if shared else ours.weight[row]).copy_(plains[0].weight if shared else plain.weight)
            plain.weight.copy_(plains[0].weight if shared else plain.weight)
    for domain in (torch.tensor([0, 2, 0, 2, 2, 0, 0]), torch.tensor([1, 1, 1, 2, 2, 2, 2])):
        x = torch.randn(7, 3, 4) * (domain + 1)[:, None, None]
        y = ours(x, domain)
        for row in domain.unique().tolist():
            torch.testing.assert_close(y[domain == row], plains[row](x[domain == row]))
    assert ours.num_batches_tracked.tolist() == [1, 1, 2]
    for row, plain in enumerate(plains):
        torch.testing.assert_close(ours.running_var[row], plain.running_var)
    x, domain = torch.randn(4, 3, 4), torch.tensor([1, 0, 2, 1])
    y = ours.eval()(x, domain)
    for sample, row in enumerate(domain.tolist()):
        torch.testing.assert_close(y[sample], plains[row].eval()(x[sample : sample + 1])[0])


def test_masks_and_parts_are_the_same_function():
    """The one is for graphs and transforms, the other for everything else."""
    domain = torch.tensor([0, 1, 0, 1, 0, 2])
    for options in ({}, {"single_value": "running", "unknown": "pooled"}):
        by_parts = DomainBatchNorm1d(3, num_domains=3, activation="silu", dtype=torch.float64, **options)
        by_masks = copy.deepcopy(by_parts)
        for training in (True, True, False):
            by_parts.train(training), by_masks.train(training)
            x, mask = torch.randn(6, 3, 4, dtype=torch.float64), torch.rand(6, 4) > 0.2
            mask[:, :2] = True
            residual = torch.randn_like(x)
            torch.testing.assert_close(
                by_masks._by_masks(x, domain, residual, mask), by_parts._by_parts(x, domain, residual, mask)
            )
        for ours, theirs in zip(by_masks.buffers(), by_parts.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", ["_by_masks", "_by_parts"])
def test_a_single_sample_by_the_running_statistics_of_its_domain(way):
    layer = DomainBatchNorm1d(3, num_domains=2, single_value="running")
    for _ in range(2):
        layer(torch.randn(8, 3) + 4, torch.tensor([0, 1] * 4))
    before = copy.deepcopy(layer)
    x, domain = torch.randn(5, 3), torch.tensor([0, 0, 1, 0, 0])
    y = getattr(layer, way)(x, domain, None, None)
    torch.testing.assert_close(y[2:3], before.eval()(x[2:3], domain[2:3]))
    assert torch.equal(layer.running_mean[1], before.running_mean[1])
    assert layer.num_batches_tracked.tolist() == [3, 2]


def test_a_single_sample_is_an_error_that_names_its_domain_and_changes_nothing():
    layer = DomainBatchNorm1d(3, num_domains=3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(DegenerateStatisticsError, match=r"of every domain in training, got one of domain 2, whose"):
        layer(torch.randn(5, 3), torch.tensor([0, 0, 2, 1, 1]))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    layer(torch.randn(5, 3, 2), torch.tensor([0, 0, 2, 1, 1]))


def trained_on_two() -> DomainBatchNorm1d:
    layer = DomainBatchNorm1d(3, num_domains=3, momentum=None, dtype=torch.float64)
    layer(torch.randn(40, 3, 5, dtype=torch.float64) + 2, torch.arange(40) % 2)
    layer(torch.randn(40, 3, 5, dtype=torch.float64) * 3, torch.zeros(40, dtype=torch.int64))
    return layer


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ([0, 3], r"expected domains 0 to 2, got 3: with unknown='pooled'"),
        ([-1, 1], r"expected domains 0 to 2, got -1"),
        ([2, 1], r"expected domains that have been trained, got 2"),
    ],
)
def test_an_unknown_domain_is_an_error(domain, message):
    with pytest.raises(InputError, match=message):
        trained_on_two().eval()(torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor(domain))


def test_a_layer_that_no_domain_has_trained_evaluates_as_a_fresh_batch_norm():
    x = torch.randn(4, 3)
    y = DomainBatchNorm1d(3, num_domains=2).eval()(x, torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(y, nn.BatchNorm1d(3).eval()(x))


@pytest.mark.parametrize("way", ["_by_masks", "_by_parts"])
def test_an_unknown_domain_by_the_pooled_statistics(way):
    layer = trained_on_two()
    layer.unknown = "pooled"
    merged = layer.merge_domains().eval()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    y = getattr(layer.eval(), way)(x, torch.tensor([0, 7, 2, -3]), None, None)
    torch.testing.assert_close(y[1:], merged(x[1:]))
    torch.testing.assert_close(y[:1], layer.merge_domains([0]).eval()(x[:1]))
    before = layer.running_mean.clone()
    y = getattr(layer.train(), way)(x, torch.full((4,), 9), None, None)
    torch.testing.assert_close(y, merged(x))
    assert torch.equal(layer.running_mean, before)


def test_in_a_graph_an_unknown_domain_is_not_a_number():
    layer = trained_on_two().eval()
    y = layer._by_masks(torch.randn(3, 3, 5, dtype=torch.float64), torch.tensor([0, 5, 2]), None, None)
    assert y.isnan().flatten(1).all(1).tolist() == [False, True, True]


def test_merged_is_pooled():
    """From batches of the same size with momentum None, the pooled statistics are those of all batches."""
    layer = trained_on_two()
    mean, var, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert batches.tolist() == [2, 1, 0]
    share = torch.tensor([2 / 3, 1 / 3, 0], dtype=torch.float64)[:, None]
    pooled = (share * mean).sum(0)
    merged = layer.merge_domains()
    assert type(merged) is BatchNorm1d
    torch.testing.assert_close(merged.running_mean, pooled)
    torch.testing.assert_close(merged.running_var, (share * (var + (mean - pooled).square())).sum(0))
    assert merged.num_batches_tracked.item() == 3
    alone = layer.merge_domains([1])
    assert torch.equal(alone.running_var, var[1])
    merged(torch.randn(4, 3, dtype=torch.float64))
    assert torch.equal(layer.running_mean, mean)
    assert layer.num_batches_tracked.tolist() == [2, 1, 0]


def test_merging_keeps_the_settings():
    layer = DomainBatchNorm2d(3, 1e-3, 0.3, num_domains=2, activation="relu", guard="raise", bias=False).bfloat16()
    layer.weight.data.fill_(2)
    norm = layer.freeze_().eval().merge_domains()
    expected = BatchNorm2d(3, 1e-3, 0.3, activation="relu", guard="raise", bias=False).freeze_()
    assert repr(norm) == repr(expected)
    assert not norm.training
    assert norm.weight.tolist() == [2, 2, 2]
    assert (norm.weight.dtype, norm.running_mean.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(norm.running_var, torch.ones(3))


def test_weights_of_their_own_are_merged_one_at_a_time():
    layer = DomainBatchNorm1d(3, num_domains=2, shared_affine=False)
    layer.weight.data[1] = 5
    with pytest.raises(InputError, match="has a weight and bias for every domain, which one batch norm cannot hold"):
        layer.merge_domains()
    assert layer.merge_domains([1]).weight.tolist() == [5, 5, 5]
    with pytest.raises(InputError, match=r"has domains 0 to 1, got \[2\]"):
        layer.merge_domains([2])


def test_what_is_not_finite_stays_out_of_its_domain_alone():
    x, domain = torch.randn(8, 3), torch.arange(8) % 2
    x[1, 2] = torch.nan
    layer = DomainBatchNorm1d(3, num_domains=2)
    layer(x, domain)
    assert layer.num_batches_tracked.tolist() == [1, 0]
    raising = DomainBatchNorm1d(3, num_domains=2, guard="raise")
    with pytest.raises(NonFiniteStatisticsError, match="channel 2"):
        raising(x, domain)
    assert raising.num_batches_tracked.tolist() == [0, 0], "nor the domain before it"


@pytest.mark.parametrize("shared", [True, False])
def test_a_plain_batch_norm_is_where_every_domain_starts(shared):
    plain = nn.BatchNorm1d(3)
    plain(torch.randn(16, 3) + 2)
    plain.weight.data.fill_(3)
    layer = DomainBatchNorm1d(3, num_domains=2, shared_affine=shared)
    layer.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.eval()(x, torch.tensor([0, 1, 1, 0])), plain.eval()(x))


def test_without_running_statistics_every_domain_is_normalised_by_its_batch():
    layer = DomainBatchNorm1d(3, num_domains=2, track_running_stats=False, unknown="pooled").eval()
    x, domain = torch.randn(6, 3, 4), torch.tensor([0, 1] * 3)
    torch.testing.assert_close(layer(x, domain)[1::2], nn.BatchNorm1d(3)(x[1::2]))
    with pytest.raises(InputError, match="expected domains 0 to 1, got 5"):
        layer(x, torch.full((6,), 5))


@pytest.mark.parametrize(
    ("domain", "given"),
    [
        (torch.zeros(4), r"\(4,\) of torch.float32"),
        (torch.zeros(4, dtype=torch.bool), r"\(4,\) of torch.bool"),
        (torch.zeros(3, dtype=torch.int64), r"\(3,\) of torch.int64"),
        (torch.zeros(4, 1, dtype=torch.int64), r"\(4, 1\) of torch.int64"),
        (1, "1"),
    ],
    ids=str,
)
def test_a_domain_that_is_none_is_refused(domain, given):
    layer = DomainBatchNorm1d(3, num_domains=2)
    with pytest.raises(InputError, match=rf"expected a domain \(4,\) of an integer dtype, got {given}: one number per"):
        layer(torch.randn(4, 3), domain)
    assert layer.num_batches_tracked.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_domains": 0}, "num_domains must be a positive integer, got 0"),
        ({"num_domains": 2.0}, "num_domains must be a positive integer, got 2.0"),
        ({"num_domains": 2, "unknown": "skip"}, "unknown must be one of 'error', 'pooled', got 'skip'"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=f"DomainBatchNorm2d: {message}"):
        DomainBatchNorm2d(3, **options)


def test_an_empty_batch_changes_nothing():
    layer = DomainBatchNorm2d(3, num_domains=2)
    assert layer(torch.randn(0, 3, 2, 2), torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 2, 2)
    assert layer.num_batches_tracked.tolist() == [0, 0]


def test_it_is_not_taken_for_a_layer_with_one_set_of_statistics():
    layer = steadynorm.DomainBatchNorm2d(3, num_domains=4)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert "num_domains=4" in repr(layer)
