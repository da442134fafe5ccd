"""Sampling chains of thought: G per video, by transformers' generate or by vLLM, behind one signature.

    engine = make_engine("transformers" | "vllm", ...)
    cots = engine.generate(prefixes, seeds, max_new_tokens, temperature)    # [prefix][sample] -> token ids, with EOS
    engine.sync(named_weights)                                              # after every update

Who calls it: collect_cots.py (stage 0), grpo.py (stage 2), phases.py (evaluation), `DeScore.think`.
"""

import contextlib
import dataclasses
import threading

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import data
from plumbing.adapters import base_of
from plumbing.checkpoint import load_backbone, read_config
from plumbing.gpu import DECODING, fixed_cache
from plumbing.hub import local_folder
from plumbing.settings import InputError, arg
from plumbing.vllm_engine import VLLMEngine


@dataclasses.dataclass
class EngineSettings:
    """Flags of whatever samples: collect_cots.py, evaluate.py and grpo.py (which takes less memory, see there)."""

    engine: str = arg("transformers", "who samples CoTs; vllm for real models", ["transformers", "vllm"])
    engine_memory: float = arg(0.9, "share of a GPU's memory that vLLM may use", above=0, at_most=1)
    engine_tp: int = arg(1, "tensor parallel vLLM: ranks that hold one engine together", at_least=1)
    engine_max_len: int = arg(
        12288, "prompt + CoT tokens that vLLM takes at most; a video with more is refused", at_least=1)
    max_new_tokens: int = arg(4096, "tokens per CoT at most (paper: 4096)", at_least=1)


class SeededSampling(LogitsProcessor):
    """Temperature sampling with one random stream per row, by the Gumbel-max trick:

        argmax_v (logit_v / temperature + g_v),  g_v ~ Gumbel(0, 1)   is a draw from softmax(logits / temperature)

    With transformers' own sampling the draw for a row depends on its batch-mates; here a CoT depends on its own seed
    only, so results do not change with the batch size or the number of ranks. (They do with the device: another kind
    of generator.) The noise is drawn where the logits are, for a small vocabulary of several tokens at a time.
    """

    def __init__(self, seeds: list[int], temperature: float, device="cpu"):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature, self.noise = temperature, []  # of the tokens to come, each (rows, V)

    def __call__(self, input_ids, scores):
        if not self.noise:
            size = max(1, 2**14 // scores.shape[1]), scores.shape[1]
            uniform = torch.stack([torch.rand(size, generator=g, device=g.device) for g in self.generators], dim=1)
            self.noise = list(-torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7))))
        return scores.float() / self.temperature + self.noise.pop(0)


def banned_tokens(tokenizer, vocab_size: int) -> list[int]:
    """Ids below `vocab_size`, the rows of the model's embedding, that a CoT may not contain.

    Allowed are text (tokens that are not added ones), EOS, `<think>` and `</think>`. Banned is the rest: a sampled
    <|video_pad|> would claim to be video, a <tool_call> belongs to another task, and rows without a token decode to
    nothing, yet would be scored. Qwen3-VL has 151,936 rows: 151,643 of text, 26 added tokens, 267 without a token.
    The trainer's log-probs are over all rows, banned ones too: its ratio is of two such, so it is 1 on-policy all the
    same, and what the ban moves is the banned share (1.4e-5 a token on the toy's trained models, 5e-4 at most).
    """
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    text = set(tokenizer.get_vocab().values()) - set(added.values())
    allowed = text | {tokenizer.eos_token_id} | {added[token] for token in data.THINK if token in added}
    return [i for i in range(vocab_size) if i not in allowed]


