"""evaluate.py: the metric against its definition, the two phases against kills and ranks, the command line."""

import collections
import contextlib
import csv
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import evaluate
from data import InputError, PreferencePair
from evaluate import accuracy_with_ties, accuracy_without_ties
from lab import best_of
from plumbing import jobs
from plumbing.settings import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------------------
# The metric
# ---------------------------------------------------------------------------------------------------------------
def brute_force_with_ties(labels, margins):
    """The definition, word by word: try every threshold that there is, take the best, the smallest of equals."""

    def share_right(threshold):
        said = [0 if abs(m) <= threshold else (1 if m > 0 else -1 if m < 0 else None) for m in margins]
        return sum(a == b for a, b in zip(said, labels)) / len(labels)

    candidates = [-1.0, *sorted({abs(m) for m in margins})]
    best = max(map(share_right, candidates))
    return best, next(t for t in candidates if share_right(t) == best)


def random_case(rng):
    """Labels, and margins from a small grid so that equal |margin|, zero and opposite signs are common."""
    n = rng.randint(1, 12)
    return [rng.choice([1, -1, 0]) for _ in range(n)], [rng.choice([-2, -1, -0.5, 0, 0.5, 1, 2, 3]) for _ in range(n)]


def test_with_ties_equals_the_definition_on_random_cases_with_repeated_margins():
    rng = random.Random(0)
    for _ in range(4000):
        labels, margins = random_case(rng)
        assert accuracy_with_ties(labels, margins) == brute_force_with_ties(labels, margins), (labels, margins)


def test_without_ties_equals_the_definition_on_random_cases():
    rng = random.Random(1)
    for _ in range(2000):
        labels, margins = random_case(rng)
        kept = [(label, margin) for label, margin in zip(labels, margins) if label != 0]
        if kept:
            expected = sum((m > 0) == (label > 0) and m != 0 for label, m in kept) / len(kept)
            assert accuracy_without_ties(labels, margins) == expected


def test_hand_worked_numbers():
    # Right, wrong because equal, right, human tie dropped: 2 of 3.
    assert accuracy_without_ties([1, 1, -1, 0], [2, 0, -1, 5]) == 2 / 3
    # |margin| .5 is the human tie; calling it a tie makes all three right.
    assert accuracy_with_ties([1, 0, -1], [2, 0.5, -1]) == (1.0, 0.5)
    # No human ties and all signs right: the best is to tie nothing, which is threshold -1.
    assert accuracy_with_ties([1, -1, 1, -1], [1, -2, 3, -4]) == (1.0, -1.0)
    # A run of equal |margin| 1 with labels 0, A, A (all predicted A): tying the run wins 1 and loses 2, so it stays
    # untied: 2 of 3. A cut inside the run would claim 3 of 3.
    assert accuracy_with_ties([0, 1, 1], [1, 1, 1]) == (2 / 3, -1.0)
    # A flipped sign must be visible: everything wrong without ties.
    assert accuracy_without_ties([1, -1], [-1, 2]) == 0.0
    # Two models that are equally good at two thresholds: the smaller one is reported.
    assert accuracy_with_ties([0, 1, 0], [1, 2, 3]) == (2 / 3, 1.0)


def test_videoalign_compatible_never_tries_nothing_is_tied_and_cuts_inside_runs():
    assert evaluate.videoalign_compatible([1, -1, 1, -1], [1, -2, 3, -4]) == 0.75  # the smallest is always a tie: wrong
    # Equal |margin| 1, in file order (0, A, A): after the first is tied all three are right. Ordered (A, A, 0) the cuts
    # give A tied: 1 right (the other A); A, A tied: 0; all tied: 1 -> 1/3. The definition says 2/3 for both orders.
    assert evaluate.videoalign_compatible([0, 1, 1], [1, 1, 1]) == 1.0
    assert evaluate.videoalign_compatible([1, 1, 0], [1, 1, 1]) == 1 / 3


def test_videoalign_compatible_agrees_with_the_definition_up_to_one_pair_when_margins_differ():
    rng = np.random.default_rng(0)
    for _ in range(200):
        labels, margins = rng.integers(-1, 2, 50), rng.normal(size=50)
        gap = accuracy_with_ties(labels, margins)[0] - evaluate.videoalign_compatible(labels, margins)
        assert 0 <= gap <= 1 / 50 + 1e-12


