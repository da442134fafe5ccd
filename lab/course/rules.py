"""Lessons 7 to 10: the rollout reward's rules, accuracy with ties, what a query may see, tests that catch mistakes."""

import random
import warnings

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from lab.course.checks import Raised, expect, near

# -- 7 the three rules ------------------------------------------------------------------------------------------------
TRUTH = {"subject": "2", "dynamics": "1", "camera": "N/A", "environment": "2", "style": "0"}


def written(**verdicts) -> str:
    """A well-formed CoT; without arguments all five verdicts are right. None leaves a dimension out."""
    said = {name: verdict for name, verdict in {**TRUTH, **verdicts}.items() if verdict is not None}
    body = ", ".join(f'"{name}": "{verdict}"' for name, verdict in said.items())
    return f'<think>I look.</think>\n<answer>{{"dimensional_scores": {{{body}}}, "overall_score": 3.5}}</answer>'


def nothing_around_the_blocks(f):
    """The WHOLE text must be <think> and <answer>: one with more before, between or after them is not well formed.
    Return True or False."""
    expect((got := f.well_formed(written())) is True, got)
    for text in ("Sure! " + written(), written() + " Thanks.", written().replace("<think>I look.</think>", ""),
                 written().replace("</think>", "</think> So I say: ")):
        expect((got := f.well_formed(text)) is False, f"{got} for {text[:38]!r} ... {text[-12:]!r}")


def verdicts_on_all_dimensions(f):
    """The answer needs a verdict, 0, 1, 2 or N/A, on each of the five dimensions; four are not well formed."""
    expect((got := f.well_formed(written(style=None))) is False, f"{got} with `style` left out")
    expect((got := f.well_formed(written(style="7"))) is False, f'{got} with "7" for `style`')


def annotated_dimensions_only(f):
    """R_qual divides by the ANNOTATED dimensions. You divided by all five, or by what the CoT speaks of."""
    near(f.quality_reward(written(), {"subject": "2"}), 1.0)
    near(f.quality_reward(written(style="2"), TRUTH), 0.8)


def left_out_is_wrong(f):
    """A dimension that the answer leaves out counts as wrong. Else a CoT earns most by saying least."""
    near(f.quality_reward(written(subject=None, style=None), TRUTH), 0.6)
    near(f.quality_reward("no answer at all", TRUTH), 0.0)


def linear_in_between(f):
    """R_len rises linearly from `low` to `high`, not in a step: else half of the CoTs learn nothing from it."""
    near([f.length_reward(n, low=100, high=300) for n in (150, 200, 275)], [0.25, 0.5, 0.875])


def bounded_in_length(f):
    """R_len stays in [0, 1]: 0 up to `low`, 1 from `high`. Else the longest CoT always wins."""
    near([f.length_reward(n, low=100, high=300) for n in (0, 100, 300, 5000)], [0, 0, 1, 1])


def tokens_not_characters(f):
    """R_len counts TOKENS, which you are given as num_tokens; a token has about four characters. `length` is
    `length_reward(num_tokens, *length_range)`, not yet weighted."""
    near(f.rollout_reward(written(), 1250, TRUTH, length_range=(500, 2000)).length, 0.5)


def parts_in_their_places(f):
    """R = w_q R_qual + w_f R_fmt + w_l R_len, in this order, and the result holds each part under its own name."""
    got = f.rollout_reward(written(style="2"), 1250, TRUTH, weights=(0.7, 0.1, 0.2), length_range=(500, 2000))
    near([got.quality, got.format, got.length, got.total], [0.8, 1.0, 0.5, 0.76])  # .56 + .1 + .1
    got = f.rollout_reward(written(style="2"), 1250, TRUTH, weights=(0.5, 0.3, 0.2), length_range=(1000, 1500))
    near(got.total, 0.8)  # .4 + .3 + .1
    near(f.rollout_reward(written(), 1250, TRUTH, length_range=(1000, 2000)).length, 0.25)
    text = "Sure! " + written(style="2")
    got = f.rollout_reward(text, 1250, TRUTH, weights=(0.7, 0.1, 0.2), length_range=(500, 2000))
    near([got.quality, got.format, got.length, got.total], [0.8, 0.0, 0.5, 0.66])  # only R_fmt asks for the form


