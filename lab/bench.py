"""What our layouts save: stage 2, stage 1, sampling, decoding and the metric, each beside its rivals, on this machine.

    python -m lab.bench [--quick] [--only stage2,metric]   ->   OUT/bench.json, bench.md (the tables printed), bench.png

Needs no data: it renders clips and makes a random Qwen3-VL (toy.py), hidden 256 x 4 layers on a CPU, 1024 x 12 on a
GPU: so wide that arithmetic, not Python, takes the time. `lm_head` is 4 % of the language model (8 % in the 8B).

All rivals of a cell run in this process on the same weights and data. One untimed run of each warms up, counts tokens
and memory, and gives the losses and gradients that are compared. Then come `--repeats` rounds; each runs every rival
once and starts with another one, so that a drift of the machine hits all alike. Tables show median [min, max];
"x plain" is the median over rounds of plain's seconds / this row's in the same round: 2 = twice as fast as plain.
Peak memory is what a run holds at most on top of the weights: on a GPU by torch.cuda.max_memory_allocated, on a CPU the
peak of the running sum of torch.profiler's allocation events (exact for tensors; RSS would show earlier rivals too).

Shapes: G CoTs per video, P prefix tokens (video + prompt), C CoT tokens; a pair is 2 videos, the query adds 1 to C.
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
import types

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is used for memory only; without a GPU it complains

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import cold_start
import data
import grpo
import metrics
import parallel
from lab import toy, toy_model
from data import InputError
from layout import lay_out
from losses import bt_loss, group_advantages, token_log_probs
from model import DeScore, Output, to_device
from plumbing.settings import arg, cli, parse
from plumbing.jobs import task_seed
from rollout import make_engine

LAYOUTS = ("packed", "plain", "released")


@dataclasses.dataclass
class Settings:
    """What is measured, and how large."""

    out: str = arg("runs/bench", "output folder")
    quick: bool = arg(False, "one cell of stage 2 (P : C = 4 : 1, G = 8), three points per line, three rounds")
    only: str = arg("stage2,stage1,scaling,decode,metric,rollout", "sections, separated by commas")
    ratios: list[float] = arg((0.5, 1, 4, 16), "stage 2: prefix tokens P / CoT tokens C", above=0)
    groups: list[int] = arg((4, 8, 16), "stage 2: G, CoTs per video", at_least=1)
    repeats: int = arg(0, "timed rounds; 0: 5, or 3 with --quick", at_least=0)
    cot_tokens: int = arg(0, "C, tokens per CoT; 0: 64 on a CPU, 256 on a GPU", at_least=0)
    hidden: int = arg(0, "hidden size of the model; 0: 256 on a CPU, 1024 on a GPU", at_least=0)
    layers: int = arg(0, "layers of the model; 0: 4 on a CPU, 12 on a GPU", at_least=0)
    released_micro: int = arg(
        2, "CoTs of each video in one forward of the released layout (EasyR1's default: 4 rows)", at_least=1)
    old_pass: bool = arg(False, "add the pass for old log-probs, which ours needs when --mini-pairs < --batch-pairs")
    gradient_checkpointing: bool = arg(False, "recompute activations in backward, in all layouts")
    seed: int = arg(0, "decides weights, clips and CoTs", at_least=0)


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
def make_world(s: Settings) -> types.SimpleNamespace:
    """-> settings, ranks, processor; model (LLM trained fully, tower frozen, as in stage 2); reference, with slightly
    other weights, or KL would be 0 in any layout; seen, a list of the tokens of each LLM forward."""
    ranks, processor, on_gpu, seen = parallel.start(s.seed), toy_model.build_processor(), torch.cuda.is_available(), []
    heads = max(2, s.hidden // 64)
    size = dict(hidden=s.hidden, layers=s.layers, heads=heads, vision_hidden=24 * heads, vision_layers=min(3, s.layers))
    model = DeScore(toy_model.build_model(processor, s.seed, **size), processor)
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
    """A real `encode_prompt` of exactly `length` tokens: about 3/4 video where there is room, filled up with words."""
    rng, room = np.random.default_rng(seed), max(1, 0.75 * (length - 34))  # 34: chat layout and timestamps
    steps = max(4, round(room / 196))  # a time step is two frames, of at most 448 x 448 pixels = 14 x 14 tokens
    side = 32 * max(1, int((room / steps) ** 0.5))
    frames = toy.render_clip(toy.random_values(rng), rng, np.arange(2 * steps) / 2, size=side)
    video = data.Video(frames, 2.0, len(frames), tuple(range(len(frames))))
    words = length + 1 - len(data.encode_prompt(processor, video, " red")["input_ids"])  # " red" is one token
    if words < 1:
        raise InputError(f"a prefix of {length} tokens is too short for a clip; raise --cot-tokens.")
    prefix = data.encode_prompt(processor, video, " red" * words)
    assert len(prefix["input_ids"]) == length
    return prefix


def make_rollouts(processor, prefix_tokens: int, group: int, cot_tokens: int, seed: int) -> grpo.Rollouts:
    """One pair: two prefixes of P tokens, G random CoTs of C tokens for each, random rollout rewards."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(256, (2, group, cot_tokens), generator=generator)  # ids below 256 are letters
    advantages = group_advantages(torch.rand(2, group, generator=generator))
    prefixes = [make_prefix(processor, prefix_tokens, seed + video) for video in (0, 1)]
    return grpo.Rollouts(data.PreferencePair("a", "b", "a prompt", 1), prefixes, words.tolist(), advantages=advantages)


