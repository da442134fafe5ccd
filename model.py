"""DeScore: a Qwen3-VL that thinks in words and scores through one extra token.

    [ video + prompt ][ CoT ... EOS ][ <Reward> ] -> last hidden state at <Reward> -> linear head -> reward
                        ^ generated     ^ learnable vector, not a word of the vocabulary

ONE forward gives both things that stage 2 trains: the reward, and the log-probability of every CoT token. That works
because attention is causal: the query stands last, so it changes nothing before it.

Shapes: B rows, L positions (padded), P prompt tokens, D hidden size, V vocabulary, N CoTs, T CoT tokens (padded).
The model knows nothing of ranks or sharding; parallel.py applies those from outside. What must not be taken out of
`forward`: everything that touches the embedding, `lm_head` or the head, since under FSDP they are whole only in there.
"""

import argparse
import contextlib
import dataclasses
import glob
import json
import os
import pickle
import sys
import zlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3VLForConditionalGeneration,
)

import data
from data import InputError
from layout import lay_out
from losses import token_log_probs

# LoRA on the LLM's linear layers; not on lm_head, the embeddings or the vision tower (whose layers have other names).
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
# The head lies in a folder of its own: vLLM loads EVERY *.safetensors beside config.json as weights of the backbone.
SETTINGS_FILE, HEAD_FILE, TRAINED_FILE = "descore.json", "reward_head/head.safetensors", "trained.safetensors"

FAR_BELOW = torch.finfo(torch.bfloat16).min  # as a logit: never attended to


@dataclasses.dataclass
class Output:
    """rewards (N,) fp32; log_probs (N, T) fp32, 0 at padding, or None if not asked for."""

    rewards: torch.Tensor
    log_probs: torch.Tensor | None


