# %% [markdown]
# # The first hour: one pair, from the video to an update
#
# *Think, then Score* (arXiv 2605.05922) in small steps, with the real classes of this repository and a toy model.
# Keep the paper beside it; equation numbers are the paper's. Every cell teaches one thing. The page of `make page`
# shows the same lines beside the paper's statements.
#
# It runs in a few minutes on two cores. If `make demo` has been run, its base model is used, as for the outputs that
# stand here; if not, a smaller one is made, whose thoughts are worse.

# %%
import os
import pathlib
import subprocess
import sys

root = next(folder for folder in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (folder / "mini.py").exists())
os.chdir(root)
sys.path.insert(0, str(root))  # before lab/course, which has a rules.py of its own

import torch

import cold_start
import data
import mini
from layout import lay_out
from losses import bt_loss, group_advantages, grpo_loss
from model import DeScore
from rollout import decode_cot
from rules import rollout_reward

_ = torch.manual_seed(0)

# %% [markdown]
# A world of coloured shapes stands in for generated videos, and a tiny Qwen3-VL for the 8B. Both are made by two
# commands.

# %%
runs = pathlib.Path("runs")
if not (runs / "base").exists():
    runs = pathlib.Path("runs/first_hour")
    world = "--train-cold-start 16 --train-rl 16 --val-cold-start 0 --test-in-domain 0 --test-genai-bench 0"
    if not (runs / "base").exists():
        for command in (f"data --out {runs}/data {world} --test-videogen-rewardbench 0",
                        f"base --out {runs}/base --vision-steps 8 --steps 120 --pool 150 --batch 16"):
            subprocess.run([sys.executable, "-m", "toy", *command.split()], check=True, capture_output=True)
