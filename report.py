"""What people look at after an evaluation: report.json, report.md, report.png, and one page with the clips.

Numbers and texts come in, files go out; nothing here thinks or scores. Whatever comes from a CSV, a file name or a
model is untrusted: it is escaped for HTML, for Markdown, for the figure's formulas and for spreadsheets.
Symbols: r_A, r_B rewards; margin = r_A - r_B; label +1 (A is better), -1 (B), 0 (the same); n pairs.
"""

import argparse
import base64
import csv
import glob
import hashlib
import html
import io
import json
import math
import os
import re
import sys
import typing

import numpy as np

import data
from data import DIMENSIONS, InputError

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


class Judged(typing.NamedTuple):
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


# ---------------------------------------------------------------------------------------------------------------
# 1. Numbers about the rewards and the CoTs
# ---------------------------------------------------------------------------------------------------------------
def calibration(labels: np.ndarray, margins: np.ndarray, bins: int = 10) -> dict:
    """Does A win as often as the Bradley-Terry model says? P(A wins) = 1 / (1 + exp(-margin)), human ties left out.

    Returns {said, won, pairs} of each non-empty one of `bins` equal slices of [0, 1], and the expected calibration
    error sum_b n_b / n |mean said - share won|: 0 is perfect; rewards on too large a scale are over-confident.
    """
    decided = labels != 0
    won = labels[decided] > 0
    said = 1 / (1 + np.exp(-np.clip(margins[decided], -700, 700)))  # exp overflows at 710
    slot = np.minimum((said * bins).astype(int), bins - 1)
    chosen = [slot == b for b in np.unique(slot)]
    rows = [{"said": float(said[c].mean()), "won": float(won[c].mean()), "pairs": int(c.sum())} for c in chosen]
    error = sum(r["pairs"] * abs(r["said"] - r["won"]) for r in rows) / len(said) if rows else None
    return {"bins": rows, "expected_calibration_error": error}


def verdicts_of(text: str) -> dict[str, str] | None:
    """A well-formed CoT's verdicts {dimension: "0" | "1" | "2" | "N/A"}; None if it is malformed.

    Well-formed: <think>...</think>, then <answer> with JSON that has a verdict for each of the five dimensions.
    """
    answer = data.extract_answer(text) if re.search(r"<think>.*</think>.*<answer>", text, re.DOTALL) else None
    scores = (answer or {}).get("dimensional_scores")
    if not isinstance(scores, dict):
        return None
    scores = {d: str(scores.get(d, "")).strip().upper() for d in DIMENSIONS}
    return scores if set(scores.values()) <= {"0", "1", "2", "N/A"} else None


