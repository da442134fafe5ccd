#!/usr/bin/env bash
# Qwen3-VL was published for transformers 4.57. Its chat template writes <|vision_start|><|video_pad|><|vision_end|> for a
# video, and the processor puts a block for each two frames in its place: "<0.2 seconds><|vision_start|> pads <|vision_end|>".
# 4.57.1 replaces all three tokens of the template, 5.19.0 the pad alone: the outer start and end stay, around all blocks.
# So the newer release gives the same weights two tokens that they never saw in training, without a word; each later
# position moves by one or two. Text with a bare <|video_pad|> is read alike by both, as 4.57.1 read the template's.
# Behaviour: how many of each token the processor writes for a clip of four frames, which is two blocks.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/new"; "$dir/new/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" torchvision==0.28.0 numpy==2.4.6 transformers==5.19.0
python3 -m venv "$dir/old"; "$dir/old/bin/pip" install -q numpy==2.4.6 transformers==4.57.1
site() { "$dir/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
site new > "$(site old)/borrowed.pth"  # torch from there; transformers is its own
cat > "$dir/run.py" <<'PY'
import json, tempfile, torch, transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor
special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
bpe.decoder = decoders.ByteLevel()
bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
with tempfile.TemporaryDirectory() as folder:
    bpe.save(f"{folder}/tokenizer.json")
    json.dump({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
               "additional_special_tokens": special[1:]}, open(f"{folder}/tokenizer_config.json", "w"))
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
vision = dict(patch_size=16, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 2**24})
processor = Qwen3VLProcessor(Qwen2VLImageProcessor(**vision), tokenizer, Qwen3VLVideoProcessor(**vision), chat_template="-")
frames = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
meta = {"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3], "duration": 2.0}
found = {"version": transformers.__version__}
for name, video in (("template", "<|vision_start|><|video_pad|><|vision_end|>"), ("bare pad", "<|video_pad|>")):
    ids = processor(text=[video + "A dog."], videos=[frames], video_metadata=[dict(meta)], do_sample_frames=False,
                    do_resize=False)["input_ids"][0]
    text = tokenizer.decode(ids)
    found[name] = {token: text.count(token) for token in ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>", " seconds>")}
    found[name]["begins"] = text[:30]
print(json.dumps(found))
PY
"$dir/old/bin/python" "$dir/run.py" 2> "$dir/log" > "$dir/old.json" || { tail -n 5 "$dir/log"; exit 1; }
"$dir/new/bin/python" "$dir/run.py" 2> "$dir/log" > "$dir/new.json" || { tail -n 5 "$dir/log"; exit 1; }
"$dir/new/bin/python" - "$dir" <<'PY'
import json, sys
old, new = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("old", "new"))
for found in (old, new):
    print("transformers", found["version"])
    for name in ("template", "bare pad"):
        print(f"  {name}: {found[name]}")
assert old["template"]["<|vision_start|>"] == old["template"]["<|vision_end|>"] == 2, old
assert new["template"]["<|vision_start|>"] == new["template"]["<|vision_end|>"] == 3, new
assert old["template"] == old["bare pad"] == new["bare pad"]
print("as described")
PY
