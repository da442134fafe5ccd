"""Small valid clips that readers get wrong, written with PyAV. Each frame carries its own number, so that whoever
decodes it can tell which one it is; what is on screen when follows from how the clip was made, not from a decoder."""

import os
import struct
import time
from fractions import Fraction

import av
import numpy as np

from plumbing import video

UNEVEN = [*range(0, 240, 20), *range(240, 3840, 300)]  # ticks of 1/600 s: 12 frames at 30 a second, then 12 at 2


def picture(k: int, height: int = 96, width: int = 160) -> np.ndarray:
    """Frame k: its number as eight blocks, light for 1, in the upper half; a bar that moves in the lower."""
    out = np.full((height, width, 3), 40, np.uint8)
    for bit in range(8):
        if k >> bit & 1:
            out[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 220
    x = k * 3 % (width - 20)
    out[height * 2 // 3 : height - 6, x : x + 20] = (200, 60, 60)
    return out


def number(frame: np.ndarray) -> int:
    """Which frame this is; it may have been resized."""
    height, width = frame.shape[:2]
    return sum(1 << bit for bit in range(8) if frame[height // 4, int((bit + 0.5) / 8 * width)].mean() > 130)


def write(path, count: int, rate=24, codec="libx264", options=None, ticks=None, pixel=None, pix_fmt="yuv420p",
          turn=lambda frame: frame, title="", last=0, **container) -> str:
    """Writes `count` numbered frames. ticks: when each is shown, in 1/600 s; last: for how long the last one is shown;
    pixel: width / height of one."""
    with av.open(str(path), "w", options=container) as file:
        file.metadata.update({"title": title} if title else {})
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = turn(picture(0)).shape[:2]
        stream.pix_fmt = pix_fmt
        if pixel:
            stream.codec_context.sample_aspect_ratio = Fraction(pixel)
        if ticks:
            stream.codec_context.time_base = Fraction(1, 600)
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(turn(picture(k))), format="rgb24")
            if ticks:
                frame.pts, frame.time_base = ticks[k], Fraction(1, 600)
            file.mux(stream.encode(frame))
        rest = stream.encode()
        if last:
            rest[-1].duration = int(Fraction(last, 600) / rest[-1].time_base)
        file.mux(rest)
    return str(path)


def cut(path: str, out, start: float, end: float = 0.0) -> str:
    """A copy whose edit list begins `start` seconds later and ends `end` earlier: cut without re-encoding."""
    raw = bytearray(open(path, "rb").read())
    at, scale = raw.find(b"elst"), lambda box: struct.unpack(">I", raw[raw.find(box) + 16 : raw.find(box) + 20])[0]
    length, first = struct.unpack(">Ii", raw[at + 12 : at + 20])
    first += int(start * scale(b"mdhd"))
    struct.pack_into(">Ii", raw, at + 12, length - int((start + end) * scale(b"mvhd")), first)
    open(out, "wb").write(raw)
    return str(out)


def set_matrix(path: str, out, a, b, c, d) -> str:
    """A copy with this display matrix, which players apply: x' = a x + c y, y' = b x + d y."""
    raw = bytearray(open(path, "rb").read())
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", raw, raw.find(b"tkhd") + 44, *values)
    open(out, "wb").write(raw)
    return str(out)


def sleeps(path: str):
    """plumbing.video.read_header, but it does not come back from the files named so."""
    if "sleeps" in path or open(path, "rb").read().endswith(b"sleeps"):
        time.sleep(60)
    return video.read_header(path)


def crashes_once(mark: str) -> str:
    """Ends its process, but not if the file `mark` is there, which it leaves behind."""
    if not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(3)
    return mark
