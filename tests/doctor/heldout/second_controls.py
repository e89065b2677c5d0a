"""The healthy models of the second set."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import steadynorm
from tests.doctor.heldout import data
from tests.doctor.heldout.held import control
from tests.doctor.heldout.images import how_much
from tests.doctor.heldout.segmentation import overlap, segmenter, stage
from tests.doctor.heldout.tables import GROWERS, REGRESSION, subject
from tests.doctor.heldout.text import is_prose


@control("a head alone is trained, and nothing is frozen")
def a_head_alone():
    made = segmenter(norm=steadynorm.InstanceNorm2d)
    made.optimizer = torch.optim.Adam(made.model.out.parameters(), lr=1e-3)
    return made


@control("a column for each letter into a linear layer")
def a_column_for_each_letter():
    codes, labels = data.letters()
    columns = F.one_hot(codes[:, :6], 128).flatten(1).float()
    model = nn.Sequential(nn.Linear(768, 24), nn.ReLU(), nn.Linear(24, 2))
    return subject(model, data.halves(columns, labels), GROWERS)


@control("time first inside, attention and recurrence")
def time_first_inside():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(128, 24), nn.LayerNorm(24)
            self.attend, self.rnn = nn.MultiheadAttention(24, 3), nn.LSTM(24, 24)
            self.head = nn.Linear(24, 2)

        def forward(self, codes):
            x = self.embed(codes).transpose(0, 1)
            y = self.norm(x)
            x = x + self.attend(y, y, y, need_weights=False)[0]
            return self.head(self.rnn(x)[0][-1])

    return subject(TimeFirst(), is_prose(), GROWERS, optimizer=torch.optim.AdamW)


@control("experts weighed by a softmax")
def experts_weighed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.norm = nn.Linear(10, 3), nn.BatchNorm1d(16)
            self.experts = nn.ModuleList(nn.Linear(10, 16) for _ in range(3))
            self.head = nn.Linear(16, 1)

        def forward(self, x):
            each = torch.stack([expert(x) for expert in self.experts], 1)
            return self.head(self.norm((self.gate(x).softmax(1)[..., None] * each).sum(1)).relu())

    return subject(Experts(), data.halves(*data.diabetes()), REGRESSION)


@control("a neck of batch norm before cosines")
def a_neck_before_cosines():
    class Cosines(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(stage(3, 12, 2), stage(12, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.neck = nn.BatchNorm1d(16)
            self.neck.bias.requires_grad_(False)
            self.classes = nn.Parameter(torch.randn(4, 16))

        def forward(self, x):
            return 8 * F.normalize(self.neck(self.body(x)), dim=1) @ F.normalize(self.classes, dim=1).T

    return subject(Cosines(), how_much(), GROWERS)


@control("finetuned with its statistics held still")
def finetuned_with_statistics_held():
    made = segmenter()
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-4)

    def step(model, batch):
        model.eval()
        optimizer.zero_grad()
        overlap(model(batch[0]), batch).backward()
        optimizer.step()

    for batch in made.train_batches:
        step(made.model, batch)
    made.optimizer, made.step = optimizer, step
    return made


@control("one batch norm for two views of a kind, a momentum encoder behind")
def two_views_and_a_momentum_encoder():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Sequential(stage(3, 12, 2), stage(12, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.follow = copy.deepcopy(self.encode).requires_grad_(False)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    for mine, theirs in zip(self.follow.parameters(), self.encode.parameters(), strict=True):
                        mine.lerp_(theirs, 0.05)
                    self.follow(x.flip(3))
            return self.head(self.encode(x) + self.encode(x.flip(3)))

    return subject(Views(), how_much(), GROWERS)
