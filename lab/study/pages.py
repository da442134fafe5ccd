"""The study's tables: study.json -> RUNS/study.md, and, with --publish, study.json and the marked parts of PAGES.

A page holds no number of its own: what stands between `<!-- FROM STUDY: name -->` and `<!-- END -->` is a table of
TABLES, made from lab/study/study.json (FROM WORLDS: worlds.json); a test makes it anew and compares.
"""

import json
import pathlib
import re

import numpy as np

from lab.study import figures
from lab.study.models import SETS
from lab.study.verdict import NOT_RUN, SEEN, interquartile_mean, interval_of_seeds, summary, verdict
from plumbing.report import table
from plumbing.settings import InputError, write_json

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ("README.md", "lab/study/README.md", "lab/study/ladder.md")
MARK = re.compile(r"(<!-- FROM (STUDY|WORLDS): (\w+) -->\n)(.*?)(<!-- END -->)", flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------
# 1. study.json
# ---------------------------------------------------------------------------------------------------------------
def read(path) -> dict | None:
    """A study.json, or None if there is none yet."""
    path = pathlib.Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rounded(value):
    """Floats with four digits after the point, at any depth: the file stays small, and tables show three."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return round(float(value), 4) if isinstance(value, (float, np.floating)) else value


def accuracies(values: dict) -> dict:
    """{seed: {set: hits}} -> {set: mean, interval, n}, and of all sets together."""
    rows = {name: summary({seed: {name: sets[name]} for seed, sets in values.items()}) for name in SETS}
    return rows | {"all": summary(values)}


# ---------------------------------------------------------------------------------------------------------------
# 2. Tables
# ---------------------------------------------------------------------------------------------------------------
def shown(row: dict, sign: str = "+") -> str:
    """ "+0.213 [+0.150, +0.270]", or how few values there were."""
    if row["mean"] is None:
        return f"{row['n']} values: too few"
    mean, low, high = (f"{row[key]:{sign}.3f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def run_of(claim: dict) -> str:
    """Which run a verdict comes from."""
    if not claim["parts"]:
        return "-"
    seeds = f"seeds {' '.join(map(str, claim['seeds']))}, {claim['commit']}"
    return seeds + (f", TRIAL of {claim['trial']} steps" if claim["trial"] else "")


def verdicts(result: dict) -> str:
    """One row per claim."""
    rows = []
    for claim in result["claims"]:
        found = [name for name in claim["decides"] if name in claim["parts"]]
        here = "; ".join(f"{name}: {shown(claim['parts'][name])}" for name in found)
        rows.append([str(claim["number"]), claim["claim"], claim["paper"], here or "-", claim["verdict"]])
    return table(["", "claim", "the paper", "here: mean [95 %]", "verdict"], rows)


def measured(result: dict) -> list[tuple[list[dict], str, dict]]:
    """(claims, name, row) of each row once: claims that are asked of the same measurement share its rows."""
    rows = {}
    for claim in result["claims"]:
        for name, row in claim["parts"].items():
            rows.setdefault((claim.get("stage"), name, row["n"], row["mean"]), ([], name, row))[0].append(claim)
    return list(rows.values())


def parts(result: dict) -> str:
    """What was measured for a claim, what decides it in bold; not `figures.LAST`, which stands in the JSON alone."""
    rows = []
    for claims, name, row in measured(result):
        if name.endswith(figures.LAST):
            continue
        label = f"**{name}**" if any(name in claim["decides"] for claim in claims) else name
        numbers = ", ".join(str(claim["number"]) for claim in claims)
        said = row["verdict"] if row["seeds"] > 1 else "-"  # one seed knows nothing of another training
        rows.append([numbers, label, shown(row), by_seeds(row), str(row["n"]), said])
    return table(["claim", "measured", "mean [95 %]", "by seeds alone [95 %]", "values", "verdict"], rows)


def by_seeds(row: dict) -> str:
    """The interval that knows nothing but each seed's mean; "not kept" where study.json has no such means."""
    found = interval_of_seeds(row.get("by_seed") or [])
    return f"[{found[0]:+.3f}, {found[1]:+.3f}]" if found else "one seed" if row["seeds"] == 1 else "not kept"


def many(result: dict) -> str:
    """How many intervals were looked at, and what chance alone would do with so many."""
    rows = [(claims[0]["margin"], row) for claims, _, row in measured(result)]
    kept = [(margin, row) for margin, row in rows if interval_of_seeds(row.get("by_seed") or [])]
    alone = [interval_of_seeds(row["by_seed"]) for _, row in kept]
    still = sum(row["verdict"] == SEEN == verdict(row | {"low": low, "high": high}, margin)
                for (margin, row), (low, high) in zip(kept, alone))
    seen = sum(row["verdict"] == SEEN for _, row in kept)
    return (f"{len(rows)} intervals of 95 % were looked at: if nothing here had any effect, some "
            f"{0.025 * len(rows):.1f} of them would lie above 0 by chance, more where seeds differ. By seeds alone, "
            f"{still} of the {seen} rows that are seen and whose seeds were kept are seen.\n")


def ladder(result: dict) -> str:
    """The four rungs: accuracy without ties on the three toy stand-ins, with intervals."""
    rows = [[rung, *(shown(sets[name], "") for name in (*SETS, "all"))] for rung, sets in result["ladder"].items()]
    return table(["rung", *SETS, "all three"], rows)


def paradigms(result: dict) -> str:
    """Claim 1: mean ± standard deviation over seeds, and the interquartile mean over sets and seeds."""
    rows = []
    for name, sets in result["claims"][0]["more"].get("accuracy", {}).items():
        cells = []
        for values in sets.values():
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        rows.append([name, *cells, f"{interquartile_mean(list(sets.values())):.3f}"])
    return table(["model", *SETS, "interquartile mean"], rows)


def gradients(result: dict) -> str:
    """Claim 2: noise / signal and cosine of one draw's gradient, each seed's."""
    rows = []
    for name, found in result["claims"][1]["more"].get("gradients", {}).items():
        noise = ", ".join("no signal found" if n is None else f"{n:.2f}" for n in found["noise_to_signal"])
        rows.append([name, noise, ", ".join(f"{c:.3f}" for c in found["cosine"])])
    return table(["gradient of", "noise / signal, each seed", "mean cosine of two draws, each seed"], rows)


def training(result: dict) -> str:
    """Claim 2, as Fig. 1c draws it: accuracy on a step's own pairs, late in training; means over seeds."""
    found = result["claims"][1]["more"].get("training_accuracy", {})
    rows = [[name, f"{np.mean(row['mean']):.3f}", f"{np.mean(row['step_to_step']):.3f}"] for name, row in found.items()]
    return table(["trained by", "accuracy, last 40 steps", "its spread from step to step"], rows)


def ends(curve: list[float]) -> tuple[float, float]:
    """Means of the first five and of the last ten steps of a training."""
    return float(np.mean(curve[:5])), float(np.mean(curve[-10:]))


def drift(result: dict) -> str:
    """Claim 4: what happens to the rewards during stage 2, by the weight of BT; means over seeds."""
    rows = []
    for weight, found in result["claims"][3]["more"].get("weights", {}).items():
        spread = np.mean([end / start for start, end in map(ends, found["reward_std"])])
        change = {name: np.mean([end - start for start, end in map(ends, found[name])])
                  for name in ("quality", "pair_accuracy", "reward_mean")}
        rows.append([weight, f"{np.mean(found['accuracy']):.3f}", f"{np.mean(found['calibration_slope']):.2f}",
                     *(f"{value:+.3f}" for value in change.values()), f"{spread:.2f}"])
    head = ["BT weight", "accuracy", "calibration slope", "quality, change", "pair accuracy, change",
            "mean reward, change", "spread of the rewards, last / first"]
    return table(head, rows)


def errors(result: dict) -> str:
    """Claim 6: accuracy by the number of corrupted verdicts, means over seeds."""
    more = result["claims"][5]["more"]
    rows = [[label, *(f"{np.mean(seeds):.3f}" for seeds in more[key])]
            for label, key in (("head", "head"), ("score in the text", "text")) if more]
    rows += [["head, no CoT", f"{np.mean(more['no_think']):.3f}", *["-"] * 5]] if more else []
    return table(["corrupted verdicts", *map(str, range(6))], rows)


def runs(result: dict) -> str:
    """Where each verdict comes from: seeds and commit."""
    rows = [[str(claim["number"]), run_of(claim)] for claim in result["claims"]]
    if result["ladder"]:
        rows.append(["ladder", run_of(result["ladder_run"] | {"parts": True, "trial": None})])
    return table(["claim", "seeds and commit"], rows)


def minutes(result: dict) -> str:
    """What each task took, and which code ran."""
    rows = [[task, f"{np.mean(one['minutes']):.1f}", str(len(one["minutes"])), ", ".join(sorted(set(one["commits"])))]
            for task, one in result["minutes"].items()]
    total = sum(sum(one["minutes"]) for one in result["minutes"].values())
    return table(["task", "minutes, mean", "runs", "commit"], [*rows, ["all", f"{total:.0f} in sum", "", ""]])


def rules(result: dict) -> str:
    """The second world's claims: rule, and of how many seeds the verdict is."""
    rows = [[str(c["number"]), c["claim"], c["rule"], f"{c['seeds']} of {c['planned']}", c["verdict"]]
            for c in sorted(result["claims"], key=lambda claim: claim["number"])]
    return table(["", "claim", "rule", "seeds", "verdict"], rows)


def worth(result: dict) -> str:
    """Claims 10 and 11: each model's accuracy in each world, mean over seeds."""
    found = next(claim for claim in result["claims"] if claim["number"] == 10)["more"].get("accuracy", {})
    names = ("DeScore", "DeScore's own text", "coupled generative", "discriminative")
    rows = [[name, *(f"{np.mean(accuracies[name]):.3f}" for accuracies in found.values())] for name in names if found]
    return table(["model", *found], rows)


def cells(result: dict) -> str:
    """What ran for each claim, at what cost, and which code: claims of one run or stage share a row."""
    runs = {}
    for claim in sorted(result["claims"], key=lambda claim: claim["number"]):
        runs.setdefault(json.dumps(claim["cells"]), []).append(str(claim["number"]))
    rows = [[", ".join(numbers), f"{one['done']} of {one['planned']}", f"{one['core_hours']:.1f}",
             ", ".join(one["commits"]) or "-"] for one, numbers in ((json.loads(k), v) for k, v in runs.items())]
    return table(["claims", "cells", "core-hours", "commits"], rows)


TABLES = {"verdicts": verdicts, "parts": parts, "many": many, "ladder": ladder, "paradigms": paradigms,
          "gradients": gradients, "training": training, "drift": drift, "errors": errors, "runs": runs,
          "minutes": minutes}
OF_WORLDS = {"rules": rules, "cells": cells, "worth": worth}


# ---------------------------------------------------------------------------------------------------------------
# 3. Files
# ---------------------------------------------------------------------------------------------------------------
def filled(page: str, result: dict, source="STUDY") -> str:
    """A page with its marked parts from one of the two sources made anew."""
    return MARK.sub(lambda m: f"{m[1]}{(TABLES | OF_WORLDS)[m[3]](result)}{m[5]}" if m[2] == source else m[0], page)


def write(folder: str, result: dict) -> None:
    """FOLDER/study.md and the figures; prints the verdicts."""
    folder = pathlib.Path(folder)
    names = figures.draw_all(folder, result)
    text = "\n".join(["# The study\n", *(f"## {name}\n\n{make(result)}" for name, make in TABLES.items())])
    (folder / "study.md").write_text(text, encoding="utf-8")
    print(f"\n{verdicts(result)}\n{folder}/study.md, study.json, {', '.join(names)}")


def kept(claim: dict, known: dict | None) -> dict:
    """A claim as it is published: with all its seeds, else as an earlier run of the same rule left it, else empty."""
    if claim["verdict"] != NOT_RUN:
        return claim
    same = known and all(known[key] == claim[key] for key in ("rule", "decides", "margin", "stage"))
    return known if same else claim | {"parts": {}, "more": {}}


def publish(folder: str) -> None:
    """lab/study/study.json, PAGES and the figures from FOLDER/study.json; from FOLDER/worlds.json what is the second
    world's. Whichever is there. InputError: neither is, or it holds trials."""
    found = {name: result for name in ("study", "worlds") if (result := read(f"{folder}/{name}.json"))}
    if not found:
        raise InputError(f"{folder}: holds no study.json or worlds.json; run `make study` first.")
    for name, result in found.items():
        if result.get("trial") or any(claim.get("trial") for claim in result["claims"]):
            raise InputError(f"{folder}/{name}.json: holds trials (--steps); only whole runs are published.")
        if name == "worlds":  # a claim some of whose seeds or cells are missing: in FOLDER's own report alone
            known = {c["number"]: c for c in (read(ROOT / "lab/study/worlds.json") or {"claims": []})["claims"]}
            result["claims"] = [kept(claim, known.get(claim["number"])) for claim in result["claims"]]
        write_json(str(ROOT / f"lab/study/{name}.json"), result)
        for page in PAGES:
            text = (ROOT / page).read_text(encoding="utf-8")
            (ROOT / page).write_text(filled(text, result, name.upper()), encoding="utf-8")
    if "study" in found:
        figures.draw_together(ROOT / "lab/study/study.png", found["study"])
        figures.draw_together(ROOT / "lab/study/ladder.png", found["study"], ("the ladder", "4 reward drift"))
    if "worlds" in found:
        figures.draw_worlds(ROOT / "lab/study/worlds.png", found["worlds"])
    print(f"wrote {', '.join(f'lab/study/{name}.json' for name in found)}, {', '.join(PAGES)} and the figures")
