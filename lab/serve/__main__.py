"""A reward server: DeScore over HTTP, for a trainer in another process, environment or machine.

    python -m lab.serve --model runs/stage2/model            http://127.0.0.1:8000, seen by this machine alone
    DESCORE_TOKEN=secret python -m lab.serve --model DIR --host 0.0.0.0          seen by others, who must send the token

    POST /compute   {"prompt": "a cat jumps", "video": "<an mp4 file, in base64>"}, or lists of both; or a multipart
                    form with fields `prompt` and files `video`, as many of one as of the other
        -> {"results": [0.31, null], "errors": [null, "the video is empty."], "error": "1 of 2 failed: ..."}
    GET /health     {"status": "ok"}           GET /metrics     counters, in Prometheus' text form

What fails has an error and NO number: a 0 in its place would push a generator as hard as a real reward. If nothing
failed, the answer holds the same list as `rewards`, and no `error`: the form that Flow-Factory's trainers read.

One thread owns the model; requests that wait are scored together. Uploads are untrusted: their size is limited before
anything is decoded, no path that a client names is opened, and only known containers reach ffmpeg, since a playlist
would make it open other files. What this does not do is shield you from a bug in ffmpeg: for strangers' files, run it
in a container; a file that is not decoded in time is given up. Needs requirements-serve.txt (lab/serve/README.md).
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import hmac
import ipaddress
import json
import math
import os
import socket
import threading
import time
import traceback

import torch

import data
from lab.clients import unirl
from lab.serve.uploads import check_fields, decode_base64, open_file, open_images, read_form, read_json, require_text
from model import DeScore
from phases import require_short
from plumbing import decoder
from plumbing.settings import InputError, arg, cli, first_line, parse, require

try:
    from aiohttp import web
    from aiohttp.http_exceptions import HttpProcessingError
except ImportError:  # an optional requirement; `main` says so
    web = None


@dataclasses.dataclass
class Settings:
    """The flags. How frames are sampled is what the checkpoint was trained with."""

    model: str | None = arg(None, "a DeScore folder")
    host: str = arg("127.0.0.1", "address to listen on; any that others can reach needs a token, DESCORE_TOKEN")
    port: int = arg(8000, "port; 0 takes a free one", at_least=0, at_most=65535)
    think: bool = arg(True, "think before scoring; --no-think is fast")
    max_new_tokens: int = arg(4096, "CoT tokens at most", at_least=1)
    normalize: bool = arg(False, "rewards minus their mean in training, over their spread there: a rough common scale")
    dtype: str = arg("auto", "auto: bfloat16 on a GPU, else float32", choices=["auto", "bfloat16", "float32"])
    batch_size: int = arg(16, "videos scored together at most", at_least=1)
    wait_ms: float = arg(20.0, "how long a video waits for others to be scored with", at_least=0)
    source_fps: float = arg(16.0, "frames a second of videos sent as images without `fps` (Wan: 16)", above=0)
    max_mb: float = arg(64.0, "size of a request, in 10^6 bytes", above=0)
    max_videos: int = arg(64, "videos in a request", at_least=1)
    max_seconds: float = arg(60.0, "length of a video", above=0)
    decode_seconds: float = arg(20.0, "for a video to be opened, and again to be decoded; then it is given up", above=0)
    timeout: float = arg(600.0, "seconds for a request, its waiting included", above=0)


# ---------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Waiting:
    """A video that waits to be scored; `answer` will hold (reward, CoT) or an exception."""

    video: data.Video
    prompt: str
    answer: asyncio.Future


class RewardServer:
    """One model, one thread that scores, a few that decode; everything else happens in the event loop."""

    def __init__(self, model: DeScore, s: Settings):
        self.model, self.s = model, s
        self.count, self.seconds = collections.Counter(), 0.0
        self.decoders = concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="decode")
        self.decoding = {}  # {a decoding thread: since when it is at its video}
        self.scorer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="score")
        self.queue = asyncio.Queue()
        # Nobody is refused: what is beyond these two waits unread in its connection, and costs no memory.
        self.open_requests = asyncio.Semaphore(2 * s.batch_size)
        self.open_videos = asyncio.Semaphore(2 * s.batch_size)

    async def compute(self, request):
        """POST /compute."""
        try:
            async with asyncio.timeout(self.s.timeout), self.open_requests:
                fields = await self.read(request)
                prompts, videos, fps = check_fields(fields, self.s.max_videos, self.s.source_fps)
                answers = await asyncio.gather(*(self.judge(v, p, fps) for v, p in zip(videos, prompts)))
        except InputError as error:
            return web.json_response({"error": str(error)}, status=400)
        except TimeoutError:
            return web.json_response({"error": f"not done within {self.s.timeout:g} s (--timeout)."}, status=504)
        errors = [message_of(answer) if isinstance(answer, Exception) else None for answer in answers]
        results = [None if error else answer[0] for answer, error in zip(answers, errors)]
        failed = [error for error in errors if error]
        self.count["videos", "failed"] += len(failed)
        self.count["videos", "scored"] += len(results) - len(failed)
        body = {"results": results, "errors": errors}
        body |= {"error": f"{len(failed)} of {len(errors)} failed: {failed[0]}"} if failed else {"rewards": results}
        if fields.get("thoughts"):
            body["thoughts"] = [None if error else answer[1] for answer, error in zip(answers, errors)]
        return web.json_response(body)

    async def read(self, request) -> dict:
        """The fields of either form. aiohttp limits the size while it reads, and answers 413."""
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

    async def judge(self, upload, prompt: str, source_fps: float):
        """One video: opened, queued, scored. Returns (reward, CoT), or the exception that is its answer."""
        loop = asyncio.get_running_loop()
        async with self.open_videos:
            try:
                require_text(prompt)
                video = await loop.run_in_executor(self.decoders, self.open_video, upload, source_fps)
            except Exception as error:  # one bad upload must not cost the others of its request their answers
                return error
            waiting = Waiting(video, prompt, loop.create_future())
            self.queue.put_nowait(waiting)
            return await waiting.answer

    def open_video(self, upload, source_fps: float) -> data.Video:
        """An upload -> frames, sampled as in training. bytes: a file; text: the same in base64; list: its images."""
        fps, max_pixels = self.model.settings.get("fps", 2.0), self.model.settings.get("max_pixels", 448 * 448)
        self.decoding[threading.get_ident()] = time.monotonic()
        try:
            if isinstance(upload, list):
                return open_images(upload, source_fps, fps, max_pixels, self.s.max_seconds)
            raw = upload if isinstance(upload, bytes) else decode_base64(upload)
            return open_file(raw, fps, max_pixels, self.s.max_seconds, self.s.decode_seconds)
        finally:
            del self.decoding[threading.get_ident()]

    async def score_waiting(self) -> None:
        """For ever: takes what waits, up to a batch, and scores it. While one batch is scored the next one gathers."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            await asyncio.sleep(self.s.wait_ms / 1000)
            while len(batch) < self.s.batch_size and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            batch = [waiting for waiting in batch if not waiting.answer.done()]  # their requests timed out
            began = time.monotonic()
            answers = await loop.run_in_executor(self.scorer, self.score, [(w.video, w.prompt) for w in batch])
            self.count["batches"] += bool(batch)
            self.seconds += time.monotonic() - began
            for waiting, answer in zip(batch, answers):
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)

    def score(self, batch: list[tuple[data.Video, str]]) -> list:
        """(reward, CoT) or an exception for each, in the scoring thread.

        If a batch fails, each of its videos is scored alone: the error then belongs to the one that caused it, and
        a batch too large for the memory still gets its rewards.
        """
        if not batch:
            return []
        try:
            for _, prompt in batch:
                require_short(prompt, self.model.processor.tokenizer)
            rewards, thoughts = self.model.reward(
                *zip(*batch), think=self.s.think, max_new_tokens=self.s.max_new_tokens, normalize=self.s.normalize,
                with_thoughts=True,
            )
            bad = InputError("the model's reward is not finite.")
            return [(r, text) if math.isfinite(r) else bad for r, text in zip(rewards.tolist(), thoughts)]
        except Exception as error:  # whatever it is, it must not take the batch's other videos along
            if len(batch) == 1:
                return [InputError(message_of(error))]  # its text alone: the error itself holds the batch's tensors
        # One by one, outside `except`: in there, too, the failed batch's tensors would still fill the memory.
        return [self.score([one])[0] for one in batch]

    async def health(self, request):
        """GET /health: 503 once nothing will be scored any more, or a decoder does not keep its time."""
        patience = 2 * self.s.decode_seconds + 10  # opened and decoded, and an end put to both
        stuck = sum(time.monotonic() - since > patience for since in list(self.decoding.values()))
        status = f"{stuck} decoders stand still" if stuck else "ok"
        if self.task.done():
            status = "the scoring task has ended"
        rewards = {unirl.NAME: [status]}  # UniRL looks here for the rewards that are served
        return web.json_response({"status": status, "rewards": rewards}, status=200 if status == "ok" else 503)

    async def metrics(self, request):
        """GET /metrics, in Prometheus' text form."""
        lines = [f'descore_requests_total{{code="{key[1]}"}} {n}' for key, n in self.count.items() if key[0] == "code"]
        for word in ("scored", "failed"):
            lines.append(f'descore_videos_total{{outcome="{word}"}} {self.count["videos", word]}')
        lines += [f"descore_batches_total {self.count['batches']}", f"descore_scoring_seconds_total {self.seconds:.3f}",
                  f"descore_decoding_videos {len(self.decoding)}", f"descore_waiting_videos {self.queue.qsize()}"]
        return web.Response(text="\n".join(lines) + "\n")

    async def run_beside(self, app):
        """The scoring task lives as long as the app."""
        self.task = asyncio.create_task(self.score_waiting())
        yield
        self.task.cancel()
        for pool in (self.decoders, self.scorer):
            pool.shutdown(wait=False, cancel_futures=True)
        decoder.end_all()  # or the end would wait for the files that they are at


