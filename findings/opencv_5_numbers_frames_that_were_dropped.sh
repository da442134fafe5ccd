#!/usr/bin/env bash
# Judges of video often choose frames by number: linspace(0, CAP_PROP_FRAME_COUNT - 1, n), then CAP_PROP_POS_FRAMES. A recorder
# that drops a frame now and then writes a valid file with gaps in its times. Of ONE such clip, 40 places at 10 a second of
# which 5 were dropped, OpenCV says 40 frames in avi and in mkv, 35 in mp4, and reads 35 of each. So some of the last
# numbers that linspace asks for give no frame; and a number means two things: reading on, frame 30 is the 30th that is
# there; after a seek to 30 it is that in mp4, and another one, two places earlier, in avi and mkv. Neither is the one at
# 3.0 s. PyAV's stream.frames for avi counts the dropped ones as well; decord's length does not.
# Behaviour: each container's count, frames read, which place frame 30 shows by reading on and by seeking, and the numbers
# below the count to which a seek gives no frame.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q av==18.1.0 opencv-python-headless==5.0.0.93 decord==0.6.0 numpy==2.4.6 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import sys
from fractions import Fraction
import av, cv2, decord, numpy as np
print("opencv", cv2.__version__, "av", av.__version__, "decord", decord.__version__)
dropped, found = (7, 8, 20, 21, 22), {}
for kind in ("avi", "mkv", "mp4"):
    path = f"{sys.argv[1]}/clip.{kind}"
    with av.open(path, "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for place in range(40):
            if place not in dropped:  # a place's grey says which it is
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 6 * place, np.uint8), "rgb24")
                frame.pts, frame.time_base = place, Fraction(1, 10)
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with av.open(path) as clip:
        told = clip.streams.video[0].frames
    reader, read = cv2.VideoCapture(path), []
    while (answer := reader.read())[0]:
        read.append(round(answer[1][32, 32, 0] / 6))
    reader = cv2.VideoCapture(path)
    count = int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
    reader.set(cv2.CAP_PROP_POS_FRAMES, 30)
    sought, none = round(reader.read()[1][32, 32, 0] / 6), []
    for number in range(count):
        reader = cv2.VideoCapture(path)
        reader.set(cv2.CAP_PROP_POS_FRAMES, number)
        none += [] if reader.read()[0] else [number]
    found[kind] = (count, len(read), read[30], sought, told, len(decord.VideoReader(path)), none)
    print(f"  {kind}: OpenCV counts {count}, reads {len(read)}; frame 30 shows place {read[30]} reading on, {sought} by "
          f"seeking; PyAV's header {told}, decord {found[kind][5]}; a seek gives none at {none or '-'}")
assert found["avi"] == (40, 35, 35, 33, 40, 35, [37, 38]), found
assert found["mkv"] == (40, 35, 35, 33, 0, 35, [37, 38]), found
assert found["mp4"] == (35, 35, 35, 35, 35, 35, []), found
print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" "$dir" 2> "$dir/log" || { tail -n 8 "$dir/log"; exit 1; }
