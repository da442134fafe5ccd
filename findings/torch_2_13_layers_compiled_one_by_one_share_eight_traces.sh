#!/usr/bin/env bash
# A language model's layers are alike, so they are compiled one by one: one trace for all, a short start. Without a cache
# that is what happens. Under a cache of keys and values each layer asks for its own entry, by its number, and that
# number is part of the trace: 28 layers need 28 traces, and 28 more when the prompt is over and tokens come singly.
# But the limit of 8 counts per FUNCTION, not per layer, and all layers have one function. So the prompt uses the 8 up,
# and from the second token on NO layer is compiled any more, the first ones neither, even in a model of 8 layers. The
# output is right, one warning names one layer, and sampling is as slow as before. torch._dynamo.config.recompile_limit
# must be at least twice the number of layers; a StaticCache, made for compiling, does not help.
# Behaviour: how many of the layers run compiled, for a prompt and three tokens behind it.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" numpy==2.4.6 transformers==5.19.0 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import logging, torch, transformers
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache
logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the warning, and its stack
limit = torch._dynamo.config.recompile_limit
print("torch", torch.__version__, "transformers", transformers.__version__, "recompile_limit", limit)

def compiled(layers, kind):
    """How many layers ran compiled: for a prompt of 9 tokens, then for one token three times (no cache: 9 each time)."""
    torch._dynamo.reset()
    config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    model, ran, counts = Qwen3ForCausalLM(config).eval(), [], []
    def backend(graph, _):
        return lambda *inputs: (ran.append(1), graph.forward(*inputs))[1]
    for layer in model.model.layers:
        layer.compile(backend=backend)
    cache = {"none": None, "dynamic": DynamicCache(config=config), "static": StaticCache(config=config, max_cache_len=32)}[kind]
    with torch.no_grad():
        for step in range(4):
            ran.clear()
            ids = torch.randint(64, (1, 1 if step and cache is not None else 9))
            model(ids, past_key_values=cache, use_cache=cache is not None)
            counts.append(len(ran))
    return counts

for layers in (8, 28):
    found = {kind: compiled(layers, kind) for kind in ("none", "dynamic", "static")}
    for kind, counts in found.items():
        print(f"  {layers} layers, cache: {kind}: {counts} run compiled")
    assert found["none"] == [layers] * 4
    assert found["dynamic"] == found["static"] == [8, 0, 0, 0]
torch._dynamo.config.recompile_limit = 2 * 28
counts = compiled(28, "static")
print(f"  28 layers, cache: static, recompile_limit {2 * 28}: {counts}")
assert counts == [28] * 4 and limit == 8
print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" 2> "$dir/log" || { tail -n 8 "$dir/log"; exit 1; }
