"""The toy world on the command line: clips and CSVs, and a tiny base model that stands in for the 8B.

    python -m toy data --out toy/data     mp4 clips and six CSVs in the formats found in the wild     (about 60 s)
    python -m toy base --out toy/base     a pre-trained tiny base model, a plain Hugging Face folder  (about 200 s)
"""

import argparse
import time

import numpy as np

import data
from plumbing.settings import cli, writable, write_json
from rules import DIMENSIONS
from toy.world import SPLITS, People, cot_text, make_data


def main(argv=None, write=cot_text, max_new_tokens=80) -> None:
    """`data` renders the clips and CSVs; `base` pre-trains the tiny model on CoTs that `write` writes, measures it."""
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
    world.add_argument("--weights", type=float, nargs=len(DIMENSIONS), default=People().weights, metavar="W",
                       help=f"how people weigh {', '.join(DIMENSIONS)} (default: all alike)")
    world.add_argument("--unspoken", type=float, default=0.0, metavar="POINTS",
                       help="what people take off for a full flicker, which no dimension names (default 0: none)")
    base.add_argument("--unspoken", action="store_true", help="clips flicker, and the tower learns to see it")
    for flag, default, meaning in (
        ("vision-steps", 100, "steps of phase 1, the vision tower alone"),
        ("steps", 340, "steps of phase 2, the language model"), ("batch", 32, "clips a step, twice that in phase 1"),
        ("pool", 3000, "clips rendered to learn from"),
    ):
        base.add_argument(f"--{flag}", type=int, default=default, help=f"{meaning} (default {default})")
    args, start = parser.parse_args(argv), time.time()
    writable([args.out])  # or minutes of training would be lost
    if args.command == "data":
        sizes = {split: getattr(args, split) for split in SPLITS}
        people = People(tuple(args.weights), args.unspoken)
        for path in make_data(args.out, args.seed, sizes, processes=2, people=people).values():
            pairs = data.read_pairs(path)
            print(f"{path}: {len(pairs)} pairs, {np.mean([p.label == 0 for p in pairs]):.0%} ties")
    else:
        from toy import base_model  # here: `data` needs no model

        processor = base_model.build_processor()
        model = base_model.build_model(processor, args.seed)
        steps = args.vision_steps, args.steps, args.batch, args.pool
        loss = base_model.pretrain(model, processor, args.seed, *steps, unspoken=args.unspoken, write=write)
        model.save_pretrained(args.out)  # before measuring: a failure there must not cost the training
        processor.save_pretrained(args.out)
        print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, loss {loss:.4f} nats a token")
        measured = base_model.measure(model, processor, args.seed + 1000, max_new_tokens=max_new_tokens)
        print("\n".join(f"  {name:22s} {value:.3f}" for name, value in measured.items()))
        write_json(f"{args.out}/measured.json", measured)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    cli(main)
