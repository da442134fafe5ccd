"""UniRL's reward service, spoken by our server: `POST /score` and what `GET /health` tells (unirl.md).

The form: github.com/Tencent-Hunyuan/UniRL, unirl/reward/remote.py at 0e713d6 (`RemoteRewardBackend`, what is sent and
how the reply is read) and unirl-reward-service/README.md at 03593c4. A clip without a reward has an entry in `errors`
and none in `results`; from that UniRL makes a failure that stops the step (unirl/reward/service.py at 0e713d6).
"""

import json

from lab.clients.over_http import warn_of_cut
from plumbing.settings import InputError

NAME = "descore"  # in `required_rewards`


def fields_of(body: bytes) -> dict:
    """A request -> the fields of the server's own form. InputError: another form, another reward, no video, a path."""
    try:
        rows = json.loads(body)["requests"]
        turns = [row["history"][-1] for row in rows]  # only the last turn is scored
        wanted = {name for row in rows for name in row["required_rewards"]}
        prompts, videos = [turn["text"] for turn in turns], [turn.get("video_b64") for turn in turns]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise InputError('the body must be {"requests": [{"history": [{"text": ..., "video_b64": ...}], '
                         f'"required_rewards": ["{NAME}"]}}]}}.') from None
    if wanted != {NAME}:
        raise InputError(f"required_rewards {sorted(map(str, wanted))}: {NAME} is served, and nothing else.")
    if not all(isinstance(video, str) for video in videos):
        raise InputError("each last turn needs `video_b64`, an mp4 in base64; images are not scored, and no path of a "
                         "client is opened.")
    return {"prompt": prompts, "video": videos}


def reply_of(answer: dict) -> dict:
    """Our answer -> UniRL's. An answer that is about the whole request stays as it is.

    UniRL's form has no place for `ended`: the first that were cut off are a warning on the server's screen.
    """
    if "results" not in answer:
        return answer
    warn_of_cut(answer, "POST /score")
    results = [{} if error else {NAME: {NAME: reward}} for reward, error in zip(answer["results"], answer["errors"])]
    return {"protocol_version": "1", "results": results,
            "errors": [{NAME: error} if error else {} for error in answer["errors"]]}
