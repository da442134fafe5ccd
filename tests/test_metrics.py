"""Table 1's accuracies, each against its definition and against numbers worked by hand.

label +1: A is better, -1: B, 0: the same. margin = r_A - r_B. A pair is called a tie where |margin| <= eps.
"""

import math
import random

import numpy as np
import pytest

from metrics import (
    accuracy_with_ties,
    accuracy_with_ties_cross_fitted,
    accuracy_without_ties,
    bootstrap_interval,
    calibration,
    videoalign_compatible,
)
from phases import mean
from plumbing.settings import InputError


def brute_force_with_ties(labels, margins):
    """The definition, word by word: try every threshold that there is, take the best, the smallest of equals."""

    def share_right(threshold):
        said = [0 if abs(m) <= threshold else (1 if m > 0 else -1 if m < 0 else None) for m in margins]
        return sum(a == b for a, b in zip(said, labels)) / len(labels)

    candidates = [-1.0, *sorted({abs(m) for m in margins})]
    best = max(map(share_right, candidates))
    return best, next(t for t in candidates if share_right(t) == best)


def random_case(rng):
    """Labels, and margins from a small grid so that equal |margin|, zero and opposite signs are common."""
    n = rng.randint(1, 12)
    return [rng.choice([1, -1, 0]) for _ in range(n)], [rng.choice([-2, -1, -0.5, 0, 0.5, 1, 2, 3]) for _ in range(n)]


def test_with_ties_equals_the_definition_on_random_cases_with_repeated_margins():
    rng = random.Random(0)
    for _ in range(4000):
        labels, margins = random_case(rng)
        assert accuracy_with_ties(labels, margins) == brute_force_with_ties(labels, margins), (labels, margins)


def test_without_ties_equals_the_definition_on_random_cases():
    rng = random.Random(1)
    for _ in range(2000):
        labels, margins = random_case(rng)
        kept = [(label, margin) for label, margin in zip(labels, margins) if label != 0]
        if kept:
            expected = sum((m > 0) == (label > 0) and m != 0 for label, m in kept) / len(kept)
            assert accuracy_without_ties(labels, margins) == expected


def test_hand_worked_numbers():
    # Right, wrong because equal, right, human tie dropped: 2 of 3.
    assert accuracy_without_ties([1, 1, -1, 0], [2, 0, -1, 5]) == 2 / 3
    # |margin| .5 is the human tie; calling it a tie makes all three right.
    assert accuracy_with_ties([1, 0, -1], [2, 0.5, -1]) == (1.0, 0.5)
    # No human ties and all signs right: the best is to tie nothing, which is threshold -1.
    assert accuracy_with_ties([1, -1, 1, -1], [1, -2, 3, -4]) == (1.0, -1.0)
    # A run of equal |margin| 1 with labels 0, A, A (all predicted A): tying the run wins 1 and loses 2, so it stays
    # untied: 2 of 3. A cut inside the run would claim 3 of 3.
    assert accuracy_with_ties([0, 1, 1], [1, 1, 1]) == (2 / 3, -1.0)
    # A flipped sign must be visible: everything wrong without ties.
    assert accuracy_without_ties([1, -1], [-1, 2]) == 0.0
    # Two models that are equally good at two thresholds: the smaller one is reported.
    assert accuracy_with_ties([0, 1, 0], [1, 2, 3]) == (2 / 3, 1.0)


def test_videoalign_compatible_never_tries_nothing_is_tied_and_cuts_inside_runs():
    assert videoalign_compatible([1, -1, 1, -1], [1, -2, 3, -4]) == 0.75  # the smallest is always a tie: wrong
    # Equal |margin| 1, in file order (0, A, A): after the first is tied all three are right. Ordered (A, A, 0) the cuts
    # give A tied: 1 right (the other A); A, A tied: 0; all tied: 1 -> 1/3. The definition says 2/3 for both orders.
    assert videoalign_compatible([0, 1, 1], [1, 1, 1]) == 1.0
    assert videoalign_compatible([1, 1, 0], [1, 1, 1]) == 1 / 3


def test_videoalign_compatible_agrees_with_the_definition_up_to_one_pair_when_margins_differ():
    rng = np.random.default_rng(0)
    for _ in range(200):
        labels, margins = rng.integers(-1, 2, 50), rng.normal(size=50)
        gap = accuracy_with_ties(labels, margins)[0] - videoalign_compatible(labels, margins)
        assert 0 <= gap <= 1 / 50 + 1e-12


def test_row_order_does_not_matter_and_inputs_stay_as_they_are():
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels, margins = rng.integers(-1, 2, 30), rng.integers(-4, 5, 30) / 2
        labels[0] = 1
        before, order = (labels.copy(), margins.copy()), rng.permutation(30)
        for metric in (accuracy_with_ties, accuracy_without_ties, accuracy_with_ties_cross_fitted):
            assert metric(labels, margins) == metric(labels[order], margins[order])
        assert (labels == before[0]).all() and (margins == before[1]).all()


def test_with_ties_is_never_below_the_share_of_human_ties():
    rng = np.random.default_rng(0)
    for _ in range(100):
        labels, margins = rng.integers(-1, 2, 20), rng.normal(size=20)
        assert accuracy_with_ties(labels, margins)[0] >= (labels == 0).mean()


