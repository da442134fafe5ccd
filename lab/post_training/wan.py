"""Post-training Wan-2.1 with DeScore as the reward: Flow-GRPO, LongCat-GRPO or Flow-DPO, on LoRA.

    WAN=lab.post_training.wan
    python -m $WAN --method grpo --reward runs/stage2/model --data prompts.txt --out runs/wan
    python -m $WAN --method dpo --data dpo.csv --out runs/wan           pairs of best_of.py --make-pairs
    torchrun --nproc_per_node 8 -m $WAN --method grpo --reward runs/stage2/model --data prompts.txt --out runs/wan

Out: the LoRA, for `WanPipeline.load_lora_weights`, metrics.jsonl, and state.pt: the same line started again goes on
after the last saving, with the result it would have had. The equations are lab/post_training/flow.py's, the policy's
loss is Eq. 7. Each rank holds a whole Wan and a whole reward model, makes the clips of its own prompts, and only the
LoRA's gradients are summed. One clip at a time, in sampling and in training: memory is that of one clip, and the same
kernels run twice, so that the replayed ratio is exactly 1.

Tested on a tiny random Wan on a CPU, one rank and two. NOT RUN: with Wan's weights, or on a GPU. Memory and time as
computed: lab/serve/README.md. Needs requirements-wan.txt.
"""

import collections
import dataclasses
import math
import os

import torch
import torch.distributed as dist

import data
import parallel
from lab.post_training import flow
from lab.post_training.wan_generator import FPS, WAN, Wan, open_pipeline
from losses import group_advantages
from model import DeScore
from plumbing.jobs import content_of, fingerprint, items_of, require_shared, task_seed
from plumbing.logs import read_metrics
from plumbing.settings import (
    InputError,
    arg,
    cli,
    first_line,
    flag_of,
    parse,
    require,
    writable,
    write_jsonl,
)
from plumbing.video import open_clip

# What may change when a run goes on: its length, and places. What --reward and --data hold may not (`read_state`)
FREE = ("wan", "data", "reward", "out", "updates", "save_every")


@dataclasses.dataclass
class Settings:
    """The flags. Defaults marked * are Flow-GRPO's or LongCat's; the others are ours, and none was tuned on Wan."""

    method: str | None = arg(None, "grpo or dpo", choices=["grpo", "dpo"])
    wan: str = arg(WAN, "Wan in diffusers' layout: a folder or its name on the hub")
    data: str | None = arg(None, "grpo: a text file, one prompt a line; dpo: a CSV of preference pairs")
    reward: str | None = arg(None, "grpo: a DeScore folder")
    out: str | None = arg(None, "folder for the LoRA and metrics.jsonl")
    think: bool = arg(True, "think before scoring; --no-think is fast")
    max_new_tokens: int = arg(4096, "CoT tokens at most", at_least=1)
    frames: int = arg(81, "frames of a clip: 4 n + 1", at_least=1)
    height: int = arg(480, "pixels, a multiple of 16", at_least=16)
    width: int = arg(832, "pixels, a multiple of 16", at_least=16)
    steps: int = arg(10, "sampling steps *", at_least=2)
    shift: float = arg(3.0, "how far the steps are moved towards noise; Wan: 3 at 480p, 5 at 720p", above=0)
    guidance: float = arg(5.0, "classifier-free guidance of the clips; 1: none, half the work", at_least=1)
    noise: str = arg("flow-grpo", "flow-grpo: all steps but the last are SDE steps; longcat: one early, shared start",
                     choices=list(flow.NOISES))
    group: int = arg(8, "clips per prompt", at_least=2)
    batch: int = arg(8, "prompts (grpo) or pairs (dpo) per update, over all ranks", at_least=1)
    updates: int = arg(100, "updates", at_least=1)
    passes: int = arg(1, "optimizer steps on the same clips; beyond 1 the clip range matters", at_least=1)
    clip: float = arg(1e-4, "range of the ratio, which is the D-th root of the true one *", above=0)
    kl: float = arg(0.0, "weight of the KL to the Wan that it began as", at_least=0)
    beta: float = arg(500.0, "dpo: weight of the implicit reward", above=0)
    lr: float = arg(1e-4, "learning rate of the LoRA", above=0)
    lora_r: int = arg(32, "rank of the LoRA; its alpha is twice that *", at_least=1)
    save_every: int = arg(1, "updates between savings of LoRA and state (.4 GB, seconds; an update takes minutes): "
                             "what comes after the last is lost with Ctrl-C", at_least=1)
    seed: int = arg(0, "of clips and LoRA")


