"""The study's second world: people mind more than the text says. What is a head worth, when does it look at the video?

    python -m lab.study.worlds --runs runs/worlds --jobs 2      everything, the most important first; hours
    python -m lab.study.worlds --runs runs/worlds --only grid cost        --report: judges what is there, runs nothing
    python -m lab.study.worlds --runs runs/trial --steps 2      the whole command in minutes; its numbers mean nothing

Rules and commit are printed, and stored in RUNS/rules.json, before anything runs. A cell (cells.py) is
one command on one core, taken from scripts/demo.sh with a few flags set anew. Out: RUNS/worlds.json, .md, .png. What
cells compute: second.py. Nothing is tuned on a test set.
"""

import argparse
import functools
import os
import pathlib
import re
import shlex

from lab.study import __main__ as study
from lab.study import figures, pages, second
from lab.study.cells import Cell, is_done, read, run_all
from lab.study.models import CSVS, SETS
from plumbing.settings import InputError, cli, write_json
from toy.world import SPLITS

WEIGHTS, UNSPOKEN = ("--weights", "3", "2", ".5", "1", ".5"), ("--unspoken", "6")
WORLDS = {"today": (), "weights": WEIGHTS, "unspoken": UNSPOKEN, "both": WEIGHTS + UNSPOKEN}
LONG = {55: "today", 250: "long1", 440: "long2"}  # tokens of a CoT: no prose, one or two sentences before each verdict
PAIRS, MASKS = {360: 8, 1440: 2, 2880: 1}, (0, 0.5, 1, 0.25, 0.75)  # {pairs: 1/share}; the last two p on all pairs only
SEEDS = {"grid": (0, 1, 2), "cost": (0, 1, 2), "looking": (0, 1, 2), "long": (0, 1, 2), "seeds": (0, 1, 2, 3, 4, 5)}
# {stage: [(a part of it, its seeds), ...]}. What decides the claims first, in all seeds: a run that is cut short has
# fewer rows then, not fewer verdicts. looking: pairs and masks; long: a world.
LOOKS = (2880, MASKS[:3]), (360, MASKS[1:2]), (360, MASKS[:3:2]), (1440, MASKS[:3])
PARTS = {"looking": [(look, SEEDS["looking"]) for look in LOOKS] + [((2880, MASKS[3:]), (0,))]}
PARTS["long"] = [(name, SEEDS["long"]) for name in ("long2", "long1")]


# ---- 1. Rules, fixed before the run --------------------------------------------------------------------------
def claims() -> dict[str, list[study.Claim]]:
    """{stage: its claims}; the stages in their order."""
    def claim(number, what, rule, decides, measure, margin=study.MARGIN, paper="no number known"):
        return study.Claim(number, what, paper, rule, tuple(decides), (), measure, margin)

    def again(number, old):  # a claim of the first study with more seeds
        c = study.CLAIMS[old - 1]
        def measure(runs):
            here = second.ready(runs, "today", *second.JUDGED, "study/heads.json")
            return c.measure(here) if here else ({}, {})
        return claim(number, f"Claim {old}, six seeds: {c.claim}", c.rule, c.decides, measure, paper=c.paper)

    grid = functools.partial(second.four, worlds=tuple(WORLDS))
    look = functools.partial(second.looking, pairs=tuple(PAIRS), masks=MASKS)
    equal = [f"BT - coupled, equal {unit}" for unit in second.UNITS[1:]]
    budget = ("{}: hits of the last checkpoint that a budget pays for, BT's head behind the base's CoTs minus the "
              "coupled model's stated score (before its first checkpoint: the base's); the budget is what the cheaper "
              "of the two whole runs cost; equal sampled tokens, FLOPs and core seconds: all above 0")
    both = "DeScore's hits minus those of {}, with --weights and with --unspoken: both above 0"
    parts, same = ("weights: DeScore - {}", "unspoken: DeScore - {}"), "the same model, "
    return {
        "grid": [
            claim(10, "Where people mind more than the text says, a head beats the score in the text",
                  both.format("its own text"), [p.format("DeScore's own text") for p in parts], grid),
            claim(11, "There it beats a coupled model, too", both.format("the coupled model"),
                  [p.format("coupled generative") for p in parts], grid)],
        "cost": [claim(9, "BT behind CoTs is the cheaper training", budget.format("today's world"), equal,
                       functools.partial(second.efficiency, world="today"), paper="'efficiency'; no number known")],
        "looking": [
            claim(12, "Masked in half, with enough pairs, a head behind a CoT looks at the video",
                  "unspoken, p .5, 2880 pairs, stopped early: hits minus those of a black clip, CoT kept: above 0",
                  ["black clip costs: p 0.5, 2880 pairs"], look),
            claim(13, "Then masking shows (claim 3)", same + "hits without a CoT minus those of p = 0: above 0",
                  ["absent CoT, - p 0: p 0.5, 2880 pairs"], look),
            claim(14, "Then errors in the CoT are forgiven (claim 6)",
                  same + "the true CoT with two wrong verdicts: the head's hits minus the stated score's: above 0",
                  ["head - text, 2 wrong: p 0.5, 2880 pairs"], look),
            claim(15, "Then it uses both", same + "hits minus those of the model that never had a CoT: above 0",
                  ["with CoT - never a CoT: p 0.5, 2880 pairs"], look)],
        "long": [
            claim(16, "Length makes the policy gradient noisy",
                  "mean cosine of two draws' gradients, GRPO by preference: 55 tokens minus 440: above 0",
                  ["cosine of GRPO, preference: 55 - 440 tokens"], functools.partial(
                      second.lengths, worlds=LONG), 0.0),
            claim(17, "Claim 9 with CoTs of 250 tokens", budget.format("prose around the verdicts"), equal,
                  functools.partial(second.efficiency, world="long1"))],
        "seeds": [again(18, 1), again(19, 3), again(20, 7)],
    }


