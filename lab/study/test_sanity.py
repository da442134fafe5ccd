"""lab.study.sanity: the changes and numbers by hand, and a whole check of a tiny model, with and without thinking."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import data
from lab.study import sanity
from model import DeScore
from plumbing.settings import InputError
from tests.conftest import refuses, write_csv

FRAMES = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)


def test_frames_by_hand():
    assert (sanity.change_frames(FRAMES, "black clip", "a") == 0).all()
    assert (sanity.change_frames(FRAMES, "frozen clip", "a") == FRAMES[2]).all()  # the middle one of 0..4
    shuffled = sanity.change_frames(FRAMES, "shuffled frames", "x/a.mp4")
    assert not np.array_equal(shuffled, FRAMES)
    assert np.array_equal(np.sort(shuffled[:, 0, 0, 0]), FRAMES[:, 0, 0, 0])  # the same five frames
    assert np.array_equal(shuffled, sanity.change_frames(FRAMES, "shuffled frames", "y/a.mp4"))  # in every checkout
    one = FRAMES[:1]
    assert np.array_equal(sanity.change_frames(one, "shuffled frames", "a"), one)
    assert FRAMES[0, 0, 0, 1] == 1  # the clip itself is left alone


def pair(a, b, prompt, label=1):
    return data.PreferencePair(a, b, prompt, label, line=2)


def test_prompts_and_videos_of_a_change():
    pairs = [pair("a", "b", "one"), pair("c", "d", "one"), pair("e", "f", "two")]
    assert sanity.unrelated_prompts(pairs) == ["two", "two", "one"]
    swapped = sanity.changed_items(pairs, "videos swapped")
    assert [(item.video, item.prompt) for item in swapped[:2]] == [("b", "one"), ("a", "one")]
    frozen = sanity.changed_items(pairs, "frozen clip")
    assert frozen[0].key == ("a", "one")
    assert sanity.apart([*pairs, pair("g", "a", "two")]) == pairs  # "a" has a partner already
    with pytest.raises(InputError, match="two different prompts"):
        sanity.unrelated_prompts(pairs[:2])


def test_numbers_by_hand():
    # before: +1 and -1 of spread 1, both pairs right. After: the second pair's rewards are equal, so it is half right.
    labels, before = [1, -1, 0], np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]])
    row = sanity.compare(labels, before, np.array([[2.0, 0.0], [0.0, 0.0], [1.0, -1.0]]))
    assert (row["pairs"], row["decided"]) == (3, 2)
    assert row["shift"] == pytest.approx((1 + 1 + 1 - 1 + 0 + 0) / 6)
    assert row["moved"] == pytest.approx(4 / 6)
    assert (row["accuracy"], row["lost"]) == (0.75, 0.25)
    same = sanity.compare(labels, before, before)
    assert (same["shift"], same["moved"], same["lost"], same["correlation"]) == (0, 0, 0, pytest.approx(1))


def test_words():
    def word(change, cot="anew", moved=1.0, low=-0.1, decided=50):
        return sanity.reading({"change": change, "cot": cot, "moved": moved, "decided": decided,
                               "lost_interval": (low, 0.3)})

    assert word("black clip", moved=0.01) == "not read"
    assert word("black clip", low=0.1) == "read, and needed"
    assert word("black clip").startswith("read; accuracy")
    assert word("black clip", low=1.0, decided=2) == "read; 2 pairs do not tell more"  # two pairs: interval [1, 1]
    assert word("videos swapped", "kept", low=0.1) == "reads the clip beside the CoT"
    assert word("videos swapped", "kept", moved=0.01) == "follows the CoT, not the clip"


@pytest.fixture
def flags(world, tiny_model_dir, tmp_path):
    return ["--model", tiny_model_dir, "--data", world["test_in_domain"], "--out", str(tmp_path / "s"),
            "--max-new-tokens", "6", "--batch-size", "7"]


def rows_in(folder):
    with open(folder / "sanity.json", encoding="utf-8") as file:
        return {(row["change"], row["cot"]): row for row in json.load(file)}


def test_a_whole_check(flags, world, tiny_model_dir, tmp_path, capsys):
    sanity.main(flags)
    rows = rows_in(tmp_path / "s")
    assert len(rows) == 6 + 5  # thought anew, and five changes under kept CoTs
    assert rows["as it is", "anew"]["moved"] == 0
    own, swapped = rows["as it is", "anew"]["accuracy"], rows["videos swapped", "anew"]["accuracy"]
    assert swapped == pytest.approx(1 - own)  # the reward goes with the clip
    for change in (*sanity.FRAMES, "unrelated prompt", "videos swapped"):
        assert rows[change, "kept"]["moved"] > 0, change
    assert "| black clip | kept |" in capsys.readouterr().out

    # The reward of a black clip under its kept CoT is DeScore's own, of zeros.
    first, model = data.read_pairs(world["test_in_domain"])[0], DeScore.from_pretrained(tiny_model_dir)
    lines = (tmp_path / "s/sanity/as_it_is/thoughts.jsonl").read_text().splitlines()
    cots = {record["video"]: record["token_ids"][0] for record in map(json.loads, lines)}
    clip = data.sample_frames(first.videos[0])
    clip = dataclasses.replace(clip, frames=np.zeros_like(clip.frames))
    expected = model.score(model.encode([clip], [first.prompt]), [cots[first.videos[0]]]).item()
    lines = (tmp_path / "s/sanity/black_clip/kept/rewards.jsonl").read_text().splitlines()
    kept = {record["video"]: record["reward"] for record in map(json.loads, lines)}
    assert kept[first.videos[0]] == pytest.approx(expected, abs=1e-5)

    before = (tmp_path / "s/sanity.json").read_text()
    sanity.main(flags)  # nothing is thought about again
    assert (tmp_path / "s/sanity.json").read_text() == before


def test_without_thinking_and_from_the_text(flags, tmp_path):
    sanity.main([*flags, "--no-think"])
    rows = rows_in(tmp_path / "s")
    assert len(rows) == 6 and {cot for _, cot in rows} == {"none"}
    assert rows["black clip", "none"]["moved"] > 0
    sanity.main([*flags[:-4], "--max-new-tokens", "6", "--score-from", "text", "--out", str(tmp_path / "t")])
    rows = rows_in(tmp_path / "t")
    assert len(rows) == 6 and rows["black clip", "anew"]["moved"] == 0  # six tokens state no score: always 3


def test_refuses(flags, capsys):
    for more in (["--video", "x.mp4", "--prompt", "a cat"], ["--score-from", "head", "text"]):
        refuses(capsys, sanity.main, *flags, *more, says="sanity takes one set")


def test_a_replaced_clip_is_checked_anew(world, tiny_clips, tiny_model_dir, tmp_path):
    """Also where only the CoT comes from it: swapped clips under kept CoTs."""
    first, second = data.read_pairs(world["test_in_domain"])[:2]
    names = [str(tmp_path / f"{k}.mp4") for k in range(4)]
    for path, name in zip([*first.videos, *second.videos], names):
        shutil.copy(path, name)
    rows = [[*names[:2], first.prompt, "A"], [*names[2:], second.prompt + " anew", "B"]]
    table = write_csv(tmp_path / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], rows)
    flags = ["--model", tiny_model_dir, "--data", table, "--max-new-tokens", "6"]
    sanity.main([*flags, "--out", str(tmp_path / "s")])
    shutil.copy(tiny_clips[0], names[0])
    for out in ("s", "fresh"):
        sanity.main([*flags, "--out", str(tmp_path / out)])
    found, fresh = rows_in(tmp_path / "s"), rows_in(tmp_path / "fresh")
    assert found.keys() == fresh.keys()
    for key, row in found.items():
        for name in ("shift", "moved"):
            assert row[name] == pytest.approx(fresh[key][name], abs=1e-4), (key, name)