# ---- The two updates -----------------------------------------------------------------------------------------
def grpo_update(wan: Wan, items: list[tuple[int, str]], score, optimizer, s: Settings, ranks) -> dict[str, float]:
    """COLLECTIVE: clips, rewards, advantages, optimizer steps. items: (number, prompt), the same on all ranks.

    score(clips, prompts) -> rewards (G,). One that fails must raise: a made-up number would poison its whole group.
    InputError: a reward that is not finite.
    """
    groups, rewards, longcat = [], [], s.noise == "longcat"
    for number, prompt in ranks.share(items):
        # 1. G clips. LongCat: one start noise for all of them
        noisy = wan.noisy_steps(number)
        starts = [task_seed(s.seed, number, "start", 0 if longcat else k) for k in range(s.group)]
        clips = [wan.sample(prompt, start, task_seed(s.seed, number, k), noisy) for k, start in enumerate(starts)]
        groups.append([trail for _, trail in clips])
        # 2. Their rewards
        rewards.append(score([wan.decode(latents) for latents, _ in clips], [prompt] * s.group))
        if not rewards[-1].isfinite().all():
            raise InputError(f"a clip of {prompt[:60]!r} has a reward that is not finite; nothing is trained on it.")
    # 3. Advantages. LongCat divides by the widest group of ALL ranks
    everyone = torch.tensor(ranks.gather_objects(torch.stack(rewards).tolist()))  # (S of all ranks, G)
    advantages = (flow.shared_spread if longcat else group_advantages)(everyone).to(wan.device)
    advantages = advantages[len(groups) * ranks.rank :][: len(groups)]  # (S, G)
    # 4. Eq. 7, one step of one clip at a time; divided by all steps of all ranks
    count, total = len(items) * s.group * len(noisy), collections.Counter()
    for _ in range(s.passes):
        for (_, prompt), trails, row in zip(ranks.share(items), groups, advantages):
            for trail, advantage in zip(trails, row):
                for step in trail:
                    numbers = wan.grpo_step_loss(prompt, step, advantage[None], count)
                    numbers["loss"].backward()
                    total.update({name: value.item() / s.passes for name, value in numbers.items()})
        norm = take_step(wan, optimizer, ranks)
    spread = everyone.std(dim=1).mean().item()
    return {"reward": everyone.mean().item(), "group_std": spread, **ranks.sum(total), "grad_norm": norm}


def dpo_update(wan: Wan, items: list[tuple[int, data.PreferencePair]], optimizer, s: Settings, ranks):
    """COLLECTIVE: one optimizer step on a batch of pairs. The videos are encoded anew each time: no cache to fill.

    InputError: one is damaged; its line in --data.
    """
    total = collections.Counter()
    for number, pair in ranks.share(items):
        chosen, rejected = pair.videos if pair.label > 0 else pair.videos[::-1]
        try:
            latents = wan.encode(chosen), wan.encode(rejected)
        except InputError as error:  # damaged further on: `check_clips` reads no frame but the first
            raise InputError(f"{s.data}, line {pair.line}: {error}") from error
        numbers = wan.dpo_pair_loss(pair.prompt, *latents, task_seed(s.seed, number))
        (numbers["loss"] / len(items)).backward()
        total.update({name: value.item() / len(items) for name, value in numbers.items()})
    return {**ranks.sum(total), "grad_norm": take_step(wan, optimizer, ranks)}


def take_step(wan: Wan, optimizer, ranks) -> float:
    """COLLECTIVE: sums the gradients over ranks (the losses are divided by counts of all), clips at norm 1, steps.

    InputError, on all ranks, before any weight is touched: the norm is not finite.
    """
    for parameter in wan.trained:
        if ranks.world > 1:
            dist.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(wan.trained, 1.0).item()
    if not math.isfinite(norm):  # of the sum, so every rank finds the same
        raise InputError(f"the gradient's norm is {norm}, so no step is taken, and the same line would come to it "
                         "again; take a lower --lr, and another --out.")
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ---- The script -----------------------------------------------------------------------------------------------
def check(s: Settings, ranks) -> None:
    """InputError for flags that make no sense, before anything large is read."""
    require(s, method="grpo or dpo", data="prompts or pairs", out="a folder")
    if s.method == "grpo":
        require(s, reward="a DeScore folder")
    if s.frames % 4 != 1 or s.height % 16 or s.width % 16:
        raise InputError("--frames must be 4 n + 1 (81), --height and --width multiples of 16.")
    if s.batch % ranks.world:
        raise InputError(f"--batch {s.batch} must be a multiple of the {ranks.world} ranks.")


def read_items(s: Settings) -> list:
    """Prompts, or pairs with a winner: as many as the updates come to.

    InputError: none, or another kind of file than the method takes.
    """
    if s.method == "dpo":
        items = [pair for pair in data.read_pairs(s.data) if pair.label]
    else:
        if s.data.endswith(".csv"):  # its header would be the first prompt
            raise InputError(f"{s.data}: is a CSV; --method grpo takes a text file, one prompt a line.")
        try:
            with open(s.data, encoding="utf-8-sig") as file:
                items = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{s.data}: cannot be read as a text file of prompts ({first_line(error)}).") from error
    if not items:
        raise InputError(f"{s.data}: holds nothing to train on.")
    return items[: s.updates * s.batch]


