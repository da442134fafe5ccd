"""Stage 2, dual-objective RL: GRPO on the chain of thought (Eq. 7), Bradley-Terry on the score (Eq. 10).

    CSV with true verdicts + OUT of stage 1   ->   OUT/model, a DeScore folder; metrics.jsonl, samples.jsonl, curves.png

    laptop   python grpo.py --model runs/stage1/model --data runs/data/train_rl.csv --out runs/stage2 --lr 1e-4 ...
    8 GPUs   torchrun --nproc_per_node 8 grpo.py --model runs/stage1/model --data train_rl.csv --engine vllm

The defaults are the paper's. The loop in `train` is the paper's algorithm, step by step:

    1 draw pairs      2 generate: G CoTs for each of the two videos      3 rollout rewards, by rules only
    4 group advantages      5 old and reference log-probs      6 update: one forward gives GRPO + KL + BT
    7 hand the new weights to the rollout engine      8 log

What to expect: `rollout_reward` and `quality` rise slowly; `pair_accuracy` must not fall. `grpo_loss` stays near 0 and
`ratio_max` at 1 while there is one update per rollout batch: that is right, see losses.grpo_loss.

The two objectives are independent: the rules never see the head's score, and no gradient of the GRPO
loss reaches the head, because log-probs do not pass through it.
"""

import dataclasses
import json
import os
import time

import torch

import data
import parallel
from data import InputError
from losses import bt_loss, clip_share, group_advantages, grpo_loss, kl_to_reference, policy_ratio
from model import DeScore, lay_out, to_device
from plumbing.answers import read_verdicts, well_formed
from plumbing.checkpoint import save_model
from plumbing.jobs import readable_pairs, task_seed
from plumbing.logs import Log, draw_curves, reward_scale
from plumbing.resume import StopSignal, load_checkpoint, require_finite, save_checkpoint
from plumbing.settings import arg, cli, parse
from rollout import decode_cot, make_engine


@dataclasses.dataclass
class Settings:
    """Stage 2. Defaults: the paper's values, from its page and the released code."""

    # data
    data: str = arg(None, "training pairs with true verdicts: a CSV in DeScore's RL format")
    video_root: str | None = arg(None, "folder that relative video paths start from; default the CSV's")
    skip_bad_videos: bool = arg(False, "leave out pairs with an unreadable video; OUT/skipped.jsonl lists them")
    fps: float = arg(2.0, "sampled frames per second (paper: 2)")
    max_pixels: int = arg(307_200, "pixels per frame at most (paper, stage 2: 307,200)")
    workers: int = arg(2, "processes that decode ahead; 0: decode in this one")
    frame_cache: str | None = arg(None, "folder that keeps sampled frames, so that later epochs need not decode")
    # model
    model: str = arg(None, "a DeScore folder: OUT/model of stage 1")
    train: str = arg("full", "what of the LLM is trained (paper: full)", choices=["lora", "full"])
    lora_r: int = arg(64, "LoRA rank, with --train lora")
    lora_alpha: int = arg(128, "LoRA alpha, with --train lora")
    gradient_checkpointing: bool = arg(True, "recompute activations in backward: less memory, a third more time")
    # rollouts
    rollouts: int = arg(8, "G, CoTs sampled per video (paper: 8)")
    max_new_tokens: int = arg(4096, "tokens per CoT at most (paper: 4096)")
    temperature: float = arg(1.0, "sampling temperature (paper: 1)")
    engine: str = arg("transformers", "who samples; vllm for real models", choices=["transformers", "vllm"])
    engine_memory: float = arg(0.4, "share of a GPU's memory that vLLM may use; it sleeps during the update")
    engine_tp: int = arg(1, "tensor parallel vLLM: ranks that hold one engine together")
    rows_per_batch: int = arg(64, "CoTs the transformers engine samples at a time")
    # rollout reward
    weight_quality: float = arg(0.7, "weight of R_qual (paper: .7)")
    weight_format: float = arg(0.1, "weight of R_fmt (paper: .1)")
    weight_length: float = arg(0.2, "weight of R_len (paper: .2)")
    length_low: int = arg(500, "CoT tokens up to which R_len is 0 (paper: 500)")
    length_high: int = arg(2000, "CoT tokens from which R_len is 1 (paper: 2000)")
    # objectives
    clip_low: float = arg(0.2, "ratio clip below (EasyR1's default: .2)")
    clip_high: float = arg(0.3, "ratio clip above (EasyR1's default: .3)")
    clip_dual: float = arg(3.0, "dual clip for negative advantages (EasyR1's default: 3)")
    kl_coef: float = arg(
        1e-5, "weight of the KL to the start of this stage (paper's launch script: 1e-5); 0: no reference"
    )
    engine_cap: float = arg(
        0.0,
        "truncated importance weight: a token's policy loss times min(trainer / engine probability, this), for "
        "engines that round otherwise; 0: off (not in the paper)",
    )
    bt_coef: float = arg(5e-3, "weight of the BT loss over rollouts, Eq. 10 (paper: 5e-3); 0: the head drifts")
    # optimisation
    epochs: int = arg(1, "passes over the data (not given in the paper)")
    max_steps: int | None = arg(None, "stop after this many rollout batches")
    batch_pairs: int = arg(128, "pairs per rollout batch over all ranks (paper: 128)")
    mini_pairs: int = arg(
        8, "pairs per update (paper: 8); equal to --batch-pairs: on-policy, no pass for old log-probs"
    )
    packing: bool = arg(True, "a row per video: the prefix once for its G CoTs; --no-packing: a row per CoT")
    lr: float = arg(1e-6, "learning rate of the LLM (paper: 1e-6)")
    lr_head: float | None = arg(None, "learning rate of query and head; default --lr (paper: the same)")
    warmup: float = arg(0.0, "share of all rollout batches with a rising learning rate (not given in the paper)")
    weight_decay: float = arg(1e-2, "AdamW weight decay (paper: 1e-2)")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this L2 norm (paper: 1.0)")
    seed: int = arg(0, "decides order and samples")
    # ranks
    shard_ranks: int = arg(0, "ranks that share one copy of the weights; 0: all; 8: inside nodes of 8 GPUs (hybrid)")
    cpu_offload: bool = arg(False, "weights and optimizer wait in the host's memory: slow, but fits (needs torchrun)")
    random_init: bool = arg(False, "random weights of --model's size, read from config.json: to measure, not to train")
    # output
    out: str = arg("runs/stage2", "output folder")
    save_every: int = arg(10, "rollout batches between checkpoints; 0: only at the end")
    keep: int = arg(2, "checkpoints kept on disk")
    resume: bool = arg(False, "go on from the newest checkpoint in --out")
    log_with: str | None = arg(None, "also log through accelerate's trackers", choices=["tensorboard", "wandb"])

    @property
    def micro_pairs(self) -> int:
        """Pairs per forward: one, that is two groups of G CoTs."""
        return 1


