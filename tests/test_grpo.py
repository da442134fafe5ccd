"""Stage 2: rewards landing on their own rollouts, a few CoTs at a time = a row per CoT, and the script itself."""

import copy
import dataclasses
import json
import math
import weakref

import pytest
import torch

import data
import grpo
import losses
import parallel
import rollout
import rules
from model import DeScore, Output
from plumbing import logs
from plumbing.checkpoint import read_processor
from plumbing.logs import write_samples
from plumbing.settings import InputError
from rollout import TransformersEngine
from tests.conftest import judge, refuses
from tests.test_answers import cot


# -- the three losses of one pair, without a model ---------------------------------------------------------------------
def three_losses(label, rewards, log_probs):
    """losses_of for G = 2: rows A_1, A_2, B_1, B_2; one CoT token each; A = (+1, -1) and (-1, +1); on-policy."""
    advantages, reference = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.full((2, 2, 1), math.log(0.25))
    pair = data.PreferencePair("a.mp4", "b.mp4", "a cat", label)
    rollouts = grpo.PairRollouts(pair, [], [], advantages=advantages, reference=reference)
    counts = {"tokens": 4, "bt": 2}
    output, mask = Output(rewards, log_probs), torch.ones(4, 1)
    return grpo.losses_of(output, log_probs.detach(), mask, rollouts, grpo.Settings(), counts)


def test_eq10_sets_rollout_i_of_the_winner_against_rollout_i_of_the_loser():
    """BT = 1/G Σ_i -ln σ(r_w,i - r_l,i), with r_A = (1, 0) and r_B = (0, 3)."""
    log_probs = torch.full((4, 1), math.log(0.5))

    def bt(label, *rewards):
        return three_losses(label, torch.tensor(rewards), log_probs)[2].item()

    # A has won: margins 1 - 0 = 1 and 0 - 3 = -3: (ln(1 + e^-1) + ln(1 + e^3)) / 2 = (.313262 + 3.048587) / 2
    assert bt(1, 1.0, 0.0, 0.0, 3.0) == pytest.approx(1.680925, abs=1e-5)
    # B's rollouts in the other order: margins 1 - 3 = -2 and 0 - 0 = 0: (2.126928 + .693147) / 2
    assert bt(1, 1.0, 0.0, 3.0, 0.0) == pytest.approx(1.410038, abs=1e-5)
    # B has won: margins -1 and 3: (1.313262 + .048587) / 2
    assert bt(-1, 1.0, 0.0, 0.0, 3.0) == pytest.approx(0.680925, abs=1e-5)
    assert bt(0, 1.0, 0.0, 0.0, 3.0) == 0.0  # a human tie has no winner


def test_grpo_and_kl_pull_on_log_probs_alone_and_bt_on_rewards_alone():
    """So GRPO's gradient cannot reach the head, and BT's reaches the LLM only through the query's hidden states."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0], requires_grad=True)
    log_probs = torch.full((4, 1), math.log(0.5), requires_grad=True)
    grpo_term, kl, bt = three_losses(1, rewards, log_probs)
    assert kl.item() == pytest.approx(0.193147, abs=1e-6)  # π .5, π_ref .25: .5 - 1 - ln .5, at every token

    def slope(loss):
        return torch.autograd.grad(loss, (log_probs, rewards), allow_unused=True, retain_graph=True)

    for_log_probs, for_rewards = slope(grpo_term)
    assert for_rewards is None
    assert for_log_probs.flatten().tolist() == pytest.approx([-0.25, 0.25, 0.25, -0.25])  # -A / tokens, on-policy
    for_log_probs, for_rewards = slope(kl)
    assert for_rewards is None
    assert for_log_probs.flatten().tolist() == pytest.approx([0.125] * 4)  # (1 - π_ref/π) / tokens = .5 / 4
    for_log_probs, for_rewards = slope(bt)
    assert for_log_probs is None
    # -σ(r_l - r_w) / G on the winner's side, the opposite on the loser's: σ(-1) = .268941, σ(3) = .952574
    assert for_rewards.tolist() == pytest.approx([-0.134471, -0.476287, 0.134471, 0.476287], abs=1e-6)


# -- one pair's rollouts ---------------------------------------------------------------------------------------------
class Scripted:
    """An engine with prepared answers, so that each rollout's reward is known beforehand."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, iter(texts)

    def generate(self, prefixes, seeds, max_new_tokens, temperature):
        return [[data.encode_cot(self.tokenizer, next(self.texts)) for _ in row] for row in seeds]

    def sync(self, named_weights): ...

    def close(self): ...


