"""The world of lab/post_training: what is asked for, rendered clips, the gold judge, the rewards.

A prompt asks for four attributes of six values each; camera and style are left open. Clips are small: 8 frames of
32 x 32 pixels, 4 seconds. The GOLD JUDGE stands for the truth: it is trained on rendered clips, whose attributes are
known, and no reward ever sees it (the control `--reward gold` aside).

Shapes: N clips, A = 4 attributes, T = 8 frames, S = 32 pixels a side.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import toy.world
from model import DeScore
from plumbing.jobs import task_seed
from plumbing.settings import InputError, atomic_write

ATTRIBUTES = {"colour": tuple(toy.world.COLOURS), "shape": toy.world.SHAPES, "dynamics": toy.world.VALUES["dynamics"],
              "environment": toy.world.VALUES["environment"]}
T, S, FPS = 8, 32, 2.0
TIMES = np.arange(T) / FPS


def rng_of(*parts) -> np.random.Generator:
    """A random stream from anything that names it, e.g. (seed, update): a run that goes on draws the same."""
    return np.random.default_rng(task_seed(*parts))


def noise_of(shape, *parts) -> torch.Tensor:
    """Normal noise, named in the same way."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(task_seed(*parts)))


# ---------------------------------------------------------------------------------------------------------------
# What is asked for, and clips that show it
# ---------------------------------------------------------------------------------------------------------------
def draw_asked(rng, n: int) -> torch.Tensor:
    """n prompts as (n, A) numbers of values; never a colour and shape of `toy.world.UNSEEN`."""
    rows = []
    for _ in range(n):
        values = toy.world.random_values(rng)
        colour, shape = values["subject"]
        parts = (colour, shape, values["dynamics"], values["environment"])
        rows.append([names.index(value) for names, value in zip(ATTRIBUTES.values(), parts)])
    return torch.tensor(rows)


def wish(row) -> dict:
    """(A,) numbers -> what `toy.world.prompt_text` puts into words."""
    colour, shape, dynamics, environment = (names[int(k)] for names, k in zip(ATTRIBUTES.values(), row))
    return {"subject": (colour, shape), "dynamics": dynamics, "camera": None, "environment": environment, "style": None}


def render(shown: torch.Tensor, rng) -> torch.Tensor:
    """(N, A) -> clips (N, T, S, S, 3) uint8 that show just that, at places and sizes drawn by rng."""
    values = [wish(row) | {"camera": "still", "style": "plain"} for row in shown]
    large = np.stack([toy.world.render_clip(v, rng, TIMES) for v in values])  # 64 x 64: smooth edges once it is halved
    return torch.from_numpy(large.reshape(-1, T, S, 2, S, 2, 3).mean((3, 5)).round().astype(np.uint8))


def to_unit(clips: torch.Tensor) -> torch.Tensor:
    """uint8 -> [-1, 1]"""
    return clips.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------
# The gold judge
# ---------------------------------------------------------------------------------------------------------------
def conv(wide_in: int, wide_out: int, stride: int) -> list[nn.Module]:
    """One layer of the judge's eye."""
    return [nn.Conv2d(wide_in, wide_out, 3, stride, 1), nn.BatchNorm2d(wide_out), nn.GELU()]


