"""What the cells of the second world compute, and what is read from them when they are done (worlds.py runs them).

    python -m lab.study.second base SENTENCES SEED ... --out DIR    toy's base, with prose around the verdicts
    python -m lab.study.second unpack RUN --out RUN/at              each checkpoint of a training as a DeScore folder
    python -m lab.study.second score RUN MODELS --out FILE          hits of models on the base's CoTs
    python -m lab.study.second rows CSV SHARE --out CSV             the first 1/SHARE of the pairs
    python -m lab.study.second flops STEPS MODULE ... --out FILE    what a step of a script costs, as PyTorch counts it

Values are {seed: {test set: (n,) array}}, for verdict.py, as those of measures.py are.
"""

import glob
import importlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import torch

import cold_start
import data
import grpo
import layout
import parallel
import toy.__main__
from lab.study import coupled, measures, models
from lab.study.figures import LAST
from lab.study.models import CSVS, SETS
from lab.study.sanity import half_hits
from model import DeScore
from plumbing import checkpoint, training
from plumbing.jobs import content_of, read_log
from plumbing.logs import read_metrics
from plumbing.settings import InputError, cli, write_json
from rules import overall_score
from toy.world import cot_text


# ---- 1. Cells --------------------------------------------------------------------------------------------------
START = ("I watch it again", "Let me go on", "Once more from the start", "I take my time", "Now the next point")
MIDDLE = ("slowly", "with care", "frame by frame", "from one end to the other", "without haste")
END = ("before I say more", "so that nothing is missed", "and weigh what I saw", "as I did before", "and go on")


def prose(sentences: int, seed: int):
    """`cot_text` with so many sentences before each verdict that say nothing, drawn at random: 7 bits in each."""
    rng = np.random.default_rng([seed, sentences])

    def write(wish, seen, verdict=None) -> str:
        lines = []
        for line in cot_text(wish, seen, verdict).split("\n"):
            words = [[part[rng.integers(5)] for part in (START, MIDDLE, END)] for _ in range(sentences)]
            lines += [f"{a} {b}, {c}." for a, b, c in words] * ("; verdict " in line) + [line]
        return "\n".join(lines)

    return write


def unpack(run: str, out: str) -> None:
    """RUN/checkpoints/step-N -> OUT/N, of stage 1 or of the coupled model."""
    first = "mask_probability" in load(run, "settings.json")
    s = models.settings_of(run, cold_start.Settings if first else coupled.Settings)
    ranks = parallel.start(s.seed)
    if first:
        model = checkpoint.open_on_rank(DeScore, s.model, torch.float32, ranks, new_head=True)
        model.settings.update(fps=s.fps, max_pixels=s.max_pixels)
        model.make_trainable(s.train, s.train_vision, s.lora_r, s.lora_alpha, s.lora_dropout, lm_head=False)
    else:
        model = grpo.open_policy(s, ranks, new_head=True)
        model.settings["score"] = "text"
    optimizer = parallel.make_optimizer(model, s)
    for path in sorted(glob.glob(f"{run}/checkpoints/step-*")):
        with tempfile.TemporaryDirectory() as alone:  # the loader takes the newest: here it is the only one
            os.mkdir(f"{alone}/checkpoints")
            os.symlink(os.path.abspath(path), f"{alone}/checkpoints/{os.path.basename(path)}")
            step = training.load_checkpoint(alone, model, optimizer, ranks)["step"]
        model.save_pretrained(f"{out}/{step}")
    files = sorted(glob.glob(f"{out}/*/**/*.safetensors", recursive=True))
    write_json(f"{out}/done", {os.path.relpath(file, out): content_of(file) for file in files})


def early(out: str) -> tuple[int, int]:
    """(the step with the best validation accuracy, the first of several; the last step): no test set is looked at."""
    seen = {line["step"]: line["val_accuracy"] for line in read_metrics(out) if "val_accuracy" in line}
    return max(seen, key=lambda step: (seen[step], -step)), max(seen)


