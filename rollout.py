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
import csv
import dataclasses
import functools
import json
import os

import torch
from transformers import AutoProcessor, GenerationConfig, LogitsProcessor, LogitsProcessorList

import data
import parallel
from data import InputError
from plumbing.checkpoint import load_backbone
from plumbing.jobs import Item, claim_out, readable_pairs, run_phase, task_seed
from plumbing.settings import arg, cli, parse
from plumbing.vllm_engine import VLLMEngine

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
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=banned_tokens(tokenizer, backbone.config.text_config.vocab_size),
    )
    sampling = LogitsProcessorList([SeededSampling(flat_seeds, temperature)] if temperature > 0 else [])
    was_training = backbone.training
    backbone.eval()
    backbone.model.rope_deltas = None  # generate caches it on the model; a stale one belongs to other videos
    cache = backbone(  # all of the prompt but its last token, from which generation starts
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1], mm_token_type_ids=left_pad("mm_token_type_ids", 0)[:, :-1],
        pixel_values_videos=torch.cat([prefix["pixel_values_videos"] for prefix in prefixes]).to(device),
        video_grid_thw=torch.cat([prefix["video_grid_thw"] for prefix in prefixes]).to(device),
        use_cache=True, logits_to_keep=1,
    ).past_key_values  # fmt: skip
    cache.batch_select_indices(which)  # a copy of the prompt's keys and values for each of its CoTs
    backbone.model.rope_deltas = backbone.model.rope_deltas[which]
    tokens = backbone.generate(
        input_ids=ids[which], attention_mask=mask[which], past_key_values=cache, generation_config=config,
        logits_processor=sampling,
    )[:, length:].tolist()  # fmt: skip
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

    def __init__(self, backbone, processor, shared: bool, rows_per_batch: int = 64):
        self.backbone, self.processor, self.shared, self.rows_per_batch = backbone, processor, shared, rows_per_batch

    def generate(self, prefixes, seeds, max_new_tokens, temperature=1.0) -> list[list[list[int]]]:
        """len(seeds[i]) CoTs for prefix i: token ids, EOS included unless cut off. Each depends on its own seed
        only."""
        cots, per_batch = [], max(1, self.rows_per_batch // max(len(row) for row in seeds))
        for i in range(0, len(prefixes), per_batch):
            part = slice(i, i + per_batch)
            cots += sample_cots(self.backbone, self.processor, prefixes[part], seeds[part], max_new_tokens, temperature)
        return cots

    def sync(self, named_weights) -> None:
        """Takes over new weights: (Hugging Face name, whole tensor) of everything trained. COLLECTIVE through its
        argument."""
        own = dict(self.backbone.named_parameters())
        for name, value in named_weights:  # walked through even when shared: gathering is collective
            if self.shared:
                continue
            if name not in own or own[name].shape != value.shape:
                raise InputError(f"the rollout engine has no weight {name} of shape {tuple(value.shape)}.")
            own[name].data.copy_(value)

    def close(self) -> None:
        """Nothing to give back."""


def make_engine(
    name: str, path: str, processor, ranks, backbone=None, seed=0, max_model_len=12288, rows_per_batch=64, **vllm
):
    """COLLECTIVE: "transformers" or "vllm", on the weights of the Hugging Face folder `path`.

    `backbone`: an unsharded one that is already there, for the transformers engine to use as it is. `vllm`: memory (its
    share of the GPU), tp (ranks that hold one engine together), dummy (start without weights).
    """
    on_cpu = ranks.device.type == "cpu"
    if name == "vllm":
        if ranks.world % vllm.get("tp", 1):
            raise InputError(f"--engine-tp {vllm['tp']} does not divide the {ranks.world} ranks.")
        dtype, group = "float32" if on_cpu else "bfloat16", ranks.rank // vllm.get("tp", 1)
        return VLLMEngine(path, functools.partial(banned_tokens, processor.tokenizer), seed + group, max_model_len, dtype=dtype, on_cpu=on_cpu, **vllm)
    if name != "transformers":
        raise InputError(f"--engine {name}: choose transformers or vllm.")
    if vllm.get("dummy") and backbone is None:
        raise InputError("--random-init on several ranks needs --engine vllm.")
    if backbone is not None:
        return TransformersEngine(backbone, processor, shared=True, rows_per_batch=rows_per_batch)
    backbone = load_backbone(path, torch.float32 if on_cpu else torch.bfloat16).to(ranks.device).eval()
    return TransformersEngine(backbone, processor, shared=False, rows_per_batch=rows_per_batch)


# ---------------------------------------------------------------------------------------------------------------
# Working through many videos, resumable: for the command below and for evaluate.py
# ---------------------------------------------------------------------------------------------------------------
MAX_PROMPT = 20_000  # characters, about 5,000 tokens: no video generator reads more, and attention cost grows squared


def opened(batch: list[Item], s) -> tuple[list[data.Video], list[str]]:
    """The batch's sampled frames and prompts; InputError for a broken video or a prompt of absurd length.

    Decoded by as many threads as this rank has cores: decord works outside Python's lock.
    """
    for item in batch:
        if len(item.prompt) > MAX_PROMPT:
            raise InputError(f"the prompt of {item.video} has {len(item.prompt):,} characters; at most {MAX_PROMPT:,}.")
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        videos = list(pool.map(lambda item: data.sample_frames(item.video, s.fps, s.max_pixels), batch))
    return videos, [item.prompt for item in batch]


def think_phase(load_engine, items: list[Item], s, ranks) -> tuple[dict, list[dict]]:
    """COLLECTIVE: writes the CoTs. Records {video, prompt, thoughts: k texts, tokens: k lengths, ended: k of EOS
    reached}.

    load_engine() -> (engine, processor), called only if there is something to do. Each CoT has a random stream of its
    own, from (seed, video, prompt, k), so it depends neither on the batch nor on the rank.
    """

    def work(loaded, batch):
        engine, processor = loaded
        videos, prompts = opened(batch, s)
        prefixes = [data.encode_prompt(processor, video, prompt) for video, prompt in zip(videos, prompts)]
        seeds = [[task_seed(s.seed, i.video, i.prompt, k) for k in range(s.thoughts)] for i in batch]
        rows = engine.generate(prefixes, seeds, s.max_new_tokens, s.temperature)
        tokenizer = processor.tokenizer
        return [{"video": i.video, "prompt": i.prompt, "thoughts": [decode_cot(tokenizer, cot) for cot in row],
                 "tokens": [len(cot) for cot in row], "ended": [cot[-1:] == [tokenizer.eos_token_id] for cot in row]}
                for i, row in zip(batch, rows)]  # fmt: skip

    return run_phase("thoughts", items, load_engine, work, s, ranks)


@dataclasses.dataclass
class Settings:
    """Collecting CoTs for stage 1."""

    data: list[str] = arg(None, "preference pairs, a CSV in any known format; of several, each has its own --out")
    out: list[str] = arg(("pairs_with_cots.csv",), "CSV to write: DeScore's cold-start columns")
    model: str = arg("Qwen/Qwen3-VL-8B-Instruct", "the model that thinks: base model or DeScore folder")
    engine: str = arg("transformers", "who samples", choices=["transformers", "vllm"])
    dimension: str = arg("TA", "label column where a CSV has several: TA, VQ, MQ or Overall")
    video_root: str | None = arg(None, "folder that relative video paths start from; default the CSV's")
    skip_bad_videos: bool = arg(False, "leave out pairs with an unreadable video; skipped.jsonl beside OUT lists them")
    fps: float = arg(2.0, "sampled frames per second (paper: 2)")
    max_pixels: int = arg(448 * 448, "pixels per frame at most (paper: 448 * 448)")
    max_new_tokens: int = arg(4096, "tokens per CoT at most (paper: 4096)")
    temperature: float = arg(1.0, "sampling temperature; 0 is greedy (not given in the paper for stage 1)")
    batch_size: int = arg(64, "CoTs sampled at a time on one rank")
    seed: int = arg(0, "decides the samples")

    thoughts, think, dtype = 1, True, "auto"  # what evaluate.py lets the user choose


def collect(path: str, out: str, load_engine, settings: Settings, ranks) -> None:
    """COLLECTIVE: the pairs of `path` -> `out`, with a CoT per video. OUT.thoughts/ keeps each CoT as it comes."""
    folder, work = os.path.dirname(os.path.abspath(out)), dataclasses.replace(settings, out=out + ".thoughts")
    pairs = data.read_pairs(path, settings.dimension, settings.video_root)
    os.makedirs(work.out, exist_ok=True)
    pairs = readable_pairs(pairs, work, ranks, data.sample_frames)
    items = {(video, pair.prompt): Item(video, pair.prompt, pair.line) for pair in pairs for video in pair.videos}
    claim_out(work, ranks)
    thoughts, _ = think_phase(load_engine, list(items.values()), work, ranks)
    texts = {key: record["thoughts"][0] for key, record in thoughts.items()}
    if not ranks.is_main:
        return
    label = {1: "A", -1: "B", 0: "same"}
    with open(out + ".tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["videos", "problem", "prompt", "CoT_A", "CoT_B", "GSB"])
        for pair in pairs:
            videos = json.dumps([os.path.relpath(path, folder) for path in pair.videos])
            cells = [texts[path, pair.prompt] for path in pair.videos]
            writer.writerow([videos, pair.prompt, pair.prompt, *cells, label[pair.label]])
    os.replace(out + ".tmp", out)
    good = sum(data.extract_answer(texts[key]) is not None for key in items)
    print(f"wrote {out}: {len(pairs)} pairs; {good / len(items):.1%} of {len(items)} CoTs hold an answer")


def main(argv=None) -> None:
    settings = parse(Settings, __doc__, argv)
    if settings.data is None:
        raise InputError("--data is missing; give a CSV of preference pairs.")
    if len(settings.data) != len(settings.out) or len(set(settings.out)) != len(settings.out):
        raise InputError(f"{len(settings.data)} --data want as many --out, all different; got {len(settings.out)}.")
    for path in settings.data:  # a wrong second file should not cost the thinking over the first
        data.read_pairs(path, settings.dimension, settings.video_root)
    ranks = parallel.start(settings.seed)

    @functools.cache  # one engine for all files, started for the first that needs it
    def load_engine():
        processor = AutoProcessor.from_pretrained(settings.model)
        engine = make_engine(settings.engine, settings.model, processor, ranks, rows_per_batch=settings.batch_size)
        return engine, processor

    for path, out in zip(settings.data, settings.out):
        collect(path, out, load_engine, settings, ranks)
    ranks.finish(*([load_engine()[0]] if load_engine.cache_info().currsize else []))


if __name__ == "__main__":
    cli(main)
