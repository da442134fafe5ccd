"""How well do rewards order single videos that people scored? For sets with a label per video, not per pair.

    python -m lab.road.pointwise --data vsb2.csv --model runs/stage2/model --out runs/vsb2      evaluate.py's flags
    python -m lab.road.pointwise --data vsb2.csv --scores theirs.csv --out runs/theirs

In: a CSV path,prompt,score (lab/road/videoscore.py makes them of published sets), and rewards: of a model that thinks
first, kept and resumed as in evaluate.py, or of a CSV path,prompt,reward. Out: pointwise.json, and pointwise.md, which
says what each number means. Intervals are of 95 %, by a bootstrap over prompts.
"""

import dataclasses
import itertools
import os

import numpy as np

import evaluate
import parallel
from lab.post_training.best_of import rewards_of
from lab.post_training.report import ranks as ranks_of
from metrics import bootstrap_interval
from plumbing.formats import open_table, refuse_outside, tidy_prompt
from plumbing.jobs import Item
from plumbing.report import table
from plumbing.settings import InputError, arg, atomic_write, cli, evaluation_flags, parse, require, writable, write_json

MEANING = {
    "spearman": "do the rewards put all videos into the order of the scores? 1: exactly, 0: no relation. A prompt that "
                "is hard for every generator counts, too",
    "pearson": "does the reward grow evenly with the score? 1: a straight line, 0: no relation",
    "within": "of two videos of ONE prompt with different scores, the share that the reward orders rightly (equal "
              "rewards count 1/2); .5 is chance. This alone is what the training of a generator uses",
}


@dataclasses.dataclass
class Settings(evaluate.Settings):
    """evaluate.py's flags; --data is a CSV with path,prompt,score."""

    scores: str = arg(None, "CSV path,prompt,reward of ready-made rewards, in place of --model")


def read_numbers(path: str, column: str, folder: str, confined: bool) -> dict[tuple[str, str], float]:
    """{(absolute path of the video, prompt): number} of a CSV path,prompt,COLUMN.

    folder: where the paths begin; confined: they must not leave it.
    InputError: no video, no number, or a video twice.
    """
    folder, found = os.path.abspath(folder), {}
    for line, row in open_table(path, ("path", "prompt", column))[1]:
        key = os.path.normpath(os.path.join(folder, row["path"].strip())), tidy_prompt(row["prompt"])
        if confined:
            refuse_outside(folder, key[0], line)
        try:
            number = float(row[column])
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise InputError(f"{path}, line {line}: {column} {row[column]!r} is no number.")
        if key in found:
            raise InputError(f"{path}, line {line}: {row['path']} stands twice with this prompt.")
        found[key] = number
    if not found:
        raise InputError(f"{path}: holds no video.")
    return found


def correlation(one, other) -> float | None:
    """Pearson's; None where one of them does not vary."""
    return float(np.corrcoef(one, other)[0, 1]) if len(set(one)) > 1 and len(set(other)) > 1 else None


def hits_within(scores, rewards, prompts) -> tuple[np.ndarray, np.ndarray]:
    """1, 1/2 or 0 for each two videos of one prompt with different scores; and the prompt of each."""
    hits, of = [], []
    for prompt in dict.fromkeys(prompts.tolist()):
        mine = prompts == prompt
        for (a, x), (b, y) in itertools.combinations(zip(scores[mine], rewards[mine]), 2):
            if a != b:
                hits.append((np.sign(x - y) * np.sign(a - b) + 1) / 2)
                of.append(prompt)
    return np.array(hits), np.array(of)