def test_row_order_does_not_matter_and_inputs_stay_as_they_are():
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels, margins = rng.integers(-1, 2, 30), rng.integers(-4, 5, 30) / 2
        labels[0] = 1
        before, order = (labels.copy(), margins.copy()), rng.permutation(30)
        for metric in (accuracy_with_ties, accuracy_without_ties, evaluate.accuracy_with_ties_cross_fitted):
            assert metric(labels, margins) == metric(labels[order], margins[order])
        assert (labels == before[0]).all() and (margins == before[1]).all()


def test_with_ties_is_never_below_the_share_of_human_ties():
    rng = np.random.default_rng(0)
    for _ in range(100):
        labels, margins = rng.integers(-1, 2, 20), rng.normal(size=20)
        assert accuracy_with_ties(labels, margins)[0] >= (labels == 0).mean()


def test_cross_fitting_takes_the_flattery_out():
    # Scores that know nothing, labels .40/.35/.25: no threshold is right for more than .75 / 2 = .375 in expectation
    # (nothing tied). Tuning on the same 100 pairs claims more.
    tuned, fair = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        labels, margins = rng.choice([1, -1, 0], size=100, p=[0.40, 0.35, 0.25]), rng.normal(size=100)
        tuned.append(accuracy_with_ties(labels, margins)[0])
        fair.append(evaluate.accuracy_with_ties_cross_fitted(labels, margins))
    assert np.mean(tuned) > 0.38 and np.mean(fair) < 0.375
    # A margin that says it all loses nothing: labels 0 have |margin| 1, others 10.
    labels = np.array([1, -1, 0, 0] * 10)
    assert evaluate.accuracy_with_ties_cross_fitted(labels, np.where(labels == 0, 1, 10 * labels)) == 1.0
    assert np.isnan(evaluate.accuracy_with_ties_cross_fitted([1], [2.0]))


def test_bootstrap_interval():
    hits = np.array([1] * 80 + [0] * 20)
    low, high = evaluate.bootstrap_interval(hits)
    assert abs(low - 0.72) < 0.02 and abs(high - 0.88) < 0.02  # normal approximation: .8 +- 1.96 * sqrt(.8 * .2 / 100)
    assert evaluate.bootstrap_interval(np.ones(10)) == (1.0, 1.0)
    # All pairs of one prompt agree: 10 prompts say as much as 10 pairs, so the interval is wider than for 100 pairs.
    groups = np.repeat(np.arange(10), 10)
    grouped = evaluate.bootstrap_interval(np.repeat([1] * 8 + [0] * 2, 10), groups)
    assert grouped[1] - grouped[0] > 2 * (high - low)
    assert np.isnan(evaluate.bootstrap_interval(hits, np.zeros(100))).all()


METRICS = [accuracy_with_ties, accuracy_without_ties, evaluate.accuracy_with_ties_cross_fitted]


@pytest.mark.parametrize("metric", METRICS)
def test_bad_input_is_named(metric):
    with pytest.raises(InputError, match="no pair"):
        metric([], [])
    with pytest.raises(InputError, match="row 1 "):
        metric([1, -1], [1.0, float("nan")])
    with pytest.raises(InputError, match="row 0 "):
        metric([1, -1], [float("inf"), 1.0])
    with pytest.raises(InputError, match="row 1 "):
        metric([1, 2], [1.0, 1.0])
    with pytest.raises(InputError, match="same length"):
        metric([1, -1], [1.0])


def test_only_human_ties_have_no_accuracy_without_ties():
    with pytest.raises(InputError, match="tie"):
        accuracy_without_ties([0, 0], [1, 2])


# ---------------------------------------------------------------------------------------------------------------
# The phases, with a work function that counts instead of a model
# ---------------------------------------------------------------------------------------------------------------
class OneRank:
    """Rank `rank` of `world`, alone in this process: it sees its own share and gathers only its own."""

    def __init__(self, rank=0, world=1):
        self.rank, self.world, self.is_main = rank, world, rank == 0

    def barrier(self): ...

    def share(self, items):
        return items[self.rank :: self.world]

    def gather_objects(self, items):
        return list(items)

    def progress(self, *args, **more):
        return contextlib.nullcontext(collections.namedtuple("Bar", "update")(lambda n: None))


