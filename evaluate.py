"""Evaluation: think, then score, then count how often the rewards agree with people.

    python evaluate.py --model DIR --data pairs.csv --out eval/run     pairs in any format of README, "Data formats"
    torchrun --nproc_per_node 8 evaluate.py --model DIR --benchmark videogen-rewardbench --root DIR --out eval/vgrb
    python evaluate.py --model DIR --video clip.mp4 --prompt "a red circle rises"        one video: its CoT and reward
    python evaluate.py --data pairs.csv --scores scores.csv             somebody else's rewards, judged by this code
    python evaluate.py --data pairs.csv --compare ours.csv theirs.csv   several score files in one table and figure

In: a checkpoint folder, a CSV. Out, in --out: thoughts*.jsonl and rewards*.jsonl (one line per unique video and prompt,
one file per rank; the same command goes on where it was killed), scores.csv, skipped.jsonl, settings.json, and
report.json, report.md, report.png (report.py). --html FILE adds one page with the clips, CoTs, rewards and labels.
Memory: the model and one batch; the 8B in bf16 wants a GPU of 24 GB. Time: nearly all of it is thinking.
No CoT is masked here. --no-think leaves all of them out, which random CoT masking has trained the head for.

Symbols: r_A, r_B rewards of a pair; margin = r_A - r_B; label +1 (A is better), -1 (B), 0 (the same); n pairs; k CoTs.
"""

import dataclasses
import functools
import json
import os

import numpy as np
from transformers import AutoProcessor

import data
import parallel
from data import InputError, PreferencePair
from metrics import (
    accuracy_curve,
    accuracy_with_ties,
    accuracy_with_ties_cross_fitted,
    accuracy_without_ties,
    bootstrap_interval,
    checked,
    right,
    videoalign_compatible,
)
from model import DeScore
from plumbing import page, report
from plumbing.formats import open_table, read_scores, refuse_outside
from plumbing.jobs import Item, claim_out, run_phase
from plumbing.settings import arg, cli, parse
from rollout import make_engine, opened, think_phase

BENCHMARKS = {  # name -> what the CSV in --root may be called, the published name first
    "videogen-rewardbench": ("videogen-rewardbench.csv", "test_videogen_rewardbench.csv"),
    "genai-bench": ("genai-bench.csv", "genaibench.csv", "test_genai_bench.csv"),
    "in-domain": ("tabench.csv", "in-domain.csv", "test_in_domain.csv"),
}
GENAI_TIES = {"both": (), "tie": ("bothbad_vote", "bothbad"), "bothbad": ("tievote", "tie")}
GENAI_TIES["drop"] = GENAI_TIES["tie"] + GENAI_TIES["bothbad"]


