"""One process and two: the same losses, gradients, rollouts and files. Real gloo ranks under torchrun."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

from lab import plan
from plumbing import checkpoint, logs, resume, settings
import cold_start
import data
import grpo
import parallel
from conftest import ROOT, refuses, run
from kills import alive, family, kill_all
from model import DeScore


def same_metrics(one, two, names, tolerance):
    for a, b in zip(one, two, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)


def test_two_ranks_equal_one_in_stage_1(world, base_dir, tmp_path):
    """FSDP2 over two gloo ranks, micro-batches on one: the same losses, gradient norms and weights; resume on one rank."""
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--val", world["val_cold_start"], "--batch-pairs", "4",
             "--lr", "1e-3", "--workers", "0", "--mask-probability", "1", "--lora-r", "4", "--lora-dropout", "0",
             "--epochs", "9"]
    out = {name: tmp_path / name for name in ("one", "two", "killed")}
    cold_start.main([*flags, "--out", str(out["one"]), "--max-steps", "4"])
    run("cold_start.py", *flags, "--out", out["two"], "--max-steps", "4", ranks=2)
    one, two = (logs.read_metrics(str(out[name])) for name in ("one", "two"))
    names = ["loss", "accuracy", "margin", "grad_norm_llm", "grad_norm_vision", "grad_norm_head"]
    same_metrics(one, two, names, 1e-4)
    assert one[-1]["val_accuracy"] == two[-1]["val_accuracy"]
    a, b = (DeScore.from_pretrained(str(out[name] / "model")).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=2e-4) for name in a)
    # kill -9 of both ranks, then --resume: bit for bit the run that nobody killed
    again = [*flags, "--out", out["killed"], "--max-steps", "4", "--save-every", "1", "--keep", "9"]
    kill_after_step(2, out["killed"], *again)
    run("cold_start.py", *again, "--resume", ranks=2)
    c = DeScore.from_pretrained(str(out["killed"] / "model")).state_dict()
    assert all(torch.equal(b[name], c[name]) for name in b)
    # and a checkpoint of two ranks goes on with one
    cold_start.main([*flags, "--out", str(out["two"]), "--max-steps", "5", "--resume"])
    assert [line["step"] for line in logs.read_metrics(str(out["two"]))] == [1, 2, 3, 4, 5]


def kill_after_step(step, out, *flags):
    """Starts cold_start.py on two ranks; SIGKILL to both as soon as the checkpoint of `step` is there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "cold_start.py"]
    process = subprocess.Popen(
        [*command, *map(str, flags)], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline, wanted = time.time() + 120, out / "checkpoints" / f"step-{step:06d}"
    while not wanted.is_dir() and time.time() < deadline:
        time.sleep(0.02)
    members = family(process.pid)
    kill_all(process)
    # torchrun and both ranks: a rank left alive would train beside the run that goes on, and save in its place.
    assert len(members) >= 3 and not any(alive(pid) for pid in members)
    assert wanted.is_dir() and not (out / "model").exists()


def test_two_ranks_equal_one_in_stage_2(world, tiny_model_dir, tmp_path):
    """Packed groups on two ranks, a row per CoT on one: the same. Unequal token counts per rank, an unsharded rollout
    engine beside the shards, several updates per rollout batch; two copies of the model in one shard each, offloaded."""
    flags = ["--model", tiny_model_dir, "--data", world["train_rl"], "--batch-pairs", "4", "--mini-pairs", "2", "--rollouts", "2",
             "--max-new-tokens", "10", "--lr", "1e-3", "--workers", "0", "--length-low", "1", "--length-high", "9",
             "--kl-coef", "0.01", "--epochs", "9", "--max-steps", "2"]
    grpo.main([*flags, "--out", str(tmp_path / "one"), "--no-packing"])
    two_ranks = [*flags, "--out", tmp_path / "two", "--shard-ranks", "1", "--cpu-offload", "--save-every", "1"]
    run("grpo.py", *two_ranks, ranks=2)
    one, two = (logs.read_metrics(str(tmp_path / name)) for name in ("one", "two"))
    names = [
        "rollout_reward",
        "quality",
        "cot_tokens",
        "grpo_loss",
        "bt_loss",
        "kl",
        "grad_norm_llm",
        "grad_norm_head",
        "mean_log_prob",
    ]
    same_metrics(one[:1], two[:1], names, 2e-4)
    same_metrics(
        one[1:], two[1:], ["rollout_reward", "cot_tokens", "bt_loss"], 2e-3
    )  # sampled from the updated weights
    a, b = (DeScore.from_pretrained(str(tmp_path / name / "model")).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=2e-4) for name in a)
    # all that came after the first step is lost; --resume on two ranks: bit for bit the run that went through
    shutil.rmtree(tmp_path / "two" / "model")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000002")
    run("grpo.py", *two_ranks, "--resume", ranks=2)
    c = DeScore.from_pretrained(str(tmp_path / "two" / "model")).state_dict()
    assert all(torch.equal(b[name], c[name]) for name in b)