def test_cross_fitting_takes_the_flattery_out():
    # Scores that know nothing, labels .40/.35/.25: no threshold is right for more than .75 / 2 = .375 in expectation
    # (nothing tied). Tuning on the same 100 pairs claims more.
    tuned, fair = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        labels, margins = rng.choice([1, -1, 0], size=100, p=[0.40, 0.35, 0.25]), rng.normal(size=100)
        tuned.append(accuracy_with_ties(labels, margins)[0])
        fair.append(accuracy_with_ties_cross_fitted(labels, margins))
    assert np.mean(tuned) > 0.38 and np.mean(fair) < 0.375
    # A margin that says it all loses nothing: labels 0 have |margin| 1, others 10.
    labels = np.array([1, -1, 0, 0] * 10)
    assert accuracy_with_ties_cross_fitted(labels, np.where(labels == 0, 1, 10 * labels)) == 1.0
    assert np.isnan(accuracy_with_ties_cross_fitted([1], [2.0]))


def test_cross_fitting_splits_at_random_not_by_margin():
    """B's wins have no tie near 0, A's margins below 1 are ties: eps learnt from one side is wrong on the other."""
    labels = np.array([-1] * 50 + [0] * 40 + [1] * 10)
    margins = np.concatenate([-np.linspace(2, 3, 50), np.linspace(0.1, 0.9, 40), np.linspace(2, 3, 10)])
    assert accuracy_with_ties_cross_fitted(labels, margins) > 0.97


def test_bootstrap_interval():
    hits = np.array([1] * 80 + [0] * 20)
    low, high = bootstrap_interval(hits)
    assert abs(low - 0.72) < 0.02 and abs(high - 0.88) < 0.02  # normal approximation: .8 +- 1.96 * sqrt(.8 * .2 / 100)
    assert bootstrap_interval(np.ones(10)) == (1.0, 1.0)
    # All pairs of one prompt agree: 10 prompts say as much as 10 pairs, so the interval is wider than for 100 pairs.
    groups = np.repeat(np.arange(10), 10)
    grouped = bootstrap_interval(np.repeat([1] * 8 + [0] * 2, 10), groups)
    assert grouped[1] - grouped[0] > 2 * (high - low)
    assert np.isnan(bootstrap_interval(hits, np.zeros(100))).all()


METRICS = [accuracy_with_ties, accuracy_without_ties, accuracy_with_ties_cross_fitted]


@pytest.mark.parametrize("metric", METRICS)
def test_bad_input_is_named(metric):
    with pytest.raises(InputError, match="no pair"):
        metric([], [])
    with pytest.raises(InputError, match="row 1 "):
        metric([1, -1], [1.0, float("nan")])
    with pytest.raises(InputError, match="row 0 "):
        metric([1, -1], [float("inf"), 1.0])
    with pytest.raises(InputError, match="row 1 "):
        metric([1, 2], [1.0, 1.0])
    with pytest.raises(InputError, match="same length"):
        metric([1, -1], [1.0])


def test_only_human_ties_have_no_accuracy_without_ties():
    with pytest.raises(InputError, match="tie"):
        accuracy_without_ties([0, 0], [1, 2])


def test_calibration_by_hand():
    # sigmoid(ln 3) = .75, twice A and twice B: said .75, won .5, off by .25. sigmoid(-ln 9) = .1, B: said .1, won 0.
    # From the other side: said .25, won .5; said .9, won 1. ECE = 8/10 * .25 + 2/10 * .1 = .22. The human tie is out.
    labels = np.array([1, 1, -1, -1, -1, 0])
    margins = np.array([math.log(3)] * 4 + [-math.log(9.0001), 7])
    done = calibration(labels, margins)
    assert done["expected_calibration_error"] == pytest.approx(0.22, abs=1e-4)
    assert [b["pairs"] for b in done["bins"]] == [1, 4, 4, 1]
    assert done["bins"][2]["said"] == pytest.approx(0.75) and done["bins"][2]["won"] == 0.5
    # A file that names the winners first holds the same pairs: A always wins there, and that is no fault of the model
    first = calibration(labels * labels, margins * labels)
    assert first["expected_calibration_error"] == pytest.approx(done["expected_calibration_error"])


def test_equal_sizes_are_equal_though_floats_differ():
    """3.3 - 3.0 and 1.3 - 1.0: no threshold may call one a tie and not the other."""
    labels, margins = [0, 1], np.array([3.3, 1.3]) - np.array([3.0, 1.0])
    assert margins[0] != margins[1]
    assert accuracy_with_ties(labels, margins)[0] == 0.5
    assert videoalign_compatible([1, 0], margins[::-1]) == 1.0  # that script cuts between them, wherever they stand
    for scale in (1e-300, 1e-12, 1e12):
        assert accuracy_with_ties([1, 0, -1], np.array([2, 0.5, -1]) * scale) == (1.0, pytest.approx(0.5 * scale))
    assert len({mean(row) for row in ([3.3, 3.1, 3.2, 3.4], [3.1, 3.2, 3.3, 3.4], [3.4, 3.3, 3.2, 3.1])}) == 1


def test_calibration_of_a_model_that_is_right_about_its_doubt():
    rng = np.random.default_rng(0)
    margins = rng.normal(size=40_000) * 2
    labels = np.where(rng.random(40_000) < 1 / (1 + np.exp(-margins)), 1, -1)
    assert calibration(labels, margins)["expected_calibration_error"] < 0.01
    assert calibration(labels, 5 * margins)["expected_calibration_error"] > 0.1  # too large a scale
    assert calibration(np.array([0]), np.array([1.0]))["expected_calibration_error"] is None
    assert calibration(np.array([1, -1]), np.array([1e9, -1e9]))["expected_calibration_error"] < 1e-9