@dataclasses.dataclass
class Settings:
    """Flags. Sizes are the paper's."""

    model: str = arg(None, "checkpoint folder with backbone, query and head")
    data: str = arg(None, "CSV of preference pairs")
    benchmark: list[str] = arg(
        None, "published benchmarks, found in --root; of several, each goes to OUT/NAME", list(BENCHMARKS)
    )
    root: str = arg(None, "folder of the videos (and the benchmark's CSV); paths that leave it are refused")
    dimension: str = arg("TA", "label column: TA (text alignment, the paper's), VQ, MQ or Overall")
    genai_ties: str = arg("both", "which of GenAI-Bench's two tie votes to keep, as ties", list(GENAI_TIES))
    video: str = arg(None, "one video to think about and score")
    prompt: str = arg(None, "the prompt of --video")
    scores: str = arg(None, "CSV of ready-made scores: reward_A,reward_B (row by row) or path,reward[,prompt]")
    compare: list[str] = arg(None, "several score files in one report; differences are to the first")
    think: bool = arg(True, "write a CoT before scoring")
    thoughts: int = arg(1, "CoTs per video: 1 is greedy; more are sampled at temperature 1, rewards averaged")
    max_new_tokens: int = arg(4096, "CoT tokens at most (paper: 4096)")
    score_from: list[str] = arg(
        ("head",), "head: DeScore's reward; text: the score that the CoT states, in OUT/text", ["head", "text"]
    )
    temperature: float = arg(None, "sampling temperature (default: 0 for one CoT, 1 for several)")
    engine: str = arg("transformers", "who writes the CoTs; vllm for real models", ["transformers", "vllm"])
    fps: float = arg(None, "sampled frames per second (default: the checkpoint's; paper: 2)")
    max_pixels: int = arg(None, "pixels per frame at most (default: the checkpoint's; paper: 200704)")
    dtype: str = arg("auto", "auto: bfloat16 on a GPU, else float32", ["auto", "float32", "bfloat16"])
    seed: int = arg(0, "seed of the sampled CoTs")
    batch_size: int = arg(8, "videos at once; changes speed, not results")
    skip_bad_videos: bool = arg(False, "leave out and list (OUT/skipped.jsonl) what cannot be read")
    videoalign_compatible: bool = arg(False, "also show accuracy with ties as VideoAlign's script computes it")
    out: str = arg("evaluation", "folder for everything that is written")
    html: str = arg(None, "page to write: clips, CoTs, rewards and labels of each pair")
    html_pairs: int = arg(200, "pairs on the page at most, spread evenly over the data")


# ---------------------------------------------------------------------------------------------------------------
# 1. All numbers of one reward model on one set of pairs
# ---------------------------------------------------------------------------------------------------------------
def measure(name: str, pairs: list[PreferencePair], rewards: np.ndarray) -> report.Judged:
    """rewards (n, 2) of A and B -> every number of the report. InputError names the row of a non-finite reward."""
    for pair, row in zip(pairs, rewards):
        if not np.isfinite(row).all():
            raise InputError(f"{name}, line {pair.line}: the rewards {row[0]} and {row[1]} must be finite numbers.")
    labels, margins = checked([p.label for p in pairs], rewards[:, 0] - rewards[:, 1])
    prompts = {}  # prompt -> group; not np.unique, which would pad every prompt to the longest
    groups = np.array([prompts.setdefault(p.prompt, len(prompts)) for p in pairs])
    accuracy, threshold = accuracy_with_ties(labels, margins)
    hits = {"without_ties": right(labels, margins), "with_ties": right(labels, margins, threshold)}
    decided = labels != 0
    numbers = {
        "name": name, "pairs": len(pairs), "human_ties": int((~decided).sum()), "prompts": len(prompts),
        "accuracy_without_ties": accuracy_without_ties(labels, margins) if decided.any() else None,
        "accuracy_without_ties_interval": bootstrap_interval(hits["without_ties"][decided], groups[decided]),
        "accuracy_with_ties": accuracy, "accuracy_with_ties_interval": bootstrap_interval(hits["with_ties"], groups),
        "threshold": threshold, "accuracy_with_ties_cross_fitted": accuracy_with_ties_cross_fitted(labels, margins),
        "accuracy_with_ties_videoalign_compatible": videoalign_compatible(labels, margins),
        "calibration": report.calibration(labels, margins),
    }  # fmt: skip
    makers = {}  # (model, model) -> indices of its pairs; which of the two was shown as A does not matter
    for i, pair in enumerate(pairs):
        if len(pair.extra) == 2:
            makers.setdefault(tuple(sorted(map(str, pair.extra.values()))), []).append(i)
    numbers["model_pairs"] = [
        {"models": names, "pairs": len(i), "with_ties": float(hits["with_ties"][i].mean()),
         "without_ties": float(hits["without_ties"][i][decided[i]].mean()) if decided[i].any() else None}
        for names, i in sorted(makers.items())
    ]  # fmt: skip
    return report.Judged(numbers, labels, margins, accuracy_curve(labels, margins), hits, groups)


# ---------------------------------------------------------------------------------------------------------------
# 2. What is to be judged: pairs, ready-made scores, lists of videos
# ---------------------------------------------------------------------------------------------------------------


