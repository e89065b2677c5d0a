"""Held-out cases on sequences: characters and lines of source code, by convolutions, recurrences and attention."""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import steadynorm
from tests.doctor.heldout import data
from tests.doctor.heldout.held import Subject, at, fit, planted
from tests.doctor.heldout.tables import GROWERS, REGRESSION, classes, squared, subject


def is_prose():
    return data.halves(*data.letters())


def of_lines():
    return data.halves(*data.lines())


class Reader(nn.Module):
    """Characters to whether they are prose: embedding, convolutions with norms, the mean over time."""

    def __init__(self, width=24, bias=False, norm=nn.BatchNorm1d, **options):
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.conv1 = nn.Conv1d(width, width, 3, padding=1, bias=bias)
        self.norm1 = norm(width, **options)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1, bias=bias)
        self.norm2 = norm(width, **options)
        self.head = nn.Linear(width, 2)

    def features(self, codes):
        x = self.embed(codes).mT
        x = F.gelu(self.norm1(self.conv1(x)))
        return F.gelu(self.norm2(self.conv2(x))).mean(2)

    def forward(self, codes):
        return self.head(self.features(codes))


@planted("convolutions with biases before our norms", *at("SN104", "conv1", "conv2"), notes=True)
def convolutions_with_biases(is_faulty):
    return subject(Reader(bias=is_faulty, norm=steadynorm.BatchNorm1d), is_prose(), GROWERS)


@planted("the momentum of Keras, in text", *at("SN108", "norm1", "norm2"), also=at("SN203", "norm1", "norm2"))
def the_momentum_of_keras(is_faulty):
    model = Reader(norm=steadynorm.BatchNorm1d, momentum=0.9 if is_faulty else 0.1)
    return subject(model, is_prose(), GROWERS, optimizer=torch.optim.AdamW)


class OverTime(nn.Module):
    """An embedding (N, T, C), and a batch norm that takes T for channels, or C."""

    def __init__(self, is_faulty, length=24, width=16):
        super().__init__()
        self.embed = nn.Embedding(128, width)
        with torch.no_grad():  # frequent ones far out, as trained embeddings have it
            self.embed.weight.mul_(torch.linspace(0.3, 2, width)).add_(torch.linspace(-2, 2, width))
        self.norm = nn.BatchNorm1d(length if is_faulty else width)
        self.rnn = nn.GRU(width, 24, batch_first=True)
        self.head = nn.Linear(24, 2)
        self.is_faulty = is_faulty

    def forward(self, codes):
        x = self.embed(codes)
        x = self.norm(x) if self.is_faulty else self.norm(x.mT).mT
        return self.head(self.rnn(x)[0].mean(1))


@planted("time taken for channels", ("SN105", "norm"))
def time_taken_for_channels(is_faulty):
    return subject(OverTime(is_faulty), is_prose(), GROWERS, steps=60)


@dataclass
class Prediction:
    """What a language model gives."""

    logits: Tensor
    hidden: Tensor


class Language(nn.Module):
    """What stood in the gaps: a transformer over (N, T), with an output of its own class."""

    def __init__(self, *, batch_first=True, norm_first=True, last=None, width=32):
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.place = nn.Parameter(0.02 * torch.randn(24, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, norm=last, enable_nested_tensor=False)
        self.head = nn.Linear(width, 128)

    def forward(self, codes):
        hidden = self.encoder(self.embed(codes) + self.place)
        return Prediction(self.head(hidden), hidden)


def filled(output, batch):
    return F.cross_entropy(output.logits.flatten(0, 1), batch[1].flatten())


def told(output, batch):
    return {"accuracy": (output.logits.argmax(2) == batch[1]).float().mean().item()}


LANGUAGE = {"loss": filled, "metrics": told}


def text():
    codes, _ = data.letters()
    gaps = codes.clone()
    gaps[:, ::4] = 0
    return data.halves(gaps, codes)


@planted("attention over the samples", ("SN801", "encoder.layers.0.self_attn"))
def attention_over_the_samples(is_faulty):
    model = Language(batch_first=not is_faulty)
    return subject(model, text(), LANGUAGE, steps=40, lr=3e-3, optimizer=torch.optim.AdamW)


@planted("a final norm behind a norm", ("SN116", "encoder.norm"), notes=True)
def a_final_norm_behind_a_norm(is_faulty):
    model = Language(norm_first=False, last=nn.LayerNorm(32) if is_faulty else None)
    return subject(model, text(), LANGUAGE, steps=40, lr=3e-3)


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


class Recomputed(Reader):
    """A reader whose convolutions are recomputed in the backward."""

    def __init__(self, is_recomputed):
        super().__init__()
        self.is_recomputed = is_recomputed

    def features(self, codes):
        x = self.embed(codes).mT

        def body(x):
            return F.gelu(self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x))))))

        return (checkpoint(body, x, use_reentrant=False) if self.is_recomputed else body(x)).mean(2)


