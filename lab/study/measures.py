"""What the study reads from finished runs: for each claim a value per pair, and the numbers of its figure.

Each function takes {seed: folder of that seed's run} and returns (parts, more): parts {name: values}, values as
lab/study/verdict.py takes them, {seed: {test set: (n,) array}}; more: plain numbers, for tables and figures.

A hit is 1 where the sign of r_A - r_B is the label, 0 where it is not, and 1/2 for equal scores: texts state equal
scores often, heads never, and counting those as wrong would let the head win by not being rounded.
"""

import glob
import json
import os

import numpy as np

import data
from lab.study import sanity
from lab.study.models import CSVS, MOST_WRONG, SETS
from lab.study.sanity import half_hits
from plumbing.formats import open_table
from plumbing.jobs import read_log
from plumbing.logs import read_metrics
from plumbing.settings import write_csv
from rules import overall_score

SHARES = (8, 4, 2, 1)  # of data efficiency: 1/8 ... all of the pairs


# ---------------------------------------------------------------------------------------------------------------
# 1. Reading
# ---------------------------------------------------------------------------------------------------------------
def key(video: str, prompt: str) -> tuple:
    """A clip by its split and name, wherever the run lies."""
    return *os.path.normpath(video).split(os.sep)[-2:], prompt


def pair_scores(run: str, folder: str, name: str, kind: str = "head") -> tuple[np.ndarray, np.ndarray]:
    """(labels (n,), rewards (n, 2)) of the decided pairs of a test set, as an evaluation left them in RUN/folder.

    kind: "head", or "text", the score that the CoT states.
    """
    pairs = [p for p in data.read_pairs(f"{run}/data/{CSVS[name]}.csv") if p.label != 0]
    log = read_log(f"{run}/{folder}/{name}", "rewards" if kind == "head" else "thoughts")
    if kind == "head":
        scores = {key(*where): record["reward"] for where, record in log.items()}
    else:
        scores = {key(*where): overall_score(record["thoughts"][0]) for where, record in log.items()}
    labels = np.array([pair.label for pair in pairs])
    return labels, np.array([[scores[key(video, pair.prompt)] for video in pair.videos] for pair in pairs])


def is_whole(run: str, folder: str) -> bool:
    """Whether an evaluation has come to its end: its last report is there."""
    return os.path.isfile(f"{run}/{folder}/{SETS[-1]}/report.json")


def evaluated(runs: dict, folder: str, kind: str = "head") -> dict:
    """{seed: {set: hits}} of an evaluation."""
    return {seed: {name: half_hits(*pair_scores(run, folder, name, kind)) for name in SETS}
            for seed, run in runs.items()}


def untrained(runs: dict) -> dict:
    """{seed: {set: hits}} of the scores in the base's greedy CoTs, of the runs in which those were collected."""
    hits = {}
    for seed, run in runs.items():
        paths = {name: f"{run}/study/cots/{CSVS[name]}.csv" for name in SETS}
        if all(map(os.path.isfile, paths.values())):
            pairs = {name: [p for p in data.read_pairs(path) if p.label != 0] for name, path in paths.items()}
            hits[seed] = {name: half_hits(np.array([p.label for p in some]),
                                          np.array([[overall_score(cot) for cot in p.cots] for p in some]))
                          for name, some in pairs.items()}
    return hits


def heads(runs: dict, model: str, kind: str, names=SETS) -> dict:
    """{seed: {set: hits}} of a model for one kind of given CoT, from study/heads.json of the seeds that have it."""
    hits = {}
    for seed, run in runs.items():
        found = load(run, "heads.json")
        if model in found["in-domain"]["rewards"]:
            hits[seed] = {}
            for name in names:
                one = found[name]
                rewards = np.array(one["rewards"][model])[:, :, one["kinds"].index(kind)]  # (n, 2)
                hits[seed][name] = half_hits(np.array(one["labels"]), rewards)
    return hits


def load(run: str, name: str):
    """A JSON file of RUN/study."""
    with open(f"{run}/study/{name}", encoding="utf-8") as file:
        return json.load(file)


def minus(one: dict, other: dict) -> dict:
    """Paired differences, on the seeds that have both."""
    return {seed: {name: one[seed][name] - other[seed][name] for name in one[seed]} for seed in one if seed in other}


