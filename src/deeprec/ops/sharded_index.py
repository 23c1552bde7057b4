"""An item table spread over the processes of a group: local exact top-k, merged exactly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deeprec.ops.index import ItemIndex, Metric, PrefilterChoice
from deeprec.ops.seen import SeenItems
from deeprec.ops.topk import TopK, as_queries, check_search

__all__ = ["ShardError", "ShardedItemIndex"]

T = TypeVar("T")


class ShardError(RuntimeError):
    """A shard is missing, does not fit the others, or its process does not answer."""


class ShardedItemIndex:
    """Items ``[N, D]`` of which every process of a group holds a contiguous part.

    Answers are those of one :class:`ItemIndex` over all items, bit for bit: item indices count
    through the parts in the order of ranks. Every method is collective: all processes of the group
    call it together.

    A search sends every query to every process, 4 D bytes each (and 8 for an excluded item), and
    returns 12 k bytes a query and process; items stay where they are.

    Args:
        items: this process's part ``[n, D]``, as :class:`ItemIndex` takes them; it may be empty,
            not all of them.
        metric: "ip" or "cosine", the same everywhere.
        prefilter: as :class:`ItemIndex`.
        group: processes that share the table; None is all of them.

    Raises:
        TypeError, ValueError: this process's items do not fit.
        ShardError: another's do not, or parts differ in dimension, dtype or metric.
    """

    def __init__(
        self,
        items: Tensor | np.ndarray,
        *,
        metric: Metric = "ip",
        prefilter: PrefilterChoice = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._open(lambda: ItemIndex(items, metric=metric, prefilter=prefilter), group)

    @classmethod
    def from_whole(
        cls,
        items: Tensor | np.ndarray,
        *,
        metric: Metric = "ip",
        prefilter: PrefilterChoice = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> ShardedItemIndex:
        """Share out a table that every process has, in parts of equal size up to one."""
        count, rank = _group_size(group), dist.get_rank(group)
        first, last = (len(items) * edge // count for edge in (rank, rank + 1))
        return cls(items[first:last], metric=metric, prefilter=prefilter, group=group)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write this process's part into ``folder``, which all processes share."""
        with _together("save the index", self._group):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._local.save(_part(folder, self._rank, self._count))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        verify: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> ShardedItemIndex:
        """Map a saved index, by as many processes as saved it.

        Raises ShardError everywhere, naming the file, where a part is missing.
        """
        index = cls.__new__(cls)
        path = _part(folder, dist.get_rank(group), _group_size(group))

        def read() -> ItemIndex:
            if not path.is_file():
                found = sorted(file.name for file in Path(folder).glob("part-*"))
                raise ShardError(
                    f"{path} is missing; in its folder: {', '.join(found) or 'no part of an index'}"
                    ". Copy it there, start as many processes as saved the index, or build it again"
                )
            return ItemIndex.load(path, verify=verify)

        index._open(read, group)
        return index

    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        exclude: SeenItems | None = None,
        *,
        backend: str | None = None,
    ) -> TopK:
        """The k best of all items for this process's queries ``[B, D]``, B its own, maybe 0.

        ``exclude`` and the answer hold indices into the whole table. See :func:`topk_retrieve`.
        Raises ShardError where another process's arguments are wrong or it does not answer.
        """
        with _together("search", self._group):
            asked = as_queries(queries, self._local.items)
            offsets, ids = check_search(asked, k, exclude)
            if (
                ids is not None
                and len(ids)
                and not 0 <= int(ids.min()) <= int(ids.max()) < len(self)
            ):
                raise IndexError(
                    f"exclude holds ids from {int(ids.min())} to {int(ids.max())}, but the items "
                    f"are 0 … {len(self) - 1}"
                )
        if offsets is None or ids is None:
            offsets = asked.new_zeros(len(asked) + 1, dtype=torch.int64)
            ids = offsets[:0]
        sizes = self._gather_sizes(len(asked), len(ids), k)
        if bool((sizes[:, 2] != k).any()):
            raise ValueError(f"k must be the same in every process, got {sizes[:, 2].tolist()}")
        every = torch.cat(self._gather(asked, sizes[:, 0]))
        rows = torch.cat(self._gather(offsets.diff(), sizes[:, 0]))
        excluded = torch.cat(self._gather(ids, sizes[:, 1]))
        found = self._local.search(every, k, self._mine(rows, excluded), backend=backend)
        return self._merge(found, sizes[:, 0].tolist(), k)

    @property
    def local(self) -> ItemIndex:
        """This process's part."""
        return self._local

    @property
    def first(self) -> int:
        """Index in the whole table of this process's first item."""
        return self._starts[self._rank]

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        last = self.first + len(self._local)
        return (
            f"ShardedItemIndex({len(self)} items, {self.first} … {last - 1} here, "
            f"{self._count} processes)"
        )

    # ---- building ----

    def _open(self, make: Callable[[], ItemIndex], group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._count, self._rank = _group_size(group), dist.get_rank(group)
        with _together("build the index", group):
            self._local = make()
        local = self._local
        mine = (len(local), local.dim, str(local.items.dtype), local.metric)
        parts = _everyone(mine, group)
        odd = [rank for rank, part in enumerate(parts) if part[1:] != parts[0][1:]]
        if odd:
            raise ShardError(
                f"parts must agree in dimension, dtype and metric: process 0 has {parts[0][1:]}, "
                f"process {odd[0]} {parts[odd[0]][1:]}"
            )
        self._starts = [0, *np.cumsum([part[0] for part in parts]).tolist()]

    # ---- communication ----

    def _gather_sizes(self, *numbers: int) -> Tensor:
        """int64 ``[processes, len(numbers)]``, on the CPU."""
        mine = torch.tensor(numbers, device=self._local.items.device)
        return torch.stack(self._gather(mine, torch.full((self._count,), len(mine)))).cpu()

    def _gather(self, tensor: Tensor, lengths: Tensor) -> list[Tensor]:
        """``tensor`` of every process; ``lengths`` are those of their first dimensions."""
        longest = int(lengths.max())
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self._count)]
        with _naming_lost("search"):
            dist.all_gather(parts, padded, group=self._group)
        return [part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)]

    def _mine(self, rows: Tensor, excluded: Tensor) -> SeenItems:
        """The excluded items of this part, numbered within it."""
        here = (excluded >= self.first) & (excluded < self.first + len(self._local))
        query = torch.repeat_interleave(rows)[here]
        counts = torch.bincount(query, minlength=len(rows))
        return SeenItems(
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]), excluded[here] - self.first
        )

    def _merge(self, found: TopK, counts: list[int], k: int) -> TopK:
        """This process's answers out of what every part has found for them."""
        indices = torch.where(found.indices >= 0, found.indices + self.first, -1)
        here = counts[self._rank]
        received = []
        for tensor in (found.values, indices):
            whole = tensor.new_empty(self._count * here, k)
            with _naming_lost("search"):
                dist.all_to_all_single(
                    whole, tensor.contiguous(), [here] * self._count, counts, group=self._group
                )
            received.append(whole.view(self._count, here, k).transpose(0, 1).flatten(1))
        values, indices = received
        # Parts lie in the order of their indices and each is sorted: stable sorts by value keep
        # equal ones in order. A real value of -inf comes before a missing one.
        order = (values + 0.0).sort(dim=1, descending=True, stable=True).indices
        missing = (indices.gather(1, order) < 0).to(torch.uint8)
        order = order.gather(1, missing.sort(dim=1, stable=True).indices)[:, :k]
        return TopK(values.gather(1, order), indices.gather(1, order))


def _group_size(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "a sharded index needs a process group: start with torchrun and call "
            "torch.distributed.init_process_group, or use ItemIndex in a single process"
        )
    return dist.get_world_size(group)


def _part(folder: str | os.PathLike[str], rank: int, count: int) -> Path:
    return Path(folder) / f"part-{rank:05d}-of-{count:05d}.safetensors"


def _everyone(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """``value`` of every process of the group."""
    every: list[Any] = [None] * dist.get_world_size(group)
    with _naming_lost("agree on the index"):
        dist.all_gather_object(every, value, group=group)
    return every


@contextmanager
def _together(doing: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """What fails in one process fails in all: the others would wait for it otherwise."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    every = _everyone(None if error is None else str(error), group)
    if error is not None:
        raise error
    failed = [f"process {rank}: {message}" for rank, message in enumerate(every) if message]
    if failed:
        raise ShardError(f"cannot {doing}; {'; '.join(failed)}")


@contextmanager
def _naming_lost(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what every back end of torch.distributed raises
        raise ShardError(
            f"cannot {doing}: a process that holds a part of the items is gone or does not answer "
            f"({error}); start all of them again"
        ) from error
