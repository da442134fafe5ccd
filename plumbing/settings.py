"""Flags, errors, files: a dataclass per script becomes its command line; bad input is one sentence and exit code 2."""

import argparse
import contextlib
import csv
import dataclasses
import errno
import importlib.util
import json
import math
import os
import sys
import types
import typing


class InputError(ValueError):
    """Bad input. The message is one sentence for the user: which file, row or flag, and the fix. Exit code 2."""


def first_line(error: Exception) -> str:
    """The first non-empty line of a message, for one-sentence errors."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def arg(default, help_text: str, choices=None, above=None, at_least=None, at_most=None):
    """A dataclass field with its `--help` text. A bool becomes --name / --no-name; default None means not set.

    above, at_least, at_most: the range of a number, or of each number of a list; `parse` refuses what lies outside.
    """
    bounds = {"above": above, "at least": at_least, "at most": at_most}
    bounds = {word: bound for word, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices, "bounds": bounds})


parsed = None  # the last command line, for `cli`


def parse(settings_class, doc: str, argv=None):
    """Command line -> an instance of the dataclass. `doc` is the script's docstring.

    An unknown flag ends with exit code 2; a number out of its range is an InputError.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        kind = hints[field.name]
        many = typing.get_origin(kind) is list
        if isinstance(kind, types.UnionType) or many:  # "str | None" -> str, list[str] -> str
            kind = typing.get_args(kind)[0]
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            text += f" (default {field.default})"
        more = {"type": kind, "choices": field.metadata["choices"], "nargs": "+" if many else None}
        if kind is bool:
            more = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag_of(field.name), default=field.default, help=text, **more)
    global parsed
    parsed = settings = settings_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(settings_class):
        check_range(field, getattr(settings, field.name))
    if hasattr(settings, "reader"):  # in the environment, so that loader workers read as this process does
        os.environ["DESCORE_READER"] = settings.reader
    return settings


def flag_of(name: str) -> str:
    """batch_pairs -> --batch-pairs"""
    return "--" + name.replace("_", "-")


def check_range(field: dataclasses.Field, value) -> None:
    """InputError unless every number of the flag is finite and within the bounds that `arg` gave it."""
    values = value if isinstance(value, (list, tuple)) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        bounds = field.metadata["bounds"]
        fits = math.isfinite(number)
        fits = fits and number > bounds.get("above", -math.inf) and number >= bounds.get("at least", -math.inf)
        if not (fits and number <= bounds.get("at most", math.inf)):
            wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items())
            raise InputError(f"{flag_of(field.name)} {number}: must be {wanted}, and finite.")


LESS_MEMORY = ("micro_pairs", "micro_rollouts", "rows_per_batch", "batch_size", "max_new_tokens", "max_pixels")


