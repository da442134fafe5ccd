"""report.py: numbers by hand, nothing untrusted gets through, files that open."""

import base64
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from lab import best_of, compare
from plumbing import page, report
import data
import evaluate
import metrics
from data import DIMENSIONS, InputError, PreferencePair

NASTY = '<script>alert(1)</script><img src=x onerror=alert(2)>" onload="x $\\frac{1 | `a` [b](http://c) & =1+1'
GOOD = "<think>\nsubject: asked a cat; shown a cat; verdict 2\n</think>\n<answer>" + json.dumps(
    {"dimensional_scores": dict(zip(DIMENSIONS, ["2", "1", "N/A", "0", 2])), "overall_score": 3.5}
) + "</answer>"


def judged(margins, labels, name="ours", prompts=None, extra=None):
    """One Judged and its pairs. Reward of A = margin, of B = 0."""
    prompts = prompts or [f"prompt {k}" for k in range(len(labels))]
    pairs = [PreferencePair(f"{k}a.mp4", f"{k}b.mp4", prompt, label, line=k + 2, extra=extra or {})
             for k, (label, prompt) in enumerate(zip(labels, prompts))]
    one = evaluate.measure(name, pairs, np.array([[m, 0.0] for m in margins]))
    one.numbers.update(data="pairs.csv", benchmark=None, skipped_pairs=0, skipped_videos=0, difference_to_first=None)
    return one, pairs


# ---------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------
def test_calibration_by_hand():
    # sigmoid(ln 3) = .75, twice A and twice B: said .75, won .5, off by .25. sigmoid(-ln 9) = .1, B: said .1, won 0.
    # ECE = 4/5 * .25 + 1/5 * .1 = .22. The human tie is left out.
    labels = np.array([1, 1, -1, -1, -1, 0])
    margins = np.array([math.log(3)] * 4 + [-math.log(9.0001), 7])
    done = metrics.calibration(labels, margins)
    assert done["expected_calibration_error"] == pytest.approx(0.22, abs=1e-4)
    assert [b["pairs"] for b in done["bins"]] == [1, 4]
    assert done["bins"][1]["said"] == pytest.approx(0.75) and done["bins"][1]["won"] == 0.5


def test_calibration_of_a_model_that_is_right_about_its_doubt():
    rng = np.random.default_rng(0)
    margins = rng.normal(size=40_000) * 2
    labels = np.where(rng.random(40_000) < 1 / (1 + np.exp(-margins)), 1, -1)
    assert metrics.calibration(labels, margins)["expected_calibration_error"] < 0.01
    assert metrics.calibration(labels, 5 * margins)["expected_calibration_error"] > 0.1  # too large a scale
    assert metrics.calibration(np.array([0]), np.array([1.0]))["expected_calibration_error"] is None
    assert metrics.calibration(np.array([1, -1]), np.array([1e9, -1e9]))["expected_calibration_error"] < 1e-9


def test_thought_statistics():
    truth = dict(zip(DIMENSIONS, ["2", "0", "N/A", "0", "1"]))
    pairs = [PreferencePair("a", "b", "p", 1, annotation_a=truth)]
    records = [
        {"video": "a", "prompt": "p", "thoughts": [GOOD, "broken"], "tokens": [10, 20]},
        {"video": "b", "prompt": "p", "thoughts": [GOOD], "tokens": [60]},  # no annotation: not in the verdict accuracy
    ]
    done = report.thought_statistics(records, pairs)
    assert (done["cots"], done["malformed_share"]) == (3, pytest.approx(1 / 3))
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


def test_several_models_in_one_report(tmp_path):
    first, second = judged([1.0, -2.0, 3.0], [1, -1, 0], "one")[0], judged([1.0, 2.0, 3.0], [1, -1, 0], "two")[0]
    second.numbers["difference_to_first"] = evaluate.difference(second, first)
    report.write(str(tmp_path), [first, second])
    text = (tmp_path / "report.md").read_text()
    assert "| one | 1.000" in text and "| two | 0.500" in text and "-0.500" in text
    assert len(json.loads((tmp_path / "report.json").read_text())["models"]) == 2


