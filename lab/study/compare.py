"""Reward models side by side, from what evaluations left behind or from their score files.

    python -m lab.study.compare --out runs --runs "DeScore=runs/eval/stage2/*/report.json" --training runs
    python -m lab.study.compare --out runs/compare --data pairs.csv --scores ours.csv theirs.csv

--runs: report.json files, a row per label, as in the paper's Fig. 1b and Table 1, with mean and spread over seeds:
results.md, results.png. --scores: somebody's rewards (path,reward[,prompt] or reward_A,reward_B row by row), judged by
evaluate.py's code: report.json, .md and .png; of several files, each one's difference to the first, on the same pairs.
"""

import dataclasses
import glob
import json
import os

import numpy as np

import evaluate
from metrics import bootstrap_interval
from plumbing import report
from plumbing.formats import open_table, tidy_prompt
from plumbing.report import table
from plumbing.settings import InputError, arg, cli, parse, require, writable


@dataclasses.dataclass
class Settings:
    """Flags. --data to --genai-ties are evaluate.py's."""

    out: str = arg(None, "folder to write")
    runs: list[str] = arg(None, "LABEL=GLOB: report.json files of each row")
    training: list[str] = arg((), "folders of whole runs, for a second table")
    scores: list[str] = arg(None, "score files; differences are to the first")
    data: str = arg(None, "CSV of preference pairs that the score files are about")
    benchmark: list[str] = arg(None, "a published benchmark, found in --root", list(evaluate.BENCHMARKS))
    root: str = arg(None, "folder of the videos (and the benchmark's CSV)")
    dimension: str = arg("TA", "label column where a CSV has several: TA (the paper's), VQ, MQ or Overall")
    genai_ties: str = arg(
        "both", "which of GenAI-Bench's two tie votes to keep, as ties", list(evaluate.DROPPED_VOTES))
    skip_bad_videos: bool = arg(False, "leave out pairs of which a file has no reward")
    videoalign_compatible: bool = arg(False, "also show accuracy with ties as VideoAlign's script computes it")


# ---------------------------------------------------------------------------------------------------------------
# 1. Score files
# ---------------------------------------------------------------------------------------------------------------
def number(path: str, line: int, row: dict, column: str) -> float:
    """A finite reward; nan for an empty cell (no score); InputError naming file and line for anything else."""
    text = row[column].strip()
    try:
        value = float(text) if text else float("nan")
    except ValueError:
        value = float("inf")
    if text and not np.isfinite(value):
        raise InputError(f"{path}, line {line}: {column} is {text[:40]!r}, not a finite number.")
    return value


def read_scores(path: str, data_path: str, pairs: list, root: str) -> np.ndarray:
    """Ready-made rewards (n, 2) of the pairs' A and B; nan where the file has none. Read row by row: it may be large.

    reward_A,reward_B: row k belongs to row k of the data. path,reward[,prompt]: looked up; paths as in the data.
    InputError: other columns, another number of rows, a path twice, or another prompt than the data's.
    """
    first, _ = open_table(path)
    rewards, found = np.full((len(pairs), 2), float("nan")), {}
    if {"reward_A", "reward_B"} <= set(first):
        index = {line: k for k, (line, _) in enumerate(open_table(data_path)[1])}
        place = {index[pair.line]: i for i, pair in enumerate(pairs)}
        k = -1
        for k, (line, row) in enumerate(open_table(path)[1]):
            i = place.get(k)
            if i is not None:
                rewards[i] = [number(path, line, row, column) for column in ("reward_A", "reward_B")]
                if tidy_prompt(row.get("prompt", pairs[i].prompt)) != pairs[i].prompt:
                    other = f"line {pairs[i].line} of {data_path}"
                    raise InputError(f"{path}, line {line}: has another prompt than {other}.")
        if k + 1 != len(index):
            raise InputError(f"{path}: has {k + 1} rows but {data_path} has {len(index)}; they belong row by row.")
        return rewards
    if not {"path", "reward"} <= set(first):
        raise InputError(f"{path}: needs the columns reward_A,reward_B or path,reward; it has {sorted(first)}.")
    for line, row in open_table(path)[1]:
        key = os.path.abspath(os.path.join(root, row["path"].strip())), tidy_prompt(row.get("prompt", ""))
        reward = number(path, line, row, "reward")
        if not np.isnan(reward) and found.setdefault(key, reward) != reward:
            raise InputError(f"{path}, line {line}: a second reward for {row['path']!r}.")
    for i, pair in enumerate(pairs):
        own = [(os.path.abspath(v), pair.prompt) for v in pair.videos]  # a video under two prompts has two rewards
        rewards[i] = [found.get(key, found.get((key[0], ""), float("nan"))) for key in own]
    return rewards


