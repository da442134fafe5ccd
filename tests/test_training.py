"""What both stages share: how pairs are divided over ranks, and the order of an epoch."""

import cold_start
from conftest import refuses
from plumbing.training import epoch_order


def test_epoch_order():
    assert sorted(epoch_order(50, 0, 0)) == list(range(50))
    assert epoch_order(50, 0, 0) == epoch_order(50, 0, 0) != epoch_order(50, 0, 1)


def test_a_rank_count_that_does_not_divide_is_one_sentence(world, base_dir, tmp_path, capsys):
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--mask-probability", "1", "--out", tmp_path]
    says = "--batch-pairs 3 is not a multiple"
    refuses(capsys, cold_start.main, *flags, "--batch-pairs", "3", "--micro-pairs", "2", says=says)
