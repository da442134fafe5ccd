"""Several evaluations side by side, as in the paper's Fig. 1b and Table 1, with mean and spread over seeds.

    python -m lab.study.compare --out runs --runs "DeScore=runs/eval/stage2/*/report.json" --training runs
"""

import argparse
import glob
import json
import os

import numpy as np

from plumbing.report import table
from plumbing.settings import InputError, cli


def compare_runs(runs: list[str], out: str, training: list[str] = ()) -> str:
    """["LABEL=GLOB of report.json files", ...] -> a table, one row per label, two columns per benchmark; and a figure.

    Where a label has several reports of one benchmark, of several seeds, a cell is their mean and standard deviation.
    `training`: folders of whole runs (stage1, discriminative, stage2), summed up in a second table.
    """
    found, benchmarks = {}, []  # label -> {benchmark: numbers of each seed}
    for run in runs:
        label, _, pattern = run.partition("=")
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise InputError(
                f"--runs {run}: no such report; give LABEL=GLOB, e.g. 'DeScore=runs/eval/stage2/*/report.json'."
            )
        for path in paths:
            with open(path, encoding="utf-8") as file:
                numbers = json.load(file)
            name = numbers["benchmark"] or os.path.basename(numbers["data"])
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


KINDS = ("without_ties", "with_ties")


def mean_and_spread(values: list) -> str:
    """ "0.812", or of several seeds "0.812 ± 0.021", the sample standard deviation; "-" if one of them is missing."""
    if not values or any(value is None for value in values):
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def training_table(folders: list[str]) -> str:
    """What the base model could do and how both stages went, one column per folder, and mean and spread over them."""

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
            elif interval := numbers[0].get("accuracy_without_ties_interval"):
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
    """Puts several evaluations, of one seed or more, into one table and figure: OUT/results.md, OUT/results.png."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", nargs="+", required=True, metavar="LABEL=GLOB", help="report.json files of each row")
    parser.add_argument(
        "--training", nargs="+", default=[], metavar="DIR", help="folders of whole runs, for a second table"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    print(compare_runs(args.runs, args.out, args.training))


if __name__ == "__main__":
    cli(main)