class Judge(nn.Module):
    """Reads the four attributes off a clip: colour, shape and environment from single frames, motion from all.

    The largest value over a frame finds the subject wherever it is, the mean over the frame is mostly background. A
    3-D network alone reads shapes badly.
    """

    def __init__(self):
        super().__init__()
        layers = ((3, 24, 1), (24, 48, 2), (48, 64, 1), (64, 96, 2), (96, 96, 1))
        self.eye = nn.Sequential(*(part for layer in layers for part in conv(*layer)))
        self.read = nn.Linear(2 * 96, 3 * 6)
        self.motion = nn.Sequential(
            nn.Conv3d(3, 16, (3, 5, 5), (1, 2, 2), (1, 2, 2)), nn.BatchNorm3d(16), nn.GELU(),
            nn.Conv3d(16, 32, 3, 2, 1), nn.BatchNorm3d(32), nn.GELU(), nn.Conv3d(32, 48, 3, (1, 2, 2), 1), nn.GELU(),
            nn.Flatten(), nn.Linear(48 * 4 * 4 * 4, 96), nn.GELU(), nn.Linear(96, 6))

    def features(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """clips (N, F, S, S, 3) in [-1, 1] -> subject and background of each frame, both (N, F, 96)."""
        maps = self.eye(clips.flatten(0, 1).permute(0, 3, 1, 2))
        return maps.amax((2, 3)).unflatten(0, clips.shape[:2]), maps.mean((2, 3)).unflatten(0, clips.shape[:2])

    def forward(self, clips: torch.Tensor, frames=slice(None)) -> torch.Tensor:
        """(N, T, S, S, 3) -> logits (N, A, 6). frames: those that the eye reads; motion always gets all T."""
        still = self.read(torch.cat(self.features(clips[:, frames]), -1)).mean(1).unflatten(-1, (3, 6))  # (N, 3, 6)
        motion = self.motion(clips.permute(0, 4, 1, 2, 3))  # (N, 6)
        return torch.stack([still[:, 0], still[:, 1], motion, still[:, 2]], 1)

    @torch.no_grad()
    def right(self, asked: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
        """(N, A) bool: which asked attributes the clip shows."""
        seen = torch.cat([self(part, slice(0, T, 2)).argmax(-1) for part in clips.split(128)])
        return seen == asked


def train_judge(seed: int, steps: int, pool: int, progress=True) -> tuple[Judge, dict[str, float]]:
    """-> the judge, and the share of each attribute that it reads right on rendered clips it has not seen.

    Half of the clips are blurred or noisy: generated clips are, and the judge must not take that for content.
    """
    rng, torch_rng = rng_of(seed, "judge"), torch.Generator().manual_seed(task_seed(seed, "judge noise"))
    torch.manual_seed(task_seed(seed, "judge init"))
    shown = draw_asked(rng, pool)
    clips, judge = render(shown, rng), Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="gold judge", disable=not progress)
    for step in bar:
        picks = rng.integers(pool, size=64)
        x = to_unit(clips[picks])
        if step % 3 == 0:
            x = F.avg_pool3d(x.permute(0, 4, 1, 2, 3), (1, 3, 3), 1, (0, 1, 1)).permute(0, 2, 3, 4, 1)
        loud = 0.25 * torch.rand(64, 1, 1, 1, 1, generator=torch_rng) * (rng.random() < 0.7)
        x = (x + loud * torch.randn(x.shape, generator=torch_rng)).clamp(-1, 1)
        logits = judge(x, sorted(rng.choice(T, 2, replace=False)))  # two frames: a quarter of the work
        loss = F.cross_entropy(logits.flatten(0, 1), shown[picks].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    judge.eval().requires_grad_(False)
    fresh = draw_asked(rng, 256)
    right = judge.right(fresh, to_unit(render(fresh, rng))).float().mean(0)
    return judge, dict(zip(ATTRIBUTES, right.tolist()))


def gold_judge(out: str, steps: int, pool: int) -> Judge:
    """The judge of a folder, trained once, kept in OUT/judge.pt: one for all seeds, or they could not be compared.

    InputError: it was trained for another number of steps, or on another pool.
    """
    path = os.path.join(out, "judge.pt")
    if not os.path.exists(path):
        judge, accuracy = train_judge(0, steps, pool)
        print("gold judge, rendered clips: " + ", ".join(f"{name} {share:.3f}" for name, share in accuracy.items()))
        os.makedirs(out, exist_ok=True)
        with atomic_write(path, "wb") as file:
            torch.save({"steps": steps, "pool": pool, "accuracy": accuracy, "weights": judge.state_dict()}, file)
    kept, judge = torch.load(path), Judge()
    if (kept["steps"], kept.get("pool", pool)) != (steps, pool):  # older files did not keep the pool
        raise InputError(f"{path}: trained with other --judge-steps ({kept['steps']}) or --pool; delete its folder.")
    judge.load_state_dict(kept["weights"])
    return judge.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# Rewards
# ---------------------------------------------------------------------------------------------------------------
class Reward:
    """--reward: a DeScore folder, or a control: `gold` (attributes that are right, 0 to 4) or `random`."""

    def __init__(self, kind: str, judge: Judge, seed: int):
        self.kind, self.judge, self.seed = kind, judge, seed
        self.model = None if kind in ("gold", "random") else DeScore.from_pretrained(kind)

    def __call__(self, asked: torch.Tensor, clips: torch.Tensor, *name) -> torch.Tensor:
        """asked (N, A), clips (N, T, S, S, 3) in [-1, 1] -> (N,). `name` seeds the random reward.

        DeScore THINKS first: without its CoT the toy's reward is useless on generated clips. One that is not finite
        raises: any number put in its place would become an advantage of its whole group.
        """
        if self.kind == "random":
            return noise_of(len(asked), self.seed, "random reward", *name)
        if self.kind == "gold":
            return self.judge.right(asked, clips).float().sum(1)
        frames = ((clips.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        frames = frames.repeat_interleave(2, 2).repeat_interleave(2, 3)  # the toy DeScore watches 64 x 64 pixels
        prompts = [toy.world.prompt_text(wish(row)) for row in asked]
        rewards = self.model.reward(list(frames.numpy()), prompts, source_fps=FPS, max_new_tokens=80)  # as in the demo
        if rewards.shape != (len(asked),) or not rewards.isfinite().all():
            bad = next((p for p, r in zip(prompts, rewards.flatten()) if not r.isfinite()), prompts[0])
            raise InputError(f"a clip of {bad!r} has no finite reward; nothing is trained on it.")
        return rewards.float().cpu()
