"""From a video file to an array, through decord: what can be wrong with a file, and memory that cannot run away.

Which frames are taken, and at what size, is decided in data.py.
"""

import contextlib
import hashlib
import os
import zipfile

import numpy as np
import torch

from plumbing.settings import InputError

os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")  # read by decord when it is imported

MAX_FRAMES = 512  # 4 minutes at 2 fps; a longer clip is refused, not silently cut
MAX_SIDE = 8192  # pixels; larger frames are no video that anyone generated


def read_clip(path: str, fps: float, choose_frames, choose_size, decode: bool) -> tuple[np.ndarray, float, int, list]:
    """A video file -> (frames (F, H, W, 3) uint8, frames per second of the file, its number of frames, indices taken).

    choose_frames(total, source_fps) -> indices; choose_size(height, width) -> (H, W). decode False: the frames are
    black and take no memory; only the first is decoded, for its size.
    Raises InputError for a file that is missing, empty, truncated, not a video, too long or too large.
    """
    from decord import DECORDError, VideoReader, cpu  # here, so that reading a CSV needs no decord

    if not os.path.isfile(path):
        raise InputError(f"{path}: no such video; paths in a CSV are relative to the CSV (or to --video-root).")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path}: the video file is empty.")
    try:
        reader = VideoReader(path, ctx=cpu(0), num_threads=1)
        total, source_fps = len(reader), float(reader.get_avg_fps())
        if total < 1 or not np.isfinite(source_fps) or source_fps <= 0:
            raise InputError(f"{path}: has no video frames.")
        seconds = total / source_fps  # as the file claims: checked before anything of that size is made
        if seconds * fps > MAX_FRAMES:
            raise InputError(
                f"{path}: {seconds:.0f} s at {fps} fps is over {MAX_FRAMES} frames; cut it or lower --fps."
            )
        indices = choose_frames(total, source_fps)
        full = reader[0].shape[:2]
        if max(full) > MAX_SIDE:
            raise InputError(f"{path}: frames of {full[1]} x {full[0]} pixels; at most {MAX_SIDE} a side are read.")
        height, width = choose_size(*full)
        del reader  # it goes on decoding in the background: keeping it would double the time of what follows
        frames = np.broadcast_to(np.uint8(0), (len(indices), height, width, 3))
        if decode:
            reader = VideoReader(path, ctx=cpu(0), width=width, height=height, num_threads=1)
            frames = reader.get_batch(indices).asnumpy()
    except (DECORDError, RuntimeError, IndexError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{path}: is broken or not a video ({reason.strip()[-120:]}).") from error
    return frames, source_fps, total, indices


def resize(frames: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Frames in memory (F, H, W, 3), uint8 or float in [0, 1] -> uint8 of `size` (H, W), antialiased as a file is."""
    if frames.is_floating_point():
        frames = (frames.clamp(0, 1) * 255).round()
    resized = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", antialias=True
    )
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# 2. Sampled frames on disk, so that a clip that is used in every epoch is decoded once
# ---------------------------------------------------------------------------------------------------------------
VERSION = 2  # of how frames are sampled: a change there must not find old frames


class FrameCache:
    """A folder of sampled frames.

    At most `gigabytes` (and 1 % for each process that writes); the least recently used go first. The key holds path,
    size, time of change, fps and pixel budget: an edited clip is decoded again. Raw uint8 frames: 16 s of 448 x 448 at
    2 fps are 19 MB. Several processes may share a folder: files appear by renaming.
    """

    def __init__(self, folder: str, gigabytes: float):
        self.folder, self.limit = folder, gigabytes * 1e9
        self.written = 0  # bytes since the last look at the folder
        os.makedirs(folder, exist_ok=True)
        self._shrink()

    def sample(self, path: str, fps: float, max_pixels: int, decode) -> dict:
        """The fields of the data.Video that `decode(path, fps, max_pixels)` gives; from the cache where it can."""
        if not os.path.isfile(path):
            return vars(decode(path, fps, max_pixels))  # for its message
        info = os.stat(path)
        clip = os.path.abspath(path), info.st_size, info.st_mtime_ns
        key = hashlib.sha256(repr((clip, fps, max_pixels, VERSION)).encode())
        file = os.path.join(self.folder, key.hexdigest()[:32] + ".npz")
        try:
            with np.load(file) as saved:
                os.utime(file)  # used now: the oldest are removed first
                return {
                    "frames": saved["frames"], "source_fps": float(saved["source_fps"]),
                    "total_num_frames": int(saved["total_num_frames"]),
                    "frame_indices": tuple(int(i) for i in saved["frame_indices"]),
                }
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):  # not there, or cut short
            fields = vars(decode(path, fps, max_pixels))
        temporary = f"{file}.{os.getpid()}.tmp"
        with open(temporary, "wb") as target:
            np.savez(target, **fields)
        self.written += os.path.getsize(temporary)
        os.replace(temporary, file)
        if self.written > self.limit / 100:  # listing a large folder takes longer than decoding a clip
            self._shrink()
        return fields

    def _shrink(self):
        self.written = 0
        with contextlib.suppress(FileNotFoundError):  # another process may remove the same file
            files = sorted((e.stat().st_mtime, e.stat().st_size, e.path) for e in os.scandir(self.folder))
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= self.limit:
                    break
                os.remove(path)
                total -= size