pairs = data.read_pairs(f"{runs}/data/train_rl.csv")
model = DeScore.from_pretrained(f"{runs}/base", new_head=True)
print(f"{len(pairs)} pairs; a model of {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## 1. A pair
# Two videos of ONE prompt, and which of them people preferred. There is no score: people compare.

# %%
import io

import IPython.display
import numpy as np
from PIL import Image

pair = next(pair for pair in pairs if pair.label > 0)
print(f"prompt: {pair.prompt}\nA (above) is better; what is true of each video, by dimension:")
print("A", pair.annotation_a, "\nB", pair.annotation_b)
clips = [data.sample_frames(path).frames[:8] for path in pair.videos]  # 2 frames a second
rows = np.concatenate([np.concatenate(list(clip), axis=1) for clip in clips])
Image.fromarray(rows).save(file := io.BytesIO(), "JPEG")
IPython.display.Image(file.getvalue())

# %% [markdown]
# The model reads the video as tokens, then the prompt. This is the *prefix*: all CoTs of the video stand behind it.

# %%
prefixes = model.encode(pair.videos, [pair.prompt] * 2)
for name, prefix in zip("AB", prefixes):
    video = int((prefix["mm_token_type_ids"] == 2).sum())
    print(f"{name}: {len(prefix['input_ids'])} tokens, {video} of them video")

# %% [markdown]
# ## 2. A chain of thought, and a reward (Fig. 2a)
# *Think*: the model writes a CoT. *Then score*: the query `<Reward>` is appended, its last hidden state goes through
# a linear head. The head is new and near 0, so both rewards are about equal. A reward has no unit and no zero: only
# the difference counts.

# %%
cots = model.think(prefixes, mini.TOKENS)  # greedily, one for each video, as lists of token ids
rewards = model.score(prefixes, cots)
for name, cot, reward in zip("AB", cots, rewards):
    print(f"--- {name}, {len(cot)} tokens, reward {reward:+.4f}\n{decode_cot(model.processor.tokenizer, cot)}")

# %% [markdown]
# ## 3. Bradley-Terry (Eq. 3)
# $$\mathcal L = -\log \sigma(r_w - r_l), \qquad \sigma(z) = 1 / (1 + e^{-z})$$
# By hand: a winner at 2 and a loser at 0.

# %% tags=["same"]
by_hand = -np.log(1 / (1 + np.exp(-(2.0 - 0.0))))
r_w, r_l = torch.tensor([2.0], requires_grad=True), torch.tensor([0.0])
loss = bt_loss(r_w, r_l)
loss.backward()
print(f"by hand {by_hand:.6f}, bt_loss {loss:.6f}; equal rewards cost ln 2 = {bt_loss(r_l, r_l):.6f}")
print(f"gradient for the winner {r_w.grad.item():.6f} = -σ(r_l - r_w): the surer, the smaller")

# %% [markdown]
# The same for our pair: from the two rewards by hand; by `cold_start.py`, whose loss trains the 8B; by `mini.py`,
# which is the method on one page.

# %% tags=["same"]
import dataclasses

a, b = (decode_cot(model.processor.tokenizer, cot) for cot in cots)
thought = dataclasses.replace(pair, cot_a=a, cot_b=b, cot_a_tokens=cots[0], cot_b_tokens=cots[1])
with torch.no_grad():
    by_hand = -torch.log(torch.sigmoid(rewards[0] - rewards[1]))
    by_script = bt_loss(*cold_start.score_pairs(model, [data.Drawn(thought, prefixes)]))
    by_mini = mini.cold_start_loss(model, pair, prefixes, cots, masked=False)
print("by hand = cold_start.py:", torch.allclose(by_hand, by_script, atol=1e-5))
print("by hand = mini.py:      ", torch.allclose(by_hand, by_mini, atol=1e-5))

# %% [markdown]
# **Random CoT masking**: in half of the pairs the CoT of both videos is left out, so that the head must also learn
# from the video. Masked means *empty*: the query stands right behind the prompt.

# %% tags=["same"]
with torch.no_grad():
    masked = mini.cold_start_loss(model, pair, prefixes, cots, masked=True)
    without = model.score(prefixes, [None, None])
print("masked = scored without a CoT:", torch.allclose(masked, bt_loss(without[:1], without[1:]), atol=1e-5))

# %% [markdown]
# Some updates of stage 1: adapters (LoRA) on the language model, and the vision tower, the query and the head in full.
# The loss of this pair falls.

# %%
model.make_trainable("lora", vision=True, lora_r=16, lora_alpha=32, lora_dropout=0.0)
optimizer = mini.make_optimizer(model, llm=5e-4, vision=3e-5, head=3e-3)
losses = []
for step in range(4):  # in earnest, each update has other pairs
    loss = mini.cold_start_loss(model, pair, prefixes, cots, masked=False)
    loss.backward()
    mini.take_step(model, optimizer)
    losses.append(loss.item())
print("BT loss before each update:", " ".join(f"{loss:.4f}" for loss in losses))
assert losses[-1] < losses[0]

# %% [markdown]
# ## 4. A group of CoTs
# Stage 2 samples G CoTs for each video and compares them with each other. What a CoT earns is decided by **rules
# alone**, from what is true of the video; the head is never asked:
# $$R = 0.7\, R_\text{qual} + 0.1\, R_\text{fmt} + 0.2\, R_\text{len}$$
# $R_\text{len}$ counts tokens: from 0 at 500 to 1 at 2,000 in the paper, from 10 to 40 for the toy.

# %%
model = DeScore.from_pretrained(f"{runs}/base", new_head=True)
group = model.think(prefixes, mini.TOKENS, temperature=1.0, seed=1, thoughts=mini.G)  # [2][G] lists of token ids
for cot in group[0]:
    text = decode_cot(model.processor.tokenizer, cot)
    print(f"{len(cot):3d} tokens", rollout_reward(text, len(cot), pair.annotation_a, length_range=mini.LENGTHS))

# %% [markdown]
# The advantage says how good a CoT is *in its group*. By hand, with three CoTs that earn 0, 1 and 1:

# %% tags=["same"]
R = torch.tensor([[0.0, 1.0, 1.0]])
std = (((0 - 2 / 3) ** 2 + 2 * (1 - 2 / 3) ** 2) / (3 - 1)) ** 0.5  # divided by G - 1
print("by hand         ", [round((r - 2 / 3) / (std + 1e-6), 4) for r in (0.0, 1.0, 1.0)])
print("group_advantages", [round(a, 4) for a in group_advantages(R)[0].tolist()])
print("all the same: no CoT is better, so", group_advantages(torch.full((1, 3), 0.86))[0].tolist())

# %%
R = mini.judge(model.processor.tokenizer, pair, group)  # (2, G)
advantages = group_advantages(R)
for name, earned, advantage in zip("AB", R, advantages):
    print(name, "R", [f"{r:.3f}" for r in earned], " A", [f"{a:+.2f}" for a in advantage])

# %% [markdown]
# ## 5. Who sees whom
# The CoTs of a video stand in ONE row behind one prefix, so that thousands of video tokens are computed once and not
# G times. Each must see what it would see alone: the prefix and itself. The drawing below is made from what `lay_out`
# returns, for two CoTs of two tokens; of the prefix it shows the last three tokens.

# %% tags=["same"]
small = lay_out(model.backbone, prefixes[:1], [[[70, 71], [80, 81]]])
(prompt, cots_at), = small["spans"]
owner = ["p"] * 3 + [name for name, (_, n) in zip("ab", cots_at) for _ in range(n)]
names = ["p"] * 3 + [name for name in "ab" for name in (name, name, "q")]
print("   ", " ".join(names))
for i in range(len(names)):
    seen = ["x" if j <= i and (owner[j] == "p" or owner[j] == owner[i]) else "." for j in range(len(names))]
    print("   ".join([names[i], " ".join(seen)]))
places = small["position_ids"][0, 0]
print("places of a's and b's tokens, after the prefix:",
      [[int(places[start + k] - places[prompt - 1]) for k in range(n)] for start, n in cots_at])

# %% [markdown]
# Is it true? Three checks with the model itself: two CoTs in one row against two forwards of their own; and a token
# of *a* is changed.

# %% tags=["same"]
a, b = group[0][:2]
with torch.no_grad():
    packed = model(lay_out(model.backbone, prefixes[:1], [[a, b]]))
    alone = [model(lay_out(model.backbone, prefixes[:1], [[cot]])) for cot in (a, b)]
    other = model(lay_out(model.backbone, prefixes[:1], [[[a[0], a[1] + 1, *a[2:]], b]]))
rewards = torch.cat([x.rewards for x in alone])
print("rewards in one row = alone:  ", torch.allclose(packed.rewards, rewards, atol=1e-5))
print("log-probs in one row = alone:", all(
    torch.allclose(packed.log_probs[k, : len(cot)], alone[k].log_probs[0, : len(cot)], atol=1e-4)
    for k, cot in enumerate((a, b))))
print("another token in a: a's reward moves:", bool((packed.rewards[0] - other.rewards[0]).abs() > 1e-7),
      "  b's reward moves:", bool((packed.rewards[1] - other.rewards[1]).abs() > 1e-7))

# %% [markdown]
# ## 6. One update of stage 2: GRPO + BT (Eq. 7 and 10)
# Before the update the policy IS the one that sampled, so the ratio ρ is 1 for every token and the GRPO loss is minus
# the mean of the advantages, about 0. Its gradient is not 0. With four tokens of two CoTs, one with A = 1 and one
# with A = -1:

# %% tags=["same"]
log_probs = torch.log(torch.tensor([[0.5, 0.25], [0.5, 0.25]])).requires_grad_()
loss = grpo_loss(log_probs, log_probs.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 2))
loss.backward()
print(f"loss {abs(loss.item()):.4f}, gradient {log_probs.grad.tolist()}: the good CoT's tokens up, the other's down")