def thought_statistics(records: list[dict], pairs: list[data.PreferencePair]) -> dict:
    """records {video, prompt, thoughts, tokens}; pairs, whose annotations are the truth -> what the CoTs are like.

    verdict_accuracy: per dimension, share of CoTs whose verdict is the annotated one; a malformed CoT is wrong.
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
            said = verdicts_of(text)
            malformed.append(said is None)
            for d in DIMENSIONS:
                if d in annotation:
                    hits[d].append((said or {}).get(d) == annotation[d])
    lengths = [n for record in records for n in record["tokens"]]
    return {
        "cots": len(malformed), "malformed_share": float(np.mean(malformed)),
        "tokens_mean": float(np.mean(lengths)), "tokens_median": float(np.median(lengths)), "tokens_max": max(lengths),
        "verdict_accuracy": {d: float(np.mean(h)) for d, h in hits.items() if h},
        "verdicts": sum(map(len, hits.values())),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# 2. report.json, report.md
# ---------------------------------------------------------------------------------------------------------------
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
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def accuracy_table(judged: list[Judged], videoalign: bool) -> str:
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


def markdown(judged: list[Judged], videoalign: bool) -> str:
    """The whole report.md: what was measured here, then what the paper published, which says so; then details."""
    first = judged[0].numbers
    text = [
        f"# Agreement with people: {markdown_cell(first['data'])}\n",
        f"{first['pairs']} pairs of {first['prompts']} prompts, {first['human_ties']} human ties; left out: "
        f"{first['skipped_pairs']} pairs ({first['skipped_videos']} videos could not be read).\n",
        accuracy_table(judged, videoalign),
        "Without ties: human ties are dropped. With ties: |margin| <= threshold is a predicted tie; the threshold is\n"
        "tuned on these pairs, as in published tables; cross-fitted: on the other half. Intervals: by prompt.\n",
        "## Published results (the paper's Table 1; not measured here)\n",
        published(first),
    ]
    if first.get("thoughts"):
        t = first["thoughts"]
        text += [
            f"## Chains of thought\n\n{t['cots']} CoTs, {t['malformed_share']:.1%} malformed. Tokens: mean "
            f"{t['tokens_mean']:.0f}, median {t['tokens_median']:.0f}, longest {t['tokens_max']}.\n"
        ]
        if t["verdict_accuracy"]:
            text += [table(["dimension", "verdicts right"], [[d, shown(v)] for d, v in t["verdict_accuracy"].items()])]
    if first["model_pairs"]:
        rows = [
            [*map(markdown_cell, p["models"]), str(p["pairs"]), shown(p["without_ties"]), shown(p["with_ties"])]
            for p in first["model_pairs"]
        ]
        text += ["## By the models that made the videos\n"]
        text += [table(["model", "model", "pairs", "without ties", "with ties"], rows)]
    return "\n".join(text + ["![report.png](report.png)\n"])


def published(ours: dict) -> str:
    """Table 1 with ours below it, in the columns of the benchmark that was run; for other data only a scale."""
    head = ["model", "source", "in-domain w/ ties", "GenAI w/", "GenAI w/o", "VideoGen w/", "VideoGen w/o"]
    rows = [[name, "published", *map(shown, values)] for name, values in PUBLISHED.items()]
    if ours["benchmark"]:
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


def write(out: str, judged: list[Judged], videoalign: bool = False) -> None:
    """Writes report.json (one model: its numbers; several: {"models": [...]}), report.md and .png; prints a table."""
    os.makedirs(out, exist_ok=True)
    numbers = [finite(one.numbers) for one in judged]
    with open(os.path.join(out, "report.json"), "w", encoding="utf-8") as file:
        json.dump(numbers[0] if len(numbers) == 1 else {"models": numbers}, file, indent=1, allow_nan=False)
    text = markdown(judged, videoalign)
    with open(os.path.join(out, "report.md"), "w", encoding="utf-8") as file:
        file.write(text)
    draw(os.path.join(out, "report.png"), judged)
    print(text.split("## Published")[0].strip(), f"\n\n{out}/report.md, report.json, report.png")


# ---------------------------------------------------------------------------------------------------------------
# 3. report.png
# ---------------------------------------------------------------------------------------------------------------
def draw(path: str, judged: list[Judged]) -> None:
    """Three panels: margins by label (several models: accuracies), reliability, accuracy by share of called ties."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, rest) = plt.subplots(1, 3, figsize=(15, 4.4))
    names = [one.numbers["name"][:40].replace("$", r"\$") for one in judged]  # a lone $ would start a formula
    (draw_margins if len(judged) == 1 else draw_accuracies)(left, judged, names)
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
    middle.set(title="Reliability (area: number of pairs)", xlabel="P(A wins), said", ylabel="share that A won")
    rest.set(title="Accuracy with ties, by threshold", xlabel="share of pairs called a tie", ylabel="accuracy")
    for axis in (left, middle, rest):
        axis.grid(alpha=0.25), axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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


