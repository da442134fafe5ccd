"""One update of each stage at the published widths: the real code, a real clip, random weights.

    python -m lab.bench.real --model DIR --bf16                                     minutes on a CPU
    python -m lab.bench.real --model DIR --text-layers all --vision-layers all      on a GPU      ->   OUT/real.json

What a new machine runs first. DIR is a published Qwen3-VL; only its config.json, tokenizer and processor are read. One
pair of clips, P : C = 1 : 1 unless --cot-tokens says otherwise. Nothing is sampled: the CoTs are given. Each case runs
in a model of its own: once untimed, for its memory and gradient norms, then --repeats times.

    stage1-lora    score_pairs, BT loss, backward, clipping, AdamW; LoRA and the whole vision tower are trained
    stage2-lora    the reference's pass (adapters off), then grpo.update; the tower is frozen
    stage2-full    the same with all of the LLM trained and a second, frozen model as reference: states of 18 bytes a
                   parameter and more, so choose --text-layers that fit

tokens/s: positions that enter the LLM (a packed prefix counts once), over the seconds of the update. MFU: the FLOPs
the update needs, without those of recomputing, over seconds and over the rate of a large bf16 matrix product on this
card. "plan GB" is lab/bench/plan.py for the same sizes on one GPU; it counts bf16 compute, as on GPUs or with --bf16.
"""

import dataclasses
import json
import os
import platform
import shutil
import statistics
import tempfile
import zlib

import numpy as np
import torch

import cold_start
import data
import grpo
import parallel
import toy.world
from lab.bench import plan
from lab.bench.__main__ import table
from lab.bench.cases import forward_flops, measure, with_peak
from losses import bt_loss, group_advantages
from model import DeScore
from plumbing import checkpoint
from plumbing.gpu import Load, compile_parts, plan_memory
from plumbing.settings import InputError, arg, cli, parse, writable

CASES = ("stage1-lora", "stage2-lora", "stage2-full")


@dataclasses.dataclass
class Settings:
    """What runs, and how large."""

    model: str = arg(None, "folder of a published Qwen3-VL; its weights are not read")
    out: str = arg("runs/bench", "output folder")
    cases: list[str] = arg(CASES[:2], "what runs", choices=CASES)
    clips: list[str] = arg(None, "two video files; default: two of 5 seconds at 448 x 448 are rendered")
    text_layers: str = arg("2", "layers of the LLM: a number, or all")
    vision_layers: str = arg("4", "layers of the vision tower: a number, or all")
    rollouts: int = arg(8, "G, CoTs per video in stage 2", at_least=1)
    cot_tokens: int = arg(0, "C, tokens per CoT; 0: as many as the prefix, P : C = 1 : 1", at_least=0)
    micro_rollouts: int = arg(2, "stage 2: CoTs of each video at a time", at_least=1)
    gradient_checkpointing: bool = arg(True, "recompute activations in backward")
    compile: bool | None = arg(None, "compile mlp, norms and rotary embedding; default: on a GPU")
    bf16: bool = arg(False, "on a CPU compute in bf16 as GPUs do (autocast), with frozen weights in bf16")
    repeats: int = arg(1, "timed rounds after the first", at_least=1)
    seed: int = arg(0, "decides weights, clip and CoTs", at_least=0)


# ---- 1. The world: a cut configuration, a model, a pair ------------------------------------------------------
def cut_copy(s: Settings, folder: str) -> None:
    """DIR without its weights, config.json with the layers asked for.

    InputError: no config.json, or more layers than it has.
    """
    if not s.model or not os.path.isfile(os.path.join(s.model, "config.json")):
        raise InputError(f"--model {s.model}: no config.json in it; give a folder of a published Qwen3-VL: "
                         "hf download Qwen/Qwen3-VL-8B-Instruct --local-dir DIR")
    shutil.copytree(s.model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", ".*"), dirs_exist_ok=True)
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    text, vision = config["text_config"], config["vision_config"]
    for part, name, flag in ((text, "num_hidden_layers", "text_layers"), (vision, "depth", "vision_layers")):
        wanted = getattr(s, flag)
        if wanted != "all" and not (wanted.isdigit() and 0 < int(wanted) <= part[name]):
            raise InputError(f"--{flag.replace('_', '-')} {wanted}: give 1 to {part[name]}, or all.")
        part[name] = part[name] if wanted == "all" else int(wanted)
    deep = vision["deepstack_visual_indexes"]  # tower layers whose output also enters the LLM: keep those that exist
    vision["deepstack_visual_indexes"] = [i for i in deep if i < vision["depth"]] or [vision["depth"] - 1]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)


