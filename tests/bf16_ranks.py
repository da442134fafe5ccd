"""Two gloo ranks in the mixed precision of GPUs (bf16 compute, fp32 gradients): stage 2's three passes over a pair.

    torchrun --nproc_per_node 2 tests/bf16_ranks.py MODEL DATA lora|full   ->   a line of JSON from each rank

Its own process, since parallel.shard casts on GPUs only: here it is told to on the CPU, too.
"""

import json
import sys

import torch
import torch.distributed.fsdp as fsdp

import data
import grpo
import parallel
from model import DeScore

mixed = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
fsdp.MixedPrecisionPolicy = lambda *_: mixed


def load(path: str, train: str, ranks):
    model = DeScore.from_pretrained(path, empty=True)
    model.make_trainable(train, vision=False, lora_r=4, lora_dropout=0.0)
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    model.backbone.model.visual.register_forward_hook(lambda *_: looks.append(1))
    return parallel.shard(model, ranks)


path, csv, train = sys.argv[1:]
looks, ranks = [], parallel.start(seed=0)
model = load(path, train, ranks).train()
reference = load(path, train, ranks).eval().requires_grad_(False)
pair, prefixes = data.EncodedPairs(data.read_pairs(csv), model.processor)[ranks.rank]
rollouts = grpo.Rollouts(pair, prefixes, [[[70, 71], [80]], [[90, 91, 92], [75]]], advantages=torch.ones(2, 2))
settings = grpo.Settings(rollouts=2, kl_coef=1e-2, out=".")
rollouts.old = grpo.log_probs_now(model, rollouts, settings, ranks)
rollouts.reference = grpo.log_probs_now(reference, rollouts, settings, ranks)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
done = grpo.update(model, optimizer, [rollouts], settings, ranks)
seen = {"looks": len(looks), "kl": done["kl"], "ratio": done["ratio_max"], "norm": done["grad_norm_total"],
        "kept": rollouts.video_features is not None}  # fmt: skip
for line in ranks.gather_objects([json.dumps(seen)]):
    ranks.print(line)
ranks.finish()
