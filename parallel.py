"""One process or many: start, sharding, sums over ranks, checkpoints, settings, logs. The only file that knows of
ranks.

    python x.py                          one process, CPU or one GPU, no process group
    torchrun --nproc_per_node 8 x.py     one process per GPU (NCCL), or per CPU share (gloo); weights sharded with FSDP2

Rule for all scripts: a function marked COLLECTIVE must be called by every rank, in the same order, or the others wait
for ever. So never under `if rank == 0`, and never behind a condition that can differ between ranks.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
import types
import typing
import warnings

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import InputError, sample_frames
from model import merge_lora


# ---------------------------------------------------------------------------------------------------------------
# 1. Settings: one dataclass per script -> --help, strict flags, a file beside the checkpoint
# ---------------------------------------------------------------------------------------------------------------
def arg(default, help_text: str, choices=None):
    """A dataclass field with its `--help` text. A bool becomes --name / --no-name; default None means not set."""
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


def parse(settings_class, doc: str, argv=None):
    """Command line -> an instance of the dataclass. `doc` is the script's docstring. Unknown flag: exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        many = typing.get_origin(kind) is list
        if isinstance(kind, types.UnionType) or many:  # "str | None" -> str, list[str] -> str
            kind = typing.get_args(kind)[0]
        text = field.metadata["help"].replace("%", "%%") + (
            "" if field.default is None else f" (default {field.default})"
        )
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            more = {"nargs": "+"} if many else {}
            choices = field.metadata["choices"]
            parser.add_argument(flag, type=kind, default=field.default, choices=choices, help=text, **more)
    return settings_class(**vars(parser.parse_args(argv)))


def cli(main) -> None:
    """Runs a script's main(). Bad input: one sentence on stderr, exit code 2. Ctrl-C: exit code 130. Bugs: a
    traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------
# 2. Ranks
# ---------------------------------------------------------------------------------------------------------------
class Ranks:
    """Who this process is. With one process every method works and costs nothing."""

    def __init__(self, log_with: str | None = None, out: str | None = None, cpu_offload: bool = False):
        from accelerate import Accelerator, InitProcessGroupKwargs

        # Accelerate finds the device, starts the process group (NCCL or gloo) and drives the trackers. FSDP2 is called
        # directly, below: accelerate's own FSDP plugin turns into DDP on CPU without a word, so it could not be tested.
        on_cpu = not torch.cuda.is_available()
        # Gradients that live in the host's memory are summed by gloo, all else by NCCL.
        both = [InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")] if cpu_offload and not on_cpu else []
        self.accelerator = Accelerator(cpu=on_cpu, log_with=log_with, project_dir=out, kwargs_handlers=both)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process

    def print(self, *what) -> None:
        """Prints on rank 0, above a progress bar if there is one."""
        if self.is_main:
            tqdm.write(" ".join(str(w) for w in what), file=sys.stdout)
            sys.stdout.flush()

    def barrier(self) -> None:
        """COLLECTIVE: waits for all ranks."""
        self.accelerator.wait_for_everyone()

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """COLLECTIVE: each entry summed over ranks. The keys must be the same on every rank."""
        if self.world == 1:
            return dict(values)
        names = sorted(values)
        total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        total = total.to(self.device)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist()))

    def any(self, flag: bool) -> bool:
        """COLLECTIVE: true on all ranks if true on one."""
        return self.sum({"flag": float(flag)})["flag"] > 0

    def gather_objects(self, items: list) -> list:
        """COLLECTIVE: all ranks' lists joined, in rank order, on every rank."""
        if self.world == 1:
            return list(items)
        lists = [None] * self.world
        dist.all_gather_object(lists, list(items))
        return [item for part in lists for item in part]

    def share(self, items: list) -> list:
        """This rank's items: every world-th, from its own number."""
        return items[self.rank :: self.world]

    def autocast(self):
        """bf16 compute for one GPU without FSDP. Under FSDP its own policy casts; on CPU all is fp32."""
        if self.device.type == "cuda" and self.world == 1:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def progress(self, iterable=None, **more):
        """A progress bar on rank 0."""
        return tqdm(iterable, disable=not self.is_main, dynamic_ncols=True, file=sys.stderr, **more)

    def finish(self, engine=None) -> None:
        """COLLECTIVE: the end of a script. Without the barrier a rank that leaves early can abort the others."""
        self.barrier()
        if engine is not None:
            engine.close()  # before end_training, which destroys the process group that the engine wants to leave
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()


