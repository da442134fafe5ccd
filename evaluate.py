"""Evaluation: think, then score, then count how often the rewards agree with people.

    python evaluate.py --model DIR --data pairs.csv --out eval/run     pairs in any format of docs/data.md
    torchrun --nproc_per_node 8 evaluate.py --model DIR --benchmark videogen-rewardbench --root DIR --out eval/vgrb
    python evaluate.py --model DIR --video clip.mp4 --prompt "a red circle rises"        one video: its CoT and reward

In --out: thoughts*.jsonl and rewards*.jsonl (one line per unique video and prompt, one file per rank; the same command
goes on where it was killed), scores.csv, skipped.jsonl, settings.json, report.json, .md and .png (plumbing/report.py).
From these: a page with clips and CoTs (lab/serve/page.py), other models' scores beside ours (lab/study/compare.py).
Memory: the model and one batch; the 8B in bf16 needs a GPU of 24 GB. Time: nearly all of it is thinking.
No CoT is masked here. --no-think leaves all of them out, which random CoT masking has trained the head for.

Symbols: margin = r_A - r_B, a pair's rewards; label +1 (A is better), -1 (B), 0 (the same); n pairs; k CoTs.
"""

import dataclasses
import os

import numpy as np

import data
import metrics
import parallel
from phases import MADE_WITH, WORDING, ThinkingSettings, Workers, require_short, text_rewards
from plumbing import report
from plumbing.checkpoint import trained_settings
from plumbing.formats import open_table, refuse_outside
from plumbing.jobs import Item, items_of, require_same_settings, write_skipped
from plumbing.settings import InputError, arg, cli, evaluation_flags, parse, writable
from rollout import decode_cot, has_ended
from rules import overall_score, stated_score

BENCHMARKS = {  # name -> what the CSV in --root may be called, the published name first
    "videogen-rewardbench": ("videogen-rewardbench.csv", "test_videogen_rewardbench.csv"),
    "genai-bench": ("genai-bench.csv", "genaibench.csv", "test_genai_bench.csv"),
    "mj-bench-video": ("mj-bench-video.csv",),
    "in-domain": ("tabench.csv", "in-domain.csv", "test_in_domain.csv"),
}
BOTH_BAD, BOTH_GOOD = ("bothbad_vote", "bothbad"), ("tievote", "tie")  # --genai-ties -> votes that are left out:
DROPPED_VOTES = {"both": (), "tie": BOTH_BAD, "bothbad": BOTH_GOOD, "drop": BOTH_BAD + BOTH_GOOD}


@dataclasses.dataclass
class Settings(ThinkingSettings):
    """Flags; more in phases.ThinkingSettings. Sizes are the paper's."""

    model: str = arg(None, "checkpoint folder with backbone, query and head")
    data: str = arg(None, "CSV of preference pairs")
    benchmark: list[str] = arg(
        None, "published benchmarks, found in --root; of several, each goes to OUT/NAME", list(BENCHMARKS))
    root: str = arg(None, "folder of the videos (and the benchmark's CSV); paths that leave it are refused")
    genai_ties: str = arg("both", "which of GenAI-Bench's two tie votes to keep, as ties", list(DROPPED_VOTES))
    video: str = arg(None, "one video to think about and score")
    prompt: str = arg(None, "the prompt of --video")
    think: bool = arg(True, "write a CoT before scoring")
    thoughts: int = arg(
        1, "CoTs per video: 1 is greedy; more are sampled at temperature 1, rewards averaged", at_least=1)
    score_from: list[str] = arg(
        ("head",), "head: DeScore's reward; text: the score that the CoT states, in OUT/text", ["head", "text"])
    temperature: float = arg(None, "sampling temperature (default: 0 for one CoT, 1 for several)", at_least=0)
    fps: float = arg(None, "sampled frames per second (default: the checkpoint's; paper: 2)", above=0)
    max_pixels: int = arg(None, "pixels per frame at most (default: the checkpoint's; paper: 200704)", at_least=1024)
    dtype: str = arg("auto", "auto: bfloat16 on a GPU, else float32", ["auto", "float32", "bfloat16"])
    batch_size: int = arg(8, "videos at once; changes speed, not results", at_least=1)
    videoalign_compatible: bool = arg(False, "also show accuracy with ties as VideoAlign's script computes it")
    out: str = arg("evaluation", "folder for everything that is written")