def test_ctrl_c_saves_and_says_how_to_go_on(world, base_dir, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "cold_start.py", "--model", base_dir, "--data", world["train_cold_start"], "--mask-probability", "1",
         "--batch-pairs", "1", "--epochs", "500", "--workers", "0", "--out", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    deadline = time.time() + 120
    while not logs.read_metrics(str(tmp_path)) and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume goes on" in output and "Traceback" not in output
    steps = [line["step"] for line in logs.read_metrics(str(tmp_path))]
    assert os.listdir(tmp_path / "checkpoints") == [f"step-{steps[-1]:06d}"]


def test_clip_gradients():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))

        def parameter_groups(self):
            return {"llm": [self.a], "head": [self.b]}

    model = Two()
    model.a.grad, model.b.grad = torch.tensor([0.3, 0.0]), torch.tensor([4.0])
    assert parallel.clip_gradients(model, 1.0) == pytest.approx({"llm": 0.3, "head": 4.0, "total": 4.01123}, rel=1e-5)
    # The head is scaled down to 1; the LLM, already below, keeps its gradient: a large head does not shrink it.
    assert model.a.grad.tolist() == pytest.approx([0.3, 0.0]) and model.b.grad.tolist() == pytest.approx([1.0])
    assert parallel.clip_gradients(model, 9.0)["head"] == pytest.approx(1.0)  # and nothing is scaled up
    assert model.b.grad.tolist() == pytest.approx([1.0])
    model.a.grad[0] = float("nan")
    assert math.isnan(parallel.clip_gradients(model, 1.0)["total"])


def test_what_is_not_finite_is_kept_with_its_rows(tmp_path):
    stage, ranks = cold_start.Settings(data="pairs.csv", out=str(tmp_path)), parallel.Ranks()
    rows = [{"line": 12, "prompt": "a cat"}, {"line": 3, "prompt": "a dog"}]
    resume.require_finite(1.5, "loss", rows, stage, ranks)
    assert not os.listdir(tmp_path)
    with pytest.raises(
        data.InputError, match="pairs.csv: the gradient norm is nan at line 3, 12 .*not_finite.jsonl"
    ):
        resume.require_finite(float("nan"), "gradient norm", rows, stage, ranks)
    assert [json.loads(line) for line in open(tmp_path / "not_finite.jsonl")] == rows


def test_warm_up_is_a_function_of_the_step():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "base_lr": 2.0}], lr=0.0)
    rates = []
    for step in (1, 2, 4, 5, 100):
        parallel.set_learning_rate(optimizer, step, warmup_steps=4)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_replacing_a_folder_is_atomic(tmp_path):
    path = str(tmp_path / "model")
    with checkpoint.replacing(path) as folder:
        open(os.path.join(folder, "new"), "w").close()
    with pytest.raises(RuntimeError):
        with checkpoint.replacing(path) as folder:
            open(os.path.join(folder, "half"), "w").close()
            raise RuntimeError("killed while saving")
    assert os.listdir(path) == ["new"]  # the old folder is untouched
    with checkpoint.replacing(path) as folder:
        open(os.path.join(folder, "newer"), "w").close()
    assert os.listdir(path) == ["newer"]
    os.rename(path, path + ".old")  # killed between the two renames: the next save starts from the only good folder
    with pytest.raises(RuntimeError):
        with checkpoint.replacing(path):
            raise RuntimeError("killed again")
    assert os.listdir(path) == ["newer"]


