#!/usr/bin/env bash
# To train or to sample Wan many times for a prompt one encodes it once: embeds = pipe.encode_prompt(prompt), then
# pipe(prompt_embeds=embeds). By default encode_prompt gives 226 places, and the call with the words gives 512
# (max_sequence_length has another default in each). Both fill up behind the prompt with zeros, and the transformer takes
# no mask: a zero is projected to the bias of its key, so each place of padding takes a share of the attention, and a
# prompt of a few words is mostly padding. So the same prompt, seed and weights give another video, and a LoRA trained
# on such embeds is used under another text condition. Nothing is said, since both lengths are valid.
# Behaviour: places of both ways, and how far the latents differ from those of the words, by 226, by 512, and
# beside the difference that another prompt makes.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" numpy==2.4.6 transformers==5.19.0 tokenizers==0.23.3 diffusers==0.42.1 ftfy==6.3.1 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import inspect, diffusers, torch, transformers
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
print("diffusers", diffusers.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
words = "<pad> </s> a red ball rolls over the green table blue cat sleeps".split()
fast = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="</s>"))
fast.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")
torch.manual_seed(0)
text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
transformer = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
    freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32)
vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                       temperal_downsample=[False, True, True])
pipe = WanPipeline(tokenizer=tokenizer, text_encoder=text_encoder.eval(), vae=vae.eval(), transformer=transformer.eval(),
                   scheduler=FlowMatchEulerDiscreteScheduler())
pipe.set_progress_bar_config(disable=True)

def latents(**what):
    return pipe(**what, height=16, width=16, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
                generator=torch.Generator().manual_seed(0), output_type="latent").frames

prompt = "a red ball rolls over the green table"
theirs = latents(prompt=prompt)
default = {name: inspect.signature(getattr(pipe, name)).parameters["max_sequence_length"].default
           for name in ("encode_prompt", "__call__")}
embeds = {places: pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **more)[0]
          for places, more in ((226, {}), (512, {"max_sequence_length": 512}))}
print("  default places:", default, "of these, not zero:", int((embeds[226].abs().sum(-1) > 0).sum()))
far = {f"embeds of {places} places": (latents(prompt_embeds=e) - theirs).abs().max().item() for places, e in embeds.items()}
far["another prompt, by words"] = (latents(prompt="a blue cat sleeps") - theirs).abs().max().item()
for name, difference in far.items():
    print(f"  {name}: latents differ from those of the words by {difference:.1e}")
assert default == {"encode_prompt": 226, "__call__": 512}
assert [e.shape[1] for e in embeds.values()] == [226, 512] and torch.equal(embeds[226], embeds[512][:, :226])
assert far["embeds of 512 places"] < 1e-5 and far["embeds of 226 places"] > 0.1 * far["another prompt, by words"]
print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" 2> "$dir/log" || { tail -n 8 "$dir/log"; exit 1; }
