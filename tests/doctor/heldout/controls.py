"""Held-out healthy models, of kinds that people have and doctors are easily alarmed by."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import steadynorm
from steadynorm.training import AveragedModel, freeze_
from tests.doctor.heldout import data
from tests.doctor.heldout.held import Subject, control, fit
from tests.doctor.heldout.images import Grouped, how_much
from tests.doctor.heldout.segmentation import segmenter, stage
from tests.doctor.heldout.series import Reader1d
from tests.doctor.heldout.tables import GROWERS, REGRESSION, TUMOURS, accuracy, classes, regressor, subject
from tests.doctor.heldout.text import LANGUAGE, Language, Reader, is_prose, text


@control("one malignant tumour in twenty")
def one_in_twenty():
    x, y = data.cancer()
    kept = (y[:, 0] > 0.5) | (torch.arange(len(y)) % 11 == 0)

    def loss(output, batch):
        return F.binary_cross_entropy_with_logits(output, batch[1], pos_weight=torch.tensor(0.05))

    split = data.halves(x[kept], y[kept])
    return subject(regressor(30), split, {"loss": loss, "metrics": accuracy}, optimizer=torch.optim.AdamW)


@control("the end of each file held out")
def the_end_of_each_file():
    series, target = data.lines()
    later = torch.arange(len(series)) % 80 >= 56
    split = [series[~later], target[~later]], [series[later], target[later]]
    return subject(Reader1d(), split, REGRESSION)


@control("rare one-hot columns into a norm")
def rare_one_hot_columns():
    x, y = data.wine()
    bins = [torch.bucketize(c, torch.quantile(c, torch.tensor([0.04, 0.5, 0.96]))) for c in x.T]
    x = torch.cat([F.one_hot(b, 4).float() for b in bins], 1)
    model = nn.Sequential(nn.BatchNorm1d(52), nn.Linear(52, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
    model.append(nn.Linear(16, 3))
    return subject(model, data.halves(x, y, share=0.5), GROWERS, size=16)


@control("heavy tails into a norm")
def heavy_tails():
    x, y = data.cancer()
    model = nn.Sequential(nn.BatchNorm1d(30), nn.Linear(30, 24, bias=False), nn.BatchNorm1d(24), nn.Tanh())
    model.append(nn.Linear(24, 1))
    return subject(model, data.halves((1.2 * x).exp(), y), TUMOURS, size=48)


@control("a frozen backbone, by our switches")
def a_frozen_backbone():
    made = subject(Reader(norm=steadynorm.BatchNorm1d), is_prose(), GROWERS)
    made.model.requires_grad_(False)
    freeze_(made.model)
    made.model.head = nn.Linear(24, 2)
    made.optimizer = torch.optim.AdamW(made.model.head.parameters(), lr=5e-3)
    fit(made.model, made.train_batches, classes, made.optimizer, 30)
    return made


class Thin(nn.Module):
    """A weight and beside it a product of two thin ones that begins at zero."""

    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(0.1 * torch.randn(4, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], 4))

    def forward(self, weight):
        return weight + self.up @ self.down


@control("thin adapters in a frozen transformer")
def thin_adapters():
    made = subject(Language(last=nn.LayerNorm(32)), text(), LANGUAGE, steps=40, lr=3e-3)
    model = made.model.requires_grad_(False)
    for layer in model.encoder.layers:
        parametrize.register_parametrization(layer.linear1, "weight", Thin(layer.linear1.weight))
        parametrize.register_parametrization(layer.linear2, "weight", Thin(layer.linear2.weight))
    left = [p for p in model.parameters() if p.requires_grad]
    made.optimizer = torch.optim.AdamW(left, lr=3e-3)
    fit(model, made.train_batches, LANGUAGE["loss"], made.optimizer, 10)
    return made


@control("an average of weights with its statistics")
def an_average_with_its_statistics():
    model, split = Reader(norm=steadynorm.BatchNorm1d), is_prose()
    batches = data.loader(split[0], 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = AveragedModel(model, decay=0.9, statistics="recalibrate")
    for _ in range(12):
        fit(model, batches, classes, optimizer, 10)
        average.update_parameters(model)
    average.recalibrate_(batches)
    held = data.loader(split[1], 64, shuffle=False, drop_last=False)
    return Subject(average, held, batches, **GROWERS)


@control("four pages a batch")
def four_pages_a_batch():
    return segmenter(size=4, steps=120)


@control("dropout everywhere, layer norms")
def dropout_everywhere():
    model = Language(last=nn.LayerNorm(32))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return subject(model, text(), LANGUAGE, steps=60, lr=3e-3, optimizer=torch.optim.AdamW)


@control("a U-Net of group norms")
def a_unet_of_group_norms():
    return segmenter(norm=Grouped)


@control("a U-Net without norms")
def a_unet_without_norms():
    return segmenter(norm=nn.Identity)


@control("root mean squares, ours")
def root_mean_squares():
    def block():
        return nn.Sequential(steadynorm.RMSNorm(24), nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 24))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.blocks = nn.Linear(10, 24), nn.ModuleList(block() for _ in range(4))
            self.norm, self.head = steadynorm.RMSNorm(24), nn.Linear(24, 1)

        def forward(self, x):
            x = self.enter(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(self.norm(x))

    return subject(Residual(), data.halves(*data.diabetes()), REGRESSION, size=16, optimizer=torch.optim.AdamW)


@control("double precision")
def double_precision():
    x, y = data.diabetes()
    model = regressor().double()
    return subject(model, data.halves(x.double(), y.double()), REGRESSION)


@control("bfloat16 with our norms")
def bfloat16_with_our_norms():
    model = nn.Sequential(nn.Linear(30, 32), steadynorm.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 32))
    model.extend([steadynorm.LayerNorm(32), nn.GELU(), nn.Linear(32, 1)])
    x, y = data.cancer()
    return subject(model.bfloat16(), data.halves(x.bfloat16(), y.bfloat16()), TUMOURS, optimizer=torch.optim.SGD)


@control("trained for forty steps from scratch")
def trained_for_forty_steps():
    return segmenter(steps=40)


@control("our norms, recomputed")
def our_norms_recomputed():
    class Recomputed(Reader):
        def forward(self, codes):
            return self.head(checkpoint(self.features, codes, use_reentrant=False))

    return subject(Recomputed(norm=steadynorm.BatchNorm1d), is_prose(), GROWERS)


class Variational(nn.Module):
    """An autoencoder of pages with noise in its middle; its output is a tuple."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(stage(3, 8, 2), stage(8, 12, 2), nn.Flatten(), nn.Linear(12 * 60, 16))
        self.decode = nn.Sequential(nn.Linear(8, 12 * 60, bias=False), nn.BatchNorm1d(12 * 60), nn.ReLU())
        self.decode.extend([nn.Unflatten(1, (12, 6, 10)), nn.ConvTranspose2d(12, 8, 2, 2, bias=False)])
        self.decode.extend([nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, 2)])

    def forward(self, x):
        mean, spread = self.encode(x).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (spread / 2).exp() * self.training
        return self.decode(drawn), mean, spread