# ---- 2. Cells ------------------------------------------------------------------------------------------------
def demo(run: str, seed: int) -> dict[str, list[str]]:
    """{what it makes: command} of scripts/demo.sh, for another folder and seed."""
    text = (pages.ROOT / "scripts/demo.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:python|torchrun --\w+ \d+) (.*?)(?: > \S+ 2>&1)?(?: &)?$", text, flags=re.MULTILINE)
    commands = [[word.replace("$RUNS", run).replace("$SEED", str(seed)) for word in shlex.split(x)] for x in lines]
    return {os.path.relpath(words[words.index("--out") + 1], run): words for words in commands}


DONE = dict.fromkeys(("cold_start.py", "grpo.py", "lab.study.coupled"), "model/model.safetensors")
DONE |= {"data": "world.json", "base": "measured.json", "unpack": "done"}
TOOL = ("-m", "lab.study.second")
SMALL = tuple(f"--{s.replace('_', '-')}={100 if 'train_cold' in s else 30}" for s in SPLITS)  # pairs of a trial


class World:
    """The cells of one world and seed, added to `cells`, {path: Cell}, in the order in which they are to begin."""

    def __init__(self, cells: dict, runs: str, seed: int, name: str, flags=(), sentences=0, steps=None):
        self.cells, self.run, self.steps, self.long = cells, f"{runs}/seed{seed}/{name}", steps, 1 + 4 * sentences
        self.tokens = {"max_new_tokens": 80 + 230 * sentences} if sentences else {}
        self.demo, flicker = demo(self.run, seed), ("--unspoken",) * ("--unspoken" in flags)
        self.base = "../base" + "_unspoken" * bool(flicker) + f"_long{sentences}" * bool(sentences)
        # 560 and 1000 steps, not 340: the first .6 of them have no prose (toy.base_model.pretrain_language).
        longer = [*TOOL, "base", str(sentences), str(seed), "--steps", str(120 + 440 * sentences)]
        words = [*longer, *self.demo["base"][3:]] if sentences else self.demo["base"]
        tiny = ("--vision-steps", "2", "--steps", "2", "--pool", "64") * bool(steps)
        self.add(self.base, [*words, *flicker, *tiny], minutes=4.2 * (1 + sentences))
        self.add("data", [*self.demo["data"], *flags, *SMALL * bool(steps)], minutes=2.0)
        pairs, cots = ([f"data/{split}_{what}" for split in ("train", "val")] for what in ("cold_start", "cots"))
        self.think("data/train_cots.csv", pairs, cots)

    def at(self, name: str) -> str:
        """A path of this world's folder."""
        return os.path.normpath(f"{self.run}/{name}")

    def add(self, name, command, *needs, minutes=1.0, done=None, **changes) -> None:
        """`command` with these flags set anew. needs: names, or paths of another world's cells."""
        changes |= self.tokens if "--max-new-tokens" in command else {}
        changes |= {"max_steps": self.steps} if self.steps and "--lr" in command else {}
        words = [self.at(self.base) if word == f"{self.run}/base" else word for word in command]
        words += study.flags(changes | {"out": changes.get("out", self.at(name))})
        if not done:  # a file is its own last one
            kind = [word for word in (*command[2:3], *command[:2]) if word in DONE]
            done = name if "." in os.path.basename(name) else f"{name}/{DONE[kind[0]]}"
        needs = tuple(need if need in self.cells else self.at(need) for need in needs)
        self.cells[self.at(name)] = Cell(self.at(name), words, self.at(done), needs, minutes)

    def think(self, name, csvs: list[str], outs: list[str]) -> None:
        """The base's CoTs of some CSVs."""
        of, out = ([self.at(f"{csv}.csv") for csv in some] for some in (csvs, outs))
        self.add(name, self.demo["data/train_cots.csv"], "data", self.base, data=of, out=out, done=f"{outs[-1]}.csv",
                 minutes=0.7 * self.long)

    def test_cots(self) -> None:
        """The base's CoTs of the three test sets."""
        pairs, cots = ([f"{folder}/{csv}" for csv in CSVS.values()] for folder in ("data", "study/cots"))
        self.think("study/cots", pairs, cots)

    def judge(self, name, model, need, *score_from) -> None:
        """An evaluation on the three test sets: by the head without a CoT, or with one, by what `score_from` says."""
        like, more = ("eval/stage2", {"score_from": list(score_from)}) if score_from else ("eval/discriminative", {})
        done = f"{name}/{SETS[-1]}/{'text/' * ('text' in score_from)}report.json"
        minutes = 2.2 if "head" in score_from else 1.0
        self.add(name, self.demo[like], need, minutes=minutes * self.long, done=done, model=self.at(model), **more)

    def train(self, name, like, *needs, minutes=1.6, **changes) -> None:
        """A training of the demo with other settings."""
        self.add(name, self.demo[like], *needs, minutes=minutes * self.long, **changes)

    def coupled(self) -> None:
        """60 steps of the coupled model from the base, about what both of DeScore's stages cost, and its score."""
        words, changes = ["-m", "lab.study.coupled", *self.demo["stage2"][1:]], {"model": self.at(self.base)}
        changes |= {"bt_coef": 0.0, "max_steps": 60, "save_every": 1 if self.steps else 10, "keep": 99}
        self.add("study/coupled", words, "data", self.base, minutes=2.9 * self.long, **changes)
        self.judge("study/eval/coupled", "study/coupled/model", "study/coupled", "text")

    def paradigms(self) -> None:
        """DeScore, the coupled and the discriminative model, each judged."""
        self.train("stage1", "stage1", "data/train_cots.csv", save_every=14, keep=99)
        self.coupled()
        self.train("discriminative", "discriminative", "data/train_cots.csv")
        self.train("stage2", "stage2", "stage1", minutes=2.1)
        self.judge("eval/stage2", "stage2/model", "stage2", "head", "text")
        self.judge("eval/discriminative", "discriminative/model", "discriminative")

    def unpack(self, name) -> None:
        """A training's checkpoints as folders that an evaluation can open."""
        self.add(f"{name}/at", [*TOOL, "unpack", self.at(name)], name, minutes=0.3)

    def cost(self) -> None:
        """Claim 9: the checkpoints of both trainings, judged; and FLOPs, which hardly depend on the seed: seed 0's."""
        self.test_cots()
        self.unpack("stage1")
        self.unpack("study/coupled")
        steps = (1,) if self.steps else (10, 20, 30, 40, 50) if self.long == 1 else (10, 20, 40)
        for step in steps:
            self.judge(f"study/eval/coupled_at_{step}", f"study/coupled/at/{step}", "study/coupled/at", "text")
        both = *(f"study/eval/coupled_at_{step}" for step in steps), "stage1/at"  # done, it stands for both curves
        self.add("study/curve.json", [*TOOL, "score", self.run, f"={self.at('stage1/at')}"], *both, "study/cots",
                 minutes=2 * self.long)
        counted = {"data/train_cots.csv": {"data": [self.at("data/train_cold_start.csv")]},
                   "stage1": {"max_steps": 3, "save_every": 0}, "study/coupled": {"max_steps": 2, "save_every": 0}}
        for name, less in counted.items() if "/seed0/" in self.run else ():
            words = [word.removesuffix(".py") for word in self.cells[self.at(name)].command if word != "-m"]
            if "--val" in words:  # a validation is no part of a step
                del words[words.index("--val") : words.index("--val") + 2]
            words = [*TOOL, "flops", str(less.get("max_steps", 1)), *words]
            self.add(f"study/flops_{pathlib.Path(name).stem}.json", words, "data/train_cots.csv", minutes=3, **less)

    def gradients(self) -> None:
        """Both losses' gradients at stage 1's model, of several draws of CoTs (claim 16)."""
        draws = ["--draws", "2"] * bool(self.steps)
        self.add("study/gradients.json", ["-m", "lab.study.models", "gradients", "--run", self.run, *draws], "stage1",
                 "stage2", out=None, minutes=self.long)

    def look(self, tests: "World", pairs: int, some: tuple) -> None:
        """p x pairs for equal steps, with a checkpoint and a validation every 120; judged on the CoTs of `tests`."""
        every = 1 if self.steps else 120
        csv, cots = f"data/train_{pairs}.csv", "data/train_cots.csv"
        self.add(csv, [*TOOL, "rows", self.at(cots), str(PAIRS[pairs])], cots, minutes=0.1)
        for p in some:
            name, val = f"mask{100 * p:.0f}_{pairs}", f"data/{'val_cots' if p < 1 else 'val_cold_start'}.csv"
            self.train(name, "stage1", csv, data=self.at(csv), val=self.at(val), mask_probability=float(p), keep=99,
                       epochs=999, max_steps=720, val_every=every, save_every=every, minutes=9.0)
            self.unpack(name)
            score = [*TOOL, "score", tests.run, f"model={self.at(f'{name}/at')}"]
            self.add(f"look_{name}.json", score, f"{name}/at", tests.at("study/cots"), minutes=2.7)

    def masked(self) -> None:
        """Claims 3 and 7: masking off, and what the heads say of the base's CoTs."""
        self.test_cots()
        self.train("study/mask_0", "stage1", "data/train_cots.csv", mask_probability=0.0)
        places = {n: n for n in ("stage1", "stage2", "discriminative")} | {"mask_0": "study/mask_0"}
        models = [f"{name}={self.at(place)}/model" for name, place in places.items()]
        self.add("study/heads.json", ["-m", "lab.study.models", "heads", "--run", self.run, "--models", *models],
                 *places.values(), "study/cots", out=None, minutes=1.5)


