"""lab/study/compare.py: several runs, or several seeds, in one table; score files in one report."""

import dataclasses
import json
import os
import runpy
import sys

import numpy as np
import pytest
from tests.test_report import judged

import evaluate
from data import PreferencePair, read_pairs
from lab.study import compare
from plumbing import report
from plumbing.settings import InputError
from tests.conftest import refuses, write_csv


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
    # Other labels of the same benchmark are another number, not another seed.
    (tmp_path / "b" / "report.json").write_text(json.dumps(numbers | {"labels": "--dimension VQ"}))
    text = compare.compare_runs([f"one={tmp_path}/[ab]/report.json"], str(tmp_path / "out"))
    assert "| genai-bench (--dimension VQ) w/o ties |" in text and "±" not in text
    with pytest.raises(InputError, match="no such report"):
        compare.main(["--runs", "x=/nowhere/*.json", "--out", str(tmp_path)])
    # With one benchmark the head's report is in OUT, the text's in OUT/text: a pattern for several finds it alone.
    (tmp_path / "b" / "text").mkdir()
    (tmp_path / "b" / "text" / "report.json").write_text(json.dumps(numbers))
    with pytest.raises(InputError, match="b/text/report.json is of the score that the CoTs state"):
        compare.compare_runs([f"DeScore={tmp_path}/b/*/report.json"], str(tmp_path / "out"))
    assert "| own |" in compare.compare_runs([f"own={tmp_path}/b/text/report.json"], str(tmp_path / "out"))
    (tmp_path / "b" / "report.json").write_text(json.dumps({"models": [numbers, numbers]}))
    with pytest.raises(InputError, match="b/report.json: is a report of several score files"):
        compare.compare_runs([f"x={tmp_path}/b/report.json"], str(tmp_path / "out"))


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


def write_reports(tmp_path, **changes):
    """{name: what differs} -> tmp_path/NAME/report.json of each."""
    numbers = {"benchmark": None, "data": "a/x.csv", "pairs": 300, "human_ties": 40, "accuracy_without_ties": 0.75,
               "accuracy_with_ties": 0.5, "accuracy_without_ties_interval": [0.6, 0.9]}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(numbers | change))


def test_reports_on_other_numbers_of_pairs_are_not_put_side_by_side(tmp_path):
    """A report that left out clips, or a vote, is of other pairs. A seed's set of another folder has as many."""
    write_reports(tmp_path, all={}, seed1={"data": "b/x.csv"}, few={"pairs": 210}, votes={"human_ties": 20})
    run = f"one={tmp_path}/all/report.json"
    for other, count in (("few", "210 pairs of x.csv .40 human"), ("votes", "300 pairs of x.csv .20 human")):
        with pytest.raises(InputError, match=f"{other}/report.json: has {count} ties., .*all/report.json 300 .40"):
            compare.compare_runs([run, f"two={tmp_path}/{other}/report.json"], str(tmp_path / "out"))
        with pytest.raises(InputError, match="evaluate both on the same"):
            compare.compare_runs([f"seeds={tmp_path}/[afv]*/report.json"], str(tmp_path / "out"))
    text = compare.compare_runs([run, f"seeds={tmp_path}/[as]*/report.json"], str(tmp_path / "out"))
    assert "| seeds | 0.750 ± 0.000 |" in text


def test_a_set_of_one_prompt_has_no_interval_and_is_drawn_without(tmp_path):
    write_reports(tmp_path, one={"accuracy_without_ties_interval": [None, None]})
    compare.compare_runs([f"one={tmp_path}/one/report.json"], str(tmp_path / "out"))
    assert (tmp_path / "out" / "results.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------------
# Score files
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)


def test_difference_is_paired():
    pairs = [PreferencePair("a", "b", f"prompt {k}", 1, line=k) for k in range(50)]
    good = np.stack([np.ones(50), np.zeros(50)], axis=1)
    worse = good.copy()
    worse[:10] = worse[:10, ::-1]
    first, second = (evaluate.measure(name, pairs, r) for name, r in (("good", good), ("worse", worse)))
    gap = compare.difference(second, first)
    assert gap["without_ties"] == pytest.approx(-0.2) and gap["without_ties_interval"][1] < 0
    of_five = [PreferencePair("a", "b", f"prompt {k // 10}", 1, line=k) for k in range(50)]  # all ten of one are worse
    first_5, second_5 = (evaluate.measure(name, of_five, r) for name, r in (("good", good), ("worse", worse)))
    wide = compare.difference(second_5, first_5)["without_ties_interval"]  # pairs of a prompt are drawn together
    assert wide[0] < gap["without_ties_interval"][0] - 0.1 and wide[1] == 0
    same = compare.difference(first, first)
    assert same["with_ties"] == 0 and same["with_ties_interval"] == (0, 0)  # paired: no spread at all


