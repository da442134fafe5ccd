"""The worked examples of docs/change.md: each diff is applied to a copy of the code, and the changed code is run."""

import csv
import json
import re
import shutil
import subprocess

import pytest

from plumbing.checkpoint import HEAD_FILE, read_tensors
from tests import forks
from tests.conftest import ROOT

SOURCES = ("*.py", "plumbing/*.py", "docs/*.diff", "docs/*.md")


@pytest.fixture
def patched(tmp_path):
    """A copy of the code -> a function: name of a diff in docs/ -> the folder, with the diff applied."""
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)

    def apply(name):
        diff = str(tmp_path / "docs" / name)
        done = subprocess.run(["git", "apply", "--verbose", diff], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{name} no longer fits the code: make it anew\n{done.stderr}"
        return tmp_path

    return apply


def run(folder, *command):
    """A command of the changed code, in a process of its own: this one has imported the code as it was."""
    done = forks.run([*map(str, command)], str(folder))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "docs").glob("*.diff"))])
def test_a_diff_is_short_and_shown_on_the_page(name):
    diff = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert len(re.findall(r"^(?:\+(?!\+\+ )|-(?!-- ))", diff, flags=re.MULTILINE)) <= 25
    assert diff.strip() in (ROOT / "docs" / "change.md").read_text(encoding="utf-8"), "the page shows another diff"


def test_second_head(patched, world, base_dir, tmp_path):
    """Three rewards: stage 1 trains each on its own label column, evaluation reads the first."""
    folder = patched("second_head.diff")
    with open(world["test_videogen_rewardbench"], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    root, pairs = world["test_videogen_rewardbench"].rsplit("/", 1)[0], tmp_path / "pairs.csv"
    # Two pairs, six labels, of which two are decided; TA alone would leave the first pair out.
    labels = [{"TA": "same", "VQ": "A", "MQ": "invalid"}, {"TA": "A", "VQ": "same", "MQ": "same"}]
    with open(pairs, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, **label} for row, label in zip(rows, labels))
    out = tmp_path / "out"
    # Stage 1, then inference with what it saved, in one process.
    code = f"""
import sys, torch, cold_start
from model import DeScore

cold_start.main(sys.argv[1:])
frames = [torch.rand(8, 64, 64, 3)]
print(DeScore.from_pretrained({str(out / "model")!r}).reward(frames, ["a"], think=False, source_fps=4).shape)
"""
    printed = run(folder, "-c", code, "--model", base_dir, "--data", pairs, "--video-root", root, "--out", out,
                  "--batch-pairs", 2, "--micro-pairs", 2, "--max-steps", 1, "--mask-probability", 1, "--lora-r", 4,
                  "--workers", 0, "--val", world["test_videogen_rewardbench"], "--lr-head", 0.01)
    before = json.loads((out / "metrics.jsonl").read_text())
    # The head starts near 0, so each decided label has a loss of about ln 2.
    assert before["loss"] == pytest.approx(2 * 0.6931 / 6, abs=0.03)
    head = read_tensors(str(out / "model" / HEAD_FILE))["head.weight"]
    assert head.shape[0] == 3
    assert "torch.Size([1])" in printed


def test_new_rule(patched, world, tiny_model_dir, tmp_path):
    """A rule more: its value by hand, its weight in the total, and its mean in the log of a real step."""
    folder = patched("new_rule.diff")
    code = """
import json, sys, grpo, rules

answer = {"dimensional_scores": {"subject": "2", "dynamics": "1", "camera": "N/A"}, "overall_score": 3.5}
reward = rules.rollout_reward(f"<answer>{json.dumps(answer)}</answer>", 500, {"style": "1"}, (0.7, 0.1, 0.2, 0.1))
print(round(reward.agreement, 4), round(reward.total, 4), rules.agreement_reward("no answer"))
grpo.main(sys.argv[1:])
"""
    printed = run(folder, "-c", code, "--model", tiny_model_dir, "--data", world["train_rl"], "--out", tmp_path / "out",
                  "--rollouts", 2, "--batch-pairs", 1, "--mini-pairs", 1, "--max-new-tokens", 8, "--workers", 0,
                  "--max-steps", 1, "--weight-agreement", 0.1)
    # Verdicts 2 and 1 are 1 + 4 * 3 / 4 = 4; stated is 3.5, half a point away. Weight .1; nothing else is right.
    assert printed.split()[:3] == ["0.5", "0.05", "0.0"]
    metrics = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    parts = 0.7 * metrics["quality"] + 0.1 * metrics["format"] + 0.2 * metrics["length"] + 0.1 * metrics["agreement"]
    assert metrics["rollout_reward"] == pytest.approx(parts)
