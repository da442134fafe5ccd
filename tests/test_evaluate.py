"""evaluate.py: the report by hand, the command line, and think-then-score with a real, tiny model."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch

import evaluate
import parallel
import phases
from data import PreferencePair
from plumbing import jobs
from plumbing.settings import InputError
from tests.conftest import refuses, write_csv


# ---------------------------------------------------------------------------------------------------------------
# Files in, and the numbers of one report
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ties, left", [("both", 4), ("tie", 3), ("bothbad", 3), ("drop", 2)])
def test_genai_ties(tmp_path, ties, left):
    votes = ["leftvote", "tievote", "bothbad_vote", "rightvote"]
    rows = [["a prompt", "m1", "m2", "a.mp4", "b.mp4", vote] for vote in votes]
    head = ["prompt", "left_model", "right_model", "left_video", "right_video", "vote_type"]
    write_csv(tmp_path / "genai-bench.csv", head, rows)
    s = evaluate.Settings(benchmark=["genai-bench"], root=str(tmp_path), genai_ties=ties)
    assert len(evaluate.read_test_set(s, "genai-bench").pairs) == left


@pytest.mark.parametrize("path", ["../outside.mp4", "/etc/passwd", "link/inside.mp4", "a/../../x.mp4", "a\0b.mp4"])
def test_paths_that_leave_the_root_are_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    table = write_csv(root / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], [["fine.mp4", path, "a prompt", "A"]])
    with pytest.raises(InputError, match="line 2: .*outside --root"):
        evaluate.read_test_set(evaluate.Settings(data=table, root=str(root)))


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
    assert numbers["accuracy_without_ties"] == 2 / 3
    assert (numbers["accuracy_with_ties"], numbers["threshold"]) == (3 / 4, 0.5)
    assert judged.hits["with_ties"].tolist() == [True, True, True, False]
    # Drawn by prompt: p and q, or one of them twice. Without ties p is 1 of 1 right, q 1 of 2; with ties 2 of 2 and
    # 1 of 2.
    assert numbers["accuracy_without_ties_interval"] == numbers["accuracy_with_ties_interval"] == (0.5, 1.0)
    (first, second) = numbers["model_pairs"]
    assert (first["models"], first["with_ties"], first["without_ties"]) == (("x", "y"), 1.0, 1.0)
    assert (second["models"], second["with_ties"], second["without_ties"]) == (("x", "z"), 0.5, 0.5)
    # Intervals are each of their own hits: only human ties are hit here, and without ties all decided pairs are missed.
    pairs = [pair(str(k), k % 2, "y") for k in range(20)]
    numbers = evaluate.measure("ties only", pairs, np.array([[0, 1.0 if k % 2 else 0.0] for k in range(20)])).numbers
    assert numbers["accuracy_without_ties_interval"] == (0.0, 0.0) and numbers["accuracy_with_ties_interval"][0] > 0.2


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------
def test_bad_input_ends_with_one_sentence_and_exit_code_2(tmp_path, pairs_csv, tiny_model_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["--model", tiny_model_dir]
    for flags, words in (
        (["--data", "none.csv", *model], "none.csv: no such file"),
        (["--data", pairs_csv, *model, "--dimension", "VQ"], "no label column VQ"),
        (["--data", pairs_csv], "give --model"),
        (["--data", pairs_csv, "--model", str(tmp_path)], "has no descore.json, so no reward head"),
        (["--model", str(tmp_path)], "give --data"),
        (["--model", str(tmp_path), "--video", "x.mp4"], "--prompt"),
        (["--benchmark", "genai-bench", *model], "--root"),
        (["--benchmark", "genai-bench", *model, "--root", str(tmp_path)], "holds none of"),
        (["--data", pairs_csv, *model, "--thoughts", "0"], "at least 1"),
        (["--data", pairs_csv, *model, "--out", pairs_csv], "cannot be written to"),
    ):
        refuses(capsys, evaluate.main, *flags, says=words)
    refuses(capsys, evaluate.main, "--nonsense", says="unrecognized arguments: --nonsense")


def test_the_first_five_minutes_of_a_user(tmp_path, base_dir, tiny_model_dir, tiny_clips, capsys, monkeypatch):
    """One video: what is not there, what is no video, a GPU that is too small. One sentence, and what to type next."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_bytes(b"no video")
    clip, model = os.path.abspath(tiny_clips[0]), ["--model", tiny_model_dir]
    for video, flags, words in (
        (clip, [], "give --model DIR: runs/stage2/model, after: make demo"),
        (clip, ["--model", "runs/stage2/model"], "error: runs/stage2/model: is no folder here, nor"),
        (clip, ["--model", "runs/stage2/model"], "see what there is with: ls runs/stage2"),
        (clip, ["--model", base_dir], f"python cold_start.py --model {base_dir}"),
        ("gone.mp4", model, "--video gone.mp4: no such file; see what there is with: ls ."),
        ("text.mp4", model, "see what it is with: file text.mp4"),
    ):
        says = refuses(capsys, evaluate.main, "--video", video, "--prompt", "a cat", *flags, says=words)
        assert "python" in says or "with: " in says or "make demo" in says

    refuses(capsys, evaluate.main, "--video", clip, "--prompt", "caf\udce9", *model, "--no-think",
            says="'caf\\udce9' holds half a character")  # what a terminal in Latin-1 hands over

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 594.00 MiB. GPU 0 has 24 GiB.")

    monkeypatch.setattr(phases.DeScore, "from_pretrained", full)
    says = refuses(capsys, evaluate.main, "--video", clip, "--prompt", "a cat", *model, says="memory is full (CUDA out")
    assert "give a lower --batch-size (now 8), --max-new-tokens (now 4096)" in says


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
    three = judge(tiny_model_dir, clips_csv, tmp_path / "three", "--batch-size", 3)
    assert len(one) == 3  # three unique videos, though the two pairs hold four
    np.testing.assert_allclose(one, three, atol=1e-5, rtol=0)
    # A kill while thinking: the half line and all rewards are gone. The rest is neither lost nor repeated.
    log = tmp_path / "one" / "thoughts.jsonl"
    before = log.read_bytes()
    log.write_bytes(before[:-30])
    (tmp_path / "one" / "rewards.jsonl").unlink()
    again = judge(tiny_model_dir, clips_csv, tmp_path / "one", "--batch-size", 2)
    np.testing.assert_allclose(again, one, atol=1e-5, rtol=0)
    assert log.read_bytes() == before
    monkeypatch.setattr(evaluate.Workers, "open_model", pytest.fail)
    judge(tiny_model_dir, clips_csv, tmp_path / "one")


