"""toy/: the truth of the toy world, real mp4 files, the real CSV formats, the command line."""

import csv
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data
import toy.world
from rules import DIMENSIONS, extract_answer, read_verdicts, well_formed
from tests.conftest import ROOT, refuses
from tests.kills import alive, family
from toy import __main__ as command_line

RED_CIRCLE = {"subject": ("red", "circle"), "dynamics": "moving left", "camera": "still", "environment": "night",
              "style": "plain"}
WISH = RED_CIRCLE | {"subject": ("red", "square"), "camera": None, "style": "grainy"}


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_world")
    return folder, toy.world.make_data(folder, 3, dict.fromkeys(toy.world.SPLITS, 6), seconds=1, progress=False)


def test_annotation_by_hand():
    # colour right, shape wrong -> 1; as asked -> 2; not asked -> N/A; as asked -> 2; grainy asked, plain shown -> 0
    verdicts = toy.world.annotate(WISH, RED_CIRCLE)
    assert verdicts == {"subject": "1", "dynamics": "2", "camera": "N/A", "environment": "2", "style": "0"}
    assert toy.world.points(verdicts) == 1 + 2 + 2 + 0
    assert toy.world.annotate(dict.fromkeys(DIMENSIONS), RED_CIRCLE) == dict.fromkeys(DIMENSIONS, "N/A")


def test_cot_by_hand():
    # overall = 1 + 4 * mean(1, 2, 2, 0) / 2 = 1 + 4 * 1.25 / 2 = 3.50
    text = toy.world.cot_text(WISH, RED_CIRCLE)
    assert text.splitlines()[:5] == [
        "<think>",
        "subject: asked red square; shown red circle; verdict 1",
        "dynamics: asked moving left; shown moving left; verdict 2",
        "camera: not asked; shown still; verdict N/A",
        "environment: asked night; shown night; verdict 2",
    ]
    answer = extract_answer(text)
    assert answer == {"dimensional_scores": toy.world.annotate(WISH, RED_CIRCLE), "overall_score": 3.5}
    assert read_verdicts(text) == answer["dimensional_scores"] and well_formed(text)
    assert toy.world.prompt_text(WISH).startswith("A red square moving left")


def test_motion_is_drawn_in_the_right_direction():
    # On a red subject over a night background, red minus blue is large only on the subject: its centre is measurable.
    ways = {"moving left": (-1, 0), "moving right": (1, 0), "rising": (0, -1), "falling": (0, 1)}
    for motion, (dx, dy) in ways.items():
        clip = toy.world.render_clip(RED_CIRCLE | {"dynamics": motion}, np.random.default_rng(1)).astype(int)
        subject = clip[..., 0] - clip[..., 2] > 80  # (T, H, W)
        rows, columns = np.mgrid[:64, :64]
        first, last = ([axis[subject[t]].mean() for axis in (columns, rows)] for t in (0, -1))
        moved = np.subtract(last, first)
        assert moved @ (dx, dy) > 15 and abs(moved @ (dy, dx)) < 5, motion


def test_mp4_round_trip(tmp_path):
    clip = toy.world.render_clip(RED_CIRCLE, np.random.default_rng(0))
    toy.world.write_mp4(tmp_path / "clip.mp4", clip, fps=4)
    video = data.sample_frames(str(tmp_path / "clip.mp4"))
    assert (video.source_fps, video.total_num_frames) == (2.0, 8)
    assert video.frame_indices == tuple(range(8)) and video.frames.shape == (8, 64, 64, 3)
    assert np.abs(video.frames.astype(int) - clip[::2]).mean() < 6  # H.264 is lossy, and colour is stored at half size


