"""Look at the data: prompt, CoT and query of a few pairs as the model reads them, and their sampled frames as a PNG.

    python -m toy.look --show 3 --data pairs.csv --model Qwen/Qwen3-VL-8B-Instruct
"""

import argparse
import os
import pathlib
import re
import sys

import numpy as np

from data import PreferencePair, Video, encode_prompt, read_pairs, sample_frames
from plumbing.settings import InputError, cli, writable


def show(pair: PreferencePair, processor, fps: float, max_pixels: int) -> list[Video]:
    """Prints what the model reads for both videos of a pair: grey = prompt side, green = CoT, red = query."""
    grey, green, red, end = ("\033[90m", "\033[32m", "\033[1;31m", "\033[0m") if sys.stdout.isatty() else [""] * 4
    print(f"\n=== line {pair.line}: " + {1: "A is better", -1: "B is better", 0: "the same"}[pair.label])
    videos = []
    for path, cot_ids in zip(pair.videos, pair.cot_ids(processor.tokenizer)):
        video = sample_frames(path, fps, max_pixels)
        inputs = encode_prompt(processor, video, pair.prompt)
        num_video = int((inputs["mm_token_type_ids"] == 2).sum())
        text = processor.tokenizer.decode(inputs["input_ids"])
        text = re.sub(r"(<\|video_pad\|>)+", lambda m: f"<|video_pad|> x {m.group().count('pad')}", text)
        print(
            f"--- {path}: {video.total_num_frames / fps:.2f} s -> {len(video.frames)} frames "
            f"of {video.frames.shape[1]} x {video.frames.shape[2]} at {fps} fps = {num_video} video tokens of "
            f"{len(inputs['input_ids'])} prompt tokens; CoT {len(cot_ids)} tokens"
        )
        shown = processor.tokenizer.decode(cot_ids) if cot_ids else "(no CoT: the query sees video and prompt only)"
        print(f"{grey}{text}{end}{green}{shown}{end}{red}<Reward>{end}")
        videos.append(video)
    return videos


def draw_frames(rows: list[tuple[str, Video]], path: str) -> None:
    """Draws sampled frames, one clip a row, each frame with its time in seconds."""
    from matplotlib.figure import Figure

    columns = min(8, max(len(video.frames) for _, video in rows))
    figure = Figure(figsize=(1.6 * columns, 1.5 * len(rows)))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, video) in zip(axes, rows):
        picks = np.linspace(0, len(video.frames) - 1, columns).round().astype(int)
        for axis, k in zip(row, picks):
            axis.imshow(video.frames[k])
            axis.set_title(f"{video.frame_indices[k] / video.source_fps:.1f} s", fontsize=7)
            axis.set_xticks([]), axis.set_yticks([])
        row[0].set_ylabel(title.replace("$", r"\$"), fontsize=7)  # two $ would be a formula
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv=None) -> None:
    """Prints the first pairs of a CSV and draws their frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CSV of preference pairs, any of the known formats")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="how many examples (default 3)")
    parser.add_argument("--model", default="Qwen/Qwen3-VL-8B-Instruct", help="folder or hub name with the processor")
    parser.add_argument("--dimension", default="TA", help="label column: TA, VQ, MQ or Overall (default TA)")
    parser.add_argument("--video-root", help="folder that relative video paths start from (default: the CSV's)")
    parser.add_argument("--fps", type=float, default=2.0, help="sampled frames per second (paper: 2)")
    parser.add_argument("--max-pixels", type=int, default=448 * 448, help="pixels per frame at most (paper: 448 * 448)")
    parser.add_argument("--out", default="frames.png", help="where to draw the sampled frames (default frames.png)")
    args = parser.parse_args(argv)
    if args.show < 1:
        raise InputError(f"--show {args.show}: at least 1 pair is shown.")
    writable([os.path.dirname(args.out)])
    pairs = read_pairs(args.data, args.dimension, args.video_root)
    print(f"{args.data}: {len(pairs)} pairs, {sum(p.label == 0 for p in pairs)} ties, "
          f"{sum(p.cot_a is not None for p in pairs)} with CoTs, "
          f"{sum(p.annotation_a is not None for p in pairs)} with annotations")
    from plumbing.checkpoint import read_processor  # here: whoever misspells a flag need not wait for transformers

    processor = read_processor(args.model)
    shown = [show(pair, processor, args.fps, args.max_pixels) for pair in pairs[: args.show]]
    names = [pathlib.Path(path).name for pair in pairs[: args.show] for path in pair.videos]
    draw_frames([*zip(names, sum(shown, []))], args.out)
    print(f"\nframes drawn to {args.out}")


if __name__ == "__main__":
    cli(main)
