"""Which implementation of an op runs, and why.

One table maps an op to its backends, in the order of :data:`PREFERENCE`. An explicit choice
(``backend=`` or the environment variable ``DEEPREC_BACKEND``) runs or raises; only the
automatic choice falls through to the next backend, and :func:`explain` says what it chose
and why the others were passed over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

__all__ = [
    "PREFERENCE",
    "available",
    "explain",
    "isa",
    "op_table",
    "register",
    "reset_op_table",
    "runnable",
    "select",
    "timed",
]

# CUDA C++ before Triton where both can run: it needs no compilation at run time. The reference
# is the specification and runs where nothing else can.
PREFERENCE = ("cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    ``why_not(*tensors)`` returns None when the backend can run on these inputs, else the reason.
    """

    op: str
    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]


@dataclass
class OpCount:
    """What :func:`op_table` reports of one op on one backend."""

    calls: int = 0
    seconds: float = 0.0


_TABLE: dict[str, list[Backend]] = {}
_COUNTS: dict[tuple[str, str], OpCount] = {}


def register(
    op: str, name: str, run: Callable[..., Any], why_not: Callable[..., str | None]
) -> None:
    """Add a backend to ``op``; ``name`` is one of :data:`PREFERENCE`, which orders them.

    Raises ValueError for another name, or one that ``op`` has already.
    """
    if name not in PREFERENCE:
        raise ValueError(f"backend {name!r} of op {op!r} is not one of {', '.join(PREFERENCE)}")
    backends = _TABLE.setdefault(op, [])
    if any(backend.name == name for backend in backends):
        raise ValueError(f"backend {name!r} of op {op!r} is registered twice")
    backends.append(Backend(op, name, run, why_not))
    backends.sort(key=lambda backend: PREFERENCE.index(backend.name))


def available() -> dict[str, list[str]]:
    """The backends of every op, in order of preference."""
    return {op: [backend.name for backend in backends] for op, backends in _TABLE.items()}


def select(op: str, requested: str | None, *tensors: Any) -> Backend:
    """The backend that runs ``op`` on ``tensors``.

    Raises ValueError for an unknown name and RuntimeError when the requested backend cannot run.
    """
    requested = requested or os.environ.get("DEEPREC_BACKEND") or None
    backends = _TABLE[op]
    if requested is not None:
        for backend in backends:
            if backend.name == requested:
                reason = backend.why_not(*tensors)
                if reason is not None:
                    raise RuntimeError(f"{op}: backend {requested!r} cannot run: {reason}")
                return backend
        names = ", ".join(backend.name for backend in backends)
        raise ValueError(f"{op}: no backend {requested!r}; choose one of: {names}")
    reasons = []
    for backend in backends:
        reason = backend.why_not(*tensors)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"{op}: no backend can run these inputs ({'; '.join(reasons)})")


def runnable(op: str, *tensors: Any) -> list[str]:
    """The backends of ``op`` that can run on ``tensors``, in order of preference."""
    return [backend.name for backend in _TABLE[op] if backend.why_not(*tensors) is None]


def explain(op: str, *tensors: Any) -> str:
    """One line a backend of ``op``: which would run on ``tensors``, and why not the others."""
    lines = []
    chosen = select(op, None, *tensors).name
    for backend in _TABLE[op]:
        reason = backend.why_not(*tensors)
        if backend.name == chosen:
            note = "runs"
        elif reason is None:
            note = "could run, comes later in the order of preference"
        else:
            note = f"cannot run: {reason}"
        lines.append(f"{op}[{backend.name}]: {note}")
    return "\n".join(lines)


def isa() -> str:
    """The instruction set the CPU kernels use (``DEEPREC_ISA`` forces one)."""
    from deeprec import _C

    return str(_C.isa())


class _Timed:
    """Not a generator: this runs around every call of an op."""

    __slots__ = ("_key", "_start")

    def __init__(self, key: tuple[str, str]) -> None:
        self._key = key

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self._start
        count = _COUNTS.get(self._key) or _COUNTS.setdefault(self._key, OpCount())
        count.calls += 1
        count.seconds += seconds


def timed(op: str, backend: str) -> AbstractContextManager[None]:
    """Count one call of ``op`` and its wall time into :func:`op_table`."""
    return _Timed((op, backend))


def op_table() -> dict[tuple[str, str], OpCount]:
    """Calls and seconds per (op, backend) since the last :func:`reset_op_table`."""
    return dict(_COUNTS)


def reset_op_table() -> None:
    """Start counting afresh."""
    _COUNTS.clear()
