"""CoTs that join and leave while others are under way, without vLLM: the real model, CoTs by transformers' generate."""

import asyncio
import os
import signal
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("aiohttp", reason="aiohttp is not installed; pip install -r requirements-serve.txt")

from lab.serve import scoring  # noqa: E402
from lab.serve.__main__ import Settings  # noqa: E402
from lab.serve.test_serve import PROMPT, b64, clips, post, scorer, served  # noqa: E402, F401
from plumbing.settings import InputError  # noqa: E402
from rollout import TransformersEngine, decode_cot  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

FEW = 5  # tokens of a CoT


class Joined(TransformersEngine):
    """What vLLM's engine offers: CoTs join, leave, and end one after the other. A prompt with "long" does not end."""

    def __init__(self, model):
        super().__init__(model.backbone, model.processor, shared=True)
        self.under_way, self.cancelled, self.longest, self.dies = {}, 0, 0, False
        self.tokenizer = model.processor.tokenizer

    def add(self, key, prefix, seeds, *how):
        if "too long" in key.prompt:
            raise InputError("a CoT has no room.")
        self.under_way[key] = prefix, seeds, how
        self.longest = max(self.longest, len(self.under_way))

    def cancel(self, key):
        self.cancelled += 1
        del self.under_way[key]

    def step(self):
        if self.dies:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        ready = [key for key in self.under_way if "long" not in key.prompt]
        if not ready:
            return []
        prefix, seeds, how = self.under_way.pop(ready[-1])  # the last first: another order than they came in
        return [(ready[-1], self.generate([prefix], [seeds], *how)[0], None)]


@pytest.fixture
def engine(scorer):  # noqa: F811
    return Joined(scorer)


def joined(scorer, engine, client, **flags):  # noqa: F811
    """As `served`, thinking by an engine that can be joined."""
    return served(scorer, client, joins=engine, engine="vllm", think=True, max_new_tokens=FEW, **flags)


async def metrics_of(session, url):
    async with session.get(f"{url}/metrics") as response:
        return {line.split(" ")[0]: float(line.split(" ")[1]) for line in (await response.text()).splitlines()}


async def health_of(session, url):
    async with session.get(f"{url}/health") as response:
        return response.status, (await response.json())["status"]


def test_each_is_scored_when_it_has_ended_and_gets_its_own_answer(scorer, engine, clips):  # noqa: F811
    """Twenty at once, every fifth bad, one that never ends among them: the others do not wait for it."""
    paths = list(clips)
    wanted, texts = scorer.reward(paths, [PROMPT] * len(paths), max_new_tokens=FEW, with_thoughts=True)

    async def client(session, url):
        endless = asyncio.create_task(post(session, url, {"prompt": "long", "video": b64(clips[paths[0]])}))
        calls = [{"prompt": PROMPT, "video": b64(clips[paths[k % len(paths)]] if k % 5 else b"junk"), "thoughts": True}
                 for k in range(20)]
        answers = await asyncio.gather(*(post(session, url, call) for call in calls))
        during = await metrics_of(session, url)
        endless.cancel()
        return answers, during

    answers, metrics = joined(scorer, engine, client)
    for k, (status, body) in enumerate(answers):
        if k % 5:
            assert body["rewards"] == [pytest.approx(wanted[k % len(paths)].item(), abs=1e-4)], (k, body)
            assert body["thoughts"] == [texts[k % len(paths)]]
        else:
            assert status == 200 and body["results"] == [None] and "no mp4" in body["error"]
    assert engine.longest > 1 and metrics["descore_running_videos"] == 1 and metrics["descore_waiting_videos"] == 0
    assert metrics["descore_cot_tokens_total"] == 16 * FEW and metrics["descore_cot_tokens_per_second"] > 0
    assert 0 < metrics['descore_latency_seconds{quantile="0.5"}'] <= metrics['descore_latency_seconds{quantile="0.95"}']
    assert metrics["descore_thinking_seconds_total"] > 0 and metrics["descore_scoring_seconds_total"] > 0


def test_the_good_of_a_request_do_not_pay_for_the_bad(scorer, engine, clips):  # noqa: F811
    """One request, five videos: one has no room in the engine, one is no video."""
    good = b64(next(iter(clips.values())))
    payload = {"prompt": [PROMPT, "too long", PROMPT, PROMPT, PROMPT], "video": [good, good, good, b64(b"junk"), good]}
    status, body = joined(scorer, engine, lambda *at: post(*at, payload))
    assert status == 200 and [result is None for result in body["results"]] == [False, True, False, True, False]
    assert body["errors"][1] == "a CoT has no room." and "no mp4" in body["errors"][3] and "2 of 5" in body["error"]


def test_a_client_that_leaves_leaves_the_engine_too(scorer, engine, clips):  # noqa: F811
    video = b64(next(iter(clips.values())))

    async def client(session, url):
        leaving = asyncio.create_task(post(session, url, {"prompt": "long", "video": video}))
        while not engine.under_way:
            await asyncio.sleep(0.05)
        leaving.cancel()
        while engine.under_way:
            await asyncio.sleep(0.05)
        return await post(session, url, {"prompt": PROMPT, "video": video}), await metrics_of(session, url)

    (status, body), metrics = joined(scorer, engine, client)
    assert status == 200 and body["errors"] == [None] and engine.cancelled == 1
    assert metrics["descore_running_videos"] == 0