ITEMS = [jobs.Item(f"v{k}", "a prompt", k + 2) for k in range(10)]


def run(out, seen, ranks=None, bad=(), skip=False):
    """A phase over 10 items, three at a time; notes each item in `seen` and refuses the videos in `bad`."""
    phase = jobs.Phase("rewards", ITEMS, str(out), skip, ranks or OneRank())
    for batch in phase.batches(3):
        for item in batch:
            if item.video in bad:
                phase.refuse(item, InputError(f"{item.video}: is broken."))
            else:
                seen.append(item.video)
                phase.write({"video": item.video, "prompt": item.prompt, "reward": float(item.video[1:])})
    return phase.finish()


def test_all_ranks_see_that_there_is_something_to_do(tmp_path):
    """A vLLM engine starts on all ranks together. With one item for three ranks, the other two must start it too, and
    go through as many batches."""
    for rank in range(3):
        phase = jobs.Phase("rewards", ITEMS[:1], str(tmp_path), False, OneRank(rank, 3))
        assert phase.to_do == ITEMS[:1]
        assert list(phase.batches(2)) == [ITEMS[:1] if rank == 0 else []]


def test_a_killed_phase_goes_on_and_repeats_nothing(tmp_path):
    run(tmp_path, [])
    log = tmp_path / "rewards.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # killed while line 5 was being written
    seen = []
    records, skipped = run(tmp_path, seen)
    assert seen == [f"v{k}" for k in range(4, 10)] and not skipped
    assert log.read_bytes() == b"".join(lines)  # the same file as without the kill
    assert {key[0]: r["reward"] for key, r in records.items()} == {f"v{k}": float(k) for k in range(10)}
    seen.clear()
    run(tmp_path, seen)
    assert not seen


def test_another_number_of_ranks_goes_on(tmp_path):
    first, second, rest = [], [], []
    run(tmp_path, second, OneRank(1, 2))
    assert sorted(second) == ["v1", "v3", "v5", "v7", "v9"] and (tmp_path / "rewards.rank1.jsonl").exists()
    run(tmp_path, first, OneRank(0, 3))
    run(tmp_path, rest)
    assert sorted(first + second + rest) == sorted(f"v{k}" for k in range(10))
    assert len(jobs.read_log(str(tmp_path), "rewards")) == 10


def test_a_bad_video_is_named_with_its_row_or_skipped_alone(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="line 6: v4: is broken"):
        run(tmp_path / "a", [], bad={"v4"})
    assert len(jobs.read_log(str(tmp_path / "a"), "rewards")) == 4  # v0 .. v2, and v3 of its own batch, are kept
    (tmp_path / "b").mkdir()
    records, skipped = run(tmp_path / "b", [], bad={"v4", "v8"}, skip=True)
    assert len(records) == 8 and [(s["video"], s["line"]) for s in skipped] == [("v4", 6), ("v8", 10)]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "rewards.jsonl").write_text('{"video": "v0"}\n{"video"\n')
    with pytest.raises(InputError, match="line 1"):
        jobs.read_log(str(tmp_path), "rewards")


# ---------------------------------------------------------------------------------------------------------------
# Files in
# ---------------------------------------------------------------------------------------------------------------
def write_csv(path, head, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return str(path)


@pytest.fixture
def pairs_csv(tmp_path):
    """Five pairs in VideoAlign's columns, one of them invalid, one a tie."""
    labels = ["A", "B", "invalid", "same", "A"]
    rows = [[f"{k}a.mp4", f"{k}b.mp4", f"prompt {k}", label] for k, label in enumerate(labels)]
    return write_csv(tmp_path / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], rows)


def rewards_of(scores, pairs_csv):
    pairs = evaluate.data.read_pairs(pairs_csv)
    return evaluate.read_scores(scores, pairs_csv, pairs, os.path.dirname(pairs_csv)).tolist()


