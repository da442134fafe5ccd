"""Point-wise benchmarks: labels of single videos, 1 to 5, not pairs. How well do rewards order them?

    python -m lab.road.pointwise convert --json videoscore-bench-v2.json --videos videos --out vsb2.csv
    python -m lab.road.pointwise judge --data vsb2.csv --model runs/stage2/model --out runs/vsb2
    python -m lab.road.pointwise judge --data vsb2.csv --scores theirs.csv --out runs/theirs

convert: VideoScore-Bench v2 (`data_27k_test (VideoScoreBench-v2).json` of TIGER-Lab/VideoFeedback2, Apache-2.0) -> a
CSV path,prompt,score of its text-to-video alignment. judge: a CSV path,prompt,score and rewards, of a model that thinks
first or of a CSV path,prompt,reward -> OUT/pointwise.json and a table:

    spearman   rank correlation over all videos: 1 the same order, 0 none. Prompts that are harder count, too
    pearson    correlation of the values: 1 where the reward is a straight line of the score
    within     of two videos of ONE prompt with different scores, the share that the reward orders rightly (equal
               rewards: 1/2); .5 is chance. This alone is what a generator's training uses

Intervals are of 95 %, by a bootstrap over prompts. Not run on the real files; a test has made-up ones in their columns.
VideoScore-Bench v1 is not converted: the list of its files on the hub has zips of frames, no videos, and whether their
rate stands in its rows was not looked at.
"""

import argparse
import itertools
import os

import numpy as np

import evaluate
import parallel
from lab.post_training.report import ranks
from lab.road.datasets import videofeedback2_row
from lab.road.published import Tally, Videos, read_json
from phases import WORDING, Workers
from plumbing.formats import open_table
from plumbing.jobs import Item, require_same_settings
from plumbing.report import table
from plumbing.settings import InputError, cli, writable, write_csv, write_json


