"""lab/post_training and its parts: the updates push the right way, resume to the bit, and never eat a failed score."""

import json
import math
import os
import pathlib
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lab.post_training import __main__ as post_training
from lab.post_training import flow, report, world
from lab.post_training.generator import C, Generator, P, from_patches, sample, to_patches
from lab.post_training.world import Judge, Reward, draw_asked, noise_of, render, rng_of, to_unit
from plumbing.settings import InputError
from toy.world import UNSEEN

SMALL = {"prompts": 2, "group": 4, "steps": 4, "warm_up": 1, "seed": 5, "batch_pairs": 4}


@pytest.fixture(scope="module")
def base():
    """A tiny generator, not trained but no longer 0 everywhere, with latents of real clips."""
    torch.manual_seed(0)
    generator = Generator(width=32, layers=1, heads=2)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    generator.latents.fit(to_unit(render(draw_asked(rng_of(0), 64), rng_of(1))))
    return generator.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(1)
    return Judge().eval().requires_grad_(False)


class Brightness(Reward):
    """A reward whose best clip is known: the brighter the better."""

    def __call__(self, asked, clips, *name):
        return clips.mean((1, 2, 3, 4))


def policy_of(base, lr=1e-3):
    policy = Generator(**base.shape)
    policy.load_state_dict(base.state_dict())
    return policy, torch.optim.AdamW(policy.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)


# -- the world and the latents -----------------------------------------------------------------------------------
def test_prompts_and_clips_are_the_toys_and_named_by_the_seed():
    asked = draw_asked(rng_of("a", 1), 100)
    assert torch.equal(asked, draw_asked(rng_of("a", 1), 100))
    assert not torch.equal(asked, draw_asked(rng_of("a", 2), 100))
    assert not UNSEEN & {world.wish(row)["subject"] for row in asked}
    clip = render(asked[:1], rng_of(0))
    assert clip.shape == (1, 8, 32, 32, 3) and clip.dtype == torch.uint8


def test_patches_are_undone_and_pca_keeps_what_it_says():
    clips = to_unit(render(draw_asked(rng_of(2), 40), rng_of(3)))
    patches = to_patches(clips)
    assert patches.shape == (40, P, 384) and torch.equal(from_patches(patches), clips)
    first = clips[0, :2, :8, 8:16].flatten()  # frames 0 and 1, the second patch of the first row
    assert torch.equal(patches[0, 1], first)
    latents = Generator(width=32, layers=1, heads=2).latents
    kept = latents.fit(clips)
    z = latents.encode(clips)
    assert z.shape == (40, P, C) and z.square().mean().item() == pytest.approx(1, abs=1e-3)
    # what C components lose is the rest of the variance
    flat = patches.flatten(0, 1)
    lost = ((z * latents.scale) @ latents.basis.T + latents.mean - patches).square().mean() / flat.var(0).mean()
    assert lost.item() == pytest.approx(1 - kept, abs=1e-4)


# -- sampling ----------------------------------------------------------------------------------------------------
def test_sampling_without_noise_is_euler_to_the_last_bit(base):
    asked, start = draw_asked(rng_of(4), 3), noise_of((3, P, C), "start")
    x, t = start, 1.0
    with torch.no_grad():
        for k in range(4):
            t, t_next = 1 - k / 4, 1 - (k + 1) / 4
            x = x + (t_next - t) * base.velocity(x, t, asked)
    out, trail = sample(base, asked, start, 4)
    assert torch.equal(out, x) and not trail
    out, trail = sample(base, asked, start, 4, noisy={0, 1, 2}, noise={"a": 0.0})
    assert torch.equal(out, x) and not trail


def test_longcat_has_one_early_step_and_one_start_per_prompt(base, judge):
    s = post_training.Settings(**SMALL, noise="longcat")
    early = [flow.noisy_steps("longcat", 4, rng_of(0, u).integers) for u in range(40)]
    assert set.union(*early) == {0, 1} and {len(steps) for steps in early} == {1}  # the first half of 4
    asked, latents, trail, *_ = post_training.make_clips(base, Brightness("gold", judge, 0), s, 0, {1})
    assert len(trail) == 1 and torch.equal(trail[0].x[0], trail[0].x[3]) and not torch.equal(latents[0], latents[3])
    assert not torch.equal(trail[0].x[0], trail[0].x[4])  # another prompt, another start
    assert flow.noisy_steps("flow-grpo", 4, rng_of(0).integers) == {0, 1, 2}  # never the last