def test_csvs_have_the_real_formats(tiny_world):
    folder, written = tiny_world
    columns = {split: next(csv.reader(open(path, encoding="utf-8"))) for split, path in written.items()}
    assert columns["train_cold_start"] == ["videos", "problem", "durations", "prompt", "CoT_A", "CoT_B", "GSB"]
    assert columns["val_cold_start"] == columns["train_cold_start"]
    assert columns["train_rl"] == ["videos", "problem", "answer"]
    assert columns["test_in_domain"] == ["video_A", "video_B", "prompt", "answer"]
    assert columns["test_genai_bench"] == [
        "prompt", "left_model", "right_model", "left_video", "right_video", "vote_type"]
    assert columns["test_videogen_rewardbench"] == [
        "path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A", "fps_B", "num_frames_B",
        "A_model", "B_model", "Overall"]
    for split, path in written.items():
        for pair in data.read_pairs(path):
            assert all(pathlib.Path(video).is_file() for video in pair.videos)
            if pair.annotation_a:  # the label must follow from the annotations
                gap = toy.world.points(pair.annotation_a) - toy.world.points(pair.annotation_b)
                assert pair.label == np.sign(gap), split
    assert {pair.label for pair in data.read_pairs(written["train_rl"])} <= {1, -1}
    # ties come in exactly the share asked for: int(6 * 0.33) = 1 of 6
    assert sum(pair.label == 0 for pair in data.read_pairs(written["test_genai_bench"])) == 1


def test_unseen_combinations_stay_unseen():
    rng = np.random.default_rng(0)
    for _ in range(200):
        wish = toy.world.random_wish(rng)
        shown = toy.world.random_clip(rng, wish)["subject"]
        assert wish["subject"] not in toy.world.UNSEEN and shown not in toy.world.UNSEEN
        assert toy.world.random_values(rng, unseen=True)["subject"] in toy.world.UNSEEN


def test_same_seed_same_files_and_other_seed_other_files(tiny_world, tmp_path):
    folder, written = tiny_world
    sizes = dict.fromkeys(toy.world.SPLITS, 0)
    # one split alone
    again = toy.world.make_data(tmp_path / "a", 3, sizes | {"train_rl": 6}, seconds=1, progress=False)
    other = toy.world.make_data(tmp_path / "b", 4, sizes | {"train_rl": 6}, seconds=1, progress=False)
    read = lambda paths: pathlib.Path(paths["train_rl"]).read_bytes()  # noqa: E731
    assert read(again) == read(written) != read(other)
    clip = "videos/train_rl/0000a.mp4"
    assert (tmp_path / "a" / clip).read_bytes() == (folder / clip).read_bytes() != (tmp_path / "b" / clip).read_bytes()


def test_two_processes_write_the_same_clips(tmp_path):
    """Encoders keep memory that they never filled; whatever stands in it must not reach the file.

    MALLOC_PERTURB_ (glibc) fills fresh memory with another byte in each process: what is luck elsewhere, one file in
    fifty, is certain here.
    """
    code = (f"import sys, numpy as np; from {toy.world.__name__} import random_values, render_clip, write_mp4\n"
            "for k in range(6):\n"
            "    rng = np.random.default_rng(k)\n"
            "    write_mp4(f'{sys.argv[1]}/{k}.mp4', render_clip(random_values(rng), rng), 4)")
    fills = ("85", "170")
    started = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / fill], cwd=ROOT,
                         env={**os.environ, "MALLOC_PERTURB_": fill})
        for fill in fills
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    one, two = ([(tmp_path / fill / f"{k}.mp4").read_bytes() for k in range(6)] for fill in fills)
    assert one == two


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["data", "--out", "x", "--no-such-flag"], 2), ([], 2)])
def test_command_line(arguments, code):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == code


def test_each_test_set_has_300_decided_pairs():
    for split, (_, pairs, ties, *_) in toy.world.SPLITS.items():
        assert not split.startswith("test_") or pairs - int(pairs * ties) >= 300, split


# ---- What people mind -------------------------------------------------------------------------------------------
OTHERS = toy.world.People((3, 2, 0.5, 1, 0.5), 6.0)


def test_utility_by_hand():
    verdicts = {"subject": "1", "dynamics": "2", "camera": "N/A", "environment": "0", "style": "2"}
    assert toy.world.People().utility(verdicts, {}) == toy.world.points(verdicts) == 5
    assert OTHERS.utility(verdicts, {"flicker": 0.5}) == 3 * 1 + 2 * 2 + 0.5 * 2 - 6 * 0.5
    assert OTHERS.utility(verdicts, {}, ("dynamics", "camera")) == 4


