"""What a player shows at 0, 1/fps, 2/fps, ... s is what the model gets; a clip that cannot be read is one sentence."""

import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from PIL import Image

import data
from plumbing import decoder, video
from plumbing.settings import InputError
from tests import clips
from tests.conftest import ROOT
from tests.kills import alive, family

X265 = {"x265-params": "log-level=none:keyint=48"}
EVERY_12 = list(range(0, 240, 12))  # 24 frames a second, seen at 2


def numbers(path, fps=2.0):
    """The numbers of the frames that the model gets, without the one that is repeated to make them even."""
    sampled = data.sample_frames(str(path), fps)
    assert [i / sampled.source_fps for i in sampled.frame_indices] == pytest.approx(
        [min(k, sampled.total_num_frames - 1) / fps for k in range(len(sampled.frames))])
    return [clips.number(frame) for frame in sampled.frames[: sampled.total_num_frames]]


def on_screen(ticks, fps=2.0, last=0):
    """From the definition: the last frame whose time has come, at each k / fps up to the end. last: as in clips.write;
    0: as long as the one before."""
    times = [(tick - ticks[0]) / 600 for tick in ticks]
    seconds, shown = times[-1] + (last / 600 if last else times[-1] - times[-2]), []
    while len(shown) / fps < seconds - 1e-6:
        shown.append(max(k for k, t in enumerate(times) if t <= len(shown) / fps + 1e-3))
    return shown


def test_plain_clips_and_the_times_between_frames(tmp_path):
    plain = clips.write(tmp_path / "plain.mp4", 240)
    assert numbers(plain) == EVERY_12 and numbers(plain, 5.0) == [int(k * 4.8 + 1e-6) for k in range(50)]
    assert numbers(clips.write(tmp_path / "webm.webm", 90, 30, "libvpx-vp9")) == [0, 15, 30, 45, 60, 75]
    assert numbers(clips.write(tmp_path / "mkv.mkv", 90, 30), 3.0) == list(range(0, 90, 10))  # stamps: 333, 667 ms
    ntsc = clips.write(tmp_path / "ntsc.mkv", 90, clips.Fraction(30000, 1001))
    assert numbers(ntsc) == [0, 14, 29, 44, 59, 74, 89]  # frame 15 comes at .5005 s


def test_a_cut_without_re_encoding_begins_where_the_player_begins(tmp_path):
    plain = clips.write(tmp_path / "plain.mp4", 240)
    assert numbers(clips.cut(plain, tmp_path / "front.mp4", 3.0)) == list(range(72, 240, 12))
    assert numbers(clips.cut(plain, tmp_path / "both.mp4", 1.25, 4.0)) == list(range(30, 144, 12))
    h265 = clips.write(tmp_path / "hevc.mp4", 144, codec="libx265", options=X265)
    assert numbers(clips.cut(h265, tmp_path / "hevc_cut.mp4", 3.0)) == list(range(72, 144, 12))


@pytest.mark.parametrize("name, codec, last", [("x.mp4", "libx264", 0), ("x.mkv", "libx264", 20),
                                               ("x.webm", "libvpx-vp9", 20), ("x.mp4", "mpeg4", 20)])
def test_a_varying_rate(tmp_path, name, codec, last):
    """last: 20, a frame at 30 a second, where the file says so of its last frame; with B-frames it says nothing."""
    ticks = clips.UNEVEN
    assert on_screen(ticks) == [0, 12, *range(13, 24)]
    assert numbers(clips.write(tmp_path / name, 24, 30, codec, ticks=ticks)) == on_screen(ticks, last=last)
    held = [0, 20, 40, 1200, 1220, 2400, 2700]  # a still of two seconds, then another
    assert numbers(clips.write(tmp_path / f"held_{name}", 7, 30, codec, ticks=held)) == on_screen(held, last=last)
    late = [tick + 600 for tick in ticks]  # the first frame comes at 1 s: the clip begins with it
    assert numbers(clips.write(tmp_path / f"late_{name}", 24, 30, codec, ticks=late)) == on_screen(ticks, last=last)


@pytest.mark.parametrize("name, codec", [("x.mp4", "libx264"), ("x.mov", "libx264"), ("x.mkv", "libx264"),
                                         ("x.webm", "libvpx-vp9")])
def test_a_last_frame_stays_as_long_as_its_file_says(tmp_path, name, codec):
    """One that is held for seconds, one that is short behind a hold, and a clip of a single frame."""
    one_second = list(range(0, 600, 100))
    for ticks, last in ((one_second, 1900), ([*one_second, 2400], 20), ([0], 3000)):
        path = clips.write(tmp_path / name, len(ticks), 30, codec, {"bf": "0"}, ticks, last=last)
        assert numbers(path) == on_screen(ticks, last=last)


