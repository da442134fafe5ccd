"""Sampled frames on disk, so that a clip that is used in every epoch is decoded once."""

import contextlib
import hashlib
import os
import zipfile

import numpy as np

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
