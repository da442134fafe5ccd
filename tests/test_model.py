"""DeScore: packing, log-probs, rewards, gradients, what is trained, think-score-reward."""

import collections

import pytest
import torch

import data
import evaluate
import model as model_module
from layout import lay_out
from losses import bt_loss, grpo_loss
from model import DeScore
from plumbing.logs import mean_and_std, reward_scale
from plumbing.settings import InputError, write_jsonl
from prefix_once import lay_out_behind
from rollout import decode_cot

COTS = [[[70, 71, 72, 73], [80], []], [[90, 91, 92, 93, 94, 95, 96], [75, 76], [77, 78, 79]]]  # [video][G], unequal


def flat(prefixes, cots):
    """The plain path of the same rollouts: a row per CoT."""
    return [p for p, row in zip(prefixes, cots) for _ in row], [[cot] for row in cots for cot in row]


def row_mask(batch):
    """(B, L), 1 at tokens, 0 at padding, as transformers' own forward wants it; one CoT per row."""
    ends = torch.tensor([start + n for _, ((start, n),) in batch["spans"]])
    return (torch.arange(batch["input_ids"].shape[1]) < ends[:, None]).long()


def texts_to_ids(model, texts):
    return [data.encode_cot(model.processor.tokenizer, text) for text in texts]


def loss_of(model, batch):
    """Something that depends on every reward and every log-prob, asymmetrically."""
    output = model(batch)
    return output, weighed(output)


def weighed(output):
    weights = torch.linspace(-1, 1.5, len(output.rewards))
    return (output.rewards * weights).sum() + (output.log_probs * weights[:, None]).sum() / 10


