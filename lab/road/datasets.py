"""Published preference data -> our CSVs. Nothing is downloaded here: lab/road/README.md has the commands for that.

    python -m lab.road.datasets videofeedback2 --json train_SFT.json --videos VideoFeedback2/videos --out vf2.csv
    python -m lab.road.datasets rapidata --parquet data/train-*.parquet --videos Videos --out rapidata.csv
    python -m lab.road.datasets mj-bench-video --json train.json --videos MJ-BENCH-VIDEO/videos --out mj.csv
    python -m lab.road.datasets genai-bench --parquet test.parquet --videos GenAI-Bench --out genai-bench.csv
    python -m lab.road.datasets join --data vf2.csv rapidata.csv --out all.csv

Each prints what it kept, the ties, and what it dropped and why. --exclude drops prompts that a benchmark also has;
--val takes a share of the prompts, with all their pairs, for validation. Labels: A, B, same (data.py).
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import typing

import data
from lab.road.published import Tally, Videos, read_json, read_parquet, text_of
from plumbing.formats import open_table, prompt_in
from plumbing.settings import InputError, cli, writable, write_csv

LICENCES = {  # as the cards said when they were looked at; the makers of the videos may add terms of their own
    "videofeedback2": "Apache-2.0 (TIGER-Lab/VideoFeedback2)",
    "rapidata": "Apache-2.0 on the cards that were seen (Rapidata/text-2-video-human-preferences-*)",
    "mj-bench-video": "MIT (MJ-Bench/MJ-BENCH-VIDEO); many captions are sexual or violent",
    "genai-bench": "CC-BY-4.0, MIT before (TIGER-Lab/GenAI-Bench); for evaluation only",
    "join": "that of the parts",
}
LABELS = {1: "A", -1: "B", 0: "same"}
VOTES = ("leftvote", "rightvote", "tievote", "bothbad_vote")


class Pair(typing.NamedTuple):
    """Two videos of one prompt. label: "A", "B", "same", or one of VOTES. verdicts: {dimension: verdict} of each."""

    video_a: str
    video_b: str
    prompt: str
    label: str
    verdicts: tuple[dict, dict] | None = None
    models: tuple[str, str] = ("", "")


# ---- 1. One function per set: its rows -> pairs ----------------------------------------------------------------
def videofeedback2_row(row: dict) -> tuple[str, str, int]:
    """A row of VideoFeedback2 -> (video as listed, prompt, alignment 1-5). ValueError: says what is wrong.

    Three shapes: train (`conversations`, `videos`), RL (`problem`, `solution`, `path`), test (`video_name`, `prompt`,
    `t2v_score`). Seen in the authors' scripts, github.com/TIGER-AI-Lab/VideoScore2, data/data_sft.py and data_rl.py.
    The score is read behind </think>: about a third of the thoughts state one, before the scores were reconciled.
    """
    if "video_name" in row:
        video, prompt = f"{row['video_name']}.mp4", text_of(row.get("prompt"))
        told = f"alignment: {row.get('t2v_score')}"
    else:
        if "conversations" in row:
            said = {turn["from"]: turn["value"] for turn in row["conversations"]}
            question, told, video = said["human"], said["gpt"].split("</think>")[-1], row["videos"][0]
        else:
            question, told, video = row["problem"], row["solution"], row["path"]
        match = re.search(r"its text prompt:\s*(.*?)\s*Based on the video content", question, flags=re.DOTALL)
        prompt = text_of(match.group(1).removesuffix(".")) if match else ""  # the full stop is their template's
    if not re.search(r"\w", prompt):
        raise ValueError("no text prompt")
    scores = re.findall(r"alignment:\s*(-?\d+(?:\.\d+)?)", told)
    if not scores:
        raise ValueError("no text-to-video alignment score")
    if float(scores[-1]) not in (1, 2, 3, 4, 5):
        raise ValueError("score outside 1-5")
    return video, prompt, int(float(scores[-1]))


def numbered(path: str):
    """(name, row) of each row of a JSON file."""
    return ((f"row {number}", row) for number, row in enumerate(read_json(path), 1))


def scored_videos(named, read, videos: Videos, tally: Tally):
    """Yields (path, prompt, score) of each row that can be used, a video once. read(row) -> (listed, prompt, score)."""
    seen = set()
    for name, row in named:
        tally.read += 1
        try:
            listed, prompt, score = read(row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            told = isinstance(error, ValueError)
            tally.drop(str(error) if told else "row without the published fields", name)
            continue
        path, why_not = videos.find(listed)
        if path is None or path in seen:
            tally.drop(why_not or "video listed twice", listed)
            continue
        seen.add(path)
        yield path, prompt, score


def videofeedback2(args, tally: Tally) -> list[Pair]:
    """Pairs inside a prompt whose alignment scores differ by --min-gap or more; --ties adds those with equal scores.

    A and B are drawn by hash, so that "A is better" is no hint. --per-prompt bounds how often a prompt comes.
    """
    videos, prompts = Videos(args.videos, args.check_videos), {}
    for path, prompt, score in scored_videos(numbered(args.json), videofeedback2_row, videos, tally):
        prompts.setdefault(prompt, []).append((path, score))
    pairs, ties, close = [], 0, 0
    for prompt, scored in prompts.items():
        found = []
        for one, two in itertools.combinations(sorted(scored, key=lambda item: share_of(os.path.basename(item[0]))), 2):
            ties += one[1] == two[1]
            close += 0 < abs(one[1] - two[1]) < args.min_gap
            if abs(one[1] - two[1]) >= args.min_gap or (args.ties and one[1] == two[1]):
                label = "same" if one[1] == two[1] else "BA"[one[1] > two[1]]
                found.append(Pair(one[0], two[0], prompt, label))
        found.sort(key=lambda pair: share_of(os.path.basename(pair.video_a) + os.path.basename(pair.video_b)))
        pairs += found[: args.per_prompt or None]
    print(f"  {sum(map(len, prompts.values()))} videos of {len(prompts)} prompts; {ties} pairs with equal scores"
          f"{'' if args.ties else ' (left out; --ties keeps them)'}, {close} closer than --min-gap {args.min_gap:g}")
    return pairs


def rapidata(args, tally: Tally) -> list[Pair]:
    """Rapidata's preferences: each side's share of the (weighted) votes on --dimension; too close is left out.

    Columns seen in a public loader of these sets (file_name1, weighted_results1_Alignment, ...); that file_name is the
    name of a file in the set's video folder was read there too, and not tried with the data.
    """
    sides = [f"weighted_results{side}_{args.dimension}" for side in (1, 2)]
    videos, pairs, close = Videos(args.videos, args.check_videos), [], 0
    for name, row in read_parquet(args.parquet, ("prompt", "file_name1", "file_name2", *sides)):
        tally.read += 1
        shares = [row[side] for side in sides]
        if any(share is None or share != share for share in shares):
            tally.drop(f"no votes on {args.dimension}", name)
        elif not all(0 <= share <= 1 for share in shares):
            tally.drop("share of votes outside 0-1", name)
        else:
            gap = round(shares[0] - shares[1], 6)  # .6 - .4 is .19999999999999996
            if 0 < abs(gap) < args.min_gap or (gap == 0 and not args.ties):
                close += 1
                continue
            label = "same" if gap == 0 else "BA"[gap > 0]
            add_pair(pairs, tally, videos, name, (row["file_name1"], row["file_name2"]), row["prompt"], label)
    print(f"  {close} pairs closer than --min-gap {args.min_gap:g}, or equal, left out")
    return pairs


MJ_DIMENSIONS = {"object": "subject", "actions": "dynamics", "location": "environment"}
MJ_VERDICTS = {1: "2", 2: "0", 0: "N/A"}  # 1 is GOOD, 2 is BAD, 0 is irrelevant: a 2 of theirs is a 0 of ours
MJ_LABELS = {"Video 1 better": "A", "Video 2 better": "B", "Same": "same"}


def mj_bench_video(args, tally: Tally) -> list[Pair]:
    """MJ-Bench-Video: pairs by their Alignment preference, and human verdicts on three of our five dimensions.

    "Video 1" is video_0. Polarity and columns: scripts/data_processor/dataset.py (`process_labels`: 1 good, 2 bad, else
    irrelevant; `deal_preference`) and datas/test.json of the authors' github.com/aiming-lab/MJ-Video.
    A row with an unknown preference or score is dropped, and counted in `tally`.
    """
    videos, pairs = Videos(args.videos, args.check_videos), []
    for name, row in numbered(args.json):
        tally.read += 1
        try:
            if row.get("discard"):
                tally.drop("the authors marked it `discard`", name)
                continue
            listed, prompt = (row["video_0_path"], row["video_1_path"]), row["caption"]
            preferred = row["overall_preference"] if args.overall else row["category_preference"]["Alignment"]
            if preferred not in MJ_LABELS:
                raise ValueError(f"unknown preference {preferred!r}")
            labels = [row[f"video_{side}_label"] for side in (0, 1)]
            if any(label[theirs] not in MJ_VERDICTS for label in labels for theirs in MJ_DIMENSIONS):
                raise ValueError("score outside 0-2")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            told = isinstance(error, ValueError)
            tally.drop(str(error) if told else "row without the published fields", name)
            continue
        verdicts = tuple({d: MJ_VERDICTS[label[theirs]] for theirs, d in MJ_DIMENSIONS.items()} for label in labels)
        add_pair(pairs, tally, videos, name, listed, prompt, MJ_LABELS[preferred], verdicts)
    return pairs


def genai_bench(args, tally: Tally) -> list[Pair]:
    """GenAI-Bench's parquet -> its CSV. `left_video` is a URL; the file's name is looked up in --videos.

    Columns and URLs: github.com/TIGER-AI-Lab/GenAI-Bench, inference.py and genaibench/utils.py.
    """
    videos, pairs = Videos(args.videos, args.check_videos), []
    columns = ("prompt", "left_model", "right_model", "left_video", "right_video", "vote_type")
    for name, row in read_parquet(args.parquet, columns):
        tally.read += 1
        if row["vote_type"] not in VOTES:
            tally.drop("unknown vote", name)
            continue
        listed, models = (row["left_video"], row["right_video"]), (row["left_model"], row["right_model"])
        add_pair(pairs, tally, videos, name, listed, row["prompt"], row["vote_type"], models=models)
    return pairs


def join(args, tally: Tally) -> list[Pair]:
    """Several of our CSVs -> one, for scripts that take a single --data. Labels alone: no verdicts, no CoTs."""
    pairs = [pair for path in args.data for pair in data.read_pairs(path)]
    tally.read = len(pairs)
    more = sum(pair.annotation_a is not None or pair.cot_a is not None for pair in pairs)
    if more:
        print(f"  {more} pairs have verdicts or CoTs, which are not carried over")
    return [Pair(*pair.videos, pair.prompt, LABELS[pair.label]) for pair in pairs]


def add_pair(pairs, tally, videos, name, listed, prompt, label, verdicts=None, models=("", "")) -> None:
    """Appends the pair, or tells the tally why not."""
    found = [videos.find(text_of(video)) for video in listed]
    why_not = next((why for path, why in found if path is None), "")
    if not text_of(prompt):
        why_not = "no prompt"
    elif not why_not and found[0] == found[1]:
        why_not = "the same video twice"
    if why_not:
        tally.drop(why_not, name)
    else:
        pairs.append(Pair(found[0][0], found[1][0], text_of(prompt), label, verdicts, models))


# ---- 2. What all sets share: benchmark prompts out, a split by prompt, one CSV ---------------------------------
def plain(prompt: str) -> str:
    """A prompt without case, punctuation and runs of blanks: two sets rarely copy those alike."""
    return re.sub(r"\W+", " ", prompt.casefold()).strip() or prompt


def share_of(text: str) -> float:
    """A number in [0, 1) that the text alone decides: a prompt lands on the same side in every set and every run.

    Splitting the larger part again needs another --seed: with the same one, its smallest numbers are gone already.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def write_pairs(pairs: list[Pair], path: str) -> None:
    """Pairs -> the CSV of their kind: GenAI-Bench's, stage 2's if there are verdicts, else stage 1's.

    InputError: the CSV would not lie beside or above the videos.
    """
    folder = os.path.dirname(os.path.abspath(path))
    rows = []
    for pair in pairs:
        videos = [os.path.relpath(video, folder) for video in pair[:2]]
        if pair.label in VOTES:
            if any(video.startswith("..") for video in videos):
                raise InputError(f"--out {path}: must lie beside or above --videos; evaluation opens nothing outside.")
            sides = zip(("left_model", "right_model", "left_video", "right_video"), (*pair.models, *videos))
            rows.append({"prompt": pair.prompt, **dict(sides), "vote_type": pair.label})
        elif pair.verdicts:
            answer = {f"video_{n}_scores": verdicts for n, verdicts in enumerate(pair.verdicts, 1)}
            answer = f"<answer>{json.dumps({**answer, 'gsb_result': pair.label})}</answer>"
            rows.append({"videos": json.dumps(videos), "problem": pair.prompt, "answer": answer})
        else:
            both = {"problem": pair.prompt, "prompt": pair.prompt}
            rows.append({"videos": json.dumps(videos), **both, "GSB": pair.label})
    writable([folder])
    write_csv(path, list(rows[0]), [list(row.values()) for row in rows])
    labels = [pair.label for pair in pairs]
    counts = ", ".join(f"{labels.count(label)} {label}" for label in ("A", "B", "same", *VOTES) if label in labels)
    print(f"  wrote {path}: {len(pairs)} pairs of {len({pair.prompt for pair in pairs})} prompts ({counts})")


