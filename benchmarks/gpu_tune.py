"""Other launch configurations than the rule picks: each number of it changed by itself, in turns with the rule's own.

What wins here by more than the noise belongs into `kernels/gpu/launch.py` or `sample_launch.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_cases import MOST, Case, Inputs, Place, batch_cases, sample_cases
from benchmarks.interleaved import check_each, take_turns
from steadynorm.kernels.gpu import launch, sample_launch

RULE = "the rule"


@dataclass(frozen=True)
class Variant:
    """Constants of a module of the rule, with other values."""

    module: Any
    values: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.values)


def _variants(module: Any, **values: tuple[float, ...]) -> list[Variant]:
    return [Variant(module, ((name, value),)) for name, others in values.items() for value in others]


TILES = [Variant(launch, (("TILE", tile), ("WARPS", warps))) for tile, warps in ((2048, 4), (4096, 4), (8192, 16))]
SPLITS = _variants(launch, PROGRAMS=(2, 4, 16), PARTS=(128,), UNITS=(1, 1 << 20), WHOLE=(0, 1 << 18))
SHAPES = TILES + _variants(launch, ROW_CHANNELS=(32, 128), WASTE=(1.0, 1.15))
BATCH = SHAPES + SPLITS + _variants(launch, STAGES=(2, 3), REGISTERS=(64, 80))
ROWS = _variants(
    sample_launch,
    STAGES=(1, 3),
    KEEPERS=(1, 4),
    ROW_TILE=(1024, 4096),
    ROW_TILE_BACKWARD=(2048, 4096),
    VALUES_PER_WARP=(256, 1024),
    NEAR=(8192,),
    HELD_BACKWARD=(4096, 16384),
)
GROUPS = SHAPES + SPLITS + _variants(sample_launch, HELD=(8192,), RUN=(1024,))
# What the rule is tried on: the widest planes, the middle and the smallest; rows that registers hold and do not.
SIDES, WIDTHS = (56, 14, 7), (1024, 4096, 8192, 16384)


@contextmanager
def changed(variant: Variant | None) -> Iterator[None]:
    """The rule with the constants of a variant."""
    if variant is None:
        yield
        return
    before = [(name, getattr(variant.module, name)) for name, _ in variant.values]
    try:
        for name, value in variant.values:
            setattr(variant.module, name, value)
        _forget()
        yield
    finally:
        for name, value in before:
            setattr(variant.module, name, value)
        _forget()


def _forget() -> None:
    launch.plan.cache_clear()
    sample_launch.plan.cache_clear()


def _cases(*, is_rehearsed: bool) -> Iterator[tuple[Case, list[Variant]]]:
    for case in batch_cases(is_rehearsed=is_rehearsed):
        if not case.residual and (is_rehearsed or case.shape[-1] in SIDES):
            yield case, BATCH
    for case in sample_cases(is_rehearsed=is_rehearsed):
        if case.name == "layer_norm" and not case.residual and (is_rehearsed or case.shape[-1] in WIDTHS):
            yield case, ROWS
        elif case.name == "group_norm":
            yield case, GROUPS


def rows(place: Place, is_late: Callable[[], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every case: its name, and the seconds of the rule and of each variant, or why it was not timed."""
    for case, variants in _cases(is_rehearsed=place.is_rehearsed):
        if is_late():
            return
        inputs, ours, eager = Inputs(case, place), case.rivals["ours"], case.rivals["eager"]
        exact, theirs = inputs.results(eager, torch.float64), inputs.results(eager)
        rivals: dict[str, Variant | None] = {RULE: None}
        refused = {}
        for variant in variants:
            try:
                with changed(variant):
                    check_each(inputs.results(ours), theirs, exact, MOST[case.dtype])
                rivals[str(variant)] = variant
            except Exception as error:  # a configuration that cannot be compiled or launched is one that does not win
                refused[str(variant)] = f"{type(error).__name__}: {error}".splitlines()[0]

        def step(variant: Variant | None, inputs: Inputs = inputs, ours: Callable[..., Any] = ours) -> Any:
            with changed(variant):
                return inputs.step(ours)

        yield str(case), take_turns(rivals, step, inputs.copy, place.least_rounds) | {"refused": refused}


def told(row: Mapping[str, Any]) -> str:
    """What is faster than the rule, how much, and what was refused."""
    words = []
    for way in ("forward", "backward"):
        rule = row[f"{RULE}_{way}"]
        times = {
            name.removesuffix(f"_{way}"): rule / value
            for name, value in row.items()
            if name.endswith(f"_{way}") and not name.startswith(RULE)
        }
        best = sorted(times.items(), key=lambda pair: -pair[1])[:3]
        words.append(f"{way} {rule * 1e6:.1f} us, " + ", ".join(f"{gain:.2f} {name}" for name, gain in best))
    words += [f"refused {name}: {why}" for name, why in row["refused"].items()]
    return "; ".join(words)
