"""Frames are decoded once, in bounded space; what a kill or a full disk left is decoded anew; nothing is removed."""

import errno
import os

import numpy as np
import pytest

import data
from plumbing import video
from plumbing.settings import InputError
from plumbing.video import FrameCache


def test_frame_cache_decodes_once_and_is_bounded(tmp_path, tiny_clips, monkeypatch):
    calls, real = [], data.sample_frames
    monkeypatch.setattr(data, "sample_frames", lambda *a: calls.append(a[0]) or real(*a))
    dataset = data.EncodedPairs([], None, 2.0, 4096, str(tmp_path / "cache"))
    first, again = (dataset.sample(tiny_clips[0]) for _ in range(2))
    assert len(calls) == 1 and np.array_equal(first.frames, again.frames) and first.metadata() == again.metadata()
    cache = dataset.cache
    cache.sample(tiny_clips[0], 1.0, 4096, data.sample_frames)  # another fps is another entry
    assert len(calls) == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])  # cut short: decoded again, not trusted
    cache.sample(tiny_clips[0], 2.0, 4096, data.sample_frames)
    assert len(calls) == 3
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"")  # a full disk leaves files of no bytes
    cache.sample(tiny_clips[0], 2.0, 4096, data.sample_frames)
    assert len(calls) == 4
    small = FrameCache(str(tmp_path / "small"), 1e-4)  # 100 kB: about two clips
    for clip in tiny_clips[:6]:
        small.sample(clip, 2.0, 4096, data.sample_frames)
    held = [f.stat().st_size for f in (tmp_path / "small").iterdir()]
    assert 0 < sum(held) <= 1e5 + max(held) and len(held) < 6
    with pytest.raises(InputError, match="no such video"):
        cache.sample(str(tmp_path / "no.mp4"), 2.0, 4096, data.sample_frames)


def test_a_clip_that_was_changed_is_decoded_again(tmp_path):
    """The same name, size and place, another time of change: other frames."""
    cache, calls, clip = FrameCache(str(tmp_path / "cache"), 1.0), [], tmp_path / "x.mp4"

    def decode(path, fps, max_pixels):
        calls.append(path)
        return data.Video(np.zeros((2, 64, 64, 3), np.uint8), 2.0, 2, (0, 1))

    clip.write_bytes(b"one")
    os.utime(clip, (1, 1))
    cache.sample(str(clip), 2.0, 4096, decode)
    clip.write_bytes(b"two")
    os.utime(clip, (2, 2))
    cache.sample(str(clip), 2.0, 4096, decode)
    cache.sample(str(clip), 2.0, 4096, decode)
    assert len(calls) == 2


def stand_in(calls):
    """A decoder of 24 kB a clip that counts."""
    def decode(path, fps, max_pixels):
        calls.append(path)
        return data.Video(np.zeros((2, 64, 64, 3), np.uint8), 2.0, 2, (0, 1))

    return decode


def test_a_full_cache_keeps_what_it_has_and_touches_nothing_else(tmp_path):
    """10 clips of 24 kB, room for 5: the second epoch, in another order, decodes the other five alone. With the least
    recently used ones removed it would decode nearly all again. The folder may be the one of the clips."""
    clips = [tmp_path / f"{k}.mp4" for k in range(10)]
    for clip in clips:
        clip.write_bytes(b"old")
        os.utime(clip, (1, 1))
    (tmp_path / "more").mkdir()
    (tmp_path / "theirs.npz").write_bytes(bytes(10**6))  # fills nothing of the cache's share
    for old in ("", f".{video.VERSION - 1}"):  # nor does what older code wrote, and nobody finds any more
        (tmp_path / f"{'0' * 32}{old}.npz").write_bytes(bytes(10**6))
    calls, cache = [], FrameCache(str(tmp_path), 5 * 25e-6)
    for clip in [*clips, *clips[::2], *clips[1::2]]:
        cache.sample(str(clip), 2.0, 4096, stand_in(calls))
    assert len(calls) == 15 and len(list(tmp_path.glob("*.npz"))) == 8
    FrameCache(str(tmp_path), 1e-6).sample(str(clips[0]), 2.0, 4096, stand_in(calls))  # a smaller limit removes none
    assert len(calls) == 15 and all(clip.exists() for clip in clips) and (tmp_path / "more").is_dir()


def test_a_full_disk_ends_the_cache_and_not_the_training(tmp_path, monkeypatch, capsys):
    clip, calls = tmp_path / "x.mp4", []
    clip.write_bytes(b"one")
    cache = FrameCache(str(tmp_path / "cache"), 1.0)

    def full(file, **fields):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    for _ in range(2):
        assert cache.sample(str(clip), 2.0, 4096, stand_in(calls))["frames"].shape == (2, 64, 64, 3)
    assert not os.listdir(tmp_path / "cache")
    assert capsys.readouterr().err.count("takes no more ([Errno 28] No space left on device)") == 1
