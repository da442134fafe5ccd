"""What people look at after an evaluation: report.json, report.md, report.png.

Numbers and texts come in, files go out; nothing here thinks or scores. Whatever comes from a CSV, a file name or a
model is untrusted: it is escaped for HTML, for Markdown, for the figure's formulas and for spreadsheets.
Symbols: r_A, r_B rewards; margin = r_A - r_B; label +1 (A is better), -1 (B), 0 (the same); n pairs.
"""

import html
import math
import os
import re
import typing

import numpy as np

from plumbing.settings import atomic_write, write_csv, write_json
from rules import DIMENSIONS, read_verdicts, well_formed

# The paper's Table 1: accuracy in-domain with ties; GenAI-Bench with, without; VideoGen-RewardBench with, without.
PUBLISHED = {
    "VideoScore": (0.552, 0.490, 0.720, 0.372, 0.503),
    "VideoAlign": (0.642, 0.494, 0.728, 0.538, 0.722),
    "VisionReward": (0.571, 0.525, 0.724, 0.465, 0.611),
    "UnifiedReward": (0.492, 0.458, 0.686, 0.303, 0.564),
    "UnifiedReward-Thinking": (0.578, 0.548, 0.709, 0.428, 0.582),
    "VideoScore2": (0.617, 0.391, 0.616, 0.301, 0.497),
    "DeScore": (0.734, 0.504, 0.765, 0.568, 0.768),
}
COLUMNS = {"in-domain": (0, None), "genai-bench": (1, 2), "videogen-rewardbench": (3, 4)}  # benchmark -> with, without


class Agreement(typing.NamedTuple):
    """One reward model on one set of pairs.

    numbers: what goes into report.json. labels, margins (n,). curve: candidate thresholds and accuracies, both (m,).
    hits: {"without_ties" | "with_ties": (n,) bool, was the pair right}. groups (n,): number of the pair's prompt.
    """

    numbers: dict
    labels: np.ndarray
    margins: np.ndarray
    curve: tuple[np.ndarray, np.ndarray]
    hits: dict[str, np.ndarray]
    groups: np.ndarray


# ---- 1. Numbers about the rewards and the CoTs ----------------------------------------------------------------
def thought_statistics(records: list[dict], pairs: list) -> dict:
    """records of Workers.think; pairs, whose annotations are the truth -> what the CoTs are like.

    verdict_accuracy: per dimension, share of CoTs whose verdict is the annotated one, as R_qual counts it.
    """
    truth = {}
    for pair in pairs:
        for video, annotation in zip(pair.videos, (pair.annotation_a, pair.annotation_b)):
            if annotation:
                truth[video, pair.prompt] = annotation
    hits, malformed = {d: [] for d in DIMENSIONS}, []
    for record in records:
        annotation = truth.get((record["video"], record["prompt"]), {})
        for text in record["thoughts"]:
            malformed.append(not well_formed(text))
            said = read_verdicts(text)
            for d in DIMENSIONS:
                if d in annotation:
                    hits[d].append(said.get(d) == annotation[d])
    lengths = [n for record in records for n in record["tokens"]]
    return {
        "cots": len(malformed), "malformed_share": float(np.mean(malformed)),
        "cut_off": sum(not ended for record in records for ended in record["ended"]),
        "tokens_mean": float(np.mean(lengths)), "tokens_median": float(np.median(lengths)), "tokens_max": max(lengths),
        "verdict_accuracy": {d: float(np.mean(h)) for d, h in hits.items() if h},
        "verdicts": sum(map(len, hits.values())),
    }


def cut_off(cut: int, cots: int) -> list[str]:
    """A sentence about CoTs that were scored though they had not ended; none if all had."""
    return [f"{cut} of {cots} CoTs did not end within --max-new-tokens; their rewards may be far off."] if cut else []


# ---- 2. report.json, report.md --------------------------------------------------------------------------------
def markdown_cell(text, limit: int = 80) -> str:
    """Untrusted text for one Markdown table cell: one line, no HTML, no formula, no table or link syntax."""
    text = " ".join(str(text).split())
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return re.sub(r"([\\`*_{}\[\]|$~#!])", r"\\\1", html.escape(text, quote=False))


