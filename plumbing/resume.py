"""Stopping and going on: whose --out it is, checkpoints, Ctrl-C, non-finite losses.

A checkpoint holds the trained weights, the optimizer's states, the random states and the step. Rates and other settings
are not in it: those are the command's, and `claim_run` decides which of them may differ from the run's first command.
"""

import dataclasses
import glob
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import warnings

import numpy as np
import torch

from plumbing.settings import InputError, flag_of, write_json

# What a run writes into --out; --overwrite removes this and nothing else.
WRITTEN = ("checkpoints", "model", "model.tmp", "model.old", "settings.json", "changes.jsonl", "metrics.jsonl",
           "samples.jsonl", "skipped.jsonl", "not_finite*.jsonl", "curves.png")

# What --resume may be given anew. All other settings decide what is learned and from what: a run whose second half has
# others could not be described by one settings.json, so they are refused. Reasons, group by group:
MAY_CHANGE = {
    "lr", "lr_vision", "lr_head", "max_grad_norm",  # size of a step: what a loss that is not finite asks for
    "epochs", "max_steps",  # how long it trains
    "max_length", "skip_bad_videos",  # limits that an error in mid-training asks to change
    "data", "val", "video_root", "frame_cache",  # where files lie; that --data holds the same pairs is checked below
    "out", "val_every", "save_every", "keep", "resume", "overwrite",  # what is written, and how often
    # speed and memory: the same sums
    "workers", "micro_pairs", "micro_rollouts", "gradient_checkpointing", "rows_per_batch",
    "engine", "engine_memory", "engine_tp", "engine_max_len", "shard_ranks", "cpu_offload",  # who computes, and where
}


def claim_run(settings, ranks) -> None:
    """COLLECTIVE: makes --out this run's, and writes its settings.json; InputError on every rank if it must not be.

    A new run needs an --out without a run, or --overwrite. --resume needs the settings of the run that it goes on with,
    but for MAY_CHANGE; what is changed is printed, and kept in changes.jsonl with the step after which it counts.
    """
    problem = None
    if ranks.is_main:  # one looks and decides, all hear of it: others could see other files
        try:
            _claim(settings, ranks)
        except InputError as error:
            problem = str(error)
    if problem := next(filter(None, ranks.gather_objects([problem])), None):
        raise InputError(problem)


def _claim(settings, ranks):
    out, saved = settings.out, _checkpoints(settings.out)
    if settings.resume and settings.overwrite:
        raise InputError("--resume goes on with the run in --out, --overwrite removes it; give one of them.")
    if settings.overwrite:
        _remove_run(settings)
    elif not settings.resume:
        names = ("checkpoints", "metrics.jsonl", "model")
        if held := [name for name in names if os.path.exists(os.path.join(out, name))]:
            raise InputError(
                f"{out}: holds a run ({', '.join(held)}); --resume goes on with it, --overwrite removes it, or give "
                "another --out."
            )
    elif not saved and os.path.isdir(os.path.join(out, "model")):
        raise InputError(f"{out}: holds a model but no checkpoint to go on from; --overwrite starts anew.")
    now = {**dataclasses.asdict(settings), "data_sha256": _sha256(settings.data)}
    if settings.resume and saved:
        _compare(out, now, saved[-1], ranks)
    os.makedirs(out, exist_ok=True)
    write_json(os.path.join(out, "settings.json"), now)


