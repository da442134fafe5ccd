"""Reading a prefix ONCE for all the CoTs behind it, in a forward of its own: memory is that of a few CoTs, not of G.

    past = model.read(lay_out(backbone, prefixes, [[], []]))         the prefixes: keys and values of each layer
    cut = past.cut()                                                 the same numbers, where a backward ends
    for some of the CoTs:
        model(lay_out_behind(backbone, prefixes, cots), past=cut) -> loss -> backward
    past.backward(cut)                                               one backward through the prefixes, for all

In the drawing of layout.py what a p computes does not depend on any a or b, so the p's can be computed before. What an
a or b asks of them are each layer's keys and values, and the hidden state of the last p, which predicts a first token.
So this equals the packed row, loss and gradient. Only stage 2 needs it: grpo.py. Shapes: see layout.py.
"""

import dataclasses

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from layout import attend_behind, lay_out, shared_prefix_attention


@dataclasses.dataclass  # which FSDP opens: before a backward it gathers weights for the tensors that it finds in here
class Past:
    """Prefixes that have been read: all that the CoTs behind them need, so that each prefix is computed once.

    layers[i] = keys and values of layer i, each (S, H_kv, P, d), as `attention` hands them over; last (S, D): the
    hidden states of the prefixes' last tokens, which predict the CoTs' first; video_features: what the tower saw.
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


def lay_out_behind(backbone, prefixes: list[dict], cots: list[list[list[int]]]) -> dict:
    """What `lay_out` makes of the same arguments, without the prefixes: ONE row [a_1 q | a_2 q | b_1 q | b_2 q].

    spans: per prefix (P, [(start, length), ...]) in that row. query_index and cot_index count from the prefixes' last
    states, S of them, which `DeScore.forward` puts before the row.
    """
    rows = lay_out(backbone, prefixes, cots)
    length, places, spans = rows["input_ids"].shape[1], [], []
    state_of = torch.zeros(rows["input_ids"].numel(), dtype=torch.long)  # place in the flattened rows -> among states
    for s, (prompt, own) in enumerate(rows["spans"]):
        spans.append((prompt, [(start - prompt + len(places), n) for start, n in own]))
        state_of[s * length + prompt - 1] = s
        places += range(s * length + prompt, s * length + prompt + sum(n for _, n in own))
    state_of[places] = torch.arange(len(places)) + len(prefixes)
    row = {name: rows[name].flatten()[None, places] for name in ("input_ids", "query_mask")}  # (1, L)
    row |= {name: state_of[rows[name]] for name in ("query_index", "cot_index")}
    row |= {name: rows[name] for name in ("cot_ids", "cot_mask")}
    return {**row, "position_ids": rows["position_ids"].flatten(1)[:, None, places], "spans": spans}


def attention(module, query, key, value, attention_mask, keep=None, past=None, spans=None, **more):
    """What transformers calls in each layer: whole rows go on to `shared_prefix_attention`.

    keep: `Past.keep`, which takes this layer's keys and values. past: layer -> those of a Past; then the ONE row of
    query, key, value (1, H, L, d) holds CoTs alone, from `lay_out_behind`; each sees its prefix in there, and itself.
    """
    if keep is not None:
        keep(module.layer_idx, key.to(value.dtype), value)
    if past is None:
        return shared_prefix_attention(module, query, key, value, attention_mask, spans=spans, **more)
    options = {"scale": more.get("scaling"), "dropout_p": more.get("dropout", 0.0), "enable_gqa": True}
    states, outputs = [x.to(value.dtype) for x in (query, key, value)], {}
    for row, (length, cots) in enumerate(spans):
        prefix = [x[row, :, :length] for x in past(module.layer_idx)]
        outputs |= attend_behind(prefix, cots, *states, options)
    return torch.cat([outputs[start] for start in sorted(outputs)], dim=2).transpose(1, 2).contiguous(), None


SHARED_PREFIX = "shared_prefix"  # the name under which transformers finds it; see DeScore.__init__
AttentionInterface.register(SHARED_PREFIX, attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)  # for calls without spans
