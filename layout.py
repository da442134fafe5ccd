"""Laying tokens out: prompts and CoTs -> the tensors of one forward. What stands where, who sees whom, at which place.

    [ prefix (video + prompt) | cot_1 q_1 | cot_2 q_2 | ... | padding ]          q = the query token <Reward>

The G CoTs of a video share thousands of prefix tokens, so packing them encodes and back-propagates those once, not G
times. That equals G separate rows because each CoT sees what it would see alone. For two CoTs of two tokens,

            p p p  a a q  b b q          rows look, columns are looked at, x = allowed
        p   x . .  . . .  . . .
        p   x x .  . . .  . . .
        p   x x x  . . .  . . .
        a   x x x  x . .  . . .
        a   x x x  x x .  . . .
        q   x x x  x x x  . . .
        b   x x x  . . .  x . .          b does not see a
        b   x x x  . . .  x x .
        q   x x x  . . .  x x x

and the first token of b has the place (rotary position) that the first token of a has: the one after the prefix.

What the p's compute does not depend on any CoT. So a row need not be one forward: the prefixes can be read first, and
kept as `Past`; a later forward holds a few CoTs alone, which look back at it. Memory is then that of a few CoTs.

Shapes: S rows (sequences), L positions (padded), P prompt tokens, N CoTs in all rows together, T CoT tokens (padded).
"""

