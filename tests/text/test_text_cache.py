"""The caches of text vectors: eviction in memory; damage, races and a full disk on disk."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from deeprec.text.cache import DiskCache, MemoryCache


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)


def test_memory_keeps_the_most_recently_used() -> None:
    cache = MemoryCache(dim=4, capacity=3)
    table = torch.from_numpy(vectors(5))
    cache.add(["a", "b", "c"], table[:3])
    cache.rows(["a"])
    cache.add(["d", "e"], table[3:])
    rows = cache.rows(list("abcde"))
    assert [row >= 0 for row in rows] == [True, False, False, True, True]
    torch.testing.assert_close(cache.gather([rows[0], rows[3], rows[4]]), table[[0, 3, 4]])


def test_memory_takes_more_texts_than_it_can_keep() -> None:
    cache = MemoryCache(dim=4, capacity=2)
    table = torch.from_numpy(vectors(5))
    cache.add(list("abcde"), table)
    assert cache.rows(list("abc")) == [-1, -1, -1]
    torch.testing.assert_close(cache.gather(cache.rows(["d", "e"])), table[3:])


def test_what_memory_returns_is_a_copy() -> None:
    cache = MemoryCache(dim=4, capacity=2)
    cache.add(["a"], torch.ones(1, 4))
    cache.gather(cache.rows(["a"])).zero_()
    assert cache.gather(cache.rows(["a"])).eq(1).all()


def found(folder: Path, texts: list[str]) -> list[bool]:
    return [vector is not None for vector in DiskCache(folder).get(texts)]


def test_disk_returns_what_was_written(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new" / "folder")
    texts = ["a", "\u00e9\n", "\ud800 lone"]
    assert cache.get(texts) == [None] * 3
    cache.add(texts, vectors(3))
    for reader in (cache, DiskCache(tmp_path / "new" / "folder")):
        np.testing.assert_array_equal(np.stack(reader.get(texts)), vectors(3))
    assert found(tmp_path / "new" / "folder", ["b", "a"]) == [False, True]


def test_two_writers_both_count(tmp_path: Path) -> None:
    first, second = DiskCache(tmp_path), DiskCache(tmp_path)
    first.get(["a"])
    second.get(["a"])
    first.add(["a", "b"], vectors(2))
    second.add(["b", "c"], vectors(2, seed=1))
    second.add(["a", "b"], vectors(2))
    assert len(list(tmp_path.iterdir())) == 2
    assert found(tmp_path, ["a", "b", "c"]) == [True] * 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "noise"])
def test_damaged_files_are_reported_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    DiskCache(tmp_path).add(["a", "b"], vectors(2))
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
    elif damage == "cut":
        content = content[:-5]
    else:
        content = bytearray(b"" if damage == "empty" else os.urandom(100))
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path, ["a", "b"]) == [False, False]
    assert "damaged" in caplog.text
    assert not list(tmp_path.iterdir())
    DiskCache(tmp_path).add(["a", "b"], vectors(2))
    assert found(tmp_path, ["a", "b"]) == [True, True]


def test_a_killed_writer_leaves_nothing_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deeprec.text.cache.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        DiskCache(tmp_path).add(["a"], vectors(1))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_full_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache = DiskCache(tmp_path)
    cache.get(["a"])
    monkeypatch.setattr("deeprec.text.cache.save_file", full)
    with caplog.at_level(logging.WARNING):
        cache.add(["a"], vectors(1))
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(cache.get(["a"])[0], vectors(1)[0])  # this process still has it
