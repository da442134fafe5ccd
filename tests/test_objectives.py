"""Which loss does an update descend, and which way? Both stages through their own loops, not equation by equation.

`test_losses.py` shows that each equation is right. Here: that the loops feed it the right numbers, in the right order,
with the right sign and weight. A loop that trains the wrong way round still runs, logs and saves.
"""

import csv
import dataclasses
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import cold_start
import data
import grpo
import parallel
from layout import lay_out
from model import DeScore
from plumbing import logs
from rules import DIMENSIONS
from tests.conftest import judge

TRUTH = dict.fromkeys(DIMENSIONS, "2")
COTS = [[[70, 71, 72, 73], [80], [90, 91]], [[92, 93, 94], [75, 76, 77, 78, 79], [81]]]  # [video][G = 3] token ids
ADVANTAGES = torch.tensor([[1.0, -0.6, -0.4], [-1.1, 0.3, 0.8]])


# -- stage 1 ----------------------------------------------------------------------------------------------------------
def stage_1(base_dir, pairs, labels, out, **more):
    """Runs the script on pairs with the CoTs "one" and "two", training query and head alone: enough for a direction."""
    out.mkdir()
    with open(out / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["videos", "prompt", "CoT_A", "CoT_B", "GSB"])
        writer.writerows([list(pair.videos), pair.prompt, "one", "two", label] for pair, label in zip(pairs, labels))
    flags = {"model": base_dir, "data": out / "pairs.csv", "out": out, "mask_probability": 0, "workers": 0,
             "train": "head"}
    words = [str(word) for name, value in (flags | more).items() for word in ("--" + name.replace("_", "-"), value)]
    cold_start.main([*words, "--no-train-vision", "--no-gradient-checkpointing"])
    return logs.read_metrics(str(out))


@pytest.mark.parametrize("loss", ["bt", "btt"])
def test_stage_1_raises_the_winner_whichever_side_it_is_on(world, base_dir, tmp_path, capsys, loss):
    """Eq. 3: -log σ(r_w - r_l) is lowered by raising r_w - r_l. The winner w is A where the label says A, else B.

    The script learns three pairs by heart, won by A, won by B and a tie; then we score them with the model it wrote.
    Plain BT leaves the tie out; Rao and Kupper's pulls its two rewards together.
    """
    pairs, labels, count = data.read_pairs(world["train_cold_start"])[:3], ("A", "B", "same"), 2 if loss == "bt" else 3
    steps = stage_1(base_dir, pairs, labels, tmp_path / "out", loss=loss, batch_pairs=count, epochs=8, lr=3e-2)
    assert loss == "btt" or "2 pairs; 1 ties left out" in capsys.readouterr().out
    model = DeScore.from_pretrained(str(tmp_path / "out" / "model"))
    prompts = [pair.prompt for pair in pairs]
    one, two = (data.encode_cot(model.processor.tokenizer, text) for text in ("one", "two"))
    r_a = model.score(model.encode([pair.video_a for pair in pairs], prompts), [one] * 3)
    r_b = model.score(model.encode([pair.video_b for pair in pairs], prompts), [two] * 3)
    won_by_a, won_by_b, tie = (r_a - r_b).tolist()
    assert won_by_a > 1 and won_by_b < -1
    assert loss == "bt" or abs(tie) < 1
    assert steps[-1]["accuracy"] == 1.0 and steps[-1]["margin"] > 1 and steps[-1]["loss"] < steps[0]["loss"] / 2
    # The loss is averaged over the batch, however that is cut into micro-batches.
    how = {"loss": loss, "batch_pairs": count, "micro_pairs": count, "max_steps": 1}
    (at_once,) = stage_1(base_dir, pairs, labels, tmp_path / "at once", **how)
    for name in ("loss", "grad_norm_total"):
        assert steps[0][name] == pytest.approx(at_once[name], rel=1e-4), name


