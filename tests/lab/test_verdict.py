import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steadynorm.lab.verdict import curves_of, judge
from tests.lab.toy import rows

SIZES = [2, 4, 8, 16, 32]


def around(mean, deviation=0.004):
    """Three seeds with exactly this mean and deviation."""
    return [mean - deviation, mean, mean + deviation]


def curve(*means):
    return {size: around(mean) for size, mean in zip(SIZES, means, strict=False)}


def test_it_finds_the_batch_size_and_the_norm_to_take_below_it():
    verdict = judge(rows({"batch": curve(0.6, 0.85, 0.98, 0.982, 0.981), "group": curve(0.95, 0.95, 0.95, 0.95, 0.95)}))
    assert (verdict.status, verdict.norm, verdict.metric, verdict.seeds) == ("warning", "batch", "accuracy", 3)
    assert (verdict.smallest, verdict.largest) == (8, 32)
    assert verdict.instead == {2: "group", 4: "group"}
    assert verdict.sentence == (
        "With batch norm, accuracy is within noise of its best, 0.982 ± 0.004 at batch size 16, from batch size 8 on; "
        "it is worse at 2 (0.6 ± 0.004), 4 (0.85 ± 0.004). "
        "Below 8 take group norm: 0.95 ± 0.004 at 2, 0.95 ± 0.004 at 4."
    )


def test_a_flat_curve_is_called_flat():
    verdict = judge(
        rows({"batch": curve(0.98, 0.981, 0.979, 0.982, 0.98), "group": curve(0.98, 0.98, 0.98, 0.98, 0.98)})
    )
    assert verdict.status == "ok"
    assert (verdict.smallest, verdict.largest, verdict.instead) == (2, 32, {})
    assert "the batch size makes no difference that the seeds could tell from noise: from 2 to 32" in verdict.sentence


def test_a_curve_that_still_rises_asks_for_larger_ones():
    verdict = judge(rows({"batch": curve(0.5, 0.6, 0.7, 0.8, 0.9)}))
    assert verdict.smallest == 32
    assert "best at the largest batch size tried, 32 (0.9 ± 0.004)" in verdict.sentence
    assert "try larger ones" in verdict.sentence


def test_a_curve_that_falls_again_has_two_ends():
    verdict = judge(rows({"batch": curve(0.5, 0.9, 0.9, 0.9, 0.7)}))
    assert (verdict.smallest, verdict.largest) == (4, 16)
    assert "from batch size 4 to 16; it is worse at 2 (0.5 ± 0.004) and at 32 (0.7 ± 0.004)." in verdict.sentence


def test_a_second_norm_as_good_as_the_first_is_said():
    scores = {"batch": curve(0.6, 0.98, 0.98), "group": curve(0.949, 0.9, 0.9), "layer": curve(0.95, 0.9, 0.9)}
    sentence = judge(rows({**scores, "none": curve(0.3, 0.3, 0.3)})).sentence
    assert "Below 4 take layer norm (group norm is within noise of it): 0.95 ± 0.004 at 2." in sentence


def test_no_better_norm_is_said():
    verdict = judge(rows({"batch": curve(0.6, 0.9, 0.9), "group": curve(0.6, 0.6, 0.6)}))
    assert verdict.instead == {}
    assert "Below 4 no other norm was better by more than noise." in verdict.sentence


def test_a_norm_that_is_better_everywhere_is_said():
    verdict = judge(rows({"batch": curve(0.6, 0.9, 0.9), "layer": curve(0.95, 0.95, 0.95)}))
    assert "Even at batch size 4 layer norm is better: 0.95 ± 0.004 against 0.9 ± 0.004." in verdict.sentence


def test_one_seed_gives_no_verdict():
    verdict = judge(rows({"batch": {2: [0.5], 32: [0.9]}}))
    assert (verdict.status, verdict.smallest) == ("note", None)
    assert verdict.sentence.startswith("One seed cannot tell a difference from noise, so there is no verdict")
    assert "better 3 to 5" in verdict.sentence


def test_noisy_seeds_do_not_make_a_difference():
    verdict = judge(rows({"batch": {2: [0.5, 0.9, 0.7], 8: [0.95, 0.6, 0.7], 32: [0.9, 0.75, 0.65]}}))
    assert verdict.status == "ok"


def test_failed_cells_are_counted_and_are_not_good():
    failed = [("batch", 1, "one value per channel")]
    verdict = judge(
        rows({"batch": curve(0.9, 0.9, 0.9), "group": {1: around(0.9), **curve(0.9, 0.9, 0.9)}}, failed=failed)
    )
    assert verdict.smallest == 2
    assert verdict.instead == {1: "group"}
    assert "worse at 1 (failed)" in verdict.sentence
    assert verdict.sentence.endswith("1 of 22 cells failed: one value per channel")


def test_a_cell_with_one_failed_seed_is_not_judged_by_the_others():
    data = rows({"batch": curve(0.9, 0.9, 0.9)}, failed=[("batch", 2, "diverged")])
    (only,) = curves_of(data)
    assert (list(only.points), only.failed) == ([4, 8], (2,))


def test_nothing_finished_is_an_error_with_the_cause():
    verdict = judge(rows({}, failed=[("batch", 2, "batches() is empty.")]))
    assert verdict.status == "error"
    assert verdict.sentence == "No cell of the grid finished with every seed: batches() is empty."


def test_one_batch_size_still_compares_norms():
    verdict = judge(rows({"batch": {8: around(0.7)}, "group": {8: around(0.9)}}))
    assert "0.7 ± 0.004 at batch size 8, the only one tried" in verdict.sentence
    assert "group norm is better" in verdict.sentence


def test_a_recipe_without_metrics_is_judged_by_its_loss():
    data = rows({"batch": curve(2.0, 0.5, 0.5)})
    for row in data:
        row["numbers"] = {"loss": row["numbers"]["accuracy"]}
    verdict = judge(data)
    assert (verdict.metric, verdict.smallest) == ("loss", 4)
    assert "0.5 ± 0.004" in verdict.sentence


def test_it_is_plain_data():
    verdict = judge(rows({"batch": curve(0.6, 0.9, 0.9), "group": curve(0.9, 0.9, 0.9)}))
    assert json.loads(json.dumps(verdict.to_dict()))["instead"] == {"2": "group"}


@given(st.lists(st.integers(0, 20), min_size=2, max_size=8), st.integers(2, 4))
def test_monotone_data_without_noise_have_their_threshold_where_they_stop_rising(steps, seeds):
    means = np.cumsum(steps) / 200
    sizes = [2**power for power in range(len(means))]
    verdict = judge(rows({"batch": {size: [mean] * seeds for size, mean in zip(sizes, means, strict=True)}}))
    assert verdict.smallest == sizes[int(np.argmax(means == means[-1]))]
    assert verdict.largest == sizes[-1]


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_the_rows_does_not_matter(order):
    data = rows({"batch": curve(0.6, 0.85, 0.98, 0.982, 0.981), "group": curve(0.95, 0.95, 0.95, 0.95, 0.95)})
    assert judge(data[::order]).sentence == judge(data).sentence