@torch.no_grad()
def sample_cots(
    backbone, processor, prefixes: list[dict], seeds: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
    compiled: bool = False,
) -> list[list[list[int]]]:
    """Samples len(seeds[i]) CoTs for prefix i, whose video and prompt are read once. temperature 0 is greedy.

    compiled: one token's forward becomes a few kernels; its first call takes a minute, and the cache is as long from
    the start as it may become.

    Returns [prefix][sample] -> token ids, the EOS included when it was reached, absent when cut off at max_new_tokens.
    """
    tokenizer, device = processor.tokenizer, next(backbone.parameters()).device
    which = torch.tensor([i for i, row_seeds in enumerate(seeds) for _ in row_seeds], device=device)  # (rows,)
    flat_seeds = [seed for row_seeds in seeds for seed in row_seeds]
    length = max(len(prefix["input_ids"]) for prefix in prefixes)

    def left_pad(name, fill):  # generation continues at the right end, so all rows must end there
        rows = [prefix[name] if name in prefix else torch.ones_like(prefix["input_ids"]) for prefix in prefixes]
        return torch.stack([torch.cat([row.new_full((length - len(row),), fill), row]) for row in rows]).to(device)

    ids, mask = left_pad("input_ids", tokenizer.pad_token_id), left_pad("attention_mask", 0)
    config = GenerationConfig(  # everything named, or the checkpoint's own generation_config would fill the gaps
        do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=50, use_cache=True,
        max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=banned_tokens(tokenizer, backbone.config.text_config.vocab_size),
    )
    sampling = LogitsProcessorList([SeededSampling(flat_seeds, temperature, device)] if temperature > 0 else [])
    was_training = backbone.training
    backbone.eval()
    read = backbone(  # all of the prompt but its last token, from which generation starts
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1], mm_token_type_ids=left_pad("mm_token_type_ids", 0)[:, :-1],
        pixel_values_videos=torch.cat([prefix["pixel_values_videos"] for prefix in prefixes]).to(device),
        video_grid_thw=torch.cat([prefix["video_grid_thw"] for prefix in prefixes]).to(device),
        use_cache=True, logits_to_keep=1,
    )
    cache = "cache" if "cache" in read else "past_key_values"  # its name since transformers 5.24, and before
    past = read[cache]  # of each prompt: its keys and values are copied for each of its CoTs
    if compiled:
        past, config.compile_config = fixed_cache(past, which, length + max_new_tokens), DECODING
    else:
        past.batch_select_indices(which)
    backbone.model.rope_deltas = backbone.model.rope_deltas[which]
    tokens = backbone.generate(
        input_ids=ids[which], attention_mask=mask[which], generation_config=config, logits_processor=sampling,
        **{cache: past},
    )[:, length:].tolist()
    backbone.train(was_training)
    ended = [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in tokens]
    samples = iter(ended)
    return [[next(samples) for _ in row_seeds] for row_seeds in seeds]


def decode_cot(tokenizer, cot: list[int]) -> str:
    """Token ids -> text without EOS."""
    return tokenizer.decode(cot[:-1] if has_ended(tokenizer, cot) else cot)


def has_ended(tokenizer, cot: list[int]) -> bool:
    """False for a CoT that was cut off at max_new_tokens: its verdicts may be missing, its reward may be far off."""
    return cot[-1:] == [tokenizer.eos_token_id]


# The class keeps the offsets of a prompt's positions in the model until its last token is sampled, and a second thread
# that reads its own prompt in between would replace them: trainers call scorers from threads, so one goes at a time.
SAMPLING = threading.Lock()


