"""What is logged of a step, by hand. (Stage 2's shares: test_objectives.py; its samples: test_grpo.py.)"""

import json
from types import SimpleNamespace

import pytest
import torch

import cold_start
import grpo
from data import PreferencePair
from plumbing import logs
from plumbing.logs import Sums


def test_stage_1_metrics_by_hand():
    """Three pairs in two forwards; the last one is a human tie, whose margin and accuracy do not count.

    |   | r_A | r_B | label | r_w - r_l | CoT hidden |
    | 1 | 2   | 1   | A     | 1         | yes        |
    | 2 | 0   | 3   | A     | -3        | no         |
    | 3 | 1   | 1   | same  |           | no         |
    """
    sums, loss = Sums(), torch.tensor(0.25)
    r_a, r_b, label = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, 1.0]), torch.tensor([1, 1, 0])
    for part, hidden in ((slice(0, 2), [True, False]), (slice(2, 3), [False])):
        logs.log_scores(sums, loss, r_a[part], r_b[part], label[part], hidden)
    metrics = logs.cold_start_metrics(sums.totals(), cold_start.Settings(batch_pairs=3))
    assert metrics == pytest.approx({
        "loss": 0.5,  # each forward's loss has the batch's denominator already: they add up
        "accuracy": 1 / 2, "margin": (1 - 3) / 2,
        "reward_mean": 8 / 6, "reward_std": (16 / 6 - (8 / 6) ** 2) ** 0.5,  # 2 + 0 + 1 + 1 + 3 + 1 = 8; squares 16
        "masked_share": 1 / 3,
    })


def two_rollouts():
    """A pair, two CoTs of two tokens for each video; A is the winner. The engine saw each token otherwise."""
    truths = {"TA": 1}, {"TA": 2}
    pair = PreferencePair("a.mp4", "b.mp4", "a cat", 1, line=2, annotation_a=truths[0], annotation_b=truths[1])
    cots = [[[5, 6], [7, 8]], [[9, 10], [11, 12]]]
    seen = [[[-1.0, -1.0], [-1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]]
    rewards = [[grpo.RolloutReward(t, t, t, t) for t in row] for row in ((0.2, 0.9), (0.7, 0.1))]
    return grpo.PairRollouts(pair, [], cots, seen, rewards, advantages=torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def test_the_gap_to_the_engine_does_not_cancel():
    """Tokens that differ by +.5 and -.5: the gap is .5, not 0. Four CoTs of two tokens, one of them masked."""
    old = torch.tensor([[-0.5, -1.5], [-1.5, -0.5], [-0.5, -1.5], [-1.5, 99.0]])
    mask = torch.ones(4, 2)
    mask[3, 1] = 0
    output = SimpleNamespace(log_probs=old, rewards=torch.tensor([1.0, 0.0, 0.0, 2.0]))
    sums = Sums()
    logs.log_update(sums, output, mask, old, two_rollouts(), grpo.Settings(), {"tokens": 7, "bt": 2})
    assert sums.totals()["engine_gap"] == pytest.approx(0.5)


def test_samples_are_the_first_videos_best_and_worst_with_its_own_truth(tmp_path):
    path = str(tmp_path / "samples.jsonl")
    logs.write_samples(path, 7, two_rollouts(), ["worse", "better"])
    lines = [json.loads(line) for line in open(path)]
    assert [(line["cot"], line["total"]) for line in lines] == [("worse", 0.2), ("better", 0.9)]
    assert [line["advantage"] for line in lines] == [-1, 1]
    assert all((line["video"], line["truth"], line["step"]) == ("a.mp4", {"TA": 1}, 7) for line in lines)
