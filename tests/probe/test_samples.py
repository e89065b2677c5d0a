from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from steadynorm.probe import samples

Pair = namedtuple("Pair", "left right")


@dataclass
class Scored:
    logits: torch.Tensor
    name: str = "x"


X = torch.arange(12.0).reshape(4, 3)
NESTED = [X, (X, [X]), {"a": X, "b": Pair(X, None)}, Scored(X), OrderedDict(x=X), "text", 3]


def test_tensors_are_found_in_whatever_holds_them():
    assert [t.shape for t in samples.tensors_in(NESTED)] == [X.shape] * 7


def test_a_nested_value_is_rebuilt_around_its_tensors():
    doubled = samples.map_tensors(lambda t: t * 2, NESTED)
    assert all(torch.equal(t, X * 2) for t in samples.tensors_in(doubled))
    assert isinstance(doubled[2]["b"], Pair)
    assert isinstance(doubled[3], Scored)
    assert doubled[5:] == ["text", 3]
    assert all(t is X for t in samples.tensors_in(NESTED))


def test_samples_are_taken_from_every_tensor_that_has_them():
    batch = ((X, torch.tensor(1.0)), torch.arange(4), torch.zeros(7))
    (x, scalar), labels, other = samples.take(batch, [0, 2])
    assert x.tolist() == X[[0, 2]].tolist()
    assert scalar == 1
    assert labels.tolist() == [0, 2]
    assert other.shape == (7,)


def test_join_is_the_samples_of_both():
    joined = samples.join((X, {"y": X}), (X + 1, {"y": X + 2}))
    assert torch.equal(joined[0], torch.cat([X, X + 1]))
    assert torch.equal(joined[1]["y"], torch.cat([X, X + 2]))


def test_the_number_of_samples_is_what_all_inputs_share():
    assert samples.sample_count((X, torch.zeros(4, 9), torch.tensor(0))) == 4
    assert samples.sample_count((X, torch.zeros(5, 9))) is None


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 2)])
def test_a_sample_that_comes_first(shape):
    x = torch.randn(shape)
    (reading,) = samples.readings(x, 5)
    assert torch.equal(reading, x[:1])


def test_a_sample_folded_with_time_is_read_on_both_sides():
    x = torch.randn(5, 4, 3)
    by_sample, by_time = x.reshape(20, 3), x.transpose(0, 1).reshape(20, 3)
    assert any(torch.equal(reading, x[0]) for reading in samples.readings(by_sample, 5))
    assert any(torch.equal(reading, x[0]) for reading in samples.readings(by_time, 5))


def test_a_sample_that_comes_second():
    x = torch.randn(7, 5, 3)
    assert any(torch.equal(reading, x[:, 0]) for reading in samples.readings(x, 5))


def test_no_reading_where_no_size_fits():
    assert samples.readings(torch.randn(7, 3), 5) == []
    assert samples.readings(torch.tensor(1.0), 5) == []


def test_broken_inputs():
    nan, inf = float("nan"), float("inf")
    assert samples.is_broken_input(torch.tensor([1.0, nan]))
    assert samples.is_broken_input(torch.tensor([1.0, inf]))
    assert not samples.is_broken_input(torch.tensor([0.0, -inf]))  # an attention mask
    assert not samples.is_broken_input(torch.tensor([1, 2]))


def test_scores_are_known_by_the_classes_in_the_batch():
    output, classes = torch.randn(4, 10), torch.zeros(4, dtype=torch.long)
    assert samples.scores(output, (X, classes)) is output
    assert samples.scores({"loss": torch.tensor(0.0), "logits": output}, {"x": X, "labels": classes}) is output
    pixels = torch.randn(4, 10, 8, 8)
    assert samples.scores(pixels, (X, torch.zeros(4, 8, 8, dtype=torch.long))) is pixels
    assert samples.scores(output, X) is None
    assert samples.scores(output, (X, torch.randn(4))) is None
    assert samples.scores(output[:, :1], (X, classes)) is None


def test_relative_difference():
    a = torch.tensor([1.0, -4.0, torch.nan])
    assert samples.relative_difference(a, a.clone()) == 0
    assert samples.relative_difference(a, torch.tensor([2.0, -4.0, torch.nan])) == 0.25
    assert samples.relative_difference(a, torch.tensor([1.0, -4.0, 0.0])) == torch.inf
    assert samples.relative_difference(torch.tensor([1]), torch.tensor([2])) == 1
    assert samples.relative_difference(torch.zeros(2), torch.tensor([0.0, 3.0])) == 1