def shown(value, interval=None) -> str:
    """.734, with its interval: .734 (.701 to .765); a dash for what is not defined."""
    if value is None or not math.isfinite(value):
        return "-"
    if interval is None or not all(map(math.isfinite, interval)):
        return f"{value:.3f}"
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Rows of cells as a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def accuracy_table(judged: list[Agreement], videoalign: bool) -> str:
    """One row per model."""
    kinds, many = ("without_ties", "with_ties"), len(judged) > 1
    head = ["model", "without ties (95 %)", "with ties (95 %)", "threshold", "cross-fitted", "calibration error"]
    head += ["with ties, VideoAlign's script"] * videoalign
    head += ["minus first, without ties", "minus first, with ties"] * many
    rows = []
    for n, *_ in judged:
        row = [markdown_cell(n["name"]), *(shown(n[f"accuracy_{k}"], n[f"accuracy_{k}_interval"]) for k in kinds)]
        row += ["nothing is tied" if n["threshold"] < 0 else f"{n['threshold']:.4g}"]
        row += [shown(n["accuracy_with_ties_cross_fitted"]), shown(n["calibration"]["expected_calibration_error"])]
        row += [shown(n["accuracy_with_ties_videoalign_compatible"])] * videoalign
        gap = n["difference_to_first"] or {}
        rows.append(row + [shown(gap.get(k), gap.get(f"{k}_interval")) for k in kinds] * many)
    return table(head, rows)


def markdown(judged: list[Agreement], videoalign: bool) -> str:
    """The whole report.md: what was measured here, then what the paper published, which says so; then details."""
    first = judged[0].numbers
    t = first.get("thoughts")
    labels = f" ({first['labels']})" if first.get("labels") else ""
    text = [
        f"# Agreement with people: {markdown_cell(first['data'])}\n",
        f"{first['pairs']} pairs of {first['prompts']} prompts, {first['human_ties']} human ties{labels}; left out: "
        f"{first['skipped_pairs']} pairs ({first['skipped_videos']} videos could not be read).\n",
        *([line + "\n" for line in cut_off(t["cut_off"], t["cots"])] if t else []),
        accuracy_table(judged, videoalign),
        "Without ties: of the pairs that people decided, the share whose better video has the higher reward; .5 is\n"
        "chance. With ties: the share right where |margin| <= threshold counts as a tie; it is never below the share\n"
        "of human ties. The threshold is tuned on these pairs, as in published tables; cross-fitted: on the other\n"
        "half. Calibration error: how far said chances of winning are from won ones. Intervals: 95 %, by prompt.\n",
        "## Published results (the paper's Table 1; not measured here)\n",
        published(first),
    ]
    if t:
        text += [f"## Chains of thought\n\n{t['cots']} CoTs, {t['malformed_share']:.1%} malformed. Tokens: mean "
                 f"{t['tokens_mean']:.0f}, median {t['tokens_median']:.0f}, longest {t['tokens_max']}.\n"]
        if t["verdict_accuracy"]:
            text += [table(["dimension", "verdicts right"], [[d, shown(v)] for d, v in t["verdict_accuracy"].items()])]
    if first["model_pairs"]:
        rows = [[*map(markdown_cell, p["models"]), str(p["pairs"]), shown(p["without_ties"]), shown(p["with_ties"])]
                for p in first["model_pairs"]]
        text += ["## By the models that made the videos\n"]
        text += [table(["model", "model", "pairs", "without ties", "with ties"], rows)]
    return "\n".join(text + ["![report.png](report.png)\n"])


def published(ours: dict) -> str:
    """Table 1 with ours below it, in the columns of the benchmark that was run; for other data only a scale."""
    head = ["model", "source", "in-domain w/ ties", "GenAI w/", "GenAI w/o", "VideoGen w/", "VideoGen w/o"]
    rows = [[name, "published", *map(shown, values)] for name, values in PUBLISHED.items()]
    if ours["benchmark"] in COLUMNS and not ours.get("labels"):  # other data, and other labels, have none
        mine = ["-"] * 5
        for column, key in zip(COLUMNS[ours["benchmark"]], ("accuracy_with_ties", "accuracy_without_ties")):
            if column is not None:
                mine[column] = shown(ours[key])
        rows.append([markdown_cell(ours["name"]), "this run", *mine])
    return table(head, rows)