def default_rules(f):
    """The weights or the length range are not those of your copy. A variant has its own, in the signatures."""
    low, high = f.c.length_range
    near([f.length_reward(n) for n in (low, (low + high) / 2, high)], [0, 0.5, 1])
    case = written(style="2"), low + 3 * (high - low) // 4, TRUTH
    told = f.rollout_reward(*case, weights=f.c.weights, length_range=f.c.length_range)
    near(f.rollout_reward(*case).total, told.total)


# -- 8 accuracy with ties ---------------------------------------------------------------------------------------------
def untied_ties_are_wrong(f):
    """While nothing is called a tie, a pair that people call a tie is wrong, also when both scores are equal; and
    equal scores are wrong where people decided."""
    sizes, hits = f._hits_by_ties(np.array([1, 0, -1, 0, -1, 1]), np.array([2.0, 0.5, -1.0, 0.0, 0.0, 0.0]))
    near(sizes, [0, 0, 0, 0.5, 1, 2])
    # None tied: the pairs at 2 and -1 are right. All three at 0 tied, in whatever order: the human tie is won, the two
    # others were wrong before. Then the human tie at .5 is won, and the pairs at -1 and 2 are lost.
    near([*hits[:1], *hits[3:]], [2, 3, 4, 3, 2])


def nothing_is_tied(f):
    """"Nothing is tied" (-1) is a threshold, too: four right scores without human ties are worth 1, not 3/4.
    `accuracy_with_ties` returns (accuracy, eps), in this order."""
    near(f.accuracy_with_ties([1, -1, 1, -1], [1, -2, 3, -4]), (1.0, -1.0))
    near(f.accuracy_curve([1, 0], [2, 1])[0], [-1, 1, 2])


def no_cut_inside_a_run(f):
    """Pairs with equally large margins are tied together: no threshold can cut between them. A cut claims 1.0 here."""
    near(f.accuracy_curve([0, 1, 1], [1, 1, 1]), [[-1, 1], [2 / 3, 1 / 3]])
    near(f.accuracy_with_ties([0, 1, 1], [1, 1, 1]), (2 / 3, -1.0))


def smallest_of_equals(f):
    """Of thresholds that are equally good the smallest is returned."""
    near(f.accuracy_with_ties([0, 1, 0], [1, 2, 3]), (2 / 3, 1.0))


def row_order_is_nothing(f):
    """The order of the rows changes the result. Sort by |margin| before you count."""
    rng = np.random.default_rng(0)
    labels, margins = rng.integers(-1, 2, 30), rng.integers(-4, 5, 30) / 2
    order = rng.permutation(30)
    near(f.accuracy_with_ties(labels, margins), f.accuracy_with_ties(labels[order], margins[order]))


def what_has_no_accuracy(f):
    """No pair at all, or a margin that is not finite, has no accuracy: `checked`, which is given, raises InputError."""
    for pairs in (([], []), ([1, 0, -1], [float("nan"), 0.5, -1.0])):
        try:
            got = f.accuracy_curve(*pairs)
        except Raised as error:
            got = error
        expect("InputError" in str(got), got)


def one_sort_one_sum(f):
    """Trying each threshold on all pairs is n² work. Sort once; a running sum tells how many are right at each."""
    rng = np.random.default_rng(0)
    labels, margins = rng.integers(-1, 2, 400_000), rng.normal(size=400_000)
    accuracy, _ = f.call("accuracy_with_ties", labels, margins, within=4)
    expect((labels == 0).mean() <= accuracy < 0.4, accuracy)


