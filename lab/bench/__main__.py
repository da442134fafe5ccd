"""What our layouts save: stage 2, stage 1, sampling, decoding and the metric, each beside its rivals, on this machine.

    python -m lab.bench [--quick] [--only stage2,metric]   ->   OUT/bench.json, bench.md (the tables printed), bench.png

Needs no data: it renders clips and makes a random Qwen3-VL (toy/base_model.py), hidden 256 x 4 layers on a CPU, 1024 x
12 on a GPU: so wide that arithmetic, not Python, takes the time. `lm_head` is 4 % of the language model (8B: 8 %).

How rivals are timed, and the layouts of stage 2, are in cases.py. Tables show median [min, max];
"x plain" is the median over rounds of plain's seconds / this row's in the same round: 2 = twice as fast as plain.

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

import numpy as np
import torch
from matplotlib.figure import Figure

import cold_start
import data
import metrics
import toy.world
from lab.bench.cases import (
    LAYOUTS,
    RIVALS,
    case_of,
    count_flops,
    inspect,
    make_prefix,
    make_rollouts,
    make_world,
    measure,
    speed_up,
)
from layout import lay_out
from losses import bt_loss
from model import to_device
from plumbing.jobs import task_seed
from plumbing.settings import InputError, arg, cli, parse, writable
from rollout import make_engine


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
    micro_rollouts: int = arg(2, "CoTs of each video at a time in our update (grpo.py's default: 2)", at_least=1)
    old_pass: bool = arg(False, "add the pass for old log-probs, which ours needs when --mini-pairs < --batch-pairs")
    gradient_checkpointing: bool = arg(False, "recompute activations in backward, in all layouts")
    seed: int = arg(0, "decides weights, clips and CoTs", at_least=0)


# ---- 1. Stage 2: a cell, all cells, and how cost grows -------------------------------------------------------
def run_cell(world, p: int, group: int, c: int, layouts) -> list[dict]:
    """One cell -> a row per layout, of those that fit into memory also their times."""
    s, rollouts = world.settings, make_rollouts(world.processor, p, group, c, world.settings.seed)
    cases, rows, right = {}, {}, None
    for layout in sorted(layouts, key="plain".__ne__):  # plain first: the others are compared to it
        work, passes = case_of(world, layout, rollouts), 8 if layout == "released" else 4 + s.old_pass
        units = passes * (group * (p + c + 1) if layout in ("plain", "released") else p + group * (c + 1))
        rows[layout] = {"P": p, "G": group, "C": c, "layout": layout, "seconds": "out of memory", "units": units}
        world.seen.clear()
        try:
            more, found = inspect(world.model, work, right)
        except torch.OutOfMemoryError:
            continue
        except (ImportError, RuntimeError) as error:  # a rival that cannot take the task says why
            if layout not in RIVALS:
                raise
            rows[layout]["seconds"] = str(error).split(".")[0]
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
        for rival in [name for name in LAYOUTS[1:] if name in times]:
            row[f"x {rival}"] = speed_up(seconds, times[rival])
            if rival not in RIVALS:  # they compute the same tokens as ours
                row[f"x {rival} by tokens"] = rows[rival]["units"] / row["units"]
                row[f"x {rival}, share of tokens"] = row[f"x {rival}"] / row[f"x {rival} by tokens"]
    return [rows[layout] for layout in layouts]


def stage2(world) -> list[dict]:
    """One GRPO + BT update of one pair. "by tokens": what counting tokens allows (a backward is two forwards); "share
    of tokens": how much of that is reached. "times the limit": seconds / (ideal FLOPs / plain forward's FLOP/s)."""
    c, quick = world.settings.cot_tokens, world.settings.quick
    cells = [(4, 8)] if quick else [(k, g) for k in world.settings.ratios for g in world.settings.groups]
    bar = world.ranks.progress(cells, desc="stage 2 cells")
    rows = [{"P : C": f"{k:g} : 1", **row} for k, g in bar for row in run_cell(world, round(k * c), g, c, LAYOUTS)]
    state = "installed" if importlib.util.find_spec("trl") else "not installed"
    return rows + [{"layout": f"TRL's GRPOTrainer ({state}) cannot express this task: it takes text and images, not "
                              "video (huggingface/trl, issue 5373), and has no second loss on the same forward."}]