@pytest.fixture
def settings(world, tmp_path):
    return grpo.Settings(data=world["train_rl"], rollouts=3, batch_pairs=2, mini_pairs=2, out=str(tmp_path),
                         max_new_tokens=12, kl_coef=0)


@pytest.fixture
def items(world, processor):
    pairs = data.read_pairs(world["train_rl"])[:2]
    return list(data.take(data.EncodedPairs(pairs, processor), [0, 1]))


@pytest.fixture
def batch(items, model, settings):
    texts = [f"<think>{'x' * n}</think>" if n % 4 else cot() for n in range(12)]
    rollouts = grpo.generate(items, Scripted(model.processor.tokenizer, texts), settings, step=0)
    for r in rollouts:
        judge(r, model.processor.tokenizer, settings)
    return rollouts


def test_rewards_land_on_their_own_rollouts(batch, items, model):
    """docs/differences.md, row 5: at G = 8 the released code gives 7 of 8 rollouts another one's reward."""
    tokenizer, n = model.processor.tokenizer, 0
    for rollouts, (pair, _) in zip(batch, items):
        for video, truth in enumerate((pair.annotation_a, pair.annotation_b)):
            for i in range(3):
                text = rollout.decode_cot(tokenizer, rollouts.cots[video][i])
                assert text == (f"<think>{'x' * n}</think>" if n % 4 else cot())  # the engine's n-th answer
                assert rollouts.rule_rewards[video][i].quality == rules.quality_reward(text, truth)
                n += 1
            totals = torch.tensor([r.total for r in rollouts.rule_rewards[video]])
            expected = (totals - totals.mean()) / (totals.std() + 1e-6)
            assert torch.allclose(rollouts.advantages[video], expected)
    assert len({r.quality for rollouts in batch for row in rollouts.rule_rewards for r in row}) > 1


def test_a_part_has_what_belongs_to_its_rollouts(batch, model):
    """A_1 A_2 B_1 B_2, then A_3 B_3: tokens, advantages, old and reference log-probs of the same CoTs."""
    whole = batch[0]
    longest = max(len(cot) for row in whole.cots for cot in row)
    whole.old = torch.arange(6.0).view(2, 3, 1).expand(-1, -1, longest)
    whole.reference = whole.old + 10
    whole.engine_log_probs = [[[float(v)] * len(cot) for cot in row] for v, row in enumerate(whole.cots)]
    for part, chosen in zip(whole.parts(2), ([0, 1], [2]), strict=True):
        assert part.cots == [[row[i] for i in chosen] for row in whole.cots]
        assert torch.equal(part.advantages, whole.advantages[:, chosen])
        assert part.rule_rewards == [[row[i] for i in chosen] for row in whole.rule_rewards]
        assert part.old[..., 0].tolist() == [[float(i) for i in chosen], [3.0 + i for i in chosen]]
        assert torch.equal(part.reference, part.old + 10)
        assert part.engine_log_probs == [[row[i] for i in chosen] for row in whole.engine_log_probs]
        tensors = grpo.lay_out_behind(model.backbone, part.prefixes, part.cots)
        for n, ids in enumerate([*part.cots[0], *part.cots[1]]):
            assert tensors["cot_ids"][n][: len(ids)].tolist() == ids and tensors["cot_mask"][n].sum() == len(ids)
        assert tensors["cot_ids"].shape[1] == part.old.shape[2]  # as long as the part's longest, not the pair's


