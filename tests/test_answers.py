"""What a CoT says, read once and strictly: the rules of stage 2, the report and the toy all ask rules.py."""

import json
import signal

import pytest

from rules import DIMENSIONS, extract_answer, read_verdicts, stated_score, well_formed

TRUTH = {"subject": "2", "dynamics": "1", "camera": "N/A", "environment": "2", "style": "0"}


def cot(**changes):
    """A good CoT, with some verdicts changed."""
    verdicts = json.dumps({"dimensional_scores": TRUTH | changes, "overall_score": 3.5})
    return f"<think>\nsubject: ...\n</think>\n<answer>{verdicts}</answer>"


FENCED = cot().replace("<answer>", "<answer>\n```json\n").replace("</answer>", "\n```\n</answer>")
GOOD = [cot(), "  " + cot() + "\n", cot(style=0), cot(camera="n/a"), FENCED, FENCED.replace("json", "")]
MALFORMED = [  # the list of all tests that need a bad one
    "", "no tags", "<think>", "no thought <answer>{}</answer>", "<think>\n</think>\n<answer>{",
    cot().replace("<think>", ""), cot().replace("</think>", ""), cot().replace("<answer>", ""), cot() + "more",
    cot().removesuffix("</answer>"), cot()[:-20], cot() + cot(), FENCED.replace("\n```\n", ""),
    cot(style="3"), cot(style=None), cot(style=True), cot(style=[2]), cot().replace('"style"', '"stile"'),
    cot().replace('"dimensional_scores"', '"scores"'), cot().replace("subject: ...", "<think>"),
    "<think></think>" + cot()[cot().index("<answer>"):], '<think>x</think><answer>["a"]</answer>',
    '<think>x</think><answer>{"dimensional_scores": "2"}</answer>',
    '<think>x</think><answer>{"dimensional_scores": {"subject": "2"}}</answer>',
]


@pytest.mark.parametrize("text", GOOD)
def test_a_good_answer(text):
    assert well_formed(text) and read_verdicts(text) == TRUTH  # 0 and "0" are the same verdict; a fence is no fault


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_answer(text):
    assert not well_formed(text)


ROUNDS = 100_000  # in cubic time 200 tags cost seconds, 1,000 minutes


@pytest.mark.parametrize("text", [
    "<answer>" * 1000, "<answer>" * ROUNDS, "<answer>x" * ROUNDS + "</answer>", "</answer>" * ROUNDS,
    "<answer></answer>" * ROUNDS, "<think>" * ROUNDS, "<think></think>" * ROUNDS, " " * ROUNDS, "<think>x" * ROUNDS,
    "<think>x</think>" + " " * ROUNDS, "<answer>```" + " " * ROUNDS + "x```</answer>", "```" * ROUNDS,
    "<think>x</think><answer>{" + '"a": 1, ' * (ROUNDS // 10) + "</answer>",  # Python's own parser: slow, but linear
    "<think>" + "the circle moves left and " * 4096,  # a CoT that loops until it is cut off
], ids=lambda text: f"{text[:20]}... {len(text)}")
def test_reading_takes_linear_time(text):
    """Bounded by the processor time of this process, not by the clock: linear is under a second, quadratic for ever."""
    def too_long(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10)
    try:
        assert not well_formed(text) and stated_score(text) is None and read_verdicts(text) == {}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_verdicts_are_read_one_by_one():
    """A dimension that is left out, or whose verdict is none, costs only itself; what is no dimension is not read."""
    left = {dimension: TRUTH[dimension] for dimension in ("subject", "dynamics", "environment")}
    assert read_verdicts(cot(style=True, camera="5", mood="2")) == left
    assert read_verdicts("<answer>{'dimensional_scores': {'subject': 2}}</answer>") == {"subject": "2"}
    huge = f"<answer>{{'dimensional_scores': {{'subject': 0x{'f' * 5000}, 'style': '0'}}}}</answer>"
    assert read_verdicts(huge) == {"style": "0"}  # Python writes no integer of so many digits as text
    assert read_verdicts("nothing") == read_verdicts('<answer>{"dimensional_scores": 3}</answer>') == {}
    assert set(read_verdicts(cot())) == set(DIMENSIONS)


@pytest.mark.parametrize("value, score", [
    ("3.5", 3.5), ('"4.5"', 4.5), ("4", 4.0), ("true", None), ("null", None), ('"x"', None), ("NaN", None),
    ("1e999", None), ("[4]", None), ("1000", None), ("0.99", None), ("-3", None), ('"5.01"', None), ("1", 1.0),
    ("5.00", 5.0), ("4" * 400, None), (f'"{"4" * 400}"', None), ("9" * 5000, None),
])
def test_stated_score(value, score):
    assert stated_score(f'x <answer>{{"overall_score": {value}}}</answer>') == score
    assert stated_score("nothing") is None


@pytest.mark.parametrize("text, expected", [
    ('x <answer>{"a": 1}</answer>', {"a": 1}), ("<answer>{'a': None}</answer>", {"a": None}),
    ("<answer>[1]</answer>", None), ("no answer", None), ("<answer>{broken</answer>", None),
    ("<answer>1</answer><answer>{}</answer>", {}), ("<answer>" + "[" * 100_000 + "</answer>", None),
    ('<answer>```json\n{"a": 1}\n```</answer>', {"a": 1}),
])
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected
