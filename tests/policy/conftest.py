"""A small data set whose items follow one another, and a recommender without any training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policy_world import LetterEncoder, World

from deeprec.data import Catalog, Dataset, LoadReport
from deeprec.policy.prompts import TitlePrompt, TitleTokens
from deeprec.policy.tokenizer import build_title_tokenizer
from deeprec.rollout import EnvironmentOptions, RetrievalEnvironment
from deeprec.trm import PreferenceAwareTRM, TRMConfig

N_ITEMS, N_USERS = 24, 80
START, DAY = 1_400_000_000, 24 * 3600
GENRES = ("War", "Drama", "Comedy")


@pytest.fixture
def catalog() -> Catalog:
    items = range(1, N_ITEMS + 1)
    return Catalog(
        titles=tuple(f"Film {i}" + (f" ({1990 + i})" if i % 3 else "") for i in items),
        categories=tuple((GENRES[i % 3],) if i % 5 else () for i in items),
        keys=tuple(str(i) for i in items),
    )


@pytest.fixture
def world(catalog: Catalog) -> World:
    """Users walk around the circle of items from anywhere, an item every ten days."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(7, 12, N_USERS)
    items = [(rng.integers(N_ITEMS) + np.arange(n)) % N_ITEMS + 1 for n in lengths]
    times = [START + (rng.integers(100) + 10 * np.arange(n)) * DAY for n in lengths]
    dataset = Dataset(
        catalog,
        np.cumsum([0, *lengths]).astype(np.int64),
        np.concatenate(items).astype(np.int64),
        np.concatenate(times).astype(np.int64),
        LoadReport(source="made up", format="none"),
    )
    tokenizer = build_title_tokenizer(
        catalog, int(dataset.timestamps.min()), int(dataset.timestamps.max())
    )
    prompts = TitlePrompt(TitleTokens(tokenizer, catalog))
    torch.manual_seed(0)
    shape = TRMConfig(N_ITEMS, LetterEncoder.dim, hidden=8, inner=16, n_layers=1, n_experts=2)
    env = RetrievalEnvironment(
        PreferenceAwareTRM(shape).eval(),
        catalog,
        LetterEncoder(),  # type: ignore[arg-type]
        k=6,
        max_calls=3,
        prompts=prompts,
        options=EnvironmentOptions(show_categories=False, constrain_list=True),
    )
    return World(dataset, prompts, env)