import dataclasses

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclasses.dataclass  # which FSDP opens: before a backward it gathers weights for the tensors that it finds in here
class Past:
    """Prefixes that have been read: all that the CoTs behind them need, so that each prefix is computed once.

    layers[i] = keys and values of layer i, each (S, H_kv, P, d), as `shared_prefix_attention` keeps them; last (S, D):
    the hidden states of the prefixes' last tokens, which predict the CoTs' first; video_features: what the tower saw.
    """

    layers: dict = dataclasses.field(default_factory=dict)
    last: torch.Tensor = None
    video_features: object = None

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Called by the attention of each layer; gradient checkpointing calls it again, which changes nothing."""
        self.layers.setdefault(layer, (key, value))

    def tensors(self) -> list[torch.Tensor]:
        """All that CoTs read, in the same order for a Past and its `cut`."""
        return [self.last, *(x for i in sorted(self.layers) for x in self.layers[i])]

    def cut(self) -> "Past":
        """The same numbers as leaves: a backward from a few CoTs ends here, its gradients add up in the leaves."""
        leaves = iter([x.detach().requires_grad_() for x in self.tensors()])
        return Past(last=next(leaves), layers={i: (next(leaves), next(leaves)) for i in sorted(self.layers)})

    def backward(self, cut: "Past") -> None:
        """COLLECTIVE under FSDP. The ONE backward through the prefixes, with what all CoTs asked of them together."""
        pairs = [(x, leaf.grad) for x, leaf in zip(self.tensors(), cut.tensors()) if x.requires_grad]
        torch.autograd.backward(*zip(*pairs))


def lay_out(backbone, prefixes: list[dict], cots: list[list[list[int]]], behind: bool = False) -> dict:
    """Prompts and CoTs -> the tensors of one forward. Row s holds prefix s ONCE and all of its CoTs behind it.

    Position i may look at j <= i in the prefix or in its own CoT, and positions restart right after the prefix for each
    CoT (the drawing above). With one CoT per row, the plain path, this is ordinary causal attention. With `behind` the
    prefixes were read before: ONE row holds all CoTs, of the first video, then of the next, without any padding.

    Args:
        backbone: the Qwen3-VL, for its rule of 3-D positions (time, height, width) only.
        prefixes: from data.encode_prompt, one per row.
        cots: cots[s] = the CoTs of prefix s as token ids, [] for "no CoT" (masked). EOS included if it was sampled; the
            query follows the last token whatever it is, so a CoT cut off at the limit needs no special case.
    Returns:
        input_ids (S, L); query_mask (S, L) bool; position_ids (3, S, L); pixel_values_videos, video_grid_thw;
        spans: per prefix (P, [(start, length), ...]), Python integers: where each CoT with its query begins in its row,
        and how many positions it has. What no span covers is padding;
        query_index (N,): where the queries are in the flattened S x L; cot_index (N, T): where the position that
        PREDICTS each CoT token is (one before it); cot_ids, cot_mask (N, T). With `behind` S is 1, and both indices
        count from the prefixes' last states, which `DeScore.forward` puts before the row.
    """
    filler = backbone.config.text_config.pad_token_id or 0  # never read: padding, or replaced by the query vector
    rows, spans, places = [([], [])] if behind else [], [], []
    for s, (prefix, row) in enumerate(zip(prefixes, cots, strict=True)):
        positions, _ = backbone.model.get_rope_index(
            input_ids=prefix["input_ids"][None],
            mm_token_type_ids=prefix["mm_token_type_ids"][None],
            video_grid_thw=prefix["video_grid_thw"],
        )
        own, prompt = [], len(prefix["input_ids"])
        if not behind:
            rows.append(([prefix["input_ids"]], [positions[:, 0]]))
        ids, places_of_row = rows[-1]
        for cot in row:
            start, n = sum(map(len, ids)), len(cot)
            ids.append(torch.tensor([*cot, filler]))  # the filler stands for the query
            after_prefix = torch.arange(n + 1) + positions[0].max() + 1
            places_of_row.append(after_prefix.expand(3, -1))  # text: the same number for time, height and width
            own.append((start, n + 1))
            places.append((s, prompt, start, cot))
        spans.append((prompt, own))

    length = max(sum(map(len, ids)) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), filler)  # (S, L)
    position_ids = torch.zeros(3, len(rows), length, dtype=torch.long)
    for s, (ids, positions) in enumerate(rows):
        ids, positions = torch.cat(ids), torch.cat(positions, dim=1)
        input_ids[s, : len(ids)], position_ids[:, s, : len(ids)] = ids, positions

    longest = max([1, *(len(cot) for *_, cot in places)])
    cot_ids, cot_index = (torch.zeros(len(places), longest, dtype=torch.long) for _ in range(2))
    cot_mask, query_index = torch.zeros(len(places), longest), torch.zeros(len(places), dtype=torch.long)
    for i, (s, prompt, start, cot) in enumerate(places):
        n, zero = len(cot), len(prefixes) if behind else s * length  # where the CoT's row begins among the states
        before = s if behind else zero + prompt - 1  # the prefix's last position, before a CoT's FIRST token
        # Token t is predicted from the position before it.
        cot_index[i, :n] = torch.tensor([before, *range(zero + start, zero + start + n - 1)])[:n]
        cot_ids[i, :n], cot_mask[i, :n], query_index[i] = torch.tensor(cot), 1, zero + start + n
    query_mask = torch.zeros(len(rows) * length, dtype=torch.bool)
    query_mask[query_index - (len(prefixes) if behind else 0)] = True
    batch = {
        "input_ids": input_ids, "query_mask": query_mask.view(len(rows), length), "position_ids": position_ids,
        "spans": spans, "query_index": query_index, "cot_index": cot_index, "cot_ids": cot_ids, "cot_mask": cot_mask,
    }
    videos = () if behind else ("pixel_values_videos", "video_grid_thw")
    return batch | {name: torch.cat([prefix[name] for prefix in prefixes]) for name in videos}


def attention(module, query, key, value, attention_mask, keep=None, past=None, spans=None, **more):
    """What transformers calls in each layer: whole rows go on to `shared_prefix_attention`.

    keep: `Past.keep`, which takes this layer's keys and values. past: a Past that has them; then the ONE row of query,
    key, value (1, H, L, d) holds CoTs alone, laid out `behind`, and each sees its prefix in there, and itself.
    """
    if keep is not None:
        keep(module.layer_idx, key.to(value.dtype), value)
    if query.shape[2] == 1 and spans is None:
        return attend_once(query, key, value, attention_mask, more.get("scaling")), None
    if past is None:
        return shared_prefix_attention(module, query, key, value, attention_mask, spans=spans, **more)
    options = {"scale": more.get("scaling"), "dropout_p": more.get("dropout", 0.0), "enable_gqa": True}
    states, outputs = [x.to(value.dtype) for x in (query, key, value)], {}
    for row, (length, cots) in enumerate(spans):
        prefix = [x[row, :, :length] for x in past.layers[module.layer_idx]]
        outputs |= attend_behind(prefix, cots, *states, options)
    return torch.cat([outputs[start] for start in sorted(outputs)], dim=2).transpose(1, 2).contiguous(), None


def attend_once(query, key, value, mask, scaling) -> torch.Tensor:
    """One token of sampling, query (S, H, 1, d), against a cache of keys and values (S, H_kv, L, d): (S, 1, H, d).

    The H / H_kv heads that share keys become as many queries, which see the same: so no kernel needs the keys H / H_kv
    times, as transformers copies them for it in every layer and for every token.
    """
    rows, heads, _, d = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, d)  # (S, H_kv, H / H_kv, d)
    found = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(rows, 1, heads, d)


def shared_prefix_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, spans=None, **more):
    """Who sees whom (the drawing above), by ordinary causal attention over parts of a row.

        prefix and first CoT    one causal sequence: nothing stands between them
        every other CoT         its queries look at [prefix, itself], causal with the LOWER RIGHT corners aligned:

                p p p  b b q
            b   x x x  x . .         keys of the CoT before are not given to the kernel, so nothing is masked in vain
            b   x x x  x x .
            q   x x x  x x x

    A mask over the whole row would allow the same, but no fast kernel takes one, and the others compute all L x L
    scores to throw most away: at P = C, packing would gain nothing. Here the work is what the drawing has x for.
    Without spans (sampling with a cache, calls from elsewhere) it is transformers' own SDPA attention.

    query (S, H, L, d), key and value (S, H_kv, L, d), spans from `lay_out` -> (S, L, H, d), None. Padding gives 0.
    """
    if spans is None:
        kwargs = {"scaling": scaling, "dropout": dropout, **more}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Under autocast the norms before leave queries and keys in fp32; lower-right kernels need one type.
    query, key = query.to(value.dtype), key.to(value.dtype)
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": True}  # H_kv < H: heads in groups share keys
    rows = []
    for s, (prompt, cots) in enumerate(spans):
        q, k, v = query[s : s + 1], key[s : s + 1], value[s : s + 1]
        end = prompt + sum(n for _, n in cots[:1])
        first = scaled_dot_product_attention(q[:, :, :end], k[:, :, :end], v[:, :, :end], is_causal=True, **options)
        outputs = {0: first} | attend_behind((k[0, :, :prompt], v[0, :, :prompt]), cots[1:], q, k, v, options)
        whole = torch.cat([outputs[start] for start in sorted(outputs)], dim=2)  # (1, H, tokens of this row, d)
        rows.append(pad(whole, (0, 0, 0, query.shape[2] - whole.shape[2])))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def attend_behind(prefix, cots: list[tuple[int, int]], query, key, value, options: dict) -> dict[int, torch.Tensor]:
    """Each CoT of one row (1, H, L, d) sees a prefix and itself: {start: (1, H, n, d)} for its (start, n).

    prefix: keys and values, each (H_kv, P, d). CoTs of the same length go in one call.
    """
    outputs = {}
    for n in sorted({n for _, n in cots}):
        starts = [start for start, length in cots if length == n]
        q, own_keys, own_values = (torch.cat([x[:, :, s : s + n] for s in starts]) for x in (query, key, value))
        shared = (x.expand(len(starts), -1, -1, -1) for x in prefix)  # (c, H_kv, P, d)
        keys, values = (torch.cat(parts, dim=2) for parts in zip(shared, (own_keys, own_values)))  # (c, H_kv, P + n, d)
        found = scaled_dot_product_attention(q, keys, values, attn_mask=causal_lower_right(n, keys.shape[2]), **options)
        outputs |= zip(starts, found.split(1), strict=True)
    return outputs


SHARED_PREFIX = "shared_prefix"  # the name under which transformers finds it; see DeScore.__init__
AttentionInterface.register(SHARED_PREFIX, attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)  # for calls without spans
