"""Published data to our CSVs: labels, polarity, counts, and files that are broken, absent or half there."""

import json
import sys

import pytest

import data
import evaluate
from lab.road import datasets
from plumbing import report
from plumbing.formats import open_table
from tests.conftest import refuses

QUESTION = "<video>\n... text-to-video models and its text prompt: \n{}.\n\nBased on the video content and the rest"


def files(folder, *names, content=b"not decoded here"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def feedback(video, prompt, score, thought="(2) text-to-video alignment: 1"):
    """A row of VideoFeedback2's training file. Its thought states another score: it must not be read."""
    scores = f"(1) visual quality: 5\n(2) text-to-video alignment: {score}\n(3) physical: 5"
    answer = f"<think>\n{thought}\n</think>\n\n{scores}"
    turns = [{"from": "human", "value": QUESTION.format(prompt)}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "videos": [f"videos/{video}.mp4"]}


def convert(tmp_path, command, *flags, rows=None):
    """Runs a converter. -> the rows of its CSV"""
    if rows is not None:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        flags = ["--json", str(tmp_path / "rows.json"), *flags]
    out = tmp_path / "out.csv"
    datasets.main([command, "--videos", str(tmp_path / "videos"), "--out", str(out), *map(str, flags)])
    return [row for _, row in open_table(str(out))[1]]


def parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed; pip install -r requirements-road.txt")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_videofeedback2_pairs_inside_a_prompt_by_the_score_behind_the_thought(tmp_path, capsys):
    files(tmp_path / "videos", "1_a.mp4", "1_b.mp4", "1_c.mp4", "2_a.mp4", "2_b.mp4")
    rows = [feedback("1_a", "A dog.", 5), feedback("1_b", "A dog.", 3), feedback("1_c", "A dog.", 2),
            feedback("2_a", "A cat", 4), feedback("2_b", "A cat", 4)]
    pairs = convert(tmp_path, "videofeedback2", rows=rows)
    found = set()
    for pair in pairs:
        a, b = (name.rsplit("/", 1)[1] for name in json.loads(pair["videos"]))
        found.add((a, b) if pair["GSB"] == "A" else (b, a))
        assert pair["prompt"] == "A dog." and pair["GSB"] in "AB"  # the template's second full stop is gone
    assert found == {("1_a.mp4", "1_b.mp4"), ("1_a.mp4", "1_c.mp4")}  # 5 against 3 and 2; 3 against 2 is too close
    told = capsys.readouterr().out
    assert "1 pairs with equal scores" in told and "1 closer than" in told and "Apache-2.0" in told
    # What stage 1 reads: the videos are found from the CSV's folder.
    there = {str(path) for path in (tmp_path / "videos").iterdir()}
    assert {pair.video_a for pair in data.read_pairs(str(tmp_path / "out.csv"))} <= there
    ties = convert(tmp_path, "videofeedback2", "--ties", "--overwrite", rows=rows)
    assert [pair["prompt"] for pair in ties if pair["GSB"] == "same"] == ["A cat"]  # none but the template's


def test_videofeedback2_s_other_two_shapes():
    learned = {"problem": QUESTION.format("A dog"), "path": "./vs2_videos/1_a.mp4", "solution":
               "<answer>visual quality: 3; text-to-video alignment: 2; physical/common-sense consistency: 5</answer>"}
    assert datasets.videofeedback2_row(learned) == ("./vs2_videos/1_a.mp4", "A dog", 2)
    test = {"video_name": "1_h", "prompt": "A dog\ud800", "visual_score": 1, "t2v_score": 4, "phy_score": 1}
    assert datasets.videofeedback2_row(test) == ("1_h.mp4", "A dog?", 4)


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path, capsys):
    files(tmp_path / "videos", "1_a.mp4", "1_b.mp4")
    files(tmp_path / "videos", "1_c.mp4", content=b"")
    rows = [feedback("1_a", "A dog.", 5), feedback("1_b", "A dog.", 1), feedback("1_c", "A dog.", 1),
            feedback("9_z", "A dog.", 1), feedback("1_a", "A dog.", 1), feedback("1_a", "A dog.", 7),
            feedback("1_a", "", 1), {"conversations": None}, "text", feedback("1_a", "A dog.", "none")]
    assert len(convert(tmp_path, "videofeedback2", rows=rows)) == 1
    told = capsys.readouterr().out
    for line in ("read 10 rows", "1: video file is empty (videos/1_c.mp4)",
                 "1: video listed but not there (videos/9_z.mp4)",
                 "1: video listed twice (videos/1_a.mp4)", "1: score outside 1-5 (row 6)", "1: no text prompt (row 7)",
                 "1: no text-to-video alignment score (row 10)",  # that in the thought is none
                 "2: row without the published fields (row 8, row 9)"):
        assert line in told, (line, told)