def test_scores_row_by_row_count_invalid_rows_too(tmp_path, pairs_csv):
    rows = [[k, -k] for k in range(5)]
    scores = write_csv(tmp_path / "s.csv", ["reward_A", "reward_B"], rows)
    assert rewards_of(scores, pairs_csv) == [[0, 0], [1, -1], [3, -3], [4, -4]]  # row 2 is invalid
    with pytest.raises(InputError, match="4 rows but .* has 5"):
        rewards_of(write_csv(tmp_path / "short.csv", ["reward_A", "reward_B"], rows[1:]), pairs_csv)
    shuffled = [[f"prompt {4 - k}", 1, 2] for k in range(5)]
    other = write_csv(tmp_path / "p.csv", ["prompt", "reward_A", "reward_B"], shuffled)
    with pytest.raises(InputError, match="another prompt"):
        rewards_of(other, pairs_csv)


def test_scores_by_path_are_looked_up(tmp_path, pairs_csv):
    rows = [[f"{k}{side}.mp4", k + (side == "a")] for k in (4, 3, 1, 0) for side in "ab"]
    scores = write_csv(tmp_path / "s.csv", ["path", "reward"], rows)
    assert rewards_of(scores, pairs_csv) == [[1, 0], [2, 1], [4, 3], [5, 4]]
    with pytest.raises(InputError, match="second reward"):
        rewards_of(write_csv(tmp_path / "t.csv", ["path", "reward"], [*rows, ["0a.mp4", 9]]), pairs_csv)
    assert np.isnan(rewards_of(write_csv(tmp_path / "u.csv", ["path", "reward"], rows[1:]), pairs_csv)[3][0])


@pytest.mark.parametrize("ties, left", [("both", 4), ("tie", 3), ("bothbad", 3), ("drop", 2)])
def test_genai_ties(tmp_path, ties, left):
    votes = ["leftvote", "tievote", "bothbad_vote", "rightvote"]
    rows = [["a prompt", "m1", "m2", "a.mp4", "b.mp4", vote] for vote in votes]
    head = ["prompt", "left_model", "right_model", "left_video", "right_video", "vote_type"]
    write_csv(tmp_path / "genai-bench.csv", head, rows)
    s = evaluate.Settings(benchmark=["genai-bench"], root=str(tmp_path), genai_ties=ties)
    assert len(evaluate.read_job(s, "genai-bench").pairs) == left


@pytest.mark.parametrize("path", ["../outside.mp4", "/etc/passwd", "link/inside.mp4", "a/../../x.mp4", "a\0b.mp4"])
def test_paths_that_leave_the_root_are_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    table = write_csv(root / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], [["fine.mp4", path, "a prompt", "A"]])
    with pytest.raises(InputError, match="line 2: .*outside --root"):
        evaluate.read_job(evaluate.Settings(data=table, root=str(root)))


def test_the_report_by_hand():
    """Four pairs of two prompts; two were made by the models (x, y), the others by (x, z).

    |    | label | margin | without ties | with ties, eps .5: |margin| <= .5 is a tie |
    | p  | A     | 2      | right        | right                                      |
    | p  | same  | .5     | dropped      | right                                      |
    | q  | B     | -1     | right        | right                                      |
    | q  | A     | -3     | wrong        | wrong                                      |
    """
    def pair(prompt, label, maker):
        return PreferencePair("a", "b", prompt, label, extra={"A_model": "x", "B_model": maker})

    pairs = [pair("p", 1, "y"), pair("p", 0, "y"), pair("q", -1, "z"), pair("q", 1, "z")]
    judged = evaluate.measure("by hand", pairs, np.array([[2, 0], [0.5, 0], [0, 1], [0, 3.0]]))
    numbers = judged.numbers
    assert (numbers["pairs"], numbers["human_ties"], numbers["prompts"]) == (4, 1, 2)
    assert (numbers["accuracy_without_ties"], numbers["accuracy_with_ties"], numbers["threshold"]) == (2 / 3, 3 / 4, 0.5)
    assert judged.hits["with_ties"].tolist() == [True, True, True, False]
    # Drawn by prompt: p and q, or one of them twice. Without ties p is 1 of 1 right, q 1 of 2; with ties 2 of 2, 1 of 2.
    assert numbers["accuracy_without_ties_interval"] == numbers["accuracy_with_ties_interval"] == (0.5, 1.0)
    (first, second) = numbers["model_pairs"]
    assert (first["models"], first["with_ties"], first["without_ties"]) == (("x", "y"), 1.0, 1.0)
    assert (second["models"], second["with_ties"], second["without_ties"]) == (("x", "z"), 0.5, 0.5)
    # Intervals are each of their own hits: only human ties are hit here, and without ties all decided pairs are missed.
    pairs = [pair(str(k), k % 2, "y") for k in range(20)]
    numbers = evaluate.measure("ties only", pairs, np.array([[0, 1.0 if k % 2 else 0.0] for k in range(20)])).numbers
    assert numbers["accuracy_without_ties_interval"] == (0.0, 0.0) and numbers["accuracy_with_ties_interval"][0] > 0.2


