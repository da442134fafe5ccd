"""mini.py: its gradients are those of the scripts, on the same pair; and it runs as a user starts it."""

import dataclasses

import pytest
import torch

import cold_start
import data
import grpo
import mini
import parallel
from losses import group_advantages
from model import DeScore
from tests.conftest import run_here


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert sum(gradient.any() for gradient in expected.values()) > 10


@pytest.mark.parametrize("masked", [False, True])
def test_stage_1_has_the_gradients_of_cold_start(world, tiny_model_dir, tmp_path, monkeypatch, masked):
    """One pair, one update: what cold_start.py hands to its optimizer, by name, is what mini.py has."""
    pair = next(pair for pair in data.read_pairs(world["train_cold_start"]) if pair.label < 0)
    pair = dataclasses.replace(pair, cot_a="<think>a</think>", cot_b="<think>the other</think>")
    handed = {}
    monkeypatch.setattr(cold_start.data, "read_pairs", lambda *_, **__: [pair])
    monkeypatch.setattr(parallel, "take_step", lambda model, *_: handed.update(gradients(model)) or
                        {f"grad_norm_{part}": 0.0 for part in ("llm", "vision", "head", "total")})
    cold_start.main(["--model", tiny_model_dir, "--data", world["train_cold_start"], "--out", str(tmp_path),
                     "--batch-pairs", "1", "--max-steps", "1", "--lora-r", "16", "--lora-alpha", "32", "--workers", "0",
                     "--lora-dropout", "0", "--mask-probability", str(float(masked))])
    torch.manual_seed(0)  # LoRA's start
    model = DeScore.from_pretrained(tiny_model_dir)
    model.make_trainable("lora", vision=True, lora_r=16, lora_alpha=32, lora_dropout=0.0, lm_head=False)
    cots = pair.cot_ids(model.processor.tokenizer)
    mini.cold_start_loss(model, pair, model.encode(pair.videos, [pair.prompt] * 2), cots, masked).backward()
    equal(gradients(model), handed)


@pytest.mark.parametrize("label", [1, -1])
def test_stage_2_has_the_gradients_of_grpo(world, model, tiny_model_dir, monkeypatch, label):
    """One pair with G = 2, judged by the same rules, against another model as reference."""
    pair = dataclasses.replace(data.read_pairs(world["train_rl"])[0], label=label)
    monkeypatch.setattr(mini, "KL", 0.7)
    prefixes = model.encode(pair.videos, [pair.prompt] * 2)
    cots = model.think(prefixes, 24, temperature=1.0, seed=1, thoughts=2)
    cots[0][1], cots[1][0] = cots[0][1][:9], cots[1][0][:17]  # of unlike lengths, and so of unlike rewards
    reference, ranks = DeScore.from_pretrained(tiny_model_dir), parallel.Ranks()
    settings = grpo.Settings(rollouts=2, batch_pairs=1, mini_pairs=1, kl_coef=mini.KL, bt_coef=mini.BT,
                             max_grad_norm=1e9, length_low=mini.LENGTHS[0], length_high=mini.LENGTHS[1],
                             micro_rollouts=1)
    rollouts = grpo.PairRollouts(pair, prefixes, cots)
    rollouts.rule_rewards = grpo.rule_rewards(rollouts, model.processor.tokenizer, settings)
    rewards = mini.judge(model.processor.tokenizer, pair, cots)
    assert torch.allclose(rewards, rollouts.totals()) and rewards.std() > 0
    rollouts.advantages = group_advantages(rollouts.totals())
    model.make_trainable("full", vision=False)
    optimizer, handed = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), {}
    optimizer.register_step_pre_hook(lambda *_: handed.update(gradients(model)))
    grpo.update(model, reference, optimizer, [rollouts], settings, ranks)
    model.zero_grad()
    tokens = rollouts.num_tokens
    mini.rl_loss(model, reference, pair, prefixes, cots, group_advantages(rewards), tokens, num_pairs=1).backward()
    equal(gradients(model), handed)


def test_both_stages_run_and_print_what_moves(world, base_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "base").symlink_to(base_dir)
    (tmp_path / "data").symlink_to(world["train_rl"].rsplit("/", 1)[0])
    monkeypatch.setattr(mini, "TOKENS", 8)
    mini.main(str(tmp_path), steps=(2, 1), pool=5)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16] for line in lines if line.startswith("stage")] == [
        "stage 1, step  1", "stage 1, step  2", "stage 2, step  1"]
    first = float(next(line for line in lines if line.startswith("stage 1")).split()[-1])
    assert first == pytest.approx(0.6931, abs=0.05)  # a new head: ln 2
    assert (tmp_path / "mini_stage1/descore.json").exists()


def test_half_a_demo_is_one_sentence(tmp_path, monkeypatch, capsys):
    """A base model, but no data beside it: as a user starts it."""
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, "mini.py")
    told = capsys.readouterr().err
    assert end.value.code == 2 and told == "error: runs/data/train_cold_start.csv: no such file.\n"
