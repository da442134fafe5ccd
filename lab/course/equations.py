"""Lessons 1 to 6, the equations of losses.py: what each check teaches. A lesson is a function of `f`, the submission.

Its docstring is what the student reads when it fails: the mistake, the rule. Its numbers are worked by hand. The order
matters: a lesson may count on those before it, so the first that fails is the one that names the mistake.
`f.c` are the course's constants (a variant has others); where a lesson gives none, the function's defaults are tried.
"""

import math

import torch
from torch import tensor

from lab.course.checks import expect, near


# -- 1 Bradley-Terry --------------------------------------------------------------------------------------------------
def winner_first(f):
    """Eq. 3 has σ(r_w − r_l), the winner first: a pair in the right order costs less than one in the wrong order."""
    right, wrong = (f.bt_loss(tensor([a]), tensor([2 - a])) for a in (2.0, 0.0))
    expect(right < wrong, (right, wrong))


def minus_log_probability(f):
    """The loss is −log σ(margin), not a probability: ln 2 = 0.6931 at equal rewards."""
    near(f.bt_loss(torch.zeros(4), torch.zeros(4)), math.log(2))
    near(f.bt_loss(tensor([2.0]), tensor([0.0])), 0.126928)  # ln(1 + e^-2)


def mean_over_all_elements(f):
    """Eq. 10 compares rollout i with rollout i, (B, G), and averages over all B·G of them."""
    # margins 1 and -3: (ln(1 + e^-1) + ln(1 + e^3)) / 2 = (.313262 + 3.048587) / 2
    near(f.bt_loss(tensor([[1.0, 0.0]]), tensor([[0.0, 3.0]])), 1.680925)


def denominator_of_the_whole_batch(f):
    """You averaged within the micro-batch. Where `denominator` is given, divide the sum over all elements by it: pieces
    then add up."""
    won, lost = tensor([1.0, 2, 0, 1, 0, 3]), tensor([0.0, 1, 2, 1, 3, 0])
    pieces = [f.bt_loss(won[i:j], lost[i:j], denominator=6) for i, j in ((0, 1), (1, 6))]
    near(sum(pieces), f.bt_loss(won, lost))
    # (B, G): margins 1 and -3, 0 and 0: (.313262 + 3.048587 + 2 * .693147) / 8
    near(f.bt_loss(tensor([[1.0, 0.0], [0, 0]]), tensor([[0.0, 3.0], [0, 0]]), denominator=8), 0.593518)


def log_sigma_in_one(f):
    """σ(−1000) is 0 in floating point, and its log −inf. Take the function that computes log σ in one step."""
    near(f.bt_loss(tensor([-500.0]), tensor([500.0])), 1000.0)


def in_fp32(f):
    """Compute in fp32, whatever comes in, and return fp32: in bf16 a reward of 5.4 has steps of .03."""
    loss = f.bt_loss(tensor([5.4], dtype=torch.bfloat16), tensor([0.3], dtype=torch.bfloat16))
    expect(loss.dtype == torch.float32, str(loss.dtype))
    near(loss, 0.006045187)  # bf16 has 5.40625 and .30078125, but no 5.10546875: ln(1 + e^-5.10546875)


def trains_both_rewards(f):
    """The gradient is what trains: it lifts the winner's reward and lowers the loser's by as much, 1 − σ(margin)."""
    slopes = f.gradients("bt_loss", tensor([2.0]), tensor([0.0]), of=(0, 1))
    near(slopes, [[-0.119203], [0.119203]])


# -- 2 Bradley-Terry with ties ----------------------------------------------------------------------------------------
def a_win_needs_a_margin(f):
    """P(A > B) = σ(r_A − r_B − ln k): ln k makes a win harder, for both sides."""
    one, other = tensor([1.3]), tensor([0.2])  # 1 / (1 + 5 e^-1.1) = .375325, -ln = .979964
    near(f.btt_loss(one, other, tensor([1]), k=5.0), 0.979964)
    near(f.btt_loss(other, one, tensor([-1]), k=5.0), 0.979964)
    near(f.btt_loss(one, other, tensor([1]), k=3.0), 0.692454)  # 1 / (1 + 3 e^-1.1) = .500347


