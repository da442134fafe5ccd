#!/usr/bin/env bash
# To train Wan on real clips one encodes them: vae.encode(clip). Wan's VAE takes the first frame, then four at a time; of a
# clip whose length is not 4 n + 1 the last one to three frames are left out without a word. 80 frames, that is 5 s at
# 16 a second, are 77 to the VAE; a clip of 4 frames is a still image. Other causal video VAEs of the same library do
# otherwise, so code that was right with one of them is not with Wan's: HunyuanVideo's and CogVideoX's read every frame,
# also where they give back another number (of 10 nine, and CogVideoX's of 13 sixteen).
# Behaviour: for each number of frames, the latents, the frames that come back from decode, and the frames that can be
# replaced by noise without changing one latent.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" numpy==2.4.6 diffusers==0.42.1 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import diffusers, torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan
print("diffusers", diffusers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
four = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
vaes = {
    "Wan": AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                            temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
    "HunyuanVideo": AutoencoderKLHunyuanVideo(**four),
    "CogVideoX": AutoencoderKLCogVideoX(**four, down_block_types=("CogVideoXDownBlock3D",) * 4,
                                        up_block_types=("CogVideoXUpBlock3D",) * 4),
}
found = {}
with torch.no_grad():
    for name, vae in vaes.items():
        vae.eval()
        for frames in (4, 8, 9, 10, 12, 13):
            clip = torch.rand(1, 3, frames, 32, 32) * 2 - 1
            latents = vae.encode(clip).latent_dist.mean
            idle = []
            for k in range(frames):
                other = clip.clone()
                other[:, :, k] = torch.rand(3, 32, 32) * 2 - 1
                if torch.equal(vae.encode(other).latent_dist.mean, latents):
                    idle.append(k)
            found[name, frames] = idle
            back = vae.decode(latents).sample.shape[2]
            print(f"  {name}: {frames} frames -> {latents.shape[2]} latents -> {back} frames; read by none: {idle or '-'}")
for (name, frames), idle in found.items():
    assert idle == ([*range(frames)][4 * ((frames - 1) // 4) + 1:] if name == "Wan" else []), (name, frames)
print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" 2> "$dir/log" || { tail -n 8 "$dir/log"; exit 1; }
