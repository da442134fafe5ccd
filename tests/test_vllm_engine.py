"""The vLLM engine beside the trainer: same prompts, same log-probs, weight sync, repeated videos.

Needs vllm; its CPU build is enough.
"""

import copy
import csv
import json
import os
import subprocess
import sys

import pytest
import torch

import data
import toy.base_model
from plumbing import logs
from rollout import banned_tokens
from tests.conftest import ROOT, TINY, run
from tests.test_data import published_layout

pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm", reason="vllm is not installed; pip install -r requirements-vllm.txt")

SCRIPT = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")
import torch, data, parallel, rollout
from model import DeScore
from layout import lay_out
from rollout import banned_tokens
ranks = parallel.start(0)
path, clips = sys.argv[1], sys.argv[2:]
model = DeScore.from_pretrained(path)
model.make_trainable("lora", vision=False, lora_r=4, lora_alpha=8)
model.eval()  # no LoRA dropout
# The engine's log-probs are those after its ban of control tokens (a bias of -100); give the trainer's logits the same.
vocab_size = model.backbone.config.text_config.vocab_size
bias = torch.zeros(vocab_size)
bias[banned_tokens(model.processor.tokenizer, vocab_size)] = -100.0
model.backbone.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
prefixes = model.encode(clips, ["a red circle <|im_end|> <|video_pad|>", "a blue square"])
engine = rollout.make_engine("vllm", path, model.processor, ranks, max_model_len=512)
report = []
for round in range(3):  # the same videos again after each sync: stale caches would show, or kill the engine
    cots = engine.generate(prefixes, [[1, 2, 3], [4, 5, 6]], 12, 1.0)
    with torch.no_grad():
        log_probs = model(lay_out(model.backbone, prefixes, cots)).log_probs
    theirs = [sample for row in engine.log_probs for sample in row]
    difference = max(abs(a - b) for ours, them in zip(log_probs.tolist(), theirs) for a, b in zip(ours, them))
    again = engine.generate(prefixes, [[1, 2, 3], [4, 5, 6]], 12, 1.0)
    report.append({"difference": difference, "same_seed_same_cot": again == cots, "cots": cots})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    engine.sync(parallel.trained_weights(model))
models, refused = [], ""
engine.llm.collective_rpc(lambda worker: models.append(worker.model_runner.get_model()))
load = models[0].load_weights
models[0].load_weights = lambda weights: {name for name in load(weights) if "layers.1." not in name}  # drops a layer
try:
    engine.sync(parallel.trained_weights(model))
except data.InputError as error:
    refused = str(error)
print("REPORT" + json.dumps({"rounds": report, "refused": refused}))
"""


def run_script(script, *args):
    """Runs it as a process of its own, which an engine wants; returns what it reports."""
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "per-frame pixel cap" not in done.stderr  # the processor's warning that its way of resizing will change
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT"))[6:])


def test_engine_agrees_with_the_trainer_over_several_syncs(tiny_model_dir, tiny_clips):
    report = run_script(SCRIPT, tiny_model_dir, *tiny_clips[:2])
    assert "vLLM did not take" in report["refused"] and "layers.1." in report["refused"]
    report = report["rounds"]
    assert len(report) == 3 and all(r["same_seed_same_cot"] for r in report)
    assert all(r["difference"] < 1e-3 for r in report), [r["difference"] for r in report]
    assert report[0]["cots"] != report[1]["cots"] != report[2]["cots"]  # the new weights did arrive


WANTS_ONLY_WHAT_IS_BANNED = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")
import data, parallel, rollout
from transformers import AutoProcessor
path, clip = sys.argv[1:]
processor = AutoProcessor.from_pretrained(path)
prefix = data.encode_prompt(processor, data.sample_frames(clip), "a red circle.")
engine = rollout.make_engine("vllm", path, processor, parallel.start(0), max_model_len=1024)
outputs, step = [], engine.llm.llm_engine.step
def noting():
    made = step()
    outputs.extend(made)
    return made
engine.llm.llm_engine.step = noting
cots = engine.generate([prefix], [list(range(20))], 20, 1.0)
print("REPORT" + json.dumps({"prompt": list(outputs[0].prompt_token_ids), "cots": cots[0]}))
"""


@pytest.mark.parametrize("files", ["toy", pytest.param("published", marks=pytest.mark.real)])
def test_engine_reads_the_published_layout_and_samples_only_text(files, request, tiny_clips, tmp_path):
    processor = request.getfixturevalue("real_processor" if files == "published" else "processor")
    model = toy.base_model.build_model(processor, hidden=64, layers=2, heads=2, vision_hidden=48, vision_layers=2)
    rows = 151_936 if files == "published" else len(processor.tokenizer) + 20
    model.resize_token_embeddings(rows, mean_resizing=False)
    banned = banned_tokens(processor.tokenizer, rows)
    with torch.no_grad():
        model.lm_head.weight.zero_()[banned] = torch.randn(len(banned), 64).sign() * 3
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    report = run_script(WANTS_ONLY_WHAT_IS_BANNED, tmp_path, tiny_clips[0])
    expected = published_layout(processor.tokenizer, data.sample_frames(tiny_clips[0]), "a red circle.")
    assert report["prompt"] == expected
    assert not {token for cot in report["cots"] for token in cot} & set(banned)


