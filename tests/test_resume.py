"""A run that ends and goes on: Ctrl-C, checkpoints, a kill while saving, a loss that is not finite."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import cold_start
import data
import parallel
from model import DeScore
from plumbing import resume, training
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


def test_a_second_sigterm_does_not_stop_at_once(stop, capsys):
    """systemd and slurm send it to torchrun and to its ranks, and torchrun then hands it on to the ranks again."""
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested and capsys.readouterr().err.count("stopping after this step") == 1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_under_torchrun_too(stop):
    """It hands on the first as SIGINT and the second, its own end, as SIGTERM."""
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_other_ranks_stop_silently(stop, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    signal.raise_signal(signal.SIGINT)
    assert stop.requested and not capsys.readouterr().err


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
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
    training.require_finite([(1.5, rows)], "loss", stage, ranks)
    assert not os.listdir(tmp_path)
    with pytest.raises(
        data.InputError, match="pairs.csv: the gradient norm is nan at line 3, 12 .*not_finite.jsonl"
    ):
        training.require_finite([(1.0, [{"line": 9}]), (float("nan"), rows)], "gradient norm", stage, ranks)
    assert [json.loads(line) for line in open(tmp_path / "not_finite.jsonl")] == rows


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


@pytest.mark.parametrize("name", ["step.json", "random-0.pt", "state/__0_0.distcp", "state/.metadata"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_without_it(model, tmp_path, name):
    model.make_trainable("head", vision=False)
    optimizer, ranks = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), parallel.Ranks()
    for step in (1, 2):
        resume.save_checkpoint(str(tmp_path), step, model, optimizer, ranks)
    newest = tmp_path / "checkpoints/step-000002"
    for size in ((newest / name).stat().st_size // 2, 0, None):
        os.truncate(newest / name, size) if size is not None else os.remove(newest / name)
        with pytest.raises(resume.InputError, match="step-000002: is damaged, .*; delete this folder") as told:
            resume.load_checkpoint(str(tmp_path), model, optimizer, ranks)
        assert len(str(told.value).splitlines()) == 1
    shutil.rmtree(newest)
    assert resume.load_checkpoint(str(tmp_path), model, optimizer, ranks)["step"] == 1


@pytest.mark.parametrize("steps", [(1, 2), (9, 10), (999_999, 1_000_000)])
def test_the_newest_checkpoint_is_loaded(model, tmp_path, steps):
    """Not the oldest: its work would be lost, and no number would look wrong."""
    model.make_trainable("head", vision=False)
    optimizer, ranks = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), parallel.Ranks()
    for step in steps:
        with torch.no_grad():
            model.query.fill_(float(step))
        resume.save_checkpoint(str(tmp_path), step, model, optimizer, ranks)
    with torch.no_grad():
        model.query.fill_(0.0)
    assert resume.load_checkpoint(str(tmp_path), model, optimizer, ranks)["step"] == steps[-1]
    assert torch.equal(model.query, torch.full_like(model.query, steps[-1]))


def test_what_is_written_is_what_was_there_when_it_was_saved(model, tmp_path, monkeypatch):
    """Beside the training: the step returns while the file is not there yet, and later updates do not reach it."""
    model.make_trainable("head", vision=False)
    optimizer, ranks = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), parallel.Ranks()
    background, go, real = resume.Background(), threading.Event(), os.rename
    monkeypatch.setattr(os, "rename", lambda *names: go.wait(60) and real(*names))
    with torch.no_grad():
        model.query.fill_(1.0)
    resume.save_checkpoint(str(tmp_path), 1, model, optimizer, ranks, begin=background.begin)
    with torch.no_grad():
        model.query.fill_(2.0)
    background.look()  # not done, and no error
    assert not resume.checkpoints_of(str(tmp_path))
    go.set()
    background.wait()
    assert resume.load_checkpoint(str(tmp_path), model, optimizer, ranks)["step"] == 1
    assert torch.equal(model.query, torch.ones_like(model.query))


def test_a_second_save_waits_for_the_first():
    background, order = resume.Background(), []
    background.begin(lambda: (time.sleep(0.2), order.append("first")))
    background.begin(lambda: order.append("second"))
    background.wait()
    assert order == ["first", "second"]


def test_what_a_save_ends_with_is_told_at_the_next_step_or_save():
    def fails():
        raise resume.InputError("the disk is full")

    for told in (lambda b: b.begin(print), lambda b: b.wait(), lambda b: [time.sleep(0.2), b.look()]):
        background = resume.Background()
        background.begin(fails)
        with pytest.raises(resume.InputError, match="the disk is full"):
            told(background)
        background.wait()  # once is enough


STAGE_1 = ["--workers", "0", "--batch-pairs", "2", "--epochs", "9", "--mask-probability", "1", "--save-every", "1",
           "--lr", "1e-3", "--lora-r", "4", "--no-train-vision"]
SLOW = """
import os, sys, time
import cold_start
from plumbing.settings import cli
rename = os.rename
def slow(old, new):  # the disk hangs at the third checkpoint, when all of it is written but its name
    if str(new).endswith("step-000003"):
        time.sleep(600)
    rename(old, new)