def update_gradients(model, batch, settings, reference=None):
    """The gradient that `update` hands to the optimizer, and the step's sums."""
    model.make_trainable("full", vision=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    taken, zero = {}, optimizer.zero_grad
    optimizer.zero_grad = lambda: (
        taken.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}),
        zero(),
    )
    sums = grpo.update(model, reference, optimizer, batch, settings, parallel.Ranks())
    return taken, sums


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_prefixes_once_and_a_few_cots_at_a_time_make_the_update_of_a_row_per_cot(
    batch, model, tiny_model_dir, settings, size, checkpointing
):
    """Losses and gradients, KL included, against whole sequences: a forward for each of the 2 x 3 CoTs by itself."""
    settings = dataclasses.replace(settings, max_grad_norm=1e9, bt_coef=0.5, kl_coef=0.3, micro_rollouts=size)
    reference = DeScore.from_pretrained(tiny_model_dir).requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.backbone.model.language_model.parameters():
            parameter.mul_(1.1)
    batch[1].cots = [[cot[: 5 + 9 * i] for i, cot in enumerate(row)] for row in batch[1].cots]  # of unlike lengths
    if checkpointing:
        model.train().backbone.gradient_checkpointing_enable({"use_reentrant": False})
    found, sums = update_gradients(model, batch, settings, reference)
    model.zero_grad()
    counts, total = grpo.denominators(batch, settings, parallel.Ranks()), 0.0
    for r in batch:
        rows = [model_of(prefix, cot, model, reference) for prefix, row in zip(r.prefixes, r.cots) for cot in row]
        rewards, log_probs, reference_log_probs = (torch.cat([row[k] for row in rows]) for k in range(3))
        lengths = [len(cot) for row in r.cots for cot in row]
        advantages = r.advantages.flatten().repeat_interleave(torch.tensor(lengths))
        policy = -(advantages * (log_probs - log_probs.detach()).exp()).sum() / counts["tokens"]
        kl = losses.kl_to_reference(log_probs, reference_log_probs).sum() / counts["tokens"]
        a, b = rewards.view(2, 3)
        bt = losses.bt_loss(*((a, b) if r.pair.label > 0 else (b, a)), denominator=counts["bt"])
        loss = policy + settings.kl_coef * kl + settings.bt_coef * bt * (r.pair.label != 0)
        loss.backward()
        total += loss.item()
    assert sums["grpo_loss"] + 0.3 * sums["kl"] + 0.5 * sums["bt_loss"] == pytest.approx(total, rel=1e-5)
    assert sums["kl"] > 1e-3
    for name, grad in found.items():
        expected = dict(model.named_parameters())[name].grad
        assert (grad - expected).norm() <= 2e-5 * expected.norm() + 1e-8, name


def model_of(prefix, cot, model, reference):
    """One CoT behind its prefix, the plain way: rewards (1,), log-probs (T,) of model and of reference."""
    batch = grpo.lay_out(model.backbone, [prefix], [[cot]])
    output = model(batch)
    return output.rewards, output.log_probs[0], reference(batch).log_probs[0]


def test_memory_of_an_update_does_not_grow_with_the_rollouts(batch, model, settings):
    """What is kept for the backward at a time: of the prefixes and of ONE CoT of each video, with 2 or with 8."""
    most = []
    for count in (2, 8):
        r, sizes = dataclasses.replace(batch[0], cots=[[[70] * 40] * count] * 2, advantages=torch.ones(2, count)), {}
        most.append(0)

        def keep(tensor, sizes=sizes):
            saved = Saved(tensor)  # lives as long as the graph that it belongs to
            sizes[id(saved)] = tensor.numel()
            weakref.finalize(saved, sizes.pop, id(saved))
            most[-1] = max(most[-1], sum(sizes.values()))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
            update_gradients(model, [r], dataclasses.replace(settings, rollouts=count, micro_rollouts=1))
    assert most[1] <= 1.1 * most[0] and len(sizes) == 0, most