def test_a_gif_s_last_frame_stays_as_long_as_it_says(tmp_path):
    first, *rest = [Image.fromarray(clips.picture(k)) for k in range(12)]
    first.save(tmp_path / "x.gif", save_all=True, append_images=rest, duration=[100] * 11 + [3000])
    assert numbers(tmp_path / "x.gif") == [0, 5, 10, 11, 11, 11, 11, 11, 11]


def test_open_key_frames_and_avi(tmp_path):
    assert numbers(clips.write(tmp_path / "hevc.mp4", 144, codec="libx265", options=X265)) == EVERY_12[:12]
    open_groups = {"g": "24", "x264-params": "open-gop=1:bframes=3:scenecut=0"}
    assert numbers(clips.write(tmp_path / "open.mp4", 144, options=open_groups)) == EVERY_12[:12]
    # AVI has no display times: its frames come one after the other
    b_frames = {"g": "24", "bf": "2"}
    assert numbers(clips.write(tmp_path / "mpeg4.mp4", 144, codec="mpeg4", options=b_frames)) == EVERY_12[:12]
    assert numbers(clips.write(tmp_path / "x.avi", 144, options={"g": "48"})) == EVERY_12[:12]
    assert numbers(clips.write(tmp_path / "y.avi", 144, codec="mpeg4")) == EVERY_12[:12]


def test_av1_and_gif_are_read(tmp_path):
    assert numbers(clips.write(tmp_path / "av1.mp4", 48, codec="libsvtav1")) == [0, 12, 24, 36]
    assert numbers(clips.write(tmp_path / "x.gif", 40, 20, "gif", pix_fmt="rgb8")) == [0, 10, 20, 30]


def test_pixels_that_are_not_square_and_clips_that_are_turned(tmp_path):
    """The target size comes from the displayed shape; the picture is upright, and may be mirrored."""
    wide = clips.write(tmp_path / "wide.mp4", 48, pixel=2)
    assert data.sample_frames(wide).frames.shape[1:3] == (96, 320) and numbers(wide) == [0, 12, 24, 36]
    tall = clips.write(tmp_path / "tall.mp4", 24, pixel="1/2")
    assert data.sample_frames(tall).frames.shape[1:3] == (96, 64)  # displayed 80 wide
    for name, undo, matrix in (
        ("quarter", lambda x: np.rot90(x), (0, 1, -1, 0)),  # stored turned left, shown turned right: as phones do
        ("three quarters", lambda x: np.rot90(x, 3), (0, -1, 1, 0)),
        ("half", lambda x: np.rot90(x, 2), (-1, 0, 0, -1)),
        ("mirror", lambda x: x[:, ::-1], (-1, 0, 0, 1)),
    ):
        stored = clips.write(tmp_path / f"{name}_stored.mp4", 48, turn=undo)
        turned = clips.set_matrix(stored, tmp_path / f"{name}.mp4", *matrix)
        assert numbers(turned) == [0, 12, 24, 36], name
        frames = data.sample_frames(turned).frames
        assert frames.shape[1:3] == (96, 160)
        assert np.abs(frames[1].astype(int) - clips.picture(12)).mean() < 8, name
    slanted = clips.set_matrix(stored, tmp_path / "slanted.mp4", 2, 1, -1, 2)
    with pytest.raises(video.Unsupported, match="no multiple of 90 degrees"):
        data.sample_frames(slanted)


def test_a_probe_counts_as_many_frames_as_are_decoded(tmp_path):
    plain = clips.write(tmp_path / "plain.mp4", 100)
    for path in (plain, clips.cut(plain, tmp_path / "cut.mp4", 1.7), clips.write(tmp_path / "x.avi", 50),
                 clips.write(tmp_path / "v.mkv", 24, 30, ticks=clips.UNEVEN)):
        probe, whole = data.sample_frames(path, decode=False), data.sample_frames(path)
        assert probe.frames.shape == whole.frames.shape and probe.metadata() == whole.metadata()
        assert not probe.frames.any() and probe.frames.base.nbytes == 1


