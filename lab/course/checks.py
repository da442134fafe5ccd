"""What lessons are made of: two ways to be wrong, and the submission's answer in the message."""

import torch


class Wrong(Exception):
    """What a lesson found: the message is for the student."""


class Raised(Wrong):
    """The submission's function raised instead of returning a value, or changed what it was given."""


class Ended(Wrong):
    """The submission's process is gone: too slow, too large, exited, or never started."""


def near(got, expected, tolerance=1e-5):
    """Numbers, lists or tensors that must agree. Wrong with both values otherwise, or the shapes of large ones."""
    got, expected = plain(got), plain(expected)
    told = f"got {shown(got)}, expected {shown(expected)}"
    try:
        a, b = (torch.tensor(x, dtype=torch.float64) for x in (got, expected))
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(told) from error
    if a.shape != b.shape and a.ndim > 1 and b.ndim > 1:
        told = f"got shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    if a.shape != b.shape or not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
        raise Wrong(told)


def expect(condition, got):
    """Wrong with what was got, unless the condition holds."""
    if not condition:
        raise Wrong(f"got {shown(got)}")


def plain(value):
    """Tensors and arrays as lists, at any depth."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def shown(value) -> str:
    """A value as a message shows it: six digits, 160 characters."""
    value = plain(value)
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"[:160]
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:160]