# ---- 3. Stage 2: one update of one pair, forward and backward, in three layouts ------------------------------
def case_of(world, layout: str, rollouts: grpo.Rollouts):
    """A function without arguments: one update in a layout, returns the loss. KL weighs 1e-2 (released config): with
    the launch script's 1e-5 the comparison would not see it."""
    settings = grpo.Settings(rollouts=len(rollouts.cots[0]), packing=layout == "packed", kl_coef=1e-2)
    rollouts = dataclasses.replace(rollouts)
    if layout == "plain forward":  # a row per CoT, no gradient: the FLOP/s that this model reaches here

        def forward():
            rollouts.video_features = None  # not what the round before saw
            grpo.log_probs_now(world.model, rollouts, settings, world.ranks)

        return forward
    return functools.partial(update_released if layout == "released" else update_ours, world, rollouts, settings)


def update_ours(world, rollouts: grpo.Rollouts, settings: grpo.Settings) -> float:
    """grpo.py's own update without the optimizer: reference pass, ONE forward, one backward. Returns the loss."""
    model, ranks = world.model, world.ranks
    model.zero_grad()
    rollouts.video_features = None  # not what the round before saw
    rollouts.old = grpo.log_probs_now(model, rollouts, settings, ranks) if world.settings.old_pass else None
    rollouts.reference = grpo.log_probs_now(world.reference, rollouts, settings, ranks)
    counts = {"tokens": rollouts.num_tokens, "bt": settings.rollouts}
    batch = grpo.lay_out_pair(model, rollouts, settings)
    with ranks.autocast():
        output = model(batch, video_features=rollouts.video_features)
    policy, kl, bt = grpo.losses_of(output, batch["response_mask"], rollouts, settings, counts)
    loss = policy + settings.kl_coef * kl + settings.bt_coef * bt
    parallel.backward(loss, ranks)
    return loss.item()


def update_released(world, rollouts: grpo.Rollouts, settings: grpo.Settings) -> float:
    """The released code's passes, from their description (README, "Where we differ"), with our losses.

    Per micro-batch of rollouts, a row per CoT, the whole video in each: forwards for old and reference log-probs, then
    a forward and backward for the policy's log-probs and another for the query's state. The optimizer, its pure bf16
    weights and the copied embedding are left out, and the query's forward is spared the logits: in its favour.
    """
    model, ranks, size = world.model, world.ranks, min(settings.rollouts, world.settings.released_micro)
    names = ("input_ids", "spans", "position_ids", "pixel_values_videos", "video_grid_thw")

    def full_log_probs(model, batch):  # -> (N, T), from logits (B * L, V) at EVERY position
        logits = model.backbone(**{name: batch[name] for name in names}, use_cache=False).logits.flatten(0, 1)
        mask = batch["response_mask"].bool()
        found = token_log_probs(logits[batch["response_index"][mask]], batch["response_ids"][mask])
        return torch.zeros(mask.shape, device=found.device).masked_scatter(mask, found)

    model.zero_grad()
    counts, total = {"tokens": rollouts.num_tokens, "bt": settings.rollouts}, 0.0
    parts = []
    for i in range(0, settings.rollouts, size):
        cots, advantages = [row[i : i + size] for row in rollouts.cots], rollouts.advantages[:, i : i + size]
        parts.append(dataclasses.replace(rollouts, cots=cots, advantages=advantages))
    with torch.no_grad(), ranks.autocast():
        for part in parts:
            batch = grpo.lay_out_pair(model, part, settings)
            part.old, part.reference = full_log_probs(model, batch), full_log_probs(world.reference, batch)
    for part in parts:
        batch = grpo.lay_out_pair(model, part, settings)
        with ranks.autocast():
            output = Output(torch.zeros(2 * len(part.cots[0]), device=ranks.device), full_log_probs(model, batch))
        policy, kl, _ = grpo.losses_of(output, batch["response_mask"], part, settings, counts)
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