def test_scores_command_line(tmp_path, pairs_csv, monkeypatch, capsys):
    scores = write_csv(tmp_path / "s.csv", ["reward_A", "reward_B"], [[2, 1], [1, 3], [0, 0], [1, 1.5], [3, 1]])
    flags = ["--data", pairs_csv, "--scores", scores, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["compare", *flags])
    runpy.run_module("lab.study.compare", run_name="__main__")
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    # Margins 1 (A), -2 (B), -.5 (tie), 2 (A): all signs right; the tie is smallest: threshold .5 makes it right too.
    assert (numbers["pairs"], numbers["human_ties"]) == (4, 1)
    assert (numbers["accuracy_without_ties"], numbers["accuracy_with_ties"], numbers["threshold"]) == (1.0, 1.0, 0.5)
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    assert "1.000" in capsys.readouterr().out and "published" in (tmp_path / "out" / "report.md").read_text()


def test_a_missing_score_is_an_error_or_a_counted_skip(tmp_path, pairs_csv, capsys, no_figure):
    scores = write_csv(tmp_path / "s.csv", ["reward_A", "reward_B"], [[2, 1], ["", 3], [0, 0], [1, 1.5], [3, 1]])
    flags = ["--data", pairs_csv, "--scores", scores, "--out", tmp_path / "out"]
    refuses(capsys, compare.main, *flags, says="line 3")
    compare.main([str(flag) for flag in [*flags, "--skip-bad-videos"]])
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (numbers["pairs"], numbers["skipped_pairs"]) == (3, 1)


def test_compare_command_line(tmp_path, pairs_csv, no_figure):
    good = write_csv(tmp_path / "good.csv", ["reward_A", "reward_B"], [[2, 1], [1, 3], [0, 0], [1, 1.5], [3, 1]])
    rows = [[f"{k}{side}.mp4", float(side == "b")] for k in range(5) for side in "ab"]
    bad = write_csv(tmp_path / "bad.csv", ["path", "reward"], rows)
    compare.main(["--data", pairs_csv, "--scores", good, bad, "--out", str(tmp_path / "out")])
    models = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
    assert [m["name"] for m in models] == ["good.csv", "bad.csv"] and models[0]["difference_to_first"] is None
    assert models[1]["difference_to_first"]["without_ties"] == pytest.approx(1 / 3 - 1)  # only the B pair is right


def test_several_models_in_one_report(tmp_path):
    first, second = judged([1.0, -2.0, 3.0], [1, -1, 0], "one")[0], judged([1.0, 2.0, 3.0], [1, -1, 0], "two")[0]
    second.numbers["difference_to_first"] = compare.difference(second, first)
    report.write(str(tmp_path), [first, second], left_panel=compare.draw_accuracies)
    text = (tmp_path / "report.md").read_text()
    assert "| one | 1.000" in text and "| two | 0.500" in text and "-0.500" in text
    assert len(json.loads((tmp_path / "report.json").read_text())["models"]) == 2


def test_bad_score_files_are_one_sentence(tmp_path, pairs_csv, capsys):
    nan = write_csv(tmp_path / "nan.csv", ["reward_A", "reward_B"], [[1, 2], [1, "nan"], [1, 1], [1, 1], [1, 1]])
    out = ["--out", str(tmp_path / "out")]
    for flags, words in (
        (["--data", "none.csv", "--scores", nan], "none.csv: no such file"),
        (["--data", pairs_csv, "--scores", "none.csv"], "none.csv: no such file"),
        (["--data", pairs_csv, "--scores", nan], "nan.csv, line 3: reward_B is 'nan'"),
        (["--data", pairs_csv, "--scores", pairs_csv], "needs the columns reward_A,reward_B or path,reward"),
        (["--data", pairs_csv, "--scores", nan, "--dimension", "VQ"], "no label column VQ"),
        (["--benchmark", "genai-bench", "--scores", nan], "--root"),
        (["--benchmark", "genai-bench", "--scores", nan, "--root", str(tmp_path)], "holds none of"),
        (["--scores", nan], "--data FILE"),
        (["--data", pairs_csv], "give --runs"),
        (["--data", pairs_csv, "--scores", nan, "--out", nan], "cannot be written to"),
    ):
        refuses(capsys, compare.main, *out, *flags, says=words)