def _compare(out, now, newest, ranks):
    """InputError if a setting differs that must not; says and keeps what else differs from the run's settings.json."""
    path = os.path.join(out, "settings.json")
    try:
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is missing or damaged; --overwrite starts anew.") from error
    changed = {name: [before.get(name), now[name]] for name in now if before.get(name) != now[name]}
    fixed = sorted(changed.keys() - MAY_CHANGE)
    if fixed == ["data_sha256"]:
        raise InputError(f"{now['data']}: is not the file that the run in {out} was trained on; give another --out.")
    if fixed:
        was = ", ".join(f"{flag_of(name)} {before.get(name)}" for name in fixed if name != "data_sha256")
        raise InputError(f"{out}: was begun with {was}, which --resume cannot change; give another --out.")
    told = {name: values for name, values in changed.items() if name not in ("resume", "overwrite", "out")}
    if told:
        for name, (old, new) in told.items():
            ranks.print(f"{flag_of(name)} was {old}, from here on {new}")
        with open(os.path.join(out, "changes.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"after_step": _read_position(newest)["step"], **told}) + "\n")


def _sha256(path):
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file.")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_run(settings):
    found = [path for name in WRITTEN for path in glob.glob(os.path.join(glob.escape(settings.out), name))]
    for path in found:  # before anything is removed: what this run reads may lie there
        for read in (settings.data, settings.model):
            real, own = os.path.realpath(path), os.path.realpath(read)
            if os.path.exists(read) and os.path.commonpath([real, own]) == real:
                raise InputError(f"{read}: lies in what --overwrite would remove; give another --out.")
    for path in found:
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def require_finite(value: float, what: str, rows: list[dict], settings, ranks) -> None:
    """InputError if `value` is inf or nan, before any weight is touched; OUT/not_finite.jsonl then holds the rows.

    rows: what this rank fed to the model, each with at least its "line" in the CSV. The last checkpoint stays good.
    """
    if np.isfinite(value):
        return
    path = os.path.join(settings.out, f"not_finite.rank{ranks.rank}.jsonl" if ranks.rank else "not_finite.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    lines = ", ".join(sorted({str(row["line"]) for row in rows}, key=int))
    raise InputError(
        f"{settings.data}: the {what} is {value} at line {lines} (kept in {path}); look at them or lower --lr, then go "
        "on with --resume."
    )


def save_checkpoint(
    out: str, step: int, model, optimizer, ranks, keep: int = 2, more: dict | None = None
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
    weights, adam = _training_state(model, optimizer)
    # Tensors only, so without the optimizer's rates: those are settings, and a resumed run's are its own command's.
    state = {"model": weights, "optimizer": adam["state"]}
    dcp.save(state, checkpoint_id=os.path.join(temporary, "state"), no_dist=ranks.world == 1)
    torch.save(_random_state(ranks.device), os.path.join(temporary, f"random-{ranks.rank}.pt"))
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


def load_checkpoint(out: str, model, optimizer, ranks) -> dict:
    """COLLECTIVE: loads the newest complete checkpoint under OUT in place; the optimizer keeps its own rates.

    Returns its step.json, {"step": 0} if there is none. With another number of ranks it goes on, but not bit for bit.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    found = _checkpoints(out)
    if not found:
        return {"step": 0}
    folder = found[-1]
    _refuse_foreign_index(os.path.join(folder, "state", ".metadata"))
    weights, adam = _training_state(model, optimizer)
    state = {"model": weights, "optimizer": adam["state"]}
    dcp.load(state, checkpoint_id=os.path.join(folder, "state"), no_dist=ranks.world == 1)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=adam,
        options=StateDictOptions(ignore_frozen_params=True, strict=False),  # frozen weights are not in the checkpoint
    )
    position = _read_position(folder)
    if position["world"] == ranks.world:
        states = torch.load(os.path.join(folder, f"random-{ranks.rank}.pt"), weights_only=True)
        _set_random_state(states, ranks.device)
    ranks.print(f"resumed from {folder}")
    return position


def _training_state(model, optimizer):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))


def _read_position(folder):
    with open(os.path.join(folder, "step.json"), encoding="utf-8") as file:
        return json.load(file)


def _random_state(device):
    """Numbers and tensors only, so that `weights_only=True` reads it: nothing in a checkpoint can run as code."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state, device):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class _Index(pickle.Unpickler):
    """Reads the index that torch.distributed.checkpoint pickles, and nothing that could run as code."""

    KNOWN = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
            "StorageMeta", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "bfloat16"},
        "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"},
    }

    def find_class(self, module, name):
        if name not in self.KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _refuse_foreign_index(path):
    """InputError before torch unpickles an index that holds more than names, sizes and places of tensors."""
    try:
        with open(path, "rb") as file:
            _Index(file).load()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: is damaged, or no checkpoint of this code ({error}).") from error


def _checkpoints(out):
    folder = os.path.join(out, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted((int(name[5:]), name) for name in names if name.startswith("step-") and name[5:].isdigit())
    return [os.path.join(folder, name) for _, name in steps]  # by number: "step-1000000" sorts before "step-999999"


class StopSignal:
    """Ctrl-C (or SIGTERM) asks for a stop at the end of the step, with a checkpoint; twice stops at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if os.environ.get("RANK", "0") != "0":
            return  # all ranks get the signal: one message is enough
        text = "stopping after this step; again to stop at once"
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, not this process, decides how long a step may still take
            text += " (torchrun kills after 30 s by default; longer steps need torchrun --shutdown-timeout SECONDS)"
        print("\n" + text, file=sys.stderr, flush=True)
