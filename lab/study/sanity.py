"""What does a reward model read? Its rewards again, after one thing about its input was changed.

    python -m lab.study.sanity --model DIR --data pairs.csv --out eval/run

| change           | what is taken away                                         | a model that reads it ...          |
|------------------|------------------------------------------------------------|------------------------------------|
| unrelated prompt | the prompt: another pair's stands in its place             | rates its videos lower, at random  |
| shuffled frames  | the order of the frames, so which way things move          | loses what only motion shows       |
| frozen clip      | all motion: the middle frame, over and over                | loses what only motion shows       |
| black clip       | all that can be seen; length and prompt stay               | can only guess: accuracy about .5  |
| videos swapped   | the pair's clips change places, the label stays            | is wrong where it was right        |

Each change is scored twice. "Thought anew": the model thinks about the changed input, then scores; this is what the
whole model reads. "CoT kept": the CoT of the unchanged input stays, and only what the scoring pass sees is changed;
this is what the head reads BESIDE the CoT. Swapped clips under kept CoTs put the two against each other: does the
reward follow the clip or the text?

Out: OUT/sanity.json, OUT/sanity.md; OUT/sanity/ keeps CoTs and rewards, so that a killed run goes on.
Shapes: n pairs, F frames; rewards (n, 2) of A and B.
"""

import dataclasses
import os

import numpy as np

import data
import evaluate
import parallel
from metrics import bootstrap_interval
from phases import WORDING, Workers, text_rewards
from plumbing.jobs import Item, require_same_settings, task_seed
from plumbing.report import finite, table
from plumbing.settings import InputError, cli, evaluation_flags, parse, writable, write_json, atomic_write


Settings = evaluate.Settings  # the same flags, for one set of pairs
AS_IT_IS, SWAPPED, PROMPT = "as it is", "videos swapped", "unrelated prompt"
FRAMES = ("shuffled frames", "frozen clip", "black clip")
CHANGES = (AS_IT_IS, PROMPT, *FRAMES, SWAPPED)
STILL = 0.05  # rewards that move by less than this share of their spread do not depend on what was changed
ENOUGH = 20  # decided pairs: with fewer a bootstrap interval is too narrow to be believed


