"""DeScore: layout, packing, log-probs, rewards, gradients, sampling, and every checkpoint's round trip."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import rollout
from lab import import_released
from plumbing import checkpoint
import data
import grpo
from conftest import refuses
from data import InputError
from losses import bt_loss, grpo_loss
from model import DeScore, lay_out
from rollout import decode_cot, sample_cots

COTS = [[[70, 71, 72, 73], [80], []], [[90, 91, 92, 93, 94, 95, 96], [75, 76], [77, 78, 79]]]  # [video][G], unequal


def flat(prefixes, cots):
    """The plain path of the same rollouts: a row per CoT."""
    return [p for p, row in zip(prefixes, cots) for _ in row], [[cot] for row in cots for cot in row]


def row_mask(batch):
    """(B, L), 1 at tokens, 0 at padding, as transformers' own forward wants it; one CoT per row."""
    ends = torch.tensor([start + n for _, ((start, n),) in batch["spans"]])
    return (torch.arange(batch["input_ids"].shape[1]) < ends[:, None]).long()


def loss_of(model, batch):
    """Something that depends on every reward and every log-prob, asymmetrically."""
    output = model(batch)
    weights = torch.linspace(-1, 1.5, len(output.rewards))
    return output, (output.rewards * weights).sum() + (output.log_probs * weights[:, None]).sum() / 10


def gradients(model, batch):
    model.zero_grad()
    output, loss = loss_of(model, batch)
    loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -- layout -------------------------------------------------------------------------------------------------------
def test_layout_by_hand(model, prefixes):
    prefix, length = prefixes[0], len(prefixes[0]["input_ids"])
    batch = lay_out(model.backbone, [prefix], [[[70, 71], [80]]])
    assert batch["input_ids"][0, length:].tolist()[:2] == [70, 71] and batch["input_ids"].shape[1] == length + 5
    assert batch["spans"] == [(length, [(length, 3), (length + 3, 2)])]
    assert batch["query_index"].tolist() == [length + 2, length + 4]
    # tokens are predicted one position earlier; the first token of BOTH CoTs by the prefix's last position
    assert batch["response_index"].tolist() == [[length - 1, length], [length - 1, 0]]
    assert batch["response_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["query_mask"][0].nonzero().flatten().tolist() == [length + 2, length + 4]
    first, second = batch["position_ids"][:, 0, length : length + 3], batch["position_ids"][:, 0, length + 3 :]
    assert torch.equal(first[:, :2], second)  # each CoT's positions restart right after the prefix
    assert first[0, 0] == batch["position_ids"][:, 0, :length].max() + 1


def test_packed_equals_plain_in_rewards_log_probs_and_gradients(model, prefixes):
    packed = lay_out(model.backbone, prefixes[:2], COTS)
    plain = lay_out(model.backbone, *flat(prefixes[:2], COTS))
    for lora in (False, True):
        model.make_trainable("lora" if lora else "full", vision=True, lora_r=4, lora_alpha=8, lora_dropout=0.0)
        for layer in model.lora_layers().values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        for checkpointing in (False, True):
            model.train()
            if checkpointing:
                model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.backbone.gradient_checkpointing_disable()
            one, grads_one = gradients(model, packed)
            many, grads_many = gradients(model, plain)
            assert torch.allclose(one.rewards, many.rewards, atol=1e-5)
            assert torch.allclose(one.log_probs, many.log_probs, atol=1e-4)
            assert set(grads_one) == set(grads_many) == {n for n, p in model.named_parameters() if p.requires_grad}
            for name, grad in grads_many.items():
                assert (grads_one[name] - grad).norm() <= 2e-5 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("cots", [[[[70, 71]]], [[[]]], [[[70] * 9, [], [71]]], [[[70]] * 8]])
def test_packing_any_number_and_length(model, prefixes, cots):
    one = model(lay_out(model.backbone, prefixes[:1], cots))
    many = model(lay_out(model.backbone, *flat(prefixes[:1], cots)))
    assert torch.allclose(one.rewards, many.rewards, atol=1e-5) and torch.allclose(
        one.log_probs, many.log_probs, atol=1e-4
    )


# -- one forward, both objectives -----------------------------------------------------------------------------------
def test_log_probs_equal_transformers_own_logits(model, prefixes):
    batch = lay_out(model.backbone, prefixes[:2], [[[70, 71, 72]], [[90]]])
    types = torch.where(batch["input_ids"] == model.backbone.config.video_token_id, 2, 0)
    logits = model.backbone(
        input_ids=batch["input_ids"], attention_mask=row_mask(batch), mm_token_type_ids=types,
        pixel_values_videos=batch["pixel_values_videos"], video_grid_thw=batch["video_grid_thw"],
    ).logits  # transformers' own positions and embedding: (2, L, V)
    ours = model(batch).log_probs
    for row, prefix, cot in ((0, prefixes[0], [70, 71, 72]), (1, prefixes[1], [90])):
        for t, token in enumerate(cot):
            theirs = logits[row, len(prefix["input_ids"]) + t - 1].log_softmax(-1)[token]
            assert ours[row, t].item() == pytest.approx(theirs.item(), abs=1e-5)
    assert ours[1, 1:].tolist() == [0.0, 0.0]  # padding


def test_the_query_changes_nothing_before_it(model, prefixes):
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71, 72]]])
    before = model(batch)
    with torch.no_grad():
        model.query.add_(1.0)
    after = model(batch)
    assert torch.equal(before.log_probs, after.log_probs) and not torch.equal(before.rewards, after.rewards)


