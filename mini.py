"""The whole method on one page, in one process: think, then score, and how both are learned. Read this first.

    python mini.py       on what `make demo` left in runs/, or on the little that it then makes itself in runs/mini

Stage 0   the base model thinks about each video                                            -> CoTs
Stage 1   a head learns to score (video, prompt, CoT): Bradley-Terry, Eq. 3                 -> cold_start.py
Stage 2   thinking by GRPO, Eq. 7, and scoring by Bradley-Terry, Eq. 10, in ONE forward     -> grpo.py

A few steps only: the model is not good yet. tests/test_mini.py compares its gradients with those of the scripts on the
right. See losses.py, rules.py, layout.py. Shapes: videos A and B of a pair, G CoTs for each, T tokens a CoT (padded).
"""

import os
import random
import subprocess
import sys

import torch

import data
from layout import lay_out
from losses import bt_loss, group_advantages, grpo_loss, kl_to_reference
from model import DeScore
from plumbing.settings import cli
from rollout import decode_cot
from rules import rollout_reward

G, TOKENS = 4, 72  # CoTs for each video, tokens of a CoT at most (paper: 8 and 4,096)
KL, BT = 1e-5, 0.05  # weights of KL and BT in stage 2 (paper: 1e-5 and 5e-3)
PAIRS, MASK = 4, 0.5  # pairs per update (paper: 32, then 8), share whose CoTs are hidden in stage 1 (paper: .5)
LENGTHS = 10, 40  # CoT tokens between which R_len goes from 0 to 1 (paper: 500 and 2,000)


# ---- Stage 1: Bradley-Terry on (video, prompt, CoT), with random CoT masking ---------------------------------
def cold_start_loss(model, pair, prefixes, cots, masked: bool) -> torch.Tensor:
    """Eq. 3 for one pair. A row per video: [video and prompt | CoT | query]; a hidden CoT is an empty one."""
    rows = [[[]], [[]]] if masked else [[cot] for cot in cots]
    reward_a, reward_b = model(lay_out(model.backbone, prefixes, rows), want_log_probs=False).rewards
    return bt_loss(reward_a, reward_b) if pair.label > 0 else bt_loss(reward_b, reward_a)


def stage_1(model, pairs, steps: int) -> None:
    """Stage 0, then `steps` updates of LoRA, vision tower, query and head."""
    prefixes = [model.encode(pair.videos, [pair.prompt] * 2) for pair in pairs]
    cots = [model.think(both, TOKENS) for both in prefixes]  # by the base model, greedily: one for each video
    model.make_trainable("lora", vision=True, lora_r=16, lora_alpha=32, lora_dropout=0.0)
    optimizer, draw = make_optimizer(model, llm=5e-4, vision=3e-5, head=3e-3), random.Random(0)
    for step in range(1, steps + 1):
        total = 0.0
        for i in draw.sample(range(len(pairs)), PAIRS):
            loss = cold_start_loss(model, pairs[i], prefixes[i], cots[i], masked=draw.random() < MASK) / PAIRS
            loss.backward()  # gradients add up over the pairs of an update
            total += loss.item()
        take_step(model, optimizer)
        print(f"stage 1, step {step:2d}   BT loss {total:.4f}")


# ---- Stage 2: two objectives, one forward ---------------------------------------------------------------------
def judge(tokenizer, pair, cots) -> torch.Tensor:
    """(2, G) rollout rewards, by rules alone: the head never says what a thought is worth."""
    truths = pair.annotation_a, pair.annotation_b
    return torch.tensor([[rollout_reward(decode_cot(tokenizer, cot), len(cot), truth, length_range=LENGTHS).total
                          for cot in row] for row, truth in zip(cots, truths)])


