"""Stage 1, the discriminative cold start: Bradley-Terry on (video, prompt, CoT), with random CoT masking.

    CSV with collected CoTs (collect_cots.py) + a Qwen3-VL  ->  OUT/model, a DeScore folder; metrics.jsonl, curves.png

    laptop   python cold_start.py --model runs/base --data runs/data/train_cots.csv --out runs/try --max-steps 3
    8 GPUs   torchrun --nproc_per_node 8 cold_start.py --data train_cots.csv --val val_cots.csv --out runs/stage1

The defaults are the paper's. What to expect: the loss starts near ln 2 = 0.6931; `accuracy` starts near .5 and rises;
`val_accuracy` is measured with the CoT always there.

One step:  1 draw pairs   2 mask CoTs   3 forward both videos   4 BT loss (Eq. 3)   5 backward, clip, update   6 log
"""

import dataclasses
import itertools

import torch

import data
import parallel
from layout import lay_out
from losses import bt_loss, btt_loss, draw_cot_mask
from metrics import accuracy_without_ties
from model import DeScore, to_device
from plumbing import checkpoint, gpu, logs
from plumbing.jobs import fitting_pairs, readable_pairs, task_seed
from plumbing.settings import CommonSettings, InputError, arg, cli, parse, require
from plumbing.training import Run, claim_run, save_run


@dataclasses.dataclass
class Settings(CommonSettings):
    """Stage 1; more in CommonSettings. Defaults: the paper's values, from its page and the released code."""

    # data
    data: str = arg(None, "training pairs, a CSV in any known format; stage 1 needs CoT_A and CoT_B (collect_cots.py)")
    val: str | None = arg(None, "validation pairs with CoTs")
    dimension: str = arg("TA", "label column where a CSV has several: TA, VQ, MQ or Overall")
    max_pixels: int = arg(448 * 448, "pixels per frame at most (paper: 448 * 448)", at_least=1024)
    max_length: int = arg(6144, "tokens per sequence at most: video + prompt + CoT (paper: 6144)", at_least=1)
    # model
    model: str = arg("Qwen/Qwen3-VL-8B-Instruct", "base model, folder or hub name; or a DeScore folder to go on from")
    train: str = arg("lora", "what of the LLM is trained (paper: lora)", choices=["lora", "full", "head"])
    train_vision: bool = arg(True, "train the vision tower and merger fully (paper: yes)")
    lora_dropout: float = arg(0.05, "LoRA dropout (paper: .05)", at_least=0, at_most=0.9)
    # objective
    loss: str = arg("bt", "bt drops ties (paper, Eq. 3); btt learns from them (Rao-Kupper)", choices=["bt", "btt"])
    mask_probability: float = arg(0.5, "p of random CoT masking, one draw per pair (paper: .5)", at_least=0, at_most=1)
    # optimisation
    epochs: int = arg(4, "passes over the data (paper: 4)", at_least=1)
    batch_pairs: int = arg(32, "pairs per update over all ranks (paper: 1 x 4 accumulation x 8 GPUs)", at_least=1)
    micro_pairs: int = arg(1, "pairs per forward on one rank (paper: 1)", at_least=1)
    lr: float = arg(2e-6, "learning rate of the LLM (paper: 2e-6)", at_least=0)
    lr_vision: float | None = arg(None, "learning rate of the vision tower; default --lr (paper: the same)", at_least=0)
    warmup: float = arg(0.05, "share of all steps with a rising learning rate (paper: 5 %)", at_least=0, at_most=1)
    weight_decay: float = arg(0.0, "AdamW weight decay (not given in the paper)", at_least=0)
    # output
    out: str = arg("runs/stage1", "output folder")
    val_every: int = arg(100, "steps between validations; 0: only at the end", at_least=0)
    save_every: int = arg(100, "steps between checkpoints; 0: only at the end", at_least=0)


def draw(pairs: list[data.PreferencePair], run: Run, settings) -> list[data.PreferencePair]:
    """1 and 2: this rank's pairs for all steps that are left, in order; those whose coin says so without their CoTs.

    A masked CoT is an EMPTY one: the query stands right behind the prompt. losses.draw_cot_mask says why. The coins
    come from (seed, epoch) alone, so that every rank and a resumed run toss the same.
    """
    drawn = []
    for epoch, indices in run.draws():
        coins = torch.Generator().manual_seed(task_seed("masks", settings.seed, epoch))
        masked = draw_cot_mask(len(pairs), settings.mask_probability, coins)  # one draw for both videos of a pair
        drawn += [pairs[i].without_cots() if masked[i] else pairs[i] for i in indices]
    return drawn


