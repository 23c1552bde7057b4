"""A small world: items of four genres, users who stay in one, an encoder that reads words."""

from __future__ import annotations

import numpy as np
import pytest
from small_world import GENRES, WordEncoder

from deeprec.data import Catalog, Dataset, LoadReport

N_ITEMS = 40
N_USERS = 100


@pytest.fixture
def encoder() -> WordEncoder:
    return WordEncoder()


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Item i is of genre (i - 1) % 4; every fifth has no year, every seventh no category."""
    items = range(1, N_ITEMS + 1)
    return Catalog(
        titles=tuple(f"Night {i}" + (f" ({1980 + i})" if i % 5 else "") for i in items),
        categories=tuple((GENRES[(i - 1) % 4],) if i % 7 else () for i in items),
        keys=tuple(str(i) for i in items),
    )


@pytest.fixture(scope="session")
def dataset(catalog: Catalog) -> Dataset:
    """Users take 6 to 9 items, three in four of them of one genre."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(N_USERS):
        own = rng.random(N_ITEMS) < np.where(np.arange(N_ITEMS) % 4 == user % 4, 0.75, 0.06)
        taken = rng.permutation(np.flatnonzero(own) + 1)[:9]
        spare = np.setdiff1d(np.arange(1, N_ITEMS + 1), taken)
        rows.append(np.concatenate([taken, rng.permutation(spare)[: max(0, 6 - len(taken))]]))
    offsets = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64)
    items = np.concatenate(rows).astype(np.int64)
    report = LoadReport(source="made up", format="none")
    return Dataset(catalog, offsets, items, np.arange(len(items), dtype=np.int64), report)
