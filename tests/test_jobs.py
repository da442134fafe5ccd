"""Long work over many videos: resumable, shared out over the ranks, bad rows named or skipped.

A work function that counts stands here where a model would think or score.
"""

import collections
import contextlib
import dataclasses
import json
import os
import shutil

import pytest

import cold_start
import collect_cots
import data
import evaluate
import parallel
from plumbing import jobs
from plumbing.settings import InputError
from tests.conftest import run as run_script


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


# Two ranks, as on two nodes, with one --out or each with one of its own
APART = """
import os, sys
import parallel
from plumbing.jobs import require_shared
from plumbing.settings import cli

ranks = parallel.start(seed=0)
cli(lambda: require_shared(sys.argv[1 + ranks.rank], ranks, seconds=1))
ranks.finish()
"""

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
                phase.write(item, {"reward": float(item.video[1:])})
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


def test_lengths_are_known_before_training(world, processor, tmp_path):
    """Without decoding, to the token; what is too long stops the run at once, or is left out and listed."""
    pairs = data.read_pairs(world["train_cold_start"])
    lengths = {}
    for pair in pairs:
        cots = pair.cot_ids(processor.tokenizer)
        prefixes = [data.encode_prompt(processor, data.sample_frames(v, 2.0, 4096), pair.prompt) for v in pair.videos]
        exact = [len(prefix["input_ids"]) + len(cot) + 1 for prefix, cot in zip(prefixes, cots)]
        assert data.sequence_lengths(processor, pair, 2.0, 4096) == exact
        lengths[pair.line] = max(exact)
    middle = sorted(lengths.values())[len(lengths) // 2]
    long = [line for line, length in lengths.items() if length > middle]
    settings = cold_start.Settings(out=str(tmp_path), max_length=middle, max_pixels=4096)
    ranks = parallel.Ranks()
    check = lambda s: jobs.fitting_pairs(pairs, processor, s, ranks, data.sequence_lengths)[0]  # noqa: E731
    with pytest.raises(InputError, match=f"line {long[0]}: {lengths[long[0]]} tokens .* --max-length {middle} "):
        check(settings)
    assert [pair.line for pair in check(dataclasses.replace(settings, skip_bad_videos=True))] == [
        line for line in lengths if line not in long]
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == len(long) > 0


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
        known.add(jobs.fingerprint(name))
        assert name in jobs.fingerprint(name) and commit in jobs.fingerprint(name)
    assert len(known) == 3
    with pytest.raises(InputError, match="us/none: is no folder"):
        jobs.fingerprint("us/none")


# ---------------------------------------------------------------------------------------------------------------
# Results belong to content
# ---------------------------------------------------------------------------------------------------------------
def test_a_result_belongs_to_what_the_video_holds(tmp_path):
    """A clip replaced under the same name is done anew, also after it was done by another rank; the others are not."""
    items = [jobs.Item(str(tmp_path / name), "a prompt", 2) for name in ("a.mp4", "b.mp4")]

    def go(ranks=None, made_from="words"):
        basis = {item.key: made_from for item in items}
        phase = jobs.Phase("rewards", items, str(tmp_path), False, ranks or OneRank(), basis)
        done = []
        for batch in phase.batches(2):
            for item in batch:
                done.append(item.video[-5])
                phase.write(item, {"reward": float(len(open(item.video).read()))})
        return done, {key[0][-5]: record["reward"] for key, record in phase.finish()[0].items()}

    for name, text in (("a.mp4", "1"), ("b.mp4", "22")):
        (tmp_path / name).write_text(text)
    assert go(OneRank(1, 2))[0] == ["b"] and go()[0] == ["a"]  # b's line is in rank 1's file, which is read last
    (tmp_path / "b.mp4").write_text("333")
    assert go() == (["b"], {"a": 1.0, "b": 3.0})
    assert go() == ([], {"a": 1.0, "b": 3.0})
    assert jobs.read_log(str(tmp_path), "rewards")[items[1].key]["reward"] == 3.0
    (tmp_path / "b.mp4").write_text("444")  # the same size
    assert go()[0] == ["b"]
    os.utime(tmp_path / "a.mp4", (1, 1))  # a copy of the same clip
    assert go()[0] == []
    (tmp_path / "a.mp4").unlink()  # a finished run can be read without its clips
    assert go() == ([], {"a": 1.0, "b": 3.0})
    (tmp_path / "a.mp4").write_text("1")
    assert go()[0] == [] and go(made_from="other words")[0] == ["a", "b"]


def test_a_clip_that_was_replaced_and_then_moved_away_keeps_its_last_result(tmp_path):
    video, asked = str(tmp_path / "a.mp4"), "a prompt"
    lines = {}
    for text in ("old", "new"):
        (tmp_path / "a.mp4").write_text(text)
        record = {"video": video, "prompt": asked, "reward": text, "content": jobs.content_of(video)}
        lines[text] = json.dumps(record) + "\n"
    log, other = tmp_path / "rewards.jsonl", tmp_path / "rewards.rank1.jsonl"

    def read():
        return jobs.read_log(str(tmp_path), "rewards")[video, asked]["reward"]

    log.write_text(lines["old"] + lines["new"])
    os.rename(video, tmp_path / "away.mp4")
    assert read() == "new"
    other.write_text(lines["new"])  # the same clip, by another rank
    assert read() == "new"
    log.write_text(lines["new"])
    other.write_text(lines["old"])  # of two files nobody knows which line is the later
    with pytest.raises(InputError, match="rank1.jsonl, line 1: .*a.mp4 is gone, and which of two clips"):
        read()
    os.rename(tmp_path / "away.mp4", video)
    assert read() == "new"


def test_models_that_differ_in_one_byte_are_two(tmp_path):
    """Also in the middle of a large file, whose ends are the same; and the same model elsewhere is the same."""
    for name, place in (("one", 0), ("two", None), ("three", None)):
        (tmp_path / name).mkdir()
        weights = bytearray(8 << 20)
        weights[4 << 20] = place is None
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "descore.json").write_text("{}")
    one, two, three = (jobs.fingerprint(str(tmp_path / name)) for name in ("one", "two", "three"))
    assert one != two == three
    (tmp_path / "three" / "descore.json").write_text('{"fps": 4}')
    assert jobs.fingerprint(str(tmp_path / "three")) != two


