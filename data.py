"""From a CSV row to what the model reads: pairs, frames, the prompt, token ids.

    CSV row -> PreferencePair -> Video (PyAV, 2 fps) -> prompt ids + pixel patches (the Hugging Face processor)

    python -m toy.look --show 3 --data pairs.csv --model Qwen/Qwen3-VL-8B-Instruct     prints examples, draws frames

Shapes: F frames, H x W pixels, P prompt tokens (video tokens included), T CoT tokens.
"""

import dataclasses
import numbers
import os
import re
import sys
from typing import NamedTuple

import numpy as np
import torch

from plumbing.decoder import CORES, LIMIT, allow_many_files, detach
from plumbing.formats import read_records, tidy_prompt
from plumbing.settings import InputError
from plumbing.video import FrameCache, from_memory, open_clip, resize


# ---- 1. Preference pairs -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """One human comparison: two videos made from the same prompt."""

    video_a: str  # path, absolute or relative to the working directory
    video_b: str
    prompt: str  # the text both videos were generated from. Untrusted: it is always tokenised as plain text
    label: int  # +1 A is better, -1 B is better, 0 the same
    cot_a: str | None = None  # a chain of thought collected beforehand (stage 1)
    cot_b: str | None = None
    cot_a_tokens: list[int] | None = None  # the same CoT as the ids that were sampled; None: the text is encoded
    cot_b_tokens: list[int] | None = None
    annotation_a: dict | None = None  # {dimension: "0" | "1" | "2" | "N/A"}, the truth for R_qual (stage 2)
    annotation_b: dict | None = None
    line: int = 0  # where it stands in the CSV, for messages: the header is line 1, a cell of many lines counts once
    extra: dict = dataclasses.field(default_factory=dict)  # other columns: names of the models that made the videos

    @property
    def videos(self) -> tuple[str, str]:
        """Paths of A and B."""
        return self.video_a, self.video_b

    @property
    def cots(self) -> tuple[str | None, str | None]:
        """Texts of A's and B's CoT, None without."""
        return self.cot_a, self.cot_b

    @property
    def masked(self) -> bool:
        """Without CoTs, hidden or never there. One that was sampled as nothing but its end has a token, and no text."""
        return not ((self.cot_a or self.cot_a_tokens) and (self.cot_b or self.cot_b_tokens))

    def without_cots(self) -> "PreferencePair":
        """The pair, its CoTs hidden."""
        return dataclasses.replace(self, cot_a=None, cot_b=None, cot_a_tokens=None, cot_b_tokens=None)

    def cot_ids(self, tokenizer) -> tuple[list[int], list[int]]:
        """Both CoTs as token ids, by `encode_cot`. InputError names the line."""
        try:
            ids_a = encode_cot(tokenizer, self.cot_a, self.cot_a_tokens)
            return ids_a, encode_cot(tokenizer, self.cot_b, self.cot_b_tokens)
        except InputError as error:
            raise InputError(f"line {self.line}: {error}") from error


def read_pairs(csv_path: str, dimension: str = "TA", video_root: str | None = None) -> list[PreferencePair]:
    """The pairs of a CSV in file order; its format is recognised by the columns (docs/data.md). UTF-8.

    dimension: the label column where there are several: TA (text alignment), VQ, MQ or Overall. video_root: where
    relative video paths start; default: the CSV's folder. Rows labelled `invalid`, or not at all, are left out and
    counted on stderr.
    InputError: no such file, no known format, missing column, unknown label, empty prompt (file and line named).
    """
    root = video_root if video_root is not None else os.path.dirname(csv_path)
    records = list(read_records(csv_path, dimension, root))
    pairs = [PreferencePair(**record) for record in records if record is not None]
    if invalid := len(records) - len(pairs):
        print(f"{csv_path}: left out {invalid} lines without a label, or labelled invalid", file=sys.stderr)
    if not pairs:
        raise InputError(f"{csv_path}: holds no usable pair, only a header or rows without a label.")
    return pairs


