"""Each client against the real server (or model), called as its trainer calls it; a failure never becomes a number."""

import asyncio
import base64
import concurrent.futures
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("aiohttp", reason="aiohttp is not installed; pip install -r requirements-serve.txt")
import toy.world  # noqa: E402
from lab.clients import dance_grpo, flow_grpo, over_http, unirl  # noqa: E402
from lab.serve.test_serve import served  # noqa: E402
from model import DeScore  # noqa: E402
from plumbing.settings import InputError  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def scorer(tiny_model_dir):
    return DeScore.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def url(tiny_model_dir):
    """A server as a user starts it; Ctrl-C ends it."""
    command = [sys.executable, "-m", "lab.serve", "--model", tiny_model_dir, "--no-think", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().split("/compute")[0]
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=30) == 0
        finally:
            server.kill()


@pytest.fixture
def environment(url, monkeypatch):
    monkeypatch.setenv("DESCORE_URL", url)
    monkeypatch.delenv("DESCORE_TOKEN", raising=False)


@pytest.fixture(scope="module")
def clips(tiny_clips):
    return sorted(set(tiny_clips))[:3]


def read(path):
    with open(path, "rb") as file:
        return file.read()


def test_over_http(environment, scorer, clips, monkeypatch):
    wanted = scorer.reward(clips, [PROMPT] * 3, think=False).tolist()
    assert over_http.rewards_of([read(clip) for clip in clips], (PROMPT,) * 3) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(RuntimeError, match="1 of 2 clips have no reward; 0: the video is empty or no mp4"):
        over_http.rewards_of([b"junk", read(clips[0])], [PROMPT] * 2)
    with pytest.raises(RuntimeError, match="400 .*2 prompts, 1 videos"):  # about the whole request
        over_http.rewards_of([read(clips[0])], [PROMPT] * 2)
    monkeypatch.setenv("DESCORE_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError):
        over_http.rewards_of([read(clips[0])], [PROMPT])


def test_the_token_is_sent(scorer, clips, monkeypatch):
    monkeypatch.setenv("DESCORE_TOKEN", "secret")

    async def ask(session, url):
        def both():
            good = over_http.rewards_of([read(clips[0])], [PROMPT], url=f"{url}/")
            with pytest.raises(RuntimeError, match="401 .*Authorization"):
                over_http.rewards_of([read(clips[0])], [PROMPT], url=url, token="wrong")
            return good

        return await asyncio.to_thread(both)

    assert len(served(scorer, ask, token="secret")) == 1


def test_a_cot_that_was_cut_off_is_a_warning(monkeypatch):
    answer = {"results": [1.0, 2.0, None], "errors": [None, None, "broken"], "ended": [True, False, None]}
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **more: io.BytesIO(json.dumps(answer).encode()))
    for ask in (lambda: over_http.rewards_of([b""] * 3, [PROMPT] * 3), lambda: unirl.reply_of(answer)):
        with pytest.warns(UserWarning, match="1 of 3 clips have a CoT that was cut off"):
            ask()


