"""What a step of either stage logs: metrics.jsonl, the line on the screen, the curves, the scale of the rewards."""

import contextlib
import dataclasses
import json
import os
import time

import numpy as np
import torch

from losses import clipped_tokens, policy_ratio
from plumbing.settings import write_jsonl


class Log:
    """metrics.jsonl, one JSON line per step, and one dense line on the screen. Rank 0 writes."""

    def __init__(self, out: str, ranks, position: dict):
        """position: step.json of the checkpoint that was resumed. Later steps' lines will be written again."""
        self.path, self.ranks, self.started = os.path.join(out, "metrics.jsonl"), ranks, time.time()
        if ranks.is_main:
            for path in (self.path, os.path.join(out, "samples.jsonl")):
                if os.path.isfile(path):
                    write_jsonl(path, [line for line in _read_lines(path) if line["step"] <= position["step"]])
            written = [line["step"] for line in read_metrics(out)]
            if position["step"] and position["step"] not in written:  # a kill came between saving and logging
                self._append(position["step"], position["metrics"])

    def step(self, step: int, metrics: dict[str, float], line: str) -> None:
        """Writes one step's metrics; `line` is what the screen shows."""
        if self.ranks.is_main:
            self._append(step, metrics)
        self.ranks.print(line)

    def lacks(self, name: str) -> bool:
        """COLLECTIVE: has the last line no such number? A kill between saving and logging leaves the step's own."""
        lacks = self.ranks.is_main and name not in _read_lines(self.path)[-1]
        return self.ranks.sum({"lacks": lacks})["lacks"] > 0

    def complete(self, metrics: dict[str, float]) -> None:
        """Adds to the last line."""
        if self.ranks.is_main:
            *lines, last = _read_lines(self.path)
            write_jsonl(self.path, [*lines, last | metrics])

    def _append(self, step, metrics):
        seconds = round(time.time() - self.started, 2)
        write_jsonl(self.path, [{"step": step, "seconds": seconds, **metrics}], add=True)


class Sums:
    """Numbers by name from the forwards of a step, tensors among them, added up once it is over.

    To read a tensor is to wait for all that its GPU still has to do, and the GPU then waits for what Python asks next.
    losses: (loss, rows of the CSV) of each forward, for `require_finite`.
    """

    def __init__(self):
        self.values, self.losses = {}, []

    def add(self, **values) -> None:
        """Keeps values by name; tensors stay where they are, unread."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach() if torch.is_tensor(value) else value)

    def totals(self) -> dict[str, float]:
        """Each name's sum, but of "ratio_max" the largest: ONE wait."""
        found = iter(read_numbers([value for values in self.values.values() for value in values]))
        found = {name: [next(found) for _ in values] for name, values in self.values.items()}
        return {name: max(values) if name == "ratio_max" else sum(values) for name, values in found.items()}


def read_numbers(values: list) -> list[float]:
    """Numbers, tensors of one number among them -> floats, with one wait for the GPU."""
    tensors = [value.double() for value in values if torch.is_tensor(value)]
    read = iter(torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else [])
    return [next(read) if torch.is_tensor(value) else float(value) for value in values]


def mean_and_std(total: float, squares: float, count: float) -> dict[str, float]:
    """Sum and sum of squares of `count` rewards of the head -> their mean and standard deviation, as logged."""
    mean = total / count
    return {"reward_mean": mean, "reward_std": max(0.0, squares / count - mean**2) ** 0.5}


def read_metrics(out: str) -> list[dict]:
    """The lines of OUT/metrics.jsonl; a line cut short by a kill is left out."""
    return _read_lines(os.path.join(out, "metrics.jsonl"))


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
    from matplotlib.figure import Figure

    lines = read_metrics(out)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows))
    axes = np.ravel(figure.subplots(rows, columns))
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (panel, names) in zip(axes, panels.items()):
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


# ---- Stage 1 --------------------------------------------------------------------------------------------------
@torch.no_grad()
def log_scores(sums: Sums, loss, reward_a, reward_b, label, masks) -> None:
    """What a forward adds to the step's log."""
    margins = (reward_a - reward_b) * label  # (B,): r_w - r_l, and 0 for a human tie
    both = torch.cat([reward_a, reward_b])
    sums.add(loss=loss, correct=(margins > 0).sum(), decided=(label != 0).sum(), margin=margins.sum())
    sums.add(reward=both.sum(), square=(both**2).sum(), masked=sum(masks))


def cold_start_metrics(sums: dict[str, float], settings) -> dict[str, float]:
    """Sums over all ranks -> what is logged. docs/metrics.md explains each name."""
    pairs, decided = settings.batch_pairs, max(1, sums["decided"])
    return {"loss": sums["loss"], "accuracy": sums["correct"] / decided, "margin": sums["margin"] / decided,
            **mean_and_std(sums["reward"], sums["square"], 2 * pairs), "masked_share": sums["masked"] / pairs}


def cold_start_line(metrics: dict[str, float]) -> str:
    """The step in one line."""
    line = ("loss {loss:.4f}  accuracy {accuracy:.3f}  margin {margin:+.3f}  reward {reward_mean:+.2f} ± "
            "{reward_std:.2f}  masked {masked_share:.2f}  |g| {grad_norm_total:.2f}")
    return (line + "  val {val_accuracy:.3f}" * ("val_accuracy" in metrics)).format(**metrics)


