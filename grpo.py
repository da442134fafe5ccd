"""Stage 2, dual-objective RL: GRPO on the chain of thought (Eq. 7), Bradley-Terry on the score (Eq. 10).

    CSV with true verdicts + OUT of stage 1   ->   OUT/model, a DeScore folder; metrics.jsonl, samples.jsonl, curves.png

    laptop   the line in scripts/demo.sh
    8 GPUs   torchrun --nproc_per_node 8 grpo.py --model runs/stage1/model --data train_rl.csv --out OUT --engine vllm

The defaults are the paper's. The loop in `train` is the paper's algorithm, step by step, and the file goes on in its
order; mini.py is the same on one page:

    1 draw pairs      2 generate: G CoTs for each of the two videos      3 rollout rewards, by rules only
    4 group advantages      5 old log-probs      6 update: one forward of a CoT gives GRPO + KL + BT
    7 hand the new weights to the rollout engine      8 log

What to expect: `rollout_reward` and `quality` rise slowly; `pair_accuracy` must not fall. With one update a batch
(--mini-pairs as --batch-pairs) `grpo_loss` near 0 and `ratio_max` 1 are right: losses.grpo_loss says why; the defaults
make 16, and the ratio leaves 1 after the first. The two objectives are independent: the rules never see the head's
score, and no gradient of the GRPO loss reaches the head, because log-probs do not pass through it.
"""

import contextlib
import dataclasses
import os

import torch
from torch.nn.functional import pad

import data
import parallel
from layout import lay_out
from losses import bt_loss, group_advantages, grpo_loss, kl_to_reference
from model import DeScore, to_device
from plumbing import checkpoint, gpu, logs
from plumbing.jobs import fitting_prompts, lengths_of, readable_pairs, task_seed
from plumbing.settings import CommonSettings, annotated_pairs, arg, cli, grpo_flags, parse
from plumbing.training import Run, claim_run, save_run
from prefix_once import Past, lay_out_behind
from rollout import EngineSettings, decode_cot, make_engine
from rules import RolloutReward, rollout_reward


@dataclasses.dataclass
class Settings(CommonSettings, EngineSettings):
    """Stage 2; more in CommonSettings and EngineSettings. Defaults: the paper's, from its page and the code."""

    # data
    data: str = arg(None, "training pairs with true verdicts: a CSV in DeScore's RL format")
    max_pixels: int = arg(307_200, "pixels per frame at most (paper, stage 2: 307,200)", at_least=1024)
    # model
    model: str = arg(None, "a DeScore folder: OUT/model of stage 1")
    train: str = arg("full", "what of the LLM is trained (paper: full)", choices=["lora", "full"])
    # rollouts
    rollouts: int = arg(8, "G, CoTs sampled per video (paper: 8)", at_least=2)
    temperature: float = arg(1.0, "of sampling, and so of all log-probs (paper: 1)", above=0)
    # Less than elsewhere (.9): the trainer's shards, reference and optimizer stay on the GPU while the engine samples.
    engine_memory: float = arg(
        0.4, "share of a GPU's memory that vLLM may use; it sleeps during the update", above=0, at_most=1)
    rows_per_batch: int = arg(64, "CoTs the transformers engine samples at a time", at_least=1)
    # rollout reward
    weight_quality: float = arg(0.7, "weight of R_qual (paper: .7)", at_least=0)
    weight_format: float = arg(0.1, "weight of R_fmt (paper: .1)", at_least=0)
    weight_length: float = arg(0.2, "weight of R_len (paper: .2)", at_least=0)
    length_low: int = arg(500, "CoT tokens up to which R_len is 0 (paper: 500)", at_least=0)
    length_high: int = arg(2000, "CoT tokens from which R_len is 1 (paper: 2000)", at_least=1)
    # objectives
    clip_low: float = arg(0.2, "ratio clip below (EasyR1's default: .2)", at_least=0, at_most=1)
    clip_high: float = arg(0.3, "ratio clip above (EasyR1's default: .3)", at_least=0)
    clip_dual: float = arg(3.0, "dual clip for negative advantages (EasyR1's default: 3)", above=1)
    kl_coef: float = arg(
        1e-5, "weight of the KL to the start of this stage (paper's launch script: 1e-5); 0: no reference", at_least=0)
    bt_coef: float = arg(
        5e-3, "weight of BT over rollouts, Eq. 10 (paper: 5e-3); 0 switches BT off; rewards then drift", at_least=0)
    # optimisation
    epochs: int = arg(1, "passes over the data (not given in the paper)", at_least=1)
    batch_pairs: int = arg(128, "pairs per rollout batch over all ranks (paper: 128)", at_least=1)
    mini_pairs: int = arg(
        8, "pairs per update (paper: 8); equal to --batch-pairs: on-policy, no pass for old log-probs", at_least=1)
    micro_rollouts: int = arg(
        2, "CoTs of each video in one forward and backward: more is faster and needs more memory", at_least=1)
    lr: float = arg(1e-6, "learning rate of the LLM (paper: 1e-6)", at_least=0)
    warmup: float = arg(
        0.0, "share of all rollout batches with a rising learning rate (not given in the paper)", at_least=0, at_most=1)
    weight_decay: float = arg(1e-2, "AdamW weight decay (paper: 1e-2)", at_least=0)
    # output
    out: str = arg("runs/stage2", "output folder")
    save_every: int = arg(10, "rollout batches between checkpoints; 0: only at the end", at_least=0)

    @property
    def on_policy(self) -> bool:
        """One update per rollout batch: the policy that is updated IS the one that sampled."""
        return self.mini_pairs == self.batch_pairs