def convert(args) -> None:
    """One sub-command: reads, leaves benchmark prompts out, splits by prompt, writes, reports.

    InputError: a flag out of its range, a file that exists, or no pair left.
    """
    for path in (args.out, args.val):
        if path and os.path.exists(path) and not args.overwrite:
            raise InputError(f"{path}: exists already; name another file, or replace it with --overwrite.")
    if not 0 < args.val_share < 1:
        raise InputError(f"--val-share {args.val_share}: must lie between 0 and 1.")
    if getattr(args, "min_gap", 1) <= 0 or getattr(args, "per_prompt", 0) < 0:
        raise InputError("--min-gap must be above 0, and --per-prompt 0 or more.")
    known = set()
    for path in args.exclude:
        # As data.read_pairs reads them: `problem` is stage 2's name for it, and in stage 1's files something else.
        column = "problem" if {"problem", "prompt"} & set(open_table(path)[0]) == {"problem"} else "prompt"
        try:
            prompts = {plain(prompt_in(row[column])) for _, row in open_table(path, (column,))[1]}
        except ValueError as error:
            raise InputError(f"--exclude {path}: {error}.") from error
        if not prompts:
            raise InputError(f"--exclude {path}: holds no prompt.")
        known |= prompts
    tally = Tally()
    print(f"{args.command}: licence {LICENCES[args.command]}")
    pairs = COMMANDS[args.command](args, tally)
    shared = [pair for pair in pairs if plain(pair.prompt) in known]
    pairs = [pair for pair in pairs if plain(pair.prompt) not in known]
    for pair in shared:
        tally.drop("pairs whose prompt a file of --exclude has", repr(pair.prompt[:40]))
    print(tally.report())
    held, kept = [], []
    for pair in pairs:
        hold = args.val and share_of(f"{args.seed} {plain(pair.prompt)}") < args.val_share
        (held if hold else kept).append(pair)
    if not kept or (args.val and not held):
        raise InputError(f"{args.command}: no pair is left for {args.val if kept else args.out}; see the counts above.")
    for path, part in ((args.out, kept), (args.val, held)):
        if path:
            write_pairs(part, path)


