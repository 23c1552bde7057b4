"""Training examples: every position of every user's sequence, cut out of it on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deeprec.data import Dataset
from deeprec.trm.phrases import Int64Array, TextEncoder

# Batches are cut from this many at once, sorted by length, so that little padding is computed.
SORTED_TOGETHER = 16


class WrittenPreference(NamedTuple):
    """A preference that a policy wrote before ``dataset`` item ``position`` of ``user``.

    ``position`` counts the user's interactions from 0; the example's target is the item there.
    """

    user: int
    position: int
    text: str


class Batch(NamedTuple):
    """``rows`` of ``dataset.items`` come next; history is padded with 0 on the right.

    The targets are those items, or some that soon follow them.
    """

    rows: Int64Array
    history: Int64Array
    lengths: Int64Array
    targets: Int64Array


class Examples:
    """The last ``per_user`` examples of each user, without the last ``held_out`` items.

    An epoch takes the item after the target in its place with probability ``lookahead``, the one
    after that with its square, and so on. Items of one evening have no order that matters, and a
    history says nearly as much about the next three as about the next one (the dense all-action
    loss of PinnerFormer, Pancha et al., arXiv 2205.04507).
    """

    def __init__(
        self,
        dataset: Dataset,
        held_out: int,
        max_length: int,
        per_user: int | None = None,
        lookahead: float = 0.0,
    ) -> None:
        self._items = dataset.items
        self._max_length = max_length
        self._lookahead = lookahead
        starts = np.repeat(dataset.offsets[:-1], np.diff(dataset.offsets))
        ends = np.repeat(dataset.offsets[1:], np.diff(dataset.offsets)) - held_out
        rows = np.arange(len(dataset.items))
        self.position = rows - starts
        used = (self.position > 0) & (rows < ends)
        if per_user is not None:
            used &= rows >= ends - per_user
        self.rows = rows[used]
        self._last = ends - 1
        if not len(self.rows):
            raise ValueError(
                f"no training examples: no user has more than {held_out + 1} interactions, and "
                f"the last {held_out} of each are held out; use a data set with longer sequences"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Int64Array) -> Batch:
        """The examples whose targets are these rows of ``dataset.items``."""
        lengths = np.minimum(self.position[rows], self._max_length)
        steps = np.arange(int(lengths.max()))
        source = (rows - lengths)[:, None] + steps
        real = steps < lengths[:, None]
        history = np.where(real, self._items[np.where(real, source, 0)], 0)
        return Batch(rows, history, lengths, self._items[rows])

    def epoch(self, size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """All examples once, in random batches of similar lengths."""
        order = rng.permutation(self.rows)
        together = size * SORTED_TOGETHER
        for chunk in np.split(order, range(together, len(order), together)):
            by_length = chunk[np.argsort(self.position[chunk].clip(max=self._max_length))]
            batches = np.split(by_length, range(size, len(chunk), size))
            for which in rng.permutation(len(batches)):
                batch = self.batch(batches[which])
                if self._lookahead:
                    skipped = rng.geometric(1.0 - self._lookahead, len(batch.rows)) - 1
                    later = np.minimum(batch.rows + skipped, self._last[batch.rows])
                    batch = batch._replace(targets=self._items[later])
                yield batch


class WrittenPreferences:
    """The vectors of policy-written preferences, by the example they belong to."""

    def __init__(
        self, dataset: Dataset, written: Sequence[WrittenPreference], encoder: TextEncoder
    ) -> None:
        rows = np.empty(len(written), dtype=np.int64)
        for n, (user, position, _) in enumerate(written):
            first, end = dataset.offsets[user], dataset.offsets[user + 1]
            if not 0 < position < end - first:
                raise ValueError(
                    f"extra_preferences[{n}]: position must be in 1..{end - first - 1} for user "
                    f"{user}, got {position}"
                )
            rows[n] = first + position
        order = np.argsort(rows, kind="stable")
        self._rows = rows[order]
        texts = [written[n].text for n in order]
        self._vectors = encoder.encode(texts, query=True) if texts else torch.zeros(0, encoder.dim)

    def replace(
        self, vectors: Tensor, rows: Int64Array, share: float, rng: np.random.Generator
    ) -> None:
        """Put a written preference into ``share`` of the ``rows`` that have one, in place."""
        first = np.searchsorted(self._rows, rows, side="left")
        count = np.searchsorted(self._rows, rows, side="right") - first
        where = np.flatnonzero((count > 0) & (rng.random(len(rows)) < share))
        pick = first[where] + rng.integers(0, count[where])
        vectors[torch.from_numpy(where)] = self._vectors[torch.from_numpy(pick)]
