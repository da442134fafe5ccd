"""What a GPU holds and what makes it faster: memory by arithmetic, gradient checkpointing chosen by it, compiled parts.

`prepare` is what both stages call. lab/bench/plan.py prints the same arithmetic, for machines that are not at hand.
"""

import dataclasses
import os
import shutil
import sysconfig

import torch
from transformers import CompileConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.models.qwen3_vl import modeling_qwen3_vl

from plumbing.settings import InputError, arg

LOGIT_CHUNK = 256  # positions whose (chunk, V) logits exist at a time: 0.16 GB in fp32 at V = 151,936
ROOM = 0.95  # of a GPU; the rest is left to CUDA and to fragments


# ---- 1. Memory, by arithmetic ---------------------------------------------------------------------------------
@dataclasses.dataclass
class Load:
    """What the memory of an update, and of sampling, depends on, beside the model."""

    stage: int = arg(2, "1: cold start, 2: RL", choices=[1, 2])
    train: str = arg("full", "what of the LLM is trained", choices=["lora", "full", "head"])
    train_vision: bool = arg(True, "stage 1 trains the vision tower")
    lora_r: int = arg(64, "LoRA rank", at_least=1)
    lora_dropout: float = arg(0.05, "LoRA dropout of stage 1; stage 2 has none", at_least=0)
    gpus: int = arg(8, "number of GPUs", at_least=1)
    shard_ranks: int = arg(0, "GPUs that share one copy of the weights; 0: all", at_least=0)
    video_tokens: int = arg(
        2048, "prompt and video tokens (5 s at 2 fps and 448 x 448: 5 x 196, plus the text)", at_least=1)
    cot_tokens: int = arg(1024, "tokens of a CoT (at most 4,096)", at_least=0)
    rollouts: int = arg(8, "G, CoTs per video in stage 2", at_least=1)
    micro_rollouts: int = arg(2, "stage 2: CoTs of each video in one forward and backward", at_least=1)
    micro_pairs: int = arg(1, "stage 1: pairs in one forward and backward", at_least=1)
    gradient_checkpointing: bool = arg(True, "recompute activations in backward")
    kl: bool = arg(True, "stage 2 holds a reference for the KL term")
    engine: str = arg("vllm", "who samples; transformers: by the weights trained", choices=["transformers", "vllm"])
    rows_per_batch: int = arg(64, "CoTs the transformers engine samples at a time", at_least=1)
    cpu_offload: bool = arg(False, "FSDP2: weights, gradients and optimizer in the host's memory")


def count_parameters(config, lora_r: int) -> dict[str, int]:
    """Parameters of the LLM, of one of its blocks, of what lies outside all blocks, of vision, and of the adapters."""
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):  # not accelerate's init_empty_weights: it would count tied embeddings twice
        backbone = Qwen3VLForConditionalGeneration._from_config(config)
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    layers, visual = backbone.model.language_model.layers, backbone.model.visual
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    counts = {"vision": size(visual), "llm": size(backbone) - size(visual), "block": size(layers[0])}
    counts["root"] = size(backbone) - size(layers) - size(visual.blocks)
    return counts | {"lora": sum(lora_r * (m.in_features + m.out_features) for m in linear)}


def block_bytes(text, prefix: int = 0, cot: int = 0, dropout: bool = False) -> float:
    """Bytes that backward keeps per token inside ONE text block, in bf16 compute: counted tensor by tensor.

    Of a whole row, or with `cot` of CoTs of so many tokens behind prefixes that were read before: each has a copy of
    the prefix's keys and values in front of its own. dropout: of LoRA. Each of the seven adapters
    then keeps what its own mask let through, in bf16, and the mask, of bytes, instead of the input that some share.
    """
    wide, narrow = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    plain = 16 * text.hidden_size + 12 * wide + 10 * narrow + 8 * text.intermediate_size
    dropped = 11 * text.hidden_size + wide + text.intermediate_size  # 3 of each of 7 inputs, less 2 of each of 4
    return plain + dropped * dropout + (4 * narrow * (prefix + cot) / cot if cot else 0)


