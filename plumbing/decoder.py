"""Runs a function on a file in a process of its own with a time limit: no file may stop the project.

Decoders are C code that no exception and no thread can stop; on some files they do not come back, on others they crash.
Each process serves one call after the other and is started once. A call that takes too long ends it by its own alarm.
A stop that is sent to the whole process group (by Ctrl-C, torchrun, slurm) does not reach it: the step that is then
finished still needs frames. It ends with the process that started it, however that ends.
"""

import atexit
import concurrent.futures
import contextlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time

from plumbing.settings import InputError

LIMIT = 120.0  # seconds for a clip: 4 minutes of 720p take about 5 on one core, of 4K nine times that
# This rank's share of the cores. Read at the start: vLLM changes LOCAL_WORLD_SIZE.
_ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CORES = max(1, _ALL // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
_idle: dict[int, list] = {}  # {process id: its decoders that wait}; a forked loader worker starts its own
_busy: set = set()


def bounded(limit: float, path: str, function, *arguments):
    """function(*arguments), a function of a module, in another process; InputError after `limit` s, naming `path`.

    Threads may call this side by side: each call has its own process. What the function raises is raised here. A
    process that ends is no proof against the file, it may have been killed: a new one is asked once more.
    """
    for again in (False, True):
        mine = _idle.setdefault(os.getpid(), [])
        worker = mine.pop() if mine and not again else _start()
        _busy.add(worker)
        try:
            pickle.dump((os.getcwd(), limit, function, arguments), worker.stdin)
            worker.stdin.flush()
            good, result = pickle.load(worker.stdout)
            mine.append(worker)
            break
        except (EOFError, OSError, pickle.UnpicklingError):  # it has ended
            code, late = worker.wait(), f"not decoded within {limit:g} s"
            why = late if code == -signal.SIGALRM else f"the decoder ended with code {code}"
            if again or why == late or worker not in _busy:  # not in _busy: end_all ended it
                raise InputError(f"{path}: {why}; leave it out (--skip-bad-videos), or encode it anew.") from None
        except BaseException:  # Ctrl-C while it worked: its answer must not be taken for the next one's
            worker.kill()
            raise
        finally:
            _busy.discard(worker)
    if not good:
        raise result
    return result


def end_all() -> None:
    """Ends this process's decoders; whoever waits for one gets an InputError at once."""
    busy = list(_busy)
    _busy.clear()
    for worker in [*busy, *_idle.pop(os.getpid(), [])]:
        worker.kill()


@contextlib.contextmanager
def threads(count: int):
    """A pool of threads that call `bounded`. An error in the `with`, or Ctrl-C, does not wait for what they are at."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise


def allow_many_files() -> None:
    """Raises this process's limit of open files from a login shell's 1,024 to what the system allows, 65,536 at most.

    A batch of 128 pairs is 1,024 tensors.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def detach(_worker: int = 0) -> None:
    """For a loader worker, as its first act: stops that are sent to the group do not reach it; it ends with its parent.

    (torch's own check of that comes only when the item that it is at is done.)
    """
    os.setsid()
    end_with_parent()


def end_with_parent() -> None:
    """From here on this process ends within a second of its parent."""

    def watch(parent):
        while os.getppid() == parent:  # an orphan gets another one
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def _start():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    more = os.pathsep + os.environ["PYTHONPATH"] if os.environ.get("PYTHONPATH") else ""
    command = [sys.executable, "-c", "from plumbing.decoder import serve; serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                            env={**os.environ, "PYTHONPATH": root + more})


def serve() -> None:
    """The other process: one call after the other from stdin, until that is closed."""
    end_with_parent()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it, in the middle of C code too
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            folder, limit, function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        os.chdir(folder)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, error
        signal.setitimer(signal.ITIMER_REAL, 0)
        pickle.dump(answer, answers, protocol=5)
        answers.flush()


atexit.register(end_all)
