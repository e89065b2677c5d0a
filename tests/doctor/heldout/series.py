"""Held-out cases on series of lines of source code, by convolutions and recurrences."""

import torch
from torch import nn
from torch.nn import functional as F

import steadynorm
from tests.doctor.heldout import data
from tests.doctor.heldout.held import Subject, at, fit, planted
from tests.doctor.heldout.tables import REGRESSION, squared, subject


def of_lines():
    return data.halves(*data.lines())


class Forecast(nn.Module):
    """The indent and the longest: a recurrence over lines (N, 5, T), whichever axis it takes for time."""

    def __init__(self, batch_first):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.rnn = nn.GRU(5, 24, batch_first=batch_first)
        self.head = nn.Linear(24, 2)

    def forward(self, lines):
        return self.head(self.rnn(self.norm(lines).mT)[0][:, -1])


@planted("a recurrence over the samples", ("SN801", "rnn"))
def a_recurrence_over_the_samples(is_faulty):
    return subject(Forecast(not is_faulty), of_lines(), REGRESSION, steps=60)


def padded(series, lengths, labels):
    """A batch of series cut to their lengths, padded with zeros to the longest of the batch."""
    longest = int(lengths.max())
    inside = torch.arange(longest) < lengths[:, None]
    return {"series": series[..., :longest] * inside[:, None], "lengths": lengths}, labels


class Lengths(nn.Module):
    """Series of their own lengths, in a dictionary: a convolution, a norm that is told the lengths or not, the mean."""

    def __init__(self, norm, is_told):
        super().__init__()
        self.conv = nn.Conv1d(5, 24, 3, padding=1, bias=False)
        self.norm = norm
        self.head = nn.Linear(24, 2)
        self.is_told = is_told

    def forward(self, series, lengths):
        inside = (torch.arange(series.shape[2]) < lengths[:, None])[:, None]
        x = self.conv(series)
        x = F.relu(self.norm(x, lengths=lengths) if self.is_told else self.norm(x)) * inside
        return {"about": self.head(x.sum(2) / lengths[:, None])}


def of_lengths(norm, is_faulty):
    series, target = data.lines()
    lengths = torch.randint(6, 33, (len(series),), generator=torch.Generator().manual_seed(3))
    series = torch.stack([torch.roll(s, int(n), 1) for s, n in zip(series, lengths, strict=True)])  # the last lines
    train, test = data.halves(series, lengths, target)
    model = Lengths(norm, not is_faulty)

    def loss(output, batch):
        return F.mse_loss(output["about"], batch[1])

    batches = data.loader(train, 32, collate=padded)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    fit(model, batches, loss, optimizer, 100)
    held = data.loader(test, 64, shuffle=False, drop_last=False, collate=padded)
    return Subject(model, held, batches, loss, optimizer=optimizer)


@planted("padding in a group norm of lines", ("SN403", "norm"))
def padding_in_a_group_norm(is_faulty):
    return of_lengths(steadynorm.GroupNorm(4, 24), is_faulty)


@planted("padding in a batch norm of lines", ("SN403", "norm"), also=[("SN203", "norm")], notes=True)
def padding_in_a_batch_norm(is_faulty):
    return of_lengths(steadynorm.BatchNorm1d(24), is_faulty)


@planted("instance norms of series that track", ("SN114", "1"))
def instance_norms_that_track(is_faulty):
    series, _ = data.lines()
    gains, offsets = torch.randn(2, len(series), 1, 1)
    where = series[:, 1].argmax(1, keepdim=True) / 16 - 1  # of the longest line
    model = nn.Sequential(
        nn.Conv1d(5, 16, 5, padding=2, bias=False),
        nn.InstanceNorm1d(16, affine=True, track_running_stats=is_faulty),
        nn.ReLU(),
        nn.Conv1d(16, 8, 5, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 1),
    )
    return subject(model, data.halves(series * gains.exp() + offsets, where), REGRESSION, steps=200)


class Level(nn.Module):
    """One level of a temporal network, with its norm written out."""

    def __init__(self, width, dilation, is_hard_coded):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.is_hard_coded = is_hard_coded

    def forward(self, x):
        batch = self.is_hard_coded or self.training
        y = F.batch_norm(self.conv(x), self.running_mean, self.running_var, self.weight, self.bias, batch)
        return x + F.relu(y)


