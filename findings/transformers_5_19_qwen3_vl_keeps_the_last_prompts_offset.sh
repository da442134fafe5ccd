#!/usr/bin/env bash
# In Qwen3-VL a video's tokens share positions, so what follows a video has smaller positions than its index. How much
# smaller differs from prompt to prompt, and transformers keeps it in the model itself (model.model.rope_deltas), from
# the reading of the prompt for all later tokens; the cache of keys and values, which is the caller's, does not have it.
# So two conversations cannot be under way on one model: if a second prompt is read before the first one's next token,
# by another thread of a trainer, or by a server that takes turns, the first goes on at positions of the second. With
# prompts of one batch size nothing is raised; the logits are others. A caller must hand over positions, or a lock.
# Behaviour: the next token's logits of prompt A from A's own cache, before and after prompt B was read.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" torchvision==0.28.0 numpy==2.4.6 transformers==5.19.0 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import copy, torch, transformers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
print("transformers", transformers.__version__, "torch", torch.__version__)
PAD, START, END = 60, 61, 62
text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True, "mrope_section": [4, 2, 2]})
vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, num_position_embeddings=64,
              deepstack_visual_indexes=[0])
torch.manual_seed(0)
model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
    text_config=text, vision_config=vision, video_token_id=PAD, image_token_id=63, vision_start_token_id=START,
    vision_end_token_id=END)).eval()

def prompt(side):
    """A clip of two frames, side x side patches of 16 pixels, between a few words."""
    pads = side * side // 4
    ids = torch.tensor([[1, 2, START, *[PAD] * pads, END, 3, 4]])
    return dict(input_ids=ids, mm_token_type_ids=(ids == PAD).int() * 2, video_grid_thw=torch.tensor([[1, side, side]]),
                pixel_values_videos=torch.randn(side * side, 1536))

@torch.no_grad()
def next_logits(read):
    """The logits behind one more token of A, from a copy of A's cache."""
    return model(input_ids=torch.tensor([[5]]), past_key_values=copy.deepcopy(read), use_cache=True).logits[0, -1]

a, b = prompt(4), prompt(8)
with torch.no_grad():
    cache = model(**a, use_cache=True).past_key_values
    own = model.model.rope_deltas.item()
    before, again = (next_logits(cache) for _ in range(2))
    model(**b, use_cache=True)
    other = model.model.rope_deltas.item()
    after = next_logits(cache)
print(f"  offset that the model holds: {own} once A was read, {other} once B was read")
print(f"  A's next token, logits: read twice in a row they differ by {(again - before).abs().max():.1e}, "
      f"after B by {(after - before).abs().max():.1e} (their spread: {before.std():.1e})")
assert own != other and torch.equal(before, again)
assert (after - before).abs().max() > 0.01 * before.std()
print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" 2> "$dir/log" || { tail -n 8 "$dir/log"; exit 1; }
