"""A submission runs in a process of its own, and the checks do not: only values cross the line between them.

    grader                                         child: limits, the folder, the submission's functions
      lesson: f.bt_loss(2, 0)   -- JSON: name, arguments -->   calls the function
      compares with .1269       <-- JSON: the value ---------   sends what came back

So a submission cannot say "passed". It can only return values, and those must be right. Its process can print, exit,
loop or fill its memory: that ends this process and costs this exercise. The line carries JSON, never pickles.
What a process of the same user can still do (read and write this user's files, leave processes behind) is listed in
lab/course/README.md; run as root, the grader makes the child another user.
"""

import builtins
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import os
import pathlib
import signal
import socket
import sys
import time
import traceback
import types

import numpy as np
import torch

from lab.course.checks import Ended, Raised, Wrong

ROOT = pathlib.Path(__file__).resolve().parents[2]
MEMORY = 2 * 2**30  # bytes that a submission may take on top of what PyTorch holds
LONGEST = 32 * 2**20  # bytes of one answer
NOBODY = 65534  # the user without rights, on Linux
DTYPES = {str(d).removeprefix("torch."): d for d in
          (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
           torch.int8, torch.uint8, torch.bool)}


def pack(value):
    """A value -> what JSON can hold. Floats keep every bit; anything that is no value becomes its type's name."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            return {"other": f"tensor of {dtype}"}
        return {"tensor": value.detach().tolist(), "dtype": dtype,
                "shape": list(value.shape)}  # which a list of no rows does not tell
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "shape": list(value.shape)}
    if isinstance(value, torch.Generator):
        return {"generator": value.initial_seed()}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__ if type(value) in (tuple, list) else "list": [pack(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(k), pack(v)] for k, v in value.items()]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"fields": {f.name: pack(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"other": type(value).__name__}


def unpack(data):
    """The inverse of `pack`. Builds plain values only, so it may read what a submission wrote."""
    if not isinstance(data, dict):
        return data
    kind, content = next(iter(data.items()))
    if kind == "tensor":
        return torch.tensor(content, dtype=DTYPES[data["dtype"]]).reshape(data["shape"])
    if kind == "array":
        return np.array(content).reshape(data["shape"])
    if kind == "generator":
        return torch.Generator().manual_seed(content)
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](unpack(v) for v in content)
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in content}
    if kind == "fields":
        return types.SimpleNamespace(**{name: unpack(v) for name, v in content.items()})
    return f"a {content}"


# ---------------------------------------------------------------------------------------------------------------
# The grader's side
# ---------------------------------------------------------------------------------------------------------------
class Submission:
    """`f.bt_loss(a, b)` calls bt_loss of the submission in its process. `f.c` holds the course's constants.

    Args:
        folder: the code to run: a blank copy with the submitted files over it.
        places: the functions, as "losses.py::bt_loss".
        constants: {name: value}, e.g. "clip_low".
        seconds: the process is ended so long after it has begun to load the submission.
        quiet: its prints are thrown away; else they go to stderr, for a student who looks for a bug.
        implementations: place -> {name: function}, right and wrong ones for exercise 10; None in a student's copy.
    """

    def __init__(self, folder, places, constants, seconds=30.0, quiet=True, implementations=None):
        self.c, self.implementations = types.SimpleNamespace(**constants), implementations
        self._channel, theirs = socket.socketpair()
        sys.stdout.flush(), sys.stderr.flush()  # what is buffered here would be printed by the child, too
        self._pid = os.fork()
        if self._pid == 0:
            child(theirs, str(folder), places, quiet)
        theirs.close()
        self._alive = True
        self._buffer, self._seconds, self._end = b"", seconds, time.monotonic() + seconds

    def open(self) -> dict:
        """Waits until the functions are loaded: {place: the file it came from}."""
        return self._receive()["loaded"]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return functools.partial(self.call, name)

    def call(self, name, *args, within=None, **kwargs):
        """The value. within: seconds after which it is too slow."""
        return self._ask({"call": name, "args": pack(args), "kwargs": pack(kwargs)}, within)

    def gradients(self, name, *args, of=(0,), **kwargs):
        """Gradients of the value's sum in the arguments `of`; None where an argument gets none."""
        return self._ask({"call": name, "args": pack(args), "kwargs": pack(kwargs), "of": list(of)})

    def judges(self, test, implementation=None, own=None) -> tuple[bool, str]:
        """Does the submission's test accept this implementation, and if not, why? It sees its values only: the calls
        come back here.

        own: instead, the place of a function of the submission itself.
        """
        self._send({"test": test, "own": own})
        while True:
            answer = self._receive()
            if "accepts" in answer:
                return answer["accepts"] is True, str(answer["why"])
            try:
                reply = {"value": pack(implementation(*unpack(answer["want"]), **unpack(answer["kwargs"])))}
            except Exception as error:  # the test gave nonsense, or the mistake is one that raises
                reply = {"raises": [type(error).__name__, str(error)]}
            self._send(reply)

    def close(self):
        """Ends the process and what it has started in its group."""
        self._channel.close()
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(self._pid, signal.SIGKILL)
        if self._alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # it may not have made its group yet
            os.waitpid(self._pid, 0)

    def _ask(self, request, within=None):
        self._send(request)
        start = time.monotonic()
        answer = self._receive(within)
        if within is not None and time.monotonic() - start > within:
            raise Wrong(f"took {time.monotonic() - start:.1f} s, at most {within:g} s are needed")
        return unpack(answer["value"])

    def _send(self, message):
        try:
            self._channel.settimeout(max(0.01, self._end - time.monotonic()))
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:
            self._too_slow()
        except OSError:
            self._gone()

    def _receive(self, within=None) -> dict:
        end = min(self._end, time.monotonic() + (within or self._seconds))
        while b"\n" not in self._buffer:
            try:
                self._channel.settimeout(max(0.01, end - time.monotonic()))
                piece = self._channel.recv(2**20)
            except TimeoutError:
                self._too_slow(within)
            except OSError:
                piece = b""
            if not piece:
                self._gone()
            self._buffer += piece
            if len(self._buffer) > LONGEST or time.monotonic() > end:
                self._too_slow(within)
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer = json.loads(line)
            kind = next(iter(answer))
            if kind == "wrong":
                raise Raised(str(answer["wrong"]))
            if kind == "ended":
                raise Ended(str(answer["ended"]))
            if kind == "value":
                unpack(answer["value"])
            return answer
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RuntimeError) as error:
            raise Ended("the process sent something that is no answer") from error

    def _too_slow(self, within=None):
        if within:
            raise Wrong(f"it took more than {within:g} s")  # the lesson has more to say
        raise Ended(f"took more than {self._seconds:g} s: an endless loop, or far too much work")

    def _gone(self):
        _, status = os.waitpid(self._pid, 0)
        self._alive = False
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        raise Ended(f"the process {how} instead of returning a value")