class Tags(html.parser.HTMLParser):
    """Collects the tags with their attributes, and what stands inside <script>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts.append(text)


@pytest.fixture
def page_file(tmp_path, tiny_clips):
    """A page of three pairs (right; human tie; wrong with a large margin) with nasty text wherever text can be."""
    one, pairs = judged([2.0, 0.1, 9.0], [1, 0, -1], name=NASTY, prompts=[NASTY, "x" * 100_000, "plain"])
    pairs[0] = PreferencePair(tiny_clips[0], f"/no/such/{NASTY}.mp4", NASTY, 1, line=2)
    thoughts = {(tiny_clips[0], NASTY): {"thoughts": [f"{NASTY}\nsubject: {NASTY}; verdict 2\nstyle"]}}
    path = tmp_path / "page.html"
    page.write_page(str(path), one, pairs, np.array([[2.0, 0.0], [0.1, 0.0], [9.0, 0.0]]), thoughts, data.sample_frames)
    return path


def test_page_is_self_contained_and_escaped(page_file):
    text = page_file.read_text()
    found = Tags(text)
    assert {tag for tag, _ in found.tags} <= set(
        "html head meta title style body h1 p nav button span article b div small img pre mark script".split()
    )
    assert [tag for tag, _ in found.tags].count("script") == 1 and found.scripts == [page.SCRIPT]
    for _, attributes in found.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert text.count("<mark>") == 1 and "/no/such" in text and "100,000 characters" in text
    seal = base64.b64encode(hashlib.sha256(found.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{seal}'" in text and "default-src 'none'" in text
    classes = [attributes["class"] for tag, attributes in found.tags if tag == "article"]
    assert classes == ["", "tie", "wrong large"]


def test_page_in_a_real_browser(page_file, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    for kind, hidden in (("", 0), ("wrong", 2), ("tie", 2), ("large", 2)):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
        done = subprocess.run([browser, *flags, f"file://{page_file}#{kind}"], capture_output=True, text=True, timeout=60)
        articles = [a for tag, a in Tags(done.stdout).tags if tag == "article"]
        assert len(articles) == 3 and sum("hidden" in a for a in articles) == hidden
        assert f"{3 - hidden} pairs shown" in done.stdout  # our script ran under the page's policy


def test_page_shows_at_most_so_many_pairs(tmp_path):
    one, pairs = judged(range(30), [1] * 30)
    page.write_page(str(tmp_path / "p.html"), one, pairs, np.zeros((30, 2)), {}, data.sample_frames, limit=7)
    assert (tmp_path / "p.html").read_text().count("<article") == 7


def test_best_and_worst_leaves_out_what_has_no_order(tmp_path):
    groups = {"two": [(2.0, "v/a.mp4"), (1.0, "v/c.mp4")], "one": [(2.0, "b.mp4")]}
    groups["equal"] = [(1.0, "d.mp4"), (1.0, "e.mp4")]
    best_of.write_best_and_worst(str(tmp_path / "dpo.csv"), groups)
    lines = (tmp_path / "dpo.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].endswith("two,A,2.0,1.0")


def test_several_runs_in_one_table(tmp_path):
    numbers = {"benchmark": "genai-bench", "data": "x.csv", "accuracy_without_ties": 0.75, "accuracy_with_ties": 0.5,
               "accuracy_without_ties_interval": [0.6, 0.9]}
    for name, value in (("a", 0.75), ("b", 0.25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(numbers | {"accuracy_without_ties": value}))
    compare.main(["--runs", f"one={tmp_path}/a/*.json", f"two={tmp_path}/b/*.json", "--out", str(tmp_path / "out")])
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert lines[0] == "| model | genai-bench w/o ties | genai-bench w/ ties |"
    assert lines[2:] == ["| one | 0.750 | 0.500 |", "| two | 0.250 | 0.500 |"]
    assert (tmp_path / "out" / "results.png").stat().st_size > 5000
    with pytest.raises(InputError, match="no such report"):
        compare.main(["--runs", "x=/nowhere/*.json", "--out", str(tmp_path)])


def test_several_seeds_give_mean_and_standard_deviation(tmp_path):
    base = {"sampled valid format": 1.0, "always 2": 0.5, "sampled accuracy": 0.7, "greedy accuracy": 0.8}
    for seed, value in enumerate((0.75, 0.25)):
        folder = tmp_path / f"seed{seed}"
        for part in ("base", "stage1", "discriminative", "stage2", "eval"):
            (folder / part).mkdir(parents=True)
        numbers = {"benchmark": "genai-bench", "accuracy_without_ties": value, "accuracy_with_ties": None}
        (folder / "eval" / "report.json").write_text(json.dumps(numbers))
        (folder / "base" / "measured.json").write_text(json.dumps(base))
        for part in ("stage1", "discriminative"):
            (folder / part / "metrics.jsonl").write_text(
                '{"step": 1, "val_accuracy": 0.5}\n{"step": 2, "val_accuracy": 0.75}\n'
            )
        quality = [0.5] * 5 + [0.9] * 5 + [0.6 + 0.1 * seed] * 10
        lines = [{"step": k, "quality": q, "pair_accuracy": 0.8} for k, q in enumerate(quality)]
        (folder / "stage2" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = [str(tmp_path / f"seed{seed}") for seed in (0, 1)]
    runs = ["--runs", f"one={tmp_path}/seed*/eval/report.json", "--out", str(tmp_path / "out")]
    compare.main([*runs, "--training", *folders])
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| one | 0.500 ± 0.354 | - |" in text  # .25 * sqrt(2)
    assert "| stage 2: rise of quality | 0.100 | 0.200 | 0.150 ± 0.071 |" in text
    assert "| stage 1: validation accuracy | 0.750 | 0.750 | 0.750 ± 0.000 |" in text
    with pytest.raises(InputError, match="give folders that `make demo` wrote"):
        compare.main([*runs, "--training", str(tmp_path)])