def a_tie_is_an_outcome(f):
    """Label 0 is an outcome of its own, neither A's win nor B's: it has a probability of its own."""
    tie, loss = (f.btt_loss(torch.zeros(1), torch.zeros(1), tensor([label]), k=5.0) for label in (0, -1))
    expect(abs(tie - loss) > 1e-6, (tie, loss))


def probabilities_sum_to_one(f):
    """P(A > B) + P(tie) + P(B > A) is not 1. The tie has the factor k² − 1."""
    a, b = tensor([1.3]), tensor([0.2])
    for k in (5.0, 3.0):
        near(sum((-f.btt_loss(a, b, tensor([label]), k=k)).exp() for label in (1, 0, -1)), 1.0)


def ties_far_apart(f):
    """One minus the two other probabilities is 0 in floating point when rewards differ by 50, and its log −inf. Stay in
    logs."""
    for a, b, label in ((50.0, 0.0, -1), (0.0, 50.0, 1)):  # -ln σ(-50 - ln 5) = ln(1 + 5 e^50) = 50 + ln 5
        near(f.btt_loss(tensor([a]), tensor([b]), tensor([label]), k=5.0), 50 + math.log(5))
    near(f.btt_loss(tensor([50.0]), tensor([0.0]), tensor([0]), k=5.0), 50 + math.log(5) - math.log(24))


def mean_over_pairs(f):
    """Each pair by its own label, and the mean over all of them: one A better, one B better, one tie."""
    case = tensor([1.3, 0.2, 1.0]), tensor([0.2, 1.3, 0.0]), tensor([1, -1, 0])
    near(f.btt_loss(*case, k=5.0), 0.835298)  # (.979962 + .979962 - ln(24 * .352188 * .068534)) / 3
    # A better: (.375325 - 1) / 3, and B the other way. The tie at margin 1: (.931466 - .647812) / 3, towards margin 0.
    slopes = [-0.208225, 0.208225, 0.094551]
    near(f.gradients("btt_loss", *case, k=5.0, of=(0, 1)), [slopes, [-slope for slope in slopes]])


def ties_in_fp32(f):
    """Compute in fp32, whatever comes in: in bf16 a reward of 5.4 has steps of .03, and ties are small margins."""
    case = (tensor([value], dtype=torch.bfloat16) for value in (5.4, 0.3))
    near(f.btt_loss(*case, tensor([1]), k=5.0), 0.029867)  # the margin is 5.10546875: ln(1 + 5 e^-5.10546875)


def ties_denominator(f):
    """You averaged within the micro-batch. Where `denominator` is given, divide the sum by it."""
    near(f.btt_loss(torch.zeros(2), torch.zeros(2), tensor([0, 0]), k=5.0, denominator=8), 0.405465 / 4)


def default_k(f):
    """The default of k is not that of your copy. A variant has its own constants: they stand in the signature."""
    case = tensor([1.0, 0.0, 2.0]), tensor([0.0, 0.5, 0.0]), tensor([1, 0, -1])
    near(f.btt_loss(*case), f.btt_loss(*case, k=f.c.k))


# -- 3 random CoT masking ---------------------------------------------------------------------------------------------
def one_coin_for_each_pair(f):
    """One draw per pair, shared by its two videos: (num_pairs,) bool. A draw per video would compare a video with its
    CoT to one without, and teach the head about masking."""
    mask = f.draw_cot_mask(10, 0.5, torch.Generator().manual_seed(0))
    expect(mask.shape == (10,) and mask.dtype == torch.bool, (tuple(mask.shape), str(mask.dtype)))


def true_means_masked(f):
    """p is the share of pairs that LOSE their CoT, and True means masked."""
    share = f.draw_cot_mask(4000, 0.2, torch.Generator().manual_seed(1)).float().mean().item()
    expect(0.16 < share < 0.24, f"{share:.3f} for a p of .2{': you have 1 − p' if 0.76 < share < 0.84 else ''}")


