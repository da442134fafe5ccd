"""Think, then score, for many videos: what `DeScore.reward` does for a batch, resumable and shared out over ranks.

    workers = Workers(settings, ranks)
    thoughts, skipped = think_phase(items, out, settings, ranks, workers)          k CoTs for each (video, prompt)
    workers.stop_thinking()                                                        the engine's memory is free now
    rewards, skipped = score_phase(items, thoughts, out, settings, ranks, workers) the head's reward of each CoT

Both keep one line per finished item in OUT; the same command goes on where it was killed. A result belongs to what the
video file held and to the words around the prompt: if either changes, the item is thought about and scored anew.
collect_cots.py needs the first phase, evaluate.py both. k: CoTs per video.
"""

import concurrent.futures
import dataclasses
import hashlib
import os

import numpy as np
import torch
from transformers import AutoProcessor

import data
from model import DeScore
from plumbing.jobs import Item, Phase, task_seed
from plumbing.settings import InputError, arg
from plumbing.video import READERS
from plumbing.vllm_engine import require_room
from rollout import EngineSettings, decode_cot, make_engine
from rules import overall_score

# This rank's share of the cores. Read now: vLLM changes LOCAL_WORLD_SIZE when it starts.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
MAX_PROMPT = 5_000  # tokens: no video generator reads more, and the cost of attention grows with the square


def hash_of(value) -> str:
    """A short name of what something printed says."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


WORDING = hash_of(data.build_conversation(""))  # of all that the model is asked beside the prompt


@dataclasses.dataclass
class ThinkingSettings(EngineSettings):
    """Flags of the scripts that think about many videos; more in rollout.EngineSettings."""

    dimension: str = arg("TA", "label column where a CSV has several: TA (the paper's), VQ, MQ or Overall")
    reader: str = arg("pyav", "of video files; decord (the paper's) takes plain ones of constant rate", READERS)
    skip_bad_videos: bool = arg(False, "leave out what cannot be read; skipped.jsonl in the output folder lists it")
    seed: int = arg(0, "decides the sampled CoTs", at_least=0)


class Workers:
    """The engine that thinks and the model that scores, each opened when first needed: a finished run opens neither.

    s: the settings model, fps, max_pixels, seed, batch_size and the engine's; dtype, if anything is scored.
    scores: the model that scores will be needed, so the transformers engine thinks with its backbone.
    """

    def __init__(self, s, ranks, scores: bool = True):
        self.s, self.ranks, self.scores, self.engine, self.model = s, ranks, scores, None, None

    def frames(self, item: Item) -> data.Video:
        """What the model is shown of an item. InputError: what is wrong with its file."""
        return data.sample_frames(item.video, self.s.fps, self.s.max_pixels)

    def open_model(self) -> DeScore:
        """The DeScore of --model, read once."""
        if self.model is None:
            dtype = getattr(torch, self.s.dtype)
            self.model = DeScore.from_pretrained(self.s.model, self.ranks.device, dtype).eval()
        return self.model

    def open_engine(self):
        """COLLECTIVE: vLLM starts on all ranks together. The engine's .processor turns videos and prompts into ids."""
        if self.engine is None:
            s, share = self.s, self.scores and self.s.engine == "transformers"
            self.engine = make_engine(
                s.engine, s.model, AutoProcessor.from_pretrained(s.model), self.ranks,
                self.open_model().backbone if share else None, s.seed, s.engine_max_len, s.batch_size,
                memory=s.engine_memory, tp=s.engine_tp, sleeps=False,
            )
        return self.engine

    def stop_thinking(self) -> None:
        """All CoTs are there: the engine's memory is for the model that scores."""
        if self.engine is not None:
            self.engine.sleep(level=2)


# ---------------------------------------------------------------------------------------------------------------
# 1. A batch: decoded, and rid of what cannot be read
# ---------------------------------------------------------------------------------------------------------------
def require_short(prompt: str, tokenizer) -> None:
    """InputError for a prompt of absurd length. Counted in tokens: 20,000 characters may be 2,000 or 33,000 of them."""
    length = len(tokenizer(prompt)["input_ids"])
    if length > MAX_PROMPT:
        raise InputError(f"the prompt has {length:,} tokens; at most {MAX_PROMPT:,} are read.")


