"""What the toy tokenizer cannot show: the published files of Qwen3-VL-8B-Instruct, without weights (env QWEN3_VL).

Numbers of tokens: from transformers 4.57.0, the release the weights came out for, run on the same frames and prompts.
"""

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl import video_processing_qwen3_vl

import data
from rollout import banned_tokens
from tests.test_data import published_layout

pytestmark = pytest.mark.real
GIRL = ("The camera remains still, a girl with braided hair and wearing a pink dress approached the chair in the room"
        " and sat on it, the background is a cozy bedroom, warm indoor lighting.")


def clip(seconds, source_fps, height, width, max_pixels=448 * 448):
    """A Video as sample_frames would make it of a file of that size; what it shows does not matter here."""
    total, size = int(seconds * source_fps), data.target_size(height, width, max_pixels)
    indices = data.sample_indices(total, source_fps, 2.0)
    return data.Video(np.zeros((len(indices), *size, 3), np.uint8), source_fps, total, tuple(indices))


@pytest.mark.parametrize("video, tokens, video_tokens", [
    (clip(5.25, 24.0, 752, 1360), 1487, 1140), (clip(5.25, 24.0, 752, 1360, 307_200), 2141, 1794),
    (clip(152 / 30, 30.0, 720, 1280), 1487, 1140), (clip(152 / 30, 30.0, 720, 1280, 307_200), 2141, 1794),
])
def test_prompts_are_as_long_as_in_the_release_that_the_weights_came_out_for(
    real_processor, video, tokens, video_tokens
):
    inputs = data.encode_prompt(real_processor, video, GIRL)
    assert len(inputs["input_ids"]) == tokens and int((inputs["mm_token_type_ids"] == 2).sum()) == video_tokens
    assert inputs["input_ids"].tolist() == published_layout(real_processor.tokenizer, video, GIRL)


PROMPTS = ["a cat", "A cat.", "Is it a cat?", "a cat!!!", "a cat...\n", "\n\na cat", "  a cat  ", "(a cat)",
           "a \"cat\"", "12", "<|", "a<", "一只猫在跑。", "猫、犬。\n", "un café à l'été", "кот — бежит…",
           "🐈‍⬛ runs 🏃!", "नमस्ते।", "مرحبا؟", "<b>cat</b>"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_harmless_prompts_are_read_as_the_stock_processor_reads_them(real_processor, prompt):
    video = clip(2, 24.0, 64, 96)
    turns = data.build_conversation(prompt.strip())  # blanks and line ends around it are no part of a prompt
    text = real_processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    whole = real_processor(text=[text], videos=[torch.from_numpy(video.frames).permute(0, 3, 1, 2)],
                           return_tensors="pt", video_metadata=[video.metadata()], do_sample_frames=False,
                           do_resize=False)
    ours = data.encode_prompt(real_processor, video, prompt)
    for name in ("input_ids", "mm_token_type_ids"):
        assert torch.equal(ours[name], whole[name][0])
    assert (624 in ours["input_ids"].tolist()[-420:]) or prompt != "A cat."  # "." and newline: one token


def test_all_added_tokens_in_all_nestings_stay_text(real_processor):
    """Each of the 26 inside each of the 26, at every place: no spelling is left when one inside it is cut."""
    tokenizer = real_processor.tokenizer
    names = [token.content for token in tokenizer.added_tokens_decoder.values()]
    assert len(names) == 26
    control, before, after = set(tokenizer.added_tokens_decoder), "<|im_end|>:\n", "\n<|im_end|>"
    own = [i for part in (before, after) for i in tokenizer(part)["input_ids"] if i in control]
    for outer in names:
        nested = " ".join(outer[:k] + inner + outer[k:] for inner in names for k in range(len(outer) + 1))
        ids = data.encode_text(tokenizer, nested, before=before, after=after)
        assert [i for i in ids if i in control] == own and tokenizer.decode(ids) == before + nested + after


def test_text_is_kept_up_to_unicode_normalisation(real_processor):
    composed, apart = "caf\u00e9", "cafe\u0301"
    ids = [data.encode_text(real_processor.tokenizer, text) for text in (composed, apart)]
    assert ids[0] == ids[1] and real_processor.tokenizer.decode(ids[1]) == composed
    with pytest.raises(data.InputError, match="lone surrogate"):
        data.encode_prompt(real_processor, clip(2, 24.0, 64, 96), "a \ud83d cat")


def test_exactly_text_eos_and_think_may_be_sampled(real_processor):
    banned = banned_tokens(real_processor.tokenizer, 151_936)
    assert len(banned) == 267 + 23  # rows without a token; 26 added tokens but three
    assert set(range(151_936)) - set(banned) == {*range(151_643), 151_645, 151_667, 151_668}


def test_a_cot_keeps_think_as_single_ids(real_processor):
    cot = '<think>\nsubject: asked a cat; shown a cat; verdict 2.\n</think>\n<answer>{"overall_score": 3.50}</answer>'
    ids = data.encode_cot(real_processor.tokenizer, cot)
    assert (ids[0], ids.count(151_667), ids.count(151_668), ids[-1]) == (151_667, 1, 1, 151_645)
    assert ids == real_processor.tokenizer(cot + "<|im_end|>")["input_ids"]


def test_the_processor_has_nothing_to_warn_of(real_processor, monkeypatch):
    monkeypatch.setattr(video_processing_qwen3_vl.logger, "warning_once", lambda text: pytest.fail(text))
    data.encode_prompt(real_processor, clip(2, 24.0, 64, 96), "a cat")
