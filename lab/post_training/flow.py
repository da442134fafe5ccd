"""The equations of post-training a flow-matching generator with a reward: Flow-GRPO, LongCat-GRPO, Flow-DPO.

Pure functions, as in losses.py: no model, no ranks, no randomness that is not passed in. All is computed in fp32.

    x_t = (1 − t) x₀ + t ε       x₀ a clip (or its latents), ε noise; t runs DOWN from 1 (noise) to 0 (clip)
    v*  = ε − x₀                 what the generator v_θ(x_t, t, prompt) learns to predict
    Δ   = t − t_next > 0         one step of the sampler

| # | function         | what                                           | value to check it by                        |
|---|------------------|------------------------------------------------|---------------------------------------------|
| 1 | noise_scale      | σ of one step, Flow-GRPO's and LongCat's       | .7 at t = .5, a = .7                        |
| 2 | sde_mean         | μ of one step; σ = 0 is the ODE (Euler)        | .702 (Euler .8), worked below               |
| 3 | step_log_prob    | log p(x' given x): the policy of GRPO          | .589 where x' = μ                           |
| 4 | step_kl          | KL to the reference, exact                     | .158; 0 where v = v_ref                     |
| 5 | step_weight      | LongCat's weight of a step                     | 1 / √Δ at t = .5                            |
| 6 | shared_spread    | LongCat's advantages                           | the widest group is `group_advantages`'     |
| 7 | flow_dpo_loss    | Flow-DPO                                       | ln 2 at the start                           |

The policy's loss itself is Eq. 7 of losses.py: `grpo_loss` on (N, K) log-probs, N clips in place of CoTs, K steps in
place of tokens, all with mask 1. ONE thing is not as with tokens: see the clip range in (3).
Worked example for all of them: x = 1, v = 2, t = .5, t_next = .4, a = .7.

Sources: Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818), LongCat-Video (2510.22200), Flow-DPO in VideoAlign
(2501.13918). None of it is in the DeScore paper, which names the two methods and no formula.
"""

import dataclasses
import itertools
import math

import torch

from losses import bt_loss, group_advantages


def odds(t: float, t_next: float) -> float:
    """t / (1 − t), noise over signal. Not numbered. At t = 1, where it is infinite: 1 / (1 − t_next), as all codes do.

    This substitution makes the first step's noise large however small the step is: there, and only there, the SDE's
    spread on the way is not the ODE's. It is again at the end (lab/post_training/test_flow.py shows both).
    """
    return t / (1 - t) if t < 1 else 1 / (1 - t_next)


def noise_scale(t: float, t_next: float, a: float = 0.7, cap: float | None = None) -> float:
    """(1) How much noise one step adds, per square root of time.

        σ = a √(t / (1 − t))                          Flow-GRPO: a = .7. a = 0: none, the ODE
        σ = min(σ, cap / √Δ)                          LongCat: a = 1, cap = .45: σ√Δ, the noise of the step, is bounded

    Worked: t = .5 gives .7; t = .9 gives 2.1. DanceGRPO takes a constant instead (.25): pass that to `sde_mean`.
    """
    assert 0 <= t_next < t <= 1, f"a step from t = {t} to {t_next}: t must fall, from 1 to 0"
    sigma = a * math.sqrt(odds(t, t_next))
    return sigma if cap is None else min(sigma, cap / math.sqrt(t - t_next))


def sde_mean(x: torch.Tensor, velocity: torch.Tensor, t: float, t_next: float, sigma: float) -> torch.Tensor:
    """(2) Where one step goes, before its noise.

        μ  = x − Δ [ v + σ²/(2t) (x + (1 − t) v) ]
        x' = μ + σ√Δ z,   z ~ N(0, 1)

    x + (1 − t) v is the clip's noise ε as the generator sees it, so −ε/t is the score of x: what the noise z spreads,
    the second term pulls back, and x' has the distribution of the ODE's. σ = 0 is Euler, to the last bit.
    Worked: σ = .7: .49 (1 + .5 * 2) = .98, μ = 1 − .1 (2 + .98) = .702; Euler .8.
    Pitfall: with the sign of the second term turned, clips come out as noise, slowly enough that training goes on.
    """
    x, velocity = x.float(), velocity.float()
    noise = x + (1 - t) * velocity
    return x - (t - t_next) * (velocity + sigma**2 / (2 * t) * noise)


