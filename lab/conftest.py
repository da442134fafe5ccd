"""The shelf's tests use the fixtures of the heart's: a small toy world, the real processor, tiny models."""

from tests.conftest import *  # noqa: F403