@pytest.mark.parametrize("script, names", [(evaluate, evaluate.MADE_WITH), (collect_cots, collect_cots.MADE_WITH)],
                         ids=["evaluate", "collect_cots"])
def test_another_setting_needs_another_folder(tmp_path, tiny_model_dir, script, names):
    """Each setting that decides on CoTs or rewards is compared, and named; so are the model and the words around it."""
    s = script.Settings(model=tiny_model_dir, out=str(tmp_path))
    claim = lambda s, wording="words": jobs.require_same_settings(str(tmp_path), s, names, wording, OneRank())  # noqa: E731
    claim(s)
    claim(dataclasses.replace(s, temperature=0.5))  # nothing is there yet
    claim(s)
    (tmp_path / "thoughts.jsonl").write_text('{"video": "a", "prompt": "b"}\n')
    claim(s)
    decides = {"max_new_tokens", "temperature", "engine", "fps", "reader", "max_pixels", "seed"}
    assert decides <= set(names)
    for name in names:
        with pytest.raises(InputError, match=f"made with another {name};"):
            claim(dataclasses.replace(s, **{name: "something else"}))
    with pytest.raises(InputError, match="made with another wording;"):
        claim(s, "other words")
    claim(s)


def test_a_bad_video_on_either_side_drops_its_pair(tmp_path, tiny_clips):
    """--skip-bad-videos before training: missing or broken, as A or as B."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    broken, (a, b) = str(tmp_path / "broken.mp4"), tiny_clips[:2]
    sides = [(a, b), (broken, b), (a, broken), (a, "gone.mp4"), (b, a), ("gone.mp4", b)]
    pairs = [data.PreferencePair(*videos, "a prompt", 1, line=k + 2) for k, videos in enumerate(sides)]
    settings = cold_start.Settings(out=str(tmp_path), skip_bad_videos=True)
    kept = jobs.readable_pairs(pairs, settings, parallel.Ranks(), data.sample_frames)
    assert [pair.line for pair in kept] == [2, 6]
    for one in pairs[3], pairs[5]:
        with pytest.raises(InputError, match=f"line {one.line}: gone.mp4: no such video"):
            jobs.readable_pairs([one], cold_start.Settings(), parallel.Ranks(), data.sample_frames)


def test_nodes_must_share_the_folder(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    run_script("-c", APART, one, one, ranks=2)
    assert not list(one.iterdir())
    done = run_script("-c", APART, one, other, ranks=2, check=False)
    assert done.returncode and "is not the same folder on every node" in done.stderr, done.stderr[-2000:]
