#!/usr/bin/env bash
# transformers 5.19.0, generate() with SDPA on a model whose heads share keys (GQA): with prompts of one length the keys
# of the cache are used as they are; with ONE token of padding in the batch every layer copies them for each head that
# shares them, for every new token (the mask switches `enable_gqa` off). PyTorch 2.13 on a CPU gives the same, to the
# bit, with mask and enable_gqa and without a copy.
# Behaviour: 0 copies against layers x tokens x 2; and both ways of the kernel are equal.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.19.0
cat > "$dir/run.py" <<'PY'
import sys, torch, transformers
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.integrations import sdpa_attention
torch.manual_seed(0)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
                                     num_attention_heads=8, num_key_value_heads=2, head_dim=8, pad_token_id=0)).eval()
copied, real = [], sdpa_attention.repeat_kv
sdpa_attention.repeat_kv = lambda x, n: (copied.append(n), real(x, n))[1]
ids, counts = torch.randint(1, 64, (4, 9)), []
for padding in (0, 1):
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    copied.clear()
    model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    counts.append(sum(n > 1 for n in copied))
q, k, v = torch.randn(4, 8, 1, 8), torch.randn(4, 2, 15, 8), torch.randn(4, 2, 15, 8)
seen = torch.arange(15).expand(4, 1, 1, 15) >= torch.tensor([1, 0, 0, 0]).view(4, 1, 1, 1)
equal = torch.equal(sdpa(q, k, v, attn_mask=seen, enable_gqa=True), sdpa(q, real(k, 4), real(v, 4), attn_mask=seen))
print(f"transformers {transformers.__version__}, torch {torch.__version__}: copies without padding {counts[0]}, with one "
      f"padded token {counts[1]} (3 layers, 6 forwards, keys and values); kernel equal to the bit without a copy: {equal}")
sys.exit(0 if counts == [0, 36] and equal else 1)
PY
"$dir/venv/bin/python" "$dir/run.py" && echo "as described"