def test_who_leaves_while_it_is_asked_leaves_at_once_or_at_the_next_turn():
    """Gone for the engine, yet still under way, it would be cancelled a second time, which ended the thread."""
    asked = iter([False, True, True, True])
    waiting = scoring.Waiting({}, PROMPT)
    waiting.answer.cancelled = lambda: next(asked)
    thread = types.SimpleNamespace(under_way={waiting})
    for _ in range(2):
        assert scoring.Scorer.left(thread, waiting) == (waiting not in thread.under_way)


def test_an_engine_that_dies_is_one_sentence_and_no_wait(scorer, engine, clips, capsys):  # noqa: F811
    """For those that are under way, for those that come later, and for /health."""
    video = b64(next(iter(clips.values())))

    async def client(session, url):
        under_way = [asyncio.create_task(post(session, url, {"prompt": "long", "video": video})) for _ in range(3)]
        while len(engine.under_way) < 3:
            await asyncio.sleep(0.05)
        before = await health_of(session, url)
        engine.dies = True
        answers = await asyncio.gather(*under_way)
        answers.append(await post(session, url, {"prompt": PROMPT, "video": video}))
        return answers, before, await health_of(session, url)

    answers, before, health = joined(scorer, engine, client)
    says = ("the engine has ended (RuntimeError: CUDA error: an illegal memory access was encountered); start the "
            "server again.")
    assert [(status, body["results"], body["errors"]) for status, body in answers] == [(200, [None], [says])] * 4
    assert before == (200, "ok") and health == (503, says)
    assert "Traceback" in capsys.readouterr().err  # for whoever runs the server


@pytest.mark.parametrize("joins", [False, True])
def test_several_thoughts_are_averaged_and_do_not_depend_on_who_else_asks(scorer, engine, clips, joins):  # noqa: F811
    (path, raw), (_, other) = list(clips.items())[:2]
    (prefix,) = scorer.encode([path], [PROMPT])
    flags = {"thoughts": 3, "max_new_tokens": FEW}
    seeds = scoring.Scorer(scorer, Settings(**flags)).seeds(scoring.Waiting(prefix, PROMPT))
    cots = TransformersEngine(scorer.backbone, scorer.processor, shared=True).generate([prefix], [seeds], FEW, 1.0)
    wanted, texts = scorer.score([prefix], cots).mean().item(), [decode_cot(engine.tokenizer, cot) for cot in cots[0]]
    payload = {"prompt": ["a blue square", PROMPT], "video": [b64(other), b64(raw)], "thoughts": True}
    status, body = served(scorer, lambda *at: post(*at, payload), think=True, **flags, joins=engine if joins else None,
                          engine="vllm" if joins else "transformers")
    assert body["rewards"][1] == pytest.approx(wanted, abs=1e-4) and len(set(texts)) == 3
    assert body["thoughts"][1] == texts


# -- the end --------------------------------------------------------------------------------------------------------
def stopped(model, raw, *flags, after):
    """(answer, exit code, seconds after the signal) of a server that is sent SIGTERM `after` s after a request."""
    command = [sys.executable, "-m", "lab.serve", "--model", model, "--port", "0", *map(str, flags)]

    async def ask(url, server):
        import aiohttp

        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(post(session, url, {"prompt": PROMPT, "video": b64(raw)}))
            await asyncio.sleep(after)
            server.send_signal(signal.SIGTERM)
            began = asyncio.get_running_loop().time()
            answer = await task
            return answer, await asyncio.to_thread(server.wait, 60), asyncio.get_running_loop().time() - began

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = next(line for line in server.stdout if "answers now" in line).split("/compute")[0]
            return asyncio.run(ask(url, server))
        finally:
            server.kill()


def test_a_stop_finishes_what_it_can_and_refuses_the_rest(tiny_model_dir, clips):  # noqa: F811
    raw = next(iter(clips.values()))
    (status, body), code, _ = stopped(tiny_model_dir, raw, "--no-think", "--wait-ms", 2500, "--stop-seconds", 20,
                                      after=1)
    assert (status, code) == (200, 0) and body["errors"] == [None]
    (status, body), code, seconds = stopped(tiny_model_dir, raw, "--no-think", "--wait-ms", 60_000, "--stop-seconds", 1,
                                            after=1)
    assert (status, code) == (200, 0) and body["results"] == [None] and "is stopping" in body["error"]
    assert seconds < 15


def test_nan_is_an_error_of_its_own_and_no_end(scorer, engine, clips):  # noqa: F811
    good = b64(next(iter(clips.values())))
    whole = scorer.head.weight.data.clone()

    async def client(session, url):
        scorer.head.weight.data.fill_(torch.nan)
        first = await post(session, url, {"prompt": PROMPT, "video": good})
        scorer.head.weight.data.copy_(whole)
        return first, await post(session, url, {"prompt": PROMPT, "video": good})

    try:
        (_, bad), (_, body) = joined(scorer, engine, client)
    finally:
        scorer.head.weight.data.copy_(whole)
    assert "not finite" in bad["error"] and body["errors"] == [None]