def compare_scores(s: Settings) -> None:
    """--scores FILE ... -> one report. Every file is judged on the pairs that ALL of them scored, or the easier pairs
    would favour one of them. InputError: no pairs are given."""
    if bool(s.data) == bool(s.benchmark) or (s.benchmark and (len(s.benchmark) > 1 or not s.root)):
        raise InputError("--scores needs the pairs: --data FILE, or one --benchmark NAME and its --root.")
    writable([s.out])
    test = evaluate.read_test_set(s, s.benchmark and s.benchmark[0])
    rewards = [read_scores(file, test.path, test.pairs, test.root) for file in s.scores]  # (n, 2) each
    complete = evaluate.complete_pairs(test, rewards, s.skip_bad_videos)
    names = [os.path.basename(os.path.normpath(file)) for file in s.scores]
    names = names if len(set(names)) == len(names) else s.scores
    found = [evaluate.measure_set(test, name, r, complete) for name, r in zip(names, rewards)]
    for one in found[1:]:
        one.numbers["difference_to_first"] = difference(one, found[0])
    report.write(s.out, found, s.videoalign_compatible, draw_accuracies if len(found) > 1 else None)


def draw_accuracies(axis, judged, names) -> None:
    """A dot and its 95 % interval per model, without and with ties."""
    for shift, key, colour in ((0.12, "without_ties", "tab:blue"), (-0.12, "with_ties", "tab:orange")):
        for row, one in enumerate(reversed(judged)):
            value, (low, high) = one.numbers[f"accuracy_{key}"], one.numbers[f"accuracy_{key}_interval"]
            if value is not None:
                axis.plot([low, high], [row + shift] * 2, color=colour)
                axis.plot(value, row + shift, "o", color=colour, label=key.replace("_", " ") if row == 0 else None)
    axis.set_yticks(range(len(judged)), names[::-1], fontsize=8)
    axis.set(title="Accuracy, 95 % intervals", xlabel="accuracy")


def difference(one: report.Agreement, first: report.Agreement) -> dict:
    """Both accuracies minus the first model's ON THE SAME PAIRS, with paired-bootstrap intervals; None without pairs.

    Both models meet the same hard pairs, so their difference is known much better than either accuracy: subtract pair
    by pair first, and resample the differences.
    """
    out = {}
    # Without ties only decided pairs count; with ties every pair does, human ties included.
    for kind, keep in (("without_ties", one.labels != 0), ("with_ties", np.full(len(one.labels), True))):
        gap = one.hits[kind][keep].astype(float) - first.hits[kind][keep]
        out[kind] = float(gap.mean()) if len(gap) else None
        out[f"{kind}_interval"] = bootstrap_interval(gap, one.groups[keep]) if len(gap) else None
    return out


# ---------------------------------------------------------------------------------------------------------------
# 2. Reports of whole runs
# ---------------------------------------------------------------------------------------------------------------
KINDS = ("without_ties", "with_ties")


def compare_runs(runs: list[str], out: str, training: list[str] = ()) -> str:
    """["LABEL=GLOB of report.json files", ...] -> a table, one row per label, two columns per benchmark; and a figure.

    Where a label has several reports of one benchmark, of several seeds, a cell is their mean and standard deviation.
    `training`: folders of whole runs (stage1, discriminative, stage2), summed up in a second table.
    InputError: a label without a report; reports of one benchmark on other numbers of pairs: some left out clips.
    """
    found, benchmarks, size = {}, [], {}  # label -> {benchmark: numbers of each seed}; benchmark -> its pairs, a file
    for run in runs:
        label, _, pattern = run.partition("=")
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise InputError(
                f"--runs {run}: no such report; give LABEL=GLOB, e.g. 'DeScore=runs/eval/stage2/*/report.json'."
            )
        for path in paths:
            if os.path.basename(os.path.dirname(path)) == "text" and "text" not in pattern:  # of one benchmark, OUT/*
                raise InputError(f"--runs {run}: {path} is of the score that the CoTs state; the head's lies in the "
                                 "folder above. For the text's name its folder: LABEL=.../text/report.json.")
            with open(path, encoding="utf-8") as file:
                numbers = json.load(file)
            if "models" in numbers:
                raise InputError(f"{path}: is a report of several score files; --runs takes those of evaluate.py.")
            name = numbers["benchmark"] or os.path.basename(numbers["data"])
            name += f" ({numbers['labels']})" if numbers.get("labels") else ""  # another number, not another seed
            pairs = [numbers.get("pairs"), numbers.get("human_ties")]  # counted only: each seed's world is another
            same, first = size.setdefault(name, (pairs, path))
            if pairs != same:
                raise InputError(f"{path}: has {pairs[0]} pairs of {name} ({pairs[1]} human ties), {first} {same[0]} "
                                 f"({same[1]}): other pairs, other accuracies; evaluate both on the same ones.")
            found.setdefault(label, {}).setdefault(name, []).append(numbers)
            benchmarks += [name] if name not in benchmarks else []
    head = ["model", *(f"{name} {kind}" for name in benchmarks for kind in ("w/o ties", "w/ ties"))]
    rows = []
    for label, reports in found.items():
        cells = [[n.get(f"accuracy_{k}") for n in reports.get(name, [])] for name in benchmarks for k in KINDS]
        rows.append([label, *map(mean_and_spread, cells)])
    text = table(head, rows)
    if training:
        text += "\n" + training_table(training)
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "results.md"), "w", encoding="utf-8") as file:
        file.write(text)
    draw_runs(os.path.join(out, "results.png"), found, benchmarks)
    return text


