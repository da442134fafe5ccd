"""Needed to run, not to understand: flags, files, formats, checkpoints, logs, the vLLM engine, the report."""

import importlib.metadata
import os
import sys


def _require_transformers() -> None:
    """One sentence for a transformers that is too old. Here, since every script of ours imports this package first.

    4.56 and before have no Qwen3-VL; 5.17 and before swallow `mm_encoder_outputs` in **kwargs, and the model would
    train and score without seeing the video. A script of ours ends with exit code 2; elsewhere it is an ImportError.
    """
    version = importlib.metadata.version("transformers")
    if tuple(int(number) for number in version.split(".")[:2]) >= (5, 18):
        return
    told = (f"transformers {version}: its Qwen3-VL would not see the video; 5.18 or newer is needed: "
            "pip install -r requirements.txt")
    main, root = getattr(sys.modules["__main__"], "__file__", None), os.path.dirname(os.path.dirname(__file__))
    if main and os.path.abspath(main).startswith(os.path.join(os.path.abspath(root), "")):
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(told)


_require_transformers()