# %% [markdown]
# Now the whole update, with `mini.py`'s functions. The thinking is trained by GRPO and a small KL to the reference;
# the scoring by Bradley-Terry, rollout *i* of the winner against rollout *i* of the loser. One forward gives both.

# %%
policy, reference = model, DeScore.from_pretrained(f"{runs}/base", new_head=True).requires_grad_(False)
policy.make_trainable("full", vision=False)
optimizer = mini.make_optimizer(policy, llm=2e-4)
num_tokens = sum(len(cot) for row in group for cot in row)
before = policy.score(prefixes, group)  # (2, G)
loss = mini.rl_loss(policy, reference, pair, prefixes, group, advantages, num_tokens, num_pairs=1)
loss.backward()
norms = {part: sum(p.grad.norm() ** 2 for p in group if p.grad is not None) ** 0.5
         for part, group in policy.parameter_groups().items()}
mini.take_step(policy, optimizer)
after = policy.score(prefixes, group)
print(f"loss {loss:.4f}; gradient norms:", {part: f"{norm:.3f}" for part, norm in norms.items()})
for name, rewards in (("before", before), ("after", after)):
    print(f"{name:6s} margins r_A - r_B of rollout i:", " ".join(f"{m:+.4f}" for m in rewards[0] - rewards[1]))

# %% [markdown]
# ## Three questions
# **1.** All eight CoTs of a video earn the same. What does GRPO learn from this video, and what does BT?
# <details><summary>Answer</summary>GRPO nothing: the advantages are 0, as in section 4. BT learns as always: it
# compares the head's rewards of the two videos, and does not look at what the rules say.</details>
#
# **2.** The GRPO loss is 0 in every step of section 6. Is something broken?
# <details><summary>Answer</summary>No. At ρ = 1 it is minus the mean advantage over tokens, about 0 by construction.
# The gradient is -A/tokens for each token. Look at the rollout reward, not at the loss.</details>
#
# **3.** What would go wrong if CoT *b* could see CoT *a* in the packed row?
# <details><summary>Answer</summary>Its log-probs would not be those of the policy that sampled it, which wrote it
# alone, so ρ would not be 1; and its reward would depend on which other CoTs were sampled. At inference there is only
# one.</details>
#
# Next: `mini.py` from top to bottom, then `losses.py`, then the exercises of the course.
