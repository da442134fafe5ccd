"""A small flow-matching video generator for the toy world: patches -> PCA -> a diffusion transformer.

It is trained on rendered clips, with a share of WRONG prompts, so that it shows what is asked only about half of the
time: the room in which a reward can help. In pixels a model of this size learns no motion; on the leading principal
components of each patch (the toy's stand-in for a video autoencoder) it does.

Shapes: N clips, P = 64 patches of 2 x 8 x 8 pixels, C = 32 components. x, velocities, noise: (N, P, C).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lab.post_training import flow
from lab.post_training.world import ATTRIBUTES, S, T, draw_asked, noise_of, render, rng_of, to_unit
from plumbing.jobs import task_seed
from toy.base_model import make_update

SIDE, P, C = 8, (T // 2) * (S // 8) ** 2, 32


# ---------------------------------------------------------------------------------------------------------------
# Pixels and latents
# ---------------------------------------------------------------------------------------------------------------
def to_patches(clips: torch.Tensor) -> torch.Tensor:
    """(N, T, S, S, 3) -> (N, P, 384)"""
    x = clips.reshape(-1, T // 2, 2, S // SIDE, SIDE, S // SIDE, SIDE, 3)  # time, 2, row, SIDE, column, SIDE, colour
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(1, 3)


def from_patches(patches: torch.Tensor) -> torch.Tensor:
    """The way back."""
    x = patches.reshape(-1, T // 2, S // SIDE, S // SIDE, 2, SIDE, SIDE, 3)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, T, S, S, 3)


class Latents(nn.Module):
    """C principal components of a patch, partly whitened: the eye sees the small ones too, but noise must not rule.

    Component c is divided by (variance_c)^.35, then all by one number that makes their mean variance 1, that of ε.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2 * SIDE * SIDE * 3))
        self.register_buffer("basis", torch.zeros(2 * SIDE * SIDE * 3, C))
        self.register_buffer("scale", torch.ones(C))

    def fit(self, clips: torch.Tensor) -> float:
        """From clips in [-1, 1]. -> the share of the variance that the C components keep"""
        patches = to_patches(clips).flatten(0, 1)
        self.mean = patches.mean(0)
        variance, basis = torch.linalg.eigh(torch.cov((patches - self.mean).T).double())  # rising order
        kept = variance.flip(0)[:C].float()
        self.basis, scale = basis.flip(1)[:, :C].float().contiguous(), kept**0.35
        self.scale = scale * (kept / scale**2).mean().sqrt()
        return (kept.sum() / variance.sum()).item()

    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """(N, T, S, S, 3) in [-1, 1] -> (N, P, C)"""
        return (to_patches(clips) - self.mean) @ self.basis / self.scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back, without what the other components held."""
        return from_patches((latents * self.scale) @ self.basis.T + self.mean).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------------
# The transformer
# ---------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Attention over all patches, then an MLP; time and prompt shift, scale and gate both (adaLN-zero, DiT)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """h (N, tokens, width), c (N, width) -> (N, tokens, width): attention and an MLP, each scaled, shifted and
        gated by the condition."""
        scale, shift, gate, scale2, shift2, gate2 = self.modulate(c)[:, None].chunk(6, -1)  # (N, 1, width) each
        q, k, v = self.qkv(self.norm(h) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + gate2 * self.down(F.gelu(self.up(self.norm(h) * (1 + scale2) + shift2), approximate="tanh"))


class Generator(nn.Module):
    """v_θ(x, t, asked). Starts at 0 everywhere: head and gates do."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4):
        super().__init__()
        self.shape = {"width": width, "layers": layers, "heads": heads}
        self.latents = Latents()
        self.embed_x, self.embed_place = nn.Linear(C, width), nn.Parameter(0.3 * torch.randn(P, width))
        self.embed_asked = nn.Parameter(0.5 * torch.randn(len(ATTRIBUTES), 6, width))
        self.embed_time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head_modulate, self.head = nn.Linear(width, 2 * width), nn.Linear(width, C)
        for layer in (self.head_modulate, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """x (N, P, C), t (N,) in (0, 1], asked (N, A) -> velocity (N, P, C)"""
        waves = 3 * t[:, None] * torch.exp(torch.linspace(0, math.log(200), 32))
        prompt = self.embed_asked[torch.arange(len(ATTRIBUTES)), asked].sum(1)  # (N, width)
        c = F.silu(self.embed_time(torch.cat([waves.sin(), waves.cos()], -1)) + prompt)
        h = self.embed_x(x) + self.embed_place
        for block in self.blocks:
            h = block(h, c)
        scale, shift = self.head_modulate(c)[:, None].chunk(2, -1)
        return self.head(self.head_norm(h) * (1 + scale) + shift)

    def velocity(self, x: torch.Tensor, t: float, asked: torch.Tensor) -> torch.Tensor:
        """The same at one time for all clips."""
        return self(x, torch.full((len(x),), t), asked)


def draw_times(rng_name: tuple, n: int) -> torch.Tensor:
    """(n,) times for training, mostly in the noisier half, where the content is laid out: sigmoid(.6 + normal)."""
    return torch.sigmoid(0.6 + noise_of(n, *rng_name)).clamp(0.02, 0.999)


def train_base(seed: int, steps: int, wrong: float, pool: int, batch: int = 64, progress=True):
    """-> the generator, its last loss, and the share of variance that its latents keep.

    Each attribute of each prompt is replaced by a random one with probability `wrong`.
    """
    rng = rng_of(seed, "base")
    torch.manual_seed(task_seed(seed, "base init"))
    shown, generator = draw_asked(rng, pool), Generator()
    clips = to_unit(render(shown, rng))
    kept = generator.latents.fit(clips[:1024])
    latents = generator.latents.encode(clips)
    update, losses = make_update(list(generator.named_parameters()), steps, 1e-3), []
    bar = tqdm(range(steps), desc="base", disable=not progress)
    for step in bar:
        picks = rng.integers(pool, size=batch)
        replaced = torch.from_numpy(rng.random((batch, len(ATTRIBUTES))) < wrong)
        asked = torch.where(replaced, torch.from_numpy(rng.integers(6, size=replaced.shape)), shown[picks])
        t, noise = draw_times((seed, "t", step), batch), noise_of((batch, P, C), seed, "noise", step)
        v = generator(flow.noised(latents[picks], noise, t[:, None, None]), t, asked)
        loss = flow.flow_error(v, latents[picks], noise).mean()
        loss.backward()
        update()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
    return generator.eval(), sum(losses[-20:]) / len(losses[-20:]), kept


# ---------------------------------------------------------------------------------------------------------------
# Sampling, and a step's log-prob
# ---------------------------------------------------------------------------------------------------------------
def step_mean(generator: Generator, x: torch.Tensor, asked, t: float, t_next: float, sigma: float) -> torch.Tensor:
    """μ of one step under this generator: flow.py (2)."""
    return flow.sde_mean(x, generator.velocity(x, t, asked), t, t_next, sigma)


def sample(
    generator: Generator, asked: torch.Tensor, start: torch.Tensor, steps: int, noisy=(),
    noise=flow.NOISES["flow-grpo"], name=(),
):
    """start (N, P, C), noise -> latents (N, P, C), and the SDE steps: flow.sample, in equal steps from 1 to 0.

    noise: arguments of flow.noise_scale; `name` seeds what is drawn.
    """
    return flow.sample(lambda x, t: generator.velocity(x, t, asked), start, flow.grid(steps), noisy, noise,
                       lambda k: noise_of(start.shape, *name, k))