def count_flops(world, rollouts: grpo.Rollouts, packed: bool, forward_only: bool = False) -> float:
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


def run_cell(world, p: int, group: int, c: int, layouts) -> list[dict]:
    """One cell -> a row per layout, of those that fit into memory also their times."""
    s, rollouts = world.settings, make_rollouts(world.processor, p, group, c, world.settings.seed)
    cases, rows, right = {}, {}, None
    for layout in sorted(layouts, key="plain".__ne__):  # plain first: the others are compared to it
        work, passes = case_of(world, layout, rollouts), 8 if layout == "released" else 4 + s.old_pass
        units = passes * (p + group * (c + 1) if layout == "packed" else group * (p + c + 1))
        rows[layout] = {"P": p, "G": group, "C": c, "layout": layout, "seconds": "out of memory", "units": units}
        world.seen.clear()
        try:
            more, found = inspect(world.model, work, right)
        except torch.OutOfMemoryError:
            continue
        right, cases[layout] = right or found, work
        ideal = (2 + s.old_pass) * 2 * (p + group * (c + 1))
        rows[layout] |= {"tokens": sum(world.seen), "ideal tokens": ideal, **more}
    world.model.zero_grad()
    cases["plain forward"] = case_of(world, "plain forward", rollouts)
    cases["plain forward"]()
    times = measure(cases, s.repeats)
    rate = count_flops(world, rollouts, False, forward_only=True) / statistics.median(times.pop("plain forward"))
    ideal = count_flops(world, rollouts, packed=True)
    for layout, seconds in times.items():
        row, middle = rows[layout], statistics.median(seconds)
        row |= {"seconds": seconds, "ideal GFLOP": ideal / 1e9, "forward GFLOP/s": rate / 1e9,
                "times the limit": middle / (ideal / rate)}
        for rival in [name for name in ("plain", "released") if name in times]:
            row[f"x {rival}"] = speed_up(seconds, times[rival])
            row[f"x {rival} by tokens"] = rows[rival]["units"] / row["units"]
            row[f"x {rival}, share of tokens"] = row[f"x {rival}"] / row[f"x {rival} by tokens"]
    return [rows[layout] for layout in layouts]


def stage2(world) -> list[dict]:
    """One GRPO + BT update of one pair. "by tokens": what counting tokens allows (a backward is two forwards); "share of
    tokens": how much of that is reached. "times the limit": seconds / (ideal FLOPs / plain forward's FLOP/s)."""
    c, quick = world.settings.cot_tokens, world.settings.quick
    cells = [(4, 8)] if quick else [(k, g) for k in world.settings.ratios for g in world.settings.groups]
    bar = world.ranks.progress(cells, desc="stage 2 cells")
    rows = [{"P : C": f"{k:g} : 1", **row} for k, g in bar for row in run_cell(world, round(k * c), g, c, LAYOUTS)]
    state = "installed" if importlib.util.find_spec("trl") else "not installed"
    return rows + [{"layout": f"TRL's GRPOTrainer ({state}) cannot express this task: it takes text and images, not video "
                              "(huggingface/trl, issue 5373), and has no second loss on the same forward."}]