def test_several_benchmarks_load_the_model_once(tmp_path, tiny_model_dir, tiny_clips, monkeypatch, no_figure):
    for name, path in zip("ab", tiny_clips):
        shutil.copy(path, tmp_path / f"{name}.mp4")
    head = ["prompt", "left_model", "right_model", "left_video", "right_video", "vote_type"]
    write_csv(tmp_path / "genai-bench.csv", head, [["a cat", "m1", "m2", "a.mp4", "b.mp4", "leftvote"]])
    head = ["path_A", "path_B", "prompt", "TA"]
    write_csv(tmp_path / "videogen-rewardbench.csv", head, [["a.mp4", "b.mp4", "a dog", "B"]])
    loaded, load = [], phases.DeScore.from_pretrained
    monkeypatch.setattr(phases.DeScore, "from_pretrained", lambda *a: loaded.append(a) or load(*a))
    names = ["genai-bench", "videogen-rewardbench"]
    both = ["--model", tiny_model_dir, "--root", tmp_path, "--out", tmp_path / "out", *FEW, "--benchmark", *names]
    evaluate.main([str(flag) for flag in both])
    assert len(loaded) == 1
    for name in names:
        numbers = json.loads((tmp_path / "out" / name / "report.json").read_text())
        assert numbers["benchmark"] == name and f"{name}.csv" in numbers["data"] and numbers["pairs"] == 1
        assert "| this run |" in (tmp_path / "out" / name / "report.md").read_text()
    # Another label than the one that Table 1 is about: no number in Table 1's columns, and the page names the label.
    write_csv(tmp_path / "videogen-rewardbench.csv", [*head, "VQ"], [["a.mp4", "b.mp4", "a dog", "B", "A"]])
    evaluate.main([str(flag) for flag in (*both, "--dimension", "VQ", "--genai-ties", "tie")])
    for name, told in zip(names, ("--genai-ties tie", "--dimension VQ")):
        page = (tmp_path / "out" / name / "report.md").read_text()
        assert f"human ties ({told}); left out" in page and "| this run |" not in page


