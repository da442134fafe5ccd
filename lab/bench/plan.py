"""Will it fit? Memory per GPU and time per step for a model size, before anything is bought or loaded.

    python -m lab.bench.plan --plan 8B --gpus 8      one size on one machine: memory by use, seconds of a step
    python -m lab.bench.plan --table                 all sizes, stages and four machines: what fits where
"""

import dataclasses
import math

from plumbing.gpu import ROOM, Load, count_parameters, plan_memory, sampling_bytes
from plumbing.settings import InputError, arg, cli, parse


@dataclasses.dataclass
class Plan(Load):
    """Memory per GPU and time per step, by arithmetic alone: nothing is loaded but a config.json."""

    plan: str = arg("8B", "2B, 4B, 8B, 32B: the sizes of Qwen3-VL-...-Instruct; or a model's folder or hub name")
    table: bool = arg(False, "all sizes and stages on four machines; --plan, --stage, --train, --gpus are not read")
    gpu_gb: float = arg(80.0, "memory of one GPU, 10^9 bytes", above=0)
    tflops: float = arg(989.0, "a GPU's dense bf16 rate, 10^12 operations per second (H100 SXM: 989)", above=0)
    bandwidth: float = arg(3.35, "a GPU's memory bandwidth, 10^12 bytes per second (H100 SXM: 3.35)", above=0)
    utilisation: float = arg(
        0.4, "share of both rates that is reached: an assumption, not a measurement", above=0, at_most=1)
    batch_pairs: int | None = arg(
        None, "pairs per step over all GPUs; default the paper's: 32 in stage 1, 128 in 2", at_least=1)
    mini_pairs: int = arg(
        8, "pairs per update of stage 2 (paper: 8); as many as --batch-pairs: no pass for old log-probs", at_least=1)
    engine_memory: float = arg(0.4, "share of the GPU that vLLM may use while it samples", above=0, at_most=1)
    engine_tp: int = arg(1, "tensor parallel vLLM: GPUs that hold one engine together", at_least=1)


