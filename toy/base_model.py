"""The toy world's model: a tokenizer trained on the spot, a tiny Qwen3-VL, and its pre-training.

The real processor and model classes; only the sizes are small. The base is mediocre on purpose, for RL can only improve
what is sampled wrongly; `measure` says how good it is, beside two baselines that never look at a video.

Shapes: B clips, T frames, H x W pixels, L tokens, N = 64 patches and V = 16 video tokens a clip of 8 frames of 64 x 64.
"""

import tempfile

import numpy as np
import torch
from tqdm import tqdm

import data
from rollout import decode_cot, sample_cots
from rules import DIMENSIONS, read_verdicts, well_formed
from toy.world import COLOURS, SHAPES, VALUES, annotate, cot_text, mix, prompt_text
from toy.world import random_clip, random_values, random_wish, render_clip, write_mp4

# ---- 1. A tokenizer, a processor and a tiny Qwen3-VL ---------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
# Qwen3-VL's chat layout in our words: turns of text and videos, one <|video_pad|> per video, widened by the processor.
CHAT_TEMPLATE = """\
{%- for turn in messages -%}
{{- '<|im_start|>' + turn['role'] + '\\n' -}}
{%- for part in ([{'type': 'text', 'text': turn['content']}] if turn['content'] is string else turn['content']) -%}
{{- part['text'] if part['type'] == 'text' else '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""


def _phrases() -> list[str]:
    """What the byte-pair encoder is trained on: each phrase becomes one token, so a CoT has 55 tokens instead of 400.

    A phrase may begin with a blank but never ends with one: then no merge learned inside a phrase glues two of them.
    """
    words = [*COLOURS, *SHAPES, *(v for values in VALUES.values() for v in values), *"012345", "N/A", "thing"]
    phrases = [" " + word for word in words] + [f".{c:02d}" for c in (0, 20, 25, 33, 40, 50, 60, 67, 75, 80)]
    phrases += [f"\n{name}" for name in DIMENSIONS] + [f'", "{name}": "' for name in DIMENSIONS[1:]]
    phrases += [": asked", ": not asked", "; shown", "; verdict", "N/A", ", camera", ", place:", ", style:"]
    phrases += ['\n<answer>{"dimensional_scores": {"subject": "', '"}, "overall_score":', "}</answer>"]
    return phrases + [" seconds>", *(f"<{t}.2 seconds>" for t in range(4)), "user\n", "assistant\n"]


def build_processor():
    """-> Qwen3VLProcessor with a byte-level BPE tokenizer trained here: any text goes in and comes out unchanged.

    The two instruction blocks of data.py are one added token each: they are the same in every prompt, and a model this
    small learns the task from examples, not from reading; spelled out they would only cost hundreds of tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(_phrases(), trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    blocks = ("<think>", "</think>", data.INSTRUCTION_BEFORE, data.INSTRUCTION_AFTER)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in blocks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096,
        additional_special_tokens=SPECIAL[1:], clean_up_tokenization_spaces=False,
    )
    # `size` bounds T * H * W. Qwen's own lower bound of 131,072 would enlarge our clips of 8 x 64 x 64 = 32,768.
    vision = dict(patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                  size={"shortest_edge": 1024, "longest_edge": 512 * 448 * 448})
    videos = Qwen3VLVideoProcessor(**vision, cap_pixels_per_frame=False)  # frames arrive at their final size
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**vision), tokenizer, videos, chat_template=CHAT_TEMPLATE)


MICRO = dict(hidden=32, layers=2, heads=2, vision_hidden=24, vision_layers=2)


