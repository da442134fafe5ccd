"""Flags that are missing or contradict each other: refused before anything is read, built or sampled."""

import os

from plumbing.settings import InputError, flag_of


def require(settings, **wanted: str) -> None:
    """InputError for a flag that was not given; wanted: {its name: what it should be}."""
    for name, what in wanted.items():
        if getattr(settings, name) is None:
            raise InputError(f"{flag_of(name)} is missing; give {what} (--help shows all flags).")


def grpo_flags(s, ranks) -> None:
    """Stage 2: both inputs, a length range, and mini-batches that divide batches and can be shared out."""
    require(s, data="a CSV in DeScore's RL format", model="a DeScore folder")
    if s.length_low >= s.length_high:
        raise InputError(f"--length-low {s.length_low} must be below --length-high {s.length_high}.")
    if s.batch_pairs % s.mini_pairs or s.mini_pairs % ranks.world:
        raise InputError(
            f"--mini-pairs {s.mini_pairs} must divide --batch-pairs {s.batch_pairs} and be a multiple "
            f"of the {ranks.world} ranks."
        )


def annotated_pairs(pairs: list, path: str) -> None:
    """Stage 2 rewards CoTs by true verdicts: every pair needs those of both videos."""
    for pair in pairs:
        if not pair.annotation_a or not pair.annotation_b:
            raise InputError(
                f"{path}, line {pair.line}: has no video_1_scores / video_2_scores in `answer`; stage 2 "
                "rewards CoTs by them (docs/data.md)."
            )


def rollout_flags(s) -> None:
    """Collecting CoTs: as many outputs as inputs."""
    require(s, data="a CSV of preference pairs")
    if len(s.data) != len(s.out) or len(set(s.out)) != len(s.out):
        raise InputError(f"{len(s.data)} --data want as many --out, all different; got {len(s.out)}.")


def evaluation_flags(s) -> None:
    """Evaluation: one thing to judge, and what it needs."""
    chosen = [flag for flag in ("video", "scores", "compare") if getattr(s, flag)]
    problems = {
        "give only one of --video, --scores, --compare": len(chosen) > 1,
        "give --data FILE or --benchmark NAME": not (s.video or s.scores or s.data or s.benchmark),
        "--data and --benchmark exclude each other": s.data and s.benchmark,
        "--html names one file, so give one --benchmark and one --score-from":
        max(len(s.benchmark or []), len(s.score_from)) > 1 and s.html,
        "--benchmark needs --root, the folder it was downloaded to": s.benchmark and not s.root,
        "--video needs --prompt, and --prompt needs --video": bool(s.video) != bool(s.prompt and s.prompt.strip()),
        "--score-from text needs CoTs, so not --no-think": "text" in s.score_from and not s.think,
        "--thoughts above 1 and --no-think exclude each other": s.thoughts > 1 and not s.think,
        "--video thinks with transformers, so leave out --engine vllm": s.video and s.engine == "vllm",
        "--sanity takes one set of pairs and one --score-from, and writes no page":
        s.sanity and (chosen or max(len(s.benchmark or []), len(s.score_from)) > 1 or s.html),
        "give --model DIR": not s.model and not (s.scores or s.compare),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise InputError(f"{problem} (--help shows all flags).")


def writable(folders: list[str]) -> None:
    """Makes the folders; fails on one that cannot be written before hours of generation."""
    try:
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written to ({error.strerror}).") from error