def scaling(world) -> list[dict]:
    """Seconds of an update against G, P and C, one of them varied, and a line a + b x fitted to the medians."""
    c, steps, rows = world.settings.cot_tokens, (2, 4, 8) if world.settings.quick else (1, 2, 4, 8, 16), []
    axes = {"G": [(4 * c, k, c) for k in steps], "P": [(k * c, 8, c) for k in steps],
            "C": [(4 * c, 8, k * c // 4) for k in steps]}
    for axis, cells in axes.items():
        points = [row for cell in cells for row in run_cell(world, *cell, ("packed", "plain"))]
        for layout in ("packed", "plain"):
            mine = [row for row in points if row["layout"] == layout and isinstance(row["seconds"], list)]
            x, y = np.array([[row[axis], statistics.median(row["seconds"])] for row in mine]).reshape(-1, 2).T
            b, a = np.polyfit(x, y, 1) if len(x) > 1 else (0.0, 0.0)
            fit = {"a": a, "b": b, "R²": 1 - float(np.var(y - a - b * x) / max(np.var(y), 1e-30))}
            rows += [{"axis": axis, **row, **fit} for row in mine]
    return [{k: v for k, v in row.items() if "differs" not in k and not k.startswith("x ")} for row in rows]


# ---- 4. The other sections -----------------------------------------------------------------------------------
def stage1(world) -> list[dict]:
    """Stage 1, one pair forward and backward, LoRA and tower trained, CoTs of C and C / 2 tokens behind 4 C: both
    videos in one batch (cold_start.score_pairs), or a forward for each, in the style of TRL's RewardTrainer."""
    s, tokenizer = world.settings, world.processor.tokenizer
    model = copy.deepcopy(world.model)
    model.make_trainable("lora", vision=True, lora_dropout=0.0)
    model.to(world.ranks.device).train()
    cots = [" red" * n for n in (s.cot_tokens, s.cot_tokens // 2)]
    prefixes = [make_prefix(world.processor, 4 * s.cot_tokens, s.seed + video) for video in (0, 1)]
    item = data.PreferencePair("a", "b", "a prompt", 1, *cots), prefixes
    no_limit = cold_start.Settings(max_length=10**9)

    def step(together: bool) -> float:
        model.zero_grad()
        with world.ranks.autocast():
            if together:
                rewards = cold_start.score_pairs(model, [item], no_limit)
            else:
                ids = [[[data.encode_cot(tokenizer, cot)]] for cot in cots]
                batches = [lay_out(model.backbone, [prefix], cot) for prefix, cot in zip(prefixes, ids)]
                rewards = [model(to_device(b, model.query.device), False).rewards for b in batches]
        loss = bt_loss(*rewards)
        loss.backward()
        return loss.item()

    cases, rows, right = {"one batch": lambda: step(True), "two forwards": lambda: step(False)}, {}, None
    for name, work in cases.items():
        rows[name], right = inspect(model, work, right)
    times = measure(cases, s.repeats * 3)
    factor = {name: speed_up(times["one batch"], times[name]) for name in rows}
    return [{"layout": n, "seconds": times[n], "ours is x faster": factor[n], **row} for n, row in rows.items()]


def rollout(world) -> list[dict]:
    """Sampling 8 CoTs for each of two videos from the same weights, P : C = 4 : 1. Caches are emptied every round."""
    s, engines, tokens, rows = world.settings, {}, {}, []
    prefixes = [make_prefix(world.processor, 4 * s.cot_tokens, s.seed + video) for video in (0, 1)]
    seeds = [[task_seed(s.seed, video, i) for i in range(8)] for video in (0, 1)]

    def sample(name):
        if llm := getattr(engines[name], "llm", None):
            assert llm.reset_prefix_cache()
            llm.llm_engine.reset_encoder_cache()
        cots = engines[name].generate(prefixes, seeds, s.cot_tokens)
        tokens[name] = sum(len(cot) for row in cots for cot in row)  # the same every round: the seeds are

    with tempfile.TemporaryDirectory() as folder:
        world.model.backbone.save_pretrained(folder)
        world.processor.save_pretrained(folder)
        for name in ("transformers", "vllm"):
            try:
                engines[name] = make_engine(name, folder, world.processor, world.ranks)
                sample(name)  # warms up
            except (InputError, RuntimeError, ValueError) as error:
                if name == "transformers":
                    raise
                engines.pop(name, None)  # a rival that does not start must not end the rest
                rows.append({"engine": name, "note": str(error).strip().split("\n")[0]})
    times = measure({name: functools.partial(sample, name) for name in engines}, s.repeats)
    for engine in engines.values():
        engine.close()
    return [{"engine": name, "tokens": tokens[name], "seconds": t, "tokens/s": [tokens[name] / x for x in t],
             "x transformers": speed_up(t, times["transformers"])} for name, t in times.items()] + rows


def decode(world) -> list[dict]:
    """A rendered 720p clip -> the model's frames: decord straight at the target size (data.sample_frames), or at full
    size and then resized. "differs": mean |pixel - ours| of 255."""
    from decord import VideoReader, cpu

    rng, fps, seconds = np.random.default_rng(world.settings.seed), 24, 2 if world.settings.quick else 5
    frames = toy.render_clip(toy.random_values(rng), rng, np.arange(fps) / fps, size=640)[:, 140:500]  # one second
    frames = frames.repeat(2, axis=1).repeat(2, axis=2)  # (24, 720, 1280, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/clip.mp4"
        toy.write_mp4(path, np.concatenate([frames[:: (-1) ** k] for k in range(seconds)]), fps, crf=20)  # to and fro
        results = {"target size": data.sample_frames(path).frames}

        def full_size():
            reader = VideoReader(path, ctx=cpu(0), num_threads=1)
            indices = data.sample_indices(len(reader), reader.get_avg_fps(), 2.0)
            full = reader.get_batch(indices).asnumpy()  # (T, 720, 1280, 3)
            size, pixels = results["target size"].shape[1:3], torch.from_numpy(full).permute(0, 3, 1, 2).float()
            small = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
            results["full size, then resize"] = small.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            return full.nbytes

        largest = {"target size": results["target size"].nbytes, "full size, then resize": full_size()}
        cases = {"target size": lambda: data.sample_frames(path), "full size, then resize": full_size}
        times = measure(cases, world.settings.repeats)
    return [{"decoded at": name, "clip": f"{seconds} s, 1280 x 720, {fps} fps", "frames": str(results[name].shape[:3]),
             "decoded MB": largest[name] / 1e6, "seconds": t, "ours is x faster": speed_up(times["target size"], t),
             "differs": float(np.abs(results[name] - results["target size"].astype(float)).mean())}
            for name, t in times.items()]


def running_counts(labels: list, margins: list) -> float:
    """As the public scripts do it: sort in Python, then move one pair at a time under the threshold."""
    pairs = sorted(zip(labels, margins), key=lambda pair: abs(pair[1]))
    hits = best = sum(label * margin > 0 for label, margin in pairs)
    for label, margin in pairs:
        hits += (label == 0) - (label * margin > 0)
        best = max(best, hits)
    return best / len(pairs)


def metric(world) -> list[dict]:
    """Accuracy with ties on 26,500 pairs. The O(n * n) loop runs on 500; its seconds are times (26,500 / 500)^2."""
    size, part, rng = 26_500, 500, np.random.default_rng(world.settings.seed)
    labels = rng.choice([1, -1, 0], size=size, p=[0.40, 0.35, 0.25])
    margins = labels + rng.normal(size=size)
    lists = labels.tolist(), margins.tolist()
    few = list(zip(*lists))[:part]  # the definition word for word: for each candidate threshold, count all pairs again
    recount = lambda cut: sum(label == 0 if abs(m) <= cut else label * m > 0 for label, m in few)  # noqa: E731
    cases = {
        "metrics.accuracy_with_ties": (size, lambda: metrics.accuracy_with_ties(labels, margins)[0]),
        "running counts in Python": (size, lambda: running_counts(*lists)),
        "every threshold anew": (part, lambda: max(map(recount, [-1, *(abs(m) for _, m in few)])) / part),
    }
    times, rows = measure({name: work for name, (_, work) in cases.items()}, world.settings.repeats), []
    for name, (n, work) in cases.items():
        seconds = [t * (size / n) ** 2 for t in times[name]]
        differs = abs(work() - metrics.accuracy_with_ties(labels[:n], margins[:n])[0])
        factor = speed_up(times["metrics.accuracy_with_ties"], seconds)
        rows.append({"method": name, "pairs run": n, "seconds for 26,500": seconds, "ours is x faster": factor,
                     "differs": differs})
    return rows


# ---- 5. Tables, figure, main ---------------------------------------------------------------------------------
SECTIONS = {f.__name__: f for f in (stage2, stage1, scaling, decode, metric, rollout)}  # vLLM last: it takes over


def cell(value) -> str:
    """A value of a row as text; a list of rounds becomes median [min, max]."""
    if isinstance(value, list):
        return f"{cell(statistics.median(value))} [{cell(min(value))}, {cell(max(value))}]"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: list[dict]) -> str:
    """Rows -> a Markdown table with every column that a row has, in the order in which they appear first."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "units"]
    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: dict, path: str) -> None:
    """All sections as one PNG; without the panels of sections that did not run."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8))
    axes = dict(zip(("speed", "memory", "G", "P", "C", "others"), axes.flat))
    timed = [row for row in results.get("stage2", []) if isinstance(row.get("seconds"), list)]
    names = list(dict.fromkeys(f"{row['P : C']}\nG {row['G']}" for row in timed))
    for k, layout in enumerate(LAYOUTS):
        mine = [(names.index(f"{row['P : C']}\nG {row['G']}"), row) for row in timed if row["layout"] == layout]
        height = [row["peak MB"] for _, row in mine]
        axes["memory"].bar([x + 0.2 * k - 0.3 for x, _ in mine], height, 0.18, label=layout)
        for j, rival in enumerate(("plain", "released") if layout == "packed" else ()):
            x = [x + 0.4 * j - 0.2 for x, _ in mine]
            axes["speed"].bar(x, [row.get(f"x {rival}", np.nan) for _, row in mine], 0.36, label=f"over {rival}")
            axes["speed"].plot(x, [row.get(f"x {rival} by tokens", np.nan) for _, row in mine], "k_", ms=16)
    axes["speed"].set_title("stage 2: packed is x times faster (-: by tokens)")
    axes["memory"].set_title("stage 2: peak memory above the weights, MB")
    for axis in (axes["speed"], axes["memory"]):
        axis.set_xticks(range(len(names)), names)
    for name, layout, colour in [(name, *style) for name in "GPC" for style in (("packed", "C0"), ("plain", "C1"))]:
        axes[name].set_title(f"seconds per update of a pair against {name}")
        mine = [row for row in results.get("scaling", []) if row["axis"] == name and row["layout"] == layout]
        x = np.array([row[name] for row in mine])
        for row in mine:
            axes[name].plot([row[name]] * len(row["seconds"]), row["seconds"], ".", color=colour)
        if mine:
            a, b, good = (mine[0][part] for part in ("a", "b", "R²"))
            axes[name].plot(x, a + b * x, color=colour, label=f"{layout}: {a:.2g} + {b:.2g} {name}, R² {good:.3f}")
        if mine and layout == "packed":
            limit = [row["ideal GFLOP"] / row["forward GFLOP/s"] for row in mine]
            axes[name].plot(x, limit, "k:", label="limit: ideal FLOPs at the plain forward's rate")
        if layout == "plain":
            axes[name].set_ylim(bottom=0)
    others = {f"{section}: {next(iter(row.values()))}": row[key] for section in list(SECTIONS)[1:]
              for row in results.get(section, []) for key in ("ours is x faster", "x transformers")
              if row.get(key, 1) != 1}
    axes["others"].barh(list(others), list(others.values()), log=bool(others))
    axes["others"].set_title("ours is x times faster (vllm: than transformers)")
    for axis in axes.values():
        axis.set_visible(axis.has_data())
        axis.grid(alpha=0.3), axis.tick_params(labelsize=8), axis.title.set_fontsize(10)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(argv=None) -> None:
    """Runs the chosen sections; writes tables and figure."""
    s, big = parse(Settings, __doc__, argv), torch.cuda.is_available()
    chosen = [name.strip() for name in s.only.split(",")]
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise InputError(f"--only {unknown[0]}: choose from {', '.join(SECTIONS)}.")
    s.repeats, s.hidden = s.repeats or (3 if s.quick else 5), s.hidden or (1024 if big else 256)
    s.layers, s.cot_tokens = s.layers or (12 if big else 4), s.cot_tokens or (256 if big else 64)
    os.makedirs(s.out, exist_ok=True)
    world = make_world(s)
    device = torch.cuda.get_device_name() if big else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "torch": torch.__version__, "compute": "bf16 autocast" if big else "fp32",
               "parameters": sum(p.numel() for p in world.model.parameters())}
    results, text = {}, ["# lab/bench.py", table([machine]), ", ".join(f"{k} {v}" for k, v in vars(s).items())]
    world.ranks.print("\n\n".join(text))
    for name in [name for name in SECTIONS if name in chosen]:
        results[name] = SECTIONS[name](world)
        text.append(f"## {name}\n{SECTIONS[name].__doc__}\n\n{table(results[name])}")
        world.ranks.print(f"\n{text[-1]}")
        with open(os.path.join(s.out, "bench.json"), "w", encoding="utf-8") as file:  # now: a crash costs one section
            json.dump({"machine": machine, "settings": vars(s), **results}, file, indent=1)
        with open(os.path.join(s.out, "bench.md"), "w", encoding="utf-8") as file:
            file.write("\n\n".join(text) + "\n")
        draw(results, os.path.join(s.out, "bench.png"))
    world.ranks.print(f"\nwrote {s.out}/bench.json, bench.md and bench.png")


if __name__ == "__main__":
    cli(main)
