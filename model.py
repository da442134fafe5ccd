"""DeScore: a Qwen3-VL that thinks in words and scores through one extra token.

    [ video + prompt ][ CoT ... EOS ][ <Reward> ] -> last hidden state at <Reward> -> linear head -> reward
                        ^ generated     ^ learnable vector, not a word of the vocabulary

ONE forward gives both things that stage 2 trains: the reward, and the log-probability of every CoT token. That works
because attention is causal: the query stands last, so it changes nothing before it.

Shapes: S rows (a video and its CoTs each), L positions (padded), P prompt tokens, D hidden size, V vocabulary, N CoTs,
T CoT tokens (padded).
The model knows nothing of ranks or sharding; parallel.py applies those from outside. What must not be taken out of
`forward`: everything that touches the embedding, `lm_head` or the head, since under FSDP they are whole only in there.
"""

import contextlib
import dataclasses
import warnings
import zlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLForConditionalGeneration

import data
from layout import lay_out
from losses import token_log_probs
from plumbing.adapters import inject_lora
from plumbing.checkpoint import QUERY_AND_HEAD, open_model, write_model
from plumbing.gpu import LOGIT_CHUNK
from plumbing.settings import InputError
from prefix_once import SHARED_PREFIX, Past
from rollout import TransformersEngine, decode_cot, has_ended

# LoRA on the LLM's linear layers; not on lm_head, the embeddings or the vision tower (whose layers have other names).
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


@dataclasses.dataclass
class Output:
    """What one forward gives: rewards (N,) fp32; log_probs (N, T) fp32, 0 at padding, or None if not asked for."""

    rewards: torch.Tensor
    log_probs: torch.Tensor | None


