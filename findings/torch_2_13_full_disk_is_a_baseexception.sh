#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint.save to a disk that is full (here: a limit on the size of a file): what it
# raises, CheckpointException, is a BaseException, not an Exception. So `except Exception` around a save, which is to keep
# a training alive, does not catch it, and neither does a thread pool's or a logger's usual handler. Nor does its text name
# the disk: the writer of zip files complains that it stands at another byte than it should.
# Behaviour: the classes that the exception is and is not, and the message inside.
# Seen: CheckpointException, a BaseException, no Exception; inside RuntimeError "... unexpected pos 704 vs 598".
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$dir/run.py" <<'PY'
import resource, signal, sys, tempfile, warnings, torch
import torch.distributed.checkpoint as dcp
warnings.filterwarnings("ignore")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
weights = {"weight": torch.zeros(1 << 20)}
with tempfile.TemporaryDirectory() as folder:
    dcp.save(weights, checkpoint_id=f"{folder}/good", no_dist=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))  # 4 MiB do not fit
    caught = None
    try:
        try:
            dcp.save(weights, checkpoint_id=f"{folder}/full", no_dist=True)
        except Exception as error:
            caught = error
    except BaseException as error:
        missed = error
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if caught is None:
    inside = next(iter(missed.failures.values()))[0]
    print(f"torch {torch.__version__}: {type(missed).__name__}, of {type(missed).__mro__[1].__name__}, is no Exception; inside: "
          f"{type(inside).__name__}: {str(inside).splitlines()[0][-60:]}")
else:
    print(f"torch {torch.__version__}: caught by `except Exception`: {type(caught).__name__}: {caught}")
sys.exit(0 if caught is None and not isinstance(missed, Exception) else 1)
PY
"$dir/venv/bin/python" "$dir/run.py" && echo "as described"
