"""Evaluation: think, then score, then count how often the rewards agree with people.

    python evaluate.py --model DIR --data pairs.csv --out eval/run     pairs in any format of docs/data.md
    torchrun --nproc_per_node 8 evaluate.py --model DIR --benchmark videogen-rewardbench --root DIR --out eval/vgrb
    python evaluate.py --model DIR --video clip.mp4 --prompt "a red circle rises"        one video: its CoT and reward
    python evaluate.py --data pairs.csv --scores scores.csv             somebody else's rewards, judged by this code
    python evaluate.py --data pairs.csv --compare ours.csv theirs.csv   several score files in one table and figure

In: a checkpoint folder, a CSV. Out, in --out: thoughts*.jsonl and rewards*.jsonl (one line per unique video and prompt,
one file per rank; the same command goes on where it was killed), scores.csv, skipped.jsonl, settings.json, and
report.json, report.md, report.png (report.py). --html FILE adds one page with the clips, CoTs, rewards and labels.
Memory: the model and one batch; the 8B in bf16 wants a GPU of 24 GB. Time: nearly all of it is thinking.
--sanity asks instead what the model reads: rewards after the prompt or the clip was changed (lab/study/sanity.py).
No CoT is masked here. --no-think leaves all of them out, which random CoT masking has trained the head for.

Symbols: r_A, r_B rewards of a pair; margin = r_A - r_B; label +1 (A is better), -1 (B), 0 (the same); n pairs; k CoTs.
"""

import dataclasses
import os

import numpy as np
import torch

import data
import parallel
from data import PreferencePair
from lab.serve import page
from lab.study import sanity
from metrics import (
    accuracy_curve,
    accuracy_with_ties,
    accuracy_with_ties_cross_fitted,
    accuracy_without_ties,
    bootstrap_interval,
    calibration,
    checked,
    paired_difference,
    right,
    videoalign_compatible,
)
from model import DeScore
from plumbing import report
from plumbing.checkpoint import trained_settings
from plumbing.formats import open_table, read_scores, refuse_outside
from plumbing.jobs import Item, Phase, claim_out, write_skipped
from plumbing.settings import InputError, arg, cli, evaluation_flags, parse, writable
from rollout import Thinker, ThinkingSettings, decode_cot, open_batch, require_short, think_phase
from rules import overall_score

BENCHMARKS = {  # name -> what the CSV in --root may be called, the published name first
    "videogen-rewardbench": ("videogen-rewardbench.csv", "test_videogen_rewardbench.csv"),
    "genai-bench": ("genai-bench.csv", "genaibench.csv", "test_genai_bench.csv"),
    "in-domain": ("tabench.csv", "in-domain.csv", "test_in_domain.csv"),
}
DROPPED_VOTES = {  # --genai-ties -> the votes whose pairs are left out
    "both": (),
    "tie": ("bothbad_vote", "bothbad"),
    "bothbad": ("tievote", "tie"),
    "drop": ("bothbad_vote", "bothbad", "tievote", "tie"),
}


@dataclasses.dataclass
class Settings(ThinkingSettings):
    """Flags; more in rollout.ThinkingSettings. Sizes are the paper's."""

    model: str = arg(None, "checkpoint folder with backbone, query and head")
    data: str = arg(None, "CSV of preference pairs")
    benchmark: list[str] = arg(
        None, "published benchmarks, found in --root; of several, each goes to OUT/NAME", list(BENCHMARKS))
    root: str = arg(None, "folder of the videos (and the benchmark's CSV); paths that leave it are refused")
    genai_ties: str = arg("both", "which of GenAI-Bench's two tie votes to keep, as ties", list(DROPPED_VOTES))
    video: str = arg(None, "one video to think about and score")
    prompt: str = arg(None, "the prompt of --video")
    scores: str = arg(None, "CSV of ready-made scores: reward_A,reward_B (row by row) or path,reward[,prompt]")
    compare: list[str] = arg(None, "several score files in one report; differences are to the first")
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
    sanity: bool = arg(False, "what does the model read? rewards after changed prompts and clips, in OUT/sanity.md")
    videoalign_compatible: bool = arg(False, "also show accuracy with ties as VideoAlign's script computes it")
    out: str = arg("evaluation", "folder for everything that is written")
    html: str = arg(None, "page to write: clips, CoTs, rewards and labels of each pair")
    html_pairs: int = arg(200, "pairs on the page at most, spread evenly over the data", at_least=1)