def test_checkpoints_on_disk_are_bounded(model, tmp_path):
    model.make_trainable("head", vision=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(1, 5):
        resume.save_checkpoint(str(tmp_path), step, model, optimizer, parallel.Ranks(), keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000003", "step-000004"]


def test_a_kill_while_saving_leaves_the_checkpoint_before(model, tmp_path, monkeypatch):
    model.make_trainable("head", vision=False)
    optimizer, ranks = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), parallel.Ranks()
    resume.save_checkpoint(str(tmp_path), 1, model, optimizer, ranks)
    for breaks in ("torch.save", "os.rename", "json.dump"):
        with monkeypatch.context() as patch, pytest.raises(BaseException):  # the library wraps some of them
            patch.setattr(breaks, lambda *_, **__: (_ for _ in ()).throw(InterruptedError))
            resume.save_checkpoint(str(tmp_path), 2, model, optimizer, ranks)
        assert resume.load_checkpoint(str(tmp_path), model, optimizer, ranks)["step"] == 1
    resume.save_checkpoint(str(tmp_path), 2, model, optimizer, ranks)  # what the kill left is no obstacle
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000001", "step-000002"]


def test_plan_counts_what_training_holds(base_dir):
    """The states of the plan, byte for byte against a model after one update; and the 8B has its published size."""
    wanted = plan.Plan(plan=base_dir, stage=1, train="full", gpus=1)
    model = DeScore.from_pretrained(base_dir, new_head=True)
    model.make_trainable("full", vision=True)
    trained = [p for name, p in model.named_parameters() if name not in ("query", "head.weight")]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    weights, gradients, adam = list(plan.plan_memory(plan.model_config(base_dir), wanted).values())[:3]
    assert (weights, gradients, adam) == (size(trained), size(p.grad for p in trained), size(moments))
    model.make_trainable("lora", vision=False, lora_r=4)
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert plan.count_parameters(model.backbone.config, 4)["lora"] == adapters
    sizes = plan.count_parameters(plan.model_config("8B"), 64)
    assert round((sizes["llm"] + sizes["vision"]) / 1e9, 2) == 8.77


def test_plan_counts_what_a_block_keeps_for_backward():
    """The bytes that one real text block saves per token, as autograd's own hooks see them: within 5 %."""
    text = plan.model_config("8B").text_config
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1536}
    text.update({**sizes, "_attn_implementation": "sdpa"})
    block = Qwen3VLTextDecoderLayer(text, 0).bfloat16()
    weights, saved = {parameter.data_ptr() for parameter in block.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    states, rotary = torch.randn(1, 256, 512, dtype=torch.bfloat16, requires_grad=True), torch.randn(1, 256, 64).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(states, position_embeddings=(rotary, rotary), attention_mask=None, position_ids=None)
    measured = sum(size for _, size in saved.values()) / 256
    assert plan.block_bytes(text, 256, 0, 1) == pytest.approx(measured, rel=0.05)


def test_plan_moves_the_right_way(capsys):
    config, total = plan.model_config("8B"), {}
    for gpus in (1, 8):
        for train in ("lora", "full"):
            wanted = plan.Plan(gpus=gpus, train=train)
            total[gpus, train] = sum(plan.plan_memory(config, wanted).values())
    assert total[1, "full"] > total[1, "lora"] > total[8, "lora"] and total[8, "full"] < total[1, "full"] / 3
    slow, fast = (plan.plan_time(config, plan.Plan(gpus=n)) for n in (1, 8))
    assert slow["update"] == pytest.approx(8 * fast["update"])
    plan.main(["--plan", "8B", "--gpus", "1", "--train", "full"])
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_half_a_metrics_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert logs.read_metrics(str(tmp_path)) == [{"step": 1}]


def test_settings_and_flags():
    @dataclasses.dataclass
    class Some:
        """Settings."""

        rate: float = settings.arg(0.5, "a rate of 5 %")
        name: str | None = settings.arg(None, "a name")
        deep: bool = settings.arg(True, "deep")
        files: list[str] = settings.arg(None, "files")

    parse = lambda *argv: settings.parse(Some, "doc", argv)
    assert parse() == Some(0.5, None, True, None)
    assert parse("--rate", "2", "--name", "x", "--no-deep", "--files", "a", "b") == Some(2.0, "x", False, ["a", "b"])
    with pytest.raises(SystemExit) as error:
        parse("--rat", "x")
    assert error.value.code == 2


def test_a_rank_count_that_does_not_divide_is_one_sentence(world, base_dir, tmp_path, capsys):
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--mask-probability", "1", "--out", tmp_path]
    says = "--batch-pairs 3 is not a multiple"
    refuses(capsys, cold_start.main, *flags, "--batch-pairs", "3", "--micro-pairs", "2", says=says)
