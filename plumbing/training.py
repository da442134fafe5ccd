"""The frame around both stages' loops: which steps are left, this rank's share of each, and what follows a step."""

import dataclasses
import os
import time

import torch

from plumbing.checkpoint import save_model
from plumbing.logs import Log, draw_curves, reward_scale
from plumbing.resume import StopSignal, load_checkpoint, save_checkpoint
from plumbing.settings import InputError, arg
from plumbing.video import READERS


@dataclasses.dataclass
class CommonSettings:
    """Flags that both stages have. Defaults: the paper's values."""

    # data
    video_root: str | None = arg(None, "folder that relative video paths start from; default the CSV's")
    skip_bad_videos: bool = arg(False, "leave out pairs with an unreadable video; OUT/skipped.jsonl lists them")
    fps: float = arg(2.0, "sampled frames per second (paper: 2)", above=0)
    reader: str = arg("pyav", "of video files; decord (the paper's) takes plain ones of constant rate", READERS)
    workers: int = arg(2, "processes that decode ahead; 0: decode in this one", at_least=0)
    frame_cache: str | None = arg(None, "folder that keeps sampled frames, so that later epochs need not decode")
    # model and optimisation
    lora_r: int = arg(64, "LoRA rank, with --train lora (paper, stage 1: 64)", at_least=1)
    lora_alpha: int = arg(128, "LoRA alpha; the update is scaled by alpha / r (paper, stage 1: 128)", at_least=1)
    gradient_checkpointing: bool = arg(True, "recompute activations in backward: less memory, a third more time")
    max_steps: int | None = arg(None, "stop after this many steps, if --epochs gives as many", at_least=1)
    lr_head: float | None = arg(None, "learning rate of query and head; default --lr (paper: the same)", at_least=0)
    max_grad_norm: float = arg(
        1.0, "gradients of each part (LLM, vision, head) are scaled down to this L2 norm (paper: 1.0 in all)", above=0)
    seed: int = arg(0, "decides order, masks, samples, dropout and LoRA's start", at_least=0)
    # ranks
    shard_ranks: int = arg(
        0, "ranks that share one copy of the weights; 0: all; 8: inside nodes of 8 GPUs (hybrid)", at_least=0)
    cpu_offload: bool = arg(False, "weights and optimizer wait in the host's memory: slow, but fits (needs torchrun)")
    # output
    keep: int = arg(2, "checkpoints kept on disk", at_least=1)
    resume: bool = arg(False, "go on from the newest checkpoint in --out, exactly where it was")
    overwrite: bool = arg(False, "first remove the run that --out holds")


def divide(num_pairs: int, settings, ranks) -> tuple[int, int]:
    """(updates per epoch, pairs per update on each rank). The last, incomplete batch of an epoch is left out."""
    micro_pairs = getattr(settings, "micro_pairs", 1)  # pairs per forward; stage 2 has one pair, that is 2 G CoTs
    if settings.batch_pairs % (ranks.world * micro_pairs):
        raise InputError(
            f"--batch-pairs {settings.batch_pairs} is not a multiple of {ranks.world} ranks x --micro-pairs "
            f"{micro_pairs}; change one of them."
        )
    if num_pairs < settings.batch_pairs:
        raise InputError(
            f"{settings.data}: {num_pairs} pairs do not fill one batch; lower --batch-pairs ({settings.batch_pairs})."
        )
    return num_pairs // settings.batch_pairs, settings.batch_pairs // ranks.world


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """A shuffle that depends on (seed, epoch) alone, so that every rank, and a resumed run, sees the same order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()


class Run:
    """One training run: where it stands, what each step draws, and how a step ends.

    Attributes: total steps; first, the number of steps done before a resume; steps_per_epoch; local_pairs, this rank's
    pairs per step; warmup_steps.
    """

    def __init__(self, name: str, model, optimizer, num_pairs: int, settings, ranks):
        """COLLECTIVE. name: "stage 1" or "stage 2". Loads the newest checkpoint if --resume was given."""
        self.name, self.model, self.optimizer, self.settings, self.ranks = name, model, optimizer, settings, ranks
        self.num_pairs = num_pairs
        self.steps_per_epoch, self.local_pairs = divide(num_pairs, settings, ranks)
        self.total = min(settings.max_steps or 10**9, settings.epochs * self.steps_per_epoch)
        if settings.max_steps and self.total < settings.max_steps:
            ranks.print(f"{name}: {self.total} steps, not --max-steps {settings.max_steps}: --epochs {settings.epochs} "
                        f"over {num_pairs} pairs, --batch-pairs {settings.batch_pairs} at a time, give no more")
        self.warmup_steps = max(1, round(settings.warmup * self.total))
        position = load_checkpoint(settings.out, model, optimizer, ranks) if settings.resume else {"step": 0}
        # The run's own: with more --epochs a share of the new total would begin the warm-up again.
        self.warmup_steps = position.get("warmup_steps", self.warmup_steps)
        self.first = position["step"]
        self.log, self.stop, self.began = Log(settings.out, ranks, position), StopSignal(), time.time()

    def draws(self):
        """Yields (epoch, this rank's indices of pairs) for each step that is left."""
        for step in range(self.first, self.total):
            epoch, place = divmod(step, self.steps_per_epoch)
            size = self.settings.batch_pairs
            order = epoch_order(self.num_pairs, self.settings.seed, epoch)
            yield epoch, self.ranks.share(order[place * size : (place + 1) * size])

    def steps(self):
        """Yields the numbers of the steps that are left, the first being 1, with a progress bar; starts the clock."""
        left = range(self.first + 1, self.total + 1)
        for step in self.ranks.progress(left, desc=self.name, initial=self.first, total=self.total):
            self.began = time.time()
            yield step

    def seconds(self) -> float:
        """Since this step began."""
        return time.time() - self.began

    def is_due(self, step: int, every: int) -> bool:
        """At every `every`-th step and at the last; `every` 0: only at the last."""
        return step == self.total or (every > 0 and step % every == 0)

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """COLLECTIVE: a checkpoint if one is due, or if somebody pressed Ctrl-C.

        The step's metrics go along: a kill between saving and logging would lose their line.
        """
        self.stopping = self.ranks.sum({"stop": self.stop.requested})["stop"] > 0
        if self.stopping or self.is_due(step, self.settings.save_every):
            more = {"metrics": metrics, "warmup_steps": self.warmup_steps}
            save_checkpoint(
                self.settings.out, step, self.model, self.optimizer, self.ranks, self.settings.keep, more)

    def finish_step(self, step: int, metrics: dict[str, float], line: str) -> None:
        """Logs the step; after Ctrl-C ends the run. `line` is what the screen shows."""
        self.log.step(step, metrics, f"step {step:5d}/{self.total}  {line}  {self.seconds():.1f} s")
        if self.stopping:
            self.ranks.print(f"stopped after step {step}; the same command with --resume goes on")
            raise KeyboardInterrupt


def save_run(model, settings, ranks, panels: dict[str, list[str]], title: str) -> None:
    """COLLECTIVE: what a finished run leaves in --out, OUT/model and OUT/curves.png.

    The rewards' mean and spread go along, for those who want them on a common scale: DeScore.reward(normalize=True).
    """
    model.settings.update(reward_scale(settings.out))
    save_model(model, os.path.join(settings.out, "model"), ranks)
    if ranks.is_main:
        draw_curves(settings.out, panels, os.path.join(settings.out, "curves.png"), title)
    ranks.print(f"wrote {settings.out}/model, metrics.jsonl and curves.png")