os.rename = slow
cli(lambda: cold_start.main(sys.argv[1:]))
"""


def test_a_kill_in_the_middle_of_a_write_beside_the_training(world, base_dir, tmp_path):
    """kill -9 while step 3 is written and step 4 waits for it: the checkpoint of step 2 is whole, and the run that
    goes on from there ends as the one that nobody killed, which saved only at its end: to the bit."""
    flags = ["--model", base_dir, "--data", world["train_cold_start"], *STAGE_1, "--max-steps", "5"]
    cold_start.main([*flags, "--out", str(tmp_path / "whole"), "--save-every", "0"])
    cut = tmp_path / "cut"
    command = [sys.executable, "-c", SLOW, *flags, "--out", str(cut)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(read_metrics(str(cut))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    held = sorted(os.listdir(cut / "checkpoints"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert held == ["step-000001", "step-000002", "step-000003.tmp"] and len(read_metrics(str(cut))) == 3
    cold_start.main([*flags, "--out", str(cut), "--resume"])
    assert sorted(os.listdir(cut / "checkpoints")) == ["step-000004", "step-000005"]  # what the kill left is gone
    one, two = (DeScore.from_pretrained(str(tmp_path / name / "model")).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    a, b = (read_metrics(str(tmp_path / name)) for name in ("whole", "cut"))
    assert [line["step"] for line in b] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in a] == [line["loss"] for line in b]


FULL = """
import resource, sys
import cold_start
from plumbing.settings import cli
def main():
    begin = cold_start.train
    def train(*arguments):  # from here on no file may be over 200 kB, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        return begin(*arguments)
    cold_start.train = train
    cold_start.main(sys.argv[1:])
cli(main)
"""
LATER = FULL.replace(".train", ".save_run")  # while checkpoints are written there is room


def test_a_disk_that_takes_no_more_is_one_sentence(world, base_dir, tmp_path):
    """Said at the next step, though a thread met it; what was logged stays, and no half checkpoint has a name."""
    flags = ["--model", base_dir, "--data", world["train_cold_start"], *STAGE_1, "--train", "full"]
    command = [sys.executable, "-c", FULL, *flags, "--max-steps", "9", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 and "step-000001: could not be written (" in lines[0] and "is the disk full" in lines[0]
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1] or len(read_metrics(str(tmp_path))) == 2
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001.tmp"]


def test_a_disk_that_is_full_when_the_model_is_written_costs_no_step(world, base_dir, tmp_path):
    flags = ["--model", base_dir, "--data", world["train_cold_start"], *STAGE_1, "--max-steps", "2"]
    command = [sys.executable, "-c", LATER, *flags, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "/model: could not be written (" in done.stderr and not (tmp_path / "model").exists()
    cold_start.main([*flags, "--out", str(tmp_path), "--resume"])
    assert DeScore.from_pretrained(str(tmp_path / "model")) and len(read_metrics(str(tmp_path))) == 2


HOLD = """
import resource, sys, torch
import data
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
class Fake(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return [torch.zeros(9) for _ in range(4)]
print(len(list(data.take(Fake(), range(60), 2))))
"""


def test_a_batch_of_many_tensors_may_keep_many_files_open(tmp_path):
    """A login shell allows 1,024, which 128 pairs of 2 prefixes of 4 tensors are; here 128, and 240 tensors."""
    (tmp_path / "hold.py").write_text(HOLD)
    found = subprocess.run([sys.executable, tmp_path / "hold.py"], env=os.environ | {"PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True)
    assert found.stdout == "60\n", found.stderr[-500:]