class Saved:
    def __init__(self, tensor):
        self.tensor = tensor


def test_the_tower_looks_once_for_reference_and_policy(batch, model, settings):
    """And what it saw is kept for one pair's update, not for the whole batch of rollouts."""
    looks, settings = [], dataclasses.replace(settings, kl_coef=1e-2)
    model.backbone.model.visual.register_forward_hook(lambda *_: looks.append(1))
    update_gradients(model, batch, settings, model)
    assert len(looks) == len(batch)


def test_a_tower_in_another_precision_sees_for_itself(batch, model, settings):
    """One GPU, all of the LLM trained: the reference is loaded in bf16, the policy in fp32 under autocast. π_old was
    read with the policy's own tower; with the reference's, the ratio would not be 1 at the first update."""
    reference = copy.deepcopy(model)
    for dtype in (torch.float32, torch.bfloat16):
        reference.backbone.to(dtype)
        ranks, settings = parallel.Ranks(), dataclasses.replace(settings, kl_coef=1e-2)
        features = grpo.add_reference(model, reference, batch[0], settings, ranks)
        assert (features is None) == (dtype == torch.bfloat16) and batch[0].reference is not None
        ranks.sharded = True  # FSDP computes both in bf16
        assert grpo.add_reference(model, reference, batch[0], settings, ranks) is not None


def test_update_direction(batch, model, settings):
    """After updates on one batch: rollouts with positive advantage are likelier, and the BT margin has grown."""
    settings = dataclasses.replace(settings, lr=3e-3, lr_head=3e-3, bt_coef=0.05)
    model.make_trainable("full", vision=False)
    optimizer, ranks = parallel.make_optimizer(model, settings), parallel.Ranks()
    parallel.set_learning_rate(optimizer, 1, 1)

    def state():
        with torch.no_grad():
            gain, right = 0.0, []
            for r in batch:
                out = model(grpo.lay_out(model.backbone, r.prefixes, r.cots))
                gain += (out.log_probs.sum(1) * r.advantages.flatten()).sum().item()
                a, b = out.rewards.view(2, 3)
                right.append(((a - b) * r.pair.label).mean().item())
            return gain, sum(right)

    before = state()
    for _ in range(3):
        grpo.update(model, model, optimizer, batch, settings, ranks)
    after = state()
    assert after[0] > before[0] + 0.1 and after[1] > before[1]


def test_a_human_tie_has_no_bt_term_but_trains_the_thinking(batch, model, settings):
    tie = dataclasses.replace(batch[0], pair=dataclasses.replace(batch[0].pair, label=0))
    grads, sums = update_gradients(model, [tie], settings)
    assert sums["bt_loss"] == 0.0 and not grads["head.weight"].any()
    assert grads["backbone.lm_head.weight"].any()


def test_old_log_probs_make_the_ratio(batch, model, settings):
    ranks = parallel.Ranks()
    for r in batch:
        r.old = grpo.log_probs_now(model, r, settings, ranks)[0] - 0.1  # the policy has moved up by .1
    _, sums = update_gradients(model, batch, dataclasses.replace(settings, mini_pairs=1))
    assert sums["ratio_max"] == pytest.approx(1.10517, abs=1e-3)  # e^.1


def test_engine_gap_is_measured(batch, model, settings):
    """Engines round otherwise. The trainer finds some tokens e^-.2, others e^.2 as likely as the engine: gap .2."""
    ranks = parallel.Ranks()
    model.make_trainable("full", vision=False)
    for r in batch:
        now, _ = grpo.log_probs_now(model, r, settings, ranks)
        off = 0.2 * (-1.0) ** torch.arange(now.shape[2])  # of both signs: a gap that cancels is one, too
        r.engine_log_probs = [[(now[v, i] + off)[: len(r.cots[v][i])].tolist() for i in range(3)] for v in (0, 1)]
    _, sums = update_gradients(model, batch, settings)
    assert sums["engine_gap"] == pytest.approx(0.2, abs=1e-4)


