"""The vLLM engine beside the trainer: same prompts, same log-probs, weight sync, repeated videos. Needs vllm (CPU build is enough)."""

import json
import subprocess
import sys

import pytest

from plumbing import logs
from conftest import ROOT, run

pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm", reason="vllm is not installed; pip install -r requirements-vllm.txt")

SCRIPT = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")
import torch, data, parallel, rollout
from model import DeScore, lay_out
from rollout import banned_tokens
ranks = parallel.start(0)
path, clips = sys.argv[1], sys.argv[2:]
model = DeScore.from_pretrained(path)
model.make_trainable("lora", vision=False, lora_r=4, lora_alpha=8)
model.eval()  # no LoRA dropout
# The engine's log-probs are those after its ban of control tokens (a bias of -100); give the trainer's logits the same.
bias = torch.zeros(model.backbone.config.text_config.vocab_size)
bias[banned_tokens(model.processor.tokenizer)] = -100.0
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
models[0].load_weights = lambda weights: {name for name in load(weights) if "layers.1." not in name}  # passes a layer over
try:
    engine.sync(parallel.trained_weights(model))
except data.InputError as error:
    refused = str(error)
print("REPORT" + json.dumps({"rounds": report, "refused": refused}))
"""


def test_engine_agrees_with_the_trainer_over_several_syncs(tiny_model_dir, tiny_clips):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_model_dir, *tiny_clips[:2]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT"))[6:])
    assert "vLLM did not take" in report["refused"] and "layers.1." in report["refused"]
    report = report["rounds"]
    assert len(report) == 3 and all(r["same_seed_same_cot"] for r in report)
    assert all(r["difference"] < 1e-3 for r in report), [r["difference"] for r in report]
    assert report[0]["cots"] != report[1]["cots"] != report[2]["cots"]  # the new weights did arrive


@pytest.mark.parametrize("tp", [1, 2])
def test_two_ranks_train_with_an_engine_each_or_with_one_together(world, tiny_model_dir, tmp_path, tp):
    flags = ["--model", tiny_model_dir, "--data", world["train_rl"], "--engine", "vllm", "--engine-tp", tp, "--rollouts", 2,
             "--batch-pairs", 2, "--mini-pairs", 2, "--max-new-tokens", 10, "--lr", "1e-3", "--max-steps", 2,
             "--length-low", 1, "--length-high", 9, "--workers", 0, "--out", tmp_path]  # fmt: skip
    run("grpo.py", *flags, ranks=2, env={"TORCHDYNAMO_DISABLE": "1"})
    lines = logs.read_metrics(str(tmp_path))
    # The second step's CoTs come from weights that were handed over; control tokens, banned in the engine, cost a little.
    assert [line["step"] for line in lines] == [1, 2] and all(line["engine_gap"] < 0.05 for line in lines), lines
