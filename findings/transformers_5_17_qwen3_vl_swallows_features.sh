#!/usr/bin/env bash
# transformers 5.17.0, Qwen3VLModel: a keyword it does not know goes into **kwargs without a word. `mm_encoder_outputs`
# (video features that were computed before, so that the tower need not look again) is known from 5.18 on. In 5.17 the
# same call runs, gives finite hidden states of the right shape, and never sees the video.
# Behaviour: with 5.17.0 other features change nothing; with 5.19.0 they change the output.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.17.0
"$dir/venv/bin/pip" install -q --no-deps --target "$dir/new" transformers==5.19.0
cat > "$dir/run.py" <<'PY'
import sys, torch, transformers
from transformers import Qwen3VLConfig, Qwen3VLModel
rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True, "mrope_section": [4, 2, 2]}
text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, rope_parameters=rope)
vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, deepstack_visual_indexes=[0])
config = Qwen3VLConfig(text_config=text, vision_config=vision, video_token_id=60, image_token_id=61, vision_start_token_id=62)
torch.manual_seed(0)
model = Qwen3VLModel(config).eval()
patches = torch.randn(16, 3 * 2 * 16 * 16)
grid, ids = torch.tensor([[1, 4, 4]]), torch.tensor([[62, 60, 60, 60, 60, 5, 6]])
positions = torch.arange(7).expand(3, 1, -1)
with torch.no_grad():
    seen = [model.get_video_features(x, grid, return_dict=True) for x in (patches, -3 * patches)]
    out = [model(inputs_embeds=model.get_input_embeddings()(ids), position_ids=positions, mm_encoder_outputs={"video": s},
                 video_grid_thw=grid, mm_token_type_ids=(ids == 60).int() * 2, input_ids=None).last_hidden_state for s in seen]
same = torch.equal(*out)
print("transformers", transformers.__version__, "| finite:", bool(out[0].isfinite().all()), "| other video, same output:", same)
sys.exit(0 if same == (sys.argv[1] == "blind") else 1)
PY
cd "$dir"; venv/bin/python run.py blind; PYTHONPATH="$dir/new" venv/bin/python run.py sees; echo "as described"
