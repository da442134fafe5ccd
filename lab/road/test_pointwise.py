"""Labels of single videos: numbers by hand, constant rewards, and files in the published columns."""

import json

import numpy as np
import pytest

from lab.road import pointwise, videoscore
from lab.road.test_datasets import parquet
from plumbing.formats import open_table
from tests.conftest import refuses


def write(path, column, rows):
    path.write_text(f"path,prompt,{column}\n" + "".join(f"{v},{p},{x}\n" for v, p, x in rows))
    return str(path)


def values(scores, rewards, prompts):
    return {name: row["value"] for name, row in pointwise.measure(scores, rewards, np.array(prompts)).items()}


def test_measures_by_hand():
    scores, rewards = np.array([1.0, 2, 3]), np.array([0.0, 5, 4])
    found = values(scores, rewards, ["a"] * 3)
    assert found["spearman"] == pytest.approx(0.5) and found["within"] == pytest.approx(2 / 3)
    assert found["pearson"] == pytest.approx(4 / (2**0.5 * 14**0.5))  # (-1, 0, 1) times (-3, 2, 1) is 4
    apart = values(scores, rewards, ["a", "a", "b"])
    assert apart["within"] == 1 and apart["spearman"] == pytest.approx(0.5)  # 3 of b is compared with none
    assert values(scores, -rewards, ["a", "a", "b"])["within"] == 0
    assert values(scores, np.ones(3), ["a"] * 3) == {"spearman": None, "pearson": None, "within": 0.5}


@pytest.mark.parametrize("scores, rewards, prompts, undefined", [
    ([1, 2, 3, 4], [7, 7, 7, 7], "aabb", {"spearman": "all 4 rewards are 7", "pearson": "all 4 rewards are 7"}),
    ([2, 2, 2, 2], [1, 3, 2, 4], "aabb", {"spearman": "all 4 scores are 2", "pearson": "all 4 scores are 2",
                                          "within": "no prompt has two"}),
    ([1, 2, 3, 4], [1, 3, 2, 4], "abcd", {"within": "no prompt has two"}),
])
def test_a_number_that_does_not_exist_is_said_and_is_no_nan(tmp_path, scores, rewards, prompts, undefined):
    rows = pointwise.measure(np.array(scores, float), np.array(rewards, float), np.array(list(prompts)))
    told = pointwise.report(str(tmp_path), 4, len(set(prompts)), rows)
    kept = json.loads((tmp_path / "pointwise.json").read_text())
    for name in pointwise.MEANING:
        (line,) = [line for line in told.splitlines() if line.startswith(f"- {name}: ")]  # what it means, in a sentence
        assert (kept[name]["value"] is None) == (name in undefined) == ("it does not exist" in line)
        assert undefined.get(name, "") in line and undefined.get(name, "") in str(kept[name]["undefined"])
    assert "nan" not in told.lower() and "NaN" not in (tmp_path / "pointwise.json").read_text()
    assert told == (tmp_path / "pointwise.md").read_text()


def test_the_interval_is_over_prompts():
    """40 prompts with two videos each, half of the prompts in order: the error of `within` is √(.25 / 40)."""
    prompts = np.repeat(np.arange(40), 2)
    scores, rewards = np.tile([1.0, 5.0], 40), np.concatenate([[0.0, 1.0]] * 20 + [[1.0, 0.0]] * 20)
    row = pointwise.measure(scores, rewards, prompts)["within"]
    assert row["value"] == 0.5 and (row["high"] - row["low"]) / 2 == pytest.approx(1.96 * (0.25 / 40) ** 0.5, rel=0.15)
    # 6 prompts of 20 videos that are all alike: six values, not 120, so the order of the prompts is hardly known
    alike = np.repeat(np.arange(6), 20)
    row = pointwise.measure(alike.astype(float), np.array([0.0, 2, 1, 4, 3, 5])[alike], alike)["spearman"]
    assert row["high"] - row["low"] > 0.35