@dataclasses.dataclass
class PairRollouts:
    """All that belongs to ONE pair, so that nothing can land on another one's rollout (docs/differences.md, row 5).

    The first index is the video (0 = A, 1 = B), the second the rollout i = 0..G-1. The steps fill it in their order.
    """

    pair: data.PreferencePair
    prefixes: list[dict]  # [2]
    cots: list[list[list[int]]]  # [2][G] token ids
    engine_log_probs: list[list[list[float]] | None] = (None, None)  # [2][G][token], if the engine tells
    rule_rewards: list[list[RolloutReward]] = None  # [2][G]
    advantages: torch.Tensor = None  # (2, G)
    old: torch.Tensor = None  # (2, G, T) log-probs before the batch's first update; on-policy not needed
    reference: torch.Tensor = None  # (2, G, T) log-probs under the reference; None with --kl-coef 0

    @property
    def num_tokens(self) -> int:
        """CoT tokens of both videos' rollouts."""
        return sum(len(cot) for row in self.cots for cot in row)

    def totals(self) -> torch.Tensor:
        """(2, G): R of each rollout."""
        return torch.tensor([[reward.total for reward in row] for row in self.rule_rewards])

    def parts(self, size: int):
        """The pair's rollouts, `size` of each video at a time. Eq. 10 sets i against i: a part has both."""
        for i in range(0, len(self.cots[0]), size):
            some = slice(i, i + size)
            cots, engine, rewards = ([row and row[some] for row in rows or (None, None)] for rows in
                                     (self.cots, self.engine_log_probs, self.rule_rewards))
            longest = max(len(cot) for row in cots for cot in row)
            old, reference = (x if x is None else x[:, some, :longest] for x in (self.old, self.reference))
            yield dataclasses.replace(self, cots=cots, engine_log_probs=engine, rule_rewards=rewards, old=old,
                                      reference=reference, advantages=self.advantages[:, some])

    def record(self) -> dict:
        """The pair and its CoTs for a file that a person reads."""
        return {**dataclasses.asdict(self.pair), "cots": self.cots, "advantages": self.advantages.tolist()}