def plan_memory(config, s: Load, n: dict[str, int] | None = None) -> dict[str, float]:
    """Bytes on one GPU in an update, by use. `n`: what `count_parameters` gives, if it is known.

    States are exact, activations are counted (`block_bytes`), gathered weights are estimates from above.
    """
    n, text, vision = n or count_parameters(config, s.lora_r), config.text_config, config.vision_config
    gpus = s.shard_ranks or s.gpus
    full, train_vision = s.train == "full", s.stage == 1 and s.train_vision
    trained = {"lora": n["lora"], "full": n["llm"], "head": 0}[s.train] + train_vision * n["vision"]
    frozen = n["llm"] + n["vision"] + (s.train == "lora") * n["lora"] - trained
    memory = {
        "weights: trained fp32, frozen bf16 (fp32 with full)": (4 * trained + (4 if full else 2) * frozen) / gpus,
        "gradients, fp32": 4 * trained / gpus,
        "AdamW, two fp32 moments": 8 * trained / gpus,
    }
    if s.stage == 2 and s.kl and full:
        memory["reference, bf16"] = 2 * (n["llm"] + n["vision"]) / gpus
    memory = {use: size * (not s.cpu_offload) for use, size in memory.items()}
    if s.stage == 2 and s.engine == "transformers" and (gpus > 1 or s.cpu_offload):
        memory["unsharded copy that samples, bf16"] = 2 * (n["llm"] + n["vision"])
    if gpus == 1 and not s.cpu_offload:
        memory["bf16 copies of the trained weights (autocast)"] = 2 * trained
    else:  # a block, the next one on its way, and what lies outside the blocks; the gradients of a block and of those
        memory["gathered weights, bf16"] = 2 * (2 * n["block"] + n["root"])
        memory["gathered gradients, bf16 and fp32"] = 6 * (n["block"] + n["root"]) if full else 0
    layers, width = text.num_hidden_layers, 2 * text.hidden_size  # width: bytes of a bf16 hidden state
    stream = 0
    if gpus == 1 and full and not s.cpu_offload:  # autocast over fp32 weights keeps the residual stream in fp32
        stream, width = 10 * text.hidden_size, 2 * width

    def kept(*parts):  # by forwards of (tokens, bytes inside a block); recomputing, inside one block at a time
        between = sum(tokens * layers * width for tokens, _ in parts)
        inside = [tokens * (inside + stream) for tokens, inside in parts]
        return between + max(inside) if s.gradient_checkpointing else layers * sum(inside)

    if s.stage == 1:
        tokens = 2 * s.micro_pairs * (s.video_tokens + s.cot_tokens + 1)
        inside = block_bytes(text, dropout=s.train == "lora" and s.lora_dropout > 0)
        memory["activations of a forward"] = kept((tokens, inside))
    else:
        cots, cot = 2 * min(s.micro_rollouts, s.rollouts), s.cot_tokens + 1
        behind = cots * cot, block_bytes(text, s.video_tokens, cot)
        memory["activations of a pair's prefixes and a part of its CoTs"] = kept(
            (2 * s.video_tokens, block_bytes(text)), behind)
        states = 2 * text.num_key_value_heads * text.head_dim * layers * 2 * s.video_tokens  # keys and values
        memory["the prefixes' keys and values and their gradients, bf16"] = 2 * 2 * states
        memory["what the tower saw of the pair, bf16"] = 2 * 2 * s.video_tokens * text.hidden_size * (
            1 + len(vision.deepstack_visual_indexes))
        memory["logits of one chunk, fp32, with gradient"] = 3 * 4 * LOGIT_CHUNK * text.vocab_size
    if train_vision:
        patches = 2 * s.micro_pairs * s.video_tokens * vision.spatial_merge_size**2
        within = 2 * (8 * vision.hidden_size + 2 * vision.intermediate_size)
        in_tower = 2 * vision.depth * vision.hidden_size + within if s.gradient_checkpointing else vision.depth * within
        memory["activations of the vision tower"] = patches * in_tower
    return memory


def sampling_bytes(memory: dict[str, float], s: Load, text) -> float:
    """Stage 2's other peak: bytes on one GPU while CoTs are sampled, without vLLM's share. memory: of `plan_memory`.

    What an update alone holds is gone then. transformers samples under the trainer's autocast, whose copies stay, and
    has keys and values, bf16, of --rows-per-batch prompts with their CoTs, from the start as long as they may become.
    """
    gone = ("gathered", "activations", "logits", "prefixes", "tower saw") + ("autocast",) * (s.engine == "vllm")
    held = sum(size for use, size in memory.items() if not any(word in use for word in gone))
    row = 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * (s.video_tokens + s.cot_tokens)
    return held + (s.stage == 2 and s.engine == "transformers") * s.rows_per_batch * row


