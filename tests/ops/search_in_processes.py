"""Searches of a sharded index in a spawned process; a module of its own, to be imported there."""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from leaving import end, leave

from deeprec import ItemIndex, SeenItems
from deeprec.ops import ShardedItemIndex, ShardError


def start(rank, world, address):
    dist.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    torch.set_num_threads(1)


def make_case(rank, n, dim, k, seed, dtype=torch.float32, batch=None, shift=0.0):
    """The same items everywhere, queries and exclusions of the process's own."""
    rng = torch.Generator().manual_seed(seed)
    items = torch.randint(-3, 4, (n, dim), generator=rng).float()  # small integers: many ties
    items = items + torch.randn(n, 1, generator=rng) * (torch.rand(n, 1, generator=rng) < 0.5)
    own = torch.Generator().manual_seed(100 * seed + rank)
    batch = 3 + 4 * rank if batch is None else batch
    queries = torch.randint(-2, 3, (batch, dim), generator=own).float()
    seen = [torch.randint(0, n, (int(7 * j % 11),), generator=own).tolist() for j in range(batch)]
    return (items + shift).to(dtype), queries + shift, k, SeenItems.from_lists(seen)


def assert_same(got, expected):
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.values.view(torch.int32), expected.values.view(torch.int32))


def search(rank, world, address, folder):
    start(rank, world, address)
    cases = [
        (make_case(rank, 1700, 24, 20, 0), "ip"),
        (make_case(rank, 1700, 24, 20, 1, torch.bfloat16), "ip"),
        (make_case(rank, 1300, 7, 5, 2), "ip"),
        (make_case(rank, 9, 8, 20, 3), "ip"),  # fewer items than k
        (make_case(rank, 1, 8, 3, 4), "ip"),  # a process without items
        (make_case(rank, 600, 8, 4, 5, batch=5 * rank), "ip"),  # one without queries
        (make_case(rank, 700, 16, 10, 6, shift=0.25), "cosine"),
    ]
    for (items, queries, k, seen), metric in cases:
        whole = ItemIndex(items, metric=metric)
        shared = ShardedItemIndex.from_whole(items, metric=metric)
        assert len(shared) == len(whole)
        for exclude in (None, seen):
            assert_same(shared.search(queries, k, exclude), whole.search(queries, k, exclude))
    everything = SeenItems.from_lists([range(len(items))] * len(queries))
    assert_same(shared.search(queries, k, everything), whole.search(queries, k, everything))
    # parts of different sizes
    first = [0, 650, 700][rank : rank + 2]
    uneven = ShardedItemIndex(items[first[0] : first[1]], metric="cosine")
    assert_same(uneven.search(queries, k, seen), whole.search(queries, k, seen))
    uneven.save(folder)
    again = ShardedItemIndex.load(folder)
    assert again.first == first[0] and again.local.nbytes == uneven.local.nbytes
    assert_same(again.search(queries, k, seen), whole.search(queries, k, seen))
    # a finite score that overflows is still an item
    huge = torch.full((4, 8), 3e38) * torch.tensor([[-1.0], [1.0], [-1.0], [1e-30]])
    ask, none = torch.full((1, 8), 3e38), SeenItems.from_lists([[1]])
    for exclude in (None, none):
        assert_same(
            ShardedItemIndex.from_whole(huge).search(ask, 6, exclude),
            ItemIndex(huge).search(ask, 6, exclude),
        )
    leave()


def misuse(rank, world, address, folder):
    start(rank, world, address)
    items, queries, k, seen = make_case(rank, 60, 8, 5, 0)
    index = ShardedItemIndex.from_whole(items)
    index.save(folder)
    dist.barrier()
    if rank == 0:
        (Path(folder) / "part-00001-of-00002.safetensors").unlink()
    dist.barrier()
    with pytest.raises(ShardError, match=r"part-00001-of-00002.safetensors is missing; in its"):
        ShardedItemIndex.load(folder)
    # A mistake in one process is an error in all, and the index still works.
    wrong = queries[:, :7] if rank == 1 else queries
    with pytest.raises(ValueError if rank else ShardError, match="queries must have shape"):
        index.search(wrong, k)
    with pytest.raises(IndexError if rank else ShardError, match="items are 0 … 59"):
        index.search(queries, k, SeenItems.from_lists([[60 if rank else 1]] * len(queries)))
    with pytest.raises(ValueError, match=r"k must be the same in every process, got \[5, 6\]"):
        index.search(queries, 5 + rank)
    with pytest.raises(ShardError, match="parts must agree in dimension"):
        ShardedItemIndex(items[:, : 8 - rank])
    with pytest.raises(ShardError if rank else ValueError, match="holds NaN"):
        ShardedItemIndex(items / (items * 0 + rank))
    assert_same(index.search(queries, k, seen), ItemIndex(items).search(queries, k, seen))
    if rank == 1:
        dist.destroy_process_group()  # gone
        end()
    with pytest.raises(ShardError, match="is gone or does not answer"):
        for _ in range(3):
            index.search(queries, k, seen)
    end()
