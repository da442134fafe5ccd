"""Think, then score, for many videos: what `DeScore.reward` does for a batch, resumable and shared out over ranks.

    workers = Workers(settings, ranks)
    thoughts, skipped = workers.think(items, out)              k CoTs for each (video, prompt)
    rewards, skipped = workers.score(items, thoughts, out)     the head's reward of each CoT

Both keep one line per finished item in OUT; the same command goes on where it was killed. A result belongs to what the
video file held and to the words around the prompt: if either changes, the item is thought about and scored anew.
collect_cots.py needs the first phase, evaluate.py both. k: CoTs per video.
"""

import dataclasses
import hashlib
import math

import torch

import data
from model import DeScore
from plumbing import decoder
from plumbing.checkpoint import read_processor
from plumbing.jobs import Item, Phase, task_seed
from plumbing.settings import READERS, InputError, arg
from plumbing.vllm_engine import require_room
from rollout import EngineSettings, decode_cot, has_ended, make_engine
from rules import overall_score

MAX_PROMPT = 5_000  # tokens: no video generator reads more, and the cost of attention grows with the square


def hash_of(value) -> str:
    """A short name of what something printed says."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


WORDING = hash_of(data.build_conversation(""))  # of all that the model is asked beside the prompt
# What decides on a CoT: with another value it must not stand beside the old ones.
MADE_WITH = ("max_new_tokens", "temperature", "engine", "fps", "reader", "max_pixels", "seed")


@dataclasses.dataclass
class ThinkingSettings(EngineSettings):
    """Flags of the scripts that think about many videos; more in rollout.EngineSettings."""

    dimension: str = arg("TA", "label column where a CSV has several: TA (the paper's), VQ, MQ or Overall")
    reader: str = arg("pyav", "of video files; decord (the paper's) takes plain ones of constant rate", READERS)
    skip_bad_videos: bool = arg(False, "leave out what cannot be read; skipped.jsonl in the output folder lists it")
    seed: int = arg(0, "decides the sampled CoTs", at_least=0, at_most=2**63)


def require_short(prompt: str, tokenizer) -> None:
    """InputError for a prompt of absurd length. Counted in tokens: 20,000 characters may be 2,000 or 33,000 of them."""
    known = prompt.encode(errors="replace").decode()  # half a character has a sentence of its own: encode_text's
    length = len(tokenizer(known)["input_ids"])
    if length > MAX_PROMPT:
        raise InputError(f"the prompt has {length:,} tokens; at most {MAX_PROMPT:,} are read.")


class Workers:
    """The engine that thinks and the model that scores, each opened when first needed: a finished run opens neither.

    settings: model, fps, max_pixels, seed, batch_size and the engine's; dtype, if anything is scored.
    scores: the model that scores will be needed, so the transformers engine thinks with its backbone.
    """

    def __init__(self, settings, ranks, scores: bool = True):
        self.settings, self.ranks, self.scores, self.engine, self.model = settings, ranks, scores, None, None

    def open_model(self) -> DeScore:
        """The DeScore of --model, read once. From here on the engine thinks no more: its memory is for the model."""
        if self.model is None:
            if self.engine is not None:
                self.engine.sleep(level=2)
            dtype = getattr(torch, self.settings.dtype)
            self.model = DeScore.from_pretrained(self.settings.model, self.ranks.device, dtype).eval()
        return self.model

    def open_engine(self):
        """COLLECTIVE: vLLM starts on all ranks together. The engine's .processor turns videos and prompts into ids."""
        if self.engine is None:
            settings, processor = self.settings, read_processor(self.settings.model)
            share = self.scores and settings.engine == "transformers"
            self.engine = make_engine(
                settings.engine, settings.model, processor, self.ranks, self.open_model().backbone if share else None,
                settings.seed, settings.engine_max_len, settings.batch_size, memory=settings.engine_memory,
                tp=settings.engine_tp, sleeps=False,
            )
        return self.engine

    def frames(self, item: Item) -> data.Video:
        """What the model is shown of an item. InputError: what is wrong with its file."""
        return data.sample_frames(item.video, self.settings.fps, self.settings.max_pixels)

    def encode(self, batch: list[Item], phase: Phase, processor, needs=None, limit=None) -> dict[Item, dict]:
        """The batch's items and their prefixes. A broken video or an endless prompt is refused here, before any work is
        done on the batch, so that one bad item costs the others nothing.

        Decoded by as many threads as this rank has cores: each in a process of its own. needs: what of a prefix is kept
        (None: all); limit: tokens that prompt and CoT may have together (None: as many as they are).
        """
        prefixes = {}
        with decoder.threads(decoder.CORES) as pool:
            for item, video in [(item, pool.submit(self.frames, item)) for item in batch]:
                try:
                    require_short(item.prompt, processor.tokenizer)
                    prefix = data.encode_prompt(processor, video.result(), item.prompt)
                    if limit:
                        require_room(len(prefix["input_ids"]), self.settings.max_new_tokens, limit)
                    prefixes[item] = {name: prefix[name] for name in needs or prefix}
                except InputError as error:
                    phase.refuse(item, error)
        return prefixes

    def think(self, items: list[Item], out: str, thoughts: int = 1):
        """COLLECTIVE: k CoTs for each item -> ({item.key: record}, what was skipped); one line each in OUT.

        A record: video, prompt, thoughts: k texts, token_ids: k lists as sampled (EOS included unless cut off), tokens:
        their k lengths, ended: k of "EOS was reached". Each CoT has a random stream of its own, from (seed, video,
        prompt, k), so it depends neither on the batch nor on the rank.
        """
        settings, made_from = self.settings, {item.key: WORDING for item in items}
        how = settings.max_new_tokens, settings.temperature
        phase = Phase("thoughts", items, out, settings.skip_bad_videos, self.ranks, made_from)
        if phase.to_do:
            engine = self.open_engine()
            tokenizer = engine.processor.tokenizer
            for batch in phase.batches(max(1, engine.requests // thoughts)):
                prefixes = self.encode(batch, phase, engine.processor, engine.needs, engine.limit)
                good = list(prefixes)
                seeds = [[task_seed(settings.seed, *item.key, k) for k in range(thoughts)] for item in good]
                for i, cots in engine.stream(list(prefixes.values()), seeds, *how):
                    ended = [has_ended(tokenizer, cot) for cot in cots]
                    phase.write(good[i], {"thoughts": [decode_cot(tokenizer, cot) for cot in cots], "token_ids": cots,
                                          "tokens": list(map(len, cots)), "ended": ended})
        return phase.finish()

    def score(self, items: list[Item], thoughts: dict | None, out: str):
        """COLLECTIVE: the head's rewards -> ({item.key: record}, what was skipped); one line each in OUT.

        thoughts: what `think` returned; None: no thinking. A record: video, prompt, rewards: of the k CoTs, reward:
        their mean. The CoTs go in as the ids that were sampled: decoded and encoded again a text may become other
        tokens, and the head would score another CoT.
        """
        settings, cots = self.settings, {item.key: [None] for item in items}
        if thoughts is not None:
            cots = {key: record["token_ids"] for key, record in thoughts.items()}
            items = [item for item in items if item.key in cots]  # the others were skipped while thinking
        # Other CoTs, other rewards: those of a clip that was replaced, or of a swapped clip whose CoT is kept.
        made_from = {item.key: f"{WORDING} {hash_of(cots[item.key])}" for item in items}
        phase = Phase("rewards", items, out, settings.skip_bad_videos, self.ranks, made_from)
        if phase.to_do:
            model = self.open_model()
            for batch in phase.batches(settings.batch_size):
                if prefixes := self.encode(batch, phase, model.processor):
                    # ONE forward for the batch: prompt, CoT and query in a row; the reward is head(h_query).
                    rows = model.score(list(prefixes.values()), [cots[item.key] for item in prefixes])
                    for item, row in zip(prefixes, rows.tolist()):
                        phase.write(item, {"reward": mean(row), "rewards": row})
        return phase.finish()


def text_rewards(thoughts: dict) -> dict:
    """The rewards that the CoTs state, as `Workers.score` returns the head's. lab/study counts equal ones half."""
    return {key: {"reward": mean([overall_score(text) for text in record["thoughts"]])}
            for key, record in thoughts.items()}


def mean(rewards: list[float]) -> float:
    """The same for the same rewards in any order: a sum that rounds as it goes makes equal clips unequal."""
    return math.fsum(rewards) / len(rewards)
