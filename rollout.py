"""Sampling chains of thought: G per video, by transformers' generate or by vLLM, behind one signature.

    engine = make_engine("transformers" | "vllm", ...)
    cots = engine.generate(prefixes, seeds, max_new_tokens, temperature)    # [prefix][sample] -> token ids, with EOS
    engine.sync(named_weights)                                              # after every update

As a command it collects the CoTs that stage 1 learns from, by the base model itself, one per video:

    python rollout.py --model runs/base --data pairs.csv --out pairs_with_cots.csv
    torchrun --nproc_per_node 8 rollout.py --data train.csv val.csv --out train_cots.csv val_cots.csv --engine vllm

Every CoT is written to OUT.thoughts/ as soon as it exists; the same command goes on where it was stopped.
"""

import concurrent.futures
import dataclasses
import os

import torch
from transformers import AutoConfig, AutoProcessor, GenerationConfig, LogitsProcessor, LogitsProcessorList

import data
import parallel
from lab.study.sanity import changed_video
from plumbing.checkpoint import load_backbone
from plumbing.formats import write_cots
from plumbing.jobs import Item, Phase, claim_out, readable_pairs, task_seed, write_skipped
from plumbing.settings import InputError, arg, cli, parse, rollout_flags
from plumbing.video import READERS
from plumbing.vllm_engine import VLLMEngine, require_room
from rules import extract_answer

# This rank's share of the cores. Read now: vLLM changes LOCAL_WORLD_SIZE when it starts.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class SeededSampling(LogitsProcessor):
    """Temperature sampling with one random stream per row, by the Gumbel-max trick:

        argmax_v (logit_v / temperature + g_v),  g_v ~ Gumbel(0, 1)   is a draw from softmax(logits / temperature)

    With transformers' own sampling the draw for a row depends on its batch-mates; here a CoT depends on its own seed
    only, so results do not change with the batch size or the number of ranks.
    """

    def __init__(self, seeds: list[int], temperature: float):
        self.generators, self.temperature = [torch.Generator().manual_seed(seed) for seed in seeds], temperature

    def __call__(self, input_ids, scores):
        noise = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])  # (rows, V)
        gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self.temperature + gumbel.to(scores.device)


def banned_tokens(tokenizer, vocab_size: int) -> list[int]:
    """Ids below `vocab_size`, the rows of the model's embedding, that a CoT may not contain.

    Allowed are text (tokens that are not added ones), EOS, `<think>` and `</think>`. Banned is the rest: a sampled
    <|video_pad|> would claim to be video, a <tool_call> belongs to another task, and rows without a token decode to
    nothing, yet would be scored. Qwen3-VL has 151,936 rows: 151,643 of text, 26 added tokens, 267 without a token.
    """
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    text = set(tokenizer.get_vocab().values()) - set(added.values())
    allowed = text | {tokenizer.eos_token_id} | {added[token] for token in data.THINK if token in added}
    return [i for i in range(vocab_size) if i not in allowed]