def test_log_probs_are_those_of_the_policy_that_samples(batch, model, settings):
    """At temperature .5 policy and reference have softmax(logits / .5), which the sampler draws from."""
    settings, seen = dataclasses.replace(settings, temperature=0.5), []
    model.backbone.lm_head.register_forward_hook(lambda _, args, logits: seen.append(logits.detach()))
    past = grpo.read(model, batch[0], settings, parallel.Ranks())
    output, mask = grpo.forward_behind(model, past, batch[0], settings, parallel.Ranks())
    ids = torch.tensor([i for row in batch[0].cots for cot in row for i in cot])
    expected = torch.log_softmax(seen[0] / 0.5, dim=1)[torch.arange(len(ids)), ids]
    assert torch.allclose(output.log_probs[mask.bool()], expected, atol=1e-5)
    again, _ = grpo.log_probs_now(model, batch[0], settings, parallel.Ranks())
    assert torch.allclose(again.flatten(0, 1), output.log_probs, atol=1e-5)
    logits = torch.tensor([[0.0, 0.3, 0.9, -1.0, 2.0]]).expand(10, -1)
    sampler = rollout.SeededSampling(list(range(10)), 0.5)  # 2,000 tokens of 10 rows: noise is drawn ahead
    drawn = torch.cat([sampler(None, logits).argmax(1) for _ in range(2_000)])
    for token in range(5):
        p = losses.token_log_probs(logits[:1], torch.tensor([token]), 0.5).exp().item()
        assert (drawn == token).float().mean().item() == pytest.approx(p, abs=4 * (p / 20_000) ** 0.5 + 1e-4), token


@pytest.mark.parametrize("flag, value", [("--temperature", 0), ("--rollouts", 1)])
def test_what_can_teach_nothing_is_refused(capsys, tmp_path, flag, value):
    """Greedy CoTs of a video are all the same, and a group of one has no advantage."""
    refuses(capsys, grpo.main, "--data", "x.csv", "--model", "m", "--out", tmp_path, flag, value, says=flag)


def test_denominators_count_tokens_and_decided_rollouts(batch, settings):
    batch[1].pair = dataclasses.replace(batch[1].pair, label=0)
    tokens = sum(len(cot) for rollouts in batch for row in rollouts.cots for cot in row)
    found = grpo.denominators(batch, settings, parallel.Ranks())
    assert found == {"tokens": tokens, "bt": 3}  # one pair has a winner, 3 rollouts each
    assert grpo.denominators(batch[1:], settings, parallel.Ranks())["bt"] == 1  # never divided by 0


def test_the_largest_ratio_is_that_of_all_ranks(batch, model, settings):
    model.make_trainable("full", vision=False)
    optimizer, ranks = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), parallel.Ranks()
    ranks.gather_objects = lambda items: [*items, 7.5]
    assert grpo.update(model, model, optimizer, batch, settings, ranks)["ratio_max"] == 7.5