# ---------------------------------------------------------------------------------------------------------------
# 4. The page: one file, no network
# ---------------------------------------------------------------------------------------------------------------
STYLE = """
body {font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1em; background: #f4f4f2}
nav {position: sticky; top: 0; background: #f4f4f2; padding: .6em 0}
button {font: inherit; padding: .25em .8em; margin-right: .4em}
button[aria-pressed=true] {background: #222; color: #fff}
article {background: #fff; border-radius: 8px; padding: .8em 1em; margin: 1em 0} article[hidden] {display: none}
.pair {display: grid; grid-template-columns: 1fr 1fr; gap: 1em} .pair > div {min-width: 0}
.frames {display: flex; gap: 3px; flex-wrap: wrap} .frames img {height: 80px}
.prompt, pre {white-space: pre-wrap; overflow-wrap: anywhere; overflow: auto; max-height: 22em}
.prompt {max-height: 6em; font-weight: 600; margin: .4em 0} pre {background: #f8f8f6; padding: .6em; font-size: 13px}
mark {background: #ffe9a8} .ok {color: #17692b} .no {color: #b3261e}"""
SCRIPT = """
function show(kind) {
  let count = 0;
  for (const a of document.querySelectorAll("article")) {
    a.hidden = kind && !a.classList.contains(kind);
    count += !a.hidden;
  }
  document.getElementById("count").textContent = count + " pairs shown";
  for (const b of document.querySelectorAll("button")) b.setAttribute("aria-pressed", b.dataset.kind === kind);
}
for (const b of document.querySelectorAll("button")) b.onclick = () => location.hash = b.dataset.kind;
onhashchange = () => show(location.hash.slice(1));
onhashchange();"""


def frames_html(path: str, count: int = 6) -> str:
    """A clip's sampled frames as <img> with the JPEG inside; a sentence instead if it cannot be read."""
    from PIL import Image

    try:
        frames = data.sample_frames(path, 2.0, 192 * 192).frames  # (T, H, W, 3)
    except InputError as error:
        return f"<p>{html.escape(str(error))}</p>"
    images = []
    for k in np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int)):
        buffer = io.BytesIO()
        Image.fromarray(frames[k]).save(buffer, "JPEG", quality=80)
        images.append(f'<img alt="frame" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
    return f'<div class="frames">{"".join(images)}</div>'


def thought_html(text: str | None) -> str:
    """A CoT, escaped, with the lines that hold a verdict or the answer marked."""
    if not text:
        return "<p>(no CoT)</p>"
    lines = [html.escape(line) for line in text.splitlines()]
    marked = [f"<mark>{x}</mark>" if re.search("verdict|dimensional_scores", x, re.I) else x for x in lines]
    return "<pre>" + "\n".join(marked) + "</pre>"


def write_page(path: str, one: Judged, pairs: list, rewards: np.ndarray, thoughts: dict, limit: int = 200) -> None:
    """Writes the page: per pair frames, prompt, both CoTs, rewards, human label, right or wrong; buttons filter.

    rewards (n, 2); thoughts {(video, prompt): record}. Of more than `limit` pairs, evenly spaced ones are shown. The
    page's policy forbids the network, and all scripts but ours, whose hash it names: a second wall behind the escaping.
    """
    words = {1: "A is better", -1: "B is better", 0: "the same"}
    large = np.quantile(np.abs(one.margins), 0.9)
    articles, seal = [], base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    for i in np.unique(np.linspace(0, len(pairs) - 1, min(limit, len(pairs))).round().astype(int)):
        pair, margin = pairs[i], one.margins[i]
        is_right = one.hits["with_ties"][i]
        said = 0 if abs(margin) <= one.numbers["threshold"] else np.sign(margin)
        kinds = ["wrong"] * (not is_right) + ["tie"] * (pair.label == 0) + ["large"] * bool(abs(margin) >= large)
        sides = []
        for name, video, reward in zip("AB", pair.videos, rewards[i]):
            texts = thoughts.get((video, pair.prompt), {"thoughts": [None]})["thoughts"]
            head = f"<b>{name}: reward {reward:+.3f}</b> <small>{html.escape(os.path.basename(video))}</small>"
            sides.append(f"<div>{head}{frames_html(video)}{''.join(map(thought_html, texts))}</div>")
        prompt, size = pair.prompt, len(pair.prompt)
        prompt = prompt if size <= 4000 else f"{prompt[:4000]}... ({size:,} characters)"
        articles.append(
            f'<article class="{" ".join(kinds)}">row {pair.row}: people say <b>{words[pair.label]}</b>, the model says '
            f'<b class="{"ok" if is_right else "no"}">{words[int(said)]}</b> (margin {margin:+.3f})'
            f'<div class="prompt">{html.escape(prompt)}</div><div class="pair">{"".join(sides)}</div></article>'
        )
    buttons = "".join(f'<button data-kind="{kind}">{text}</button>' for kind, text in (
        ("", "all"), ("wrong", "wrong"), ("tie", "human ties"), ("large", "large margins (top 10 %)")))  # fmt: skip
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{seal}'"
    n = one.numbers
    title = html.escape(f"{n['name']} on {n['data']}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>',
        f"<style>{STYLE}</style></head>",
        f"<body><h1>{title}</h1><p>{len(articles)} of {len(pairs)} pairs. Accuracy without ties ",
        f"{shown(n['accuracy_without_ties'])}, with ties {shown(n['accuracy_with_ties'])}.",
        f'</p><nav>{buttons}<span id="count"></span></nav>{"".join(articles)}<script>{SCRIPT}</script></body></html>',
    ]
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(parts))