@control("a variational autoencoder")
def a_variational_autoencoder():
    def loss(output, batch):
        picture, mean, spread = output
        apart = (mean**2 + spread.exp() - spread - 1).mean()
        return F.mse_loss(picture, batch[0]) + 1e-3 * apart

    images, _, _ = data.pages()
    return subject(Variational(), data.halves(images), {"loss": loss, "metrics": None}, steps=100)


@control("noise and shifts in training only")
def noise_and_shifts_in_training():
    train, test = how_much()

    def varied(images, labels):
        images = torch.roll(images, int(torch.randint(-2, 3, ())), 2)
        return images + 0.1 * torch.randn_like(images), labels

    model = nn.Sequential(stage(3, 12, 2), stage(12, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    batches = data.loader(train, 32, collate=varied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    fit(model, batches, classes, optimizer, 100)
    held = data.loader(test, 64, shuffle=False, drop_last=False)
    return Subject(model, held, batches, **GROWERS, optimizer=optimizer)


@control("two domains, each with its statistics")
def two_domains():
    class Domains(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(10, 20, bias=False), steadynorm.DomainBatchNorm1d(20, num_domains=2)
            self.last = nn.Linear(20, 1)

        def forward(self, x, domain):
            return self.last(F.relu(self.norm(self.first(x), domain)))

    x, y = data.diabetes()
    domain = torch.arange(len(x)) % 2
    x = torch.where(domain[:, None] > 0, 2 * x + 1, x)

    def together(x, domain, y):
        return {"x": x, "domain": domain}, y

    model = Domains()
    train, test = data.halves(x, domain, y)
    batches = data.loader(train, 32, collate=together)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    fit(model, batches, REGRESSION["loss"], optimizer, 100)
    held = data.loader(test, 64, shuffle=False, drop_last=False, collate=together)
    return Subject(model, held, batches, **REGRESSION, optimizer=optimizer)


@control("batches drawn by weights of the classes")
def batches_drawn_by_weights():
    (x, y), test = data.halves(*data.cancer())
    weights = torch.where(y[:, 0] > 0.5, 1.0, 2.0)
    sampler = torch.utils.data.WeightedRandomSampler(weights, len(x), generator=torch.Generator().manual_seed(0))
    model = regressor(30)
    batches = data.loader([x, y], 32, sampler=sampler)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
    fit(model, batches, TUMOURS["loss"], optimizer, 80)
    held = data.loader(test, 64, shuffle=False, drop_last=False)
    return Subject(model, held, batches, **TUMOURS, optimizer=optimizer)


@control("padding under a mask of attention, a model of transformers")
def padding_under_a_mask():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=128, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, num_labels=2
    )
    model = BertForSequenceClassification(config)
    codes, labels = data.letters()
    lengths = torch.randint(8, 25, (len(codes),), generator=torch.Generator().manual_seed(2))

    def together(codes, lengths, labels):
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        return {"input_ids": codes[:, : inside.shape[1]] * inside, "attention_mask": inside.long()}, labels

    def loss(output, batch):
        return F.cross_entropy(output.logits, batch[1])

    train, test = data.halves(codes, lengths, labels)
    batches = data.loader(train, 32, collate=together)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    fit(model, batches, loss, optimizer, 40)
    held = data.loader(test, 64, shuffle=False, drop_last=False, collate=together)
    return Subject(model, held, batches, loss, optimizer=optimizer)


@control("instance norms in 3d, a model of monai")
def instance_norms_in_3d():
    from monai.networks.nets import UNet as MonaiUNet

    x, _ = data.volumes()
    x = F.pad(x, (0, 4, 0, 4, 0, 2))
    model = MonaiUNet(3, 1, 1, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, norm="INSTANCE")

    def loss(output, batch):
        return F.mse_loss(output, batch[0])

    return subject(model, data.halves(x), {"loss": loss, "metrics": None}, size=8, steps=40)


@control("ghost batches and renormalization in one")
def ghost_batches_and_renormalization():
    model = nn.Sequential(
        stage(3, 12, 2, steadynorm.GhostBatchNorm2d, ghost_size=8),
        stage(12, 16, 2, steadynorm.BatchRenorm2d),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    return subject(model, how_much(), GROWERS, steps=120)