# ---- The loop -------------------------------------------------------------------------------------------------
def train(model, reference, engine, pairs, settings: Settings, ranks, rewards=None) -> None:
    """The loop of stage 2; the steps are those of the docstring at the top.

    rewards: (PairRollouts, tokenizer, settings) -> [2][G] RolloutReward, step 3; default `rule_rewards`, another is in
    lab/study/coupled.py.
    """
    rewards = rewards or rule_rewards
    optimizer = parallel.make_optimizer(model, settings)
    run = Run("stage 2", model, optimizer, pairs, settings, ranks)
    if run.first:
        engine.sync(parallel.trained_weights(model))
    dataset = data.EncodedPairs(pairs, model.processor, *settings.reading)
    order = [index for _, indices in run.draws() for index in indices]
    stream = data.take(dataset, order, settings.workers)
    tokenizer, mini_size = model.processor.tokenizer, settings.mini_pairs // ranks.world

    model.train()
    # Rewards and advantages belong to the CoTs as they were sampled: they are computed once per rollout batch, and stay
    # the same for all of its mini-batches, while the policy moves on. That is what the ratio π / π_old corrects for.
    for step in run.steps():
        items = [next(stream) for _ in range(run.local_pairs)]  # 1 draw pairs
        drawn = run.seconds()
        batch = generate(items, engine, settings, step)  # 2 generate
        for rollouts in batch:
            rollouts.rule_rewards = rewards(rollouts, tokenizer, settings)  # 3 rollout rewards: never by the head
            rollouts.advantages = group_advantages(rollouts.totals())  # 4 group advantages: (2, G)
        generated = run.seconds()
        if not settings.on_policy:  # else the update's own forward gives them
            for rollouts in batch:
                rollouts.old, _ = log_probs_now(model, rollouts, settings, ranks)  # 5 old log-probs
        parallel.set_learning_rate(optimizer, step, run.warmup_steps)
        updates = []
        for i in range(0, run.local_pairs, mini_size):  # one mini-batch = one optimizer step
            updates.append(update(model, reference, optimizer, batch[i : i + mini_size], settings, ranks))  # 6 update
        engine.sync(parallel.trained_weights(model))  # 7 the engine samples the next batch from the new weights
        metrics = logs.grpo_metrics(batch, updates, tokenizer.eos_token_id, settings, ranks)  # 8 log
        metrics |= {"wait_share": drawn / run.seconds(), "generate_seconds": generated - drawn}
        metrics |= {"update_seconds": run.seconds() - generated, "step_seconds": run.seconds()}
        run.save(step, metrics)
        if ranks.is_main:
            texts = [decode_cot(tokenizer, cot) for cot in batch[0].cots[0]]
            logs.write_samples(os.path.join(settings.out, "samples.jsonl"), step, batch[0], texts)
        run.finish_step(step, metrics, logs.grpo_line(metrics))


# ---- The steps, in their order --------------------------------------------------------------------------------
def generate(items, engine, settings, step) -> list[PairRollouts]:
    """2: G CoTs for each of the two videos of each pair."""
    prefixes = [prefix for item in items for prefix in item.prefixes]
    seeds = [[task_seed(settings.seed, step, item.pair.line, video, i) for i in range(settings.rollouts)]
             for item in items for video in (0, 1)]  # each CoT's own: the sample does not depend on its batch-mates
    cots = engine.generate(prefixes, seeds, settings.max_new_tokens, settings.temperature)
    log_probs = getattr(engine, "log_probs", None) or [None] * len(cots)  # as the engine saw them, if it tells
    two = [slice(2 * n, 2 * n + 2) for n in range(len(items))]  # each pair's two videos among all
    return [PairRollouts(*item, cots[ab], engine_log_probs=log_probs[ab]) for item, ab in zip(items, two)]


def rule_rewards(rollouts: PairRollouts, tokenizer, settings) -> list[list[RolloutReward]]:
    """3: rollout rewards [2][G] by the rules, each video against its own true verdicts."""
    weights = settings.weight_quality, settings.weight_format, settings.weight_length
    span = settings.length_low, settings.length_high
    annotations = rollouts.pair.annotation_a, rollouts.pair.annotation_b
    return [
        [rollout_reward(decode_cot(tokenizer, cot), len(cot), truth, weights, span) for cot in row]
        for row, truth in zip(rollouts.cots, annotations, strict=True)
    ]


@torch.no_grad()
def log_probs_now(model, rollouts: PairRollouts, settings, ranks):
    """COLLECTIVE under FSDP. 5: log-probs (2, G, T) of a pair's CoTs under the model as it is; what the tower saw."""
    past, found = read(model, rollouts, settings, ranks), []
    longest = max(len(cot) for row in rollouts.cots for cot in row)
    for part in rollouts.parts(settings.micro_rollouts):
        log_probs = forward_behind(model, past, part, settings, ranks)[0].log_probs
        found.append(pad(log_probs, (0, longest - log_probs.shape[1])).unflatten(0, (2, -1)))
    return torch.cat(found, dim=1), past.video_features


def read(model, rollouts: PairRollouts, settings, ranks, features=None) -> Past:
    """COLLECTIVE under FSDP: the pair's two prefixes."""
    batch = to_device(lay_out(model.backbone, rollouts.prefixes, [[], []]), model.query.device)
    with ranks.autocast():
        return model.read(batch, features)