def score_pairs(model, items):
    """Rewards of both videos of each pair: (B,), (B,), with gradient if enabled.

    items: B times data.Drawn.
    """
    prefixes = [prefix for item in items for prefix in item.prefixes]  # A_1, B_1, A_2, ...
    cots = [[ids] for item in items for ids in item.pair.cot_ids(model.processor.tokenizer)]
    # One row per video, [video and prompt | CoT | query]; r = head(hidden state of the query).
    batch = to_device(lay_out(model.backbone, prefixes, cots), model.query.device)
    rewards = model(batch, want_log_probs=False).rewards.view(-1, 2)  # (B, 2): videos A and B of each pair
    return rewards[:, 0], rewards[:, 1]


@torch.no_grad()
def validate(model, dataset, settings, ranks) -> float:
    """COLLECTIVE: accuracy without ties over all pairs. Never masked: masking is for training."""
    model.eval()  # no dropout
    numbers, mine = list(range(len(dataset))), []
    # The same number of forwards on every rank, or FSDP deadlocks: the last round may repeat the last pair.
    order = ranks.share(numbers + numbers[-1:] * (-len(numbers) % ranks.world))
    stream = data.take(dataset, order, settings.workers)
    for _ in range(0, len(order), settings.micro_pairs):
        items = list(itertools.islice(stream, settings.micro_pairs))
        with ranks.autocast():
            reward_a, reward_b = score_pairs(model, items)
        margins = (reward_a - reward_b).tolist()
        mine += [(item.pair.label, margin) for item, margin in zip(items, margins)]
    model.train()
    labels, margins = zip(*ranks.gather_objects(mine[: len(ranks.share(numbers))]))  # what is repeated does not count
    return accuracy_without_ties(labels, margins)


def train(model, pairs, val_pairs, settings: Settings, ranks) -> None:
    """The loop of stage 1; the steps are those of the docstring at the top."""
    optimizer = parallel.make_optimizer(model, settings)
    run = Run("stage 1", model, optimizer, pairs, settings, ranks)
    # The whole schedule is known now, so loader workers can decode ahead; a resumed run starts it at its own step.
    drawn = data.EncodedPairs(draw(pairs, run, settings), model.processor, *settings.reading)
    val_set = data.EncodedPairs(val_pairs, model.processor, *settings.reading)
    stream = data.take(drawn, range(len(drawn)), settings.workers)

    model.train()
    if val_pairs and run.first and run.is_due(run.first, settings.val_every) and run.log.lacks("val_accuracy"):
        run.log.complete({"val_accuracy": validate(model, val_set, settings, ranks)})  # a kill came in the midst of it
    for step in run.steps():
        batch = [next(stream) for _ in range(run.local_pairs)]  # 1 draw pairs, 2 mask CoTs
        waited = run.seconds()  # a large share of the step means: more --workers, or --frame-cache
        # Like lengths together: less padding. Only within the batch: the sum of its gradients does not depend on it.
        batch.sort(key=lambda item: max(len(prefix["input_ids"]) for prefix in item.prefixes))
        sums = logs.Sums()
        # Micro-batches: as many pairs as memory holds. Gradients add up, so their number changes nothing.
        for i in range(0, run.local_pairs, settings.micro_pairs):
            items = batch[i : i + settings.micro_pairs]
            with ranks.autocast():
                reward_a, reward_b = score_pairs(model, items)  # 3 forward both videos: (B,), (B,)
            label = torch.tensor([item.pair.label for item in items])  # (B,) ±1, 0
            label = label.to(reward_a.device, non_blocking=True)
            # 4 The denominator is the whole batch's, over all micro-batches and ranks.
            if settings.loss == "btt":
                loss = btt_loss(reward_a, reward_b, label, denominator=settings.batch_pairs)
            else:
                # r_w, r_l of Eq. 3: the reward of the video that people preferred, A or B, and of the other.
                chosen = torch.where(label > 0, reward_a, reward_b)
                rejected = torch.where(label > 0, reward_b, reward_a)
                loss = bt_loss(chosen, rejected, denominator=settings.batch_pairs)
            sums.losses.append((loss.detach(), [dataclasses.asdict(item.pair) for item in items]))
            parallel.backward(loss, ranks)  # 5 backward
            logs.log_scores(sums, loss, reward_a, reward_b, label, [item.pair.masked for item in items])
        parallel.set_learning_rate(optimizer, step, run.warmup_steps)
        norms = parallel.take_step(model, optimizer, sums.losses, settings, ranks)  # clip and update, once per batch
        metrics = logs.cold_start_metrics(ranks.sum(sums.totals()), settings) | norms  # 6 log
        metrics |= {"lr": optimizer.param_groups[0]["lr"], "epoch": step / run.steps_per_epoch}
        metrics |= {"wait_share": waited / run.seconds(), "step_seconds": run.seconds()}
        run.save(step, metrics)
        if val_pairs and run.is_due(step, settings.val_every):  # after saving: a crash here costs nothing
            # Validation forks loader workers, with every lock as it is at that moment: one that the thread which writes
            # the checkpoint holds would never be given back to them, and the run would stand still for ever.
            run.background.wait()
            metrics["val_accuracy"] = validate(model, val_set, settings, ranks)
        run.finish_step(step, metrics, logs.cold_start_line(metrics))


