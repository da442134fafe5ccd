"""One test per equation of lab/post_training/flow.py: a number worked by hand, torch.distributions, a closed form."""

import itertools
import math

import pytest
import torch

import losses
from lab.post_training import flow

# The worked example of the docstrings: x = 1, v = 2, t = .5, t_next = .4, a = .7
X, V, T, NEXT = torch.tensor([[1.0]]), torch.tensor([[2.0]]), 0.5, 0.4


def a_step(seed=0, n=3, shape=(4, 2, 5)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) for _ in range(3)]


def test_noise_scale():
    assert flow.noise_scale(0.5, 0.4) == pytest.approx(0.7)
    assert flow.noise_scale(0.9, 0.8) == pytest.approx(2.1)  # .7 * sqrt(9)
    assert flow.noise_scale(1.0, 0.9) == pytest.approx(0.7 * math.sqrt(1 / 0.1))  # 1 - t_next in the denominator
    assert flow.noise_scale(0.9, 0.8, a=1.0, cap=0.45) * math.sqrt(0.1) == pytest.approx(0.45)  # uncapped .949
    assert flow.noise_scale(0.1, 0.0, a=1.0, cap=0.45) == pytest.approx(1 / 3)  # .105 of noise: the cap does nothing
    with pytest.raises(AssertionError):
        flow.noise_scale(0.4, 0.5)  # t runs down


def test_without_noise_a_step_is_euler_to_the_last_bit():
    x, v, _ = a_step()
    for t, t_next in ((1.0, 0.97), (0.5, 0.4), (0.1, 0.0)):
        assert flow.noise_scale(t, t_next, a=0.0) == 0.0
        assert torch.equal(flow.sde_mean(x, v, t, t_next, 0.0), x + (t_next - t) * v)


def test_sde_mean_by_hand():
    # .49 / (2 * .5) * (1 + .5 * 2) = .98; 1 - .1 * (2 + .98) = .702
    assert flow.sde_mean(X, V, T, NEXT, 0.7).item() == pytest.approx(0.702, abs=1e-6)
    assert flow.sde_mean(X, V, T, NEXT, 0.0).item() == pytest.approx(0.8, abs=1e-6)


def gaussian_path(mean, std, times, a, cap=None, sign=1.0, noisy=None):
    """Mean and std of x after each step, exactly, for data N(mean, std²), where v* has a closed form.

    E[x₀ given x] and E[ε given x] are linear in x, so a step is x' = A x + B + σ√Δ z: no sampling is needed.
    sign -1 turns the drift's correction. noisy: which are SDE steps; None: all.
    """
    at, var, path = 0.0, 1.0, []  # x at t = 1 is noise
    for k, (t, t_next) in enumerate(itertools.pairwise(times)):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        away = x - (1 - t) * mean
        total = (1 - t) ** 2 * std**2 + t**2  # the variance of x_t
        v = t / total * away - (mean + (1 - t) * std**2 / total * away)  # E[ε] - E[x₀]
        sigma = flow.noise_scale(t, t_next, a, cap) if noisy is None or k in noisy else 0.0
        # sde_mean is fp32; its linear map, read off at x = 0 and x = 1
        euler = flow.sde_mean(x, v, t, t_next, 0.0).double()
        zero, one = (euler + sign * (flow.sde_mean(x, v, t, t_next, sigma).double() - euler)).squeeze(1).tolist()
        at, var = zero + (one - zero) * at, (one - zero) ** 2 * var + sigma**2 * (t - t_next)
        path.append((at, math.sqrt(var)))
    return path


@pytest.mark.parametrize("a, cap", [(0.7, None), (1.0, 0.45), (0.3, None)])
def test_the_sde_ends_with_the_mean_and_spread_of_the_ode(a, cap):
    """Data N(2, .5²). The noise that steps add is taken back by their drift; a wrong sign is not near it."""
    times = flow.grid(1000)
    ode, sde = gaussian_path(2.0, 0.5, times, 0.0), gaussian_path(2.0, 0.5, times, a, cap)
    assert ode[-1] == pytest.approx((2.0, 0.5), abs=5e-3)
    assert sde[-1] == pytest.approx(ode[-1], abs=5e-3)
    assert gaussian_path(2.0, 0.5, times, a, cap, sign=-1.0)[-1][1] > 0.7
    # On the way it is not: the substitution at t = 1 gives the first step a variance of its own, however many steps.
    if cap is None:
        assert sde[0][1] ** 2 == pytest.approx(1 + a**4 / 4, abs=0.01)


