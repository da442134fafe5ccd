"""Two gloo ranks in the mixed precision of GPUs (bf16 compute, fp32 gradients): a step of stage 1, then stage 2's
three passes over a pair.

    torchrun --nproc_per_node 2 tests/bf16_ranks.py MODEL DATA lora full   ->   a line of JSON from each rank, for each

On a CPU parallel.shard casts only if it is told to.
"""

import copy
import json
import os
import sys

import torch

import cold_start
import data
import grpo
import parallel
from losses import bt_loss
from model import DeScore
from plumbing import logs
from plumbing.adapters import gather_full
from plumbing.checkpoint import open_model


def load(path: str, train: str, ranks, vision=False, dropout=0.0, frozen=False):
    model = open_model(DeScore, path, empty=True, merged=False)  # as on GPUs: an earlier LoRA beside its base
    model.make_trainable(train, vision=vision, lora_r=4, lora_dropout=dropout, lm_head=not vision)
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    model.backbone.model.visual.register_forward_hook(lambda *_: looks.append(1))
    return parallel.shard(model, ranks, frozen=frozen, compute_dtype=torch.bfloat16)


def note_types(model, types: set):
    """The types that reach the blocks: of hidden states, and of the vision tower's rotary tables."""
    def note(kind):
        def hook(module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            tables = {str(table.dtype) for table in kwargs["position_embeddings"]} if kind == "vision" else set()
            types.add((kind, str(states.dtype), *tables))
        return hook

    towers = model.backbone.model
    for kind, blocks in (("text", towers.language_model.layers), ("vision", towers.visual.blocks)):
        blocks[0].register_forward_pre_hook(note(kind), with_kwargs=True)


def stage_1_step(model, items, ranks) -> dict:
    """One update of stage 1, with the tower and LoRA's dropout: loss and norms, all finite."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    settings = cold_start.Settings(out=".")
    reward_a, reward_b = cold_start.score_pairs(model, items)
    loss = bt_loss(reward_a, reward_b, denominator=ranks.world)
    parallel.backward(loss, ranks)
    return {"loss": loss.item(), **parallel.take_step(model, optimizer, [], settings, ranks)}


def away(model, path: str, train: str, items, ranks) -> float:
    """Gradients of stage 2 over all ranks' pairs, beside one process in fp32: the distance, as a share of its norm.

    No KL: at the start policy and reference are one, and its gradient is their rounding.
    """
    settings = grpo.Settings(rollouts=2, kl_coef=0, bt_coef=0.5, micro_rollouts=1, mini_pairs=1, batch_pairs=1, out=".")
    alone = copy.copy(ranks)
    alone.world = 1  # no rank sums what another has computed, too
    torch.manual_seed(0)
    own = open_model(DeScore, path, merged=False)
    own.make_trainable(train, vision=False, lora_r=4, lora_dropout=0.0)
    for one, every, among in ((own.train(), items, alone), (model, items[ranks.rank :][:1], ranks)):
        one.zero_grad()
        for item in every:
            rollouts = grpo.PairRollouts(*item, [[[70, 71], [80]], [[90, 91, 92], [75]]],
                                         advantages=torch.tensor([[1.0, -0.5], [0.2, -1.0]]))
            grpo.backward_pair(one, None, rollouts, settings, among, {"tokens": 14, "bt": 4}, logs.Sums())
    found = {name: gather_full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    names = [name for name in found if name not in ("query", "head.weight")]  # these are summed in take_step
    wanted = dict(own.named_parameters())
    square = lambda tensors: sum(float(x.double().square().sum()) for x in tensors)  # noqa: E731
    model.zero_grad()
    return (square(found[n] - wanted[n].grad for n in names) / square(wanted[n].grad for n in names)) ** 0.5


def opened(tensor: torch.Tensor) -> list[int]:
    """How many tensors FSDP has found in the arguments of each module that it shards: each is given a gradient."""
    seen, found, counts = set(), [tensor.grad_fn], []
    while found:
        node = found.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [before for before, _ in node.next_functions]
            counts += [len(node.next_functions)] if "PostBackward" in node.name() else []
    return sorted(counts)


def both_stages(path: str, csv: str, train: str, ranks) -> dict:
    """What this rank sees of a step of stage 1 and of stage 2's three passes over a pair."""
    first, types = load(path, train, ranks, vision=True, dropout=0.5).train(), set()
    torch.manual_seed(ranks.rank)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if ".lora_B.default" in name:
                parameter.to_local().fill_(0.05)  # B starts at 0, where dropout changes nothing
    note_types(first, types)
    item = data.EncodedPairs(data.read_pairs(csv), first.processor)[0]  # one pair on both ranks: only dropout differs
    step = stage_1_step(first, [item], ranks)
    torch.manual_seed(0)  # LoRA is drawn from it
    model = load(path, train, ranks).train()
    reference = load(path, train, ranks, frozen=True).eval().requires_grad_(False)
    items = [data.EncodedPairs(data.read_pairs(csv), model.processor)[i] for i in range(ranks.world)]
    gap = away(model, path, train, items, ranks)
    pair, prefixes = items[ranks.rank]
    rollouts = grpo.PairRollouts(pair, prefixes, [[[70, 71], [80]], [[90, 91, 92], [75]]], advantages=torch.ones(2, 2))
    settings = grpo.Settings(rollouts=2, kl_coef=1e-2, micro_rollouts=1, out=".")
    cut = grpo.read(model, rollouts, settings, ranks).cut()
    in_blocks = opened(grpo.forward_behind(model, cut, rollouts, settings, ranks)[0].rewards)
    looks.clear()
    rollouts.old, _ = grpo.log_probs_now(model, rollouts, settings, ranks)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    done = grpo.update(model, reference, optimizer, [rollouts], settings, ranks)
    return {"train": train, "looks": len(looks), "kl": done["kl"], "ratio": done["ratio_max"],
            "norm": done["grad_norm_total"], "away": gap, "types": sorted(types), "stage 1": step,
            "opened": in_blocks}


path, csv, *ways = sys.argv[1:]
looks, ranks = [], parallel.start(seed=0)
for train in ways:
    for line in ranks.gather_objects([json.dumps(both_stages(path, csv, train, ranks))]):
        ranks.print(line)
parallel.shard(open_model(DeScore, path, empty=True), ranks, shard_ranks=1)  # two copies: groups of its own
groups = torch.distributed.distributed_c10d._world.pg_map
hours = [group._get_backend(ranks.device).options._timeout.total_seconds() / 3600 for group in groups]
ranks.print(json.dumps({"train": "copies", "hours": hours}))
ranks.finish()
sys.stdout.flush()
os._exit(0)  # gloo's threads can abort an interpreter that is being torn down, after all is said
