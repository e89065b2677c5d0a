"""What reaches the layers of a model while batches run through it, pooled as Moments, with its standard error."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import functional, models, moments
from steadynorm.moments import Moments
from steadynorm.samples import tensors_in

# Batches differ more than their samples do where data comes in an order. A deviation taken from fewer is rough.
FEWEST_BATCHES = 8


@dataclass(frozen=True)
class Clusters:
    """How much the sums over whole clusters of values vary: the values of a sample, or of a batch, are not independent.

    A cluster has n values, t = Σ (x − pivot) and q = Σ (x − pivot)². Known is Σ (n, t, q)ᵀ(n, t, q) over clusters.

    Args:
        pivot: (C,), a value near the mean.
        products: (3, 3, C).
        number: of clusters.
    """

    pivot: Tensor
    products: Tensor
    number: int = 0

    @classmethod
    def at(cls, pivot: Tensor) -> "Clusters":
        """None yet."""
        return cls(pivot, pivot.new_zeros(3, 3, len(pivot)))

    def plus(self, sums: Tensor) -> "Clusters":
        """With those of `sums` (3, clusters, C): n, t and q about the pivot."""
        number = int((sums[0] > 0).any(1).sum())
        return Clusters(self.pivot, self.products + torch.einsum("ikc,jkc->ijc", sums, sums), self.number + number)

    def about(self, pivot: Tensor) -> "Clusters":
        """The same about another pivot."""
        shift, one = self.pivot - pivot, torch.ones_like(pivot)
        zero = torch.zeros_like(pivot)
        rows = ((one, zero, zero), (shift, one, zero), (shift.square(), 2 * shift, one))
        move = torch.stack([torch.stack(row) for row in rows])
        return Clusters(pivot, torch.einsum("ijc,jkc,lkc->ilc", move, self.products, move), self.number)

    def standard_error(self, all_values: Moments, eps: float) -> Tensor:
        """The standard error (C,) of the mean, and of the deviation, whichever is larger, in deviations.

        mean: sqrt(Σ t²) / N / deviation;  deviation: sqrt(Σ (q − n·var)²) / N / (2·deviation²), both about the mean,
        times sqrt(k / (k − 1)) for k clusters; deviation² = var + eps, as the layer has it.

        Source: Cochran, Sampling Techniques (1977), section 6.3, the ratio estimator over clusters of different size.
        """
        if self.number < 2:
            return torch.full_like(self.pivot, torch.inf)
        found = self.about(all_values.mean).products
        var, total = all_values.var, torch.as_tensor(all_values.count, dtype=torch.float64)
        square = (found[2, 2] - 2 * var * found[0, 2] + var.square() * found[0, 0]).clamp(min=0)
        of_mean = found[1, 1].clamp(min=0).sqrt() / (var + eps).sqrt()
        of_deviation = square.sqrt() / (2 * (var + eps))
        return torch.maximum(of_mean, of_deviation) / total * (self.number / (self.number - 1)) ** 0.5


def merge_clusters(parts: list[Clusters]) -> Clusters:
    """The clusters of several, about the pivot of the first."""
    moved = [part.about(parts[0].pivot) for part in parts]
    return Clusters(parts[0].pivot, torch.stack([m.products for m in moved]).sum(0), sum(m.number for m in moved))


@dataclass
class Pool:
    """Everything that reached one layer: the Moments of the values, and how samples and batches differ.

    Where a layer sees several rows of a sample, (N·T, C, *), they may be neighbours or N apart: "blocks" and "strides"
    are the two readings.
    """

    all_values: Moments
    clusters: dict[str, Clusters]
    batches: int = 0

    def standard_error(self, eps: float) -> Tensor:
        """The largest standard error (C,) that any reading gives: see `Clusters.standard_error`."""
        readings = [c for name, c in self.clusters.items() if name != "batches" or c.number >= FEWEST_BATCHES]
        return torch.stack([c.standard_error(self.all_values, eps) for c in readings]).amax(0)

    def to_cpu(self) -> "Pool":
        """The same in the memory of the host, in which it travels between processes."""
        values = self.all_values
        count = values.count.cpu() if isinstance(values.count, Tensor) else values.count
        clusters = {name: Clusters(c.pivot.cpu(), c.products.cpu(), c.number) for name, c in self.clusters.items()}
        return Pool(Moments(values.mean.cpu(), values.var.cpu(), count), clusters, self.batches)


def merge_pools(pools: list[Pool]) -> Pool:
    """What all of them saw."""
    values = moments.merge([pool.all_values for pool in pools])
    clusters = {name: merge_clusters([pool.clusters[name] for pool in pools]) for name in pools[0].clusters}
    return Pool(values, clusters, sum(pool.batches for pool in pools))


@dataclass
class LayerInputs:
    """Watches `layers` and pools what reaches them.

    Args:
        layers: by path, with running statistics (C,).
        put: called with path and Moments of each call before the layer runs.

    `pools` are by path, and in the order in which the layers were first called.
    """

    layers: Mapping[str, nn.Module]
    put: Callable[[str, Moments], None] | None = None
    pools: dict[str, Pool] = field(default_factory=dict)
    samples: int | None = None
    _sums: dict[str, list[tuple[str, Tensor]]] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Calls of the layers inside are seen."""
        hooks = []
        try:
            for path, layer in self.layers.items():
                hooks.append(layer.register_forward_pre_hook(self._hook(path), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, samples: int | None) -> None:
        """A batch begins; None samples: as many as there are rows in the first layer's input."""
        self.samples = samples
        self._sums.clear()

    def end(self) -> None:
        """The batch has run: what one sample gave in all calls of a layer is one cluster."""
        for path, calls in self._sums.items():
            pool = self.pools[path]
            for reading in ("blocks", "strides", "batches"):
                by_size: dict[int, Tensor] = {}
                for name, sums in calls:
                    if name == reading:
                        known = by_size.get(sums.shape[1])
                        by_size[sums.shape[1]] = sums if known is None else known + sums
                for sums in by_size.values():
                    pool.clusters[reading] = pool.clusters[reading].plus(sums)
            pool.batches += 1
        self._sums.clear()

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(path, module, args, kwargs)

        return hook

    def _see(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, mask = normalized_input(module, args, kwargs)
        if x.dim() < 2 or x.shape[1] != models.running_statistics(module)[0].numel() or not x.numel():
            return  # nothing, or a subclass with its channels elsewhere
        if self.samples is None:
            self.samples = x.shape[0]
        rows = of_rows(x.detach(), mask)
        batch = moments.merge_rows(rows)
        known = self.pools.get(path)
        if known is None:
            names = ("blocks", "strides", "batches")
            self.pools[path] = known = Pool(batch, {name: Clusters.at(batch.mean) for name in names})
        else:
            known.all_values = moments.merge([known.all_values, batch])
        self._sums.setdefault(path, []).extend(_readings(rows, known.clusters["blocks"].pivot, self.samples))
        if self.put is not None:
            self.put(path, batch)


def _readings(rows: Moments, pivot: Tensor, samples: int) -> Iterator[tuple[str, Tensor]]:
    """n, t and q (3, clusters, C) of each sample, in both orders that rows may have, and of the batch."""
    shift = rows.mean - pivot
    n = torch.as_tensor(rows.count, dtype=shift.dtype, device=shift.device).reshape(-1, 1).expand_as(shift)
    sums = torch.stack([n, n * shift, n * (rows.var + shift.square())])
    sums = torch.where(n > 0, sums, 0)
    yield "batches", sums.sum(1, keepdim=True)
    count = sums.shape[1]
    if samples < 1 or count % samples:
        samples = count
    yield "blocks", sums.unflatten(1, (samples, -1)).sum(2)
    yield "strides", sums.unflatten(1, (-1, samples)).sum(1)


def of_rows(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Moments of every row of x (N, C, *), mean and variance (N, C) in float64, without padding: mask (N, *)."""
    n, c = x.shape[:2]
    if mask is not None:
        valid = mask.reshape(n, 1, -1)
        count = valid.sum(2).double()
        values = torch.where(valid, x.reshape(n, c, -1).double(), 0)
        mean = values.sum(2) / count.clamp(min=1)
        var = torch.where(valid, values - mean.unsqueeze(2), 0).square().sum(2) / count.clamp(min=1)
        return Moments(mean, var, count.squeeze(1))
    if x.dim() == 2:
        mean = x.double()
        return Moments(mean, torch.zeros_like(mean), 1)
    found = functional.moments(x.reshape(1, n * c, -1))
    return Moments(found.mean.double().view(n, c), found.var.double().view(n, c), found.count)


def normalized_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a norm layer is given: x, and which of it is valid, where it takes `mask` or `lengths`."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    x = next(tensors_in((args, kwargs)))
    mask, lengths = given.get("mask"), given.get("lengths")
    if mask is None and lengths is not None:
        mask = torch.arange(x.shape[-1], device=x.device) < lengths.reshape(-1, *[1] * (x.dim() - 2))
        mask = mask.expand(x.shape[0], *x.shape[2:])
    return x, mask
