"""Replacing functions of a made-up library: everywhere, all or nothing, and back."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

import deeprec
from deeprec.integrations import explain, patching
from deeprec.integrations.patching import Peer, Replacement, Usage

SOURCE = """
def double(x, times=2):
    return x * times

class Model:
    def score(self, x):
        return x + 1
"""


def _double(original: Any, usage: Usage) -> Any:
    def double(x: float, times: int = 2) -> float:
        if x < 0:
            usage.passed_on["negative"] += 1
            return float(original(x, times))
        usage.taken += 1
        return x * times + 0.5

    return double


def _score(original: Any, usage: Usage) -> Any:
    def score(self: Any, x: float) -> float:
        return float(original(self, x) + 0.5)

    return score


DOUBLE = Replacement("fakelib.core", "double", _double, "ours")
SCORE = Replacement("fakelib.core", "Model.score", _score, "ours")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """``library(*replacements)`` installs fakelib 1.4, where user code imported by value."""

    def install(*replacements: Replacement, supported: str = ">=1.4,<1.5") -> ModuleType:
        core, user = ModuleType("fakelib.core"), ModuleType("user_of_fakelib")
        exec(SOURCE, core.__dict__)
        user.renamed = core.double  # type: ignore[attr-defined]
        recipe = ModuleType("deeprec.integrations.fakelib")
        recipe.PEER = Peer("fakelib", supported, replacements)  # type: ignore[attr-defined]
        for module in (core, user, recipe):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(sys.modules, "fakelib", ModuleType("fakelib"))
        monkeypatch.setattr(patching, "TARGETS", ("fakelib",))
        versions = {"fakelib": "1.4.2"}

        def version(name: str) -> str:
            if name in versions:
                return versions[name]
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", version)
        return core

    yield install  # type: ignore[misc]
    deeprec.unpatch()


def user() -> Any:
    return sys.modules["user_of_fakelib"]


def test_every_module_that_holds_the_function_is_patched_and_restored(library: Any) -> None:
    core = library(DOUBLE, SCORE)
    assert user().renamed(3) == 6
    with deeprec.patch("fakelib"):
        assert core.double(3) == user().renamed(3) == 6.5
        assert core.Model().score(1) == 2.5
    assert core.double(3) == user().renamed(3) == 6
    assert core.Model().score(1) == 2


def test_a_module_imported_under_the_patch_is_restored_too(library: Any) -> None:
    core = library(DOUBLE)
    handle = deeprec.patch("fakelib")
    user().late = core.double  # what `from fakelib.core import double` does now
    assert user().late(3) == 6.5
    handle.unpatch()
    assert user().late(3) == 6


def test_places_others_have_replaced_since_are_left_alone(library: Any) -> None:
    core = library(DOUBLE)
    with deeprec.patch("fakelib"):
        core.double = len
    assert core.double is len
    assert user().renamed(3) == 6


def test_explain_names_places_calls_and_reasons(library: Any) -> None:
    core = library(DOUBLE)
    assert "nothing is patched" in explain()
    with deeprec.patch("fakelib"):
        core.double(1)
        core.double(2)
        user().renamed(-1)
        text = explain()
    assert "fakelib 1.4.2" in text
    assert "fakelib.core.double -> ours: 2 calls" in text
    assert "passed on 1 times: negative" in text
    assert "also in user_of_fakelib.renamed" in text
    assert "nothing is patched" in explain()


def test_patching_twice_is_an_error_and_changes_nothing(library: Any) -> None:
    core = library(DOUBLE)
    with deeprec.patch("fakelib"):
        with pytest.raises(RuntimeError, match="patched already"):
            deeprec.patch("fakelib")
        assert core.double(3) == 6.5
    assert core.double(3) == 6
    with deeprec.patch("fakelib"):  # and once more after the end of the first
        assert core.double(3) == 6.5


def test_a_failure_half_way_is_rolled_back(library: Any) -> None:
    class Frozen(ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            raise OSError("read-only")

    core = library(DOUBLE, SCORE)
    original, method = core.double, core.Model.score
    frozen = Frozen("zz_frozen")
    frozen.__dict__["held"] = original
    sys.modules["zz_frozen"] = frozen
    try:
        with pytest.raises(OSError, match="read-only"):
            deeprec.patch("fakelib")
    finally:
        del sys.modules["zz_frozen"]
    assert core.double is user().renamed is original
    assert core.Model.score is method
    assert "nothing is patched" in explain()


@pytest.mark.parametrize("missing", ["triple", "Model.rank", "Other.score"])
def test_a_missing_function_patches_nothing(library: Any, missing: str) -> None:
    core = library(DOUBLE, Replacement("fakelib.core", missing, _score, "ours"))
    with pytest.raises(RuntimeError, match=rf"has no fakelib.core.{missing}"):
        deeprec.patch("fakelib")
    assert core.double(3) == 6


def test_another_signature_patches_nothing(library: Any) -> None:
    def other(original: Any, usage: Usage) -> Any:
        return lambda x, times=3: x

    core = library(SCORE, Replacement("fakelib.core", "double", other, "ours"))
    with pytest.raises(RuntimeError, match=r"parameters \(x, times=2\)"):
        deeprec.patch("fakelib")
    assert core.Model().score(1) == 2


def test_an_untested_version_names_both_and_the_remedy(library: Any) -> None:
    core = library(DOUBLE, supported="==1.3.*")
    with pytest.raises(RuntimeError, match=r'1\.4\.2 is installed.*pip install "fakelib==1.3'):
        deeprec.patch("fakelib")
    assert core.double(3) == 6


@pytest.mark.parametrize(
    ("target", "tested", "newer"),
    [
        ("trl", "1.16.0", "1.17.0"),
        ("verl", "0.9.1", "0.10.0"),
        ("openrlhf", "0.11.2", "0.12.0"),
        ("recbole", "1.2.1", "1.2.2"),
    ],
)
def test_the_versions_of_every_library(
    monkeypatch: pytest.MonkeyPatch, target: str, tested: str, newer: str
) -> None:
    peer = importlib.import_module(f"deeprec.integrations.{target}").PEER
    assert tested in SpecifierSet(peer.supported)
    monkeypatch.setattr(metadata, "version", lambda name: newer)
    with pytest.raises(RuntimeError, match=rf"{newer} is installed; nothing was patched. pip"):
        deeprec.patch(target)
    assert "nothing is patched" in explain()


def test_a_library_that_is_not_installed(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library(DOUBLE)
    recipe = ModuleType("deeprec.integrations.fakelib")
    recipe.PEER = Peer("absent", ">=1", ())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, recipe.__name__, recipe)
    with pytest.raises(ImportError, match=r"not installed: pip install"):
        deeprec.patch("fakelib")


@pytest.mark.parametrize("call", [deeprec.patch, deeprec.unpatch])
def test_unknown_targets(call: Any) -> None:
    with pytest.raises(ValueError, match="target must be one of trl, verl, openrlhf, recbole"):
        call("torch")


def test_unpatch_of_what_is_not_patched_does_nothing() -> None:
    deeprec.unpatch()
    deeprec.unpatch("trl")


def test_ours_pickle_by_the_name_they_are_found_under(library: Any) -> None:
    core = library(DOUBLE)
    with deeprec.patch("fakelib"):
        assert pickle.loads(pickle.dumps(core.double)) is core.double
        assert core.double.__wrapped__(3) == 6