def test_times_are_an_even_grid_that_is_shifted_once():
    assert flow.grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    # 3 * .5 / (1 + 2 * .5) = .75; 3 * .25 / 1.5 = .5; 3 * .75 / 2.5 = .9
    assert flow.grid(4, 3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert flow.grid(10, 3.0)[-2:] == pytest.approx([0.25, 0.0])
    for shift in (k / 100 for k in range(1, 1001)):  # .3 began at 1 - 2e-16 with a sigma of 5e7, .45 at 1 + 2e-16
        times = flow.grid(10, shift)
        assert times[0] == 1.0 and times[-1] == 0.0 and times == sorted({*times}, reverse=True), shift
        assert flow.noise_scale(*times[:2]) == pytest.approx(0.7 * math.sqrt(1 + 9 * shift))  # a / √(1 - t_next)
        if shift >= 0.5:  # to the bit what the formula gives everywhere
            assert times == [flow.shifted(1 - k / 10, shift) for k in range(11)]


@pytest.mark.parametrize("noise", flow.NOISES)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [4, 10, 20])
def test_the_last_sde_step_leaves_no_noise(noise, shift, steps):
    """Data N(0, .02²): clips with SDE steps are as clean as the ODE's, however few the steps are."""
    def end(times, noisy):
        return gaussian_path(0.0, 0.02, times, **flow.NOISES[noise], noisy=noisy)[-1][1]

    noisy = flow.noisy_steps(noise, steps, lambda n: n - 1)
    times = flow.grid(steps, shift)
    assert end(times, noisy) - end(times, set()) < 0.005 and end(times, noisy) < 0.02
    if noise == "flow-grpo" and (steps, shift) == (10, 3.0):  # what the docstring of grid says
        assert [round(end(times, n), 4) for n in (noisy, set())] == [0.0015, 0.0012]
        twice = [*times[:-2], 0.278, 0.0089, 0.0]  # as diffusers' times end
        assert end(twice, noisy | {9}) > 0.2 > 0.02 > end(twice, set())


def test_log_prob_and_kl_are_those_of_torch_distributions():
    x, v, v_ref = a_step()
    for t, t_next in ((1.0, 0.9), (0.7, 0.6), (0.1, 0.0)):
        sigma = flow.noise_scale(t, t_next)
        mean, ref_mean = (flow.sde_mean(x, u, t, t_next, sigma) for u in (v, v_ref))
        normal, reference = (torch.distributions.Normal(m, sigma * math.sqrt(t - t_next)) for m in (mean, ref_mean))
        x_next = normal.sample()
        log_prob = flow.step_log_prob(x_next, mean, sigma, t, t_next)
        assert torch.allclose(log_prob, normal.log_prob(x_next).flatten(1).mean(dim=1), atol=1e-5)
        kl = flow.step_kl(mean, ref_mean, sigma, t, t_next)
        exact = torch.distributions.kl_divergence(normal, reference).flatten(1).mean(dim=1)
        assert torch.allclose(kl, exact, rtol=1e-4)
    assert not flow.step_kl(mean, mean, sigma, t, t_next).any()


def test_log_prob_and_kl_by_hand_and_in_closed_form():
    mean = flow.sde_mean(X, V, T, NEXT, 0.7)
    assert flow.step_log_prob(mean, mean, 0.7, T, NEXT).item() == pytest.approx(0.58903, abs=1e-5)  # -.5 ln(2 pi .049)
    ref_mean = flow.sde_mean(X, V - 1, T, NEXT, 0.7)
    assert flow.step_kl(mean, ref_mean, 0.7, T, NEXT).item() == pytest.approx(0.158166, abs=1e-5)
    closed = (1 + 0.7**2 / 2) ** 2 * 0.1 * (1 - T) / (2 * 0.7**2 * T)  # times |v - v_ref|^2 = 1
    assert closed == pytest.approx(0.158166, abs=1e-6)
    with pytest.raises(AssertionError):
        flow.step_log_prob(mean, mean, 0.0, T, NEXT)


def test_a_replayed_step_has_ratio_exactly_one_and_a_loss_with_gradient():
    x, v, z = a_step()
    v.requires_grad_(True)
    sigma = flow.noise_scale(0.7, 0.6)
    with torch.no_grad():
        mean = flow.sde_mean(x, v, 0.7, 0.6, sigma)
        x_next = mean + sigma * math.sqrt(0.1) * z
        old = flow.step_log_prob(x_next, mean, sigma, 0.7, 0.6)[:, None]
    new = flow.step_log_prob(x_next, flow.sde_mean(x, v, 0.7, 0.6, sigma), sigma, 0.7, 0.6)[:, None]  # (N, K = 1)
    assert (losses.policy_ratio(new, old, torch.ones(3, 1)) == 1).all()
    advantages = torch.tensor([1.0, -1.0, 0.0])
    losses.grpo_loss(new, old, advantages, torch.ones(3, 1), clip_low=1e-4, clip_high=1e-4).backward()
    # d log p / dv = -((1 + a²/2) / a) sqrt(Δ (1 - t) / t) z / D, and the loss is -A ratio / N
    slope = -(1 + 0.7**2 / 2) / 0.7 * math.sqrt(0.1 * 0.3 / 0.7) * z / z[0].numel()
    assert torch.allclose(v.grad, -advantages[:, None, None, None] * slope / 3, atol=1e-6)


