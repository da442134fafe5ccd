"""Asking an annotator that misbehaves: nothing twice, nothing lost, and no failure that becomes a verdict."""

import concurrent.futures
import csv
import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import data
import toy.world
from lab.road import __main__ as road
from lab.road import annotate, annotator
from rules import DIMENSIONS
from tests.conftest import ROOT, refuses

pytest.importorskip("openai", reason="openai is not installed; pip install -r requirements-road.txt")
RIGHT = {"subject": "2", "dynamics": "1", "camera": "0", "environment": "N/A", "style": "2"}


class Server(road.Annotator):
    """Answers RIGHT; `faults` are answers to come first: (status, headers, body), or seconds to sleep."""

    faults, requests = [], []

    def respond(self, request):
        self.requests.append(request)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, tuple):
            return fault
        time.sleep(fault or 0)
        return 200, {}, road.completion(json.dumps(RIGHT))


@pytest.fixture
def server():
    Server.faults, Server.requests = [], []
    running = road.serve(Server)
    yield running
    running.shutdown()


@pytest.fixture
def ask(server, tmp_path):
    """ask(flags) runs the script on three pairs of five videos; the first video is in two of them."""
    names = [f"{letter}.mp4" for letter in "abcdef"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 9)
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        rows = [["a.mp4", "b.mp4", "A dog.", "A"], ["a.mp4", "c.mp4", "A dog.", "B"],
                ["d.mp4", "e.mp4", "A cat.", "same"]]
        csv.writer(file).writerows([["path_A", "path_B", "prompt", "TA"], *rows])

    def run(*more):
        annotate.main([str(flag) for flag in (*run.flags, *more)])

    run.flags = ["--data", tmp_path / "pairs.csv", "--out", tmp_path / "rl.csv", "--model", "m", "--retries", 0,
                 "--workers", 1, "--base-url", f"http://127.0.0.1:{server.server_port}/v1"]
    return run


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "rl.csv.jsonl").read_text().splitlines()]


def test_each_video_is_asked_about_once_and_never_again(ask, tmp_path, capsys):
    ask()
    pairs = data.read_pairs(str(tmp_path / "rl.csv"))
    assert [pair.label for pair in pairs] == [1, -1, 0]
    assert all(truth == RIGHT for pair in pairs for truth in (pair.annotation_a, pair.annotation_b))
    assert len(Server.requests) == 5  # a, b, c, d, e: a stands in two pairs
    assert "tokens so far: 4500 of prompts, 200 of answers" in capsys.readouterr().out
    (tmp_path / "a.mp4").rename(tmp_path / "g.mp4")
    (tmp_path / "g.mp4").rename(tmp_path / "a.mp4")
    ask()
    assert len(Server.requests) == 5
    (tmp_path / "a.mp4").write_bytes(b"another clip under that name")
    ask()
    assert len(Server.requests) == 6
    ask("--model", "another")
    assert len(Server.requests) == 11


