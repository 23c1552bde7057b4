"""The index shared by processes answers as one index over all items."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from search_in_processes import misuse, search

from deeprec.ops import ShardedItemIndex


@pytest.mark.parametrize("task", [search, misuse])
def test_two_processes(tmp_path: Path, task: object) -> None:
    mp.spawn(task, (2, f"file://{tmp_path}/store", str(tmp_path / "index")), nprocs=2)


def test_without_processes() -> None:
    with pytest.raises(RuntimeError, match="start with torchrun"):
        ShardedItemIndex(torch.zeros(3, 2))
