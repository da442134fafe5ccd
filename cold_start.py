"""Stage 1, the discriminative cold start: Bradley-Terry on (video, prompt, CoT), with random CoT masking.

    CSV with collected CoTs (rollout.py) + a Qwen3-VL   ->   OUT/model, a DeScore folder; OUT/metrics.jsonl,
    OUT/curves.png

    laptop   python cold_start.py --model runs/base --data runs/data/train_cots.csv --out runs/stage1 --lr 3e-4 ...
    8 GPUs   torchrun --nproc_per_node 8 cold_start.py --data train_cots.csv --val val_cots.csv --out runs/stage1

The defaults are the paper's. What to expect: the loss starts near ln 2 = 0.6931; `accuracy` starts
near .5 and rises; `val_accuracy` is measured with the CoT always there.

One step:  1 draw pairs   2 mask CoTs   3 forward both videos   4 BT loss (Eq. 3)   5 backward, clip, update   6 log
"""

import dataclasses
import itertools
import math
import os
import time

import torch

import data
import parallel
from data import InputError
from losses import bt_loss, btt_loss, draw_cot_mask
from metrics import accuracy_without_ties
from model import DeScore, lay_out, to_device
from plumbing.checkpoint import save_model
from plumbing.jobs import readable_pairs
from plumbing.logs import Log, draw_curves, reward_scale
from plumbing.resume import StopSignal, claim_run, load_checkpoint, require_finite, save_checkpoint
from plumbing.settings import arg, cli, parse


@dataclasses.dataclass
class Settings:
    """Stage 1. Defaults: the paper's values, from its page and the released code."""

    # data
    data: str = arg(None, "training pairs, a CSV in any known format; stage 1 wants CoT_A and CoT_B (see rollout.py)")
    val: str | None = arg(None, "validation pairs with CoTs")
    dimension: str = arg("TA", "label column where a CSV has several: TA, VQ, MQ or Overall")
    video_root: str | None = arg(None, "folder that relative video paths start from; default the CSV's")
    skip_bad_videos: bool = arg(False, "leave out pairs with an unreadable video; OUT/skipped.jsonl lists them")
    fps: float = arg(2.0, "sampled frames per second (paper: 2)")
    max_pixels: int = arg(448 * 448, "pixels per frame at most (paper: 448 * 448)")
    max_length: int = arg(6144, "tokens per sequence at most: video + prompt + CoT (paper: 6144)")
    workers: int = arg(2, "processes that decode ahead; 0: decode in this one")
    frame_cache: str | None = arg(None, "folder that keeps sampled frames, so that later epochs need not decode")
    # model
    model: str = arg("Qwen/Qwen3-VL-8B-Instruct", "base model, folder or hub name; or a DeScore folder to go on from")
    train: str = arg("lora", "what of the LLM is trained (paper: lora)", choices=["lora", "full", "head"])
    train_vision: bool = arg(True, "train the vision tower and merger fully (paper: yes)")
    lora_r: int = arg(64, "LoRA rank (paper: 64)")
    lora_alpha: int = arg(128, "LoRA alpha; the update is scaled by alpha / r (paper: 128)")
    lora_dropout: float = arg(0.05, "LoRA dropout (paper: .05)")
    gradient_checkpointing: bool = arg(True, "recompute activations in backward: less memory, a third more time")
    # objective
    loss: str = arg("bt", "bt drops ties (paper, Eq. 3); btt learns from them (Rao-Kupper)", choices=["bt", "btt"])
    mask_probability: float = arg(0.5, "p of random CoT masking, one draw per pair (paper: .5)")
    # optimisation
    epochs: int = arg(4, "passes over the data (paper: 4)")
    max_steps: int | None = arg(None, "stop after this many updates")
    batch_pairs: int = arg(32, "pairs per update over all ranks (paper: 1 x 4 accumulation x 8 GPUs)")
    micro_pairs: int = arg(1, "pairs per forward on one rank (paper: 1)")
    lr: float = arg(2e-6, "learning rate of the LLM (paper: 2e-6)")
    lr_vision: float | None = arg(None, "learning rate of the vision tower; default --lr (paper: the same)")
    lr_head: float | None = arg(None, "learning rate of query and head; default --lr (paper: the same)")
    warmup: float = arg(0.05, "share of all steps with a rising learning rate; then constant (paper: 5 %)")
    weight_decay: float = arg(0.0, "AdamW weight decay (not given in the paper)")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this L2 norm (paper: 1.0 in stage 2)")
    seed: int = arg(0, "decides order, masks, dropout and LoRA's start")
    # ranks
    shard_ranks: int = arg(0, "ranks that share one copy of the weights; 0: all; 8: inside nodes of 8 GPUs (hybrid)")
    cpu_offload: bool = arg(False, "weights and optimizer wait in the host's memory: slow, but fits (needs torchrun)")
    random_init: bool = arg(False, "random weights of --model's size, read from config.json: to measure, not to train")
    # output
    out: str = arg("runs/stage1", "output folder")
    val_every: int = arg(100, "steps between validations; 0: only at the end")
    save_every: int = arg(100, "steps between checkpoints; 0: only at the end")
    keep: int = arg(2, "checkpoints kept on disk")
    resume: bool = arg(False, "go on from the newest checkpoint in --out, exactly where it was")
    overwrite: bool = arg(False, "first remove the run that --out holds")
    log_with: str | None = arg(None, "also log through accelerate's trackers", choices=["tensorboard", "wandb"])