def convert(args) -> None:
    """VideoScore-Bench v2's JSON -> CSV path,prompt,score; rows that cannot be used are counted and named."""
    tally, videos, rows = Tally(), Videos(args.videos, check=False), []
    for number, row in enumerate(read_json(args.json), 1):
        tally.read += 1
        try:
            listed, prompt, score = videofeedback2_row(row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            told = isinstance(error, ValueError)
            tally.drop(str(error) if told else "row without the published fields", f"row {number}")
            continue
        path, why_not = videos.find(listed)
        if path is None:
            tally.drop(why_not, listed)
        else:
            rows.append([os.path.relpath(path, os.path.dirname(os.path.abspath(args.out))), prompt, score])
    print(tally.report())
    if not rows:
        raise InputError(f"{args.json}: no row can be used; see the counts above.")
    write_csv(args.out, ["path", "prompt", "score"], rows)
    print(f"  wrote {args.out}: {len(rows)} videos of {len({row[1] for row in rows})} prompts; licence Apache-2.0")


def read_numbers(path: str, column: str) -> dict[tuple[str, str], float]:
    """{(absolute path of the video, prompt): number} of a CSV path,prompt,COLUMN."""
    folder, found = os.path.dirname(os.path.abspath(path)), {}
    for line, row in open_table(path, ("path", "prompt", column))[1]:
        key = os.path.normpath(os.path.join(folder, row["path"])), row["prompt"].strip()
        try:
            number = float(row[column])
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise InputError(f"{path}, line {line}: {column} {row[column]!r} is no number.")
        if key in found:
            raise InputError(f"{path}, line {line}: {row['path']} stands twice with this prompt.")
        found[key] = number
    return found


def correlation(one, other) -> float | None:
    """Pearson's; None where one of them does not vary."""
    return float(np.corrcoef(one, other)[0, 1]) if len(set(one)) > 1 and len(set(other)) > 1 else None


def measure(scores: np.ndarray, rewards: np.ndarray, prompts: np.ndarray) -> dict[str, float | None]:
    """scores, rewards, prompts (n,) -> spearman, pearson, within; None: cannot be computed.

    Worked: scores 1 2 3 of one prompt, rewards 0 5 4: two of three pairs in order; ranks 1 3 2: spearman .5.
    """
    hits = []
    for prompt in dict.fromkeys(prompts.tolist()):
        mine = prompts == prompt
        for (a, x), (b, y) in itertools.combinations(zip(scores[mine], rewards[mine]), 2):
            if a != b:
                hits.append((np.sign(x - y) * np.sign(a - b) + 1) / 2)
    return {"spearman": correlation(ranks(scores), ranks(rewards)), "pearson": correlation(scores, rewards),
            "within": float(np.mean(hits)) if hits else None}


def with_intervals(scores, rewards, prompts, draws: int = 1000, seed: int = 0) -> dict[str, dict]:
    """{name: {"value", "low", "high"}}: percentiles over draws of whole prompts; one drawn twice counts as two."""
    rng, names = np.random.default_rng(seed), sorted(set(prompts.tolist()))
    places, found = [np.flatnonzero(prompts == name) for name in names], {}
    for _ in range(draws if len(names) > 1 else 0):
        chosen = [places[k] for k in rng.integers(len(names), size=len(names))]
        index = np.concatenate(chosen)
        apart = np.repeat(np.arange(len(chosen)), [len(c) for c in chosen])
        for name, value in measure(scores[index], rewards[index], apart).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    rows = {}
    for name, value in measure(scores, rewards, prompts).items():
        low, high = np.quantile(found[name], (0.025, 0.975)).tolist() if found.get(name) else (None, None)
        rows[name] = {"value": value, "low": low, "high": high}
    return rows


def rewards_of(path: str, wanted: list[tuple[str, str]], out: str, max_new_tokens: int) -> list[float]:
    """Rewards of a model that thinks first, as evaluate.py gives them: each CoT and reward stands in OUT as soon as it
    is there, and the same command goes on behind them. wanted: (video, prompt) of each record of a CSV."""
    ranks = parallel.start(0)
    settings = evaluate.resolve(evaluate.Settings(model=path, out=out, max_new_tokens=max_new_tokens), ranks)
    items = [Item(video, prompt, line) for line, (video, prompt) in enumerate(wanted, 2)]  # the header is line 1
    require_same_settings(out, settings, evaluate.MADE_WITH, WORDING, ranks)
    workers = Workers(settings, ranks)
    thoughts, _ = workers.think(items, out)
    rewards, _ = workers.score(items, thoughts, out)
    return [rewards[item.key]["reward"] for item in items]


def judge(args) -> None:
    """The table, and OUT/pointwise.json. Rewards that are all alike are named: they order nothing."""
    truth = read_numbers(args.data, "score")
    if not truth or bool(args.model) == bool(args.scores):
        raise InputError("judge needs rows in --data, and either --model or --scores.")
    writable([args.out])
    if args.scores:
        given = read_numbers(args.scores, "reward")
        if lacking := [video for video, prompt in truth if (video, prompt) not in given]:
            raise InputError(f"{args.scores}: has no reward for {lacking[0]} ({len(lacking)} lack one).")
        rewards = [given[key] for key in truth]
    else:
        rewards = rewards_of(args.model, list(truth), args.out, args.max_new_tokens)
    scores, rewards = np.array(list(truth.values())), np.array(rewards)
    prompts = np.array([prompt for _, prompt in truth])
    if len(set(rewards.tolist())) == 1:
        print(f"all {len(rewards)} rewards are {rewards[0]:g}: constant rewards order nothing, no correlation exists.")
    rows = with_intervals(scores, rewards, prompts)
    write_json(os.path.join(args.out, "pointwise.json"), {"videos": len(scores), "prompts": len(set(prompts)), **rows})
    cells = [[name, *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("value", "low", "high"))]
             for name, row in rows.items()]
    print(table([f"{len(scores)} videos, {len(set(prompts))} prompts", "value", "low", "high"], cells))


def main(argv=None) -> None:
    """convert or judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="command", required=True)
    one, two = parts.add_parser("convert"), parts.add_parser("judge")
    one.add_argument("--json", required=True, help="the set's JSON file")
    one.add_argument("--videos", required=True, help="folder where the set's videos were unpacked")
    one.add_argument("--out", required=True, help="CSV to write; its video paths are relative to its folder")
    two.add_argument("--data", required=True, help="CSV path,prompt,score")
    two.add_argument("--model", help="a DeScore folder, which thinks and scores")
    two.add_argument("--max-new-tokens", type=int, default=4096, help="tokens per CoT at most")
    two.add_argument("--scores", help="CSV path,prompt,reward of ready-made rewards")
    two.add_argument("--out", required=True, help="folder for pointwise.json")
    args = parser.parse_args(argv)
    {"convert": convert, "judge": judge}[args.command](args)


if __name__ == "__main__":
    cli(main)