MADE_WITH = (*MADE_WITH, "think", "thoughts", "dtype")


# ---- 1. All numbers of one reward model on one set of pairs --------------------------------------------------
def measure(name: str, pairs: list[data.PreferencePair], rewards: np.ndarray) -> report.Agreement:
    """rewards (n, 2) of A and B, finite -> every number of the report; the paper's Table 1 has the two accuracies."""
    # BT's loss (Eq. 3) is blind to a constant added to both rewards: only the difference of a pair has a meaning.
    differences = rewards[:, 0] - rewards[:, 1]
    labels, margins = metrics.checked([p.label for p in pairs], differences)
    prompts = {}  # prompt -> group; not np.unique, which would pad every prompt to the longest
    groups = np.array([prompts.setdefault(p.prompt, len(prompts)) for p in pairs])
    # The model never says "the same". A pair counts as called a tie if |margin| <= threshold, the one that does best.
    accuracy, threshold = metrics.accuracy_with_ties(labels, margins)
    hits = {"without_ties": metrics.right(labels, margins), "with_ties": metrics.right(labels, margins, threshold)}
    decided = labels != 0  # human ties have no right side: accuracy without ties leaves them out
    numbers = {
        "name": name, "pairs": len(pairs), "human_ties": int((~decided).sum()), "prompts": len(prompts),
        "accuracy_without_ties": metrics.accuracy_without_ties(labels, margins) if decided.any() else None,
        # Pairs of one prompt share videos, so they are right or wrong together: an interval draws whole prompts.
        "accuracy_without_ties_interval": metrics.bootstrap_interval(hits["without_ties"][decided], groups[decided]),
        "accuracy_with_ties": accuracy,
        "accuracy_with_ties_interval": metrics.bootstrap_interval(hits["with_ties"], groups), "threshold": threshold,
        # With the threshold of the other half of the pairs: what new pairs would get, as published numbers are not.
        "accuracy_with_ties_cross_fitted": metrics.accuracy_with_ties_cross_fitted(labels, margins),
        "accuracy_with_ties_videoalign_compatible": metrics.videoalign_compatible(labels, differences),
        # Eq. 3 takes σ(r_A - r_B) for the chance that people choose A. Do they, as often?
        "calibration": metrics.calibration(labels, margins),
    }
    # Where the CSV names the two generators: which of their comparisons is the reward good at?
    makers = {}  # (model, model) -> indices of its pairs; which of the two was shown as A does not matter
    for i, pair in enumerate(pairs):
        if len(pair.extra) == 2:
            makers.setdefault(tuple(sorted(map(str, pair.extra.values()))), []).append(i)
    numbers["model_pairs"] = [
        {"models": names, "pairs": len(i), "with_ties": float(hits["with_ties"][i].mean()),
         "without_ties": float(hits["without_ties"][i][decided[i]].mean()) if decided[i].any() else None}
        for names, i in sorted(makers.items())
    ]
    return report.Agreement(numbers, labels, margins, metrics.accuracy_curve(labels, margins), hits, groups)


# ---- 2. A test set: what is to be judged ---------------------------------------------------------------------
@dataclasses.dataclass
class TestSet:
    """Pairs, what is found out about them, and the folder where that is kept."""

    path: str  # the CSV
    pairs: list[data.PreferencePair]
    out: str
    root: str  # relative video paths start here
    benchmark: str | None = None
    labels: str = ""  # the flag that asked for other labels than those that Table 1 is about
    thoughts: dict | None = None  # {item.key: record of Workers.think}; None: no thinking
    rewards: dict = dataclasses.field(default_factory=dict)  # {item.key: record of Workers.score}
    skipped: list[dict] = dataclasses.field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """Each (video, prompt) once."""
        return items_of(self.pairs)


