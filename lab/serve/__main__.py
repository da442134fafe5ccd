"""A reward server: DeScore over HTTP, for a trainer in another process, environment or machine.

    python -m lab.serve --model runs/stage2/model            http://127.0.0.1:8000, seen by this machine alone
    DESCORE_TOKEN=secret python -m lab.serve --model DIR --host 0.0.0.0          seen by others, who must send the token

    POST /compute   {"prompt": "a cat jumps", "video": "<an mp4 file, in base64>"}, or lists of both; or a multipart
                    form with fields `prompt` and files `video`, as many of one as of the other
        -> {"results": [0.31, null], "errors": [null, "the video is empty."], "error": "1 of 2 failed: ..."}
    POST /score     the same, in the form of UniRL's reward service
    GET /health     {"status": "ok"}           GET /metrics     counters, in Prometheus' text form

What fails has an error and NO number: a 0 in its place would push a generator as hard as a real reward. If nothing
failed, the answer holds the same list as `rewards`, and no `error`: the form that Flow-Factory's trainers read.

One thread owns the model (lab/serve/scoring.py). Videos that wait are thought about and scored together; with --engine
vllm each CoT joins the batch that is running, and is scored when it has ended. Uploads are untrusted: their size is
limited before anything is decoded, no path that a client names is opened, and only known containers reach ffmpeg, since
a playlist would make it open other files. What this does not do is shield you from a bug in ffmpeg: for strangers'
files, run it in a container; a file that is not decoded in time is given up. Needs requirements-serve.txt.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import hmac
import ipaddress
import json
import os
import socket
import threading
import time

import numpy as np
import torch

import data
import parallel
from lab.clients import unirl
from lab.serve.scoring import Scorer, message_of
from lab.serve.uploads import check_fields, decode_base64, open_file, open_images, read_form, read_json, require_text
from model import DeScore
from phases import require_short
from plumbing import decoder
from plumbing.settings import InputError, arg, cli, parse, require
from rollout import EngineSettings, make_engine

try:
    from aiohttp import web
    from aiohttp.http_exceptions import HttpProcessingError
except ImportError:  # an optional requirement; `main` says so
    web = None

QUANTILES = (0.5, 0.95, 0.99)
STOPPING = "the server is stopping; send it once more, to another one or later."


@dataclasses.dataclass
class Settings(EngineSettings):
    """The flags; more in rollout.EngineSettings. How frames are sampled is what the checkpoint was trained with."""

    model: str | None = arg(None, "a DeScore folder")
    host: str = arg("127.0.0.1", "address to listen on; any that others can reach needs a token, DESCORE_TOKEN")
    port: int = arg(8000, "port; 0 takes a free one", at_least=0, at_most=65535)
    think: bool = arg(True, "think before scoring; --no-think is fast")
    thoughts: int = arg(
        1, "CoTs per video: 1 is greedy; more are sampled at temperature 1, rewards averaged", at_least=1)
    engine_memory: float = arg(
        0.5, "share of a GPU's memory that vLLM may use; the model that scores lies beside it", above=0, at_most=1)
    normalize: bool = arg(False, "rewards minus their mean in training, over their spread there: a rough common scale")
    dtype: str = arg("auto", "auto: bfloat16 on a GPU, else float32", choices=["auto", "bfloat16", "float32"])
    batch_size: int = arg(16, "videos scored together at most", at_least=1)
    wait_ms: float = arg(
        20.0, "how long a video waits for others to be scored with; not with vllm, whose batch it can join", at_least=0)
    open_videos: int = arg(64, "requests, and videos, held in memory at a time; the others wait unread", at_least=1)
    source_fps: float = arg(16.0, "frames a second of videos sent as images without `fps` (Wan: 16)", above=0)
    max_mb: float = arg(64.0, "size of a request, in 10^6 bytes", above=0)
    max_videos: int = arg(64, "videos in a request", at_least=1)
    max_seconds: float = arg(60.0, "length of a video", above=0)
    decode_seconds: float = arg(20.0, "for a video to be opened, and again to be decoded; then it is given up", above=0)
    timeout: float = arg(600.0, "seconds for a request, its waiting included", above=0)
    stop_seconds: float = arg(3.0, "that a stop (SIGTERM, Ctrl-C) leaves to what is under way", at_least=0)


# ---------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------
class RewardServer:
    """One thread that scores, a few that decode; everything else happens in the event loop.

    engine: who thinks, from rollout.make_engine; None: nothing is thought.
    """

    def __init__(self, model: DeScore, s: Settings, engine=None):
        self.model, self.s, self.scorer = model, s, Scorer(model, s, engine)
        self.count, self.requests, self.latencies = collections.Counter(), 0, collections.deque(maxlen=1000)
        self.decoders = concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="decode")
        self.decoding = {}  # {a decoding thread: since when it is at its video}
        self.encoding = threading.Lock()  # of prompts: a tokenizer is for one thread at a time
        # Nobody is refused: what is beyond these two waits unread in its connection. A request is held whole, about 2.4
        # times its size, until its last answer: memory for open_videos x max_mb x 2.4 at the very worst.
        self.open_requests = asyncio.Semaphore(s.open_videos)
        self.open_videos = asyncio.Semaphore(s.open_videos)
        self.stopping = asyncio.Event()

    async def compute(self, request):
        """POST /compute."""
        self.requests, began = self.requests + 1, time.monotonic()
        try:
            async with asyncio.timeout(self.s.timeout), self.open_requests:
                fields = await self.read(request)
                prompts, videos, fps = check_fields(fields, self.s.max_videos, self.s.source_fps)
                answers = await asyncio.gather(*(self.or_stop(self.judge(v, p, fps, began))
                                                 for v, p in zip(videos, prompts)))
        except InputError as error:
            return web.json_response({"error": str(error)}, status=400)
        except TimeoutError:
            return web.json_response({"error": f"not done within {self.s.timeout:g} s (--timeout)."}, status=504)
        finally:
            self.requests -= 1
        errors = [message_of(answer) if isinstance(answer, Exception) else None for answer in answers]
        results = [None if error else answer[0] for answer, error in zip(answers, errors)]
        failed = [error for error in errors if error]
        self.count["videos", "failed"] += len(failed)
        self.count["videos", "scored"] += len(results) - len(failed)
        ended = [None if error else answer[2] for answer, error in zip(answers, errors)]
        body = {"results": results, "errors": errors, "ended": ended}
        body |= {"error": f"{len(failed)} of {len(errors)} failed: {failed[0]}"} if failed else {"rewards": results}
        if fields.get("thoughts"):
            body["thoughts"] = [None if error else answer[1] for answer, error in zip(answers, errors)]
        return web.json_response(body)

    async def read(self, request) -> dict:
        """The fields of either form. aiohttp limits the size while it reads, and answers 413.

        InputError: a broken form.
        """
        if request.content_type == "multipart/form-data":
            try:
                form = await request.post()
            except (ValueError, AssertionError, HttpProcessingError) as error:
                raise InputError("the multipart form is broken.") from error
            return read_form(form)
        body = await request.read()
        return await asyncio.to_thread(unirl.fields_of if request.path == "/score" else read_json, body)

    async def score_for_unirl(self, request):
        """POST /score: the same, in the form of UniRL's reward service."""
        answer = await self.compute(request)
        return web.json_response(unirl.reply_of(json.loads(answer.body)), status=answer.status)

    async def judge(self, upload, prompt: str, source_fps: float, began: float):
        """One video: opened, put in line, scored. Returns (reward, CoT), or the exception that is its answer."""
        loop = asyncio.get_running_loop()
        async with self.open_videos:
            try:
                require_text(prompt)
                prefix = await loop.run_in_executor(self.decoders, self.open_video, upload, prompt, source_fps)
            except Exception as error:  # one bad upload must not cost the others of its request their answers
                self.scorer.failures += not isinstance(error, InputError)  # a full disk: /health is to say so
                return error
            answer = await asyncio.wrap_future(self.scorer.ask(prefix, prompt))
            self.latencies.append(time.monotonic() - began)
            return answer

    async def or_stop(self, answering):
        """An answer; or, where the server stops before it is there, a sentence in its place."""
        tasks = [asyncio.ensure_future(answering), asyncio.ensure_future(self.stopping.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].result() if tasks[0].done() else InputError(STOPPING)
        finally:
            for task in tasks:
                task.cancel()

    def open_video(self, upload, prompt: str, source_fps: float) -> dict:
        """An upload and its prompt -> a prefix. bytes: a file; text: the same in base64; list: its images."""
        fps, max_pixels = self.model.settings.get("fps", 2.0), self.model.settings.get("max_pixels", 448 * 448)
        self.decoding[threading.get_ident()] = time.monotonic()
        try:
            if isinstance(upload, list):
                video = open_images(upload, source_fps, fps, max_pixels, self.s.max_seconds)
            else:
                raw = upload if isinstance(upload, bytes) else decode_base64(upload)
                video = open_file(raw, fps, max_pixels, self.s.max_seconds, self.s.decode_seconds)
        finally:
            del self.decoding[threading.get_ident()]
        with self.encoding:
            require_short(prompt, self.model.processor.tokenizer)
            return data.encode_prompt(self.model.processor, video, prompt)

    async def health(self, request):
        """GET /health: 503 once nothing will be scored any more, or a decoder does not keep its time."""
        patience = 2 * self.s.decode_seconds + 10  # opened and decoded, and an end put to both
        stuck = sum(time.monotonic() - since > patience for since in list(self.decoding.values()))
        status = self.scorer.state() or (f"{stuck} decoders stand still" if stuck else "ok")
        rewards = {unirl.NAME: [status]}  # UniRL looks here for the rewards that are served
        return web.json_response({"status": status, "rewards": rewards}, status=200 if status == "ok" else 503)

    async def metrics(self, request):
        """GET /metrics, in Prometheus' text form."""
        lines = [f'descore_requests_total{{code="{key[1]}"}} {n}' for key, n in self.count.items() if key[0] == "code"]
        for word in ("scored", "failed"):
            lines.append(f'descore_videos_total{{outcome="{word}"}} {self.count["videos", word]}')
        times = np.quantile(self.latencies or [np.nan], QUANTILES)  # of the last 1,000
        lines += [f'descore_latency_seconds{{quantile="{q}"}} {x:.3f}' for q, x in zip(QUANTILES, times)]
        lines += [f"descore_open_requests {self.requests}", f"descore_decoding_videos {len(self.decoding)}"]
        return web.Response(text="\n".join([*lines, *self.scorer.metrics()]) + "\n")

    async def stop(self, app):
        """On SIGTERM or Ctrl-C: what is under way has --stop-seconds, then all that wait are told."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.s.stop_seconds):
                while self.requests:
                    await asyncio.sleep(0.02)
        self.stopping.set()

    async def end(self, app):
        """When all have their answers."""
        self.scorer.stop(STOPPING)
        self.decoders.shutdown(wait=False, cancel_futures=True)
        decoder.end_all()  # or the end would wait for the files that they are at


def make_app(server: RewardServer, token: str = ""):
    """The aiohttp application. token: what `Authorization: Bearer ...` must hold, everywhere but at /health."""

    @web.middleware
    async def guard(request, handler):
        """Around every request: asks for the token, turns every failure into JSON, counts the answer."""
        given = request.headers.get("Authorization", "")
        right = hmac.compare_digest(given.encode(errors="replace"), f"Bearer {token}".encode())
        if token and request.path != "/health" and not right:
            response = web.json_response({"error": "send the header `Authorization: Bearer TOKEN`."}, status=401)
        else:
            try:
                response = await handler(request)
            except web.HTTPException as error:  # 404, 405, 413: as JSON, like all answers
                response = web.json_response({"error": error.text or error.reason}, status=error.status)
            except Exception as error:  # a bug; the server goes on
                response = web.json_response({"error": message_of(error)}, status=500)
        server.count["code", response.status] += 1
        return response

    app = web.Application(middlewares=[guard], client_max_size=int(server.s.max_mb * 1e6))
    app.add_routes([web.post("/compute", server.compute), web.post("/score", server.score_for_unirl),
                    web.get("/health", server.health), web.get("/metrics", server.metrics)])
    app.on_shutdown.append(server.stop)
    app.on_cleanup.append(server.end)
    return app


def warm_up(model: DeScore, engine) -> None:
    """A black clip: what is compiled at the first request, or does not work at all, is so before the port answers."""
    black = data.Video(np.zeros((2, 64, 64, 3), np.uint8), 2.0, 2, (0, 1))
    prefixes = [data.encode_prompt(model.processor, black, "a black screen")]
    model.score(prefixes, engine.generate(prefixes, [[0]], 2) if engine else [[None]])


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine reaches. A name other than localhost may mean any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv=None) -> None:
    """Takes the port first, then loads the model: a taken port is told in a second, not after minutes."""
    s = parse(Settings, __doc__, argv)
    require(s, model="a DeScore folder")
    if s.engine_tp > 1:
        raise InputError("--engine-tp: the server is one process; start one for each GPU.")
    if web is None:
        raise InputError("lab.serve needs aiohttp: pip install -r requirements-serve.txt.")
    token = os.environ.get("DESCORE_TOKEN", "")
    if not is_loopback(s.host) and not token:
        raise InputError(f"--host {s.host}: others could reach it; set DESCORE_TOKEN, the token that they must send.")
    listener = socket.socket(socket.AF_INET6 if ":" in s.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((s.host, s.port))
        listener.listen(128)  # bound alone, another server could bind it too; whoever comes before the loop waits
    except OSError as error:
        raise InputError(f"--host {s.host} --port {s.port}: cannot be listened on ({error.strerror}).") from error
    ranks = parallel.start(seed=0)
    dtype = s.dtype if s.dtype != "auto" else {"cuda": "bfloat16", "cpu": "float32"}[ranks.device.type]
    model = DeScore.from_pretrained(s.model, ranks.device, getattr(torch, dtype)).eval()
    model.unit(s.normalize)  # what is missing is said before the engine starts
    engine = None
    if s.think:
        shared = model.backbone if s.engine == "transformers" else None
        engine = make_engine(s.engine, s.model, model.processor, ranks, shared, max_model_len=s.engine_max_len,
                             memory=s.engine_memory, tp=s.engine_tp, sleeps=False)
    warm_up(model, engine)
    server = RewardServer(model, s, engine)
    app = make_app(server, token)
    print(f"http://{s.host}:{listener.getsockname()[1]}/compute answers now", flush=True)
    web.run_app(app, sock=listener, print=None, handler_cancellation=True,  # a client that left is not scored
                shutdown_timeout=3.0)  # for answers to be sent
    if not server.scorer.rests.wait(5):  # nobody waits for the batch that it is at, and nothing can interrupt it
        os._exit(0)
    ranks.finish(engine)


if __name__ == "__main__":
    cli(main)
