"""The one thread that owns the model and the engine: videos join, are thought about, are scored, get their answer.

--engine transformers: what waits is thought about and scored in batches; each waits for the longest CoT of its batch.
--engine vllm: CoTs join and leave the engine's running batch at every token; whatever has ended is scored at once.

One thread for both, since vLLM's engine lives in this process and makes a step only when it is asked to: between two
steps CoTs join, leave, or are scored, and nothing needs a lock.
"""

import collections
import concurrent.futures
import dataclasses
import math
import queue
import threading
import time
import traceback

from plumbing.jobs import task_seed
from plumbing.settings import InputError, first_line
from rollout import decode_cot, has_ended

RECENT = 60.0  # seconds that the rate of tokens is taken over
BROKEN = 10  # videos that fail one after the other by no fault of theirs: a GPU that had one error has it ever after


@dataclasses.dataclass(eq=False)
class Waiting:
    """A video that waits for its reward; `answer` will hold (reward, CoTs, ended), or an exception."""

    prefix: dict
    prompt: str
    answer: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)
    cots: list | None = None  # token ids of each CoT, as sampled
    ended: bool = True  # False: one was cut off at --max-new-tokens


def message_of(error: Exception) -> str:
    """One sentence for the client. What is not the client's fault goes to the log with its traceback."""
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exception(error)
    return f"the server failed: {type(error).__name__}: {first_line(error)}"