def test_decord_is_the_twin_on_plain_clips_and_refuses_the_rest(tmp_path, monkeypatch, tiny_clips):
    """Same frames; pixels within what two scalers differ by. What it would misread is refused by its name."""
    plain = clips.write(tmp_path / "plain.mp4", 240)
    times = [k / 2 for k in range(20)]
    for path, size in [(plain, (96, 160)), (plain, (64, 96)), (tiny_clips[0], (64, 64))]:
        clip = video.read_header(path)
        ours, theirs = video.frames_pyav(clip, times[:8], size), video.frames_decord(clip, times[:8], size)
        assert clip.plain and ours[1] == theirs[1]
        assert np.abs(ours[0].astype(int) - theirs[0]).mean() < 2
    monkeypatch.setenv("DESCORE_READER", "decord")
    assert numbers(plain) == EVERY_12
    mirrored = clips.set_matrix(plain, tmp_path / "mirrored.mp4", -1, 0, 0, 1)
    for path in (clips.cut(plain, tmp_path / "cut.mp4", 3.0), mirrored, clips.write(tmp_path / "x.avi", 144),
                 clips.write(tmp_path / "v.mp4", 24, 30, ticks=clips.UNEVEN),
                 clips.write(tmp_path / "v.mkv", 24, 30, ticks=clips.UNEVEN),
                 clips.write(tmp_path / "hevc.mp4", 144, codec="libx265", options=X265),
                 clips.write(tmp_path / "wide.mp4", 48, pixel=2),
                 clips.write(tmp_path / "av1.mp4", 48, codec="libsvtav1")):
        with pytest.raises(video.Unsupported, match="decord") as error:
            data.sample_frames(path)
        assert path in str(error.value) and "\n" not in str(error.value)
    assert "av1 file; leave out --reader decord" in str(error.value)  # by what it is, not by what FFmpeg's bindings say


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "truncated index first",
                                  "truncated.mkv", "truncated.webm", "truncated.avi", "zeros.mkv", "zeros.webm",
                                  "zeros.avi", "tail zeroed", "audio", "directory"])
