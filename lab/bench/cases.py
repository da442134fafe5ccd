"""What lab/bench measures: the clock, the memory, a model and a pair, and a stage-2 update in four layouts.

All rivals of a cell run in this process on the same weights and data. One untimed run of each warms up, counts tokens
and memory, and gives the losses and gradients that are compared. Then come `--repeats` rounds; each runs every rival
once and starts with another one, so that a drift of the machine hits all alike.
Peak memory is what a run holds at most on top of the weights: on a GPU by torch.cuda.max_memory_allocated, on a CPU the
peak of the running sum of torch.profiler's allocation events (exact for tensors; RSS would show earlier rivals too).

Shapes: G CoTs per video, P prefix tokens (video + prompt), C CoT tokens; a pair is 2 videos, the query adds 1 to C.
"""

import copy
import dataclasses
import functools
import os
import statistics
import time
import types

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is used for memory only; without a GPU it complains

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import data
import grpo
import parallel
import toy.base_model
import toy.world
from lab.bench.rivals import RIVALS, attention
from layout import lay_out
from losses import bt_loss, group_advantages, token_log_probs
from model import DeScore, Output, to_device
from plumbing.logs import Sums
from plumbing.settings import InputError

LAYOUTS = ("once", "packed", "plain", "released", *RIVALS)


# ---- 1. Measuring --------------------------------------------------------------------------------------------
def measure(cases: dict, repeats: int) -> dict[str, list[float]]:
    """{name: function} -> {name: seconds per round}. Interleaved, the order rotated by one each round."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None  # a GPU works behind Python's back
    times, names = {name: [] for name in cases}, list(cases)
    for name in [names[(k + i) % len(names)] for k in range(repeats) for i in range(len(names))]:
        wait()
        began = time.perf_counter()
        cases[name]()
        wait()
        times[name].append(time.perf_counter() - began)
    return times


def with_peak(work):
    """-> (what work() returns, the most bytes it held at a time on top of what was there before)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), work()
        return result, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])  # allocations +, frees -
    return result, int(max(0, held.max(initial=0)))


def speed_up(ours: list[float], rival: list[float]) -> float:
    """How many times faster ours is: the median over rounds of rival / ours."""
    return statistics.median(r / o for o, r in zip(ours, rival, strict=True))


def inspect(model, work, right=None) -> tuple[dict, tuple]:
    """One untimed run: ({peak MB, differences to `right`}, (loss, gradients)). Gradients: largest ‖g - g'‖ / ‖g'‖."""
    model.zero_grad()
    loss, peak = with_peak(work)
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    right = right or (loss, gradients)
    assert gradients.keys() == right[1].keys(), "other parameters have gradients"
    worst = max(float((g - right[1][n]).norm() / right[1][n].norm().clamp(min=1e-30)) for n, g in gradients.items())
    difference = {"loss differs": abs(loss - right[0]) / abs(right[0]), "gradient differs": worst}
    return {"peak MB": peak / 1e6, **difference}, (loss, gradients)


# ---- 2. The world: a model, its reference, and one pair with G CoTs per video --------------------------------
def make_world(s) -> types.SimpleNamespace:
    """bench.Settings -> settings, ranks, processor; model (LLM trained fully, tower frozen, as in stage 2); reference,
    with slightly other weights, or KL would be 0 in any layout; seen, a list of the tokens of each LLM forward."""
    ranks, processor = parallel.start(s.seed), toy.base_model.build_processor()
    on_gpu, seen = torch.cuda.is_available(), []
    heads = max(2, s.hidden // 64)
    size = dict(hidden=s.hidden, layers=s.layers, heads=heads, vision_hidden=24 * heads, vision_layers=min(3, s.layers))
    model = DeScore(toy.base_model.build_model(processor, s.seed, **size), processor)
    torch.nn.init.normal_(model.head.weight, std=s.hidden**-0.5)  # rewards that differ: a BT loss that is not ln 2
    model.make_trainable("full", vision=False)
    reference = copy.deepcopy(model).requires_grad_(False)
    for name, parameter in reference.backbone.named_parameters():
        if "visual" not in name:  # the tower is frozen in stage 2: policy and reference have the same
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn_like(parameter))
        parameter.data = parameter.data.bfloat16() if on_gpu else parameter.data  # as grpo.py loads it
    if s.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    note = lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"][..., 0].numel())  # noqa: E731, padding included
    for either in (model, reference):
        either.backbone.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    model, reference = model.to(ranks.device).train(), reference.to(ranks.device).eval()
    names = ("settings", "ranks", "processor", "model", "reference", "seen")
    return types.SimpleNamespace(**dict(zip(names, (s, ranks, processor, model, reference, seen))))


