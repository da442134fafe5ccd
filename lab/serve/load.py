"""Many requests at once to a running server, a fifth of them bad: videos per second, latencies, what was lost.

    python -m lab.serve --model runs/stage2/model --max-new-tokens 80                       one server, then
    python -m lab.serve.load --data runs/data/test_in_domain.csv --requests 64              this beside it
    python -m lab.serve --model runs/stage2/model --max-new-tokens 80 --engine vllm         the other: the same again

Each request is one video of --data with its prompt, other videos in each round as long as there are any (a server may
know the old ones). A bad one is no video, cut short, or without a prompt. A good one without a reward, or a bad one
with one, is an error: exit code 2.
"""

import asyncio
import base64
import dataclasses
import os
import time

import numpy as np

import data
from plumbing.jobs import items_of
from plumbing.settings import InputError, arg, cli, parse, require

try:
    import aiohttp
except ImportError:  # an optional requirement; `main` says so
    aiohttp = None


@dataclasses.dataclass
class Settings:
    """The flags."""

    data: str | None = arg(None, "CSV of pairs, whose clips and prompts are sent")
    url: str = arg("http://127.0.0.1:8000", "the server; the token, if it needs one, in DESCORE_TOKEN")
    requests: int = arg(64, "requests at once", at_least=1)
    rounds: int = arg(3, "times that this is done", at_least=1)


def payloads(items: list, count: int, start: int) -> list[dict]:
    """Requests for items[start], items[start + 1], ...; every fifth is bad, in one of three ways."""
    made = []
    for k in range(count):
        video, prompt, _ = items[(start + k) % len(items)]
        with open(video, "rb") as file:
            raw = file.read()
        if k % 5 == 4:
            raw, prompt = [(b"no video", "a"), (raw[: len(raw) // 3], "a"), (raw, "")][k // 5 % 3]
        made.append({"prompt": prompt, "video": base64.b64encode(raw).decode()})
    return made


async def send(url: str, requests: list[dict]) -> tuple[list, float]:
    """All at once -> ([(seconds, the answer's body)], seconds in all)."""
    headers = {"Authorization": f"Bearer {os.environ.get('DESCORE_TOKEN', '')}"}
    limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(None)}
    began = time.monotonic()
    async with aiohttp.ClientSession(url, headers=headers, **limits) as session:
        async def one(payload):
            async with session.post("/compute", json=payload) as response:
                body = await response.json()
            return time.monotonic() - began, body

        return await asyncio.gather(*map(one, requests)), time.monotonic() - began


def main(argv=None) -> None:
    """Prints one line a round."""
    s = parse(Settings, __doc__, argv)
    require(s, data="a CSV of pairs")
    if aiohttp is None:
        raise InputError("lab.serve.load needs aiohttp: pip install -r requirements-serve.txt.")
    items = items_of(data.read_pairs(s.data))
    for k in range(s.rounds):
        requests = payloads(items, s.requests, k * s.requests)
        try:
            answers, seconds = asyncio.run(send(s.url, requests))
        except (aiohttp.ClientError, OSError) as error:
            raise InputError(f"--url {s.url}: does not answer ({error}); start it: python -m lab.serve.") from error
        scored = [(i, took) for i, (took, body) in enumerate(answers) if body.get("rewards")]
        p50, p95 = np.quantile([took for _, took in scored] or [np.nan], (0.5, 0.95))
        print(f"round {k + 1}: {len(scored)} of {len(requests)} scored in {seconds:.2f} s: "
              f"{len(scored) / seconds:.1f} videos/s; latency p50 {p50:.2f} s, p95 {p95:.2f} s", flush=True)
        if wrong := sorted(set(range(len(requests))) ^ {i for i, _ in scored} ^ set(range(4, len(requests), 5))):
            raise InputError(f"request {wrong[0]} and {len(wrong) - 1} more: a good clip without a reward, or a bad "
                             f"one with one: {answers[wrong[0]][1]}.")


if __name__ == "__main__":
    cli(main)