# -- the updates -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("noise, kl", [("flow-grpo", 0.0), ("flow-grpo", 0.1), ("longcat", 0.0)])
def test_before_the_first_step_the_replayed_ratio_is_exactly_1(base, judge, noise, kl):
    s = post_training.Settings(**SMALL, noise=noise, kl=kl, minis=1)
    policy, optimizer = policy_of(base)
    log = post_training.grpo_update(policy, base, optimizer, Brightness("gold", judge, 0), s, 0, [])
    assert log["ratio_off"] == 0.0 and log["clipped"] == 0.0 and log.get("kl", 0.0) == 0.0 and log["grad_norm"] > 0
    more = post_training.Settings(**SMALL, noise="flow-grpo", minis=3)
    policy, optimizer = policy_of(base)
    logged = post_training.grpo_update(policy, base, optimizer, Brightness("gold", judge, 0), more, 0, [])
    assert logged["ratio_off"] > 0


def test_dpo_starts_at_ln_2_and_ranks_by_the_reward(base, judge):
    s, store = post_training.Settings(**SMALL, minis=1, pairs=2), []
    policy, optimizer = policy_of(base)
    score = Brightness("gold", judge, 0)
    log = post_training.dpo_update(policy, base, optimizer, score, s, 0, store)
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6) and log["winner_error_rise"] == 0.0
    bright = [[score(None, base.latents.decode(clip[None])).item() for clip in pair[1:]] for pair in store]
    assert len(store) == 4 and all(better > worse for better, worse in bright)
    assert bright[0][0] > bright[1][0] and bright[0][1] < bright[1][1]  # best and worst, then second best and worst


class Equal(Reward):
    """Says nothing."""

    def __call__(self, asked, clips, *name):
        return torch.full((len(asked),), 0.86)


def test_equal_rewards_change_nothing(base, judge):
    s, store = post_training.Settings(**SMALL), []
    policy, optimizer = policy_of(base)
    post_training.dpo_update(policy, base, optimizer, Equal("gold", judge, 0), s, 0, store)
    assert not store
    post_training.grpo_update(policy, base, optimizer, Equal("gold", judge, 0), s, 0, store)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), base.parameters()))


@pytest.mark.parametrize("method, noise", [("grpo", "flow-grpo"), ("grpo", "longcat"), ("dpo", "flow-grpo")])
def test_the_reward_rises(base, judge, method, noise):
    """Brightness on fresh clips of the ODE, before and after: a sign that is turned anywhere makes it fall."""
    s = post_training.Settings(**SMALL | {"group": 8, "batch_pairs": 16}, noise=noise, lr=2e-3)
    policy, optimizer = policy_of(base)
    score, update, store = Brightness("gold", judge, 0), getattr(post_training, f"{method}_update"), []
    for k in range(12):
        update(policy, base, optimizer, score, s, k, store)
    asked, start = draw_asked(rng_of("fresh"), 16), noise_of((16, P, C), "fresh")
    before, after = (score(asked, g.latents.decode(sample(g, asked, start, 4)[0])) for g in (base, policy))
    assert (after - before).mean() > 0.02 and (after > before).float().mean() > 0.8


# -- rewards -----------------------------------------------------------------------------------------------------
def test_descore_thinks_and_a_failed_score_raises(base, judge, tiny_model_dir, monkeypatch):
    score, asked = Reward(tiny_model_dir, judge, 0), draw_asked(rng_of(6), 2)
    clips, thought = to_unit(render(asked, rng_of(7))), []
    think = score.model.think
    monkeypatch.setattr(score.model, "think", lambda *a, **k: thought.append(len(a[0])) or think(*a, **k))
    assert score(asked, clips).shape == (2,) and thought == [2]
    with torch.no_grad():
        score.model.head.weight.fill_(float("nan"))
    policy, optimizer = policy_of(base)
    for update in (post_training.grpo_update, post_training.dpo_update):
        with pytest.raises(InputError, match="no finite reward"):
            update(policy, base, optimizer, score, post_training.Settings(**SMALL | {"group": 2, "prompts": 1}), 0, [])
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), base.parameters()))


# -- measures, by hand -------------------------------------------------------------------------------------------
def test_measures_by_hand():
    clip = torch.zeros(1, 2, 2, 2, 3)
    clip[0, 1, 0, 0] = 1.0  # one of 4 pixels lights up in the second of two frames
    assert report.dynamic_degree(clip) == pytest.approx(1 / 4)
    assert report.sharpness(clip) == pytest.approx(1 / 4)  # one of 4 neighbours each way, over both frames
    assert report.diversity(torch.cat([clip, clip]), 2) == 0.0
    assert report.diversity(torch.cat([clip, clip + 2]), 2) == pytest.approx(2)
    still = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    turned = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 5.0]]])
    assert report.consistency(still) == pytest.approx(1)
    assert report.consistency(turned) == pytest.approx(0.25)  # (0 + 0) / 2 and (0 + 1) / 2
    # ranks within a prompt: 1 and -1; the third prompt has no spread in gold and is left out
    rewards = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    gold = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.5, 0.5, 0.5]])
    assert report.agreement(rewards[:1], gold[:1]) == pytest.approx(1)
    assert report.agreement(rewards, gold) == pytest.approx(0)
    assert report.agreement(rewards[2:], gold[2:]) is None
    assert report.ranks([5, 1, 5]).tolist() == [2.5, 1, 2.5]
    values = {"proxy": np.array([[1.0, 3.0], [2.0, 0.0]]), "gold": np.array([[0.5, 0.25], [0.0, 1.0]])}
    assert report.best_of(values) == {"proxy": {"proxy": 2.5, "gold": 0.125}, "gold": {"proxy": 0.5, "gold": 0.75}}


