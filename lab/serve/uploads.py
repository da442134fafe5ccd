"""What a client sends -> prompts and sampled frames. For lab/serve, which trusts none of it.

Whatever is wrong is an InputError: a clear sentence for the client. The size of a request is limited before this.
"""

import base64
import binascii
import io
import json
import math
import tempfile

import numpy as np
import torch
from PIL import Image

import data
from plumbing.decoder import LIMIT
from plumbing.formats import tidy_prompt
from plumbing.settings import InputError
from plumbing.video import MAX_SIDE, open_clip, resize


# ---------------------------------------------------------------------------------------------------------------
# 1. From an upload to frames
# ---------------------------------------------------------------------------------------------------------------
def is_known_container(raw: bytes) -> bool:
    """mp4 and mov, webm and mkv, avi: by their first bytes, the names are the client's."""
    return raw[4:8] == b"ftyp" or raw[:4] == b"\x1aE\xdf\xa3" or (raw[:4] == b"RIFF" and raw[8:12] == b"AVI ")


def decode_base64(text) -> bytes:
    """Strict: what is no base64 is an InputError, not skipped over."""
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise InputError("the video is no base64 text.") from None


def open_file(raw: bytes, fps: float, max_pixels: int, max_seconds: float, limit: float = LIMIT) -> data.Video:
    """A video file's bytes -> sampled frames, by way of a temporary file. Opened and decoded within `limit` s each.

    InputError: no video, a broken one, or longer than max_seconds.
    """
    if not is_known_container(raw):
        raise InputError("the video is empty or no mp4, mov, webm, mkv or avi file.")
    with tempfile.NamedTemporaryFile(prefix="descore-", suffix=".mp4") as file:
        file.write(raw)
        file.flush()
        try:
            seconds = open_clip(file.name, limit).seconds  # before the memory is taken
            if seconds > max_seconds:
                raise InputError(f"the video has {seconds:.1f} s; at most {max_seconds:g} are read.")
            return data.sample_frames(file.name, fps, max_pixels, limit=limit)
        except InputError as error:
            raise InputError(str(error).replace(file.name, "the video")) from error


def open_images(images: list, source_fps: float, fps: float, max_pixels: int, max_seconds: float) -> data.Video:
    """All frames of a clip, each a PNG or JPEG in base64 -> sampled frames. Only the sampled ones are decoded.

    InputError: no image, another size, or longer than max_seconds.
    """
    if not images or len(images) > max_seconds * source_fps:
        raise InputError(f"{len(images)} frames at {source_fps:g} fps: 1 frame to {max_seconds:g} s are read.")
    indices, frames, size = data.sample_indices(len(images), source_fps, fps), [], None
    for index in indices:
        try:
            image = Image.open(io.BytesIO(decode_base64(images[index])), formats=("PNG", "JPEG"))
            if max(image.size) > MAX_SIDE or (size or image.size) != image.size:
                raise InputError(f"frame {index} has {image.size} pixels: one size for all, at most {MAX_SIDE} a side.")
            size = image.size
            if image.mode.startswith(("I", "F")):  # 16 bits: Pillow would cut them off at 255, which is white
                raise InputError(f"frame {index} has mode {image.mode}; send 8 bits a channel.")
            pixels = torch.from_numpy(np.array(image.convert("RGB")))[None]
        except InputError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow, on broken files
            raise InputError(f"frame {index} is no PNG or JPEG image.") from error
        frames.append(resize(pixels, data.target_size(size[1], size[0], max_pixels))[0])
    steps = data.sample_steps(len(images) / source_fps, fps)
    return data.Video(np.stack(frames), fps, steps[-1] + 1, tuple(steps))


# ---------------------------------------------------------------------------------------------------------------
# 2. From a request to videos and prompts
# ---------------------------------------------------------------------------------------------------------------
def read_json(body: bytes) -> dict:
    """The JSON form -> the same fields as the multipart form's. InputError: no JSON object."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the body is no JSON; or send a multipart form.") from None
    if not isinstance(fields, dict):
        raise InputError('the body must be an object: {"prompt": ..., "video": ...}.')
    prompts, videos = fields.get("prompt"), fields.get("video")
    if isinstance(prompts, str):  # one video: a file's text, or the list of its frames
        prompts, videos = [prompts], [videos]
    return {**fields, "prompt": prompts, "video": videos}


def read_form(form) -> dict:
    """The multipart form, as aiohttp read it: `prompt` and the files `video`, as many of both.

    InputError: `video` is no file.
    """
    files = form.getall("video", [])
    if any(isinstance(file, str) for file in files):
        raise InputError("`video` must be sent as a file, with a file name.")
    videos = []
    for file in files:
        with file.file:  # aiohttp's temporary file, gone when closed
            videos.append(file.file.read())
    texts = {name: value for name, value in form.items() if isinstance(value, str)}
    return {**texts, "prompt": form.getall("prompt", []), "video": videos}


def require_text(prompt: str) -> None:
    """InputError for an empty prompt: seen here, before its video is decoded."""
    if not prompt.strip():
        raise InputError("the prompt is empty; a reward needs the prompt that the video was made from.")


def check_fields(fields: dict, max_videos: int, source_fps: float) -> tuple[list[str], list, float]:
    """-> prompts, uploads, frames per second of those sent as images (`source_fps` where the request has no `fps`).

    InputError: a field is missing, of another type, or too many.
    """
    prompts, videos = fields["prompt"], fields["video"]
    if not isinstance(prompts, list) or not isinstance(videos, list) or not prompts:
        raise InputError("`prompt` and `video` are needed: one text and one video, or lists of them.")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("each prompt must be a text.")
    if len(prompts) != len(videos) or len(prompts) > max_videos:
        raise InputError(f"{len(prompts)} prompts, {len(videos)} videos: as many of both, and at most {max_videos}.")
    try:
        told = fields.get("fps")
        fps = source_fps if told is None else math.nan if isinstance(told, bool) else float(told)
    except (TypeError, ValueError, OverflowError):  # OverflowError: an integer of 400 digits
        fps = math.nan
    if not 0 < fps <= 1000:
        raise InputError("`fps` must be a number of frames a second, above 0 and at most 1000.")
    return list(map(tidy_prompt, prompts)), videos, fps