# ---------------------------------------------------------------------------------------------------------------
# Rollout reward: rules only. Not numbered here; R = 0.7 R_qual + 0.1 R_fmt + 0.2 R_len
# ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class RolloutReward:
    """What the rules give one CoT; each part in [0, 1], total is their weighted sum."""

    total: float
    quality: float
    format: float
    length: float


def format_reward(text: str) -> float:
    """R_fmt: 1 if the text is `<think>...</think>`, then an `<answer>` with JSON verdicts on all dimensions; else 0."""
    return float(well_formed(text))


def quality_reward(text: str, annotation: dict[str, str]) -> float:
    """R_qual: right verdicts / annotated dimensions. A dimension that the answer leaves out is wrong."""
    verdicts = read_verdicts(text)
    return sum(verdicts.get(d) == truth for d, truth in annotation.items()) / len(annotation)


def length_reward(num_tokens: int, low: int = 500, high: int = 2000) -> float:
    """R_len: 0 up to `low` TOKENS, then linear, 1 from `high`. (The released code counts characters, in steps.)"""
    return min(1.0, max(0.0, (num_tokens - low) / (high - low)))


def rollout_reward(
    text: str, num_tokens: int, annotation: dict[str, str], weights=(0.7, 0.1, 0.2), length_range=(500, 2000)
) -> RolloutReward:
    """R = w_q R_qual + w_f R_fmt + w_l R_len for one CoT. Rules only: the head's score never enters.

    Worked: 4 of 5 verdicts right, good format, 1,250 tokens: .7 * .8 + .1 * 1 + .2 * .5 = .76.
    """
    parts = quality_reward(text, annotation), format_reward(text), length_reward(num_tokens, *length_range)
    return RolloutReward(sum(w * part for w, part in zip(weights, parts, strict=True)), *parts)


