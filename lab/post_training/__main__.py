"""Post-training a video generator with DeScore as its reward, on the toy: Flow-GRPO and Flow-DPO, with controls.

    python -m lab.post_training base --out runs/post --seed 0
    python -m lab.post_training grpo --out runs/post --seed 0 --reward runs/stage2/model
    python -m lab.post_training dpo  --out runs/post --seed 0 --reward runs/stage2/model
    python -m lab.post_training grpo --out runs/post --seed 0 --reward gold          control: a perfect reward
    python -m lab.post_training grpo --out runs/post --seed 0 --reward random        control: what the updates alone do
    python -m lab.post_training measure --out runs/post --reward runs/stage2/model   all seeds in --out: tables, figure

`make post-train` runs all of it for one seed, `make post-seeds` for three. More: lab/post_training/README.md.
Each run keeps its state in OUT/seedK/METHOD-REWARD/state.pt. Started again, it goes on as if it had never stopped, to
the bit: all that is random is named by the seed and the update. `base` and the gold judge are kept when they are done.

The equations are flow.py's, the policy's loss is Eq. 7. The same two updates on Wan-2.1: wan.py.
Shapes: N = prompts x group clips, P patches, C components, A attributes, K SDE steps of the sampler.
"""

import copy
import dataclasses
import os
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from lab.post_training import flow, report
from lab.post_training.generator import C, Generator, P, draw_times, sample, step_mean, train_base
from lab.post_training.world import Reward, draw_asked, gold_judge, noise_of, rng_of
from lab.study.cells import read
from losses import clipped_tokens, group_advantages, grpo_loss
from plumbing.jobs import content_of, fingerprint
from plumbing.settings import InputError, arg, atomic_write, cli, flag_of, parse, writable, write_json, write_jsonl

COMMANDS, CONTROLS = ("base", "grpo", "dpo", "measure"), ("gold", "random")


@dataclasses.dataclass
class Settings:
    """The flags of all commands."""

    out: str | None = arg(None, "folder of all seeds and runs; holds the gold judge")
    seed: int = arg(0, "training seed: base, prompts, noise")
    reward: str | None = arg(None, "a DeScore folder, or a control: gold, random")
    updates: int = arg(50, "updates, each on the clips of --prompts x --group", at_least=1)
    prompts: int = arg(16, "prompts per update", at_least=1)
    group: int = arg(8, "clips per prompt", at_least=2)
    minis: int = arg(4, "optimizer steps per update; longcat: 1, it has one SDE step", at_least=1)
    lr: float = arg(1e-4, "learning rate of AdamW", above=0)
    warm_up: int = arg(5, "updates until the full learning rate", at_least=1)
    steps: int = arg(10, "sampling steps", at_least=2)
    noise: str = arg("longcat", "longcat: one early SDE step, shared start noise; flow-grpo: all but the last are SDE",
                     choices=list(flow.NOISES))
    clip: float = arg(1e-3, "range of the ratio, which is the D-th root of the true one", above=0)
    kl: float = arg(0.0, "weight of the KL to the base", at_least=0)
    beta: float = arg(100.0, "dpo: weight of the implicit reward", above=0)
    pairs: int = arg(1, "dpo: pairs from each group: best and worst, second best and second worst, ...", at_least=1)
    batch_pairs: int = arg(32, "dpo: pairs per optimizer step", at_least=1)
    base_steps: int = arg(800, "base: optimizer steps", at_least=1)
    wrong: float = arg(0.3, "base: share of asked attributes replaced by random ones", at_least=0, at_most=1)
    pool: int = arg(4096, "base, gold judge: rendered clips to learn from", at_least=32)
    judge_steps: int = arg(220, "gold judge: optimizer steps", at_least=1)
    eval_prompts: int = arg(32, "prompts of the evaluation, --group clips each", at_least=2)
    curve_every: int = arg(10, "updates between two points of the figure's curves", at_least=1)
    save_every: int = arg(5, "updates between two savings", at_least=1)
    publish: bool = arg(False, "measure: also write README.md of lab/post_training, post_training.json and the figures")


# These may change when a run goes on; of the reward the place, not the weights
FREE = ("out", "updates", "save_every", "eval_prompts", "curve_every", "publish", "reward")


