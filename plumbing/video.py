"""From a video file to the frames that a player has on screen at given times; frames in memory; a cache on disk.

Which times, and what size, is decided in data.py. Files are opened in a process that can be ended (decoder.py).
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import sys
import zipfile

import numpy as np

from plumbing.decoder import LIMIT, bounded
from plumbing.settings import InputError, first_line, writable

os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")  # read by decord when it is imported

MAX_SIDE = 8192  # pixels; larger frames are no video that anyone generated


class Unsupported(InputError):
    """A file that may well be a valid video, but that this reader would not read, or would misread."""


# ---- 1. Files. Time stamps decide: number / average rate is no time where the rate varies or a clip was cut ----
@dataclasses.dataclass(frozen=True)
class Clip:
    """What a file says of itself.

    height, width: as displayed, turned upright and with square pixels. stamps: the seconds at which each frame comes
    on screen, ascending, the first at 0. seconds: the clip's length; the last frame stays as long as its packet says
    where the file's own length agrees (with B-frames, packets of an mp4 say another's), else as long as the one before.
    slack: by how much a stamp may be rounded up.
    plain: one rate, square pixels, upright, not cut, no open key frame: what a reader by number gets right.
    """

    path: str
    height: int
    width: int
    stamps: tuple[float, ...]
    seconds: float
    slack: float
    plain: bool
    codec: str = "unknown"
    limit: float = LIMIT

    def frames(self, times: list[float], size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
        """The frames on screen at `times` (seconds, ascending) -> (F, *size, 3) uint8 RGB, and their numbers."""
        read = frames_decord if os.environ.get("DESCORE_READER") == "decord" else frames_pyav
        return bounded(self.limit, self.path, read, self, times, size)


def open_clip(path: str, limit: float = LIMIT) -> Clip:
    """read_header in a process that ends after `limit` seconds: InputError then."""
    return dataclasses.replace(bounded(limit, path, read_header, path), limit=limit)


def read_header(path: str) -> Clip:
    """Reads the time stamps of a file and decodes its first frame.

    Raises InputError for a file that is missing, empty, truncated, not a video or too large; Unsupported by its name.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such video; paths in a CSV are relative to the CSV (or to --video-root).")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path}: the video file is empty.")
    with _opened(path) as (file, stream):
        first = next(file.decode(stream), None)
        if first is None:
            raise InputError(f"{path}: has no video frames.")
        width, height = first.width, first.height
        if max(width, height) > MAX_SIDE:
            raise InputError(f"{path}: frames of {width} x {height} pixels; at most {MAX_SIDE} a side are read.")
        swap, *flips = _turn(path, first)
        pixel = stream.sample_aspect_ratio or 1  # width / height of a pixel
        width, codec = max(1, round(width * pixel)), stream.codec.canonical_name
    with _complaints() as said, _opened(path) as (file, stream):
        packets = list(file.demux(stream))
        tick, opened, name = float(stream.time_base), False, file.format.name
        # A reader that meets nonsense looks for the next frame that it can read: none of these is an error to it.
        lost = any(who == name for _, who, _ in said) and name in ("matroska,webm", "avi")
        # An avi's header counts empty chunks, too, which say that a frame stays; its index does not.
        lost |= name == "avi" and sum(p.dts is not None for p in packets) < len(stream.index_entries)
        if name == "mpegts" and any(p.is_corrupt for p in packets):  # a counter jumps where files were joined, too
            raise Unsupported(f"{path}: is damaged, or joined of several files; put it into an mp4 file.")
        if lost or any(p.is_corrupt for p in packets):
            raise InputError(f"{path}: is damaged: frames are lost, or parts of them; copy it anew.")
        packets = [p for p in packets if p.size]
        stamps = [p.dts if name == "avi" or p.pts is None else p.pts for p in packets]
        declared = _declared(file, stream)
    if None in stamps:
        raise Unsupported(f"{path}: {name} has no time stamps; put it into an mp4 file.")
    key = None
    for packet, stamp in zip(packets, stamps):  # in the order of decoding
        opened |= key is not None and stamp < key  # shown before the key frame, stored behind it
        key = stamp if packet.is_keyframe else key
    lasts = {stamp: packet.duration for packet, stamp in zip(packets, stamps) if not packet.is_discard}
    shown = sorted(lasts)
    if not shown:
        raise InputError(f"{path}: has no video frames.")
    steps = np.diff(shown)
    stays = lasts[shown[-1]]
    if not stays or abs((shown[-1] + stays) * tick - declared) > max(tick, 2e-3):
        stays = steps[-1] if len(steps) else 1
    seconds = (shown[-1] - shown[0] + stays) * tick
    end = shown[0] * tick + seconds
    if end < declared - 0.5 and name in ("matroska,webm", "avi"):  # a truncated mp4 cannot be opened at all
        raise InputError(f"{path}: is cut short: it ends at {end:.1f} s of {declared:.1f}; copy it anew.")
    even = len(shown) < 2 or np.ptp(steps) * tick <= 2e-3  # mkv counts in milliseconds
    plain = even and pixel == 1 and not (swap or opened or any(flips)) and len(shown) == len(packets)
    stamps = tuple((stamp - shown[0]) * tick for stamp in shown)
    slack = 1e-6 + (0.4 * tick if tick <= 1e-3 else 0)  # containers with ticks of their own round: mkv to milliseconds
    return Clip(path, *((width, height) if swap else (height, width)), stamps, seconds, slack, plain, codec)