@dataclasses.dataclass
class Step:
    """One SDE step as it was sampled, of N clips: what GRPO goes through again under the policy as it is then."""

    x: torch.Tensor  # (N, ...)
    x_next: torch.Tensor  # (N, ...)
    t: float
    t_next: float
    sigma: float
    log_prob: torch.Tensor  # (N,): (3), when sampled


def shifted(u, shift: float):
    """t = s u / (1 + (s − 1) u): a time u in [0, 1] moved towards noise. Not numbered. Wan: s = 3 at 480p, 5 at 720p.

    The larger a clip, the more noise it takes to hide what it shows, so large clips need more of their steps there.
    s = 1: u itself, to the last bit. Worked: s = 3: 0, .1, .5, 1 -> 0, .25, .75, 1.
    """
    return shift * u / (1 + (shift - 1) * u)


def grid(steps: int, shift: float = 1.0) -> list[float]:
    """The sampler's times, steps + 1 of them from 1 to 0: an even grid, shifted ONCE. Not numbered.

    Worked: 10 steps, s = 3: 1, .964, ..., .429, .25, 0. Take them from here, not from diffusers: its
    `FlowMatchEulerDiscreteScheduler.set_timesteps(10)` shifts the smallest time of an already shifted range again and
    ends .278, .0089, 0. For the ODE that is harmless. But the last SDE step of Flow-GRPO is the one before the last:
    from .278 to .0089 it adds noise of std .225, and what follows is too short to take it out. Every clip that the
    reward sees is then noisy: data of std .02 come out at .208, where the ODE on the same times gives .008. On this
    grid, .0015 and .0012 (test_the_last_sde_step_leaves_no_noise): a few long steps end near the mean of what
    is possible: less varied than the data, but clean.
    """
    # 1 as it is: below a shift of .5 the formula rounds to a number beside it, which `odds` would take for a real time.
    return [1.0, *(shifted(1 - k / steps, shift) for k in range(1, steps + 1))]


NOISES = {"flow-grpo": {"a": 0.7}, "longcat": {"a": 1.0, "cap": 0.45}}  # --noise -> the arguments of (1)