def prepare_pairs(path: str, settings: Settings, ranks, need_cots: bool) -> list[data.PreferencePair]:
    """COLLECTIVE: reads a CSV, drops ties for plain BT, drops bad videos if asked, and says how many."""
    pairs = data.read_pairs(path, settings.dimension, settings.video_root)
    if need_cots and not any(pair.cot_a or pair.cot_b for pair in pairs) and settings.mask_probability < 1:
        raise InputError(
            f"{path}: has no CoT_A / CoT_B; collect them with rollout.py, or train with --mask-probability 1."
        )
    if not need_cots and not any(pair.cot_a or pair.cot_b for pair in pairs):
        ranks.print(f"{path}: has no CoT_A / CoT_B, so validation is without thinking")
    if settings.loss == "bt":
        ties = sum(pair.label == 0 for pair in pairs)
        pairs = [pair for pair in pairs if pair.label != 0]
        ranks.print(f"{path}: {len(pairs)} pairs; {ties} ties left out (--loss btt uses them)")
    return readable_pairs(pairs, settings, ranks, data.sample_frames)


def score_pairs(model, items, settings, masks=None):
    """Rewards of both videos of each pair: (B,), (B,), with gradient if enabled. masks (B,) bool: True hides the
    CoTs."""
    prefixes, responses = [], []
    for n, (pair, (prefix_a, prefix_b)) in enumerate(items):
        for prefix, cot in zip((prefix_a, prefix_b), pair.cots):
            # Random CoT masking: an EMPTY response, so the query stands right behind the prompt. One draw per pair.
            ids = [] if masks is not None and masks[n] else data.encode_cot(model.processor.tokenizer, cot)
            length = len(prefix["input_ids"]) + len(ids) + 1
            if length > settings.max_length:
                raise InputError(
                    f"line {pair.line}: {length} tokens (CoT {len(ids)}); raise --max-length or shorten the CoT."
                )
            prefixes.append(prefix)
            responses.append([ids])
    batch = to_device(lay_out(model.backbone, prefixes, responses), model.query.device)
    rewards = model(batch, want_log_probs=False).rewards.view(-1, 2)  # (B, 2): videos A and B of each pair
    return rewards[:, 0], rewards[:, 1]


@torch.no_grad()
def validate(model, dataset, settings, ranks) -> float:
    """COLLECTIVE: accuracy without ties over all pairs. Never masked: masking is for training."""
    model.eval()
    size, mine = len(dataset), []
    rounds = math.ceil(size / ranks.world)  # the same number of forwards on every rank, or FSDP waits for ever
    order = [min(i * ranks.world + ranks.rank, size - 1) for i in range(rounds)]
    stream = data.take(dataset, order, settings.workers)
    for first in range(0, rounds, settings.micro_pairs):
        items = list(itertools.islice(stream, settings.micro_pairs))
        with ranks.autocast():
            reward_a, reward_b = score_pairs(model, items, settings)
        margins = (reward_a - reward_b).tolist()
        mine += [(pair.label, margin) for (pair, _), margin in zip(items, margins)]
    model.train()
    mine = mine[: len(range(ranks.rank, size, ranks.world))]  # a last round that repeats a pair is not counted
    labels, margins = zip(*ranks.gather_objects(mine))
    return accuracy_without_ties(labels, margins)


