"""Each equation: a number worked by hand, a limit, an asymmetric case, a naive loop as twin, inputs unchanged."""

import math

import pytest
import torch

import losses

torch.manual_seed(0)


def naive_bt(chosen, rejected):
    return sum(math.log(1 + math.exp(-(w - l))) for w, l in zip(chosen, rejected)) / len(chosen)


def test_bt_loss_eq3():
    # one pair, r_w = 2, r_l = 0: -ln sigma(2) = ln(1 + e^-2) = ln 1.135335 = 0.126928
    assert losses.bt_loss(torch.tensor([2.0]), torch.tensor([0.0])).item() == pytest.approx(0.126928, abs=1e-6)
    # the flipped pair costs exactly 2 more: -ln sigma(-2) = 2 + 0.126928; a flipped sign would swap the two
    assert losses.bt_loss(torch.tensor([0.0]), torch.tensor([2.0])).item() == pytest.approx(2.126928, abs=1e-6)
    assert losses.bt_loss(torch.zeros(4), torch.zeros(4)).item() == pytest.approx(math.log(2))  # at initialisation
    chosen, rejected = torch.randn(7), torch.randn(7)
    before = chosen.clone()
    assert losses.bt_loss(chosen, rejected).item() == pytest.approx(
        naive_bt(chosen.tolist(), rejected.tolist()), rel=1e-5
    )
    assert torch.equal(chosen, before)


def test_bt_loss_eq10_pairs_rollout_i_with_rollout_i():
    # rollouts (r_w, r_l) = (1, 0) and (0, 3): (ln(1 + e^-1) + ln(1 + e^3)) / 2 = (0.313262 + 3.048587) / 2 = 1.680925
    chosen, rejected = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert losses.bt_loss(chosen, rejected).item() == pytest.approx(1.680925, abs=1e-5)


def test_bt_gradient_is_sigma_of_minus_margin():
    chosen, rejected = torch.tensor([1.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    losses.bt_loss(chosen, rejected).backward()
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.e))  # -sigma(r_l - r_w): up with the winner
    assert rejected.grad.item() == pytest.approx(1 / (1 + math.e))


def test_bt_survives_extreme_and_bf16_rewards():
    huge = losses.bt_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert huge.item() == pytest.approx(1000.0)
    a, b = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.bfloat16)
    assert losses.bt_loss(a, b).dtype == torch.float32


def test_denominator_makes_micro_batches_sum_to_the_batch():
    chosen, rejected = torch.randn(6), torch.randn(6)
    pieces = [losses.bt_loss(chosen[i:j], rejected[i:j], denominator=6) for i, j in ((0, 1), (1, 6))]  # unequal pieces
    assert sum(pieces).item() == pytest.approx(losses.bt_loss(chosen, rejected).item(), rel=1e-6)


def test_btt_probabilities_sum_to_one_and_ties():
    a, b = torch.tensor([1.3]), torch.tensor([0.2])
    total = sum(math.exp(-losses.btt_loss(a, b, torch.tensor([label])).item()) for label in (1, 0, -1))
    assert total == pytest.approx(1.0, abs=1e-6)
    tie = losses.btt_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert tie.item() == pytest.approx(-math.log(4 / 6), abs=1e-6)  # P(tie) = (k-1)/(k+1) = 4/6 at k = 5
    # A better, margin 1.1: P = 1 / (1 + 5 e^-1.1) = 1 / (1 + 1.664355) = 0.375325, -ln = 0.979964
    assert losses.btt_loss(a, b, torch.tensor([1])).item() == pytest.approx(0.979964, abs=1e-5)
    near_bt = losses.btt_loss(a, b, torch.tensor([-1]), k=1 + 1e-6)
    assert near_bt.item() == pytest.approx(losses.bt_loss(b, a).item(), abs=1e-5)  # k -> 1 is plain BT
    with pytest.raises(AssertionError):
        losses.btt_loss(a, b, torch.tensor([1]), k=1.0)


def test_cot_mask_share_seed_and_limits():
    draw = lambda p, seed: losses.draw_cot_mask(4000, p, torch.Generator().manual_seed(seed))
    assert draw(0.5, 1).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert draw(0.2, 1).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert not draw(0.0, 1).any() and draw(1.0, 1).all()
    assert torch.equal(draw(0.5, 1), draw(0.5, 1)) and not torch.equal(draw(0.5, 1), draw(0.5, 2))
    assert draw(0.5, 1).shape == (4000,)  # one draw per PAIR