def test_difference_is_paired():
    pairs = [PreferencePair("a", "b", f"prompt {k}", 1, line=k) for k in range(50)]
    good = np.stack([np.ones(50), np.zeros(50)], axis=1)
    worse = good.copy()
    worse[:10] = worse[:10, ::-1]
    first, second = (evaluate.measure(name, pairs, r) for name, r in (("good", good), ("worse", worse)))
    gap = evaluate.difference(second, first)
    assert gap["without_ties"] == pytest.approx(-0.2) and gap["without_ties_interval"][1] < 0
    same = evaluate.difference(first, first)
    assert same["with_ties"] == 0 and same["with_ties_interval"] == (0, 0)  # paired: no spread at all


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------
def command(*flags):
    return subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *map(str, flags)], capture_output=True, text=True)


def test_scores_command_line(tmp_path, pairs_csv):
    scores = write_csv(tmp_path / "s.csv", ["reward_A", "reward_B"], [[2, 1], [1, 3], [0, 0], [1, 1.5], [3, 1]])
    done = command("--data", pairs_csv, "--scores", scores, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    # Margins 1 (A), -2 (B), -.5 (tie), 2 (A): all signs right; the tie is smallest: threshold .5 makes it right too.
    assert (numbers["pairs"], numbers["human_ties"]) == (4, 1)
    assert (numbers["accuracy_without_ties"], numbers["accuracy_with_ties"], numbers["threshold"]) == (1.0, 1.0, 0.5)
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    assert "1.000" in done.stdout and "published" in (tmp_path / "out" / "report.md").read_text()


def fails(capsys, *flags):
    """Runs main() in this process (a subprocess costs seconds) as cli() does; returns the one line it ends with."""
    with pytest.raises(SystemExit) as end:
        cli(lambda: evaluate.main([str(flag) for flag in flags]))
    text = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in text
    return text


def test_bad_input_ends_with_one_sentence_and_exit_code_2(tmp_path, pairs_csv, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nan = write_csv(tmp_path / "nan.csv", ["reward_A", "reward_B"], [[1, 2], [1, "nan"], [1, 1], [1, 1], [1, 1]])
    for flags, words in (
        (["--data", "none.csv", "--scores", nan], "none.csv: no such file"),
        (["--data", pairs_csv, "--scores", "none.csv"], "none.csv: no such file"),
        (["--data", pairs_csv, "--scores", nan], "nan.csv, line 3: reward_B is 'nan'"),
        (["--data", pairs_csv, "--scores", pairs_csv], "needs the columns reward_A,reward_B or path,reward"),
        (["--data", pairs_csv, "--scores", nan, "--dimension", "VQ"], "no label column VQ"),
        (["--data", pairs_csv], "give --model"),
        (["--data", pairs_csv, "--model", str(tmp_path)], "no DeScore checkpoint"),
        (["--model", str(tmp_path)], "give --data"),
        (["--model", str(tmp_path), "--video", "x.mp4"], "--prompt"),
        (["--benchmark", "genai-bench", "--scores", nan], "--root"),
        (["--benchmark", "genai-bench", "--scores", nan, "--root", str(tmp_path)], "holds none of"),
        (["--data", pairs_csv, "--scores", nan, "--thoughts", "0"], "at least 1"),
        (["--data", pairs_csv, "--scores", nan, "--out", nan], "cannot be written to"),
    ):
        lines = fails(capsys, *flags).strip().splitlines()
        lines = [line for line in lines if "labelled invalid" not in line]
        assert len(lines) == 1 and words in lines[0], (flags, lines)
    assert "unrecognized arguments: --nonsense" in fails(capsys, "--nonsense")


def test_a_missing_score_is_an_error_or_a_counted_skip(tmp_path, pairs_csv, capsys, no_figure):
    scores = write_csv(tmp_path / "s.csv", ["reward_A", "reward_B"], [[2, 1], ["", 3], [0, 0], [1, 1.5], [3, 1]])
    flags = ["--data", pairs_csv, "--scores", scores, "--out", tmp_path / "out"]
    assert "line 3" in fails(capsys, *flags)
    evaluate.main([str(flag) for flag in [*flags, "--skip-bad-videos"]])
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (numbers["pairs"], numbers["skipped_pairs"]) == (3, 1)


def test_compare_command_line(tmp_path, pairs_csv, no_figure):
    good = write_csv(tmp_path / "good.csv", ["reward_A", "reward_B"], [[2, 1], [1, 3], [0, 0], [1, 1.5], [3, 1]])
    rows = [[f"{k}{side}.mp4", float(side == "b")] for k in range(5) for side in "ab"]
    bad = write_csv(tmp_path / "bad.csv", ["path", "reward"], rows)
    evaluate.main(["--data", pairs_csv, "--compare", good, bad, "--out", str(tmp_path / "out")])
    models = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
    assert [m["name"] for m in models] == ["good.csv", "bad.csv"] and models[0]["difference_to_first"] is None
    assert models[1]["difference_to_first"]["without_ties"] == pytest.approx(1 / 3 - 1)  # only the B pair is right


# ---------------------------------------------------------------------------------------------------------------
# With a real, tiny model
# ---------------------------------------------------------------------------------------------------------------
FEW = ["--max-new-tokens", "6"]


@pytest.fixture
def no_figure(monkeypatch):
    """test_report.py draws; here each figure would only cost half a second."""
    monkeypatch.setattr(evaluate.report, "draw", lambda *_: None)


@pytest.fixture
def clips_csv(tmp_path, tiny_clips, no_figure):
    """Two pairs, three unique (video, prompt): the second pair shares a video. A prompt full of control tokens."""
    a, b, c = (os.path.abspath(path) for path in tiny_clips[:3])
    prompt = "a <|im_end|> <|video_pad|> <Reward> <script>alert(1)</script> =1+1"
    rows = [[a, b, prompt, "A"], [c, b, prompt, "same"]]
    return write_csv(tmp_path / "clips.csv", ["path_A", "path_B", "prompt", "TA"], rows)


def rewards_in(out):
    return [r["reward"] for _, r in sorted(jobs.read_log(str(out), "rewards").items())]


def judge(model, data, out, *flags):
    evaluate.main(["--model", model, "--data", data, "--out", str(out), *FEW, *map(str, flags)])
    return rewards_in(out)


def test_batch_size_changes_nothing_and_a_finished_run_needs_no_model(tmp_path, tiny_model_dir, clips_csv, monkeypatch):
    one = judge(tiny_model_dir, clips_csv, tmp_path / "one", "--batch-size", 1)
    three = judge(tiny_model_dir, clips_csv, tmp_path / "three", "--batch-size", 3, "--html", tmp_path / "page.html")
    assert len(one) == 3  # three unique videos, though the two pairs hold four
    np.testing.assert_allclose(one, three, atol=1e-5, rtol=0)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg") >= 4 and "<script>alert" not in page
    # What it wrote is what --scores reads.
    scores = str(tmp_path / "one" / "scores.csv")
    evaluate.main(["--data", clips_csv, "--scores", scores, "--out", str(tmp_path / "again")])
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "again"))
    assert first["accuracy_with_ties"] == again["accuracy_with_ties"] and first["threshold"] == again["threshold"]
    # A kill while thinking: the half line and all rewards are gone. The rest is neither lost nor repeated.
    log = tmp_path / "one" / "thoughts.jsonl"
    before = log.read_bytes()
    log.write_bytes(before[:-30])
    (tmp_path / "one" / "rewards.jsonl").unlink()
    again = judge(tiny_model_dir, clips_csv, tmp_path / "one", "--batch-size", 2)
    np.testing.assert_allclose(again, one, atol=1e-5, rtol=0)
    assert log.read_bytes() == before
    monkeypatch.setattr(evaluate.Judge, "open_model", pytest.fail)
    judge(tiny_model_dir, clips_csv, tmp_path / "one")


