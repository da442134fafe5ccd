"""The two measurements of the study that need a model in memory; lab/study starts them, one process a seed.

    python -m lab.study.models heads     --run runs/seed0 --models stage1=runs/seed0/stage1/model ...
    python -m lab.study.models gradients --run runs/seed0

`heads`: rewards of many models for ONE fixed file of CoTs per test set, written by the base model, which none of them
has trained. Thinking costs a minute, scoring seconds; and all models are asked about the same texts. The CoT of a video
is its own, absent, or that of the pair's other video; and on the in-domain set the true CoT with k verdicts corrupted.
`gradients`: how much of the gradient of BT and of GRPO is noise of the sampled CoTs, at one checkpoint on one batch.

Out: RUN/study/heads.json, RUN/study/gradients.json.
Shapes: n decided pairs; rewards (n, 2) of A and B; d draws, P parameters.
"""

import argparse
import dataclasses
import json
import os

import numpy as np
import torch
from tqdm import tqdm

import data
import grpo
import parallel
from lab.study.coupled import preference_rewards
from lab.study.sanity import change_frames
from layout import lay_out
from losses import group_advantages
from model import DeScore, to_device
from plumbing.settings import InputError, cli, write_json
from rollout import TransformersEngine
from rules import DIMENSIONS, overall_score
from toy.world import COLOURS, SHAPES, VALUES, annotate, cot_text

SETS = ("in-domain", "genai-bench", "videogen-rewardbench")
CSVS = {"in-domain": "test_in_domain", "genai-bench": "test_genai_bench",
        "videogen-rewardbench": "test_videogen_rewardbench"}
MOST_WRONG = 5  # k of error tolerance
DRAWS = 32  # of the gradient's CoTs
OBJECTIVES = {"rules": grpo.rule_rewards, "preference": preference_rewards}  # what the policy is rewarded for


# ---------------------------------------------------------------------------------------------------------------
# 1. Heads: rewards for given CoTs
# ---------------------------------------------------------------------------------------------------------------
def corrupt(wish: dict, seen: dict, wrong: int, rng) -> dict:
    """What a CoT believes to have seen when `wrong` of its verdicts are wrong: -> seen, with other values.

    Where the clip shows what was asked, another value is claimed; where it does not, the asked one. Verdict and score
    follow from that, so the text agrees with itself, and only the video can tell that it is wrong. Dimensions that
    were not asked for have no verdict that could be wrong; with fewer than `wrong` others, all of those are.
    """
    asked = [name for name in DIMENSIONS if wish[name]]
    claimed = dict(seen)
    for name in rng.permutation(asked)[:wrong]:
        if seen[name] != wish[name]:
            claimed[name] = wish[name]
        elif name == "subject":
            claimed[name] = (_other(COLOURS, seen[name][0], rng), _other(SHAPES, seen[name][1], rng))
        else:
            claimed[name] = _other(VALUES[name], seen[name], rng)
    return claimed


def _other(values, value, rng):
    rest = [v for v in values if v != value]
    return rest[rng.integers(len(rest))]


def corrupted_texts(path: str, seed: int) -> dict[int, list[list[str]]]:
    """{line of the CSV: [wrong = 0..5][video A, B] -> CoT} of a split, from the truth that `toy` wrote beside it.
    """
    texts = {}
    with open(path, encoding="utf-8") as file:
        for line, record in enumerate(map(json.loads, file), 2):
            for values in (record[name] for name in ("wish", "a", "b")):  # JSON has no tuples
                values["subject"] = values["subject"] and tuple(values["subject"])
            rng, wish = np.random.default_rng([seed, line]), record["wish"]
            seen = [[corrupt(wish, record[side], k, rng) for side in "ab"] for k in range(MOST_WRONG + 1)]
            texts[line] = [[cot_text(wish, one, annotate(wish, one)) for one in both] for both in seen]
    return texts


