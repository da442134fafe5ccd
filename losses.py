"""The equations. Pure functions of tensors: no model, no ranks, no randomness that is not passed in.

Shapes: N CoTs of all videos, T CoT tokens (padded), G CoTs per video, B preference pairs.
Everything is computed in fp32, whatever comes in: in bf16 a reward of 5.4 has steps of 0.03.

| function                  | paper                       | value at initialisation                                    |
|---------------------------|-----------------------------|------------------------------------------------------------|
| bt_loss                   | Eq. 3 (stage 1), Eq. 10 (RL)| ln 2 = 0.6931 when both rewards are equal                  |
| draw_cot_mask             | "random CoT masking"        | masks a share p of the pairs                               |
| group_advantages          | part of Eq. 7               | mean 0, std 1 in each group                                |
| token_log_probs           | the policy's log-probs      | about -ln(vocabulary)                                      |
| grpo_loss                 | Eq. 7                       | 0 on-policy when every group has mean advantage 0 (see it) |
| kl_to_reference           | the KL term of Eq. 7        | 0 while the policy is the reference                        |
| btt_loss                  | not in the paper            | 0.4055 for a tie at k = 5 and equal rewards                |

A loss is averaged by a DENOMINATOR. On one batch that is its own count. When a batch is cut into micro-batches or
spread over ranks, each piece must be divided by the count of the WHOLE batch, or short pieces weigh too much
(docs/differences.md, row 7): the caller counts first and passes `denominator`; the pieces' losses then sum to the whole
batch's loss.
"""

import math

import torch
import torch.nn.functional as F


# ---- Scoring: Bradley-Terry -----------------------------------------------------------------------------------
def bt_loss(
    reward_chosen: torch.Tensor, reward_rejected: torch.Tensor, denominator: float | None = None
) -> torch.Tensor:
    """Bradley-Terry loss. Eq. 3 (cold start) and Eq. 10 (RL stage).

        L = -(1/B) Σ log σ(r_w − r_l)

    r_w -> reward_chosen, r_l -> reward_rejected: any equal shape; Eq. 3 has (B,), Eq. 10 has (B, G), rollout i of the
    one video against rollout i of the other. Averaged over all elements. The gradient pushes r_w up and r_l down by
    σ(r_l − r_w) each, so pairs already ranked right by a wide margin stop mattering. ln 2 at initialisation.
    """
    assert reward_chosen.shape == reward_rejected.shape, (reward_chosen.shape, reward_rejected.shape)
    losses = -F.logsigmoid(reward_chosen.float() - reward_rejected.float())
    return losses.sum() / (denominator or losses.numel())


def draw_cot_mask(num_pairs: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Random CoT masking (stage 1): which pairs lose their CoT in this epoch. Not numbered here.

        m_n ~ Bernoulli(p),  n = 1..B;   m_n = 1: the query sees video and prompt only

    ONE draw per pair, shared by its two videos: comparing a video judged with its CoT to one judged without would teach
    the head about masking, not about videos. Why at all: a head that always has the CoT may stop looking at the video;
    and it can then score without thinking, fast. The paper has p = 0.5. Returns (num_pairs,) bool. Never used in
    evaluation.
    """
    return torch.rand(num_pairs, generator=generator) < probability


# ---- Thinking: GRPO -------------------------------------------------------------------------------------------
def group_advantages(rollout_rewards: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """Group-relative advantages, the A of Eq. 7.

        A_i = (R_i − mean(R_1..R_G)) / (std(R_1..R_G) + ε)

    R -> rollout_rewards (S, G): row s holds the G CoTs of ONE video. std has Bessel's correction (divides by G − 1).
    A group whose G rewards are equal says nothing: its advantages are exactly 0, as is that of a group of one.
    Worked: R = (0, 1): mean .5, std .7071, A = (-.7071, +.7071).

    Pitfall: eight times .86 has the fp32 mean .8600001. That would be an R - mean of -6e-8 over an ε of 1e-6: A = -.06
    for all eight, and a push against every token of a group in which no CoT is better than another. So equal rewards
    are found by comparing, not by subtracting.
    """
    assert rollout_rewards.ndim == 2, f"(S, G) expected, got {tuple(rollout_rewards.shape)}"
    rewards = rollout_rewards.float()
    flat = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)  # (S, 1)
    if flat.all():  # groups of one too: their std would be nan
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (S, G)
    return torch.where(flat, 0.0, centred / (rewards.std(dim=1, keepdim=True) + epsilon))


def token_log_probs(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log π(token) for each row of logits. logits (M, V), token_ids (M,) -> (M,) fp32. Not numbered here.

        π = softmax(logits / temperature)

    The temperature is the sampler's: ratio and KL are about the policy that wrote the CoTs, and at another temperature
    that is another policy.

    logits[m] must come from the position BEFORE token m: position t predicts token t + 1.
    """
    assert logits.ndim == 2 and token_ids.shape == logits.shape[:1], (logits.shape, token_ids.shape)
    return -F.cross_entropy(logits.float() / temperature, token_ids, reduction="none")


def grpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    clip_dual: float = 3.0,
    denominator: float | None = None,
) -> torch.Tensor:
    """Clipped token-level policy-gradient loss. Eq. 7 without its KL term, which `kl_to_reference` adds.

        ρ_t = π(token_t) / π_old(token_t)
        L_t = max( −A ρ_t,  −A clip(ρ_t, 1 − clip_low, 1 + clip_high) )        and, where A < 0,
        L_t = min( L_t, −A clip_dual )                                         (dual clip: bounds a bad token's pull)
        L   = (1 / number of tokens) Σ L_t

    log π -> log_probs (N, T), with gradient; log π_old -> old_log_probs (N, T), detached; A -> advantages (N,), one per
    CoT; mask (N, T): 1 on CoT tokens, EOS included, 0 on padding. Averaged over all tokens, so a long CoT weighs more
    than a short one. Defaults: EasyR1's, which the released code uses.

    "Loss 0, ratio 1: is it broken?" No. On-policy (one update per rollout batch) π_old IS π, so ρ = 1 and L = −mean(A),
    which is 0 up to differences in length, because advantages are centred. The GRADIENT is not 0: dρ/dθ = d log π/dθ,
    so each token is pushed by its A. Watch the rollout rewards, not this number.
    """
    assert log_probs.shape == old_log_probs.shape == mask.shape, (log_probs.shape, old_log_probs.shape, mask.shape)
    assert advantages.shape == log_probs.shape[:1], (advantages.shape, log_probs.shape)
    advantage = advantages.float()[:, None]  # (N, 1), the same for all tokens of a CoT
    ratio = policy_ratio(log_probs, old_log_probs, mask)  # (N, T)
    losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    losses = torch.where(advantage < 0, torch.minimum(losses, -advantage * clip_dual), losses)
    return (losses * mask).sum() / (denominator or mask.sum().clamp(min=1))


