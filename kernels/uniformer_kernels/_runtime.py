"""The one place that asks the environment what it is and which implementation to run."""

import contextlib
import os
from collections.abc import Iterator

__all__ = ["BACKENDS", "backend", "current_backend"]

BACKENDS = ("auto", "reference")


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"the backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_current = _checked(os.environ.get("UNIFORMER_BACKEND", "auto"))


def current_backend() -> str:
    """The backend asked for: `UNIFORMER_BACKEND`, or the innermost `backend(...)`."""
    return _current


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose how the operators run, for the whole process, while the context lasts.

    Args:
        name: "auto", the fastest there is; "reference", the formula of the paper in plain
            PyTorch, literally.

    Raises:
        ValueError: `name` is neither.
    """
    global _current
    before, _current = _current, _checked(name)
    try:
        yield
    finally:
        _current = before