def test_the_key_is_all_that_decides_the_answer(tmp_path, monkeypatch):
    """Old verdicts must not answer a new question: of other words, another form, other frames, another clip."""
    (tmp_path / "a.mp4").write_bytes(b"a clip")
    (tmp_path / "moved.mp4").write_bytes(b"a clip")
    settings = annotate.Settings(model="m", send="frames")

    def key(video="a.mp4", prompt="A dog.", **more):
        return annotator.make_question(str(tmp_path / video), prompt, dataclasses.replace(settings, **more)).key

    first = key()
    assert first == key() == key("moved.mp4") == key(workers=3, retries=0, timeout=9.0)  # nothing of the question
    keys = [first, key(prompt="A cat."), key(model="n"), key(fps=1.0), key(max_pixels=1024), key(send="video")]
    assert key(send="video", fps=1.0) == keys[-1]  # there the server samples
    for name, other in (("CRITERIA", "other words"), ("INSTRUCTION_BEFORE", "other words")):
        with monkeypatch.context() as patch:
            patch.setattr(data, name, other)
            keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(annotator, "SCHEMA", {**annotator.SCHEMA, "required": []})
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(annotator, "VERSION", annotator.VERSION + 1)  # of how frames are sampled
        keys.append(key())
    (tmp_path / "a.mp4").write_bytes(b"b clip")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_what_is_sent(ask, tiny_clips, tmp_path):
    ask("--limit", 1)
    sent = Server.requests[0]
    video, text = sent["messages"][0]["content"]
    assert video["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert text["text"].startswith(data.INSTRUCTION_BEFORE + "A dog." + data.CRITERIA)  # the model's own words
    assert data.INSTRUCTION_AFTER.startswith(data.CRITERIA) and "mm_processor_kwargs" not in sent
    schema = sent["response_format"]["json_schema"]
    assert sent["temperature"] == 0 and sent["max_completion_tokens"] == 256 and schema["strict"]
    assert schema["schema"]["required"] == list(DIMENSIONS)
    assert all(part["enum"] == ["0", "1", "2", "N/A"] for part in schema["schema"]["properties"].values())
    (tmp_path / "a.mp4").write_bytes(open(tiny_clips[0], "rb").read())
    ask("--send", "frames", "--limit", 1)
    parts = Server.requests[1]["messages"][0]["content"]
    times = [part["text"] for part in parts[:-1] if part["type"] == "text"]
    assert times[:3] == ["<0.0 seconds>", "<0.5 seconds>", "<1.0 seconds>"] and len(times) == 8  # 4 s at 2 fps
    assert [part["type"] for part in parts[:-1]] == ["text", "image_url"] * 8
    assert parts[1]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")


WRONG = {
    "cut off": road.completion(json.dumps(RIGHT), "length"),  # whole JSON, and yet cut off: not to be trusted
    "filtered": road.completion(json.dumps(RIGHT), "content_filter"),
    "half JSON": road.completion('{"subject": "2", "dyna'),
    "unknown verdict": road.completion(json.dumps({**RIGHT, "camera": "3"})),
    "a number": road.completion(json.dumps({**RIGHT, "camera": 2})),
    "a dimension too few": road.completion(json.dumps({key: RIGHT[key] for key in DIMENSIONS[:4]})),
    "a dimension too many": road.completion(json.dumps({**RIGHT, "sound": "2"})),
    "a list": road.completion(json.dumps(list(RIGHT.values()))),
    "nothing": road.completion(""),
    "no choices": json.dumps({**json.loads(road.completion("")), "choices": []}).encode(),
    "no message": json.dumps({**json.loads(road.completion("")), "choices": [{"finish_reason": "stop"}]}).encode(),
    "a message of null": json.dumps({**json.loads(road.completion("")), "choices": [
        {"finish_reason": "stop", "message": None}]}).encode(),
    "usage without numbers": json.dumps({**json.loads(road.completion("")), "usage": {}}).encode(),
    "an error in a 200": b'{"error": {"message": "overloaded"}}',
    "not JSON": b"{not json",
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG)
def test_a_failure_never_becomes_a_verdict(ask, tmp_path, capsys, body):
    Server.faults = [(200, {}, body)]
    ask()
    failed = [record for record in records(tmp_path) if "error" in record]
    assert len(failed) == 1 and "verdicts" not in failed[0] and failed[0]["video"].endswith("a.mp4")
    assert "5 videos: 4 have verdicts, 1 failed, 0 not asked yet" in capsys.readouterr().out
    assert len(data.read_pairs(str(tmp_path / "rl.csv"))) == 1  # d and e; both pairs with a are left out
    ask()
    assert len(Server.requests) == 6 and len(data.read_pairs(str(tmp_path / "rl.csv"))) == 3


def test_html_500_404_and_no_server(ask, tmp_path, capsys):
    Server.faults = [(200, {"Content-Type": "text/html"}, b"<html>welcome</html>"), (500, {}, b"{}"), (404, {}, b"{}")]
    ask()
    told = capsys.readouterr().out
    for reason in ("is --base-url an OpenAI-compatible endpoint", "Error code: 500", "Error code: 404"):
        assert reason in told
    refuses(capsys, annotate.main, *ask.flags, "--base-url", "http://127.0.0.1:9/v1", "--out", tmp_path / "n.csv",
            "--max-errors", 3, says="3 failures in a row, the last: Connection error")


def test_429_and_500_are_tried_again_after_the_time_the_server_names(ask, tmp_path):
    Server.faults = [(429, {"Retry-After": "1"}, b"{}"), (500, {"Retry-After": "1"}, b"{}")]
    start = time.time()
    ask("--retries", 2, "--limit", 1)
    assert time.time() - start > 2 and len(Server.requests) == 3
    assert "verdicts" in records(tmp_path)[0]


def test_a_slow_answer_is_a_failure_and_holds_nobody_up(ask, tmp_path):
    Server.faults = [3]
    ask("--timeout", 0.5, "--workers", 2)
    assert sorted("error" in record for record in records(tmp_path)) == [False] * 4 + [True]
    assert "timed out" in next(record["error"] for record in records(tmp_path) if "error" in record)


def test_many_failures_in_a_row_stop_the_run_and_come_last_in_the_next(ask, tmp_path, capsys):
    Server.faults = [(500, {}, b"{}")] * 2
    refuses(capsys, annotate.main, *ask.flags, "--max-errors", 2, says="stopped early: 2 failures in a row")
    assert len(Server.requests) == 2  # a and b
    ask("--limit", 3)  # c, d, e, which were never asked: what always fails blocks nothing
    assert [record["video"][-5] for record in records(tmp_path)] == list("abcde")
    assert len(data.read_pairs(str(tmp_path / "rl.csv"))) == 1


def test_an_earlier_run_s_pairs_do_not_pass_for_this_one_s(ask, tmp_path, capsys):
    ask()
    Server.faults = [(200, {}, road.completion(""))] * 5
    refuses(capsys, annotate.main, *ask.flags, "--model", "another", "--max-errors", 99, says="is an earlier run's")


def test_limit_and_budget(ask, tmp_path, capsys):
    refuses(capsys, annotate.main, *ask.flags, "--max-tokens-total", 1000, says="1000 is reached: 1880 tokens used")
    assert len(Server.requests) == 2  # 940 tokens each
    refuses(capsys, annotate.main, *ask.flags, "--max-tokens-total", 1000, says="is reached")
    assert len(Server.requests) == 2  # what the file has used counts in the next run, too
    ask("--limit", 1)
    assert len(Server.requests) == 3


def test_a_kill_costs_half_a_line_and_ctrl_c_nothing_that_was_paid_for(ask, tmp_path, capsys, monkeypatch):
    ask("--limit", 2)
    with open(tmp_path / "rl.csv.jsonl", "a") as file:
        file.write('{"key": "half a li')
    ask("--limit", 1)
    assert [record["video"][-5] for record in records(tmp_path)] == ["a", "b", "c"]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask("--workers", 2)
    monkeypatch.undo()
    assert len(records(tmp_path)) == 5  # d and e were under way
    (tmp_path / "rl.csv.jsonl").write_text("nonsense\n")
    refuses(capsys, annotate.main, *ask.flags, says="line 1: is damaged")


def test_agreement_by_hand(ask, tmp_path, capsys):
    """The annotator says subject 2, environment N/A of every video."""
    def answer(first, second):
        both = {"video_1_scores": first, "video_2_scores": second, "gsb_result": "A"}
        return f"<answer>{json.dumps(both)}</answer>"

    one, two = {"subject": "2", "environment": "N/A"}, {"subject": "0", "environment": "1"}
    rows = [["['a.mp4', 'b.mp4']", "A dog.", answer(one, two)], ["['a.mp4', 'c.mp4']", "A dog.", answer(one, one)],
            ["['d.mp4', 'f.mp4']", "A cat.", answer(one, two)]]  # f is not in --data
    with open(tmp_path / "human.csv", "w", newline="") as file:
        csv.writer(file).writerows([["videos", "problem", "answer"], *rows])
    ask("--agreement", tmp_path / "human.csv")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    subject, environment = ([line for line in lines if line[:1] == [name]][0] for name in ("subject", "environment"))
    # a, b, c, d: three of four agree; the commonest human verdict is 2, three of four times.
    assert subject[:3] == ["subject", "4", "0.750"] and subject[-6:] == ["0.750", "(", "2)", "0.750", "of", "4"]
    # On b a human says 1, the annotator N/A: wrong, and no video is left where neither says N/A.
    assert environment[:3] == ["environment", "4", "0.750"] and environment[-1] == "-"
    assert subject[3:5] == ["[0.667,", "1.000]"]  # of two prompts: dogs 2/3, cats 1/1
    (tmp_path / "human.csv").write_text("path_A,path_B,prompt,TA\na.mp4,b.mp4,A dog.,A\n")
    refuses(capsys, annotate.main, *ask.flags, "--agreement", tmp_path / "human.csv", says="has no human verdict")


def test_bad_input(ask, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.csv").write_text("my own file")
    refuses(capsys, annotate.main, *ask.flags, "--out", tmp_path / "mine.csv", says="exists, and is not ours")
    refuses(capsys, annotate.main, *ask.flags, "--agreement", tmp_path / "no.csv", says="no such file")
    refuses(capsys, annotate.main, *ask.flags[:4], says="--model is missing")
    os.remove(tmp_path / "b.mp4")
    ask()
    assert "cannot be read 1:" in capsys.readouterr().out and len(data.read_pairs(str(tmp_path / "rl.csv"))) == 2
    monkeypatch.setitem(sys.modules, "openai", None)
    refuses(capsys, annotate.main, *ask.flags, "--model", "m2",
            says="needs openai: pip install -r requirements-road.txt")


@pytest.mark.vllm
def test_a_real_vllm_server(tmp_path, base_dir, world):
    """JSON schema, base64 video and frames as vLLM takes them; and its frames grow with a video's length."""
    pytest.importorskip("vllm", reason="vllm is not installed; pip install -r requirements-vllm.txt")
    port = 20000 + os.getpid() % 10000
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base_dir, "--host", "127.0.0.1",
               "--port", str(port), "--served-model-name", "m", "--max-model-len", "2048", "--enforce-eager",
               "--dtype", "float32", "--max-num-seqs", "4", "--media-io-kwargs", '{"video": {"fps": 2}}']
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.time() + 400
        while "startup complete" not in (tmp_path / "log").read_text() and server.poll() is None and time.time() < end:
            time.sleep(1)
        flags = ["--model", "m", "--base-url", f"http://127.0.0.1:{port}/v1", "--retries", "0"]
        used = {}
        for send in ("video", "frames"):
            out = tmp_path / f"{send}.csv"
            annotate.main(["--data", world["train_rl"], "--out", str(out), "--limit", "3", "--send", send, *flags])
            replies = [json.loads(line) for line in open(f"{out}.jsonl")]
            assert len(replies) == 3 and all("verdicts" in reply for reply in replies), replies
            used[send] = [reply["usage"]["prompt"] for reply in replies]
        toy.world.write_mp4(tmp_path / "long.mp4", np.zeros((32, 64, 64, 3), np.uint8), 4)  # 8 s; those above last 4
        (tmp_path / "long.csv").write_text("path_A,path_B,prompt,TA\nlong.mp4,long.mp4,A dog.,A\n")
        annotate.main(["--data", str(tmp_path / "long.csv"), "--out", str(tmp_path / "l.csv"), *flags])
        long = json.loads((tmp_path / "l.csv.jsonl").read_text())["usage"]["prompt"]
        assert long > max(used["video"]) + 4, (long, used)  # 4 blocks of frames more, and their times
    finally:
        server.terminate()
        server.wait(60)