def score(run: str, out: str, folders: list[str]) -> None:
    """OUT: {set: {model: {kind: hits}}} on the decided pairs of RUN's test sets, for the base's CoTs.

    LABEL=TRAINING/at: its `early` checkpoint and its last; without LABEL all of them, by their steps. Kinds: own,
    absent, swapped; "black clip", the own CoT kept; in-domain the true CoT with k wrong verdicts. "text": the CoT's.
    """
    paths, result = {}, {}
    for label, _, at in (folder.partition("=") for folder in folders):
        steps = {f"{label} {w}": step for w, step in zip(("early", "last"), early(os.path.dirname(at)))} if label else {
            name: name for name in sorted(os.listdir(at)) if name.isdigit()}
        paths |= {name: f"{at}/{step}" for name, step in steps.items()}
    opened = {label: DeScore.from_pretrained(path) for label, path in paths.items()}
    for name in SETS:
        pairs = [p for p in data.read_pairs(f"{run}/study/cots/{CSVS[name]}.csv") if p.label != 0]
        texts = models.corrupted_texts(f"{run}/data/{CSVS[name]}.truth.jsonl", 0) if name == SETS[0] else None
        found = models.score_set(opened, pairs, texts, asked=opened)
        black = models.score_set(opened, pairs, None, change="black clip")
        told = [[p.cots, *(texts[p.line] if texts else ())] for p in pairs]  # n of [own, wrong 0 ... 5][A, B]
        stated = np.array([[[overall_score(t) for t in both] for both in row] for row in told])  # (n, kinds, 2)
        rows = {"text": dict(zip(["own", *found["kinds"][3:]], stated.transpose(1, 0, 2)))}
        for label in opened:
            rows[label] = dict(zip(found["kinds"], np.array(found["rewards"][label]).transpose(2, 0, 1)))
            rows[label]["black clip"] = np.array(black["rewards"][label])[:, :, 0]
        labels = np.array([p.label for p in pairs])
        result[name] = {label: {kind: half_hits(labels, rewards).tolist() for kind, rewards in row.items()}
                        for label, row in rows.items()}
    write_json(out, result)