def test_seeds_differ_between_rollouts_videos_steps(items, model, settings):
    engine = TransformersEngine(model.backbone, model.processor, shared=True)
    first, again, other = (grpo.generate(items, engine, settings, step) for step in (0, 0, 1))
    assert [r.cots for r in first] == [r.cots for r in again] != [r.cots for r in other]
    assert len({tuple(c) for r in first for row in r.cots for c in row}) == 12
    reseeded = grpo.generate(items, engine, dataclasses.replace(settings, seed=1), 0)
    assert [r.cots for r in reseeded] != [r.cots for r in first]
    (same,) = grpo.generate([items[0]._replace(prefixes=[items[0].prefixes[0]] * 2)], engine, settings, 0)
    assert same.cots[0] != same.cots[1]  # A and B of a pair draw for themselves, even if they are one clip
    twins = [items[0], items[0]._replace(pair=dataclasses.replace(items[0].pair, line=99))]  # one clip, two lines
    one, two = grpo.generate(twins, engine, settings, 0)
    assert one.cots != two.cots  # a line of the CSV has random streams of its own
    greedy = grpo.generate(items, engine, dataclasses.replace(settings, temperature=0.0), 0)
    assert all(len({tuple(c) for c in row}) == 1 for r in greedy for row in r.cots)


def test_the_loop_hands_each_pair_with_its_advantages_to_one_update(world, tiny_model_dir, tmp_path, monkeypatch):
    """--batch-pairs 4 --mini-pairs 2: two updates with two pairs each, no pair twice.

    Of each video's two CoTs one is well formed and one is not, in turn: A is +.7071 for the good, -.7071 for the bad.
    """
    def scripted(_, path, processor, *more, **options):
        assert more[-2].__func__ is parallel.Ranks.autocast and more[-1] is False  # samples as it trains
        return Scripted(processor.tokenizer, [cot(), "<think>what?</think>"] * 8)

    updates, update = [], grpo.update
    monkeypatch.setattr(grpo, "make_engine", scripted)
    monkeypatch.setattr(grpo, "update", lambda *first, **_: updates.append(first[3]) or update(*first))
    grpo.main(["--model", tiny_model_dir, "--data", world["train_rl"], "--out", str(tmp_path), "--rollouts", "2",
               "--workers", "0", "--batch-pairs", "4", "--mini-pairs", "2", "--max-steps", "1", "--kl-coef", "0"])
    assert [len(mini) for mini in updates] == [2, 2]
    pairs = [one for mini in updates for one in mini]
    assert len({one.pair.line for one in pairs}) == 4
    for one in pairs:
        assert one.advantages.flatten().tolist() == pytest.approx([0.7071, -0.7071] * 2, abs=1e-4)


def test_samples_are_the_worst_and_the_best(batch, model, tmp_path):
    texts = [rollout.decode_cot(model.processor.tokenizer, ids) for ids in batch[0].cots[0]]
    write_samples(str(tmp_path / "samples.jsonl"), 3, batch[0], texts)
    worst, best = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    totals = [reward.total for reward in batch[0].rule_rewards[0]]
    assert worst["total"] == min(totals) < max(totals) == best["total"] and worst["advantage"] < 0 < best["advantage"]
    assert best["cot"] == texts[totals.index(max(totals))]


