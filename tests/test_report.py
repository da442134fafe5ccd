"""plumbing/report.py: numbers by hand, nothing untrusted gets through, files that open."""

import json
import re

import numpy as np
import pytest

import evaluate
from data import PreferencePair
from plumbing import report
from rules import DIMENSIONS
from tests.test_answers import cot

NASTY = '<script>alert(1)</script><img src=x onerror=alert(2)>" onload="x $\\frac{1 | `a` [b](http://c) & =1+1'


def judged(margins, labels, name="ours", prompts=None, extra=None):
    """One Agreement and its pairs. Reward of A = margin, of B = 0."""
    prompts = prompts or [f"prompt {k}" for k in range(len(labels))]
    pairs = [PreferencePair(f"{k}a.mp4", f"{k}b.mp4", prompt, label, line=k + 2, extra=extra or {})
             for k, (label, prompt) in enumerate(zip(labels, prompts))]
    one = evaluate.measure(name, pairs, np.array([[m, 0.0] for m in margins]))
    one.numbers.update(data="pairs.csv", benchmark=None, skipped_pairs=0, skipped_videos=0, difference_to_first=None)
    return one, pairs


# ---------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------
def test_thought_statistics():
    truth = {"subject": "2", "dynamics": "0", "camera": "N/A", "environment": "0", "style": "1"}
    good = cot(subject="2", dynamics="1", camera="N/A", environment="0", style="2")
    pairs = [PreferencePair("a", "b", "p", 1, annotation_a=truth)]
    records = [
        {"video": "a", "prompt": "p", "thoughts": [good, "broken"], "tokens": [10, 20], "ended": [True, False]},
        {"video": "b", "prompt": "p", "thoughts": [good], "tokens": [60], "ended": [True]},  # no annotation: no verdict
    ]
    done = report.thought_statistics(records, pairs)
    assert (done["cots"], done["malformed_share"]) == (3, pytest.approx(1 / 3))
    assert done["cut_off"] == 1
    assert (done["tokens_mean"], done["tokens_median"], done["tokens_max"]) == (30, 20, 60)
    # The good CoT is right about subject, camera and environment; the broken one about nothing.
    assert done["verdict_accuracy"] == dict(zip(DIMENSIONS, [0.5, 0, 0.5, 0.5, 0]))


def test_pairs_of_models_do_not_care_who_was_shown_as_a():
    one, two = {"A_model": "x", "B_model": "y"}, {"A_model": "y", "B_model": "x"}
    pairs = [PreferencePair("a", "b", "p", label, extra=e) for label, e in ((1, one), (1, two), (0, one))]
    done = evaluate.measure("m", pairs, np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]))
    (row,) = done.numbers["model_pairs"]
    assert (row["models"], row["pairs"], row["without_ties"]) == (("x", "y"), 3, 0.5)


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------
def test_report_files_and_escaping(tmp_path, capsys):
    extra = {"A_model": NASTY, "B_model": "fine"}
    one, _ = judged([2.0, -1.0, 0.1, 3.0], [1, -1, 0, -1], name=NASTY, extra=extra)
    one.numbers["benchmark"] = "genai-bench"
    report.write(str(tmp_path), [one], videoalign=True)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["accuracy_without_ties"] == pytest.approx(2 / 3) and numbers["accuracy_with_ties"] == 0.75
    text = (tmp_path / "report.md").read_text()
    assert "| DeScore | published | 0.734 | 0.504 | 0.765 | 0.568 | 0.768 |" in text
    assert "this run | - | 0.750 | 0.667 | - | - |" in text  # in GenAI-Bench's columns, nowhere else
    assert "<script" not in text and "<img" not in text and not re.search(r"(?<!\\)\$", text)
    rows = [line for line in text.splitlines() if line.startswith("|") and "script" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", line)) in (6, 8, 9) for line in rows)  # no cell breaks the table
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"  # a lone $ in a name would have raised
    assert "0.750" in capsys.readouterr().out


def test_a_report_of_one_pair_or_of_ties_only(tmp_path):
    for margins, labels in (([1.0], [1]), ([1.0, 2.0], [0, 0]), ([0.0, 0.0, 0.0], [1, -1, 0])):
        report.write(str(tmp_path), [judged(margins, labels)[0]])
        json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN in JSON