def forward_behind(model, past: Past, rollouts: PairRollouts, settings, ranks):
    """COLLECTIVE under FSDP: the ONE forward of a pair's N CoTs behind their prefixes -> (Output, mask (N, T))."""
    batch = to_device(lay_out_behind(model.backbone, rollouts.prefixes, rollouts.cots), model.query.device)
    with ranks.autocast():
        return model(batch, temperature=settings.temperature, past=past), batch["cot_mask"]


def update(model, reference, optimizer, mini: list[PairRollouts], settings, ranks) -> dict[str, float]:
    """COLLECTIVE. 6: one update from this rank's pairs of a mini-batch. Returns what is logged of it."""
    counts, sums = denominators(mini, settings, ranks), logs.Sums()
    for rollouts in mini:
        backward_pair(model, reference, rollouts, settings, ranks, counts, sums)
    norms, totals = parallel.take_step(model, optimizer, sums.losses, settings, ranks), sums.totals()
    ratio_max = max(ranks.gather_objects([totals.pop("ratio_max")]))
    return {**ranks.sum(totals), "ratio_max": ratio_max, **norms}


def backward_pair(model, reference, rollouts: PairRollouts, settings, ranks, counts, sums) -> None:
    """COLLECTIVE under FSDP. Adds one pair's gradients, and to `sums` what is logged.

    Its two prefixes go forward and backward ONCE, its CoTs a few at a time in between: what is in memory at a time is
    the prefixes and a few CoTs, however large G is.
    """
    features = add_reference(model, reference, rollouts, settings, ranks)
    past = read(model, rollouts, settings, ranks, features)
    cut = past.cut()  # a part's backward ends at the prefixes' keys and values
    for part in rollouts.parts(settings.micro_rollouts):
        output, mask = forward_behind(model, cut, part, settings, ranks)  # ONE forward: log-probs and rewards
        old = output.log_probs.detach() if settings.on_policy else part.old.flatten(0, 1)  # log π_old (N, T)
        grpo, kl, bt = losses_of(output, old, mask, part, settings, counts)
        loss = grpo + settings.kl_coef * kl + settings.bt_coef * bt  # Eq. 7 and Eq. 10
        sums.losses.append((loss.detach(), [part.record()]))
        parallel.backward(loss, ranks)
        sums.add(grpo_loss=grpo, kl=kl, bt_loss=bt)
        logs.log_update(sums, output, mask, old, part, settings, counts)
    past.backward(cut)  # and goes on from there, for all parts together


def add_reference(model, reference, rollouts: PairRollouts, settings, ranks):
    """COLLECTIVE under FSDP. Log-probs under the model at the start of this stage: with LoRA, without the adapter.

    Returns what the tower saw, for the policy's pass: it is frozen in stage 2. (Kept for a whole batch of rollouts it
    would be 9 to 18 GB, by counting.) None where the policy's tower computes in another precision than the reference's:
    π_old was read with the policy's own, and at the first update the ratio must be 1.
    """
    if settings.kl_coef == 0:
        return None
    with model.reference_policy() if reference is None else contextlib.nullcontext(reference) as frozen:
        rollouts.reference, features = log_probs_now(frozen, rollouts, settings, ranks)
    # One GPU: fp32 weights under autocast beside a reference loaded in bf16. Under FSDP both compute in bf16.
    one, other = (m.backbone.model.visual.dtype for m in (model, frozen))
    return features if ranks.sharded or one == other else None


def losses_of(output, old, mask, rollouts: PairRollouts, settings, counts) -> tuple[torch.Tensor, ...]:
    """The three losses of one pair: GRPO (Eq. 7), KL (Eq. 7), BT (Eq. 10), each with the whole update's denominator.

    N of its CoTs, A_i.. then B_i..; old, mask (N, T). GRPO and KL train the thinking; BT trains the score, and through
    its hidden states the LLM.
    """
    log_probs = output.log_probs  # (N, T)
    advantages = rollouts.advantages.flatten().to(mask.device)  # (N,) in the same order
    clip = settings.clip_low, settings.clip_high, settings.clip_dual
    grpo = grpo_loss(log_probs, old, advantages, mask, *clip, denominator=counts["tokens"])
    kl = torch.zeros((), device=mask.device)
    if rollouts.reference is not None:
        kl = (kl_to_reference(log_probs, rollouts.reference.flatten(0, 1)) * mask).sum() / counts["tokens"]
    # Eq. 10: rollout i of the winner against rollout i of the loser
    reward_a, reward_b = output.rewards.view(2, -1)  # (N/2,) each
    if rollouts.pair.label > 0:
        bt = bt_loss(reward_a, reward_b, denominator=counts["bt"])
    elif rollouts.pair.label < 0:
        bt = bt_loss(reward_b, reward_a, denominator=counts["bt"])
    else:  # a human tie has no winner; times 0 keeps the head in the graph, so that ranks' backwards match
        bt = 0.0 * output.rewards.sum()
    return grpo, kl, bt


