"""The reward server over a real socket: many clients at once, bad uploads among them, nothing lost or made up."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

MISSING = "aiohttp is not installed; pip install -r requirements-serve.txt"
aiohttp = pytest.importorskip("aiohttp", reason=MISSING)
from aiohttp import web  # noqa: E402

import evaluate  # noqa: E402
from lab.serve import __main__ as serve  # noqa: E402
from lab.serve import scoring, uploads  # noqa: E402
from model import DeScore  # noqa: E402
from plumbing import video  # noqa: E402
from plumbing.settings import InputError  # noqa: E402
from rollout import TransformersEngine  # noqa: E402
from tests import clips as made  # noqa: E402
from tests.conftest import ROOT, refuses, write_csv  # noqa: E402

PROMPT = "a red circle moves left"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n"


@pytest.fixture(scope="module")
def scorer(tiny_model_dir):
    return DeScore.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module")
def clips(tiny_clips):
    """{path: bytes} of a few clips."""
    return {path: open(path, "rb").read() for path in sorted(set(tiny_clips))[:4]}


def b64(raw):
    return base64.b64encode(raw).decode()


def served(scorer, client, token="", joins=None, **flags):
    """Runs `client(session, url)` against a server on a free port. Returns what it returns. joins: an engine."""
    settings, engine = serve.Settings(model="-", **{"think": False, "max_mb": 1.0, "timeout": 120.0, **flags}), joins
    if settings.think and not joins:
        engine = TransformersEngine(scorer.backbone, scorer.processor, shared=True)

    async def both():
        app = serve.make_app(serve.RewardServer(scorer, settings, engine), token)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                return await client(session, url)
        finally:
            await runner.cleanup()

    return asyncio.run(both())


async def post(session, url, payload=None, **more):
    """(status, body) of POST /compute."""
    async with session.post(f"{url}/compute", json=payload, **more) as response:
        return response.status, await response.json()


def multipart(pairs):
    form = aiohttp.FormData()
    for prompt, raw in pairs:
        form.add_field("prompt", prompt)
        form.add_field("video", raw, filename="../../etc/passwd")  # a client's name is never used
    return form


def test_200_requests_at_once_and_none_is_lost(scorer, clips, tmp_path, monkeypatch):
    """Every fifth is bad, in one of eight ways. All get their own answer; the good ones the reward they'd get alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths = list(clips)
    rewards = dict(zip(paths, scorer.reward(paths, [PROMPT] * len(paths), think=False).tolist()))
    truncated = next(iter(clips.values()))[:400]
    bad = [
        ({"prompt": PROMPT, "video": "no base64!"}, 200, "no base64"),
        ({"prompt": PROMPT, "video": ""}, 200, "empty or no mp4"),
        ({"prompt": PROMPT, "video": b64(PLAYLIST)}, 200, "empty or no mp4"),
        ({"prompt": PROMPT, "video": b64(truncated)}, 200, "broken or not a video"),
        ({"prompt": "  ", "video": b64(next(iter(clips.values())))}, 200, "prompt is empty"),
        ({"prompt": [PROMPT], "video": []}, 400, "1 prompts, 0 videos"),
        ({"prompt": PROMPT, "video": "A" * 1_500_000}, 413, "exceeded"),
        ([1, 2], 400, "must be an object"),
    ]

    async def load(session, url):
        calls = []
        for k in range(200):
            raw = clips[paths[k % len(paths)]]
            if k % 5 == 4:
                calls.append(post(session, url, bad[k // 5 % len(bad)][0]))
            elif k % 2:
                calls.append(post(session, url, data=multipart([(PROMPT, raw)])))
            else:
                calls.append(post(session, url, {"prompt": PROMPT, "video": b64(raw)}))
        answers = await asyncio.gather(*calls)
        async with session.get(f"{url}/metrics") as response:
            return answers, await response.text()

    answers, metrics = served(scorer, load)
    assert len(answers) == 200
    for k, (status, body) in enumerate(answers):
        if k % 5 == 4:
            _, wanted, says = bad[k // 5 % len(bad)]
            assert status == wanted and says in body["error"], (k, status, body)
            assert "rewards" not in body and body.get("results", [None]) == [None], body
        else:
            assert status == 200 and body["errors"] == [None] and body["rewards"] == body["results"], body
            assert body["results"][0] == pytest.approx(rewards[paths[k % len(paths)]], abs=1e-4)
    assert 'descore_videos_total{outcome="scored"} 160' in metrics
    assert 'descore_videos_total{outcome="failed"} 25' in metrics and "descore_waiting_videos 0" in metrics
    batches = int(re.search(r"descore_batches_total (\d+)", metrics).group(1))
    assert 165 / 16 <= batches < 80, batches  # 165 were opened: those that waited were scored together
    assert not list(tmp_path.iterdir())  # no upload is left on disk


def test_a_batch_keeps_the_good_and_names_the_bad(scorer, clips):
    """In the order of the request; and with --think the CoT comes along when asked for."""
    good = next(iter(clips.values()))
    payload = {"prompt": [PROMPT, PROMPT, PROMPT], "video": [b64(good), b64(b"junk"), b64(good)], "thoughts": True}
    status, body = served(scorer, lambda *at: post(*at, payload), think=True, max_new_tokens=4)
    assert status == 200 and body["results"][1] is None
    assert body["results"][0] == pytest.approx(body["results"][2], abs=1e-4)  # a row beside others: other sums
    assert body["errors"][0] is None and "no mp4" in body["errors"][1] and "1 of 3 failed" in body["error"]
    assert isinstance(body["thoughts"][0], str) and body["thoughts"][1] is None and "rewards" not in body


def test_frames_as_images_get_the_reward_of_the_same_frames_in_memory(scorer):
    """What Flow-Factory sends: a list of PNGs for each video; and the answer in the key it reads."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 40, 64, 3), dtype=np.uint8)
    wanted = scorer.reward([frames], [PROMPT], think=False, source_fps=8.0).tolist()
    images = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, format="PNG")
        images.append(b64(file.getvalue()))
    theirs = {"prompt": [PROMPT], "image": None, "video": [images], "condition_images": None, "kwargs": None}
    status, body = served(scorer, lambda *at: post(*at, theirs), source_fps=8.0)
    assert status == 200 and body["rewards"] == pytest.approx(wanted, abs=1e-5)
    broken = {**theirs, "video": [images[:4] + ["AAAA"] * 16]}
    status, body = served(scorer, lambda *at: post(*at, broken), source_fps=8.0)
    assert body["results"] == [None] and "no PNG or JPEG" in body["error"]
    half = {**theirs, "video": [images], "fps": 4.0}  # the request's own rate counts: twice as many frames are sampled
    assert served(scorer, lambda *at: post(*at, half))[1]["rewards"] != pytest.approx(wanted, abs=1e-5)


def test_one_that_breaks_the_model_costs_the_others_of_its_batch_nothing(scorer, clips):
    """Half a character passes JSON and no tokenizer; an endless prompt is seen in the batch; nan is an error, too."""
    good = b64(next(iter(clips.values())))
    payload = {"prompt": [PROMPT, "\ud800", PROMPT, "a " * 50_000], "video": [good] * 4}
    body = served(scorer, lambda *at: post(*at, data=json.dumps(payload)))[1]
    assert [r is None for r in body["results"]] == [False, True, False, True]
    assert "half a character" in body["errors"][1] and "tokens; at most" in body["errors"][3]
    whole = scorer.head.weight.data.clone()
    scorer.head.weight.data.fill_(torch.nan)
    try:
        body = served(scorer, lambda *at: post(*at, {"prompt": PROMPT, "video": good}))[1]
    finally:
        scorer.head.weight.data.copy_(whole)
    assert body["results"] == [None] and "not finite" in body["error"]


def test_limits_of_time_length_and_number(scorer, clips):
    good = b64(next(iter(clips.values())))
    one = {"prompt": PROMPT, "video": good}
    status, body = served(scorer, lambda *at: post(*at, one), timeout=0.05, wait_ms=500.0)
    assert status == 504 and "--timeout" in body["error"] and "results" not in body
    body = served(scorer, lambda *at: post(*at, one), max_seconds=0.1)[1]
    assert body["results"] == [None] and "at most 0.1" in body["error"]
    status, body = served(scorer, lambda *at: post(*at, {"prompt": [PROMPT] * 3, "video": [good] * 3}), max_videos=2)
    assert status == 400 and "at most 2" in body["error"]
    for fps in (-1, 0, True, "x", 1e9, 10**400):
        with pytest.raises(InputError, match="`fps`"):
            uploads.check_fields({"prompt": [PROMPT], "video": [good], "fps": fps}, 64, 16.0)
    ended = {"prompt": [f" {PROMPT}\r\n"], "video": [good]}  # sampled CoTs take their random numbers from the prompt
    assert uploads.check_fields(ended, 64, 16.0)[0] == [PROMPT]
    for digits, says in ((400, "`fps` must be"), (5000, "no JSON")):  # Python reads no integer of over 4,300
        text = json.dumps({**one, "fps": 0})[:-2] + "9" * digits + "}"
        status, body = served(scorer, lambda *at, text=text: post(*at, data=text))
        assert status == 400 and says in body["error"] and "results" not in body
    status, body = served(scorer, lambda *at: post(*at, data=b"--x\r\nbroken", headers={
        "Content-Type": "multipart/form-data; boundary=x"}))
    assert status == 400 and body["error"]


def test_line_ends_around_a_prompt_change_no_reward_anywhere(scorer, tiny_model_dir, clips, tmp_path, capsys):
    """The Python call, both forms of HTTP, --prompt and a CSV."""
    (path, raw), (other, _), *_ = clips.items()
    wanted = scorer.reward([path], [PROMPT], think=False).item()
    ended, found = f" {PROMPT}\r\n", {}
    found["Python"] = scorer.reward([path], [ended], think=False).item()
    for name, sent in (("json", {"payload": {"prompt": ended, "video": b64(raw)}}), ("form", {"data": [(ended, raw)]})):
        sent = {key: multipart(value) if key == "data" else value for key, value in sent.items()}
        found[name] = served(scorer, lambda *at, sent=sent: post(*at, **sent))[1]["results"][0]
    flags = ["--model", tiny_model_dir, "--no-think"]
    evaluate.main([*flags, "--video", path, "--prompt", ended])
    found["--prompt"] = float(re.search(r"^reward (\S+)", capsys.readouterr().out, re.MULTILINE).group(1))
    csv = write_csv(tmp_path / "x.csv", ["path_A", "path_B", "prompt", "TA"], [[path, other, ended, "A"]])
    evaluate.main([*flags, "--data", csv, "--out", str(tmp_path / "out")])
    lines = [json.loads(line) for file in (tmp_path / "out").glob("rewards*.jsonl") for line in open(file)]
    (found["CSV"],) = (line["reward"] for line in lines if os.path.samefile(line["video"], path))
    assert found == {name: pytest.approx(wanted, abs=2e-4) for name in found}


def test_a_client_that_leaves_is_not_scored_and_the_next_one_is(scorer, clips):
    payload = {"prompt": PROMPT, "video": b64(next(iter(clips.values())))}

    async def client(session, url):
        leaving = asyncio.create_task(post(session, url, payload))
        await asyncio.sleep(0.3)
        leaving.cancel()
        await asyncio.sleep(0.7)
        stays = await post(session, url, payload)
        async with session.get(f"{url}/metrics") as response:
            return stays, await response.text()

    (status, body), metrics = served(scorer, client, wait_ms=600.0)
    assert status == 200 and body["errors"] == [None] and "descore_batches_total 1" in metrics, metrics


def test_health_and_token(scorer, clips):
    payload = {"prompt": PROMPT, "video": b64(next(iter(clips.values())))}

    async def client(session, url):
        async with session.get(f"{url}/health") as response:
            health = response.status, await response.json()
        async with session.get(f"{url}/metrics") as response:
            metrics = response.status
        async with session.get(f"{url}/other", headers={"Authorization": "Bearer secret"}) as response:
            other = response.status, await response.json()
        answers = [await post(session, url, payload, headers={"Authorization": given})
                   for given in ("", "Bearer secreT", "Bearer secre", "Bearer secret2", "secret", "Bearer secret")]
        return health, metrics, other, answers

    async def bytes_(session, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"GET /metrics HTTP/1.0\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        return await reader.read()

    assert b" 401 " in served(scorer, bytes_, token="secret").splitlines()[0]  # no text, but bytes
    health, metrics, other, answers = served(scorer, client, token="secret")
    assert health == (200, {"status": "ok", "rewards": {"descore": ["ok"]}})
    assert metrics == 401 and other[0] == 404 and "error" in other[1]
    assert [status for status, _ in answers] == [401, 401, 401, 401, 401, 200]
    assert "results" not in answers[0][1] and answers[5][1]["errors"] == [None]


def test_no_file_of_the_server_is_opened(tmp_path):
    """A path is no upload: not as JSON, not as a file name, not inside a playlist."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    for upload in (str(secret), f"file://{secret}", None, 7, {"path": str(secret)}):
        with pytest.raises(InputError, match="no base64"):
            uploads.decode_base64(upload)
    with pytest.raises(InputError, match="no mp4"):
        uploads.open_file(PLAYLIST, 2.0, 448 * 448, 60.0)
    with pytest.raises(InputError) as error:
        uploads.open_file(b"\0\0\0\x18ftypisom" + b"\0" * 99, 2.0, 448 * 448, 60.0)
    assert tempfile.gettempdir() not in str(error.value)  # nor is a path of the server told


def refused(port):
    """True if a second server cannot take this port."""
    with socket.socket() as second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            second.bind(("127.0.0.1", port))
            second.listen()
        except OSError:
            return True
    return False


def test_bad_flags(capsys, monkeypatch, tiny_model_dir):
    monkeypatch.delenv("DESCORE_TOKEN", raising=False)
    refuses(capsys, serve.main, says="--model is missing")
    refuses(capsys, serve.main, "--model", tiny_model_dir, "--port", "70000", says="--port 70000")
    refuses(capsys, serve.main, "--model", tiny_model_dir, "--host", "0.0.0.0", says="DESCORE_TOKEN")
    refuses(capsys, serve.main, "--model", tiny_model_dir, "--host", "example.invalid", says="DESCORE_TOKEN")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refuses(capsys, serve.main, "--model", tiny_model_dir, "--port", port, says=f"--port {port}: cannot be")
    with monkeypatch.context() as here:  # before a server loads its model, no second one can take its port
        here.setattr(serve.parallel, "start", lambda **_: sys.exit(f"refused: {refused(port)}"))
        with pytest.raises(SystemExit, match="refused: True"):
            serve.main(["--model", tiny_model_dir, "--port", str(port)])
    refuses(capsys, serve.main, "--model", tiny_model_dir, "--engine-tp", "2", says="--engine-tp: the server is one")
    refuses(capsys, serve.main, "--model", "nowhere", "--port", "0", says="nowhere")
    refuses(capsys, serve.main, "--model", tiny_model_dir, "--port", "0", "--normalize", says="--normalize")
    assert not any(map(serve.is_loopback, ("::", "0.0.0.0", "192.168.0.1", "a.example")))
    assert serve.is_loopback("127.0.0.1") and serve.is_loopback("::1") and serve.is_loopback("localhost")
    monkeypatch.setattr(serve, "web", None)
    refuses(capsys, serve.main, "--model", tiny_model_dir, says="requirements-serve.txt")


# -- a decoder that does not come back ------------------------------------------------------------------------------
def test_files_that_are_never_decoded_cost_the_others_nothing(scorer, clips, monkeypatch):
    """More of them than there are decoders: each gets its sentence, and the good ones behind them their rewards."""
    monkeypatch.setattr(video, "read_header", made.sleeps)
    good = next(iter(clips.values()))
    payload = {"prompt": [PROMPT] * 8, "video": [b64(good + b"sleeps")] * 6 + [b64(good)] * 2}
    status, body = served(scorer, lambda *at: post(*at, payload), decode_seconds=3.0)
    assert status == 200 and [r is None for r in body["results"]] == [True] * 6 + [False] * 2, body
    assert all(error.startswith("the video: not decoded within 3 s") for error in body["errors"][:6])


def test_health_sees_that_nothing_can_be_opened(scorer, clips, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    async def ten(session, url):
        await post(session, url, {"prompt": [PROMPT] * 10, "video": [b64(next(iter(clips.values())))] * 10})
        async with session.get(f"{url}/health") as response:
            return response.status

    monkeypatch.setattr(serve, "open_file", full)
    assert served(scorer, ten) == 503


def test_health_sees_the_scorer_and_the_decoders(scorer):
    async def statuses():
        server = serve.RewardServer(scorer, serve.Settings(model="-"))
        found = []
        for since in (time.monotonic() - 45, time.monotonic() - 55):  # 20 s to open, 20 s to decode, 10 s to end both
            server.decoding = {1: since}
            found.append((await server.health(None)))
        server.decoding, server.scorer.under_way = {}, {"a video"}
        server.scorer.turned -= 601  # --timeout: by then all who wait have been told
        found.append(await server.health(None))
        server.scorer.under_way, server.scorer.failures = set(), 10
        found.append(await server.health(None))
        server.scorer.failures = 0
        server.scorer.stop("it has ended.")
        return [*found, await server.health(None)]

    answers = [(answer.status, json.loads(answer.text)["status"]) for answer in asyncio.run(statuses())]
    assert answers == [(200, "ok"), (503, "1 decoders stand still"),
                       (503, "the scoring thread has been at one step for 601 s"),
                       (503, "the last 10 videos failed by no fault of theirs: start the server again"),
                       (503, "it has ended.")]


# -- what the flags and the checkpoint say reaches the model ----------------------------------------------------------
def test_a_failed_batch_is_out_of_memory_before_its_videos_are_scored_alone(scorer, tiny_clips, monkeypatch):
    alive = []

    class Model:
        processor, unit = scorer.processor, scorer.unit

        def score(self, prefixes, cots):
            batch = torch.zeros(len(prefixes))
            assert not any(old() is not None for old in alive), "a failed batch's tensors still fill the memory"
            alive.append(weakref.ref(batch))
            if len(prefixes) > 1 or prefixes[0] == "bad":
                raise torch.OutOfMemoryError("too large")
            return torch.ones(1, 1)

    thread = scoring.Scorer(Model(), serve.Settings(model="-"))
    answers = thread.judge([scoring.Waiting(prefix, PROMPT) for prefix in ("a", "bad", "c")])
    assert answers[0] == answers[2] == (1.0, None, True) and "OutOfMemoryError: too large" in str(answers[1])
    assert len(alive) == 4


def test_the_checkpoint_s_fps_and_pixels_and_the_flags_are_used(scorer, clips, monkeypatch):
    raw = next(iter(clips.values()))
    monkeypatch.setattr(scorer, "settings", {**scorer.settings, "fps": 1.0, "max_pixels": 1024})
    scorer.settings.update(reward_mean=2.0, reward_std=4.0)
    engine = TransformersEngine(scorer.backbone, scorer.processor, shared=True)
    server = serve.RewardServer(scorer, serve.Settings(model="-", max_new_tokens=7, normalize=True, thoughts=2), engine)
    opened = server.open_video(raw, PROMPT, 16.0)
    assert opened["video"].frames.shape[:3] == (4, 32, 32) and opened["video"].source_fps == 1.0
    frame = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(frame, format="PNG")
    images = server.open_video([b64(frame.getvalue())] * 64, PROMPT, 16.0)
    assert images["video"].frames.shape[:3] == (4, 32, 32)
    ((reward, texts, ended),) = server.scorer.judge([waiting := scoring.Waiting(opened, PROMPT)])
    assert [len(cot) for cot in waiting.cots] == [7, 7] and texts[0] != texts[1]  # sampled
    assert not ended and "descore_cots_cut_total 2" in server.scorer.metrics()  # cut off at 7 tokens: it is told
    assert reward == pytest.approx((scorer.score([opened], [waiting.cots]).mean().item() - 2) / 4, abs=1e-5)


def test_images_have_limits(monkeypatch):
    def png(height, width):
        file = io.BytesIO()
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, format="PNG")
        return b64(file.getvalue())

    small, file = png(32, 32), io.BytesIO()
    Image.fromarray(np.full((32, 32), 60000, np.uint16)).save(file, format="PNG")
    deep = b64(file.getvalue())  # 16 bits
    assert len(uploads.open_images([small] * 16, 8.0, 2.0, 4096, 2.0).frames) == 4
    for images, says in (
        ([deep] * 8, "frame 0 has mode I;16"), ([small] * 17, "17 frames at 8 fps"), ([], "0 frames"),
        ([small] * 4 + [png(32, 64)] * 4, "frame 4 has"), ([png(8, 9000)] * 2, "at most 8192 a side"),
    ):
        with pytest.raises(InputError, match=says):
            uploads.open_images(images, 8.0, 2.0, 4096, 2.0)


def test_ctrl_c_ends_a_server_whose_decoder_does_not_come_back(tiny_model_dir, clips):
    script = ("from plumbing import settings, video; from tests import clips; video.read_header = clips.sleeps; "
              "from lab.serve.__main__ import main; import sys; settings.cli(lambda: main(sys.argv[1:]))")
    command = [sys.executable, "-c", script, "--model", tiny_model_dir, "--no-think", "--port", "0"]
    raw = b64(next(iter(clips.values())) + b"sleeps")

    async def leave_it_waiting(url):
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(post(session, url, {"prompt": PROMPT, "video": raw}))
            await asyncio.sleep(3.0)
            server.send_signal(signal.SIGINT)
            assert "the server is stopping" in (await task)[1]["error"]

    with subprocess.Popen([*command, "--decode-seconds", "300"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            asyncio.run(leave_it_waiting(server.stdout.readline().split("/compute")[0]))
            assert server.wait(timeout=50) == 0
        finally:
            server.kill()
