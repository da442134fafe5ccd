"""metrics.jsonl, the line on the screen, the curves, and the scale of the rewards."""

import contextlib
import json
import os
import time

import numpy as np

from plumbing.files import write_jsonl


class Log:
    """metrics.jsonl, one JSON line per step, and one dense line on the screen. Rank 0 writes."""

    def __init__(self, out: str, ranks, position: dict):
        """position: step.json of the checkpoint that was resumed. Later steps' lines will be written again."""
        self.path, self.ranks, self.started = os.path.join(out, "metrics.jsonl"), ranks, time.time()
        if ranks.is_main:
            for file_name in ("metrics.jsonl", "samples.jsonl"):
                _cut(os.path.join(out, file_name), position["step"])
            written = [line["step"] for line in read_metrics(out)]
            if position["step"] and position["step"] not in written:  # a kill came between saving and logging
                self._append(position["step"], position["metrics"])

    def step(self, step: int, metrics: dict[str, float], line: str) -> None:
        """Writes one step's metrics; `line` is what the screen shows."""
        if self.ranks.is_main:
            self._append(step, metrics)
        self.ranks.print(line)

    def _append(self, step, metrics):
        record = {"step": step, "seconds": round(time.time() - self.started, 2), **metrics}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Sums(dict):
    """Sums of numbers by name, over the forwards of a step."""

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self[name] = self.get(name, 0.0) + float(value)


def mean_and_std(total: float, squares: float, count: float) -> dict[str, float]:
    """Sum and sum of squares of `count` rewards of the head -> their mean and standard deviation, as logged."""
    mean = total / count
    return {"reward_mean": mean, "reward_std": max(0.0, squares / count - mean**2) ** 0.5}


def read_metrics(out: str) -> list[dict]:
    """The lines of OUT/metrics.jsonl; a line cut short by a kill is left out."""
    return _read_lines(os.path.join(out, "metrics.jsonl"))


def _cut(path, last_step):
    """Leaves out of a file what came after `last_step`: those steps will be made again."""
    if os.path.isfile(path):
        kept = [line for line in _read_lines(path) if line["step"] <= last_step]
        write_jsonl(path, kept)


def _read_lines(path):
    lines = []
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            for text in file:
                with contextlib.suppress(json.JSONDecodeError):
                    lines.append(json.loads(text))
    return lines


def reward_scale(out: str) -> dict[str, float]:
    """Mean and spread of the rewards over the last quarter of the steps, for `DeScore.reward(normalize=True)`."""
    lines = [line for line in read_metrics(out) if "reward_std" in line]
    last = lines[-max(1, len(lines) // 4) :]
    mean = float(np.mean([line["reward_mean"] for line in last]))
    square = float(np.mean([line["reward_std"] ** 2 + line["reward_mean"] ** 2 for line in last]))
    return {"reward_mean": mean, "reward_std": max(square - mean**2, 1e-12) ** 0.5}


def draw_curves(out: str, panels: dict[str, list[str]], path: str, title: str) -> None:
    """Draws metrics.jsonl to a PNG, one panel per entry: title -> metric names. Missing metrics are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(out)
    columns = min(3, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(4.6 * columns, 3.2 * -(-len(panels) // columns))
    )
    for axis in np.ravel(axes)[len(panels) :]:
        axis.axis("off")
    for axis, (panel, names) in zip(np.ravel(axes), panels.items()):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name, marker="o" if len(points) < 40 else None, markersize=3)
        axis.set_title(panel, fontsize=10), axis.set_xlabel("step", fontsize=8), axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