def rl_loss(model, reference, pair, prefixes, cots, advantages, num_tokens: int, num_pairs: int) -> torch.Tensor:
    """GRPO + KL (Eq. 7) + BT (Eq. 10) of one pair. num_tokens, num_pairs: of the whole update, its denominators."""
    batch = lay_out(model.backbone, prefixes, cots)  # two rows: [video and prompt | cot_1 q_1 | ... | cot_G q_G]
    with torch.no_grad():
        ref_log_probs = reference(batch).log_probs  # (2G, T)
    out, mask = model(batch), batch["cot_mask"]  # log_probs (2G, T), rewards (2G,): A_1..A_G, B_1..B_G
    old_log_probs = out.log_probs.detach()  # one update per batch of CoTs: the policy IS the one that sampled
    grpo = grpo_loss(out.log_probs, old_log_probs, advantages.flatten(), mask, denominator=num_tokens)
    kl = (kl_to_reference(out.log_probs, ref_log_probs) * mask).sum() / num_tokens
    reward_a, reward_b = out.rewards.view(2, -1)  # rollout i of the winner against rollout i of the loser
    bt = bt_loss(reward_a, reward_b) if pair.label > 0 else bt_loss(reward_b, reward_a)
    return grpo + KL * kl + BT * bt / num_pairs


def stage_2(model, reference, pairs, steps: int) -> None:
    """Each step: draw pairs, think, judge by rules, advantages within each group of G, one update."""
    model.make_trainable("full", vision=False)
    optimizer, draw = make_optimizer(model, llm=2e-4), random.Random(0)
    for step in range(1, steps + 1):
        batch = []
        for pair in draw.sample(pairs, PAIRS):
            prefixes = model.encode(pair.videos, [pair.prompt] * 2)  # the clips are decoded here
            cots = model.think(prefixes, TOKENS, temperature=1.0, seed=draw.randrange(2**31), thoughts=G)  # [2][G]
            batch.append((pair, prefixes, cots, judge(model.processor.tokenizer, pair, cots)))
        num_tokens = sum(len(cot) for _, _, cots, _ in batch for row in cots for cot in row)
        for pair, prefixes, cots, rewards in batch:
            advantages = group_advantages(rewards)  # (2, G): against the other thoughts about the SAME video
            rl_loss(model, reference, pair, prefixes, cots, advantages, num_tokens, PAIRS).backward()
        take_step(model, optimizer)
        mean = torch.stack([rewards for *_, rewards in batch]).mean()
        print(f"stage 2, step {step:2d}   rollout reward {mean:.3f}   CoT tokens {num_tokens / (2 * G * PAIRS):.1f}")


# ---- Optimizer, data, run -------------------------------------------------------------------------------------
def make_optimizer(model, llm: float, **rates: float) -> torch.optim.AdamW:
    """AdamW with a learning rate for each part of the model: llm, vision, head."""
    return torch.optim.AdamW({"params": p, "lr": rates.get(part, llm)} for part, p in model.parameter_groups().items())


def take_step(model, optimizer) -> None:
    """Clips each part's gradient to norm 1, and updates."""
    for parameters in model.parameter_groups().values():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main(runs: str = "runs", steps=(10, 4), pool: int = 16) -> None:
    """Stage 1 on the base model, stage 2 on what stage 1 saved."""
    if not os.path.isdir(f"{runs}/base") and not os.path.isdir(f"{(runs := runs + '/mini')}/base"):  # no demo here
        few = "--train-cold-start 16 --train-rl 16 --val-cold-start 0 --test-in-domain 0 --test-genai-bench 0"
        small = "--vision-steps 4 --steps 30 --pool 100 --batch 16"
        for flags in f"data --out {runs}/data {few} --test-videogen-rewardbench 0", f"base --out {runs}/base {small}":
            subprocess.run([sys.executable, "-m", "toy", *flags.split()], check=True)
    torch.manual_seed(0)
    scored = [pair for pair in data.read_pairs(f"{runs}/data/train_cold_start.csv") if pair.label != 0][:pool]
    model = DeScore.from_pretrained(f"{runs}/base", new_head=True)
    stage_1(model, scored, steps[0])
    model.save_pretrained(f"{runs}/mini_stage1")  # LoRA is merged into the weights
    policy, reference = (DeScore.from_pretrained(f"{runs}/mini_stage1") for _ in range(2))
    stage_2(policy, reference.requires_grad_(False), data.read_pairs(f"{runs}/data/train_rl.csv")[:pool], steps[1])


if __name__ == "__main__":
    cli(main)