# ---------------------------------------------------------------------------------------------------------------
# One pair's rollouts, kept together so that nothing can land on the wrong rollout (README, difference 5)
# ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Rollouts:
    """All that belongs to one pair. The first index is the video (0 = A, 1 = B), the second the rollout i = 0..G-1."""

    pair: data.PreferencePair
    prefixes: list[dict]  # [2]
    cots: list[list[list[int]]]  # [2][G] token ids
    rewards: list[list[RolloutReward]] = None  # [2][G]
    advantages: torch.Tensor = None  # (2, G)
    engine_log_probs: list[list[list[float]]] = None  # [2][G][token] as the engine saw them, if it tells
    old: torch.Tensor = None  # (2G, T) log-probs when sampled, if they differ from the current ones
    reference: torch.Tensor = None  # (2G, T) log-probs under the reference
    video_features: object = None  # what the frozen tower saw, from the first pass of a step to its last

    @property
    def num_tokens(self) -> int:
        return sum(len(cot) for row in self.cots for cot in row)

    def record(self) -> dict:
        """The pair and its CoTs for a file that a person reads."""
        return {**dataclasses.asdict(self.pair), "cots": self.cots, "advantages": self.advantages.tolist()}


def generate(items, engine, settings, step) -> list[Rollouts]:
    """2: G CoTs for each of the two videos of each pair."""
    prefixes = [prefix for _, both in items for prefix in both]
    seeds = [
        [task_seed(settings.seed, step, pair.line, video, i) for i in range(settings.rollouts)]
        for pair, _ in items
        for video in (0, 1)
    ]
    cots = engine.generate(prefixes, seeds, settings.max_new_tokens, settings.temperature)
    seen = getattr(engine, "log_probs", None)
    return [
        Rollouts(pair, both, cots[2 * n : 2 * n + 2], engine_log_probs=seen and seen[2 * n : 2 * n + 2])
        for n, (pair, both) in enumerate(items)
    ]


def judge(rollouts: Rollouts, tokenizer, settings) -> None:
    """3 and 4: rollout rewards by the rules, advantages within each video's group of G."""
    weights = settings.weight_quality, settings.weight_format, settings.weight_length
    span = settings.length_low, settings.length_high
    annotations = rollouts.pair.annotation_a, rollouts.pair.annotation_b
    rollouts.rewards = [
        [rollout_reward(decode_cot(tokenizer, cot), len(cot), truth, weights, span) for cot in row]
        for row, truth in zip(rollouts.cots, annotations, strict=True)
    ]
    rollouts.advantages = group_advantages(torch.tensor([[r.total for r in row] for row in rollouts.rewards]))


def lay_out_pair(model, rollouts: Rollouts, settings) -> dict:
    """The tensors of a pair's ONE forward, CoTs ordered A_1..A_G, B_1..B_G.

    Packed: two rows, each a prefix and its G CoTs. Plain: a row per CoT.
    """
    if settings.packing:
        batch = lay_out(model.backbone, rollouts.prefixes, rollouts.cots)
    else:
        prefixes = [prefix for prefix, row in zip(rollouts.prefixes, rollouts.cots) for _ in row]
        batch = lay_out(model.backbone, prefixes, [[cot] for row in rollouts.cots for cot in row])
    return to_device(batch, model.query.device)


@torch.no_grad()
def log_probs_now(model, rollouts: Rollouts, settings, ranks) -> torch.Tensor:
    """COLLECTIVE under FSDP. 5: the log-probs (2G, T) of a pair's rollouts under the model as it is.

    The tower is frozen in stage 2, so what it saw is kept for the next pass, of the policy or of the reference.
    """
    with ranks.autocast():
        output = model(lay_out_pair(model, rollouts, settings), video_features=rollouts.video_features)
    rollouts.video_features = output.video_features
    return output.log_probs