def mean_and_spread(values: list) -> str:
    """ "0.812", or of several seeds "0.812 ± 0.021", the sample standard deviation; "-" if one of them is missing."""
    if not values or any(value is None for value in values):
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def training_table(folders: list[str]) -> str:
    """What the base model could do and how both stages went, one column per folder, and mean and spread over them.

    InputError: a folder that no demo wrote.
    """

    def lines(folder, stage):
        with open(os.path.join(folder, stage, "metrics.jsonl"), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def last(folder, stage, name):
        return [line[name] for line in lines(folder, stage) if name in line][-1]

    def average(folder, name, span):
        return float(np.mean([line[name] for line in lines(folder, "stage2")][span]))

    def base(folder, name):
        with open(os.path.join(folder, "base", "measured.json"), encoding="utf-8") as file:
            return json.load(file)[name]

    start, end, ten = slice(None, 5), slice(-10, None), slice(None, 10)
    rows = {
        "base: valid format, sampled": lambda f: base(f, "sampled valid format"),
        'base: verdicts right, always "2"': lambda f: base(f, "always 2"),
        "base: verdicts right, sampled": lambda f: base(f, "sampled accuracy"),
        "base: verdicts right, greedy": lambda f: base(f, "greedy accuracy"),
        "stage 1: validation accuracy": lambda f: last(f, "stage1", "val_accuracy"),
        "CoT always masked: validation accuracy": lambda f: last(f, "discriminative", "val_accuracy"),
        "stage 2: quality, first 5 steps": lambda f: average(f, "quality", start),
        "stage 2: quality, last 10": lambda f: average(f, "quality", end),
        "stage 2: rise of quality": lambda f: average(f, "quality", end) - average(f, "quality", start),
        "stage 2: pair accuracy, first 10 steps": lambda f: average(f, "pair_accuracy", ten),
        "stage 2: pair accuracy, last 10": lambda f: average(f, "pair_accuracy", end),
    }
    try:
        values = {name: [function(folder) for folder in folders] for name, function in rows.items()}
    except (OSError, KeyError, IndexError) as error:
        raise InputError(f"--training: {error}; give folders that `make demo` wrote, with RUNS set.") from error
    many = len(folders) > 1
    head = ["", *(os.path.basename(os.path.normpath(folder)) for folder in folders), *["mean ± std"] * many]
    return table(head, [[n, *(f"{v:.3f}" for v in r), *[mean_and_spread(r)] * many] for n, r in values.items()])


def draw_runs(path: str, found: dict, benchmarks: list[str]) -> None:
    """Bars of accuracy without ties, one group per benchmark: of one run with its 95 % interval, of several seeds the
    mean with a dot for each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(2.5 + 2.2 * len(benchmarks), 3.8))
    width, seeds = 0.8 / len(found), max(len(n) for reports in found.values() for n in reports.values())
    for k, (label, reports) in enumerate(found.items()):
        have = [
            (i - 0.4 + width * (k + 0.5), [n for n in reports[name] if n.get("accuracy_without_ties") is not None])
            for i, name in enumerate(benchmarks)
            if name in reports
        ]
        have = [(place, numbers) for place, numbers in have if numbers]
        places, values = [p for p, _ in have], [np.mean([n["accuracy_without_ties"] for n in ns]) for _, ns in have]
        axis.bar(places, values, width * 0.92, label=label)
        for place, value, (_, numbers) in zip(places, values, have):
            axis.text(place, 0.02, f"{value:.2f}", ha="center", fontsize=8, color="white")
            if len(numbers) > 1:
                dots = [n["accuracy_without_ties"] for n in numbers]
                axis.plot([place] * len(dots), dots, "o", color="black", markersize=3)
            elif None not in (interval := numbers[0].get("accuracy_without_ties_interval") or [None]):  # 1 prompt
                spread = [[max(0, value - interval[0])], [max(0, interval[1] - value)]]
                axis.errorbar(place, value, spread, color="black", capsize=2, elinewidth=0.8)
    axis.axhline(0.5, color="grey", linestyle="--", linewidth=1)
    axis.set_xticks(range(len(benchmarks)), benchmarks)
    what = f"mean of {seeds} seeds, dots: each" if seeds > 1 else "bars: 95 % bootstrap"
    axis.set(ylim=(0, 1), ylabel="accuracy without ties", title=f"Agreement with the labels ({what}; dashed: chance)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, ncols=len(found), loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> None:
    """Puts several evaluations, of one seed or more, or several score files, into one table and figure."""
    s = parse(Settings, __doc__, argv)
    require(s, out="a folder to write")
    if bool(s.runs) == bool(s.scores):
        raise InputError("give --runs LABEL=GLOB, or --scores FILE (--help shows all flags).")
    if s.scores:
        compare_scores(s)
    else:
        print(compare_runs(s.runs, s.out, s.training))


if __name__ == "__main__":
    cli(main)
