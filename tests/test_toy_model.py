"""The tokenizer and the tiny Qwen3-VL of the toy world: real classes, small sizes."""

import numpy as np
import torch

import data
import toy.base_model
import toy.world
from rollout import sample_cots
from tests.test_toy import RED_CIRCLE, WISH


def test_tokenizer_round_trip_of_any_text(processor):
    tokenizer, rng = processor.tokenizer, np.random.default_rng(0)
    texts = ["", " ", "\n\n  \t", "A red circle, zoomed  in.", "naïve 東京 🎬 \u200b\x00\x7f", "<think> a </think>"]
    texts += ["".join(map(chr, rng.integers(1, 0xD7FF, 50))) for _ in range(50)]
    texts += [bytes(range(256)).decode("latin-1"), toy.world.cot_text(WISH, RED_CIRCLE), data.INSTRUCTION_AFTER]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert set(ids) and tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    special = set(tokenizer.all_special_ids)
    assert special == set(tokenizer.convert_tokens_to_ids(list(toy.base_model.SPECIAL)))
    assert not special & set(tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))


def test_cot_and_prompt_are_short_and_values_are_single_tokens(processor):
    rng, tokenizer = np.random.default_rng(0), processor.tokenizer
    for _ in range(50):
        wish = toy.world.random_wish(rng)
        text = toy.world.cot_text(wish, toy.world.random_clip(rng, wish))
        ids = data.encode_cot(tokenizer, text)
        assert len(ids) <= 65 and tokenizer.decode(ids) == text + "<|im_end|>"
    for value in (v for values in toy.world.VALUES.values() for v in values):
        assert len(tokenizer(" " + value)["input_ids"]) == 1


def test_chat_template(processor):
    turns = [{"role": "system", "content": "Be brief."}, *data.build_conversation("P", cot="<think>\n</think>")]
    text = processor.apply_chat_template(turns, tokenize=False)
    user = "<|vision_start|><|video_pad|><|vision_end|>" + data.INSTRUCTION_BEFORE + "P" + data.INSTRUCTION_AFTER
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + user + "<|im_end|>\n"
                    "<|im_start|>assistant\n<think>\n</think><|im_end|>\n")
    asked = processor.apply_chat_template(data.build_conversation("P"), add_generation_prompt=True, tokenize=False)
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_patches_equal_the_processors(processor):
    frames = toy.world.render_clip(RED_CIRCLE, np.random.default_rng(0), np.arange(8) / 2)
    inputs = data.encode_prompt(processor, data.Video(frames, 2.0, 8, tuple(range(8))), "A red circle.")
    assert inputs["video_grid_thw"].tolist() == [[4, 4, 4]]  # not upsized
    torch.testing.assert_close(toy.base_model.patchify(frames[None]), inputs["pixel_values_videos"], atol=1e-6, rtol=0)
    assert len(inputs["input_ids"]) < 110


def test_tiny_base_trains_saves_and_opens(processor, tmp_path):
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    model, twin = (toy.base_model.build_model(processor, 5, **toy.base_model.MICRO) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert model.config.text_config.vocab_size % 64 == 0 and not model.config.tie_word_embeddings
    loss = toy.base_model.pretrain(model, processor, seed=0, vision_steps=2, steps=30, batch=8, pool=16, progress=False)
    assert loss < np.log(model.config.text_config.vocab_size)
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    model_2 = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    processor_2 = Qwen3VLProcessor.from_pretrained(tmp_path)
    frames = toy.world.render_clip(RED_CIRCLE, np.random.default_rng(0))[::2]
    video = data.Video(frames, 4.0, 16, tuple(range(0, 16, 2)))
    inputs = [data.encode_prompt(p, video, "A red circle.") for p in (processor, processor_2)]
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    with torch.no_grad():
        tensors = {k: v for k, v in inputs[0].items() if torch.is_tensor(v)}  # of one clip: ids (P,), patches (N, 1536)
        batch = {k: v[None] if v.ndim == 1 else v for k, v in tensors.items()}
        outputs = [either(**batch).logits for either in (model, model_2)]
    assert torch.isfinite(outputs[0]).all() and torch.equal(*outputs)
    assert model_2.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert len(sample_cots(model_2, processor_2, inputs, [[0], [1]], max_new_tokens=4, temperature=0.0)) == 2


def test_muon_steps_as_the_one_of_torch_does():
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=rng) for shape in ((24, 8), (8, 24), (16, 16))]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = toy.base_model.Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.05)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=rng)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):  # theirs multiplies in bf16: 8 bits of a step
        torch.testing.assert_close(a - w, b - w, atol=0.02 * (b - w).abs().max().item(), rtol=0)


def test_an_unspoken_flaw_reaches_the_tower_and_no_text(processor, monkeypatch):
    """The base of that world is trained to tell flicker; what the language model learns to write `write` gives."""
    texts, seen, base = [], [], toy.base_model

    def write(wish, values, verdict):
        seen.append(values)
        texts.append(toy.world.cot_text(wish, values, verdict))
        return texts[-1]

    def train(**more):
        model = base.build_model(processor, 5, **base.MICRO)
        base.pretrain(model, processor, 0, vision_steps=2, steps=3, batch=4, pool=16, progress=False, **more)
        return model.model.visual.state_dict()

    plain, flickering = train(), train(unspoken=True, write=write)
    # From .6 of the steps on: to judge is learned before that.
    assert len(texts) == 4 and all("flicker" in values for values in seen) and "flicker" not in "".join(texts)
    assert any(not torch.equal(plain[name], flickering[name]) for name in plain)
    heads = []
    monkeypatch.setattr(torch.nn.ModuleDict, "__init__", lambda self, of, make=torch.nn.ModuleDict.__init__: (
        heads.append({name: layer.out_features for name, layer in of.items()}), make(self, of))[1])
    train(unspoken=True)
    assert heads[-1]["flicker"] == 3 and len(heads[-1]) == 7
    train()
    assert len(heads[-1]) == 6
