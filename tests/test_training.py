"""What both stages share: how pairs are divided over ranks, and the order of an epoch."""

import cold_start
from plumbing.logs import read_metrics
from plumbing.training import epoch_order
from tests.conftest import refuses


def test_epoch_order():
    assert sorted(epoch_order(50, 0, 0)) == list(range(50))
    assert epoch_order(50, 0, 0) == epoch_order(50, 0, 0) != epoch_order(50, 0, 1)


def test_a_rank_count_that_does_not_divide_is_one_sentence(world, base_dir, tmp_path, capsys):
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--mask-probability", "1", "--out", tmp_path]
    says = "--batch-pairs 3 is not a multiple"
    refuses(capsys, cold_start.main, *flags, "--batch-pairs", "3", "--micro-pairs", "2", says=says)


def test_steps_that_the_epochs_do_not_give_are_said(world, base_dir, tmp_path, capsys):
    """--max-steps 9, but two epochs of one batch: two steps, and a line that says why."""
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--out", str(tmp_path), "--workers", "0"]
    flags += ["--mask-probability", "1", "--batch-pairs", "4", "--lora-r", "4"]
    cold_start.main([*flags, "--epochs", "2", "--max-steps", "9"])
    assert "stage 1: 2 steps, not --max-steps 9: --epochs 2" in capsys.readouterr().out
    assert len(read_metrics(str(tmp_path))) == 2
