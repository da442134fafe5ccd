"""The coupled generative model: rewards by hand, both ways round; the script from a base."""

import json

import pytest

import data
import evaluate
import grpo
from lab.study import coupled
from plumbing import logs
from tests.conftest import refuses
from tests.test_answers import cot
from tests.test_hub import cache, lora_dir  # noqa: F401


def stating(score, good=True):
    return cot().replace("3.5", str(score)) + ("" if good else " and more")


def judged(processor, texts_a, texts_b, label):
    encode = processor.tokenizer
    pair = data.PreferencePair("a", "b", "a prompt", label)
    cots = [[data.encode_cot(encode, text) for text in row] for row in (texts_a, texts_b)]
    rollouts = grpo.PairRollouts(pair, [{}, {}], cots)
    return coupled.preference_rewards(rollouts, encode, coupled.Settings(length_low=1, length_high=2))


def test_rewards_by_hand(processor):
    a, b = [stating(4), stating(2)], [stating(3), stating(2)]
    first, second = judged(processor, a, b, +1)
    assert [r.quality for r in first] == [1.0, 0.25]
    assert [r.quality for r in second] == [0.5, 0.75]  # 3 is below 4 alone; 2 is below 4 and equals 2: (1 + 1/2) / 2
    assert first[1].total == pytest.approx(0.7 * 0.25 + 0.1 + 0.2)  # good format, long enough
    # the other wins: what was right is now wrong, and equal stays equal
    first, second = judged(processor, a, b, -1)
    assert [r.quality for r in first] == [0.0, 0.75] and [r.quality for r in second] == [0.5, 0.25]
    # the same pair shown the other way round
    assert judged(processor, b, a, -1) == [*reversed(judged(processor, a, b, +1))]
    # nobody wins: nothing to learn
    assert {r.quality for row in judged(processor, a, b, 0) for r in row} == {0.5}


def test_a_malformed_answer_wins_nothing(processor):
    first, second = judged(processor, [stating(5, good=False), "gibberish"], [stating(2), stating(3)], +1)
    assert [r.quality for r in first] == [0.0, 0.0] and first[0].format == 0.0
    assert [r.quality for r in second] == [1.0, 0.75]  # gibberish counts as 3: 2 is below it, 3 equals it
    assert first[1].total == pytest.approx(0.2)  # its length is all it has


def test_from_a_base_model_on_pairs_without_verdicts(world, base_dir, tmp_path, capsys):
    """Labels are enough; the head is new, nothing trains it, and nobody may take it for a score."""
    out = tmp_path / "coupled"
    flags = ["--model", base_dir, "--out", out, "--rollouts", "2", "--batch-pairs", "1", "--mini-pairs", "1",
             "--max-new-tokens", "4", "--workers", "0", "--max-steps", "1"]
    coupled.main([*map(str, flags), "--data", world["train_cold_start"]])
    line = logs.read_metrics(str(out))[0]
    assert line["quality"] == line["format"] == 0 and line["grad_norm_head"] == 0
    with open(out / "model/descore.json", encoding="utf-8") as file:
        assert json.load(file)["score"] == "text"
    say = ["--model", out / "model", "--data", world["test_in_domain"], "--out", tmp_path / "e"]
    say += ["--max-new-tokens", "4"]
    refuses(capsys, evaluate.main, *say, says="--score-from text")
    evaluate.main([*map(str, say), "--score-from", "text"])
    assert (tmp_path / "e/text/report.json").exists()
    refuses(capsys, grpo.main, *flags, "--overwrite", "--data", world["train_rl"], says="descore.json")


def test_from_a_descore_of_the_hub(cache, world, tmp_path):  # noqa: F811
    """By its name: it has a head, so this is no base model, and the checkpoint does not say that its score is text."""
    flags = ["--model", "someone/descore@v1", "--out", tmp_path, "--rollouts", "2", "--batch-pairs", "1",
             "--mini-pairs", "1", "--max-new-tokens", "4", "--workers", "0", "--max-steps", "1"]
    coupled.main([*map(str, flags), "--data", world["train_cold_start"]])
    saved = json.loads((tmp_path / "model/descore.json").read_text())
    assert "score" not in saved and "@" not in str(saved.get("base_model"))


def test_rules_still_want_verdicts(world, tiny_model_dir, tmp_path, capsys):
    flags = ["--model", tiny_model_dir, "--out", tmp_path / "x", "--batch-pairs", "1", "--mini-pairs", "1"]
    refuses(capsys, grpo.main, *flags, "--data", world["train_cold_start"], says="has no video_1_scores")


def test_win_shares_by_hand():
    # 4 beats 3 and 2; 2 loses to 3 and meets its equal: (0 + 1/2) / 2
    assert coupled.win_shares([4, 2], [3, 2]) == [1.0, 0.25]
    assert coupled.win_shares([3, 2], [4, 2]) == [0.5, 0.25]