# ---- 1. The model ---------------------------------------------------------------------------------------------
class DeScore(nn.Module):
    """Qwen3-VL backbone + learnable query + linear head without bias. Rewards are unbounded; only differences count.

    The query is a parameter put into `inputs_embeds`, not a row of the vocabulary: nothing is resized, no 1.2 GB
    embedding gets an optimizer state for one row (docs/differences.md, row 1), the sampler can never emit it, and a
    prompt that contains the letters `<Reward>` is only text.
    """

    def __init__(self, backbone: Qwen3VLForConditionalGeneration, processor=None, settings: dict | None = None):
        super().__init__()
        hidden = backbone.config.text_config.hidden_size
        # Here, so that every way to a backbone (weights, empty, random) gets it. The vision tower keeps SDPA.
        backbone.model.language_model.set_attn_implementation(SHARED_PREFIX)
        for name in ("folded", "beside"):  # LoRA of earlier stages, in the weights or next to them: read_adapters
            setattr(backbone, name, getattr(backbone, name, {}))
        self.backbone, self.processor, self.settings = backbone, processor, dict(settings or {})
        self.weights = None  # where the values of a backbone that is still empty come from; see `load_empty`
        # The query starts as an average word (a foreign scale would disturb the first layers), the head near 0, so that
        # at the start all rewards are about equal and the loss is ln 2.
        self.query = nn.Parameter(backbone.get_input_embeddings().weight.detach().float().mean(dim=0).clone())  # (D,)
        self.head = nn.Linear(hidden, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.head.weight, std=hidden**-1)

    def forward(self, batch: dict, want_log_probs=True, temperature: float = 1.0, past: Past | None = None) -> Output:
        """One pass: rewards at the queries, and log-probs of the CoT tokens. `batch` comes from `lay_out`.

        temperature: that of sampling; log-probs are those of the policy that samples, softmax(logits / temperature).
        past: the prefixes, read before; the batch comes from `lay_out_behind` then.
        """
        embeds = self.backbone.get_input_embeddings()(batch["input_ids"])  # (S, L, D)
        embeds = torch.where(batch["query_mask"][..., None], self.query.to(embeds.dtype), embeds)
        if past is None:
            hidden, _ = self._hidden(embeds, batch)
        else:  # CoTs are text: no tower, no video among them
            hidden = self.backbone.model.language_model(
                inputs_embeds=embeds, attention_mask=None, spans=batch["spans"], past=past.layers.__getitem__,
                position_ids=batch["position_ids"], use_cache=False,
            ).last_hidden_state
            hidden = torch.cat([past.last, hidden[0]])
        # fp32 for the head whatever the backbone computes in: a bf16 reward near 5 has steps of 0.03.
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = self.head(hidden[batch["query_index"]].float()).squeeze(-1)  # (N,)
        return Output(rewards, self._cot_log_probs(hidden, batch, temperature) if want_log_probs else None)

    def read(self, batch: dict, video_features=None) -> Past:
        """The prefixes alone, each ONCE, for all CoTs that `forward` then lays behind them. `batch`: `lay_out` of [].

        video_features: those of another Past for the same videos, so that the tower need not look again; only while it
        is frozen. A forward method like `forward` (parallel.shard tells FSDP so): with gradients, if they are on.
        """
        past = Past()
        hidden, past.video_features = self._hidden(
            self.backbone.get_input_embeddings()(batch["input_ids"]), batch, video_features, past.keep)
        length = batch["input_ids"].shape[1]
        past.last = hidden[[s * length + prompt - 1 for s, (prompt, _) in enumerate(batch["spans"])]]
        return past

    def _hidden(self, embeds, batch, video_features=None, keep=None):
        """Rows with their videos -> last hidden states (S * L, D), and what the tower saw."""
        if video_features is None:
            # On the host: each layer of the tower reads these ends, three times, and would wait for the GPU.
            ends = torch.tensor([0, *batch["frames"]]).cumsum(0)
            video_features = self.backbone.model.get_video_features(
                batch["pixel_values_videos"], batch["video_grid_thw"], return_dict=True, video_cu_seqlens=ends)
        # `spans` and `keep` are no arguments of transformers: its models hand keywords they do not know down to each
        # layer's attention function, here prefix_once.attention, which reads who sees whom from them. No mask then:
        # with None (and spans), that function runs each part causally, and padding is in no part. keep and past are
        # functions, since FSDP would open an object with tensors: each layer would get a copy, and would make zeros in
        # the backward for the keys and values of all other layers.
        hidden = self.backbone.model(
            inputs_embeds=embeds, attention_mask=None, spans=batch["spans"], keep=keep,
            position_ids=batch["position_ids"], mm_encoder_outputs={"video": video_features}, use_cache=False,
        ).last_hidden_state.flatten(0, 1)
        return hidden, video_features

    def _cot_log_probs(self, hidden, batch, temperature):
        """log π of each CoT token: `lm_head` on CoT positions only, in chunks whose logits are recomputed in backward.

        Full logits of one 8B sequence (6,144 x 151,936 fp32) would be 3.7 GB; most of its positions are video.
        """
        mask = batch["cot_mask"].bool()  # (N, T)
        states = hidden[batch["cot_index"][mask]]  # (M, D): M real CoT tokens of all N CoTs
        token_ids = batch["cot_ids"][mask]  # (M,)

        def chunk_log_probs(states, token_ids):
            return token_log_probs(self.backbone.lm_head(states), token_ids, temperature)

        pieces = [
            checkpoint(chunk_log_probs, states[i : i + LOGIT_CHUNK], token_ids[i : i + LOGIT_CHUNK],
                       use_reentrant=False)
            for i in range(0, len(states), LOGIT_CHUNK)
        ]
        log_probs = torch.zeros(mask.shape, device=hidden.device)  # (N, T)
        return log_probs.masked_scatter(mask, torch.cat(pieces)) if pieces else log_probs

    # -- what is trained ----------------------------------------------------------------------------------------
    def make_trainable(
        self, train: str, vision: bool, lora_r: int = 64, lora_alpha: int = 128, lora_dropout: float = 0.05,
        lm_head: bool = True,
    ) -> None:
        """Marks what is trained: always the query and the head; the LLM by `train`; the vision tower if `vision`.

        train = "lora": adapters on the LLM's linear layers (paper, stage 1: r 64, alpha 128, dropout .05);
        train = "full": all of the LLM, `lm_head` included (paper, stage 2); train = "head": nothing of the LLM.
        lm_head=False leaves `lm_head` as it is: no loss of stage 1 reaches it, and a parameter without a gradient has
        no Adam state, so a checkpoint could not be loaded. (Tied to the embeddings, it is trained as those.)
        Trained parameters are held in fp32: in bf16 an update of 1e-6 rounds away (docs/differences.md, row 6).
        InputError: another word for `train`.
        """
        if train not in ("lora", "full", "head"):
            raise InputError(f"--train {train}: choose lora, full or head.")
        if train == "lora":
            inject_lora(self.backbone, "default", r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                        target_modules=LORA_TARGETS)
            self._start_adapters()
        trained = {"head": True, "vision": vision, "llm": train == "full"}
        for name, parameter in self.named_parameters():  # after inject_lora, which freezes the whole backbone
            idle = name == "backbone.lm_head.weight" and not lm_head
            own = trained[part_of(name)] and not idle
            parameter.requires_grad_(".default." in name if ".lora_" in name else own)  # not an earlier stage's LoRA
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _start_adapters(self) -> None:
        """A uniform as in a linear layer, B 0: at step 0 the adapted model is the base model.

        Each A is drawn from its own name and the seed, so one process and many ranks start alike.
        """
        for name, layer in self.lora_layers().items():
            a, b = (part["default"].to_empty(device=self.query.device).weight for part in (layer.lora_A, layer.lora_B))
            generator = torch.Generator(a.device).manual_seed(torch.initial_seed() + zlib.crc32(name.encode()))
            nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
            nn.init.zeros_(b)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by part, for optimizer and gradient norm: "llm", "vision", "head" (query and head)."""
        groups = {"llm": [], "vision": [], "head": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[part_of(name)].append(parameter)
        return {name: parameters for name, parameters in groups.items() if parameters}

    def lora_layers(self) -> dict[str, nn.Module]:
        """Name -> layer for each linear layer that carries an adapter."""
        return {name: module for name, module in self.named_modules() if hasattr(module, "lora_A")}

    @contextlib.contextmanager
    def reference_policy(self):
        """Inside, the model is what it was before training, for the KL term: its adapter off, and no dropout.

        Only for LoRA: with full fine-tuning the old weights are gone, and grpo.py loads a second, frozen model.
        """
        layers, was_training = list(self.lora_layers().values()), self.training
        assert layers, "reference_policy needs LoRA"
        self.eval()
        active = [layer._active_adapter for layer in layers]
        for layer in layers:  # set_adapter() would also flip requires_grad, which FSDP forbids
            layer._active_adapter = [name for name in layer.active_adapters if name != "default"]
        try:
            yield self
        finally:
            for layer, names in zip(layers, active):
                layer._active_adapter = names
            self.train(was_training)

    # -- using it -----------------------------------------------------------------------------------------------
    def encode(self, videos, prompts, source_fps: float | None = None) -> list[dict]:
        """Videos and their prompts -> S prefixes, as `think`, `score` and `lay_out` take them.

        videos: paths, data.Video, or arrays (F, H, W, 3) of all frames at `source_fps`; each is decoded once, here.
        InputError: another number of prompts, an empty prompt, or a clip that cannot be read.
        """
        if len(videos) != len(prompts):
            raise InputError(f"{len(videos)} videos but {len(prompts)} prompts; one prompt per video is needed.")
        fps, max_pixels = self.settings.get("fps", 2.0), self.settings.get("max_pixels", 448 * 448)
        videos = [data.to_video(video, fps, max_pixels, source_fps) for video in videos]
        return [data.encode_prompt(self.processor, video, prompt) for video, prompt in zip(videos, prompts)]

    def think(self, prefixes, max_new_tokens=4096, temperature=0.0, seed=0, thoughts=None, engine=None) -> list:
        """Writes CoTs (greedy by default): S lists of token ids; with `thoughts` k, S lists of k such lists.

        engine: from rollout.make_engine; default: transformers, with this model's own weights. The ids are the CoT
        itself: its text (rollout.decode_cot) may be encoded to other ids than those that were sampled, and does not
        tell whether the CoT ended (EOS, the last id) or was cut off at max_new_tokens.
        """
        k = thoughts or 1
        seeds = [[seed + i * k + j for j in range(k)] for i in range(len(prefixes))]
        engine = engine or TransformersEngine(self.backbone, self.processor, shared=True)
        cots = engine.generate(prefixes, seeds, max_new_tokens, temperature)
        return cots if thoughts else [cot for (cot,) in cots]

    @torch.no_grad()
    def score(self, prefixes, cots) -> torch.Tensor:
        """Rewards (S,) fp32 of S prefixes, each with its CoT: token ids, or None or [] for no CoT.

        With a list of k CoTs for each prefix: (S, k); the k share the prefix. Nothing is masked, and no dropout.
        InputError: k is not the same for all.
        """
        several = any(isinstance(cot, (list, type(None))) for row in cots for cot in row or ())
        rows = [[cot or [] for cot in (row or () if several else [row])] for row in cots]
        if len(counts := {len(row) for row in rows}) > 1:  # a reward would go to another row's video
            raise InputError(f"score: prefixes with {sorted(counts)} CoTs; give each as many, or score them apart.")
        if not rows:
            return torch.zeros(0, device=self.query.device)
        was_training = self.training
        self.eval()
        batch = to_device(lay_out(self.backbone, prefixes, rows), self.query.device)
        rewards = self(batch, want_log_probs=False).rewards.view(len(rows), -1)  # (S, k)
        self.train(was_training)
        return rewards if several else rewards[:, 0]

    def reward(
        self, videos, prompts, think=True, max_new_tokens=4096, source_fps=None, normalize=False, with_thoughts=False,
        engine=None,
    ):
        """Think, then score (Fig. 2a): rewards (S,) fp32; with `with_thoughts` also S texts (None if not thought).

        `think=False` skips the CoT, for speed: random CoT masking has trained the head for it. normalize: rewards in
        the unit of training (`unit`); only differences mean anything either way. engine: as for `think`; a CoT is
        then scored as soon as it has ended, one at a time. A CoT cut off at max_new_tokens is scored as it is, and its
        reward may be far off: there is a warning. InputError: what `encode`, `unit` and the engine say.
        """
        mean, std = self.unit(normalize)
        prefixes = self.encode(videos, prompts, source_fps)
        cots, rewards = [None] * len(prefixes), torch.zeros(len(prefixes), device=self.query.device)
        if think and engine:
            for i, (cots[i],) in engine.stream(prefixes, [[0]] * len(prefixes), max_new_tokens, temperature=0.0):
                rewards[i] = self.score(prefixes[i : i + 1], cots[i : i + 1])[0]
        else:
            cots = self.think(prefixes, max_new_tokens) if think else cots
            for i in range(0, len(prefixes), 16):  # not all at once: 256 clips would not fit into a GPU's memory
                rewards[i : i + 16] = self.score(prefixes[i : i + 16], cots[i : i + 16])
        if cut := sum(not has_ended(self.processor.tokenizer, cot) for cot in cots if think):
            warnings.warn(f"{cut} of {len(cots)} CoTs did not end within max_new_tokens ({max_new_tokens}); their "
                          "rewards may be far off.", stacklevel=2)
        rewards = (rewards - mean) / std
        if with_thoughts:
            return rewards, [cot and decode_cot(self.processor.tokenizer, cot) for cot in cots]
        return rewards

    def unit(self, normalize: bool) -> tuple[float, float]:
        """What is taken from a reward, and what it is then divided by: 0 and 1; with `normalize`, the unit of training.

        That is the mean and the standard deviation of the rewards in its last quarter (plumbing.logs.reward_scale),
        where CoTs were masked (stage 1) or sampled (stage 2). For other videos it is a rough scale: the toy's three
        test sets come out at means of -1.5 to +.3 and deviations of .8 to 1.1. InputError: a checkpoint without it.
        """
        if not normalize:
            return 0.0, 1.0
        if not self.settings.get("reward_std"):
            raise InputError("normalize (--normalize): the checkpoint has no reward_mean and reward_std; train it with "
                             "this code.")
        return self.settings["reward_mean"], self.settings["reward_std"]

    # -- disk: plumbing/checkpoint.py has the files --------------------------------------------------------------
    def save_pretrained(self, path: str) -> None:
        """Writes a folder that transformers and vLLM open as a plain Qwen3-VL, plus the query and the head.

        LoRA is folded into the weights, in fp32, so the next stage cannot lose it (docs/differences.md, row 17), and
        kept beside them as well: see `from_pretrained`. InputError: none; OSError if the folder cannot be written.
        """
        write_model(self, path)

    @classmethod
    def from_pretrained(cls, path: str, device="cpu", dtype=torch.float32, new_head=False, revision=None) -> "DeScore":
        """Opens a DeScore: a folder, or name/repo of the hub, from its cache if it is there.

        With `new_head=True` it may be a plain Qwen3-VL, to start stage 1 from. revision: a branch, tag or commit.
        Strict: a missing or extra weight, another size, or a base model without a head is an InputError, never a random
        head. In evaluation mode, as transformers does it. In bf16 the LoRA of training stands beside its base again, as
        it did there; rounded into it, a small change would be gone (docs/differences.md, rows 16 and 25).
        """
        return open_model(cls, path, device, dtype, new_head, revision)


def part_of(name: str) -> str:
    """The part that a parameter of DeScore is of: "head" (with the query), "vision" (tower and merger) or "llm"."""
    if name in QUERY_AND_HEAD:
        return "head"
    return "vision" if name.startswith("backbone.model.visual.") else "llm"


def to_device(batch: dict, device) -> dict:
    """Moves a batch's tensors, to a GPU from pinned memory, where Python need not wait; what is Python's stays."""
    pin = torch.Tensor.pin_memory if torch.device(device).type == "cuda" else lambda value: value
    return {key: pin(value).to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()}