def strict(hits: dict) -> dict:
    """Equal scores wrong, as accuracy without ties counts them: 1/2 becomes 0."""
    return {seed: {name: np.floor(array) for name, array in sets.items()} for seed, sets in hits.items()}


def per_seed(values: dict) -> list[float]:
    """The mean of each seed over its sets."""
    return [float(np.mean([a.mean() for a in sets.values() if len(a)])) for sets in values.values()]


def per_set(values: dict) -> dict[str, list[float]]:
    """{set: the mean of each seed}."""
    return {name: [float(sets[name].mean()) for sets in values.values()] for name in next(iter(values.values()))}


# ---------------------------------------------------------------------------------------------------------------
# 2. The claims
# ---------------------------------------------------------------------------------------------------------------
def paradigms(runs):
    """1: DeScore, the coupled generative model and the discriminative one, each thinking (or not) for itself."""
    models = {
        "discriminative": evaluated(runs, "eval/discriminative"),
        "coupled generative": evaluated(runs, "study/eval/coupled", "text"),
        "DeScore": evaluated(runs, "eval/stage2"),
        "DeScore's own text": evaluated(runs, "eval/stage2", "text"),
    }
    if base := untrained(runs):
        models["the untrained base's text"] = base
    ours = models["DeScore"]
    parts = {f"DeScore - {name}": minus(ours, hits) for name, hits in models.items() if name != "DeScore"}
    parts["coupled generative - discriminative"] = minus(models["coupled generative"], models["discriminative"])
    for name in ("coupled generative", "DeScore's own text"):
        parts |= {f"{name} - the untrained base's text": minus(models[name], base)} if base else {}
        parts[f"DeScore - {name}, equal scores wrong"] = minus(strict(ours), strict(models[name]))
    return parts, {"accuracy": {name: per_set(hits) for name, hits in models.items()}}


def of_draws(cosines) -> np.ndarray:
    """Each draw's mean cosine with all others, twice as far from their mean: a bootstrap takes values for independent.

    They share their draws: the mean over all pairs of n draws is a U-statistic, and its standard deviation is twice
    that of a mean of n independent values that spread as these do (Hoeffding, 1948; 2.0 to 2.1 simulated at n = 32).
    """
    cosines = np.asarray(cosines, dtype=float)
    return cosines.mean() + 2 * (cosines - cosines.mean())


def gradient_noise(runs):
    """2: one draw's gradient against the other draws', at the same weights and pairs."""
    found = {seed: load(run, "gradients.json") for seed, run in runs.items()}
    names = [name for name in next(iter(found.values())) if name != "BT"]
    parts = {f"cosine: BT - {name}": {
        seed: {"draws": of_draws(rows["BT"]["cosine"]) - of_draws(rows[name]["cosine"])}
        for seed, rows in found.items()}
        for name in names}
    more = {name: {"noise_to_signal": [rows[name]["noise_to_signal"] for rows in found.values()],
                   "cosine": [float(np.mean(rows[name]["cosine"])) for rows in found.values()]}
            for name in ("BT", *names)}
    return parts, {"gradients": more, "training_accuracy": training_accuracy(runs)}


# trained by -> (folder, what its metrics.jsonl calls its accuracy on the step's own pairs)
ACCURACIES = {"BT, stage 1": ("stage1", "accuracy"), "BT, discriminative": ("discriminative", "accuracy"),
              "BT, stage 2": ("stage2", "pair_accuracy"), "GRPO, preference": ("study/coupled", "quality")}


def training_accuracy(runs) -> dict:
    """2, as Fig. 1c draws it: {trained by: each seed's mean over its last 40 steps, and its step-to-step spread}.

    Stage 1 counts 8 pairs a step, stage 2 and the preference reward 6 pairs and several CoTs of each video: a finer
    mean, for which the same noise looks smaller.
    """
    found = {}
    for name, (folder, metric) in ACCURACIES.items():
        curves = [[line[metric] for line in read_metrics(f"{run}/{folder}")][-40:] for run in runs.values()]
        found[name] = {"mean": [float(np.mean(curve)) for curve in curves],
                       "step_to_step": [step_to_step(curve) for curve in curves]}
    return found