def train(model, pairs, val_pairs, settings: Settings, ranks) -> None:
    """The loop of stage 1."""
    optimizer = parallel.make_optimizer(model, settings)
    dataset, val_set = (
        data.EncodedPairs(p, model.processor, settings.fps, settings.max_pixels, settings.frame_cache) for p in (pairs, val_pairs)
    )
    steps_per_epoch, local_pairs = parallel.divide(len(pairs), settings, ranks)
    total = min(settings.max_steps or 10**9, settings.epochs * steps_per_epoch)
    first = load_checkpoint(settings.out, model, optimizer, ranks)["step"] if settings.resume else 0
    log = Log(settings.out, ranks, "cold_start", first)
    stop = StopSignal()

    schedule = []  # this rank's pairs: (index, is its CoT masked), from the first step still to do
    for step in range(first, total):
        epoch, place = divmod(step, steps_per_epoch)
        order = data.epoch_order(len(pairs), settings.seed, epoch)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch + 500_009)
        masks = draw_cot_mask(len(pairs), settings.mask_probability, generator)  # one draw per pair and epoch
        batch = order[place * settings.batch_pairs : (place + 1) * settings.batch_pairs]
        schedule += [(index, bool(masks[index])) for index in ranks.share(batch)]
    stream = data.take(dataset, [index for index, _ in schedule], settings.workers)
    hidden = iter(mask for _, mask in schedule)

    model.train()
    for step in ranks.progress(range(first + 1, total + 1), desc="stage 1", initial=first, total=total):
        began = time.time()
        sums = dict.fromkeys(("loss", "correct", "decided", "margin", "masked", "reward", "square", "tokens"), 0.0)
        drawn = [next(stream) for _ in range(local_pairs)]  # 1 draw pairs
        waited = time.time() - began
        drawn = [(item, next(hidden)) for item in drawn]  # each with its mask
        drawn.sort(
            key=lambda d: max(len(prefix["input_ids"]) for prefix in d[0][1])
        )  # like lengths together: less padding
        for first_pair in range(0, local_pairs, settings.micro_pairs):
            items, masks = zip(*drawn[first_pair : first_pair + settings.micro_pairs])  # 2 mask CoTs
            with ranks.autocast():
                reward_a, reward_b = score_pairs(model, items, settings, masks)  # 3 forward both videos
            labels = torch.tensor([pair.label for pair, _ in items], device=reward_a.device)
            if settings.loss == "btt":
                loss = btt_loss(reward_a, reward_b, labels, denominator=settings.batch_pairs)
            else:  # 4 BT loss, Eq. 3; the denominator is the whole batch's, over all micro-batches and ranks
                chosen, rejected = (
                    torch.where(labels > 0, reward_a, reward_b),
                    torch.where(labels > 0, reward_b, reward_a),
                )
                loss = bt_loss(chosen, rejected, denominator=settings.batch_pairs)
            rows = [dataclasses.asdict(pair) for pair, _ in items]
            require_finite(loss.item(), "loss", rows, settings, ranks)
            parallel.backward(loss, ranks)  # 5 backward
            with torch.no_grad():
                margins, both = (reward_a - reward_b) * labels, torch.cat([reward_a, reward_b])
                sums["loss"] += loss.item()
                sums["correct"] += (margins > 0).sum().item()
                sums["decided"] += (labels != 0).sum().item()
                sums["margin"] += margins.sum().item()
                sums["masked"] += sum(masks)
                sums["reward"], sums["square"] = (
                    sums["reward"] + both.sum().item(),
                    sums["square"] + (both**2).sum().item(),
                )
        parallel.sync_gradients(model, ranks)
        norms = parallel.clip_gradients(model, settings.max_grad_norm)  # clip
        rows = [dataclasses.asdict(pair) for (pair, _), _ in drawn]
        require_finite(norms["total"], "gradient norm", rows, settings, ranks)
        lr_scale = parallel.set_learning_rate(optimizer, step, max(1, round(settings.warmup * total)))
        optimizer.step()  # update
        optimizer.zero_grad()
        sums, count = ranks.sum(sums), settings.batch_pairs  # 6 log
        mean = sums["reward"] / (2 * count)
        metrics = {
            "loss": sums["loss"],
            "accuracy": sums["correct"] / max(1, sums["decided"]),
            "margin": sums["margin"] / max(1, sums["decided"]),
            "reward_mean": mean,
            "reward_std": max(0.0, sums["square"] / (2 * count) - mean**2) ** 0.5,
            "masked_share": sums["masked"] / count,
            "lr": lr_scale * settings.lr,
            "epoch": step / steps_per_epoch,
            "wait_share": waited / (time.time() - began),
            "step_seconds": time.time() - began,
            **{f"grad_norm_{part}": norm for part, norm in norms.items()},
        }
        stopping = ranks.any(stop.requested)
        if step == total or stopping or (settings.save_every and step % settings.save_every == 0):
            save_checkpoint(settings.out, step, model, optimizer, ranks, settings.keep)
        if val_pairs and (step == total or (settings.val_every and step % settings.val_every == 0)):
            metrics["val_accuracy"] = validate(
                model, val_set, settings, ranks
            )  # after saving: a crash here costs nothing
        log.step(
            step,
            metrics,
            f"step {step:5d}/{total}  loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}  "
            f"margin {metrics['margin']:+.3f}  reward {mean:+.2f} ± {metrics['reward_std']:.2f}  "
            f"masked {metrics['masked_share']:.2f}  |g| {norms['total']:.2f}  {metrics['step_seconds']:.2f} s"
            + (f"  val {metrics['val_accuracy']:.3f}" if "val_accuracy" in metrics else ""),
        )
        if stopping:
            ranks.print(f"stopped after step {step}; the same command with --resume goes on")
            raise KeyboardInterrupt


