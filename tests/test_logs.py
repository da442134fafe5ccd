"""metrics.jsonl after a kill."""

import json

import pytest

import parallel
from plumbing import logs


def test_half_a_metrics_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert logs.read_metrics(str(tmp_path)) == [{"step": 1}]


def test_a_resume_keeps_the_lines_up_to_its_checkpoint_and_writes_the_missing_one(tmp_path):
    lines = [json.dumps({"step": k, "seconds": 1.0, "val_accuracy": k / 10}) for k in (1, 2, 3)]
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    logs.Log(str(tmp_path), parallel.Ranks(), {"step": 2, "metrics": {"loss": 0.5}})
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_text() == "\n".join(lines[:2]) + "\n"  # step 2's own line, not a new one
    logs.Log(str(tmp_path), parallel.Ranks(), {"step": 3, "metrics": {"loss": 0.5}})  # killed before its line
    assert [(line["step"], line.get("loss")) for line in logs.read_metrics(str(tmp_path))] == [(1, None), (2, None),
                                                                                              (3, 0.5)]


def test_the_scale_of_rewards_is_that_of_the_last_quarter_with_the_spread_of_its_means(tmp_path):
    """Eight steps; the last two have means 1 and 3 and standard deviations 2 and 4. All their rewards together: mean 2,
    mean square ((4 + 1) + (16 + 9)) / 2 = 15, variance 15 - 2^2 = 11 (10 within the steps, and 1 between them)."""
    values = [(100.0, 50.0)] * 6 + [(1.0, 2.0), (3.0, 4.0)]
    lines = [{"step": k, "reward_mean": m, "reward_std": s} for k, (m, s) in enumerate(values, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert logs.reward_scale(str(tmp_path)) == pytest.approx({"reward_mean": 2.0, "reward_std": 11**0.5})
