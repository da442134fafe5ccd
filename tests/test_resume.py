"""A run that ends and goes on: Ctrl-C, checkpoints, a kill while saving, a loss that is not finite."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import cold_start
import data
import parallel
from plumbing import training
from plumbing.logs import read_metrics
from plumbing.training import StopSignal
from tests.conftest import ROOT


@pytest.fixture
def stop():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield StopSignal()
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_ctrl_c_asks_once_and_tells_of_torchruns_limit(stop, under_torchrun, monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    signal.raise_signal(signal.SIGINT)
    assert stop.requested
    text = capsys.readouterr().err
    assert "stopping after this step" in text
    assert ("torchrun --shutdown-timeout SECONDS" in text) == under_torchrun
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_ranks_stop_silently(stop, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    signal.raise_signal(signal.SIGINT)
    assert stop.requested and not capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "2"])
def test_sigterm_to_the_whole_group_ends_the_run_after_its_step(workers, world, base_dir, tmp_path):
    """As torchrun, slurm and Ctrl-C send it: to the decoders and loader workers, too, which the step still needs."""
    command = [sys.executable, "cold_start.py", "--model", base_dir, "--data", world["train_cold_start"], "--workers",
               workers, "--batch-pairs", "4", "--epochs", "999", "--mask-probability", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while len(read_metrics(str(tmp_path))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "the same command with --resume goes on" in text, text
    last = read_metrics(str(tmp_path))[-1]["step"]
    assert os.listdir(tmp_path / "checkpoints") == [f"step-{last:06d}"] and last < 20


def test_what_is_not_finite_is_kept_with_its_rows(tmp_path):
    stage, ranks = cold_start.Settings(data="pairs.csv", out=str(tmp_path)), parallel.Ranks()
    rows = [{"line": 12, "prompt": "a cat"}, {"line": 3, "prompt": "a dog"}]
    training.require_finite(1.5, "loss", rows, stage, ranks)
    assert not os.listdir(tmp_path)
    with pytest.raises(
        data.InputError, match="pairs.csv: the gradient norm is nan at line 3, 12 .*not_finite.jsonl"
    ):
        training.require_finite(float("nan"), "gradient norm", rows, stage, ranks)
    assert [json.loads(line) for line in open(tmp_path / "not_finite.jsonl")] == rows


def test_checkpoints_on_disk_are_bounded(model, tmp_path):
    model.make_trainable("head", vision=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(1, 5):
        training.save_checkpoint(str(tmp_path), step, model, optimizer, parallel.Ranks(), keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000003", "step-000004"]


def test_a_kill_while_saving_leaves_the_checkpoint_before(model, tmp_path, monkeypatch):
    model.make_trainable("head", vision=False)
    optimizer, ranks = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), parallel.Ranks()
    training.save_checkpoint(str(tmp_path), 1, model, optimizer, ranks)
    for breaks in ("torch.save", "os.rename", "json.dump"):
        with monkeypatch.context() as patch, pytest.raises(BaseException):  # the library wraps some of them
            patch.setattr(breaks, lambda *_, **__: (_ for _ in ()).throw(InterruptedError))
            training.save_checkpoint(str(tmp_path), 2, model, optimizer, ranks)
        assert training.load_checkpoint(str(tmp_path), model, optimizer, ranks)["step"] == 1
    training.save_checkpoint(str(tmp_path), 2, model, optimizer, ranks)  # what the kill left is no obstacle
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("steps", [(1, 2), (9, 10), (999_999, 1_000_000)])
def test_the_newest_checkpoint_is_loaded(model, tmp_path, steps):
    """Not the oldest: its work would be lost, and no number would look wrong."""
    model.make_trainable("head", vision=False)
    optimizer, ranks = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), parallel.Ranks()
    for step in steps:
        with torch.no_grad():
            model.query.fill_(float(step))
        training.save_checkpoint(str(tmp_path), step, model, optimizer, ranks)
    with torch.no_grad():
        model.query.fill_(0.0)
    assert training.load_checkpoint(str(tmp_path), model, optimizer, ranks)["step"] == steps[-1]
    assert torch.equal(model.query, torch.full_like(model.query, steps[-1]))
