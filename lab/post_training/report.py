"""What lab/post_training measures, the rule of its verdict, the tables, the figure and the strip of clips.

Shapes: N = prompts x group clips, clips (N, T, S, S, 3) in [-1, 1].
"""

import itertools
import json
import math
import os
import pathlib
import re
import shutil

import numpy as np
import torch

from lab.post_training.generator import C, Generator, P, sample
from lab.post_training.world import ATTRIBUTES, Judge, draw_asked, noise_of, render, rng_of, to_unit, wish
from lab.study.compare import mean_and_spread
from lab.study.pages import rounded
from lab.study.verdict import CANNOT_TELL, MARGIN, NOT_SEEN, SEEN, summary_of_seeds, weakest
from lab.study.verdict import verdict as study_verdict
from plumbing.report import table
from plumbing.settings import InputError, write_json, atomic_write
from toy.world import prompt_text

BESIDE = ("subject_consistency", "background_consistency", "sharpness", "dynamic_degree", "diversity")
CURVES = {"proxy": "rise of the proxy: DeScore's reward", "gold": "rise of gold: share of the asked attributes",
          "agreement": "rank correlation of both within a prompt"}
ROOT, PAGE = pathlib.Path(__file__).resolve().parents[2], "lab/post_training/README.md"
MARK, END = "<!-- FROM POST-TRAINING -->\n", "<!-- END -->"
LOSS = 0.10  # a measure that loses more than this share of its value has fallen
RULE = f"""The rule of the verdict. Before and after are measured on the same prompts and noise; all intervals are of
95 %, over the training seeds (Student's t). Fewer than three seeds: no verdict.
  ROSE    the interval of the rise of gold alignment lies above 0, and so does that of what it ends above the random
          reward's. DID NOT RISE: one of them lies below {MARGIN}, the study's margin. Else: CAN'T TELL.
  FELL    {", ".join(BESIDE)}: each that lost over {LOSS:.0%} of its value
          before in the mean over the seeds, and whose loss has an interval above 0.
  HACKED  the interval of the reward's rise lies above 0, and that of gold alignment below {MARGIN}: a rise that would
          count is ruled out. NOT HACKED: the reward did not rise, or gold alignment did. Else: CAN'T TELL."""


# ---------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------
def ranks(values) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def agreement(rewards: torch.Tensor, gold: torch.Tensor) -> float | None:
    """Spearman's rank correlation of reward and gold WITHIN a prompt, mean over prompts: what GRPO and DPO really use.

    Both (prompts, group). Prompts with no spread in one of them say nothing and are left out; None if all are.
    """
    pairs = [(r, g) for r, g in zip(rewards.tolist(), gold.tolist()) if len(set(r)) > 1 and len(set(g)) > 1]
    return float(np.mean([np.corrcoef(ranks(r), ranks(g))[0, 1] for r, g in pairs])) if pairs else None


def consistency(features: torch.Tensor) -> float:
    """VBench's: mean cosine of each frame with the first and with the one before. (N, T, D) -> 1 for a still clip.

    It saturates, and a frozen clip has the best value of all: never read it without the dynamic degree.
    """
    f = torch.nn.functional.normalize(features, dim=-1)
    first, before = (f[:, 1:] * f[:, :1]).sum(-1), (f[:, 1:] * f[:, :-1]).sum(-1)  # (N, T - 1)
    return ((first + before) / 2).mean().item()


