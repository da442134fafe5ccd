"""Labels of single videos: numbers by hand, constant rewards, and files in the published columns."""

import json

import numpy as np
import pytest

from lab.road import pointwise
from tests.conftest import refuses


def write(path, column, rows):
    path.write_text(f"path,prompt,{column}\n" + "".join(f"{v},{p},{x}\n" for v, p, x in rows))
    return str(path)


def test_measures_by_hand():
    scores, rewards = np.array([1.0, 2, 3]), np.array([0.0, 5, 4])
    found = pointwise.measure(scores, rewards, np.array(["a"] * 3))
    assert found["spearman"] == pytest.approx(0.5) and found["within"] == pytest.approx(2 / 3)
    assert found["pearson"] == pytest.approx(4 / (2**0.5 * 14**0.5))  # (-1, 0, 1) times (-3, 2, 1) is 4
    apart = pointwise.measure(scores, rewards, np.array(["a", "a", "b"]))
    assert apart["within"] == 1 and apart["spearman"] == pytest.approx(0.5)  # 3 of b is compared with none
    assert pointwise.measure(scores, -rewards, np.array(["a", "a", "b"]))["within"] == 0
    assert pointwise.measure(scores, np.ones(3), np.array(["a"] * 3)) == {
        "spearman": None, "pearson": None, "within": 0.5}


def test_the_interval_is_over_prompts():
    """40 prompts with two videos each, half of the prompts in order: the error of `within` is √(.25 / 40)."""
    prompts = np.repeat(np.arange(40), 2)
    scores, rewards = np.tile([1.0, 5.0], 40), np.concatenate([[0.0, 1.0]] * 20 + [[1.0, 0.0]] * 20)
    row = pointwise.with_intervals(scores, rewards, prompts)["within"]
    assert row["value"] == 0.5 and (row["high"] - row["low"]) / 2 == pytest.approx(1.96 * (0.25 / 40) ** 0.5, rel=0.15)
    # 6 prompts of 20 videos that are all alike: six values, not 120, so the order of the prompts is hardly known
    alike = np.repeat(np.arange(6), 20)
    row = pointwise.with_intervals(alike.astype(float), np.array([0.0, 2, 1, 4, 3, 5])[alike], alike)["spearman"]
    assert row["high"] - row["low"] > 0.35


def test_convert_and_judge(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    for name in ("1_a", "1_b", "2_a"):
        (tmp_path / f"videos/{name}.mp4").write_bytes(b"not decoded here")
    rows = [{"video_name": name, "prompt": f"Dog {name[0]}.", "visual_score": 1, "t2v_score": score, "phy_score": 1}
            for name, score in (("1_a", 4), ("1_b", 2), ("2_a", 5), ("9_z", 3), ("2_a", 9))]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    out = tmp_path / "vsb2.csv"
    pointwise.main(["convert", "--json", str(tmp_path / "test.json"), "--videos", str(tmp_path / "videos"),
                    "--out", str(out)])
    told = capsys.readouterr().out
    assert "1: video listed but not there (9_z.mp4)" in told and "3 videos of 2 prompts" in told
    given = [("videos/1_a.mp4", "Dog 1.", 2.5), ("videos/1_b.mp4", "Dog 1.", -1), ("videos/2_a.mp4", "Dog 2.", 9)]
    judge = ["judge", "--data", str(out), "--out", str(tmp_path / "o")]
    pointwise.main([*judge, "--scores", write(tmp_path / "r.csv", "reward", given)])
    found = json.loads((tmp_path / "o/pointwise.json").read_text())
    assert found["spearman"]["value"] == pytest.approx(1) and found["within"]["value"] == 1 and found["videos"] == 3
    same = write(tmp_path / "c.csv", "reward", [(video, prompt, 1) for video, prompt, _ in given])
    pointwise.main([*judge, "--scores", same])
    assert "all 3 rewards are 1: constant" in capsys.readouterr().out
    refuses(capsys, pointwise.main, *judge, "--scores", write(tmp_path / "h.csv", "reward", given[:2]), says="1 lack")
    bad = write(tmp_path / "b.csv", "reward", [("x.mp4", "p", "nan")])
    refuses(capsys, pointwise.main, *judge, "--scores", bad, says="line 2: reward 'nan' is no number")
    refuses(capsys, pointwise.main, *judge, says="either --model or --scores")


def test_judge_by_a_model_loses_nothing(tmp_path, tiny_clips, tiny_model_dir, capsys):
    """A clip that cannot be read stops it; what was thought until then is kept, and the same command goes on."""
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    clips = sorted({*tiny_clips})
    rows = [(clip, "a dog", 1 + k) for k, clip in enumerate([*clips[:8], str(bad)])]  # 8: a batch
    csv, out = write(tmp_path / "d.csv", "score", rows), tmp_path / "o"
    judge = ["judge", "--data", csv, "--model", tiny_model_dir, "--out", str(out), "--max-new-tokens", "6"]
    refuses(capsys, pointwise.main, *judge, says="bad.mp4: is broken or not a video")
    thought = (out / "thoughts.jsonl").read_text()
    assert thought.count("\n") == 8
    bad.write_bytes(open(clips[8], "rb").read())
    pointwise.main(judge)
    assert (out / "thoughts.jsonl").read_text().startswith(thought)
    assert json.loads((out / "pointwise.json").read_text())["videos"] == 9
    refuses(capsys, pointwise.main, *judge[:-1], "7", says="made with another max_new_tokens")