COMMANDS = {"videofeedback2": videofeedback2, "rapidata": rapidata, "mj-bench-video": mj_bench_video,
            "genai-bench": genai_bench, "join": join}


def main(argv=None) -> None:
    """Reads the command line and converts one set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="command", required=True)
    parts = {name: parts.add_parser(name, help=job.__doc__.splitlines()[0]) for name, job in COMMANDS.items()}
    for name, part in parts.items():
        part.add_argument("--out", required=True, help="CSV to write; its video paths are relative to its folder")
        part.add_argument("--val", help="CSV for the prompts that are held out")
        part.add_argument("--val-share", type=float, default=0.02, help="share of the prompts for --val (default .02)")
        part.add_argument("--seed", type=int, default=0, help="draws other prompts; what was split needs another one")
        part.add_argument("--exclude", nargs="+", default=[], metavar="CSV", help="benchmarks: drop their prompts")
        part.add_argument("--overwrite", action="store_true", help="replace --out and --val")
        if name != "join":
            part.add_argument("--videos", required=True, help="folder where the set's videos were unpacked")
            part.add_argument("--check-videos", action="store_true", help="open each video; drop those that are broken")
    for name in ("videofeedback2", "mj-bench-video"):
        parts[name].add_argument("--json", required=True, help="the set's JSON file")
    for name in ("rapidata", "genai-bench"):
        parts[name].add_argument("--parquet", nargs="+", required=True, help="the set's parquet files")
    for name, gap, unit in (("videofeedback2", 2, "points of 1-5"), ("rapidata", 0.2, "share of the votes")):
        told = f"smallest difference, {unit} (default {gap})"
        parts[name].add_argument("--min-gap", type=float, default=gap, help=told)
        parts[name].add_argument("--ties", action="store_true", help="keep pairs with equal scores, as `same`")
    parts["videofeedback2"].add_argument("--per-prompt", type=int, default=0, help="pairs of a prompt (default 0: all)")
    parts["rapidata"].add_argument("--dimension", default="Alignment", choices=["Alignment", "Preference", "Coherence"])
    parts["mj-bench-video"].add_argument("--overall", action="store_true", help="label by overall_preference instead")
    parts["join"].add_argument("--data", nargs="+", required=True, help="CSVs in any of our formats")
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    cli(main)