# ---- 2. Before the first step ---------------------------------------------------------------------------------
def prepare(model, settings, ranks, longest) -> bool:
    """COLLECTIVE: what both stages do to a model before parallel.shard. longest(): tokens of the longest sequence in
    the data, without CoTs in stage 2; asked for only if there is a GPU.

    --gradient-checkpointing: as told; else off if the plan fits the GPU without, on a CPU always on. Says what is
    planned, and what would fit if this does not; InputError if not even the states do. Returns whether it compiles.
    """
    recompute = settings.gradient_checkpointing
    if ranks.device.type == "cuda":
        load, card = load_of(settings, ranks, longest()), torch.cuda.get_device_properties(ranks.device).total_memory
        recompute, text = choose(model.backbone.config, load, card, recompute)
        ranks.print(text)
    if recompute in (True, None):
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = compile_parts(model, settings.compile, ranks.device)
    if compiled:
        ranks.print("compiled: mlp, norms and rotary embedding of each layer, and sampling by transformers; the first "
                    "steps take a minute or two longer")
    return compiled


def load_of(settings, ranks, longest: int) -> Load:
    """What a stage's settings mean for memory. In stage 1 all of the longest sequence counts as video: from above."""
    own = {field.name for field in dataclasses.fields(Load)}
    same = {name: value for name, value in vars(settings).items() if name in own}
    same |= {"gpus": ranks.world, "gradient_checkpointing": True}  # until `choose`
    if hasattr(settings, "micro_pairs"):
        return Load(**same, stage=1, video_tokens=longest - 1, cot_tokens=0)
    sampled = 2 * settings.rollouts * settings.batch_pairs // ranks.world  # by a rank, in all
    same["rows_per_batch"] = min(settings.rows_per_batch, max(1, sampled))
    return Load(**same, stage=2, video_tokens=longest, cot_tokens=settings.max_new_tokens, kl=settings.kl_coef > 0)


LESS = (  # what takes less memory, the cheapest first
    ("--gradient-checkpointing", {"gradient_checkpointing": True}), ("--micro-pairs 1", {"micro_pairs": 1}),
    ("--micro-rollouts 1", {"micro_rollouts": 1}), ("--rows-per-batch 8", {"rows_per_batch": 8}),
    ("--train lora", {"train": "lora"}), ("--no-train-vision", {"train_vision": False}),
    ("--train head", {"train": "head"}),
)


def choose(config, load: Load, card: int, wanted: bool | None = None) -> tuple[bool, str]:
    """Gradient checkpointing or not, and the sentence that says why. card: bytes of the GPU; wanted: as told.

    Planned is the higher of two peaks, in an update and while transformers samples; recomputing lowers the first alone.
    InputError: the states alone, which are exact, are more than the card has. The plan as a whole is from above, so a
    run whose plan does not fit is only told so.
    """
    n, gib, room = count_parameters(config, load.lora_r), 2**30, ROOM * card

    def peaks(load: Load) -> tuple[float, float]:  # in an update, while sampling
        memory = plan_memory(config, load, n)
        return sum(memory.values()), sampling_bytes(memory, load, config.text_config)

    def planned(load: Load) -> float:
        return max(peaks(load))

    off = dataclasses.replace(load, gradient_checkpointing=False)
    recompute = peaks(off)[0] > room if wanted is None else wanted
    load = dataclasses.replace(load, gradient_checkpointing=recompute)
    text = f"GPU memory: {planned(load) / gib:.1f} GiB planned of {card / gib:.1f}, "
    text += "while sampling, " * (planned(load) > peaks(load)[0]) + "without " * (not recompute)
    text += "gradient checkpointing" + f" ({planned(off) / gib:.1f} without)" * recompute
    if planned(load) <= room:
        return recompute, text
    smaller, flags = load, []
    for flag, change in LESS:
        other = dataclasses.replace(smaller, **change)
        lower = any(now > max(room, then) for now, then in zip(peaks(smaller), peaks(other)))
        if lower and (load.stage == 1 or "head" not in flag):
            smaller, flags = other, [*flags, flag]
    while planned(smaller) > room and smaller.gpus < 64:
        smaller = dataclasses.replace(smaller, gpus=2 * smaller.gpus)
    flags += [f"torchrun --nproc_per_node {smaller.gpus}"] * (smaller.gpus > load.gpus)
    fits = f"{', '.join(flags)} would take {planned(smaller) / gib:.1f}; docs/machines.md has more"
    uses = plan_memory(config, load, n).items()
    if sum(size for use, size in uses if use.startswith(("weights", "gradients", "Adam", "refer"))) > card:
        raise InputError(f"{text}: not even the weights, gradients and optimizer fit; {fits}.")
    return recompute, f"{text}: it may run out of memory; {fits}"


