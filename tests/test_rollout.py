"""Sampling CoTs from the softmax, and collecting them: resumable, each (video, prompt) once."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch

import cold_start
import data
import parallel
import rollout
from layout import lay_out
from model import DeScore
from plumbing.jobs import read_log
from rollout import sample_cots
from tests.conftest import refuses, run


def test_collecting_cots_writes_a_cold_start_csv_and_resumes(world, base_dir, tmp_path, capsys):
    out = tmp_path / "sub" / "cots.csv"
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--out", str(out), "--max-new-tokens", "6"]
    rollout.main([*flags, "--batch-size", "4"])
    first = out.read_text()
    pairs, source = data.read_pairs(str(out)), data.read_pairs(world["train_cold_start"])
    assert [(p.videos, p.prompt, p.label) for p in pairs] == [(p.videos, p.prompt, p.label) for p in source]
    assert all(p.cot_a for p in pairs)
    # cut the file as a kill would: half a line lost, the rest kept, nothing thought twice, the same result
    thoughts = out.parent / "cots.csv.thoughts" / "thoughts.jsonl"
    lines = thoughts.read_text().splitlines(keepends=True)
    thoughts.write_text("".join(lines[:5]) + lines[5][:20])
    capsys.readouterr()
    rollout.main([*flags, "--batch-size", "3"])  # another batch size: seeds belong to the task
    assert "thoughts: 100%" in capsys.readouterr().err
    assert thoughts.read_text().startswith("".join(lines[:5]))  # those stay as they were
    assert out.read_text() == first
    known = [json.loads(line)["video"] for line in thoughts.read_text().splitlines()]
    assert len(known) == len(set(known)) == 14


@pytest.fixture
def val_csv(world, monkeypatch):
    """A CSV by a relative path: its videos' names, which name the random streams, are then the same in every run."""
    folder, name = os.path.split(world["val_cold_start"])
    monkeypatch.chdir(folder)
    return name


def of_video(path, prompt):
    """What tells a thought, however its video's path is written."""
    return os.path.realpath(path), prompt


def test_what_is_kept_of_a_thought(val_csv, base_dir, tmp_path):
    """thoughts.jsonl tells which CoT of which video, how many TOKENS, and whether EOS came before the limit."""
    out, more, flags = {}, {}, ["--model", base_dir, "--data", val_csv, "--max-new-tokens", "6"]
    runs = {"sampled": [], "again": [], "seed 1": ["--seed", "1"], "greedy": ["--temperature", "0"]}
    for name, flag in runs.items():
        rollout.main([*flags, *flag, "--out", str(tmp_path / f"{name}.csv")])
        lines = (tmp_path / f"{name}.csv.thoughts" / "thoughts.jsonl").read_text().splitlines()
        out[name] = {of_video(r["video"], r["prompt"]): r["thoughts"][0] for r in map(json.loads, lines)}
        more[name] = [(r["tokens"][0], r["ended"][0], len(r["thoughts"][0])) for r in map(json.loads, lines)]
    assert out["sampled"] == out["again"] and out["seed 1"] != out["sampled"] != out["greedy"]
    for pair in data.read_pairs(str(tmp_path / "sampled.csv")):
        assert pair.cots == tuple(out["sampled"][of_video(video, pair.prompt)] for video in pair.videos)
    # random weights hardly ever say EOS: all six tokens, cut off, and far more characters than tokens
    assert {tokens for tokens, _, _ in more["sampled"]} == {6} and not any(ended for _, ended, _ in more["sampled"])
    assert max(characters for _, _, characters in more["sampled"]) > 6