def check_clips(pairs: list[data.PreferencePair], s: Settings, ranks) -> None:
    """COLLECTIVE: opens all clips now, shared out over the ranks: the last pair's turn may come after hours.

    InputError, on all ranks: the first line with a clip that is broken, too short, or of another shape than Wan's.
    """
    problems = []
    for video, _, line in ranks.progress(ranks.share(items_of(pairs)), desc="checking clips"):
        try:
            clip = open_clip(video)
            if clip.seconds < (s.frames - 0.5) / FPS:
                raise InputError(f"{video}: lasts {clip.seconds:.2f} s, and --frames {s.frames} at {FPS:g} a second "
                                 f"need {s.frames / FPS:.2f} s; lower it, or leave the pair out.")
            if abs(clip.width * s.height / (clip.height * s.width) - 1) > 0.05:  # 16:9 for 832 x 480 is off by .026
                raise InputError(f"{video}: has {clip.width} x {clip.height} pixels and would be squashed; give "
                                 f"--width and --height (now {s.width}, {s.height}) its shape, or leave the pair out.")
        except InputError as error:
            problems.append((line, str(error)))
    if problems := sorted(ranks.gather_objects(problems)):
        raise InputError(f"{s.data}, line {problems[0][0]} (the first of {len(problems)} clips): {problems[0][1]}")


def read_state(s: Settings, made_from: dict, ranks) -> dict | None:
    """COLLECTIVE: OUT/state.pt, None if there is none yet. made_from: {flag: what tells its content from another}.

    InputError: it had other settings, another reward model or other data; not all ranks see one OUT; OUT holds another
    kind of run.
    """
    require_shared(s.out, ranks)
    path = os.path.join(s.out, "state.pt")
    if not os.path.exists(path):
        if any(not {"step", "grad_norm"} <= line.keys() for line in read_metrics(s.out)):
            raise InputError(f"{s.out}: the metrics.jsonl in it is another kind of run's; give another --out.")
        return None
    state, now = torch.load(path, map_location="cpu"), dataclasses.asdict(s)
    changed = [flag_of(name) for name in now if name not in FREE and state["settings"].get(name) != now[name]]
    kept = state.get("made_from", made_from)  # older states have none
    changed += [f"content of {flag_of(name)}" for name, content in made_from.items() if kept.get(name) != content]
    if changed:
        raise InputError(f"{path}: was run with other {', '.join(changed)}; give another --out.")
    return state


def main(argv=None) -> None:
    """Update after update, LoRA and state every --save-every."""
    s = parse(Settings, __doc__, argv)
    ranks = parallel.start(s.seed)
    check(s, ranks)
    items, dtype = read_items(s), torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    writable([s.out])
    made_from = {"data": content_of(s.data), "reward": fingerprint(s.reward) if s.method == "grpo" else None}
    state = read_state(s, made_from, ranks)  # before minutes of reading Wan
    if s.method == "dpo" and not (state and state["done"] >= s.updates):
        check_clips(items, s, ranks)
    pipe = open_pipeline(s.wan, dtype)
    # All that this rank will come to: --batch is a multiple of the ranks, so it has the same place in each batch
    mine = [items[number % len(items)] for number in ranks.share(range(s.updates * s.batch))]
    wan = Wan(pipe, [item.prompt if s.method == "dpo" else item for item in mine], s, ranks.device)
    model = DeScore.from_pretrained(s.reward, ranks.device, dtype).eval() if s.method == "grpo" else None

    def score(clips, prompts):
        return model.reward(clips, prompts, s.think, s.max_new_tokens, source_fps=FPS).cpu()

    optimizer = torch.optim.AdamW(wan.trained, lr=s.lr, weight_decay=0.0)
    done = wan.load(state, optimizer) if state else 0
    if ranks.is_main:  # lines behind the last saving: those updates are made again
        write_jsonl(os.path.join(s.out, "metrics.jsonl"), [m for m in read_metrics(s.out) if m["step"] <= done])
    for update in range(done + 1, s.updates + 1):
        numbers = range((update - 1) * s.batch, update * s.batch)
        batch = [(number, items[number % len(items)]) for number in numbers]
        if s.method == "grpo":
            metrics = grpo_update(wan, batch, score, optimizer, s, ranks)
        else:
            metrics = dpo_update(wan, batch, optimizer, s, ranks)
        ranks.print(f"update {update}", *(f"{name} {value:.4g}" for name, value in metrics.items()))
        if ranks.is_main:
            write_jsonl(os.path.join(s.out, "metrics.jsonl"), [{"step": update, **metrics}], add=True)
            if update % s.save_every == 0 or update == s.updates:
                wan.save(s.out, optimizer, update, made_from)
    ranks.finish()


if __name__ == "__main__":
    cli(main)