def losses_of(output, batch, rollouts: Rollouts, settings, counts) -> tuple[torch.Tensor, dict[str, float]]:
    """6: the loss of a pair, and sums for the log. `counts`: denominators of the whole update, over all ranks.

    L = GRPO (Eq. 7)  +  kl_coef * KL  +  bt_coef * BT (Eq. 10)
    """
    log_probs, mask, device = output.log_probs, batch["response_mask"], output.rewards.device
    old = log_probs.detach() if rollouts.old is None else rollouts.old  # on-policy: the old ones ARE the current ones
    advantages = rollouts.advantages.flatten().to(device)  # (2G,) in the batch's order A_1.., B_1..
    clip = settings.clip_low, settings.clip_high
    gap = torch.zeros_like(mask)  # trainer minus engine, per token, of the log-prob the CoT was sampled with
    if rollouts.engine_log_probs:
        for n, values in enumerate(values for row in rollouts.engine_log_probs for values in row):
            gap[n, : len(values)] = old[n, : len(values)] - torch.tensor(values, device=device)
    weight = gap.exp().clamp(max=settings.engine_cap) if settings.engine_cap else 1.0
    policy = grpo_loss(
        log_probs, old, advantages, mask * weight, *clip, settings.clip_dual, denominator=counts["tokens"]
    )
    kl = torch.zeros((), device=device)
    if rollouts.reference is not None:
        kl = (kl_to_reference(log_probs, rollouts.reference) * mask).sum() / counts["tokens"]
    rewards = output.rewards.view(2, -1)  # (2, G): the head's rewards of videos A and B
    label = rollouts.pair.label
    bt = torch.zeros((), device=device) if label else 0.0 * rewards.sum()  # a human tie has no winner: no BT term
    if label:  # Eq. 10: rollout i of the winner against rollout i of the loser
        chosen, rejected = (rewards[0], rewards[1]) if label > 0 else (rewards[1], rewards[0])
        bt = bt_loss(chosen, rejected, denominator=counts["bt"])
    with torch.no_grad():
        margins = (rewards[0] - rewards[1]) * label
        sums = {
            "grpo_loss": policy.item(),
            "kl": kl.item(),
            "bt_loss": bt.item(),
            "clipped": clip_share(log_probs, old, advantages, mask, *clip).item(),
            "engine_gap": (gap.abs() * mask).sum().item(),
            "right": (margins > 0).sum().item(),
            "margin": margins.sum().item(),
            "reward": rewards.sum().item(),
            "square": (rewards**2).sum().item(),
            "log_prob": (log_probs * mask).sum().item(),
        }
        sums["ratio_max"] = policy_ratio(log_probs, old, mask).max().item()
    return policy + settings.kl_coef * kl + settings.bt_coef * bt, sums