def sharpness(clips: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels. It rises with noise as well as with clean edges."""
    across, down = clips.diff(dim=3).abs().mean(), clips.diff(dim=2).abs().mean()
    return ((across + down) / 2).item()


def dynamic_degree(clips: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring frames."""
    return clips.diff(dim=1).abs().mean().item()


def diversity(clips: torch.Tensor, group: int) -> float:
    """Root mean square difference of two clips of one prompt, mean over all pairs. 0: all are the same clip."""
    flat = clips.flatten(1).unflatten(0, (-1, group))
    return torch.stack([torch.pdist(f).mean() for f in flat]).mean().item() / math.sqrt(flat.shape[-1])


def rendered_clips(prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts of the evaluation (prompts, A), and a rendered clip for each: the scale of two measures."""
    asked = draw_asked(rng_of("evaluation"), prompts)
    return asked, to_unit(render(asked, rng_of("evaluation clips")))


def evaluate(generator: Generator, judge: Judge, score, rendered, group: int, steps: int) -> dict:
    """All measures of one generator, on prompts and start noise that are the same for all generators and seeds."""
    asked, truth = rendered
    prompts = len(asked)
    start, clips = noise_of((prompts, group, P, C), "evaluation noise"), []
    for k, row in enumerate(asked):
        clips.append(generator.latents.decode(sample(generator, row.expand(group, -1), start[k], steps)[0]))
    asked, clips = asked.repeat_interleave(group, 0), torch.cat(clips)
    rewards = torch.cat([score(a, c, k) for k, (a, c) in enumerate(zip(asked.split(64), clips.split(64)))])
    right = judge.right(asked, clips).float()  # (N, A)
    with torch.no_grad():
        subject, background = (torch.cat(f) for f in zip(*(judge.features(part) for part in clips.split(64))))
    gold = right.mean(1)
    return {
        "proxy": rewards.mean().item(), "gold": gold.mean().item(), **dict(zip(ATTRIBUTES, right.mean(0).tolist())),
        "agreement": agreement(rewards.view(prompts, group), gold.view(prompts, group)),
        "subject_consistency": consistency(subject), "background_consistency": consistency(background),
        "sharpness": sharpness(clips) / sharpness(truth), "diversity": diversity(clips, group),
        "dynamic_degree": dynamic_degree(clips) / dynamic_degree(truth),
        "best": best_of({"proxy": rewards.view(prompts, group).numpy(), "gold": gold.view(prompts, group).numpy()}),
    }


def best_of(values: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """{measure: (prompts, group)} -> {by: {measure: mean over the best clip of each group}}; ties go to the first."""
    picks = {by: scores.argmax(1)[:, None] for by, scores in values.items()}
    return {by: {name: float(np.take_along_axis(v, pick, 1).mean()) for name, v in values.items()}
            for by, pick in picks.items()}


# ---------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------
def verdict(before: list[dict], after: list[dict], random: list[dict]) -> str:
    """RULE in words, by the study's intervals and verdicts (lab/study/verdict.py).

    One dict of numbers per training seed, in the same order; random may be empty: not run.
    """
    def rise(name, one=before, two=after):
        return summary_of_seeds([b[name] - a[name] for a, b in zip(one, two)])

    gold, rises = rise("gold"), [b["gold"] - a["gold"] for a, b in zip(before, after)]
    told = f"gold alignment {gold['mean']:+.3f} ({', '.join(f'{one:+.3f}' for one in rises)})"
    if len(rises) < 3 or len(random) < len(rises):
        return f"no verdict, it needs three seeds with their random control; {told}"
    rose, proxy_rose = study_verdict(gold), rise("proxy")["low"] > 0
    real = weakest([rose, study_verdict(rise("gold", random))])
    losses = {name: rise(name, after, before) for name in BESIDE}
    fell = [name for name, loss in losses.items()
            if loss["low"] > 0 and loss["mean"] > LOSS * np.mean([n[name] for n in before])]
    hacked = NOT_SEEN if rose == SEEN or not proxy_rose else SEEN if rose == NOT_SEEN else CANNOT_TELL
    words = [{SEEN: "ROSE", NOT_SEEN: "did not rise"}.get(real, "can't tell whether it rose"),
             "FELL: " + ", ".join(fell) if fell else "nothing fell",
             {SEEN: "HACKED", NOT_SEEN: "not hacked"}.get(hacked, "can't tell whether it is hacked")]
    return f"{'; '.join(words)}; {told}, 95 % [{gold['low']:+.3f}, {gold['high']:+.3f}]"


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------
def find_runs(out: str) -> dict[int, dict[str, str]]:
    """{seed: {"base": its file, "grpo-descore": its file, ...}} of a folder that post_train wrote.

    InputError: it holds none.
    """
    seeds = sorted(int(n[4:]) for n in (os.listdir(out) if os.path.isdir(out) else ()) if re.fullmatch(r"seed\d+", n))
    runs = {}
    for seed in seeds:
        folder = os.path.join(out, f"seed{seed}")
        arms = sorted(n for n in os.listdir(folder) if os.path.exists(os.path.join(folder, n, "state.pt")))
        if os.path.exists(os.path.join(folder, "base.pt")):
            runs[seed] = {"base": os.path.join(folder, "base.pt")}
            runs[seed] |= {arm: os.path.join(folder, arm, "state.pt") for arm in arms}
    if not runs:
        raise InputError(f"{out}: holds no seedK/base.pt; run `python -m lab.post_training base` first.")
    return runs


def tables(measured: dict[str, list[dict]], group: int) -> str:
    """{arm: the numbers of each seed} -> two tables: what was asked for, and what else there is."""
    rows = {"no training": measured["base"]}
    for by, word in (("proxy", "the reward"), ("gold", "gold")):
        rows[f"no training, best of {group} by {word}"] = [n["best"][by] for n in measured["base"]]
    rows |= {arm: numbers for arm, numbers in measured.items() if arm != "base"}

    def lines(names, chosen):
        cells = [(row, n, [mean_and_spread([one.get(name) for one in n]) for name in names]) for row, n in chosen]
        return [[row, str(len(n)), *numbers] for row, n, numbers in cells]

    asked = ("proxy", "gold", *ATTRIBUTES, "agreement")
    full = [(row, numbers) for row, numbers in rows.items() if "best of" not in row]
    return (table(["", "seeds", *asked], lines(asked, rows.items())) + "\n"
            + table(["", "seeds", *(name.replace("_", " ") for name in BESIDE)], lines(BESIDE, full)))


def by_seed(result: dict) -> dict[str, dict[int, dict]]:
    """{arm: {seed: numbers}}"""
    return {arm: dict(zip(result["seeds"][arm], numbers)) for arm, numbers in result["measured"].items()}


def summed_up(result: dict) -> str:
    """The tables, and a verdict for each arm that is not itself the random control."""
    of, text = by_seed(result), tables(result["measured"], result["group"]) + "\n"
    for arm, found in of.items():
        if arm == "base" or arm.endswith("-random"):
            continue
        control = of.get(arm.rpartition("-")[0] + "-random") or of.get("grpo-random", {})
        starts = [of["base"][seed] for seed in found]
        text += f"- {arm}: {verdict(starts, [*found.values()], [control[k] for k in found if k in control])}\n"
    return text


def report(out: str, result: dict, logs: dict) -> str:
    """Writes OUT/results.json, results.md, post_training.png. result: `group`; `seeds` and `measured` numbers of each
    arm; logs: {arm: [metrics of each seed]}.
    """
    of, text = by_seed(result), summed_up(result)
    write_json(os.path.join(out, "results.json"), result)
    with atomic_write(os.path.join(out, "results.md")) as file:
        file.write(f"{RULE}\n\n{text}")
    before = {arm: [of["base"][seed] for seed in found] for arm, found in of.items()}
    draw_curves(os.path.join(out, "post_training.png"), result["measured"], before, logs)
    return text


def publish(out: str) -> None:
    """OUT's results -> lab/post_training/post_training.json, the table in lab/post_training/README.md, two figures."""
    with open(os.path.join(out, "results.json"), encoding="utf-8") as file:
        result = rounded(json.load(file))
    write_json(str(ROOT / "lab/post_training/post_training.json"), result)
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    (ROOT / PAGE).write_text(filled(page, result), encoding="utf-8")
    for name, kept in (("post_training.png", "post_training.png"), ("strip.png", "clips.png")):
        shutil.copy(os.path.join(out, name), ROOT / "lab/post_training" / kept)


def filled(page: str, result: dict) -> str:
    """The page with what stands between its two marks made anew."""
    head, rest = page.split(MARK, 1)
    return f"{head}{MARK}{summed_up(result)}{rest[rest.index(END) :]}"


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------
def pyplot():
    """matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_curves(path: str, measured: dict[str, list[dict]], before: dict[str, list[dict]], logs: dict) -> None:
    """Proxy, gold, and how far they agree, over updates: mean of the seeds, and a band from the lowest to the highest.

    On the prompts and start noise of the evaluation; at 0 the base, whose numbers are `before`. Where the proxy goes on
    rising and gold does not, the reward is hacked.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    for axis, (name, title) in zip(axes, CURVES.items()):
        for arm, runs in logs.items():
            if name != "gold" and not arm.endswith("-descore"):
                continue  # a control's reward is no proxy
            points = [[line for line in run if "fixed" in line] for run in runs]
            length = min(map(len, points))
            updates = [0, *(line["update"] + 1 for line in points[0][:length])]
            curves = [[start[name], *(line["fixed"][name] for line in run[:length])]
                      for start, run in zip(before[arm], points)]
            curves = np.array(curves, float)  # (seeds, points); None becomes nan
            if name != "agreement":
                curves -= curves[:, :1]  # each seed against its own base, as the verdict does
            colour = f"C{list(logs).index(arm)}"
            axis.plot(updates, curves.mean(0), marker=".", color=colour, label=arm)
            axis.fill_between(updates, curves.min(0), curves.max(0), color=colour, alpha=0.15)
        axis.set(xlabel="update", title=title)
        axis.spines[["top", "right"]].set_visible(False)
    for by, word, style in (("proxy", "the reward", "--"), ("gold", "gold", ":")):
        level = np.mean([numbers["best"][by]["gold"] - numbers["gold"] for numbers in measured["base"]])
        axes[1].axhline(level, color="grey", linestyle=style, linewidth=1, label=f"best of a group by {word}")
    axes[1].legend(fontsize=6.5, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.95), ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_strip(path: str, generators: dict[str, Generator], steps: int, prompts: int = 5) -> None:
    """Clips of the same start noise before and after, a prompt a row; every second frame. First: as it should look."""
    plt = pyplot()
    asked, truth = rendered_clips(prompts)
    start = noise_of((prompts, P, C), "strip noise")
    columns = {"rendered": truth}
    for arm, generator in generators.items():
        columns[arm] = generator.latents.decode(sample(generator, asked, start, steps)[0])
    figure, axes = plt.subplots(prompts, len(columns), figsize=(3.2 * len(columns), 1.15 * prompts), squeeze=False)
    for (row, line), (column, (arm, clips)) in itertools.product(enumerate(axes), enumerate(columns.items())):
        frames = (clips[row, ::2] + 1) / 2  # (T / 2, S, S, 3)
        line[column].imshow(torch.cat(list(frames), 1).clamp(0, 1).numpy(), interpolation="nearest")
        line[column].set_axis_off()
        if row == 0:
            line[column].set_title(arm, fontsize=9, pad=14)
        if column == 0:
            line[column].text(0, -2, prompt_text(wish(asked[row])), fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