def test_stage_1_obeys_its_settings(world, base_dir, tmp_path, monkeypatch):
    """A coin per pair AND epoch hides the CoT; the rate rises, then stays; bounded gradients; frames as asked for."""
    hidden, norms, sampled, score, sample = [], [], set(), cold_start.score_pairs, data.sample_frames

    def note_masks(model, items):
        hidden.extend((pair.line, not any(pair.cots)) for pair, _ in items)
        return score(model, items)

    def note_norm(optimizer, *_):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())

    def note_sampling(path, fps, max_pixels, **more):
        sampled.add((fps, max_pixels))
        return sample(path, fps, max_pixels, **more)

    monkeypatch.setattr(cold_start, "score_pairs", note_masks)
    monkeypatch.setattr(data, "sample_frames", note_sampling)
    hook = register_optimizer_step_pre_hook(note_norm)
    pairs = data.read_pairs(world["train_cold_start"])[:4]
    how = {"batch_pairs": 2, "epochs": 4, "mask_probability": 0.5, "lr": 1e-3, "warmup": 0.5, "max_grad_norm": 1e-3}
    steps = stage_1(base_dir, pairs, "ABAB", tmp_path / "out", fps=1, max_pixels=4096, **how)
    hook.remove()
    assert [step["masked_share"] for step in steps] == [(hidden[i][1] + hidden[i + 1][1]) / 2 for i in range(0, 16, 2)]
    by_pair = {line: [mask for other, mask in hidden if other == line] for line, _ in hidden}
    assert len(by_pair) == 4 and any(len(set(masks)) == 2 for masks in by_pair.values())  # it changes between epochs
    assert len({tuple(masks) for masks in by_pair.values()}) > 1  # and pairs differ within one
    assert [step["lr"] for step in steps] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    assert max(norms) < 1.001e-3 < min(step["grad_norm_total"] for step in steps)
    assert sampled == {(1.0, 4096)}


# -- stage 2 ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def settings():
    return grpo.Settings(rollouts=3, batch_pairs=1, mini_pairs=1, kl_coef=0.0, bt_coef=0.0, max_grad_norm=1e9)


@pytest.fixture
def rollouts(world, processor):
    """A pair that A has won, and its rollouts with advantages as if judged."""
    pair = dataclasses.replace(data.read_pairs(world["train_rl"])[0], label=1)
    ((_, prefixes),) = data.take(data.EncodedPairs([pair], processor), [0])
    return grpo.PairRollouts(pair, prefixes, COTS, advantages=ADVANTAGES)