@dataclasses.dataclass
class Size:
    """What tells the Qwen3-VL-...-Instruct apart, as in config.json; `parameters` as in the published weights."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    tied: bool  # one matrix is word embedding and lm_head
    large_tower: bool
    parameters: int


SIZES = {
    "2B": Size(2048, 28, 16, 6144, True, False, 2_127_532_032),
    "4B": Size(2560, 36, 32, 9728, True, False, 4_437_815_808),
    "8B": Size(4096, 36, 32, 12288, False, True, 8_767_123_696),
    "32B": Size(5120, 64, 64, 25600, False, True, 33_357_390_064),
}
SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def model_config(name: str):
    """The Qwen3-VL configuration of a name in SIZES, of a folder, or of a hub name."""
    from transformers import Qwen3VLConfig

    from plumbing.checkpoint import read_config

    if name not in SIZES:
        return read_config(name)
    s = SIZES[name]
    text = {"hidden_size": s.hidden, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": s.intermediate, "vocab_size": 151936}
    tower = LARGE_TOWER if s.large_tower else SMALL_TOWER
    vision = {**tower, "num_heads": 16, "out_hidden_size": s.hidden, "num_position_embeddings": 2304}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=s.tied)


def plan_time(config, s: Plan) -> dict[str, float]:
    """Seconds of one step: operations / (GPUs x rate x utilisation); sampling reads weights and KV cache."""
    n, text = count_parameters(config, s.lora_r), config.text_config
    pairs = s.batch_pairs or (128 if s.stage == 2 else 32)
    group = s.rollouts if s.stage == 2 else 1
    row = s.video_tokens + (s.cot_tokens + 1) * group
    patches = s.video_tokens * config.vision_config.spatial_merge_size**2
    in_layers = n["block"] * text.num_hidden_layers
    # Q K' and P V, causal: the prefix sees itself, each CoT the prefix and itself (the drawing in layout.py).
    seen = s.video_tokens**2 / 2 + group * s.cot_tokens * (s.video_tokens + s.cot_tokens / 2)  # (query, key) pairs
    attention = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * seen
    lm_head = text.hidden_size * text.vocab_size * s.cot_tokens * group if s.stage == 2 else 0
    vision = 2 * n["vision"] * patches
    products = 2 * (in_layers * row + lm_head)
    forward = products + attention
    # Backward costs a forward for the activations' gradients, and another for the weights' (with LoRA hardly any);
    # attention has no weights, and two inputs to each product.
    update = products * (2 + (s.train == "full")) + 3 * attention + forward * s.gradient_checkpointing
    # Stage 2 also reads old log-probs, unless on-policy, and the reference. The tower looks once for the old log-probs,
    # and once for reference and policy together.
    old, reference = s.stage == 2 and s.mini_pairs != pairs, s.stage == 2 and s.kl
    update += forward * (old + reference)
    update += vision * (3 + s.gradient_checkpointing if s.stage == 1 and s.train_vision else 1 + old)
    total = 2 * pairs * update
    times = {"update": total / (s.gpus * s.tflops * 1e12 * s.utilisation)}
    if s.stage == 2:
        cots, cache = 2 * pairs * group / s.gpus, 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        weights = 2 * (n["llm"] + n["vision"]) / s.engine_tp
        free = max(1e9, s.engine_memory * s.gpu_gb * 1e9 - weights)
        waves = max(1.0, cots * cache * (s.video_tokens / group + s.cot_tokens) / free)  # the prefix is shared
        if s.engine == "transformers":
            waves = math.ceil(cots / s.rows_per_batch)
        read = s.cot_tokens * (waves * weights + cots * cache * (s.video_tokens + s.cot_tokens / 2))
        times["rollouts"] = read / (s.bandwidth * 1e12 * s.utilisation)
    return times


@dataclasses.dataclass
class Verdict:
    """Bytes on one GPU at the two peaks of a step, and whether each leaves room."""

    updating: float
    fits_updating: bool
    sampling: float | None  # stage 2 only: states and vLLM's share
    fits_sampling: bool

    @property
    def fits(self) -> bool:
        """Both peaks do."""
        return self.fits_updating and self.fits_sampling


def judge(memory: dict[str, float], s: Plan, parameters: int, text) -> Verdict:
    """plan_memory -> does it fit? 5 % of the GPU is left to CUDA and to fragments, 3 % while sampling.

    vLLM holds memory only while it samples. Its share must have room for its own weights, in bf16, and 1 GB of cache.
    transformers samples by the trainer's weights and needs a cache only.
    """
    room, total = s.gpu_gb * 1e9, sum(memory.values())
    verdict = Verdict(total, total < ROOM * room, None, True)
    if s.stage == 2:
        share = 0 if s.engine == "transformers" else s.engine_memory * room
        verdict.sampling = sampling_bytes(memory, s, text) + share
        holds = not share or 2 * parameters / s.engine_tp + 1e9 < share
        verdict.fits_sampling = verdict.sampling < 0.97 * room and holds
    return verdict


MACHINES = {  # name -> GPUs, memory of one
    "1 x 24 GB": (1, 24.0), "1 x 80 GB": (1, 80.0), "1 x 141 GB": (1, 141.0), "8 x 80 GB": (8, 80.0),
}
RUNS = {  # what is run -> stage, --train, --train-vision
    "1, head only": (1, "head", False), "1, LoRA and vision": (1, "lora", True), "1, full": (1, "full", True),
    "2, LoRA": (2, "lora", False), "2, full": (2, "full", False),
}


def cell(config, s: Plan, n: dict[str, int]) -> str:
    """One place of the table: GiB of the higher peak, in brackets if it does not fit, and what vLLM needs to fit.

    Tried in this order: vLLM's share of 40 %, of 50 %, of 30 %; then more GPUs for one engine.
    """
    memory, tried = plan_memory(config, s, n), [(tp, share) for tp in (1, 2, 4, 8) for share in (0.4, 0.5, 0.3)]
    plans = [dataclasses.replace(s, engine_tp=tp, engine_memory=share) for tp, share in tried if tp <= s.gpus]
    verdicts = [(plan, judge(memory, plan, n["llm"] + n["vision"], config.text_config)) for plan in plans]
    plan, verdict = next((found for found in verdicts if found[1].fits), verdicts[0])
    peak = f"{max(verdict.updating, verdict.sampling or 0) / 2**30:.1f}"
    if not verdict.fits:
        return f"({peak})"
    peak += f", share {plan.engine_memory}" if plan.engine_memory != 0.4 else ""
    return peak + (f", tp {plan.engine_tp}" if plan.engine_tp > 1 else "")


def table(s: Plan) -> str:
    """A Markdown table: sizes and what is trained, against MACHINES.

    Last row of a size: vLLM's weights while it thinks, for collect_cots.py, evaluate.py, with its share of 90 %.
    """
    lines = [["size", "stage, what is trained", *MACHINES], ["---"] * (2 + len(MACHINES))]
    for size in SIZES:
        config = model_config(size)
        n = count_parameters(config, s.lora_r)
        for run, (stage, train, vision) in RUNS.items():
            plan = dataclasses.replace(s, stage=stage, train=train, train_vision=vision)
            places = [dataclasses.replace(plan, gpus=gpus, gpu_gb=gb) for gpus, gb in MACHINES.values()]
            lines.append([size, run, *(cell(config, place, n) for place in places)])
        weights = 2 * SIZES[size].parameters
        held = f"{weights / 2**30:.1f}"
        fits = [weights + 1e9 < 0.9e9 * gb for _, gb in MACHINES.values()]
        lines.append([size, "thinking, evaluation", *(held if fit else f"({held})" for fit in fits)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None) -> None:
    """Prints memory by use, and seconds of one step; or the table of all sizes."""
    s = parse(Plan, "Memory per GPU and time per step for a model size, before anything is bought or loaded.", argv)
    if s.table:
        print(f"GiB on one GPU, planned; in brackets: does not fit. {s.video_tokens} + {s.cot_tokens} tokens.\n")
        print(table(s))
        return
    try:
        config = model_config(s.plan)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--plan {s.plan}: no config.json found ({str(error).splitlines()[0]}); give {', '.join(SIZES)}, or a "
            "folder."
        ) from error
    n = count_parameters(config, s.lora_r)
    memory, times = plan_memory(config, s, n), plan_time(config, s)
    verdict, parameters = judge(memory, s, n["llm"] + n["vision"], config.text_config), (n["llm"] + n["vision"]) / 1e9
    print(f"{s.plan}, {parameters:.2f} billion parameters, stage {s.stage}, {s.train}, {s.gpus} GPUs; "
          f"{s.video_tokens} + {s.cot_tokens} tokens")
    for use, size in memory.items():
        print(f"  {size / 2**30:8.1f} GiB  {use}")
    words = {True: "fits", False: "DOES NOT FIT"}
    room = s.gpu_gb * 1e9
    print(f"  {verdict.updating / 2**30:8.1f} GiB  in all, of {room / 2**30:.1f}: {words[verdict.fits_updating]}")
    if s.stage == 2:
        print(f"  {verdict.sampling / 2**30:8.1f} GiB  while sampling, {s.engine}'s share included: "
              f"{words[verdict.fits_sampling]}")
    for name, seconds in times.items():
        print(f"  {seconds:8.1f} s    {name} of one step, at {s.utilisation:.0%} of the peak rates")


if __name__ == "__main__":
    cli(main)
