#!/usr/bin/env bash
# decord 0.6.0 on a clip of variable rate: `index / get_avg_fps()` is not when a frame is shown, `get_frame_timestamp` is.
# The file is valid: 12 frames at 30 a second, then 12 at 2 a second, as screen recorders and some generators write it.
# Behaviour: the average rate is 4.8; frame 14 is shown at 1.4 s, as its time stamp says; index / rate says 2.92 s.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q decord==0.6.0 av==18.1.0 numpy==2.4.6
cd "$dir"; venv/bin/python - <<'PY'
from fractions import Fraction
import av, decord, numpy as np
print("decord", decord.__version__, "av", av.__version__)
ticks = [*range(0, 240, 20), *range(240, 240 + 12 * 300, 300)]  # of 1/600 s
with av.open("v.mp4", "w") as file:
    stream = file.add_stream("libx264", rate=30)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    stream.codec_context.time_base = Fraction(1, 600)
    for k, tick in enumerate(ticks):
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * k, np.uint8), format="rgb24")
        frame.pts, frame.time_base = tick, Fraction(1, 600)
        file.mux(stream.encode(frame))
    file.mux(stream.encode())
reader = decord.VideoReader("v.mp4")
rate, truth = reader.get_avg_fps(), [tick / 600 for tick in ticks]
told = [float(reader.get_frame_timestamp(k)[0]) for k in range(len(reader))]
by_rate = [k / rate for k in range(len(reader))]
print("frames", len(reader), "average rate", round(rate, 3))
print("frame 14: shown at", truth[14], "s; its time stamp says", round(told[14], 3), "; index / average rate says", round(by_rate[14], 3))
assert np.allclose(told, truth, atol=2e-3), told
assert max(abs(a - b) for a, b in zip(by_rate, truth)) > 1.5
print("as described")
PY