# ---- flow_grpo ------------------------------------------------------------------------------------------------
def multi_score(videos, prompts, weights):
    """What flow_grpo does with its scorers: built by the name of an argument, called in a thread, summed, a tensor."""
    functions = {"descore": flow_grpo.descore_score}
    scorers = {name: functions[name](torch.device("cpu")) for name in weights
               if "device" in functions[name].__code__.co_varnames}

    def score():
        details = {}
        for name, weight in weights.items():
            scores, _ = scorers[name](videos, prompts, [{}] * len(prompts))
            details[name], details["avg"] = scores, [weight * score for score in scores]
        return details

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return {name: torch.as_tensor(value).float() for name, value in pool.submit(score).result().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flow_grpo(environment, scorer, dtype):
    videos, prompts = torch.rand(2, 17, 3, 32, 48).to(dtype), (PROMPT, "a blue square")
    found = multi_score(videos, prompts, {"descore": 0.5})
    frames = [(v.float().permute(0, 2, 3, 1) * 255).round().byte() for v in videos]
    wanted = scorer.reward(frames, prompts, think=False, source_fps=16.0)
    assert torch.allclose(found["descore"], wanted, atol=1e-4) and torch.allclose(found["avg"], wanted / 2, atol=1e-4)
    slow = flow_grpo.descore_score("cpu", fps=8.0)(videos, prompts, None)[0]
    assert slow != pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("change, says", [
    (lambda v: v * 2 - 1, r"from -.* \(N, F, 3, H, W\) in \[0, 1\]"), (lambda v: v * 255, r"in \[0, 1\]"),
    (lambda v: v.fill_(torch.nan), r"from nan"), (lambda v: v.transpose(1, 2), "of shape"),
])
def test_flow_grpo_refuses_other_frames(change, says):
    """A VAE's -1..1, 0..255, nan, channels first: each would be clipped to some picture, and get a plausible reward."""
    with pytest.raises(ValueError, match=says):
        multi_score(change(torch.rand(1, 4, 3, 32, 32)), [PROMPT], {"descore": 1.0})


def test_flow_grpo_s_failures_end_the_run(environment):
    with pytest.raises(RuntimeError, match="1 of 2 clips have no reward; 1: the prompt is empty"):
        multi_score(torch.rand(2, 4, 3, 32, 32), [PROMPT, " "], {"descore": 1.0})


# ---- Flow-Factory ---------------------------------------------------------------------------------------------
def flow_factory(url, videos, prompts):
    """What its RemotePointwiseRewardModel sends, and what it makes of the reply: a list of PIL frames for each clip."""
    def text(image):
        file = io.BytesIO()
        image.save(file, format="PNG")
        return base64.b64encode(file.getvalue()).decode()

    payload = {"prompt": prompts, "image": None, "video": [[text(image) for image in video] for video in videos],
               "condition_images": None, "condition_videos": None, "kwargs": None}
    status, data = post(f"{url}/compute", payload)
    assert status == 200
    if data.get("error"):
        raise RuntimeError(f"Server error: {data['error']}")
    return torch.tensor(data["rewards"], dtype=torch.float32)


def post(where, payload):
    request = urllib.request.Request(where, json.dumps(payload).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_flow_factory(url, scorer):
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 32, 3), dtype=np.uint8)
    images = [[Image.fromarray(frame) for frame in video] for video in frames]
    wanted = scorer.reward(list(frames), [PROMPT] * 2, think=False, source_fps=16.0)
    assert torch.allclose(flow_factory(url, images, [PROMPT] * 2), wanted, atol=1e-4)
    images[1][0] = Image.fromarray(frames[0, 0]).resize((16, 16))
    with pytest.raises(RuntimeError, match="1 of 2 failed"):
        flow_factory(url, images, [PROMPT] * 2)


# ---- UniRL ----------------------------------------------------------------------------------------------------
def score_request(clip, prompt, **more):
    turn = {"text": prompt, "video_b64": base64.b64encode(clip).decode()}
    identity = {"request_id": "1", "sample_id": "1", "group_id": "0", "source_rank": None, "policy_version": None,
                "scorer_version": None, "idempotency_key": "0"}
    return {"history": [turn], "required_rewards": ["descore"], "metadata": None, **identity, **more}


def rewards_and_failures(url, requests):
    """How UniRL's RemoteRewardBackend reads a reply: (reward, why it failed) of each."""
    status, raw = post(f"{url}/score", {"protocol_version": "1", "requests": requests})
    assert status == 200 and raw.get("protocol_version") in (None, "1") and not raw.get("identities")
    assert len(raw["results"]) == len(raw["errors"]) == len(requests)
    found = []
    for result, errors in zip(raw["results"], raw["errors"]):
        values = list(result.get("descore", {}).values())
        assert all(isinstance(value, float) and np.isfinite(value) for value in values)
        found.append((values[0], None) if values else (None, errors["descore"]))
    return found