def build_model(processor, seed: int = 0, hidden=128, layers=3, heads=4, vision_hidden=96, vision_layers=3, tied=False):
    """-> Qwen3VLForConditionalGeneration with random weights; `MICRO` makes one for tests. tied: as in Qwen3-VL-2B, one
    matrix is word embedding and lm_head.

    Initialised by fan-in (std = fan_in^-0.5), not with the usual std 0.02: that is made for widths of thousands; at
    width 128 it gives flat logits and next to no signal from the pixels.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer, side = processor.tokenizer, hidden // heads
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {f"{n.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in names}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True,
            "mrope_section": [side // 2 - 2 * (side // 6), side // 6, side // 6]}
    text = dict(vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=hidden, intermediate_size=3 * hidden,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=side,
                max_position_embeddings=4096, rope_parameters=rope)
    vision = dict(depth=vision_layers, hidden_size=vision_hidden, intermediate_size=3 * vision_hidden,
                  num_heads=vision_hidden // 24, out_hidden_size=hidden, num_position_embeddings=16,
                  deepstack_visual_indexes=list(range(vision_layers - 1)))
    torch.manual_seed(seed)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    model = Qwen3VLForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            scale = weight[0].numel() ** -0.5
            special = {"embed_tokens": 0.5, "pos_embed": 0.5, "patch_embed": 2 * scale}
            torch.nn.init.normal_(weight, std=next((std for key, std in special.items() if key in name), scale))
    plain = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)  # sample from the model's own distribution
    model.generation_config.update(**plain, eos_token_id=ids["eos_token_id"], pad_token_id=ids["pad_token_id"])
    return model.eval()


# ---- 2. Pre-training in two phases, first the eyes, then the words -------------------------------------------
GRID = [[4, 4, 4]]  # patches of a clip along time, height, width: 8 frames in pairs, 64 = 4 x 16 pixels
LR = 2e-3  # AdamW's; Muon's is ten times that
SLIPS = 0.1  # share of verdicts drawn at random in the last fifth of the steps: a base whose samples RL can improve
MATCH = 0.45  # share of the asked values that the clip shows: about half of the verdicts are "2"


def patchify(frames: np.ndarray) -> torch.Tensor:
    """(B, T, H, W, 3) uint8 -> (B * N, 1536) float32: what the processor makes of it, for a whole batch at once."""
    b, t, h, w, _ = frames.shape
    x = torch.from_numpy(frames).view(b, t // 2, 2, h // 32, 2, 16, w // 32, 2, 16, 3)
    x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)  # clip, time, block of 2 x 2, patch; inside: colour, frame, row, column
    return x.reshape(-1, 1536).float() / 127.5 - 1


class Muon(torch.optim.Optimizer):
    """Jordan 2024; torch's own multiplies in bf16, which takes a CPU without instructions for it 10 to 45 times longer.

    The step is the gradient's running average with all singular values near 1.
    """

    def __init__(self, params, lr: float, momentum=0.95, weight_decay=0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """w <- w - lr * the update with all singular values near 1, of each matrix w."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for w in filter(lambda w: w.grad is not None, group["params"]):
                average = self.state[w].setdefault("average", torch.zeros_like(w)).lerp_(w.grad, 1 - momentum)
                x = torch.lerp(w.grad, average, momentum)  # Nesterov's look ahead
                x = (x.T if (tall := w.shape[0] > w.shape[1]) else x) / x.norm().clamp(min=1e-7)
                for _ in range(5):  # Newton-Schulz: each singular value s becomes 3.4445 s - 4.775 s^3 + 2.0315 s^5
                    gram = x @ x.T
                    x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
                rate = lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
                w.mul_(1 - lr * group["weight_decay"]).add_(x.T if tall else x, alpha=-rate)


def make_update(named: list, steps: int, lr: float):
    """-> a function of the step number that applies the gradients. Muon for weight matrices, AdamW for the rest.

    Muon needs about half of AdamW's steps here. Both warm up for 20 steps, stay, and fall to zero over the last 40 %.
    """
    small = lambda name, p: p.ndim != 2 or any(key in name for key in ("embed", "head"))  # noqa: E731
    muon = Muon([p for n, p in named if not small(n, p)], lr=10 * lr)
    adam = torch.optim.AdamW([p for n, p in named if small(n, p)], lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    rise = lambda k: min(1.0, (k + 1) / 20, 2.5 * (1 - k / steps))  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rise) for optimizer in (muon, adam)]

    def update():
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0, error_if_nonfinite=True)
        for schedule in schedules:
            schedule.optimizer.step()
            schedule.optimizer.zero_grad()
            schedule.step()

    return update


def pretrain_vision(model, seen: list[dict], frames: np.ndarray, steps: int, batch: int, rng, progress=True) -> None:
    """Phase 1: the tower learns to tell attributes apart, by a linear classifier for each, thrown away afterwards.

    Qwen's tower too is trained before it meets the language model; from captions alone, motion took over 500 steps. The
    classifiers read the average token of each of the 4 time steps, side by side, so motion is a difference they see.
    """
    visual = model.model.visual
    parts = [{**s, "colour": s["subject"][0], "subject": s["subject"][1]} for s in seen]
    values = {"colour": list(COLOURS), "subject": SHAPES, **VALUES}
    if "flicker" in seen[0]:  # three levels of it
        values["flicker"], parts = range(3), [{**s, "flicker": int(3 * s["flicker"])} for s in parts]
    truth = {n: torch.tensor([v.index(s[n]) for s in parts]) for n, v in values.items()}  # (clips,) each
    width = 4 * visual.config.out_hidden_size * (1 + len(visual.config.deepstack_visual_indexes))
    heads = torch.nn.ModuleDict({n: torch.nn.Linear(width, len(v)) for n, v in values.items()})
    named = [*visual.named_parameters(), *((f"head.{n}", p) for n, p in heads.named_parameters())]
    update = make_update(named, steps, LR)
    bar = tqdm(range(steps), desc="vision", disable=not progress)
    for _ in bar:
        picks = rng.integers(len(seen), size=batch)
        features = see(visual, frames[picks]).view(batch, 4, 4, -1).mean(2).flatten(1)  # (B, width)
        logits = {n: head(features) for n, head in heads.items()}
        sum(torch.nn.functional.cross_entropy(logits[n], truth[n][picks]) for n in heads).backward()
        update()
        bar.set_postfix({n: f"{(x.argmax(-1) == truth[n][picks]).float().mean():.2f}" for n, x in logits.items()})


