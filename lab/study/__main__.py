"""The paper's claims in miniature, each with a verdict, on the toy world.

    make study            three seeds        make study SEEDS=0        one
    python -m lab.study --runs runs --seeds 0 1 2 [--only 6 7 8]
    python -m lab.study --runs runs --seeds 0 1 2 --publish           results -> study.json, pages, figures

In: RUNS/seedK, each a finished `make demo`. Out: RUNS/study.json, RUNS/study.md and a figure per claim.
Every run is the demo's own with a few settings changed (VARIANTS), kept in RUNS/seedK/study/; what is there is not run
again, so a killed study goes on. Two runs at a time, each on one core. Rules and commit are printed before anything
runs. Nothing is tuned on a test set.

How is judged: verdict.py; which values: measures.py; what needs a model: models.py; tables and figures: pages.py,
figures.py.
"""

import argparse
import dataclasses
import os
import subprocess

import cold_start
import grpo
from lab.study import measures, pages
from lab.study.cells import Cell, run_all
from lab.study.models import CSVS, SETS, settings_of
from lab.study.verdict import MARGIN, NOT_RUN, summary, verdict, weakest
from plumbing.settings import InputError, cli, write_json


# ---------------------------------------------------------------------------------------------------------------
# 1. The claims
# ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Claim:
    """decides: the parts whose verdicts make the claim's, the weakest of them. needs: tasks that must have run."""

    number: int
    claim: str
    paper: str  # the paper's number
    rule: str  # fixed beforehand
    decides: tuple[str, ...]
    needs: tuple[str, ...]
    measure: object
    margin: float = MARGIN  # of accuracies; a claim about another unit has none: 0


CLAIMS = (
    Claim(
        1, "Think, then score through a head: better than a coupled generative model, and than not thinking (Fig. 1b)",
        "in-domain / GenAI / VideoGen: DeScore .734 / .765 / .768, generative .683 / .697 / .712, discriminative "
        ".588 / .585 / .589",
        "hits on the same pairs: DeScore's minus the coupled model's, and minus the discriminative one's, both above 0",
        ("DeScore - coupled generative", "DeScore - discriminative"), ("coupled", "eval_coupled", "cots"),
        measures.paradigms,
    ),
    Claim(
        2, "BT trains smoothly, the policy gradient is noisy (Fig. 1c)", "a figure, no number",
        "32 draws of the CoTs of one batch at stage 1's weights: mean cosine between the draws' gradients, BT minus "
        "GRPO (rules and preference): both above 0",
        ("cosine: BT - GRPO, rules", "cosine: BT - GRPO, preference"), ("gradients",), measures.gradient_noise,
        margin=0.0,
    ),
    Claim(
        3, "Random CoT masking keeps the head looking at the video", "p = .5; no number known",
        "accuracy WITHOUT a CoT, trained with p = .5 minus trained with p = 0: above 0",
        ("absent CoT: p .5 - p 0",), ("mask_0", "mask_25", "mask_75", "heads"), measures.masking,
    ),
    Claim(
        4, "Without BT in stage 2 the rewards drift away from the CoTs (Eq. 10)", "weight 5e-3; no number known",
        "accuracy, each model thinking for itself, stage 2 with BT minus stage 2 with --bt-coef 0: above 0",
        ("BT .05 - BT 0",), ("no_anchor", "eval_no_anchor", "anchor_paper", "eval_anchor_paper"),
        measures.reward_drift,
    ),
    Claim(
        5, "Thinking needs less data", "22 k pairs, where VideoAlign has 182 k",
        "accuracy of stage 1 on a quarter of the pairs minus the discriminative model's on all, equal steps: above 0",
        ("stage 1 on a quarter - discriminative on all",),
        ("stage1_8", "stage1_4", "stage1_2", "discriminative_8", "discriminative_4", "discriminative_2", "heads"),
        measures.data_efficiency,
    ),
    Claim(
        6, "The head tolerates errors in the CoT", "no number known",
        "the true CoT with two verdicts corrupted: the head's hits minus those of the score the text states: above 0",
        ("head - text, 2 wrong",), ("heads",), measures.error_tolerance,
    ),
    Claim(
        7, "The head tells apart what the stated score does not", "no number known",
        "pairs that people decided and whose two CoTs state the same score: the head's hits minus 1/2: above 0",
        ("head - 1/2, stated scores equal to two digits",), (), measures.fine_grained,
    ),
    Claim(
        8, "The reward depends on prompt and video", "no number: a check, not a claim of the paper",
        "lab.study.sanity: accuracy lost by an unrelated prompt, and by a black clip, thought anew: both above 0",
        ("lost by: unrelated prompt, thought anew", "lost by: black clip, thought anew"),
        ("sanity",), measures.reads_both,
    ),
)