def step_to_step(curve: list[float]) -> float:
    """Standard deviation of a step's value around its trend: that of the differences of neighbours, over √2.

    >>> step_to_step([1.0, 2.0, 3.0]), round(step_to_step([0.0, 1.0, 0.0]), 3)   # a trend is no noise
    (0.0, 0.707)
    """
    return float(np.std(np.diff(curve)) / np.sqrt(2))


def masking(runs):
    """3: with and without random CoT masking, for CoTs of their own, absent ones and the other video's."""
    kinds = ("own", "absent", "swapped")
    parts = {f"{kind} CoT: p .5 - p 0": minus(heads(runs, "stage1", kind), heads(runs, "mask_0", kind))
             for kind in kinds}
    curve = {}
    for share, model in ((0, "mask_0"), (0.25, "mask_25"), (0.5, "stage1"), (0.75, "mask_75"), (1, "discriminative")):
        hits = {kind: heads(runs, model, kind) for kind in kinds}
        if hits["own"]:
            curve[str(share)] = {kind: per_seed(values) for kind, values in hits.items()}
    return parts, {"curve": curve}


def calibration_slope(labels: np.ndarray, rewards: np.ndarray) -> float:
    """b of P(A wins) = 1 / (1 + exp(-b (r_A - r_B))), by Newton: 1 is calibrated, below 1 the margins are too large."""
    margins, won, slope = rewards[:, 0] - rewards[:, 1], labels > 0, 0.0
    for _ in range(50):
        said = 1 / (1 + np.exp(-np.clip(slope * margins, -30, 30)))
        step = ((won - said) @ margins) / max(1e-12, (said * (1 - said)) @ margins**2)
        slope += np.clip(step, -1, 1)
    return float(slope)


def reward_drift(runs):
    """4: stage 2 with and without BT on the rollouts (Eq. 10), each thinking for itself."""
    folders = {"0.05": ("stage2", "eval/stage2"), "0": ("study/no_anchor", "study/eval/no_anchor"),
               "0.005": ("study/anchor_paper", "study/eval/anchor_paper")}
    hits, more = {}, {}
    for weight, (folder, evaluation) in folders.items():
        have = {seed: run for seed, run in runs.items() if is_whole(run, evaluation)}
        if not have:
            continue
        hits[weight] = evaluated(have, evaluation)
        lines = [read_metrics(f"{run}/{folder}") for run in have.values()]
        more[weight] = {
            "accuracy": per_seed(hits[weight]),
            "calibration_slope": [float(np.mean([calibration_slope(*pair_scores(run, evaluation, n)) for n in SETS]))
                                  for run in have.values()],
            **{name: [[round(line[name], 4) for line in one] for one in lines]
               for name in ("pair_accuracy", "reward_mean", "reward_std", "quality")},
        }
    return {"BT .05 - BT 0": minus(hits["0.05"], hits["0"])}, {"weights": more}


def data_efficiency(runs):
    """5: stage 1 and the discriminative model on 1/8 to all of the pairs, for equal numbers of steps."""
    curve = {"stage 1": {}, "discriminative": {}}
    for share in SHARES:
        for label, model, kind in (("stage 1", "stage1", "own"), ("discriminative", "discriminative", "absent")):
            hits = heads(runs, model if share == 1 else f"{model}_{share}", kind)
            if hits:
                curve[label][str(share)] = per_seed(hits)
    quarter, whole = heads(runs, "stage1_4", "own"), heads(runs, "discriminative", "absent")
    return {"stage 1 on a quarter - discriminative on all": minus(quarter, whole)}, {"curve": curve}


def error_tolerance(runs):
    """6: k verdicts of the true CoT corrupted: DeScore's head beside the score that the corrupted text states."""
    names = ("in-domain",)
    head = {k: heads(runs, "stage2", f"wrong {k}", names) for k in range(MOST_WRONG + 1)}
    text = {k: {} for k in head}
    for seed, run in runs.items():
        found = load(run, "heads.json")["in-domain"]
        for k in text:
            text[k][seed] = {"in-domain": half_hits(np.array(found["labels"]), np.array(found["stated"])[:, :, k])}
    parts = {f"head - text, {k} wrong": minus(head[k], text[k]) for k in (1, 2, 3)}
    absent = heads(runs, "stage2", "absent", names)
    slope = np.polyfit(list(head), [np.mean(per_seed(h)) for h in head.values()], 1)[0]
    meets = next((k for k in head if np.mean(per_seed(head[k])) <= np.mean(per_seed(absent))), None)
    return parts, {"head": [per_seed(h) for h in head.values()], "text": [per_seed(t) for t in text.values()],
                   "no_think": per_seed(absent), "slope": float(slope), "meets_no_think_at": meets}