def see(visual, frames: np.ndarray) -> torch.Tensor:
    """(B, 8, 64, 64, 3) uint8 -> (B * V, all) the tower's output and its DeepStack features side by side."""
    out = visual(patchify(frames), grid_thw=torch.tensor(GRID * len(frames)))
    return torch.cat([out.pooler_output, *out.deepstack_features], -1)


def language_batch(processor, seen: list[dict], captions: float, slips: float, before, after, rng, write=cot_text):
    """Clips that exist already -> ids (B, L) of prompt and CoT, and learn (B, L), true on the CoT and its EOS.

    Where nothing is asked (a share `captions`) the CoT is a caption: "shown" can only come from the pixels.
    A share `slips` of the verdicts is drawn at random, as texts in the wild contain errors.
    """
    rows = []
    for values in seen:
        wish = mix(rng, random_wish(rng, 0.88 * (rng.random() >= captions)), values, MATCH, MATCH)
        prompt = before + processor.tokenizer(prompt_text(wish))["input_ids"] + after
        verdict = {n: "012"[rng.integers(3)] if rng.random() < slips else v for n, v in annotate(wish, values).items()}
        rows.append((prompt, data.encode_cot(processor.tokenizer, write(wish, values, verdict))))
    ids = torch.full((len(rows), max(len(p) + len(c) for p, c in rows)), processor.tokenizer.pad_token_id)
    learn = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, cot) in enumerate(rows):
        ids[row, : len(prompt) + len(cot)] = torch.tensor(prompt + cot)
        learn[row, len(prompt) : len(prompt) + len(cot)] = True
    return ids, learn


def pretrain_language(model, processor, seen: list[dict], frames, steps, batch, rng, progress=True, write=cot_text):
    """Phase 2: the language model learns to caption, then to judge, from the finished tower's features, computed once.

    Trained on prompts from the start and without phase 1, the model copies the asked words into "shown" (right half of
    the time) and never learns to look; hence captions first. Then the verdict, an equality of two words, takes longest.
    """
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures as Seen

    visual, width, grid = model.model.visual, model.config.text_config.hidden_size, torch.tensor(GRID)
    with torch.no_grad():
        chunks = [see(visual, frames[k : k + 64]) for k in range(0, len(frames), 64)]
        cache = torch.cat(chunks).unflatten(0, (len(seen), -1))  # (clips, V, all)
    # The prompt's ids around the user's text are the same in every example: take them from data.encode_prompt once.
    video = data.Video(frames[0], 2.0, 8, tuple(range(8)))
    one, two = (data.encode_prompt(processor, video, text)["input_ids"].tolist() for text in ("0", "1"))
    cut = next(k for k in range(len(one)) if one[k] != two[k])
    update = make_update([(n, p) for n, p in model.named_parameters() if "visual" not in n], steps, LR)
    # From here on the features are handed over in place of pixels, and the tower passes them on.
    visual.forward = lambda x, **_: Seen(None, x[:, :width], deepstack_features=list(x[:, width:].split(width, -1)))
    losses, bar = [], tqdm(range(steps), desc="language", disable=not progress)
    own, encode = np.random.default_rng(0), processor.tokenizer
    verdicts = torch.tensor([encode(f" {verdict}")["input_ids"][0] for verdict in "012"])
    plain = [encode(cot_text(random_wish(own), random_values(own)))["input_ids"] for _ in range(400)]
    plain = torch.tensor(sorted({encode.eos_token_id}.union(*plain)))  # any other token that `write` uses is prose
    for step in bar:
        picks, captions = rng.integers(len(seen), size=batch), 1.0 if step < 0.08 * steps else 0.05
        slips = SLIPS if step > 0.8 * steps else 0.0
        around = one[:cut], one[cut + 1 :]
        now = write if step >= 0.6 * steps else cot_text
        ids, learn = language_batch(processor, [seen[k] for k in picks], captions, slips, *around, rng, now)
        # Up to the video all rows are equal, then positions count on by one: one row's positions serve all. Padding is
        # on the right, where causal attention never looks, so no attention mask is needed either.
        types = (ids[:1] == model.config.video_token_id).int() * 2
        places, _ = model.model.get_rope_index(input_ids=ids[:1], mm_token_type_ids=types, video_grid_thw=grid)
        given = dict(video_grid_thw=grid.repeat(batch, 1), pixel_values_videos=cache[picks].flatten(0, 1))
        output = model.model(input_ids=ids, position_ids=places.expand(3, batch, -1), **given)
        hidden = output.last_hidden_state  # (B, L, hidden)
        target = ids[:, 1:][learn[:, 1:]]  # (C,), all CoT tokens of the batch
        logits = model.lm_head(hidden[:, :-1][learn[:, 1:]])  # (C, vocabulary): the token at i is predicted at i - 1
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")  # nats of each CoT token
        # Verdicts count more, or the noise of guessed colours and shapes drowns them; prose, of other tokens, less.
        weight = 1 + 4.0 * torch.isin(target, verdicts) - 0.9 * (write is not cot_text) * ~torch.isin(target, plain)
        (loss @ weight / weight.sum()).backward()
        update()
        losses.append(loss.mean().item())
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    del visual.forward  # the class's own again
    return float(np.mean(losses[-20:]))