def compile_parts(model, wanted: bool | None, device: torch.device, backend: str = "inductor") -> bool:
    """--compile: each text layer's mlp and both norms, and the rotary embedding, become a kernel or two each.

    In place, so no name in a checkpoint changes (a compiled MODULE would put `_orig_mod` into all). Nothing is traced
    before a part's first call, so this may come before parallel.shard, and what is traced then are the weights that
    FSDP has gathered for the layer around it. The attention between them stays as it is: its spans are Python integers,
    and each new one would be traced anew. Lengths are symbols (dynamic): one trace for all.
    wanted None: on a GPU where a C compiler and Python's headers are there, which Triton needs; True without them is an
    InputError. Returns whether it compiles. The rotary embedding's stays on for the process.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    headers = os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    compilers = [os.environ.get("CC"), "cc", "gcc", "clang"] if device.type == "cuda" else ["g++", "clang++"]
    if not (headers and any(name and shutil.which(name) for name in compilers)):
        if wanted:
            raise InputError("--compile: needs a C compiler (gcc, g++) and Python's headers (python3-dev); install "
                             "them, or leave it out.")
        return False
    # All parts of a kind are one function to it, traced for each circumstance: with and without gradients, autocast or
    # the adapter; one row or two. A step of stage 2 has 7; after 8, its default, the rest would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for layer in model.backbone.model.language_model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile(dynamic=True, backend=backend)
    rotary = modeling_qwen3_vl.apply_rotary_pos_emb
    if not hasattr(rotary, "_torchdynamo_orig_callable"):  # a function of transformers' module: once
        modeling_qwen3_vl.apply_rotary_pos_emb = torch.compile(rotary, dynamic=True, backend=backend)
    return True


# ---- 3. Sampling, compiled ------------------------------------------------------------------------------------
# What `generate` compiles: the whole forward of one token. Not the default mode, "reduce-overhead": the memory that
# CUDA graphs keep for themselves would be missing in the update.
DECODING = CompileConfig(mode="default")
DECODING._compile_all_devices = True  # a CPU, too, for the tests: the caller has decided


class FixedLayer(StaticLayer):
    """Keys and values of one layer, in tensors as long as they may become; all of the type of the first ones.

    Under autocast keys come in fp32 and values in bf16, and transformers' own layer then takes neither.
    """

    def update(self, keys, values, *args, **more):
        """Appends keys and values (rows, H_kv, new, d) -> all of them, (rows, H_kv, length, d)."""
        dtype = self.dtype if self.is_initialized else keys.dtype
        return super().update(keys.to(dtype), values.to(dtype), *args, **more)


def fixed_cache(past, which: torch.Tensor, tokens: int) -> Cache:
    """Rows `which` of a growing cache, with room for `tokens` in all; `past` is used up, layer by layer.

    A growing cache has another shape for each token, so compiled decoding would be traced anew for each. transformers
    compiles by itself what `generate` calls with a fixed one: for its shape, and where another comes with rows, lengths
    or both as symbols, so a few traces serve all batches. Lengths are multiples of 64, as kernels like them.
    """
    length, kind = -(-tokens // 64) * 64, which.device.type
    fixed = Cache([FixedLayer(length) for _ in past.layers])
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else past.layers[0].keys.dtype
    for i in range(len(past.layers)):
        layer, past.layers[i] = past.layers[i], None
        fixed.update(layer.keys[which].to(dtype), layer.values[which].to(dtype), i)
    return fixed
