"""The study's commands: each runs once on one core, and again when it must. A killed study goes on where it was.

A cell is done when its record is there, belongs to this command and to what it was made from, and its last file is as
it was left; else it begins anew, from nothing. One that fails stops only those that need it.
"""

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

from plumbing.jobs import content_of
from plumbing.settings import write_json


class Cell(NamedTuple):
    """One command on one core. It writes to `path`, `done` last; its record and log lie beside it."""

    path: str
    command: list[str]
    done: str
    needs: tuple[str, ...]  # paths of cells, or files that are no cell's
    minutes: float  # an estimate

    @property
    def record(self) -> str:
        """Where a finished cell says what it ran, and in which time."""
        return f"{self.path}.cell.json"


CHILD = """
import runpy, sys
from plumbing.decoder import end_with_parent
end_with_parent()
first, *sys.argv = sys.argv[1:]
if first == "-m":
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv.insert(0, first)
    runpy.run_path(first, run_name="__main__")
"""


def child(command: list[str]) -> list[str]:
    """`python COMMAND` that ends with this process, however that ends: nothing is left that goes on writing."""
    return [sys.executable, "-c", CHILD, *command]


def read(path: str) -> dict:
    """A JSON file, say a cell's record; {} if there is none that can be read."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def stamp(cell: Cell) -> dict:
    """What tells a cell from one of another command, of other sources, or damaged since."""
    def source(need):
        record = read(f"{need}.cell.json")
        return [record.get("command"), record.get("wrote")] if record else content_of(need)

    made_from = [source(need) for need in cell.needs]
    return {"command": cell.command, "made_from": made_from, "wrote": content_of(cell.done)}


def is_done(cell: Cell) -> bool:
    """Its record belongs to this command and to what it was made from, and its last file is as it was left."""
    now, known = stamp(cell), read(cell.record)
    return now["wrote"] is not None and all(known.get(key) == value for key, value in now.items())


def run_cell(cell: Cell, now: str) -> str | None:
    """Runs it on one core, from nothing. -> None, or what went wrong."""
    begun = [f"{path}.thoughts" for path in (cell.path, cell.done)]  # of the first and of the last CSV it writes
    for path in filter(os.path.exists, (cell.record, cell.done, cell.path, *begun)):
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    os.makedirs(os.path.dirname(cell.path), exist_ok=True)
    log, began = f"{cell.path}.cell.log", time.time()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(child(cell.command), stdout=file, stderr=subprocess.STDOUT, env=env)
        _, status, used = os.wait4(process.pid, 0)  # its own core time, whatever else the machine does
    if status or not os.path.isfile(cell.done):
        return f"{cell.path}: ended with code {os.waitstatus_to_exitcode(status)}; read {log}."
    spent = {"minutes": (time.time() - began) / 60, "core_minutes": (used.ru_utime + used.ru_stime) / 60}
    write_json(cell.record, stamp(cell) | {"commit": now} | spent)
    print(f"{time.strftime('%H:%M')} {cell.path}: {spent['core_minutes']:.1f} core-minutes", flush=True)
    return None


def run_all(cells: list[Cell], jobs: int, now: str) -> list[str]:
    """`jobs` at a time, in order, each as soon as what it needs is done. -> what went wrong."""
    left, running, wrong = list(cells), {}, {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while True:
            for cell in list(left):
                waits = {c.path for c in (*left, *running.values())} | wrong.keys()
                if len(running) < jobs and not waits & set(cell.needs):
                    left.remove(cell)
                    if not is_done(cell):
                        running[pool.submit(run_cell, cell, now)] = cell
            if not running:
                return [*wrong.values(), *(f"{cell.path}: needs a cell that failed." for cell in left)]
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                cell = running.pop(future)
                if problem := future.exception() or future.result():
                    wrong[cell.path] = str(problem)
                    print(problem, flush=True)