# ---- The script ----------------------------------------------------------------------------------------------
def prepare_pairs(path: str, settings: Settings, ranks, need_cots: bool) -> list[data.PreferencePair]:
    """COLLECTIVE: reads a CSV, drops ties for plain BT, drops bad videos if asked, and says how many.

    InputError: no CoTs where they are needed; ties alone where a winner is; a missing video.
    """
    pairs = data.read_pairs(path, settings.dimension, settings.video_root)
    # A CSV has both CoTs of a pair or neither. Without any the head would learn to score without thinking, unnoticed.
    without = sum(pair.masked for pair in pairs)
    if need_cots and without == len(pairs) and settings.mask_probability < 1:
        raise InputError(f"{path}: has no CoT_A / CoT_B; collect them with collect_cots.py, or train with "
                         "--mask-probability 1.")
    if not need_cots and without == len(pairs):
        ranks.print(f"{path}: has no CoT_A / CoT_B, so validation is without thinking")
    elif without and settings.mask_probability < 1:
        ranks.print(f"{path}: {without} of {len(pairs)} pairs have no CoTs, and count as masked")
    # Eq. 3 needs a winner, and a human tie has none. --loss btt has a term of its own for "the same".
    if settings.loss == "bt":
        ties = sum(pair.label == 0 for pair in pairs)
        pairs = [pair for pair in pairs if pair.label != 0]
        ranks.print(f"{path}: {len(pairs)} pairs; {ties} ties left out (--loss btt uses them)")
    if not any(pair.label for pair in pairs) and (settings.loss == "bt" or not need_cots):
        raise InputError(f"{path}: in no pair one video is better; only --data of --loss btt may be ties alone.")
    return readable_pairs(pairs, settings, ranks, data.sample_frames)


def main(argv=None) -> None:
    """Reads and checks everything that can be checked, builds the model, trains it, saves it."""
    settings = parse(Settings, __doc__, argv)
    require(settings, data="a CSV of preference pairs")
    ranks = parallel.start(settings.seed, settings.cpu_offload, settings.shard_ranks)
    claim_run(settings, ranks)
    pairs = prepare_pairs(settings.data, settings, ranks, need_cots=True)
    val_pairs = prepare_pairs(settings.val, settings, ranks, need_cots=False) if settings.val else []
    dtype = parallel.load_dtype(settings.train, ranks)
    # new_head: the base model has none, so query and head start from scratch; stage 2 will insist on them.
    model = checkpoint.open_on_rank(DeScore, settings.model, dtype, ranks, new_head=True)
    fit = model.processor, settings, ranks, data.sequence_lengths
    if settings.mask_probability == 1:  # no CoT is ever read, so none is too long
        pairs = [pair.without_cots() for pair in pairs]
    pairs, longest = fitting_pairs(pairs, *fit)  # before hours of training
    val_pairs = fitting_pairs(val_pairs, *fit)[0] if val_pairs else []
    if val_pairs and not any(pair.label for pair in val_pairs):
        raise InputError(f"{settings.val}: in no pair that --skip-bad-videos leaves one video is better; give others.")
    model.settings.update(fps=settings.fps, max_pixels=settings.max_pixels)
    lora = settings.lora_r, settings.lora_alpha, settings.lora_dropout
    # lm_head maps hidden states to words: this stage's loss asks for none, so no gradient would reach it.
    model.make_trainable(settings.train, settings.train_vision, *lora, lm_head=False)
    gpu.prepare(model, settings, ranks, lambda: longest)
    for part, parameters in model.parameter_groups().items():
        ranks.print(f"trained {part}: {sum(p.numel() for p in parameters):,} parameters")
    parallel.shard(model, ranks, settings.shard_ranks, settings.cpu_offload)
    torch.manual_seed(settings.seed + ranks.rank)  # dropout: LoRA had to start alike on all ranks, masks need not
    train(model, pairs, val_pairs, settings, ranks)
    save_run(model, settings, ranks, logs.COLD_START_PANELS, "Stage 1: cold start")
    ranks.finish()


if __name__ == "__main__":
    cli(main)