def sequence_lengths(processor, pair: data.PreferencePair, fps: float, max_pixels: int) -> list[int]:
    """Tokens of the pair's two sequences, prefix + CoT + query, without decoding the videos.

    A patch of 32 x 32 stands for each frame; each two frames of H x W then have H W / 1024 - 1 video tokens more.
    """
    lengths = []
    for path, cot in zip(pair.videos, pair.cot_ids(processor.tokenizer)):
        video = data.sample_frames(path, fps, max_pixels, decode=False)
        count, height, width = video.frames.shape[:3]
        small = dataclasses.replace(video, frames=np.zeros((count, data.SIDE, data.SIDE, 3), np.uint8))
        prefix = len(data.encode_prompt(processor, small, pair.prompt)["input_ids"])
        lengths.append(prefix + count // 2 * (height * width // data.SIDE**2 - 1) + len(cot) + 1)
    return lengths


def open_batch(batch: list[Item], phase: Phase, workers: Workers, tokenizer) -> list[tuple[Item, data.Video]]:
    """The items with their sampled frames. A broken video or an endless prompt is refused here, before any work is
    done on the batch, so that one bad item costs the others nothing.

    Decoded by as many threads as this rank has cores: each in a process of its own.
    """
    good = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for item, video in [(item, pool.submit(workers.frames, item)) for item in batch]:
            try:
                require_short(item.prompt, tokenizer)
                good.append((item, video.result()))
            except InputError as error:
                phase.refuse(item, error)
    return good


def encode_batch(batch: list[Item], s, phase: Phase, workers: Workers) -> tuple[list[Item], list[dict]]:
    """The batch's good items and their prefixes, with what the engine needs of each. The others are refused."""
    engine, items, prefixes = workers.open_engine(), [], []
    for item, video in open_batch(batch, phase, workers, engine.processor.tokenizer):
        try:
            prefix = data.encode_prompt(engine.processor, video, item.prompt)
            if engine.limit:
                require_room(len(prefix["input_ids"]), s.max_new_tokens, engine.limit)
            items.append(item)
            prefixes.append({name: prefix[name] for name in engine.needs})
        except InputError as error:
            phase.refuse(item, error)
    return items, prefixes


# ---------------------------------------------------------------------------------------------------------------
# 2. The two phases
# ---------------------------------------------------------------------------------------------------------------
def think_phase(items: list[Item], out: str, s, ranks, workers: Workers, thoughts: int = 1):
    """COLLECTIVE: k CoTs for each item -> ({item.key: record}, what was skipped); one line each in OUT.

    A record: video, prompt, thoughts: k texts, token_ids: k lists as sampled (EOS included unless cut off), tokens:
    their k lengths, ended: k of "EOS was reached". Each CoT has a random stream of its own, from (seed, video, prompt,
    k), so it depends neither on the batch nor on the rank.
    """
    phase = Phase("thoughts", items, out, s.skip_bad_videos, ranks, {item.key: WORDING for item in items})
    if phase.to_do:
        engine = workers.open_engine()
        tokenizer = engine.processor.tokenizer
        for batch in phase.batches(max(1, engine.requests // thoughts)):
            batch, prefixes = encode_batch(batch, s, phase, workers)
            seeds = [[task_seed(s.seed, *item.key, k) for k in range(thoughts)] for item in batch]
            for i, cots in engine.stream(prefixes, seeds, s.max_new_tokens, s.temperature):
                texts = [decode_cot(tokenizer, cot) for cot in cots]
                ended = [cot[-1:] == [tokenizer.eos_token_id] for cot in cots]
                phase.write(batch[i], {"thoughts": texts, "token_ids": cots, "tokens": list(map(len, cots)),
                                       "ended": ended})
    return phase.finish()


def score_phase(items: list[Item], thoughts: dict | None, out: str, s, ranks, workers: Workers):
    """COLLECTIVE: the head's rewards. Returns ({item.key: record}, what was skipped); one line each in OUT.

    thoughts: what think_phase returned; None: no thinking. A record: video, prompt, rewards: of the k CoTs, reward:
    their mean. The CoTs go in as the ids that were sampled: decoded and encoded again a text may become other tokens,
    and the head would score what nobody thought.
    """
    if thoughts is not None:
        items = [item for item in items if item.key in thoughts]  # the others were skipped while thinking
    # Other CoTs, other rewards: those of a clip that was replaced, or of a swapped clip whose CoT is kept.
    ids = {item.key: thoughts[item.key]["token_ids"] if thoughts is not None else [None] for item in items}
    made_from = {key: f"{WORDING} {hash_of(row)}" for key, row in ids.items()}
    phase = Phase("rewards", items, out, s.skip_bad_videos, ranks, made_from)
    if phase.to_do:
        model = workers.open_model()
        for batch in phase.batches(s.batch_size):
            good = open_batch(batch, phase, workers, model.processor.tokenizer)
            if not good:
                continue
            prefixes = model.encode([video for _, video in good], [item.prompt for item, _ in good])
            # ONE forward for the batch: prompt, CoT and query in a row; the reward is head(h_query), a dot product.
            for (item, _), row in zip(good, model.score(prefixes, [ids[item.key] for item, _ in good]).tolist()):
                phase.write(item, {"reward": float(np.mean(row)), "rewards": row})
    return phase.finish()


def text_rewards(thoughts: dict) -> dict:
    """The rewards that the CoTs state, as score_phase returns the head's.

    Scores have few different values, so two videos often get the same one. An equal score is wrong wherever people
    decided, so texts look worse than they are: lab/study counts equal scores half.
    """
    return {key: {"reward": float(np.mean([overall_score(text) for text in record["thoughts"]]))}
            for key, record in thoughts.items()}
