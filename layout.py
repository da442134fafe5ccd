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
What a p computes depends on no CoT, so stage 2 computes the prefix apart, once: prefix_once.py.

Shapes: S rows (sequences), L positions (padded), P prompt tokens, N CoTs in all rows together, T CoT tokens (padded).
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def lay_out(backbone, prefixes: list[dict], cots: list[list[list[int]]]) -> dict:
    """Prompts and CoTs -> the tensors of one forward. Row s holds prefix s ONCE and all of its CoTs behind it.

    Position i may look at j <= i in the prefix or in its own CoT, and positions restart right after the prefix for each
    CoT (the drawing above). With one CoT per row, the plain path, this is ordinary causal attention.

    Args:
        backbone: the Qwen3-VL, for its rule of 3-D positions (time, height, width) only.
        prefixes: from data.encode_prompt, one per row.
        cots: cots[s] = the CoTs of row s as token ids, [] for "no CoT" (masked). EOS included if it was sampled; the
            query follows the last token whatever it is, so a CoT cut off at the limit needs no special case.
    Returns:
        input_ids (S, L); query_mask (S, L) bool; position_ids (3, S, L); pixel_values_videos, video_grid_thw;
        spans: per row (P, [(start, length), ...]), Python integers: where each CoT with its query begins, and how many
        positions it has. What no span covers is padding; frames: patches of each time step (the tower looks inside);
        query_index (N,): where the queries are in the flattened S x L; cot_index (N, T): where the position that
        PREDICTS each CoT token is (one before it); cot_ids, cot_mask (N, T).
    """
    filler = backbone.config.text_config.pad_token_id or 0  # never read: padding, or replaced by the query vector
    rows, spans = [], []
    for prefix, row in zip(prefixes, cots, strict=True):
        positions, _ = backbone.model.get_rope_index(
            input_ids=prefix["input_ids"][None], mm_token_type_ids=prefix["mm_token_type_ids"][None],
            video_grid_thw=prefix["video_grid_thw"])
        ids, positions, end, own = [prefix["input_ids"]], [positions[:, 0]], len(prefix["input_ids"]), []
        for cot in row:
            ids.append(torch.tensor([*cot, filler]))  # the filler stands for the query
            after_prefix = torch.arange(len(cot) + 1) + positions[0].max() + 1
            positions.append(after_prefix.expand(3, -1))  # text: the same number for time, height and width
            own.append((end, len(cot) + 1))
            end += len(cot) + 1
        rows.append((torch.cat(ids), torch.cat(positions, dim=1)))
        spans.append((len(prefix["input_ids"]), own))

    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), filler)  # (S, L)
    position_ids = torch.zeros(3, len(rows), length, dtype=torch.long)
    for s, (ids, positions) in enumerate(rows):
        input_ids[s, : len(ids)], position_ids[:, s, : len(ids)] = ids, positions

    places = [(s, prompt, start, n - 1) for s, (prompt, own) in enumerate(spans) for start, n in own]  # n - 1: the CoT
    longest = max([1, *(n for *_, n in places)])
    cot_ids, cot_index = (torch.zeros(len(places), longest, dtype=torch.long) for _ in range(2))
    cot_mask, query_mask = torch.zeros(len(places), longest), torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (s, prompt, start, n) in enumerate(places):
        cot_ids[i, :n] = input_ids[s, start : start + n]
        # Token t is predicted from the position before it. Before a CoT's FIRST token stands the prefix's last one.
        cot_index[i, :n] = s * length + torch.tensor([prompt - 1, *range(start, start + n - 1)])[:n]
        cot_mask[i, :n] = 1
        query_mask[s, start + n] = True
    grid = torch.cat([prefix["video_grid_thw"] for prefix in prefixes])
    return {
        "input_ids": input_ids, "query_mask": query_mask, "position_ids": position_ids, "spans": spans,
        "pixel_values_videos": torch.cat([prefix["pixel_values_videos"] for prefix in prefixes]),
        "video_grid_thw": grid, "frames": [h * w for steps, h, w in grid.tolist() for _ in range(steps)],
        "query_index": torch.tensor([s * length + start + n for s, _, start, n in places]),
        "cot_index": cot_index, "cot_ids": cot_ids, "cot_mask": cot_mask,
    }


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
    if spans is None and query.shape[2] == 1:
        return attend_once(query, key, value, attention_mask, scaling), None
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
    options: keywords of scaled_dot_product_attention: scale, dropout_p, enable_gqa.
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


def attend_once(query, key, value, mask, scaling) -> torch.Tensor:
    """One token of sampling, query (S, H, 1, d), against a cache of keys and values (S, H_kv, L, d): (S, 1, H, d).

    The H / H_kv heads that share keys become as many queries, which see the same: so no kernel needs the keys H / H_kv
    times, as transformers copies them for it in every layer and for every token.
    """
    rows, heads, _, d = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, d)  # (S, H_kv, H / H_kv, d)
    found = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(rows, 1, heads, d)