def message_of(error: Exception) -> str:
    """One sentence for the client. What is not the client's fault goes to the log with its traceback."""
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exception(error)
    return f"the server failed: {type(error).__name__}: {first_line(error)}"


def make_app(model: DeScore, s: Settings, token: str = ""):
    """The aiohttp application. token: what `Authorization: Bearer ...` must hold, everywhere but at /health."""
    server = RewardServer(model, s)

    @web.middleware
    async def guard(request, handler):
        """Around every request: asks for the token, turns every failure into JSON, counts the answer."""
        given = request.headers.get("Authorization", "")
        if token and request.path != "/health" and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
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

    app = web.Application(middlewares=[guard], client_max_size=int(s.max_mb * 1e6))
    app.add_routes([web.post("/compute", server.compute), web.post("/score", server.score_for_unirl),
                    web.get("/health", server.health), web.get("/metrics", server.metrics)])
    app.cleanup_ctx.append(server.run_beside)
    return app


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
    if web is None:
        raise InputError("lab.serve needs aiohttp: pip install -r requirements-serve.txt.")
    token = os.environ.get("DESCORE_TOKEN", "")
    if not is_loopback(s.host) and not token:
        raise InputError(f"--host {s.host}: others could reach it; set DESCORE_TOKEN, the token that they must send.")
    listener = socket.socket(socket.AF_INET6 if ":" in s.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((s.host, s.port))
    except OSError as error:
        raise InputError(f"--host {s.host} --port {s.port}: cannot be listened on ({error.strerror}).") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = s.dtype if s.dtype != "auto" else {"cuda": "bfloat16", "cpu": "float32"}[device]
    model = DeScore.from_pretrained(s.model, device, getattr(torch, dtype)).eval()
    if s.normalize and not model.settings.get("reward_std"):
        raise InputError(f"--normalize: {s.model} holds no reward_mean and reward_std; train it with this code.")
    app = make_app(model, s, token)
    listener.listen(128)  # before it is said; whoever comes before the loop runs waits in line
    print(f"http://{s.host}:{listener.getsockname()[1]}/compute answers now", flush=True)
    web.run_app(app, sock=listener, print=None, handler_cancellation=True,  # a client that left is not scored
                shutdown_timeout=3.0)  # Ctrl-C: what is answered by then


if __name__ == "__main__":
    cli(main)