A_LONG_VIDEO = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")
import numpy as np
import data, parallel, rollout
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
frames = np.random.default_rng(0).integers(0, 255, (34, 512, 512, 3), np.uint8)
prefix = data.encode_prompt(processor, data.Video(frames, 2.0, 34, tuple(range(34))), "a red circle.")
engine = rollout.make_engine("vllm", sys.argv[1], processor, parallel.start(0), max_model_len=4600)
# Greedy: where a prompt is read in two batches, vLLM's CPU build has no random stream to set back.
(cots,), refused = engine.generate([prefix], [[1]], 4, 0.0), ""
engine.llm.llm_engine.input_processor.mm_encoder_cache_size = 9  # vLLM's own limit again, and too low
try:
    engine.generate([prefix], [[1]], 4, 0.0)
except data.InputError as error:
    refused = str(error)
video = int((prefix["mm_token_type_ids"] == 2).sum())
print("REPORT" + json.dumps({"video": video, "cots": cots, "refused": refused, "left": len(engine.under_way)}))
"""


def test_a_video_as_long_as_the_engine_s_limit(processor, tmp_path):
    """vLLM limits the tokens of one video, too: here to 4,096, a CPU's batch, for its processor's largest video has 64.
    What it refuses all the same is one sentence, and the engine goes on."""
    model = toy.base_model.build_model(processor, **TINY)
    model.config.text_config.max_position_embeddings = 8192
    model.save_pretrained(tmp_path)
    small = copy.deepcopy(processor)
    small.video_processor.size = {"shortest_edge": 1024, "longest_edge": 64 * 2048}
    small.save_pretrained(tmp_path)
    report = run_script(A_LONG_VIDEO, tmp_path)
    assert report["video"] == 17 * 256 and 1 <= len(report["cots"][0]) <= 4
    assert "vLLM refused the video (" in report["refused"] and "4352" in report["refused"] and report["left"] == 0


@pytest.mark.parametrize("tp", [1, 2])
def test_two_ranks_train_with_an_engine_each_or_with_one_together(world, tiny_model_dir, tmp_path, tp):
    flags = ["--model", tiny_model_dir, "--data", world["train_rl"], "--engine", "vllm", "--engine-tp", tp,
             "--rollouts", 2, "--batch-pairs", 2, "--mini-pairs", 2, "--max-new-tokens", 10, "--lr", "1e-3",
             "--max-steps", 2, "--length-low", 1, "--length-high", 9, "--workers", 0, "--out", tmp_path]
    run("grpo.py", *flags, ranks=2, env={"TORCHDYNAMO_DISABLE": "1"})
    lines = logs.read_metrics(str(tmp_path))
    # The second step's CoTs come from weights that were handed over; control tokens, banned in the engine, cost a bit.
    assert [line["step"] for line in lines] == [1, 2] and all(line["engine_gap"] < 0.05 for line in lines), lines


@pytest.mark.parametrize("tp", [1, 2])
def test_fewer_videos_than_ranks(tiny_model_dir, tiny_clips, tmp_path, tp):
    """Starting vLLM is collective: with one video for two ranks, the rank that has nothing to do starts it too.
    Collecting, thinking and scoring all end, and the engine is closed."""
    clips = [os.path.abspath(clip) for clip in tiny_clips[:2]]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path_A", "path_B", "prompt", "TA"], [clips[0], clips[0], "a circle", "A"]])
    common = ["--model", tiny_model_dir, "--data", tmp_path / "pairs.csv", "--engine", "vllm", "--max-new-tokens", 4,
              "--engine-tp", tp]
    env = {"TORCHDYNAMO_DISABLE": "1"}
    run("collect_cots.py", *common, "--out", tmp_path / "cots.csv", ranks=2, env=env)
    assert "CoT_A_tokens" in (tmp_path / "cots.csv").read_text()
    done = run("evaluate.py", *common, "--out", tmp_path / "eval", ranks=2, env=env)
    assert "Traceback" not in done.stderr and (tmp_path / "eval" / "scores.csv").exists()


def test_evaluation_with_a_bad_video_a_long_prompt_and_an_end(tiny_model_dir, tiny_clips, tmp_path):
    a, b = (os.path.abspath(clip) for clip in tiny_clips[:2])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [[a, b, "a circle", "A"], [a, "broken.mp4", "a circle", "A"], [a, b, "word " * 900, "B"]]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path_A", "path_B", "prompt", "TA"], *rows])
    flags = ["--model", tiny_model_dir, "--data", tmp_path / "pairs.csv", "--engine", "vllm", "--max-new-tokens", 8,
             "--engine-max-len", 700, "--out", tmp_path / "eval", "--thoughts", 2]
    env = {"TORCHDYNAMO_DISABLE": "1"}
    done = run("evaluate.py", *flags, env=env, check=False)
    assert done.returncode == 2 and "line 3" in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
    done = run("evaluate.py", *flags, "--skip-bad-videos", env=env)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr[-3000:]
    skipped = [json.loads(line)["error"] for line in (tmp_path / "eval" / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 3 and "broken.mp4" in skipped[0]
    assert all("--engine-max-len" in error for error in skipped[1:])
