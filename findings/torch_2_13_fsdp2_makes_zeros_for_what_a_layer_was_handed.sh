#!/usr/bin/env bash
# Layers that read something computed before, each its own keys and values of a shared prefix, say, are often handed all of
# it: layer(x, past), and take past[k]. fully_shard hangs its backward on EVERY tensor that needs a gradient and that it
# finds in a layer's arguments. So the backward of each of N layers hands back N gradients of which N - 1 are zeros, of
# full size, made anew and added up: N (N - 1) where N were asked for. Loss and gradients are right, so nothing shows it
# but memory and time: 36 layers with 8 MB of keys and values each make 10 GB of zeros in a backward. A function that
# gives a layer its own (past.__getitem__) is not opened, and makes none.
# Behaviour: gradients handed back by the layers' FSDP hooks, how many are all zeros, and their MB; list beside function.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" numpy==2.4.6 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import tempfile, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
print("torch", torch.__version__)
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)

class Layer(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k, self.inner = k, torch.nn.Linear(8, 8)

    def forward(self, x, past):
        return x + self.inner(x) * (past(self.k) if callable(past) else past[self.k]).mean()

def backward(layers, hand_over):
    """-> gradients of the past, and what the layers' FSDP hooks handed back: [how many, zeros among them, MB of these]."""
    torch.manual_seed(0)
    model = [fully_shard(Layer(k)) for k in range(layers)]
    past = [torch.randn(256, 1024).requires_grad_() for _ in range(layers)]  # 1 MB each
    x = torch.randn(4, 8, requires_grad=True)
    for layer in model:
        x = layer(x, hand_over(past))
    loss, seen, told = x.square().mean(), set(), [0, 0, 0]
    found = [loss.grad_fn]

    def note(gradients, _):
        zeros = [g for g in gradients if g is not None and not g.any()]
        told[0] += len(gradients)
        told[1] += len(zeros)
        told[2] += sum(g.numel() * g.element_size() for g in zeros) >> 20

    while found:
        node = found.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [before for before, _ in node.next_functions]
            if "PostBackward" in node.name():
                node.register_hook(note)
    loss.backward()
    return [p.grad for p in past], told

for layers in (6, 12, 24):
    (one, listed), (two, called) = (backward(layers, way) for way in (lambda past: past, lambda past: past.__getitem__))
    equal = all(torch.equal(a, b) for a, b in zip(one, two))
    print(f"  {layers} layers: handed a list {listed[0]} gradients, {listed[1]} of zeros, {listed[2]} MB; handed a function "
          f"{called[0]}, {called[1]}, {called[2]} MB; gradients equal: {equal}")
    assert listed == [layers * (layers + 1), layers * (layers - 1), layers * (layers - 1)] and called == [layers, 0, 0] and equal
dist.destroy_process_group()
print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" 2> "$dir/log" || { tail -n 8 "$dir/log"; exit 1; }
