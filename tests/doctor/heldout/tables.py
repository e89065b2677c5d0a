"""Held-out cases on tables of measurements: regression and classification by dense networks."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from tests.doctor.heldout import data
from tests.doctor.heldout.held import Subject, at, fit, planted


def squared(output, batch):
    return F.mse_loss(output, batch[1])


def explained(output, batch):
    return {"explained": 1 - float(F.mse_loss(output, batch[1]))}


def logistic(output, batch):
    return F.binary_cross_entropy_with_logits(output.float(), batch[1].float())


def accuracy(output, batch):
    return {"accuracy": ((output > 0) == (batch[1] > 0.5)).float().mean().item()}


def classes(output, batch):
    return F.cross_entropy(output, batch[1])


def right(output, batch):
    return {"accuracy": (output.argmax(1) == batch[1]).float().mean().item()}


REGRESSION = {"loss": squared, "metrics": explained}
TUMOURS = {"loss": logistic, "metrics": accuracy}
GROWERS = {"loss": classes, "metrics": right}


def subject(model, split, task, *, size=32, steps=80, lr=5e-3, optimizer=torch.optim.Adam, **how):
    """A model trained on a split, with loaders over both halves."""
    train, test = split
    train_batches = data.loader(train, size, **how)
    maker = optimizer(model.parameters(), lr=lr)
    if steps:
        is_sorted = how.get("shuffle") is False
        fit(model, train_batches if is_sorted else data.loader(train, size), task["loss"], maker, steps)
    return Subject(model, data.loader(test, 64, shuffle=False, drop_last=False), train_batches, optimizer=maker, **task)


def regressor(inputs=10, width=24, **norm):
    """Linear, norm, activation, twice, and a number."""
    return nn.Sequential(
        nn.Linear(inputs, width, bias=False),
        nn.BatchNorm1d(width, **norm),
        nn.SiLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width, **norm),
        nn.SiLU(),
        nn.Linear(width, 1),
    )


@planted("a row left over", ("SN101", "0"), also=at("SN101", "2"))
def a_row_left_over(is_faulty):
    model = nn.Sequential(
        nn.BatchNorm1d(30), nn.Linear(30, 32, bias=False), nn.BatchNorm1d(32), nn.ELU(), nn.Linear(32, 1)
    )
    train, test = data.halves(*data.cancer(False))
    train = [t[: 16 * 20 + 1] for t in train]
    return subject(model, (train, test), TUMOURS, size=16, drop_last=not is_faulty)


@planted("four patients a batch", ("SN102", "1"))
def four_patients_a_batch(is_faulty):
    model = regressor()
    return subject(
        model, data.halves(*data.diabetes()), REGRESSION, size=4 if is_faulty else 64, optimizer=torch.optim.AdamW
    )


@planted("two rows left over", ("SN402", "1"))
def two_rows_left_over(is_faulty):
    train, test = data.halves(*data.cancer())
    train = [t[: 24 * 14 + 2] for t in train]
    return subject(regressor(30), (train, test), TUMOURS, size=24, drop_last=not is_faulty)


@planted("dropout before a bottleneck's norm", ("SN107", "norm"), notes=True)
def dropout_before_a_bottlenecks_norm(is_faulty):
    parts = [("squeeze", nn.Linear(30, 6)), ("act", nn.SELU())]
    rest = [("drop", nn.Dropout(0.6)), ("norm", nn.BatchNorm1d(6))]
    parts += rest if is_faulty else rest[::-1]
    model = nn.Sequential(
        OrderedDict([*parts, ("expand", nn.Linear(6, 12)), ("act2", nn.ReLU()), ("head", nn.Linear(12, 1))])
    )
    return subject(model, data.halves(*data.cancer()), TUMOURS, steps=150)


@planted("an average too slow for eighty steps", *at("SN109", "1", "4"), also=at("SN203", "1", "4"))
def an_average_too_slow(is_faulty):
    model = regressor(momentum=0.002 if is_faulty else 0.1)
    return subject(model, data.halves(*data.diabetes()), REGRESSION, optimizer=torch.optim.SGD, lr=0.05)


@planted("raw measurements into a linear layer", ("SN406", "0"))
def raw_measurements(is_faulty):
    model = nn.Sequential(nn.Linear(30, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 1))
    return subject(model, data.halves(*data.cancer(not is_faulty)), TUMOURS)


@planted("a column that never varies", ("SN407", "0"), notes=True)
def a_column_that_never_varies(is_faulty):
    x, y = data.cancer(False)
    x = x[:, :12].clone()
    if is_faulty:
        x[:, 5] = 3.0
    model = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))
    made = subject(model, data.halves(x, y), TUMOURS)
    made.select = ("SN407",)
    return made


@planted("a missing value in one step", *at("SN202", "0", "2"))
def a_missing_value_in_one_step(is_faulty):
    model = nn.Sequential(
        nn.BatchNorm1d(13), nn.Linear(13, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)
    )
    made = subject(model, data.halves(*data.wine(), share=0.5), GROWERS, size=16)
    x = next(iter(made.train_batches))[0].clone()
    if is_faulty:
        x[3, 7] = torch.nan
    model(x)  # its loss is not finite, and the step is skipped
    return made


@planted("missing values in new data", ("SN002", ""))
def missing_values_in_new_data(is_faulty):
    train, (x, y) = data.halves(*data.diabetes())
    x = x.clone()
    if is_faulty:
        x[::40, 2] = torch.nan
    return subject(regressor(), (train, [x, y]), REGRESSION)


@planted("finetuned with momentum 0", *at("SN110", "1", "4"), *at("SN203", "1", "4"))
def finetuned_with_momentum_zero(is_faulty):
    x, y = data.cancer()
    model = regressor(30)
    subject(model, data.halves(x, y), TUMOURS)
    if is_faulty:
        for i in (1, 4):
            model[i].momentum = 0.0
    return subject(model, data.halves(2.5 * x + 1, y), TUMOURS)  # another hospital's units


@planted(
    "trained in bfloat16", *at("SN206", "1", "4"), also=[*at("SN203", "1", "4"), *at("SN109", "1", "4"), ("SN501", "1")]
)
def trained_in_bfloat16(is_faulty):
    model = regressor(momentum=0.01).bfloat16()
    if not is_faulty:
        model[1].float()
        model[4].float()
    x, y = data.diabetes()
    split = data.halves((3 * x + 4).bfloat16(), y.bfloat16())
    return subject(model, split, REGRESSION, optimizer=torch.optim.SGD, lr=0.05, steps=400)


@planted("years in bfloat16", ("SN501", "norm"))
def years_in_bfloat16(is_faulty):
    x, y = data.diabetes()
    years = (1990 if is_faulty else 0) + 6 * x[:, :1]
    x = torch.cat([years, x[:, 1:]], 1).bfloat16()
    layers = [("norm", nn.BatchNorm1d(10).float()), ("first", nn.Linear(10, 24)), ("act", nn.GELU())]
    model = nn.Sequential(OrderedDict([*layers, ("last", nn.Linear(24, 1))])).bfloat16()
    model.norm.float()
    return subject(model, data.halves(x, y.bfloat16()), REGRESSION)


@planted("measured in metres", ("SN111", "0"), also=[("SN109", "0")], notes=True)
def measured_in_metres(is_faulty):
    x, y = data.diabetes()
    model = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 1))
    return subject(model, data.halves(x * (1e-3 if is_faulty else 1.0), y), REGRESSION)


@planted("channels pruned by their gammas", ("SN112", "4"), notes=True)
def channels_pruned_by_their_gammas(is_faulty):
    made = subject(regressor(), data.halves(*data.diabetes()), REGRESSION)
    if is_faulty:
        with torch.no_grad():
            made.model[4].weight[:9] = 0
    return made


@planted("a head that came after the optimizer", ("SN702", "head.1"))
def a_head_that_came_after_the_optimizer(is_faulty):
    def head(outputs):
        return nn.Sequential(nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.LeakyReLU(), nn.Linear(16, outputs))

    body = nn.Sequential(nn.Linear(13, 16, bias=False), nn.BatchNorm1d(16), nn.LeakyReLU())
    model = nn.Sequential(OrderedDict(body=body, head=head(5)))
    x, y = data.wine()
    split = data.halves((x - x.mean(0)) / x.std(0), y, share=0.5)
    made = subject(model, split, GROWERS, size=16)
    model.head = head(3)
    if not is_faulty:
        made.optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    fit(model, made.train_batches, classes, made.optimizer, 60)
    return made


class Forgotten(nn.Module):
    """A residual network of which one norm is made and not called."""

    def __init__(self, is_called):
        super().__init__()
        self.enter = nn.Linear(10, 20)
        self.norm1, self.norm2 = nn.LayerNorm(20), nn.LayerNorm(20)
        self.mix1, self.mix2 = nn.Linear(20, 20), nn.Linear(20, 20)
        self.head = nn.Linear(20, 1)
        self.is_called = is_called

    def forward(self, x):
        x = self.enter(x)
        x = x + F.gelu(self.mix1(self.norm1(x)))
        x = x + F.gelu(self.mix2(self.norm2(x) if self.is_called else x))
        return self.head(x)


@planted("a norm that is made and not called", ("SN118", "norm2"), notes=True)
def a_norm_that_is_not_called(is_faulty):
    return subject(Forgotten(not is_faulty), data.halves(*data.diabetes()), REGRESSION)
