"""What a CoT says: text -> verdicts and stated score. The only parser of model output; nothing is ever evaluated.

    <think> ... </think>
    <answer>{"dimensional_scores": {"subject": "2", ...}, "overall_score": 3.50}</answer>
"""

import ast
import json
import math
import re

DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")  # what a CoT gives a verdict on
VERDICTS = ("0", "1", "2", "N/A")  # missing or wrong, partly, as asked, not asked for

# One <think> block, then one <answer> block, nothing else. `(?!...)` keeps a block from holding its own tags.
LAYOUT = re.compile(
    r"\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*", flags=re.DOTALL
)
FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", flags=re.DOTALL)  # Qwen likes to put JSON into a Markdown fence


def parse_literal(text: str):
    """Text that holds JSON or a Python literal -> the object. Never evaluated; raises ValueError on anything else."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"neither JSON nor a Python literal: {text[:60]!r}") from error


def extract_answer(text: str) -> dict | None:
    """The JSON object inside the last `<answer>...</answer>` of a text, fenced or not; None when there is none."""
    match = re.search(r".*<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if match is None:
        return None
    inside = match.group(1).strip()
    fenced = FENCE.fullmatch(inside)
    try:
        value = parse_literal(fenced.group(1) if fenced else inside)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_verdicts(text: str) -> dict[str, str]:
    """{dimension: verdict} of the answer's `dimensional_scores`, without what is no dimension or no verdict.

    2 and "2" are the same verdict, "n/a" is "N/A"; `true` is none, though Python calls it equal to 1.
    """
    scores = (extract_answer(text) or {}).get("dimensional_scores")
    if not isinstance(scores, dict):
        return {}
    verdicts = {dimension: str(scores[dimension]).strip().upper() for dimension in DIMENSIONS if dimension in scores}
    return {dimension: verdict for dimension, verdict in verdicts.items() if verdict in VERDICTS}


def well_formed(text: str) -> bool:
    """`<think>...</think>`, then `<answer>` with JSON that has a verdict on each dimension, and no more."""
    return LAYOUT.fullmatch(text) is not None and len(read_verdicts(text)) == len(DIMENSIONS)


def stated_score(text: str) -> float | None:
    """The answer's `overall_score`, 1 to 5, also where it is written as a string; None if there is no such number."""
    value = (extract_answer(text) or {}).get("overall_score")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        score = float(value)
    except ValueError:
        return None
    return score if math.isfinite(score) else None


def overall_score(text: str) -> float:
    """The score that a CoT's answer states itself, 1 to 5: what a GENERATIVE reward model would return (Fig. 1a).

    A malformed answer gets 3, the middle. Few different values, hence many exact ties: where the head tells two videos
    apart by a hair, the text says 3.50 twice, and an equal score is wrong wherever people decided.
    """
    score = stated_score(text)
    return 3.0 if score is None else score