def test_unirl(url, scorer, clips, tmp_path):
    """Its clips are (C, T, H, W) floats, written to an mp4 at `video_fps`."""
    pixels = toy.world.render_clip(toy.world.random_clip(np.random.default_rng(0), toy.world.random_wish(
        np.random.default_rng(1))), np.random.default_rng(2), np.arange(16) / 8)
    path = str(tmp_path / "clip.mp4")
    toy.world.write_mp4(path, pixels, 8)
    wanted = scorer.reward([path, clips[0]], [PROMPT, "a dog"], think=False).tolist()
    sent = [score_request(read(path), PROMPT), score_request(b"junk", PROMPT), score_request(read(clips[0]), "a dog"),
            score_request(read(path), " ")]
    found = rewards_and_failures(url, sent)
    assert [reward for reward, _ in found[::2]] == pytest.approx(wanted, abs=1e-4)
    assert found[1][0] is None and "no mp4" in found[1][1] and found[3][0] is None and "prompt is empty" in found[3][1]
    with urllib.request.urlopen(f"{url}/health") as reply:  # what is_available() wants
        health = json.load(reply)
    assert isinstance(health["rewards"], dict) and "descore" in health["rewards"]


def test_unirl_refuses_what_it_cannot_score(url, clips):
    """With 4xx, which UniRL raises at once; anything from 500 on it tries three times."""
    good = score_request(read(clips[0]), PROMPT)
    for requests, says in (
        ([{**good, "required_rewards": ["pickscore"]}], "descore is served, and nothing else"),
        ([{**good, "history": [{"text": PROMPT, "image_b64": "AAAA"}]}], "images are not scored"),
        ([{**good, "history": [{"text": PROMPT, "video_path": clips[0]}]}], "no path of a client is opened"),
        ([{**good, "history": []}], "the body must be"), ("x", "the body must be"), ([7], "the body must be"),
    ):
        status, body = post(f"{url}/score", {"requests": requests})
        assert status == 400 and says in body["error"] and "results" not in body
    for body in (b"", b"[]", b"[" * 100_000, b'{"requests": {}}'):
        with pytest.raises(InputError):
            unirl.fields_of(body)


# ---- DanceGRPO ------------------------------------------------------------------------------------------------
def dance_rewards(inferencer, paths, prompts):
    """What DanceGRPO does, clip by clip: what it catches becomes -1."""
    rewards = []
    for path, prompt in zip(paths, prompts):
        try:
            with torch.no_grad():
                reward = inferencer.reward([os.path.abspath(path)], [prompt], use_norm=True)
            pair = torch.tensor(reward[0]["VQ"]), torch.tensor(reward[0]["MQ"])
        except Exception:
            pair = torch.tensor(-1.0), torch.tensor(-1.0)
        rewards.append(torch.stack(pair))
    return torch.stack(rewards)


@pytest.mark.parametrize("where", ["in process", "over HTTP"])
def test_dance_grpo(where, environment, url, tiny_model_dir, scorer, clips, tmp_path):
    load = tiny_model_dir if where == "in process" else url
    inferencer = dance_grpo.DeScoreInference(load, device="cpu", dtype=torch.float32, think=False)
    wanted = scorer.reward(clips, [PROMPT] * 3, think=False)
    found = dance_rewards(inferencer, clips, [PROMPT] * 3)
    assert found.dtype == torch.float32 and torch.allclose(found, wanted[:, None].expand(3, 2), atol=1e-4)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for bad in (tmp_path / "bad.mp4", tmp_path / "none.mp4"):
        with pytest.raises(SystemExit, match=f"DeScore: no reward for .*{bad.name}: "):
            dance_rewards(inferencer, [clips[0], str(bad)], [PROMPT] * 2)


def test_dance_grpo_stops_at_a_reward_that_is_not_finite(tiny_model_dir, clips):
    inferencer = dance_grpo.DeScoreInference(tiny_model_dir, device="cpu", think=False)
    inferencer.model.head.weight.data.fill_(torch.nan)
    with pytest.raises(SystemExit, match="not finite"):
        dance_rewards(inferencer, clips[:1], [PROMPT])
