"""A tiny shop as CSV files, a tiny sentence encoder, and the options of a run of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import BertConfig, BertModel, BertTokenizerFast

CATEGORIES = ("War", "Drama", "Comedy", "Horror")
N_USERS, N_ITEMS = 40, 30
DAY = 24 * 3600


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users with 8 to 12 of 30 items each, as ``interactions.csv`` and ``items.csv``."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    rows = ["user_id,item_id,timestamp"]
    for user in range(N_USERS):
        taken = rng.permutation(N_ITEMS)[: rng.integers(8, 13)]
        rows += [
            f"u{user},i{item},{1_400_000_000 + (user + 5 * n) * DAY}"
            for n, item in enumerate(taken)
        ]
    (folder / "interactions.csv").write_text("\n".join(rows) + "\n")
    items = [
        f"i{n},Film {n:02d} ({1990 + n % 20}),{CATEGORIES[n % 4]}|{CATEGORIES[n % 3]}"
        for n in range(N_ITEMS)
    ]
    (folder / "items.csv").write_text("\n".join(["item_id,title,categories", *items]) + "\n")
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that knows letters and digits."""
    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=1, **shape)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def tiny_options(
    shop: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run's options as a YAML file holds them."""
    stage = {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 2, "lr": 1e-4}
    return {
        "name": "tiny",
        "threads": 1,
        "data": {"path": str(shop)},
        "encoder": {
            "model": str(encoder_folder),
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "dtype": "fp32",
        },
        "trm": {"hidden": 8, "inner": 16, "n_layers": 1, "n_experts": 2, "max_epochs": 1},
        "policy": {
            "title": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1},
            "pretrain": {"epochs": 1, "batch_size": 16, "validation_users": 20},
            "warm_start": {"conversations": 200, "learning_rate": 5e-3, "tokens_per_batch": 1024},
        },
        "environment": {"k": 10, "max_calls": 2},
        "sampling": {"max_turn_tokens": 48, "max_tokens": 300},
        "rl": {
            "train_batch": None,
            "precision": "fp32",
            "checkpoint_every": 1,
            # So small a policy ends no conversation well: rewards are all alike and teach nothing.
            "loss": {"entropy_coef": 0.1},
        },
        "stages": [
            {"name": "stage1", "reward": "cold", **stage},
            {"name": "stage2", "reward": "rec", **stage, "credit": "list_item"},
        ],
        "eval": {"users": 12, "all_users": True, "conversations": 2},
    }


@pytest.fixture
def tiny_config(tiny_options: dict[str, Any], tmp_path: Path) -> Path:
    """The tiny options in a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tiny_options))))
    return path