def test_several_benchmarks_load_the_model_once(tmp_path, tiny_model_dir, tiny_clips, capsys, monkeypatch, no_figure):
    for name, path in zip("ab", tiny_clips):
        shutil.copy(path, tmp_path / f"{name}.mp4")
    head = ["prompt", "left_model", "right_model", "left_video", "right_video", "vote_type"]
    write_csv(tmp_path / "genai-bench.csv", head, [["a cat", "m1", "m2", "a.mp4", "b.mp4", "leftvote"]])
    head = ["path_A", "path_B", "prompt", "TA"]
    write_csv(tmp_path / "videogen-rewardbench.csv", head, [["a.mp4", "b.mp4", "a dog", "B"]])
    loaded, load = [], evaluate.DeScore.from_pretrained
    monkeypatch.setattr(evaluate.DeScore, "from_pretrained", lambda *a: loaded.append(a) or load(*a))
    names = ["genai-bench", "videogen-rewardbench"]
    both = ["--model", tiny_model_dir, "--root", tmp_path, "--out", tmp_path / "out", *FEW, "--benchmark", *names]
    assert "give one --benchmark" in fails(capsys, *both, "--html", tmp_path / "page.html")
    evaluate.main([str(flag) for flag in both])
    assert len(loaded) == 1
    for name in names:
        numbers = json.loads((tmp_path / "out" / name / "report.json").read_text())
        assert numbers["benchmark"] == name and f"{name}.csv" in numbers["data"] and numbers["pairs"] == 1


