import pytest
import torch
from torch import nn

from steadynorm.probe.isolation import leaks
from steadynorm.probe.trace import NotPossible
from steadynorm.recipe import call


class Through(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def places(model, x):
    return [leak.path for leak in leaks(model.eval(), [x], call)]


def net(function):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), Through(function), nn.ReLU(), nn.Linear(7, 3))


X = torch.randn(11, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0),
        lambda x: x.softmax(0),
        lambda x: x / x.amax(),
        lambda x: x / x.norm(dim=0),
        lambda x: x.flip(0),
        lambda x: x.cumsum(0).flip(0),
        lambda x: x.cumsum(0),
        lambda x: x - torch.cat([x[:1], x[:-1]]),
        lambda x: x.T.reshape(x.shape),
        lambda x: x + 1e-5 * x.sum(0),
    ],
)
def test_a_leak_is_found_at_its_module(function):
    assert places(net(function), X) == ["2"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.softmax(1),
        lambda x: x.T.contiguous().T,
        lambda x: x + torch.rand_like(x),  # the same random numbers in every pass
        lambda x: torch.stack([x, x]).transpose(0, 1).reshape(-1, 7).reshape(x.shape[0], 2, 7).sum(1),
        lambda x: torch.cat([x, x]).reshape(2, -1, 7).sum(0),
    ],
)
def test_what_keeps_samples_apart_is_left_alone(function):
    assert places(net(function), X) == []


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 40])
def test_any_batch_of_two_or_more_will_do(count):
    x = torch.randn(count, 3, 4)
    assert places(net(lambda x: x - x.mean(0)), x) == ["2"]
    assert places(net(lambda x: x), x) == []


def test_a_recurrence_over_the_samples_is_found_though_the_first_one_begins_it():
    class Sequences(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.rnn, self.last = nn.GRU(4, 6, batch_first=batch_first), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.rnn(x)[0][:, -1])

    assert places(Sequences(batch_first=False), X) == ["rnn"]
    assert places(Sequences(batch_first=True), X) == []


def test_a_maximum_is_found_though_the_first_sample_holds_it():
    x = X.clone()
    x[0] += 10
    assert places(nn.Sequential(nn.ReLU(), Through(lambda x: x / x.amax())), x) == ["1"]


def test_places_that_are_given_in_order_are_found_though_the_last_sample_never_gets_one():
    x = X.abs()
    x[0] = -x[0]  # leaves the only place to the second sample
    model = nn.Sequential(nn.Flatten(), Through(lambda x: x * ((x[:, :1] > 0).cumsum(0) <= 1)))
    assert places(model, x) == ["1"]


def test_a_leak_behind_weights_that_begin_at_zero_is_found_and_the_weights_are_put_back():
    class Branch(nn.Module):
        def __init__(self, axis):
            super().__init__()
            self.scale, self.axis = nn.Parameter(-torch.zeros(3, 4)), axis

        def forward(self, x):
            return x + self.scale * nn.functional.normalize(x, dim=self.axis)

    model = nn.Sequential(nn.ReLU(), Branch(0), Branch(2))
    (leak,) = leaks(model.eval(), [X], call)
    assert (leak.path, leak.output_change) == ("1", 0)
    assert all(bool((p == 0).all() and p.signbit().all()) for p in model.parameters())
    assert places(nn.Sequential(Branch(2), Branch(1)), X) == []


def test_single_samples_are_joined():
    batches = list(torch.randn(3, 1, 3, 4))
    assert [leak.path for leak in leaks(net(lambda x: x - x.mean(0)).eval(), batches, call)] == ["2"]
    with pytest.raises(NotPossible, match="single sample"):
        leaks(net(lambda x: x).eval(), batches[:1], call)


def test_time_major_and_folded_tensors_are_read_right():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.each, self.gru, self.last = nn.Linear(4, 6), nn.GRU(6, 6), nn.Identity()

        def forward(self, x):
            n, t, _ = x.shape
            frames = self.each(x.transpose(0, 1).reshape(t * n, -1))
            return self.last(self.gru(frames.reshape(t, n, -1))[0][-1])

    assert places(Frames(), X) == []


def test_two_leaks_side_by_side_are_both_found():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (Through(f) for f in (lambda x: x.mean(0) + x, lambda x: x.amax() * x, torch.relu))

        def forward(self, x):
            return self.a(x) + self.b(x) + self.c(x)

    assert sorted(places(Branches(), X)) == ["a", "b"]


def test_a_leak_in_the_code_of_a_parent_is_found_though_its_output_hides_it():
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x + 0 * self.inner(x - x.mean(0))

    (leak,) = leaks(nn.Sequential(nn.ReLU(), Hides()).eval(), [X], call)
    assert leak.path == "1"
    assert leak.output_change == 0
    assert leak.change > 0.1


def test_nan_is_a_second_witness_which_zeros_do_not_fool():
    (leak,) = leaks(net(lambda x: x - x.mean(0)).eval(), [X], call)
    assert leak.is_confirmed
    # A product with zero takes NaN across without taking values across.
    assert places(net(lambda x: torch.eye(len(x)) @ x), X) == []


def test_inputs_of_different_lengths_cannot_be_told_apart():
    class Two(nn.Module):
        def forward(self, x, y):
            return x.sum() + y.sum()

    with pytest.raises(NotPossible, match="differ in their first size"):
        leaks(Two(), [((torch.zeros(4, 2), torch.zeros(3, 2)),)], call)


def test_a_model_that_goes_another_way_for_other_data_is_not_judged():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x[1, 0, 0] > 0 else self.b(x)

    x = X.clone()
    x[1], x[2:] = x[1].abs(), -x[2:].abs()
    with pytest.raises(NotPossible, match="does not call the same modules"):
        leaks(Chooses(), [x], call)