def measure(scores: np.ndarray, rewards: np.ndarray, prompts: np.ndarray, draws: int = 1000) -> dict[str, dict]:
    """scores, rewards, prompts (n,) -> {name of MEANING: {value, low, high, undefined}}.

    A prompt that is drawn twice counts twice. `value` None: the number does not exist, and `undefined` says why; low
    and high None: a single prompt, or too few draws in which it exists.
    Worked: scores 1 2 3 of one prompt, rewards 0 5 4: two of three pairs in order; ranks 1 3 2: spearman .5.
    """
    same = [f"all {len(scores)} {word} are {values[0]:g}, and constant {word} have no order"
            for word, values in (("scores", scores), ("rewards", rewards)) if len(set(values.tolist())) == 1]
    inverse = np.unique(prompts, return_inverse=True)[1]
    places, rng = [np.flatnonzero(inverse == k) for k in range(inverse.max() + 1)], np.random.default_rng(0)
    drawn = [np.concatenate([places[k] for k in rng.integers(len(places), size=len(places))])
             for _ in range(draws if len(places) > 1 else 0)]
    rows, kinds = {}, {"spearman": lambda i: correlation(ranks_of(scores[i]), ranks_of(rewards[i])),
                       "pearson": lambda i: correlation(scores[i], rewards[i])}
    for name, of in kinds.items():
        values = [value for value in map(of, drawn) if value is not None]
        low, high = np.quantile(values, (0.025, 0.975)).tolist() if len(values) > draws / 2 else (None, None)
        rows[name] = {"value": of(slice(None)), "low": low, "high": high, "undefined": same[0] if same else None}
    hits, of_prompt = hits_within(scores, rewards, prompts)
    low, high = (None if np.isnan(x) else x for x in bootstrap_interval(hits, of_prompt)) if len(hits) else (None, None)
    none = None if len(hits) else "no prompt has two videos with different scores"
    rows["within"] = {"value": float(hits.mean()) if len(hits) else None, "low": low, "high": high, "undefined": none}
    return rows


def report(out: str, videos: int, prompts: int, rows: dict[str, dict]) -> str:
    """Writes OUT/pointwise.json and pointwise.md. -> the latter"""
    def shown(number):
        return "-" if number is None else f"{number:.3f}"

    cells = [[name, *(shown(row[key]) for key in ("value", "low", "high"))] for name, row in rows.items()]
    text = table([f"{videos} videos, {prompts} prompts", "value", "low", "high"], cells) + "\n"
    for name, row in rows.items():
        text += f"- {name}: {MEANING[name]}." + f" Here it does not exist: {row['undefined']}." * bool(row["undefined"])
        text += "\n"
    write_json(os.path.join(out, "pointwise.json"), {"videos": videos, "prompts": prompts, **rows})
    with atomic_write(os.path.join(out, "pointwise.md")) as file:
        file.write(text)
    return text


def main(argv=None) -> None:
    """Rewards of --model or --scores against the scores of --data."""
    s = parse(Settings, __doc__, argv)
    require(s, data="a CSV with the columns path,prompt,score")
    if bool(s.model) == bool(s.scores):
        raise InputError("give either --model DIR or --scores FILE (--help shows all flags).")
    where = s.root or os.path.dirname(s.data), bool(s.root)  # also of somebody's scores, wherever they lie
    truth, engine = read_numbers(s.data, "score", *where), None
    writable([s.out])
    if s.scores:
        ranks, given = parallel.Ranks(), read_numbers(s.scores, "reward", *where)
    else:
        evaluation_flags(s)
        ranks = parallel.start(s.seed)
        items = [Item(*key, line) for line, key in enumerate(truth, 2)]  # the header is line 1
        rewards, _, engine = rewards_of(evaluate.resolve(s, ranks), items, ranks)
        given = {key: record["reward"] for key, record in rewards.items()}
    lacking = [video for video, prompt in truth if (video, prompt) not in given]
    if lacking and not s.skip_bad_videos:
        raise InputError(f"{s.scores}: has no reward for {lacking[0]} ({len(lacking)} lack one).")
    kept = [key for key in truth if key in given]
    if not kept:
        raise InputError(f"{s.scores or s.model}: has a reward for no video of {s.data}; paths begin in {where[0]!r}.")
    prompts = np.array([prompt for _, prompt in kept])
    rows = measure(np.array([truth[key] for key in kept]), np.array([given[key] for key in kept]), prompts)
    if ranks.is_main:
        print(report(s.out, len(kept), len(set(prompts)), rows), end="")
        if lacking:
            print(f"{len(lacking)} of {len(truth)} videos have no reward and are left out")
    ranks.finish(engine)


if __name__ == "__main__":
    cli(main)
