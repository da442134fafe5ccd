"""The rollout reward of stage 2, by rules only: what a CoT earns. Plain functions of text and numbers, no model.

    R = 0.7 R_qual + 0.1 R_fmt + 0.2 R_len                    (not numbered here)

    R_qual in [0, 1]   right verdicts / annotated dimensions
    R_fmt  in {0, 1}   `<think>...</think>`, then an `<answer>` with JSON verdicts on all dimensions
    R_len  in [0, 1]   0 up to 500 tokens, 1 from 2,000, linear between

Rules can be checked by hand and cannot be gamed, as a reward model could. The head's score never enters: thinking and
scoring have an objective each (grpo.py).
"""

import ast
import dataclasses
import json
import re
import warnings

# ---- 1. What a CoT says: text -> verdicts and stated score. Nothing is ever evaluated. -----------------------
DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")  # what a CoT gives a verdict on
VERDICTS = ("0", "1", "2", "N/A")  # missing or wrong, partly, as asked, not asked for

# One <think> block, then one <answer> block, nothing else. `(?!...)` keeps a block from holding its own tags.
LAYOUT = re.compile(
    r"\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*", flags=re.DOTALL
)
FENCE = "```"  # Qwen likes to put JSON into a Markdown fence


def parse_literal(text: str):
    """Text that holds JSON or a Python literal -> the object. Never evaluated; raises ValueError on anything else."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        try:
            with warnings.catch_warnings(action="ignore"):  # "1and": Python's parser would speak to the user
                return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:  # TypeError: a set of dicts
            raise ValueError(f"neither JSON nor a Python literal: {text[:60]!r}") from error


def extract_answer(text: str) -> dict | None:
    """The JSON object inside the last `<answer>...</answer>` of a text, fenced or not; None when there is none.

    By searching from the end, in linear time: a CoT that loops may open a thousand answers and close none, and a
    pattern like `.*<answer>(.*?)</answer>` tries each with each.
    """
    begin = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if begin < 0:
        return None
    inside = text[begin + len("<answer>") : text.index("</answer>", begin)].strip()
    if len(inside) >= 2 * len(FENCE) and inside.startswith(FENCE) and inside.endswith(FENCE):
        inside = inside.removeprefix(FENCE).removesuffix(FENCE).removeprefix("json").strip()
    try:
        value = parse_literal(inside)
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
    said = {d: scores[d] for d in DIMENSIONS if isinstance(scores.get(d), str) or scores.get(d) in (0, 1, 2)}
    verdicts = {dimension: str(verdict).strip().upper() for dimension, verdict in said.items()}
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
    except (ValueError, OverflowError):  # no number, or an integer of 400 digits
        return None
    return score if 1 <= score <= 5 else None  # not 1000, and not nan, which no comparison is true of


def overall_score(text: str) -> float:
    """`stated_score`, or 3, the middle: what a GENERATIVE reward model would return (Fig. 1a).

    Few different values, hence many exact ties, and an equal score is wrong wherever people decided.
    """
    score = stated_score(text)
    return 3.0 if score is None else score


@dataclasses.dataclass(frozen=True)
class RolloutReward:
    """What the rules give one CoT; each part in [0, 1], total is their weighted sum."""

    total: float
    quality: float
    format: float
    length: float


def format_reward(text: str) -> float:
    """R_fmt: 1 if the text is `well_formed`, else 0."""
    return float(well_formed(text))


def quality_reward(text: str, annotation: dict[str, str]) -> float:
    """R_qual: right verdicts / annotated dimensions. A dimension that the answer leaves out is wrong."""
    verdicts = read_verdicts(text)
    return sum(verdicts.get(d) == truth for d, truth in annotation.items()) / len(annotation)


def length_reward(num_tokens: int, low: int = 500, high: int = 2000) -> float:
    """R_len: 0 up to `low` TOKENS, then linear, 1 from `high`. (The released code counts characters, in steps.)"""
    return min(1.0, max(0.0, (num_tokens - low) / (high - low)))


def rollout_reward(
    text: str, num_tokens: int, annotation: dict[str, str], weights=(0.7, 0.1, 0.2), length_range=(500, 2000)
) -> RolloutReward:
    """R = w_q R_qual + w_f R_fmt + w_l R_len for one CoT. Rules only: the head's score never enters.

    Worked: 4 of 5 verdicts right, good format, 1,250 tokens: .7 * .8 + .1 * 1 + .2 * .5 = .76.
    """
    parts = quality_reward(text, annotation), format_reward(text), length_reward(num_tokens, *length_range)
    return RolloutReward(sum(w * part for w, part in zip(weights, parts, strict=True)), *parts)