# ---------------------------------------------------------------------------------------------------------------
# The child's side
# ---------------------------------------------------------------------------------------------------------------
def may_become_nobody(folder: str) -> bool:
    """Run as root, and could another user still read Python, the packages and the folder?"""
    needed = [pathlib.Path(p).resolve() for p in (sys.executable, os.__file__, torch.__file__, folder)]
    return os.geteuid() == 0 and all(p.stat().st_mode & 1 for path in needed for p in path.parents)


def isolate(channel, folder: str, quiet: bool) -> None:
    """Limits, and no handle of the grader left: its modules, its variables, its open files. No wall: see the README."""
    os.setsid()
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null if quiet or number == 0 else 2, number)
    os.closerange(3, channel.fileno())
    os.closerange(channel.fileno() + 1, 4096)
    kept = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": folder, "PATH": os.environ.get("PATH", "")}
    os.environ.clear()
    os.environ.update(kept)
    for name, module in list(sys.modules.items()):  # the house's own modules, and `lab`, come from the folder
        path = getattr(module, "__file__", None)
        if name != "__main__" and path and pathlib.Path(path).is_relative_to(ROOT) and "site-packages" not in path:
            del sys.modules[name]
    sys.path[:] = [folder] + [p for p in sys.path if p and pathlib.Path(p).resolve() != ROOT]
    sys.argv, sys.dont_write_bytecode = ["submission"], True
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        for what, limit in ((resource.RLIMIT_AS, size + MEMORY), (resource.RLIMIT_FSIZE, 2**24),
                            (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(what, (limit, limit))
        if may_become_nobody(folder):
            resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)


def child(channel, folder: str, places, quiet: bool):
    """Loads the functions, answers calls, never returns."""
    send = None
    try:
        isolate(channel, folder, quiet)
        lines = channel.makefile("r", encoding="utf-8")

        def send(message):
            channel.sendall(json.dumps(message).encode() + b"\n")

        functions, loaded = {}, {}
        for place in places:
            function = load(place)
            functions[place.split("::")[1]] = function
            source = inspect.getsourcefile(inspect.unwrap(function))
            loaded[place] = os.path.relpath(os.path.realpath(source), os.path.realpath(folder))
        send({"loaded": loaded})
        for count, line in enumerate(lines):
            torch.manual_seed(count)  # the global generator stands elsewhere in each call
            send(serve(json.loads(line), functions, send, lines, folder))
    except BaseException as error:  # SystemExit, too
        if send:
            send({"ended": explain(error, folder)})
    os._exit(3)


def load(place: str):
    """"losses.py::bt_loss" -> the function. Wrong: the file has no such function."""
    file, name = place.split("::")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    if not callable(getattr(module, name, None)):
        raise Wrong(f"{file} has no function {name}")
    return getattr(module, name)


def explain(error: BaseException, folder: str) -> str:
    """An exception in one line, with the line of the submission that raised it."""
    if isinstance(error, (NotImplementedError, Wrong)) and str(error):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    if isinstance(error, SyntaxError):
        return f"{os.path.basename(error.filename or '')}, line {error.lineno}: {error.msg}"
    where = f"{os.path.relpath(frames[-1].filename, folder)}, line {frames[-1].lineno}: " if frames else ""
    return " ".join(f"{where}{type(error).__name__}: {str(error)[:300]}".split()).removesuffix(":")


def serve(request: dict, functions: dict, send, lines, folder: str) -> dict:
    """One request -> one answer. Wrong: a detached gradient, or an argument changed in place."""
    try:
        if "test" in request:
            own = load(request["own"]) if request["own"] else None
            accepted, why = accepts(functions[request["test"]], own, send, lines, folder)
            return {"accepts": accepted, "why": why}
        args, kwargs = list(unpack(request["args"])), unpack(request["kwargs"])
        of = request.get("of")
        for i in of or ():
            args[i] = args[i].requires_grad_()
        before = [a.detach().clone() if isinstance(a, torch.Tensor) else None for a in args]
        value = functions[request["call"]](*args, **kwargs)
        for number, (old, new) in enumerate(zip(before, args), start=1):
            if old is not None and not torch.equal(old, new.detach()):
                raise Wrong(f"{request['call']} changes its argument {number} in place: the caller still needs it")
        if of is None:
            return {"value": pack(value)}
        value = value[0] if isinstance(value, tuple) else value
        total = value.sum()
        if not total.requires_grad:
            raise Wrong(f"{request['call']} returns a value without a gradient: something in it is detached")
        return {"value": pack(list(torch.autograd.grad(total, [args[i] for i in of], allow_unused=True)))}
    except Exception as error:  # a student's code may raise anything; it becomes what the lesson says
        return {"wrong": explain(error, folder)}


def accepts(test, own, send, lines, folder) -> tuple[bool, str]:
    """Runs the submission's test on `own`, or on an implementation that lives in the grader.

    An exception: refused, and the exception is told.
    """
    from plumbing.settings import InputError  # the folder's

    def theirs(*args, **kwargs):
        """The grader's implementation: arguments go to it over the line, its value or its exception comes back."""
        send({"want": pack(args), "kwargs": pack(kwargs)})
        reply = json.loads(next(lines))
        if "raises" in reply:
            kind, text = reply["raises"]  # a test may ask for it: pytest.raises(InputError)
            raise {"InputError": InputError}.get(kind, getattr(builtins, kind, RuntimeError))(text)
        return unpack(reply["value"])

    try:
        test(own or theirs)
    except (NotImplementedError, SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # a failed assertion, or any; that of pytest.fail is no Exception
        return False, explain(error, folder)
    return True, ""