def pretrain(model, processor, seed=0, vision_steps=100, steps=360, batch=32, pool=3000, progress=True, unspoken=False,
             write=cot_text) -> float:
    """Renders a pool of clips and trains both phases on it; returns the last loss in nats a token.

    unspoken: they flicker. write: (wish, seen, verdicts) -> the CoT that is learned from .6 of the steps on: first the
    verdicts alone, which amid prose are learned late or not at all.
    """
    rng = np.random.default_rng([seed, 99])
    seen = [random_values(rng) | ({"flicker": rng.random()} if unspoken else {}) for _ in range(pool)]
    bar = tqdm(seen, desc="rendering", disable=not progress)
    frames = np.stack([render_clip(values, rng, np.arange(8) / 2) for values in bar])  # (pool, 8, 64, 64, 3)
    embed = model.model.visual.patch_embed  # a convolution whose stride is its kernel is a matrix product: 3 x faster
    embed.forward = lambda x: torch.nn.functional.linear(x, embed.proj.weight.flatten(1), embed.proj.bias)
    pretrain_vision(model, seen, frames, vision_steps, 2 * batch, rng, progress)
    loss = pretrain_language(model, processor, seen, frames, steps, batch, rng, progress, write)
    del embed.forward
    return loss


def measure(model, processor, seed: int, clips=128, progress=True, max_new_tokens=80) -> dict[str, float]:
    """Valid-format share and sub-dimension accuracy on fresh mp4 clips, beside two baselines that never watch a video.

    "always 2" answers "2" everywhere; "2 or N/A" also notices which dimensions the prompt does not mention.
    """
    rng, truth, inputs = np.random.default_rng([seed, 7]), [], []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(clips):
            wish = random_wish(rng)
            seen, path = random_clip(rng, wish), f"{folder}/{index}.mp4"
            write_mp4(path, render_clip(seen, rng), 4)
            inputs.append(data.encode_prompt(processor, data.sample_frames(path), prompt_text(wish)))
            truth.append(list(annotate(wish, seen).values()))
    truth = np.array(truth)  # (clips, 5)
    result = {"always 2": (truth == "2").mean(), "2 or N/A": np.isin(truth, ["2", "N/A"]).mean()}
    for sample in (False, True):
        texts = []
        for k in tqdm(range(0, clips, 64), desc="measuring", disable=not progress):
            batch = inputs[k : k + 64]
            seeds = [[seed * 1000 + k + i] for i in range(len(batch))]
            cots = sample_cots(model, processor, batch, seeds, max_new_tokens, temperature=float(sample))
            texts += [decode_cot(processor.tokenizer, cot) for (cot,) in cots]
        name = "sampled" if sample else "greedy"
        right = np.array([[read_verdicts(text).get(n, "") for n in DIMENSIONS] for text in texts]) == truth
        result |= {f"{name} valid format": np.mean([well_formed(t) for t in texts]), f"{name} accuracy": right.mean()}
        result |= {f"{name} {n}": right[:, k].mean() for k, n in enumerate(DIMENSIONS)}
    return {name: float(value) for name, value in result.items()}