def test_prompts_of_a_benchmark_are_dropped_and_a_split_keeps_prompts_together(tmp_path, capsys):
    names = [f"{k}_{letter}" for k in range(40) for letter in "abc"]
    files(tmp_path / "videos", *(f"{name}.mp4" for name in names))
    (tmp_path / "bench.csv").write_text('prompt,other\n"number 7, A DOG",1\n')  # another case and punctuation
    scores = {"a": 1, "b": 3, "c": 5}
    rows = [feedback(name, f"Number {name.split('_')[0]}: a dog.", scores[name[-1]]) for name in names]
    flags = "--exclude", tmp_path / "bench.csv", "--val", tmp_path / "val.csv", "--val-share", 0.3
    kept = {pair["prompt"] for pair in convert(tmp_path, "videofeedback2", *flags, rows=rows)}
    held = {row["prompt"] for _, row in open_table(str(tmp_path / "val.csv"))[1]}
    assert "dropped 3: pairs whose prompt a file of --exclude has" in capsys.readouterr().out
    assert not kept & held and len(kept | held) == 39 and "Number 7: a dog." not in kept | held
    assert 4 <= len(held) <= 20  # 12 expected
    again = ["join", "--data", tmp_path / "out.csv", "--out", tmp_path / "a.csv", "--val", tmp_path / "b.csv",
             "--val-share", 0.3]
    # In stage 1's files `problem` is not the prompt: data.read_pairs does not read it either.
    (tmp_path / "cold.csv").write_text('problem,prompt\nWhich video is better?,number 8: a dog\n')
    (tmp_path / "rl.csv").write_text("problem\nnumber 9: a dog\n")
    (tmp_path / "asked.csv").write_text("problem\nText Prompt: a dog. Video: <video>\n")  # would match no prompt
    refuses(capsys, datasets.main, *again, "--exclude", tmp_path / "asked.csv", says="asked.csv: `problem` is a whole")
    files_ = "--exclude", tmp_path / "cold.csv", tmp_path / "rl.csv"
    left = {pair["prompt"] for pair in convert(tmp_path, "videofeedback2", *files_, "--overwrite", rows=rows)}
    assert len(left) == 38 and not left & {"Number 8: a dog.", "Number 9: a dog."}
    convert(tmp_path, "videofeedback2", *flags, "--overwrite", rows=rows)
    # Splitting the rest again: the same seed finds nothing below its share, another one does.
    refuses(capsys, datasets.main, *again, says="no pair is left for")
    datasets.main([*map(str, again), "--seed", "1"])
    three = convert(tmp_path, "videofeedback2", "--per-prompt", 1, "--overwrite", rows=rows)
    assert len(three) == 40


def test_the_better_video_is_not_always_a_and_not_by_the_order_of_the_rows(tmp_path):
    """Were A always the better, the label would be a side, which a model learns at once."""
    scores = dict(zip("abcdef", (1, 5, 3, 1, 5, 3)))
    names = [f"{k}_{letter}" for k in range(30) for letter in scores]
    files(tmp_path / "videos", *(f"{name}.mp4" for name in names))
    rows = [feedback(name, f"Prompt {name.split('_')[0]}.", scores[name[-1]]) for name in names]
    pairs = convert(tmp_path, "videofeedback2", rows=rows)
    assert len(pairs) == 30 * 12 and 0.4 < sum(pair["GSB"] == "A" for pair in pairs) / len(pairs) < 0.6
    # --per-prompt draws among all pairs: two of twelve share a video in 6 of 11 draws, not in each
    few = convert(tmp_path, "videofeedback2", "--per-prompt", 2, "--overwrite", rows=rows)
    videos = {}
    for pair in few:
        videos.setdefault(pair["prompt"], []).extend(json.loads(pair["videos"]))
    assert {len(listed) for listed in videos.values()} == {4} and len(videos) == 30
    assert 0.25 < sum(len(set(listed)) < 4 for listed in videos.values()) / 30 < 0.85
    assert 0.25 < sum(pair["GSB"] == "A" for pair in few) / len(few) < 0.75
    again = convert(tmp_path, "videofeedback2", "--per-prompt", 2, "--overwrite", rows=rows[::-1])
    assert sorted(map(str, again)) == sorted(map(str, few))


