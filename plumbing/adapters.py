"""LoRA in the weights, and LoRA beside them: merged for whoever opens a plain Qwen3-VL, unmerged where bf16 computes.

A folder's model*.safetensors hold W + B A in fp32. In bf16 that sum is no good: an entry of B A below half a step of
bf16 at W is gone. So A and B are kept too (alpha / r inside B; those of several stages side by side, (R, in) and
(out, R)), and W is what the file holds minus B A. plumbing/checkpoint.py reads and writes the files.
"""

import warnings

import torch
from torch import nn

SURVIVAL = "lora_cosine_in_bf16"  # of descore.json
KEPT = "kept"  # the name of an earlier stage's adapter in peft; the one that is being trained is "default"


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """COLLECTIVE: a shard -> the whole tensor, on every rank. A tensor that is no shard comes back as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def merge_lora(state: dict[str, torch.Tensor], layers: dict[str, nn.Module], folded=None, adapters=None,
               kept=None):
    """State dict -> (Hugging Face name, tensor) of the backbone, adapters folded in: W + (alpha / r) B A, in fp32.

    A generator: a caller that sends the weights on needs room for one layer, not for a second model. COLLECTIVE if the
    model is sharded. layers: `DeScore.lora_layers`. `adapters` takes what makes the base again, as
    ADAPTER_FILE has it, with `folded`, which the weights hold already; `kept`, a Survival, what bf16 leaves of it.
    """
    folded = folded or {}
    for key, value in state.items():
        if not key.startswith("backbone.") or ".lora_" in key:
            continue
        value, layer = gather_full(value), key.removesuffix(".weight").removesuffix(".base_layer")
        name = layer.removeprefix("backbone.")
        parts = [(name, folded[name])] if name in folded else []
        for adapter in layers[layer].lora_A if key.endswith(".base_layer.weight") else ():
            a, b = (gather_full(state[f"{layer}.lora_{x}.{adapter}.weight"]).float() for x in "AB")  # (r, in), (out, r)
            b = layers[layer].scaling[adapter] * b
            parts.append((adapter, (a, b)))
            value = value.float() + b @ a
        if parts and adapters is not None:
            a, b = (torch.cat([part[x].to(value.device) for _, part in parts], dim=x) for x in (0, 1))
            adapters[f"{name}.A"], adapters[f"{name}.B"] = a.cpu().contiguous(), b.cpu().contiguous()
            kept.add(name, value, b @ a)
        yield key.removeprefix("backbone.").replace(".base_layer.", "."), value


def base_of(name: str, value: torch.Tensor, beside: dict) -> torch.Tensor:
    """W + B A -> W, for a weight whose LoRA stands beside it; any other comes back as it is.

    To fp32's last digit; and W to its last bit, once rounded to bf16 again, if it was bf16.
    """
    a, b = beside.get(name.removesuffix(".weight"), (None, None))
    return value if a is None else value.float() - b.to(value.device) @ a.to(value.device)


def inject_lora(backbone, name: str, **options) -> None:
    """peft's adapter in the layers of the backbone, by peft's own function: transformers' add_adapter is a second way
    to it, which refuses some versions of peft that work (transformers 5.24 every one that is released)."""
    from peft import LoraConfig, inject_adapter_in_model

    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # one beside another, as intended
    inject_adapter_in_model(LoraConfig(**options), backbone, name, low_cpu_mem_usage=name == KEPT)
    active = [KEPT, name] if backbone.beside and name != KEPT else [name]
    for module in backbone.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter([adapter for adapter in active if adapter in module.lora_A])
            module._cast_input_dtype = cast_input


def cast_input(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In place of peft's own, which casts each layer's input to the adapter's fp32: not where autocast casts it back.

    There the two casts are a seventh of the kernels' time of a step on a GPU, and change no bit without dropout (with
    it, a mask is drawn for bf16 instead of fp32 numbers). It asks autocast each time: `think` runs without, and a
    block that gradient checkpointing computes again runs as it did before.
    """
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def attach_adapters(backbone) -> None:
    """Puts the backbone's earlier LoRA, `beside`, next to its layers: frozen, in fp32, alpha / r = 1."""
    rank = next(iter(backbone.beside.values()))[0].shape[0]
    inject_lora(backbone, KEPT, r=rank, lora_alpha=rank, target_modules=list(backbone.beside))
    for name, (a, b) in backbone.beside.items():
        layer = backbone.get_submodule(name)
        device = "cpu" if layer.base_layer.weight.is_meta else layer.base_layer.weight.device
        layer.lora_A[KEPT].weight = nn.Parameter(a.to(device), requires_grad=False)
        layer.lora_B[KEPT].weight = nn.Parameter(b.to(device), requires_grad=False)


class Survival:
    """What is left of LoRA where its sum with the base is rounded to bf16, over all layers of a part of the LLM.

    cosine = <D, B A> / (|D| |B A|), D = bf16(W + B A) - bf16(W), over all entries: also the cosine between the two
    changes of a layer's output, for inputs of independent entries. 1: all is left; 0: nothing.
    """

    def __init__(self):
        self.sums = {}  # part -> (<D, BA>, |D|^2, |BA|^2)

    def add(self, name: str, merged: torch.Tensor, change: torch.Tensor) -> None:
        """merged: W + B A, change: B A, fp32 (out, in)."""
        part = "mlp" if ".mlp." in name else "attention"
        left = merged.bfloat16().float() - (merged - change).bfloat16().float()
        new = [(left * change).sum().item(), left.square().sum().item(), change.square().sum().item()]
        self.sums[part] = [old + more for old, more in zip(self.sums.get(part, (0, 0, 0)), new)]

    def cosines(self) -> dict[str, float]:
        """Part -> cosine; 1 if there is no change."""
        return {part: round(dot / (left * all_) ** 0.5, 4) if left * all_ else float(not all_)
                for part, (dot, left, all_) in sorted(self.sums.items())}


def survival_line(cosines: dict[str, float]) -> str:
    """What the save prints, and --engine vllm, which can only have the merged weights."""
    text = "LoRA merged and rounded to bf16, cosine with what was trained: "
    text += ", ".join(f"{part} {value:.3f}" for part, value in cosines.items())
    if min(cosines.values()) < 0.9:
        text += ("; WARNING: under .9, so who opens the folder as a plain Qwen3-VL in bf16 (vLLM) gets another model. "
                 "DeScore.from_pretrained keeps LoRA beside its base, and loses nothing")
    return text
