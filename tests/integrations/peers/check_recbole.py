"""RecBole's evaluation with the patch on and off; run by test_peers.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import recbole_compat  # noqa: F401  # isort: skip  # before RecBole
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
from recbole.utils.case_study import full_sort_topk

import deeprec
from deeprec.integrations import explain
from deeprec.integrations.recbole import DOT_PRODUCT_MODELS

MODELS = sorted(name.rpartition(".")[2] for name in DOT_PRODUCT_MODELS)
SEARCHED = "_full_sort_batch_eval -> deeprec.ItemIndex: {} calls"
FULL = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}


@pytest.fixture(autouse=True)
def _unpatched_afterwards() -> Iterator[None]:
    yield
    deeprec.unpatch()


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 users with 4 to 40 purchases among 600 items, in RecBole's format."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "shop").mkdir()
    generator = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(1, 201):
        for moment, item in enumerate(generator.integers(1, 601, generator.integers(4, 41))):
            lines.append(f"{user}\t{item}\t{moment}")
    (folder / "shop" / "shop.inter").write_text("\n".join(lines))
    return folder


@pytest.fixture
def make(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``make("SASRec", **config)``: an untrained model with its trainer and data."""
    monkeypatch.chdir(tmp_path)  # RecBole writes its logs there

    def build(model: str, **changes: Any) -> Any:
        settings = {
            "data_path": str(shop),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": 20,
            "train_neg_sample_args": None,
            "epochs": 2,
            "eval_args": FULL,
            "eval_batch_size": 64,
            "topk": [1, 5, 10],
            "metrics": ["Recall", "NDCG", "MRR", "ShannonEntropy"],
            "valid_metric": "NDCG@10",
            "use_gpu": False,
            "state": "ERROR",
            "show_progress": False,
            "checkpoint_dir": str(tmp_path),
            **changes,
        }
        config = Config(model=model, dataset="shop", config_dict=settings)
        init_seed(1, True)
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
        network = get_model(model)(config, train.dataset)
        with torch.no_grad():  # RecBole's initial weights give almost equal scores
            network.item_embedding.weight.mul_(20)
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
        trainer.eval_collector.data_collect(train)
        return SimpleNamespace(
            model=network, trainer=trainer, dataset=dataset, train=train, valid=valid, test=test
        )

    return build


def evaluate(made: Any) -> dict[str, float]:
    init_seed(2, True)  # of sampled candidates
    return dict(made.trainer.evaluate(made.test, load_best_model=False))


@pytest.mark.parametrize("name", MODELS)
def test_every_metric_of_every_model_covered(make: Any, name: str) -> None:
    made = make(name)
    expected = evaluate(made)
    with deeprec.patch("recbole"):
        assert evaluate(made) == expected
        assert SEARCHED.format(4) in explain()
    assert len(set(expected.values())) > 3


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_a_training_run_reports_the_same(make: Any, name: str) -> None:
    """Embeddings change between evaluations, so the index must follow."""
    results = []
    for patched in (False, True):
        made = make(name, learning_rate=0.01, embedding_size=16, hidden_size=16, inner_size=32)
        if patched:
            deeprec.patch("recbole")
        best = made.trainer.fit(made.train, made.valid, saved=False, verbose=False)
        results.append((best, evaluate(made)))
    assert results[0] == results[1]
    assert "forward -> deeprec's encoder of histories: 12 calls" in explain()
    assert "training, or gradients are wanted" in explain()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SASRec", {}),
        ("SASRec", {"n_layers": 1}),
        ("SASRec", {"n_layers": 3, "hidden_act": "relu"}),
        ("GRU4Rec", {}),
        ("GRU4Rec", {"num_layers": 3}),
    ],
)
def test_scores_of_encoders(make: Any, name: str, changes: dict[str, Any]) -> None:
    made = make(name, **changes)
    made.model.eval()
    users = next(iter(made.test))[0]
    with torch.no_grad():
        theirs = made.model.full_sort_predict(users)
        with deeprec.patch("recbole"):
            ours = made.model.full_sort_predict(users)
            assert f"{name}.forward -> deeprec's encoder of histories: 1 calls" in explain()
        exact = made.model.double().full_sort_predict(users)
    error = (ours - exact).abs().max()
    assert error <= 2 * (theirs - exact).abs().max()


def test_gradients_and_training_stay_with_recbole(make: Any) -> None:
    made = make("SASRec")
    users = next(iter(made.test))[0]
    with deeprec.patch("recbole"):
        assert made.model.eval().full_sort_predict(users).requires_grad
        made.model.train()
        with torch.no_grad():
            made.model.full_sort_predict(users)
        assert "passed on 2 times: training, or gradients are wanted" in explain()


def test_histories_that_are_not_padded_on_the_right(make: Any) -> None:
    made = make("SASRec")
    made.model.eval()
    history, lengths = torch.zeros(2, 20, dtype=torch.long), torch.tensor([3, 2])
    history[0, :3], history[1, 1:3] = 5, 7
    with torch.no_grad():
        expected = made.model.forward(history, lengths)
        with deeprec.patch("recbole"):
            assert torch.equal(made.model.forward(history, lengths), expected)
            assert "histories that are empty or not padded on the right" in explain()


def test_top_k_of_chosen_users(make: Any) -> None:
    made = make("SASRec")
    users = np.array([7, 3, 150])
    theirs = full_sort_topk(users, made.model, made.test, 10)
    with deeprec.patch("recbole"):
        ours = full_sort_topk(users, made.model, made.test, 10)
        assert "full_sort_topk -> deeprec.ItemIndex: 1 calls" in explain()
    torch.testing.assert_close(ours.values, theirs.values)
    assert torch.equal(ours.indices, theirs.indices)


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("SASRec", {"metrics": ["GAUC"], "valid_metric": "GAUC"}, "metrics need rec.meanrank"),
        ("SASRec", {"topk": [601]}, "k is as large as the catalogue"),
        ("BERT4Rec", {}, "BERT4Rec is not one of the models covered"),
    ],
)
def test_what_is_passed_on(make: Any, name: str, changes: dict[str, Any], reason: str) -> None:
    made = make(name, **changes)
    expected = evaluate(made)
    with deeprec.patch("recbole"):
        assert evaluate(made) == pytest.approx(expected)
        assert reason in explain()


def test_modified_trainers_and_models_see_scores(make: Any) -> None:
    made = make("SASRec")
    shapes = []

    class OwnTrainer(type(made.trainer)):
        def _full_sort_batch_eval(self, batched_data: Any) -> Any:
            result = super()._full_sort_batch_eval(batched_data)
            shapes.append(result[1].shape)
            return result

    expected = evaluate(made)
    made.trainer.__class__ = OwnTrainer
    with deeprec.patch("recbole"):
        assert evaluate(made) == expected
        assert "the trainer or its collector is a modified one" in explain()
    assert shapes[0] == (64, 601)


def test_sampled_candidates_are_untouched(make: Any) -> None:
    made = make("SASRec", eval_args={**FULL, "mode": "uni20"})
    expected = evaluate(made)
    with deeprec.patch("recbole"):
        assert evaluate(made) == expected
        assert SEARCHED.format(0) in explain()