@contextlib.contextmanager
def _complaints():
    """Yields a list to which each error is added that FFmpeg only logs: (level, who, what)."""
    import av

    before = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as said:
            yield said
    finally:
        av.logging.set_level(before)


@contextlib.contextmanager
def _opened(path: str):
    """Yields (container, its main video stream); what FFmpeg says becomes one sentence."""
    import av

    try:
        whole = os.path.join(os.getcwd(), path)  # FFmpeg takes what stands before a colon for a protocol
        with av.open(whole, metadata_errors="replace") as file:  # a title may be in any encoding
            stream = file.streams.best("video")
            if stream is None:
                raise InputError(f"{path}: has no video frames.")
            if getattr(stream, "codec_context", None) is None:
                raise Unsupported(f"{path}: its codec has no decoder here; encode it as H.264.")
            stream.codec_context.thread_count = 1  # files are read side by side already
            yield file, stream
    except (av.error.DecoderNotFoundError, av.codec.codec.UnknownCodecError) as error:
        raise Unsupported(f"{path}: its codec has no decoder here ({error}); encode it as H.264.") from error
    except (av.error.FFmpegError, EOFError) as error:
        raise InputError(f"{path}: is broken or not a video ({error.strerror or type(error).__name__}).") from error


def _declared(file, stream) -> float:
    """The second at which the video ends by what its file says; 0 if unknown."""
    if "matroska" not in file.format.name:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) if stream.duration else 0.0
    found = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # 00:00:04.125000000
    return sum(float(part) * 60**k for part, k in zip(found.groups(), (2, 1, 0))) if found else 0.0


def _turn(path: str, frame) -> tuple[bool, bool, bool]:
    """The display matrix, which phones write -> (swap height and width, then flip upside down, left to right)."""
    found = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(found), "<i4")[:5] / 65536  # x' = a x + c y, y' = b x + d y
    if not sorted((abs(a), abs(b))) == sorted((abs(c), abs(d))) == [0, 1] or abs(a) != abs(d):
        raise Unsupported(f"{path}: is turned by no multiple of 90 degrees; encode it upright.")
    return a == 0, b + d < 0, a + c < 0