@torch.no_grad()
def sample_cots(
    backbone, processor, prefixes: list[dict], seeds: list[list[int]], max_new_tokens: int, temperature: float = 1.0
) -> list[list[list[int]]]:
    """Samples len(seeds[i]) CoTs for prefix i, whose video and prompt are read once. temperature 0 is greedy.

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
    sampling = LogitsProcessorList([SeededSampling(flat_seeds, temperature)] if temperature > 0 else [])
    was_training = backbone.training
    backbone.eval()
    cache = backbone(  # all of the prompt but its last token, from which generation starts
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1], mm_token_type_ids=left_pad("mm_token_type_ids", 0)[:, :-1],
        pixel_values_videos=torch.cat([prefix["pixel_values_videos"] for prefix in prefixes]).to(device),
        video_grid_thw=torch.cat([prefix["video_grid_thw"] for prefix in prefixes]).to(device),
        use_cache=True, logits_to_keep=1,
    ).past_key_values
    cache.batch_select_indices(which)  # a copy of the prompt's keys and values for each of its CoTs
    backbone.model.rope_deltas = backbone.model.rope_deltas[which]
    tokens = backbone.generate(
        input_ids=ids[which], attention_mask=mask[which], past_key_values=cache, generation_config=config,
        logits_processor=sampling,
    )[:, length:].tolist()
    backbone.train(was_training)
    ended = [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in tokens]
    samples = iter(ended)
    return [[next(samples) for _ in row_seeds] for row_seeds in seeds]


def decode_cot(tokenizer, cot: list[int]) -> str:
    """Token ids -> text without EOS."""
    return tokenizer.decode(cot[:-1] if cot and cot[-1] == tokenizer.eos_token_id else cot)


class TransformersEngine:
    """Samples with transformers' generate. Slow on large models, but needs nothing else and runs anywhere.

    `backbone` is the trainer's own when there is one process (then `sync` has nothing to do), or an unsharded copy
    beside an FSDP model.
    """

    needs = ("input_ids", "mm_token_type_ids", "pixel_values_videos", "video_grid_thw")  # of a prefix
    limit = None  # prompt + CoT tokens: as many as memory holds

    def __init__(self, backbone, processor, shared: bool, rows_per_batch: int = 64):
        self.backbone, self.processor, self.shared, self.requests = backbone, processor, shared, rows_per_batch

    def generate(self, prefixes, seeds, max_new_tokens, temperature=1.0) -> list[list[list[int]]]:
        """len(seeds[i]) CoTs for prefix i: token ids, EOS included unless cut off. Each depends on its own seed."""
        return [cots for _, cots in self.stream(prefixes, seeds, max_new_tokens, temperature)]

    def stream(self, prefixes, seeds, max_new_tokens, temperature=1.0):
        """Yields (i, CoTs of prefix i) as they are ready, here in order."""
        per_batch = max(1, self.requests // max(map(len, seeds), default=1))
        for start in range(0, len(prefixes), per_batch):
            part = slice(start, start + per_batch)
            cots = sample_cots(self.backbone, self.processor, prefixes[part], seeds[part], max_new_tokens, temperature)
            yield from enumerate(cots, start)

    def sync(self, named_weights) -> None:
        """Takes over (Hugging Face name, whole tensor) of all that is trained. COLLECTIVE: iterating gathers shards."""
        own = dict(self.backbone.named_parameters())
        for name, value in named_weights:  # walked through even when shared: gathering is collective
            if self.shared:
                continue
            if name not in own or own[name].shape != value.shape:
                raise InputError(f"the rollout engine has no weight {name} of shape {tuple(value.shape)}.")
            own[name].data.copy_(value)

    def sleep(self, level: int) -> None:
        """Keeps its memory: the model that scores is often the same."""

    def close(self) -> None:
        """Nothing to give back."""


def make_engine(
    name: str, path: str, processor, ranks, backbone=None, seed=0, max_model_len=12288, rows_per_batch=64, **vllm
):
    """COLLECTIVE: "transformers" or "vllm", on the weights of the Hugging Face folder `path`.

    `backbone`: an unsharded one that is already there, for the transformers engine to use as it is. `max_model_len`:
    prompt + CoT tokens that vLLM takes at most. `vllm`: memory (its share of the GPU), tp (ranks that hold one engine
    together), sleeps (between calls: there is a trainer).
    """
    on_cpu = ranks.device.type == "cpu"
    if name == "vllm":
        tp = vllm.get("tp", 1)
        if tp < 1 or ranks.world % tp:
            raise InputError(f"--engine-tp {tp} does not divide the {ranks.world} ranks.")
        vllm |= {"dtype": "float32" if on_cpu else "bfloat16", "on_cpu": on_cpu}
        text = AutoConfig.from_pretrained(path).text_config
        banned = banned_tokens(processor.tokenizer, text.vocab_size)
        limit = min(max_model_len, text.max_position_embeddings)
        return VLLMEngine(path, processor, banned, seed + ranks.rank // tp, limit, **vllm)
    if name != "transformers":
        raise InputError(f"--engine {name}: choose transformers or vllm.")
    shared = backbone is not None
    if not shared:
        backbone = load_backbone(path, torch.float32 if on_cpu else torch.bfloat16).to(ranks.device).eval()
    return TransformersEngine(backbone, processor, shared, rows_per_batch)


# ---------------------------------------------------------------------------------------------------------------
# Thinking about many videos, resumable: for the command below and for evaluate.py
# ---------------------------------------------------------------------------------------------------------------
MAX_PROMPT = 5_000  # tokens: no video generator reads more, and the cost of attention grows with the square


class Thinker:
    """Who writes the CoTs: an engine, opened when it is first needed. A finished run opens none.

    s: the settings model, engine, engine_memory, engine_max_len, engine_tp, batch_size and seed.
    """

    def __init__(self, s, ranks):
        self.s, self.ranks, self.engine = s, ranks, None

    def open_engine(self):
        """COLLECTIVE: vLLM starts on all ranks together. The engine's .processor turns videos and prompts into ids."""
        if self.engine is None:
            s, backbone = self.s, self.open_backbone() if self.s.engine == "transformers" else None
            self.engine = make_engine(
                s.engine, s.model, AutoProcessor.from_pretrained(s.model), self.ranks, backbone, s.seed,
                s.engine_max_len, s.batch_size, memory=s.engine_memory, tp=s.engine_tp, sleeps=False,
            )
        return self.engine

    def open_backbone(self):
        """A backbone that is there already and may be used, or None: the engine then reads its own."""
        return None


