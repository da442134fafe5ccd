"""Laying tokens out: prompts and CoTs -> the tensors of one forward. What stands where, who sees whom, at which place.

    [ prefix (video + prompt) | cot_1 q_1 | cot_2 q_2 | ... | padding ]          q = the query token <Reward>

Shapes: B rows, L positions (padded), P prompt tokens, N CoTs in all rows together, T CoT tokens (padded).
"""

import torch


def lay_out(backbone, prefixes: list[dict], responses: list[list[list[int]]]) -> dict[str, torch.Tensor]:
    """Prompts and CoTs -> the tensors of one forward. Row b holds prefix b ONCE and all of its CoTs behind it.

        [ prefix (video + prompt) | cot_1 q_1 | cot_2 q_2 | ... | padding ]

    The G CoTs of a video share thousands of prefix tokens, so packing them encodes and back-propagates those once, not
    G times. That equals G separate rows because each CoT sees what it would see alone:
      * a block mask: position i may look at j <= i in the prefix or in its own CoT. For two CoTs of two tokens,

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

      * positions restart right after the prefix for each CoT.
    With one CoT per row (the plain path) the block mask is the ordinary causal mask, and only padding is marked.

    Args:
        backbone: the Qwen3-VL, for its rule of 3-D positions (time, height, width) only.
        prefixes: from data.encode_prompt, one per row.
        responses: responses[b] = the CoTs of row b as token ids, [] for "no CoT" (masked). EOS included if it was
            sampled; the query follows the last token whatever it is, so a CoT cut off at the limit needs no special
            case.
    Returns:
        input_ids (B, L); query_mask (B, L) bool; position_ids (3, B, L); attention_mask (B, L), or (B, 1, L, L) bool
        when a row holds several CoTs; pixel_values_videos, video_grid_thw;
        query_index (N,): where the queries are in the flattened B x L; response_index (N, T): where the position that
        PREDICTS each CoT token is (one before it); response_ids, response_mask (N, T).
    """
    pad = backbone.config.text_config.pad_token_id or 0  # never read: masked out, or replaced by the query vector
    rows, starts = [], []
    for prefix, cots in zip(prefixes, responses, strict=True):
        positions, _ = backbone.model.get_rope_index(
            input_ids=prefix["input_ids"][None],
            mm_token_type_ids=prefix["mm_token_type_ids"][None],
            video_grid_thw=prefix["video_grid_thw"],
        )
        ids, positions, segments = [prefix["input_ids"]], [positions[:, 0]], [torch.zeros_like(prefix["input_ids"])]
        row_starts, end = [], len(prefix["input_ids"])
        for k, cot in enumerate(cots, start=1):
            ids.append(torch.tensor([*cot, pad]))  # the pad stands for the query
            after_prefix = torch.arange(len(cot) + 1) + positions[0].max() + 1
            positions.append(after_prefix.expand(3, -1))  # text: the same number for time, height and width
            segments.append(torch.full((len(cot) + 1,), k))
            row_starts.append(end)
            end += len(cot) + 1
        rows.append((torch.cat(ids), torch.cat(positions, dim=1), torch.cat(segments)))
        starts.append(row_starts)

    length = max(len(ids) for ids, _, _ in rows)
    input_ids = torch.full((len(rows), length), pad)  # (B, L)
    position_ids = torch.zeros(3, len(rows), length, dtype=torch.long)
    segment = torch.full((len(rows), length), -1)  # 0 prefix, k the k-th CoT and its query, -1 padding
    for b, (ids, positions, segments) in enumerate(rows):
        input_ids[b, : len(ids)], position_ids[:, b, : len(ids)], segment[b, : len(ids)] = ids, positions, segments

    spans = [
        (b, start, len(cot))
        for b, (row_starts, cots) in enumerate(zip(starts, responses))
        for start, cot in zip(row_starts, cots)
    ]
    longest = max([1, *(n for _, _, n in spans)])
    response_ids, response_index = (torch.zeros(len(spans), longest, dtype=torch.long) for _ in range(2))
    response_mask, query_mask = torch.zeros(len(spans), longest), torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (b, start, n) in enumerate(spans):
        response_ids[i, :n] = input_ids[b, start : start + n]
        # Token t is predicted from the position before it. Before a CoT's FIRST token stands the prefix's last one.
        before = torch.tensor([len(prefixes[b]["input_ids"]) - 1, *range(start, start + n - 1)])[:n]
        response_index[i, :n] = b * length + before
        response_mask[i, :n] = 1
        query_mask[b, start + n] = True

    if all(len(cots) == 1 for cots in responses):
        attention_mask = (segment >= 0).long()  # (B, L); causality is the model's own
    else:
        attention_mask = block_mask(segment)
    return {
        "input_ids": input_ids,
        "query_mask": query_mask,
        "position_ids": position_ids,
        "attention_mask": attention_mask,
        "pixel_values_videos": torch.cat([prefix["pixel_values_videos"] for prefix in prefixes]),
        "video_grid_thw": torch.cat([prefix["video_grid_thw"] for prefix in prefixes]),
        "query_index": torch.tensor([b * length + start + n for b, start, n in spans]),
        "response_index": response_index,
        "response_ids": response_ids,
        "response_mask": response_mask,
    }


def block_mask(segment: torch.Tensor) -> torch.Tensor:
    """segment (B, L): 0 prefix, k >= 1 the k-th CoT, -1 padding -> (B, 1, L, L) bool, True where it may look."""
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()  # (L, L)
    same_cot = segment[:, :, None] == segment[:, None, :]  # (B, L, L)
    in_prefix = (segment == 0)[:, None, :]  # (B, 1, L)
    return (causal & (same_cot | in_prefix))[:, None]
