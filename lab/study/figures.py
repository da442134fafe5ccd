"""The study's figures: one panel per claim and one for the ladder, each from study.json alone."""

import pathlib
from functools import partial

import numpy as np

LAST = ", not stopped early"  # how claims 12 to 15 name the same rows of a training's last checkpoint
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def intervals(axis, rows: dict, bold=()) -> None:
    """A dot and its 95 % interval per row, a line at 0; what decides is darker."""
    rows = {name: row for name, row in rows.items() if row["mean"] is not None}
    for place, (name, row) in enumerate(reversed(rows.items())):
        colour = "black" if name in bold else "tab:blue"
        axis.plot([row["low"], row["high"]], [place, place], color=colour)
        axis.plot(row["mean"], place, "o", color=colour)
    axis.set_yticks(range(len(rows)), list(rows)[::-1], fontsize=7)
    axis.axvline(0, color="grey", linestyle="--", linewidth=1)


def lines(axis, xs, curves: dict, chance: bool = True) -> None:
    """Curves of the mean over seeds, a dot for each seed. curves: {label: one list of seeds' values per x}."""
    for colour, (label, values) in zip(COLOURS, curves.items()):
        axis.plot(xs[: len(values)], [np.mean(v) for v in values], color=colour, label=label)
        for x, dots in zip(xs, values):
            axis.plot([x] * len(dots), dots, ".", color=colour, markersize=4)
    if chance:
        axis.axhline(0.5, color="grey", linestyle="--", linewidth=1)
    axis.legend(fontsize=7, frameon=False)


def bars(axis, groups: dict[str, dict[str, list[float]]]) -> None:
    """{label: {group: each seed's value}} -> a bar per label in each group, with a dot for each seed."""
    names, width = list(next(iter(groups.values()))), 0.8 / len(groups)
    for k, (label, found) in enumerate(groups.items()):
        places = np.arange(len(names)) - 0.4 + width * (k + 0.5)
        axis.bar(places, [np.mean(found[n]) for n in names], width * 0.92, label=label, color=COLOURS[k % 5])
        for place, name in zip(places, names):
            axis.plot([place] * len(found[name]), found[name], "o", color="black", markersize=2)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.axhline(0.5, color="grey", linestyle="--", linewidth=1)
    axis.set_ylim(0, 1.15)
    axis.legend(fontsize=6.5, frameon=False, ncols=2, loc="upper center")


def paradigms(axis, claim) -> None:
    """Claim 1: a bar for each paradigm."""
    bars(axis, claim["more"]["accuracy"])
    axis.set_ylabel("accuracy, equal scores count half")


def gradient_noise(axis, claim) -> None:
    """Claim 2: how alike two draws' gradients are (cosine), bars over seeds; above them noise / signal."""
    found = claim["more"]["gradients"]
    for place, (name, row) in enumerate(found.items()):
        axis.bar(place, np.mean(row["cosine"]), 0.6, color=COLOURS[place])
        axis.plot([place] * len(row["cosine"]), row["cosine"], "o", color="black", markersize=3)
        noise = [n for n in row["noise_to_signal"] if n is not None]
        text = f"noise / signal\n{np.mean(noise):.2f}" if noise else "no signal\nfound"
        axis.text(place, max(row["cosine"]) + 0.04, text, ha="center", fontsize=7)
    axis.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found], fontsize=8)
    axis.set(ylim=(0, 1.1), ylabel="cosine of two draws' gradients")


def masking(axis, claim) -> None:
    """Accuracy over the masking probability, a line for each kind of CoT."""
    curve = claim["more"]["curve"]
    kinds = next(iter(curve.values()))
    lines(axis, [float(p) for p in curve], {f"{kind} CoT": [curve[p][kind] for p in curve] for kind in kinds})
    axis.set(xlabel="masking probability p in training", ylabel="accuracy", ylim=(0, 1))