# ---------------------------------------------------------------------------------------------------------------
# 1. All numbers of one reward model on one set of pairs
# ---------------------------------------------------------------------------------------------------------------
def measure(name: str, pairs: list[PreferencePair], rewards: np.ndarray) -> report.Judged:
    """rewards (n, 2) of A and B -> every number of the report. InputError names the row of a non-finite reward."""
    for pair, row in zip(pairs, rewards):
        if not np.isfinite(row).all():
            raise InputError(f"{name}, line {pair.line}: the rewards {row[0]} and {row[1]} must be finite numbers.")
    # Only the difference counts: BT's loss (Eq. 3) is blind to a constant added to both rewards, so a reward by itself
    # has no zero and no unit, and two prompts' rewards cannot be compared.
    labels, margins = checked([p.label for p in pairs], rewards[:, 0] - rewards[:, 1])
    prompts = {}  # prompt -> group; not np.unique, which would pad every prompt to the longest
    groups = np.array([prompts.setdefault(p.prompt, len(prompts)) for p in pairs])
    # The model never says "the same". A pair counts as called a tie if |margin| <= threshold, the one that does best.
    accuracy, threshold = accuracy_with_ties(labels, margins)
    hits = {"without_ties": right(labels, margins), "with_ties": right(labels, margins, threshold)}
    decided = labels != 0  # human ties have no right side: accuracy without ties leaves them out
    numbers = {
        "name": name, "pairs": len(pairs), "human_ties": int((~decided).sum()), "prompts": len(prompts),
        "accuracy_without_ties": accuracy_without_ties(labels, margins) if decided.any() else None,
        "accuracy_without_ties_interval": bootstrap_interval(hits["without_ties"][decided], groups[decided]),
        "accuracy_with_ties": accuracy, "accuracy_with_ties_interval": bootstrap_interval(hits["with_ties"], groups),
        "threshold": threshold, "accuracy_with_ties_cross_fitted": accuracy_with_ties_cross_fitted(labels, margins),
        "accuracy_with_ties_videoalign_compatible": videoalign_compatible(labels, margins),
        "calibration": calibration(labels, margins),
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
    return report.Judged(numbers, labels, margins, accuracy_curve(labels, margins), hits, groups)


# ---------------------------------------------------------------------------------------------------------------
# 2. What is to be judged: one set of pairs is one job
# ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Job:
    """One set of pairs, what is found out about it, and the folder where that is kept."""

    path: str  # the CSV
    pairs: list[PreferencePair]
    out: str
    root: str  # relative video paths start here
    benchmark: str | None = None
    thoughts: dict = dataclasses.field(default_factory=dict)  # {(video, prompt): record of think_phase}
    rewards: dict = dataclasses.field(default_factory=dict)  # {(video, prompt): record of score_phase}
    skipped: list[dict] = dataclasses.field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """Each (video, prompt) once, however many pairs it is in."""
        items = {}
        for pair in self.pairs:
            for video in pair.videos:
                items.setdefault((video, pair.prompt), Item(video, pair.prompt, pair.line))
        return list(items.values())


def read_job(s: Settings, benchmark: str | None = None) -> Job:
    """The pairs of --data, or of one benchmark, after --root and --genai-ties."""
    path, out = s.data or s.scores, s.out
    if benchmark:
        names = [n for n in BENCHMARKS[benchmark] if os.path.isfile(os.path.join(s.root, n))]
        if not names:
            raise InputError(f"{s.root}: holds none of {', '.join(BENCHMARKS[benchmark])} (docs/benchmarks.md).")
        path = os.path.join(s.root, names[0])
        out = os.path.join(s.out, benchmark) if len(s.benchmark) > 1 else s.out
    pairs = data.read_pairs(path, s.dimension, s.root or None)
    if s.root:  # a benchmark's CSV comes from the net: "../../secret.mp4" must not be opened
        for pair in pairs:
            for video in pair.videos:
                refuse_outside(s.root, video, pair.line)
    # GenAI-Bench lets people say "both good" and "both bad". Both are ties to us; published numbers differ in that.
    if DROPPED_VOTES[s.genai_ties]:
        votes = {line: row["vote_type"].strip().lower() for line, row in open_table(path, ("vote_type",))[1]}
        pairs = [pair for pair in pairs if votes[pair.line] not in DROPPED_VOTES[s.genai_ties]]
    return Job(path, pairs, out, s.root or os.path.dirname(path), benchmark)


# ---------------------------------------------------------------------------------------------------------------
# 3. Think, then score. What DeScore.reward does for one batch, for many and resumable
# ---------------------------------------------------------------------------------------------------------------
class Judge(Thinker):
    """The engine that thinks and the model that scores, each opened when first needed: a finished run opens neither."""

    model = None

    def open_model(self) -> DeScore:
        """The DeScore of --model, read once."""
        if self.model is None:
            dtype = getattr(torch, self.s.dtype)
            self.model = DeScore.from_pretrained(self.s.model, self.ranks.device, dtype).eval()
        return self.model

    def open_backbone(self):
        """The transformers engine thinks with the backbone of the model that scores."""
        return self.open_model().backbone

    def stop_thinking(self) -> None:
        """All CoTs are there: the engine's memory is for the model that scores."""
        if self.engine is not None:
            self.engine.sleep(level=2)


def score_phase(items: list[Item], thoughts: dict, out: str, s: Settings, ranks, judge: Judge):
    """COLLECTIVE: the head's rewards. Returns ({(video, prompt): record}, what was skipped); one line each in OUT.

    A record: video, prompt, rewards: of the k CoTs, reward: their mean. The CoTs go in as the ids that were sampled:
    decoded and encoded again a text may become other tokens, and the head would score what nobody thought.
    """
    if s.think:
        items = [item for item in items if item[:2] in thoughts]  # the others were skipped while thinking
    # What a former run of the same command has scored is not scored again.
    phase = Phase("rewards", items, out, s.skip_bad_videos, ranks)
    if phase.to_do:
        model = judge.open_model()
        for batch in phase.batches(s.batch_size):
            good = open_batch(batch, s, phase, model.processor.tokenizer)
            if not good:
                continue
            videos, prompts = [video for _, video in good], [item.prompt for item, _ in good]
            cots = [thoughts[item[:2]]["token_ids"] if s.think else [None] for item, _ in good]  # None: as if masked
            # ONE forward for the batch: prompt, CoT and query in a row; the reward is head(h_query), a dot product.
            for (item, _), row in zip(good, model.score(model.encode(videos, prompts), cots).tolist()):
                phase.write({"video": item.video, "prompt": item.prompt, "reward": float(np.mean(row)), "rewards": row})
    return phase.finish()


def text_rewards(thoughts: dict) -> dict:
    """The rewards that the CoTs state, as score_phase returns the head's.

    Scores have few different values, so two videos often get the same one. An equal score is wrong wherever people
    decided, so texts look worse than they are: lab/study counts equal scores half.
    """
    return {key: {"reward": float(np.mean([overall_score(text) for text in record["thoughts"]]))}
            for key, record in thoughts.items()}


# ---------------------------------------------------------------------------------------------------------------
# 4. The report
# ---------------------------------------------------------------------------------------------------------------
def pair_rewards(pairs: list[PreferencePair], rewards: dict) -> np.ndarray:
    """{(video, prompt): record} -> (n, 2) rewards of A and B; nan where a video has none."""
    none = {"reward": float("nan")}  # not 0: a missing reward must never look like one
    return np.array([[rewards.get((video, p.prompt), none)["reward"] for video in p.videos] for p in pairs])


def write_report(job: Job, out: str, scored: dict[str, np.ndarray], s: Settings) -> None:
    """scored {name of a model or score file: (n, 2) rewards} -> report.json, .md and .png in `out`, and --html."""
    complete = np.all([np.isfinite(r).all(axis=1) for r in scored.values()], axis=0)
    if not complete.all() and not s.skip_bad_videos:
        line = job.pairs[int(complete.argmin())].line
        raise InputError(f"{job.path}, line {line}: a video has no reward; --skip-bad-videos leaves such pairs out.")
    kept = [pair for pair, is_complete in zip(job.pairs, complete) if is_complete]
    if not kept:
        raise InputError(f"{job.path}: no pair has a reward for both videos.")
    # Every model is judged on the pairs that ALL of them scored, or the easier pairs would flatter one of them.
    names = [os.path.basename(os.path.normpath(file)) for file in scored]
    names = names if len(set(names)) == len(names) else list(scored)
    judged = [measure(name, kept, r[complete]) for name, r in zip(names, scored.values())]
    for one in judged:
        one.numbers.update(data=job.path, benchmark=job.benchmark)
        one.numbers.update(skipped_pairs=len(job.pairs) - len(kept), skipped_videos=len(job.skipped))
        one.numbers["difference_to_first"] = difference(one, judged[0]) if one is not judged[0] else None
    if job.thoughts:
        records = [job.thoughts[item[:2]] for item in job.items if item[:2] in job.thoughts]
        judged[0].numbers["thoughts"] = report.thought_statistics(records, kept)
    report.write(out, judged, s.videoalign_compatible)
    if s.html:
        first = next(iter(scored.values()))
        page.write_page(s.html, judged[0], kept, first[complete], job.thoughts, data.sample_frames, s.html_pairs)


def report_model(job: Job, s: Settings) -> None:
    """The report and the scores of each kind that --score-from asks for: the head's in OUT, the text's in OUT/text."""
    for kind in s.score_from:
        rewards = job.rewards if kind == "head" else text_rewards(job.thoughts)
        out = job.out if kind == "head" else os.path.join(job.out, "text")
        write_report(job, out, {s.model: pair_rewards(job.pairs, rewards)}, s)
        rows = [(*item[:2], rewards[item[:2]]["reward"]) for item in job.items if item[:2] in rewards]
        report.write_scores(os.path.join(out, "scores.csv"), rows, job.root)


def difference(one: report.Judged, first: report.Judged) -> dict:
    """Both accuracies minus the first model's on the same pairs, with paired-bootstrap intervals."""
    out = {}
    # Without ties only decided pairs count; with ties every pair does, human ties included.
    for kind, keep in (("without_ties", one.labels != 0), ("with_ties", np.full(len(one.labels), True))):
        gap = paired_difference(one.hits[kind][keep], first.hits[kind][keep], one.groups[keep])
        out[kind], out[f"{kind}_interval"] = gap
    return out


# ---------------------------------------------------------------------------------------------------------------
# 5. The script
# ---------------------------------------------------------------------------------------------------------------
def make_folders(out: str, s: Settings) -> None:
    """Fails on unwritable folders before hours of generation."""
    writable([out, *([os.path.join(out, "text")] if "text" in s.score_from else [])])
    if s.html:
        writable([os.path.dirname(s.html) or "."])


def resolve(s: Settings, ranks) -> Settings:
    """Settings with what was left to the checkpoint (it knows how its training sampled frames) and to the device."""
    trained = trained_settings(s.model)
    if trained.get("score") == "text" and "head" in s.score_from:
        raise InputError(f"{s.model}: its head is not trained, its score stands in the text; use --score-from text.")
    # Greedy for one CoT, so that a report can be made again; several greedy ones would all be the same.
    temperature = float(s.thoughts > 1) if s.temperature is None else s.temperature
    dtype = s.dtype if s.dtype != "auto" else "bfloat16" if ranks.device.type == "cuda" else "float32"
    fps, max_pixels = s.fps or trained.get("fps", 2.0), s.max_pixels or trained.get("max_pixels", 448 * 448)
    return dataclasses.replace(s, fps=fps, max_pixels=max_pixels, dtype=dtype, temperature=temperature)


def one_video(s: Settings, ranks, judge: Judge) -> None:
    """Prints CoT and reward of --video."""
    # The same two steps as for many: think, then score.
    model, k = judge.open_model(), s.thoughts
    require_short(s.prompt, model.processor.tokenizer)
    prefixes = model.encode([data.sample_frames(s.video, s.fps, s.max_pixels)], [s.prompt])
    cots = model.think(prefixes, s.max_new_tokens, s.temperature, s.seed, k) if s.think else [[None]]
    (cots,), (rewards,) = cots, model.score(prefixes, cots).tolist()
    for cot, reward in zip(cots, rewards):
        text = decode_cot(model.processor.tokenizer, cot) if cot else "(no CoT)"
        ranks.print(f"{text}\nreward {reward:+.4f}")
    if k > 1:
        ranks.print(f"mean reward {np.mean(rewards):+.4f}")
    ranks.print("(unbounded, no unit: only differences between videos of one prompt mean something)")


def main(argv=None) -> None:
    """All sets are thought about first, then scored: the engine's memory is free when scoring starts."""
    s = parse(Settings, __doc__, argv)
    evaluation_flags(s)
    ranks = parallel.start(s.seed)
    ready_made = s.compare or ([s.scores] if s.scores else [])
    if not ready_made:
        s = resolve(s, ranks)
    judge = Judge(s, ranks)
    jobs = [] if s.video else [read_job(s, name) for name in s.benchmark or [None]]
    for job in jobs:
        make_folders(job.out, s)
    if s.video:
        one_video(s, ranks, judge)
    elif s.sanity:
        sanity.run(jobs[0], s, ranks, judge, think_phase, score_phase, text_rewards)
    elif not ready_made:
        for job in jobs:  # 1 think: over all sets first, so that the model that scores finds the engine's memory free
            claim_out(job.out, s, ranks)
            if s.think:
                job.thoughts, job.skipped = think_phase(job.items, job.out, s, ranks, judge)
        judge.stop_thinking()
        for job in jobs:  # 2 score
            if "head" in s.score_from:
                job.rewards, unscored = score_phase(job.items, job.thoughts, job.out, s, ranks, judge)
                job.skipped += unscored
            write_skipped(job.out, job.skipped, ranks)
    if ranks.is_main and not s.sanity:
        for job in jobs:  # 3 compare with people
            if ready_made:
                scored = {file: read_scores(file, job.path, job.pairs, job.root) for file in ready_made}
                write_report(job, job.out, scored, s)
            else:
                report_model(job, s)
    ranks.finish(judge.engine)


if __name__ == "__main__":
    cli(main)
