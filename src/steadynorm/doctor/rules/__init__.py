"""The rules: one file each, which is its documentation and its test too.

A rule file is named by its code and its slug. Its docstring is one sentence of advice, then the paragraphs Why, Bad,
Good and Source; `tests/doctor/test_rules.py` runs Bad and Good. `needs` names the parts of the probe that it reads:
where one of them could not be looked at, the rule is reported as not checked. `check` is a pure function of the facts.

A code is never used again for another fault. Hundreds are topics, and within them a rule keeps its number whatever it
becomes. A rule that speaks of taste, or that is right in fewer than nine of ten networks that people train on purpose,
has `is_optional = True`: it is checked only where its code, or a beginning of its code, is selected.
"""

import inspect
from collections.abc import Iterator
from typing import Protocol

from steadynorm.doctor.finding import Finding
from steadynorm.doctor.rules import (
    SN001_forward_raises,
    SN002_nonfinite_batches,
    SN101_one_value_per_statistic,
    SN102_too_few_values,
    SN103_single_element_group,
    SN104_dead_bias,
    SN105_wrong_axis,
    SN106_shared_norm,
    SN107_dropout_before_norm,
    SN108_momentum_convention,
    SN109_momentum_too_slow,
    SN110_momentum_zero,
    SN111_eps_dominates,
    SN112_dead_channels,
    SN113_hard_coded_training,
    SN114_tracking_instance_norm,
    SN115_rescaled_before_norm,
    SN116_stacked_norms,
    SN118_never_called_norm,
    SN201_default_statistics,
    SN202_broken_statistics,
    SN203_stale_statistics,
    SN204_averaged_weights,
    SN205_tracking_toggled,
    SN206_low_precision_statistics,
    SN208_spectral_vectors,
    SN209_ragged_counters,
    SN301_evaluation_moves_statistics,
    SN302_frozen_but_moving,
    SN303_recompute_double_update,
    SN304_extra_forward,
    SN305_training_in_evaluation_mode,
    SN306_freeze_undone,
    SN307_helper_in_training_mode,
    SN308_dropout_with_batch_statistics,
    SN309_accumulated_statistics,
    SN401_batches_not_alike,
    SN402_ragged_last_batch,
    SN403_padding_in_statistics,
    SN405_preprocessing_mismatch,
    SN406_input_scale,
    SN407_constant_feature,
    SN501_mean_over_deviation,
    SN503_bessel_gap,
    SN601_statistics_of_ranks,
    SN701_decay_on_norm,
    SN702_norm_not_optimised,
    SN801_batch_dependent_evaluation,
    SN802_program_in_training_mode,
)
from steadynorm.errors import InputError
from steadynorm.probe import Facts, Part


class Rule(Protocol):
    """A rule file, as a module."""

    __name__: str
    __doc__: str | None
    needs: tuple[Part, ...]

    def check(self, facts: Facts) -> Iterator[Finding]:
        """The faults of this kind that the facts show."""
        ...


RULES: tuple[Rule, ...] = (
    SN001_forward_raises,
    SN002_nonfinite_batches,
    SN101_one_value_per_statistic,
    SN102_too_few_values,
    SN103_single_element_group,
    SN104_dead_bias,
    SN105_wrong_axis,
    SN106_shared_norm,
    SN107_dropout_before_norm,
    SN108_momentum_convention,
    SN109_momentum_too_slow,
    SN110_momentum_zero,
    SN111_eps_dominates,
    SN112_dead_channels,
    SN113_hard_coded_training,
    SN114_tracking_instance_norm,
    SN115_rescaled_before_norm,
    SN116_stacked_norms,
    SN118_never_called_norm,
    SN201_default_statistics,
    SN202_broken_statistics,
    SN203_stale_statistics,
    SN204_averaged_weights,
    SN205_tracking_toggled,
    SN206_low_precision_statistics,
    SN208_spectral_vectors,
    SN209_ragged_counters,
    SN301_evaluation_moves_statistics,
    SN302_frozen_but_moving,
    SN303_recompute_double_update,
    SN304_extra_forward,
    SN305_training_in_evaluation_mode,
    SN306_freeze_undone,
    SN307_helper_in_training_mode,
    SN308_dropout_with_batch_statistics,
    SN309_accumulated_statistics,
    SN401_batches_not_alike,
    SN402_ragged_last_batch,
    SN403_padding_in_statistics,
    SN405_preprocessing_mismatch,
    SN406_input_scale,
    SN407_constant_feature,
    SN501_mean_over_deviation,
    SN503_bessel_gap,
    SN601_statistics_of_ranks,
    SN701_decay_on_norm,
    SN702_norm_not_optimised,
    SN801_batch_dependent_evaluation,
    SN802_program_in_training_mode,
)


def is_on(rule: Rule) -> bool:
    """Whether a rule is checked without being selected by its code."""
    return not getattr(rule, "is_optional", False)


def code_of(rule: Rule) -> str:
    """The code of a rule, from the name of its file."""
    return rule.__name__.rpartition(".")[2].partition("_")[0]


def slug_of(rule: Rule) -> str:
    """The name of a rule, from the name of its file."""
    return rule.__name__.rpartition(".")[2].partition("_")[2].replace("_", "-")


def advice_of(rule: Rule) -> str:
    """The one sentence of a rule."""
    return (rule.__doc__ or "").strip().partition("\n")[0]


def explain(code: str) -> str:
    """What a rule says, why, an example that it finds and one that it does not, and where it comes from.

    Raises:
        InputError: no rule has this code.
    """
    for rule in RULES:
        if code.upper() == code_of(rule):
            return f"{code_of(rule)} {slug_of(rule)}\n\n{inspect.cleandoc(rule.__doc__ or '')}"
    codes = ", ".join(map(code_of, RULES))
    raise InputError(f"no rule has the code {code!r}: expected one of {codes}.")