def denominators(mini: list[PairRollouts], settings, ranks) -> dict[str, float]:
    """COLLECTIVE: what the sums of an update are divided by, over all ranks, known before its first backward.

    "tokens": CoT tokens, for GRPO and KL; "bt": pairs of rollouts that have a winner, for BT.
    """
    tokens, decided = sum(r.num_tokens for r in mini), sum(r.pair.label != 0 for r in mini)
    counts = ranks.sum({"tokens": tokens, "bt": decided * settings.rollouts})
    return {name: max(1.0, count) for name, count in counts.items()}


# ---- The script -----------------------------------------------------------------------------------------------
def main(argv=None) -> None:
    """Reads and checks the data, builds policy, reference and engine, trains, saves."""
    settings = parse(Settings, __doc__, argv)
    ranks, pairs = begin(settings)
    annotated_pairs(pairs, settings.data)
    run(open_policy(settings, ranks), pairs, settings, ranks)


def begin(settings: Settings):
    """COLLECTIVE: checks the flags, claims --out, reads --data -> (ranks, pairs whose videos can be read)."""
    ranks = parallel.start(settings.seed, settings.cpu_offload, settings.shard_ranks)
    grpo_flags(settings, ranks)
    claim_run(settings, ranks)
    pairs = data.read_pairs(settings.data, video_root=settings.video_root)
    return ranks, readable_pairs(pairs, settings, ranks, data.sample_frames)


def open_policy(settings: Settings, ranks, new_head: bool = False) -> DeScore:
    """COLLECTIVE: the model that is trained, not yet sharded. new_head: --model may be a base model, without a head."""
    dtype = parallel.load_dtype(settings.train, ranks)
    model = checkpoint.open_on_rank(DeScore, settings.model, dtype, ranks, new_head)
    model.settings.update(fps=settings.fps, max_pixels=settings.max_pixels)
    # The vision tower is frozen (paper). No dropout: π_θ must equal π_old at the first update, or the ratio is not 1.
    model.make_trainable(settings.train, False, settings.lora_r, settings.lora_alpha, lora_dropout=0.0)
    return model


def run(model: DeScore, pairs, settings: Settings, ranks, rewards=None) -> None:
    """COLLECTIVE: adds reference and engine, trains, saves. rewards: as in `train`."""
    fit, longest = (model.processor, settings, ranks, data.sequence_lengths), None
    if settings.engine == "vllm":  # before hours of training: vLLM's rows have an end, --engine-max-len
        pairs, longest = fitting_prompts(pairs, *fit)
    compiled = gpu.prepare(model, settings, ranks, lambda: longest or max(lengths_of(pairs, *fit).values()))
    reference = None
    if settings.kl_coef > 0 and settings.train == "full":  # with LoRA the reference is the model without its adapter
        # new_head: the policy's has been checked, and the reference gives no rewards
        reference = checkpoint.open_on_rank(
            DeScore, settings.model, parallel.load_dtype("lora", ranks), ranks, new_head=True)
        reference.eval().requires_grad_(False)
        parallel.shard(reference, ranks, settings.shard_ranks, settings.cpu_offload, frozen=True)
    own = None if ranks.sharded else model.backbone  # under FSDP the transformers engine needs an unsharded copy
    engine = make_engine(
        settings.engine, settings.model, model.processor, ranks, own, settings.seed, settings.engine_max_len,
        settings.rows_per_batch, ranks.autocast, compiled, memory=settings.engine_memory, tp=settings.engine_tp,
    )
    parallel.shard(model, ranks, settings.shard_ranks, settings.cpu_offload)
    train(model, reference, engine, pairs, settings, ranks, rewards)
    save_run(model, settings, ranks, logs.GRPO_PANELS, "Stage 2: GRPO + BT")
    ranks.finish(engine)


if __name__ == "__main__":
    cli(main)