def gradients(model, batch):
    model.zero_grad()
    output, loss = loss_of(model, batch)
    loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -- layout -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefixes_read_first_and_cots_laid_behind_equal_one_row(model, prefixes, lora, checkpointing):
    """Rewards, log-probs and gradients, with the graph whole and cut; the prefixes are of unlike lengths."""
    model.make_trainable("lora" if lora else "full", vision=True, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    for layer in model.lora_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    model.train()
    if checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    longer = {**prefixes[1], **{name: torch.cat([prefixes[1][name], prefixes[1][name][-3:]]) for name in
                                ("input_ids", "mm_token_type_ids")}}
    both = [prefixes[0], longer]
    one, expected = gradients(model, lay_out(model.backbone, both, COTS))
    for cutting in (False, True):
        model.zero_grad()
        past = model.read(lay_out(model.backbone, both, [[], []]))
        used = past.cut() if cutting else past
        output = model(lay_out_behind(model.backbone, both, COTS), past=used)
        assert torch.allclose(output.rewards, one.rewards, atol=1e-5)
        assert torch.allclose(output.log_probs, one.log_probs, atol=1e-4)
        weighed(output).backward()
        if cutting:
            past.backward(used)
        for name, grad in expected.items():
            found = dict(model.named_parameters())[name].grad
            assert (found - grad).norm() <= 2e-5 * grad.norm() + 1e-7, name


def test_in_bf16_a_few_cots_at_a_time_are_as_near_to_fp32_as_one_row(model, prefixes):
    """The prefixes' keys and values are bf16 then, and so are the sums of what six parts ask of them."""
    cots, both = [[[70 + i] * (3 + i) for i in range(6)], [[80 + i] * (8 - i) for i in range(6)]], prefixes[:2]
    model.make_trainable("full", vision=False)
    model.train()

    def backward(output):
        (output.rewards.square().sum() + output.log_probs.sum() / 10).backward()

    def collect(bf16: bool, parts: bool):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if not parts:
                backward(model(lay_out(model.backbone, both, cots)))
            else:
                past = model.read(lay_out(model.backbone, both, [[], []]))
                cut = past.cut()
                for i in range(6):
                    backward(model(lay_out_behind(model.backbone, both, [row[i : i + 1] for row in cots]), past=cut))
                past.backward(cut)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    right = collect(False, False)
    row, parts = ((collect(True, parts) - right).norm() / right.norm() for parts in (False, True))
    assert 1e-4 < parts <= 1.1 * row, (parts, row)


def test_what_the_tower_saw_serves_a_next_reading(model, prefixes):
    looks = []
    model.backbone.model.visual.register_forward_hook(lambda *_: looks.append(1))
    batch = lay_out(model.backbone, prefixes[:2], [[], []])
    with torch.no_grad():
        first, second = model.read(batch), model.read(batch)
        assert len(looks) == 2
        shared = model.read(batch, first.video_features)
    assert len(looks) == 2
    assert torch.equal(first.last, second.last) and torch.equal(first.last, shared.last)


def test_lm_head_in_chunks(model, prefixes, monkeypatch):
    batch = lay_out(model.backbone, prefixes[:2], COTS)
    whole, whole_grads = gradients(model, batch)
    monkeypatch.setattr("model.LOGIT_CHUNK", 3)
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
            args = out.log_probs, out.log_probs.detach(), advantages[part], batch["cot_mask"]
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


def test_no_dropout_in_the_kl_reference(model, prefixes):
    """Qwen3-VL is published with attention dropout 0; a backbone that has some must not get a random reference."""
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    model.make_trainable("lora", vision=False, lora_r=4, lora_dropout=0.5)
    expected = model.eval()(batch).log_probs  # B is 0: the adapters change nothing yet
    for layer in model.backbone.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert not torch.allclose(model(batch).log_probs, expected, atol=1e-3)  # else nothing is tested here
    with model.reference_policy():
        assert torch.allclose(model(batch).log_probs, expected, atol=1e-6)
    assert model.training


def test_where_training_starts(base_dir):
    """The query as an average word; each LoRA layer's A from its own name and the seed, so no two layers are alike."""
    def start(seed):
        torch.manual_seed(seed)
        model = DeScore.from_pretrained(base_dir, new_head=True)
        torch.manual_seed(seed)
        model.make_trainable("lora", vision=False, lora_r=4)
        return model, {name: layer.lora_A["default"].weight for name, layer in model.lora_layers().items()}

    (model, first), (_, again), (_, other) = start(0), start(0), start(1)
    words = model.backbone.get_input_embeddings().weight.float()
    assert torch.allclose(model.query, words.mean(dim=0)) and model.query.any()
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    for shape in {a.shape for a in first.values()}:
        alike = [a for a in first.values() if a.shape == shape]
        assert len({tuple(a.flatten().tolist()) for a in alike}) == len(alike) > 1


def test_trained_parameters_are_fp32_masters(base_dir):
    model = DeScore.from_pretrained(base_dir, dtype=torch.bfloat16, new_head=True)
    model.make_trainable("lora", vision=True, lora_r=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = model.backbone.model.language_model.layers[0].mlp.up_proj.base_layer.weight
    assert frozen.dtype == torch.bfloat16
    with torch.no_grad():  # the point of it (docs/differences.md, row 6): 1e-6 survives in fp32, not in bf16
        assert (torch.ones(1) + 1e-6 != 1).all() and (torch.ones(1, dtype=torch.bfloat16) + 1e-6 == 1).all()


# -- think, score, reward -------------------------------------------------------------------------------------------
def test_think_score_reward(model, tiny_clips):
    clips, prompts = tiny_clips[:2], ["a red circle", "a blue square <|im_end|><|video_pad|><Reward>"]
    prefixes = model.encode(clips, prompts)
    cots = model.think(prefixes, max_new_tokens=6)
    rewards = model.score(prefixes, cots)
    assert rewards.shape == (2,) and rewards.dtype == torch.float32
    assert all(len(cot) == 6 for cot in cots)  # cut off: no EOS, which a text would get
    assert torch.equal(model.reward(clips, prompts, max_new_tokens=6), rewards)
    other = model.score(prefixes, texts_to_ids(model, [decode_cot(model.processor.tokenizer, cot) for cot in cots]))
    assert not torch.allclose(other, rewards, atol=1e-3)
    assert torch.equal(model.reward(clips, prompts, think=False), model.score(prefixes, [None, []]))
    with pytest.raises(InputError, match="one prompt per video"):
        model.encode(clips, prompts[:1])


def test_each_clip_is_decoded_and_encoded_once(model, tiny_model_dir, tiny_clips, monkeypatch, capsys):
    """In `reward`, and in `evaluate.py --video` with several thoughts, whatever thinks and scores afterwards."""
    count = collections.Counter()

    def counted(name):
        real = getattr(data, name)
        monkeypatch.setattr(data, name, lambda *args, **more: count.update([name]) or real(*args, **more))

    for name in ("to_video", "sample_frames", "encode_prompt"):
        counted(name)
    model.reward(tiny_clips[:3], ["a circle"] * 3, max_new_tokens=3, with_thoughts=True)
    assert count == {"to_video": 3, "sample_frames": 3, "encode_prompt": 3}
    count.clear()
    evaluate.main(["--model", tiny_model_dir, "--video", tiny_clips[0], "--prompt", "a circle",
                   "--thoughts", "3", "--max-new-tokens", "3"])
    assert count["sample_frames"] == count["encode_prompt"] == 1
    assert capsys.readouterr().out.count("\nreward ") == 3


def test_reward_scores_a_few_at_a_time_none_at_all_and_tells_of_cut_cots(model, tiny_clips, monkeypatch):
    """Of 256 clips an 8B's forward would not fit into a GPU; a rank may have no clip; a cut CoT's reward is far off."""
    rows, lay_out = [], model_module.lay_out
    monkeypatch.setattr(model_module, "lay_out", lambda *args: rows.append(len(args[1])) or lay_out(*args))
    many = model.reward(tiny_clips[:2] * 10, ["a circle"] * 20, think=False)
    assert rows == [16, 4]
    assert torch.allclose(many, model.reward(tiny_clips[:2], ["a circle"] * 2, think=False).repeat(10), atol=1e-5)
    assert model.reward([], []).shape == (0,) and model.reward([], [], with_thoughts=True)[1] == []
    with pytest.warns(UserWarning, match=r"2 of 2 CoTs did not end within max_new_tokens \(1\)"):
        model.reward(tiny_clips[:2], ["a circle"] * 2, max_new_tokens=1)


def test_the_reward_depends_on_the_video(model, tiny_clips):
    prefixes = model.encode(tiny_clips[:2], ["a red circle"] * 2)
    cots = texts_to_ids(model, ["<think>the same</think>"] * 2)
    one, other = model.score(prefixes, cots).tolist()
    swapped = model.score(prefixes[::-1], cots).tolist()
    assert abs(one - other) > 1e-3 and swapped == pytest.approx([other, one], abs=1e-5)


def test_several_thoughts_cost_one_prefix_and_score_as_alone(model, tiny_clips):
    prefixes = model.encode(tiny_clips[:2], ["a red circle", "a blue square"])
    cots = [texts_to_ids(model, ["<think>one</think>", "two", ""]), texts_to_ids(model, ["three", None, "a longer"])]
    together = model.score(prefixes, cots)
    alone = torch.stack([model.score(prefixes, column) for column in zip(*cots)], dim=1)
    assert together.shape == (2, 3) and torch.allclose(together, alone, atol=1e-5)
    for ragged in ([cots[0][:1], cots[1]], [None, cots[1]]):  # 1 + 3 CoTs fill a table of 2 x 2, too
        with pytest.raises(InputError, match=r"score: prefixes with \[\d, \d\] CoTs; give each as many"):
            model.score(prefixes, ragged)
    assert model.score([], []).shape == model.reward([], []).shape == (0,)
    without = model.score(prefixes, [[None], [[]]])  # lists of one: a column
    assert without.shape == (2, 1) and torch.allclose(without[:, 0], model.score(prefixes, [None, []]), atol=1e-6)


def test_frames_in_memory_score_like_a_file(model, tiny_clips):
    import decord

    frames = decord.VideoReader(tiny_clips[0])[:].asnumpy()  # all frames, full size
    fps = decord.VideoReader(tiny_clips[0]).get_avg_fps()
    cots = texts_to_ids(model, ["<think>x</think>"])
    reward = lambda video, **more: model.score(model.encode([video], ["a circle"], **more), cots)
    from_file = reward(tiny_clips[0])
    assert torch.allclose(reward(frames, source_fps=fps), from_file, atol=1e-5)
    assert torch.allclose(reward(torch.tensor(frames) / 255.0, source_fps=fps), from_file, atol=1e-3)
    with pytest.raises(InputError, match="source_fps"):
        reward(frames)


def test_copies_of_a_video_think_differently_when_sampled(model, tiny_clips):
    """Each CoT has a random stream of its own, be it of a copy or one of `evaluate.py --video --thoughts 3`."""
    (prefix,) = model.encode(tiny_clips[:1], ["a red circle"])
    think = lambda **more: model.think([prefix] * 3, 12, **more)
    sampled = think(temperature=1.0)
    assert len(set(map(tuple, sampled))) == 3 and sampled == think(temperature=1.0) != think(temperature=1.0, seed=9)
    assert model.think([prefix], 12, temperature=1.0, thoughts=3) == [sampled]
    assert len(set(map(tuple, think()))) == 1  # greedy


def test_scoring_in_the_middle_of_training_has_no_dropout(model, tiny_clips):
    model.make_trainable("lora", vision=False, lora_r=4, lora_dropout=0.5)
    for layer in model.lora_layers().values():  # B starts at 0, and the adapter with its dropout would not show
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.train()
    prefixes, cots = model.encode(tiny_clips[:1], ["a red circle"]), texts_to_ids(model, ["<think>x</think>"])
    scores = [model.score(prefixes, cots) for _ in range(3)]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[1], scores[2]) and model.training


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


def test_normalized_rewards_and_thoughts(model, tiny_clips):
    arguments = (tiny_clips[:2], ["a red circle", "a blue square"])
    with pytest.raises(InputError, match="reward_mean"):
        model.reward(*arguments, think=False, normalize=True)
    model.settings.update(reward_mean=2.0, reward_std=4.0)
    plain = model.reward(*arguments, think=False)
    assert torch.allclose(model.reward(*arguments, think=False, normalize=True), (plain - 2) / 4)
    rewards, thoughts = model.reward(*arguments, max_new_tokens=3, with_thoughts=True)
    cots = model.think(model.encode(*arguments), max_new_tokens=3)
    assert thoughts == [decode_cot(model.processor.tokenizer, cot) for cot in cots] and rewards.shape == (2,)


def test_the_scale_is_that_of_the_last_quarter_of_training(model, tmp_path):
    """8 steps of 3 rewards, logged as training logs them. The last 2 steps' six rewards come out at exactly 0 and 1."""
    rewards = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + torch.arange(8.0)[:, None]  # they drift
    lines = [{"step": k} | mean_and_std(r.sum().item(), (r**2).sum().item(), 3) for k, r in enumerate(rewards)]
    write_jsonl(str(tmp_path / "metrics.jsonl"), lines)
    scale = reward_scale(str(tmp_path))
    normalized = (rewards[-2:] - scale["reward_mean"]) / scale["reward_std"]
    assert normalized.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalized.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert lines[-1]["reward_std"] < scale["reward_std"]  # one step's spread alone leaves out that of their means
