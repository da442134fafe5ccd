"""Best of N: ranks the videos of each prompt; writes best and worst as pairs for DPO.

    python -m lab.post_training.best_of --model DIR --data videos.csv --out runs/best [--make-pairs dpo.csv]

In: a CSV with the columns path,prompt. Out: best_of.csv in --out, best first, and the pairs in VideoAlign's columns.
Thinking and scoring are evaluate.py's: kept per video in --out, and resumed.
"""

import dataclasses
import os

import evaluate
import parallel
from phases import WORDING, Workers, text_rewards
from plumbing.formats import open_table, refuse_outside, tidy_prompt
from plumbing.jobs import Item, content_of, require_same_settings, write_skipped
from plumbing.report import cut_off
from plumbing.settings import InputError, arg, cli, evaluation_flags, parse, require, writable, write_csv


NOISE = 1e-5  # by how much the reward of one clip may differ between two batches


@dataclasses.dataclass
class Settings(evaluate.Settings):
    """evaluate.py's flags; --data is a CSV with path,prompt."""

    make_pairs: str = arg(None, "CSV to write: best and worst video per prompt, for DPO (VideoAlign columns)")


def ranking(items: list[Item], rewards: dict) -> dict[str, list[tuple[float, str]]]:
    """{prompt: [(reward, video), ...] best first}, of the items that have a reward."""
    groups = {}
    for item in items:
        if item.key in rewards:
            groups.setdefault(item.prompt, []).append((rewards[item.key]["reward"], item.video))
    return {prompt: sorted(videos, key=lambda v: (-v[0], v[1])) for prompt, videos in groups.items()}


def read_videos(s: Settings) -> list[Item]:
    """The videos of --data, each once. InputError: none, or an empty cell."""
    items, root = {}, s.root or os.path.dirname(s.data)
    for line, row in open_table(s.data, ("path", "prompt"))[1]:
        video, prompt = os.path.normpath(os.path.join(root, row["path"].strip())), tidy_prompt(row["prompt"])
        if not prompt or not row["path"].strip():
            raise InputError(f"{s.data}, line {line}: path or prompt is empty.")
        if s.root:
            refuse_outside(s.root, video, line)
        items.setdefault((video, prompt), Item(video, prompt, line))
    if not items:
        raise InputError(f"{s.data}: holds no video.")
    return list(items.values())


def write_ranking(path: str, groups: dict[str, list[tuple[float, str]]]) -> None:
    """prompt,rank,path,reward, best first. For people: a cell that a spreadsheet would run as a formula gets a '."""

    def calm(text):
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text

    rows = [[calm(p), k, calm(v), reward] for p, videos in groups.items() for k, (reward, v) in enumerate(videos, 1)]
    write_csv(path, ["prompt", "rank", "path", "reward"], rows)


def write_best_and_worst(path: str, groups: dict[str, list[tuple[float, str]]]) -> None:
    """Best (A) and worst (B) video of each prompt, in VideoAlign's columns, so that DPO and cold_start.py can read it.

    A prompt with one video, with equal rewards only, or whose best and worst are copies of one clip, has no pair. Paths
    are relative to the file.
    """
    folder, rows = os.path.dirname(os.path.abspath(path)), []
    for prompt, videos in groups.items():
        (high, best), (low, worst) = videos[0], videos[-1]
        copies = content_of(best) == content_of(worst) is not None
        if high - low > NOISE and not copies:
            rows.append([os.path.relpath(best, folder), os.path.relpath(worst, folder), prompt, "A", high, low])
    write_csv(path, ["path_A", "path_B", "prompt", "TA", "reward_A", "reward_B"], rows)
    print(f"{len(rows)} pairs of {len(groups)} prompts -> {path}")


def rewards_of(s: Settings, items: list[Item], ranks) -> tuple[dict, list[dict], object]:
    """COLLECTIVE: thinks and scores, resumable in --out -> ({item.key: record}, what was skipped, the engine).

    InputError: none got a reward.
    """
    writable([s.out])
    require_same_settings(s.out, s, evaluate.MADE_WITH, WORDING, ranks)
    workers, thoughts, skipped = Workers(s, ranks), None, []
    if s.think:
        thoughts, skipped = workers.think(items, s.out, s.thoughts)
        ended = [one for item in items if item.key in thoughts for one in thoughts[item.key]["ended"]]
        for line in cut_off(ended.count(False), len(ended)):
            ranks.print(line)
    if s.score_from[0] == "text":
        rewards, unscored = text_rewards(thoughts), []
    else:
        rewards, unscored = workers.score(items, thoughts, s.out)
    write_skipped(s.out, skipped + unscored, ranks)
    if not rewards:
        raise InputError(f"{s.data}: no video has a reward; see {s.out}/skipped.jsonl.")
    return rewards, skipped + unscored, workers.engine


def main(argv=None) -> None:
    """Thinks and scores as evaluate.py does, then ranks per prompt."""
    s = parse(Settings, __doc__, argv)
    require(s, data="a CSV with the columns path,prompt")
    evaluation_flags(s)
    writable([os.path.dirname(s.make_pairs)] if s.make_pairs else [])  # before minutes of thinking
    ranks = parallel.start(s.seed)
    s = evaluate.resolve(s, ranks)
    items = read_videos(s)
    rewards, skipped, engine = rewards_of(s, items, ranks)
    if ranks.is_main:
        groups = ranking(items, rewards)
        write_ranking(os.path.join(s.out, "best_of.csv"), groups)
        print(f"{len(groups)} prompts, {len(items)} videos, {len(skipped)} skipped -> {s.out}/best_of.csv")
        if s.make_pairs:
            write_best_and_worst(s.make_pairs, groups)
    ranks.finish(engine)


if __name__ == "__main__":
    cli(main)
