"""Stage 0: the base model thinks about each training video once. Stage 1 learns to score from these CoTs.

    CSV of preference pairs   ->   the same pairs in DeScore's cold-start columns, with CoT_A and CoT_B

    laptop   python collect_cots.py --model runs/base --data pairs.csv --out pairs_with_cots.csv
    8 GPUs   torchrun --nproc_per_node 8 collect_cots.py --data train.csv val.csv --out train_cots.csv val_cots.csv \\
                 --engine vllm

Every CoT is written to OUT.thoughts/ as soon as it exists; the same command goes on where it was stopped. Time: all of
it is sampling. The base model follows the layout that data.INSTRUCTION_AFTER asks for only sometimes; the last line
says how often. Malformed CoTs stay: the head must score what the model really thinks.
"""

import dataclasses

import data
import parallel
from phases import MADE_WITH, WORDING, ThinkingSettings, Workers
from plumbing.formats import write_cots
from plumbing.jobs import items_of, readable_pairs, require_same_settings, write_skipped
from plumbing.settings import InputError, arg, cli, collecting_flags, parse, writable
from rules import extract_answer


@dataclasses.dataclass
class Settings(ThinkingSettings):
    """Collecting CoTs for stage 1; more in phases.ThinkingSettings."""

    data: list[str] = arg(None, "preference pairs, a CSV in any known format; of several, each has its own --out")
    out: list[str] = arg(("pairs_with_cots.csv",), "CSV to write: DeScore's cold-start columns")
    model: str = arg("Qwen/Qwen3-VL-8B-Instruct", "the model that thinks: base model or DeScore folder")
    video_root: str | None = arg(None, "folder that relative video paths start from; default the CSV's")
    fps: float = arg(2.0, "sampled frames per second (paper: 2)", above=0)
    max_pixels: int = arg(448 * 448, "pixels per frame at most (paper: 448 * 448)", at_least=1024)
    temperature: float = arg(1.0, "sampling temperature; 0 is greedy (not given in the paper for stage 1)", at_least=0)
    batch_size: int = arg(64, "CoTs that transformers samples at a time on one rank", at_least=1)


def collect(path: str, pairs: list[data.PreferencePair], out: str, settings: Settings, ranks, workers: Workers) -> None:
    """COLLECTIVE: the pairs of `path` -> `out`, with a CoT per video. OUT.thoughts/ keeps each CoT as it comes.

    InputError: a missing or broken video (with --skip-bad-videos: no pair is left), results of other settings.
    """
    folder = out + ".thoughts"
    writable([folder])
    if not settings.skip_bad_videos:  # with it, thinking meets each bad video, and leaves it out
        pairs = readable_pairs(pairs, settings, ranks, data.sample_frames)
    items = items_of(pairs)
    require_same_settings(folder, settings, MADE_WITH, WORDING, ranks)
    thoughts, skipped = workers.think(items, folder)  # one CoT for each
    write_skipped(folder, skipped, ranks)
    kept = [pair for pair in pairs if all((video, pair.prompt) in thoughts for video in pair.videos)]
    if not kept:
        raise InputError(f"{path}: no pair is left with two readable videos; see {folder}/skipped.jsonl.")
    if not ranks.is_main:
        return
    write_cots(out, kept, thoughts)
    texts = [thoughts[item.key]["thoughts"][0] for item in items if item.key in thoughts]
    good = sum(extract_answer(text) is not None for text in texts)
    print(f"wrote {out}: {len(kept)} pairs; {good / len(texts):.1%} of {len(texts)} CoTs hold an answer")
    if skipped:
        print(f"skipped {len(pairs) - len(kept)} pairs with {len(skipped)} bad videos; see {folder}/skipped.jsonl")


def main(argv=None) -> None:
    """One CoT per video of each CSV; the engine is opened once for all of them."""
    settings = parse(Settings, __doc__, argv)
    collecting_flags(settings)
    # All first: a wrong second file should not cost the thinking over the first.
    sets = [data.read_pairs(path, settings.dimension, settings.video_root) for path in settings.data]
    ranks = parallel.start(settings.seed)
    workers = Workers(settings, ranks, scores=False)
    for path, pairs, out in zip(settings.data, sets, settings.out):
        collect(path, pairs, out, settings, ranks, workers)
    ranks.finish(workers.engine)


if __name__ == "__main__":
    cli(main)