COLD_START_PANELS = {  # title -> what curves.png shows in it
    "BT loss (Eq. 3)": ["loss"],
    "pair accuracy": ["accuracy", "val_accuracy"],
    "margin r_w - r_l": ["margin"],
    "reward": ["reward_mean", "reward_std"],
    "gradient norms": ["grad_norm_llm", "grad_norm_vision", "grad_norm_head"],
    "seconds": ["step_seconds"],
}


# ---- Stage 2 --------------------------------------------------------------------------------------------------
def engine_gap(old, rollouts) -> torch.Tensor | None:
    """(2G, T): log π_old by the trainer minus by the engine that sampled, per token; None if the engine does not tell.

    Both are the same policy, computed by two programs in two precisions: the gap is their error, and should be small.
    """
    if not rollouts.engine_log_probs[0]:
        return None
    gap = torch.zeros_like(old)
    for n, values in enumerate(values for row in rollouts.engine_log_probs for values in row):
        gap[n, : len(values)] = old[n, : len(values)] - torch.tensor(values, device=old.device)
    return gap


@torch.no_grad()
def log_update(sums: Sums, output, mask, old, rollouts, settings, counts) -> None:
    """What a forward adds to the update's log: each entry's sum over pairs and ranks is the mean."""
    log_probs, gap = output.log_probs, engine_gap(old, rollouts)  # (N, T), like old and mask
    reward_a, reward_b = output.rewards.view(2, -1)  # (N/2,) each
    margins = (reward_a - reward_b) * rollouts.pair.label  # (N/2,): r_w - r_l, and 0 for a human tie
    sums.add(pair_accuracy=(margins > 0).sum() / counts["bt"], margin=margins.sum() / counts["bt"])
    sums.add(decided=len(margins) * (rollouts.pair.label != 0))
    sums.add(reward=output.rewards.sum(), square=(output.rewards**2).sum())
    sums.add(mean_log_prob=(log_probs * mask).sum() / counts["tokens"])
    advantages = rollouts.advantages.flatten().to(mask.device)
    clip = settings.clip_low, settings.clip_high, settings.clip_dual
    clipped = clipped_tokens(log_probs, old, advantages, mask, *clip)
    sums.add(clip_share=clipped / counts["tokens"])
    sums.add(ratio_max=policy_ratio(log_probs, old, mask).max())
    if gap is not None:
        sums.add(engine_gap=(gap.abs() * mask).sum() / counts["tokens"])


def grpo_metrics(batch: list, updates: list[dict], eos: int, settings, ranks) -> dict[str, float]:
    """COLLECTIVE. What moves, averaged over all rollouts of all ranks. docs/metrics.md explains each name."""
    rewards = [r for rollouts in batch for row in rollouts.rule_rewards for r in row]
    cots = [cot for rollouts in batch for row in rollouts.cots for cot in row]
    groups = [row for rollouts in batch for row in rollouts.advantages]  # of G advantages each
    count = 2 * settings.batch_pairs * settings.rollouts
    rules = ranks.sum({
        "rollout_reward": sum(r.total for r in rewards) / count, "quality": sum(r.quality for r in rewards) / count,
        "format": sum(r.format for r in rewards) / count, "length": sum(r.length for r in rewards) / count,
        "cot_tokens": sum(map(len, cots)) / count,
        "truncated": sum(cot[-1:] != [eos] for cot in cots) / count,
        "flat_groups": sum(not group.any() for group in groups) / (2 * settings.batch_pairs),
    })
    reward, square = (sum(u.pop(name) for u in updates) for name in ("reward", "square"))
    decided = [u.pop("decided") for u in updates]  # an update of human ties alone says nothing about accuracy
    mean = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
    mean |= {name: sum(n * u[name] for n, u in zip(decided, updates)) / max(1, sum(decided))
             for name in ("bt_loss", "pair_accuracy", "margin")}
    ratio_max = max(u["ratio_max"] for u in updates)
    return rules | mean | mean_and_std(reward, square, count) | {"ratio_max": ratio_max}


def grpo_line(metrics: dict[str, float]) -> str:
    """The step in one line."""
    return ("R {rollout_reward:.3f} (quality {quality:.3f} format {format:.2f} length {length:.2f})  flat groups "
            "{flat_groups:.2f}  BT {bt_loss:.3f}  pair accuracy {pair_accuracy:.3f}  KL {kl:.1e}  |g| "
            "{grad_norm_total:.2f}  {cot_tokens:.0f} tokens").format(**metrics)


GRPO_PANELS = {  # title -> what curves.png shows in it
    "rollout reward R": ["rollout_reward", "quality", "format", "length"],
    "pair accuracy": ["pair_accuracy"],
    "BT loss (Eq. 10)": ["bt_loss"],
    "groups with no spread, clipped tokens": ["flat_groups", "clip_share"],
    "KL to the reference": ["kl"],
    "gradient norms": ["grad_norm_llm", "grad_norm_head"],
}


def write_samples(path: str, step: int, rollouts, texts: list[str]) -> None:
    """Appends the best and the worst CoT of the first pair's first video, with rewards: read them while it trains.

    texts: the G CoTs of that video.
    """
    order = sorted(range(len(rollouts.cots[0])), key=lambda i: rollouts.rule_rewards[0][i].total)
    pair = rollouts.pair
    what = {"step": step, "video": pair.video_a, "prompt": pair.prompt, "truth": pair.annotation_a}
    lines = [{**what, "advantage": round(float(rollouts.advantages[0, i]), 3),
              **dataclasses.asdict(rollouts.rule_rewards[0][i]), "cot": texts[i]} for i in (order[0], order[-1])]
    write_jsonl(path, lines, add=True)
