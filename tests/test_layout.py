"""Shared-prefix attention: what the drawing in `lay_out` says, without a mask; without spans, ordinary attention."""

import pytest
import torch

import layout
from layout import lay_out, shared_prefix_attention
from plumbing.checkpoint import open_model
from rollout import sample_cots

ROWS = [  # (prefix, [(start, CoT + query)]): equal lengths, unequal ones, a hidden CoT first and last, one CoT, none
    (5, [(5, 3), (8, 3), (11, 3)]),
    (3, [(3, 4), (7, 2), (9, 4), (13, 2)]),
    (4, [(4, 1), (5, 3), (8, 1)]),
    (6, [(6, 5)]),
    (7, []),
]


def who_sees_whom(prefix: int, cots: list, length: int) -> torch.Tensor:
    """The drawing of one row as (L, L) bool: rows look, columns are looked at. Padding sees itself only."""
    segment = torch.arange(-length, 0)  # padding: each position a segment of its own
    segment[:prefix] = 0
    for k, (start, n) in enumerate(cots, start=1):
        segment[start : start + n] = k
    return ((segment[:, None] == segment) | (segment == 0)).tril()


def dense_attention(query, key, value, spans):
    """softmax(Q K' / sqrt(d)) V in fp32, with every score written down and the forbidden ones set to -inf."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    allowed = torch.stack([who_sees_whom(*row, query.shape[2]) for row in spans])[:, None]
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    used = torch.stack([torch.arange(query.shape[2]) < max([p, *(s + n for s, n in cots)]) for p, cots in spans])
    return (scores.softmax(-1) @ value).transpose(1, 2) * used[:, :, None, None]


def test_the_dense_twin_is_the_drawing_in_the_docstring():
    drawing = [line.split()[1:10] for line in layout.__doc__.splitlines() if line.strip()[:1] in ("p", "a", "q", "b")]
    drawing = [row for row in drawing if set(row) <= {"x", "."} and len(row) == 9]
    expected = torch.tensor([[cell == "x" for cell in row] for row in drawing])
    assert expected.shape == (9, 9) and torch.equal(who_sees_whom(3, [(3, 3), (6, 3)], 9), expected)


def test_layout_by_hand(model, prefixes):
    prefix, length = prefixes[0], len(prefixes[0]["input_ids"])
    batch = lay_out(model.backbone, [prefix], [[[70, 71], [80]]])
    assert batch["input_ids"][0, length:].tolist()[:2] == [70, 71] and batch["input_ids"].shape[1] == length + 5
    assert batch["spans"] == [(length, [(length, 3), (length + 3, 2)])]
    assert batch["query_index"].tolist() == [length + 2, length + 4]
    # tokens are predicted one position earlier; the first token of BOTH CoTs by the prefix's last position
    assert batch["cot_index"].tolist() == [[length - 1, length], [length - 1, 0]]
    assert batch["cot_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["query_mask"][0].nonzero().flatten().tolist() == [length + 2, length + 4]
    first, second = batch["position_ids"][:, 0, length : length + 3], batch["position_ids"][:, 0, length + 3 :]
    assert torch.equal(first[:, :2], second)  # each CoT's positions restart right after the prefix
    assert first[0, 0] == batch["position_ids"][:, 0, :length].max() + 1


@pytest.mark.parametrize("spans", [ROWS, *([row] for row in ROWS)])
def test_attention_equals_the_dense_twin(spans):
    """Values and gradients, 4 heads that share 2 keys, rows of unequal length: the padding of the shorter ones is 0."""
    torch.manual_seed(0)
    length = max(max([p, *(s + n for s, n in cots)]) for p, cots in spans)
    inputs = [torch.randn(len(spans), heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]
    ours, mask = shared_prefix_attention(None, *inputs, None, spans=spans)
    twin, weights = dense_attention(*inputs, spans), torch.randn(ours.shape)
    assert mask is None and torch.allclose(ours, twin, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, twin))):
        assert torch.allclose(one, other, atol=1e-5) and one.isfinite().all()


def test_attention_in_bf16_and_with_norms_in_fp32():
    """Under autocast queries and keys come in fp32, values in bf16."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(len(ROWS), heads, 15, 8) for heads in (4, 2, 2))
    twin = dense_attention(query, key, value, ROWS)
    for dtype in (torch.bfloat16, torch.float32):
        ours, _ = shared_prefix_attention(None, query.to(dtype), key.to(dtype), value.bfloat16(), None, spans=ROWS)
        assert ours.dtype == torch.bfloat16 and (ours - twin).abs().max() < 0.05


def test_attention_writes_down_nothing_of_size_l_times_l(model, prefixes):
    """No layer gets a mask, and nothing of that size is kept for the backward."""
    batch = lay_out(model.backbone, prefixes[:2], [[[70] * 40, [80] * 40, []], [[90] * 60, [75], [71] * 40]])
    length, masks, kept = batch["input_ids"].shape[1], [], set()
    layer = model.backbone.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(tuple(x.shape[-2:])) or x, lambda x: x):
        model(batch)
    assert masks == [None]
    assert len(kept) > 5 and (length, length) not in kept


def test_attention_without_spans_is_the_ordinary_one(model, prefixes, processor):
    """Sampling with a cache, and a call with a padding mask: the same through our name as through "sdpa"."""
    text = model.backbone.model.language_model
    ids, mask = torch.randint(0, 256, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    found = {}
    for name in ("shared_prefix", "sdpa"):
        text.set_attn_implementation(name)
        assert {layer.self_attn.config._attn_implementation for layer in text.layers} == {name}
        assert {block.attn.config._attn_implementation for block in model.backbone.model.visual.blocks} == {"sdpa"}
        cots = sample_cots(model.backbone, processor, prefixes[:3], [[1, 2], [3], [4, 5]], 6)
        with torch.no_grad():
            found[name] = cots, model.backbone(input_ids=ids, attention_mask=mask).logits
    assert found["shared_prefix"][0] == found["sdpa"][0] and torch.equal(found["shared_prefix"][1], found["sdpa"][1])


def test_attention_is_ours_after_every_way_of_loading(base_dir, tiny_model_dir):
    """And what is saved names no attention: the folder stays a plain Qwen3-VL."""
    from model import DeScore
    ways = [DeScore.from_pretrained(base_dir, new_head=True), DeScore.from_pretrained(tiny_model_dir),
            open_model(DeScore, tiny_model_dir, empty=True)]
    for model in ways:
        assert model.backbone.config.text_config._attn_implementation == "shared_prefix"
    assert "shared_prefix" not in open(f"{tiny_model_dir}/config.json").read()


def test_a_sampled_token_sees_its_cache_as_through_copied_keys():
    """8 heads that share 2 keys, a batch whose second row is padded: transformers' way copies the keys fourfold."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 8) for heads, length in ((8, 1), (2, 11), (2, 11)))
    mask = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    mask[1, ..., :4] = False
    ours, _ = shared_prefix_attention(None, query, key, value, mask, scaling=0.3)
    keys, values = (x.repeat_interleave(4, dim=1) for x in (key, value))
    scores = (query @ keys.mT * 0.3).masked_fill(~mask, -torch.inf)
    assert torch.allclose(ours, (scores.softmax(-1) @ values).transpose(1, 2), atol=1e-6)