def test_step_weight_undoes_the_shrinking_gradient():
    for t, t_next in ((0.9, 0.85), (0.5, 0.4), (0.1, 0.0)):
        assert flow.step_weight(t, t_next) * math.sqrt((t - t_next) * (1 - t) / t) == pytest.approx(1.0)
    assert flow.step_weight(0.5, 0.4) == pytest.approx(1 / math.sqrt(0.1))
    assert math.isfinite(flow.step_weight(1.0, 0.9))


def test_shared_spread():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.1], [0.86, 0.86]])
    expected = torch.tensor([[-0.7071, 0.7071], [-0.0707, 0.0707], [0.0, 0.0]])
    assert torch.allclose(flow.shared_spread(rewards), expected, atol=1e-4)
    assert flow.shared_spread(rewards)[2].tolist() == [0.0, 0.0]
    one = torch.randn(1, 6)
    assert torch.allclose(flow.shared_spread(one), losses.group_advantages(one), atol=1e-5)
    assert not flow.shared_spread(torch.full((2, 4), 0.3)).any()


def test_noised_runs_from_clip_to_noise_along_the_velocity():
    clip, noise, _ = a_step()
    assert torch.equal(flow.noised(clip, noise, 0.0), clip) and torch.equal(flow.noised(clip, noise, 1.0), noise)
    slope = (flow.noised(clip, noise, 0.75) - flow.noised(clip, noise, 0.25)) / 0.5
    assert torch.allclose(flow.flow_error(slope, clip, noise), torch.zeros(3), atol=1e-10)


def test_flow_error_is_zero_for_the_right_velocity():
    clip, noise, _ = a_step()
    assert not flow.flow_error(noise - clip, clip, noise).any()
    assert torch.allclose(flow.flow_error(noise - clip + 2, clip, noise), torch.full((3,), 4.0))


def test_flow_dpo_loss_starts_at_ln_2_and_by_hand():
    errors = torch.rand(4), torch.rand(4)
    same = flow.flow_dpo_loss(errors[0], errors[0], errors[1], errors[1], beta=500.0)
    assert same.item() == pytest.approx(math.log(2))
    # r_w = -5 (.8 - 1) = 1, r_l = -5 (1.1 - 1) = -.5; -ln sigma(1.5) = .201413
    one = torch.ones(1)
    loss = flow.flow_dpo_loss(0.8 * one, one, 1.1 * one, one, beta=10.0)
    assert loss.item() == pytest.approx(0.201413, abs=1e-5)
    # turned around: -ln sigma(-1.5) = 1.701413
    assert flow.flow_dpo_loss(1.1 * one, one, 0.8 * one, one, beta=10.0).item() == pytest.approx(1.701413, abs=1e-5)


def test_flow_dpo_gradient_by_hand():
    """At the start σ(0) = 1/2: dL/dv_w = (β/2)(1/2) d(error_w)/dv_w = −(β/2)(v* − v)/D; the loser's sign is turned."""
    clip, noise, v = a_step(n=1)
    loser = clip + 1
    chosen, rejected = v.clone().requires_grad_(True), v.clone().requires_grad_(True)
    w, l = flow.flow_error(chosen, clip, noise), flow.flow_error(rejected, loser, noise)
    flow.flow_dpo_loss(w, w.detach(), l, l.detach(), beta=100.0).backward()
    size = v.numel()
    assert torch.allclose(chosen.grad, -50 * (noise - clip - v) / size, atol=1e-5)
    assert torch.allclose(rejected.grad, 50 * (noise - loser - v) / size, atol=1e-5)


def test_a_noisy_step_goes_where_its_log_prob_says():
    """From x = 0 with v = 0, t = 1 -> 1/2: μ = 0, σ = .7 √2, so z = 1 goes to σ √(1/2) = .7; then Euler stays there."""
    x, (step,) = flow.sample(lambda x, t: 0 * x, torch.zeros(2, 3), [1.0, 0.5, 0.0], {0}, flow.NOISES["flow-grpo"],
                             lambda k: torch.ones(2, 3))
    assert step.x_next.flatten().tolist() == pytest.approx([0.7] * 6) and torch.equal(x, step.x_next)
    expected = torch.distributions.Normal(0.0, 0.7).log_prob(torch.tensor(0.7)).item()
    assert step.log_prob.tolist() == pytest.approx([expected] * 2)
