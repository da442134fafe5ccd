"""Frames are decoded once, in bounded space; what a kill or a full disk left is decoded anew."""

import os

import numpy as np
import pytest

import data
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
    assert 0 < sum(f.stat().st_size for f in (tmp_path / "small").iterdir()) <= 1e5
    with pytest.raises(InputError, match="no such video"):
        cache.sample(str(tmp_path / "no.mp4"), 2.0, 4096, data.sample_frames)


def test_a_clip_that_was_changed_is_decoded_again_and_the_oldest_leave_first(tmp_path, tiny_clips):
    """The same name, size and place, another time of change: other frames. And a cache must keep what is used."""
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
    folder = tmp_path / "small"
    folder.mkdir()
    for k in range(4):  # 4 files of 100 bytes, file 0 the oldest; 250 bytes are allowed
        (folder / f"{k}.npz").write_bytes(bytes(100))
        os.utime(folder / f"{k}.npz", (k + 1, k + 1))
    FrameCache(str(folder), 250e-9)
    assert sorted(os.listdir(folder)) == ["2.npz", "3.npz"]
