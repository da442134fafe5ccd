"""A DeScore folder on disk: written tensor by tensor, read strictly, whole or block by block."""

import contextlib
import copy
import glob
import json
import os
import shutil

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoProcessor, GenerationConfig, Qwen3VLForConditionalGeneration

from plumbing.adapters import SURVIVAL, Survival, attach_adapters, base_of, gather_full, merge_lora, survival_line
from plumbing.hub import local_folder
from plumbing.settings import InputError, first_line, write_json

SETTINGS_FILE, HEAD_FILE, ADAPTER_FILE = "descore.json", "reward_head/head.safetensors", "adapter/lora.safetensors"
# These lie in folders of their own: vLLM loads EVERY *.safetensors beside config.json as weights of the backbone.
QUERY_AND_HEAD = ("query", "head.weight")  # what is ours: their names in the model and in HEAD_FILE


def write_model(model, path: str, write=True) -> None:
    """DeScore.save_pretrained. COLLECTIVE if the model is sharded; `write=False` only takes part in gathering.

    Files: config.json, model*.safetensors (LoRA merged), tokenizer, processor; reward_head/head.safetensors (query,
    head.weight); adapter/lora.safetensors, with LoRA; descore.json (sizes, sampling settings, what LoRA is in bf16).
    No model card: that tells of a run, and training.save_run adds it.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    text = model.backbone.config.text_config
    sizes = {"hidden_size": text.hidden_size, "layers": text.num_hidden_layers, "vocab_size": text.vocab_size}
    head = {key: gather_full(state[key]).cpu().contiguous() for key in QUERY_AND_HEAD}
    if model.backbone.config.tie_word_embeddings:
        state.pop("backbone.lm_head.weight", None)
    # One type for all. fp32 as soon as anything was trained: stage 1 changes weights by less than half a step of bf16,
    # and rounding would give the base model back.
    trained = any(value.dtype == torch.float32 for name, value in state.items() if name.startswith("backbone."))
    dtype = torch.float32 if trained else model.backbone.dtype
    adapters, kept = {}, Survival()
    if write:
        os.makedirs(path, exist_ok=True)
    merged = merge_lora(state, model.lora_layers(), model.backbone.folded, adapters, kept)
    write_tensors(path, ((name, value.to(dtype)) for name, value in merged), write)
    if not write:
        return
    for file, tensors in ((HEAD_FILE, head), (ADAPTER_FILE, adapters)):
        if tensors:
            os.makedirs(os.path.dirname(os.path.join(path, file)), exist_ok=True)
            save_tensors(tensors, os.path.join(path, file))
    settings = {**model.settings, **sizes}
    settings.pop(SURVIVAL, None)
    if adapters:
        settings[SURVIVAL] = kept.cosines()
        print(survival_line(settings[SURVIVAL]), flush=True)
    write_json(os.path.join(path, SETTINGS_FILE), settings)
    if model.processor is not None:
        model.processor.save_pretrained(path)
    config = copy.deepcopy(model.backbone.config)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(path)
    model.backbone.generation_config.save_pretrained(path)


def trained_settings(path: str) -> dict:
    """descore.json of a folder or name/repo: sizes, how frames were sampled, the rewards' scale. InputError: broken."""
    folder = local_folder(path)
    require_head(path, folder)
    try:
        with open(os.path.join(folder, SETTINGS_FILE), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: its {SETTINGS_FILE} is damaged ({first_line(error)}); copy it anew.") from error


def require_head(path: str, folder: str) -> None:
    """InputError for a folder without a reward head: a base model, or what lies around the model."""
    if os.path.isfile(os.path.join(folder, SETTINGS_FILE)):
        return
    inside = os.path.join(path, "model")
    if os.path.isfile(os.path.join(inside, SETTINGS_FILE)):
        fix = f"give {inside}"
    elif os.path.isfile(os.path.join(folder, "config.json")):
        fix = f"train one: python cold_start.py --model {path} --data PAIRS.csv --out OUT, and give OUT/model"
    else:
        fix = "give OUT/model of cold_start.py or grpo.py"
    raise InputError(f"{path}: has no {SETTINGS_FILE}, so no reward head; {fix}.")


def open_model(
    cls, path: str, device="cpu", dtype=torch.float32, new_head=False, revision=None, empty=False, merged=None
):
    """DeScore.from_pretrained; `cls` is DeScore. Two more choices for training:

    empty: the backbone stays on the meta device, without memory, until `load_empty`; parallel.shard does that block by
    block. merged: as `load_backbone` has it. InputError: the head belongs to another base.
    """
    name, path = path, local_folder(path, revision)
    has_head = os.path.isfile(os.path.join(path, SETTINGS_FILE))
    # Of a folder its own name only: what is saved may be given away, and is to tell nothing of this machine.
    base = os.path.basename(os.path.abspath(path)) if os.path.isdir(name) else name.partition("@")[0]
    settings = trained_settings(path) if has_head else {"base_model": base}
    if not new_head:
        require_head(name, path)
    backbone = empty_backbone(path, dtype, merged) if empty else load_backbone(path, dtype, merged)
    model = cls(backbone, read_processor(path), settings)
    if empty:
        model.weights = Weights(path, backbone)
        model.query = nn.Parameter(model.weights[EMBEDDING].to(dtype).float().mean(dim=0))
    if has_head:
        sizes = backbone.config.text_config
        for key, have in (("hidden_size", sizes.hidden_size), ("layers", sizes.num_hidden_layers)):
            if settings.get(key) != have:
                raise InputError(f"{path}: the head was trained on a base with {key} {settings.get(key)}, this one has "
                                 f"{have}.")
        head = os.path.join(path, HEAD_FILE)
        load_head(model, read_tensors(head), head)
    return (model if empty else model.to(device)).eval()


def open_on_rank(cls, path: str, dtype: torch.dtype, ranks, new_head=False):
    """A DeScore to train, for parallel.shard: empty if it will be sharded. On a GPU all is computed in bf16, fp32
    masters too, so the LoRA of earlier stages stands beside its base there; on a CPU it is in the weights."""
    merged = ranks.device.type == "cpu"
    return open_model(cls, path, dtype=dtype, new_head=new_head, empty=ranks.sharded, merged=merged)


@torch.no_grad()
def load_empty(model, module: nn.Module, device) -> None:
    """Reads the parameters of `module`, a part of `model`, that are still empty. Without any it does nothing."""
    wanted = {id(parameter) for parameter in module.parameters() if parameter.is_meta}
    for name, parameter in [(n, p) for n, p in model.backbone.named_parameters() if id(p) in wanted]:
        owner, _, leaf = name.rpartition(".")
        value = model.weights[name.replace(".base_layer.", ".")].to(device, parameter.dtype)
        setattr(model.backbone.get_submodule(owner), leaf, nn.Parameter(value, parameter.requires_grad))
    if wanted and model.backbone.config.tie_word_embeddings:
        model.backbone.lm_head.weight = model.backbone.get_input_embeddings().weight


def save_tensors(tensors: dict[str, torch.Tensor], path: str) -> None:
    """A safetensors file with the rights that the umask gives: the library's own is for its owner only (mode 0600)."""
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


FILE_BYTES = 4 << 30  # a file of weights, at most


def write_tensors(path: str, named_tensors, write=True) -> None:
    """(name, tensor) one by one -> model*.safetensors in Hugging Face's layout, a file for every FILE_BYTES.

    So the host needs room for one file, not for the model. `write=False`: only walks through.
    """
    parts, size, part = [], 0, {}  # parts: the names in each file

    def flush():
        save_tensors(part, os.path.join(path, f"model-{len(parts) + 1:05d}.part"))
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
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_json(os.path.join(path, "model.safetensors.index.json"), index)


def load_backbone(path: str, dtype: torch.dtype, merged: bool | None = None) -> Qwen3VLForConditionalGeneration:
    """The Qwen3-VL in a folder (or on the hub), every weight accounted for. Raises InputError otherwise.

    merged: the LoRA of earlier stages stays in the weights. Default: in fp32 only, where that is exact. In bf16 it
    stands beside its base, as in training: rounded to bf16, base + LoRA would be nearly the base again.
    """
    path = local_folder(path)
    config = read_config(path)
    try:
        backbone, info = Qwen3VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be opened as a Qwen3-VL checkpoint ({first_line(error)}).") from error
    require_matching_weights(path, info)
    if config.tie_word_embeddings and backbone.lm_head.weight is not backbone.get_input_embeddings().weight:
        raise InputError(untied_message(path))
    if read_adapters(path, backbone, dtype, merged):
        weights = Weights(path, backbone)
        attach_adapters(backbone)
        with torch.no_grad():
            for name in backbone.beside:
                backbone.get_submodule(name).base_layer.weight.copy_(weights[f"{name}.weight"])
    return backbone


def read_processor(path: str):
    """The processor of a Qwen3-VL, a folder or name/repo; InputError if its files are missing or broken."""
    read_config(path)  # what is no Qwen3-VL at all is said so
    try:
        return AutoProcessor.from_pretrained(local_folder(path))
    except (OSError, ValueError, TypeError) as error:  # TypeError: a tokenizer file is not there
        raise InputError(f"{path}: the processor's files are missing or broken ({first_line(error)}); copy them from "
                         "the base model.") from error


def read_config(path: str):
    """config.json of a Qwen3-VL, in a folder or of a name/repo; InputError for anything else."""
    path = local_folder(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened as a Qwen3-VL checkpoint ({first_line(error)}).") from error
    if config.model_type != "qwen3_vl":
        raise InputError(f"{path}: is a {config.model_type} model; DeScore needs a Qwen3-VL (model_type qwen3_vl).")
    return config


def untied_message(path: str) -> str:
    """What to say if config.json ties the embeddings, but the weights do not. transformers would go on with both."""
    return (f"{path}: config.json has tie_word_embeddings true, but lm_head.weight is not the embedding; set it to "
            "false there.")


def require_matching_weights(path: str, found: dict) -> None:
    """InputError if any of the three lists of names in `found` is not empty."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in found[kind]):
            raise InputError(f"{path}: {len(names)} {kind.replace('_', ' ')}, e.g. {names[0]}; is it the right base "
                             "model?")


def empty_backbone(path: str, dtype: torch.dtype, merged: bool | None = None) -> Qwen3VLForConditionalGeneration:
    """The Qwen3-VL of a folder's config.json on the meta device: names, shapes and types, but no memory."""
    from accelerate import init_empty_weights

    config = read_config(path)
    with init_empty_weights(include_buffers=False):  # buffers, such as the rotary frequencies, are in no checkpoint
        backbone = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    if config.tie_word_embeddings:  # 2B and 4B. `init_empty_weights` makes each name a parameter of its own
        backbone.lm_head.weight = backbone.get_input_embeddings().weight
    with contextlib.suppress(OSError):  # a base model may come without one
        backbone.generation_config = GenerationConfig.from_pretrained(path)
    if read_adapters(path, backbone, dtype, merged):
        attach_adapters(backbone)
    return backbone


EMBEDDING = "model.language_model.embed_tokens.weight"


class Weights:
    """A folder's safetensors, read one tensor at a time, when asked for: `weights[name]`.

    So each rank can read a block, keep its own rows of it, and go on: no host ever holds a whole 8B model.
    """

    def __init__(self, path: str, backbone):
        self.places, shapes = {}, {}  # name -> file; name -> shape
        self.outside = backbone.beside  # layer -> (A, B) that stand beside it: `self[name]` is the base without them
        for file in sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors"))):
            with open_tensors(file) as tensors:
                self.places |= {name: file for name in tensors.keys()}
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        own = {name.replace(".base_layer.", "."): tuple(value.shape) for name, value in backbone.state_dict().items()
               if ".lora_" not in name}
        if backbone.config.tie_word_embeddings:
            own.pop("lm_head.weight")
            second = shapes.pop("lm_head.weight", None)  # some programs write the one matrix twice
            if second and EMBEDDING in shapes and not torch.equal(self["lm_head.weight"], self[EMBEDDING]):
                raise InputError(untied_message(path))
        wrong = [name for name in own.keys() & shapes.keys() if own[name] != shapes[name]]
        found = {"missing_keys": own.keys() - shapes.keys(), "unexpected_keys": shapes.keys() - own.keys()}
        require_matching_weights(path, found | {"mismatched_keys": wrong})

    def __getitem__(self, name: str) -> torch.Tensor:
        with open_tensors(self.places[name]) as tensors:
            value = tensors.get_tensor(name)
        return base_of(name, value, self.outside)


def read_tensors(file: str) -> dict[str, torch.Tensor]:
    """A safetensors file; a missing or broken one is an InputError. (Nothing is ever unpickled.)"""
    with open_tensors(file) as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}


def open_tensors(file: str):
    """safetensors' handle, for `with`: reads single tensors. InputError: missing or damaged."""
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: missing or not a safetensors file ({first_line(error)}).") from error


@torch.no_grad()
def load_head(model: nn.Module, tensors: dict, file: str) -> None:
    """Copies query and head into the model; a missing, extra or wrongly sized one is an InputError."""
    if odd := sorted(set(tensors) ^ set(QUERY_AND_HEAD)):
        raise InputError(f"{file}: missing or extra weights: {', '.join(odd[:3])}.")
    for name, value in tensors.items():
        own = model.get_parameter(name)
        if own.shape != value.shape:
            raise InputError(f"{file}: {name} is {tuple(value.shape)}, the model's is {tuple(own.shape)}; is it the "
                             "right base model?")
        own.copy_(value)


def save_model(model, path: str, ranks, write_more) -> None:
    """COLLECTIVE: writes the Hugging Face folder; rank 0 holds one file's worth of it (4 GiB) at a time.

    Atomic: a kill while saving leaves the old folder or the new one. write_more(folder): what else is to lie in it.
    """
    with replacing(path) if ranks.is_main else contextlib.nullcontext() as temporary:
        write_model(model, temporary, ranks.is_main)
        if ranks.is_main:
            write_more(temporary)
    ranks.barrier()


@contextlib.contextmanager
def replacing(path: str):
    """Yields a temporary folder beside `path`; renamed to `path` once complete."""
    temporary, old = f"{path}.tmp", f"{path}.old"
    if os.path.isdir(old) and not os.path.isdir(path):
        os.rename(old, path)  # a kill came between the two renames below
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    os.makedirs(temporary)
    yield temporary
    if os.path.isdir(path):
        os.rename(path, old)
    os.rename(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def read_adapters(path: str, backbone, dtype: torch.dtype, merged: bool | None) -> bool:
    """Sets backbone.folded or backbone.beside, layer -> (A, B) fp32, from ADAPTER_FILE; True if any stand beside.

    folded: they are in the weights, and are only handed on to the next save. beside: the weights are to be read
    without them. Which of the two: as `load_backbone` has it. InputError: adapters of another model.
    """
    file, found = os.path.join(path, ADAPTER_FILE), {}
    if os.path.isfile(file):
        tensors = read_tensors(file)
        layers = {name: layer.weight.shape for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)}
        names = {name.rpartition(".")[0] for name in tensors}
        expected = {f"{name}.{x}" for name in names & set(layers) for x in "AB"}
        if odd := sorted(set(tensors) ^ expected):
            raise InputError(f"{file}: is not this model's LoRA; missing or extra weights: {', '.join(odd[:3])}.")
        found = {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in sorted(names)}
        for name, (a, b) in found.items():
            if [*b.shape, *a.shape] != [layers[name][0], *a.shape[:1] * 2, layers[name][1]]:  # (out, R), (R, in)
                raise InputError(f"{file}: is not this model's LoRA; {name} is {[*layers[name]]} here.")
    merged = dtype == torch.float32 if merged is None else merged
    backbone.folded, backbone.beside = (found, {}) if merged else ({}, found)
    return bool(backbone.beside)