# -- 9 what a query may see -------------------------------------------------------------------------------------------
def inputs(length, heads=1, key_heads=1, rows=1, dtype=torch.float32):
    """Random query, key and value (rows, heads, length, 4)."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(rows, h, length, 4, generator=generator, dtype=dtype) for h in (heads, key_heads, key_heads)]


def attend(f, q, k, v, spans, **more):
    """(rows, length, heads, 4)"""
    return f.shared_prefix_attention(None, q, k, v, None, spans=spans, **more)[0]


def alone(q, k, v, seen, **more):
    """One CoT in a row of its own, by ordinary causal attention: (1, len(seen), heads, 4)."""
    seen = torch.tensor(seen)
    parts = (x[:1, :, seen] for x in (q, k, v))
    return scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True, **more).transpose(1, 2)


def prefix_is_causal(f):
    """Prefix and first CoT are one causal sequence: a position sees itself and what stands before it."""
    q, k, v = inputs(6)
    near(attend(f, q, k, v, [(4, [(4, 2)])]), alone(q, k, v, range(6)))
    near(attend(f, q, k, v, [(6, [])]), alone(q, k, v, range(6)))  # no CoT yet: stage 2 reads its prefixes so


def cots_do_not_see_each_other(f):
    """CoT b sees CoT a. In a batch of separate rows it could not, so its log-probs and its reward are not its own."""
    q, k, v = inputs(7)
    changed = [x.clone() for x in (k, v)]
    for x in changed:
        x[:, :, 3:5] += 1.0  # the first CoT
    one, two = (attend(f, q, *kv, [(3, [(3, 2), (5, 2)])])[0, 5:] for kv in ((k, v), changed))
    expect(torch.allclose(one, two, atol=1e-6), f"b changes by {(one - two).abs().max():.3g} when a does")


def lower_right_corner(f):
    """The last CoT position sees all keys, the first all but n − 1: align the LOWER RIGHT corners. With fewer queries
    than keys is_causal aligns the upper left ones: the query would see a few prefix tokens and not its own CoT."""
    q, k, v = inputs(7)
    near(attend(f, q, k, v, [(3, [(3, 2), (5, 2)])])[0, 5:], alone(q, k, v, [0, 1, 2, 5, 6])[0, 3:])


def in_the_order_of_positions(f):
    """With CoTs of unequal length the outputs come in another order than their positions; each row has its own prefix;
    padding gives 0."""
    q, k, v = inputs(12, rows=2)
    got = attend(f, q, k, v, [(3, [(3, 2), (5, 4), (9, 2)]), (2, [(2, 1), (3, 2)])])
    for start, n in ((3, 2), (5, 4), (9, 2)):
        near(got[0, start : start + n], alone(q, k, v, [0, 1, 2, *range(start, start + n)])[0, 3:])
    for seen in ([0, 1, 2], [0, 1, 3, 4]):
        near(got[1:, seen], alone(q[1:], k[1:], v[1:], seen))
    expect(not got[0, 11:].any() and not got[1, 5:].any(), got[1, 5])


def heads_in_groups(f):
    """Keys have fewer heads than queries: query heads 0 and 1 share key head 0, 2 and 3 share key head 1."""
    q, k, v = inputs(7, heads=4, key_heads=2)
    near(attend(f, q, k, v, [(3, [(3, 2), (5, 2)])])[0, 5:], alone(q, k, v, [0, 1, 2, 5, 6])[0, 3:])


def scaling_is_used(f):
    """`scaling` multiplies the scores, and `dropout` drops weights, where given, in the prefix and behind it."""
    q, k, v = inputs(7)
    got = attend(f, q, k, v, [(3, [(3, 2), (5, 2)])], scaling=2.0)[0]
    near(got[:5], alone(q, k, v, range(5), scale=2.0)[0])
    near(got[5:], alone(q, k, v, [0, 1, 2, 5, 6], scale=2.0)[0, 3:])
    none, half = (attend(f, q, k, v, [(3, [(3, 2), (5, 2)])], dropout=p)[0] for p in (0.0, 0.5))
    kept = ((none - half).abs() < 1e-6).all(dim=(1, 2))  # a weight becomes 0 or twice itself
    expect(not kept.any(), f"with a dropout of .5 the same as without at {kept.nonzero().flatten().tolist()}")


def gradient_reaches_the_prefix(f):
    """Each CoT's gradient must reach the shared prefix, and its own queries, keys and values, as those of G separate
    rows would. Yours stops somewhere."""
    q, k, v = case = inputs(7)
    slopes = f.gradients("shared_prefix_attention", None, *case, None, of=(1, 2, 3), spans=[(3, [(3, 2), (5, 2)])])
    q, k, v = leaves = [x.clone().requires_grad_() for x in case]
    total = alone(q, k, v, range(5)).sum() + alone(q, k, v, [0, 1, 2, 5, 6])[:, 3:].sum()
    for slope, expected in zip(slopes, torch.autograd.grad(total, leaves)):
        near(slope if slope is not None else torch.zeros_like(expected), expected)


def without_spans(f):
    """Without spans (sampling, calls from elsewhere) it is ordinary causal attention over the whole row; a single query
    is the newest token, and sees all keys. Where a mask or a scaling is given, it counts."""
    q, k, v = inputs(5)
    near(f.shared_prefix_attention(None, q, k, v, None)[0], alone(q, k, v, range(5)))
    near(f.shared_prefix_attention(None, q[:, :, 4:], k, v, None)[0], alone(q, k, v, range(5))[:, 4:])
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., 0] = False  # key 0 is padding: who may not see it is alone with the rest
    for first in (1, 4):  # four queries, and the newest alone
        got = f.shared_prefix_attention(None, q[:, :, first:], k, v, mask[:, :, first:], scaling=2.0)[0]
        near(got, alone(q, k, v, range(1, 5), scale=2.0)[:, first - 1 :])


def behind_a_prefix(f):
    """prefix_once.py calls `attend_behind`, too: {start: output} of each CoT, which sees the prefix and itself."""
    q, k, v = inputs(12)
    options = {"scale": None, "dropout_p": 0.0, "enable_gqa": True}
    got = f.attend_behind((k[0, :, :3], v[0, :, :3]), [(3, 2), (5, 4), (9, 2)], q, k, v, options)
    expect(sorted(got) == [3, 5, 9], sorted(got))
    for start, n in ((3, 2), (5, 4), (9, 2)):
        near(got[start].transpose(1, 2), alone(q, k, v, [0, 1, 2, *range(start, start + n)])[:, 3:])


# -- 10 tests that catch mistakes -------------------------------------------------------------------------------------
TESTED = {"test_group_advantages": "losses.py::group_advantages",
          "test_accuracy_with_ties": "metrics.py::accuracy_with_ties"}


def verdicts(f) -> dict:
    """{implementation: is it accepted}, for right code, the same written otherwise, and mistakes.

    The order is drawn anew, three times: a test that counts its calls would have to guess it. In a student's copy,
    which has no mistakes, only the student's own function is tried, by the first lesson: see ON_OTHERS.
    `f.why` tells why right code is refused, and `f.unwritten` holds the tests that are as they were handed out.
    """
    if "found" in vars(f):
        return f.found
    f.why, f.unwritten = {}, set()
    if f.implementations is None:
        f.found = {(test, "right"): accepted(f, test, "right", own=place) for test, place in TESTED.items()}
        return f.found
    jobs = [(test, *pair) for test, place in TESTED.items() for pair in f.implementations(place).items()] * 3
    random.SystemRandom().shuffle(jobs)
    rounds = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mistakes
        for test, name, function in jobs:
            rounds.setdefault((test, name), set()).add(accepted(f, test, name, function))
    f.found = {key: seen.pop() if len(seen) == 1 else None for key, seen in rounds.items()}
    return f.found


def accepted(f, test, name, function=None, **own) -> bool:
    """Does the test accept this implementation? One that is not written does, if the other one is: that has points."""
    try:
        accepts, why = f.judges(test, function, **own)
    except Raised as error:
        if not str(error).startswith("Exercise 10 "):
            raise
        f.unwritten.add(test)
        if len(f.unwritten) == len(TESTED):
            raise
        return True
    if not accepts:
        f.why[test, name] = f"a failure of {test}: {why}"
    return accepts


def right_code_is_accepted(f):
    """Your test fails on right code, so its failing says nothing. If an assert fails, check the numbers that you worked
    out by hand; if something else does, mend the test."""
    for test in TESTED:
        expect(verdicts(f)[test, "right"] is True, f.why.get((test, "right")))


def another_way_to_write_it(f):
    """Your test fails on right code that is written otherwise: compare floats with a tolerance, test no internals."""
    for test in TESTED:
        expect(verdicts(f)[test, "rewritten"] is True, f.why.get((test, "rewritten")))


def _catches(test, mistake, what):
    def lesson(f):
        caught = verdicts(f)[test, mistake] is False
        expect(caught, f"{test}, which is not written yet" if test in f.unwritten else f"{test} passes")

    lesson.__name__ = f"catches_{mistake}"
    lesson.__doc__ = f"Your test does not notice this mistake: {what}."
    return lesson


CATCHES = (
    _catches("test_group_advantages", "population_std", "the std divides by G, not by G − 1"),
    _catches("test_group_advantages", "whole_batch", "mean and std are taken over the whole batch"),
    _catches("test_group_advantages", "nan_at_one", "a group of one gets nan"),
    _catches("test_group_advantages", "flat_group", "eight rewards of .86 get an advantage that is not 0"),
    _catches("test_accuracy_with_ties", "cut_inside_a_run", "a threshold cuts between pairs of equal |margin|"),
    _catches("test_accuracy_with_ties", "nothing_tied_missing", "the threshold \"nothing is tied\" is not tried"),
)
ON_OTHERS = (another_way_to_write_it, *CATCHES)  # lessons that need code which a student's copy does not have