def reward_drift(axis, claim, window: int = 5) -> None:
    """Claim 4: the rewards' spread over stage 2, as a share of where it began; thin: seeds, thick: their mean.

    The spread, not the mean: BT sees differences only, so a shift of all rewards is nothing to it.
    """
    for colour, (weight, found) in zip(COLOURS, claim["more"]["weights"].items()):
        window = min(window, *map(len, found["reward_std"]))  # a trial may be shorter
        runs = [np.convolve(run, np.full(window, 1 / window), "valid") for run in found["reward_std"]]
        runs = np.array([run / run[0] for run in runs])  # (seeds, steps - window + 1)
        steps = np.arange(window, window + runs.shape[1])
        axis.plot(steps, runs.T, color=colour, alpha=0.4, linewidth=0.7)
        axis.plot(steps, runs.mean(0), color=colour, label=f"BT weight {weight}" + " (seed 0)" * (len(runs) == 1))
    axis.set(xlabel=f"step of stage 2 (mean of {window})", ylabel="spread of the rewards / at the start")
    axis.axhline(1, color="grey", linestyle="--", linewidth=1)
    axis.legend(fontsize=7, frameon=False)


def data_efficiency(axis, claim) -> None:
    """Claim 5: accuracy against the share of the training pairs, thinking and not."""
    curve = {label: found for label, found in claim["more"]["curve"].items() if found}
    shares = list(max(curve.values(), key=len))
    lines(axis, [1 / int(s) for s in shares], {label: list(found.values()) for label, found in curve.items()})
    axis.set_xscale("log", base=2)
    axis.set_xticks([1 / int(s) for s in shares], [f"1/{s}" if s != "1" else "all" for s in shares])
    axis.set(xlabel="share of the training pairs", ylabel="accuracy", ylim=(0.3, 1))


def error_tolerance(axis, claim) -> None:
    """Accuracy over the number of corrupted verdicts, of the head and of the score in the text."""
    more = claim["more"]
    lines(axis, list(range(len(more["head"]))), {"head": more["head"], "score in the text": more["text"]})
    axis.axhline(np.mean(more["no_think"]), color="tab:green", linestyle=":", label="head, no CoT")
    axis.set(xlabel="corrupted verdicts in the true CoT", ylabel="accuracy", ylim=(0, 1.02))
    axis.legend(fontsize=7, frameon=False)


def fine_grained(axis, claim) -> None:
    """The head's hits where the text calls a tie or errs, with intervals."""
    intervals(axis, claim["parts"], claim["decides"])
    axis.set(xlabel="head's hits minus 1/2", ylim=(-1, 2))
    axis.set_yticks(axis.get_yticks(), [f"{row['n']} pairs,\n{name.split('scores ')[1]}"
                                        for name, row in list(claim["parts"].items())[::-1] if row["mean"] is not None])


def reads_both(axis, claim) -> None:
    """Accuracy lost by a changed video or CoT, with intervals."""
    intervals(axis, {name.removeprefix("lost by: "): row for name, row in claim["parts"].items()},
              [name.removeprefix("lost by: ") for name in claim["decides"]])
    axis.set(xlabel="accuracy lost")


PANELS = (paradigms, gradient_noise, masking, reward_drift, data_efficiency, error_tolerance, fine_grained, reads_both)
TITLES = ("1 three paradigms", "2 BT smooth, GRPO noisy", "3 masking", "4 reward drift", "5 data efficiency",
          "6 errors in the CoT", "7 equal stated scores", "8 reads prompt and video")


def ladder(axis, result) -> None:
    """Accuracy over the three sets, rung by rung."""
    rungs = {name: sets["all"] for name, sets in result["ladder"].items()}
    intervals(axis, rungs)
    axis.axvline(0.5, color="grey", linestyle="--", linewidth=1)
    axis.set(xlabel="accuracy, mean of the three toy sets", xlim=(0.4, 1))
    axis.set_yticks(axis.get_yticks(), [name.replace(", ", ",\n") for name in list(rungs)[::-1]])


def panels(result: dict) -> dict:
    """{title: function that draws it into an axis} of all that has been measured."""
    found = {}
    for claim, draw, title in zip(result["claims"], PANELS, TITLES):
        if claim["parts"]:
            found[f"{title}: {claim['verdict']}"] = (draw, claim)
    if result["ladder"]:
        found["the ladder"] = (ladder, result)
    return found