def start(seed: int, log_with: str | None = None, out: str | None = None, cpu_offload: bool = False) -> Ranks:
    """COLLECTIVE: starts the process group under torchrun, finds the device, seeds every generator alike on all
    ranks."""
    ranks = Ranks(log_with, out, cpu_offload)
    random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
    return ranks


# ---------------------------------------------------------------------------------------------------------------
# 3. FSDP2: the model cut into shards, one block at a time
# ---------------------------------------------------------------------------------------------------------------
def shard(model, ranks: Ranks, shard_ranks: int = 0, cpu_offload: bool = False):
    """COLLECTIVE: each rank keeps 1/world of every weight, gradient and optimizer state; a block is whole only while
    used.

    fp32 master weights, bf16 compute on GPUs, gradients reduced in fp32. The query and the head are left out: a few
    thousand numbers that stay whole and fp32 on every rank, their gradients summed in `sync_gradients`. An empty model
    is read here, block by block, so that no rank ever holds more than one block and the embeddings.
    shard_ranks: so many ranks share one copy, 0: all. With 8 on nodes of 8 GPUs, weights are gathered inside a node,
    and only gradients travel between nodes (hybrid sharding). cpu_offload: the shards and the optimizer live in the
    host's memory.
    """
    if ranks.world == 1:
        model.fill(model, ranks.device)
        return model.to(ranks.device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    on_gpu, shard_ranks = ranks.device.type == "cuda", shard_ranks or ranks.world
    if ranks.world % shard_ranks:
        raise InputError(f"--shard-ranks {shard_ranks} does not divide the {ranks.world} ranks.")
    copies = ranks.world // shard_ranks
    shape, names = ((copies, shard_ranks), ("copy", "shard")) if copies > 1 else ((shard_ranks,), ("shard",))
    options = {
        "mesh": init_device_mesh(ranks.device.type, shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_gpu else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else OffloadPolicy(),
    }
    for own in (model.query, model.head.weight):
        own.data = own.data.to(ranks.device)
    tower = model.backbone.model
    for block in [*tower.language_model.layers, *tower.visual.blocks]:
        model.fill(block, ranks.device)
        fully_shard(block, **options)
    model.fill(model, ranks.device)
    fully_shard(model, ignored_params={model.query, model.head.weight}, **options)
    return model


def backward(loss: torch.Tensor, ranks: Ranks) -> None:
    """COLLECTIVE under FSDP: adds d(sum of all ranks' losses)/dθ to the gradients.

    Each loss is already divided by the count over ALL ranks and micro-batches, so ranks must be summed. FSDP averages
    over ranks; times world makes that a sum.
    """
    (loss * ranks.world).backward()


def sync_gradients(model, ranks: Ranks) -> None:
    """COLLECTIVE: averages the gradients of query and head over ranks, as FSDP did for all others. After the last
    backward."""
    if ranks.world > 1:
        for parameter in (model.query, model.head.weight):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks.world


def clip_gradients(model, max_norm: float) -> dict[str, float]:
    """COLLECTIVE under FSDP: L2 norm per part ("llm", "vision", "head") and in total; scales all down to `max_norm`.

    The norms returned are those before clipping; check their "total" with `require_finite` before the update.
    """
    norms = {}
    for name, parameters in model.parameter_groups().items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        norms[name] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    scale = min(1.0, max_norm / (total + 1e-6))
    if scale < 1.0:
        for parameters in model.parameter_groups().values():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
    return {**norms, "total": total}


def require_finite(value: float, what: str, rows: list[dict], settings, ranks: Ranks) -> None:
    """InputError if `value` is inf or nan, before any weight is touched; OUT/not_finite.jsonl then holds the rows.

    rows: what this rank fed to the model, each with at least its "row" in the CSV. The last checkpoint stays good.
    """
    if np.isfinite(value):
        return
    path = os.path.join(settings.out, f"not_finite.rank{ranks.rank}.jsonl" if ranks.rank else "not_finite.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    lines = ", ".join(sorted({str(row["row"]) for row in rows}, key=int))
    raise InputError(
        f"{settings.data}: the {what} is {value} at line {lines} (kept in {path}); look at them or lower --lr, then go "
        "on with --resume."
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """COLLECTIVE: a shard -> the whole tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained_weights(model):
    """COLLECTIVE: yields (Hugging Face name, whole tensor) of every backbone weight that training has changed.

    For the rollout engine. One at a time: gathered from the shards, LoRA folded in, so no rank holds a second model.
    The receiver must use up the generator on every rank.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained |= {f"{layer}.base_layer.weight" for layer in model.lora_layers()}
    chosen = {name: value for name, value in state.items() if name in trained or ".lora_" in name}
    yield from merge_lora(chosen, model.lora_scaling(), whole)


def save_model(model, path: str, ranks: Ranks) -> None:
    """COLLECTIVE: writes the Hugging Face folder; rank 0 holds one file's worth of it (4 GiB) at a time.

    Atomic: a kill while saving leaves the old folder or the new one.
    """
    with replacing(path) if ranks.is_main else contextlib.nullcontext() as temporary:
        model.save_pretrained(temporary, whole=whole, write=ranks.is_main)
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


# ---------------------------------------------------------------------------------------------------------------
# 4. What both stages need around their loop
# ---------------------------------------------------------------------------------------------------------------
def load_dtype(train: str, ranks: Ranks) -> torch.dtype:
    """How the backbone is loaded: fp32 masters if it is trained (or on CPU), bf16 on a GPU if only adapters are."""
    return torch.float32 if train == "full" or ranks.device.type == "cpu" else torch.bfloat16


def make_optimizer(model, settings) -> torch.optim.AdamW:
    """AdamW with one group per part; --lr-vision and --lr-head default to --lr."""
    rates = {"llm": settings.lr, "vision": getattr(settings, "lr_vision", None), "head": settings.lr_head}
    groups = [
        {"params": parameters, "lr": 0.0, "base_lr": settings.lr if rates[part] is None else rates[part]}
        for part, parameters in model.parameter_groups().items()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=settings.weight_decay)


def set_learning_rate(optimizer, step: int, warmup_steps: int) -> float:
    """Linear warm-up, then constant; `step` counts from 1. A function of the step alone: nothing to save for a
    resume."""
    scale = min(1.0, step / warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
    return scale


def divide(num_pairs: int, settings, ranks: Ranks) -> tuple[int, int]:
    """(updates per epoch, pairs per update on each rank). The last, incomplete batch of an epoch is left out."""
    if settings.batch_pairs % (ranks.world * settings.micro_pairs):
        raise InputError(
            f"--batch-pairs {settings.batch_pairs} is not a multiple of {ranks.world} ranks x --micro-pairs "
            f"{settings.micro_pairs}; change one of them."
        )
    if num_pairs < settings.batch_pairs:
        raise InputError(
            f"{settings.data}: {num_pairs} pairs do not fill one batch; lower --batch-pairs ({settings.batch_pairs})."
        )
    return num_pairs // settings.batch_pairs, settings.batch_pairs // ranks.world


def readable_pairs(pairs: list, settings, ranks: Ranks) -> list:
    """COLLECTIVE: the pairs whose videos exist; with --skip-bad-videos, whose videos decode (each is tried once).

    Skipped ones are counted and listed in OUT/skipped.jsonl. Without the flag a missing file is an InputError now, a
    broken one when its turn comes.
    """
    paths = sorted({path for pair in pairs for path in pair.videos})
    bad = {path: "no such file" for path in paths if not os.path.isfile(path)}
    if not settings.skip_bad_videos:
        for pair in pairs:
            if path := next((path for path in pair.videos if path in bad), None):
                raise InputError(f"row {pair.row}: {path}: no such video; fix the path, or use --skip-bad-videos.")
        return pairs
    found = []
    for path in ranks.progress(ranks.share([path for path in paths if path not in bad]), desc="checking videos"):
        try:
            sample_frames(path, settings.fps, settings.max_pixels)
        except InputError as error:
            found.append((path, str(error)))
    bad.update(ranks.gather_objects(found))
    kept = [pair for pair in pairs if not bad.keys() & set(pair.videos)]
    if ranks.is_main and bad:
        with open(os.path.join(settings.out, "skipped.jsonl"), "a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"video": path, "reason": reason}) + "\n" for path, reason in sorted(bad.items())
            )
        print(f"skipped {len(pairs) - len(kept)} pairs with {len(bad)} bad videos; see {settings.out}/skipped.jsonl")
    if not kept:
        raise InputError("no pair is left with two readable videos.")
    return kept


# ---------------------------------------------------------------------------------------------------------------
# 5. Checkpoints for resuming: trained weights, optimizer, random states, step
# ---------------------------------------------------------------------------------------------------------------
def save_checkpoint(
    out: str, step: int, model, optimizer, ranks: Ranks, keep: int = 2, more: dict | None = None
) -> str:
    """COLLECTIVE: writes OUT/checkpoints/step-N. Complete or absent: it gets its name only when all of it is on disk.

    Weights and optimizer go through torch.distributed.checkpoint, so another number of ranks can load them. The last
    `keep` stay.
    """
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: said on every save
    folder = os.path.join(out, "checkpoints", f"step-{step:06d}")
    temporary = folder + ".tmp"
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    ranks.barrier()
    dcp.save(
        _training_state(model, optimizer), checkpoint_id=os.path.join(temporary, "state"), no_dist=ranks.world == 1
    )
    random_state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    torch.save(random_state, os.path.join(temporary, f"random-{ranks.rank}.pt"))
    ranks.barrier()
    if ranks.is_main:
        with open(os.path.join(temporary, "step.json"), "w", encoding="utf-8") as file:
            json.dump({"step": step, "world": ranks.world, **(more or {})}, file)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        for old in _checkpoints(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()
    return folder


def load_checkpoint(out: str, model, optimizer, ranks: Ranks) -> dict:
    """COLLECTIVE: loads the newest complete checkpoint under OUT in place. Returns its step.json, {"step": 0} if
    none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    found = _checkpoints(out)
    if not found:
        return {"step": 0}
    folder = found[-1]
    state = _training_state(model, optimizer)
    dcp.load(state, checkpoint_id=os.path.join(folder, "state"), no_dist=ranks.world == 1)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),  # frozen weights are not in the checkpoint
    )  # fmt: skip
    with open(os.path.join(folder, "step.json"), encoding="utf-8") as file:
        position = json.load(file)
    own_random = os.path.join(folder, f"random-{ranks.rank}.pt")
    if position["world"] == ranks.world:  # another number of ranks goes on, but not bit for bit
        states = torch.load(own_random, weights_only=False)  # our own file: Python's and NumPy's states are tuples
        random.setstate(states["python"]), np.random.set_state(states["numpy"]), torch.set_rng_state(states["torch"])
        if "cuda" in states and ranks.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], ranks.device)
    ranks.print(f"resumed from {folder}")
    return position


def _training_state(model, optimizer):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": weights, "optimizer": states}


def _checkpoints(out):
    folder = os.path.join(out, "checkpoints")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if name.startswith("step-") and not name.endswith(".tmp")]


class StopSignal:
    """Ctrl-C (or SIGTERM) asks for a stop at the end of the step, so that a checkpoint can be saved; twice stops at
    once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; again to stop at once", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# 6. Logs
# ---------------------------------------------------------------------------------------------------------------
class Log:
    """metrics.jsonl (one JSON line per step), one dense line on the screen, and trackers if asked for. Rank 0
    writes."""

    def __init__(self, out: str, settings, ranks: Ranks, name: str, resumed_step: int = 0):
        self.path, self.ranks, self.started = os.path.join(out, "metrics.jsonl"), ranks, time.time()
        if ranks.is_main:
            os.makedirs(out, exist_ok=True)
            with open(os.path.join(out, "settings.json"), "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(settings), file, indent=1)
            kept = [line for line in read_metrics(out) if line["step"] <= resumed_step]  # later ones will be made again
            with open(self.path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
        ranks.accelerator.init_trackers(name)

    def step(self, step: int, metrics: dict[str, float], line: str) -> None:
        """Writes one step's metrics; `line` is what the screen shows."""
        if self.ranks.is_main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": step, "seconds": round(time.time() - self.started, 2), **metrics}) + "\n"
                )
        self.ranks.accelerator.log(metrics, step=step)
        self.ranks.print(line)


def read_metrics(out: str) -> list[dict]:
    """The lines of OUT/metrics.jsonl; a line cut short by a kill is left out."""
    path, lines = os.path.join(out, "metrics.jsonl"), []
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            for text in file:
                with contextlib.suppress(json.JSONDecodeError):
                    lines.append(json.loads(text))
    return lines


def reward_scale(out: str) -> dict[str, float]:
    """Mean and spread of the head's rewards over the last quarter of the steps, for
    `DeScore.reward(normalize=True)`."""
    lines = [line for line in read_metrics(out) if "reward_std" in line]
    last = lines[-max(1, len(lines) // 4) :]
    mean = float(np.mean([line["reward_mean"] for line in last]))
    square = float(np.mean([line["reward_std"] ** 2 + line["reward_mean"] ** 2 for line in last]))
    return {"reward_mean": mean, "reward_std": max(square - mean**2, 1e-12) ** 0.5}


def draw_curves(out: str, panels: dict[str, list[str]], path: str, title: str) -> None:
    """Draws metrics.jsonl to a PNG, one panel per entry: title -> metric names. Missing metrics are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(out)
    columns = min(3, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(4.6 * columns, 3.2 * -(-len(panels) // columns))
    )
    for axis in np.ravel(axes)[len(panels) :]:
        axis.axis("off")
    for axis, (panel, names) in zip(np.ravel(axes), panels.items()):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name, marker="o" if len(points) < 40 else None, markersize=3)
        axis.set_title(panel, fontsize=10), axis.set_xlabel("step", fontsize=8), axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------
# 7. Will it fit? `python parallel.py --plan 8B --gpus 8`
# ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Plan:
    """Memory per GPU and time per step, by arithmetic alone: nothing is loaded but a config.json."""

    plan: str = arg("8B", "8B: the sizes of Qwen3-VL-8B-Instruct; or a model's folder or hub name")
    stage: int = arg(2, "1: cold start, 2: RL", choices=[1, 2])
    train: str = arg("full", "what of the LLM is trained", choices=["lora", "full"])
    lora_r: int = arg(64, "LoRA rank")
    gpus: int = arg(8, "number of GPUs")
    shard_ranks: int = arg(0, "GPUs that share one copy of the weights; 0: all")
    gpu_gb: float = arg(80.0, "memory of one GPU, 10^9 bytes")
    tflops: float = arg(989.0, "a GPU's dense bf16 rate, 10^12 operations per second (H100 SXM: 989)")
    bandwidth: float = arg(3.35, "a GPU's memory bandwidth, 10^12 bytes per second (H100 SXM: 3.35)")
    utilisation: float = arg(0.4, "share of both rates that is reached: an assumption, not a measurement")
    video_tokens: int = arg(2048, "prompt and video tokens (5 s at 2 fps and 448 x 448: 5 x 196, plus the text)")
    cot_tokens: int = arg(1024, "tokens of a CoT (at most 4,096)")
    rollouts: int = arg(8, "G, CoTs per video in stage 2")
    batch_pairs: int | None = arg(None, "pairs per step over all GPUs; default the paper's: 32 in stage 1, 128 in 2")
    gradient_checkpointing: bool = arg(True, "recompute activations in backward")
    kl: bool = arg(True, "stage 2 holds a reference for the KL term")
    engine_memory: float = arg(0.4, "share of the GPU that vLLM may use while it samples")


def model_config(name: str):
    """The Qwen3-VL configuration of "8B" (its published sizes: 8.77 B parameters), a folder, or a hub name."""
    from transformers import AutoConfig, Qwen3VLConfig

    if name != "8B":
        return AutoConfig.from_pretrained(name)
    text = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936}  # fmt: skip
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
              "deepstack_visual_indexes": [8, 16, 24], "num_position_embeddings": 2304}  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def count_parameters(config, lora_r: int) -> dict[str, int]:
    """Parameters of the LLM, of one of its blocks, of what lies outside all blocks, of vision, and of the adapters."""
    from accelerate import init_empty_weights
    from transformers import Qwen3VLForConditionalGeneration

    with init_empty_weights():
        backbone = Qwen3VLForConditionalGeneration._from_config(config)
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    layers, visual = backbone.model.language_model.layers, backbone.model.visual
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    counts = {"vision": size(visual), "llm": size(backbone) - size(visual), "block": size(layers[0])}
    counts["root"] = size(backbone) - size(layers) - size(visual.blocks)
    return counts | {"lora": sum(lora_r * (m.in_features + m.out_features) for m in linear)}


def plan_memory(config, s: Plan) -> dict[str, float]:
    """Bytes on one GPU, by use. States are exact; activations and gathered weights are estimates from above."""
    n, text, vision = count_parameters(config, s.lora_r), config.text_config, config.vision_config
    gpus = s.shard_ranks or s.gpus
    lora = s.train == "lora"
    trained = (n["lora"] if lora else n["llm"]) + (n["vision"] if s.stage == 1 else 0)
    frozen = n["llm"] + n["vision"] + (n["lora"] if lora else 0) - trained
    memory = {
        "weights: trained fp32, frozen bf16 (fp32 with full)": (4 * trained + (2 if lora else 4) * frozen) / gpus,
        "gradients, fp32": 4 * trained / gpus,
        "AdamW, two fp32 moments": 8 * trained / gpus,
    }
    if s.stage == 2 and s.kl and not lora:
        memory["reference, bf16"] = 2 * (n["llm"] + n["vision"]) / gpus
    if gpus == 1:
        memory["bf16 copies of the trained weights (autocast)"] = 2 * trained
    else:  # a block, the next one on its way, and what lies outside the blocks; the gradients of a block and of those
        memory["gathered weights, bf16"] = 2 * (2 * n["block"] + n["root"])
        memory["gathered gradients, bf16 and fp32"] = 0 if lora else 6 * (n["block"] + n["root"])
    row = s.video_tokens + (s.cot_tokens + 1) * (s.rollouts if s.stage == 2 else 1)
    tokens, wide = 2 * row, text.num_attention_heads * text.head_dim
    inside = 2 * (6 * text.hidden_size + 4 * wide + 3 * text.intermediate_size)  # bytes per token inside one block
    layers = text.num_hidden_layers
    patches = 2 * s.video_tokens * vision.spatial_merge_size**2
    kept = tokens * (2 * layers * text.hidden_size + inside if s.gradient_checkpointing else layers * inside)
    if s.stage == 1:  # the vision tower is trained
        within = 2 * (8 * vision.hidden_size + 2 * vision.intermediate_size)
        in_tower = 2 * vision.depth * vision.hidden_size + within if s.gradient_checkpointing else vision.depth * within
        kept += patches * in_tower
    memory["activations of one pair"] = kept + 3 * 2 * row**2  # the attention mask: bool, and bf16 for the kernel
    memory["logits of one chunk, fp32, with gradient"] = 3 * 4 * 1024 * text.vocab_size if s.stage == 2 else 0
    return memory


def plan_time(config, s: Plan) -> dict[str, float]:
    """Seconds of one step: operations / (GPUs x rate x utilisation); sampling reads weights and KV cache from memory."""
    n, text = count_parameters(config, s.lora_r), config.text_config
    pairs = s.batch_pairs or (128 if s.stage == 2 else 32)
    group = s.rollouts if s.stage == 2 else 1
    row, patches = (
        s.video_tokens + (s.cot_tokens + 1) * group,
        s.video_tokens * config.vision_config.spatial_merge_size**2,
    )
    in_layers = n["block"] * text.num_hidden_layers
    attention = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * row**2  # Q K' and P V, causal
    lm_head = text.hidden_size * text.vocab_size * s.cot_tokens * group if s.stage == 2 else 0
    vision = 2 * n["vision"] * patches
    forward = 2 * (in_layers * row + lm_head) + attention
    # Backward costs a forward for the activations' gradients, and another for the weights' (with LoRA hardly any).
    passes = 2 + (s.train == "full") + s.gradient_checkpointing
    total = 2 * pairs * (forward * passes + vision * (4 if s.stage == 1 else 1))
    if s.stage == 2 and s.kl:
        total += 2 * pairs * (forward + vision)
    times = {"update": total / (s.gpus * s.tflops * 1e12 * s.utilisation)}
    if s.stage == 2:
        cots, cache = 2 * pairs * group / s.gpus, 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        weights = 2 * (n["llm"] + n["vision"])
        free = max(1e9, s.engine_memory * s.gpu_gb * 1e9 - weights)
        waves = max(1.0, cots * cache * (s.video_tokens / group + s.cot_tokens) / free)  # the prefix is shared
        read = s.cot_tokens * (waves * weights + cots * cache * (s.video_tokens + s.cot_tokens / 2))
        times["rollouts"] = read / (s.bandwidth * 1e12 * s.utilisation)
    return times


def main(argv=None) -> None:
    s = parse(Plan, "Memory per GPU and time per step for a model size, before anything is bought or loaded.", argv)
    try:
        config = model_config(s.plan)
    except (OSError, ValueError) as error:
        raise InputError(f"--plan {s.plan}: no config.json found ({str(error).splitlines()[0]}).") from error
    memory, times = plan_memory(config, s), plan_time(config, s)
    total = sum(memory.values())
    print(f"{s.plan}, stage {s.stage}, {s.train}, {s.gpus} GPUs; {s.video_tokens} + {s.cot_tokens} tokens")
    for use, size in memory.items():
        print(f"  {size / 2**30:8.1f} GiB  {use}")
    room = s.gpu_gb * 1e9
    print(
        f"  {total / 2**30:8.1f} GiB  in all, of {room / 2**30:.1f}: {'fits' if total < 0.95 * room else 'DOES NOT FIT'}"
    )
    if s.stage == 2:
        states = total - sum(size for use, size in memory.items() if "gathered" in use or "of one" in use)
        engine = s.engine_memory * room
        fits = "fits" if states + engine < 0.97 * room else "DOES NOT FIT"
        print(
            f"  {(states + engine) / 2**30:8.1f} GiB  while sampling: states and {engine / 2**30:.1f} of vLLM: {fits}"
        )
    for name, seconds in times.items():
        print(f"  {seconds:8.1f} s    {name} of one step, at {s.utilisation:.0%} of the peak rates")


if __name__ == "__main__":
    cli(main)