# ---------------------------------------------------------------------------------------------------------------
# 1. The model
# ---------------------------------------------------------------------------------------------------------------
class DeScore(nn.Module):
    """Qwen3-VL backbone + learnable query + linear head without bias. Rewards are unbounded; only differences count.

    The query is a parameter put into `inputs_embeds`, not a row of the vocabulary: nothing is resized, no 1.2 GB
    embedding gets an optimizer state for one row (README, difference 1), the sampler can never emit it, and a prompt
    that contains the letters `<Reward>` is only text.
    """

    def __init__(self, backbone: Qwen3VLForConditionalGeneration, processor=None, settings: dict | None = None):
        super().__init__()
        hidden = backbone.config.text_config.hidden_size
        self.backbone, self.processor, self.settings = backbone, processor, dict(settings or {})
        self.weights = None  # where the values of a backbone that is still empty come from; see `fill`
        # The query starts as an average word (a foreign scale would disturb the first layers), the head near 0, so that
        # at the start all rewards are about equal and the loss is ln 2.
        self.query = nn.Parameter(backbone.get_input_embeddings().weight.detach().float().mean(dim=0).clone())  # (D,)
        self.head = nn.Linear(hidden, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.head.weight, std=hidden**-1)
        self.logit_chunk = 1024  # positions whose (chunk, V) logits exist at a time: 0.6 GB in fp32 at V = 151,936

    def forward(self, batch: dict[str, torch.Tensor], want_log_probs: bool = True) -> Output:
        """One pass: rewards at the queries, and log-probs of the CoT tokens. `batch` comes from `lay_out`.

        A batch may have an entry "seen", None at first: then what the vision tower saw is kept there, and a next pass
        over the batch, be it of another model with the same tower, need not look again.
        """
        embeds = self.backbone.get_input_embeddings()(batch["input_ids"])  # (B, L, D)
        embeds = torch.where(batch["query_mask"][..., None], self.query.to(embeds.dtype), embeds)
        seen, grid, mask = batch.get("seen"), batch["video_grid_thw"], batch["attention_mask"]
        if seen is None:
            seen = self.backbone.model.get_video_features(batch["pixel_values_videos"], grid, return_dict=True)
        if "seen" in batch:
            batch["seen"] = seen
        if mask.ndim == 4:  # added to the attention scores: as numbers once, not anew from booleans in every layer
            mask = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device).masked_fill_(~mask, FAR_BELOW)
        hidden = self.backbone.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=batch["position_ids"],
            mm_encoder_outputs={"video": seen},
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)  # (B * L, D)
        # fp32 for the head whatever the backbone computes in: a bf16 reward near 5 has steps of 0.03.
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = self.head(hidden[batch["query_index"]].float()).squeeze(-1)  # (N,)
        return Output(rewards, self._response_log_probs(hidden, batch) if want_log_probs else None)

    def _response_log_probs(self, hidden, batch):
        """log π of each CoT token: `lm_head` on CoT positions only, in chunks whose logits are recomputed in backward.

        Full logits of one 8B sequence (6,144 x 151,936 fp32) would be 3.7 GB; most of its positions are video.
        """
        mask = batch["response_mask"].bool()  # (N, T)
        states = hidden[batch["response_index"][mask]]  # (M, D): M real CoT tokens of all N CoTs
        token_ids = batch["response_ids"][mask]  # (M,)

        def chunk_log_probs(states, token_ids):
            return token_log_probs(self.backbone.lm_head(states), token_ids)

        pieces = [
            checkpoint(chunk_log_probs, states[i : i + self.logit_chunk], token_ids[i : i + self.logit_chunk],
                       use_reentrant=False)
            for i in range(0, len(states), self.logit_chunk)
        ]  # fmt: skip
        log_probs = torch.zeros(mask.shape, device=hidden.device)  # (N, T)
        return log_probs.masked_scatter(mask, torch.cat(pieces)) if pieces else log_probs

    # -- what is trained ----------------------------------------------------------------------------------------
    def make_trainable(
        self, train: str, vision: bool, lora_r: int = 64, lora_alpha: int = 128, lora_dropout: float = 0.05
    ) -> None:
        """Marks what is trained: always the query and the head; the LLM by `train`; the vision tower if `vision`.

        train = "lora": adapters on the LLM's linear layers (paper, stage 1: r 64, alpha 128, dropout .05);
        train = "full": all of the LLM, `lm_head` included (paper, stage 2); train = "head": nothing of the LLM.
        Trained parameters are held in fp32: in bf16 an update of 1e-6 rounds away (README, difference 6).
        """
        if train not in ("lora", "full", "head"):
            raise InputError(f"--train {train}: choose lora, full or head.")
        if train == "lora":
            from peft import LoraConfig

            self.backbone.add_adapter(
                LoraConfig(r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=LORA_TARGETS)
            )
            self._start_adapters()
        for name, parameter in self.named_parameters():  # after add_adapter, which freezes the whole backbone
            mine = name in ("query", "head.weight") or ".lora_" in name
            in_tower = name.startswith("backbone.model.visual.")
            parameter.requires_grad_(mine or (vision if in_tower else train == "full"))
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _start_adapters(self) -> None:
        """A uniform as in a linear layer, B 0: at step 0 the adapted model is the base model.

        Each A is drawn from its own name and the seed, so one process and many ranks start alike.
        """
        for name, layer in self.lora_layers().items():
            a, b = (part.to_empty(device=self.query.device)["default"].weight for part in (layer.lora_A, layer.lora_B))
            generator = torch.Generator(a.device).manual_seed(torch.initial_seed() + zlib.crc32(name.encode()))
            nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
            nn.init.zeros_(b)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by part: "llm", "vision", "head" (query and head). For optimizers and gradient
        norms."""
        groups = {"llm": [], "vision": [], "head": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                mine = name in ("query", "head.weight")
                groups["head" if mine else "vision" if ".visual." in name else "llm"].append(parameter)
        return {name: parameters for name, parameters in groups.items() if parameters}

    def lora_layers(self) -> dict[str, nn.Module]:
        """Name -> layer for each linear layer that carries an adapter."""
        return {name: module for name, module in self.named_modules() if hasattr(module, "lora_A")}

    @contextlib.contextmanager
    def reference_policy(self):
        """Inside, the model is what it was before training, for the KL term: adapters off, and no dropout.

        Only for LoRA: with full fine-tuning the old weights are gone, and grpo.py loads a second, frozen model.
        """
        layers, was_training = list(self.lora_layers().values()), self.training
        assert layers, "reference_policy needs LoRA"
        self.eval()
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters() would also flip requires_grad, which FSDP forbids
        try:
            yield self
        finally:
            for layer in layers:
                layer._disable_adapters = False
            self.train(was_training)

    # -- using it -----------------------------------------------------------------------------------------------
    def encode(self, videos, prompts, source_fps: float | None = None) -> list[dict]:
        """Videos (paths, data.Video, or (T, H, W, 3) arrays with `source_fps`) and prompts -> prefixes for
        `lay_out`."""
        if len(videos) != len(prompts):
            raise InputError(f"{len(videos)} videos but {len(prompts)} prompts; one prompt per video is needed.")
        fps, max_pixels = self.settings.get("fps", 2.0), self.settings.get("max_pixels", 448 * 448)
        videos = [data.to_video(video, fps, max_pixels, source_fps) for video in videos]
        return [data.encode_prompt(self.processor, video, prompt) for video, prompt in zip(videos, prompts)]

    @torch.no_grad()
    def think(self, videos, prompts, max_new_tokens=4096, temperature=0.0, seed=0, source_fps=None) -> list[str]:
        """Writes one CoT per video (greedy by default). Returns B texts, without the EOS."""
        prefixes = self.encode(videos, prompts, source_fps)
        seeds = [[seed + i] for i in range(len(prefixes))]
        cots = sample_cots(self.backbone, self.processor, prefixes, seeds, max_new_tokens, temperature)
        return [decode_cot(self.processor.tokenizer, cot) for (cot,) in cots]

    def score(self, videos, prompts, thoughts, source_fps=None) -> torch.Tensor:
        """Rewards (B,) fp32 of videos whose CoTs are given: texts, token ids, or None for no CoT. Nothing is masked."""
        return self.score_several(videos, prompts, [[thought] for thought in thoughts], source_fps)[:, 0]

    @torch.no_grad()
    def score_several(self, videos, prompts, thoughts: list[list], source_fps=None) -> torch.Tensor:
        """Rewards (B, k) fp32: k CoTs for each video, packed behind one prefix, which is so encoded once, not k
        times."""
        encode = lambda t: data.encode_cot(self.processor.tokenizer, t) if isinstance(t, str) else t or []  # noqa: E731
        was_training = self.training
        self.eval()
        batch = lay_out(
            self.backbone, self.encode(videos, prompts, source_fps), [[encode(t) for t in row] for row in thoughts]
        )
        rewards = self(to_device(batch, self.query.device), want_log_probs=False).rewards
        self.train(was_training)
        return rewards.view(len(thoughts), -1)

    def reward(
        self, videos, prompts, think=True, max_new_tokens=4096, source_fps=None, normalize=False, with_thoughts=False
    ):
        """Think, then score: rewards (B,) fp32, and with `with_thoughts` also the B texts (None where not thought).

        `think=False` skips the CoT, for speed: random CoT masking has trained the head for it. `normalize=True`
        subtracts the mean and divides by the spread that rewards had at the end of training, saved with the checkpoint:
        a rough common scale (about 0 +- 1) for using DeScore beside other rewards. Only differences mean anything
        either way.
        """
        thoughts = self.think(videos, prompts, max_new_tokens, source_fps=source_fps) if think else [None] * len(videos)
        rewards = self.score(videos, prompts, thoughts, source_fps)
        if normalize:
            if not self.settings.get("reward_std"):
                raise InputError(
                    "normalize=True: the checkpoint holds no reward_mean and reward_std; train it with this code."
                )
            rewards = (rewards - self.settings["reward_mean"]) / self.settings["reward_std"]
        return (rewards, thoughts) if with_thoughts else rewards

    # -- disk ---------------------------------------------------------------------------------------------------
    def save_pretrained(self, path: str, merge=True, whole=lambda tensor: tensor, write=True) -> None:
        """Writes a folder that transformers and vLLM open as a plain Qwen3-VL, plus the query and the head.

        Files: config.json, model*.safetensors, tokenizer and processor; reward_head/head.safetensors (query,
        head.weight); descore.json (sizes, sampling settings). `merge=True` folds LoRA into the weights, in fp32, so the
        next stage cannot lose it (README, difference 17). `merge=False` writes only what was trained:
        adapter_model.safetensors (PEFT's layout), trained.safetensors (vision tower), and the base model's path.
        A sharded model (parallel.save_model): `whole` gathers one tensor; `write=False` only takes part in gathering.
        """
        from safetensors.torch import save_file

        state = {name: value.detach() for name, value in self.state_dict().items()}
        text = self.backbone.config.text_config
        sizes = {"hidden_size": text.hidden_size, "layers": text.num_hidden_layers, "vocab_size": text.vocab_size}
        kind = "merged" if merge or not self.lora_layers() else "adapter"
        head = {key: whole(state[key]).cpu().contiguous() for key in ("query", "head.weight")}
        if write:
            os.makedirs(os.path.dirname(os.path.join(path, HEAD_FILE)), exist_ok=True)
            save_file(head, os.path.join(path, HEAD_FILE))
            with open(os.path.join(path, SETTINGS_FILE), "w", encoding="utf-8") as file:
                json.dump({**self.settings, "kind": kind, **sizes}, file, indent=1)
            if self.processor is not None:
                self.processor.save_pretrained(path)
        if kind == "merged":
            if self.backbone.config.tie_word_embeddings:
                state.pop("backbone.lm_head.weight", None)
            write_tensors(path, merge_lora(state, self.lora_scaling(), whole), write)
            if write:
                self.backbone.config.save_pretrained(path)
                self.backbone.generation_config.save_pretrained(path)
            return
        strip = len("backbone.")
        adapter = {
            f"base_model.model.{k[strip:].replace('.default', '')}": whole(v).cpu().contiguous()
            for k, v in state.items() if ".lora_" in k
        }  # fmt: skip
        trained = {n for n, p in self.named_parameters() if p.requires_grad and ".lora_" not in n} - set(head)
        trained = {k: whole(state[k]).cpu().contiguous() for k in sorted(trained)}
        if write:
            config = self.backbone.peft_config["default"]
            config.base_model_name_or_path = self.settings.get("base_model")
            config.save_pretrained(path)
            save_file(adapter, os.path.join(path, "adapter_model.safetensors"))
            save_file(trained, os.path.join(path, TRAINED_FILE))

    def lora_scaling(self) -> dict[str, float]:
        """Layer name in the state dict -> alpha / r."""
        return {name: layer.scaling["default"] for name, layer in self.lora_layers().items()}

    @classmethod
    def from_pretrained(
        cls, path: str, device="cpu", dtype=torch.float32, new_head=False, empty=False, random_init=False
    ) -> "DeScore":
        """Opens a DeScore folder, or, with `new_head=True`, a plain Qwen3-VL to start stage 1 from.

        Strict: a missing or extra weight, another size, or a base model without a head is an InputError, never a random
        head (README, difference 16). In evaluation mode, as transformers does it. `empty=True`: the backbone stays on
        the meta device, without memory, until `fill`; parallel.shard does that block by block. `random_init=True`: only
        config.json and the processor are read, to measure the speed and memory of a size without its weights.
        """
        settings_path = os.path.join(path, SETTINGS_FILE)
        settings = {"base_model": str(path)}
        if os.path.isfile(settings_path):
            with open(settings_path, encoding="utf-8") as file:
                settings = json.load(file)
        elif not new_head and not random_init:
            raise InputError(
                f"{path}: has no {SETTINGS_FILE}, so no reward head; give --model a folder that cold_start.py wrote."
            )
        is_adapter = settings.get("kind") == "adapter"
        base, empty = settings["base_model"] if is_adapter else path, empty or random_init
        backbone = empty_backbone(base, dtype) if empty else load_backbone(base, dtype)
        try:
            processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: the processor's files are missing or broken ({first_line(error)}).") from error
        model = cls(backbone, processor, settings)
        if empty:
            model.weights = RandomWeights(backbone) if random_init else Weights(base, backbone)
            model.query = nn.Parameter(model.weights[EMBEDDING].to(dtype).float().mean(dim=0))
        if not random_init and (not new_head or os.path.isfile(settings_path)):
            sizes = backbone.config.text_config
            for key, have in (("hidden_size", sizes.hidden_size), ("layers", sizes.num_hidden_layers)):
                if settings.get(key) != have:
                    raise InputError(
                        f"{path}: the head was trained on a base with {key} {settings.get(key)}, this one has {have}."
                    )
            if is_adapter:
                model._load_adapter(path)
            head = os.path.join(path, HEAD_FILE)
            load_strictly(model, read_tensors(head), head, ("query", "head.weight"))
        return (model if empty else model.to(device)).eval()

    @torch.no_grad()
    def fill(self, module: nn.Module, device) -> None:
        """Reads the parameters of `module`, a part of this model, that are still empty. Without any it does nothing."""
        wanted = {id(parameter) for parameter in module.parameters() if parameter.is_meta}
        for name, parameter in [(n, p) for n, p in self.backbone.named_parameters() if id(p) in wanted]:
            owner, _, leaf = name.rpartition(".")
            value = self.weights[name.replace(".base_layer.", ".")].to(device, parameter.dtype)
            setattr(self.backbone.get_submodule(owner), leaf, nn.Parameter(value, parameter.requires_grad))
        if wanted and self.backbone.config.tie_word_embeddings:
            self.backbone.lm_head.weight = self.backbone.get_input_embeddings().weight

    def _load_adapter(self, path):
        from peft import LoraConfig

        self.backbone.add_adapter(LoraConfig.from_pretrained(path))
        self._start_adapters()
        file = os.path.join(path, "adapter_model.safetensors")
        adapter = {
            k.replace("base_model.model.", "backbone.", 1).replace(".weight", ".default.weight"): v
            for k, v in read_tensors(file).items()
        }
        load_strictly(self, adapter, file, [k for k in self.state_dict() if ".lora_" in k])
        file = os.path.join(path, TRAINED_FILE)
        trained = read_tensors(file)
        load_strictly(self, trained, file, list(trained))
        if self.weights is not None:
            self.weights.add(file, "backbone.")  # copied into an empty backbone they are lost: `fill` reads them again


def import_released(path: str) -> DeScore:
    """Opens a checkpoint of the authors' code: a Hugging Face folder with a `<Reward>` row, and `rm_head.pth` beside
    it.

    The row becomes our query, rm_head.weight our head. Nothing is unpickled but plain tensors (weights_only). Their
    prompt and the place of the CoT differ from ours, so rewards will be near theirs, not equal.
    """
    file = os.path.join(path, "rm_head.pth")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"{file}: missing, or more than plain tensors ({first_line(error)}).") from error
    state = state.get("model", state)
    weights = [v for k, v in state.items() if k in ("rm_head.weight", "base_model.model.rm_head.weight")]
    backbone = load_backbone(path, torch.float32)
    processor = AutoProcessor.from_pretrained(path)
    row = processor.tokenizer.get_added_vocab().get("<Reward>")
    model = DeScore(backbone, processor, {"base_model": str(path)})
    if len(weights) != 1 or weights[0].shape != model.head.weight.shape or row is None:
        raise InputError(
            f"{path}: needs one rm_head.weight of shape {tuple(model.head.weight.shape)} and a <Reward> token."
        )
    with torch.no_grad():
        model.query.copy_(backbone.get_input_embeddings().weight[row])
        model.head.weight.copy_(weights[0])
    return model.eval()


def merge_lora(state: dict[str, torch.Tensor], scaling: dict[str, float], whole=lambda tensor: tensor):
    """This model's state dict -> (Hugging Face name, tensor) of the backbone, adapters folded in: W + (alpha/r) B A,
    fp32.

    A generator: a caller that sends the weights on needs room for one layer, not for a second model. `whole` turns a
    shard into the whole tensor, where the model is sharded.
    """
    for key, value in state.items():
        if not key.startswith("backbone.") or ".lora_" in key:
            continue
        layer = key.removesuffix(".base_layer.weight")
        if layer != key:
            a, b = (whole(state[f"{layer}.lora_{x}.default.weight"]).float() for x in "AB")  # (r, in), (out, r)
            value, key = whole(value).float() + scaling[layer] * (b @ a), f"{layer}.weight"
        else:
            value = whole(value)
        yield key.removeprefix("backbone.").replace(".base_layer.", "."), value


FILE_BYTES = 4 << 30  # a file of weights, at most


def write_tensors(path: str, named_tensors, write=True) -> None:
    """(name, tensor) one by one -> model*.safetensors in Hugging Face's layout, a file for every FILE_BYTES.

    So the host needs room for one file, not for the model. `write=False`: only walks through.
    """
    from safetensors.torch import save_file

    parts, size, part = [], 0, {}  # parts: the names in each file

    def flush():
        save_file(part, os.path.join(path, f"model-{len(parts) + 1:05d}.part"), metadata={"format": "pt"})
        parts.append(list(part))
        part.clear()

    for name, tensor in named_tensors:
        if not write:
            continue
        if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > FILE_BYTES:
            flush()
        part[name], size = tensor.cpu().contiguous(), size + tensor.nbytes
    if not write:
        return
    flush()
    files = [f"model-{k + 1:05d}-of-{len(parts):05d}.safetensors" for k in range(len(parts))]
    files = files if len(files) > 1 else ["model.safetensors"]
    for k, file in enumerate(files):
        os.replace(os.path.join(path, f"model-{k + 1:05d}.part"), os.path.join(path, file))
    if len(files) > 1:
        where = {name: file for file, names in zip(files, parts) for name in names}
        with open(os.path.join(path, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
            json.dump({"metadata": {"total_size": size}, "weight_map": where}, file, indent=1)


def load_backbone(path: str, dtype: torch.dtype) -> Qwen3VLForConditionalGeneration:
    """The Qwen3-VL in a folder (or on the hub), every weight accounted for. Raises InputError otherwise."""
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "qwen3_vl":
            raise InputError(f"{path}: is a {config.model_type} model; DeScore needs a Qwen3-VL (model_type qwen3_vl).")
        backbone, info = Qwen3VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be opened as a Qwen3-VL checkpoint ({first_line(error)}).") from error
    refuse_odd_weights(path, info)
    return backbone


def refuse_odd_weights(path: str, found: dict) -> None:
    """InputError if any of the three lists of names in `found` is not empty."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in found[kind]):
            raise InputError(
                f"{path}: {len(names)} {kind.replace('_', ' ')}, e.g. {names[0]}; is it the right base model?"
            )


def empty_backbone(path: str, dtype: torch.dtype) -> Qwen3VLForConditionalGeneration:
    """The Qwen3-VL of a folder's config.json on the meta device: names, shapes and types, but no memory."""
    from accelerate import init_empty_weights

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened as a Qwen3-VL checkpoint ({first_line(error)}).") from error
    if config.model_type != "qwen3_vl":
        raise InputError(f"{path}: is a {config.model_type} model; DeScore needs a Qwen3-VL (model_type qwen3_vl).")
    with init_empty_weights(include_buffers=False):  # buffers, such as the rotary frequencies, are in no checkpoint
        backbone = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    with contextlib.suppress(OSError):  # a base model may come without one
        backbone.generation_config = GenerationConfig.from_pretrained(path)
    return backbone


EMBEDDING = "model.language_model.embed_tokens.weight"


class Weights:
    """A folder's safetensors, read one tensor at a time, when asked for: `weights[name]`.

    So each rank can read a block, keep its own rows of it, and go on: no host ever holds a whole 8B model.
    """

    def __init__(self, path: str, backbone):
        from huggingface_hub import snapshot_download

        folder = path if os.path.isdir(path) else snapshot_download(path, allow_patterns="*.safetensors")
        self.places, shapes = {}, {}  # name -> (file, key); name -> shape
        for file in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
            shapes |= self.add(file)
        own = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
        if backbone.config.tie_word_embeddings:
            own.pop("lm_head.weight"), shapes.pop("lm_head.weight", None)
        wrong = [name for name in own.keys() & shapes.keys() if own[name] != shapes[name]]
        found = {"missing_keys": own.keys() - shapes.keys(), "unexpected_keys": shapes.keys() - own.keys()}
        refuse_odd_weights(path, found | {"mismatched_keys": wrong})

    def add(self, file: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
        """Names the tensors of a file, without `prefix`; they go before those of earlier files. Returns their shapes."""
        with open_tensors(file) as tensors:
            names = {key.removeprefix(prefix): key for key in tensors.keys()}
            self.places |= {name: (file, key) for name, key in names.items()}
            return {name: tuple(tensors.get_slice(key).get_shape()) for name, key in names.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        file, key = self.places[name]
        with open_tensors(file) as tensors:
            return tensors.get_tensor(key)


class RandomWeights:
    """In place of `Weights`: normal with std .02, norms 1, biases 0; by name, so every rank draws the same."""

    def __init__(self, backbone):
        self.shapes = {name: value.shape for name, value in backbone.state_dict().items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        if len(self.shapes[name]) == 1:
            return torch.full(self.shapes[name], float("norm" in name and name.endswith("weight")))
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(self.shapes[name], generator=generator) * 0.02


def read_tensors(file: str) -> dict[str, torch.Tensor]:
    """A safetensors file; a missing or broken one is an InputError. (Nothing is ever unpickled.)"""
    with open_tensors(file) as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}


def open_tensors(file: str):
    """safetensors' handle, for `with`: reads single tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: missing or not a safetensors file ({first_line(error)}).") from error


def load_strictly(model: nn.Module, tensors: dict, file: str, expected) -> None:
    """Copies tensors into the model; a missing, extra or wrongly sized one is an InputError."""
    own = dict(model.state_dict())
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise InputError(f"{file}: missing or extra weights: {', '.join(odd[:3])}.")
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            have = tuple(own[name].shape) if name in own else "none"
            raise InputError(
                f"{file}: {name} is {tuple(value.shape)}, the model's is {have}; is it the right base model?"
            )
        with torch.no_grad():
            own[name].copy_(value)


def first_line(error: Exception) -> str:
    """The first non-empty line of a message, for one-sentence errors."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def to_device(batch: dict[str, torch.Tensor], device) -> dict[str, torch.Tensor]:
    """Moves a batch; tensors stay as they are."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


# ---------------------------------------------------------------------------------------------------------------
# 2. Sampling CoTs with transformers' generate
# ---------------------------------------------------------------------------------------------------------------
class SeededSampling(LogitsProcessor):
    """Temperature sampling with one random stream per row, by the Gumbel-max trick:

        argmax_v (logit_v / temperature + g_v),  g_v ~ Gumbel(0, 1)   is a draw from softmax(logits / temperature)

    With transformers' own sampling the draw for a row depends on its batch-mates; here a CoT depends on its own seed
    only, so results do not change with the batch size or the number of ranks.
    """

    def __init__(self, seeds: list[int], temperature: float):
        self.generators, self.temperature = [torch.Generator().manual_seed(seed) for seed in seeds], temperature

    def __call__(self, input_ids, scores):
        noise = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])  # (rows, V)
        gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self.temperature + gumbel.to(scores.device)


def banned_tokens(tokenizer, vocab_size: int) -> list[int]:
    """Ids below `vocab_size`, the rows of the model's embedding, that a CoT may not contain.

    Allowed are text (tokens that are not added ones), EOS, `<think>` and `</think>`. Banned is the rest: a sampled
    <|video_pad|> would claim to be video, a <tool_call> belongs to another task, and rows without a token decode to
    nothing, yet would be scored. Qwen3-VL has 151,936 rows: 151,643 of text, 26 added tokens, 267 without a token.
    """
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    text = set(tokenizer.get_vocab().values()) - set(added.values())
    allowed = text | {tokenizer.eos_token_id} | {added[token] for token in data.THINK if token in added}
    return [i for i in range(vocab_size) if i not in allowed]


@torch.no_grad()
def sample_cots(
    backbone, processor, prefixes: list[dict], seeds: list[list[int]], max_new_tokens: int, temperature: float = 1.0
) -> list[list[list[int]]]:
    """Samples len(seeds[i]) CoTs for prefix i, whose video and prompt are read once. temperature 0 is greedy.

    Returns [prefix][sample] -> token ids, the EOS included when it was reached, absent when cut off at max_new_tokens.
    """
    tokenizer, device = processor.tokenizer, next(backbone.parameters()).device
    which = torch.tensor([i for i, row_seeds in enumerate(seeds) for _ in row_seeds], device=device)  # (rows,)
    flat_seeds = [seed for row_seeds in seeds for seed in row_seeds]
    length = max(len(prefix["input_ids"]) for prefix in prefixes)

    def left_pad(name, fill):  # generation continues at the right end, so all rows must end there
        rows = [prefix[name] if name in prefix else torch.ones_like(prefix["input_ids"]) for prefix in prefixes]
        return torch.stack([torch.cat([row.new_full((length - len(row),), fill), row]) for row in rows]).to(device)

    ids, mask = left_pad("input_ids", tokenizer.pad_token_id), left_pad("attention_mask", 0)
    config = GenerationConfig(  # everything named, or the checkpoint's own generation_config would fill the gaps
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=banned_tokens(tokenizer, backbone.config.text_config.vocab_size),
    )
    sampling = LogitsProcessorList([SeededSampling(flat_seeds, temperature)] if temperature > 0 else [])
    was_training = backbone.training
    backbone.eval()
    backbone.model.rope_deltas = None  # generate caches it on the model; a stale one belongs to other videos
    cache = backbone(  # all of the prompt but its last token, from which generation starts
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1], mm_token_type_ids=left_pad("mm_token_type_ids", 0)[:, :-1],
        pixel_values_videos=torch.cat([prefix["pixel_values_videos"] for prefix in prefixes]).to(device),
        video_grid_thw=torch.cat([prefix["video_grid_thw"] for prefix in prefixes]).to(device),
        use_cache=True, logits_to_keep=1,
    ).past_key_values  # fmt: skip
    cache.batch_select_indices(which)  # a copy of the prompt's keys and values for each of its CoTs
    backbone.model.rope_deltas = backbone.model.rope_deltas[which]
    tokens = backbone.generate(
        input_ids=ids[which], attention_mask=mask[which], past_key_values=cache, generation_config=config,
        logits_processor=sampling,
    )[:, length:].tolist()  # fmt: skip
    backbone.train(was_training)
    ended = [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in tokens]
    samples = iter(ended)
    return [[next(samples) for _ in row_seeds] for row_seeds in seeds]


def decode_cot(tokenizer, cot: list[int]) -> str:
    """Token ids -> text without EOS."""
    return tokenizer.decode(cot[:-1] if cot and cot[-1] == tokenizer.eos_token_id else cot)


def main(argv=None) -> None:
    """Converts a checkpoint of the authors' code into a DeScore folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--import-released", required=True, metavar="DIR", help="folder with config.json and rm_head.pth"
    )
    parser.add_argument("--out", required=True, help="DeScore folder to write")
    args = parser.parse_args(argv)
    import_released(args.import_released).save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
