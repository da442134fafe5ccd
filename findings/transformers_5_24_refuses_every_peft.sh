#!/usr/bin/env bash
# transformers 5.24.0 + peft 0.21.2, the newest release of each when this was written (2026-11): model.add_adapter raises,
# asking for peft >= 0.22.0, which does not exist. peft's own inject_adapter_in_model puts the same layers into the same
# model and works.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$dir"; venv/bin/python - <<'PY'
import peft, torch, transformers
from peft import LoraConfig, inject_adapter_in_model
from transformers import Qwen3Config, Qwen3Model
print("transformers", transformers.__version__, "peft", peft.__version__)
config = Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, head_dim=8)
lora = LoraConfig(r=2, target_modules=r".*\.q_proj")
try:
    Qwen3Model(config).add_adapter(lora)
except Exception as error:
    print("add_adapter:", type(error).__name__, str(error).splitlines()[0][:160])
else:
    raise SystemExit("add_adapter works now")
model = inject_adapter_in_model(lora, Qwen3Model(config))
print("inject_adapter_in_model:", [name for name, _ in model.named_parameters() if "lora_" in name])
print("as described")
PY