def change_frames(frames: np.ndarray, change: str, path: str) -> np.ndarray:
    """frames (F, H, W, 3) -> the same after one of FRAMES. The shuffle depends on the file's name alone.

    A clip of one frame has no order to lose, and stays as it is when shuffled.
    """
    count = len(frames)
    if change == "black clip":
        return np.zeros_like(frames)
    if change == "frozen clip":
        return frames[[count // 2] * count]
    rng, order = np.random.default_rng(task_seed("shuffle", os.path.basename(path))), np.arange(count)
    while count > 1 and (order == np.arange(count)).all():
        order = rng.permutation(count)
    return frames[order]


def apart(pairs: list) -> list:
    """The pairs that share no video with an earlier one: a video then has ONE other clip to change places with."""
    kept, used = [], set()
    for pair in pairs:
        if not used & set(pair.videos):
            kept.append(pair)
            used |= set(pair.videos)
    return kept


def unrelated_prompts(pairs: list) -> list[str]:
    """For each pair the prompt of another: the first that differs, going on from the pair itself.

    InputError: all pairs have one prompt.
    """
    prompts = [pair.prompt for pair in pairs]
    if len(set(prompts)) < 2:
        raise InputError("sanity needs pairs of at least two different prompts; give a CSV with more pairs.")
    around = prompts * 2
    return [next(p for p in around[i:] if p != prompt) for i, prompt in enumerate(prompts)]


def changed_items(pairs: list, change: str) -> list[Item]:
    """2 n items, A and B of each pair, after the change."""
    prompts = unrelated_prompts(pairs) if change == PROMPT else [pair.prompt for pair in pairs]
    items = []
    for pair, prompt in zip(pairs, prompts):
        videos = pair.videos[::-1] if change == SWAPPED else pair.videos
        items += [Item(video, prompt, pair.line) for video in videos]
    return items


def half_hits(labels: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """(n,) 1 right, 0 wrong, 1/2 for equal rewards: two black clips of one length look alike, and that is a guess."""
    return (1 + np.sign(labels * (rewards[:, 0] - rewards[:, 1]))) / 2


def compare(labels, before: np.ndarray, after: np.ndarray) -> dict:
    """Rewards before and after a change, both (n, 2) -> the numbers of one row.

    shift, moved: mean of (after - before) and of its absolute value, in units of the spread of `before`;
    correlation over all 2 n videos; accuracy on the decided pairs, and what it lost, with a 95 % interval by pair.
    """
    labels, spread = np.asarray(labels), before.std() or 1.0
    step = (after - before) / spread
    moves = before.std() > 0 and after.std() > 0
    decided = labels != 0
    row = {"pairs": len(labels), "decided": int(decided.sum()), "shift": step.mean(), "moved": np.abs(step).mean()}
    row["correlation"] = np.corrcoef(before.ravel(), after.ravel())[0, 1] if moves else float("nan")
    hits = half_hits(labels, after)[decided]
    lost = half_hits(labels, before)[decided] - hits
    row["accuracy"], row["lost"] = (float(x.mean()) if decided.any() else float("nan") for x in (hits, lost))
    row["lost_interval"] = bootstrap_interval(lost)
    return {name: float(v) if isinstance(v, np.floating) else v for name, v in row.items()}


def reading(row: dict) -> str:
    """What a row says, in words."""
    low, high = row["lost_interval"]
    if row["change"] == AS_IT_IS:
        return "-"
    if row["change"] == SWAPPED and row["cot"] != "kept":
        return "the clips do not matter" if row["moved"] < STILL else "the score goes with the clip, not with the side"
    if row["decided"] < ENOUGH:
        return "not read" if row["moved"] < STILL else f"read; {row['decided']} pairs do not tell more"
    if row["change"] == SWAPPED:
        return "reads the clip beside the CoT" if low > 0 else "follows the CoT, not the clip"
    if row["moved"] < STILL:
        return "not read"
    return "read, and needed" if low > 0 else "read; accuracy does not show a loss"


def markdown(rows: list[dict], model: str, path: str) -> str:
    """OUT/sanity.md."""
    head = ["changed", "CoT", "shift", "moved", "correlation", "accuracy", "lost (95 %)", "so it is"]
    cells = []
    for row in rows:
        interval = "[{:+.3f}, {:+.3f}]".format(*row["lost_interval"])
        numbers = [f"{row[n]:+.2f}" if n == "shift" else f"{row[n]:.3f}" for n in ("shift", "moved", "correlation")]
        lost = f"{row['lost']:+.3f} {interval}"
        cells.append([row["change"], row["cot"], *numbers, f"{row['accuracy']:.3f}", lost, reading(row)])
    return (
        f"# What {model} reads: {os.path.basename(path)}\n\n{rows[0]['pairs']} pairs, {rows[0]['decided']} decided. "
        "shift, moved: change of the reward, mean and mean absolute value,\nin units of the rewards' spread. accuracy: "
        "decided pairs, equal rewards count half. lost: what the change cost.\n\n" + table(head, cells)
    )


class ChangedWorkers(Workers):
    """Workers that are shown the clips after a change."""

    change = AS_IT_IS

    def frames(self, item: Item) -> data.Video:
        """The item's frames, changed if its change is one of the video."""
        video = super().frames(item)
        if self.change not in FRAMES:
            return video
        return dataclasses.replace(video, frames=change_frames(video.frames, self.change, item.video))


def run(test: evaluate.TestSet, s: Settings, ranks, workers: ChangedWorkers) -> list[dict]:
    """COLLECTIVE: the whole check of one set of pairs. Returns its rows; rank 0 writes sanity.json and sanity.md.

    The phases are evaluate.py's own, so each CoT and each reward is made as in an evaluation.
    """
    pairs, from_text = apart(test.pairs), "text" in s.score_from
    items = {change: changed_items(pairs, change) for change in CHANGES}
    folder = {change: os.path.join(test.out, "sanity", change.replace(" ", "_")) for change in CHANGES}
    thoughts, rewards = dict.fromkeys(CHANGES), {}  # change -> {item.key: record}; (change, cot) -> the same
    for change in CHANGES:
        for path in (folder[change], os.path.join(folder[change], "kept")):
            if ranks.is_main:
                os.makedirs(path, exist_ok=True)
            ranks.barrier()
            require_same_settings(path, s, evaluate.MADE_WITH, WORDING, ranks)
        if s.think and change != SWAPPED:
            workers.change = change
            thoughts[change], _ = workers.think(items[change], folder[change], s.thoughts)
    anew = "anew" if s.think else "none"
    for change in CHANGES[:-1]:
        workers.change = change
        if from_text:
            rewards[change, anew] = text_rewards(thoughts[change])
        else:
            rewards[change, anew], _ = workers.score(items[change], thoughts[change], folder[change])
    rewards[SWAPPED, anew] = rewards[AS_IT_IS, anew]  # each clip was thought about under this prompt already
    if s.think and not from_text:
        for change in CHANGES[1:]:
            workers.change = change
            both = zip(items[change], items[AS_IT_IS], strict=True)
            own = {new.key: thoughts[AS_IT_IS][old.key] for new, old in both if old.key in thoughts[AS_IT_IS]}
            path = os.path.join(folder[change], "kept")
            rewards[change, "kept"], _ = workers.score(items[change], own, path)
    rows = rows_of(pairs, items, rewards)
    if ranks.is_main:
        write(test.out, rows, s.model, test.path)
    return rows


def rows_of(pairs: list, items: dict, rewards: dict) -> list[dict]:
    """One row per change and kind of CoT, on the pairs that have all rewards (a bad video may have been skipped).

    InputError: no pair has them.
    """
    arrays = {}
    for (change, cot), found in rewards.items():
        values = [found.get(item.key, {"reward": np.nan})["reward"] for item in items[change]]
        arrays[change, cot] = np.array(values).reshape(-1, 2)
    complete = np.all([np.isfinite(a).all(axis=1) for a in arrays.values()], axis=0)
    if not complete.any():
        raise InputError("sanity: no pair has a reward for both videos.")
    labels = np.array([pair.label for pair in pairs])[complete]
    before = next(iter(arrays.values()))[complete]
    return [{"change": change, "cot": cot} | compare(labels, before, after[complete])
            for (change, cot), after in arrays.items()]


def write(out: str, rows: list[dict], model: str, path: str) -> None:
    """OUT/sanity.json and OUT/sanity.md; prints the table."""
    text = markdown(rows, os.path.normpath(model), path)
    with atomic_write(os.path.join(out, "sanity.md")) as file:
        file.write(text)
    write_json(os.path.join(out, "sanity.json"), [finite(row) for row in rows])
    print(f"{text}\n{out}/sanity.md, sanity.json")


def main(argv=None) -> None:
    """The check of one model on one set of pairs."""
    s = parse(Settings, __doc__, argv)
    evaluation_flags(s)
    if s.video or max(len(s.benchmark or []), len(s.score_from)) > 1:
        raise InputError("sanity takes one set of pairs (--data, or one --benchmark) and one --score-from.")
    ranks = parallel.start(s.seed)
    s = evaluate.resolve(s, ranks)
    test = evaluate.read_test_set(s, s.benchmark and s.benchmark[0])
    writable([test.out])
    workers = ChangedWorkers(s, ranks)
    run(test, s, ranks, workers)
    ranks.finish(workers.engine)


if __name__ == "__main__":
    cli(main)