# ---------------------------------------------------------------------------------------------------------------
# The two updates. Both begin alike: clips of the policy, and their rewards
# ---------------------------------------------------------------------------------------------------------------
def make_clips(policy: Generator, score: Reward, s: Settings, update: int, noisy):
    """-> asked (N, A), latents (N, P, C), the SDE steps, rewards (prompts, group), and numbers to log."""
    begin, name = time.time(), (s.seed, "update", update)
    asked = draw_asked(rng_of(*name), s.prompts).repeat_interleave(s.group, 0)
    shared = s.noise == "longcat" and bool(noisy)
    start = noise_of((s.prompts if shared else len(asked), P, C), *name, "start")
    start = start.repeat_interleave(s.group, 0) if shared else start
    latents, trail = sample(policy, asked, start, s.steps, noisy, flow.NOISES[s.noise], name)
    clips, middle = policy.latents.decode(latents), time.time()
    rewards = score(asked, clips, update).view(s.prompts, s.group)
    right = score.judge.right(asked, clips).float().mean(1).view(s.prompts, s.group)
    return asked, latents, trail, rewards, {
        "reward": rewards.mean().item(), "group_std": rewards.std(1).mean().item(), "gold": right.mean().item(),
        "agreement": report.agreement(rewards, right), "sampling_s": middle - begin,
        "scoring_s": time.time() - middle,
    }


def grpo_update(policy: Generator, base: Generator, optimizer, score, s: Settings, update: int, _store) -> dict:
    """Clips, rewards, advantages, then --minis optimizer steps, each on its share of the SDE steps of ALL clips.

    All clips at one step were one batch of the sampler and are one again here: the same kernels, so before the first
    optimizer step the replayed ratio is exactly 1.
    """
    # 1. Clips and their rewards
    noisy = flow.noisy_steps(s.noise, s.steps, rng_of(s.seed, "early", update).integers)
    asked, _, trail, rewards, log = make_clips(policy, score, s, update, noisy)
    # 2. Advantages, within the clips of one prompt
    advantages = (flow.shared_spread if s.noise == "longcat" else group_advantages)(rewards).flatten()  # (N,)
    # 3. Eq. 7 with the clip's K steps in place of tokens
    order = rng_of(s.seed, "order", update).permutation(len(trail))
    totals = dict.fromkeys(("loss", "kl", "clipped", "off"), 0.0)
    parts = [part for part in np.array_split(order, s.minis) if len(part)]
    for part in parts:
        for k in part:
            loss = step_loss(policy, base, trail[k], asked, advantages, s, totals) / len(part)
            loss.backward()
            totals["loss"] += loss.item() / len(parts)
        norm = take_step(policy, optimizer, s, update)
    count = len(trail) * len(asked)
    log |= {"loss": totals["loss"], "clipped": totals["clipped"] / count, "ratio_off": totals["off"] / len(trail)}
    return log | ({"kl": totals["kl"] / len(trail)} if s.kl else {}) | {"grad_norm": norm}


def step_loss(policy, base, step, asked, advantages, s: Settings, totals: dict) -> torch.Tensor:
    """Eq. 7 and the KL for one SDE step of all clips. Adds to `totals`: clipped, off = mean of |ratio − 1|, kl.

    Every step is weighted by LongCat's w (w² for the KL), with Flow-GRPO's noise too: else late steps alone learn.
    """
    at, weight = (step.sigma, step.t, step.t_next), flow.step_weight(step.t, step.t_next)
    mean = step_mean(policy, step.x, asked, step.t, step.t_next, step.sigma)
    log_prob, old = flow.step_log_prob(step.x_next, mean, *at)[:, None], step.log_prob[:, None]  # (N, 1)
    loss = weight * grpo_loss(log_prob, old, advantages, torch.ones_like(old), s.clip, s.clip)
    with torch.no_grad():
        totals["clipped"] += clipped_tokens(log_prob, old, advantages, torch.ones_like(old), s.clip, s.clip).item()
        totals["off"] += ((log_prob - old).exp() - 1).abs().mean().item()
    if s.kl:
        with torch.no_grad():
            ref_mean = step_mean(base, step.x, asked, step.t, step.t_next, step.sigma)
        kl = flow.step_kl(mean, ref_mean, *at).mean()
        totals["kl"] += kl.item()
        loss = loss + s.kl * weight**2 * kl
    return loss


