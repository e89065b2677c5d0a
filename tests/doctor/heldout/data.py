"""Real data that lies at hand: tables of scikit-learn, and the source text of Python's standard library."""

import importlib.util
import io
import tokenize
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

MODULES = ("argparse", "calendar", "difflib", "mailbox", "optparse", "pickle", "tarfile", "typing")
COLUMNS = 40


def loader(tensors, size, *, shuffle=True, drop_last=True, collate=None, sampler=None):
    """A torch loader over tensors, the way a user makes one."""
    data = TensorDataset(*tensors)
    how = {"drop_last": drop_last, "generator": torch.Generator().manual_seed(0)}
    if collate is not None:
        how["collate_fn"] = lambda rows: collate(*[torch.stack(column) for column in zip(*rows, strict=True)])
    if sampler is not None:
        return DataLoader(data, size, sampler=sampler, **how)
    return DataLoader(data, size, shuffle=shuffle, **how)


def halves(*tensors: Tensor, share: float = 0.7, seed: int = 1):
    """Rows for training and for evaluation, drawn at random."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(seed))
    cut = int(share * len(order))
    return [t[order[:cut]] for t in tensors], [t[order[cut:]] for t in tensors]


@cache
def diabetes() -> tuple[Tensor, Tensor]:
    """442 patients: ten measurements, unit variance, and the progression of the disease, standardised (N, 1)."""
    x, y = datasets.load_diabetes(return_X_y=True)
    x, y = torch.tensor(x).float(), torch.tensor(y).float()
    return x / x.std(0), ((y - y.mean()) / y.std())[:, None]


@cache
def cancer(standardised: bool = True) -> tuple[Tensor, Tensor]:
    """569 tumours: 30 measurements, raw from 0.001 to 4,254, and whether it is benign (N, 1)."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(x).float(), torch.tensor(y).float()
    return (x - x.mean(0)) / x.std(0) if standardised else x, y[:, None]


@cache
def wine() -> tuple[Tensor, Tensor]:
    """178 wines: 13 measurements, raw, and one of three growers."""
    x, y = datasets.load_wine(return_X_y=True)
    return torch.tensor(x).float(), torch.tensor(y)


@cache
def sources() -> tuple[str, ...]:
    """The text of eight modules."""
    paths = [importlib.util.find_spec(name).origin for name in MODULES]
    return tuple(Path(path).read_text(encoding="utf-8").expandtabs() for path in paths)


@cache
def prose() -> tuple[np.ndarray, ...]:
    """Per module and character of its text: whether it stands in a string or a comment."""
    masks = []
    for source in sources():
        begins = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
        mask = np.zeros(len(source), bool)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in (tokenize.STRING, tokenize.COMMENT):
                (top, left), (bottom, right) = token.start, token.end
                mask[begins[top - 1] + left : begins[bottom - 1] + right] = True
        masks.append(mask)
    return tuple(masks)


@cache
def letters(length: int = 24, each: int = 100) -> tuple[Tensor, Tensor]:
    """Characters (N, length), and whether most of them are prose (N,)."""
    rows, labels = [], []
    for source, mask in zip(sources(), prose(), strict=True):
        codes = torch.tensor([min(ord(c), 127) for c in source])
        for start in np.linspace(0, len(codes) - length - 1, each).astype(int):
            rows.append(codes[start : start + length])
            labels.append(int(mask[start : start + length].mean() > 0.5))
    return torch.stack(rows), torch.tensor(labels)


def _of_line(line: str) -> list[float]:
    body = line.strip()
    n = max(len(body), 1)
    return [
        (len(line) - len(line.lstrip())) / 4 if body else 0.0,
        len(line) / 20,
        sum(c.isalpha() for c in body) / n,
        sum(not c.isalnum() and not c.isspace() for c in body) / n,
        float(not body),
    ]


@cache
def lines(length: int = 32, each: int = 80) -> tuple[Tensor, Tensor]:
    """Series of lines (N, 5, length): indent, length, letters, signs, blank; mean indent and longest line (N, 2)."""
    series = []
    for source in sources():
        values = torch.tensor([_of_line(line) for line in source.splitlines()])
        starts = np.linspace(0, len(values) - length - 1, each).astype(int)
        series += [values[start : start + length].T for start in starts]
    stacked = torch.stack(series)
    target = torch.stack([stacked[:, 0].mean(1), stacked[:, 1].amax(1)], 1)
    return stacked, (target - target.mean(0)) / target.std(0)


@cache
def _page_maps() -> tuple[Tensor, ...]:
    """Per module: (4, lines, COLUMNS) of letters, other signs, the code of the character, and whether it is prose."""
    maps = []
    for source, mask in zip(sources(), prose(), strict=True):
        rows = source.splitlines(keepends=True)
        begins = np.cumsum([0, *map(len, rows)])
        codes = np.full((len(rows), COLUMNS), ord(" "))
        is_prose = np.zeros(codes.shape)
        for i, row in enumerate(rows):
            line = row.rstrip("\n")[:COLUMNS]
            codes[i, : len(line)] = [min(ord(c), 127) for c in line]
            is_prose[i, : len(line)] = mask[begins[i] : begins[i] + len(line)]
        is_letter = np.isin(codes, [c for c in range(128) if chr(c).isalpha()])
        layers = [is_letter, ~is_letter & (codes != ord(" ")), codes / 128, is_prose]
        maps.append(torch.from_numpy(np.stack(layers).astype("float32")))
    return tuple(maps)


def _quarters(shares: Tensor) -> Tensor:
    return torch.bucketize(shares, torch.quantile(shares, torch.tensor([0.25, 0.5, 0.75])))


@cache
def pages(each: int = 60, height: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of source code (N, 3, height, 40), its prose (N, 1, height, 40), and how full they are, in quarters."""
    images = []
    for page in _page_maps():
        starts = np.linspace(0, page.shape[1] - height, each).astype(int)
        images += [page[:, start : start + height] for start in starts]
    both = torch.stack(images)
    return both[:, :3].contiguous(), both[:, 3:].contiguous(), _quarters(both[:, 0].mean((1, 2)))


@cache
def volumes(each: int = 50) -> tuple[Tensor, Tensor]:
    """Six screens in a row as a volume (N, 1, 6, 12, 20), and how much fuller it begins than it ends, in quarters."""
    found, slopes = [], []
    for page in _page_maps():
        ink = torch.nn.functional.avg_pool2d((page[0] + page[1])[None], 2)[0]
        for start in np.linspace(0, len(ink) - 72, each).astype(int):
            found.append(ink[start : start + 72].reshape(1, 6, 12, 20))
            slopes.append(found[-1][0, :3].mean() - found[-1][0, 3:].mean())
    return torch.stack(found), _quarters(torch.stack(slopes))