def noisy_steps(noise: str, steps: int, draw) -> set[int]:
    """Which of the sampler's steps are SDE steps. LongCat: one early one, draw(n) below n; Flow-GRPO: all but the last.

    The last never is: nothing would take its noise out of the clip again. And it must be a long one: see `grid`.
    """
    return {int(draw(max(1, steps // 2)))} if noise == "longcat" else set(range(steps - 1))


@torch.no_grad()
def sample(velocity, start: torch.Tensor, times, noisy, noise_args: dict, draw) -> tuple[torch.Tensor, list[Step]]:
    """From noise (N, ...) to latents: steps numbered in `noisy` are SDE steps, kept for GRPO; the others are Euler.

    velocity(x, t) -> v. times fall from 1 to 0. noise_args: those of (1). draw(k) -> z of step k, normal, shaped as x.
    """
    x, trail = start, []
    for k, (t, t_next) in enumerate(itertools.pairwise(times)):
        sigma = noise_scale(t, t_next, **noise_args) if k in noisy else 0.0
        x_next = mean = sde_mean(x, velocity(x, t), t, t_next, sigma)
        if sigma:
            x_next = mean + sigma * math.sqrt(t - t_next) * draw(k)
            trail.append(Step(x, x_next, t, t_next, sigma, step_log_prob(x_next, mean, sigma, t, t_next)))
        x = x_next
    return x, trail


def step_log_prob(
    x_next: torch.Tensor, mean: torch.Tensor, sigma: float, t: float, t_next: float
) -> torch.Tensor:
    """(3) log p(x' given x) of a Gaussian step. x_next, mean (N, ...) -> (N,), the MEAN over the D numbers of a clip.

        log p = −‖x' − μ‖² / (2 σ² Δ) / D  −  ½ log(2π σ² Δ)

    Worked: D = 1, x' = μ: −½ log(2π * .049) = .589. The field takes the mean, not the sum: a clip has 10^5 numbers and
    more, and the ratio of a sum would be 0 or infinite. So `policy_ratio` is the D-th root of the true ratio, always
    very near 1, and the clip range that bites is 1e-4 (Flow-GRPO) to 1e-3, not the .2 of tokens.
    """
    variance = sigma**2 * (t - t_next)
    assert variance > 0, "an ODE step has no density: take log-probs of SDE steps only"
    squares = (x_next.detach().float() - mean).square().flatten(1).mean(dim=1)  # x' is data: no gradient through it
    return -squares / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)


def step_kl(mean: torch.Tensor, ref_mean: torch.Tensor, sigma: float, t: float, t_next: float) -> torch.Tensor:
    """(4) KL(p ‖ p_ref) of one step, exact: two Gaussians of one variance. (N, ...) -> (N,), mean over D as in (3).

        KL = ‖μ − μ_ref‖² / (2 σ² Δ) / D        with (1), uncapped: (1 + a²/2)² Δ (1 − t) / (2 a² t) ‖v − v_ref‖² / D

    Worked: v_ref = 1: μ_ref = .8265, .1245² / .098 = .158. No sampling, so none of `kl_to_reference`'s noise.
    """
    squares = (mean - ref_mean.detach()).square().flatten(1).mean(dim=1)
    return squares / (2 * sigma**2 * (t - t_next))


def step_weight(t: float, t_next: float) -> float:
    """(5) What a step's policy loss is multiplied by, so that all steps learn alike (LongCat). Its square for the KL.

        w = √( t / (Δ (1 − t)) )          because      ∇ log p = −((1 + a²/2) / a) √(Δ (1 − t) / t) z ∇v

    Worked: t = .5, Δ = .1: 3.16; t = .9: 9.49; t = .1: 1.05. Without it the gradient of a step falls to 0 towards
    t = 1: the early steps, which lay out what the clip shows, would hardly learn; the last, which polish, most.
    """
    return math.sqrt(odds(t, t_next) / (t - t_next))


def shared_spread(rewards: torch.Tensor) -> torch.Tensor:
    """(6) LongCat's advantages: every group is divided by the spread of the WIDEST group. rewards (S, G) -> (S, G).

        A_si = (R_si − mean_s) / max over groups of std_s

    `losses.group_advantages` divides each group by its own std: a group whose clips are all alike then shouts as loud
    as one with clear winners, about differences that may be the reward's noise. Here it whispers. With one group, or
    equal spreads, both are the same. Worked: (0, 1) and (0, .1): -.707, .707 and -.0707, .0707.
    Several rewards: add weighted ADVANTAGES, Σ w_k A_k, never rewards; the one of the largest scale would rule.
    """
    assert rewards.shape[1] > 1, "a group of one clip has no spread"
    spread = rewards.float().std(dim=1, keepdim=True)  # (S, 1)
    return group_advantages(rewards) * spread / (spread.max() + 1e-6)


def noised(clip: torch.Tensor, noise: torch.Tensor, t: float) -> torch.Tensor:
    """x_t = (1 − t) x₀ + t ε, what the generator sees in training. Not numbered. Its slope in t is v*."""
    return (1 - t) * clip + t * noise


def flow_error(velocity: torch.Tensor, clip: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """‖v* − v‖² / D: the flow-matching loss of each clip. Not numbered. (N, ...) -> (N,); 0 for the true velocity."""
    return (noise - clip - velocity).float().square().flatten(1).mean(dim=1)


def flow_dpo_loss(
    error_chosen: torch.Tensor,
    ref_error_chosen: torch.Tensor,
    error_rejected: torch.Tensor,
    ref_error_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """(7) Flow-DPO: Bradley-Terry on implicit rewards.

        r = −(β/2) (‖v* − v_θ‖² − ‖v* − v_ref‖²),      L = bt_loss(r_w, r_l) = −log σ(r_w − r_l)

    Errors (B,) from `flow_error`; winner and loser of a pair get the SAME t and ε, or their noise is compared. β is
    constant over t (VideoAlign found that better than β ∝ 1 − t). With means over D, β is 100 (flow_grpo) to 2,000
    (Flow-Factory). ln 2 while v_θ is v_ref.
    Worked: errors .8 and 1.1, both references 1, β = 10: r_w = 1, r_l = −.5, L = −log σ(1.5) = .2014.
    Pitfall: the loss also falls when BOTH errors rise and the loser's rises faster. Watch the winner's error itself.
    """
    reward_chosen = -beta / 2 * (error_chosen - ref_error_chosen.detach())
    reward_rejected = -beta / 2 * (error_rejected - ref_error_rejected.detach())
    return bt_loss(reward_chosen, reward_rejected)