def test_other_settings_in_the_same_folder_are_refused(tmp_path, tiny_model_dir, clips_csv, capsys):
    judge(tiny_model_dir, clips_csv, tmp_path / "out", "--no-think")
    flags = ["--model", tiny_model_dir, "--data", clips_csv, "--out", tmp_path / "out", *FEW]
    refuses(capsys, evaluate.main, *flags, says="another think;")
    refuses(capsys, evaluate.main, *flags, "--no-think", "--max-pixels", "4096", says="another max_pixels;")
    assert not (tmp_path / "out" / "thoughts.jsonl").exists()
    trained_on = shutil.copytree(tiny_model_dir, tmp_path / "model")  # the same folder with another head
    (head,) = [path for path in trained_on.rglob("*.safetensors") if "query" in safetensors.numpy.load_file(path)]
    tensors = safetensors.numpy.load_file(head)
    safetensors.numpy.save_file({name: 2 * value for name, value in tensors.items()}, head)
    refuses(capsys, evaluate.main, "--model", trained_on, *flags[2:], "--no-think", says="another model;")


def test_one_cot_is_greedy_and_several_are_sampled(tiny_model_dir):
    def temperature(**flags):
        return evaluate.resolve(evaluate.Settings(model=tiny_model_dir, **flags), parallel.Ranks()).temperature

    assert temperature() == 0 and temperature(thoughts=2) == 1
    assert temperature(temperature=0.5) == 0.5 and temperature(thoughts=4, temperature=0.0) == 0


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
    assert "broken.mp4" in refuses(capsys, evaluate.main, *flags, says="line 3")
    evaluate.main([str(flag) for flag in [*flags, "--skip-bad-videos"]])
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (numbers["pairs"], numbers["skipped_pairs"], numbers["skipped_videos"]) == (1, 2, 3)
    reasons = [json.loads(line)["error"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert "broken.mp4" in reasons[0] and "tokens; at most 5,000" in reasons[1]


def test_one_video_by_the_score_that_its_cot_states(tiny_model_dir, tiny_clips, capsys, monkeypatch):
    """--video, too: a checkpoint without a trained head has no other score."""
    flags = ["--model", tiny_model_dir, "--video", tiny_clips[0], "--prompt", "a circle", "--max-new-tokens", "3"]
    evaluate.main([*flags, "--score-from", "text"])
    text = capsys.readouterr().out
    assert "stated score none (counted as 3)" in text and "\nreward" not in text  # not a 3 that a CoT stated
    assert "1 of 1 CoTs did not end within --max-new-tokens" in text
    evaluate.main([*flags, "--score-from", "head", "text", "--thoughts", "2"])
    text = capsys.readouterr().out
    assert text.count("\nreward ") == 2 == text.count("\nstated score none (counted as 3)") and "mean reward" in text
    assert "mean stated score +3.0000" in text
    monkeypatch.setattr(evaluate, "decode_cot", lambda *_: '<answer>{"overall_score": "4.5"}</answer>')
    monkeypatch.setattr(evaluate, "has_ended", lambda *_: True)
    evaluate.main([*flags, "--score-from", "text"])
    text = capsys.readouterr().out
    assert "\nstated score +4.5000" in text and "did not end" not in text


def test_cots_that_were_cut_off_are_counted_in_the_report(tmp_path, tiny_model_dir, clips_csv, capsys):
    flags = ["--model", tiny_model_dir, "--data", clips_csv, "--out", str(tmp_path), "--max-new-tokens", "3"]
    evaluate.main([*flags, "--thoughts", "2"])
    cut = [end for record in jobs.read_log(str(tmp_path), "thoughts").values() for end in record["ended"]].count(False)
    told = f"{cut} of 6 CoTs did not end within --max-new-tokens; their rewards may be far off."
    assert told in capsys.readouterr().out and told in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["thoughts"]["cut_off"] == cut > 0


def test_the_score_that_a_cot_states(tmp_path, tiny_model_dir, clips_csv):
    """--score-from text: the generative reward model of Fig. 1a. It shares the head's thoughts, not its reports."""
    assert phases.overall_score('x <answer>{"overall_score": 3.5}</answer>') == 3.5
    assert phases.overall_score("nothing") == phases.overall_score('<answer>{"overall_score": "x"}</answer>') == 3.0
    flags = ["--model", tiny_model_dir, "--data", clips_csv, "--out", str(tmp_path), "--max-new-tokens", "3"]
    evaluate.main(flags)
    before = (tmp_path / "thoughts.jsonl").read_text()
    evaluate.main([*flags, "--score-from", "text"])
    assert (tmp_path / "thoughts.jsonl").read_text() == before
    heads, texts = (tmp_path / "scores.csv").read_text(), (tmp_path / "text" / "scores.csv").read_text()
    assert {row["reward"] for row in csv.DictReader(texts.splitlines())} == {"3.0"}
    written = sorted(float(row["reward"]) for row in csv.DictReader(heads.splitlines()))
    assert written == pytest.approx(sorted(rewards_in(tmp_path)))
    assert (tmp_path / "report.json").exists() and (tmp_path / "text" / "report.json").exists()
    evaluate.main([*flags[:-3], str(tmp_path / "both"), *flags[-2:], "--score-from", "head", "text"])
    for name in ("scores.csv", "text/scores.csv"):
        assert (tmp_path / name).read_text() == (tmp_path / "both" / name).read_text()
    for name in ("report.json", "text/report.json"):
        one, both = (json.loads((folder / name).read_text()) for folder in (tmp_path, tmp_path / "both"))
        assert one["accuracy_with_ties"] == both["accuracy_with_ties"]


def test_a_clip_replaced_under_its_name_is_judged_anew(tmp_path, tiny_model_dir, tiny_clips, no_figure):
    """As in training a generator, which writes each round's clips to the same names: no old CoT, no old reward."""
    names = [str(tmp_path / f"{side}.mp4") for side in "ab"]
    for path, name in zip(tiny_clips, names):
        shutil.copy(path, name)
    pairs = write_csv(tmp_path / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], [[*names, "a red circle", "A"]])

    def go(*flags):
        judge(tiny_model_dir, pairs, tmp_path / "out", *flags)
        logs = (jobs.read_log(str(tmp_path / "out"), kind) for kind in ("thoughts", "rewards"))
        return [{key[0]: record for key, record in log.items()} for log in logs]

    thoughts, rewards = go()
    shutil.copy(tiny_clips[2], names[1])
    new_thoughts, new_rewards = go()
    assert new_thoughts[names[0]] == thoughts[names[0]] and new_rewards[names[0]] == rewards[names[0]]
    assert new_thoughts[names[1]]["content"] != thoughts[names[1]]["content"]
    model = phases.DeScore.from_pretrained(tiny_model_dir)
    expected, _ = model.reward([tiny_clips[2]], ["a red circle"], max_new_tokens=6, with_thoughts=True)
    assert new_rewards[names[1]]["reward"] == pytest.approx(expected.item(), abs=1e-5)
    assert new_rewards[names[1]]["reward"] != pytest.approx(rewards[names[1]]["reward"], abs=1e-3)
    # The report too; and a CoT that was lost takes its reward along, if it comes out as another one.
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        assert {float(row["reward"]) for row in csv.DictReader(file)} == {r["reward"] for r in new_rewards.values()}


def test_other_words_around_the_prompt_need_another_folder(tmp_path, tiny_model_dir, clips_csv, capsys, monkeypatch):
    judge(tiny_model_dir, clips_csv, tmp_path / "out")
    monkeypatch.setattr(evaluate, "WORDING", phases.hash_of("another question"))
    refuses(capsys, evaluate.main, "--model", tiny_model_dir, "--data", clips_csv, "--out", tmp_path / "out", *FEW,
            says="made with another wording")
