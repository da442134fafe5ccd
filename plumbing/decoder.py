"""Runs a function on a file in a process of its own with a time limit: no file may hold the project for ever.

Decoders are C code that no exception and no thread can stop; on some files they do not come back, on others they crash.
Each process serves one call after the other and is started once. A call that takes too long ends it by its own alarm,
so nothing is left behind even if whoever asked is gone.
"""

import atexit
import os
import pickle
import signal
import subprocess
import sys

from plumbing.settings import InputError

LIMIT = 120.0  # seconds for a clip: 4 minutes of 720p take about 5 on one core, of 4K nine times that
_idle: dict[int, list] = {}  # {process id: its decoders that wait}; a forked loader worker starts its own
_busy: set = set()


def bounded(limit: float, path: str, function, *arguments):
    """function(*arguments), a function of a module, in another process; InputError after `limit` s, naming `path`.

    Threads may call this side by side: each call has its own process. What the function raises is raised here.
    """
    mine = _idle.setdefault(os.getpid(), [])
    worker = mine.pop() if mine else _start()
    try:
        _busy.add(worker)
        pickle.dump((os.getcwd(), limit, function, arguments), worker.stdin)
        worker.stdin.flush()
        good, result = pickle.load(worker.stdout)
        mine.append(worker)
    except (EOFError, OSError, pickle.UnpicklingError):  # it has ended
        code = worker.wait()
        why = f"not decoded within {limit:g} s" if code == -signal.SIGALRM else f"the decoder ended with code {code}"
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
    for worker in [*_busy, *_idle.pop(os.getpid(), [])]:
        worker.kill()


def _start():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    more = os.pathsep + os.environ["PYTHONPATH"] if os.environ.get("PYTHONPATH") else ""
    command = [sys.executable, "-c", "from plumbing.decoder import serve; serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": root + more})


def serve() -> None:
    """The other process: one call after the other from stdin, until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, in the middle of C code too
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # so does the alarm
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