def read_test_set(settings: Settings, benchmark: str | None = None) -> TestSet:
    """Pairs of --data, or of one benchmark, after --root and --genai-ties. InputError: no CSV, or a path outside."""
    path, out = settings.data, settings.out
    if benchmark:
        names = [n for n in BENCHMARKS[benchmark] if os.path.isfile(os.path.join(settings.root, n))]
        if not names:
            raise InputError(f"{settings.root}: holds none of {', '.join(BENCHMARKS[benchmark])} (docs/benchmarks.md).")
        path = os.path.join(settings.root, names[0])
        out = os.path.join(settings.out, benchmark) if len(settings.benchmark) > 1 else settings.out
    pairs = data.read_pairs(path, settings.dimension, settings.root or None)
    for item in items_of(pairs) if settings.root else []:  # a CSV from the net: "../../secret.mp4" must not be opened
        refuse_outside(settings.root, item.video, item.line)
    # GenAI-Bench lets people say "both good" and "both bad". Both are ties to us; published numbers differ in that.
    dropped = DROPPED_VOTES[settings.genai_ties] if benchmark in (None, "genai-bench") else ()
    if dropped:
        votes = {line: row["vote_type"].strip().lower() for line, row in open_table(path, ("vote_type",))[1]}
        pairs = [pair for pair in pairs if votes[pair.line] not in dropped]
    labels = f"--genai-ties {settings.genai_ties}" if dropped else ""  # no set has both votes and dimensions
    if settings.dimension != "TA" and benchmark != "genai-bench" and not dropped:
        labels = f"--dimension {settings.dimension}"
    return TestSet(path, pairs, out, settings.root or os.path.dirname(path), benchmark, labels)


# ---- 3. The report -------------------------------------------------------------------------------------------
def pair_rewards(pairs: list[data.PreferencePair], rewards: dict) -> np.ndarray:
    """{(video, prompt): record} -> (n, 2) rewards of A and B; nan where a video has none."""
    none = {"reward": float("nan")}  # not 0: a missing reward must never look like one
    return np.array([[rewards.get((video, p.prompt), none)["reward"] for video in p.videos] for p in pairs])


def complete_pairs(test: TestSet, rewards: list[np.ndarray], skip: bool) -> np.ndarray:
    """(n,) bool: pairs with a reward for both videos in each array (n, 2). InputError without `skip`, or if none is."""
    complete = np.all([np.isfinite(r).all(axis=1) for r in rewards], axis=0)
    if not complete.all() and not skip:
        line = test.pairs[int(complete.argmin())].line
        raise InputError(f"{test.path}, line {line}: a video has no reward; --skip-bad-videos leaves such pairs out.")
    if not complete.any():
        raise InputError(f"{test.path}: no pair has a reward for both videos.")
    return complete


def measure_set(test: TestSet, name: str, rewards: np.ndarray, complete: np.ndarray) -> report.Agreement:
    """The rewards (n, 2) of one model on the complete pairs, as report.write takes them."""
    kept = [pair for pair, keep in zip(test.pairs, complete) if keep]
    found = measure(name, kept, rewards[complete])
    found.numbers.update(data=test.path, benchmark=test.benchmark, labels=test.labels, difference_to_first=None)
    found.numbers.update(skipped_pairs=len(test.pairs) - len(kept), skipped_videos=len(test.skipped))
    if test.thoughts:
        records = [test.thoughts[item.key] for item in test.items if item.key in test.thoughts]
        found.numbers["thoughts"] = report.thought_statistics(records, kept)
    return found


def write_report(test: TestSet, settings: Settings) -> None:
    """The report and the scores of each kind that --score-from asks for: the head's in OUT, the text's in OUT/text."""
    name = os.path.basename(os.path.normpath(settings.model))
    # One CoT, two scores: the head's and the one that the CoT states. Counted alike, so nothing else differs.
    for kind in settings.score_from:
        found = test.rewards if kind == "head" else text_rewards(test.thoughts)
        out = test.out if kind == "head" else os.path.join(test.out, "text")
        rewards = pair_rewards(test.pairs, found)
        complete = complete_pairs(test, [rewards], settings.skip_bad_videos)
        report.write(out, [measure_set(test, name, rewards, complete)], settings.videoalign_compatible)
        rows = [(*item.key, found[item.key]["reward"]) for item in test.items if item.key in found]
        report.write_scores(os.path.join(out, "scores.csv"), rows, test.root)


