"""What is logged of a step, by hand. (Stage 2's shares: test_objectives.py; its samples: test_grpo.py.)"""

import pytest
import torch

import cold_start
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
    metrics = logs.cold_start_metrics(sums, cold_start.Settings(batch_pairs=3))
    assert metrics == pytest.approx({
        "loss": 0.5,  # each forward's loss has the batch's denominator already: they add up
        "accuracy": 1 / 2, "margin": (1 - 3) / 2,
        "reward_mean": 8 / 6, "reward_std": (16 / 6 - (8 / 6) ** 2) ** 0.5,  # 2 + 0 + 1 + 1 + 3 + 1 = 8; squares 16
        "masked_share": 1 / 3,
    })