# ---- 2. Frames: those on screen at 0, 1/fps, 2/fps, ... seconds, and the times that the model is told --------
SIDE = 32  # frame sides are multiples of patch (16) x merge (2): one video token covers 32 x 32 pixels x 2 frames
MIN_PIXELS = 3136  # 56 x 56 a frame at least (paper, stage 2; here in both stages): smaller clips are enlarged
MAX_FRAMES = 512  # 4 minutes at 2 fps; a longer clip is refused, not silently cut


@dataclasses.dataclass(frozen=True)
class Video:
    """Sampled frames and their times. source_fps is not the file's own rate: sample_frames counts in steps of 1/fps."""

    frames: np.ndarray  # (F, H, W, 3) uint8, RGB; F is even and >= 2; H and W are multiples of 32
    source_fps: float  # the model is told the times frame_indices / source_fps: a wrong value silently shifts them all
    total_num_frames: int  # steps of 1 / source_fps in the clip
    frame_indices: tuple[int, ...]  # the step of each of the F frames

    def metadata(self) -> dict:
        """What the Hugging Face processor and vLLM need to know, as a fresh dict (they edit the list in place)."""
        return {"fps": self.source_fps, "total_num_frames": self.total_num_frames,
                "frames_indices": list(self.frame_indices), "duration": self.total_num_frames / self.source_fps}