def test_what_evaluation_wrote_of_prompts_with_blanks_is_read_back(tmp_path, tiny_model_dir, tiny_clips, no_figure):
    """The same clip under "a cat" and "a cat " is one item with one reward."""
    a, b, c = map(os.path.abspath, tiny_clips[:3])
    rows = [[a, b, "a\r\ncat", "A"], [a, c, "a\ncat ", "B"]]
    flags = ["--data", write_csv(tmp_path / "x.csv", ["path_A", "path_B", "prompt", "TA"], rows), "--out"]
    more = ["--thoughts", "2", "--max-new-tokens", "4"]
    evaluate.main(["--model", tiny_model_dir, *flags, str(tmp_path / "one"), *more])
    compare.main(["--scores", str(tmp_path / "one" / "scores.csv"), *flags, str(tmp_path / "again")])
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "again"))
    assert first["prompts"] == again["prompts"] == 1 and first["threshold"] == again["threshold"]


def test_what_evaluation_wrote_is_read_back(tmp_path, tiny_model_dir, world, no_figure):
    flags = ["--data", world["test_in_domain"], "--out"]
    evaluate.main(["--model", tiny_model_dir, *flags, str(tmp_path / "one"), "--no-think"])
    compare.main(["--scores", str(tmp_path / "one" / "scores.csv"), *flags, str(tmp_path / "again")])
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "again"))
    assert first["accuracy_with_ties"] == again["accuracy_with_ties"] and first["threshold"] == again["threshold"]


# -- score files ----------------------------------------------------------------------------------------------------
def rewards_of(scores, pairs_csv):
    pairs = read_pairs(pairs_csv)
    return compare.read_scores(scores, pairs_csv, pairs, os.path.dirname(pairs_csv)).tolist()


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


def test_absolute_and_relative_paths_are_one_video(tmp_path, pairs_csv, monkeypatch):
    """What write_scores wrote holds relative paths, also of videos that the data names from the root."""
    pairs, root = read_pairs(pairs_csv), os.path.dirname(pairs_csv)
    rows = [[os.path.relpath(video, root), k] for k, pair in enumerate(pairs) for video in pair.videos]
    scores = write_csv(tmp_path / "s.csv", ["path", "reward"], rows)
    monkeypatch.chdir(root)
    far = [dataclasses.replace(pair, **{name: os.path.abspath(getattr(pair, name)) for name in ("video_a", "video_b")})
           for pair in pairs]
    assert compare.read_scores(scores, pairs_csv, far, "").tolist() == [[k, k] for k in range(len(pairs))]


def test_scores_by_path_are_looked_up(tmp_path, pairs_csv):
    rows = [[f"{k}{side}.mp4", k + (side == "a")] for k in (4, 3, 1, 0) for side in "ab"]
    scores = write_csv(tmp_path / "s.csv", ["path", "reward"], rows)
    assert rewards_of(scores, pairs_csv) == [[1, 0], [2, 1], [4, 3], [5, 4]]
    with pytest.raises(InputError, match="second reward"):
        rewards_of(write_csv(tmp_path / "t.csv", ["path", "reward"], [*rows, ["0a.mp4", 9]]), pairs_csv)
    assert np.isnan(rewards_of(write_csv(tmp_path / "u.csv", ["path", "reward"], rows[1:]), pairs_csv)[3][0])
    empty = write_csv(tmp_path / "v.csv", ["path", "reward"], [["0a.mp4", ""], *rows])  # no score is no second score
    assert rewards_of(empty, pairs_csv) == [[1, 0], [2, 1], [4, 3], [5, 4]]
    lacks = write_csv(tmp_path / "w.csv", ["path", "reward"], [*rows[1:], ["4a.mp4", ""], ["4a.mp4", " "]])
    assert np.isnan(rewards_of(lacks, pairs_csv)[3][0])
    both = [["0a.mp4", "prompt 0", 7], ["0a.mp4", "another", 8], ["0a.mp4", "", 9], ["0b.mp4", "", 6]]
    own = write_csv(tmp_path / "x.csv", ["path", "prompt", "reward"], both)  # the prompt's own reward comes first
    assert rewards_of(own, pairs_csv)[0] == [7, 6]
