"""One process or many: start, sums over ranks, FSDP2, the optimizer's step.

    python x.py                          one process, CPU or one GPU, no process group
    torchrun --nproc_per_node 8 x.py     one process per GPU (NCCL), or per CPU share (gloo); weights sharded with FSDP2

Rule for all scripts: a function marked COLLECTIVE must be called by every rank, in the same order, or the run
deadlocks. So never under `if rank == 0`, and never behind a condition that can differ between ranks.
"""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object, set_seed
from tqdm import tqdm

from plumbing.adapters import gather_full, merge_lora
from plumbing.checkpoint import load_empty
from plumbing.logs import read_numbers
from plumbing.settings import InputError
from plumbing.training import require_finite


# A rank may wait long for the slowest at the end of a phase: NCCL's own 10 minutes would end the run there.
PATIENCE = datetime.timedelta(hours=24)


# ---- 1. Ranks ------------------------------------------------------------------------------------------------
class Ranks:
    """Who this process is. With one process every method works and costs nothing."""

    def __init__(self, cpu_offload: bool = False):
        # It finds the device and starts the process group (NCCL or gloo). FSDP2 is called directly, below: accelerate's
        # own FSDP plugin turns into DDP on CPU without a word, so it could not be tested.
        on_cpu = not torch.cuda.is_available()
        # Gradients that live in the host's memory are summed by gloo, all else by NCCL. Only under torchrun: without it
        # accelerate asks a group that nobody made for its size, where `start` has a sentence.
        backend = "cuda:nccl,cpu:gloo" if cpu_offload and not on_cpu and "LOCAL_RANK" in os.environ else None
        group = InitProcessGroupKwargs(backend=backend, timeout=PATIENCE)
        self.accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[group])
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.sharded = self.world > 1  # or `start` says so

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
        total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist()))

    def gather_objects(self, items: list) -> list:
        """COLLECTIVE: all ranks' lists joined, in rank order, on every rank."""
        return gather_object(list(items))

    def share(self, items: list) -> list:
        """This rank's items: every world-th, from its own number."""
        return items[self.rank :: self.world]

    def autocast(self):
        """bf16 compute for one GPU without FSDP. Under FSDP its own policy casts; on CPU all is fp32."""
        if self.device.type == "cuda" and not self.sharded:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def progress(self, iterable=None, **more):
        """A progress bar on rank 0."""
        return tqdm(iterable, disable=not self.is_main, dynamic_ncols=True, file=sys.stderr, **more)

    def finish(self, engine=None) -> None:
        """COLLECTIVE: the end of a script. Without the barrier a rank that leaves early can abort the others."""
        self.barrier()
        if engine is not None:
            engine.close()  # before end_training, which destroys the process group that the engine must leave first
        self.accelerator.end_training()


def start(seed: int, cpu_offload: bool = False, shard_ranks: int = 0) -> Ranks:
    """COLLECTIVE: starts the process group, finds the device, seeds all generators alike on all ranks.

    InputError for flags of sharding without torchrun. With it, one process is a shard of one, for --cpu-offload.
    """
    ranks = Ranks(cpu_offload)
    ranks.sharded = dist.is_initialized() and bool(ranks.world > 1 or cpu_offload or shard_ranks)
    if not ranks.sharded and (cpu_offload or shard_ranks):
        flag = "--cpu-offload" if cpu_offload else "--shard-ranks"
        raise InputError(f"{flag}: one process shards nothing; start with torchrun, or leave the flag out.")
    set_seed(seed % 2**32)  # NumPy takes no more
    return ranks


# ---- 2. FSDP2: the model cut into shards, one block at a time ------------------------------------------------
def shard(model, ranks: Ranks, shard_ranks: int = 0, cpu_offload: bool = False, frozen=False, compute_dtype=None):
    """COLLECTIVE: each rank keeps 1/world of all weights, gradients and optimizer states; a block is whole while used.

    fp32 master weights, bf16 compute on GPUs, gradients reduced in fp32. The query and the head are left out: a few
    thousand numbers that stay whole and fp32 on every rank, their gradients averaged in `take_step`. An empty model is
    read here, block by block, so that no rank ever holds more than one block and the embeddings.

    shard_ranks: so many ranks share one copy, 0: all; InputError unless it divides them. With 8 on nodes of 8 GPUs,
    weights are gathered inside a node, and only gradients travel between nodes (hybrid sharding). cpu_offload: the
    shards and the optimizer live in the host's memory. frozen: for the reference; its embeddings are given back after
    each forward too (FSDP keeps the root's for a backward, which the reference has none of), or they would lie in
    memory while sampling.
    compute_dtype: bfloat16 on GPUs, else as the weights; tests ask for bfloat16 on a CPU.
    """
    if not ranks.sharded:
        load_empty(model, model, ranks.device)
        return model.to(ranks.device)
    from torch.distributed import device_mesh, fsdp

    on_gpu, shard_ranks = ranks.device.type == "cuda", shard_ranks or ranks.world
    if ranks.world % shard_ranks:
        raise InputError(f"--shard-ranks {shard_ranks} does not divide the {ranks.world} ranks.")
    copies = ranks.world // shard_ranks
    shape, names = (shard_ranks,), ("shard",)
    if copies > 1:
        shape, names = (copies, shard_ranks), ("copy", "shard")
    compute_dtype = compute_dtype or (torch.bfloat16 if on_gpu else None)
    reduce_dtype = torch.float32 if compute_dtype else None
    mesh = device_mesh.init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    for name in names:  # groups that it makes have torch's own 10 minutes, whatever the first group was given
        dist.distributed_c10d._set_pg_timeout(PATIENCE, mesh.get_group(name))
    options = {
        "mesh": mesh,
        "offload_policy": fsdp.CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else fsdp.OffloadPolicy(),
    }
    # A block's inputs are not cast: its hidden states come from a bf16 layer already, and the vision tower's rotary
    # tables, which come along, must stay fp32, or places far from the origin become alike.
    inside = fsdp.MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=False)
    for own in (model.query, model.head.weight):
        own.data = own.data.to(ranks.device)
    tower = model.backbone.model
    for block in [*tower.language_model.layers, *tower.visual.blocks]:
        load_empty(model, block, ranks.device)
        fsdp.fully_shard(block, mp_policy=inside, **options)
    load_empty(model, model, ranks.device)
    options["mp_policy"] = fsdp.MixedPrecisionPolicy(compute_dtype, reduce_dtype)
    options["reshard_after_forward"] = True if frozen else None  # None: FSDP's own choice, the root stays whole
    fsdp.fully_shard(model, ignored_params={model.query, model.head.weight}, **options)
    fsdp.register_fsdp_forward_method(model, "read")
    return model


