"""Wan-2.1 as the generator that wan.py trains: opened, given a LoRA, sampled; its losses; its latents; what is saved.

Shapes: latents (1, C, F', H', W') of one clip; pixels (F, H, W, 3). s is everywhere wan.py's Settings.
"""

import contextlib
import dataclasses
import os
import random

import numpy as np
import torch

from lab.post_training import flow
from losses import clipped_tokens, grpo_loss, policy_ratio
from plumbing.jobs import task_seed
from plumbing.settings import InputError, atomic_write, first_line
from plumbing.video import open_clip

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FPS = 16.0  # of Wan's clips
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def open_pipeline(path: str, dtype: torch.dtype):
    """Wan's pipeline; the VAE in fp32, as published. InputError: a package or the weights are missing; another Wan."""
    try:
        import ftfy  # noqa: F401  diffusers cleans prompts with it, and without it goes on: other tokens, without a word
        from diffusers import WanPipeline
    except ImportError:
        raise InputError("lab.post_training.wan needs diffusers, ftfy: pip install -r requirements-wan.txt.") from None
    try:
        pipe = WanPipeline.from_pretrained(path, dtype={"vae": torch.float32, "default": dtype})
    except (OSError, ValueError) as error:
        raise InputError(f"--wan {path}: cannot be opened ({first_line(error)}); hf download {WAN}") from error
    experts = pipe.transformer_2 is not None or pipe.config.boundary_ratio  # one alone would be trained and sampled
    channels = pipe.transformer.config.in_channels, pipe.transformer.config.out_channels
    if experts or pipe.config.expand_timesteps or channels[0] != channels[1]:
        raise InputError(f"--wan {path}: is not Wan2.1's text-to-video model but Wan2.2's, or an image-to-video one, "
                         f"which are sampled otherwise; take {WAN}.")
    return pipe


class Wan:
    """The generator: Wan's pipeline with a LoRA, its text encoder used up at the start."""

    def __init__(self, pipe, prompts: list[str], s, device="cpu"):
        from peft import LoraConfig

        self.pipe, self.s, self.device = pipe.to(device), s, device
        # Not Wan's UniPC: its step looks back, so it has no log p. Nor diffusers' Euler: it shifts twice (flow.grid).
        self.times = flow.grid(s.steps, s.shift)
        with torch.no_grad():
            # 512 places, as __call__ has (encode_prompt's own default is 226): no mask hides the padding. Those of
            # this rank's prompts, in the host's memory: at 4 MB each, 20,000 are 84 GB
            self.embeds = {p: pipe.encode_prompt(p, None, False, max_sequence_length=512)[0].cpu()
                           for p in {*prompts, ""}}
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
            embeds = self.embeds[text].to(x.device).expand(len(x), -1, -1)
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

    def grpo_step_loss(self, prompt: str, step: flow.Step, advantage: torch.Tensor, count: int) -> dict:
        """Eq. 7 for one step of one clip: advantage (1,). `count`: clips x steps of the whole update.

        -> {"loss"}, to go backward from; for the log "clipped" (0 or 1), "ratio_off" (abs(ratio - 1)), with --kl "kl":
        scalars, divided by count.
        """
        at = (step.sigma, step.t, step.t_next)
        weight = flow.step_weight(step.t, step.t_next) if self.s.noise == "longcat" else 1.0
        if self.s.kl:
            with self.reference():
                v = self.velocity(step.x, step.t, prompt, self.s.guidance)
                ref_mean = flow.sde_mean(step.x, v, step.t, step.t_next, step.sigma)
        v = self.velocity(step.x, step.t, prompt, self.s.guidance)
        mean = flow.sde_mean(step.x, v, step.t, step.t_next, step.sigma)
        log_prob, old = flow.step_log_prob(step.x_next, mean, *at)[:, None], step.log_prob[:, None]  # (1, 1)
        policy = log_prob, old, advantage, torch.ones_like(old), self.s.clip, self.s.clip
        numbers = {"loss": weight * grpo_loss(*policy, denominator=count), "clipped": clipped_tokens(*policy) / count,
                   "ratio_off": (policy_ratio(log_prob, old, torch.ones_like(old)) - 1).abs().sum() / count}
        if self.s.kl:
            numbers["kl"] = flow.step_kl(mean, ref_mean, *at).sum() / count
            numbers["loss"] = numbers["loss"] + self.s.kl * weight**2 * numbers["kl"]
        return numbers

    def dpo_pair_loss(self, prompt: str, chosen: torch.Tensor, rejected: torch.Tensor, seed: int) -> dict:
        """Flow-DPO for one pair of latents (1, C, F', H', W'): flow.py (7), at one t and one ε for both.

        t is uniform, then shifted as the sampler's steps are. Without guidance: what is trained is v itself.
        -> {"loss"}, and for the log "pair_accuracy" (0 or 1), and "winner_error_rise", by how much worse than the
        reference the policy is at the winner; scalars.
        """
        t = flow.shifted(random.Random(seed).random(), self.s.shift)
        noise, errors = self.draw(seed), []
        for latents in (chosen, rejected):
            x = flow.noised(latents, noise, t)
            with self.reference():
                ref_error = flow.flow_error(self.velocity(x, t, prompt), latents, noise)
            errors += [flow.flow_error(self.velocity(x, t, prompt), latents, noise), ref_error]
        winner, loser = errors[0] - errors[1], errors[2] - errors[3]  # (1,) each
        return {"loss": flow.flow_dpo_loss(*errors, beta=self.s.beta),
                "pair_accuracy": (winner < loser).float().mean(), "winner_error_rise": winner.mean()}

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
        """The first frames of a video file, at Wan's rate -> latents. wan.py has looked whether the clip fits."""
        # Not frame by frame: of a clip with 30 a second Wan would learn slow motion.
        times = np.arange(self.s.frames) / FPS
        frames, _ = open_clip(path).frames(times, (self.s.height, self.s.width))
        pixels = torch.from_numpy(frames).to(self.device, self.pipe.vae.dtype).permute(3, 0, 1, 2)[None] / 127.5 - 1
        mean, std = self.latent_scale()
        return (self.pipe.vae.encode(pixels).latent_dist.mode().float() - mean) / std

    def save(self, out: str, optimizer, done: int, made_from: dict) -> None:
        """The LoRA, as `WanPipeline.load_lora_weights` reads it, and what a run needs to go on.

        done: updates; made_from: what tells the reward model and the data from others.
        """
        from peft import get_peft_model_state_dict

        told = self.transformer.peft_config["default"].to_dict()  # or it loads with alpha = r: at half its strength
        self.pipe.save_lora_weights(out, transformer_lora_layers=get_peft_model_state_dict(self.transformer),
                                    transformer_lora_adapter_metadata=told)
        state = {"settings": dataclasses.asdict(self.s), "done": done, "made_from": made_from,
                 "optimizer": optimizer.state_dict()}
        with atomic_write(os.path.join(out, "state.pt"), "wb") as file:
            torch.save({**state, "trained": [parameter.detach().cpu() for parameter in self.trained]}, file)

    def load(self, state: dict, optimizer) -> int:
        """What `save` wrote into state.pt -> updates done."""
        for parameter, kept in zip(self.trained, state["trained"], strict=True):
            parameter.data.copy_(kept)
        optimizer.load_state_dict(state["optimizer"])
        return state["done"]
