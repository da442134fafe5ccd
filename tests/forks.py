"""Our scripts in processes of their own, without the seconds that a new Python takes to import torch and transformers.

A server (multiprocessing's forkserver) imports the libraries once for all tests of a worker, and none of our modules.
Each script runs in a fork of it, with session, environment, folder, path and output of its own.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "accelerate", "peft", "av", "PIL.Image",
    "transformers.models.qwen3_vl.modeling_qwen3_vl", "transformers.models.qwen3_vl.processing_qwen3_vl",
    "transformers.models.qwen3_vl.video_processing_qwen3_vl", "transformers.models.qwen2.tokenization_qwen2",
    "matplotlib.pyplot", "torch.utils.checkpoint", "torch._dynamo"])
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def child(command: list[str], cwd: str, env: dict, output: str, errors: str) -> None:
    """Becomes `python *command`: a script, `-m module` or `-c code`."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in ((1, output), (2, errors)):  # ranks share both, as under torchrun
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    first = cwd if command[0].startswith("-") else os.path.dirname(os.path.join(cwd, command[0]))
    sys.path[:] = [first, *(path for path in sys.path if path not in ("", ROOT))]
    sys.argv[:] = command[1:] if command[0].startswith("-") else command
    if command[0] == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(command[0], run_name="__main__")


def run(command: list[str], cwd: str, ranks: int = 0, timeout: float = 240) -> subprocess.CompletedProcess:
    """What subprocess.run gives for `python *command`, or with ranks for torchrun: one fails, all end."""
    from torch.distributed import TCPStore  # not in the forks before their time

    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            open(file, "w").close()
        environments = [dict(os.environ)]
        if ranks:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # 0: the system finds a free port
            shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
            environments = [{**os.environ, **{name: str(value) for name, value in shared.items()},
                             "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        processes = [SERVER.Process(target=child, args=(command, cwd, env, *files)) for env in environments]
        deadline, codes = time.monotonic() + timeout, [None]
        try:
            for process in processes:
                process.start()
            while None in codes and not any(codes):
                assert time.monotonic() < deadline, f"{command}: over {timeout} s"
                time.sleep(0.01)
                codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        code = next((code for code in codes if code), 0)
        output, errors = (open(file, encoding="utf-8").read() for file in files)
    return subprocess.CompletedProcess(command, code, output, errors)