def test_group_advantages():
    # (0, 1): mean .5, Bessel std sqrt(.5) = .707107 -> -+ .707106 ; without Bessel it would be -+ 1
    rewards = torch.tensor([[0.0, 1.0], [0.3, 0.3]])
    advantages = losses.group_advantages(rewards)
    assert advantages[0].tolist() == pytest.approx([-0.707106, 0.707106], abs=1e-5)
    assert advantages[1].tolist() == [0.0, 0.0]  # no spread: no signal, not NaN
    assert losses.group_advantages(torch.tensor([[0.7]])).tolist() == [[0.0]]
    # rows are groups: scaling one video's rewards must not touch the other's advantages
    assert torch.equal(losses.group_advantages(rewards * torch.tensor([[1.0], [9.0]]))[0], advantages[0])
    big = losses.group_advantages(torch.rand(3, 8))
    assert big.mean(dim=1).abs().max() < 1e-5 and (big.std(dim=1) - 1).abs().max() < 1e-3
    with pytest.raises(AssertionError):
        losses.group_advantages(torch.rand(8))


def test_a_group_of_equal_rewards_has_advantage_exactly_zero():
    """A group whose CoTs are all as good says nothing. A rounded mean must not make it say something.

    All rewards that the rules can give: R = .7 right/annotated + .1 format + .2 length, in groups of G equal ones.
    """
    quality = sorted({right / annotated for annotated in range(1, 6) for right in range(annotated + 1)})
    levels = [0.7 * q + 0.1 * f + 0.2 * tokens / 1500 for q in quality for f in (0, 1) for tokens in range(0, 1501, 5)]
    for group in (1, 2, 3, 5, 8, 16):
        advantages = losses.group_advantages(torch.tensor([[level] * group for level in levels]))
        assert not advantages.any(), f"G = {group}: |A| up to {advantages.abs().max():.3f}"
    # the limit: one CoT that is better by the last bit of fp32 still counts, and the flat neighbour's row stays 0
    last_bit = torch.tensor([[0.86] * 8, [0.86] * 7 + [0.86 + 6e-8]])
    assert losses.group_advantages(last_bit)[0].tolist() == [0.0] * 8
    assert losses.group_advantages(last_bit)[1].any()


def naive_grpo(log_probs, old, advantages, mask, low, high, dual):
    total, count = 0.0, 0
    for n in range(len(log_probs)):
        for t in range(len(log_probs[n])):
            if mask[n][t]:
                ratio, a = math.exp(log_probs[n][t] - old[n][t]), advantages[n]
                clipped = min(max(ratio, 1 - low), 1 + high)
                loss = max(-a * ratio, -a * clipped)
                if a < 0:
                    loss = min(loss, -a * dual)
                total, count = total + loss, count + 1
    return total / count


def test_grpo_loss_eq7_by_hand():
    # A = +1, ratio e^.5 = 1.6487: clipped at 1.3, loss -1.3.  A = -1, ratio e^.5: not clipped, loss +1.6487.
    # A = -1, ratio e^2 = 7.389: dual clip, loss +3.  A = +1, ratio e^-1 = .3679: max(-.3679, -.8) = -.3679.
    old = torch.zeros(4, 1)
    log_probs = torch.tensor([[0.5], [0.5], [2.0], [-1.0]])
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    mask = torch.ones(4, 1)
    expected = (-1.3 + 1.648721 + 3.0 - 0.367879) / 4
    assert losses.grpo_loss(log_probs, old, advantages, mask).item() == pytest.approx(expected, abs=1e-5)
    assert losses.clipped_tokens(log_probs, old, advantages, mask).item() == 2  # the first's and the third's gradient


def test_the_tokens_that_count_as_clipped_are_those_without_a_gradient():
    ratio = torch.arange(0.05, 6, 0.1)  # on no bound
    for low, high, dual in ((0.2, 0.3, 3.0), (0.5, 4.0, 2.0)):  # the dual clip outside the other, and inside
        for sign in (1.0, -1.0):
            log_probs, old = ratio.log()[None].requires_grad_(), torch.zeros(1, len(ratio))
            args = log_probs, old, torch.tensor([sign]), torch.ones_like(old), low, high, dual
            losses.grpo_loss(*args).backward()
            assert losses.clipped_tokens(*args).item() == (log_probs.grad == 0).sum() > 0


