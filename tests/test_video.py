"""Clips that are missing, broken or huge: one sentence with the path."""

import pathlib

import av
import decord
import numpy as np
import pytest

import data
from plumbing import video
from plumbing.settings import InputError


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "tail zeroed", "audio", "directory"])
def test_bad_videos_are_one_sentence(kind, tmp_path, tiny_clips):
    path, good = tmp_path / "x.mp4", pathlib.Path(tiny_clips[0]).read_bytes()
    if kind == "directory":
        path.mkdir()
    elif kind == "audio":
        with av.open(str(path), "w") as file:
            stream = file.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                file.mux(packet)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"hello " * 99, "truncated": good[: len(good) // 2],
                          "tail zeroed": good[: len(good) // 3] + bytes(2 * len(good) // 3)}[kind])
    with pytest.raises(InputError) as error:
        data.sample_frames(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_clip_that_claims_to_be_huge_is_refused_before_it_is_decoded(tiny_clips, monkeypatch):
    monkeypatch.setattr(decord.VideoReader, "__len__", lambda self: 10**9)
    with pytest.raises(InputError, match="over 512 frames"):
        data.sample_frames(tiny_clips[0])
    monkeypatch.undo()
    monkeypatch.setattr(video, "MAX_SIDE", 32)
    with pytest.raises(InputError, match="64 x 64 pixels"):
        data.sample_frames(tiny_clips[0])