def make_prefix(processor, length: int, seed: int) -> dict:
    """A real `encode_prompt` of exactly `length` tokens: about 3/4 video where there is room, filled up with words.

    InputError: fewer tokens than a clip needs.
    """
    rng, room = np.random.default_rng(seed), max(1, 0.75 * (length - 34))  # 34: chat layout and timestamps
    steps = max(4, round(room / 196))  # a time step is two frames, of at most 448 x 448 pixels = 14 x 14 tokens
    side = 32 * max(1, int((room / steps) ** 0.5))
    frames = toy.world.render_clip(toy.world.random_values(rng), rng, np.arange(2 * steps) / 2, size=side)
    video = data.Video(frames, 2.0, len(frames), tuple(range(len(frames))))
    words = length + 1 - len(data.encode_prompt(processor, video, " red")["input_ids"])  # " red" is one token
    if words < 1:
        raise InputError(f"a prefix of {length} tokens is too short for a clip; raise --cot-tokens.")
    prefix = data.encode_prompt(processor, video, " red" * words)
    assert len(prefix["input_ids"]) == length
    return prefix


def make_rollouts(processor, prefix_tokens: int, group: int, cot_tokens: int, seed: int) -> grpo.PairRollouts:
    """One pair: two prefixes of P tokens, G random CoTs of C tokens for each, random rollout rewards."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(256, (2, group, cot_tokens), generator=generator)  # ids below 256 are letters
    advantages = group_advantages(torch.rand(2, group, generator=generator))
    prefixes = [make_prefix(processor, prefix_tokens, seed + video) for video in (0, 1)]
    pair = data.PreferencePair("a", "b", "a prompt", 1)
    return grpo.PairRollouts(pair, prefixes, words.tolist(), advantages=advantages)


# ---- 3. Stage 2: one update of one pair, forward and backward, in four layouts -------------------------------
def case_of(world, layout: str, rollouts: grpo.PairRollouts):
    """A function without arguments: one update in a layout, returns the loss. KL weighs 1e-2 (released config): with
    the launch script's 1e-5 the comparison would not see it."""
    settings = grpo.Settings(rollouts=len(rollouts.cots[0]), kl_coef=1e-2, micro_rollouts=world.settings.micro_rollouts)
    if not world.settings.old_pass:
        settings.mini_pairs = settings.batch_pairs
    if layout == "plain forward":  # a row per CoT, no gradient: the FLOP/s that this model reaches here

        @torch.no_grad()
        def forward():
            with world.ranks.autocast():
                world.model(rows_of(world.model, rollouts, packed=False))

        return forward
    if layout in ("packed", "plain"):
        return functools.partial(update_rows, world, rollouts, settings, layout == "packed")
    if layout in RIVALS:

        def rival():
            with attention(world.model, layout), attention(world.reference, layout):
                return update_rows(world, rollouts, settings, packed=True)

        return rival
    update = {"once": update_once, "released": update_released}[layout]
    return functools.partial(update, world, dataclasses.replace(rollouts), settings)


def rows_of(model, rollouts: grpo.PairRollouts, packed: bool) -> dict:
    """The tensors of a forward over whole rows: a row per video, its prefix and G CoTs; or a row per CoT."""
    prefixes, cots = rollouts.prefixes, rollouts.cots
    if not packed:
        prefixes = [prefix for prefix, row in zip(prefixes, cots) for _ in row]
        cots = [[cot] for row in cots for cot in row]
    return to_device(lay_out(model.backbone, prefixes, cots), model.query.device)


def update_once(world, rollouts: grpo.PairRollouts, settings: grpo.Settings) -> float:
    """grpo.py's own: the prefixes once, --micro-rollouts CoTs of each video at a time. Returns the loss."""
    world.model.zero_grad()
    if world.settings.old_pass:
        rollouts.old, _ = grpo.log_probs_now(world.model, rollouts, settings, world.ranks)
    counts, sums = {"tokens": rollouts.num_tokens, "bt": settings.rollouts}, Sums()
    grpo.backward_pair(world.model, world.reference, rollouts, settings, world.ranks, counts, sums)
    totals = sums.totals()
    return totals["grpo_loss"] + settings.kl_coef * totals["kl"] + settings.bt_coef * totals["bt_loss"]


def update_rows(world, rollouts: grpo.PairRollouts, settings: grpo.Settings, packed: bool) -> float:
    """All CoTs of the pair in one forward and one backward, over whole rows. Returns the loss."""
    model, ranks = world.model, world.ranks
    model.zero_grad()
    batch = rows_of(model, rollouts, packed)
    with torch.no_grad(), ranks.autocast():
        old = model(batch).log_probs if world.settings.old_pass else None
        reference = world.reference(batch).log_probs
    rollouts = dataclasses.replace(rollouts, reference=reference.unflatten(0, (2, -1)))
    with ranks.autocast():
        output = model(batch)
    old = output.log_probs.detach() if old is None else old
    counts = {"tokens": rollouts.num_tokens, "bt": settings.rollouts}
    policy, kl, bt = grpo.losses_of(output, old, batch["cot_mask"], rollouts, settings, counts)
    loss = policy + settings.kl_coef * kl + settings.bt_coef * bt
    parallel.backward(loss, ranks)
    return loss.item()