def flops(out: str, steps: int, command: list[str]) -> None:
    """Runs a script and counts the products with its weights, 2 for a multiply-add; attention's own are not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    # The counter sees each operation below autograd, where torch's CausalBias cannot be made: the mask it stands for.
    layout.causal_lower_right = lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(m - n)
    shutil.rmtree(f"{out}.run.thoughts", ignore_errors=True)  # of a killed one: it would go on, and be cheap
    with FlopCounterMode(display=False) as counter:
        importlib.import_module(command[0]).main([*command[1:], "--out", f"{out}.run"])
    kinds = {str(kind).rpartition(".")[2]: count for kind, count in counter.get_flop_counts()["Global"].items()}
    own = sum(kinds.get(kind, 0) for kind in ("mm", "addmm", "convolution", "convolution_backward"))
    write_json(out, {"each step": own / steps, "all that was counted": kinds})


# ---- 2. What is read from them ---------------------------------------------------------------------------------
JUDGED = ("study/eval/coupled", "eval/stage2", "eval/discriminative")
UNITS = ("pairs", "sampled tokens", "FLOPs", "core seconds")


def load(*path) -> dict:
    """A JSON file."""
    return json.loads(pathlib.Path(*path).read_text(encoding="utf-8"))


STALE = set()  # paths of cells whose record is another command's, or of other files; worlds.report fills it


def ready(runs: dict, world: str, *cells: str) -> dict:
    """{seed: that world's folder} of the seeds whose cells are done."""
    def is_ready(path):
        return os.path.isfile(f"{path}.cell.json") and os.path.normpath(path) not in STALE

    return {seed: f"{run}/{world}" for seed, run in runs.items()
            if all(is_ready(f"{run}/{world}/{cell}") for cell in cells)}


def mean(sets: dict) -> float:
    """{set: hits} -> the mean over pairs, then sets."""
    return measures.per_seed({0: sets})[0]


def four(runs: dict, worlds: tuple[str, ...]):
    """10, 11: DeScore beside its own text, the coupled and the discriminative model, in each world."""
    parts, more = {}, {}
    for world in worlds:
        if here := ready(runs, world, *JUDGED):
            found, accuracy = measures.paradigms(here)
            parts |= {f"{world}: {name}": row for name, row in found.items() if "equal scores" not in name}
            more[world] = {name: np.mean(list(sets.values()), axis=0).tolist()
                           for name, sets in accuracy["accuracy"].items()}
    return parts, {"accuracy": more}


def costs(run: str, each: dict) -> dict:
    """{"BT" or "coupled": {step: what was spent until then, one number for each of UNITS}}.

    BT first pays for the base's CoTs. each: FLOPs of a step.
    """
    core = lambda name: load(run, f"{name}.cell.json")["core_minutes"] * 60  # noqa: E731
    log = read_log(f"{run}/data/train_cots.csv.thoughts", "thoughts")
    tokens = sum(sum(record["tokens"]) for record in log.values())
    begin, result = np.array([0, tokens, each["train_cots"], core("data/train_cots.csv")]), {}
    for trainer, name, start in (("BT", "stage1", begin), ("coupled", "study/coupled", 0 * begin)):
        lines, s = read_metrics(f"{run}/{name}"), load(run, name, "settings.json")
        cots = 2 * s["batch_pairs"] * s.get("rollouts", 0)
        steps = [[s["batch_pairs"], cots * line.get("cot_tokens", 0), each[os.path.basename(name)],
                  core(name) / len(lines)] for line in lines]
        result[trainer] = dict(enumerate(np.cumsum([start, *steps], axis=0).tolist()))
    return result


def curves(run: str) -> dict:
    """{"BT" or "coupled": {step: {set: hits}}} of the checkpoints; step 0: a coin, and the base's own text."""
    found = load(run, "study/curve.json")
    label = {int(name): name for name in found[SETS[0]] if name.isdigit()}
    bt = {step: {name: np.array(found[name][label[step]]["own"]) for name in SETS} for step in sorted(label)}
    own = {0: {name: np.array(found[name]["text"]["own"]) for name in SETS}}
    last = len(read_metrics(f"{run}/study/coupled"))
    for path in glob.glob(f"{run}/study/eval/coupled*.cell.json"):
        folder = os.path.basename(path).removesuffix(".cell.json")
        step = int(folder.partition("_at_")[2] or last)
        own[step] = measures.evaluated({0: run}, f"study/eval/{folder}", "text")[0]
    coin = {0: {name: np.full(len(values), 0.5) for name, values in own[0].items()}}
    return {"BT": coin | bt, "coupled": dict(sorted(own.items()))}


def efficiency(runs: dict, world: str):
    """9, 17: what equal budgets buy, and what it costs one to reach the other's last accuracy (None: not reached).

    A budget may end between two checkpoints of the coupled model. The rule takes the one before, which may be the base;
    with the one after, "rounded up", the coupled model has spent more than BT. The truth lies between the two.
    """
    ways = ("", ", coupled rounded up")
    parts = {f"BT - coupled, equal {unit}{way}": {} for unit in UNITS for way in ways}
    more = {"curves": {}, "reaches": {}, "bought": {}}
    names = ("train_cots", "stage1", "coupled")
    counted = ready(runs, world, *(f"study/flops_{name}.json" for name in names))
    for seed, run in ready(runs, world, "study/curve.json", "study/eval/coupled").items() if counted else ():
        each = {n: load(next(iter(counted.values())), f"study/flops_{n}.json")["each step"] for n in names}
        curve, spent = curves(run), costs(run, each)
        for k, unit in enumerate(UNITS):
            paid = {who: {step: spent[who][step][k] for step in steps} for who, steps in curve.items()}
            budget = min(max(cost.values()) for cost in paid.values())
            bought = {who: max((step for step in cost if cost[step] <= budget), default=0)
                      for who, cost in paid.items()}
            after = min(step for step, cost in paid["coupled"].items() if cost >= budget)
            more["bought"].setdefault(unit, []).append([*bought.values(), after])  # steps: BT's, coupled's
            for way, step in zip(ways, (bought["coupled"], after)):
                minus = {n: curve["BT"][bought["BT"]][n] - curve["coupled"][step][n] for n in SETS}
                parts[f"BT - coupled, equal {unit}{way}"][seed] = minus
            for who, other in (("BT", "coupled"), ("coupled", "BT")):
                goal = mean(curve[other][max(curve[other])])
                enough = [paid[who][step] for step, sets in curve[who].items() if mean(sets) >= goal]
                more["reaches"].setdefault(f"{who}: {unit}", []).append(min(enough, default=None))
                more["curves"].setdefault(f"{who}: {unit}", []).append(
                    [[paid[who][step], mean(sets)] for step, sets in curve[who].items()])
    for unit, steps in more["bought"].items():
        if all(before == after for _, before, after in steps):  # the budget ends at a checkpoint: one row, not two
            del parts[f"BT - coupled, equal {unit}{ways[1]}"]
    return {name: row for name, row in parts.items() if row}, more


def beyond(own: dict, swapped: dict) -> dict:
    """Hits with the own CoTs and with the pair's two swapped, minus 1: 0 for who reads the text alone, and turns."""
    return {seed: {name: hits + swapped[seed][name] - 1 for name, hits in sets.items()} for seed, sets in own.items()}


def looking(runs: dict, pairs: tuple[int, ...], masks: tuple[float, ...]):
    """12 to 15: p x pairs, stopped early and not: what a black clip costs under a kept CoT; claims 3 and 6 again."""
    parts, more, stops = {}, {}, {}

    def hits(p, n, who, kind, names=SETS):
        cell = f"look_mask{100 * p:.0f}_{n}.json"
        return {seed: {name: np.array(found[name][who][kind]) for name in names}
                for seed, found in ((s, load(run, cell)) for s, run in ready(runs, "looking", cell).items())}

    for n, p, when in itertools.product(pairs, masks, ("early", "last")):
        who, row = f"model {when}", f"p {p}, {n} pairs" + LAST * (when == "last")
        kinds = {kind: hits(p, n, who, kind) for kind in ("own", "absent", "swapped", "black clip")}
        if kinds["own"]:
            more[row] = {kind: measures.per_seed(values) for kind, values in kinds.items()}
        if when == "early":
            stops[row] = [early(f"{runs[seed]}/looking/mask{100 * p:.0f}_{n}")[0] for seed in kinds["own"]]
        if p < 1:
            right, wrong = (measures.minus(*(hits(p, n, label, f"wrong {k}", SETS[:1]) for label in (who, "text")))
                            for k in (0, 2))
            parts[f"black clip costs: {row}"] = measures.minus(kinds["own"], kinds["black clip"])
            parts[f"own CoT + swapped CoT - 1: {row}"] = beyond(kinds["own"], kinds["swapped"])
            parts[f"head - text, 2 wrong: {row}"] = wrong
            parts[f"the same, minus head - text, 0 wrong: {row}"] = measures.minus(wrong, right)
            text = hits(p, n, "text", "own")
            parts[f"with CoT - the stated score: {row}"] = measures.minus(kinds["own"], text)
            parts[f"with CoT - never a CoT: {row}"] = measures.minus(kinds["own"], hits(1, n, who, "absent"))
        if p:
            parts[f"absent CoT, - p 0: {row}"] = measures.minus(kinds["absent"], hits(0, n, who, "absent"))
    return {name: row for name, row in parts.items() if row}, {
        "accuracy": more, "stopped at": {row: steps for row, steps in stops.items() if steps}}


def lengths(runs: dict, worlds: dict[int, str]):
    """16: cosines of two draws' gradients (claim 2), CoTs as short as today's minus longer ones; claim 2 at each."""
    names, found, bases = ("GRPO, preference", "GRPO, rules", "BT"), {}, {}
    for tokens, world in worlds.items():
        here = ready(runs, world, "study/gradients.json")
        texts = [load(run, f"../base{f'_{world}' * (world != 'today')}", "measured.json") for run in here.values()]
        bases[str(tokens)] = {n: [text[n] for text in texts] for n in ("greedy accuracy", "sampled valid format")}
        found[tokens] = {n: {seed: {"draws": measures.of_draws(load(run, "study/gradients.json")[n]["cosine"])}
                             for seed, run in here.items()} for n in names}
    short, *longer = worlds
    parts = {f"cosine of {n}: {short} - {tokens} tokens": measures.minus(found[short][n], found[tokens][n])
             for tokens in longer for n in names}
    parts |= {f"cosine: BT - {n}, {tokens} tokens": measures.minus(found[tokens]["BT"], found[tokens][n])
              for tokens in worlds for n in names[:2]}
    more = {n: {str(tokens): measures.per_seed(rows[n]) for tokens, rows in found.items()} for n in names}
    return {name: row for name, row in parts.items() if row}, {"cosine": more, "base": bases}


def main(argv=None) -> None:
    """One cell's computation; --out comes last. InputError: a base with prose that has not learned to judge."""
    what, *rest, _, out = argv or sys.argv[1:]
    if what == "base":
        count, seed = map(int, rest[:2])
        toy.__main__.main(["base", *rest[2:], "--out", out], prose(count, seed), 80 + 230 * count)
        found = load(out, "measured.json")
        if found["greedy accuracy"] < found["2 or N/A"] + 0.1 and "--pool" not in rest:  # which a trial has
            raise InputError(f"{out}: its verdicts are right in {found['greedy accuracy']:.2f}, those of who never "
                             f"watches in {found['2 or N/A']:.2f}: no claim can be asked of it; train it longer.")
    elif what == "rows":
        measures.first_rows(rest[0], out, int(rest[1]))
    elif what == "flops":
        flops(out, int(rest[0]), rest[1:])
    else:
        {"unpack": unpack, "score": score}[what](rest[0], out, *([rest[1:]] if what == "score" else []))


if __name__ == "__main__":
    cli(main)
