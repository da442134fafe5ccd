"""Post-training Wan-2.1 with DeScore as the reward: Flow-GRPO, LongCat-GRPO or Flow-DPO, on LoRA.

    WAN=lab.post_training.wan
    python -m $WAN --method grpo --reward runs/stage2/model --data prompts.txt --out runs/wan
    python -m $WAN --method dpo --data dpo.csv --out runs/wan           pairs of best_of.py --make-pairs
    torchrun --nproc_per_node 8 -m $WAN --method grpo --reward runs/stage2/model --data prompts.txt --out runs/wan

Out: the LoRA, for `WanPipeline.load_lora_weights`, metrics.jsonl, and state.pt: the same line started again goes on
after the last saving, with the result it would have had. The equations are lab/post_training/flow.py's, the policy's
loss is Eq. 7. Each rank holds a whole Wan and a whole reward model, makes the clips of its own prompts, and only the
LoRA's gradients are summed. One clip at a time, in sampling and in training: memory is that of one clip, and the same
kernels run twice, so that the replayed ratio is exactly 1.

Tested on a tiny random Wan on a CPU, one rank and two. NOT RUN: with Wan's weights, or on a GPU. Memory and time as
computed: lab/serve/README.md. Needs requirements-wan.txt.
"""

import contextlib
import dataclasses
import os
import random

import numpy as np
import torch
import torch.distributed as dist

import data
import parallel
from lab.post_training import flow
from losses import group_advantages, grpo_loss
from model import DeScore
from plumbing.jobs import task_seed
from plumbing.logs import read_metrics
from plumbing.settings import (
    InputError,
    arg,
    cli,
    first_line,
    flag_of,
    parse,
    require,
    writable,
    write_jsonl,
    atomic_write,
)
from plumbing.video import open_clip

FPS = 16.0  # of Wan's clips
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FREE = ("wan", "data", "reward", "out", "updates", "save_every")  # may change when a run goes on: length, and places


@dataclasses.dataclass
class Settings:
    """The flags. Defaults marked * are Flow-GRPO's or LongCat's; the others are ours, and none was tuned on Wan."""

    method: str | None = arg(None, "grpo or dpo", choices=["grpo", "dpo"])
    wan: str = arg("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan in diffusers' layout: a folder or its name on the hub")
    data: str | None = arg(None, "grpo: a text file, one prompt a line; dpo: a CSV of preference pairs")
    reward: str | None = arg(None, "grpo: a DeScore folder")
    out: str | None = arg(None, "folder for the LoRA and metrics.jsonl")
    think: bool = arg(True, "think before scoring; --no-think is fast")
    max_new_tokens: int = arg(4096, "CoT tokens at most", at_least=1)
    frames: int = arg(81, "frames of a clip: 4 n + 1", at_least=1)
    height: int = arg(480, "pixels, a multiple of 16", at_least=16)
    width: int = arg(832, "pixels, a multiple of 16", at_least=16)
    steps: int = arg(10, "sampling steps *", at_least=2)
    shift: float = arg(3.0, "how far the steps are moved towards noise; Wan: 3 at 480p, 5 at 720p", above=0)
    guidance: float = arg(5.0, "classifier-free guidance of the clips; 1: none, half the work", at_least=1)
    noise: str = arg("flow-grpo", "flow-grpo: all steps but the last are SDE steps; longcat: one early, shared start",
                     choices=list(flow.NOISES))
    group: int = arg(8, "clips per prompt", at_least=2)
    batch: int = arg(8, "prompts (grpo) or pairs (dpo) per update, over all ranks", at_least=1)
    updates: int = arg(100, "updates", at_least=1)
    passes: int = arg(1, "optimizer steps on the same clips; beyond 1 the clip range matters", at_least=1)
    clip: float = arg(1e-4, "range of the ratio, which is the D-th root of the true one *", above=0)
    kl: float = arg(0.0, "weight of the KL to the Wan that it began as", at_least=0)
    beta: float = arg(500.0, "dpo: weight of the implicit reward", above=0)
    lr: float = arg(1e-4, "learning rate of the LoRA", above=0)
    lora_r: int = arg(32, "rank of the LoRA; its alpha is twice that *", at_least=1)
    save_every: int = arg(20, "updates between savings of LoRA and state", at_least=1)
    seed: int = arg(0, "of clips and LoRA")