def scaling(world) -> list[dict]:
    """Seconds of an update against G, P and C, one of them varied, and a line a + b x fitted to the medians."""
    c, steps, rows = world.settings.cot_tokens, (2, 4, 8) if world.settings.quick else (1, 2, 4, 8, 16), []
    axes = {"G": [(4 * c, k, c) for k in steps], "P": [(k * c, 8, c) for k in steps],
            "C": [(4 * c, 8, k * c // 4) for k in steps]}
    for axis, cells in axes.items():
        points = [row for cell in cells for row in run_cell(world, *cell, ("once", "plain"))]
        for layout in ("once", "plain"):
            mine = [row for row in points if row["layout"] == layout and isinstance(row["seconds"], list)]
            x, y = np.array([[row[axis], statistics.median(row["seconds"])] for row in mine]).reshape(-1, 2).T
            b, a = np.polyfit(x, y, 1) if len(x) > 1 else (0.0, 0.0)
            fit = {"a": a, "b": b, "R²": 1 - float(np.var(y - a - b * x) / max(np.var(y), 1e-30))}
            rows += [{"axis": axis, **row, **fit} for row in mine]
    return [{k: v for k, v in row.items() if "differs" not in k and not k.startswith("x ")} for row in rows]


# ---- 2. The other sections -----------------------------------------------------------------------------------
def stage1(world) -> list[dict]:
    """Stage 1, one pair forward and backward, LoRA and tower trained, CoTs of C and C / 2 tokens behind 4 C: both
    videos in one batch (cold_start.score_pairs), or a forward for each, in the style of TRL's RewardTrainer."""
    s, tokenizer = world.settings, world.processor.tokenizer
    model = copy.deepcopy(world.model)
    model.make_trainable("lora", vision=True, lora_dropout=0.0)
    model.to(world.ranks.device).train()
    cots = [" red" * n for n in (s.cot_tokens, s.cot_tokens // 2)]
    prefixes = [make_prefix(world.processor, 4 * s.cot_tokens, s.seed + video) for video in (0, 1)]
    item = data.Drawn(data.PreferencePair("a", "b", "a prompt", 1, *cots), prefixes)

    def step(together: bool) -> float:
        """One forward and backward of a pair: both videos in a batch, or one after the other."""
        model.zero_grad()
        with world.ranks.autocast():
            if together:
                rewards = cold_start.score_pairs(model, [item])
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
        for name in ("transformers", *["transformers, compiled"] * (not s.quick), "vllm"):
            kind, *compiled = name.split(", ")
            try:
                engines[name] = make_engine(kind, folder, world.processor, world.ranks, compiled=bool(compiled))
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
    """A rendered 720p clip -> the model's frames: straight at the target size (data.sample_frames), or by decord
    at full size and then resized. "differs": mean |pixel - ours| of 255."""
    from decord import VideoReader, cpu

    rng, fps, seconds = np.random.default_rng(world.settings.seed), 24, 2 if world.settings.quick else 5
    values = toy.world.random_values(rng)
    frames = toy.world.render_clip(values, rng, np.arange(fps) / fps, size=640)[:, 140:500]  # one second
    frames = frames.repeat(2, axis=1).repeat(2, axis=2)  # (24, 720, 1280, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/clip.mp4"
        to_and_fro = np.concatenate([frames[:: (-1) ** k] for k in range(seconds)])
        toy.world.write_mp4(path, to_and_fro, fps, crf=20)
        results = {"target size": data.sample_frames(path).frames}

        def full_size():
            """The other way: decode whole frames, then make them small."""
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


# ---- 3. Tables, figure, main ---------------------------------------------------------------------------------
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
    figure = Figure(figsize=(15, 8))
    axes = dict(zip(("speed", "memory", "G", "P", "C", "others"), figure.subplots(2, 3).flat))
    timed = [row for row in results.get("stage2", []) if isinstance(row.get("seconds"), list)]
    names = list(dict.fromkeys(f"{row['P : C']}\nG {row['G']}" for row in timed))
    for k, layout in enumerate(LAYOUTS):
        mine = [(names.index(f"{row['P : C']}\nG {row['G']}"), row) for row in timed if row["layout"] == layout]
        height = [row["peak MB"] for _, row in mine]
        axes["memory"].bar([x + 0.14 * k - 0.35 for x, _ in mine], height, 0.13, label=layout)
        for j, rival in enumerate(("packed", "plain", "released") if layout == "once" else ()):
            x = [x + 0.3 * j - 0.3 for x, _ in mine]
            axes["speed"].bar(x, [row.get(f"x {rival}", np.nan) for _, row in mine], 0.26, label=f"over {rival}")
            axes["speed"].plot(x, [row.get(f"x {rival} by tokens", np.nan) for _, row in mine], "k_", ms=16)
    axes["speed"].set_title("stage 2: prefixes once is x times faster (-: by tokens)")
    axes["memory"].set_title("stage 2: peak memory above the weights, MB")
    for axis in (axes["speed"], axes["memory"]):
        axis.set_xticks(range(len(names)), names)
    for name, layout, colour in [(name, *style) for name in "GPC" for style in (("once", "C0"), ("plain", "C1"))]:
        axes[name].set_title(f"seconds per update of a pair against {name}")
        mine = [row for row in results.get("scaling", []) if row["axis"] == name and row["layout"] == layout]
        x = np.array([row[name] for row in mine])
        for row in mine:
            axes[name].plot([row[name]] * len(row["seconds"]), row["seconds"], ".", color=colour)
        if mine:
            a, b, good = (mine[0][part] for part in ("a", "b", "R²"))
            axes[name].plot(x, a + b * x, color=colour, label=f"{layout}: {a:.2g} + {b:.2g} {name}, R² {good:.3f}")
        if mine and layout == "once":
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


def main(argv=None) -> None:
    """Runs the chosen sections; writes tables and figure."""
    s, big = parse(Settings, __doc__, argv), torch.cuda.is_available()
    chosen = [name.strip() for name in s.only.split(",")]
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise InputError(f"--only {unknown[0]}: choose from {', '.join(SECTIONS)}.")
    s.repeats, s.hidden = s.repeats or (3 if s.quick else 5), s.hidden or (1024 if big else 256)
    s.layers, s.cot_tokens = s.layers or (12 if big else 4), s.cot_tokens or (256 if big else 64)
    writable([s.out])
    world = make_world(s)
    device = torch.cuda.get_device_name() if big else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "torch": torch.__version__, "compute": "bf16 autocast" if big else "fp32",
               "parameters": sum(p.numel() for p in world.model.parameters())}
    results, text = {}, ["# lab/bench/__main__.py", table([machine]), ", ".join(f"{k} {v}" for k, v in vars(s).items())]
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