# ---------------------------------------------------------------------------------------------------------------
# 5. CSV files
# ---------------------------------------------------------------------------------------------------------------
def write_csv(path: str, head: list[str], rows: list[list]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def write_scores(path: str, rows: list[tuple[str, str, float]], root: str) -> None:
    """path,prompt,reward: what --scores and --compare read back, so texts stay exact: beware of spreadsheets."""
    write_csv(path, ["path", "prompt", "reward"], [[os.path.relpath(v, root or "."), p, r] for v, p, r in rows])


def write_ranking(path: str, groups: dict[str, list[tuple[float, str]]]) -> None:
    """prompt,rank,path,reward, best first. For people: a cell that a spreadsheet would run as a formula gets a '."""

    def calm(text):
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text

    rows = [[calm(p), k, calm(v), reward] for p, videos in groups.items() for k, (reward, v) in enumerate(videos, 1)]
    write_csv(path, ["prompt", "rank", "path", "reward"], rows)


def write_best_and_worst(path: str, groups: dict[str, list[tuple[float, str]]]) -> None:
    """Best (A) and worst (B) video of each prompt, in VideoAlign's columns, so that DPO and cold_start.py can read it.

    A prompt with one video, or with equal rewards only, has no pair. Paths are relative to the file.
    """
    folder, rows = os.path.dirname(os.path.abspath(path)), []
    for prompt, videos in groups.items():
        (high, best), (low, worst) = videos[0], videos[-1]
        if high > low:
            rows.append([os.path.relpath(best, folder), os.path.relpath(worst, folder), prompt, "A", high, low])
    write_csv(path, ["path_A", "path_B", "prompt", "TA", "reward_A", "reward_B"], rows)
    print(f"{len(rows)} pairs of {len(groups)} prompts -> {path}")


# ---------------------------------------------------------------------------------------------------------------
# 5. Several evaluations side by side, as in the paper's Fig. 1b and Table 1
# ---------------------------------------------------------------------------------------------------------------
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
    """Puts several evaluations, of one seed or of several, into one table and figure: OUT/results.md, OUT/results.png."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", nargs="+", required=True, metavar="LABEL=GLOB", help="report.json files of each row")
    parser.add_argument(
        "--training", nargs="+", default=[], metavar="DIR", help="folders of whole runs, for a second table"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    print(compare_runs(args.runs, args.out, args.training))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