def test_grpo_loss_equals_the_naive_loop():
    log_probs, old = torch.randn(5, 6), torch.randn(5, 6)
    advantages, mask = torch.randn(5), (torch.rand(5, 6) < 0.7).float()
    args = log_probs.tolist(), old.tolist(), advantages.tolist(), mask.tolist()
    ours = losses.grpo_loss(log_probs, old, advantages, mask, 0.2, 0.3, 3.0)
    assert ours.item() == pytest.approx(naive_grpo(*args, 0.2, 0.3, 3.0), rel=1e-5)


def test_grpo_loss_on_policy_is_zero_but_its_gradient_is_not():
    log_probs = torch.randn(2, 3, requires_grad=True)
    advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 3)
    loss = losses.grpo_loss(log_probs, log_probs.detach(), advantages, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    # d loss / d log pi = -A / tokens: descent raises the good CoT's tokens and lowers the bad one's
    assert torch.allclose(log_probs.grad, torch.tensor([[-1 / 6] * 3, [1 / 6] * 3]))


def test_grpo_loss_ignores_padding_and_splits_by_denominator():
    log_probs, old, advantages = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([0.5, -2.0])
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    whole = losses.grpo_loss(log_probs, old, advantages, mask)
    poisoned = torch.where(mask.bool(), log_probs, torch.full_like(log_probs, 50.0))
    assert losses.grpo_loss(poisoned, old, advantages, mask).item() == pytest.approx(whole.item())
    pieces = [
        losses.grpo_loss(*(x[n : n + 1] for x in (log_probs, old, advantages, mask)), denominator=4) for n in (0, 1)
    ]
    assert sum(pieces).item() == pytest.approx(whole.item(), rel=1e-6)


def test_kl_to_reference_k3():
    # π = .5, π_ref = .25: ratio π_ref/π = .5: .5 - 1 - ln .5 = .193147.
    # The ratio the other way up would give 2 - 1 - ln 2 = .306853.
    value = losses.kl_to_reference(torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]]))
    assert value.item() == pytest.approx(0.193147, abs=1e-6)
    x = torch.randn(3, 4)
    assert torch.equal(losses.kl_to_reference(x, x), torch.zeros(3, 4))
    assert (losses.kl_to_reference(torch.randn(9, 9), torch.randn(9, 9)) >= 0).all()


def test_kl_estimator_has_the_right_mean():
    # exact: E_pi[k3] = sum pi (ref/pi - 1 - log(ref/pi)) = KL(pi || ref), because sum ref = sum pi = 1
    pi, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    expected = (pi * (pi / ref).log()).sum()
    estimate = (pi * losses.kl_to_reference(pi.log()[None], ref.log()[None])[0]).sum()
    assert estimate.item() == pytest.approx(expected.item(), rel=1e-5)


def test_old_and_reference_log_probs_are_constants():
    """π_old and π_ref are where we came from: they get no gradient, even where they hang on the same graph.

    Given log π itself as old log-probs, ρ = π/π_old is 1 everywhere; were π_old not detached, its slope would cancel
    that of π, and nothing would ever be learned. For the KL, moving π_ref to π would be as good as moving π back.
    """
    log_probs, mask = torch.randn(2, 3, requires_grad=True), torch.ones(2, 3)
    losses.grpo_loss(log_probs, log_probs, torch.tensor([1.0, -1.0]), mask).backward()
    assert torch.allclose(log_probs.grad, torch.tensor([[-1 / 6] * 3, [1 / 6] * 3]))  # -A / tokens, as on-policy
    policy, reference = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    losses.kl_to_reference(policy, reference).sum().backward()
    assert reference.grad is None
    # d/dlogπ (π_ref/π - 1 - log π_ref/π) = 1 - π_ref/π: up in π where π is above π_ref, so descent brings it down
    expected = 1 - (reference.detach() - policy.detach()).exp()
    assert torch.allclose(policy.grad, expected, atol=1e-6)


def test_token_log_probs():
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])  # softmax: (1/4, 3/4), (1/2, 1/2)
    value = losses.token_log_probs(logits, torch.tensor([1, 0]))
    assert value.tolist() == pytest.approx([math.log(0.75), math.log(0.5)], abs=1e-6)
