"""Sampling CoTs from the softmax; an engine takes over new weights."""

import concurrent.futures
import time

import numpy as np
import pytest
import torch

import data
import parallel
import rollout
from layout import lay_out
from model import DeScore
from plumbing.jobs import task_seed
from plumbing.checkpoint import open_model
from rollout import sample_cots


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


@pytest.mark.parametrize("train", ["full", "lora"])
def test_an_engine_with_lora_beside_its_base_takes_over_weights(base_dir, model, prefixes, tmp_path, train):
    """The engine's own copy in bf16 of a folder with LoRA: it is sent W + B A, and keeps B A beside what is left. Full
    fine-tuning loses nothing so; of an adapter that is trained on top, rounding leaves what fits beside W."""
    model.make_trainable("lora", vision=False, lora_r=4, lora_alpha=8)
    for layer in model.lora_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=1e-3)
    model.save_pretrained(str(tmp_path))
    trained = open_model(DeScore, str(tmp_path), merged=False)
    trained.make_trainable(train, vision=False, lora_r=4)
    engine = rollout.TransformersEngine(rollout.load_backbone(str(tmp_path), torch.bfloat16), None, shared=False)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad and name.startswith("backbone."):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    engine.sync(parallel.trained_weights(trained))
    for name, layer in trained.lora_layers().items():
        name = name.removeprefix("backbone.")
        own, new = engine.backbone.get_submodule(name), layer.base_layer.weight
        if train == "lora":
            new = new + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert torch.allclose(own.base_layer.weight.float(), new, rtol=2**-8, atol=1e-5)
        assert torch.equal(own.lora_B["kept"].weight, layer.lora_B["kept"].weight)
    batch = lay_out(trained.backbone, prefixes[:1], [[[70, 71]]])
    assert torch.allclose(DeScore(engine.backbone)(batch).log_probs, trained(batch).log_probs, atol=0.3)


def test_task_seed_is_stable():
    first, again, other = (task_seed(0, "a.mp4", "p", k) for k in (1, 1, 2))
    assert first == again != other


def test_sampling_depends_on_the_seed_alone(model, prefixes, processor):
    many = sample_cots(model.backbone, processor, prefixes, [[1, 2], [3, 4], [5, 6], [7, 8]], 8)
    alone = sample_cots(model.backbone, processor, prefixes[2:3], [[6]], 8)
    assert alone[0][0] == many[2][1] and many[0][0] != many[0][1]
    assert [len(row) for row in many] == [2, 2, 2, 2]


def test_no_more_rows_are_sampled_at_a_time_than_asked_for(model, prefixes, processor, monkeypatch):
    """--rows-per-batch below --rollouts, too: it is what a full GPU is told to lower. The CoTs stay the same."""
    sizes, real, seeds = [], rollout.sample_cots, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12]]
    monkeypatch.setattr(rollout, "sample_cots", lambda *a: sizes.append(sum(map(len, a[3]))) or real(*a))
    found = []
    for rows, wanted in ((64, [12]), (2, [2, 2, 1, 2, 2, 1, 2]), (1, [1] * 12)):
        sizes.clear()
        engine = rollout.TransformersEngine(model.backbone, processor, True, rows)
        found.append(engine.generate(prefixes[:3], seeds, 8))
        assert sizes == wanted
    assert found[0] == found[1] == found[2] and [len(row) for row in found[0]] == [5, 5, 2]


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


def test_two_threads_sample_one_after_the_other(model, tiny_clips, monkeypatch):
    """Trainers call scorers from threads, and the class keeps a prompt's offsets in the model until it has sampled."""
    parts = [model.encode(tiny_clips[:n], ["a red circle"] * n) for n in (1, 3)]
    alone, generate = [model.think(part, 4) for part in parts], model.backbone.generate

    def slow(**more):
        time.sleep(0.3)  # between the reading of the prompt and the sampling the other thread reads its own
        return generate(**more)

    monkeypatch.setattr(model.backbone, "generate", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda part: model.think(part, 4), parts)) == alone


@pytest.mark.parametrize("trains", [True, False])
def test_the_engine_samples_as_its_caller_computes(base_dir, world, trains):
    """A trainer on one GPU in bf16 under autocast: else another policy samples than the one whose log-probs are taken.
    An evaluation with --dtype float32 in fp32: nothing may cast there because a trainer would."""
    ranks, seen = parallel.Ranks(), set()
    model = DeScore.from_pretrained(base_dir, new_head=True)
    model.make_trainable("lora", vision=False, lora_r=4, lora_dropout=0.0)
    ranks.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    how = {"autocast": ranks.autocast} if trains else {}
    engine = rollout.make_engine("transformers", base_dir, model.processor, ranks, model.backbone, **how)
    model.backbone.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    _, prefixes = data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)[0]
    (cots, _) = engine.generate(prefixes, [[1, 2], [3, 4]], 6)
    assert seen == {torch.bfloat16 if trains else torch.float32} and all(cots)


def test_rare_tokens_are_sampled():
    """Of probability .002 and .0005: 60 and 15 of 30,000 draws. A cut-off noise would never reach them, and GRPO would
    sample from another policy than the one whose log-probs it trains."""
    logits = torch.log(torch.tensor([[0.9975, 0.002, 0.0005]])).expand(10, 3)
    sampler = rollout.SeededSampling(list(range(10)), temperature=1.0)  # 3,000 tokens of 10 rows: noise is drawn ahead
    drawn = torch.bincount(torch.cat([sampler(None, logits).argmax(-1) for _ in range(3_000)]), minlength=3)
    assert 60 - 4 * 60**0.5 < drawn[1] < 60 + 4 * 60**0.5 and 2 < drawn[2] < 15 + 4 * 15**0.5


def test_greedy_matches_the_models_own_argmax(model, prefixes, processor):
    ((cot,),) = sample_cots(model.backbone, processor, prefixes[:1], [[0]], 4, temperature=0.0)
    for t in range(len(cot)):
        batch = lay_out(model.backbone, prefixes[:1], [[cot[: t + 1]]])
        others = [model(lay_out(model.backbone, prefixes[:1], [[cot[:t] + [o]]])).log_probs[0, t] for o in (70, 81, 95)]
        assert model(batch).log_probs[0, t] >= max(others)


def test_noise_is_drawn_ahead_and_is_a_row_s_own():
    """Of a small vocabulary several tokens at once; alone, in a batch or after an earlier token: the same draws."""
    logits = torch.zeros(3, 5_000)  # 16,384 // 5,000: three tokens at a time
    batch, alone = rollout.SeededSampling([7, 8, 9], 1.0), rollout.SeededSampling([8], 1.0)
    drawn = [(batch(None, logits)[1], alone(None, logits[:1])[0]) for _ in range(7)]
    assert all(torch.equal(one, other) for one, other in drawn)
    assert len({one.argmax().item() for one, _ in drawn}) == 7  # and each token has its own
    generator = torch.Generator().manual_seed(8)
    first = -torch.log(-torch.log(torch.rand(5_000, generator=generator).clamp(1e-20, 1 - 1e-7)))
    assert torch.equal(drawn[0][0], first)
