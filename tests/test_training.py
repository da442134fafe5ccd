"""What both stages share: how pairs are divided over ranks, and the order of an epoch."""

import multiprocessing
import os

import pytest
import torch

import cold_start
import data
import parallel
from plumbing import training
from plumbing.logs import read_metrics
from plumbing.settings import InputError
from plumbing.training import Run, epoch_order
from tests.conftest import refuses


def test_epoch_order():
    assert sorted(epoch_order(50, 0, 0)) == list(range(50))
    assert epoch_order(50, 0, 0) == epoch_order(50, 0, 0) != epoch_order(50, 0, 1)


def test_a_rank_count_that_does_not_divide_is_one_sentence(world, base_dir, tmp_path, capsys):
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--mask-probability", "1", "--out", tmp_path]
    says = "--batch-pairs 3 is not a multiple"
    refuses(capsys, cold_start.main, *flags, "--batch-pairs", "3", "--micro-pairs", "2", says=says)


def test_two_runs_at_once_do_not_share_a_folder(tmp_path):
    """For minutes a run leaves nothing there that tells. The lock goes with the process, however it ends."""
    context, out = multiprocessing.get_context("fork"), str(tmp_path)
    held, end = context.Event(), context.Event()

    def other():
        training._hold(out)
        held.set()
        end.wait(60)

    process = context.Process(target=other)
    process.start()
    assert held.wait(60)
    with pytest.raises(InputError, match="another run is under way in it"):
        training._hold(out)
    process.kill()
    process.join()
    training._hold(out)
    training._hold(out)  # the same process: a training, and then its --resume


def test_steps_that_the_epochs_do_not_give_are_said(world, base_dir, tmp_path, capsys):
    """--max-steps 9, but two epochs of one batch: two steps, and a line that says why."""
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--out", str(tmp_path), "--workers", "0"]
    flags += ["--mask-probability", "1", "--batch-pairs", "4", "--lora-r", "4"]
    cold_start.main([*flags, "--epochs", "2", "--max-steps", "9"])
    assert "stage 1: 2 steps, not --max-steps 9: --epochs 2" in capsys.readouterr().out
    assert len(read_metrics(str(tmp_path))) == 2


@pytest.fixture
def begin(model, world, base_dir, tmp_path):
    """begin(seed=0, ...) -> a Run of three epochs over 8 pairs, 2 a step; query and head are trained."""
    model.make_trainable("head", vision=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def start(**flags):
        read = {"data": world["train_cold_start"], "model": base_dir}
        settings = cold_start.Settings(**read, out=str(tmp_path), batch_pairs=2, epochs=3, **flags)
        pairs = [data.PreferencePair("a", "b", "a prompt", 1, line=line) for line in range(8)]
        return Run("a run", model, optimizer, pairs, settings, parallel.Ranks())

    return start


def epochs_of(run):
    """[epoch][place]: which pairs are drawn."""
    drawn = list(run.draws())
    return [[pair for epoch, pairs in drawn if epoch == k for pair in pairs] for k in range(3)]


def test_each_epoch_draws_every_pair_once_in_an_order_of_its_own_and_of_the_seed(begin):
    """What the loop gets, not only what the helper can do."""
    first, other = epochs_of(begin(seed=0)), epochs_of(begin(seed=1))
    orders = [*first, *other]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(map(tuple, orders))) == 6


@pytest.mark.parametrize("every, saved", [(0, [12]), (5, [5, 10, 12]), (6, [6, 12])])
def test_a_checkpoint_is_saved_when_due_and_at_the_end(begin, tmp_path, every, saved):
    """--save-every 0: at the end alone, but there; what is not saved is lost."""
    run = begin(save_every=every, keep=99)
    for step in run.steps():
        run.save(step, {})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"step-{step:06d}" for step in saved]