def frames_pyav(clip: Clip, times: list[float], size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """Decodes in order from the first frame on, and scales those that are asked for. Never jumps: behind an open key
    frame a jump lands frames late.
    InputError: no frame, or a damaged one; Unsupported: times that run back or are missing."""
    from av.video.reformatter import VideoReformatter

    out, numbers, scaler = np.empty((len(times), *size, 3), np.uint8), [], VideoReformatter()

    def show(frame, k, until):
        """Fills in frame k for all times that come before `until`."""
        start = len(numbers)
        while len(numbers) < len(times) and times[len(numbers)] + clip.slack < until:
            numbers.append(k)
        if len(numbers) > start:
            swap, *flips = _turn(clip.path, frame)
            height, width = size[::-1] if swap else size
            pixels = scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1).to_ndarray()
            pixels = pixels.swapaxes(0, 1) if swap else pixels
            up, left = (slice(None, None, -1 if flip else 1) for flip in flips)
            out[start : len(numbers)] = pixels[up, left]

    with _opened(clip.path) as (file, stream):
        last, zero, now = None, None, 0.0
        for k, frame in enumerate(file.decode(stream)):
            if file.format.name == "avi":  # holds no order of showing: frames come at its one rate
                time = clip.stamps[min(k, len(clip.stamps) - 1)]
            elif frame.pts is None:
                raise Unsupported(f"{clip.path}: frame {k} has no time stamp; encode it anew.")
            else:
                zero = frame.pts if zero is None else zero
                time = float((frame.pts - zero) * stream.time_base)
            if time < now:
                raise Unsupported(f"{clip.path}: time runs back at frame {k}; encode it anew.")
            if frame.is_corrupt:
                raise InputError(f"{clip.path}: is damaged at frame {k} ({time:.2f} s); copy it anew.")
            if last is not None:
                show(last, k - 1, time)
            last, now = frame, time
            if len(numbers) == len(times):
                return out, numbers
        if last is None:
            raise InputError(f"{clip.path}: has no video frames.")
        show(last, k, float("inf"))
    return out, numbers


def frames_decord(clip: Clip, times: list[float], size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """The reader that the released code uses. It finds frames by number, so it gets plain files alone.

    Unsupported: any other.
    """
    from decord import DECORDError, VideoReader, cpu

    if not clip.plain:
        raise Unsupported(f"{clip.path}: --reader decord would misread it (its rate varies, it is cut or turned, its "
                          "key frames are open, or its pixels not square); leave the flag out.")
    numbers = [max(0, int(np.searchsorted(clip.stamps, time + clip.slack, "right")) - 1) for time in times]
    try:
        path = os.path.join(os.getcwd(), clip.path)  # as for FFmpeg
        reader = VideoReader(path, ctx=cpu(0), width=size[1], height=size[0], num_threads=1)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]  # read from the index, nothing is decoded yet
        if len(reader) != len(clip.stamps) or np.abs(starts - starts[0] - clip.stamps).max() > 2e-3:
            raise Unsupported(f"{clip.path}: decord takes other time stamps than FFmpeg; leave out --reader decord.")
        return reader.get_batch(numbers).asnumpy(), numbers
    except (DECORDError, RuntimeError, IndexError) as error:
        message = f"{clip.path}: decord cannot read this {clip.codec} file; leave out --reader decord."
        raise Unsupported(message) from error


# ---- 2. Frames in memory --------------------------------------------------------------------------------------
def from_memory(video):
    """Frames in memory -> a tensor (F, H, W, 3), uint8 or float in [0, 1]. InputError for any other shape or range.

    video: such an array or tensor, or a list of images. A VAE's -1..1, or floats up to 255, would be clipped to another
    picture, and get a plausible reward.
    """
    import torch

    listed = isinstance(video, (list, tuple))
    if listed and any(str(getattr(image, "mode", "")).startswith(("I", "F")) for image in video):
        raise InputError("images of Pillow's mode I or F: their values would be cut off at 0 and 255; scale them.")
    try:
        if listed:
            images = [image.convert("RGB") if hasattr(image, "convert") else image for image in video]
            tensors = all(map(torch.is_tensor, images))
            video = torch.stack(images) if tensors else np.stack([np.asarray(image) for image in images])
        # PyTorch refuses views that run backwards: frames[..., ::-1] of OpenCV's BGR
        frames = torch.as_tensor(np.ascontiguousarray(video) if isinstance(video, np.ndarray) else video)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"a video must be a path, an array (F, H, W, 3) or a list of images of one size; this is a "
                         f"{type(video).__name__} ({first_line(error)}).") from error
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"frames of shape {tuple(frames.shape)}: (F, H, W, 3) is needed, F >= 1.")
    if frames.dtype != torch.uint8:
        try:
            if frames.dtype == torch.bool:
                raise TypeError
            low, high = frames.min().item(), frames.max().item()
        except (TypeError, RuntimeError) as error:  # complex numbers, float8, sparse tensors, ... have no minimum
            raise InputError(f"frames of type {frames.dtype}, layout {frames.layout}: dense uint8, or floats in "
                             "[0, 1], are needed.") from error
        if frames.is_floating_point() and not (-1e-3 <= low <= high <= 1 + 1e-3):  # nan fails every comparison
            raise InputError(f"frames hold floats from {low:g} to {high:g}: [0, 1] is needed; a VAE's -1..1 becomes it "
                             "by x / 2 + .5, 0..255 by x / 255.")
        if not frames.is_floating_point() and not 0 <= low <= high <= 255:
            raise InputError(f"frames hold integers from {low} to {high}: 0 to 255 is needed; scale them.")
    return frames


