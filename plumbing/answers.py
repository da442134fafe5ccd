"""What the answer of a CoT says: text -> verdicts and score. The only parser of model output; nothing is evaluated."""

import ast
import json
import re


DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")  # what a CoT gives a verdict on


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
    """The JSON object inside the last `<answer>...</answer>` of a text, or None when there is none."""
    match = re.search(r".*<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if match is None:
        return None
    try:
        value = parse_literal(match.group(1).strip())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_verdicts(text: str) -> dict[str, str]:
    """{dimension: verdict} from the answer's `dimensional_scores`, {} if there is none. 2 and "2" are the same."""
    scores = (extract_answer(text) or {}).get("dimensional_scores")
    return {d: str(v).strip().upper() for d, v in scores.items()} if isinstance(scores, dict) else {}