def policy_ratio(log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ρ_t = π/π_old per token (N, T), exactly 1 at padding. The exponent is bounded at ±20: fp32 cannot overflow."""
    difference = (log_probs.float() - old_log_probs.detach().float()) * mask
    return difference.clamp(-20, 20).exp()


def clipped_tokens(
    log_probs, old_log_probs, advantages, mask, clip_low=0.2, clip_high=0.3, clip_dual=3.0
) -> torch.Tensor:
    """Number of tokens whose gradient the clip has cut off: ρ > 1 + clip_high and A > 0, or A < 0 and ρ < 1 − clip_low
    or, by the dual clip, ρ > clip_dual.

    Shapes as in `grpo_loss`. 0 on-policy. Divide by the tokens of the whole batch for a share.
    """
    ratio = policy_ratio(log_probs, old_log_probs, mask)
    advantage = advantages[:, None]
    outside = (ratio < 1 - clip_low) | (ratio > clip_dual)
    cut = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & outside)
    return (cut * mask).sum()


def kl_to_reference(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """KL(π ‖ π_ref) per token by Schulman's k3 estimator, the KL term of Eq. 7. Tokens are sampled from π.

        k3 = π_ref/π − 1 − log(π_ref/π)            (never negative; its mean over samples of π is the KL)

    log_probs (N, T) with gradient, ref_log_probs (N, T) -> (N, T). The ratio is reference over policy: the other way up
    estimates nothing useful under samples of π. Worked: π = .5, π_ref = .25: .5 − 1 − ln .5 = .1931. 0 when equal.
    Schulman, "Approximating KL divergence", 2020.
    """
    assert log_probs.shape == ref_log_probs.shape, (log_probs.shape, ref_log_probs.shape)
    log_ratio = (ref_log_probs.detach().float() - log_probs.float()).clamp(-20, 20)
    return log_ratio.exp() - 1 - log_ratio


# ---- Not in the paper: a score loss that learns from ties -----------------------------------------------------
def btt_loss(
    reward_a: torch.Tensor,
    reward_b: torch.Tensor,
    label: torch.Tensor,
    k: float = 5.0,
    denominator: float | None = None,
) -> torch.Tensor:
    """Bradley-Terry with ties (Rao and Kupper 1967). VideoAlign trains with it.

        P(A > B) = 1 / (1 + k e^(r_B − r_A))          = σ(r_A − r_B − ln k)
        P(tie)   = 1 − P(A > B) − P(B > A)            = (k² − 1) σ(r_A − r_B − ln k) σ(r_B − r_A − ln k)

    r_A, r_B: reward_a, reward_b (B,). label (B,): +1 A better, -1 B better, 0 tie. k > 1 sets how wide a tie is:
    at equal rewards P(tie) = (k − 1)/(k + 1), 2/3 for k = 5. Averaged over pairs. As k -> 1 it becomes `bt_loss`.
    """
    assert reward_a.shape == reward_b.shape == label.shape, (reward_a.shape, reward_b.shape, label.shape)
    assert k > 1, f"k = {k}: a tie needs k > 1"
    margin = reward_a.float() - reward_b.float()
    log_p_a = F.logsigmoid(margin - math.log(k))
    log_p_b = F.logsigmoid(-margin - math.log(k))
    log_p_tie = math.log(k * k - 1) + log_p_a + log_p_b
    losses = -torch.where(label > 0, log_p_a, torch.where(label < 0, log_p_b, log_p_tie))
    return losses.sum() / (denominator or losses.numel())
