"""One process and two: the same losses, gradients, rollouts and files. Real gloo ranks under torchrun."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import cold_start
import grpo
import parallel
from conftest import ROOT, fails_in_one_sentence, run
from model import DeScore


def same_metrics(one, two, names, tolerance):
    for a, b in zip(one, two, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)


def test_two_ranks_equal_one_in_stage_1(world, base_dir, tmp_path):
    """FSDP2 over two gloo ranks, micro-batches on one: the same losses, gradient norms and weights; resume on one rank."""
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--val", world["val_cold_start"], "--batch-pairs", "4",
             "--lr", "1e-3", "--workers", "0", "--mask-probability", "1", "--lora-r", "4", "--lora-dropout", "0",
             "--epochs", "4"]  # fmt: skip
    cold_start.main([*flags, "--out", str(tmp_path / "one"), "--max-steps", "2"])
    run("cold_start.py", *flags, "--out", tmp_path / "two", "--max-steps", "2", ranks=2)
    one, two = (parallel.read_metrics(str(tmp_path / name)) for name in ("one", "two"))
    same_metrics(one, two, ["loss", "accuracy", "margin", "grad_norm_llm", "grad_norm_vision", "grad_norm_head"], 1e-4)
    assert one[-1]["val_accuracy"] == two[-1]["val_accuracy"]
    a, b = (DeScore.from_pretrained(str(tmp_path / name / "model")).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    # a checkpoint of two ranks goes on with one
    cold_start.main([*flags, "--out", str(tmp_path / "two"), "--max-steps", "3", "--resume"])
    assert [line["step"] for line in parallel.read_metrics(str(tmp_path / "two"))] == [1, 2, 3]


def test_two_ranks_equal_one_in_stage_2(world, tiny_model_dir, tmp_path):
    """Unequal token counts per rank, an unsharded rollout engine beside the shards, several updates per rollout batch."""
    flags = ["--model", tiny_model_dir, "--data", world["train_rl"], "--batch-pairs", "4", "--mini-pairs", "2", "--rollouts", "2",
             "--max-new-tokens", "10", "--lr", "1e-3", "--workers", "0", "--length-low", "1", "--length-high", "9",
             "--kl-coef", "0.01", "--epochs", "9", "--max-steps", "2"]  # fmt: skip
    grpo.main([*flags, "--out", str(tmp_path / "one")])
    run("grpo.py", *flags, "--out", tmp_path / "two", ranks=2)
    one, two = (parallel.read_metrics(str(tmp_path / name)) for name in ("one", "two"))
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


def test_ctrl_c_saves_and_says_how_to_go_on(world, base_dir, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "cold_start.py", "--model", base_dir, "--data", world["train_cold_start"], "--mask-probability", "1",
         "--batch-pairs", "1", "--epochs", "500", "--workers", "0", "--out", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not parallel.read_metrics(str(tmp_path)) and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume goes on" in output and "Traceback" not in output
    steps = [line["step"] for line in parallel.read_metrics(str(tmp_path))]
    assert os.listdir(tmp_path / "checkpoints") == [f"step-{steps[-1]:06d}"]


def test_clip_gradients():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))

        def parameter_groups(self):
            return {"llm": [self.a], "head": [self.b]}

    model = Two()
    model.a.grad, model.b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert parallel.clip_gradients(model, 1.0) == pytest.approx({"llm": 3.0, "head": 4.0, "total": 5.0})
    assert model.a.grad.tolist() == pytest.approx([0.6, 0.0]) and model.b.grad.tolist() == pytest.approx([0.8])
    assert parallel.clip_gradients(model, 9.0)["total"] == pytest.approx(1.0)  # and nothing is scaled up
    assert model.b.grad.tolist() == pytest.approx([0.8])
    model.a.grad[0] = float("nan")
    with pytest.raises(parallel.InputError, match="gradient norm is nan"):
        parallel.clip_gradients(model, 1.0)


def test_warm_up_is_a_function_of_the_step():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "base_lr": 2.0}], lr=0.0)
    rates = []
    for step in (1, 2, 4, 5, 100):
        parallel.set_learning_rate(optimizer, step, warmup_steps=4)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_replacing_a_folder_is_atomic(tmp_path):
    path = str(tmp_path / "model")
    with parallel.replacing(path) as folder:
        open(os.path.join(folder, "new"), "w").close()
    with pytest.raises(RuntimeError):
        with parallel.replacing(path) as folder:
            open(os.path.join(folder, "half"), "w").close()
            raise RuntimeError("killed while saving")
    assert os.listdir(path) == ["new"]  # the old folder is untouched
    with parallel.replacing(path) as folder:
        open(os.path.join(folder, "newer"), "w").close()
    assert os.listdir(path) == ["newer"]


def test_checkpoints_on_disk_are_bounded(model, tmp_path):
    model.make_trainable("head", vision=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(1, 5):
        parallel.save_checkpoint(str(tmp_path), step, model, optimizer, parallel.Ranks(), keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000003", "step-000004"]


def test_half_a_metrics_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert parallel.read_metrics(str(tmp_path)) == [{"step": 1}]


def test_settings_and_flags():
    @dataclasses.dataclass
    class Some:
        """Settings."""

        rate: float = parallel.arg(0.5, "a rate of 5 %")
        name: str | None = parallel.arg(None, "a name")
        deep: bool = parallel.arg(True, "deep")
        files: list[str] = parallel.arg(None, "files")

    parse = lambda *argv: parallel.parse(Some, "doc", argv)
    assert parse() == Some(0.5, None, True, None)
    assert parse("--rate", "2", "--name", "x", "--no-deep", "--files", "a", "b") == Some(2.0, "x", False, ["a", "b"])
    with pytest.raises(SystemExit) as error:
        parse("--rat", "x")
    assert error.value.code == 2


def test_a_rank_count_that_does_not_divide_is_one_sentence(world, base_dir, tmp_path):
    fails_in_one_sentence("cold_start.py", "--model", base_dir, "--data", world["train_cold_start"], "--mask-probability", "1",
                          "--batch-pairs", "3", "--micro-pairs", "2", "--out", tmp_path, says="--batch-pairs 3 is not a multiple")  # fmt: skip