def test_the_frozen_tower_looks_once_at_a_batch(model, prefixes):
    """What it saw comes back in the Output; handed to a next pass, the result is the same without another look."""
    looks = []
    model.backbone.model.visual.register_forward_hook(lambda *_: looks.append(1))
    batch = lay_out(model.backbone, prefixes[:2], [[[5, 6], [7]], [[8], [9, 10]]])
    with torch.no_grad():
        first, second = model(batch), model(batch)
        assert len(looks) == 2
        shared = model(batch, video_features=first.video_features)
    assert len(looks) == 2
    assert torch.equal(first.log_probs, second.log_probs) and torch.equal(first.log_probs, shared.log_probs)


def test_lm_head_in_chunks(model, prefixes):
    batch = lay_out(model.backbone, prefixes[:2], COTS)
    whole, whole_grads = gradients(model, batch)
    model.logit_chunk = 3
    chunked, chunked_grads = gradients(model, batch)
    assert torch.allclose(whole.log_probs, chunked.log_probs, atol=1e-6)
    assert all(torch.allclose(whole_grads[n], chunked_grads[n], atol=1e-5) for n in whole_grads)


def test_reward_does_not_depend_on_padding_or_batch_mates(model, prefixes):
    cots = [[[70, 71]], [[80] * 12], [[]], [[90]]]
    together = model(lay_out(model.backbone, prefixes, cots)).rewards
    alone = torch.cat([model(lay_out(model.backbone, [p], [c])).rewards for p, c in zip(prefixes, cots)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.std() > 1e-3  # different videos do get different rewards


def test_grpo_gradient_never_reaches_the_head_and_bt_reaches_the_llm(model, prefixes):
    model.make_trainable("full", vision=False)
    output = model(lay_out(model.backbone, prefixes[:2], [[[70, 71]], [[90]]]))
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    grpo_loss(output.log_probs, output.log_probs.detach(), torch.tensor([1.0, -1.0]), mask).backward(retain_graph=True)
    assert model.head.weight.grad is None  # not on the way from the CoT's log-probs to the LLM
    assert model.query.grad is None or not model.query.grad.any()  # in the row, but no CoT token looks at it
    assert model.backbone.lm_head.weight.grad.any()
    model.zero_grad()
    bt_loss(output.rewards[:1], output.rewards[1:]).backward()
    assert model.head.weight.grad.any() and model.query.grad.any()
    assert model.backbone.model.language_model.layers[0].mlp.up_proj.weight.grad.any()


def test_micro_batches_give_the_gradient_of_the_batch(model, prefixes):
    cots = [[[70, 71, 72]], [[80]], [[90, 91]], [[]]]
    advantages, tokens = torch.tensor([1.0, -1.0, 0.5, 0.2]), 6

    def grads(parts):
        model.zero_grad()
        for part in parts:
            batch = lay_out(model.backbone, prefixes[part], cots[part])
            out = model(batch)
            args = out.log_probs, out.log_probs.detach(), advantages[part], batch["response_mask"]
            loss = grpo_loss(*args, denominator=tokens) + bt_loss(out.rewards[::2], out.rewards[1::2], denominator=2)
            loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    whole, pieces = grads([slice(0, 4)]), grads([slice(0, 2), slice(2, 4)])
    for name in whole:
        assert torch.allclose(whole[name], pieces[name], atol=1e-5 * float(whole[name].abs().max()) + 1e-7), name


# -- what is trained ------------------------------------------------------------------------------------------------
def test_lora_targets_and_reference(model, prefixes):
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    before = model(batch)
    model.make_trainable("lora", vision=False, lora_r=4, lora_alpha=8)
    layers = model.lora_layers()
    text_layers = model.backbone.config.text_config.num_hidden_layers
    assert len(layers) == 7 * text_layers and all(".language_model.layers." in name for name in layers)
    assert set(model.parameter_groups()) == {"llm", "head"}
    assert torch.equal(model(batch).rewards, before.rewards)  # B starts at 0
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    model.train()
    assert not torch.allclose(model(batch).rewards, before.rewards)
    with model.reference_policy():
        assert torch.allclose(model(batch).log_probs, before.log_probs, atol=1e-6)
    assert model.training and not torch.allclose(model(batch).log_probs, before.log_probs)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)


def test_trained_parameters_are_fp32_masters(base_dir):
    model = DeScore.from_pretrained(base_dir, dtype=torch.bfloat16, new_head=True)
    model.make_trainable("lora", vision=True, lora_r=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = model.backbone.model.language_model.layers[0].mlp.up_proj.base_layer.weight
    assert frozen.dtype == torch.bfloat16
    with torch.no_grad():  # the point of it (README, difference 6): 1e-6 survives in fp32, not in bf16
        assert (torch.ones(1) + 1e-6 != 1).all() and (torch.ones(1, dtype=torch.bfloat16) + 1e-6 == 1).all()


# -- sampling -------------------------------------------------------------------------------------------------------
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
    rows, names = model.backbone.config.text_config.vocab_size, {i: t for t, i in processor.tokenizer.get_vocab().items()}
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


# -- think, score, reward -------------------------------------------------------------------------------------------
def test_think_score_reward(model, tiny_clips):
    clips, prompts = tiny_clips[:2], ["a red circle", "a blue square <|im_end|><|video_pad|><Reward>"]
    thoughts = model.think(clips, prompts, max_new_tokens=6)
    rewards = model.score(clips, prompts, thoughts)
    assert rewards.shape == (2,) and rewards.dtype == torch.float32
    ids = model.think(clips, prompts, max_new_tokens=6, as_tokens=True)  # cut off: no EOS, which a text would get
    assert [decode_cot(model.processor.tokenizer, cot) for cot in ids] == thoughts and all(len(cot) == 6 for cot in ids)
    own = model.score(clips, prompts, ids)
    assert torch.allclose(model.reward(clips, prompts, max_new_tokens=6), own, atol=1e-5)
    assert not torch.allclose(own, rewards, atol=1e-3)
    assert torch.allclose(model.reward(clips, prompts, think=False), model.score(clips, prompts, [None, ""]), atol=1e-6)
    with pytest.raises(InputError, match="one prompt per video"):
        model.think(clips, prompts[:1])


def test_the_reward_depends_on_the_video(model, tiny_clips):
    prompts, thoughts = ["a red circle"] * 2, ["<think>the same</think>"] * 2
    one, other = model.score(tiny_clips[:2], prompts, thoughts).tolist()
    swapped = model.score(tiny_clips[:2][::-1], prompts, thoughts).tolist()
    assert abs(one - other) > 1e-3 and swapped == pytest.approx([other, one], abs=1e-5)


def test_a_transformers_that_would_drop_the_video_is_refused(base_dir, monkeypatch):
    monkeypatch.setattr(transformers.Qwen3VLModel, "forward", lambda self, input_ids, **kwargs: None)
    for empty in (False, True):
        with pytest.raises(InputError, match="would not see the video; 5.18 or newer"):
            DeScore.from_pretrained(base_dir, new_head=True, empty=empty)


def test_several_thoughts_cost_one_prefix_and_score_as_alone(model, tiny_clips):
    clips, prompts = tiny_clips[:2], ["a red circle", "a blue square"]
    thoughts = [["<think>one</think>", "two", ""], ["three", None, "a longer thought than the others"]]
    together = model.score_several(clips, prompts, thoughts)
    alone = torch.stack([model.score(clips, prompts, list(column)) for column in zip(*thoughts)], dim=1)
    assert together.shape == (2, 3) and torch.allclose(together, alone, atol=1e-5)


def test_frames_in_memory_score_like_a_file(model, tiny_clips):
    import decord

    frames = decord.VideoReader(tiny_clips[0])[:].asnumpy()  # all frames, full size
    fps = decord.VideoReader(tiny_clips[0]).get_avg_fps()
    reward = lambda video, **more: model.score([video], ["a circle"], ["<think>x</think>"], **more)
    from_file = reward(tiny_clips[0])
    assert torch.allclose(reward(frames, source_fps=fps), from_file, atol=1e-5)
    assert torch.allclose(reward(torch.tensor(frames) / 255.0, source_fps=fps), from_file, atol=1e-3)
    with pytest.raises(InputError, match="source_fps"):
        reward(frames)


# -- checkpoints ----------------------------------------------------------------------------------------------------
def disturb(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)


def test_lora_round_trip(model, prefixes, tmp_path):
    model.make_trainable("lora", vision=True, lora_r=4, lora_alpha=8)
    disturb(model)
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    expected = model.eval()(batch)
    model.save_pretrained(str(tmp_path))
    again = DeScore.from_pretrained(str(tmp_path))
    assert torch.allclose(again(batch).rewards, expected.rewards, atol=1e-5)
    assert torch.allclose(again(batch).log_probs, expected.log_probs, atol=1e-4)


@pytest.mark.parametrize("file_bytes", [4 << 30, 200_000])
def test_merged_folder_is_a_plain_qwen3_vl(model, prefixes, tmp_path, monkeypatch, file_bytes):
    """In one file of weights or in several, with an index."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    model.make_trainable("lora", vision=True, lora_r=4, lora_alpha=8)
    disturb(model)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", file_bytes)
    model.save_pretrained(str(tmp_path))
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 4 if file_bytes < 1e6 else [file.name for file in files] == ["model.safetensors"]
    plain, info = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = lay_out(plain, prefixes[:1], [[[70, 71]]])
    assert torch.allclose(DeScore(plain)(batch).log_probs, model.eval()(batch).log_probs, atol=1e-4)
    AutoProcessor.from_pretrained(tmp_path)
    assert torch.allclose(DeScore.from_pretrained(str(tmp_path))(batch).rewards, model(batch).rewards, atol=1e-5)


def test_what_was_trained_is_saved_in_fp32(base_dir, prefixes, tmp_path):
    """LoRA on a bf16 base, as on a GPU: one type for all, and an update below half a step of bf16 is not rounded away."""
    model = DeScore.from_pretrained(base_dir, dtype=torch.bfloat16, new_head=True)
    model.make_trainable("lora", vision=True, lora_r=2, lora_alpha=2)
    name = "backbone.model.language_model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    base = layer.base_layer.weight.detach().float()
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1e-3)
        layer.lora_B["default"].weight.fill_(1e-3)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "float32"
    update = saved[f"{name.removeprefix('backbone.')}.weight"] - base
    assert torch.allclose(update, torch.full_like(update, 2e-6), atol=1e-7)  # alpha / r * B A = 1 * (2 * 1e-3 * 1e-3)
    assert ((base + 2e-6).bfloat16().float() == base).float().mean() > 0.9  # in bf16 nearly all of it would be gone


def test_a_second_stage_keeps_the_first(model, prefixes, tmp_path):
    """README, difference 17: stage 2 must start from stage 1's weights, not from the base model's."""
    model.make_trainable("lora", vision=False, lora_r=4, lora_alpha=8)
    disturb(model)
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    expected = model.eval()(batch).rewards
    model.save_pretrained(str(tmp_path / "stage1"))
    second = DeScore.from_pretrained(str(tmp_path / "stage1"))
    second.make_trainable("lora", vision=False, lora_r=4, lora_alpha=8)
    assert torch.allclose(second.eval()(batch).rewards, expected, atol=1e-5)
    second.save_pretrained(str(tmp_path / "stage2"))
    assert torch.allclose(DeScore.from_pretrained(str(tmp_path / "stage2"))(batch).rewards, expected, atol=1e-5)


def test_loading_is_strict(tiny_model_dir, base_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(tiny_model_dir, folder)
        change(folder)
        with pytest.raises(InputError) as error:
            DeScore.from_pretrained(str(folder))
        return str(error.value)

    def edit(folder, file, change):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    def edit_json(folder, **values):
        settings = json.loads((folder / "descore.json").read_text())
        (folder / "descore.json").write_text(json.dumps(settings | values))

    assert "query" in broken("no query", lambda f: edit(f, "reward_head/head.safetensors", lambda t: t.pop("query")))
    assert "extra" in broken(
        "extra", lambda f: edit(f, "reward_head/head.safetensors", lambda t: t.update(more=torch.ones(1)))
    )
    assert "base model" in broken(
        "size", lambda f: edit(f, "reward_head/head.safetensors", lambda t: t.update(query=torch.ones(8)))
    )
    assert "hidden_size" in broken("other base", lambda f: edit_json(f, hidden_size=4096))
    assert "missing keys" in broken("hole", lambda f: edit(f, "model.safetensors", lambda t: t.pop(sorted(t)[3])))
    assert "unexpected keys" in broken(
        "odd", lambda f: edit(f, "model.safetensors", lambda t: t.update(odd=torch.ones(1)))
    )
    with pytest.raises(InputError, match="no reward head"):
        DeScore.from_pretrained(base_dir)
    with pytest.raises(InputError, match="cannot be opened"):
        DeScore.from_pretrained(str(tmp_path), new_head=True)


def test_a_directory_that_is_no_checkpoint_is_one_sentence(tmp_path, world, capsys):
    flags = ["--model", tmp_path, "--data", world["train_rl"], "--batch-pairs", 2, "--mini-pairs", 2]
    refuses(capsys, grpo.main, *flags, "--out", tmp_path / "out", says="no reward head")


def test_query_is_bit_equal_to_a_vocabulary_row(model, prefixes):
    """A parameter in `inputs_embeds` is the same as a `<Reward>` row of the embedding."""
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    as_parameter = model(batch).rewards
    row, embedding = 99, model.backbone.get_input_embeddings().weight
    with torch.no_grad():
        embedding[row] = model.query
    ids = torch.where(batch["query_mask"], row, batch["input_ids"])
    types = torch.where(ids == model.backbone.config.video_token_id, 2, 0)
    hidden = model.backbone.model(
        input_ids=ids, attention_mask=row_mask(batch), mm_token_type_ids=types,
        pixel_values_videos=batch["pixel_values_videos"], video_grid_thw=batch["video_grid_thw"],
    ).last_hidden_state
    assert torch.equal(model.head(hidden[0, -1]), as_parameter)
    assert data.encode_text(model.processor.tokenizer, "<Reward>")  # only text


def test_import_of_a_released_checkpoint(model, prefixes, processor, tmp_path):
    """A Hugging Face folder with a `<Reward>` row plus rm_head.pth: row -> query, rm_head -> head, the same reward."""
    import copy

    released = copy.deepcopy(processor)
    released.tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<Reward>"]}, replace_extra_special_tokens=False
    )
    row = released.tokenizer.convert_tokens_to_ids("<Reward>")
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    expected = model(batch).rewards
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[row] = model.query
    folder = str(tmp_path / "released")
    model.backbone.save_pretrained(folder)
    released.save_pretrained(folder)
    torch.save({"model": {"base_model.model.rm_head.weight": model.head.weight.data}}, f"{folder}/rm_head.pth")
    import_released.main(["--dir", folder, "--out", str(tmp_path / "ours")])
    ours = DeScore.from_pretrained(str(tmp_path / "ours"))
    assert torch.allclose(ours(batch).rewards, expected, atol=1e-5)
    assert row in rollout.banned_tokens(ours.processor.tokenizer, row + 1)
    assert row not in data.encode_text(ours.processor.tokenizer, "<Reward>")
    torch.save({"rm_head.weight": torch.ones(1, 8)}, f"{folder}/rm_head.pth")
    with pytest.raises(InputError, match="rm_head.weight of shape"):
        import_released.import_released(folder)

    class Evil:
        def __reduce__(self):
            return print, ("pickled code ran",)

    torch.save({"rm_head.weight": Evil()}, f"{folder}/rm_head.pth")
    with pytest.raises(InputError, match="more than plain tensors"):
        import_released.import_released(folder)


def test_normalized_rewards_and_thoughts(model, tiny_clips):
    arguments = (tiny_clips[:2], ["a red circle", "a blue square"])
    with pytest.raises(InputError, match="reward_mean"):
        model.reward(*arguments, think=False, normalize=True)
    model.settings.update(reward_mean=2.0, reward_std=4.0)
    plain = model.reward(*arguments, think=False)
    assert torch.allclose(model.reward(*arguments, think=False, normalize=True), (plain - 2) / 4)
    rewards, thoughts = model.reward(*arguments, max_new_tokens=3, with_thoughts=True)
    assert thoughts == model.think(*arguments, max_new_tokens=3) and rewards.shape == (2,)


def test_an_empty_model_is_read_part_by_part_and_equals_the_whole(model, tiny_model_dir, tmp_path):
    """What sharded loading builds on: nothing is in memory before `fill`, and `fill` of a part reads that part only."""
    model.make_trainable("lora", vision=True, lora_r=4, lora_alpha=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01 * parameter.requires_grad)  # the vision tower too
    model.save_pretrained(str(tmp_path))
    for folder in (tiny_model_dir, str(tmp_path)):
        whole = DeScore.from_pretrained(folder).state_dict()
        empty = DeScore.from_pretrained(folder, empty=True)
        on_disk = [p for name, p in empty.named_parameters() if name.startswith("backbone.") and ".lora_" not in name]
        assert on_disk and all(p.is_meta for p in on_disk)
        block = empty.backbone.model.language_model.layers[0]
        checkpoint.fill(empty, block, "cpu")
        assert not any(p.is_meta for p in block.parameters()) and sum(p.is_meta for p in on_disk) == len(on_disk)
        checkpoint.fill(empty, empty, "cpu")
        for name, value in empty.state_dict().items():
            assert torch.equal(value, whole[name]), name
    query = DeScore.from_pretrained(tiny_model_dir, new_head=True, empty=True).query
    assert torch.equal(query, DeScore.from_pretrained(tiny_model_dir).query)


def test_empty_loading_is_strict(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    file = str(folder / "model.safetensors")
    tensors, name = load_file(file), "model.language_model.norm.weight"
    for broken, says in (
        ({k: v for k, v in tensors.items() if k != name}, "1 missing keys"),
        ({**tensors, "more": torch.zeros(1)}, "1 unexpected keys, e.g. more"),
        ({**tensors, name: torch.zeros(3)}, "1 mismatched keys"),
    ):
        save_file(broken, file)
        with pytest.raises(InputError, match=says):
            DeScore.from_pretrained(str(folder), empty=True)


def test_random_init_needs_no_weights_and_is_the_same_on_every_rank(base_dir, prefixes, tmp_path):
    folder = shutil.copytree(base_dir, tmp_path / "sizes", ignore=shutil.ignore_patterns("*.safetensors"))
    models = [DeScore.from_pretrained(str(folder), random_init=True) for _ in "ab"]
    for one in models:
        checkpoint.fill(one, one, "cpu")
    a, b = (one.backbone.state_dict() for one in models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    with torch.no_grad():
        rewards = models[0](lay_out(models[0].backbone, prefixes[:1], [[[5, 6, 7]]])).rewards
    assert torch.isfinite(rewards).all()


def test_saved_weights_are_readable_as_the_umask_says(model, tmp_path):
    before = os.umask(0o022)
    try:
        model.save_pretrained(str(tmp_path))
        assert os.umask(0o022) == 0o022  # and the umask is left as it was
    finally:
        os.umask(before)
    for file in tmp_path.rglob("*.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o644, file


def test_a_damaged_file_of_weights_is_one_sentence(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be opened as a Qwen3-VL"):
        DeScore.from_pretrained(str(tmp_path / "m"))