@planted(
    "a temporal network's own norm",
    *at("SN113", "levels.1"),
    *at("SN801", "levels.1"),
    *at("SN301", "levels.1"),
)
def a_temporal_networks_own_norm(is_faulty):
    model = nn.Sequential()
    model.enter = nn.Conv1d(5, 16, 1)
    model.levels = nn.Sequential(Level(16, 1, False), Level(16, 2, is_faulty), Level(16, 4, False))
    model.pool = nn.Sequential(nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 2))
    return subject(model, of_lines(), REGRESSION)


class Cell(nn.Module):
    """A recurrence with a batch norm inside: one for all steps, or with statistics for each."""

    def __init__(self, norm, is_shared, width=20):
        super().__init__()
        self.enter, self.back = nn.Linear(5, width), nn.Linear(width, width, bias=False)
        self.norm, self.is_shared = norm, is_shared
        self.head = nn.Linear(width, 2)

    def forward(self, lines):
        h = lines.new_zeros(len(lines), self.back.in_features)
        for t in range(12):
            x = self.back(h) + self.enter(lines[:, :, t + 20])
            h = h + torch.tanh(self.norm(x) if self.is_shared else self.norm(x, step=t))
        return self.head(h)


@planted("one norm for all steps of a recurrence", ("SN106", "norm"), also=[("SN203", "norm")])
def one_norm_for_all_steps(is_faulty):
    norm = steadynorm.BatchNorm1d(20) if is_faulty else steadynorm.StepBatchNorm1d(20, steps=12)
    return subject(Cell(norm, is_faulty), of_lines(), REGRESSION)


class Uncertain(nn.Module):
    """The mean of three draws with dropout, also in evaluation."""

    def __init__(self, is_faulty):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(160, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(32, 2)
        self.is_faulty = is_faulty

    def forward(self, lines):
        was = self.training
        (self if self.is_faulty else self.drop).train()
        drawn = torch.stack([self.head(self.drop(self.body(lines.flatten(1)))) for _ in range(3)]).mean(0)
        self.train(was)
        return drawn


@planted("dropout drawn by train()", *[(code, "body.1") for code in ("SN301", "SN308", "SN801")])
def dropout_drawn_by_train(is_faulty):
    return subject(Uncertain(is_faulty), of_lines(), REGRESSION)


@planted("file by file", ("SN401", ""), notes=True)
def file_by_file(is_faulty):
    series, target = data.lines()
    train, test = data.halves(series, target)
    order = torch.arange(len(series))[torch.randperm(len(series), generator=torch.Generator().manual_seed(1))]
    kept = order[: len(train[0])].sort().indices  # the rows of a file stand together again
    if is_faulty:
        train = [t[kept] for t in train]
    return subject(Reader1d(), (train, test), REGRESSION, shuffle=not is_faulty)


class Reader1d(nn.Sequential):
    """Convolutions over lines, with two norms."""

    def __init__(self):
        super().__init__(
            nn.Conv1d(5, 16, 3, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 16, 3, stride=2, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(16, 2),
        )


@planted("a norm of one number", ("SN103", "0"))
def a_norm_of_one_number(is_faulty):
    series, target = data.lines()
    split = data.halves(series[:, 1, :, None], target)  # one series of lengths, (N, T, 1)
    model = nn.Sequential(nn.LayerNorm(1 if is_faulty else (32, 1)), nn.Flatten(), nn.Linear(32, 32), nn.Tanh())
    model.append(nn.Linear(32, 2))
    return subject(model, split, REGRESSION)


@planted("spectral norm straight into a norm", ("SN115", "0"), notes=True)
def spectral_norm_into_a_norm(is_faulty):
    model = Reader1d()
    if is_faulty:
        nn.utils.parametrizations.spectral_norm(model[0])
    return subject(model, of_lines(), REGRESSION)


@planted("four small steps before the optimizer's", ("SN309", ""), notes=True)
def four_small_steps(is_faulty):
    made = subject(Reader1d(), of_lines(), REGRESSION)
    optimizer = made.optimizer

    def step(model, batch):
        model.train()
        parts = [t.chunk(4) for t in batch] if is_faulty else [[t] for t in batch]
        optimizer.zero_grad()
        for lines, target in zip(*parts, strict=True):
            (squared(model(lines), (lines, target)) / len(parts[0])).backward()
        optimizer.step()

    made.step = step
    return made