def cli(main) -> None:
    """Runs a script's main(). Bad input, or a full GPU: one sentence, exit code 2. Ctrl-C: 130. A bug: a traceback."""
    try:
        main()
    except (InputError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; this file works without torch
            flags = [f"{flag_of(name)} (now {getattr(parsed, name)})" for name in LESS_MEMORY if hasattr(parsed, name)]
            also = "--gradient-checkpointing, or " * (getattr(parsed, "gradient_checkpointing", True) is not True)
            error = f"the GPU's memory is full ({first_line(error)}); give {also}a lower {', '.join(flags)}."
        elif not isinstance(error, InputError):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


READERS = ["pyav", "decord"]  # of --reader, which `parse` keeps in the environment


@dataclasses.dataclass
class CommonSettings:
    """Flags that both stages have. Defaults: the paper's values."""

    # data
    video_root: str | None = arg(None, "folder that relative video paths start from; default the CSV's")
    skip_bad_videos: bool = arg(False, "leave out pairs with an unreadable video; OUT/skipped.jsonl lists them")
    fps: float = arg(2.0, "sampled frames per second (paper: 2)", above=0)
    reader: str = arg("pyav", "of video files; decord (the paper's) takes plain ones of constant rate", READERS)
    workers: int | None = arg(None, "processes that decode ahead; 0: decode in this one; default: 2 to 8, by this "
                                    "rank's cores", at_least=0)
    frame_cache: str | None = arg(None, "folder that keeps sampled frames, so that later epochs need not decode")
    frame_cache_gb: float = arg(50.0, "GB that it may hold (a clip of 5 s: 6 MB); the rest is decoded anew", above=0)
    # model and optimisation
    lora_r: int = arg(64, "LoRA rank, with --train lora (paper, stage 1: 64)", at_least=1)
    lora_alpha: int = arg(128, "LoRA alpha; the update is scaled by alpha / r (paper, stage 1: 128)", at_least=1)
    gradient_checkpointing: bool | None = arg(None, "recompute activations in backward: less memory, a third more "
                                                    "time; default: on, unless a GPU holds the plan without")
    compile: bool | None = arg(None, "compile mlp, norms and rotary embedding, and sampling by transformers; default: "
                                     "on a GPU (its first steps take a minute or two longer)")
    max_steps: int | None = arg(None, "stop after this many steps, if --epochs gives as many", at_least=1)
    lr_head: float | None = arg(None, "learning rate of query and head; default --lr (paper: the same)", at_least=0)
    max_grad_norm: float = arg(
        1.0, "gradients of each part (LLM, vision, head) are scaled down to this L2 norm (paper: 1.0 in all)", above=0)
    seed: int = arg(0, "decides order, masks, samples, dropout and LoRA's start", at_least=0, at_most=2**63)
    # ranks
    shard_ranks: int = arg(
        0, "ranks that share one copy of the weights; 0: all; 8: inside nodes of 8 GPUs (hybrid)", at_least=0)
    cpu_offload: bool = arg(False, "weights and optimizer wait in the host's memory: slow, but fits (needs torchrun)")
    # output
    keep: int = arg(2, "checkpoints kept on disk", at_least=1)
    resume: bool = arg(False, "go on from the newest checkpoint in --out, exactly where it was")
    overwrite: bool = arg(False, "first remove the run that --out holds")

    @property
    def reading(self) -> tuple:
        """How clips are read: what data.EncodedPairs takes behind the processor. Each stage has its own max_pixels."""
        return self.fps, self.max_pixels, self.frame_cache, self.frame_cache_gb


# ---- 2. Flags that are missing or contradict each other: refused before anything is read, built or sampled ----
def require(settings, **wanted: str) -> None:
    """InputError for a flag that was not given (wanted: {its name: what it should be}), or whose package is missing."""
    for flag, package in (("engine", "vllm"), ("reader", "decord")):
        if getattr(settings, flag, None) == package and importlib.util.find_spec(package) is None:
            where = "requirements-vllm.txt" if package == "vllm" else "requirements.txt"
            raise InputError(f"--{flag} {package}: {package} is not installed; pip install -r {where}, or leave the "
                             "flag out.")
    for name, what in wanted.items():
        if getattr(settings, name) is None:
            raise InputError(f"{flag_of(name)} is missing; give {what} (--help shows all flags).")


def grpo_flags(s, ranks) -> None:
    """Stage 2: both inputs, a length range, and mini-batches that divide batches and can be shared out.

    InputError if not.
    """
    require(s, data="a CSV in DeScore's RL format", model="a DeScore folder")
    if s.length_low >= s.length_high:
        raise InputError(f"--length-low {s.length_low} must be below --length-high {s.length_high}.")
    if s.batch_pairs % s.mini_pairs or s.mini_pairs % ranks.world:
        raise InputError(f"--mini-pairs {s.mini_pairs} must divide --batch-pairs {s.batch_pairs} and be a multiple of "
                         f"the {ranks.world} ranks.")


def annotated_pairs(pairs: list, path: str) -> None:
    """Stage 2 rewards CoTs by true verdicts: every pair needs those of both videos.

    InputError: the first line without.
    """
    for pair in pairs:
        if not pair.annotation_a or not pair.annotation_b:
            raise InputError(f"{path}, line {pair.line}: has no video_1_scores / video_2_scores in `answer`; stage 2 "
                             "rewards CoTs by them (docs/data.md).")


def collecting_flags(s) -> None:
    """Collecting CoTs: as many outputs as inputs. InputError if not."""
    require(s, data="a CSV of preference pairs")
    if len(s.data) != len(s.out) or len(set(s.out)) != len(s.out):
        raise InputError(f"{len(s.data)} --data need as many --out, all different; got {len(s.out)}.")
    if over := {os.path.realpath(path) for path in s.data} & {os.path.realpath(path) for path in s.out}:
        raise InputError(f"--out {min(over)}: is one of --data, and would lose its other columns; give another name.")


def evaluation_flags(s) -> None:
    """Evaluation: one thing to judge, and what it needs. InputError if not."""
    require(s)
    problems = {
        "give --data FILE or --benchmark NAME": not (s.video or s.data or s.benchmark),
        "--data and --benchmark exclude each other": s.data and s.benchmark,
        "--benchmark needs --root, the folder it was downloaded to": s.benchmark and not s.root,
        "--video needs --prompt, and --prompt needs --video": bool(s.video) != bool(s.prompt and s.prompt.strip()),
        "--score-from text needs CoTs, so not --no-think": "text" in s.score_from and not s.think,
        "--thoughts above 1 and --no-think exclude each other": s.thoughts > 1 and not s.think,
        "give --model DIR: runs/stage2/model, after: make demo": not s.model,
    }
    for problem, is_so in problems.items():
        if is_so:
            raise InputError(f"{problem} (--help shows all flags).")


def writable(folders: list[str]) -> None:
    """Makes the folders; fails on one that cannot be written before hours of generation. InputError names it."""
    try:
        for folder in folders:
            os.makedirs(folder or ".", exist_ok=True)
            if not os.access(folder or ".", os.W_OK):
                raise PermissionError(errno.EACCES, "Permission denied", folder or ".")
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written to ({error.strerror}); give another folder.") from error


# ---- 3. One way to write a file: whole, or not at all ---------------------------------------------------------
@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w"):
    """Opens a file beside `path` that takes its name once all is written: a kill leaves the old file or the new one."""
    temporary = f"{path}.tmp"
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with open(temporary, mode, **text) as file:
        yield file
    os.replace(temporary, path)


def write_json(path: str, value) -> None:
    """A file that people read, too."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1)


def write_jsonl(path: str, records, add: bool = False) -> None:
    """One line per record; `add` appends to what is there."""
    with open(path, "a", encoding="utf-8") if add else atomic_write(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write_csv(path: str, head: list[str], rows) -> None:
    """A header and its rows, as plumbing.formats reads them."""
    with atomic_write(path) as file:
        csv.writer(file).writerows([head, *rows])