def plan(runs: str, only, steps: int | None) -> list[Cell]:
    """All cells of the stages, in the order in which they are to begin."""
    cells = {}
    world = functools.partial(World, cells, os.path.normpath(runs), steps=steps)
    large = ("--train-cold-start", "2880", "--val-cold-start", "240", "--train-rl", "0")
    large += tuple(word for csv in CSVS.values() for word in (f"--{csv.replace('_', '-')}", "0"))
    parts = [(stage, *part) for stage in SEEDS if stage in only for part in PARTS.get(stage, [((), SEEDS[stage])])]
    for stage, part, seed in [(stage, part, seed) for stage, part, seeds in parts for seed in seeds]:
        if stage == "grid":
            for name, flags in WORLDS.items():
                world(seed, name, flags).paradigms()
        elif stage == "looking":
            (tests := world(seed, "unspoken", UNSPOKEN)).test_cots()
            world(seed, "looking", UNSPOKEN + large).look(tests, *part)
        else:
            (today := world(seed, "today")).paradigms()
            {"cost": today.cost, "long": today.gradients, "seeds": today.masked}[stage]()
        if stage == "long":
            sentences = list(LONG.values()).index(part)
            longer = world(seed, part, sentences=sentences)
            longer.train("stage1", "stage1", "data/train_cots.csv", save_every=14, keep=99)
            longer.train("stage2", "stage2", "stage1", max_steps=1, minutes=0.2)  # only for its settings
            longer.gradients()
            if sentences == 1:
                longer.coupled()
                longer.cost()
    return list(cells.values())