def update_released(world, rollouts: grpo.PairRollouts, settings: grpo.Settings) -> float:
    """The released code's passes, from their description (docs/differences.md), with our losses.

    Per micro-batch of rollouts, a row per CoT, the whole video in each: forwards for old and reference log-probs, then
    a forward and backward for the policy's log-probs and another for the query's state. The optimizer, its pure bf16
    weights and the copied embedding are left out, and the query's forward is spared the logits: in its favour.
    """
    model, ranks, size = world.model, world.ranks, min(settings.rollouts, world.settings.released_micro)
    names = ("input_ids", "spans", "position_ids", "pixel_values_videos", "video_grid_thw")

    def full_log_probs(model, batch):
        """(N, T), from logits (B * L, V) at EVERY position."""
        ends = torch.tensor([0, *batch["frames"]]).cumsum(0)  # on the host, as in ours: the tower does not wait
        logits = model.backbone(**{name: batch[name] for name in names}, video_cu_seqlens=ends, use_cache=False).logits
        logits = logits.flatten(0, 1)
        mask = batch["cot_mask"].bool()
        found = token_log_probs(logits[batch["cot_index"][mask]], batch["cot_ids"][mask])
        return torch.zeros(mask.shape, device=found.device).masked_scatter(mask, found)

    model.zero_grad()
    counts, total = {"tokens": rollouts.num_tokens, "bt": settings.rollouts}, 0.0
    parts = list(rollouts.parts(size))
    with torch.no_grad(), ranks.autocast():
        for part in parts:
            batch = rows_of(model, part, packed=False)
            part.old = full_log_probs(model, batch)
            part.reference = full_log_probs(world.reference, batch).unflatten(0, (2, -1))
    for part in parts:
        batch = rows_of(model, part, packed=False)
        with ranks.autocast():
            output = Output(torch.zeros(2 * len(part.cots[0]), device=ranks.device), full_log_probs(model, batch))
        policy, kl, _ = grpo.losses_of(output, part.old, batch["cot_mask"], part, settings, counts)
        loss = policy + settings.kl_coef * kl
        parallel.backward(loss, ranks)
        with ranks.autocast():
            chosen, rejected = model(batch, want_log_probs=False).rewards.view(2, -1)  # the pair's label is +1
        bt = settings.bt_coef * bt_loss(chosen, rejected, denominator=counts["bt"])
        parallel.backward(bt, ranks)
        total += loss.item() + bt.item()
    return total


def forward_flops(model: DeScore, prefix: dict, cots: list[int]) -> dict[str, float]:
    """FLOPs of ONE forward of a video with CoTs of these lengths, nothing computed twice.

    linear: 2 * weights of the LLM's linear layers * tokens; lm_head: likewise, at CoT positions only; attention: 4 *
    width * layers for each (query, key) that the drawing in `lay_out` allows: half of a causal square, not the whole.
    vision: 2 * weights * patches (mergers: patches / 4), and attention within each time step.
    """
    text, tower = model.backbone.config.text_config, model.backbone.model.visual
    layers = [m for m in model.backbone.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    linear = sum(m.weight.numel() for m in layers)
    p, lengths = len(prefix["input_ids"]), [c + 1 for c in cots]  # + 1: the query
    seen = p * (p + 1) / 2 + sum(c * p + c * (c + 1) / 2 for c in lengths)
    attention = 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers * seen
    steps, height, width = prefix["video_grid_thw"][0].tolist()
    patches = steps * height * width
    weights = {n: w.numel() for n, w in tower.named_parameters() if w.ndim > 1 and "pos_embed" not in n}
    vision = sum(2 * w * (patches / 4 if "merger" in n else patches) for n, w in weights.items())
    vision += 4 * tower.config.hidden_size * tower.config.depth * patches * patches / steps
    lm_head = 2 * model.backbone.lm_head.weight.numel() * sum(cots)
    return {"linear": 2 * linear * (p + sum(lengths)), "attention": attention,
            "lm_head": lm_head, "vision": vision}


def count_flops(world, rollouts: grpo.PairRollouts, packed: bool, forward_only: bool = False) -> float:
    """FLOPs of one update: backward is twice a forward, the reference one more; the frozen tower runs forward only,
    once for policy and reference together.

    packed=True is the ideal: each prefix once, and the tower once a video.
    """
    total, passes = 0.0, 1 if forward_only else 4 + world.settings.old_pass
    for prefix, cots in zip(rollouts.prefixes, rollouts.cots):
        for lengths in [[len(c) for c in cots]] if packed else [[len(c)] for c in cots]:
            flops = forward_flops(world.model, prefix, lengths)
            vision = flops.pop("vision")
            total += passes * sum(flops.values()) + vision
    return total
