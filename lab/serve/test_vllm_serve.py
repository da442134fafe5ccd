"""The server and `DeScore.reward` thinking by the real vLLM engine. Its CPU build is enough."""

import base64
import json
import os

import pytest

from model import DeScore
from rollout import decode_cot
from tests.test_vllm_engine import run_script

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vllm is not installed; pip install -r requirements-vllm.txt")
pytest.importorskip("aiohttp", reason="aiohttp is not installed; pip install -r requirements-serve.txt")

SCRIPT = """
import asyncio, json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")
import parallel
from lab.serve.test_serve import post, served
from lab.serve.test_scoring import health_of, metrics_of
from model import DeScore
from rollout import make_engine
path, calls = sys.argv[1], json.load(open(sys.argv[2]))
model = DeScore.from_pretrained(path)
engine = make_engine("vllm", path, model.processor, parallel.start(0), max_model_len=512, sleeps=False)
report, most, step = {}, [0], engine.step

def noting():
    most[0] = max(most[0], len(engine.under_way))
    return step()

engine.step = noting

async def everything(session, url):
    send = lambda call: post(session, url, call)
    report["answers"] = await asyncio.gather(*map(send, calls))
    report["together"] = most[0]
    report["metrics"] = await metrics_of(session, url)
    good = calls[0]
    five = {"prompt": [good["prompt"]] * 5, "video": [good["video"]] * 5, "thoughts": True}
    five["video"][2], five["prompt"][4] = "AAAA", "word " * 900  # no video; no room for it in the engine
    report["five"] = await send(five)
    leaving = asyncio.create_task(send(good))
    while not engine.under_way:
        await asyncio.sleep(0.002)
    leaving.cancel()
    while engine.under_way:
        await asyncio.sleep(0.002)
    report["unfinished"] = engine.llm.llm_engine.get_num_unfinished_requests()
    report["after"] = await send(good)
    report["healthy"] = await health_of(session, url)
    models = []
    engine.llm.collective_rpc(lambda worker: models.append(worker.model_runner.get_model()))
    del models[0].language_model.model.layers[0].mlp  # as a broken GPU would: the next step raises
    report["dead"] = await asyncio.gather(*map(send, calls[:3]))
    report["unhealthy"] = await health_of(session, url)

served(model, everything, joins=engine, engine="vllm", think=True, max_new_tokens=16)
print("REPORT" + json.dumps(report))
"""


def test_the_server_thinks_by_vllm_as_by_transformers(tiny_model_dir, tiny_clips, tmp_path):
    """15 at once, every fifth bad; five in one request, two of them bad; one that leaves; at last, the engine's end."""
    model, prompts = DeScore.from_pretrained(tiny_model_dir), [f"a red circle, number {k}" for k in range(15)]
    paths = [os.path.abspath(tiny_clips[k % 4]) for k in range(15)]
    prefixes = model.encode(paths, prompts)
    cots = model.think(prefixes, 16)
    rewards, texts = model.score(prefixes, cots), [decode_cot(model.processor.tokenizer, cot) for cot in cots]
    calls = [{"prompt": prompt, "video": base64.b64encode(open(path, "rb").read()).decode(), "thoughts": True}
             for path, prompt in zip(paths, prompts)]
    for call in calls[4::5]:
        call["video"] = call["video"][:400]
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    report = run_script(SCRIPT, tiny_model_dir, tmp_path / "calls.json")
    for k, (status, body) in enumerate(report["answers"]):
        assert status == 200
        if k % 5 == 4:
            assert body["results"] == [None] and "the video" in body["error"]
        else:
            assert body["thoughts"] == [texts[k]] and body["rewards"] == [pytest.approx(rewards[k].item(), abs=1e-3)]
    assert report["together"] > 4, "requests that come together must be in the engine's batch together"
    assert report["metrics"]["descore_cot_tokens_total"] == sum(len(cots[k]) for k in range(15) if k % 5 != 4)
    status, body = report["five"]
    assert status == 200 and [result is None for result in body["results"]] == [False, False, True, False, True]
    assert "no mp4" in body["errors"][2] and "--engine-max-len" in body["errors"][4]
    assert report["unfinished"] == 0 and report["after"][1]["thoughts"] == [texts[0]]
    assert report["healthy"] == [200, "ok"] and report["unhealthy"][0] == 503
    for status, body in report["dead"]:
        assert status == 200 and body["results"] == [None] and "the engine has ended" in body["error"]


IN_PYTHON = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")
import parallel
from model import DeScore
from plumbing.settings import InputError
from rollout import make_engine
path, clips = sys.argv[1], sys.argv[2:]
model, prompts = DeScore.from_pretrained(path), ["a red circle", "a blue square", "a red circle rises"]
prefixes = model.encode(clips, prompts)
engine = make_engine("vllm", path, model.processor, parallel.start(0), max_model_len=512)
report = {"theirs": model.think(prefixes, 16), "ours": model.think(prefixes, 16, engine=engine)}
for name, more in (("rewards", {}), ("by_vllm", {"engine": engine})):
    rewards, texts = model.reward(clips, prompts, max_new_tokens=16, with_thoughts=True, **more)
    report[name] = rewards.tolist(), texts
several = model.think(prefixes[:2], 16, 1.0, thoughts=3, engine=engine)
report["several"] = [[len(row), len(set(map(tuple, row)))] for row in several]
try:
    model.reward(clips, prompts[:2] + ["word " * 900], max_new_tokens=16, engine=engine)
except InputError as error:
    report["refused"] = str(error)
report["left"] = engine.llm.llm_engine.get_num_unfinished_requests()
report["again"] = model.reward(clips, prompts, max_new_tokens=16, engine=engine).tolist()
print("REPORT" + json.dumps(report))
"""


def test_the_python_call_takes_an_engine(tiny_model_dir, tiny_clips):
    report = run_script(IN_PYTHON, tiny_model_dir, *map(os.path.abspath, tiny_clips[:3]))
    assert report["ours"] == report["theirs"] and report["by_vllm"][1] == report["rewards"][1]
    assert report["by_vllm"][0] == pytest.approx(report["rewards"][0], abs=1e-3)
    assert report["several"] == [[3, 3], [3, 3]]
    assert "--engine-max-len" in report["refused"] and report["left"] == 0  # nothing of it runs on beside the next call
    assert report["again"] == pytest.approx(report["rewards"][0], abs=1e-3)


def test_a_video_on_the_command_line(tiny_model_dir, tiny_clips):
    """evaluate.py --video thinks by vLLM, too: greedy, so it says what transformers says."""
    import re

    from tests.conftest import run

    flags = ["--model", tiny_model_dir, "--video", os.path.abspath(tiny_clips[0]), "--prompt", "a red circle",
             "--max-new-tokens", 8]
    printed = [re.findall(r"^(.*)\nreward (\S+)", run("evaluate.py", *flags, "--engine", engine, env={
        "TORCHDYNAMO_DISABLE": "1"}).stdout, re.MULTILINE) for engine in ("transformers", "vllm")]
    ((ours, reward),), ((theirs, other),) = printed
    assert ours == theirs and float(reward) == pytest.approx(float(other), abs=1e-3)
