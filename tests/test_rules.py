"""rules.py: the rollout reward by hand, and what each rule counts as wrong."""

import pytest

import rules
from tests.test_answers import MALFORMED, TRUTH, cot


def test_rollout_reward_by_hand():
    # 4 of 5 right, well formed, 1,250 tokens: .7 * .8 + .1 * 1 + .2 * (750 / 1500) = .56 + .1 + .1 = .76
    reward = rules.rollout_reward(cot(style="2"), 1250, TRUTH)
    assert (reward.quality, reward.format, reward.length) == (0.8, 1.0, 0.5)
    assert reward.total == pytest.approx(0.76)
    assert rules.rollout_reward(cot(), 2000, TRUTH).total == pytest.approx(1.0)
    assert rules.rollout_reward("gibberish", 100, TRUTH).total == 0.0


@pytest.mark.parametrize("tokens, expected", [(0, 0), (500, 0), (501, 1 / 1500), (1250, 0.5), (2000, 1), (4096, 1)])
def test_length_reward_is_linear_in_tokens(tokens, expected):
    assert rules.length_reward(tokens) == pytest.approx(expected)


def test_quality_counts_what_is_left_out_as_wrong():
    text = '<think>x</think><answer>{"dimensional_scores": {"subject": 2}}</answer>'
    assert rules.quality_reward(text, TRUTH) == pytest.approx(1 / 5)
    assert rules.quality_reward(cot(), {"subject": "2"}) == 1.0  # only annotated dimensions count
    assert rules.quality_reward(cot(camera="n/a"), TRUTH) == 1.0


def test_what_is_malformed_loses_the_format_reward_only():
    assert [rules.format_reward(text) for text in (cot(), *MALFORMED)] == [1.0] + [0.0] * len(MALFORMED)
    # style "3" is no verdict: not well formed, and 4 of 5 right: .7 * .8 + 0 + .2 * 1 = .76
    assert rules.rollout_reward(cot(style="3"), 2000, TRUTH).total == pytest.approx(0.76)


@pytest.mark.parametrize("answer", ['{{"subject": "2"}}', "{[1]: 2}", "{set()}"])
def test_a_literal_that_cannot_exist_is_no_answer(answer):
    """A set of a dict is Python's grammar, and a TypeError: one such CoT of thousands would end a step of stage 2."""
    assert rules.extract_answer(f"<answer>{answer}</answer>") is None
    assert rules.rollout_reward(f"<think>a</think><answer>{answer}</answer>", 2000, TRUTH).quality == 0


def test_a_cot_makes_no_noise(recwarn):
    """What is sampled is no code of ours: "1and" is a SyntaxWarning to Python's parser, once for each such CoT."""
    with pytest.raises(ValueError, match="neither JSON"):
        rules.parse_literal("[1and 2]")
    assert not recwarn.list
