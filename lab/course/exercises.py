"""The table of exercises: which functions lose their bodies, what they are worth, and the lessons that check them."""

import dataclasses
import random

from lab.course import equations as eq
from lab.course import rules


@dataclasses.dataclass(frozen=True)
class Exercise:
    """One row of the course.

    Attributes:
        number, title, points, minutes: what the student sees.
        places: the functions that lose their bodies, as "losses.py::bt_loss".
        hint: the last words of the NotImplementedError.
        lessons: the checks in order; the share before the first that fails is the share of the points.
    """

    number: int
    title: str
    points: int
    minutes: int
    places: tuple[str, ...]
    hint: str
    lessons: tuple

    @property
    def files(self) -> tuple[str, ...]:
        """The files handed in for it."""
        return tuple(dict.fromkeys(place.split("::")[0] for place in self.places))


EXERCISES = (
    Exercise(1, "Bradley-Terry, Eq. 3 and Eq. 10", 4, 15, ("losses.py::bt_loss",),
             "what does a pair in the right order cost, and what is the mean taken over?",
             (eq.winner_first, eq.minus_log_probability, eq.mean_over_all_elements, eq.denominator_of_the_whole_batch,
              eq.log_sigma_in_one, eq.in_fp32, eq.trains_both_rewards)),
    Exercise(2, "Bradley-Terry with ties", 5, 25, ("losses.py::btt_loss",),
             "three outcomes, whose probabilities sum to 1; stay in logs.",
             (eq.a_win_needs_a_margin, eq.a_tie_is_an_outcome, eq.probabilities_sum_to_one, eq.ties_far_apart,
              eq.mean_over_pairs, eq.ties_in_fp32, eq.ties_denominator, eq.default_k)),
    Exercise(3, "random CoT masking", 3, 15, ("losses.py::draw_cot_mask",),
             "how many coins, whose generator, and what does True mean?",
             (eq.one_coin_for_each_pair, eq.true_means_masked, eq.the_given_generator, eq.independent_coins)),
    Exercise(4, "group advantages", 6, 30, ("losses.py::group_advantages",),
             "which axis is the group? Then read the pitfall in the docstring.",
             (eq.rows_are_groups, eq.bessel, eq.a_group_of_one, eq.equal_rewards_say_nothing,
              eq.epsilon_in_the_denominator)),
    Exercise(5, "the KL to the reference (k3)", 5, 20, ("losses.py::kl_to_reference",),
             "which of the two is a constant, and which way up is the ratio?",
             (eq.never_negative, eq.reference_over_policy, eq.reference_is_a_constant, eq.kl_stays_finite)),
    Exercise(6, "the clipped policy loss, Eq. 7", 10, 60, ("losses.py::grpo_loss",),
             "`policy_ratio` is given. Work out one token with A > 0 and one with A < 0 by hand first.",
             (eq.good_tokens_become_likelier, eq.the_larger_loss, eq.two_clips, eq.dual_clip,
              eq.padding_counts_for_nothing, eq.mean_over_all_tokens, eq.grpo_denominator, eq.default_clips)),
    Exercise(7, "the three rules of the rollout reward", 7, 45,
             ("rules.py::well_formed", "rules.py::quality_reward", "rules.py::length_reward",
              "rules.py::rollout_reward"),
             "LAYOUT and `read_verdicts` in rules.py are given.",
             (rules.nothing_around_the_blocks, rules.verdicts_on_all_dimensions, rules.annotated_dimensions_only,
              rules.left_out_is_wrong, rules.linear_in_between, rules.bounded_in_length, rules.tokens_not_characters,
              rules.parts_in_their_places, rules.default_rules)),
    Exercise(8, "accuracy with ties", 8, 60,
             ("metrics.py::_hits_by_ties", "metrics.py::accuracy_curve", "metrics.py::accuracy_with_ties"),
             "start with `_hits_by_ties`: what does calling one more pair a tie change? `right` is given.",
             (rules.untied_ties_are_wrong, rules.nothing_is_tied, rules.no_cut_inside_a_run, rules.smallest_of_equals,
              rules.row_order_is_nothing, rules.what_has_no_accuracy, rules.one_sort_one_sum)),
    Exercise(9, "what a query may see: attention with a shared prefix", 12, 120,
             ("layout.py::shared_prefix_attention", "layout.py::attend_behind"),
             "one CoT a row first. `attend_behind` is its second half, and prefix_once.py calls it, too. "
             "`module` is not needed: it is None in the lessons.",
             (rules.prefix_is_causal, rules.cots_do_not_see_each_other, rules.lower_right_corner,
              rules.in_the_order_of_positions, rules.heads_in_groups, rules.scaling_is_used,
              rules.gradient_reaches_the_prefix, rules.without_spans, rules.behind_a_prefix)),
    Exercise(10, "tests that catch mistakes", 10, 60,
             ("my_tests.py::test_group_advantages", "my_tests.py::test_accuracy_with_ties"),
             "numbers worked by hand, and one case for each way to be wrong.",
             (rules.right_code_is_accepted, rules.another_way_to_write_it, *rules.CATCHES)),
)

# The file that exercise 10 asks for. The reference has none: each student's tests are their own.
MY_TESTS = '''"""Exercise 10: two tests that pass on right code, however it is written, and fail on six known mistakes.

The function under test is given to you. Work the expected numbers out by hand; `assert` what must hold.
It may be right code, or code with one mistake. What you see of it are its values: no signature, no gradient.
Called with one argument, by the grader and not by pytest: loop over your cases.
"""

import numpy as np
import torch


def test_group_advantages(group_advantages):
    """Tests losses.group_advantages: rewards (N, G) -> advantages (N, G)."""


def test_accuracy_with_ties(accuracy_with_ties):
    """Tests metrics.accuracy_with_ties: labels, margins -> (accuracy, eps)."""
'''

# The constants that `--variant` changes, in the signatures and in the lessons. First the reference's own.
VARIANTS = {
    "k": (5.0, 3.0, 4.0, 6.0, 8.0),
    "epsilon": (1e-6, 1e-3, 2e-3, 5e-3),
    "clip_low": (0.2, 0.1, 0.15, 0.25),
    "clip_high": (0.3, 0.22, 0.28, 0.35, 0.4),
    "clip_dual": (3.0, 2.5, 4.0, 5.0),
    "weights": ((0.7, 0.1, 0.2), (0.6, 0.1, 0.3), (0.6, 0.2, 0.2), (0.8, 0.1, 0.1), (0.5, 0.2, 0.3)),
    "length_range": ((500, 2000), (300, 1500), (400, 2400), (600, 1800), (200, 1000)),
}


def constants(variant: int = 0) -> dict:
    """{name: value} of a variant; 0 is the reference."""
    draw = random.Random(variant)
    return {name: draw.choice(values[1:]) if variant else values[0] for name, values in VARIANTS.items()}