def test_stage_1_trains_on_what_was_sampled(val_csv, base_dir, model, tmp_path, capsys):
    """Ids from sampling to stage 1's forward: no EOS where the CoT was cut off, and not what the text encodes to."""
    out, tokenizer = tmp_path / "cots.csv", model.processor.tokenizer
    rollout.main(["--model", base_dir, "--data", val_csv, "--out", str(out), "--max-new-tokens", "9"])
    records = {of_video(*key): record for key, record in read_log(f"{out}.thoughts", "thoughts").items()}
    pairs = data.read_pairs(str(out))
    for pair in pairs:
        sampled = [records[of_video(video, pair.prompt)] for video in pair.videos]
        assert list(pair.cot_ids(tokenizer)) == [record["token_ids"][0] for record in sampled]
        assert not any(record["ended"][0] for record in sampled)  # all cut off: no EOS, though encode_cot would add one
        assert all(ids[-1] != tokenizer.eos_token_id for ids in pair.cot_ids(tokenizer))
    word = tokenizer("circle", add_special_tokens=False)["input_ids"]
    letters = [i for letter in "circle" for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert word != letters  # the same text, sampled letter by letter
    assert data.encode_cot(tokenizer, "circle", letters) == letters
    assert data.encode_cot(tokenizer, "circle", [*letters, tokenizer.eos_token_id])[:-1] == letters
    assert data.encode_cot(tokenizer, "circle") == [*word, tokenizer.eos_token_id]
    for wrong in ([*letters, 70], [10**6], [-1]):  # edited text, or another tokenizer's ids
        with pytest.raises(data.InputError, match="line 7: the CoT's tokens do not spell"):
            dataclasses.replace(pairs[0], line=7, cot_a="circle", cot_a_tokens=wrong).cot_ids(tokenizer)
    items = [(dataclasses.replace(pairs[0], cot_a="circle", cot_b="circle", cot_a_tokens=letters, cot_b_tokens=None),
              model.encode(pairs[0].videos, [pairs[0].prompt] * 2))]
    rewards = torch.cat(cold_start.score_pairs(model, items, cold_start.Settings()))
    ids = [letters, [*word, tokenizer.eos_token_id]]
    assert torch.allclose(rewards, model.score(items[0][1], ids), atol=1e-5)


def test_two_ranks_collect_the_same(world, base_dir, tmp_path, capsys):
    """Two ranks as one process; and several files with one engine as each by itself."""
    flags = ["--model", base_dir, "--max-new-tokens", "6"]
    names, one, two = ("train_cold_start", "val_cold_start"), [], []
    for name in names:
        one, two = [*one, tmp_path / f"one_{name}.csv"], [*two, tmp_path / f"two_{name}.csv"]
        rollout.main([*flags, "--data", world[name], "--out", str(one[-1])])
    run("rollout.py", *flags, "--data", *(world[name] for name in names), "--out", *two, ranks=2)
    assert [path.read_text() for path in one] == [path.read_text() for path in two]
    refuses(capsys, rollout.main, *flags, "--data", *(world[name] for name in names), says="as many --out")


def test_engine_takes_over_trained_weights(model, base_dir, prefixes):
    """What `trained_weights` sends is all that changed: the engine then samples as the merged model does."""
    model.make_trainable("lora", vision=True, lora_r=4, lora_alpha=8)
    engine = rollout.TransformersEngine(rollout.load_backbone(base_dir, torch.float32), model.processor, shared=False)
    greedy = lambda: engine.generate(prefixes[:2], [[0], [0]], 8, temperature=0.0)
    own = rollout.TransformersEngine(model.backbone, model.processor, shared=True)
    assert greedy() == own.generate(prefixes[:2], [[0], [0]], 8, temperature=0.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    before = greedy()
    engine.sync(parallel.trained_weights(model))
    assert greedy() == own.generate(prefixes[:2], [[0], [0]], 8, temperature=0.0) != before
    for wrong in (("model.nowhere", torch.zeros(1)), ("lm_head.weight", torch.zeros(1))):
        with pytest.raises(data.InputError, match="no weight"):  # a name that fits nothing must not be passed over
            engine.sync([wrong])
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    assert torch.allclose(DeScore(engine.backbone)(batch).log_probs, model(batch).log_probs, atol=1e-4)


def test_task_seed_is_stable():
    first, again, other = (rollout.task_seed(0, "a.mp4", "p", k) for k in (1, 1, 2))
    assert first == again != other


def test_sampling_depends_on_the_seed_alone(model, prefixes, processor):
    many = sample_cots(model.backbone, processor, prefixes, [[1, 2], [3, 4], [5, 6], [7, 8]], 8)
    alone = sample_cots(model.backbone, processor, prefixes[2:3], [[6]], 8)
    assert alone[0][0] == many[2][1] and many[0][0] != many[0][1]
    assert [len(row) for row in many] == [2, 2, 2, 2]


def test_sampling_reads_each_video_once(model, prefixes, processor):
    seen, visual = [], model.backbone.model.visual
    hook = visual.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    many = sample_cots(model.backbone, processor, prefixes[:3], [[1, 2, 3], [4], [5, 6]], 8)
    hook.remove()
    assert sum(len(grid) for kwargs in seen for name, grid in kwargs.items() if name == "grid_thw") == 3  # not 6
    assert [len(row) for row in many] == [3, 1, 2]
    one_by_one = [[sample_cots(model.backbone, processor, [prefix], [[seed]], 8)[0][0] for seed in row]
                  for prefix, row in zip(prefixes, [[1, 2, 3], [4], [5, 6]])]
    assert many == one_by_one


def test_clips_of_several_sizes_share_a_batch(model, processor):
    """A CoT's positions start behind its OWN video, whose position count depends on its frames' number and size."""
    rng, prefixes = np.random.default_rng(0), []
    for count, height, width in ((2, 64, 64), (8, 128, 64), (4, 32, 192)):
        frames = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        video = data.Video(frames, 2.0, count, tuple(range(count)))
        prefixes.append(data.encode_prompt(processor, video, "a red square " * count))
    many = sample_cots(model.backbone, processor, prefixes, [[1], [2], [3]], 24)
    assert len(model.backbone.model.rope_deltas.unique()) == 3  # else nothing is tested here
    assert many == [sample_cots(model.backbone, processor, [p], [[k]], 24)[0] for k, p in enumerate(prefixes, 1)]


def test_sampling_follows_softmax_and_stops(model, prefixes, processor):
    with torch.no_grad():  # a model that likes all tokens equally
        model.backbone.lm_head.weight.zero_()
    (cots,) = sample_cots(model.backbone, processor, prefixes[:1], [list(range(60))], 40)
    drawn = [token for cot in cots for token in cot]
    assert len(set(drawn)) > 100  # flat logits: temperature 1 spreads over the vocabulary
    eos = processor.tokenizer.eos_token_id
    assert all(eos not in cot[:-1] for cot in cots)  # nothing after EOS; cut-off CoTs have none
    assert all(len(cot) == 40 or cot[-1] == eos for cot in cots)


def test_only_text_eos_and_think_can_be_sampled(model, prefixes, processor):
    rows = model.backbone.config.text_config.vocab_size
    names = {i: token for token, i in processor.tokenizer.get_vocab().items()}
    banned = rollout.banned_tokens(processor.tokenizer, rows)
    assert set(banned) >= set(range(len(names), rows)) and rows > len(names)  # rows without a token
    added = {i: token.content for i, token in processor.tokenizer.added_tokens_decoder.items()}
    assert {added[i] for i in added.keys() - set(banned)} == {"<|im_end|>", "<think>", "</think>"}
    assert not set(names) - set(added) & set(banned)
    with torch.no_grad():  # a model that wants nothing but what is banned
        model.backbone.lm_head.weight.zero_()[banned] = torch.randn(len(banned), 64).sign() * 3
    for temperature in (1.0, 0.0):
        (cots,) = sample_cots(model.backbone, processor, prefixes[:1], [list(range(20))], 20, temperature)
        assert not {token for cot in cots for token in cot} & set(banned)


def test_seeded_sampling_draws_from_the_softmax():
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).expand(3000, 3)
    sampler = rollout.SeededSampling(list(range(3000)), temperature=1.0)
    share = torch.bincount(sampler(None, logits).argmax(-1), minlength=3) / 3000
    assert share.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.04)
    sampler = rollout.SeededSampling(list(range(3000)), temperature=2.0)  # p^(1/2), normalised: flatter
    share = torch.bincount(sampler(None, logits).argmax(-1), minlength=3) / 3000
    assert share.tolist() == pytest.approx([0.473, 0.334, 0.193], abs=0.04)


def test_greedy_matches_the_models_own_argmax(model, prefixes, processor):
    ((cot,),) = sample_cots(model.backbone, processor, prefixes[:1], [[0]], 4, temperature=0.0)
    for t in range(len(cot)):
        batch = lay_out(model.backbone, prefixes[:1], [[cot[: t + 1]]])
        others = [model(lay_out(model.backbone, prefixes[:1], [[cot[:t] + [o]]])).log_probs[0, t] for o in (70, 81, 95)]
        assert model(batch).log_probs[0, t] >= max(others)
