"""A laptop-sized world: rendered clips with known answers (`python -m toy data`).

A clip shows one coloured shape over a textured background, seen by a moving camera, in some style. We drew it, so the
truth of every verdict is known: `annotate` stands in for the human labels and for Gemini's annotations. Nothing else
is simplified: real H.264 files, the real processor and model classes. The model is in base_model.py.

Shapes: F frames, H x W pixels.
"""

import fractions
import json
import multiprocessing
import pathlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from plumbing.decoder import end_with_parent
from plumbing.settings import InputError, write_csv, write_json
from rules import DIMENSIONS

# ---- 1. The world: what a clip can show, what a prompt can ask for, and the truth about both -----------------
COLOURS = {"red": (220, 45, 45), "green": (60, 190, 70), "blue": (60, 90, 235), "yellow": (240, 215, 60),
           "pink": (240, 130, 190), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
VALUES = {
    "dynamics": ("resting", "moving left", "moving right", "rising", "falling", "circling"),
    "camera": ("still", "panning left", "panning right", "zooming in", "zooming out", "shaking"),
    "environment": ("night", "forest", "desert", "snow", "sea", "meadow"),
    "style": ("plain", "grainy", "faded", "sepia", "pixelated"),
}
GROUND = {"night": ((15, 18, 50), (85, 90, 140)), "forest": ((15, 60, 30), (80, 130, 75)),
          "desert": ((180, 140, 85), (240, 215, 170)), "snow": ((180, 192, 208), (245, 248, 252)),
          "sea": ((10, 65, 115), (85, 150, 190)), "meadow": ((90, 140, 50), (165, 210, 120))}
# Colour-shape pairs that neither pre-training nor a training split ever shows: only the GenAI-Bench stand-in has them.
UNSEEN = {("red", "diamond"), ("green", "ring"), ("blue", "cross"), ("yellow", "triangle"), ("pink", "square")}


def random_values(rng, unseen: bool = False) -> dict:
    """One value per dimension; the subject is a (colour, shape) pair, one of UNSEEN if asked to."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in UNSEEN) == unseen]
    return {"subject": pairs[rng.integers(len(pairs))]} | {n: v[rng.integers(len(v))] for n, v in VALUES.items()}


def random_wish(rng, mention: float = 0.88, unseen: bool = False) -> dict:
    """What a prompt asks for; a dimension that it does not mention is None, and its true verdict is N/A."""
    return {name: value if rng.random() < mention else None for name, value in random_values(rng, unseen).items()}


def mix(rng, values: dict, others: dict, match: float, match_subject: float) -> dict:
    """`values`, each replaced by that of `others`, where both have one, with probability `match`.

    Colour and shape of the subject are replaced one by one: that is where the verdict "1" comes from.
    """
    mixed = {n: others[n] if v and others[n] and rng.random() < match else v for n, v in values.items()}
    if others["subject"] and values["subject"]:
        both = zip(values["subject"], others["subject"])
        mixed["subject"] = tuple(o if rng.random() < match_subject else v for v, o in both)
    return mixed


def random_clip(rng, wish: dict, unseen: bool = False) -> dict:
    """What a video generator makes of a wish: half of the attributes come out as asked, the others by chance.

    So a verdict of "2" is right in about half of the cases, and always answering "2" is no strategy.
    """
    while True:
        seen = mix(rng, random_values(rng, unseen), wish, match=0.5, match_subject=0.7)
        if unseen or seen["subject"] not in UNSEEN:
            return seen


def annotate(wish: dict, seen: dict) -> dict:
    """The truth. {dimension: "2" as asked, "1" half of it (subject only), "0" not at all, "N/A" not asked for}."""
    verdict = {n: "N/A" if wish[n] is None else "2" if wish[n] == seen[n] else "0" for n in DIMENSIONS}
    if wish["subject"]:
        verdict["subject"] = str(sum(w == s for w, s in zip(wish["subject"], seen["subject"])))
    return verdict


def points(verdicts: dict) -> int:
    """Sum of the verdicts, N/A not counted: what a text states. People agree with it, unless People says otherwise."""
    return sum(int(verdict) for verdict in verdicts.values() if verdict != "N/A")


class People(NamedTuple):
    """What people mind: the points, or (lab/study/worlds.py) something else than a text states.

    weights: of the DIMENSIONS. unspoken: points that a full flicker costs, a flaw that shows and that no dimension
    names; with 0 no clip flickers.
    """

    weights: tuple[float, ...] = (1.0,) * len(DIMENSIONS)
    unspoken: float = 0.0

    def utility(self, verdicts: dict, seen: dict, names=DIMENSIONS) -> float:
        """Points as people weigh them, less the flicker's."""
        weighed = dict(zip(DIMENSIONS, self.weights))
        rated = sum(weighed[n] * int(verdicts[n]) for n in names if verdicts[n] != "N/A")
        return rated - self.unspoken * seen.get("flicker", 0)


def prompt_text(wish: dict) -> str:
    """A wish in words, e.g. "A red circle moving left, camera still, place: night, style: grainy."."""
    lead = {"subject": "A", "dynamics": "", "camera": ", camera", "environment": ", place:", "style": ", style:"}
    asked = {"subject": ("thing",)} | {name: value for name, value in wish.items() if value}
    return "".join(f"{lead[name]} {_words(value)}" for name, value in asked.items()) + "."


def _words(value) -> str:
    return " ".join(value) if isinstance(value, tuple) else value


def cot_text(wish: dict, seen: dict, verdict: dict | None = None) -> str:
    """The chain of thought and answer, in the layout that `data.INSTRUCTION_AFTER` asks for; ideal without `verdict`.

    Asked and shown stand side by side in one line, so a verdict is a comparison of neighbours: a tiny transformer can
    learn that in a few hundred steps, and not from prose.
    """
    verdict = verdict or annotate(wish, seen)
    asked = {n: f"asked {_words(wish[n])}" if wish[n] else "not asked" for n in DIMENSIONS}
    lines = [f"{n}: {asked[n]}; shown {_words(seen[n])}; verdict {verdict[n]}" for n in DIMENSIONS]
    rated = sum(v != "N/A" for v in verdict.values())
    overall = 1 + 4 * points(verdict) / (2 * rated) if rated else 5.0  # nothing asked, nothing missed
    scores = f'{{"dimensional_scores": {json.dumps(verdict)}, "overall_score": {overall:.2f}}}'
    return "\n".join(["<think>", *lines, "</think>", f"<answer>{scores}</answer>"])


# ---- 2. Drawing a clip, and writing it as a real H.264 file --------------------------------------------------
def _outline(shape: str, x, y, r):
    """Signed distance in pixels of the points (x, y) to the outline of a shape of radius r: negative inside."""
    ax, ay = np.abs(x), np.abs(y)
    if shape in ("circle", "ring"):
        far = np.hypot(x, y)
        return far - r if shape == "circle" else np.abs(far - 0.75 * r) - 0.3 * r
    if shape == "triangle":
        return np.maximum(0.866 * ax - 0.5 * y - 0.5 * r, y - 0.6 * r)
    if shape == "cross":
        return np.maximum(np.minimum(ax, ay) - 0.33 * r, np.maximum(ax, ay) - r)
    return np.maximum(ax, ay) - 0.88 * r if shape == "square" else (ax + ay - 1.25 * r) * 0.707  # or a diamond


def _paths(seen: dict, t, rng):
    """Times t (T,) in seconds -> the subject's place on the screen (T, 2), the background's shift (T, 2) and zoom (T,).

    Motion is centred on the clip's middle, so the place in one frame says nothing about the direction.
    """
    mid, move, camera = t - t.mean(), seen["dynamics"], seen["camera"]
    way = {"moving left": (-1, 0), "moving right": (1, 0), "rising": (0, -1), "falling": (0, 1)}.get(move, (0, 0))
    place = np.outer(mid * rng.uniform(8, 12), way) + rng.uniform(-6, 6, 2)  # pixels of 64, from the centre
    if move == "circling":
        turn = rng.uniform(1.5, 2.0) * t * rng.choice([-1, 1]) + rng.uniform(0, 6.3)
        place = place + 12 * np.stack([np.cos(turn), np.sin(turn)], -1)
    pan = {"panning left": -1, "panning right": 1}.get(camera, 0)
    shift = np.outer(mid * rng.uniform(6, 9), (pan, 0))
    zoom = np.exp({"zooming in": 1, "zooming out": -1}.get(camera, 0) * rng.uniform(0.2, 0.35) * mid)
    shake = rng.normal(0, 3.0 * (camera == "shaking"), place.shape)
    return [part.astype(np.float32) for part in (place + shake, shift - shake, zoom)]


def _apply_style(frames, style: str, strength: float, rng):
    """frames (F, H, W, 3) float -> the same in a style. `strength` 1 is plain to see, 0.5 is a close call."""
    if style == "grainy":
        return frames + 26 * strength * rng.standard_normal(frames.shape[:3] + (1,), np.float32)
    if style == "faded":
        return 150 + (frames - 150) * (1 - 0.55 * strength)
    if style == "sepia":
        toned = frames.mean(-1, keepdims=True) * np.array([1.12, 0.98, 0.75], np.float32)
        return frames + 0.65 * strength * (toned - frames)
    if style == "pixelated":
        coarse = frames.reshape(len(frames), frames.shape[1] // 4, 4, frames.shape[2] // 4, 4, 3).mean((2, 4))
        return frames + min(1.0, 1.2 * strength) * (coarse.repeat(4, 1).repeat(4, 2) - frames)
    return frames


def render_clip(seen: dict, rng, times=None, size: int = 64, look: str = "clean") -> np.ndarray:
    """Draws a clip. -> (T, size, size, 3) uint8

    seen: a value per dimension, as `random_values` makes it; rng gives sizes, speeds and places, so that equal values
    still make different clips. times: (T,) seconds, default 16 frames at 4 fps. look: "clean", "old" (dark corners,
    washed out, noise: an early video generator) or "hard" (weak styles, small shapes).
    """
    place, shift, zoom = _paths(seen, np.arange(16) / 4 if times is None else np.asarray(times, float), rng)
    y, x = (np.mgrid[:size, :size].astype(np.float32) - (size - 1) / 2) * (64 / size)  # (H, W), 0 is the centre
    # The background is a sum of waves in world coordinates, with structure both ways, so that pans and zooms show. A
    # wave is a product of a row pattern and a column pattern: T * (H + W) sines instead of T * H * W.
    phase, wave = rng.uniform(0, 6.3, 3), 6.28 / rng.uniform(18, 30, 3)
    across = (x[0] / zoom[:, None] + shift[:, :1])[:, None, :]  # (T, 1, W)
    down = (y[:, 0] / zoom[:, None] + shift[:, 1:])[:, :, None]  # (T, H, 1)
    checks = np.sin(wave[0] * across + phase[0]) * np.sin(wave[1] * down + phase[1])  # (F, H, W)
    i, j = wave[2] * across + phase[2], wave[2] * down
    stripes = np.sin(i) * np.cos(j) + np.cos(i) * np.sin(j)  # sin(i + j)
    low, high = np.array(GROUND[seen["environment"]], np.float32)
    frames = low + (high - low) * (0.5 + 0.35 * checks + 0.25 * stripes)[..., None]  # (F, H, W, 3)

    colour, shape = seen["subject"]
    radius = rng.uniform(9.0, 12.5) * (0.8 if look == "hard" else 1.0)
    edge = _outline(shape, x - place[:, 0, None, None], y - place[:, 1, None, None], radius)[..., None]
    frames += np.clip(1.8 - edge, 0, 1) * (20 - frames)  # a dark rim: a white shape shows on snow
    paint = np.array(COLOURS[colour], np.float32) * np.float32(rng.uniform(0.88, 1.04))
    frames += np.clip(0.5 - edge, 0, 1) * (paint - frames)

    frames = _apply_style(frames, seen["style"], rng.uniform(*((0.45, 0.7) if look == "hard" else (0.6, 1.1))), rng)
    if "flicker" in seen:
        jumps = 0.45 * seen["flicker"] * np.clip(rng.standard_normal(len(frames), np.float32), -2, 2)
        frames *= (1 + jumps)[:, None, None, None]
    if look == "old":
        corners = 1 - 0.45 * np.clip(np.hypot(x, y) / 45, 0, 1)[..., None] ** 2
        frames = (20 + 0.85 * frames) * corners + 5 * rng.standard_normal(frames.shape[:3] + (1,), np.float32)
    return np.clip(frames, 0, 255).astype(np.uint8)


def write_mp4(path, frames: np.ndarray, fps: int, crf: int = 14) -> None:
    """frames (F, H, W, 3) uint8 -> H.264 in mp4, 4:2:0 like nearly every clip in the wild. crf: higher is blockier."""
    import av  # here: only `data` and `measure` write clips
    from av.video.reformatter import VideoReformatter

    scaler = VideoReformatter()  # one for all: each frame's own would start threads of its own, for 64 x 64 pixels
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        # The same bytes in every run: one thread, for the result must not depend on the number of cores, and no
        # macroblock tree. x264's AVX-512 code for it reads memory that nobody has written, unless a frame is a
        # multiple of 8 macroblocks (128 pixels) wide: ours has 4.
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(scaler.reformat(frame, format="yuv420p", threads=1)))
        container.mux(stream.encode())


# ---- 3. `data`: pairs in the CSV formats of the real data sets ----------------------------------------
# Format, pairs, share of ties, largest gap in points, UNSEEN subjects, look, source fps, crf. The shares of ties are
# the real ones: GenAI-Bench 33 %, VideoGen-RewardBench (TA) 26 %; RL data has no word for a tie. Each test set has at
# least 300 decided pairs: at an accuracy of .8 that is a standard error of .023 (with 80 pairs it would be .045).
SPLITS = {
    "train_cold_start": ("cold_start", 360, 0.15, 10, False, "clean", 4, 14),
    "val_cold_start": ("cold_start", 60, 0.15, 10, False, "clean", 4, 14),
    "train_rl": ("rl", 150, 0.0, 10, False, "clean", 4, 14),
    "test_in_domain": ("tabench", 375, 0.20, 10, False, "clean", 4, 14),
    "test_genai_bench": ("genai", 450, 0.33, 10, True, "old", 8, 26),
    "test_videogen_rewardbench": ("videogen", 410, 0.26, 3, False, "hard", 6, 14),
}


TIE = 0.75  # people call a smaller difference "the same"; between points it is 0


def make_pair(rng, tie: bool, max_gap: int, unseen: bool, people=People()):
    """-> one wish and two clips that people call the same if `tie`, else differ by at most `max_gap` for them."""
    while True:
        wish = random_wish(rng, unseen=unseen)
        clips = [random_clip(rng, wish, unseen) | ({"flicker": rng.random()} if people.unspoken else {}) for _ in "ab"]
        a, b = (people.utility(annotate(wish, seen), seen) for seen in clips)
        if any(wish.values()) and (abs(a - b) < TIE) == tie and abs(a - b) <= max_gap:
            return wish, *clips


def _row(kind: str, rng, a: str, b: str, prompt: str, utility, truth: list[dict], fps: int, frames: int) -> dict:
    """One CSV row in the columns and label words of a public format (docs/data.md). a, b: paths; utility of names."""
    def better(names=DIMENSIONS, words=("A", "same", "B")):
        gap = np.subtract(*utility(names))
        return words[1 - int(np.sign(gap) * (abs(gap) >= TIE))]

    if kind == "cold_start":  # the CoTs are sampled from the base model later; 2 % of pairs could not be judged
        label = "invalid" if rng.random() < 0.02 else better()
        return {"videos": str([a, b]), "problem": prompt, "durations": str([frames / fps] * 2), "prompt": prompt,
                "CoT_A": "", "CoT_B": "", "GSB": label}
    if kind == "genai":
        tie = "bothbad_vote" if utility(DIMENSIONS)[0] <= 3 else "tievote"
        return {"prompt": prompt, "left_model": "toy-old-1", "right_model": "toy-old-2", "left_video": a,
                "right_video": b, "vote_type": better(words=("leftvote", tie, "rightvote"))}
    if kind == "videogen":
        looks, motion = better(("subject", "environment", "style")), better(("dynamics", "camera"))
        return {"path_A": a, "path_B": b, "prompt": prompt, "VQ": looks, "MQ": motion, "TA": better(),
                "fps_A": fps, "num_frames_A": frames, "fps_B": fps, "num_frames_B": frames,
                "A_model": "toy-1", "B_model": "toy-2", "Overall": better()}
    words = ("A", "same", "B") if rng.random() < 0.8 else ("Video 1 is better", "same", "Video 2 is better")
    scores = {"video_1_scores": truth[0], "video_2_scores": truth[1], "gsb_result": better(words=words)}
    answer = f"<answer>{json.dumps(scores)}</answer>"
    if kind == "rl":
        return {"videos": str([a, b]), "problem": prompt, "answer": answer}
    return {"video_A": a, "video_B": b, "prompt": prompt, "answer": answer}


def _make_split(job: tuple) -> str:
    """Writes one split's clips and CSV. -> path of the CSV"""
    out, seed, number, split, pairs, seconds, people = job
    kind, _, ties, max_gap, unseen, look, fps, crf = SPLITS[split]
    rng, rows, world = np.random.default_rng([seed, number]), [], []  # a random stream of its own
    for k in range(pairs):
        tie = int((k + 1) * ties) > int(k * ties)  # every so many pairs: the share is exact in a small split too
        wish, *clips = make_pair(rng, tie, max_gap, unseen, people)
        paths = [f"videos/{split}/{k:04d}{side}.mp4" for side in "ab"]
        for path, seen in zip(paths, clips):
            write_mp4(out / path, render_clip(seen, rng, np.arange(seconds * fps) / fps, look=look), fps, crf)
        truth = [annotate(wish, seen) for seen in clips]
        utility = lambda names: [people.utility(v, seen, names) for v, seen in zip(truth, clips)]  # noqa: B023, E731
        known = {"utility": utility(DIMENSIONS)} if people != People() else {}  # else it is the points
        world.append(json.dumps({"wish": wish, "a": clips[0], "b": clips[1], **known}) + "\n")
        rows.append(_row(kind, rng, *paths, prompt_text(wish), utility, truth, fps, seconds * fps))
    (out / f"{split}.truth.jsonl").write_text("".join(world), encoding="utf-8")  # no real CSV tells it; lab/study/
    write_csv(str(out / f"{split}.csv"), list(rows[0]), (row.values() for row in rows))
    return str(out / f"{split}.csv")


def make_data(out, seed=0, sizes: dict | None = None, seconds=4, progress=True, processes=1, people=People()) -> dict:
    """Writes <split>.csv and videos/<split>/<row><a|b>.mp4 under `out`. -> {split: path of its CSV}

    `sizes` overrides the number of pairs of a split; 0 leaves it out. The result does not depend on `processes`.
    world.json says whose world it is: seed and people. InputError: people who could never agree on a pair.
    """
    if not all(0 <= w <= 3 for w in people.weights) or max(people.weights) < 0.5 or not 0 <= people.unspoken <= 20:
        raise InputError("--weights are numbers of 0 to 3, one of them at least .5, and --unspoken is 0 to 20.")
    out, sizes = pathlib.Path(out), {split: settings[1] for split, settings in SPLITS.items()} | (sizes or {})
    jobs = [(out, seed, n, split, sizes[split], seconds, people) for n, split in enumerate(SPLITS) if sizes[split]]
    jobs.sort(key=lambda job: -job[4])  # the largest first
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, end_with_parent) if processes > 1 else ThreadPoolExecutor(1) as pool:
        paths = list(tqdm(pool.map(_make_split, jobs), desc="splits", total=len(jobs), disable=not progress))
    write_json(str(out / "world.json"), {"seed": seed, **people._asdict()})
    written = {job[3]: path for job, path in zip(jobs, paths)}
    return {split: written[split] for split in SPLITS if split in written}