def test_other_settings_in_the_same_folder_are_refused(tmp_path, tiny_model_dir, clips_csv, capsys):
    judge(tiny_model_dir, clips_csv, tmp_path / "out", "--no-think")
    flags = ["--model", tiny_model_dir, "--data", clips_csv, "--out", tmp_path / "out", *FEW]
    assert "another think;" in fails(capsys, *flags)
    assert "another max_pixels;" in fails(capsys, *flags, "--no-think", "--max-pixels", "4096")
    assert not (tmp_path / "out" / "thoughts.jsonl").exists()
    trained_on = shutil.copytree(tiny_model_dir, tmp_path / "model")  # the same folder with another head
    (head,) = [path for path in trained_on.rglob("*.safetensors") if "query" in safetensors.numpy.load_file(path)]
    tensors = safetensors.numpy.load_file(head)
    safetensors.numpy.save_file({name: 2 * value for name, value in tensors.items()}, head)
    assert "another model;" in fails(capsys, "--model", trained_on, *flags[2:], "--no-think")


def test_hub_models_differ_by_name_and_commit(tmp_path, base_dir, monkeypatch):
    """As files they have nothing to hash here: two names, or two commits of one, must not count as the same model."""
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    known = set()
    for name, commit in (("us/one", "a" * 40), ("us/two", "a" * 40), ("us/one", "b" * 40)):
        cached = tmp_path / f"models--{name.replace('/', '--')}"
        (cached / "snapshots" / commit).mkdir(parents=True)
        shutil.copy(f"{base_dir}/config.json", cached / "snapshots" / commit)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(commit)
        known.add(jobs.identity(name))
        assert name in jobs.identity(name) and commit in jobs.identity(name)
    assert len(known) == 3
    with pytest.raises(InputError, match="us/none: is no folder"):
        jobs.identity("us/none")


def test_sampled_thoughts_average_and_do_not_depend_on_the_batch(tmp_path, tiny_model_dir, clips_csv):
    two = judge(tiny_model_dir, clips_csv, tmp_path / "a", "--thoughts", 2, "--batch-size", 3)
    one = judge(tiny_model_dir, clips_csv, tmp_path / "b", "--thoughts", 2, "--batch-size", 1)
    np.testing.assert_allclose(one, two, atol=1e-5, rtol=0)
    for record in jobs.read_log(str(tmp_path / "a"), "rewards").values():
        assert record["reward"] == pytest.approx(sum(record["rewards"]) / 2) and len(record["rewards"]) == 2
    thoughts = [record["thoughts"] for record in jobs.read_log(str(tmp_path / "a"), "thoughts").values()]
    assert all(first != second for first, second in thoughts)  # each has a random stream of its own