class TransformersEngine:
    """Samples with transformers' generate. Slow on large models, but needs nothing else and runs anywhere.

    `backbone` is the trainer's own when there is one process (then `sync` has nothing to do), or an unsharded copy
    beside an FSDP model. `autocast`: how the trainer computes, so that the policy that samples is the one that learns.
    `compiled`: as in `sample_cots`.
    """

    needs = ("input_ids", "mm_token_type_ids", "pixel_values_videos", "video_grid_thw")  # of a prefix
    limit = None  # prompt + CoT tokens: as many as memory holds

    def __init__(
        self, backbone, processor, shared: bool, rows_per_batch=64, autocast=contextlib.nullcontext, compiled=False
    ):
        self.backbone, self.processor, self.shared, self.requests = backbone, processor, shared, rows_per_batch
        self.autocast, self.compiled = autocast, compiled

    def generate(self, prefixes, seeds, max_new_tokens, temperature=1.0) -> list[list[list[int]]]:
        """len(seeds[i]) CoTs for prefix i: token ids, EOS included unless cut off. Each depends on its own seed."""
        return [cots for _, cots in self.stream(prefixes, seeds, max_new_tokens, temperature)]

    def stream(self, prefixes, seeds, max_new_tokens, temperature=1.0):
        """Yields (i, CoTs of prefix i) as they are ready, here in order."""
        per_batch = max(1, self.requests // max(map(len, seeds), default=1))
        for start in range(0, len(prefixes), per_batch):
            part = slice(start, start + per_batch)
            cots = [[] for _ in prefixes[part]]
            for i in range(0, max(map(len, seeds[part])), self.requests):  # one prefix may have more CoTs than rows
                some = [row[i : i + self.requests] for row in seeds[part]]
                with self.autocast(), SAMPLING:
                    found = sample_cots(
                        self.backbone, self.processor, prefixes[part], some, max_new_tokens, temperature, self.compiled)
                cots = [before + new for before, new in zip(cots, found)]
            yield from enumerate(cots, start)

    def sync(self, named_weights) -> None:
        """Takes over (Hugging Face name, whole tensor) of all that is trained. COLLECTIVE: iterating gathers shards.

        InputError: a weight that the engine does not have, or of another shape.
        """
        own = {name.replace(".base_layer.", "."): value for name, value in self.backbone.named_parameters()}
        for name, value in named_weights:  # walked through even when shared: gathering is collective
            if self.shared:
                continue
            if name not in own or own[name].shape != value.shape:
                raise InputError(f"the rollout engine has no weight {name} of shape {tuple(value.shape)}.")
            own[name].data.copy_(base_of(name, value, getattr(self.backbone, "beside", {})))

    def sleep(self, level: int) -> None:
        """Keeps its memory: the model that scores is often the same."""

    def close(self) -> None:
        """Nothing to give back."""


def make_engine(
    name: str, path: str, processor, ranks, backbone=None, seed=0, max_model_len=12288, rows_per_batch=64,
    autocast=contextlib.nullcontext, compiled=False, **vllm
):
    """COLLECTIVE: "transformers" or "vllm", on the weights of the Hugging Face folder `path`.

    `backbone`: an unsharded one that is already there, for the transformers engine to use as it is, `autocast` and
    `compiled` as its trainer has it; who evaluates has neither, and samples in the type that was asked for.
    `max_model_len`: prompt + CoT tokens that vLLM takes at most. `vllm`: memory (its share of the GPU), tp (ranks that
    hold one engine together), sleeps (between calls: there is a trainer). InputError: flags that do not go together.
    """
    on_cpu, path = ranks.device.type == "cpu", local_folder(path)
    if name == "vllm":
        tp = vllm.get("tp", 1)
        if tp < 1 or ranks.world % tp:
            raise InputError(f"--engine-tp {tp} does not divide the {ranks.world} ranks.")
        vllm |= {"dtype": "float32" if on_cpu else "bfloat16", "on_cpu": on_cpu}
        text = read_config(path).text_config
        banned = banned_tokens(processor.tokenizer, text.vocab_size)
        limit = min(max_model_len, text.max_position_embeddings)
        return VLLMEngine(path, processor, banned, seed + ranks.rank // tp, limit, **vllm)
    if name != "transformers":
        raise InputError(f"--engine {name}: choose transformers or vllm.")
    shared = backbone is not None
    if not shared:
        backbone = load_backbone(path, torch.float32 if on_cpu else torch.bfloat16).to(ranks.device).eval()
    return TransformersEngine(backbone, processor, shared, rows_per_batch, autocast, compiled)