def update(model, optimizer, mini: list[Rollouts], settings, ranks) -> dict[str, float]:
    """COLLECTIVE. 6: one update from this rank's pairs of a mini-batch. Returns sums over ranks, and gradient norms."""
    decided = sum(r.pair.label != 0 for r in mini)
    counts = ranks.sum({"tokens": sum(r.num_tokens for r in mini), "bt": decided * settings.rollouts})
    counts = {name: max(1.0, value) for name, value in counts.items()}  # denominators, before the first backward
    sums, ratio_max = {}, 1.0
    for rollouts in mini:
        batch = lay_out_pair(model, rollouts, settings)
        with ranks.autocast():
            output = model(batch, video_features=rollouts.video_features)  # ONE forward for log-probs and rewards
        rollouts.video_features = None  # this was the step's last pass: nothing stays in memory while sampling
        loss, more = losses_of(output, batch, rollouts, settings, counts)
        require_finite(loss.item(), "loss", [rollouts.record()], settings, ranks)
        parallel.backward(loss, ranks)
        ratio_max = max(ratio_max, more.pop("ratio_max"))
        for name, value in more.items():
            sums[name] = sums.get(name, 0.0) + value
    parallel.sync_gradients(model, ranks)
    norms = parallel.clip_gradients(model, settings.max_grad_norm)
    require_finite(norms["total"], "gradient norm", [r.record() for r in mini], settings, ranks)
    optimizer.step()
    optimizer.zero_grad()
    sums = ranks.sum(sums)
    for name, count in (
        ("clipped", "tokens"),
        ("engine_gap", "tokens"),
        ("log_prob", "tokens"),
        ("right", "bt"),
        ("margin", "bt"),
    ):
        sums[name] /= counts[count]
    return {**sums, "ratio_max": ratio_max, **{f"grad_norm_{part}": norm for part, norm in norms.items()}}


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------
def train(model, reference, engine, pairs, settings: Settings, ranks) -> None:
    """The loop of stage 2; the steps are those of the docstring at the top."""
    optimizer = parallel.make_optimizer(model, settings)
    steps_per_epoch, local_pairs = parallel.divide(len(pairs), settings, ranks)
    total = min(settings.max_steps or 10**9, settings.epochs * steps_per_epoch)
    first = load_checkpoint(settings.out, model, optimizer, ranks)["step"] if settings.resume else 0
    if first or settings.random_init:
        engine.sync(parallel.trained_weights(model))
    log = Log(settings.out, settings, ranks, "grpo", first)
    stop = StopSignal()
    schedule = []
    for step in range(first, total):
        epoch, place = divmod(step, steps_per_epoch)
        order = data.epoch_order(len(pairs), settings.seed, epoch)
        schedule += ranks.share(order[place * settings.batch_pairs : (place + 1) * settings.batch_pairs])
    dataset = data.EncodedPairs(pairs, model.processor, settings.fps, settings.max_pixels, settings.frame_cache)
    stream = data.take(dataset, schedule, settings.workers)
    updates = settings.batch_pairs // settings.mini_pairs
    model.train()
    for step in ranks.progress(range(first + 1, total + 1), desc="stage 2", initial=first, total=total):
        began = time.time()
        items = [next(stream) for _ in range(local_pairs)]  # 1 draw pairs
        drawn = time.time()
        batch = generate(items, engine, settings, step)  # 2 generate
        for rollouts in batch:
            judge(rollouts, model.processor.tokenizer, settings)  # 3 rollout rewards, 4 group advantages
        generated = time.time()
        for rollouts in batch:  # 5 log-probs that the update compares with, from before it
            if updates > 1:
                rollouts.old = log_probs_now(model, rollouts, settings, ranks)
            if settings.kl_coef > 0 and reference is not None:
                rollouts.reference = log_probs_now(reference, rollouts, settings, ranks)
            elif settings.kl_coef > 0:
                with model.reference_policy():
                    rollouts.reference = log_probs_now(model, rollouts, settings, ranks)
        parallel.set_learning_rate(optimizer, step, max(1, round(settings.warmup * total)))
        size = local_pairs // updates
        done = [
            update(model, optimizer, batch[i : i + size], settings, ranks) for i in range(0, local_pairs, size)
        ]  # 6
        engine.sync(parallel.trained_weights(model))  # 7 the engine samples the next batch from the new weights
        metrics = step_metrics(batch, done, settings, ranks)  # 8 log
        metrics |= {
            "wait_share": (drawn - began) / (time.time() - began),
            "generate_seconds": generated - drawn,
            "update_seconds": time.time() - generated,
            "step_seconds": time.time() - began,
        }
        stopping = ranks.any(stop.requested)
        if step == total or stopping or (settings.save_every and step % settings.save_every == 0):
            save_checkpoint(settings.out, step, model, optimizer, ranks, settings.keep)
        if ranks.is_main:
            write_samples(os.path.join(settings.out, "samples.jsonl"), step, batch[0], model.processor.tokenizer)
        log.step(
            step,
            metrics,
            f"step {step:4d}/{total}  R {metrics['rollout_reward']:.3f} (quality {metrics['quality']:.3f} "
            f"format {metrics['format']:.2f} length {metrics['length']:.2f})  flat groups {metrics['flat_groups']:.2f}  "
            f"BT {metrics['bt_loss']:.3f}  pair accuracy {metrics['pair_accuracy']:.3f}  KL {metrics['kl']:.1e}  "
            f"|g| {metrics['grad_norm_total']:.2f}  {metrics['cot_tokens']:.0f} tokens  {metrics['step_seconds']:.1f} s",
        )
        if stopping:
            ranks.print(f"stopped after step {step}; the same command with --resume goes on")
            raise KeyboardInterrupt


def step_metrics(batch: list[Rollouts], updates: list[dict], settings, ranks) -> dict[str, float]:
    """COLLECTIVE. 8: what moves, averaged over all rollouts of all ranks. README's glossary explains each name."""
    rewards = [r for rollouts in batch for row in rollouts.rewards for r in row]
    cots = [cot for rollouts in batch for row in rollouts.cots for cot in row]
    groups = [row for rollouts in batch for row in rollouts.advantages]  # of G advantages each
    sums = ranks.sum({
        "rollout_reward": sum(r.total for r in rewards), "quality": sum(r.quality for r in rewards),
        "format": sum(r.format for r in rewards), "length": sum(r.length for r in rewards),
        "cot_tokens": sum(map(len, cots)), "truncated": sum(len(cot) >= settings.max_new_tokens for cot in cots),
        "flat": sum(not group.any() for group in groups), "rollouts": len(rewards), "groups": len(groups),
    })  # fmt: skip
    count, num_groups, flat = sums.pop("rollouts"), sums.pop("groups"), sums.pop("flat")
    metrics = {name: value / count for name, value in sums.items()} | {"flat_groups": flat / num_groups}
    mean = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
    metrics |= {
        "pair_accuracy": mean.pop("right"),
        "clip_share": mean.pop("clipped"),
        "mean_log_prob": mean.pop("log_prob"),
    }
    metrics["reward_mean"] = mean.pop("reward") * len(updates) / count
    metrics["reward_std"] = max(0.0, mean.pop("square") * len(updates) / count - metrics["reward_mean"] ** 2) ** 0.5
    return metrics | mean | {"ratio_max": max(u["ratio_max"] for u in updates)}