def resize(frames, size: tuple[int, int]) -> np.ndarray:
    """Frames in memory (F, H, W, 3), uint8 or float in [0, 1] -> uint8 of `size` (H, W), antialiased as a file is."""
    import torch  # here: a process that only decodes starts in a third of a second without it

    if frames.is_floating_point():
        frames = (frames.clamp(0, 1) * 255).round()
    resized = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", antialias=True
    )
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


# ---- 3. Sampled frames on disk, so that a clip that is used in every epoch is decoded once --------------------
VERSION = 5  # of how frames are sampled: a change there must not find old frames


class FrameCache:
    """A folder of sampled frames, which grows to `gigabytes` (and 1 % for each process that writes), then no further.

    Nothing is ever removed: with a new order in each epoch, what was used longest ago is what comes next, so a cache
    that makes room finds next to nothing again; one that stays as it is finds the share that fits. And the folder may
    hold other files; frames of an older `VERSION` count for nothing. The key holds path, size, time of change, fps and
    pixel budget: an edited clip is decoded again. Raw uint8 frames: 16 s of 448 x 448 at 2 fps are 19 MB. Several
    processes may share a folder: files appear by renaming.
    """

    def __init__(self, folder: str, gigabytes: float):
        self.folder, self.limit = folder, gigabytes * 1e9
        writable([folder])
        self._look()

    def sample(self, path: str, fps: float, max_pixels: int, decode) -> dict:
        """The fields of the data.Video that `decode(path, fps, max_pixels)` gives; from the cache where it can."""
        if not os.path.isfile(path):
            return vars(decode(path, fps, max_pixels))  # for its message
        info = os.stat(path)
        clip = os.path.abspath(path), info.st_size, info.st_mtime_ns
        reader = os.environ.get("DESCORE_READER", "pyav")
        key = hashlib.sha256(repr((clip, fps, max_pixels, reader, VERSION)).encode())
        file = os.path.join(self.folder, f"{key.hexdigest()[:32]}.{VERSION}.npz")
        try:
            with np.load(file) as saved:
                return {
                    "frames": saved["frames"], "source_fps": float(saved["source_fps"]),
                    "total_num_frames": int(saved["total_num_frames"]),
                    "frame_indices": tuple(int(i) for i in saved["frame_indices"]),
                }
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):  # not there, or cut short
            fields = vars(decode(path, fps, max_pixels))
        if self.held + self.written < self.limit:
            self._write(file, fields)
        return fields

    def _write(self, file, fields):
        temporary = f"{file}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as target:
                np.savez(target, **fields)
            self.written += os.path.getsize(temporary)
            os.replace(temporary, file)
        except OSError as error:  # a full disk must not end a training that can go on without
            with contextlib.suppress(OSError):
                os.remove(temporary)
            self.limit = 0
            print(f"--frame-cache {self.folder}: takes no more ({first_line(error)})", file=sys.stderr)
        if self.written > self.limit / 100:  # listing a large folder takes longer than decoding a clip
            self._look()

    def _look(self):
        self.held = self.written = 0  # bytes in the folder, and since this look
        for entry in os.scandir(self.folder):
            if re.fullmatch(rf"[0-9a-f]{{32}}\.{VERSION}\.npz", entry.name):  # others are not ours, or of older code
                with contextlib.suppress(FileNotFoundError):  # removed by hand, while it is in use
                    self.held += entry.stat().st_size