class RandomWeights:
    """In place of `Weights`: normal with std .02, norms 1, biases 0; by name, so every rank draws the same."""

    def __init__(self, backbone):
        self.shapes = {name: value.shape for name, value in backbone.state_dict().items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        if len(self.shapes[name]) == 1:
            return torch.full(self.shapes[name], float("norm" in name and name.endswith("weight")))
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(self.shapes[name], generator=generator) * 0.02


def random_model(folder: str, dtype: torch.dtype) -> DeScore:
    """A DeScore of the size that config.json says, empty until `load_empty`; no file with weights is read."""
    backbone = checkpoint.empty_backbone(folder, dtype)
    model = DeScore(backbone, checkpoint.read_processor(folder))
    model.weights = RandomWeights(backbone)
    model.query = torch.nn.Parameter(model.weights[checkpoint.EMBEDDING].to(dtype).float().mean(dim=0))
    return model.eval()


def load(folder: str, s: Settings, ranks, train: str, stage: int) -> DeScore:
    """The model as cold_start.py and grpo.py make it on one rank, with random weights."""
    dtype = torch.bfloat16 if s.bf16 and train != "full" else parallel.load_dtype(train, ranks)
    model = random_model(folder, dtype)
    model.make_trainable(train, vision=stage == 1, lora_dropout=0.05 if stage == 1 else 0.0)
    if s.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    compile_parts(model, s.compile, ranks.device)
    return parallel.shard(model, ranks).train()


def clips_of(s: Settings) -> tuple[list, float | None]:
    """(two videos, frames per second if they are in memory). Two unlike ones, or the head would have no gradient.

    InputError: another number of --clips.
    """
    if s.clips:
        if len(s.clips) != 2:
            raise InputError(f"--clips: {len(s.clips)} given; a pair needs two.")
        return s.clips, None
    rng = np.random.default_rng(s.seed)
    return [toy.world.render_clip(toy.world.random_values(rng), rng, np.arange(40) / 8, size=448) for _ in "AB"], 8.0


# ---- 2. One update of each stage, as a function without arguments --------------------------------------------
def stage_1(model, item, settings: cold_start.Settings, ranks):
    """-> (update, which returns loss and gradient norms)"""
    optimizer = parallel.make_optimizer(model, settings)
    parallel.set_learning_rate(optimizer, 1, 1)

    def update():
        """One step of stage 1, as cold_start.train makes it."""
        with ranks.autocast():
            chosen, rejected = cold_start.score_pairs(model, [item])
        loss = bt_loss(chosen, rejected)
        parallel.backward(loss, ranks)
        norms = parallel.take_step(model, optimizer, [(loss, [vars(item[0])])], settings, ranks)
        return {"loss": loss.item(), **in_short(norms)}

    return update


def stage_2(model, reference, rollouts: grpo.PairRollouts, settings: grpo.Settings, ranks):
    """-> (update, which returns losses and gradient norms). reference None: the model without its adapter."""
    optimizer = parallel.make_optimizer(model, settings)
    parallel.set_learning_rate(optimizer, 1, 1)

    def update():
        done = grpo.update(model, reference, optimizer, [rollouts], settings, ranks)
        return {"BT loss": done["bt_loss"], **in_short(done)}

    return update


def in_short(logged: dict) -> dict[str, float]:
    """The gradient norms among what an update logs, before clipping, as "|g| llm"."""
    return {name.replace("grad_norm_", "|g| "): x for name, x in logged.items() if name.startswith("grad_norm_")}


def update_flops(model, prefixes, cots, stage: int, train: str) -> float:
    """FLOPs of one update, nothing recomputed. Backward: a forward for the activations' gradients, another for those of
    trained weights; attention has none, but its backward is two forwards. Stage 2 adds the reference's forward."""
    passes = {"linear": 2 + (train == "full"), "attention": 3, "lm_head": 2 + (train == "full")}
    passes = {part: n + (stage == 2) for part, n in passes.items()} | {"vision": 3 if stage == 1 else 1}
    if stage == 1:
        passes["lm_head"] = 0
    parts = [forward_flops(model, prefix, lengths) for prefix, lengths in zip(prefixes, cots)]
    return sum(n * part[name] for name, n in passes.items() for part in parts)


def planned_gb(folder: str, s: Settings, stage: int, train: str, prefix: int, cot: int) -> float:
    """The plan's memory on one GPU, 10^9 bytes."""
    sizes = Load(
        stage=stage, train=train, gpus=1, video_tokens=prefix, cot_tokens=cot, rollouts=s.rollouts,
        micro_rollouts=s.micro_rollouts, gradient_checkpointing=s.gradient_checkpointing,
    )
    return sum(plan_memory(plan.model_config(folder), sizes).values()) / 1e9


def run_case(case: str, folder: str, s: Settings, ranks, rate: float | None) -> dict:
    """Loads, runs and measures one case -> its row."""
    stage, train = int(case[5]), case[7:]
    settings = {1: cold_start.Settings, 2: grpo.Settings}[stage]()
    settings.out = s.out
    reference = load(folder, s, ranks, "head", 2).eval().requires_grad_(False) if case == "stage2-full" else None
    model = load(folder, s, ranks, train, stage)
    videos, fps = clips_of(s)
    model.settings.update(fps=settings.fps, max_pixels=settings.max_pixels)
    prefixes = model.encode(videos, ["a red ball rolls to the left"] * 2, fps)
    p = max(len(prefix["input_ids"]) for prefix in prefixes)
    c, vocabulary = s.cot_tokens or p, model.backbone.config.text_config.vocab_size
    generator = torch.Generator().manual_seed(s.seed)
    if stage == 1:
        settings.max_length = 10**9
        pair = data.PreferencePair("a", "b", "a prompt", 1, " red" * (c - 1), " red" * (c - 1))  # and EOS: C tokens
        cots, update = [[c], [c]], stage_1(model, data.Drawn(pair, prefixes), settings, ranks)
    else:
        settings.rollouts, settings.micro_rollouts = s.rollouts, s.micro_rollouts
        settings.mini_pairs = settings.batch_pairs  # on-policy: no pass for old log-probs
        words = torch.randint(vocabulary // 2, (2, s.rollouts, c), generator=generator).tolist()
        advantages = group_advantages(torch.rand(2, s.rollouts, generator=generator))
        pair = data.PreferencePair("a", "b", "a prompt", 1)
        rollouts = grpo.PairRollouts(pair, prefixes, words, advantages=advantages)
        cots, update = [[c] * s.rollouts] * 2, stage_2(model, reference, rollouts, settings, ranks)
    held = sum(x.nbytes for part in (model, reference) if part is not None for x in part.parameters())
    found, peak = with_peak(update)
    seconds = measure({case: update}, s.repeats)[case]
    tokens = sum(len(prefix["input_ids"]) + sum(n + 1 for n in lengths) for prefix, lengths in zip(prefixes, cots))
    middle = statistics.median(seconds)
    flops = update_flops(model, prefixes, cots, stage, train)
    row = {"case": case, "P": p, "C": c, "G": s.rollouts if stage == 2 else 1, "tokens": tokens, "seconds": seconds,
           "tokens/s": tokens / middle, "TFLOP": flops / 1e12, "TFLOP/s": flops / middle / 1e12,
           "MFU": rate and flops / middle / rate, "weights GB": held / 1e9, "peak GB": (held + peak) / 1e9,
           "plan GB": planned_gb(folder, s, stage, train, p, c), **found}
    return {name: value for name, value in row.items() if value is not None}


def matmul_rate(device) -> float:
    """FLOP/s of a bf16 matrix product of 8,192 x 8,192, the best of ten: what MFU is a share of."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / min(measure({"": lambda: a @ a}, 10)[""])


def main(argv=None) -> None:
    """One update of each chosen case, printed beside the plan and written to OUT/real.json."""
    s, on_gpu = parse(Settings, __doc__, argv), torch.cuda.is_available()
    writable([s.out])
    ranks, rows = parallel.start(s.seed), []
    rate = matmul_rate(ranks.device) if on_gpu else None
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = {"device": name, "torch": torch.__version__, "compute": "bf16" if on_gpu or s.bf16 else "fp32",
               "matmul TFLOP/s": rate and rate / 1e12}
    ranks.print(table([machine]))
    with tempfile.TemporaryDirectory() as folder:
        cut_copy(s, folder)
        for case in s.cases:
            on_cpu = torch.autocast("cpu", torch.bfloat16, enabled=s.bf16 and not on_gpu)
            try:
                with on_cpu:
                    rows.append(run_case(case, folder, s, ranks, rate))
            except torch.OutOfMemoryError:
                rows.append({"case": case, "seconds": "out of memory"})
            ranks.print(f"\n{table(rows[-1:])}")
            with open(os.path.join(s.out, "real.json"), "w", encoding="utf-8") as file:  # now: a crash costs one case
                json.dump({"machine": machine, "settings": vars(s), "cases": rows}, file, indent=1)
    ranks.print(f"\nwrote {s.out}/real.json")


if __name__ == "__main__":
    cli(main)
