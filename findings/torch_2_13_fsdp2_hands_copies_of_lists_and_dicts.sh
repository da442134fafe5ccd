#!/usr/bin/env bash
# Layers that share something, keys and values of a prefix, say, or a list in which each leaves what it computed, hand
# it on as an argument: a list, a dict, a dataclass. fully_shard opens the arguments of a module to cast its inputs, and
# again to hang its backward on those that need a gradient, and builds all containers anew. What the layer writes goes
# into that copy and is gone when it returns; nothing is raised. With a bf16 policy all is lost, also in evaluation. In
# fp32 it depends: without gradients nothing is lost, so a test of the forward passes; in training the FIRST layer's
# writes are there (its input needs no gradient) and those of all others are not. A list inside a dataclass is copied,
# too. Only an object that torch cannot open, of a plain class, arrives as itself: a KV cache works, the dict beside it
# does not.
# Behaviour: what three layers leave in a list, a dict, a dataclass and an object, in one process of a gloo group.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" numpy==2.4.6 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import dataclasses, tempfile, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
print("torch", torch.__version__)
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)

@dataclasses.dataclass
class Data:
    left: list = dataclasses.field(default_factory=list)
    count: int = 0

class Plain:
    def __init__(self):
        self.left, self.count = [], 0

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, left, table, data, plain):
        x = self.inner(x)
        left.append(x)
        table[len(table)] = x
        for both in (data, plain):
            both.left.append(x)
            both.count += 1
        return x

def left_behind(policy):
    """How many of three layers' outputs are found afterwards in each container."""
    model = nn.ModuleList(Layer() for _ in range(3))
    if policy is not None:
        for layer in model:
            fully_shard(layer, mp_policy=policy)
    x, left, table, data, plain = torch.randn(2, 4), [], {}, Data(), Plain()
    for layer in model:
        x = layer(x, left, table, data, plain)
    return {"list": len(left), "dict": len(table), "dataclass, its list": len(data.left), "dataclass, its number": data.count,
            "object, its list": len(plain.left), "object, its number": plain.count}

fp32, bf16 = MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
found = {}
for name, policy, training in (("not sharded", None, True), ("fully_shard, fp32, no_grad", fp32, False),
                               ("fully_shard, fp32", fp32, True), ("fully_shard, bf16, no_grad", bf16, False),
                               ("fully_shard, bf16", bf16, True)):
    with torch.set_grad_enabled(training):
        found[name] = left_behind(policy)
    print(f"  {name}: {found[name]}")
dist.destroy_process_group()
assert set(found["not sharded"].values()) == set(found["fully_shard, fp32, no_grad"].values()) == {3}
assert list(found["fully_shard, fp32"].values()) == [1, 1, 1, 1, 3, 3]
for name in ("fully_shard, bf16, no_grad", "fully_shard, bf16"):
    assert list(found[name].values()) == [0, 0, 0, 0, 3, 3]
print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" 2> "$dir/log" || { tail -n 8 "$dir/log"; exit 1; }
