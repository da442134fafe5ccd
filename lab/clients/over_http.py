"""The reward server (lab/serve) from a trainer's environment, by Python's own library alone. Made to be copied there.

The server's address and token: DESCORE_URL and DESCORE_TOKEN in the environment, or the arguments.
"""

import base64
import json
import os
import urllib.error
import urllib.request
import warnings


def rewards_of(videos, prompts, url=None, token=None, timeout=600.0, **more) -> list[float]:
    """Videos and their prompts -> rewards, a float each.

    videos: bytes of mp4 files, or lists of all frames of a clip, each the bytes of a PNG; more: `fps` of such frames.
    RuntimeError with the server's sentences if any of them failed: none gets a number in place of its reward, since a 0
    would be the best or the worst of its group. OSError: no server there. A CoT that was cut off: a warning.
    """
    url = url or os.environ.get("DESCORE_URL", "http://127.0.0.1:8000")
    token = token or os.environ.get("DESCORE_TOKEN", "")
    body = json.dumps({"prompt": list(prompts), "video": [as_text(video) for video in videos], **more}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/compute", body, headers)
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:  # about the whole request: its size, its form, the token, the time
        raise RuntimeError(f"{url}: {error.code} {error.read().decode(errors='replace')[:500]}") from error
    if answer.get("error"):
        failed = [f"{k}: {told}" for k, told in enumerate(answer["errors"]) if told]
        raise RuntimeError(f"{url}: {len(failed)} of {len(answer['errors'])} clips have no reward; {'; '.join(failed)}")
    warn_of_cut(answer, url)
    return answer["results"]


def warn_of_cut(answer: dict, where: str) -> None:
    """Says how many clips of the server's answer have a CoT that was cut off: a number alone does not show it."""
    if cut := answer.get("ended", []).count(False):
        warnings.warn(f"{where}: {cut} of {len(answer['ended'])} clips have a CoT that was cut off, and their rewards "
                      "may be far off; raise the server's --max-new-tokens.", stacklevel=3)


def as_text(video) -> str | list[str]:
    """bytes, or a list of bytes -> base64."""
    return base64.b64encode(video).decode() if isinstance(video, bytes) else [as_text(frame) for frame in video]
