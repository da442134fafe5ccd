#!/usr/bin/env bash
# Sampling under autocast, as a trainer with fp32 weights does so that the policy that samples is the one it trains.
# The norms of queries and keys give fp32, the projection of values bf16. transformers 5.19 gives both one type:
# DynamicCache joins the values to an empty tensor of the KEYS' type, so all are kept in fp32, twice the memory, without a
# word; StaticCache, which compiled decoding needs, allocates them in that type and raises when bf16 comes to be copied in.
# Behaviour: Qwen3 (Qwen3-VL's LLM is alike) under torch.autocast("cpu", bfloat16): what v_proj gives and what is kept.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.19.0
"$dir/venv/bin/python" - <<'PY' 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
import torch, transformers
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache
print("transformers", transformers.__version__, "torch", torch.__version__)
config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8)
torch.manual_seed(0)
model, ids, seen = Qwen3ForCausalLM(config).eval(), torch.arange(1, 9)[None], set()
model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
    layer = model(ids, past_key_values=DynamicCache(config=config)).past_key_values.layers[0]
    print("v_proj gives", *seen, "- DynamicCache keeps keys", layer.keys.dtype, "values", layer.values.dtype)
    try:
        model(ids, past_key_values=StaticCache(config=config, max_cache_len=16))
        raised = ""
    except RuntimeError as error:
        raised = str(error)
    print("StaticCache:", raised)
assert seen == {torch.bfloat16} and layer.keys.dtype == layer.values.dtype == torch.float32
assert "same dtype" in raised
with torch.no_grad():
    model(ids, past_key_values=StaticCache(config=config, max_cache_len=16))  # without autocast it works
print("as described")
PY