def dpo_update(policy: Generator, base: Generator, optimizer, score, s: Settings, update: int, store: list) -> dict:
    """Clips of the policy, ranked by the reward, go into the store; then --minis steps on pairs drawn from all of it.

    store: (asked (A,), chosen (P, C), rejected (P, C)), grows in place. The reference stays the base.
    """
    # 1. Clips (of the ODE: DPO needs no log-probs) and their rewards
    asked, latents, _, rewards, log = make_clips(policy, score, s, update, noisy=())
    # 2. Pairs. Equal rewards say nothing
    for row, order in enumerate(rewards.argsort(dim=1, stable=True)):
        for k in range(min(s.pairs, s.group // 2)):
            worse, better = (int(order[i]) for i in (k, -1 - k))
            if rewards[row, better] > rewards[row, worse]:
                first = row * s.group
                store.append((asked[first].clone(), latents[first + better].clone(), latents[first + worse].clone()))
    if not store:
        return log
    # 3. Flow-DPO, the same t and ε for both clips of a pair
    for mini in range(s.minis):
        name = (s.seed, "pairs", update, mini)
        picks = rng_of(*name).integers(len(store), size=s.batch_pairs)
        prompt, chosen, rejected = (torch.stack(part) for part in zip(*(store[k] for k in picks)))
        t, noise = draw_times((*name, "t"), len(picks)), noise_of(chosen.shape, *name, "noise")
        errors = pair_errors(policy, chosen, rejected, t, noise, prompt)
        with torch.no_grad():
            ref_errors = pair_errors(base, chosen, rejected, t, noise, prompt)
        loss = flow.flow_dpo_loss(errors[0], ref_errors[0], errors[1], ref_errors[1], s.beta)
        loss.backward()
        norm = take_step(policy, optimizer, s, update)
    moved = [(error - ref).detach() for error, ref in zip(errors, ref_errors)]
    log |= {"pair_accuracy": (moved[0] < moved[1]).float().mean().item(), "winner_error_rise": moved[0].mean().item()}
    return log | {"loss": loss.item(), "stored": len(store), "grad_norm": norm}


def pair_errors(generator: Generator, chosen, rejected, t, noise, asked) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow-matching error of winners and of losers, (B,) each, in one forward pass."""
    clips, noise, t = torch.cat([chosen, rejected]), noise.repeat(2, 1, 1), t.repeat(2)
    v = generator(flow.noised(clips, noise, t[:, None, None]), t, asked.repeat(2, 1))
    return flow.flow_error(v, clips, noise).chunk(2)


def take_step(policy: Generator, optimizer, s: Settings, update: int) -> float:
    """One optimizer step; the learning rate rises over --warm-up updates. -> the gradient's norm, not clipped.

    Without the warm-up the reward fell first: AdamW's early steps are all of full size, in directions of noise.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), float("inf"), error_if_nonfinite=True).item()
    for group in optimizer.param_groups:
        group["lr"] = s.lr * min(1.0, (update + 1) / s.warm_up)
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------
def arm_name(method: str, s: Settings) -> str:
    """The folder of a run: grpo-descore, dpo-gold, grpo-flow-grpo-random, ..."""
    kind = s.reward if s.reward in CONTROLS else "descore"
    return "-".join([method, *["flow-grpo"] * (s.noise == "flow-grpo" and method == "grpo"), kind])


def seed_folder(s: Settings) -> str:
    """OUT/seedK"""
    return os.path.join(s.out, f"seed{s.seed}")


def save_generator(path: str, generator: Generator, **more) -> None:
    """A generator with its latents, and whatever belongs to it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path, "wb") as file:
        torch.save({"shape": generator.shape, "weights": generator.state_dict(), **more}, file)


def load_generator(path: str) -> tuple[Generator, dict]:
    """-> the generator, and all that was saved with it. InputError: not there."""
    if not os.path.exists(path):
        raise InputError(f"{path}: is not there; first run `python -m lab.post_training base`, same --out and --seed.")
    kept = torch.load(path)
    generator = Generator(**kept["shape"])
    generator.load_state_dict(kept["weights"])
    return generator.eval(), kept


def post_train(method: str, s: Settings, progress=True) -> None:
    """--updates updates from the base, or from where the run of this name stopped.

    InputError: that run had other settings, another reward model or another base.
    """
    folder, base_path = os.path.join(seed_folder(s), arm_name(method, s)), os.path.join(seed_folder(s), "base.pt")
    path, settings = os.path.join(folder, "state.pt"), dataclasses.asdict(s) | {"method": method}
    base, _ = load_generator(base_path)
    base.requires_grad_(False)
    policy, log, store = copy.deepcopy(base).requires_grad_(True), [], []
    optimizer = torch.optim.AdamW(policy.parameters(), s.lr, betas=(0.9, 0.99), weight_decay=0.0)
    # What the files hold, not what they are called: `make demo` writes another reward model under the same name.
    made_from = {"base": content_of(base_path), "reward": s.reward if s.reward in CONTROLS else fingerprint(s.reward)}
    if os.path.exists(path):
        kept, state = load_generator(path)
        changed = [flag_of(n) for n, v in settings.items() if n not in FREE and state["settings"].get(n) != v]
        if "made_from" not in state and state["settings"]["reward"] != s.reward:  # a run of old kept the name alone
            changed.append("--reward")
        if changed := changed + exchanged(state, made_from):
            raise InputError(f"{path}: was run with other {', '.join(changed)}; delete its folder or change --out.")
        policy.load_state_dict(kept.state_dict())
        optimizer.load_state_dict(state["optimizer"])
        log, store = state["log"], state["store"]
    if len(log) >= s.updates:
        print(f"{folder}: {len(log)} updates are done")
        return
    score = Reward(s.reward, gold_judge(s.out, s.judge_steps, s.pool), s.seed)
    rendered = report.rendered_clips(s.eval_prompts)
    step = {"grpo": grpo_update, "dpo": dpo_update}[method]
    bar = tqdm(range(len(log), s.updates), desc=os.path.basename(folder), disable=not progress)
    for update in bar:
        begin = time.time()
        numbers = step(policy, base, optimizer, score, s, update, store)
        log.append({"update": update, **numbers, "seconds": time.time() - begin})
        if (update + 1) % s.curve_every == 0:
            fixed = report.evaluate(policy, score.judge, score, rendered, s.group, s.steps)
            log[-1]["fixed"] = {name: fixed[name] for name in report.CURVES}
        bar.set_postfix({name: f"{np.mean([line[name] for line in log[-5:]]):.3f}" for name in ("reward", "gold")})
        if (update + 1) % s.save_every == 0 or update + 1 == s.updates:
            save_generator(path, policy, settings=settings, made_from=made_from, log=log, store=store,
                           optimizer=optimizer.state_dict())
            write_jsonl(os.path.join(folder, "metrics.jsonl"), log)


def exchanged(state: dict, made_from: dict[str, str]) -> list[str]:
    """What a run was trained with and is no longer what `made_from` names, in words; runs of old did not keep it."""
    kept = state.get("made_from", {})
    return [f"weights of the {name}" for name, content in made_from.items() if kept.get(name, content) != content]


def make_base(s: Settings) -> None:
    """OUT/seedK/base.pt, and the gold judge. InputError: the folder's base had other settings."""
    path = os.path.join(seed_folder(s), "base.pt")
    settings = {"steps": s.base_steps, "wrong": s.wrong, "seed": s.seed, "pool": s.pool}
    gold_judge(s.out, s.judge_steps, s.pool)
    if os.path.exists(path):
        if settings | load_generator(path)[1]["settings"] != settings:  # older files did not keep the pool
            raise InputError(f"{path}: was trained with other --base-steps, --wrong or --pool; delete "
                             f"{seed_folder(s)} first.")
        print(f"{path}: is there")
        return
    generator, loss, kept = train_base(s.seed, s.base_steps, s.wrong, s.pool)
    save_generator(path, generator, settings=settings)
    count = sum(p.numel() for p in generator.parameters())
    print(f"{path}: {count:,} parameters, loss {loss:.4f}, latents keep {kept:.1%} of the variance")


def require_alike(runs: dict[int, dict[str, str]], proxy: str) -> None:
    """InputError unless the seeds of an arm had as many updates and the same settings: they are summed up. An arm that
    follows DeScore must have followed `proxy`: HACKED says that ITS reward rose.
    """
    first, own = {}, ("out", "save_every", "publish", "seed", "reward")  # own: of a seed, or without effect
    for arm, path, base in [(arm, path, arms["base"]) for arms in runs.values() for arm, path in arms.items()]:
        state = load_generator(path)[1]
        made_from = {"base": content_of(base)} | ({"reward": proxy} if arm.endswith("-descore") else {})
        if changed := exchanged(state, made_from):
            raise InputError(f"{path}: was run with other {', '.join(changed)} than those given; move its folder away.")
        now = state["settings"] | {"updates": len(state.get("log", []))}  # those made, not those that were asked for
        now |= {"base_steps": now.pop("steps")} if arm == "base" else {}
        other, expected = first.setdefault(arm, (path, now))
        if changed := [flag_of(name) for name in now if name not in own and now[name] != expected.get(name, now[name])]:
            raise InputError(f"{path}: has other {', '.join(changed)} than {other}; let it run to its end, or move one "
                             "of the two folders away.")


def measure(s: Settings) -> None:
    """Every generator in --out on the same prompts and start noise; kept, then summed up over the seeds.

    InputError: no --reward.
    """
    if s.reward in CONTROLS:
        raise InputError("--reward: measure needs the DeScore folder; the gold judge measures anyway.")
    judge, score, rendered = gold_judge(s.out, s.judge_steps, s.pool), None, report.rendered_clips(s.eval_prompts)
    measured, seeds, logs, pictures, proxy = {}, {}, {}, {}, fingerprint(s.reward)
    runs = report.find_runs(s.out)
    require_alike(runs, proxy)
    for seed, arms in runs.items():
        for arm, path in arms.items():
            generator, state = load_generator(path)
            kept = path.removesuffix(".pt") + "_measured.json"
            key = {"generator": content_of(path), "judge": content_of(os.path.join(s.out, "judge.pt")), "reward": proxy,
                   "prompts": s.eval_prompts, "group": s.group, "steps": s.steps}
            numbers = read(kept)
            if numbers.get("key") != key:
                score = score or Reward(s.reward, judge, seed)
                numbers = {"key": key, **report.evaluate(generator, judge, score, rendered, s.group, s.steps)}
                write_json(kept, numbers)
                print(f"seed {seed}, {arm}: proxy {numbers['proxy']:.3f}, gold {numbers['gold']:.3f}", flush=True)
            measured.setdefault(arm, []).append(numbers)
            seeds.setdefault(arm, []).append(seed)
            if arm != "base":
                logs.setdefault(arm, []).append(state["log"])
            pictures.setdefault(arm, generator)  # of the first seed
    minutes = {arm: [round(sum(line["seconds"] for line in log) / 60, 1) for log in kept] for arm, kept in logs.items()}
    result = {"group": s.group, "seeds": seeds, "measured": measured, "minutes": minutes}
    print(report.report(s.out, result, logs))
    report.draw_strip(os.path.join(s.out, "strip.png"), pictures, s.steps)
    if s.publish:
        report.publish(s.out)


def main(argv=None) -> None:
    """The first word is the command; all take the same flags."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else None
    s = parse(Settings, __doc__, argv[1:] if command else argv)
    if command is None:
        raise InputError(f"the first word must be a command: {', '.join(COMMANDS)}.")
    if s.out is None or (s.reward is None and command != "base"):
        raise InputError(f"{command}: needs --out{'' if command == 'base' else ' and --reward'}.")
    writable([s.out])
    if command != "measure":
        print(report.RULE, flush=True)  # before anything is known
    begin = time.time()
    if command == "base":
        make_base(s)
    elif command == "measure":
        measure(s)
    else:
        post_train(command, s)
    print(f"{command}: {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    cli(main)