def numbers(gold, proxy=1.0, **beside):
    return {"gold": gold, "proxy": proxy} | dict.fromkeys(report.BESIDE, 1.0) | beside


def test_the_verdict_follows_the_rule():
    before, random = [numbers(0.5, 1.0)] * 3, [numbers(0.4)] * 3


    def said(*golds, proxy=2.0, random=random):
        return report.verdict(before, [numbers(gold, proxy) for gold in golds], random)

    rose = said(0.60, 0.61, 0.62)  # mean .11, s .01: .11 -+ 4.303 * .01 / sqrt 3
    assert rose == ("ROSE; nothing fell; not hacked; gold alignment +0.110 (+0.100, +0.110, +0.120), "
                    "95 % [+0.085, +0.135]")
    # rises .01, .1, .01: mean .04, standard error .03: it may be chance, and may be real; no word for either
    chance = said(0.51, 0.60, 0.51)
    assert chance.startswith("can't tell whether it rose; nothing fell; can't tell whether it is hacked;")
    assert chance.endswith("95 % [-0.089, +0.169]")
    assert said(0.50, 0.501, 0.499).startswith("did not rise; nothing fell; HACKED")  # a rise of .03 is ruled out
    assert said(0.40, 0.41, 0.42).startswith("did not rise; nothing fell; HACKED")
    assert said(0.40, 0.41, 0.42, proxy=1.0).startswith("did not rise; nothing fell; not hacked")  # no reward rose
    after = [numbers(0.6, 2.0, diversity=0.85, sharpness=0.95)] * 3
    assert "FELL: diversity;" in report.verdict(before, after, random)
    shaky = [numbers(0.6, 2.0, diversity=value) for value in (0.4, 1.0, 1.1)]  # a sixth less, but surely?
    assert "nothing fell" in report.verdict(before, shaky, random)
    assert said(0.60, 0.61, 0.62, random=[numbers(0.7)] * 3).startswith("did not rise; nothing fell; not hacked")
    assert said(0.60, 0.61, 0.62, random=[numbers(g) for g in (0.4, 0.6, 0.65)]).startswith("can't tell whether it")
    assert report.verdict(before[:2], after[:2], random[:2]).startswith("no verdict")
    assert report.verdict(before, after, []).startswith("no verdict")


# -- the script --------------------------------------------------------------------------------------------------
FLAGS = ["--pool", "32", "--base-steps", "1", "--judge-steps", "2", "--prompts", "2", "--group", "2", "--steps", "3",
         "--eval-prompts", "2", "--minis", "2", "--batch-pairs", "2", "--curve-every", "2"]


def state(out, arm):
    return torch.load(os.path.join(out, "seed0", arm, "state.pt"))


def measured(out, arm):
    with open(os.path.join(out, "seed0", f"{arm}_measured.json"), encoding="utf-8") as file:
        return json.load(file)


