"""DomainBatchNorm1d, 2d, 3d: batch normalization with statistics for each domain, domains mixed in a batch."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from steadynorm import functional
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.grouping import is_channels_last
from steadynorm.kernels import ops
from steadynorm.kernels.reference import statistics_dtype
from steadynorm.layers import checks, portable
from steadynorm.layers.batch import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, as_leaf
from steadynorm.layers.rows import Rows
from steadynorm.layers.running import Running
from steadynorm.layers.wide import wide
from steadynorm.moments import Moments, merge

Unknown = Literal["error", "pooled"]
NO_ROW = -1
"""Stands for a domain without statistics of its own."""


class DomainBatchNorm(Rows):
    """What the domain batch normalizations of every rank share; see `DomainBatchNorm2d`."""

    plain: ClassVar[type[BatchNorm]]
    num_domains: int = 0
    unknown: Unknown = "error"
    shared_affine: bool = True
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Rows.choices,
        "unknown": ("error", "pooled"),
        "shared_affine": (True, False),
    }
    shown = ("num_domains", "unknown", "shared_affine", *Rows.shown)

    def __init__(
        self,
        num_features: int,
        *args: Any,
        num_domains: int,
        unknown: Unknown = "error",
        shared_affine: bool = True,
        **kwargs: Any,
    ) -> None:
        # Before the settings are checked.
        self.num_domains = self.rows = num_domains
        self.unknown = unknown
        self.shared_affine = shared_affine
        super().__init__(num_features, *args, **kwargs)

    def _configure(self, *args: Any) -> None:
        super()._configure(*args)
        for name, parameter in self._parameters.items():
            if parameter is not None and not self.shared_affine:
                rows = parameter.detach().expand(self.num_domains, *parameter.shape).clone()
                self._parameters[name] = nn.Parameter(rows)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        domain: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalise every sample by the statistics of its domain; the rest as `BatchNorm2d`.

        Args:
            domain: (N,) integers, the domain of each sample, from 0 on. Only domains that are present are updated.

        Raises:
            InputError: also for a domain that is unknown, with ``unknown="error"``.
            DegenerateStatisticsError: one value per channel of a domain in training, unless
                ``single_value="running"``.
        """
        if isinstance(input, torch.fx.Proxy):
            return as_leaf(self, input, domain=domain, residual=residual, mask=mask, lengths=lengths)
        mask = self._checked(input, mask, lengths)
        self._check_domain(input, domain)
        domain = domain.to(input.device)
        if ops.is_traced(input) or ops.is_traced(domain) or torch._C._are_functorch_transforms_active():
            return self._by_masks(input, domain, residual, mask)
        return self._by_parts(input, domain, residual, mask)

    def merge_domains(self, domains: Iterable[int] | None = None) -> BatchNorm:
        """A plain batch norm with the pooled statistics of all domains, or of some.

        mean = Σ n·mean / Σ n;  var = Σ n·(var + (mean_domain − mean)²) / Σ n,  n the batches of a domain

        Args:
            domains: which; all by default. With one, it is the batch norm of this domain.

        Raises:
            InputError: several domains with weights of their own, which one batch norm cannot hold.
        """
        numbers = list(range(self.num_domains) if domains is None else domains)
        if not numbers or not all(0 <= number < self.num_domains for number in numbers):
            raise InputError(f"{checks.name(self)} has domains 0 to {self.num_domains - 1}, got {numbers}.")
        if not self.shared_affine and self.weight is not None and len(numbers) > 1:
            raise InputError(
                f"{checks.name(self)} has a weight and bias for every domain, which one batch norm cannot hold: merge"
                " one domain at a time, merge_domains([0])."
            )
        like = self.weight if self.weight is not None else self.running_mean
        norm = self.plain(
            self.num_features,
            self.eps,
            self.momentum,
            self.affine,
            self.track_running_stats,
            *(() if like is None else (like.device, like.dtype)),
            bias=self.bias is not None,
            **{setting: getattr(self, setting) for setting in BatchNorm.shown},
        )
        with torch.no_grad():
            for name in ("weight", "bias"):
                own, parameter = getattr(norm, name), self._own(getattr(self, name), numbers[0])
                if own is not None and parameter is not None:
                    own.copy_(parameter)
            pooled = self._pooled(numbers)
            if pooled is not None:
                for name, value in zip(("running_mean", "running_var", "num_batches_tracked"), pooled, strict=True):
                    norm._buffers[name] = value.clone() if value is not None else None
        for switch, value in self.switches().items():
            setattr(norm, switch, value)
        return norm.train(self.training)

    def _affine(self) -> list[Tensor | None]:
        """Weight and bias as all domains use them."""
        parameters = (self.weight, self.bias)
        return [p if p is None or self.num_domains == 1 else wide(p) for p in parameters]

    def _own(self, parameter: Tensor | None, number: int) -> Tensor | None:
        """Weight or bias of a domain; of one without its own, the mean of all."""
        if parameter is None or self.shared_affine:
            return parameter
        return parameter.mean(0) if number == NO_ROW else parameter[number]

    def _pooled(self, numbers: Iterable[int]) -> Running | None:
        """The running statistics of several domains as one: exactly, each with the weight of its batches."""
        rows = [row for number in numbers if (row := self._row(number)) is not None and row.batches is not None]
        if not rows:
            return None
        if len(rows) == 1:
            return rows[0]
        dtype = statistics_dtype(rows[0].mean)
        merged = merge(Moments(row.mean.to(dtype), row.var.to(dtype), _count(row)) for row in rows)
        batches = torch.as_tensor(merged.count)
        # Where none has seen a batch, the initial values.
        mean, var = (torch.where(batches > 0, new.to(old.dtype), old) for new, old in zip(
            (merged.mean, merged.var), rows[0][:2], strict=True
        ))  # fmt: skip
        return Running(mean, var, batches.to(torch.long))

    def _uses_running(self) -> bool:
        if self.running_mean is None:
            return False
        return self.normalize_by == "running" or (self.normalize_by is None and not self.training)

    def _known(self, domain: Tensor) -> Tensor:
        """(N,) bool: a domain is known if it is one of ours and, to be evaluated by, has seen a batch if any has."""
        known = (domain >= 0) & (domain < self.num_domains)
        if self._uses_running() and self.num_batches_tracked is not None:
            trained = self.num_batches_tracked > 0
            trained = trained | ~trained.any()
            known = known & trained[domain.clamp(0, self.num_domains - 1).long()]
        return known

    def _by_parts(self, x: Tensor, domain: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """Gather the samples of each domain, normalise them as a batch of their own, and put them back."""
        numbers, order, sizes = self._sorted(domain)
        self._ensure_values(x, numbers, sizes)
        is_mixed = len(numbers) > 1
        tensors = [t if t is None or not is_mixed else _taken(t, order).split(sizes) for t in (x, residual, mask)]
        affine, ys, remembered = self._affine(), [], []
        for place, number in enumerate(numbers):
            part, also, valid = (t[place] if isinstance(t, tuple) else t for t in tensors)
            assert isinstance(part, Tensor)
            row = self._row(number) if number != NO_ROW else None
            y, moments = self._normalize_domain(number, part, also, valid, affine)
            ys.append(y)
            if row is not None and moments is not None:
                remembered.append((row, moments))
        # All are looked at before one is changed.
        for row, moments in remembered:
            self._require_finite(row, moments)
        for row, moments in remembered:
            self._remember(row, moments)
        return _in_order(ys, order, x) if is_mixed else ys[0]

    def _sorted(self, domain: Tensor) -> tuple[list[int], Tensor, list[int]]:
        """The domains that are there, the samples in their order, and how many each has. Waits for the device."""
        known = self._known(domain)
        if self.unknown == "error" or self.running_mean is None:
            self._ensure_known(domain, known)
        row = torch.where(known, domain.long(), NO_ROW)
        row, order = torch.sort(row, stable=True)
        numbers, sizes = torch.unique_consecutive(row, return_counts=True)
        # An empty batch is normalised as one of the first domain.
        return numbers.tolist() or [0], order, sizes.tolist() or [0]

    def _normalize_domain(
        self, number: int, x: Tensor, residual: Tensor | None, mask: Tensor | None, affine: list[Tensor | None]
    ) -> tuple[Tensor, Moments | None]:
        weight, bias = (self._own(parameter, number) for parameter in affine)
        if number != NO_ROW:
            return self._normalize(x, residual, mask, self._row(number), weight, bias)
        return self._by_pooled(x, residual, mask, weight, bias), None

    def _by_pooled(
        self, x: Tensor, residual: Tensor | None, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        pooled = self._pooled(range(self.num_domains))
        assert pooled is not None
        return self._by_row(pooled, x, residual, mask, weight, bias)

    def _by_row(
        self,
        row: Running,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        normalize = portable if torch.compiler.is_exporting() else functional
        weight, bias = self._trained(weight), self._trained(bias)
        return normalize.normalize_running(
            x,
            row.mean,
            row.var,
            weight,
            bias,
            eps=self.eps,
            residual=residual,
            activation=self.activation,
            mask=mask,
        )

    def _by_masks(self, x: Tensor, domain: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """The same with a mask for each domain: for graphs and transforms, where no size may depend on values."""
        known = self._known(domain)
        spatial = (x.shape[0], *(1,) * (x.dim() - 2))
        valid = torch.ones_like(x[:, 0], dtype=torch.bool) if mask is None else mask
        affine = self._affine()
        total: Tensor | None = None
        for number in [*range(self.num_domains), *([NO_ROW] if self._takes_pooled() else [])]:
            is_here = ~known if number == NO_ROW else (domain == number) & known
            member = valid & is_here.view(spatial)
            y, moments = self._normalize_domain(number, x, residual, member, affine)
            row = self._row(number) if number != NO_ROW else None
            if moments is not None and row is not None:
                if self.single_value == "running" and not self._uses_running():
                    weight, bias = (self._own(parameter, number) for parameter in affine)
                    enough = torch.as_tensor(moments.count) > 1
                    y = torch.where(enough, y, self._by_row(row, x, residual, member, weight, bias))
                self._require_finite(row, moments)
                self._remember(row, moments)
            total = y if total is None else total + y
        assert total is not None
        if self._takes_pooled():
            return total
        # Nothing can be raised here; what is not known is not a number.
        return torch.where(known.view(x.shape[0], *(1,) * (x.dim() - 1)), total, torch.nan)

    def _takes_pooled(self) -> bool:
        return self.unknown == "pooled" and self.running_mean is not None

    def _ensure_known(self, domain: Tensor, known: Tensor) -> None:
        if bool(known.all()):
            return
        strange = sorted(set(domain[~known].tolist()))
        outside = [number for number in strange if not 0 <= number < self.num_domains]
        what = f"domains 0 to {self.num_domains - 1}" if outside else "domains that have been trained"
        raise InputError(
            f"{checks.name(self)} expected {what}, got {', '.join(map(str, outside or strange))}: with unknown='pooled'"
            " such samples are normalised by the pooled statistics of all domains."
        )

    def _ensure_values(self, x: Tensor, numbers: list[int], sizes: list[int]) -> None:
        """Refuse one value per channel before any domain is changed."""
        values = x.numel() // max(x.shape[0] * self.num_features, 1)
        is_refused = self.training and not self._uses_running() and self.single_value == "error"
        if len(numbers) < 2 or not is_refused:
            return
        alone = [n for n, size in zip(numbers, sizes, strict=True) if size * values == 1 and n != NO_ROW]
        if alone:
            raise DegenerateStatisticsError(
                f"{checks.name(self)} expected more than one value per channel of every domain in training, got one of"
                f" domain {', '.join(map(str, alone))}, whose variance is zero: give a batch at least two samples of"
                " each domain, or normalise them by the running statistics with single_value='running'."
            )

    def _check_domain(self, x: Tensor, domain: Tensor) -> None:
        is_integer = isinstance(domain, Tensor) and not (
            domain.is_floating_point() or domain.is_complex() or domain.dtype == torch.bool
        )
        if not is_integer or domain.shape != x.shape[:1]:
            given = f"{tuple(domain.shape)} of {domain.dtype}" if isinstance(domain, Tensor) else repr(domain)
            raise InputError(
                f"{checks.name(self)} expected a domain ({x.shape[0]},) of an integer dtype, got {given}: one number"
                " per sample."
            )

    def _check_settings(self) -> None:
        super()._check_settings()
        if not isinstance(self.num_domains, int) or isinstance(self.num_domains, bool) or self.num_domains < 1:
            raise InputError(f"{checks.name(self)}: num_domains must be a positive integer, got {self.num_domains!r}.")


def _count(row: Running) -> Tensor:
    assert row.batches is not None
    return row.batches


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """`x` sample by sample in another order, and its gradient, in the memory order of `x`."""
    if is_channels_last(x):
        return x.movedim(1, -1)[order].movedim(-1, 1)
    return x[order]


def _in_order(ys: list[Tensor], order: Tensor, x: Tensor) -> Tensor:
    """The parts as one tensor again, in the order of samples and memory of `x`."""
    back = torch.argsort(order)
    if is_channels_last(x):
        return torch.cat([y.movedim(1, -1) for y in ys])[back].movedim(-1, 1)
    return torch.cat(ys)[back]


class DomainBatchNorm1d(DomainBatchNorm):
    """`DomainBatchNorm2d` for (N, C) and (N, C, L)."""

    ranks = (2, 3)
    plain = BatchNorm1d


class DomainBatchNorm2d(DomainBatchNorm):
    """Batch normalization over (N, C, H, W) with statistics for each domain, called with a domain id per sample.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual), mean and var of the sample's domain

    A batch may mix domains: each is normalised as a batch of its own, and updates its own row of the running
    statistics (num_domains, C). With one domain this is `BatchNorm2d`. `merge_domains` gives one plain batch norm.
    The state_dict of a plain batch norm loads: every domain starts from it.

    Args:
        num_features, ...: as `BatchNorm2d`.
        num_domains: by keyword; positive.
        unknown: what is done with a domain outside 0 … num_domains − 1, or, in evaluation, with one that has seen no
            batch where others have. "error": an error; "pooled": the pooled running statistics of all normalise it,
            and it moves none.
        shared_affine: one weight and bias for all domains; otherwise (num_domains, C), and an unknown domain gets
            their mean.
        single_value: as `BatchNorm2d`, for one value per channel of a domain.

    Source: Chang et al., Domain-Specific Batch Normalization for Unsupervised Domain Adaptation (2019), section 3.
    """

    ranks = (4,)
    plain = BatchNorm2d


class DomainBatchNorm3d(DomainBatchNorm):
    """`DomainBatchNorm2d` for (N, C, D, H, W)."""

    ranks = (5,)
    plain = BatchNorm3d