# -- the script -------------------------------------------------------------------------------------------------------
@pytest.mark.curves
def test_script_runs_logs_saves_and_resumes(world, tiny_model_dir, tmp_path):
    def go(out, steps, *more):
        grpo.main(["--model", tiny_model_dir, "--data", world["train_rl"], "--out", str(tmp_path / out),
                   "--rollouts", "2", "--batch-pairs", "2", "--mini-pairs", "1", "--max-new-tokens", "8",
                   "--lr", "1e-3", "--workers", "0", "--length-low", "1", "--length-high", "9", "--kl-coef", "0.01",
                   "--max-steps", str(steps), *more])
        return logs.read_metrics(str(tmp_path / out))

    whole = go("whole", 3)
    assert len(go("parts", 1)) == 1
    parts = go("parts", 3, "--resume")
    clock = ("seconds", "share")
    for a, b in zip(whole, parts, strict=True):
        assert {k: v for k, v in a.items() if not k.endswith(clock)} == {
            k: v for k, v in b.items() if not k.endswith(clock)
        }
    load = lambda out: DeScore.from_pretrained(str(tmp_path / out / "model")).state_dict()
    one, two = load("whole"), load("parts")
    assert all(torch.equal(one[name], two[name]) for name in one)  # bit for bit
    start = DeScore.from_pretrained(tiny_model_dir).state_dict()
    changed = {name for name in one if not torch.equal(one[name], start[name])}
    assert {"query", "head.weight", "backbone.lm_head.weight"} <= changed
    assert not any(".visual." in name for name in changed)  # the vision tower is frozen in stage 2
    assert whole[0]["ratio_max"] > 1.0001  # two updates per batch: in the second the policy has moved away from π_old
    assert whole[0]["kl"] >= 0 and 0 <= whole[0]["flat_groups"] <= 1
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 5000
    sample = json.loads((tmp_path / "whole" / "samples.jsonl").read_text().splitlines()[0])
    assert {"cot", "total", "advantage", "truth"} <= set(sample)
    settings = json.loads((tmp_path / "whole" / "settings.json").read_text())
    assert settings["kl_coef"] == 0.01 and settings["clip_high"] == 0.3


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_reference_is_the_start_of_the_stage(world, tiny_model_dir, tmp_path, train):
    """π_ref of the KL term: with LoRA the model without its adapter, else a second, frozen model. It never moves."""
    grpo.main(["--model", tiny_model_dir, "--data", world["train_rl"], "--out", str(tmp_path), "--rollouts", "2",
               "--train", train, "--lora-r", "4", "--batch-pairs", "1", "--mini-pairs", "1", "--max-new-tokens", "6",
               "--lr", "1e-2", "--workers", "0", "--kl-coef", "0.01", "--max-steps", "2"])
    first, second = logs.read_metrics(str(tmp_path))
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)  # step 1: nothing has moved, the policy IS the reference
    assert second["kl"] > 1e-6
    assert first["ratio_max"] == second["ratio_max"] == 1.0  # one update per batch: old log-probs ARE the current


def test_what_the_engine_has_no_room_for_is_known_before_training(
    world, tiny_model_dir, tmp_path, capsys, monkeypatch
):
    """vLLM would refuse the clip when its turn comes, hours later; a CSV's own CoT is not what it is shown."""
    flags = ["--model", tiny_model_dir, "--data", world["train_rl"], "--out", tmp_path, "--engine", "vllm",
             "--max-new-tokens", "50", "--batch-pairs", "1", "--mini-pairs", "1"]
    pairs = data.read_pairs(world["train_rl"])
    processor = read_processor(tiny_model_dir)
    lengths = {pair.line: max(len(data.encode_prompt(processor, data.sample_frames(video), pair.prompt)["input_ids"])
                              for video in pair.videos) for pair in pairs}
    longest = max(lengths.values())
    line, room = next(line for line, length in lengths.items() if length == longest), longest + 50
    says = f"line {line}: {room} tokens of video, prompt and CoT exceed --engine-max-len {room - 1}"
    monkeypatch.setattr("plumbing.settings.importlib.util.find_spec", lambda name: name)  # as if vLLM were there
    refuses(capsys, grpo.main, *flags, "--engine-max-len", room - 1, says=says)
    monkeypatch.setattr(grpo, "make_engine", lambda *_, **__: called.append(1) or 1 / 0)
    called = []
    with pytest.raises(ZeroDivisionError):  # all fit: the engine is next
        grpo.main([*map(str, flags), "--engine-max-len", str(room)])
    assert called


def test_stage_2_needs_annotations(world, tiny_model_dir, tmp_path, capsys):
    with pytest.raises(InputError, match="video_1_scores"):
        grpo.main(["--model", tiny_model_dir, "--data", world["test_genai_bench"], "--out", str(tmp_path)])
    with pytest.raises(InputError, match="--mini-pairs"):
        grpo.main(["--model", tiny_model_dir, "--data", world["train_rl"], "--batch-pairs", "4", "--mini-pairs", "3"])
    refuses(capsys, grpo.main, "--gamma", "1", says="unrecognized arguments: --gamma 1")