def test_the_whole_script_resumes_to_the_bit(tmp_path, tiny_model_dir, capsys):
    out = str(tmp_path / "post")
    flags = ["--out", out, *FLAGS]
    post_training.main(["base", *flags])
    assert capsys.readouterr().out.startswith("The rule of the verdict.")
    for method, reward in (("grpo", "random"), ("dpo", "random")):  # a random reward: never equal
        arm = f"{method}-{reward}"
        post_training.main([method, *flags, "--reward", reward, "--updates", "2"])
        whole = state(out, arm)
        os.remove(os.path.join(out, "seed0", arm, "state.pt"))
        for updates in ("1", "2"):
            post_training.main([method, *flags, "--reward", reward, "--updates", updates])
        again = state(out, arm)
        assert all(torch.equal(whole["weights"][name], again["weights"][name]) for name in whole["weights"])
        assert [line["reward"] for line in whole["log"]] == [line["reward"] for line in again["log"]]
        assert ["fixed" in line for line in again["log"]] == [False, True]  # --curve-every 2
        with pytest.raises(InputError, match="--lr"):
            post_training.main([method, *flags, "--reward", reward, "--updates", "3", "--lr", "1e-3"])
    post_training.main(["measure", *flags, "--reward", tiny_model_dir])
    before = measured(out, "base")
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")  # another reward, the same generators
    head = other / "reward_head" / "head.safetensors"
    save_file({name: -value for name, value in load_file(head).items()}, head)
    post_training.main(["measure", *flags, "--reward", str(other)])
    assert measured(out, "base")["proxy"] == pytest.approx(-before["proxy"], abs=5) != before["proxy"]
    post_training.main(["grpo", *flags, "--reward", tiny_model_dir, "--updates", "1", "--prompts", "1"])
    post_training.main(["measure", *flags, "--reward", tiny_model_dir])
    assert measured(out, "base") == before
    # A run belongs to the reward and the base that it was trained with, not to their names
    with pytest.raises(InputError, match="grpo-descore/state.pt: was run with other weights of the reward than"):
        post_training.main(["measure", *flags, "--reward", str(other)])
    more = ["grpo", *flags, "--updates", "2", "--prompts", "1", "--reward"]
    with pytest.raises(InputError, match="grpo-descore/state.pt: was run with other weights of the reward;"):
        post_training.main([*more, str(other)])
    path = os.path.join(out, "seed0", "grpo-descore", "state.pt")
    trained = pathlib.Path(path).read_bytes()
    torch.save({name: v for name, v in torch.load(path).items() if name != "made_from"}, path)  # as it was kept of old
    with pytest.raises(InputError, match="grpo-descore/state.pt: was run with other --reward;"):
        post_training.main([*more, str(other)])
    pathlib.Path(path).write_bytes(trained)
    path = os.path.join(out, "seed0", "base.pt")
    kept, of_base = pathlib.Path(path).read_bytes(), torch.load(path)
    torch.save(of_base | {"weights": {name: -value for name, value in of_base["weights"].items()}}, path)
    with pytest.raises(InputError, match="was run with other weights of the base;"):
        post_training.main([*more, tiny_model_dir])
    with pytest.raises(InputError, match="was run with other weights of the base than"):
        post_training.main(["measure", *flags, "--reward", tiny_model_dir])
    pathlib.Path(path).write_bytes(kept)
    os.makedirs(os.path.join(out, "seed1.old"))  # put aside by hand
    shutil.copytree(os.path.join(out, "seed0"), os.path.join(out, "seed1"))
    path = os.path.join(out, "seed1", "base.pt")
    torch.save(of_base | {"settings": of_base["settings"] | {"steps": 9}}, path)
    with pytest.raises(InputError, match="seed1/base.pt: has other --base-steps than"):
        post_training.main(["measure", *flags, "--reward", tiny_model_dir])
    torch.save(of_base | {"settings": of_base["settings"] | {"newer": 1}}, path)  # and the other's file lacks it
    with pytest.raises(InputError, match="seed1/dpo-random/state.pt: was run with other weights of the base"):
        post_training.main(["measure", *flags, "--reward", tiny_model_dir])
    pathlib.Path(path).write_bytes(kept)
    half = state(out, "grpo-random")
    for change, flag in (({"log": half["log"][:1]}, "--updates"),
                         ({"settings": half["settings"] | {"lr": 1.0}}, "--lr")):
        torch.save({**half, **change}, os.path.join(out, "seed1", "grpo-random", "state.pt"))
        with pytest.raises(InputError, match=f"seed1/grpo-random/state.pt: has other {flag} than"):
            post_training.main(["measure", *flags, "--reward", tiny_model_dir])
    with pytest.raises(InputError, match="--pool"):
        post_training.main(["base", *flags, "--pool", "128"])
    text = (tmp_path / "post" / "results.md").read_text(encoding="utf-8")
    assert "| no training, best of 2 by gold | 1 |" in text and "grpo-descore: no verdict" in text
    assert {"post_training.png", "strip.png", "judge.pt"} <= set(os.listdir(out))


def test_the_page_shows_what_its_json_holds():
    with open(report.ROOT / "lab/post_training/post_training.json", encoding="utf-8") as file:
        result = json.load(file)
    page = (report.ROOT / report.PAGE).read_text(encoding="utf-8")
    assert report.filled(page, result) == page
    assert {"base", "grpo-descore", "dpo-descore", "grpo-random", "grpo-gold"} <= result["measured"].keys()
    assert all(len(numbers) == 3 for numbers in result["measured"].values())  # seeds


@pytest.mark.parametrize("words, message", [
    ([], "the first word must be a command"), (["grpo", "--out", "x"], "needs --out and --reward"),
    (["measure", "--out", "x", "--reward", "gold"], "measure needs the DeScore folder"),
    (["dpo", "--out", "x", "--reward", "gold"], "run `python -m lab.post_training base`"),
])
def test_bad_flags_are_one_sentence(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        post_training.main(words)