# name -> (the demo's run that is repeated, the settings that are changed, on the first seed only?). {run}: that seed's
# folder. The coupled model starts from the base, as DeScore does: 60 steps of it cost what stage 1 and 2 cost together.
VARIANTS = {
    "coupled": ("stage2", {"model": "{run}/base", "bt_coef": 0.0, "max_steps": 60}, False),
    "mask_0": ("stage1", {"mask_probability": 0.0}, False),
    "mask_25": ("stage1", {"mask_probability": 0.25}, True),
    "mask_75": ("stage1", {"mask_probability": 0.75}, True),
    "no_anchor": ("stage2", {"bt_coef": 0.0}, False),
    "anchor_paper": ("stage2", {"bt_coef": 0.005}, True),
} | {
    f"{stage}_{share}": (stage, {"data": f"{{run}}/study/train_cots_{share}.csv", "epochs": 3 * share + 10}, False)
    for stage in ("stage1", "discriminative")
    for share in measures.SHARES[:-1]
}


# ---------------------------------------------------------------------------------------------------------------
# 2. Commands (cells.py)
# ---------------------------------------------------------------------------------------------------------------
def again(run: str, name: str, steps: int | None) -> Cell:
    """A variant: the demo's own training, from its settings.json, with a few settings changed."""
    stage, changes, _ = VARIANTS[name]
    kind = grpo.Settings if stage == "stage2" else cold_start.Settings
    settings = vars(settings_of(f"{run}/{stage}", kind))  # its flags alone: the file also says what the run found out
    with open(f"{run}/{stage}/metrics.jsonl", encoding="utf-8") as file:
        settings["max_steps"] = sum(1 for _ in file)  # equal steps, whatever the number of pairs
    settings |= {"data": f"{run}/data/{os.path.basename(settings['data'])}", "video_root": f"{run}/data", "val": None,
                 "model": f"{run}/{'base' if stage != 'stage2' else 'stage1/model'}", "out": f"{run}/study/{name}"}
    settings |= {key: value.format(run=run) if isinstance(value, str) else value for key, value in changes.items()}
    settings |= {"overwrite": True, "resume": False, "workers": 0, "frame_cache": f"{run}/frames"}
    if steps:
        settings["max_steps"] = steps
    script = ["grpo.py"] if stage == "stage2" else ["cold_start.py"]
    if name == "coupled":
        script = ["-m", "lab.study.coupled"]
    return cell(run, name, [*script, *flags(settings)], "model/model.safetensors")


def flags(settings: dict) -> list[str]:
    """{name: value} -> a command line. What is None is left out."""
    line = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            line.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            line += [flag, *map(str, value if isinstance(value, list) else [value])]
    return line


def cell(run: str, place: str, command: list[str], done: str = "", *needs: str) -> Cell:
    """A command that writes to RUN/study/PLACE, `done` in it last. needs: places.

    It is made from the demo's models, too: what is there of a demo that has been made anew since belongs to no model.
    """
    path, models = f"{run}/study/{place}", ("base", "discriminative/model", "stage1/model", "stage2/model")
    sources = *(f"{run}/study/{need}" for need in needs), *(f"{run}/{model}/model.safetensors" for model in models)
    return Cell(path, command, f"{path}/{done}" if done else path, sources, 1.0)


def judged(run: str, place: str, model: str, *more: str) -> Cell:
    """An evaluation on the three test sets, thinking for itself. model: a place in RUN/study."""
    command = ["evaluate.py", "--root", f"{run}/data", "--benchmark", *SETS, "--batch-size", "220",
               "--max-new-tokens", "80", "--model", f"{run}/study/{model}/model", "--out", f"{run}/study/{place}",
               *more]
    return cell(run, place, command, f"{SETS[-1]}/{'text/' if more else ''}report.json", model)


def commands(run: str, first: bool, wanted: set[str], steps: int | None) -> dict[str, Cell]:
    """{task: its cell} of one seed, those that claims need, in an order in which they can run."""
    os.makedirs(f"{run}/study", exist_ok=True)
    names = [name for name, (_, _, first_only) in VARIANTS.items() if name in wanted and (first or not first_only)]
    for share in measures.SHARES[:-1]:
        if f"stage1_{share}" in names:
            measures.first_rows(f"{run}/data/train_cots.csv", f"{run}/study/train_cots_{share}.csv", share)
    found = {name: again(run, name, steps) for name in names}
    csvs = [f"{run}/data/{name}.csv" for name in CSVS.values()]
    cots = [f"{run}/study/cots/{name}.csv" for name in CSVS.values()]
    collect = ["collect_cots.py", "--model", f"{run}/base", "--temperature", "0", "--batch-size", "220",
               "--max-new-tokens", "80", "--data", *csvs, "--out", *cots]
    models = {name: f"{run}/{name}/model" for name in ("discriminative", "stage1", "stage2")}
    own = [name for name in names if VARIANTS[name][0] != "stage2"]
    models |= {name: f"{run}/study/{name}/model" for name in own}
    score = ["-m", "lab.study.models", "heads", "--run", run, "--models", *(f"{k}={v}" for k, v in models.items())]
    noise = ["-m", "lab.study.models", "gradients", "--run", run]
    check = ["-m", "lab.study.sanity", "--root", f"{run}/data", "--benchmark", SETS[0], "--batch-size", "220",
             "--max-new-tokens", "80", "--model", f"{run}/stage2/model", "--out", f"{run}/study/sanity"]
    found |= {
        "cots": cell(run, "cots", collect, f"{CSVS[SETS[-1]]}.csv"),
        "eval_coupled": judged(run, "eval/coupled", "coupled", "--score-from", "text"),
        "eval_no_anchor": judged(run, "eval/no_anchor", "no_anchor"),
        "gradients": cell(run, "gradients.json", noise),
        "heads": cell(run, "heads.json", score, "", "cots", *own),
        "eval_anchor_paper": judged(run, "eval/anchor_paper", "anchor_paper"),
        "sanity": cell(run, "sanity", check, "sanity.json"),
    }
    chosen = wanted if first else wanted - {"eval_anchor_paper"}
    return {task: one for task, one in found.items() if task in chosen or (task == "cots" and "heads" in chosen)}


