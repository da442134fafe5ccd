"""Sampling chains of thought: G per video, by transformers' generate or by vLLM, behind one signature.

    engine = make_engine("transformers" | "vllm", ...)
    cots = engine.generate(prefixes, seeds, max_new_tokens, temperature)    # [prefix][sample] -> token ids, EOS included
    engine.sync(named_weights)                                              # after every update

As a command it collects the CoTs that stage 1 learns from, by the base model itself (PAPER.md section 3), one per video:

    python rollout.py --model runs/base --data pairs.csv --out pairs_with_cots.csv
    torchrun --nproc_per_node 8 rollout.py --data pairs.csv --out pairs_with_cots.csv --engine vllm

Every CoT is written to OUT.thoughts.*.jsonl as soon as it exists; the same command goes on where it was stopped.
"""

import csv
import dataclasses
import json
import os

import torch
from transformers import AutoConfig, AutoProcessor

import data
import parallel
from data import InputError
from model import banned_tokens, decode_cot, load_backbone, sample_cots
from parallel import arg


class TransformersEngine:
    """Samples with transformers' generate. Slow on large models, but needs nothing else and runs anywhere.

    `backbone` is the trainer's own when there is one process (then `sync` has nothing to do), or an unsharded copy
    beside an FSDP model.
    """

    def __init__(self, backbone, processor, shared: bool, rows_per_batch: int = 64):
        self.backbone, self.processor, self.shared, self.rows_per_batch = backbone, processor, shared, rows_per_batch

    def generate(self, prefixes, seeds, max_new_tokens, temperature=1.0) -> list[list[list[int]]]:
        """len(seeds[i]) CoTs for prefix i: token ids, EOS included unless cut off. Each depends on its own seed only."""
        cots, per_batch = [], max(1, self.rows_per_batch // max(len(row) for row in seeds))
        for i in range(0, len(prefixes), per_batch):
            part = slice(i, i + per_batch)
            cots += sample_cots(self.backbone, self.processor, prefixes[part], seeds[part], max_new_tokens, temperature)
        return cots

    def sync(self, named_weights) -> None:
        """Takes over new weights: (Hugging Face name, whole tensor) of everything trained. COLLECTIVE through its argument."""
        own = dict(self.backbone.named_parameters())
        for name, value in named_weights:  # walked through even when shared: gathering is collective
            if not self.shared:
                own[name].data.copy_(value)


class VLLMEngine:
    """One vLLM engine per process, in this process, beside the trainer. See FIELD notes in README, "vLLM"."""

    def __init__(self, path: str, seed: int, max_model_len: int, memory: float = 0.4, dtype: str = "auto", on_cpu=False):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, so weights can be handed over
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError("--engine vllm: vllm is not installed; pip install -r requirements-vllm.txt.") from error
        limit = AutoConfig.from_pretrained(path).text_config.max_position_embeddings
        distributed = torch.distributed.is_initialized()  # must be so BEFORE the engine starts, or it makes its own group
        options = {"kv_cache_memory_bytes": 64 << 20, "block_size": 32} if on_cpu else {"gpu_memory_utilization": memory}
        state = torch.get_rng_state()  # the engine reseeds the global generators
        self.llm = LLM(
            model=path, dtype=dtype, max_model_len=min(max_model_len, limit), seed=seed, enforce_eager=on_cpu,
            limit_mm_per_prompt={"image": 0, "video": 1}, enable_prefix_caching=True, logprobs_mode="processed_logprobs",
            distributed_executor_backend="external_launcher" if distributed else None, enable_sleep_mode=not on_cpu, **options,
        )  # fmt: skip
        torch.set_rng_state(state)
        self.tokenizer, self.on_cpu = self.llm.get_tokenizer(), on_cpu

    def generate(self, prefixes, seeds, max_new_tokens, temperature=1.0) -> list[list[list[int]]]:
        """As TransformersEngine.generate. One request per CoT: each has its own seed, and prefix caching shares the video."""
        from vllm import SamplingParams

        banned = {token: -100.0 for token in banned_tokens(self.tokenizer)}
        requests, parameters = [], []
        for prefix, row in zip(prefixes, seeds, strict=True):
            video = prefix["video"]
            metadata = {**video.metadata(), "do_sample_frames": False}  # our frames: never resampled
            prompt = {"prompt_token_ids": prefix["short_ids"], "multi_modal_data": {"video": [(video.frames, metadata)]}}
            for seed in row:
                requests.append(prompt)
                parameters.append(SamplingParams(temperature=temperature, top_p=1.0, top_k=0, max_tokens=max_new_tokens,
                                                 seed=seed % 2**31, logit_bias=banned, logprobs=0, detokenize=False))  # fmt: skip
        outputs = iter(self.llm.generate(requests, parameters, use_tqdm=False))
        samples = [[next(outputs) for _ in row] for row in seeds]
        for prefix, row in zip(prefixes, samples):
            if list(row[0].prompt_token_ids) != prefix["input_ids"].tolist():
                raise InputError("vLLM expanded the video to other prompt tokens than the trainer; check both versions.")
        self.log_probs = [[[next(iter(t.values())).logprob for t in s.outputs[0].logprobs] for s in row] for row in samples]
        return [[list(s.outputs[0].token_ids) for s in row] for row in samples]

    def sync(self, named_weights) -> None:
        """Hands new weights to the engine and empties its caches, which hold what the old weights computed."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_weights)})
        assert self.llm.reset_prefix_cache(), "vLLM could not reset its prefix cache: requests still running"
        self.llm.llm_engine.reset_encoder_cache()  # without it a repeated video kills the engine


def make_engine(name: str, path: str, processor, ranks, model=None, seed=0, max_model_len=12288, rows_per_batch=64):
    """COLLECTIVE: "transformers" or "vllm", on the weights of the Hugging Face folder `path`.

    `model`: the trainer's DeScore, if any; with one process and transformers its backbone is used as it is.
    """
    on_cpu = ranks.device.type == "cpu"
    if name == "vllm":
        return VLLMEngine(path, seed + ranks.rank, max_model_len, dtype="float32" if on_cpu else "bfloat16", on_cpu=on_cpu)
    if name != "transformers":
        raise InputError(f"--engine {name}: choose transformers or vllm.")
    if model is not None and ranks.world == 1:
        return TransformersEngine(model.backbone, processor, shared=True, rows_per_batch=rows_per_batch)
    backbone = load_backbone(path, torch.float32 if on_cpu else torch.bfloat16).to(ranks.device).eval()
    return TransformersEngine(backbone, processor, shared=False, rows_per_batch=rows_per_batch)


# ---------------------------------------------------------------------------------------------------------------
# Thinking about many videos, resumable: used by this command and by evaluate.py
# ---------------------------------------------------------------------------------------------------------------
def think_all(path: str, tasks: list[tuple[str, str]], engine, processor, settings, ranks, samples: int = 1) -> dict:
    """COLLECTIVE: one CoT (or `samples`) for each (video, prompt) -> {(video, prompt): [token ids, ...]}.

    Each rank appends JSON lines to PATH.thoughts.RANK.jsonl; all parts are read at the start, so nothing is thought twice,
    whatever the number of ranks was. Seeds depend on the task, not on its place, so neither does the result.
    """
    known = {}
    folder, stem = os.path.split(os.path.abspath(path))
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.startswith(stem + ".thoughts.") and name.endswith(".jsonl"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                for line in file:
                    if line.endswith("\n"):  # a last line without its end was cut by a kill
                        row = json.loads(line)
                        known[row["video"], row["prompt"]] = row["cots"]
    ranks.barrier()
    todo = [task for task in dict.fromkeys(tasks) if task not in known]
    mine, new = ranks.share(todo), []
    size = max(1, settings.batch_size // samples)
    if ranks.is_main and len(todo) < len(set(tasks)):
        print(f"{len(set(tasks)) - len(todo)} of {len(set(tasks))} already thought about")
    with parallel.append_lines(f"{path}.thoughts.{ranks.rank}.jsonl") as file:
        for i in ranks.progress(range(0, len(mine), size), desc="thinking", unit="batch"):
            batch = mine[i : i + size]
            prefixes = [
                data.encode_prompt(processor, data.sample_frames(video, settings.fps, settings.max_pixels), prompt)
                for video, prompt in batch
            ]
            seeds = [[task_seed(settings.seed, *task, k) for k in range(samples)] for task in batch]
            cots = engine.generate(prefixes, seeds, settings.max_new_tokens, settings.temperature)
            for (video, prompt), row in zip(batch, cots):
                texts = [decode_cot(processor.tokenizer, cot) for cot in row]
                new.append(((video, prompt), row))
                file.write(json.dumps({"video": video, "prompt": prompt, "cots": row, "texts": texts}) + "\n")
            file.flush()
    known.update(ranks.gather_objects(new))
    return known


def task_seed(*parts) -> int:
    """A seed from anything that names a sample, e.g. (seed, video, prompt, k); the same on every machine."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


@dataclasses.dataclass
class Settings:
    """Collecting CoTs for stage 1."""

    data: str = arg(None, "preference pairs, a CSV in any known format")
    out: str = arg("pairs_with_cots.csv", "CSV to write: DeScore's cold-start columns")
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


def main(argv=None) -> None:
    settings = parallel.parse(Settings, __doc__, argv)
    if settings.data is None:
        raise InputError("--data is missing; give a CSV of preference pairs.")
    ranks = parallel.start(settings.seed)
    pairs = data.read_pairs(settings.data, settings.dimension, settings.video_root)
    folder = os.path.dirname(os.path.abspath(settings.out))
    os.makedirs(folder, exist_ok=True)
    pairs = parallel.readable_pairs(pairs, dataclasses.replace(settings, out=folder), ranks)
    processor = AutoProcessor.from_pretrained(settings.model)
    engine = make_engine(settings.engine, settings.model, processor, ranks, rows_per_batch=settings.batch_size)
    tasks = [(path, pair.prompt) for pair in pairs for path in pair.videos]
    cots = think_all(settings.out, tasks, engine, processor, settings, ranks)
    texts = {task: decode_cot(processor.tokenizer, row[0]) for task, row in cots.items()}
    if ranks.is_main:
        label = {1: "A", -1: "B", 0: "same"}
        with open(settings.out + ".tmp", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["videos", "problem", "prompt", "CoT_A", "CoT_B", "GSB"])
            for pair in pairs:
                videos = json.dumps([os.path.relpath(path, folder) for path in pair.videos])
                cells = [texts[path, pair.prompt] for path in pair.videos]
                writer.writerow([videos, pair.prompt, pair.prompt, *cells, label[pair.label]])
        os.replace(settings.out + ".tmp", settings.out)
        good = sum(data.extract_answer(text) is not None for text in texts.values())
        print(f"wrote {settings.out}: {len(pairs)} pairs; {good / len(texts):.1%} of {len(texts)} CoTs hold an answer")
    ranks.finish()


if __name__ == "__main__":
    parallel.cli(main)