def the_given_generator(f):
    """Draw from the generator you are given. The global one stands elsewhere after a resume: other pairs are masked."""
    one, two = (f.draw_cot_mask(200, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    expect(torch.equal(one, two), f"{(one != two).sum()} of 200 pairs masked otherwise from the same seed")
    other = f.draw_cot_mask(200, 0.5, torch.Generator().manual_seed(4))
    expect(not torch.equal(one, other), "the same mask from another seed")


def independent_coins(f):
    """m_n ~ Bernoulli(p), each by itself: the number of masked pairs varies from epoch to epoch. Yours is fixed."""
    counts = {int(f.draw_cot_mask(50, 0.5, torch.Generator().manual_seed(seed)).sum()) for seed in range(12)}
    expect(len(counts) > 2, f"always {counts} of 50")


# -- 4 group advantages -----------------------------------------------------------------------------------------------
def rows_are_groups(f):
    """Mean and std are those of a group, a row: the G CoTs of ONE video. You took them over other rows, too."""
    one, two = (f.group_advantages(tensor([[0.0, 1.0, 2.0], [0.0, scale, 3.0]]))[0] for scale in (1.0, 90.0))
    near(one, two)


def bessel(f):
    """A = (R − mean) / std, and the std divides by G − 1 (Bessel): (0, 1) gives ∓.7071. Divided by G it gives ∓1."""
    near(f.group_advantages(tensor([[0.0, 1.0]]), epsilon=1e-6), [[-0.707106, 0.707106]])
    # Three tell a mean from a median, G − 1 from 1: mean 2/3, variance (4/9 + 1/9 + 1/9) / 2 = 1/3, std .577350.
    near(f.group_advantages(tensor([[0.0, 1.0, 1.0]]), epsilon=1e-6), [[-1.154699, 0.577349, 0.577349]])


def a_group_of_one(f):
    """G = 1 has no spread: its std is nan. One CoT says nothing about itself, so its advantage is 0."""
    near(f.group_advantages(tensor([[0.7], [0.2]])), [[0.0], [0.0]])


def equal_rewards_say_nothing(f):
    """Eight times .86 has the fp32 mean .8600001, so R − mean is not 0, and ε makes it −.06: a push against every
    token. Find equal rewards by comparing them, not by subtracting the mean."""
    got = f.group_advantages(tensor([[0.86] * 8, [0.1 * n for n in range(8)]]), epsilon=1e-6)
    expect(not got[0].any() and got[1].any(), got[0])


def epsilon_in_the_denominator(f):
    """ε is added to the std, and its default stands in your copy's signature."""
    near(f.group_advantages(tensor([[0.0, 2.0]]), epsilon=1.0), [[-1 / 2.414214, 1 / 2.414214]])
    case = tensor([[0.0, 0.004]])
    near(f.group_advantages(case), f.group_advantages(case, epsilon=f.c.epsilon))


# -- 5 KL to the reference --------------------------------------------------------------------------------------------
POLICY, REFERENCE = tensor([[0.7, 0.2, 0.1]]).log(), tensor([[0.2, 0.3, 0.5]]).log()


def never_negative(f):
    """k3 is never negative. log π − log π_ref (k1) has the right mean, but single tokens are negative."""
    got = f.kl_to_reference(POLICY, REFERENCE)
    expect(got.shape == (1, 3) and (got >= 0).all(), got)


def reference_over_policy(f):
    """The ratio is π_ref/π: tokens are sampled from π, so the ratio's mean is 1. The other way up estimates nothing."""
    near(f.kl_to_reference(tensor([[0.5]]).log(), tensor([[0.25]]).log()), [[0.193147]])  # .5 - 1 - ln .5
    exact = (POLICY.exp() * (POLICY - REFERENCE)).sum()  # the KL itself; k3's mean under π must be that
    near((POLICY.exp() * f.kl_to_reference(POLICY, REFERENCE)).sum(), exact)


def reference_is_a_constant(f):
    """π_ref is where we came from: detach it. Else moving the reference to the policy lowers the loss as well."""
    policy, reference = f.gradients("kl_to_reference", POLICY, REFERENCE, of=(0, 1))
    expect(reference is None, reference)
    near(policy, 1 - (REFERENCE - POLICY).exp())


def kl_stays_finite(f):
    """e^1000 is inf in fp32, and one such token makes a whole batch nan. Bound the exponent, as `policy_ratio` does:
    before the exp, so that the gradient is finite, too, and far outside of what tokens have."""
    far = tensor([[-1000.0]]), tensor([[0.0]])
    got = torch.cat([f.kl_to_reference(*far), f.gradients("kl_to_reference", *far)[0]])
    expect(got.isfinite().all(), got)
    near(f.kl_to_reference(tensor([[-3.0]]), tensor([[0.0]])), [[16.085537]])  # e^3 - 1 - 3


# -- 6 the clipped loss -----------------------------------------------------------------------------------------------
CLIPS = {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0}
# Three tokens with A = 1, one with A = -2, two of padding; ρ is 1.
FOUR_TOKENS = torch.zeros(2, 3), torch.zeros(2, 3), tensor([1.0, -2.0]), tensor([[1.0, 1, 1], [1, 0, 0]])


def one_token(f, advantage, log_ratio, **more):
    """The loss of a batch of one token: its ρ is e^log_ratio."""
    case = tensor([[log_ratio]]), tensor([[0.0]]), tensor([advantage]), torch.ones(1, 1)
    return f.grpo_loss(*case, **{**CLIPS, **more})


def good_tokens_become_likelier(f):
    """Descent must raise the log-probs of a CoT with A > 0 and lower those with A < 0: the gradient is −A/tokens. The
    dual clip is for A < 0 only."""
    case = torch.full((2, 3), -1.0), torch.full((2, 3), -1.0), tensor([1.0, -1.0]), torch.ones(2, 3)
    near(f.gradients("grpo_loss", *case, **CLIPS)[0], [[-1 / 6] * 3, [1 / 6] * 3])


def the_larger_loss(f):
    """Of the two losses take the LARGER: the clip may only take a gain away, never a loss. Did you take the smaller, or
    swap the clips?"""
    near(one_token(f, -1.0, -1.0), 0.8)  # A = -1, ρ = .3679: max(.3679, .8)
    near(one_token(f, 1.0, -1.0), -0.367879)  # A = 1, ρ = .3679: max(-.3679, -.8)


def two_clips(f):
    """The ratio is clipped to [1 − clip_low, 1 + clip_high]: the two sides differ."""
    near(one_token(f, 1.0, 0.5), -1.3)  # A = 1, ρ = 1.6487, cut at 1.3
    near(one_token(f, -1.0, 0.5), 1.648721)  # A = -1: not cut
    near(one_token(f, 1.0, 0.5, clip_high=0.1), -1.1)
    near(one_token(f, -1.0, -1.0, clip_low=0.5), 0.5)


def dual_clip(f):
    """Dual clip: where A < 0 the loss is at most −A·clip_dual. Else one bad token at ρ = 50 outweighs the batch."""
    near(one_token(f, -1.0, 2.0), 3.0)  # ρ = 7.389
    near(one_token(f, -2.0, 2.0), 6.0)
    near(one_token(f, -1.0, 2.0, clip_dual=2.0), 2.0)


def padding_counts_for_nothing(f):
    """Padding has mask 0: it belongs neither into the sum nor into the number of tokens, whatever stands there."""
    mask = tensor([[1.0, 1, 0, 0]])
    case = tensor([[0.1, -0.1, 1000.0, -5.0]]), torch.zeros(1, 4), tensor([1.0]), mask
    near(f.grpo_loss(*case, **CLIPS), -1.005004)  # ρ = 1.105171 and .904837
    # e^1000 is inf, and 0 * inf nan: `policy_ratio` is 1 at padding, with the gradient 0.
    near(f.gradients("grpo_loss", *case, **CLIPS)[0], [[-0.552585, -0.452419, 0, 0]])


def mean_over_all_tokens(f):
    """You averaged within each CoT first. Eq. 7 averages over all tokens: a long CoT weighs more than a short one."""
    near(f.grpo_loss(*FOUR_TOKENS, **CLIPS), (-3 + 2) / 4)


def grpo_denominator(f):
    """Where `denominator` is given, divide the sum over the tokens by it, and by nothing else: Eq. 7 averages over the
    whole batch, not within a micro-batch."""
    near(one_token(f, -1.0, 0.0, denominator=8), 1 / 8)
    near(f.grpo_loss(*FOUR_TOKENS, denominator=8, **CLIPS), (-3 + 2) / 8)


def default_clips(f):
    """The defaults of the clips are not those of your copy. A variant has its own constants, in the signature."""
    case = tensor([[2.0], [0.9], [-2.0]]), torch.zeros(3, 1), tensor([-1.0, 1.0, -2.0]), torch.ones(3, 1)
    told = {name: getattr(f.c, name) for name in CLIPS}
    near(f.grpo_loss(*case), f.grpo_loss(*case, **told))