def backward(loss: torch.Tensor, ranks: Ranks) -> None:
    """COLLECTIVE under FSDP: adds d(sum of all ranks' losses)/dθ to the gradients.

    Each loss is already divided by the count over ALL ranks and micro-batches, so ranks must be summed. FSDP averages
    over ranks; times world makes that a sum.
    """
    (loss * ranks.world).backward()


def clip_gradients(model, max_norm: float) -> dict[str, float]:
    """COLLECTIVE under FSDP: each part ("llm", "vision", "head") is scaled down to L2 norm `max_norm`, by itself.

    By itself, because in stage 1 the head's norm is that of the hidden states: at the 8B's width 13 to 73 of a total of
    13 to 73. One common norm would scale the others by 1/13 to 1/73, and by another factor in every step; Adam undoes a
    constant factor, not a changing one. In stage 2, where the paper has its 1.0, the head hardly counts either way.
    Returns the norms before clipping, with their "total"; check it with `require_finite` before the update.
    """
    norms, parts = {}, {}
    for part, parameters in model.parameter_groups().items():
        parts[part] = [p.grad for p in parameters if p.grad is not None]
        # torch's own choice for shards would be one by one: a kernel, and some Python, for each of 250 adapters.
        many = torch.cuda.is_available() or None
        norms[part] = gather_full(torch.nn.utils.get_total_norm(parts[part], foreach=many)) if parts[part] else 0.0
    norms = dict(zip(norms, read_numbers(list(norms.values()))))
    for part, gradients in parts.items():
        torch._foreach_mul_(gradients, min(1.0, max_norm / (norms[part] + 1e-6)))
    return {**norms, "total": sum(norm**2 for norm in norms.values()) ** 0.5}


def take_step(model, optimizer, losses: list[tuple], settings, ranks: Ranks) -> dict[str, float]:
    """COLLECTIVE: the update, after the last backward. Returns the gradient norms before clipping, for the log.

    losses: (loss, rows) of this rank's forwards, looked at here, once a step: each look waits for the GPU. InputError
    names the rows if a loss or gradient is not finite, and no weight is touched.
    """
    require_finite(losses, "loss", settings, ranks)
    if ranks.world > 1:  # query and head are whole on every rank: averaged, as FSDP did all other gradients
        for parameter in (model.query, model.head.weight):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks.world
    norms = clip_gradients(model, settings.max_grad_norm)
    require_finite([(norms["total"], [row for _, rows in losses for row in rows])], "gradient norm", settings, ranks)
    optimizer.step()
    optimizer.zero_grad()
    return {f"grad_norm_{part}": norm for part, norm in norms.items()}


def trained_weights(model):
    """COLLECTIVE: yields (Hugging Face name, whole tensor) of every backbone weight that training has changed.

    For the rollout engine. One at a time: gathered from the shards, LoRA folded in, so no rank holds a second model.
    The receiver must use up the generator on every rank.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained |= {f"{layer}.base_layer.weight" for layer in model.lora_layers()}
    chosen = {name: value for name, value in state.items() if name in trained or ".lora_" in name}
    yield from merge_lora(chosen, model.lora_layers())


# ---- 3. What both stages need around their loop --------------------------------------------------------------
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
    fused = torch.cuda.is_available()  # left to itself torch takes FSDP2's shards one by one, ten kernels each
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=settings.weight_decay, fused=fused)


def set_learning_rate(optimizer, step: int, warmup_steps: int) -> None:
    """Linear warm-up, then constant; `step` counts from 1. Of the step alone, so a resume has nothing to restore."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * min(1.0, step / warmup_steps)