# ---------------------------------------------------------------------------------------------------------------
# 3. Results
# ---------------------------------------------------------------------------------------------------------------
def judge(claim: Claim, runs: dict[int, str]) -> dict:
    """One claim's entry of study.json."""
    parts, more = claim.measure(runs)
    rows = {name: summary(values) for name, values in parts.items() if values}
    for name, row in rows.items():
        row["verdict"] = verdict(row, claim.margin)
    decided = [rows[name]["verdict"] for name in claim.decides if name in rows]
    found = weakest(decided) if len(decided) == len(claim.decides) else NOT_RUN
    return entry(claim) | {"verdict": found, "parts": rows, "more": more}


def entry(claim: Claim) -> dict:
    """What is known of a claim before it is measured."""
    return {"number": claim.number, "claim": claim.claim, "paper": claim.paper, "rule": claim.rule,
            "decides": list(claim.decides), "margin": claim.margin, "verdict": NOT_RUN, "parts": {}, "more": {}}


def commit() -> str:
    """The commit of the code that runs, and whether code differs from it; "unknown" outside git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=pages.ROOT, capture_output=True, text=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--", "*.py", "Makefile", "scripts") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def announce(claims: list[Claim], seeds: list[int], now: str) -> None:
    """Before anything runs: what is claimed, and what will count as seen."""
    print(f"commit {now}, seeds {seeds}, margin {MARGIN}; verdicts: bootstrap over seeds, then pairs, 95 %")
    print(f"  seen here: the interval lies above 0; not seen here: below {MARGIN} (cosines: below 0)")
    print("  else: can't tell at this size")
    for claim in claims:
        print(f"{claim.number}. {claim.claim}\n   paper: {claim.paper}\n   rule: {claim.rule}", flush=True)


def main(argv=None) -> None:
    """Runs what is missing, judges, writes study.json, study.md and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs", help="folder of seed0, seed1 ...: demos (default runs)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of claims; the others keep what study.json says")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default 2)")
    parser.add_argument("--steps", type=int, help="a trial: trainings end after so many steps")
    parser.add_argument("--publish", action="store_true", help="write study.json, its pages and figures, and stop")
    args = parser.parse_args(argv)
    runs = {seed: os.path.join(args.runs, f"seed{seed}") for seed in args.seeds}
    path = os.path.join(args.runs, "study.json")
    if args.publish:
        pages.publish(args.runs)
        return
    for run in runs.values():
        for name in ("eval/stage2", "data/test_in_domain.truth.jsonl"):
            if not os.path.exists(f"{run}/{name}"):
                raise InputError(f"{run}: has no {name}, so no demo of this code; run `make study`, which makes one.")
    claims = [claim for claim in CLAIMS if not args.only or claim.number in args.only]
    now = commit()
    announce(claims, args.seeds, now)
    first, needs = next(iter(runs)), {name for claim in claims for name in claim.needs}
    cells = [cell for seed, run in runs.items() for cell in commands(run, seed == first, needs, args.steps).values()]
    if wrong := run_all(cells, args.jobs, now):
        raise InputError(f"{len(wrong)} commands are missing, the first: {wrong[0]} Mend it and run the study again.")
    result = pages.read(path) or {"claims": []}
    known = {found["number"]: found for found in result["claims"] if found["parts"]}
    result["claims"] = [entry(claim) | known.get(claim.number, {}) for claim in CLAIMS]
    for claim in claims:
        about = {"commit": now, "seeds": args.seeds, "trial": args.steps}
        result["claims"][claim.number - 1] = judge(claim, runs) | about
    rungs = measures.ladder(runs)
    result |= {"margin": MARGIN, "ladder": {rung: pages.accuracies(values) for rung, values in rungs.items()}}
    result |= {"ladder_run": {"commit": now, "seeds": args.seeds}, "minutes": measures.minutes(runs)}
    write_json(path, pages.rounded(result))
    pages.write(args.runs, pages.read(path))


if __name__ == "__main__":
    cli(main)
