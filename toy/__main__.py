"""The toy world on the command line: clips and CSVs, and a tiny base model that stands in for the 8B.

    python -m toy data --out toy/data     mp4 clips and six CSVs in the formats found in the wild     (about 60 s)
    python -m toy base --out toy/base     a pre-trained tiny base model, a plain Hugging Face folder  (about 200 s)
"""

import argparse
import json
import pathlib
import time

import numpy as np

import data
from plumbing.settings import cli
from toy.world import SPLITS, make_data


def main(argv=None) -> None:
    """`data` renders the clips and CSVs; `base` pre-trains the tiny model and measures it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("data", help="render clips and write the CSVs")
    base = commands.add_parser("base", help="pre-train the tiny base model and measure it")
    for command in (world, base):
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    for split, (_, pairs, *_) in SPLITS.items():
        flag = f"--{split.replace('_', '-')}"
        world.add_argument(flag, type=int, default=pairs, metavar="N", help=f"pairs (default {pairs})")
    for flag, default, meaning in (
        ("vision-steps", 100, "steps of phase 1, the vision tower alone"),
        ("steps", 340, "steps of phase 2, the language model"), ("batch", 32, "clips a step, twice that in phase 1"),
        ("pool", 3000, "clips rendered to learn from"),
    ):
        base.add_argument(f"--{flag}", type=int, default=default, help=f"{meaning} (default {default})")
    args, start = parser.parse_args(argv), time.time()
    if args.command == "data":
        for path in make_data(
            args.out, args.seed, {split: getattr(args, split) for split in SPLITS}, processes=2
        ).values():
            pairs = data.read_pairs(path)
            print(f"{path}: {len(pairs)} pairs, {np.mean([p.label == 0 for p in pairs]):.0%} ties")
    else:
        from toy import base_model  # here: `data` needs no model

        processor = base_model.build_processor()
        model = base_model.build_model(processor, args.seed)
        loss = base_model.pretrain(model, processor, args.seed, args.vision_steps, args.steps, args.batch, args.pool)
        model.save_pretrained(args.out)  # before measuring: a failure there must not cost the training
        processor.save_pretrained(args.out)
        print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, loss {loss:.4f} nats a token")
        measured = base_model.measure(model, processor, args.seed + 1000)
        for name, value in measured.items():
            print(f"  {name:22s} {value:.3f}")
        with open(pathlib.Path(args.out) / "measured.json", "w", encoding="utf-8") as file:
            json.dump(measured, file, indent=1)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    cli(main)