def fine_grained(runs):
    """7: pairs that people decided and whose CoTs state the same score: does the head still tell them apart?"""
    parts, more = {}, {}
    for label, digits in (("equal to two digits", 2), ("equal when rounded to 1-5", 0)):
        values = {}
        for seed, run in runs.items():
            values[seed] = {}
            for name in SETS:
                labels, rewards = pair_scores(run, "eval/stage2", name)
                _, stated = pair_scores(run, "eval/stage2", name, "text")
                tied = np.round(stated[:, 0], digits) == np.round(stated[:, 1], digits)
                values[seed][name] = half_hits(labels, rewards)[tied] - 0.5
        parts[f"head - 1/2, stated scores {label}"] = values
        more[label] = {"pairs": {n: [len(sets[n]) for sets in values.values()] for n in SETS}}
    return parts, more


def reads_both(runs):
    """8: accuracy lost on the in-domain set by changed inputs (lab/study/sanity.py), of DeScore."""
    parts = {f"lost by: {change}, {words}": {seed: {"in-domain": lost(run, change, kind)} for seed, run in runs.items()}
             for kind, words in (("anew", "thought anew"), ("kept", "CoT kept")) for change in sanity.CHANGES[1:]}
    return parts, {}


def lost(run: str, change: str, kind: str) -> np.ndarray:
    """(n,) hits as it is minus hits after the change, of the decided pairs of the in-domain set."""
    folder = f"{run}/study/sanity/sanity"
    pairs = sanity.apart(data.read_pairs(f"{run}/data/{CSVS['in-domain']}.csv"))
    labels = np.array([pair.label for pair in pairs])

    def hits(what, path):
        found = {key(*where): record["reward"] for where, record in read_log(path, "rewards").items()}
        items = sanity.changed_items(pairs, what)
        scores = np.array([found[key(item.video, item.prompt)] for item in items]).reshape(-1, 2)
        return half_hits(labels, scores)[labels != 0]

    before = hits(sanity.AS_IT_IS, f"{folder}/as_it_is")
    place = f"{folder}/{change.replace(' ', '_')}"
    if kind == "kept":
        return before - hits(change, f"{place}/kept")
    return before - hits(change, f"{folder}/as_it_is" if change == sanity.SWAPPED else place)


def ladder(runs) -> dict:
    """{rung: {seed: {set: hits}}} of the four rungs, each thinking (or not) for itself; those that are there."""
    folders = {"1 discriminative": "eval/discriminative", "2 + CoT, random masking": "eval/stage1",
               "3 + GRPO": "study/eval/no_anchor", "4 + BT anchor": "eval/stage2"}
    return {rung: evaluated(runs, folder) for rung, folder in folders.items()
            if all(is_whole(run, folder) for run in runs.values())}


# ---------------------------------------------------------------------------------------------------------------
# 3. Files
# ---------------------------------------------------------------------------------------------------------------
def first_rows(path: str, out: str, share: int) -> None:
    """The header and the first 1/share of the rows of a CSV, as they are."""
    head, records = open_table(path)
    rows = [list(row.values()) for _, row in records]
    write_csv(out, head, rows[: len(rows) // share])


def minutes(runs: dict) -> dict[str, dict]:
    """{task: its minutes and commits, one of each per run of it}, in all seeds, as cells.py keeps them."""
    spent = {}
    for run in runs.values():
        for path in sorted(glob.glob(f"{run}/study/**/*.cell.json", recursive=True)):
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
            task = os.path.relpath(path, f"{run}/study").removesuffix(".cell.json").removesuffix(".json")
            one = spent.setdefault(task.replace("/", "_"), {"minutes": [], "commits": []})
            one["minutes"].append(record["core_minutes"])
            one["commits"].append(record["commit"])
    return spent
