#!/usr/bin/env bash
# torch 2.13.0, torch.utils.flop_counter.FlopCounterMode on a CPU: the fused attention that scaled_dot_product_attention
# takes there counts as nothing, without a word, so a transformer's attention is missing from its FLOPs. The "math" way of
# the same call is counted, so the same model has another count where the fused one does not take its mask or dtype. And
# torch.nn.attention.bias.causal_lower_right, the mask for queries behind a cache, which a model makes in its forward, cannot
# be made under the counter: a dispatch mode has wrapped the raw tensor by then. One that was made before can be used.
# Behaviour: FLOPs counted for one call of attention, fused and by "math", and what making the bias raises.
# Seen: 0 of 33,554,432 (two products of 4 heads x 256 x 256 x 32, 2 for a multiply-add); 33,554,432 by "math"; RuntimeError.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$dir/run.py" <<'PY'
import sys, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.flop_counter import FlopCounterMode
q, k, v = (torch.randn(1, 4, 256, 32) for _ in range(3))
expected = 2 * 2 * 4 * 256 * 256 * 32

def counted(backend):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(backend):
        attention(q, k, v)
    return counter.get_total_flops()

fused, by_math = counted(SDPBackend.FLASH_ATTENTION), counted(SDPBackend.MATH)
outside = attention(q, k, v, attn_mask=causal_lower_right(256, 256)).shape  # without the counter it works
try:
    with FlopCounterMode(display=False):
        attention(q, k, v, attn_mask=causal_lower_right(256, 256))
    raised = "nothing"
except Exception as error:
    raised = type(error).__name__
print(f"torch {torch.__version__}: of {expected:,} FLOPs {fused:,} are counted with the fused attention, {by_math:,} by "
      f"'math'; causal_lower_right gives {tuple(outside)}, under the counter it raises {raised}")
sys.exit(0 if fused == 0 and by_math == expected and raised != "nothing" else 1)
PY
"$dir/venv/bin/python" "$dir/run.py" && echo "as described"
