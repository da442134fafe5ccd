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
import contextlib
import csv
import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import typing

import numpy as np
import torch
from transformers import AutoConfig, AutoProcessor

import data
import parallel
from data import InputError
from model import banned_tokens, decode_cot, load_backbone, sample_cots
from parallel import arg

# This rank's share of the cores. Read now: vLLM changes LOCAL_WORLD_SIZE when it starts.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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


class VLLMEngine:
    """One vLLM engine per process, in this process, beside the trainer. README, "vLLM"."""

    def __init__(
        self, path: str, seed: int, max_model_len: int, memory=0.4, dtype="auto", on_cpu=False, tp=1, dummy=False
    ):
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # the engine in this process, so weights can be handed over
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError("--engine vllm: vllm is not installed; pip install -r requirements-vllm.txt.") from error
        text = AutoConfig.from_pretrained(path).text_config
        distributed = (
            torch.distributed.is_initialized()
        )  # must be so BEFORE the engine starts, or it makes its own group
        options = (
            {"kv_cache_memory_bytes": 64 << 20, "block_size": 32} if on_cpu else {"gpu_memory_utilization": memory}
        )
        if dummy:
            options["load_format"] = "dummy"  # --random-init: the trainer's weights come with the first sync
        state = torch.get_rng_state()  # the engine reseeds the global generators
        self.llm = LLM(
            model=path,
            dtype=dtype,
            max_model_len=min(max_model_len, text.max_position_embeddings),
            seed=seed,
            enforce_eager=on_cpu,
            tensor_parallel_size=tp,
            limit_mm_per_prompt={"image": 0, "video": 1},
            mm_processor_kwargs={"do_resize": False, "cap_pixels_per_frame": False},  # as data.encode_prompt
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            distributed_executor_backend="external_launcher" if distributed else None,
            enable_sleep_mode=not on_cpu,
            **options,
        )
        torch.set_rng_state(state)
        self.tokenizer, self.on_cpu, self.asleep, self.tp = self.llm.get_tokenizer(), on_cpu, False, tp
        self.bans = dict.fromkeys(banned_tokens(self.tokenizer, text.vocab_size), -100.0)  # vLLM's lowest; at most 1,024
        if tp > 1:
            from vllm.distributed import get_tp_group

            self.group = get_tp_group()

    def generate(self, prefixes, seeds, max_new_tokens, temperature=1.0) -> list[list[list[int]]]:
        """As TransformersEngine.generate. One request per CoT: each has its own seed, and prefix caching shares the
        video. With tensor parallelism the ranks of a group sample for each other: all do the work of all, in shards."""
        from vllm import SamplingParams

        if self.tp > 1:  # COLLECTIVE within the group
            slim = [{key: prefix[key] for key in ("short_ids", "input_ids", "video")} for prefix in prefixes]
            parts = [None] * self.tp
            torch.distributed.all_gather_object(parts, (slim, seeds), group=self.group.cpu_group)
            mine = self.group.rank_in_group
            begin = sum(len(part[0]) for part in parts[:mine])
            own = slice(begin, begin + len(prefixes))
            prefixes, seeds = ([x for part in parts for x in part[k]] for k in (0, 1))
        else:
            own = slice(None)
        self._wake()
        requests, parameters = [], []
        for prefix, row in zip(prefixes, seeds, strict=True):
            video = prefix["video"]
            metadata = {**video.metadata(), "do_sample_frames": False}  # our frames: never resampled
            prompt = {
                "prompt_token_ids": prefix["short_ids"],
                "multi_modal_data": {"video": [(video.frames, metadata)]},
            }
            for seed in row:
                requests.append(prompt)
                parameters.append(
                    SamplingParams(
                        temperature=temperature,
                        top_p=1.0,
                        top_k=0,
                        max_tokens=max_new_tokens,
                        seed=seed % 2**31,
                        logit_bias=self.bans,
                        logprobs=0,
                        detokenize=False,
                    )
                )
        outputs = iter(self.llm.generate(requests, parameters, use_tqdm=False))
        samples = [[next(outputs) for _ in row] for row in seeds]
        for prefix, row in zip(prefixes, samples):
            if list(row[0].prompt_token_ids) != prefix["input_ids"].tolist():
                raise InputError(
                    "vLLM expanded the video to other prompt tokens than the trainer; check both versions."
                )
        self.log_probs = [
            [[next(iter(t.values())).logprob for t in s.outputs[0].logprobs] for s in row] for row in samples[own]
        ]
        if not self.on_cpu:
            self.llm.sleep(level=1)  # gives the GPU's memory to the update; its CPU build cannot sleep
            self.asleep = True
        return [[list(s.outputs[0].token_ids) for s in row] for row in samples[own]]

    def sync(self, named_weights) -> None:
        """Hands new weights to the engine and empties its caches, which hold what the old weights computed.

        Raises InputError unless every weight has arrived: vLLM itself only warns.
        """
        self._wake()
        self.llm.collective_rpc(_reload, args=(named_weights,))
        assert self.llm.reset_prefix_cache(), "vLLM could not reset its prefix cache: requests still running"
        self.llm.llm_engine.reset_encoder_cache()  # without it a repeated video kills the engine

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        """Ends the engine. It takes the process group with it, so this is the very last thing a script does."""
        self.llm.llm_engine.engine_core.shutdown()


