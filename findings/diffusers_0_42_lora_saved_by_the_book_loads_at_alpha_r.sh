#!/usr/bin/env bash
# Trainers of video generators put a LoRA on Wan's transformer with peft and save it with WanPipeline.save_lora_weights,
# as diffusers' own example scripts did for years: transformer_lora_layers=get_peft_model_state_dict(transformer). That
# state dict holds A and B alone. What multiplies them, alpha / r, goes into the file only if it is handed over too, as
# transformer_lora_adapter_metadata, an argument added later, and None by default. Loading then takes alpha = r, without
# a word: an adapter that was trained with alpha = 2 r changes the velocity about half as much as it did in training, so
# the generator that is shown and judged is not the one that was trained. A run that saves alpha = r never shows it.
# Behaviour: the scaling after loading, and how far the velocity moves, in training, and loaded without and with metadata.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" numpy==2.4.6 transformers==5.19.0 peft==0.21.2 diffusers==0.42.1 ftfy==6.3.1 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import sys, diffusers, peft, torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
print("diffusers", diffusers.__version__, "peft", peft.__version__, "torch", torch.__version__)

def pipeline():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True])
    return WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer.eval(),
                       scheduler=FlowMatchEulerDiscreteScheduler())

@torch.no_grad()
def velocity(transformer):
    torch.manual_seed(1)
    return transformer(torch.randn(1, 16, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 8, 32), return_dict=False)[0]

def scaling(transformer):
    return sorted({value for module in transformer.modules() for value in getattr(module, "scaling", {}).values()})

trained = pipeline()
before = velocity(trained.transformer)
trained.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
torch.manual_seed(2)
for name, parameter in trained.transformer.named_parameters():
    if ".lora_" in name:
        torch.nn.init.normal_(parameter, std=0.1)
moved = {"trained": velocity(trained.transformer) - before}
found = {"trained": scaling(trained.transformer)}
weights = get_peft_model_state_dict(trained.transformer)
told = trained.transformer.peft_config["default"].to_dict()
for name, more in (("saved without", {}), ("saved with", {"transformer_lora_adapter_metadata": told})):
    folder = f"{sys.argv[1]}/{name}"
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=weights, **more)
    fresh = pipeline()
    fresh.load_lora_weights(folder)
    found[name], moved[name] = scaling(fresh.transformer), velocity(fresh.transformer) - before
for name in found:
    print(f"  {name}: alpha / r {found[name]}, the velocity moves by {moved[name].norm():.4f}")
assert found == {"trained": [2.0], "saved without": [1.0], "saved with": [2.0]}, found
assert torch.allclose(moved["saved with"], moved["trained"], atol=1e-5)
assert moved["saved without"].norm() < 0.8 * moved["trained"].norm()
print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" "$dir" 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
