"""best_of.py: clips of one prompt in the order of their rewards, and pairs of the best and the worst."""

import csv
import os
import shutil

import data
import evaluate
from lab.post_training import best_of
from plumbing import jobs
from tests.conftest import refuses, write_csv
from tests.test_evaluate import FEW


def test_best_of_and_one_video(tmp_path, tiny_model_dir, tiny_clips, capsys):
    rows = [[os.path.abspath(path), "=a prompt"] for path in tiny_clips[:3]]
    videos, dpo = write_csv(tmp_path / "videos.csv", ["path", "prompt"], rows), tmp_path / "new" / "dpo.csv"
    model = ["--model", tiny_model_dir, *FEW, "--no-think"]
    best_of.main([*model, "--data", videos, "--make-pairs", str(dpo), "--out", str(tmp_path / "out")])
    rewards = {key[0]: r["reward"] for key, r in jobs.read_log(str(tmp_path / "out"), "rewards").items()}
    with open(tmp_path / "out" / "best_of.csv", newline="") as file:
        ranked = list(csv.DictReader(file))
    assert [r["path"] for r in ranked] == sorted(rewards, key=rewards.get, reverse=True)
    assert ranked[0]["prompt"] == "'=a prompt"  # no formula for the spreadsheet
    (pair,) = data.read_pairs(str(dpo))
    assert (pair.label, pair.prompt) == (1, "=a prompt")  # exact for training
    assert [os.path.realpath(v) for v in pair.videos] == [os.path.realpath(ranked[k]["path"]) for k in (0, -1)]
    capsys.readouterr()
    evaluate.main([*model, "--video", rows[0][0], "--prompt", "=a prompt"])
    assert f"reward {rewards[rows[0][0]]:+.4f}" in capsys.readouterr().out


def test_best_and_worst_leaves_out_what_has_no_order(tmp_path):
    groups = {"two": [(2.0, "v/a.mp4"), (1.0, "v/c.mp4")], "one": [(2.0, "b.mp4")]}
    groups["equal"] = [(1.0, "d.mp4"), (1.0, "e.mp4")]
    groups["a copy, in another batch"] = [(1.0000001, "d.mp4"), (1.0, "e.mp4")]
    for name in "fg":
        (tmp_path / f"{name}.mp4").write_text("one clip")
    groups["a copy, with other sampled CoTs"] = [(2.0, str(tmp_path / "f.mp4")), (1.0, str(tmp_path / "g.mp4"))]
    best_of.write_best_and_worst(str(tmp_path / "dpo.csv"), groups)
    lines = (tmp_path / "dpo.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].endswith("two,A,2.0,1.0")


def test_no_clip_that_can_be_read(tmp_path, tiny_model_dir, capsys):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    videos = write_csv(tmp_path / "videos.csv", ["path", "prompt"], [["a.mp4", "a prompt"]])
    flags = ["--model", tiny_model_dir, "--no-think", "--data", videos, "--out", tmp_path / "o"]
    refuses(capsys, best_of.main, *flags, says="is broken or not a video (Invalid data found when processing input). "
            "(--skip-bad-videos leaves it out)")
    refuses(capsys, best_of.main, *flags, "--skip-bad-videos", says="no video has a reward; see")


def test_cots_that_were_cut_off_are_told(tmp_path, tiny_model_dir, tiny_clips, capsys):
    rows = [[os.path.abspath(path), "a prompt"] for path in tiny_clips[:2]]
    videos = write_csv(tmp_path / "videos.csv", ["path", "prompt"], rows)
    best_of.main(["--model", tiny_model_dir, *FEW, "--data", videos, "--out", str(tmp_path / "out")])
    assert "2 of 2 CoTs did not end within --max-new-tokens" in capsys.readouterr().out
    write_csv(tmp_path / "videos.csv", ["path", "prompt"], rows[:1])
    best_of.main(["--model", tiny_model_dir, *FEW, "--data", videos, "--out", str(tmp_path / "out")])
    assert "1 of 1 CoTs did not end" in capsys.readouterr().out  # not those of an earlier --data


def test_a_replaced_clip_is_ranked_anew(tmp_path, tiny_model_dir, tiny_clips):
    """A generator writes each round's clips to the same names."""
    names = [str(tmp_path / f"{k}.mp4") for k in range(3)]
    videos = write_csv(tmp_path / "videos.csv", ["path", "prompt"], [[name, "a prompt"] for name in names])
    flags = ["--model", tiny_model_dir, *FEW, "--no-think", "--data", videos]
    for clips, outs in ((tiny_clips[:3], ["out"]), (tiny_clips[3:6], ["out", "fresh"])):
        for path, name in zip(clips, names):
            shutil.copy(path, name)
        for out in outs:
            best_of.main([*flags, "--out", str(tmp_path / out)])
    assert (tmp_path / "out" / "best_of.csv").read_text() == (tmp_path / "fresh" / "best_of.csv").read_text()