class Wan:
    """The generator: Wan's pipeline with a LoRA, its text encoder used up at the start."""

    def __init__(self, pipe, prompts: list[str], s: Settings, device="cpu"):
        from peft import LoraConfig

        self.pipe, self.s, self.device = pipe.to(device), s, device
        # Not Wan's UniPC: its step looks back, so it has no log p. Nor diffusers' Euler: it shifts twice (flow.grid).
        self.times = flow.grid(s.steps, s.shift)
        with torch.no_grad():
            # 512 places, as __call__ has (encode_prompt's own default is 226): no mask hides the padding
            self.embeds = {p: pipe.encode_prompt(p, None, False, max_sequence_length=512)[0] for p in {*prompts, ""}}
        pipe.text_encoder = None  # 5.7 B parameters, more than four times the generator
        self.transformer, self.dtype = pipe.transformer, pipe.transformer.dtype
        self.transformer.requires_grad_(False)
        # diffusers' own method: it takes every released peft from 0.17 on, and disable_adapters below asks for it
        self.transformer.add_adapter(LoraConfig(r=s.lora_r, lora_alpha=2 * s.lora_r, target_modules=LORA_TARGETS))
        self.trained = [p for p in self.transformer.parameters() if p.requires_grad]
        assert self.trained, f"no layer of this transformer is called {LORA_TARGETS}"
        for parameter in self.trained:
            parameter.data = parameter.data.float()  # in bf16 small updates round away
        self.transformer.enable_gradient_checkpointing()
        scale = pipe.vae_scale_factor_spatial
        self.shape = (1, self.transformer.config.in_channels, (s.frames - 1) // pipe.vae_scale_factor_temporal + 1,
                      s.height // scale, s.width // scale)

    def velocity(self, x: torch.Tensor, t: float, prompt: str, guidance: float = 1.0) -> torch.Tensor:
        """v_θ(x, t, prompt), fp32; with guidance w it is v_empty + w (v − v_empty), and THAT is the policy."""
        time = torch.full((len(x),), t * self.pipe.scheduler.config.num_train_timesteps, device=x.device)

        def predict(text):
            embeds = self.embeds[text].expand(len(x), -1, -1)
            return self.transformer(x.to(self.dtype), time, embeds, return_dict=False)[0].float()

        if guidance == 1:
            return predict(prompt)
        empty = predict("")
        return empty + guidance * (predict(prompt) - empty)

    @contextlib.contextmanager
    def reference(self):
        """Inside: Wan as it was, without its LoRA and without gradients."""
        self.transformer.disable_adapters()
        try:
            with torch.no_grad():
                yield
        finally:
            self.transformer.enable_adapters()

    def sample(self, prompt: str, start_seed: int, seed: int, noisy: set[int]) -> tuple[torch.Tensor, list[flow.Step]]:
        """One clip's latents, and its SDE steps: those numbered in `noisy`; the others are Euler."""
        generator = torch.Generator().manual_seed(seed)
        return flow.sample(
            lambda x, t: self.velocity(x, t, prompt, self.s.guidance), self.draw(start_seed), self.times, noisy,
            flow.NOISES[self.s.noise], lambda _: torch.randn(self.shape, generator=generator).to(self.device),
        )

    def draw(self, seed: int) -> torch.Tensor:
        """Start noise, the same on every device."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def noisy_steps(self, number: int) -> set[int]:
        """Which steps are SDE steps for this prompt: one early (LongCat), or all but the last: its noise stays."""
        draw = random.Random(task_seed(self.s.seed, number)).randrange
        return flow.noisy_steps(self.s.noise, self.s.steps, draw)

    def grpo_step_loss(self, prompt: str, step: flow.Step, advantage: torch.Tensor, count: int) -> torch.Tensor:
        """Eq. 7 for one step of one clip: advantage (1,). `count`: clips x steps of the whole update."""
        at = (step.sigma, step.t, step.t_next)
        weight = flow.step_weight(step.t, step.t_next) if self.s.noise == "longcat" else 1.0
        if self.s.kl:
            with self.reference():
                v = self.velocity(step.x, step.t, prompt, self.s.guidance)
                ref_mean = flow.sde_mean(step.x, v, step.t, step.t_next, step.sigma)
        v = self.velocity(step.x, step.t, prompt, self.s.guidance)
        mean = flow.sde_mean(step.x, v, step.t, step.t_next, step.sigma)
        log_prob = flow.step_log_prob(step.x_next, mean, *at)  # (1,)
        loss = weight * grpo_loss(log_prob[:, None], step.log_prob[:, None], advantage,
                                  torch.ones_like(log_prob)[:, None], self.s.clip, self.s.clip, denominator=count)
        if self.s.kl:
            loss = loss + self.s.kl * weight**2 * flow.step_kl(mean, ref_mean, *at).sum() / count
        return loss

    def dpo_pair_loss(self, prompt: str, chosen: torch.Tensor, rejected: torch.Tensor, seed: int) -> torch.Tensor:
        """Flow-DPO for one pair of latents (1, C, F', H', W'): flow.py (7), at one t and one ε for both.

        t is uniform, then shifted as the sampler's steps are. Without guidance: what is trained is v itself.
        """
        t = flow.shifted(random.Random(seed).random(), self.s.shift)
        noise, errors = self.draw(seed), []
        for latents in (chosen, rejected):
            x = flow.noised(latents, noise, t)
            with self.reference():
                ref_error = flow.flow_error(self.velocity(x, t, prompt), latents, noise)
            errors += [flow.flow_error(self.velocity(x, t, prompt), latents, noise), ref_error]
        return flow.flow_dpo_loss(*errors, beta=self.s.beta)

    # -- pixels and latents: Wan's latents have a mean and a spread per channel ------------------------------------
    def latent_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and spread per channel, each (1, C, 1, 1, 1)."""
        config = self.pipe.vae.config
        return tuple(torch.tensor(v, device=self.device).view(1, -1, 1, 1, 1)
                     for v in (config.latents_mean, config.latents_std))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of one clip -> (F, H, W, 3) in [0, 1], as DeScore.reward takes them."""
        mean, std = self.latent_scale()
        video = self.pipe.vae.decode((latents * std + mean).to(self.pipe.vae.dtype), return_dict=False)[0]
        return (video[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).cpu()

    @torch.no_grad()
    def encode(self, path: str) -> torch.Tensor:
        """The first frames of a video file, at Wan's rate -> latents. InputError: the clip is too short."""
        s, clip = self.s, open_clip(path)
        if clip.seconds < (s.frames - 0.5) / FPS:
            raise InputError(f"{path}: lasts {clip.seconds:.2f} s, and --frames {s.frames} at {FPS:g} a second need "
                             f"{s.frames / FPS:.2f} s; lower it.")
        # Not frame by frame: of a clip with 30 a second Wan would learn slow motion.
        frames, _ = clip.frames(np.arange(s.frames) / FPS, (s.height, s.width))
        pixels = torch.from_numpy(frames).to(self.device, self.pipe.vae.dtype).permute(3, 0, 1, 2)[None] / 127.5 - 1
        mean, std = self.latent_scale()
        return (self.pipe.vae.encode(pixels).latent_dist.mode().float() - mean) / std

    def save(self, out: str, optimizer, done: int) -> None:
        """The LoRA, as `WanPipeline.load_lora_weights` reads it, and what a run needs to go on."""
        from peft import get_peft_model_state_dict

        told = self.transformer.peft_config["default"].to_dict()  # or it loads with alpha = r: at half its strength
        self.pipe.save_lora_weights(out, transformer_lora_layers=get_peft_model_state_dict(self.transformer),
                                    transformer_lora_adapter_metadata=told)
        state = {"settings": dataclasses.asdict(self.s), "done": done, "optimizer": optimizer.state_dict()}
        with atomic_write(os.path.join(out, "state.pt"), "wb") as file:
            torch.save({**state, "trained": [parameter.detach().cpu() for parameter in self.trained]}, file)

    def resume(self, out: str, optimizer) -> int:
        """Reads OUT/state.pt, if there, -> updates done. InputError: it had other settings."""
        path = os.path.join(out, "state.pt")
        if not os.path.exists(path):
            return 0
        state, now = torch.load(path, map_location="cpu"), dataclasses.asdict(self.s)
        if changed := [flag_of(name) for name in now if name not in FREE and state["settings"].get(name) != now[name]]:
            raise InputError(f"{path}: was run with other {', '.join(changed)}; give another --out.")
        for parameter, kept in zip(self.trained, state["trained"], strict=True):
            parameter.data.copy_(kept)
        optimizer.load_state_dict(state["optimizer"])
        return state["done"]


# ---- The two updates -----------------------------------------------------------------------------------------
def grpo_update(wan: Wan, items: list[tuple[int, str]], score, optimizer, s: Settings, ranks) -> dict[str, float]:
    """COLLECTIVE: clips, rewards, advantages, optimizer steps. items: (number, prompt), the same on all ranks.

    score(clips, prompts) -> rewards (G,). One that fails must raise: a made-up number would poison its whole group.
    InputError: a reward that is not finite.
    """
    groups, rewards, longcat = [], [], s.noise == "longcat"
    for number, prompt in ranks.share(items):
        # 1. G clips. LongCat: one start noise for all of them
        noisy = wan.noisy_steps(number)
        starts = [task_seed(s.seed, number, "start", 0 if longcat else k) for k in range(s.group)]
        clips = [wan.sample(prompt, start, task_seed(s.seed, number, k), noisy) for k, start in enumerate(starts)]
        groups.append([trail for _, trail in clips])
        # 2. Their rewards
        rewards.append(score([wan.decode(latents) for latents, _ in clips], [prompt] * s.group))
        if not rewards[-1].isfinite().all():
            raise InputError(f"a clip of {prompt[:60]!r} has a reward that is not finite; nothing is trained on it.")
    # 3. Advantages. LongCat divides by the widest group of ALL ranks
    everyone = torch.tensor(ranks.gather_objects(torch.stack(rewards).tolist()))  # (S of all ranks, G)
    advantages = (flow.shared_spread if longcat else group_advantages)(everyone).to(wan.device)
    advantages = advantages[len(groups) * ranks.rank :][: len(groups)]  # (S, G)
    # 4. Eq. 7, one step of one clip at a time; divided by all steps of all ranks
    count, total = len(items) * s.group * len(noisy), 0.0
    for _ in range(s.passes):
        for (_, prompt), trails, row in zip(ranks.share(items), groups, advantages):
            for trail, advantage in zip(trails, row):
                for step in trail:
                    loss = wan.grpo_step_loss(prompt, step, advantage[None], count)
                    loss.backward()
                    total += loss.item() / s.passes
        norm = take_step(wan, optimizer, ranks)
    spread = everyone.std(dim=1).mean().item()
    return {"reward": everyone.mean().item(), "group_std": spread, **ranks.sum({"loss": total}), "grad_norm": norm}


def dpo_update(wan: Wan, items: list[tuple[int, data.PreferencePair]], optimizer, s: Settings, ranks):
    """COLLECTIVE: one optimizer step on a batch of pairs. The videos are encoded anew each time: no cache to fill."""
    total = 0.0
    for number, pair in ranks.share(items):
        chosen, rejected = pair.videos if pair.label > 0 else pair.videos[::-1]
        seed = task_seed(s.seed, number)
        loss = wan.dpo_pair_loss(pair.prompt, wan.encode(chosen), wan.encode(rejected), seed) / len(items)
        loss.backward()
        total += loss.item()
    return {**ranks.sum({"loss": total}), "grad_norm": take_step(wan, optimizer, ranks)}


def take_step(wan: Wan, optimizer, ranks) -> float:
    """COLLECTIVE: sums the gradients over ranks (the losses are divided by counts of all), clips at norm 1, steps."""
    for parameter in wan.trained:
        if ranks.world > 1:
            dist.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(wan.trained, 1.0, error_if_nonfinite=True).item()
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ---- The script -----------------------------------------------------------------------------------------------
def check(s: Settings, ranks) -> None:
    """InputError for flags that make no sense, before anything large is read."""
    require(s, method="grpo or dpo", data="prompts or pairs", out="a folder")
    if s.method == "grpo":
        require(s, reward="a DeScore folder")
    if s.frames % 4 != 1 or s.height % 16 or s.width % 16:
        raise InputError("--frames must be 4 n + 1 (81), --height and --width multiples of 16.")
    if s.batch % ranks.world:
        raise InputError(f"--batch {s.batch} must be a multiple of the {ranks.world} ranks.")


def read_items(s: Settings) -> list:
    """Prompts, or pairs with a winner. InputError: none, or another kind of file than the method takes."""
    if s.method == "dpo":
        items = [pair for pair in data.read_pairs(s.data) if pair.label]
    else:
        if s.data.endswith(".csv"):  # its header would be the first prompt
            raise InputError(f"{s.data}: is a CSV; --method grpo takes a text file, one prompt a line.")
        try:
            with open(s.data, encoding="utf-8-sig") as file:
                items = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{s.data}: cannot be read as a text file of prompts ({first_line(error)}).") from error
    if not items:
        raise InputError(f"{s.data}: holds nothing to train on.")
    return items


def open_pipeline(path: str, dtype: torch.dtype):
    """Wan's pipeline; the VAE in fp32, as published. InputError: a package or the weights are missing."""
    try:
        import ftfy  # noqa: F401  diffusers cleans prompts with it, and without it goes on: other tokens, without a word
        from diffusers import WanPipeline
    except ImportError:
        raise InputError("lab.post_training.wan needs diffusers, ftfy: pip install -r requirements-wan.txt.") from None
    try:
        return WanPipeline.from_pretrained(path, dtype={"vae": torch.float32, "default": dtype})
    except (OSError, ValueError) as error:
        raise InputError(f"--wan {path}: cannot be opened ({first_line(error)}); hf download {Settings.wan}") from error


def main(argv=None) -> None:
    """Update after update, and the LoRA every --save-every."""
    s = parse(Settings, __doc__, argv)
    ranks = parallel.start(s.seed)
    check(s, ranks)
    items, dtype = read_items(s), torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    writable([s.out])
    pipe = open_pipeline(s.wan, dtype)
    prompts = [item.prompt if s.method == "dpo" else item for item in items]
    wan = Wan(pipe, prompts, s, ranks.device)
    model = DeScore.from_pretrained(s.reward, ranks.device, dtype).eval() if s.method == "grpo" else None

    def score(clips, prompts):
        return model.reward(clips, prompts, s.think, s.max_new_tokens, source_fps=FPS).cpu()

    optimizer = torch.optim.AdamW(wan.trained, lr=s.lr, weight_decay=0.0)
    done = wan.resume(s.out, optimizer)
    if ranks.is_main:  # lines behind the last saving: those updates are made again
        write_jsonl(os.path.join(s.out, "metrics.jsonl"), [m for m in read_metrics(s.out) if m["step"] <= done])
    for update in range(done + 1, s.updates + 1):
        numbers = range((update - 1) * s.batch, update * s.batch)
        batch = [(number, items[number % len(items)]) for number in numbers]
        if s.method == "grpo":
            metrics = grpo_update(wan, batch, score, optimizer, s, ranks)
        else:
            metrics = dpo_update(wan, batch, optimizer, s, ranks)
        ranks.print(f"update {update}", *(f"{name} {value:.4g}" for name, value in metrics.items()))
        if ranks.is_main:
            write_jsonl(os.path.join(s.out, "metrics.jsonl"), [{"step": update, **metrics}], add=True)
            if update % s.save_every == 0 or update == s.updates:
                wan.save(s.out, optimizer, update)
    ranks.finish()


if __name__ == "__main__":
    cli(main)
