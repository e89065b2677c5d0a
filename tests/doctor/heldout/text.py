"""Held-out cases on characters of source code, by convolutions and attention."""

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
from tests.doctor.heldout.tables import GROWERS, classes, subject


def is_prose():
    return data.halves(*data.letters())


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


@planted("a teacher in training mode", *at("SN307", "teacher.norm1", "teacher.norm2"), notes=True)
def a_teacher_in_training_mode(is_faulty):
    return subject(MeanTeacher(is_faulty), is_prose(), GROWERS)


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


@planted("pseudo-labels in training mode", ("SN304", ""), notes=True)
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