@planted("text, recomputed", *at("SN303", "norm1", "norm2"), notes=True)
def text_recomputed(is_faulty):
    return subject(Recomputed(is_faulty), is_prose(), GROWERS)


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


@planted("padding in a batch norm of lines", ("SN403", "norm"), also=[("SN203", "norm")])
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


class OneNorm(Reader):
    """A reader with a single batch norm."""

    def __init__(self):
        super().__init__()
        self.norm2 = nn.Identity()


@planted("weights averaged from the start", ("SN204", "module.norm1"))
def weights_averaged(is_faulty):
    model = OneNorm()
    split = is_prose()
    batches = data.loader(split[0], 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    averaged = AveragedModel(model)
    for _ in range(12):
        fit(model, batches, classes, optimizer, 10)
        averaged.update_parameters(model)
    if not is_faulty:
        update_bn(batches, averaged)
    held = data.loader(split[1], 64, shuffle=False, drop_last=False)
    return Subject(averaged, held, batches, **GROWERS)


@planted("tracking toggled by a freeze", *at("SN205", "norm1", "norm2"), also=at("SN203", "norm1", "norm2"))
def tracking_toggled(is_faulty):
    made = subject(Reader(), is_prose(), GROWERS)
    for norm in (made.model.norm1, made.model.norm2):
        norm.track_running_stats = not is_faulty
    fit(made.model, made.train_batches, classes, made.optimizer, 40)
    return made


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


class MeanTeacher(nn.Module):
    """A student and its slow copy, which gives targets while training."""

    def __init__(self, is_faulty):
        super().__init__()
        self.student = Reader()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.is_faulty = is_faulty

    def train(self, mode=True):
        super().train(mode)
        self.teacher.train(mode and self.is_faulty)
        return self

    def forward(self, codes):
        if not self.training:
            return self.student(codes)
        with torch.no_grad():
            target = self.teacher(codes)
        return self.student(codes) + 0 * target


@planted("a teacher in training mode", *at("SN307", "teacher.norm1", "teacher.norm2"))
def a_teacher_in_training_mode(is_faulty):
    return subject(MeanTeacher(is_faulty), is_prose(), GROWERS)


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


@planted("traced while training", *at("SN802", "norm1", "norm2"), also=at("SN801", "", "norm1"))
def traced_while_training(is_faulty):
    made = subject(Reader(), is_prose(), GROWERS)
    example = next(iter(made.batches))[0]
    made.model.train(is_faulty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.model = torch.jit.trace(made.model, example, check_trace=False)
    made.optimizer = None
    return made


@planted("file by file", ("SN401", ""))
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


@planted("pseudo-labels in training mode", ("SN304", ""))
def pseudo_labels(is_faulty):
    made = subject(Reader(), is_prose(), GROWERS)
    optimizer = made.optimizer

    def step(model, batch):
        codes, labels = batch
        half = len(codes) // 2
        model.train(is_faulty)
        with torch.no_grad():
            pseudo = model(codes[half:]).argmax(1)
        model.train()
        optimizer.zero_grad()
        output = model(codes)
        (F.cross_entropy(output[:half], labels[:half]) + 0.3 * F.cross_entropy(output[half:], pseudo)).backward()
        optimizer.step()

    made.step = step
    return made


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