def read_data(s: Settings) -> tuple[str, list[PreferencePair]]:
    """The CSV that the flags mean and its pairs, after --root and --genai-ties."""
    path = s.data or s.scores
    if s.benchmark:
        (benchmark,) = s.benchmark  # main goes through them one by one
        names = [n for n in BENCHMARKS[benchmark] if os.path.isfile(os.path.join(s.root, n))]
        if not names:
            raise InputError(f"{s.root}: holds none of {', '.join(BENCHMARKS[benchmark])} (README, 'Benchmarks').")
        path = os.path.join(s.root, names[0])
    pairs = data.read_pairs(path, s.dimension, s.root or None)
    if s.root:
        for pair in pairs:
            for video in pair.videos:
                refuse_outside(s.root, video, pair.line)
    if GENAI_TIES[s.genai_ties]:
        votes = {line: row["vote_type"].strip().lower() for line, row in open_table(path, ("vote_type",))[1]}
        pairs = [p for p in pairs if votes[p.line] not in GENAI_TIES[s.genai_ties]]
    return path, pairs


# ---------------------------------------------------------------------------------------------------------------
# 3. Think, then score. Each unique (video, prompt) once, however many pairs it is in
# ---------------------------------------------------------------------------------------------------------------
def score_phase(load_model, items: list[Item], thoughts: dict, s: Settings, ranks) -> tuple[dict, list[dict]]:
    """COLLECTIVE: reads the CoTs, writes the rewards. Records {video, prompt, reward: mean of rewards, rewards: k}."""

    def work(model, batch):
        if s.score_from == "text":
            texts = [thoughts[item[:2]]["thoughts"] for item in batch]  # B lists of k
            rewards = np.array([[overall_score(text) for text in row] for row in texts]).T  # (k, B)
            return records(batch, rewards)
        videos, prompts = opened(batch, s)
        cots = [thoughts[item[:2]]["thoughts"] if s.think else [None] for item in batch]  # B lists of k
        return records(batch, model.score_several(videos, prompts, cots).cpu().numpy().T.astype(float))

    def records(batch, rewards):  # rewards (k, B)
        return [{"video": i.video, "prompt": i.prompt, "reward": float(r.mean()), "rewards": r.tolist()}
                for i, r in zip(batch, rewards.T)]  # fmt: skip

    items = [item for item in items if not s.think or item[:2] in thoughts]  # the others were skipped while thinking
    return run_phase("rewards" if s.score_from == "head" else "text_rewards", items, load_model, work, s, ranks)


def overall_score(text: str) -> float:
    """The score that a CoT's answer states itself, 1 to 5: what a GENERATIVE reward model would return (Fig. 1a).

    A malformed answer gets 3, the middle.
    """
    score = (data.extract_answer(text) or {}).get("overall_score")
    return float(score) if isinstance(score, (int, float)) and np.isfinite(score) else 3.0


def loaders(s: Settings, ranks):
    """Two functions that open the model, and the engine on it, when first needed: a finished run loads neither."""

    @functools.cache
    def load_model():
        import torch

        return DeScore.from_pretrained(s.model, ranks.device, getattr(torch, s.dtype)).eval()

    @functools.cache
    def load_engine():
        if s.engine == "vllm":
            processor = AutoProcessor.from_pretrained(s.model)
            return make_engine("vllm", s.model, processor, ranks, seed=s.seed), processor
        model = load_model()
        return make_engine(
            "transformers", s.model, model.processor, ranks, model.backbone, rows_per_batch=s.batch_size
        ), model.processor

    return load_model, load_engine


