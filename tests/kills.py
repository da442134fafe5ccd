"""Kills training and sampling at random moments, goes on, and checks that nothing is lost. A script, not collected.

    python tests/kills.py --kills 100 --out DIR              stage 1 on one rank, and collect_cots.py
    python tests/kills.py --kills 20 --ranks 2 --out DIR     stage 1 under torchrun

Each round runs a command to its end without a kill, then again with SIGKILL to all its processes at random
moments (a checkpoint is saved after every step, so many hit a save), each time going on with the same command, until it
ends by itself. Lost is: another final weight or CoT by a single bit, a step that is missing or twice in metrics.jsonl,
a half-written folder that stays. Prints a line per kill and a verdict; exit code 1 if anything was lost.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file

import toy.base_model
import toy.world

STEPS = 30


def make_world(out: pathlib.Path) -> tuple[str, str]:
    """A few clips and a tiny base model: (CSV of pairs, model folder)."""
    sizes = dict.fromkeys(toy.world.SPLITS, 0) | {"train_cold_start": 8}
    csv = toy.world.make_data(out / "data", seed=3, sizes=sizes, progress=False)
    processor = toy.base_model.build_processor()
    toy.base_model.build_model(processor, **toy.base_model.MICRO).save_pretrained(out / "base")
    processor.save_pretrained(out / "base")
    return csv["train_cold_start"], str(out / "base")


def stage_1(csv: str, base: str, out: pathlib.Path, ranks: int) -> list[str]:
    """The command; --resume on an empty folder starts a run."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    start = start if ranks > 1 else [sys.executable]
    return [*start, "cold_start.py", "--model", base, "--data", csv, "--out", str(out), "--batch-pairs", "2",
            "--workers", "0", "--mask-probability", "1", "--epochs", "99", "--max-steps", str(STEPS),
            "--save-every", "1", "--lr", "1e-3", "--lora-r", "4", "--resume"]


def rollout(csv: str, base: str, out: pathlib.Path, ranks: int) -> list[str]:
    out.mkdir(exist_ok=True)
    return [sys.executable, "collect_cots.py", "--model", base, "--data", csv, "--out", str(out / "cots.csv"),
            "--batch-size", "1", "--max-new-tokens", "40"]


def lines_of(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def family(pid: int) -> list[int]:
    """A process and all its descendants, from /proc (Linux). The parent's pid is the second field behind the name."""
    children = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended just now
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:  # grows while it is read
        found += children.get(one, [])
    return found


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the process and its ranks, and waits until all are gone.

    torchrun gives each rank a session of its own, so its process group holds none of them. Left alive, they would train
    and save beside the run that goes on.
    """
    members = family(process.pid)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(alive(pid) for pid in members):
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """False for a zombie too: it writes nothing any more, and its parent may never fetch it."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def run(command: list[str], log: pathlib.Path, kill_after: float | None) -> bool:
    """Runs it; after its log has grown by a line and `kill_after` seconds more, kills it. True: it ended by itself."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(exist_ok=True)
    with open(log.parent / "output.txt", "ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)
        before, moment = lines_of(log), None
        while process.poll() is None:
            if kill_after is not None and moment is None and lines_of(log) > before:
                moment = time.time() + kill_after
            if moment is not None and time.time() >= moment:
                kill_all(process)
                return False
            time.sleep(0.005)
    if process.returncode:
        sys.exit(f"LOST: the command ended with {process.returncode}; see {log.parent}/output.txt")
    return True


def differences(kind: str, whole: pathlib.Path, parts: pathlib.Path) -> list[str]:
    """What the killed run lost against the undisturbed one."""
    if kind == "rollout":
        return [] if (whole / "cots.csv").read_bytes() == (parts / "cots.csv").read_bytes() else ["cots.csv differs"]
    found = []
    for name in ("model.safetensors", "reward_head/head.safetensors"):
        one, two = (load_file(folder / "model" / name) for folder in (whole, parts))
        found += [f"{name}: {key}" for key in one if not one[key].equal(two[key])]
    steps = [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()]
    if steps != list(range(1, STEPS + 1)):
        found.append(f"steps {steps}")
    return found + [str(path) for path in parts.rglob("*.tmp")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    out, draw, kills, rounds, lost = pathlib.Path(args.out).resolve(), random.Random(args.seed), 0, 0, []
    csv, base = make_world(out)
    kinds = {"stage 1": stage_1} if args.ranks > 1 else {"stage 1": stage_1, "rollout": rollout}
    logs = {"stage 1": "metrics.jsonl", "rollout": "cots.csv.thoughts/thoughts.jsonl"}
    for kind, command in kinds.items():
        (out / kind / "whole").mkdir(parents=True)
        run(command(csv, base, out / kind / "whole", args.ranks), out / kind / "whole" / "log", None)
    while kills < args.kills:
        kind = "rollout" if "rollout" in kinds and rounds % 4 == 3 else "stage 1"
        parts = out / kind / "parts"
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        while not run(kinds[kind](csv, base, parts, args.ranks), parts / logs[kind], draw.uniform(0, 0.5)):
            kills += 1
            print(f"kill {kills}: {kind} after {lines_of(parts / logs[kind])} lines", flush=True)
        lost += differences(kind, out / kind / "whole", parts)
        rounds += 1
        print(f"round {rounds} ({kind}) ended: {'LOST ' + '; '.join(lost) if lost else 'nothing lost'}", flush=True)
    print(f"{kills} kills in {rounds} rounds, {args.ranks} rank(s): {'LOST' if lost else 'nothing lost'}")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