def update(model, rollouts, settings, reference=None, more=()):
    """One update at learning rate 0, of one pair or of several.

    Returns {parameter: the gradient that the optimizer got} and what is logged.
    """
    model.make_trainable("full", vision=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    gradients = {}

    def note(*_):
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(note)
    return gradients, grpo.update(model, reference, optimizer, [rollouts, *more], settings, parallel.Ranks())


def rewards_one_by_one(model, rollouts):
    """(2, G): the head's reward of each rollout, each in a forward of its own."""
    with torch.no_grad():
        return torch.stack([torch.cat([model(lay_out(model.backbone, [prefix], [[cot]])).rewards for cot in row])
                            for prefix, row in zip(rollouts.prefixes, rollouts.cots)])


def dot(one, two):
    return sum((one[name] * two[name]).sum() for name in one).item()


def test_eq10_pairs_rollout_i_of_the_winner_with_rollout_i_of_the_loser(rollouts, model, settings):
    """Eq. 10: mean over i of -log σ(r_w,i - r_l,i). The order of B's rollouts matters, and so does who has won."""
    settings = dataclasses.replace(settings, bt_coef=1.0)

    def by_hand(winner, loser):
        return sum(math.log(1 + math.exp(l - w)) for w, l in zip(winner.tolist(), loser.tolist())) / 3

    for_two_videos = by_hand(*rewards_one_by_one(model, rollouts))
    assert update(model, rollouts, settings)[1]["bt_loss"] == pytest.approx(for_two_videos, rel=1e-4)

    # From here one video twice: only the CoTs differ, so margins are small and of both signs.
    rollouts = grpo.PairRollouts(rollouts.pair, [rollouts.prefixes[0]] * 2, COTS, advantages=ADVANTAGES)
    r_a, r_b = rewards_one_by_one(model, rollouts)
    gradients, logged = update(model, rollouts, settings)
    assert logged["bt_loss"] == pytest.approx(by_hand(r_a, r_b), rel=1e-4)

    order = [1, 2, 0]  # B's rollouts in another order: other opponents, another loss
    moved = dataclasses.replace(rollouts, cots=[COTS[0], [COTS[1][i] for i in order]])
    other_gradients, other = update(model, moved, settings)
    assert other["bt_loss"] == pytest.approx(by_hand(r_a, r_b[order]), rel=1e-4)
    assert abs(other["bt_loss"] - logged["bt_loss"]) > 1e-3
    assert not torch.allclose(gradients["head.weight"], other_gradients["head.weight"], rtol=1e-2)

    flipped = dataclasses.replace(rollouts, pair=dataclasses.replace(rollouts.pair, label=-1))
    other_gradients, other = update(model, flipped, settings)
    assert other["bt_loss"] == pytest.approx(by_hand(r_b, r_a), rel=1e-4)
    assert abs(other["bt_loss"] - logged["bt_loss"]) > 1e-2
    assert dot(gradients, other_gradients) < 0  # what raised A's rewards over B's now lowers them
    assert other["margin"] == pytest.approx(-logged["margin"], rel=1e-4)


def test_a_human_tie_does_not_thin_out_the_others_bt(rollouts, model, settings):
    """Eq. 10 averages over the pairs that have a winner. A tie has none: it counts neither above nor below the line."""
    tie = dataclasses.replace(rollouts, pair=dataclasses.replace(rollouts.pair, label=0), advantages=torch.zeros(2, 3))
    settings = dataclasses.replace(settings, bt_coef=1.0)
    alone, logged = update(model, dataclasses.replace(rollouts, advantages=torch.zeros(2, 3)), settings)
    beside, also = update(model, dataclasses.replace(rollouts, advantages=torch.zeros(2, 3)), settings, more=[tie])
    for name in ("bt_loss", "margin"):
        assert also[name] == pytest.approx(logged[name], rel=1e-5), name
    assert torch.allclose(alone["head.weight"], beside["head.weight"], rtol=1e-4)


@pytest.mark.parametrize("kl_coef, bt_coef", [(0.0, 0.0), (2.0, 0.0), (0.0, 3.0), (0.7, 0.4)])
def test_the_update_descends_the_sum_of_its_three_losses(rollouts, model, tiny_model_dir, settings, kl_coef, bt_coef):
    """L = GRPO (Eq. 7) + kl_coef KL + bt_coef BT (Eq. 10): the gradient of the update is the slope of this sum.

    Measured without autograd: all weights move by ±h along the gradient's direction, and the three logged losses are
    added up by hand. (L(+h) - L(-h)) / 2h must be |gradient|. A weight that is forgotten, swapped or negative shows.
    """
    settings = dataclasses.replace(settings, kl_coef=kl_coef, bt_coef=bt_coef)
    other = DeScore.from_pretrained(tiny_model_dir)  # any other policy as reference, so that the KL has a slope
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "language_model" in name:
                parameter.mul_(1.2)
    settings = dataclasses.replace(settings, batch_pairs=2)  # two updates a batch: log π_old is fixed
    rollouts.old, _ = grpo.log_probs_now(model, rollouts, settings, parallel.Ranks())
    gradients, logged = update(model, rollouts, settings, other)
    assert kl_coef == 0 or logged["kl"] > 1e-3
    norm, h = dot(gradients, gradients) ** 0.5, 2e-3

    def total_at(distance):
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameters[name].add_(gradient, alpha=distance / norm)
        _, sums = update(model, rollouts, settings, other)
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameters[name].sub_(gradient, alpha=distance / norm)
        return sums["grpo_loss"] + kl_coef * sums["kl"] + bt_coef * sums["bt_loss"]

    assert (total_at(h) - total_at(-h)) / (2 * h) == pytest.approx(norm, rel=0.02)


def test_on_policy_the_loss_is_minus_the_mean_advantage_over_tokens(rollouts, model, settings):
    """"Loss 0, ratio 1: is it broken?" On-policy L = -Σ A_i T_i / Σ T_i: 0 only if all CoTs are of one length T_i."""
    _, logged = update(model, rollouts, settings)
    pushes = [a * len(cot) for row, As in zip(COTS, ADVANTAGES.tolist()) for cot, a in zip(row, As)]
    assert logged["grpo_loss"] == pytest.approx(-sum(pushes) / 16, rel=1e-5)  # 4 + 1 + 2 + 3 + 5 + 1 tokens
    assert logged["ratio_max"] == 1.0


@pytest.mark.parametrize("shift, up, down", [(0.2, 1.221403, 1.221403), (0.5, 1.4, 1.5), (-0.2, 0.818731, 0.9)])
def test_the_clip_settings_reach_the_loss(rollouts, model, settings, shift, up, down):
    """Off-policy by e^shift a token. A > 0 is clipped above, 1 + .4; A < 0 below, 1 - .1, and at the dual clip 1.5.

    L = -(up Σ_{A>0} A_i T_i + down Σ_{A<0} A_i T_i) / Σ T_i with the ratios `up` and `down` that the clip leaves.
    """
    settings = dataclasses.replace(settings, clip_low=0.1, clip_high=0.4, clip_dual=1.5, batch_pairs=2)
    rollouts.old = grpo.log_probs_now(model, rollouts, settings, parallel.Ranks())[0] - shift
    _, logged = update(model, rollouts, settings)
    pushes = [a * len(cot) * (up if a > 0 else down)
              for row, As in zip(COTS, ADVANTAGES.tolist()) for cot, a in zip(row, As)]
    assert logged["grpo_loss"] == pytest.approx(-sum(pushes) / 16, rel=1e-4)


def test_stage_2_bounds_its_gradient(rollouts, model, settings):
    gradients, logged = update(model, rollouts, dataclasses.replace(settings, bt_coef=1.0, max_grad_norm=0.01))
    assert logged["grad_norm_llm"] > 0.1 and logged["grad_norm_head"] > 0.1
    own = {name: gradient for name, gradient in gradients.items() if name in ("query", "head.weight")}
    llm = {name: gradient for name, gradient in gradients.items() if name not in own}
    for part in (own, llm):  # each part by itself
        assert dot(part, part) ** 0.5 == pytest.approx(0.01, rel=1e-3)


def test_the_two_objectives_are_independent(rollouts, model, tiny_model_dir, settings):
    """No gradient of GRPO or KL reaches query or head, and none of BT reaches `lm_head`: they meet in the LLM only."""
    other = DeScore.from_pretrained(tiny_model_dir)
    thinking, _ = update(model, rollouts, dataclasses.replace(settings, kl_coef=1.0), other)
    silent = dataclasses.replace(rollouts, advantages=torch.zeros(2, 3))
    scoring, _ = update(model, silent, dataclasses.replace(settings, bt_coef=1.0))
    zero = lambda gradients, name: name not in gradients or not gradients[name].any()
    assert zero(thinking, "head.weight") and zero(thinking, "query") and zero(scoring, "backbone.lm_head.weight")
    for name in ("backbone.lm_head.weight", "backbone.model.language_model.layers.0.mlp.up_proj.weight"):
        assert thinking[name].any()
    for name in ("head.weight", "query", "backbone.model.language_model.layers.0.mlp.up_proj.weight"):
        assert scoring[name].any()


def test_r_len_counts_tokens(rollouts, processor, settings):
    """R_len = 0 up to `low` TOKENS, 1 from `high`. Characters are another unit: here a token has eight or more.

    10 tokens between 0 and 20: R_len = .5. Their 80 and more characters would give 1.
    """
    word = processor.tokenizer(" moving left", add_special_tokens=False)["input_ids"]
    assert len(word) == 1
    settings = dataclasses.replace(settings, length_low=0, length_high=20)
    pair = dataclasses.replace(rollouts.pair, annotation_a=TRUTH, annotation_b=TRUTH)
    judged = dataclasses.replace(rollouts, pair=pair, cots=[[word * 10, word * 5, word], [word * 20, word * 30, []]])
    judge(judged, processor.tokenizer, settings)
    assert [[reward.length for reward in row] for row in judged.rule_rewards] == [[0.5, 0.25, 0.05], [1.0, 1.0, 0.0]]
    assert judged.rule_rewards[0][0].total == pytest.approx(0.2 * 0.5)  # R_qual and R_fmt are 0


def test_flat_groups_and_cut_off_cots_are_counted(rollouts, model, settings):
    """Three of four groups are flat: all CoTs of a video are worth the same. One CoT of twelve met the limit of 5."""
    eos = model.processor.tokenizer.eos_token_id
    # R = .2 T / 7
    settings = dataclasses.replace(settings, length_low=0, length_high=7, batch_pairs=2, mini_pairs=2, max_new_tokens=5)
    pair = dataclasses.replace(rollouts.pair, annotation_a=TRUTH, annotation_b=TRUTH)
    same, other = [[70, 71, eos], [80, 81, eos], [90, 91, eos]], [[70, 71, 72, 73, 74], [80, eos], [90, 91, eos]]
    batch = [dataclasses.replace(rollouts, pair=pair, cots=cots) for cots in ([same, other], [same, same])]
    for one in batch:
        judge(one, model.processor.tokenizer, settings)
    assert not batch[0].advantages[0].any() and batch[0].advantages[1].abs().min() > 0.1
    _, sums = update(model, batch[0], settings, more=[batch[1]])
    metrics = logs.grpo_metrics(batch, [dict(sums)], eos, settings, parallel.Ranks())
    assert metrics["flat_groups"] == 3 / 4 and metrics["truncated"] == pytest.approx(1 / 12)
    # Pairs that people decided count alike, whichever update they are in; one of ties alone adds nothing.
    assert sums["decided"] == 2 * settings.rollouts
    each = [sums | {"decided": n, "pair_accuracy": right, "bt_loss": loss} for n, right, loss in
            ((0, 0.0, 0.0), (3, 1.0, 0.5), (1, 0.2, 0.9))]
    metrics = logs.grpo_metrics(batch, each, eos, settings, parallel.Ranks())
    assert metrics["pair_accuracy"] == pytest.approx(0.8) and metrics["bt_loss"] == pytest.approx(0.6)
