"""Replacing functions of installed libraries: all of them or none, and back again."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType, TracebackType
from typing import Any

from packaging.specifiers import SpecifierSet

__all__ = ["Patch", "Peer", "Replacement", "Usage", "explain", "patch", "unpatch"]

TARGETS = ("trl", "verl", "openrlhf", "recbole")


@dataclass
class Usage:
    """What became of the calls of one replacement: computed by us, or passed on, and why.

    Calls inside a compiled graph are not counted: a counter would recompile it at every call.
    """

    taken: int = 0
    passed_on: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Replacement:
    """One function, class or method of a peer, and what stands in for it.

    Args:
        module: where the peer defines it.
        name: its name there; "Class.method" for a method.
        make: ``(original, usage)`` gives ours, which passes on to the original what it cannot do.
        by: what does the work, for :func:`explain`.
        everywhere: replace it in every module that holds the very same object, because it was
            imported by value; False replaces the one attribute.
    """

    module: str
    name: str
    make: Callable[[Any, Usage], Any]
    by: str
    everywhere: bool = True


@dataclass(frozen=True)
class Peer:
    """A library that can be patched: its distribution, tested versions and replacements."""

    distribution: str
    supported: str
    replacements: tuple[Replacement, ...]


@dataclass(frozen=True)
class _Planned:
    """A replacement that has been found and checked, but not made."""

    replacement: Replacement
    owner: Any
    attribute: str
    original: Any
    ours: Any
    usage: Usage

    @property
    def path(self) -> str:
        return f"{self.replacement.module}.{self.replacement.name}"


class Patch:
    """A patch in force; use it as a context manager, or call :meth:`unpatch`."""

    def __init__(self, target: str, version: str, planned: list[_Planned]) -> None:
        self.target, self.version = target, version
        self._planned = planned

    def unpatch(self) -> None:
        """Put the originals back, also in modules imported since; does nothing a second time.

        A place that somebody else has replaced in the meantime is theirs and left alone.
        """
        if _ACTIVE.get(self.target) is self:
            del _ACTIVE[self.target]
            _exchange(self._planned, undo=True)

    def explain(self) -> str:
        """One line a replaced function: where it is used, and what became of its calls."""
        lines = [f"{self.target} {self.version}:"]
        holders = _holders(item.ours for item in self._planned)
        for item in self._planned:
            usage = item.usage
            lines.append(f"  {item.path} -> {item.replacement.by}: {usage.taken} calls")
            lines += [
                f"    passed on {n} times: {why}" for why, n in sorted(usage.passed_on.items())
            ]
            places = {f"{module.__name__}.{name}" for module, name in holders[id(item.ours)]}
            if others := sorted(places - {item.path}):
                lines.append(f"    also in {', '.join(others)}")
        return "\n".join(lines)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        state = "in force" if _ACTIVE.get(self.target) is self else "undone"
        return f"Patch({self.target!r}, {self.version}, {state})"


_ACTIVE: dict[str, Patch] = {}


def patch(target: str) -> Patch:
    """Replace hot functions of a library by deeprec's, until :func:`unpatch`.

    Call it before or after the library is imported. A function is replaced in every module that
    holds it, ``from … import`` included; modules imported later get ours from where it is defined.
    Only copies that no module attribute holds are missed: a default argument, a closure, a
    container. Signatures, shapes and output dtypes stay the peer's own; what deeprec cannot
    compute is passed on to the peer's code, and :func:`explain` says how often and why.

    Args:
        target: "trl", "verl", "openrlhf" or "recbole".

    Returns:
        The patch; as a context manager it ends with its block.

    Raises:
        ValueError: an unknown target.
        ImportError: the library is not installed, or cannot be imported.
        RuntimeError: its version has not been tested, a signature is not the expected one, or it
            is patched already. Nothing has been changed then.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if target in _ACTIVE:
        raise RuntimeError(
            f"{target} is patched already; call deeprec.unpatch({target!r}) first, or keep the "
            "Patch that the first call returned"
        )
    peer: Peer = importlib.import_module(f"deeprec.integrations.{target}").PEER
    version = _checked_version(target, peer)
    planned = [_plan(target, version, replacement) for replacement in peer.replacements]
    try:
        _exchange(planned)
    except BaseException:
        _exchange(planned, undo=True)
        raise
    _ACTIVE[target] = Patch(target, version, planned)
    return _ACTIVE[target]


def unpatch(target: str | None = None) -> None:
    """End the patch of one library, or of all. What is not patched stays as it is."""
    if target is not None and target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)} or None, got {target!r}")
    for active in list(_ACTIVE.values()):
        if target in (None, active.target):
            active.unpatch()


def explain() -> str:
    """What is replaced at the moment, and what became of the calls so far."""
    if not _ACTIVE:
        return f"nothing is patched; deeprec.patch takes {', '.join(TARGETS)}"
    return "\n".join(active.explain() for active in _ACTIVE.values())


def _checked_version(target: str, peer: Peer) -> str:
    remedy = f'pip install "{peer.distribution}{peer.supported}"'
    try:
        version = metadata.version(peer.distribution)
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"{target} is not installed: {remedy}") from error
    if version not in SpecifierSet(peer.supported):
        raise RuntimeError(
            f"deeprec.patch({target!r}) has been tested with {peer.distribution}{peer.supported}, "
            f"but {version} is installed; nothing was patched. {remedy}"
        )
    return version


def _plan(target: str, version: str, replacement: Replacement) -> _Planned:
    """Find what is to be replaced and make what replaces it, changing nothing."""
    owner: Any = importlib.import_module(replacement.module)
    *path, attribute = replacement.name.split(".")
    usage = Usage()
    try:
        for name in path:
            owner = getattr(owner, name)
        original = vars(owner)[attribute]
    except (AttributeError, KeyError) as error:
        raise RuntimeError(
            f"{target} {version} has no {replacement.module}.{replacement.name}; nothing was "
            "patched. Is it a modified copy?"
        ) from error
    ours = replacement.make(original, usage)
    _check_signature(f"{replacement.module}.{replacement.name}", original, ours)
    if inspect.isfunction(original):
        functools.update_wrapper(ours, original)  # pickles by the name it is found under
    return _Planned(replacement, owner, attribute, original, ours, usage)


def _check_signature(path: str, original: Any, ours: Any) -> None:
    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    if inspect.isfunction(original) and parameters(original) != parameters(ours):
        raise RuntimeError(
            f"{path} has the parameters {inspect.signature(original)}, expected "
            f"{inspect.signature(ours)}; nothing was patched. "
            "Is it a modified copy?"
        )


def _holders(values: Iterable[Any]) -> dict[int, list[tuple[ModuleType, str]]]:
    """The modules that hold each of the values, and under which names, by the value's id."""
    found: dict[int, list[tuple[ModuleType, str]]] = {id(value): [] for value in values}
    for module in list(sys.modules.values()):
        # __dict__, not getattr: lazy modules would import everything they could offer.
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict):
            for name, held in list(namespace.items()):
                if id(held) in found:
                    found[id(held)].append((module, name))
    return found


def _exchange(planned: Iterable[_Planned], *, undo: bool = False) -> None:
    """Put ours wherever the originals are, or the other way round."""
    swaps = [(p, p.ours, p.original) if undo else (p, p.original, p.ours) for p in planned]
    holders = _holders(old for item, old, _ in swaps if item.replacement.everywhere)
    for item, old, new in swaps:
        for module, name in holders.get(id(old), []):
            setattr(module, name, new)
        if vars(item.owner).get(item.attribute) is old:
            setattr(item.owner, item.attribute, new)