# ---- 4. The script -------------------------------------------------------------------------------------------
def resolve(settings: Settings, ranks) -> Settings:
    """Settings with what was left to the checkpoint (it knows how its training sampled frames) and to the device.

    InputError: the head's reward is asked of a checkpoint whose head was not trained.
    """
    trained = trained_settings(settings.model)
    if trained.get("score") == "text" and "head" in settings.score_from:
        raise InputError(f"{settings.model}: its head is not trained, its score is in the text; use --score-from text.")
    # Greedy for one CoT, so that a report can be made again; several greedy ones would all be the same.
    temperature = float(settings.thoughts > 1) if settings.temperature is None else settings.temperature
    dtype = settings.dtype if settings.dtype != "auto" else "bfloat16" if ranks.device.type == "cuda" else "float32"
    fps = settings.fps or trained.get("fps", 2.0)
    max_pixels = settings.max_pixels or trained.get("max_pixels", 448 * 448)
    return dataclasses.replace(settings, fps=fps, max_pixels=max_pixels, dtype=dtype, temperature=temperature)


def one_video(settings: Settings, ranks, workers: Workers) -> None:
    """Prints CoT and reward of --video. First what may be wrong with the clip: the models take minutes to open.

    InputError: no such clip, or one that cannot be read.
    """
    if not os.path.isfile(settings.video):
        folder = os.path.dirname(settings.video) or "."
        raise InputError(f"--video {settings.video}: no such file; see what there is with: ls {folder}")
    try:
        video = workers.frames(Item(settings.video, settings.prompt, 0))
    except InputError as error:
        raise InputError(f"--video {str(error).rstrip('.')}; see what it is with: file {settings.video}") from error
    processor = (workers.open_engine() if settings.think else workers.open_model()).processor
    require_short(settings.prompt, processor.tokenizer)
    # The same as for many: think, then score. The clip is decoded, and video and prompt are encoded, once.
    prefixes, cots = [data.encode_prompt(processor, video, settings.prompt)], [[None]]
    if settings.think:
        seeds = [[settings.seed + k for k in range(settings.thoughts)]]
        cots = workers.engine.generate(prefixes, seeds, settings.max_new_tokens, settings.temperature)
    texts = [decode_cot(processor.tokenizer, cot) if cot else "(no CoT)" for cot in cots[0]]
    # {score: one number for each CoT}: one CoT, two scores, as in `write_report`
    scores = {"stated score": [overall_score(text) for text in texts]} if "text" in settings.score_from else {}
    if "head" in settings.score_from:
        scores["reward"] = workers.open_model().score(prefixes, cots)[0].tolist()
    for k, text in enumerate(texts):
        told = {name: f"{row[k]:+.4f}" for name, row in scores.items()}
        if "stated score" in told and stated_score(text) is None:
            told["stated score"] = f"none (counted as {overall_score(text):g})"
        ranks.print("\n".join([text, *map(" ".join, told.items())]))
    cut = sum(not has_ended(processor.tokenizer, cot) for cot in cots[0] if settings.think)
    for line in report.cut_off(cut, len(texts)):
        ranks.print(line)
    if settings.thoughts > 1:
        ranks.print("\n".join(f"mean {name} {np.mean(row):+.4f}" for name, row in scores.items()))
    ranks.print("(a reward is unbounded and has no unit: only differences between videos of one prompt mean something)")


def main(argv=None) -> None:
    """All sets are thought about first, then scored: the engine's memory is free when scoring starts."""
    settings = parse(Settings, __doc__, argv)
    evaluation_flags(settings)
    ranks = parallel.start(settings.seed)
    settings = resolve(settings, ranks)
    workers = Workers(settings, ranks)
    if settings.video:
        one_video(settings, ranks, workers)
        return ranks.finish(workers.engine)
    tests = [read_test_set(settings, name) for name in settings.benchmark or [None]]
    for test in tests:  # an unwritable folder stops the run before hours of generation
        writable([test.out, *([os.path.join(test.out, "text")] if "text" in settings.score_from else [])])
    for test in tests:  # 1 think: over all sets first, so that the model that scores finds the engine's memory free
        own = dataclasses.replace(settings, benchmark=test.benchmark and [test.benchmark], out=test.out)
        require_same_settings(test.out, own, MADE_WITH, WORDING, ranks)
        if settings.think:
            test.thoughts, test.skipped = workers.think(test.items, test.out, settings.thoughts)
    for test in tests:  # 2 score
        if "head" in settings.score_from:
            test.rewards, unscored = workers.score(test.items, test.thoughts, test.out)
            test.skipped += unscored
        write_skipped(test.out, test.skipped, ranks)
    for test in tests if ranks.is_main else []:  # 3 compare with people
        write_report(test, settings)
    ranks.finish(workers.engine)


if __name__ == "__main__":
    cli(main)