def test_bad_videos_are_one_sentence(kind, tmp_path, tiny_clips):
    path, good = tmp_path / "x.mp4", pathlib.Path(tiny_clips[0]).read_bytes()
    if kind == "directory":
        path.mkdir()
    elif kind == "truncated index first":
        good = pathlib.Path(clips.write(path, 99, movflags="faststart")).read_bytes()
        path.write_bytes(good[: len(good) // 2])
    elif "." in kind:
        path = tmp_path / kind
        clips.write(path, 99, codec="libvpx-vp9" if "webm" in kind else "libx264")
        good = path.read_bytes()
        half = len(good) // 2
        path.write_bytes(good[:half] if "truncated" in kind else good[:half] + bytes(400) + good[half + 400 :])
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
    assert not isinstance(error.value, video.Unsupported)


@pytest.mark.parametrize("name", ["x.mkv", "x.avi"])
def test_a_damaged_file_is_refused_or_shows_what_the_whole_one_does(name, tmp_path):
    """FFmpeg looks for the next frame that it can read, and says so in its log alone: frames were lost without a word.

    Wherever the damage lies; without random numbers in the file, which moved it with each run.
    """
    def shown(path):
        return video.frames_pyav(video.read_header(path), [k / 4 for k in range(16)], (96, 160))[0]

    whole = clips.write(tmp_path / name, 99, fflags="bitexact")
    frames, good, refused = shown(whole), pathlib.Path(whole).read_bytes(), 0
    for at in np.linspace(len(good) // 20, len(good) - 600, 25).astype(int):
        (tmp_path / f"bad {name}").write_bytes(good[:at] + bytes(40) + good[at + 40 :])
        try:
            assert np.array_equal(shown(str(tmp_path / f"bad {name}")), frames)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 10 < refused


def test_joined_ts_files_are_unsupported_not_broken(tmp_path):
    """Where one ends, a counter jumps, as where packets are lost: which of the two it is, nobody can tell."""
    whole = clips.write(tmp_path / "x.ts", 24)
    assert len(video.read_header(whole).stamps) == 24
    (tmp_path / "two.ts").write_bytes(2 * pathlib.Path(whole).read_bytes())
    with pytest.raises(video.Unsupported, match="two.ts: is damaged, or joined of several files"):
        video.read_header(str(tmp_path / "two.ts"))


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_an_avi_with_empty_chunks_is_whole(codec, tmp_path):
    """Its header counts them among the frames: each says that the frame before stays."""
    clip = video.read_header(clips.write(tmp_path / "x.avi", 24, codec=codec, ticks=clips.UNEVEN))
    assert len(clip.stamps) == 24


@pytest.mark.parametrize("name", ["x.mkv", "x.avi", "x.mp4"])
def test_a_title_in_any_encoding_is_no_fault_of_the_clip(name, tmp_path):
    whole = pathlib.Path(clips.write(tmp_path / name, 240, title="Cafe"))
    whole.write_bytes(whole.read_bytes().replace(b"Cafe", b"Caf\xe9"))  # Latin-1
    assert numbers(whole) == EVERY_12


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_a_colon_in_a_name_is_no_protocol(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DESCORE_READER", reader)
    clips.write(tmp_path / "12:30:01.mp4", 240)
    clip = video.read_header("12:30:01.mp4")  # here: another process may have begun in another folder
    read = video.frames_decord if reader == "decord" else video.frames_pyav
    assert [clips.number(frame) for frame in read(clip, [0, 1, 2], (96, 160))[0]] == [0, 24, 48]
    (tmp_path / "a:b.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="^a:b.mp4: is broken or not a video .Invalid data"):
        video.read_header("a:b.mp4")


def test_a_length_that_is_no_number_is_unknown(tmp_path):
    whole = pathlib.Path(clips.write(tmp_path / "x.mkv", 240))
    whole.write_bytes(whole.read_bytes().replace(b"00:00:10", b"00:00:??"))
    assert numbers(whole) == EVERY_12


def test_a_clip_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, tiny_clips, monkeypatch):
    long = clips.write(tmp_path / "long.mkv", 3, ticks=[0, 20, 600 * 10**5])
    with pytest.raises(InputError, match="long.mkv: 100000 s at 2.0 fps is over 512 frames"):
        data.sample_frames(long)
    monkeypatch.setattr(video, "MAX_SIDE", 32)
    with pytest.raises(InputError, match="64 x 64 pixels"):
        video.read_header(tiny_clips[0])


# -- no file may hold a process for ever ----------------------------------------------------------------------------
def test_a_reader_that_does_not_come_back_is_ended_and_the_next_file_is_read(tmp_path, tiny_clips, monkeypatch):
    monkeypatch.setattr(video, "read_header", clips.sleeps)
    bad = tmp_path / "sleeps.mp4"
    bad.write_bytes(pathlib.Path(tiny_clips[0]).read_bytes())
    began = time.monotonic()
    with pytest.raises(InputError, match="sleeps.mp4: not decoded within 0.5 s"):
        data.sample_frames(str(bad), limit=0.5)
    assert time.monotonic() - began < 20 and len(data.sample_frames(tiny_clips[0]).frames) == 8


def test_a_decoder_that_crashes_is_an_error_of_its_file(tiny_clips):
    with pytest.raises(InputError, match="x.mp4: the decoder ended with code 3"):
        decoder.bounded(9.0, "x.mp4", os._exit, 3)
    with pytest.raises(ZeroDivisionError):  # a bug stays one
        decoder.bounded(9.0, "x.mp4", divmod, 1, 0)
    assert len(data.sample_frames(tiny_clips[0]).frames) == 8
    assert isinstance(pickle.loads(pickle.dumps(video.Unsupported("AV1"))), video.Unsupported)


def test_a_decoder_that_somebody_ended_is_no_fault_of_its_file(tmp_path, tiny_clips):
    """Idle or at work: the file is given to a new one. Several idle ones are gone, as after a group's signal."""
    data.sample_frames(tiny_clips[0])
    mine = decoder._idle[os.getpid()]
    mine += [decoder._start() for _ in range(2)]
    for worker in mine:
        worker.send_signal(signal.SIGTERM)
        worker.wait()
    assert len(data.sample_frames(tiny_clips[0]).frames) == 8
    mark = str(tmp_path / "mark")
    assert decoder.bounded(9.0, "good.mp4", clips.crashes_once, mark) == mark


def test_ctrl_c_does_not_wait_for_a_decoder(tmp_path):
    (tmp_path / "sleeps.mp4").write_bytes(b"x")
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), decoder.threads(2) as pool:
        for _ in range(6):
            pool.submit(decoder.bounded, 90.0, "sleeps.mp4", clips.sleeps, str(tmp_path / "sleeps.mp4"))
        while len(decoder._busy) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 20 and not decoder._busy


def test_no_decoder_and_no_loader_worker_outlives_a_killed_parent(tmp_path, tiny_clips):
    """SIGKILL, while one decoder waits and those of two loader workers are at files that do not come back."""
    script = """
import sys, data
from plumbing import video
from tests import clips
data.sample_frames(sys.argv[1])
video.read_header = clips.sleeps
class Files(list):
    def __getitem__(self, index):
        return data.sample_frames(sys.argv[2])
next(data.take(Files([0] * 4), [0] * 4, workers=2))
"""
    bad = tmp_path / "sleeps.mp4"
    bad.write_bytes(b"x")
    with subprocess.Popen([sys.executable, "-c", script, tiny_clips[0], str(bad)], cwd=ROOT) as parent:
        members, deadline = [], time.monotonic() + 100
        while len(members) < 6 and time.monotonic() < deadline:  # itself, its decoder, two workers, and theirs
            time.sleep(0.1)
            members = family(parent.pid)
        time.sleep(1.0)  # the last decoder begins
        parent.kill()
    assert len(members) == 6
    deadline = time.monotonic() + 20
    while (left := [pid for pid in members if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