class Scorer:
    """The thread. s: the server's flags. engine: as rollout.make_engine makes it, or None: nothing is thought.

    `ask`, `stop`, `state` and `metrics` may be called from any thread; all else is the thread's own.
    """

    def __init__(self, model, s, engine=None):
        self.model, self.s, self.engine = model, s, engine
        self.joins = s.engine == "vllm" and engine is not None  # its batch can be joined while it runs
        self.mean, self.std = model.unit(s.normalize)
        self.inbox, self.under_way, self.ended = queue.Queue(), set(), []
        self.count, self.seconds, self.tokens = collections.Counter(), collections.Counter(), collections.deque()
        self.failures, self.turned = 0, time.monotonic()  # one after the other; when the thread was last seen
        self.closed, self.rests = None, threading.Event()  # a sentence, once nothing will be scored any more
        self.thread = threading.Thread(target=self.run, daemon=True, name="score")
        self.thread.start()

    def ask(self, prefix: dict, prompt: str) -> concurrent.futures.Future:
        """Puts a video in line. Its answer can be cancelled as long as it is not there."""
        waiting = Waiting(prefix, prompt)
        self.inbox.put(waiting)
        return waiting.answer

    def stop(self, why: str) -> None:
        """From now on nothing is scored: what waits, and what still comes, is answered with that sentence."""
        self.closed = self.closed or why
        self.inbox.put(None)  # so that it wakes up

    def state(self) -> str | None:
        """None while videos are scored, else a sentence."""
        still = time.monotonic() - self.turned
        if self.under_way and still > self.s.timeout and not self.closed:
            return f"the scoring thread has been at one step for {still:.0f} s"
        if self.failures >= BROKEN:
            return f"the last {self.failures} videos failed by no fault of theirs: start the server again"
        return self.closed

    def metrics(self) -> list[str]:
        """Lines for /metrics."""
        since, now = time.monotonic() - RECENT, list(self.tokens)
        rate = sum(count for at, count in now if at > since) / RECENT
        lines = [f"descore_{name}_seconds_total {self.seconds[name]:.3f}" for name in ("thinking", "scoring")]
        return [*lines, f"descore_batches_total {self.count['batches']}",
                f"descore_waiting_videos {self.inbox.qsize()}", f"descore_running_videos {len(self.under_way)}",
                f"descore_cot_tokens_total {self.count['tokens']}",
                f"descore_cots_cut_total {self.count['cut']}", f"descore_cot_tokens_per_second {rate:.1f}"]

    # -- the thread ------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Scores until `stop`, or until the engine ends; from then on it tells everybody so."""
        try:
            while not self.closed:
                self.turn()
        except Exception as error:
            traceback.print_exception(error)
            self.closed = (f"the engine has ended ({type(error).__name__}: {first_line(error)}); start the server "
                           "again.")
        for waiting in list(self.under_way):
            self.answer(waiting, InputError(self.closed))
        self.rests.set()
        while True:
            if waiting := self.inbox.get():
                self.answer(waiting, InputError(self.closed))

    def turn(self) -> None:
        """What has come joins, the engine makes a step, and what has ended is scored."""
        new = self.take()
        self.turned = time.monotonic()
        if self.joins:
            self.join(new)
            self.step()
        else:
            self.under_way.update(new)
            self.ended += new
        batch, self.ended = self.ended[: self.s.batch_size], self.ended[self.s.batch_size :]
        batch = [waiting for waiting in batch if not self.left(waiting)]
        for waiting, answer in zip(batch, self.judge(batch)):
            self.answer(waiting, answer)

    def take(self) -> list[Waiting]:
        """At most a batch of what waits. Sleeps only while there is nothing else to do."""
        new = []
        while len(new) < self.s.batch_size:
            idle = not (self.under_way or new)
            try:
                waiting = self.inbox.get(block=idle)
            except queue.Empty:
                break
            if waiting is None:  # `stop`
                break
            if idle and not self.joins:
                time.sleep(self.s.wait_ms / 1000)  # for others to be thought about with
            if not self.left(waiting):
                new.append(waiting)
        return new

    def left(self, waiting: Waiting) -> bool:
        """True if nobody waits for it any more: its request timed out, or its client left."""
        gone = waiting.answer.cancelled()  # asked once: another thread changes it, and who leaves must leave at once
        if gone:
            self.under_way.discard(waiting)
        return gone

    def how(self) -> tuple[int, float]:
        """CoT tokens at most, temperature: one CoT is greedy, several are sampled."""
        return self.s.max_new_tokens, float(self.s.thoughts > 1)

    def seeds(self, waiting: Waiting) -> list[int]:
        """Of the request alone: a reward depends on nothing that is under way beside it."""
        return [task_seed(waiting.prompt, k) for k in range(self.s.thoughts)]

    def join(self, new: list[Waiting]) -> None:
        """Into the engine's running batch; and out of it go those that nobody waits for any more."""
        for waiting in [waiting for waiting in self.under_way if waiting.cots is None]:
            if self.left(waiting):
                self.engine.cancel(waiting)
        for waiting in new:
            try:
                self.engine.add(waiting, waiting.prefix, self.seeds(waiting), *self.how())
                self.under_way.add(waiting)
            except Exception as error:  # a video that vLLM refuses; the others go on
                self.answer(waiting, InputError(message_of(error)))

    def step(self) -> None:
        """One more token for every CoT that is under way. What this raises is the engine's end."""
        began = time.monotonic()
        for waiting, cots, _ in self.engine.step() if self.engine.under_way else ():
            self.thought(waiting, cots)
            self.ended.append(waiting)
        self.seconds["thinking"] += time.monotonic() - began

    def think(self, batch: list[Waiting]) -> None:
        """CoTs for those that have none yet, all together; [None] without thinking."""
        batch = [waiting for waiting in batch if waiting.cots is None]
        if self.engine is None:
            for waiting in batch:
                waiting.cots = [None]
        elif batch:
            began, prefixes = time.monotonic(), [waiting.prefix for waiting in batch]
            rows = self.engine.generate(prefixes, [self.seeds(waiting) for waiting in batch], *self.how())
            for waiting, cots in zip(batch, rows):
                self.thought(waiting, cots)
            self.seconds["thinking"] += time.monotonic() - began

    def thought(self, waiting: Waiting, cots: list[list[int]]) -> None:
        """Keeps the CoTs of a video, and counts their tokens."""
        now, waiting.cots = time.monotonic(), cots
        self.tokens.append((now, sum(map(len, cots))))
        self.count["tokens"] += self.tokens[-1][1]
        cut = sum(not has_ended(self.model.processor.tokenizer, cot) for cot in cots)
        self.count["cut"], waiting.ended = self.count["cut"] + cut, not cut
        while self.tokens[0][0] < now - RECENT:
            self.tokens.popleft()

    def judge(self, batch: list[Waiting]) -> list:
        """(reward, CoTs as text, whether all ended) or an exception for each.

        If a batch fails, each of its videos is judged alone: the error then belongs to the one that caused it, and a
        batch too large for the memory still gets its rewards.
        """
        if not batch:
            return []
        try:
            self.think(batch)
            began = time.monotonic()
            rewards = self.model.score([w.prefix for w in batch], [w.cots for w in batch]).mean(dim=1)  # (S,)
            rewards = ((rewards - self.mean) / self.std).tolist()
            self.seconds["scoring"] += time.monotonic() - began
            self.count["batches"] += 1
            self.failures, bad = 0, InputError("the model's reward is not finite.")
            return [(r, self.texts(w), w.ended) if math.isfinite(r) else bad for r, w in zip(rewards, batch)]
        except Exception as error:  # whatever it is, it must not take the batch's other videos along
            if len(batch) == 1:
                self.failures += not isinstance(error, InputError)
                return [InputError(message_of(error))]  # its text alone: the error itself holds the batch's tensors
        # One by one, outside `except`: in there, too, the failed batch's tensors would still fill the memory.
        return [self.judge([one])[0] for one in batch]

    def texts(self, waiting: Waiting):
        """The CoT as text; a list of them with --thoughts; None without thinking."""
        tokenizer = self.model.processor.tokenizer
        texts = [cot and decode_cot(tokenizer, cot) for cot in waiting.cots]
        return texts if self.s.thoughts > 1 else texts[0]

    def answer(self, waiting: Waiting, answer) -> None:
        """Unless nobody waits for it any more."""
        self.under_way.discard(waiting)
        if waiting.answer.set_running_or_notify_cancel():
            waiting.answer.set_result(answer)
