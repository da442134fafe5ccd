"""Frames are decoded once, in bounded space; what a kill or a full disk left is decoded anew."""

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
