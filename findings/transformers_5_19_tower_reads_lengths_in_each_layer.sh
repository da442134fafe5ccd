#!/usr/bin/env bash
# transformers 5.19.0, Qwen3-VL's vision tower with SDPA: each layer turns the frames' lengths into Python integers three
# times (for queries, keys and values apart), from a tensor that lies where the model lies. On a GPU each is a wait for all
# that was asked of it before: 81 for a tower of 27 layers, in a forward of which nothing else needs the host. A caller
# avoids them by handing in `cu_seqlens` that lies on the host.
# Behaviour: how often a tensor becomes a list inside the layers of a small tower of L layers, and the lengths asked for.
# Seen: 3 for each layer, all the same (2 frames of 16 patches each).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q transformers==5.19.0 torch==2.13.0 numpy==2.4.6
cat > "$dir/run.py" <<'PY'
import sys, torch, transformers
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
config = Qwen3VLVisionConfig(depth=5, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=48,
                             deepstack_visual_indexes=[1, 2], attn_implementation="sdpa")
tower, layers, asked = Qwen3VLVisionModel(config).eval(), [0], []
plain = torch.Tensor.tolist
def tolist(tensor):
    if layers[0]:
        asked.append(plain(tensor))
    return plain(tensor)
torch.Tensor.tolist = tolist
for block in tower.blocks:
    block.register_forward_pre_hook(lambda *_: layers.__setitem__(0, 1))
    block.register_forward_hook(lambda *_: layers.__setitem__(0, 0))
grid = torch.tensor([[2, 4, 4]])  # two frames of 4 x 4 patches
with torch.no_grad():
    tower(torch.randn(32, config.in_channels * config.temporal_patch_size * config.patch_size**2), grid)
print(f"transformers {transformers.__version__}: {len(asked)} reads in {config.depth} layers; lengths "
      f"{sorted(set(map(tuple, asked)))}")
sys.exit(0 if len(asked) == 3 * config.depth and set(map(tuple, asked)) == {(16, 16)} else 1)
PY
"$dir/venv/bin/python" "$dir/run.py" && echo "as described"