def think_and_score(items: list[Item], s: Settings, ranks, load) -> tuple[dict, dict, list[dict]]:
    """COLLECTIVE: both phases. Returns {(video, prompt): record} of rewards, of thoughts ({} without), the skipped.

    `load`: the two functions of `loaders`.
    """
    claim_out(s, ranks)
    load_model, load_engine = load
    thoughts, unread = think_phase(load_engine, items, s, ranks) if s.think else ({}, [])
    rewards, unscored = score_phase(load_model, items, thoughts, s, ranks)
    skipped = unread + unscored
    if ranks.is_main:
        with open(os.path.join(s.out, "skipped.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in skipped)
    return rewards, thoughts, skipped


# ---------------------------------------------------------------------------------------------------------------
# 4. The script
# ---------------------------------------------------------------------------------------------------------------
def one_video(s: Settings, ranks, load) -> None:
    """Prints CoT and reward of --video."""
    (video,), _ = opened([Item(s.video, s.prompt, 0)], s)
    model, k = load[0](), s.thoughts
    texts = model.think([video] * k, [s.prompt] * k, s.max_new_tokens, s.temperature, s.seed) if s.think else [None]
    rewards = [float(model.score([video], [s.prompt], [text])[0]) for text in texts]
    for text, reward in zip(texts, rewards):
        ranks.print(f"{text or '(no CoT)'}\nreward {reward:+.4f}")
    if k > 1:
        ranks.print(f"mean reward {np.mean(rewards):+.4f}")
    ranks.print("(unbounded, no unit: only differences between videos of one prompt mean something)")


def judge_pairs(s: Settings, ranks, load) -> None:
    """Thinks and scores, or reads ready-made scores; writes the report."""
    path, pairs = read_data(s)
    root = s.root or os.path.dirname(path)
    unique = {}
    for pair in pairs:
        for video in pair.videos:
            unique.setdefault((video, pair.prompt), Item(video, pair.prompt, pair.line))
    items = list(unique.values())
    rewards, thoughts, skipped = {}, {}, []
    if s.scores or s.compare:
        scored = {file: read_scores(file, path, pairs, root) for file in s.compare or [s.scores]}
    else:
        rewards, thoughts, skipped = think_and_score(items, s, ranks, load)
        none = {"reward": float("nan")}
        scored = {s.model: np.array([[rewards.get((v, p.prompt), none)["reward"] for v in p.videos] for p in pairs])}
    if not ranks.is_main:
        return
    complete = np.all([np.isfinite(r).all(axis=1) for r in scored.values()], axis=0)
    if not complete.all() and not s.skip_bad_videos:
        line = pairs[int(complete.argmin())].line
        raise InputError(f"{path}, line {line}: a video has no reward; --skip-bad-videos leaves such pairs out.")
    kept = [pair for pair, is_complete in zip(pairs, complete) if is_complete]
    if not kept:
        raise InputError(f"{path}: no pair has a reward for both videos.")
    names = [os.path.basename(os.path.normpath(file)) for file in scored]
    names = names if len(set(names)) == len(names) else list(scored)
    judged = [measure(name, kept, r[complete]) for name, r in zip(names, scored.values())]
    for one in judged:
        one.numbers.update(data=path, benchmark=s.benchmark[0] if s.benchmark else None)
        one.numbers.update(skipped_pairs=len(pairs) - len(kept), skipped_videos=len(skipped))
        one.numbers["difference_to_first"] = difference(one, judged[0]) if one is not judged[0] else None
    if thoughts:
        records = [thoughts[item[:2]] for item in items if item[:2] in thoughts]
        judged[0].numbers["thoughts"] = report.thought_statistics(records, kept)
    report.write(s.out if s.score_from == "head" else os.path.join(s.out, "text"), judged, s.videoalign_compatible)
    if rewards:
        rows = [(*item[:2], rewards[item[:2]]["reward"]) for item in items if item[:2] in rewards]
        report.write_scores(os.path.join(s.out, "scores.csv"), rows, root)
    if s.html:
        first = next(iter(scored.values()))
        page.write_page(s.html, judged[0], kept, first[complete], thoughts, data.sample_frames, s.html_pairs)


def difference(one: report.Judged, first: report.Judged) -> dict:
    """Accuracy minus the first model's on the same pairs, with paired-bootstrap intervals."""
    out = {}
    for kind, keep in (("without_ties", one.labels != 0), ("with_ties", np.full(len(one.labels), True))):
        gap = one.hits[kind][keep].astype(float) - first.hits[kind][keep]
        out[kind] = float(gap.mean()) if len(gap) else None
        out[f"{kind}_interval"] = bootstrap_interval(gap, one.groups[keep]) if len(gap) else None
    return out


def check(s: Settings) -> None:
    """Flags that do not fit together, before anything is opened."""
    chosen = [flag for flag in ("video", "scores", "compare") if getattr(s, flag)]
    problems = {
        "give only one of --video, --scores, --compare": len(chosen) > 1,
        "give --data FILE or --benchmark NAME": not (s.video or s.scores or s.data or s.benchmark),
        "--data and --benchmark exclude each other": s.data and s.benchmark,
        "--html names one file, so give one --benchmark and one --score-from":
        max(len(s.benchmark or []), len(s.score_from)) > 1 and s.html,
        "--benchmark needs --root, the folder it was downloaded to": s.benchmark and not s.root,
        "--video needs --prompt, and --prompt needs --video": bool(s.video) != bool(s.prompt and s.prompt.strip()),
        "--thoughts, --batch-size, --max-new-tokens and --html-pairs must be at least 1": min(
            s.thoughts, s.batch_size, s.max_new_tokens, s.html_pairs) < 1,
        "--fps must be positive and --max-pixels at least 1024": (s.fps or 1) <= 0 or (s.max_pixels or 1024) < 1024,
        "--score-from text needs CoTs, so not --no-think": "text" in s.score_from and not s.think,
        "--thoughts above 1 and --no-think exclude each other": s.thoughts > 1 and not s.think,
        "give --model DIR": not s.model and not (s.scores or s.compare),
    }  # fmt: skip
    for problem, is_so in problems.items():
        if is_so:
            raise InputError(f"{problem} (--help shows all flags).")


def make_folders(s: Settings) -> None:
    """Now, not after hours of thinking, is when a place that cannot be written to should be noticed."""
    try:
        for folder in (
            s.out,
            os.path.join(s.out, "text") if s.score_from == "text" else s.out,
            *(os.path.dirname(file) or "." for file in (s.html,) if file),
        ):
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written to ({error.strerror}).") from error


def resolve(s: Settings, ranks) -> Settings:
    """Settings with what was left to the checkpoint (it knows how its training sampled frames) and to the device."""
    path = os.path.join(s.model, "descore.json")
    try:
        with open(path, encoding="utf-8") as file:
            trained = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{s.model}: is no DeScore checkpoint ({error}); give a folder that training wrote") from error
    temperature = float(s.thoughts > 1) if s.temperature is None else s.temperature
    dtype = s.dtype if s.dtype != "auto" else "bfloat16" if ranks.device.type == "cuda" else "float32"
    fps, max_pixels = s.fps or trained.get("fps", 2.0), s.max_pixels or trained.get("max_pixels", 448 * 448)
    return dataclasses.replace(s, fps=fps, max_pixels=max_pixels, dtype=dtype, temperature=temperature)


def main(argv=None) -> None:
    s = parse(Settings, __doc__, argv)
    check(s)
    ranks = parallel.start(s.seed)
    if not (s.scores or s.compare):
        s = resolve(s, ranks)
    judge = one_video if s.video else judge_pairs
    several, load = len(s.benchmark or []) > 1, loaders(s, ranks)  # the model is loaded once for all of them
    each = [  # one report each: of one benchmark, and with score_from ONE of head and text, as the phases expect
        dataclasses.replace(
            s, benchmark=[name] if name else None, out=os.path.join(s.out, name) if several else s.out, score_from=kind
        )
        for name in s.benchmark or [None]
        for kind in s.score_from
    ]
    for one in each:
        if not s.video:
            make_folders(one)
        judge(one, ranks, load)
    ranks.finish()


if __name__ == "__main__":
    cli(main)
