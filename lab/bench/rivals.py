"""Others' ways to share a prefix, each as the attention of our packed row: same weights, same data, same losses.

    with attention(model, "prefix grouper"):
        model(batch)                               batch from `lay_out`: a row per video, its prefix and its CoTs

prefix grouper: the library PrefixGrouper (arXiv 2506.05433), two calls of attention, one over the prefixes, one over
[prefix | CoT] with the prefix's keys and values copied for each CoT. flex attention: PyTorch's FlexAttention, one call
over the row with a block mask of the drawing in layout.py, compiled. Neither reads the prefix apart from the CoTs, so
memory grows with P + G C, as the packed row's does.
"""

import contextlib
import functools

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface


@contextlib.contextmanager
def attention(model, name: str):
    """Inside, the LLM of `model` attends as the rival does. ImportError: its package is not there."""
    layers = [layer.self_attn for layer in model.backbone.model.language_model.layers]
    config, before = layers[0].config, layers[0].config._attn_implementation
    AttentionInterface.register("rival", RIVALS[name])
    config._attn_implementation = "rival"
    try:
        yield
    finally:
        config._attn_implementation = before


@functools.lru_cache(1)
def _grouper(lengths: tuple, device):
    """Its indices, made once for all layers: from (prefix, CoT, CoT, ...) of each row; a CoT's query counts to it."""
    try:
        from prefix_grouper import PrefixGrouper
    except ImportError:
        raise ImportError("not installed: pip install -r requirements-bench.txt") from None
    return PrefixGrouper([list(row) for row in lengths], device)


def _prefix_grouper(module, query, key, value, attention_mask, scaling=None, spans=None, **more):
    """query (S, H, L, d), key and value (S, H_kv, L, d), spans from `lay_out` -> (S, L, H, d), None."""

    def attend(q, k, v, mask):
        """mask (rows, keys): false at padding. Equal lengths have none, and take a fast kernel."""
        causal = causal_lower_right(q.shape[2], k.shape[2])
        if len(set(lengths)) > 1 or len(set(lengths[0][1:])) > 1:
            causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
            own = torch.zeros_like(causal).diagonal_scatter(causal.new_ones(len(causal)), k.shape[2] - q.shape[2])
            causal = causal & mask[:, None, None].bool() | own  # a padded query sees itself: no softmax over nothing
        return scaled_dot_product_attention(q, k, v, attn_mask=causal, scale=scaling, enable_gqa=True).transpose(1, 2)

    lengths = tuple((prompt, *(n for _, n in cots)) for prompt, cots in spans)
    grouper = _grouper(lengths, query.device)
    return grouper.forward(attend, query.to(value.dtype), key.to(value.dtype), value), None


@functools.lru_cache(1)
def _blocks(spans: tuple, length: int, device):
    """The drawing as FlexAttention's block mask: a position sees what is not behind it, of the prefix or of its CoT."""
    owner = torch.full((len(spans), length), -1, device=device)  # 0: prefix, i: the i-th CoT, -1: padding
    for row, (prompt, cots) in zip(owner, spans):
        row[:prompt] = 0
        for i, (start, n) in enumerate(cots, 1):
            row[start : start + n] = i

    def sees(s, h, q, k):
        return (q >= k) & ((owner[s, k] == 0) | (owner[s, k] == owner[s, q]))

    return create_block_mask(sees, len(spans), None, length, length, device=device)


@functools.lru_cache(1)
def _compiled():
    torch._dynamo.config.recompile_limit = 64  # two for each cell of the bench; beyond it, it would run unfused
    return torch.compile(flex_attention, dynamic=False)


def _flex_attention(module, query, key, value, attention_mask, scaling=None, spans=None, **more):
    """Shapes as above."""
    blocks = _blocks(tuple((prompt, tuple(cots)) for prompt, cots in spans), query.shape[2], query.device)
    one_type = [x.to(value.dtype) for x in (query, key)]
    found = _compiled()(*one_type, value, block_mask=blocks, scale=scaling, enable_gqa=True)
    return found.transpose(1, 2).contiguous(), None


RIVALS = {"prefix grouper": _prefix_grouper, "flex attention": _flex_attention}