@torch.no_grad()
def rewards_for(model: DeScore, prefixes: list[dict], cots: list[list[list[int]]]) -> np.ndarray:
    """(B, K): rewards of B prefixes, each with K CoTs behind it. An empty CoT is an absent one."""
    batch = to_device(lay_out(model.backbone, prefixes, cots), model.query.device)
    return model(batch, want_log_probs=False).rewards.view(len(prefixes), -1).numpy()


def cots_of(pair, other_texts, tokenizer) -> list[list[list[int]]]:
    """[video A, B][own, absent, swapped, then corrupted 0..5] -> token ids."""
    own = pair.cot_ids(tokenizer)
    rows = []
    for side in (0, 1):
        given = [data.encode_cot(tokenizer, texts[side]) for texts in other_texts or []]
        rows.append([own[side], [], own[1 - side], *given])
    return rows


def score_set(models: dict, pairs: list, texts: dict | None, chunk=32, asked=("stage2",), change="") -> dict:
    """Rewards of every model for every kind of CoT: {"kinds": names, "rewards": {model: (n, 2, kinds)}}.

    A clip is decoded and encoded once for all models. Corrupted CoTs are shown to the models `asked` alone; for the
    others the last axis ends before them. change: what is done to the frames (sanity.FRAMES); the CoTs stay.
    """
    kinds = ["own", "absent", "swapped"] + [f"wrong {k}" for k in range(MOST_WRONG + 1)] * bool(texts)
    first = next(iter(models.values()))
    rewards = {name: [] for name in models}
    for start in tqdm(range(0, len(pairs), chunk), desc="pairs / 32"):
        part = pairs[start : start + chunk]
        videos = [video for pair in part for video in pair.videos]
        if change:
            sampled = [(path, data.sample_frames(path, first.settings.get("fps", 2.0))) for path in videos]
            videos = [dataclasses.replace(v, frames=change_frames(v.frames, change, path)) for path, v in sampled]
        prefixes = first.encode(videos, [pair.prompt for pair in part for _ in pair.videos])
        rows = [cots_of(pair, texts and texts[pair.line], first.processor.tokenizer) for pair in part]
        for name, model in models.items():
            end = len(kinds) if name in asked else 3
            found = rewards_for(model, prefixes, [row[:end] for both in rows for row in both])  # (2 * chunk, end)
            rewards[name] += found.reshape(len(part), 2, -1).tolist()
    return {"kinds": kinds, "labels": [pair.label for pair in pairs], "rewards": rewards}


def heads(run: str, models: dict[str, str], chosen: list[str] = SETS, most: int | None = None) -> None:
    """RUN/study/heads.json. `most`: only so many decided pairs of each set, for a trial."""
    opened = {name: DeScore.from_pretrained(path) for name, path in models.items()}
    result = {}
    for name in chosen:
        pairs = [p for p in data.read_pairs(f"{run}/study/cots/{CSVS[name]}.csv") if p.label != 0][:most]
        texts = None
        truth = f"{run}/data/{CSVS[name]}.truth.jsonl"
        if name == "in-domain" and os.path.isfile(truth):
            texts = corrupted_texts(truth, seed=0)
        result[name] = score_set(opened, pairs, texts)
        if texts:  # what the text itself says of these pairs, under the same errors
            stated = [[[overall_score(t) for t in both] for both in texts[pair.line]] for pair in pairs]
            result[name]["stated"] = np.array(stated).transpose(0, 2, 1).tolist()  # (n, 2, 6)
    write_json(f"{run}/study/heads.json", result)


# ---------------------------------------------------------------------------------------------------------------
# 2. Gradients: signal and noise
# ---------------------------------------------------------------------------------------------------------------
def signal_and_noise(gradients: torch.Tensor) -> dict:
    """(d, P) gradients of d independent draws of the CoTs, same weights, same pairs -> how noisy one of them is.

        noise / signal = tr Cov(g) / (‖ḡ‖² - tr Cov(g) / d)         0: every draw says the same

    tr Cov(g) = Σ ‖g_i - ḡ‖² / (d - 1). ‖ḡ‖² alone would count a d-th of the noise as signal. Where the difference is
    not positive, d draws do not tell the signal from 0: None. cosine: for each draw its mean cosine with the others, 1
    without noise and 0 with nothing but noise; it is defined always.
    """
    gradients = gradients.double()
    count = len(gradients)
    noise = (gradients - gradients.mean(0)).square().sum().item() / (count - 1)
    signal = gradients.mean(0).square().sum().item() - noise / count
    unit = gradients / gradients.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosines = (unit @ unit.T).fill_diagonal_(0).sum(1) / (count - 1)
    return {"noise": noise, "signal": signal, "noise_to_signal": noise / signal if signal > 0 else None,
            "cosine": cosines.tolist()}