# ---- 3. Results ----------------------------------------------------------------------------------------------
def judged(claim: study.Claim, runs: dict, stage: str) -> dict:
    """A claim's entry, of the seeds of its stage (others may have run for another); its verdict waits for all."""
    found = study.judge(claim, {seed: runs[seed] for seed in SEEDS[stage] if seed in runs})
    seeds = min(found["parts"][name]["seeds"] if name in found["parts"] else 0 for name in claim.decides)
    whole = found["verdict"] if seeds == len(SEEDS[stage]) else study.NOT_RUN
    return found | {"stage": stage, "seeds": seeds, "planned": len(SEEDS[stage]), "verdict": whole}


def spent(records: list[dict | None]) -> dict:
    """What a stage's cells took; None: one that is not done. A cell that two stages need is counted in both."""
    there = list(filter(None, records))
    return {"done": len(there), "planned": len(records), "commits": sorted({record["commit"] for record in there}),
            "core_hours": sum(record["core_minutes"] for record in there) / 60}


def report(runs: str, now: str, trial: int | None) -> None:
    """RUNS/worlds.json, worlds.md and worlds.png from what is there of all stages, whatever --only says."""
    folders = {seed: f"{runs}/seed{seed}" for seed in SEEDS["seeds"]}
    cells = plan(runs, SEEDS, trial)
    done, paths = {}, {cell.path for cell in cells}
    for cell in cells:  # what it needs comes before it; what was made from a stale cell is stale, too
        if is_done(cell) and all(need in done for need in cell.needs if need in paths):
            done[cell.path] = read(cell.record)
    second.STALE = {cell.path for cell in cells if os.path.exists(cell.record)} - done.keys()
    counts = {stage: spent([done.get(cell.path) for cell in plan(runs, [stage], trial)]) for stage in SEEDS}
    found = [judged(claim, folders, stage) | {"cells": counts[stage]} for stage, some in claims().items()
             for claim in some]
    result = pages.rounded({"commit": now, "trial": trial, "claims": found})
    write_json(f"{runs}/worlds.json", result)
    text = "\n".join(make(result) for make in (pages.rules, pages.parts, pages.many, pages.cells))
    pathlib.Path(runs, "worlds.md").write_text(text, encoding="utf-8")
    figures.draw_worlds(pathlib.Path(runs, "worlds.png"), result)
    print(f"{pages.rules(result)}\n{len(done)} of {len(cells)} cells done; {runs}/worlds.json, .md, .png")


