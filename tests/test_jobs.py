"""Long work over many videos: resumable, shared out over the ranks, bad rows named or skipped.

A work function that counts stands here where a model would think or score.
"""

import collections
import contextlib
import dataclasses
import shutil

import pytest

import cold_start
import data
import parallel
from plumbing import jobs
from plumbing.settings import InputError


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
        assert cold_start.sequence_lengths(processor, pair, 2.0, 4096) == exact
        lengths[pair.line] = max(exact)
    middle = sorted(lengths.values())[len(lengths) // 2]
    long = [line for line, length in lengths.items() if length > middle]
    settings = cold_start.Settings(out=str(tmp_path), max_length=middle, max_pixels=4096)
    ranks = parallel.Ranks()
    check = lambda s: jobs.fitting_pairs(pairs, processor, s, ranks, cold_start.sequence_lengths)  # noqa: E731
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