def finite(value):
    """JSON has no NaN: null instead, at any depth."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(out: str, judged: list[Agreement], videoalign: bool = False, left_panel=None) -> None:
    """Writes report.json (one model: its numbers; several: {"models": [...]}), report.md and .png; prints a table."""
    os.makedirs(out, exist_ok=True)
    numbers = [finite(one.numbers) for one in judged]
    write_json(os.path.join(out, "report.json"), numbers[0] if len(numbers) == 1 else {"models": numbers})
    text = markdown(judged, videoalign)
    with atomic_write(os.path.join(out, "report.md")) as file:
        file.write(text)
    draw(os.path.join(out, "report.png"), judged, left_panel or draw_margins)
    print(text.split("## Published")[0].strip(), f"\n\n{out}/report.md, report.json, report.png")


# ---- 3. report.png --------------------------------------------------------------------------------------------
def draw(path: str, judged: list[Agreement], left_panel) -> None:
    """Three panels: the left one, reliability, accuracy by share of called ties."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4))
    left, middle, rest = figure.subplots(1, 3)
    names = [one.numbers["name"][:40].replace("$", r"\$") for one in judged]  # a lone $ would start a formula
    left_panel(left, judged, names)
    middle.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="perfect")
    for one, name in zip(judged, names):
        bins = one.numbers["calibration"]["bins"]
        said, won, count = ([b[k] for b in bins] for k in ("said", "won", "pairs"))
        line = middle.plot(said, won, marker="o", markersize=3, label=name)[0]
        middle.scatter(said, won, s=[300 * c / sum(count) for c in count], color=line.get_color(), alpha=0.35)
        thresholds, accuracies = one.curve
        share = np.searchsorted(np.sort(np.abs(one.margins)), thresholds, side="right") / len(one.margins)
        rest.plot(share, accuracies, label=name, color=line.get_color(), drawstyle="steps-post")
        best = int(np.argmax(accuracies))
        rest.plot(share[best], accuracies[best], "o", color=line.get_color())
        rest.annotate(f" {accuracies[best]:.3f}", (share[best], accuracies[best]), fontsize=9, va="bottom")
    rest.axhline((judged[0].labels == 0).mean(), color="grey", linestyle="--", linewidth=1, label="share of human ties")
    middle.set(title="Reliability (area: number of pairs)", xlabel="chance of winning, said", ylabel="share won")
    rest.set(title="Accuracy with ties, by threshold", xlabel="share of pairs called a tie", ylabel="accuracy")
    for axis in (left, middle, rest):
        axis.grid(alpha=0.25), axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def draw_margins(axis, judged, names) -> None:
    """Histogram of r_A - r_B, one outline per human label. A good model keeps the three apart."""
    one = judged[0]
    low, high = np.quantile(one.margins, (0.005, 0.995))
    edges = np.linspace(low, high if high > low else low + 1, 31)
    looks = ((1, "A is better", "tab:blue"), (0, "the same", "tab:grey"), (-1, "B is better", "tab:orange"))
    for label, text, colour in looks:
        chosen = np.clip(one.margins[one.labels == label], edges[0], edges[-1])
        axis.hist(chosen, edges, histtype="stepfilled", alpha=0.35, color=colour, label=f"{text} ({len(chosen)})")
        axis.hist(chosen, edges, histtype="step", color=colour)
    threshold = one.numbers["threshold"]
    if threshold > 0:
        axis.axvspan(-threshold, threshold, color="black", alpha=0.07, label="called a tie")
    axis.set(title=f"Margins by human label: {names[0]}", xlabel="margin r_A - r_B", ylabel="pairs")


def write_scores(path: str, rows: list[tuple[str, str, float]], root: str) -> None:
    """path,prompt,reward: what lab/study/compare.py reads back, so texts stay exact: beware of spreadsheets."""
    write_csv(path, ["path", "prompt", "reward"], [[os.path.relpath(v, root or "."), p, r] for v, p, r in rows])