def test_utility_decides_labels_and_the_text_does_not(tmp_path):
    """In a world of other people some pairs are decided against the points, and some of equal points are decided."""
    sizes = dict.fromkeys(toy.world.SPLITS, 0) | {"test_in_domain": 30, "test_videogen_rewardbench": 20}
    written = toy.world.make_data(tmp_path, 3, sizes, seconds=1, progress=False, people=OTHERS)
    assert json.loads((tmp_path / "world.json").read_text()) == {
        "seed": 3, "weights": [3, 2, 0.5, 1, 0.5], "unspoken": 6.0}
    signs, ties = set(), 0
    for split, path in written.items():
        truth = [json.loads(line) for line in (tmp_path / f"{split}.truth.jsonl").read_text().splitlines()]
        for pair, known in zip(data.read_pairs(path), truth, strict=True):
            for side, stated in zip("ab", known["utility"]):
                seen = known[side] | {"subject": tuple(known[side]["subject"])}
                wish = known["wish"] | {"subject": known["wish"]["subject"] and tuple(known["wish"]["subject"])}
                verdicts = toy.world.annotate(wish, seen)
                assert stated == pytest.approx(OTHERS.utility(verdicts, seen)) and 0 <= seen["flicker"] < 1
                known[side] = toy.world.points(verdicts)
            gap = known["utility"][0] - known["utility"][1]
            assert pair.label == (0 if abs(gap) < 0.75 else np.sign(gap)) and abs(gap) <= 10
            signs.add((pair.label, int(np.sign(known["a"] - known["b"]))))
            ties += pair.label == 0
    assert {(1, -1), (-1, 1), (1, 0)} & signs and (1, 1) in signs and ties == int(30 * 0.2) + int(20 * 0.26)


def test_without_the_knobs_the_world_is_what_it_was(tmp_path):
    """The files' hash before there were any."""
    written = toy.world.make_data(tmp_path, 3, dict.fromkeys(toy.world.SPLITS, 6), seconds=1, progress=False)
    text = b"".join(pathlib.Path(path).read_bytes() + (tmp_path / f"{split}.truth.jsonl").read_bytes()
                    for split, path in written.items())
    assert hashlib.sha256(text).hexdigest()[:16] == "acc54d3975a68ba7"
    assert json.loads((tmp_path / "world.json").read_text()) == {"seed": 3, "weights": [1.0] * 5, "unspoken": 0.0}


def test_flicker_is_seen_and_nothing_else_changes():
    """Brightness jumps from frame to frame; twice as much of it jumps twice as far. The text says nothing of it."""
    def jumps(flicker):
        clip = RED_CIRCLE | ({} if flicker is None else {"flicker": flicker})
        light = toy.world.render_clip(clip, np.random.default_rng(2)).astype(float).mean((1, 2, 3))
        return np.abs(np.diff(light)).mean() / light.mean()

    none, zero, half, full = map(jumps, (None, 0.0, 0.5, 1.0))
    assert none == zero < 0.02 and half > 5 * none and full == pytest.approx(2 * half, rel=0.15)
    assert toy.world.cot_text(WISH, RED_CIRCLE) == toy.world.cot_text(WISH, RED_CIRCLE | {"flicker": 1.0})


@pytest.mark.parametrize("flags", [["--weights", "0", "0", "0.2", "0", "0"], ["--weights", *["9"] * 5], [
    "--unspoken", "-1"], ["--weights", *["nan"] * 5]])
def test_people_who_could_never_decide_a_pair_are_refused(flags, tmp_path, capsys):
    refuses(capsys, command_line.main, "data", "--out", tmp_path, *flags, says="--weights are numbers of 0 to 3")


def test_no_process_that_renders_outlives_a_killed_parent(tmp_path):
    script = "import sys, toy.world as w; w.make_data(sys.argv[1], sizes=dict.fromkeys(w.SPLITS, 400), processes=2)"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT) as parent:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("videos/*/0000a.mp4"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        members = family(parent.pid)
        parent.kill()
    deadline = time.monotonic() + 20
    while (left := [pid for pid in members if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(members) >= 3 and not left