def target_size(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Frame size for the model: multiples of 32, about the same shape, MIN_PIXELS to `max_pixels`.

    target_size(752, 1360, 448 * 448) == (320, 608): 194,560 of at most 200,704 pixels, 190 video tokens;
    target_size(32, 32, 448 * 448) == (64, 64). Between the bounds a clip keeps its size, up to rounding.
    """
    scale = min(1.0, (max_pixels / (height * width)) ** 0.5)
    sides = [max(SIDE, round(side * scale / SIDE) * SIDE) for side in (height, width)]
    if sides[0] * sides[1] < MIN_PIXELS:  # enlarged, and rounded up, as Qwen's smart_resize does
        scale = (MIN_PIXELS / (height * width)) ** 0.5
        sides = [int(np.ceil(side * scale / SIDE)) * SIDE for side in (height, width)]
    while sides[0] * sides[1] > max_pixels and max(sides) > SIDE:  # rounding up may have crossed the budget
        sides[sides.index(max(sides))] -= SIDE
    return sides[0], sides[1]


def sample_steps(seconds: float, fps: float) -> list[int]:
    """0, 1, 2, ...: the frames to show are those on screen at k / fps seconds, as long as the clip lasts.

    The last is repeated to make an even number >= 2: two frames form one temporal patch.
    Example: sample_steps(1.5, 2.0) == [0, 1, 2, 2]. InputError beyond MAX_FRAMES.
    """
    if seconds * fps > MAX_FRAMES:
        raise InputError(f"{seconds:.6g} s at {fps} fps is over {MAX_FRAMES} frames; cut it or lower --fps.")
    steps = list(range(max(1, int(np.ceil(seconds * fps - 1e-6)))))
    return steps + steps[-1:] * (len(steps) % 2)


def sample_indices(total_num_frames: int, source_fps: float, fps: float) -> list[int]:
    """sample_steps as frame numbers of a clip of constant rate. sample_indices(12, 8.0, 2.0) == [0, 4, 8, 8]."""
    steps = sample_steps(total_num_frames / source_fps, fps)
    return [min(int(k * source_fps / fps + 1e-6), total_num_frames - 1) for k in steps]  # the frame on screen


def sample_frames(path: str, fps: float = 2.0, max_pixels: int = 448 * 448, decode: bool = True, limit=LIMIT) -> Video:
    """Shows the model what a player has on screen at 0, 1/fps, 2/fps, ... s, decoded straight to the model's size.

    Paper: 2 fps, at most 448 x 448 pixels in stage 1. decode False: a probe; all frames are black and take no memory.
    Raises InputError for a file that is missing, empty, truncated, not a video, or not decoded within `limit` seconds.
    """
    clip = open_clip(path, limit)
    try:
        steps = sample_steps(clip.seconds - 4 * clip.slack, fps)  # stamps are rounded, and so is the end
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    size = target_size(clip.height, clip.width, max_pixels)
    frames = np.broadcast_to(np.uint8(0), (len(steps), *size, 3))
    if decode:
        frames, _ = clip.frames([k / fps for k in steps], size)
    return Video(frames, fps, steps[-1] + 1, tuple(steps))


def to_video(video, fps: float, max_pixels: int, source_fps: float | None = None) -> Video:
    """A path, a Video, or frames in memory -> Video.

    Frames: (F, H, W, 3), uint8 or float in [0, 1], or a list of images: all of the clip, at `source_fps`; they are
    sampled and resized as a file would be. InputError: no source_fps; another shape or range; a file as above.
    """
    if isinstance(video, Video):
        return video
    if isinstance(video, (str, os.PathLike)):
        return sample_frames(os.fspath(video), fps, max_pixels)
    frames = from_memory(video)
    if not isinstance(source_fps, numbers.Real) or not 0 < source_fps <= 1000:
        raise InputError("frames in memory need source_fps, the frames per second they were made at: a number to 1000.")
    steps = sample_steps(len(frames) / source_fps, fps)
    sampled = frames[sample_indices(len(frames), source_fps, fps)]
    return Video(resize(sampled, target_size(*frames.shape[1:3], max_pixels)), fps, steps[-1] + 1, tuple(steps))


# ---- 3. The conversation, everywhere the same: [user: video, prompt, instruction][assistant: CoT][query] ------
INSTRUCTION_BEFORE = "The video above was generated from this text prompt:\n"
CRITERIA = """
Judge how well the video follows the prompt, in five dimensions:
- subject: the people, animals and things, their number, looks and parts
- dynamics: what moves or changes, how and in which order
- camera: shot size, angle and camera movement
- environment: place, background, time of day, weather and light
- style: medium, look and mood
A verdict is 2 (as asked), 1 (partly), 0 (missing or wrong) or N/A (the prompt does not ask for it)."""
INSTRUCTION_AFTER = CRITERIA + """
Think first, carefully and in detail: for each dimension what the prompt asks for, what the video shows, \
and the verdict.
Then answer with the verdicts and an overall score from 1.00 (ignores the prompt) to 5.00 (does all it asks). Layout:
<think>
subject: asked ...; shown ...; verdict 2
...
</think>
<answer>{"dimensional_scores": {"subject": "2", "dynamics": "1", "camera": "N/A", "environment": "2", "style": "0"}, \
"overall_score": 3.50}</answer>"""
THINK = ("<think>", "</think>")  # one added token each; the only ones, with EOS, that belong into a CoT
_PLACE = "[[the user's prompt goes here]]"


def build_conversation(prompt: str, cot: str | None = None) -> list[dict]:
    """The chat messages, in Hugging Face form. `cot` adds the assistant's turn."""
    text = INSTRUCTION_BEFORE + prompt + INSTRUCTION_AFTER
    turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    if cot is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": cot}]})
    return turns


def encode_text(tokenizer, text: str, keep: tuple[str, ...] = (), before: str = "", after: str = "") -> list[int]:
    """Ids of before + text + after. Control tokens may come from `before` and `after`, never from `text`.

    A user may type `<|im_end|>` or `<|video_pad|>`; as control tokens they would end the turn or pretend to be video.
    We cut inside each spelling that touches `text` ('<' | '|im_end|>'), encode the pieces, and join the ids: none is a
    control token, and they decode to the same text (Qwen's tokenizer writes "e" + accent as one letter, NFC). `keep`
    names added tokens that may stay (`<think>` in a CoT). Why not encode the three texts apart: a token may reach over
    a seam; Qwen's "." + newline is one token (624), and the model has read it so after almost every sentence.
    InputError: half a character (a lone surrogate), which no tokenizer can encode; a token that no cut keeps apart.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the text {ascii(text[:60])} holds half a character (a lone surrogate); remove it.") from None
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.content not in keep}
    spellings = "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True))
    whole, begin, end = before + text + after, len(before), len(before) + len(text)
    matches = re.finditer(f"(?=({spellings}))", whole) if added else []  # (?=...): those that overlap, too
    cuts = [m.start() + 1 for m in matches if m.start() < end and m.end(1) > begin]

    def encode(parts):
        return [i for part in parts if part for i in tokenizer(part, add_special_tokens=False)["input_ids"]]

    ids, controls = encode(whole[i:j] for i, j in zip([0, *cuts], [*cuts, len(whole)])), set(added.values())
    if [i for i in ids if i in controls] != [i for i in encode((before, after)) if i in controls]:
        raise InputError(f"the text {text[:60]!r} spells a control token that cannot be kept apart; remove it.")
    return ids


def encode_prompt(processor, video: Video, prompt: str) -> dict[str, torch.Tensor]:
    """All before the CoT: the user's turn with the video in it, the opening of the assistant's. InputError: no prompt.

    The video stands in the text as Qwen3-VL was published with (transformers 4.57): for each two frames
        <0.3 seconds><|vision_start|><|video_pad|> ... <|video_pad|><|vision_end|>
    and nothing around them. Newer releases, and vLLM, replace the pad alone of what the chat template writes,
    <|vision_start|><|video_pad|><|vision_end|>, so an extra start and end stay around all blocks, which the model has
    never seen (docs/differences.md, row 24). With a bare pad in the text both write what 4.57 wrote, id for id.

    Returns:
        input_ids (P,) int64; mm_token_type_ids (P,), 2 at video positions, else 0;
        pixel_values_videos (N, 1536) float32 patches; video_grid_thw (1, 3) patches along time, height, width;
        and for an engine that encodes videos itself: video, and short_ids, the ids with ONE <|video_pad|>.
    """
    prompt = tidy_prompt(prompt)
    if not prompt:
        raise InputError("the prompt is empty; a reward needs the prompt the video was made from (--prompt).")
    template = processor.apply_chat_template(build_conversation(_PLACE), add_generation_prompt=True, tokenize=False)
    pad = processor.video_token
    template = template.replace(processor.vision_start_token + pad + processor.vision_end_token, pad)
    head, tail = template.split(_PLACE)
    head, between = head.split(pad)
    # The processor replaces the pad by "<0.3 seconds>" and a block of pads per two frames. We sampled and resized
    # already, so it must do neither: with its own defaults it assumes 24 fps and upsizes small clips. Its cap of pixels
    # belongs to its resizing.
    inputs = processor(
        text=[head + pad], videos=[torch.from_numpy(video.frames).permute(0, 3, 1, 2)],
        video_metadata=[video.metadata()], do_sample_frames=False, do_resize=False, cap_pixels_per_frame=False,
        return_tensors="pt",
    )
    after_ids = encode_text(processor.tokenizer, prompt, before=between, after=tail)
    before = inputs["input_ids"][0]
    after = torch.tensor(after_ids, dtype=before.dtype)
    return {
        "input_ids": torch.cat([before, after]),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"][0], torch.zeros_like(after)]),
        "pixel_values_videos": inputs["pixel_values_videos"], "video_grid_thw": inputs["video_grid_thw"],
        "video": video,
        "short_ids": processor.tokenizer(head + pad, add_special_tokens=False)["input_ids"] + after_ids,
    }


def encode_cot(tokenizer, cot: str | None, tokens: list[int] | None = None) -> list[int]:
    """A CoT's ids, ended by EOS as a sampled one is. None or "" (masked, or no thinking): no ids at all, no EOS.

    tokens: the ids it was sampled as, taken as they are: encoding the text may give others, and would put an EOS behind
    a CoT that was cut off. InputError unless they spell the text.
    Encoded apart from the prompt: a sampled CoT too begins with a token of its own.
    """
    if tokens:
        spelled = tokens[:-1] if tokens[-1] == tokenizer.eos_token_id else tokens
        if not 0 <= min(tokens) <= max(tokens) < len(tokenizer) or tokenizer.decode(spelled) != (cot or ""):
            raise InputError("the CoT's tokens do not spell its text with this model's tokenizer; take the columns "
                             "CoT_A_tokens and CoT_B_tokens out of the CSV, and the texts are encoded anew.")
        return tokens
    if not cot:
        return []
    cot = cot.removesuffix(tokenizer.eos_token)
    return encode_text(tokenizer, cot, keep=THINK) + [tokenizer.eos_token_id]


def sequence_lengths(processor, pair: PreferencePair, fps: float, max_pixels: int) -> list[int]:
    """Tokens of the pair's two sequences, prefix + CoT + query, without decoding the videos.

    A patch of 32 x 32 stands for each frame; each two frames of H x W then have H W / 1024 - 1 video tokens more.
    """
    lengths = []
    for path, cot in zip(pair.videos, pair.cot_ids(processor.tokenizer)):
        video = sample_frames(path, fps, max_pixels, decode=False)
        count, height, width, _ = video.frames.shape
        small = dataclasses.replace(video, frames=video.frames[:, :SIDE, :SIDE].copy())
        prefix = len(encode_prompt(processor, small, pair.prompt)["input_ids"])
        lengths.append(prefix + count // 2 * (height * width // SIDE**2 - 1) + len(cot) + 1)
    return lengths


# ---- 4. A stream of encoded pairs ----------------------------------------------------------------------------
class Drawn(NamedTuple):
    """What a loop draws: a pair, and its two videos encoded with its prompt."""

    pair: PreferencePair
    prefixes: list[dict]  # [2], from `encode_prompt`: of video A, of B


class EncodedPairs(torch.utils.data.Dataset):
    """Index -> Drawn; decoded and encoded on demand, in loader workers.

    An InputError is returned, and raised by `take`: a DataLoader wraps what a worker raises in its own traceback text.
    """

    def __init__(self, pairs, processor, fps=2.0, max_pixels=448 * 448, frame_cache: str | None = None, cache_gb=50.0):
        self.pairs, self.processor, self.fps, self.max_pixels = pairs, processor, fps, max_pixels
        self.cache = FrameCache(frame_cache, cache_gb) if frame_cache else None

    def sample(self, path: str) -> Video:
        """sample_frames, through the frame cache if there is one."""
        if self.cache is None:
            return sample_frames(path, self.fps, self.max_pixels)
        return Video(**self.cache.sample(path, self.fps, self.max_pixels, sample_frames))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        pair = self.pairs[index]
        try:
            videos = [self.sample(path) for path in pair.videos]
            return Drawn(pair, [encode_prompt(self.processor, video, pair.prompt) for video in videos])
        except InputError as error:
            return InputError(f"line {pair.line}: {error} (--skip-bad-videos leaves it out)")


def take(dataset: torch.utils.data.Dataset, order: list[int], workers: int | None = 0):
    """Yields dataset[i] for i in `order`, read ahead by processes (0: none; None: by the cores). Raises InputError."""
    workers = min(8, max(2, CORES - 2)) if workers is None else workers  # two cores for the trainer and its logs
    if workers:
        allow_many_files()  # each tensor that a worker hands over keeps one open, while it lives
    # A loader draws a seed when it starts: from a generator of its own, or a resumed run has other dropout masks.
    own = torch.Generator()
    loader = torch.utils.data.DataLoader(
        dataset, sampler=order, batch_size=None, num_workers=workers, generator=own, worker_init_fn=detach)
    for item in loader:
        if isinstance(item, InputError):
            raise item
        yield item