def test_a_prompt_in_other_letters_stays_on_its_side_of_the_split(tmp_path):
    """Two sets rarely write a prompt alike: were the raw text hashed, "A dog." could be trained on, "a dog" tested."""
    names = [f"{k}_{letter}" for k in range(30) for letter in "abcd"]
    files(tmp_path / "videos", *(f"{name}.mp4" for name in names))
    rows = []
    for name in names:
        prompt = f"A dog, number {name.split('_')[0]}"
        rows.append(feedback(name, prompt if name[-1] in "ab" else prompt.upper().replace(",", ""),
                             1 if name[-1] in "ac" else 5))
    kept = convert(tmp_path, "videofeedback2", "--val", tmp_path / "val.csv", "--val-share", 0.4, rows=rows)
    held = [row for _, row in open_table(str(tmp_path / "val.csv"))[1]]
    assert len(kept) + len(held) == 60
    sides = [{datasets.plain(row["prompt"]) for row in part} for part in (kept, held)]
    assert not sides[0] & sides[1] and all(sides)


def test_join_keeps_labels(tmp_path):
    files(tmp_path, "a.mp4", "b.mp4")
    labels = ["A", "B", "same", "B"]
    (tmp_path / "one.csv").write_text("path_A,path_B,prompt,TA\n" + "".join(
        f"a.mp4,b.mp4,prompt {k},{label}\n" for k, label in enumerate(labels)))
    datasets.main(["join", "--data", str(tmp_path / "one.csv"), "--out", str(tmp_path / "all.csv")])
    pairs = data.read_pairs(str(tmp_path / "all.csv"))
    assert [pair.label for pair in pairs] == [1, -1, 0, -1]
    assert {pair.videos for pair in pairs} == {(str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"))}


def test_mj_bench_video_has_another_polarity_and_three_of_our_dimensions(tmp_path, capsys):
    """By hand: 1 is good, 2 is bad, 0 is irrelevant. Read as numbers, their 2 would be our best."""
    files(tmp_path / "videos", *(f"test/{k}_{side}.mp4" for k in range(5) for side in (0, 1)))

    def row(k, better, first, second, **more):
        labels = [dict(zip(("object", "actions", "location", "count"), (*verdicts, 1))) for verdicts in (first, second)]
        return {"caption": f"Dog {k}.", "video_0_path": f"test/{k}_0.mp4", "video_1_path": f"test/{k}_1.mp4",
                "video_0_label": labels[0], "video_1_label": labels[1], "discard": False,
                "category_preference": {"Alignment": better}, "overall_preference": "Video 2 better", **more}

    rows = [row(0, "Video 1 better", (1, 2, 0), (2, 2, 1)), row(1, "Same", (1, 1, 1), (1, 1, 1)),
            row(2, "Same", (1, 1, 3), (1, 1, 1)), row(3, "Same", (1, 1, 1), (1, 1, 1), discard=True),
            row(4, "?", (1, 1, 1), (1, 1, 1))]
    convert(tmp_path, "mj-bench-video", rows=rows)
    first, second = data.read_pairs(str(tmp_path / "out.csv"))
    assert first.label == 1 and second.label == 0
    assert first.annotation_a == {"subject": "2", "dynamics": "0", "environment": "N/A"}
    assert first.annotation_b == {"subject": "0", "dynamics": "0", "environment": "2"}
    assert first.video_a.endswith("test/0_0.mp4")
    told = capsys.readouterr().out
    for line in ("1: score outside 0-2 (row 3)", "1: the authors marked it `discard` (row 4)",
                 "1: unknown preference '?' (row 5)"):
        assert line in told
    # The training rows' videos were not unpacked: those of the test rows bear the same names, and are not them.
    train = json.loads(json.dumps(rows[0]).replace("test/", "train/"))
    convert(tmp_path, "mj-bench-video", "--overwrite", rows=[rows[1], train])
    assert len(data.read_pairs(str(tmp_path / "out.csv"))) == 1
    assert "1: video listed but not there (row 2)" in capsys.readouterr().out
    convert(tmp_path, "mj-bench-video", "--overall", "--overwrite", rows=rows[:1])
    assert data.read_pairs(str(tmp_path / "out.csv"))[0].label == -1


def test_mj_bench_video_is_evaluated_under_its_name(tmp_path, tiny_clips, tiny_model_dir, monkeypatch, capsys):
    """From the published columns to a report: the CSV has the name that `--benchmark` looks for in --root."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    rows = []
    for k, better in enumerate(("Video 1 better", "Video 2 better", "Same")):
        for side in (0, 1):
            files(tmp_path / "videos", f"{k}_{side}.mp4", content=open(tiny_clips[2 * k + side], "rb").read())
        label = {"object": 1, "actions": 2, "location": 0}
        rows.append({"caption": f"Dog {k % 2}.", "video_0_path": f"{k}_0.mp4", "video_1_path": f"{k}_1.mp4",
                     "video_0_label": label, "video_1_label": label, "category_preference": {"Alignment": better},
                     "overall_preference": better})
    (tmp_path / "test.json").write_text(json.dumps(rows))
    flags = ["--model", tiny_model_dir, "--benchmark", "mj-bench-video", "--root", tmp_path, "--out", tmp_path / "o",
             "--no-think"]
    refuses(capsys, evaluate.main, *flags, says="holds none of mj-bench-video.csv (docs/benchmarks.md)")
    datasets.main(["mj-bench-video", "--json", str(tmp_path / "test.json"), "--videos", str(tmp_path / "videos"),
                   "--out", str(tmp_path / "mj-bench-video.csv")])
    evaluate.main([str(flag) for flag in flags])
    numbers = json.loads((tmp_path / "o" / "report.json").read_text())
    assert (numbers["benchmark"], numbers["pairs"], numbers["human_ties"]) == ("mj-bench-video", 3, 1)
    scores = {row["path"][-7:-4]: float(row["reward"]) for _, row in open_table(str(tmp_path / "o" / "scores.csv"))[1]}
    assert numbers["accuracy_without_ties"] == ((scores["0_0"] > scores["0_1"]) + (scores["1_1"] > scores["1_0"])) / 2


def test_rapidata_s_votes(tmp_path, capsys):
    files(tmp_path / "videos" / "wan", "0.mp4", "1.mp4")
    files(tmp_path / "videos" / "sora", "0.mp4", "1.mp4")  # the same names in two folders: the folder decides

    def row(first, second, one="wan/0.mp4", two="https://host/sora/0.mp4"):
        return {"prompt": "A dog.", "file_name1": one, "file_name2": two, "unused": b"x" * 9,
                "weighted_results1_Alignment": first, "weighted_results2_Alignment": second}

    rows = [row(0.9, 0.1), row(0.4, 0.6), row(0.55, 0.45), row(None, None), row(7.0, 1.0), row(0.5, 0.5),
            row(1.0, 0.0, "0.mp4")]
    table = parquet(tmp_path / "t.parquet", rows)
    pairs = convert(tmp_path, "rapidata", "--parquet", table)
    assert [pair["GSB"] for pair in pairs] == ["A", "B"]  # .6 - .4 is .2, whatever floats say
    assert json.loads(pairs[0]["videos"]) == ["videos/wan/0.mp4", "videos/sora/0.mp4"]
    ties = convert(tmp_path, "rapidata", "--parquet", table, "--ties", "--overwrite")
    assert [pair["GSB"] for pair in ties] == ["A", "B", "same"]  # .5 to .5; .55 to .45 is neither
    told = capsys.readouterr().out
    for line in ("1: no votes on Alignment (t.parquet row 4)", "1: share of votes outside 0-1 (t.parquet row 5)",
                 "1: several videos of that name (t.parquet row 7)", "2 pairs closer"):
        assert line in told, told
    files(tmp_path / "videos" / "wan", "2.mp4")  # of sora's 2.mp4 nothing is there
    parquet(tmp_path / "half.parquet", [row(0.9, 0.1), row(0.9, 0.1, "wan/2.mp4", "sora/2.mp4"),
                                        row(0.9, 0.1, "sora/2.mp4", "sora/0.mp4"), row(0.9, 0.1, two="wan/0.mp4"),
                                        row(0.9, 0.1, "pika/2.mp4", "sora/0.mp4"), row(0.9, 0.1, "wan/2.mp4")])
    assert len(convert(tmp_path, "rapidata", "--parquet", tmp_path / "half.parquet", "--overwrite")) == 2
    told = capsys.readouterr().out
    for line in ("2: video listed but not there (half.parquet row 2, half.parquet row 3)", "1: the same video twice",
                 "1: one video for two that are listed (half.parquet row 5)"):
        assert line in told, told
    refuses(capsys, datasets.main, "rapidata", "--parquet", table, "--videos", tmp_path / "videos",
            "--out", tmp_path / "x.csv", "--dimension", "Coherence", says="has no column weighted_results1_Coherence")


def test_genai_bench_becomes_the_benchmark_s_csv(tmp_path, capsys):
    files(tmp_path / "videos" / "dir", "l.mp4", "r.mp4")
    url = "https://huggingface.co/datasets/some/videos/blob/main/dir/"
    row = {"prompt": "A dog.", "left_model": "one", "right_model": "two", "left_video": f"{url}l.mp4",
           "right_video": f"{url}r.mp4"}
    votes = ("leftvote", "rightvote", "tievote", "bothbad_vote", "upvote")
    table = parquet(tmp_path / "t.parquet", [{**row, "vote_type": vote} for vote in votes])
    convert(tmp_path, "genai-bench", "--parquet", table)
    pairs = data.read_pairs(str(tmp_path / "out.csv"))
    assert [pair.label for pair in pairs] == [1, -1, 0, 0] and pairs[0].extra["left_model"] == "one"
    assert "1: unknown vote (t.parquet row 5)" in capsys.readouterr().out
    refuses(capsys, datasets.main, "genai-bench", "--parquet", table, "--videos", tmp_path / "videos",
            "--out", tmp_path / "other" / "genai-bench.csv", says="must lie beside or above --videos")


def test_a_broken_video_is_found_before_training(tmp_path, capsys, tiny_clips):
    whole = open(tiny_clips[0], "rb").read()
    files(tmp_path / "videos", "1_a.mp4", "1_b.mp4", content=whole)
    files(tmp_path / "videos", "1_c.mp4", content=whole[: len(whole) // 2])  # a download that stopped
    rows = [feedback("1_a", "A dog.", 5), feedback("1_b", "A dog.", 1), feedback("1_c", "A dog.", 1)]
    assert len(convert(tmp_path, "videofeedback2", rows=rows)) == 2
    assert len(convert(tmp_path, "videofeedback2", "--check-videos", "--overwrite", rows=rows)) == 1
    assert "1: video cannot be read (videos/1_c.mp4)" in capsys.readouterr().out


def test_files_that_are_missing_or_half_there(tmp_path, capsys):
    videos, out = files(tmp_path / "videos", "1_a.mp4", "1_b.mp4"), tmp_path / "new.csv"
    whole = json.dumps([feedback("1_a", "A dog.", 5), feedback("1_b", "A dog.", 1)])

    def says(message, content=whole, videos=videos, *flags):
        (tmp_path / "x.json").write_text(content)
        refuses(capsys, datasets.main, "videofeedback2", "--json", tmp_path / "x.json", "--videos", videos,
                "--out", out, *flags, says=message)
        assert flags or not out.exists()

    says("is not whole JSON", whole[:-30])
    says("Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    says("holds a dict where a list", "{}")
    says("no such folder", whole, str(tmp_path / "nowhere"))
    says("holds only archives (v.zip): unpack them", whole, files(tmp_path / "zipped", "v.zip"))
    says("holds no video", whole, files(tmp_path / "bare", "x.txt"))
    says("no pair is left", json.dumps([feedback("8_a", "A dog.", 5)]))
    says("has no column prompt", whole, videos, "--exclude", files(tmp_path, "b.csv", content=b"text\nx\n") + "/b.csv")
    says("--val-share 1.5: must lie", whole, videos, "--val-share", "1.5")
    out.write_text("mine")
    says("exists already", whole, videos, "--seed", "1")
    assert out.read_text() == "mine"  # a second run loses nothing
    refuses(capsys, datasets.main, "videofeedback2", "--json", tmp_path / "no.json", "--videos", videos,
            "--out", tmp_path / "y.csv", says="no such file")


def test_parquet_that_is_half_there_or_without_a_reader(tmp_path, capsys, monkeypatch):
    videos = files(tmp_path / "videos", "l.mp4")
    flags = ["genai-bench", "--videos", videos, "--out", tmp_path / "g.csv", "--parquet", tmp_path / "t.parquet"]
    files(tmp_path, "t.parquet", content=b"PAR1 and then nothing")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed; pip install -r requirements-road.txt")
    refuses(capsys, datasets.main, *flags, says="is not whole parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuses(capsys, datasets.main, *flags, says="parquet files need pyarrow: pip install -r requirements-road.txt")