def write_samples(path: str, step: int, rollouts: Rollouts, tokenizer) -> None:
    """Appends the best and the worst CoT of the first pair's first video, with rewards: read them while it trains."""
    order = sorted(range(len(rollouts.cots[0])), key=lambda i: rollouts.rewards[0][i].total)
    with open(path, "a", encoding="utf-8") as file:
        for i in (order[0], order[-1]):
            line = {
                "step": step,
                "video": rollouts.pair.video_a,
                "prompt": rollouts.pair.prompt,
                "truth": rollouts.pair.annotation_a,
                "advantage": round(float(rollouts.advantages[0, i]), 3),
                **dataclasses.asdict(rollouts.rewards[0][i]),
                "cot": decode_cot(tokenizer, rollouts.cots[0][i]),
            }
            file.write(json.dumps(line) + "\n")


def check(settings: Settings, ranks) -> None:
    """Flags that contradict each other, before anything is loaded."""
    for name in ("data", "model"):
        if getattr(settings, name) is None:
            raise InputError(f"--{name} is missing; see --help.")
    if settings.batch_pairs % settings.mini_pairs or settings.mini_pairs % ranks.world:
        raise InputError(
            f"--mini-pairs {settings.mini_pairs} must divide --batch-pairs {settings.batch_pairs} and be a multiple "
            f"of the {ranks.world} ranks."
        )


def main(argv=None) -> None:
    settings = parse(Settings, __doc__, argv)
    ranks = parallel.start(settings.seed, settings.log_with, settings.out, settings.cpu_offload)
    check(settings, ranks)
    os.makedirs(settings.out, exist_ok=True)
    pairs = readable_pairs(data.read_pairs(settings.data, video_root=settings.video_root), settings, ranks, data.sample_frames)
    for pair in pairs:
        if not pair.annotation_a or not pair.annotation_b:
            raise InputError(
                f"{settings.data}, line {pair.line}: has no video_1_scores / video_2_scores in `answer`; stage 2 "
                "rewards CoTs by them (README, 'Data formats')."
            )
    how = {"empty": ranks.world > 1, "random_init": settings.random_init}
    model = DeScore.from_pretrained(settings.model, dtype=parallel.load_dtype(settings.train, ranks), **how)
    model.settings.update(fps=settings.fps, max_pixels=settings.max_pixels)
    model.make_trainable(
        settings.train, vision=False, lora_r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=0.0
    )
    if settings.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    reference = None
    if settings.kl_coef > 0 and settings.train == "full":  # with LoRA the reference is the model without its adapter
        reference = (
            DeScore.from_pretrained(settings.model, dtype=parallel.load_dtype("lora", ranks), **how)
            .eval()
            .requires_grad_(False)
        )
        parallel.shard(reference, ranks, settings.shard_ranks, settings.cpu_offload)
    own = model.backbone if ranks.world == 1 else None  # under FSDP the transformers engine needs an unsharded copy
    engine = make_engine(
        settings.engine,
        settings.model,
        model.processor,
        ranks,
        own,
        settings.seed,
        rows_per_batch=settings.rows_per_batch,
        memory=settings.engine_memory,
        tp=settings.engine_tp,
        dummy=settings.random_init,
    )
    parallel.shard(model, ranks, settings.shard_ranks, settings.cpu_offload)
    train(model, reference, engine, pairs, settings, ranks)
    model.settings.update(reward_scale(settings.out))
    save_model(model, os.path.join(settings.out, "model"), ranks)
    if ranks.is_main:
        panels = {
            "rollout reward R": ["rollout_reward", "quality", "format", "length"],
            "pair accuracy": ["pair_accuracy"],
            "BT loss (Eq. 10)": ["bt_loss"],
            "groups with no spread, clipped tokens": ["flat_groups", "clip_share"],
            "KL to the reference": ["kl"],
            "gradient norms": ["grad_norm_llm", "grad_norm_head"],
        }
        draw_curves(settings.out, panels, os.path.join(settings.out, "curves.png"), "Stage 2: GRPO + BT")
    ranks.print(f"wrote {settings.out}/model, metrics.jsonl, samples.jsonl and curves.png")
    ranks.finish(engine)


if __name__ == "__main__":
    cli(main)
