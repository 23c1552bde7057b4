"""The other libraries, each installed for itself and patched in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deeprec

HERE = Path(__file__).parent

# Without their dependencies: what they need for what is patched is here already, or a stub.
PACKAGES = {
    "recbole": ("recbole==1.2.1", "colorama", "colorlog", "texttable", "tabulate", "thop"),
    "verl": ("verl==0.9.1", "tensordict==0.10.0", "pyvers", "orjson", "cloudpickle"),
    "openrlhf": ("openrlhf==0.11.2",),
}


@pytest.mark.peers
@pytest.mark.parametrize("peer", PACKAGES)
def test_side_by_side(peer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if peer == "recbole" and sys.version_info >= (3, 12):
        pytest.skip("RecBole 1.2.1 needs Python 3.11 or older")
    place = tmp_path_factory.mktemp(peer)
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place)], peer)
    paths = [str(Path(deeprec.__file__).parents[1]), str(place), os.environ.get("PYTHONPATH", "")]
    check = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*check, str(HERE / "peers" / f"check_{peer}.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def run(install: list[str], peer: str) -> None:
    done = subprocess.run(
        [*install, *PACKAGES[peer]], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"pip could not install {peer}:\n{done.stdout}{done.stderr}"