def keep_rules(path: str, now: str) -> None:
    """Writes the rules before the first cell runs; InputError if a run has others."""
    rules = [study.entry(claim) | {"stage": stage} for stage, some in claims().items() for claim in some]
    if read(path).get("rules", rules) != rules:
        raise InputError(f"{path}: its cells ran under other rules than this code's; give another --runs.")
    if not os.path.exists(path):
        write_json(path, {"commit": now, "rules": rules})


def main(argv=None) -> None:
    """Announces, runs what is missing, judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/worlds", help="folder (default runs/worlds)")
    parser.add_argument("--only", nargs="+", choices=SEEDS, default=list(SEEDS), help="stages (default: all, in order)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one core each (default 2)")
    parser.add_argument("--steps", type=int, help="a trial: few pairs, and trainings end after so many steps")
    parser.add_argument("--report", action="store_true", help="judge what is there, run nothing")
    args = parser.parse_args(argv)
    cells, now, wrong = plan(args.runs, args.only, args.steps), study.commit(), []
    os.makedirs(args.runs, exist_ok=True)
    if not args.report:
        keep_rules(f"{args.runs}/rules.json", now)
        study.announce([claim for stage in args.only for claim in claims()[stage]], SEEDS["seeds"], now)
        to_do = [cell.minutes for cell in cells if not is_done(cell)]
        print(f"{len(to_do)} of {len(cells)} cells to do, about {sum(to_do) / 60:.1f} core-hours", flush=True)
        wrong = run_all(cells, args.jobs, now)
    report(args.runs, now, args.steps)
    if wrong:
        raise InputError(f"{len(wrong)} cells are missing, the first: {wrong[0]} Mend it and run the command again.")


if __name__ == "__main__":
    cli(main)