def main(argv=None) -> None:
    settings = parse(Settings, __doc__, argv)
    if settings.data is None:
        raise InputError("--data is missing; give a CSV of preference pairs.")
    ranks = parallel.start(settings.seed, settings.log_with, settings.out, settings.cpu_offload)
    claim_run(settings, ranks)
    pairs = prepare_pairs(settings.data, settings, ranks, need_cots=True)
    val_pairs = prepare_pairs(settings.val, settings, ranks, need_cots=False) if settings.val else []
    model = DeScore.from_pretrained(
        settings.model,
        dtype=parallel.load_dtype(settings.train, ranks),
        new_head=True,
        empty=ranks.world > 1,
        random_init=settings.random_init,
    )
    model.settings.update(base_model=settings.model, fps=settings.fps, max_pixels=settings.max_pixels)
    model.make_trainable(
        settings.train, settings.train_vision, settings.lora_r, settings.lora_alpha, settings.lora_dropout, lm_head=False
    )
    if settings.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    for part, parameters in model.parameter_groups().items():
        ranks.print(f"trained {part}: {sum(p.numel() for p in parameters):,} parameters")
    parallel.shard(model, ranks, settings.shard_ranks, settings.cpu_offload)
    train(model, pairs, val_pairs, settings, ranks)
    model.settings.update(reward_scale(settings.out))
    save_model(model, os.path.join(settings.out, "model"), ranks)
    if ranks.is_main:
        panels = {
            "BT loss (Eq. 3)": ["loss"],
            "pair accuracy": ["accuracy", "val_accuracy"],
            "margin r_w - r_l": ["margin"],
            "reward": ["reward_mean", "reward_std"],
            "gradient norms": ["grad_norm_llm", "grad_norm_vision", "grad_norm_head"],
            "seconds": ["step_seconds"],
        }
        draw_curves(settings.out, panels, os.path.join(settings.out, "curves.png"), "Stage 1: cold start")
    ranks.print(f"wrote {settings.out}/model, metrics.jsonl and curves.png")
    ranks.finish()


if __name__ == "__main__":
    cli(main)
