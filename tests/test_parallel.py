"""One process and two: the same losses, gradients, rollouts and files. Real gloo ranks under torchrun."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import cold_start
import grpo
import parallel
from model import DeScore
from plumbing import logs
from plumbing.settings import InputError
from tests.conftest import ROOT, run
from tests.kills import alive, family, kill_all


def same_metrics(one, two, names, tolerance):
    for a, b in zip(one, two, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)


@pytest.mark.slow
def test_two_ranks_equal_one_in_stage_1(world, base_dir, tmp_path):
    """FSDP2 over two gloo ranks, micro-batches on one: the same losses, norms and weights; resume on one rank."""
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--val", world["val_cold_start"],
             "--batch-pairs", "4", "--lr", "1e-3", "--workers", "0", "--mask-probability", "1", "--lora-r", "4",
             "--lora-dropout", "0", "--epochs", "9"]
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
    """One CoT of each video at a time on two ranks, all together on one: the same.

    Unequal token counts per rank, an unsharded rollout engine beside the shards, several updates per rollout batch; two
    copies of the model in one shard each, offloaded.
    """
    flags = ["--model", tiny_model_dir, "--data", world["train_rl"], "--batch-pairs", "4", "--mini-pairs", "2",
             "--rollouts", "2", "--max-new-tokens", "10", "--lr", "1e-3", "--workers", "0", "--length-low", "1",
             "--length-high", "9", "--kl-coef", "0.01", "--epochs", "9", "--max-steps", "2"]
    grpo.main([*flags, "--out", str(tmp_path / "one"), "--micro-rollouts", "2"])
    two_ranks = [*flags, "--micro-rollouts", "1", "--out", tmp_path / "two", "--shard-ranks", "1", "--cpu-offload",
                 "--save-every", "1"]
    run("grpo.py", *two_ranks, ranks=2)
    one, two = (logs.read_metrics(str(tmp_path / name)) for name in ("one", "two"))
    names = ["rollout_reward", "quality", "cot_tokens", "grpo_loss", "bt_loss", "kl", "grad_norm_llm", "grad_norm_head",
             "mean_log_prob"]
    same_metrics(one[:1], two[:1], names, 2e-4)
    # Step 2 is sampled from the updated weights.
    same_metrics(one[1:], two[1:], ["rollout_reward", "cot_tokens", "bt_loss"], 2e-3)
    a, b = (DeScore.from_pretrained(str(tmp_path / name / "model")).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=2e-4) for name in a)
    # all that came after the first step is lost; --resume on two ranks: bit for bit the run that went through
    shutil.rmtree(tmp_path / "two" / "model")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000002")
    run("grpo.py", *two_ranks, "--resume", ranks=2)
    c = DeScore.from_pretrained(str(tmp_path / "two" / "model")).state_dict()
    assert all(torch.equal(b[name], c[name]) for name in b)


@pytest.mark.parametrize("flag", [pytest.param(["--shard-ranks", "1"], marks=pytest.mark.slow), ["--cpu-offload"]])
def test_a_shard_of_one_equals_one_process(world, base_dir, tmp_path, flag):
    """torchrun with one process: FSDP2 on a mesh of one, as on one GPU whose weights wait in the host's memory."""
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--batch-pairs", "2", "--lr", "1e-3",
             "--workers", "0", "--mask-probability", "1", "--lora-r", "4", "--lora-dropout", "0", "--max-steps", "2"]
    cold_start.main([*flags, "--out", str(tmp_path / "plain")])
    done = run("cold_start.py", *flags, "--out", tmp_path / "sharded", *flag, ranks=1)
    plain, sharded = (logs.read_metrics(str(tmp_path / name)) for name in ("plain", "sharded"))
    same_metrics(plain, sharded, ["loss", "grad_norm_llm", "grad_norm_vision", "grad_norm_head"], 1e-4)
    a, b = (DeScore.from_pretrained(str(tmp_path / name / "model")).state_dict() for name in ("plain", "sharded"))
    assert all(torch.allclose(a[name], b[name], atol=2e-4) for name in a), done.stderr[-2000:]


def test_ctrl_c_saves_and_says_how_to_go_on(world, base_dir, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "cold_start.py", "--model", base_dir, "--data", world["train_cold_start"],
         "--mask-probability", "1", "--batch-pairs", "1", "--epochs", "500", "--workers", "0", "--out", str(tmp_path)],
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


def test_warm_up_is_a_function_of_the_step():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "base_lr": 2.0}], lr=0.0)
    rates = []
    for step in (1, 2, 4, 5, 100):
        parallel.set_learning_rate(optimizer, step, warmup_steps=4)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_each_part_has_its_own_rate_and_0_is_one():
    class Parts(torch.nn.Module):
        def parameter_groups(self):
            return {part: [torch.nn.Parameter(torch.zeros(1))] for part in ("llm", "vision", "head")}

    settings = cold_start.Settings(lr=2.0, lr_vision=None, lr_head=0.0, weight_decay=0.5)
    optimizer = parallel.make_optimizer(Parts(), settings)
    assert [group["base_lr"] for group in optimizer.param_groups] == [2.0, 2.0, 0.0]  # 0 freezes; None is --lr
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("started", [False, True])
def test_a_backend_for_two_devices_is_asked_for_under_torchrun_alone(monkeypatch, started):
    """accelerate takes a backend without torchrun for a group that is there, and asks it for its size: a traceback,
    where `start` has a sentence."""
    asked = []

    class Recorder:
        process_index, num_processes, device, is_main_process = 0, 1, torch.device("cuda"), True

        def __init__(self, cpu, kwargs_handlers):
            asked.append(kwargs_handlers[0].backend)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parallel, "Accelerator", Recorder)
    monkeypatch.setenv("LOCAL_RANK", "0") if started else monkeypatch.delenv("LOCAL_RANK", raising=False)
    if started:
        parallel.Ranks(cpu_offload=True)
    else:
        with pytest.raises(InputError, match="start with torchrun"):
            parallel.start(0, cpu_offload=True)
    assert asked == ["cuda:nccl,cpu:gloo" if started else None]
