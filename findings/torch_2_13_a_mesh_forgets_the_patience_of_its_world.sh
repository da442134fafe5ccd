#!/usr/bin/env bash
# A script whose ranks wait long for one another (one samples for an hour while others have ended) gives
# init_process_group a timeout of a day. A device mesh over two dimensions makes groups of its own for them, and these do
# not inherit it: they get the backend's default, 30 minutes with gloo (10 with NCCL). fully_shard and tensor parallel
# work on those groups, so a sharded run ends after that time where the same run unsharded waits. What hides it: a mesh of
# one dimension over all ranks IS the default group, and so is each dimension of a mesh of one process, so neither a
# test in one process nor plain FSDP shows it. init_device_mesh has no argument timeout; a backend_override with options
# that hold one is what helps, for each dimension.
# Behaviour: the timeouts of the groups behind meshes of 4 and of 2 x 2 ranks, the latter with and without options.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" numpy==2.4.6 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import datetime, sys, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

DAY = datetime.timedelta(days=1)

def hours(group):
    return group._get_backend(torch.device("cpu")).options._timeout / datetime.timedelta(hours=1)

def run(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=DAY)
    patient = dist.ProcessGroupGloo._Options() if hasattr(dist.ProcessGroupGloo, "_Options") else dist.ProcessGroupGloo.Options()
    patient._timeout = DAY
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    found = {"the default group": hours(dist.group.WORLD), "mesh of 4": hours(flat.get_group()),
             "mesh of 2 x 2, copies": hours(mesh.get_group("copies")), "its shards": hours(mesh.get_group("shards"))}
    try:
        told = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"),
                                backend_override={"copies": ("gloo", patient), "shards": ("gloo", patient)})
        found["with options, copies"], found["its shards, too"] = hours(told.get_group(0)), hours(told.get_group(1))
    except TypeError as error:
        found["with options"] = str(error)
    if rank == 0:
        print("torch", torch.__version__)
        for name, value in found.items():
            print(f"  {name}: {value:g} hours")
    assert list(found.values()) == [24, 24, 0.5, 0.5, 24, 24], found
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(run, (f"{sys.argv[1]}/store",), nprocs=4)
    print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" "$dir" 2> "$dir/log" || { tail -n 8 "$dir/log"; exit 1; }