def frames_or_error(item: Item, s) -> data.Video | InputError:
    """The item's sampled frames, or what is wrong with its file."""
    try:
        return changed_video(data.sample_frames(item.video, s.fps, s.max_pixels), item)
    except InputError as error:
        return error


def require_short(prompt: str, tokenizer) -> None:
    """InputError for a prompt of absurd length. Counted in tokens: 20,000 characters may be 2,000 or 33,000 of them."""
    length = len(tokenizer(prompt)["input_ids"])
    if length > MAX_PROMPT:
        raise InputError(f"the prompt has {length:,} tokens; at most {MAX_PROMPT:,} are read.")


def open_batch(batch: list[Item], s, phase: Phase, tokenizer) -> list[tuple[Item, data.Video]]:
    """The items with their sampled frames. A broken video or an endless prompt is refused here, before any work is
    done on the batch, so that one bad item costs the others nothing.

    Decoded by as many threads as this rank has cores: each in a process of its own.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        videos = list(pool.map(frames_or_error, batch, [s] * len(batch)))
    good = []
    for item, video in zip(batch, videos):
        try:
            if isinstance(video, InputError):
                raise video
            require_short(item.prompt, tokenizer)
            good.append((item, video))
        except InputError as error:
            phase.refuse(item, error)
    return good


def encode_batch(batch: list[Item], s, phase: Phase, engine) -> tuple[list[Item], list[dict]]:
    """The batch's good items and their prefixes, with what the engine needs of each. The others are refused."""
    items, prefixes = [], []
    for item, video in open_batch(batch, s, phase, engine.processor.tokenizer):
        try:
            prefix = data.encode_prompt(engine.processor, video, item.prompt)
            if engine.limit:
                require_room(len(prefix["input_ids"]), s.max_new_tokens, engine.limit)
            items.append(item)
            prefixes.append({name: prefix[name] for name in engine.needs})
        except InputError as error:
            phase.refuse(item, error)
    return items, prefixes


