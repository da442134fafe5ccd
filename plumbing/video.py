"""From a video file to an array, through decord: what can be wrong with a file, and memory that cannot run away.

Which frames are taken, and at what size, is decided in data.py.
"""

import os

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
