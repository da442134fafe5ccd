#!/usr/bin/env bash
# torch 2.13.0, torch.optim.Muon: its Newton-Schulz steps run in bf16 whatever the weights are (fp64 too), and no argument
# changes that. So an update of an fp64 weight has bf16's 8 bits; and on a CPU without instructions for bf16 the matrix
# products of a 384 x 384 weight take 10 to 45 times as long as in fp32: there the optimizer, not the model, was 85 % of a
# training step of a model of two million weights.
# Behaviour: every number of an fp64 update is a bf16 number; seconds of a step in bf16 and of the same in fp32.
# Seen: all of 147,456; 596 ms against 13 ms on an AMD EPYC (avx2, no avx512_bf16, no amx_bf16). The times are printed only.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$dir/run.py" <<'PY'
import sys, time, torch
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.zeros(384, 384, dtype=torch.float64))
weight.grad = torch.randn(384, 384, dtype=torch.float64)
optimizer = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0)
optimizer.step()
began = time.perf_counter()
optimizer.step()
in_bf16 = time.perf_counter() - began
weight.data.zero_()
optimizer.step()  # from zero: the weight IS the update
share = (weight.data == weight.data.bfloat16().double()).double().mean().item()
x = torch.randn(384, 384)
x = x / x.norm()
began = time.perf_counter()
for _ in range(5):
    gram = x @ x.T
    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
in_fp32 = time.perf_counter() - began
flags = {w for line in open("/proc/cpuinfo") if line.startswith("flags") for w in line.split()}
print(f"torch {torch.__version__}: {share:.0%} of an fp64 weight's update are bf16 numbers; a step of one 384 x 384 weight "
      f"{in_bf16 * 1e3:.0f} ms, the same products in fp32 {in_fp32 * 1e3:.0f} ms; this CPU has "
      f"{sorted(flags & {'avx2', 'avx512f', 'avx512_bf16', 'amx_bf16'})}")
sys.exit(0 if share == 1 else 1)
PY
"$dir/venv/bin/python" "$dir/run.py" && echo "as described"