def _finish(plt, figure, path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_all(folder: pathlib.Path, result: dict) -> list[str]:
    """A file for each panel; returns their names."""
    plt, names = _plot(), []
    for title, (draw, what) in panels(result).items():
        figure, axis = plt.subplots(figsize=(5.6, 3.6))
        _panel(axis, title, draw, what)
        names.append(f"study_{title.split()[0] if title[0].isdigit() else 'ladder'}.png")
        _finish(plt, figure, folder / names[-1])
    return names


def draw_together(path: pathlib.Path, result: dict, chosen: tuple[str, ...] = ("",)) -> None:
    """The panels whose title begins with one of `chosen` in one picture, three a row; without `chosen` all."""
    plt, found = _plot(), {title: panel for title, panel in panels(result).items() if title.startswith(chosen)}
    rows, columns = -(-len(found) // 3), min(3, len(found))
    figure, axes = plt.subplots(rows, columns, figsize=(5.3 * columns, 3.7 * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (title, (draw, what)) in zip(axes.flat, found.items()):
        _panel(axis, title, draw, what)
    _finish(plt, figure, path)


def _panel(axis, title, draw, what) -> None:
    draw(axis, what)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


# ---- The second world (worlds.py) ----------------------------------------------------------------------------------
def worth(axis, found) -> None:
    """DeScore beside its own text, the coupled and the discriminative model, in each world."""
    rows = {name: row for name, row in found[10]["parts"].items() if "DeScore -" in name}
    intervals(axis, rows, [name for name in rows if name in found[10]["decides"] + found[11]["decides"]])
    axis.set(xlabel="difference of accuracies")


def budgets(axis, found) -> None:
    """Accuracy against FLOPs, a curve for each seed."""
    for colour, who in zip(COLOURS, ("BT", "coupled")):
        for k, curve in enumerate(found[9]["more"]["curves"][f"{who}: FLOPs"]):
            axis.plot(*zip(*curve), ".-", color=colour, linewidth=0.8, label=who if k == 0 else None)
    axis.set_xscale("symlog", linthresh=1e11)
    axis.set(xlabel="FLOPs", ylabel="accuracy")
    axis.legend(fontsize=7, frameon=False)


def looks(axis, found, what: str, says: str) -> None:
    """Rows of claims 12 to 15, of the trainings that were stopped early."""
    rows = {name: row for name, row in found[12]["parts"].items()
            if name.startswith(what) and not name.endswith(LAST)}
    said = {name: name.partition(": ")[2] + ", one seed" * (row["seeds"] == 1) for name, row in rows.items()}
    intervals(axis, {said[name]: row for name, row in rows.items()})
    axis.set(xlabel=says)


def noise_by_length(axis, found) -> None:
    """Claim 16: how alike two draws' gradients are, over the length of the CoTs."""
    curves = found[16]["more"]["cosine"]
    tokens = [t for t, values in next(iter(curves.values())).items() if values]
    curves = {name: [row[t] for t in tokens] for name, row in curves.items()}
    lines(axis, [int(t) for t in tokens], curves, chance=False)
    axis.set(xlabel="tokens of a CoT", ylabel="cosine of two draws' gradients")


def draw_worlds(path: pathlib.Path, result: dict) -> None:
    """worlds.png: what has been measured."""
    found = {claim["number"]: claim for claim in result["claims"]}
    chosen = {"what a head is worth": (worth, 10), "what it costs": (budgets, 9),
              "when it looks": (partial(looks, what="black clip", says="accuracy lost by a black clip, CoT kept"), 12),
              "what masking buys": (partial(looks, what="absent CoT", says="without a CoT, minus that of p 0"), 12),
              "length and noise": (noise_by_length, 16)}
    panels = {title: draw for title, (draw, number) in chosen.items() if found[number]["parts"]}
    plt = _plot()
    columns, rows = max(1, min(3, len(panels))), max(1, -(-len(panels) // 3))
    figure, axes = plt.subplots(rows, columns, figsize=(6.2 * columns, 4.2 * rows), squeeze=False)
    for axis, (title, draw) in zip(axes.flat, panels.items()):
        _panel(axis, title, draw, found)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    _finish(plt, figure, path)
