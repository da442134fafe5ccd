"""One question to an annotator: a video and its prompt -> five verdicts, or the reason why there are none.

`s` is annotate.py's Settings: model, base_url, send, fps, max_pixels, max_answer_tokens, timeout, retries.
"""

import base64
import dataclasses
import hashlib
import io
import json
import os
import time

import data
from plumbing.settings import InputError, first_line
from plumbing.video import VERSION
from rules import DIMENSIONS, VERDICTS

SCHEMA = {
    "type": "object",
    "properties": {dimension: {"type": "string", "enum": list(VERDICTS)} for dimension in DIMENSIONS},
    "required": list(DIMENSIONS),
    "additionalProperties": False,
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A video and its prompt. key names all that decides the answer: it is what a second run looks up."""

    video: str
    prompt: str
    key: str


def text_of(prompt: str) -> str:
    """What the annotator reads: the model's own words (data.py), but for the layout of the answer."""
    return data.INSTRUCTION_BEFORE + prompt + data.CRITERIA + "\nAnswer with the five verdicts as JSON, nothing else."


def make_question(video: str, prompt: str, s) -> Question:
    """Hashes the video's bytes, so that an edited clip is asked anew and a moved one is not. OSError: not readable."""
    with open(video, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    frames = [s.fps, s.max_pixels, VERSION] if s.send == "frames" else "the server's own"
    parts = json.dumps([content, text_of(prompt), SCHEMA, s.model, frames])
    return Question(video, prompt, hashlib.sha256(parts.encode()).hexdigest())


def make_message(question: Question, s) -> list[dict]:
    """The user's turn: the video, or its frames with their times, then the text."""
    if s.send == "video":
        with open(question.video, "rb") as file:
            content = base64.b64encode(file.read()).decode()
        parts = [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{content}"}}]
    else:
        from PIL import Image

        parts, video = [], data.sample_frames(question.video, s.fps, s.max_pixels)
        for frame, index in zip(video.frames, video.frame_indices):
            picture = io.BytesIO()
            Image.fromarray(frame).save(picture, "JPEG", quality=95)
            url = f"data:image/jpeg;base64,{base64.b64encode(picture.getvalue()).decode()}"
            parts += [{"type": "text", "text": f"<{index / video.source_fps:.1f} seconds>"},
                      {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text_of(question.prompt)}]}]


def read_reply(choice) -> dict[str, str]:
    """The five verdicts of a reply. ValueError with the reason for anything else: half an answer is no answer."""
    if choice.finish_reason != "stop":
        raise ValueError(f"finish_reason is {choice.finish_reason!r}, not 'stop'")
    content = getattr(choice.message, "content", None)  # some endpoints send no message at all
    if not content:
        raise ValueError("empty answer or refusal")
    try:
        verdicts = json.loads(content)
    except ValueError:
        raise ValueError("answer is not JSON") from None
    if not isinstance(verdicts, dict) or set(verdicts) != set(DIMENSIONS):
        raise ValueError("answer has other keys than the five dimensions")
    if not all(isinstance(verdict, str) and verdict in VERDICTS for verdict in verdicts.values()):
        raise ValueError("answer has an unknown verdict")
    return {dimension: verdicts[dimension] for dimension in DIMENSIONS}


def open_client(s):
    """The client of the endpoint; it repeats what is worth repeating, and waits as Retry-After says.

    InputError: openai is not installed.
    """
    try:
        import openai
    except ImportError:
        raise InputError("asking an annotator needs openai: pip install -r requirements-road.txt.") from None
    key = os.environ.get("OPENAI_API_KEY") or "none"  # a local vLLM needs no key, the client needs some text
    return openai.OpenAI(base_url=s.base_url, api_key=key, max_retries=s.retries, timeout=s.timeout)


def ask(client, question: Question, s) -> dict:
    """One request -> the record for OUT.jsonl, with `verdicts` or with `error`. The client repeats 429 and 5xx."""
    import openai

    start = time.time()
    record = {"key": question.key, "video": question.video, "prompt": question.prompt, "model": s.model}
    form = {"type": "json_schema", "json_schema": {"name": "verdicts", "schema": SCHEMA, "strict": True}}
    try:
        reply = client.chat.completions.create(
            model=s.model, messages=make_message(question, s), response_format=form, temperature=0,
            max_completion_tokens=s.max_answer_tokens,
        )
        usage = getattr(reply, "usage", None)
        if usage:
            record["usage"] = {"prompt": usage.prompt_tokens or 0, "answer": usage.completion_tokens or 0}
        if not getattr(reply, "choices", None):  # the client hands a page of HTML back as a str
            raise ValueError("reply has no choices: is --base-url an OpenAI-compatible endpoint, with /v1?")
        record["verdicts"] = read_reply(reply.choices[0])
    # ValueError: also a reply that is no JSON; the last two: one without the fields that every reply has
    except (openai.OpenAIError, InputError, ValueError, OSError, AttributeError, TypeError) as error:
        record["error"] = first_line(error)
    return record | {"seconds": round(time.time() - start, 2)}