def test_a_bad_clip_or_a_giant_prompt_stops_or_is_counted(tmp_path, tiny_model_dir, tiny_clips, capsys, no_figure):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    a, b = (os.path.abspath(path) for path in tiny_clips[:2])
    rows = [[a, b, "a prompt", "A"], [a, "broken.mp4", "a prompt", "B"], [a, b, "x" * 100_000, "A"]]
    data = write_csv(tmp_path / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], rows)
    flags = ["--model", tiny_model_dir, "--data", data, "--out", tmp_path / "out", *FEW]
    text = fails(capsys, *flags)
    assert "line 3" in text and "broken.mp4" in text
    evaluate.main([str(flag) for flag in [*flags, "--skip-bad-videos"]])
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (numbers["pairs"], numbers["skipped_pairs"], numbers["skipped_videos"]) == (1, 2, 3)
    reasons = [json.loads(line)["error"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert "broken.mp4" in reasons[0] and "tokens; at most 5,000" in reasons[1]


def test_best_of_and_one_video(tmp_path, tiny_model_dir, tiny_clips, capsys):
    rows = [[os.path.abspath(path), "=a prompt"] for path in tiny_clips[:3]]
    videos, dpo = write_csv(tmp_path / "videos.csv", ["path", "prompt"], rows), tmp_path / "dpo.csv"
    model = ["--model", tiny_model_dir, *FEW, "--no-think"]
    best_of.main([*model, "--data", videos, "--make-pairs", str(dpo), "--out", str(tmp_path / "out")])
    rewards = {key[0]: r["reward"] for key, r in jobs.read_log(str(tmp_path / "out"), "rewards").items()}
    with open(tmp_path / "out" / "best_of.csv", newline="") as file:
        ranked = list(csv.DictReader(file))
    assert [r["path"] for r in ranked] == sorted(rewards, key=rewards.get, reverse=True)
    assert ranked[0]["prompt"] == "'=a prompt"  # no formula for the spreadsheet
    (pair,) = evaluate.data.read_pairs(str(dpo))
    assert (pair.label, pair.prompt) == (1, "=a prompt")  # exact for training
    assert [os.path.realpath(v) for v in pair.videos] == [os.path.realpath(ranked[k]["path"]) for k in (0, -1)]
    capsys.readouterr()
    evaluate.main([*model, "--video", rows[0][0], "--prompt", "=a prompt"])
    assert f"reward {rewards[rows[0][0]]:+.4f}" in capsys.readouterr().out


def test_the_score_that_a_cot_states(tmp_path, tiny_model_dir, clips_csv):
    """--score-from text: the generative reward model of Fig. 1a; thoughts are shared with the head's run, reports are not."""
    assert evaluate.overall_score('x <answer>{"overall_score": 3.5}</answer>') == 3.5
    assert evaluate.overall_score("nothing") == evaluate.overall_score('<answer>{"overall_score": "x"}</answer>') == 3.0
    flags = ["--model", tiny_model_dir, "--data", clips_csv, "--out", str(tmp_path), "--max-new-tokens", "3"]
    evaluate.main(flags)
    before = (tmp_path / "thoughts.jsonl").read_text()
    evaluate.main([*flags, "--score-from", "text"])
    assert (tmp_path / "thoughts.jsonl").read_text() == before
    heads, texts = (tmp_path / "scores.csv").read_text(), (tmp_path / "text" / "scores.csv").read_text()
    assert {row["reward"] for row in csv.DictReader(texts.splitlines())} == {"3.0"}
    assert sorted(float(row["reward"]) for row in csv.DictReader(heads.splitlines())) == pytest.approx(sorted(rewards_in(tmp_path)))
    assert (tmp_path / "report.json").exists() and (tmp_path / "text" / "report.json").exists()
    evaluate.main([*flags[:-3], str(tmp_path / "both"), *flags[-2:], "--score-from", "head", "text"])
    for name in ("scores.csv", "text/scores.csv"):
        assert (tmp_path / name).read_text() == (tmp_path / "both" / name).read_text()
    for name in ("report.json", "text/report.json"):
        one, both = (json.loads((folder / name).read_text()) for folder in (tmp_path, tmp_path / "both"))
        assert one["accuracy_with_ties"] == both["accuracy_with_ties"]