def _reload(worker, named_weights) -> None:
    """Runs in vLLM's worker, which is this process: loads the weights, then checks that each has reached a parameter."""
    model, sent, arrived = worker.model_runner.get_model(), [], set()
    load = model.load_weights

    def noting():
        for name, value in named_weights:
            sent.append(name)
            yield name, value

    def load_and_note(weights):
        arrived.update(load(weights))
        return arrived

    model.load_weights = load_and_note
    try:
        worker.model_runner.reload_weights(weights_iterator=noting())
    finally:
        del model.load_weights  # the class's own again
    wanted = model.hf_to_vllm_mapper.apply_list(sent)
    for packed, parts in model.packed_modules_mapping.items():  # vLLM holds q, k and v in one matrix, gate and up too
        wanted = [re.sub(rf"\.({'|'.join(parts)})\.", f".{packed}.", name) for name in wanted]
    if missing := sorted(set(wanted) - arrived):
        raise InputError(f"vLLM did not take {len(missing)} trained weights, e.g. {missing[0]}; check its version.")


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
        return VLLMEngine(path, seed + group, max_model_len, dtype=dtype, on_cpu=on_cpu, **vllm)
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


def task_seed(*parts) -> int:
    """A seed from anything that names a sample, e.g. (seed, video, prompt, k); the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class Item(typing.NamedTuple):
    """A video, its prompt, and the row that asks for it first. The key of everything kept is item[:2]."""

    video: str
    prompt: str
    row: int


def read_log(out: str, name: str) -> dict[tuple[str, str], dict]:
    """All ranks' lines of a phase, {(video, prompt): record}. A last line cut short by a kill is left out."""
    records = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(out), f"{name}*.jsonl"))):
        with open(path, "rb") as file:
            for count, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    try:
                        record = json.loads(line)
                        records[record["video"], record["prompt"]] = record
                    except (ValueError, KeyError, TypeError) as error:
                        raise InputError(f"{path}, line {count}: is damaged; delete it and run again.") from error
    return records


def open_log(out: str, name: str, rank: int):
    """This rank's file, to append to. A half-written last line is cut off, or the next would be glued to it."""
    file = open(os.path.join(out, f"{name}.rank{rank}.jsonl" if rank else f"{name}.jsonl"), "ab+")
    file.seek(0)
    file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
    return file


def attempt(work, batch: list[Item], skip: bool, skipped: list[dict]):
    """Yields work(batch)'s records. If the batch holds a bad video, goes one by one: names it, or skips only it."""
    try:
        records = work(batch)
    except InputError as error:
        if len(batch) > 1:
            for item in batch:
                yield from attempt(work, [item], skip, skipped)
            return
        if not skip:
            raise InputError(f"row {batch[0].row}: {error}") from error
        skipped.append({**batch[0]._asdict(), "error": str(error)})
        return
    yield from records


def run_phase(name: str, items: list[Item], load_model, work, s, ranks) -> tuple[dict, list[dict]]:
    """COLLECTIVE: appends one line per item that has none yet. Returns all {(video, prompt): record} and the skipped.

    work(model, list of items) -> list of records. Lines are flushed one by one, so a kill loses at most one batch.
    """
    done = read_log(s.out, name)
    ranks.barrier()  # nobody may append before everybody has read, or the ranks would share out different lists
    mine, new, skipped = ranks.share([item for item in items if item[:2] not in done]), [], []
    model = load_model() if mine else None  # not inside attempt: a broken checkpoint must not count as a broken video
    with open_log(s.out, name, ranks.rank) as file, ranks.progress(total=len(mine), desc=name) as bar:
        for start in range(0, len(mine), s.batch_size):
            batch = mine[start : start + s.batch_size]
            for record in attempt(functools.partial(work, model), batch, s.skip_bad_videos, skipped):
                if not np.isfinite(record.get("reward", 0.0)):
                    raise InputError(f"{record['video']}: reward {record['reward']}; the checkpoint is broken.")
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                new.append(record)
            bar.update(len(batch))
    done.update({(record["video"], record["prompt"]): record for record in ranks.gather_objects(new)})
    return done, ranks.gather_objects(skipped)


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


def claim_out(s, ranks) -> None:
    """COLLECTIVE: refuses an --out that holds results of another model or other settings; they must not be mixed.

    The model is known by its files' names, sizes and both ends (hashing all of an 8B would take a minute).
    """
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "*/*.safetensors", "*config.json", "descore.json", "tokenizer.json", "*.jinja")
    for pattern in patterns:
        for file_path in sorted(glob.glob(os.path.join(glob.escape(s.model), pattern))):
            with open(file_path, "rb") as file:
                size = os.path.getsize(file_path)
                digest.update(f"{os.path.basename(file_path)} {size}".encode() + file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
    names = ("think", "thoughts", "max_new_tokens", "temperature", "engine", "fps", "max_pixels", "dtype", "seed")
    now, path = {"model": digest.hexdigest()} | {n: getattr(s, n) for n in names}, os.path.join(s.out, "settings.json")
    if ranks.is_main:
        if read_log(s.out, "thoughts") or read_log(s.out, "rewards"):
            before = {}
            with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
                before = json.load(file)
            changed = [name for name in now if before.get(name, "unknown") != now[name]]
            if changed:
                raise InputError(f"{s.out}: holds results made with another {', '.join(changed)}; give another --out.")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(now, file, indent=1)
        os.replace(path + ".tmp", path)
    ranks.barrier()


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
    pairs = parallel.readable_pairs(pairs, work, ranks)
    items = {(video, pair.prompt): Item(video, pair.prompt, pair.row) for pair in pairs for video in pair.videos}
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
    settings = parallel.parse(Settings, __doc__, argv)
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
    parallel.cli(main)