def videos(tmp_path, *names):
    (tmp_path / "videos").mkdir(exist_ok=True)
    for name in names:
        (tmp_path / f"videos/{name}.mp4").write_bytes(b"not decoded here")
    return ["--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "out.csv")]


def test_v2_in_its_published_columns_and_ready_made_rewards(tmp_path, capsys):
    rows = [{"video_name": name, "prompt": f"Dog {name[0]}.", "visual_score": 1, "t2v_score": score, "phy_score": 1}
            for name, score in (("1_a", 4), ("1_b", 2), ("2_a", 5), ("9_z", 3), ("2_a", 9), ("1_a", 4))]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    flags = ["v2", "--json", str(tmp_path / "test.json"), *videos(tmp_path, "1_a", "1_b", "2_a")]
    videoscore.main(flags)
    told = capsys.readouterr().out
    for line in ("1: video listed but not there (9_z.mp4)", "1: score outside 1-5 (row 5)", "1: video listed twice",
                 "3 videos of 2 prompts; licence Apache-2.0"):
        assert line in told
    given = [("videos/1_a.mp4", "Dog 1.", 2.5), ("videos/1_b.mp4", "Dog 1.", -1), ("videos/2_a.mp4", "Dog 2.", 9)]
    judge = ["--data", str(tmp_path / "out.csv"), "--out", str(tmp_path / "o")]
    pointwise.main([*judge, "--scores", write(tmp_path / "r.csv", "reward", given)])
    found = json.loads((tmp_path / "o/pointwise.json").read_text())
    assert found["spearman"]["value"] == pytest.approx(1) and found["within"]["value"] == 1 and found["videos"] == 3
    (tmp_path / "else").mkdir()  # paths begin where the data's do, wherever the rewards lie
    elsewhere = write(tmp_path / "else" / "r.csv", "reward", given)
    pointwise.main([*judge, "--scores", elsewhere])
    none = write(tmp_path / "n.csv", "reward", [("x.mp4", "p", 1)])
    refuses(capsys, pointwise.main, *judge, "--scores", none, "--skip-bad-videos", says="has a reward for no video of")
    # --root: there they begin, and they must not leave it
    pointwise.main([*judge, "--scores", elsewhere, "--root", str(tmp_path)])
    outside = write(tmp_path / "outside.csv", "reward", [("../x.mp4", "p", 1)])
    refuses(capsys, pointwise.main, *judge, "--scores", outside, "--root", tmp_path, says="line 2")
    refuses(capsys, pointwise.main, *judge, "--scores", write(tmp_path / "h.csv", "reward", given[:2]), says="1 lack")
    bad = write(tmp_path / "b.csv", "reward", [("x.mp4", "p", "nan")])
    refuses(capsys, pointwise.main, *judge, "--scores", bad, says="line 2: reward 'nan' is no number")
    refuses(capsys, pointwise.main, *judge, says="either --model DIR or --scores FILE")
    (tmp_path / "test.json").write_text(json.dumps([{"name": "1_a", "score": 3}]))
    refuses(capsys, videoscore.main, *flags, says="no row can be used")
    (tmp_path / "test.json").write_text("{}")
    refuses(capsys, videoscore.main, *flags, says="holds a dict where a list")


def test_v1_in_its_published_columns(tmp_path, capsys):
    """Rows as VideoScore's own evaluation reads them: the prompt between quotes, a line for each of five aspects."""
    def row(name, prompt, score, asked='For this video, the text prompt is "{}  ",\nall the frames are as follows:'):
        told = ("visual quality: 4\ntemporal consistency: 4\ndynamic degree: 4\n"
                f"text-to-video alignment: {score}\nfactual consistency: 4")
        turns = [{"from": "human", "value": asked.format(prompt)}, {"from": "gpt", "value": told}]
        return {"id": name, "images": [f"{name}_00.jpg"], "conversations": turns}

    rows = [row("70", 'A "big" dog', 1), row("71", 'A "big" dog', 3), row("p1", "A cat", 4), row("72", "A cat", 0),
            row("73", "A cat", "?"), row("74", "A cat", 2, "nothing {}"), row("75", "A cat", 2)]
    table = parquet(tmp_path / "t.parquet", rows)
    flags = ["v1", "--parquet", table, *videos(tmp_path, "70", "71", "p1", "72", "73", "74")]
    videoscore.main(flags)
    kept = [row for _, row in open_table(str(tmp_path / "out.csv"))[1]]
    assert kept == [{"path": f"videos/{name}.mp4", "prompt": prompt, "score": score} for name, prompt, score in (
        ("70", 'A "big" dog', "1"), ("71", 'A "big" dog', "3"), ("p1", "A cat", "4"))]  # alignment, not the first 4
    told = capsys.readouterr().out
    for line in ("1: score outside 1-4 (t.parquet row 4)", "1: no text-to-video alignment score (t.parquet row 5)",
                 "1: no text prompt (t.parquet row 6)", "1: video listed but not there (75.mp4)"):
        assert line in told
    other = parquet(tmp_path / "t.parquet", [{"id": "70", "score_list": [1.0]}])  # another subset's columns
    refuses(capsys, videoscore.main, *["v1", "--parquet", other, *flags[3:]], says="has no column conversations; its")
    refuses(capsys, videoscore.main, *["v1", "--parquet", tmp_path / "no.parquet", *flags[3:]], says="no such file")


def test_judge_by_a_model_loses_nothing(tmp_path, tiny_clips, tiny_model_dir, capsys):
    """A clip that cannot be read stops it; what was thought until then is kept, and the same command goes on."""
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    clips = sorted({*tiny_clips})
    rows = [(clip, "a dog", 1 + k) for k, clip in enumerate([*clips[:8], str(bad)])]  # 8: a batch
    csv, out = write(tmp_path / "d.csv", "score", rows), tmp_path / "o"
    judge = ["--data", csv, "--model", tiny_model_dir, "--out", str(out), "--max-new-tokens", "6"]
    refuses(capsys, pointwise.main, *judge, says="bad.mp4: is broken or not a video")
    thought = (out / "thoughts.jsonl").read_text()
    assert thought.count("\n") == 8
    bad.write_bytes(open(clips[8], "rb").read())
    pointwise.main(judge)
    assert (out / "thoughts.jsonl").read_text().startswith(thought)
    assert json.loads((out / "pointwise.json").read_text())["videos"] == 9
    refuses(capsys, pointwise.main, *judge[:-1], "7", says="made with another max_new_tokens")
