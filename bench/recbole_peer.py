"""RecBole's own evaluation of an untrained model on data with real or made-up histories."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integrations"))

PACKAGES = ("recbole==1.2.1", "colorama", "colorlog", "texttable", "tabulate", "thop")


def install(folder: Path) -> None:
    """RecBole without its dependencies, in a folder of its own; skips where that is impossible."""
    if sys.version_info >= (3, 12):
        pytest.skip("RecBole 1.2.1 needs Python 3.11 or older")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"RecBole could not be installed: {done.stderr.strip()[-200:]}")
    sys.path.append(str(folder))
    import recbole_compat  # noqa: F401


def movietweetings(folder: Path) -> None:
    """MovieTweetings 100K, as it comes with deeprec, every user and film with five ratings."""
    from deeprec.data import load_dataset

    data = load_dataset()
    users = np.repeat(np.arange(data.n_users), np.diff(data.offsets))
    # In time order already. RecBole keeps times as float32, which cannot tell seconds apart.
    rows = [
        f"{user}\t{item}\t{n}" for n, (user, item) in enumerate(zip(users, data.items, strict=True))
    ]
    _write(folder, "movietweetings", rows)


def shop(folder: Path) -> None:
    """8,000 users and 25,612 items with the short, skewed histories of a shop; nine on average."""
    generator = np.random.default_rng(0)
    rows = []
    for user in range(8_000):
        items = generator.integers(25_612, size=5 + generator.geometric(0.2))
        items[:4] = (np.arange(4) + 4 * user) % 25_612  # so that every item occurs
        rows += [f"{user}\t{item}\t{moment}" for moment, item in enumerate(items)]
    _write(folder, "shop", rows)


def _write(folder: Path, name: str, rows: list[str]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    header = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / name / f"{name}.inter").write_text("\n".join([header, *rows]))


def evaluation(
    model: str, data: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[], dict[str, float]], dict[str, Any]]:
    """RecBole's evaluation on the test users, and what it is over."""
    import recbole
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    # RecBole brings this one along.
    own = Path(recbole.__file__).parent / "dataset_example"
    settings = {
        "data_path": str(own if data == "ml-100k" else folder),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "topk": [1, 5, 10],
        "metrics": ["Recall", "NDCG", "MRR"],
        "valid_metric": "NDCG@10",
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(folder / "saved"),
    }
    # RecBole would read pytest's arguments, and writes logs into the working directory.
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    monkeypatch.chdir(folder)
    config = Config(model=model, dataset=data, config_dict=settings)
    init_seed(0, True)
    dataset = create_dataset(config)
    train, _, test = data_preparation(config, dataset)
    network = get_model(model)(config, train.dataset)
    with torch.no_grad():  # RecBole's initial weights give almost equal scores
        network.item_embedding.weight.mul_(20)
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
    trainer.eval_collector.data_collect(train)
    lengths = test.dataset[:]["item_length"].float()
    what = {
        "model": model,
        "data": data,
        "users": len(test.dataset),
        "items": dataset.item_num - 1,
        "history": f"{float(lengths.mean()):.0f}",
    }
    return lambda: dict(trainer.evaluate(test, load_best_model=False)), what