def one_draw(model, items, engine, settings, parameters, draw: int) -> dict[str, torch.Tensor]:
    """New CoTs for the same pairs -> {objective: (P,) gradient}: BT (Eq. 10), GRPO by rules, GRPO by preference."""
    ranks, total = parallel.Ranks(), {}
    batch = grpo.generate(items, engine, settings, 10_000 + draw)
    counts = grpo.denominators(batch, settings, ranks)
    for rollouts in batch:
        rows = to_device(lay_out(model.backbone, rollouts.prefixes, rollouts.cots), model.query.device)
        output, mask = model(rows), rows["cot_mask"]
        for objective, rule in OBJECTIVES.items():
            rollouts.rule_rewards = rule(rollouts, model.processor.tokenizer, settings)
            rollouts.advantages = group_advantages(rollouts.totals())
            policy, _, bt = grpo.losses_of(output, output.log_probs.detach(), mask, rollouts, settings, counts)
            losses = {f"GRPO, {objective}": policy} | ({"BT": bt} if objective == "rules" else {})
            for name, loss in losses.items():
                grads = torch.autograd.grad(loss, parameters, retain_graph=True)
                flat = torch.cat([g.flatten() for g in grads])
                total[name] = total[name] + flat if name in total else flat
    return total


def gradients(run: str, draws: int = DRAWS) -> None:
    """RUN/study/gradients.json: at stage 1's model, on the first batch of stage 2's data, for the LLM's blocks.

    Both losses reach those parameters; the head and `lm_head` are reached by one of them only, and are left out.
    """
    settings = settings_of(f"{run}/stage2", grpo.Settings)
    model = DeScore.from_pretrained(f"{run}/stage1/model").eval()
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(".language_model.layers." in name)
    parameters = [p for p in named.values() if p.requires_grad]
    engine = TransformersEngine(model.backbone, model.processor, shared=True, rows_per_batch=settings.rows_per_batch)
    pairs = data.read_pairs(f"{run}/data/train_rl.csv")[: settings.batch_pairs]
    items = list(data.take(data.EncodedPairs(pairs, model.processor, settings.fps, settings.max_pixels),
                           list(range(len(pairs)))))
    found = [one_draw(model, items, engine, settings, parameters, k) for k in tqdm(range(draws), desc="draws")]
    rows = {name: signal_and_noise(torch.stack([draw[name] for draw in found])) for name in found[0]}
    write_json(f"{run}/study/gradients.json", rows)


def settings_of(folder: str, kind):
    """The settings that a training run saved, as the dataclass `kind`. InputError: it holds none."""
    try:
        with open(os.path.join(folder, "settings.json"), encoding="utf-8") as file:
            saved = json.load(file)
    except OSError as error:
        raise InputError(f"{folder}: holds no settings.json ({error.strerror}); make demo writes it.") from error
    names = kind.__dataclass_fields__
    return kind(**{name: value for name, value in saved.items() if name in names})


def main(argv=None) -> None:
    """One measurement of one seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("heads", "gradients"))
    parser.add_argument("--run", required=True, help="folder of a finished demo")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=DIR", help="heads: the models to ask")
    parser.add_argument("--most", type=int, help="heads: decided pairs of each set at most, for a trial")
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"gradients: draws of the CoTs (default {DRAWS})")
    args = parser.parse_args(argv)
    if args.what == "heads":
        heads(args.run, dict(model.split("=", 1) for model in args.models), most=args.most)
    else:
        gradients(args.run, args.draws)


if __name__ == "__main__":
    cli(main)