def think_phase(items: list[Item], out: str, s, ranks, thinker: Thinker) -> tuple[dict, list[dict]]:
    """COLLECTIVE: k CoTs for each item -> ({(video, prompt): record}, what was skipped); one line each in OUT.

    A record: video, prompt, thoughts: k texts, token_ids: k lists as sampled (EOS included unless cut off), tokens:
    their k lengths, ended: k of "EOS was reached". Each CoT has a random stream of its own, from (seed, video, prompt,
    k), so it depends neither on the batch nor on the rank.
    """
    phase = Phase("thoughts", items, out, s.skip_bad_videos, ranks)
    if phase.to_do:
        engine = thinker.open_engine()
        tokenizer = engine.processor.tokenizer
        for batch in phase.batches(max(1, engine.requests // s.thoughts)):
            batch, prefixes = encode_batch(batch, s, phase, engine)
            seeds = [[task_seed(s.seed, item.video, item.prompt, k) for k in range(s.thoughts)] for item in batch]
            for i, cots in engine.stream(prefixes, seeds, s.max_new_tokens, s.temperature):
                texts = [decode_cot(tokenizer, cot) for cot in cots]
                ended = [cot[-1:] == [tokenizer.eos_token_id] for cot in cots]
                phase.write({"video": batch[i].video, "prompt": batch[i].prompt, "thoughts": texts, "token_ids": cots,
                             "tokens": [len(cot) for cot in cots], "ended": ended})
    return phase.finish()


@dataclasses.dataclass
class ThinkingSettings:
    """Flags of the two scripts that think about many videos: this one and evaluate.py."""

    dimension: str = arg("TA", "label column where a CSV has several: TA (the paper's), VQ, MQ or Overall")
    engine: str = arg("transformers", "who writes the CoTs; vllm for real models", ["transformers", "vllm"])
    engine_memory: float = arg(0.9, "share of a GPU's memory that vLLM may use while thinking", above=0, at_most=1)
    engine_max_len: int = arg(
        12288, "prompt + CoT tokens that vLLM takes at most; a video with more is refused", at_least=1)
    engine_tp: int = arg(1, "tensor parallel vLLM: ranks that hold one engine together", at_least=1)
    max_new_tokens: int = arg(4096, "CoT tokens at most (paper: 4096)", at_least=1)
    reader: str = arg("pyav", "of video files; decord (the paper's) takes plain ones of constant rate", READERS)
    skip_bad_videos: bool = arg(False, "leave out what cannot be read; skipped.jsonl in the output folder lists it")
    seed: int = arg(0, "decides the sampled CoTs", at_least=0)


@dataclasses.dataclass
class Settings(ThinkingSettings):
    """Collecting CoTs for stage 1; more in ThinkingSettings."""

    data: list[str] = arg(None, "preference pairs, a CSV in any known format; of several, each has its own --out")
    out: list[str] = arg(("pairs_with_cots.csv",), "CSV to write: DeScore's cold-start columns")
    model: str = arg("Qwen/Qwen3-VL-8B-Instruct", "the model that thinks: base model or DeScore folder")
    video_root: str | None = arg(None, "folder that relative video paths start from; default the CSV's")
    fps: float = arg(2.0, "sampled frames per second (paper: 2)", above=0)
    max_pixels: int = arg(448 * 448, "pixels per frame at most (paper: 448 * 448)", at_least=1024)
    temperature: float = arg(1.0, "sampling temperature; 0 is greedy (not given in the paper for stage 1)", at_least=0)
    batch_size: int = arg(64, "CoTs that transformers samples at a time on one rank", at_least=1)

    # Constants here, flags in evaluate.py: one CoT for each video, and always one.
    thoughts = 1
    think = True
    dtype = "auto"


def collect(path: str, out: str, s: Settings, ranks, thinker: Thinker) -> None:
    """COLLECTIVE: the pairs of `path` -> `out`, with a CoT per video. OUT.thoughts/ keeps each CoT as it comes."""
    folder = out + ".thoughts"
    pairs = data.read_pairs(path, s.dimension, s.video_root)
    os.makedirs(folder, exist_ok=True)
    if not s.skip_bad_videos:  # with it, thinking meets each bad video, and leaves it out
        pairs = readable_pairs(pairs, s, ranks, data.sample_frames)
    items = {(video, pair.prompt): Item(video, pair.prompt, pair.line) for pair in pairs for video in pair.videos}
    claim_out(folder, s, ranks)
    thoughts, skipped = think_phase(list(items.values()), folder, s, ranks, thinker)
    write_skipped(folder, skipped, ranks)
    kept = [pair for pair in pairs if all((video, pair.prompt) in thoughts for video in pair.videos)]
    if not kept:
        raise InputError(f"{path}: no pair is left with two readable videos; see {folder}/skipped.jsonl.")
    if not ranks.is_main:
        return
    write_cots(out, kept, thoughts)
    texts = [thoughts[key]["thoughts"][0] for key in items if key in thoughts]
    good = sum(extract_answer(text) is not None for text in texts)
    print(f"wrote {out}: {len(kept)} pairs; {good / len(texts):.1%} of {len(texts)} CoTs hold an answer")
    if skipped:
        print(f"skipped {len(pairs) - len(kept)} pairs with {len(skipped)} bad videos; see {folder}/skipped.jsonl")


def main(argv=None) -> None:
    """One CoT per video of each CSV; the engine is opened once for all of them."""
    s = parse(Settings, __doc__, argv)
    rollout_flags(s)
    for path in s.data:  # a wrong second file should not cost the thinking over the first
        data.read_pairs(path, s.dimension, s.video_root)
    ranks = parallel.start(s.seed)
    thinker = Thinker(s, ranks)  # one engine for all files
    for path, out in zip(s.data, s.out):
        collect(path, out, s, ranks, thinker)
    ranks.finish(thinker.engine)


if __name__ == "__main__":
    cli(main)
