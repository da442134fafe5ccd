"""VideoScore-Bench, labels of single videos -> a CSV path,prompt,score of their alignment with the text, for pointwise.

    python -m lab.road.videoscore v1 --parquet video_feedback/test-00000-of-00001.parquet --videos videos --out vsb1.csv
    python -m lab.road.videoscore v2 --json "data_27k_test (VideoScoreBench-v2).json" --videos videos --out vsb2.csv

v1: the subset video_feedback of TIGER-Lab/VideoScore-Bench, 760 rows, Apache-2.0, scores 1 to 4. That repository holds
frames without their rate, so the videos come from TIGER-Lab/VideoFeedback (Apache-2.0), whose test clips they are, by
their ids: videos_annotated_test.zip and videos_real_test.zip. Its other subsets are not read: eval_crafter has frames
alone, vbench and genaibench are preferences.
v2: of TIGER-Lab/VideoFeedback2, Apache-2.0, scores 1 to 5. Neither was run on the real files.
"""

import argparse
import os
import re

from lab.road.datasets import numbered, scored_videos, videofeedback2_row
from lab.road.published import Tally, Videos, read_parquet, text_of
from plumbing.settings import InputError, cli, writable, write_csv


def v1_row(row: dict) -> tuple[str, str, int]:
    """A row of VideoScore-Bench -> (video, prompt, alignment 1-4). ValueError: says what is wrong.

    Columns and texts as the authors read them: github.com/TIGER-AI-Lab/VideoScore, benchmark/eval_videoscore.py at
    d588446 (`id`; in `conversations` the prompt between quotes, and a line `aspect: score` for each of five aspects);
    the aspects' names: the card of TIGER-Lab/VideoFeedback at c37e3b0. That an mp4 is called by its id, in a folder of
    its batch: the `video link` that public code has for such rows (.../p/p110924.mp4).
    """
    asked, told = row["conversations"][0]["value"], row["conversations"][1]["value"]
    match = re.search(r'text prompt is "(.*?)",\n', asked, flags=re.DOTALL)
    if not match or not text_of(match.group(1)):
        raise ValueError("no text prompt")
    scores = re.findall(r"text-to-video alignment:\s*(-?\d+(?:\.\d+)?)", told)
    if not scores:
        raise ValueError("no text-to-video alignment score")
    if float(scores[0]) not in (1, 2, 3, 4):
        raise ValueError("score outside 1-4")
    return f"{row['id']}.mp4", text_of(match.group(1)), int(float(scores[0]))


def convert(args) -> None:
    """Reads, writes the CSV; rows that cannot be used are counted and named. InputError: no row can be used."""
    writable([os.path.dirname(args.out)])
    tally, videos, rows = Tally(), Videos(args.videos, args.check_videos), []
    v1 = args.set == "v1"
    named = read_parquet(args.parquet, ("id", "conversations")) if v1 else numbered(args.json)
    for path, prompt, score in scored_videos(named, v1_row if v1 else videofeedback2_row, videos, tally):
        rows.append([os.path.relpath(path, os.path.dirname(os.path.abspath(args.out))), prompt, score])
    print(tally.report())
    if not rows:
        raise InputError(f"{args.out}: not written, for no row can be used; see the counts above.")
    write_csv(args.out, ["path", "prompt", "score"], rows)
    print(f"  wrote {args.out}: {len(rows)} videos of {len({row[1] for row in rows})} prompts; licence Apache-2.0")


def main(argv=None) -> None:
    """v1 or v2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="set", required=True)
    one, two = parts.add_parser("v1"), parts.add_parser("v2")
    one.add_argument("--parquet", nargs="+", required=True, help="the subset's parquet files")
    two.add_argument("--json", required=True, help="the set's JSON file")
    for part in (one, two):
        part.add_argument("--videos", required=True, help="folder where the set's videos were unpacked")
        part.add_argument("--check-videos", action="store_true", help="open each video; drop those that are broken")
        part.add_argument("--out", required=True, help="CSV to write; its video paths are relative to its folder")
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    cli(main)
