"""``metrics.json`` and the records of conversations."""

import json

import numpy as np
import pytest

from deeprec.data import Catalog
from deeprec.eval import METRICS, build_results, conversation_record, evaluate_ranking
from deeprec.eval.results import replace_text, write_results
from deeprec.rewards import Rewards
from deeprec.rollout.protocol import final_list_text, observation_text
from deeprec.rollout.types import Trajectory, Turn


def systems():
    rng = np.random.default_rng(0)
    return {
        name: evaluate_ranking(rng.integers(1, 30, (60, 10)), np.ones(60, dtype=int))
        for name in ("trm", "policy_stage2")
    }


def test_the_table_has_the_documented_shape(tmp_path):
    results = build_results(systems(), [("policy_stage2", "trm")])
    write_results(tmp_path / "metrics.json", results)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read == results
    assert set(read["systems"]) == {"trm", "policy_stage2"}
    assert tuple(read["systems"]["trm"]) == METRICS
    assert set(read["systems"]["trm"]["ndcg@10"]) == {"mean", "low", "high"}
    assert set(read["paired"]["policy_stage2_vs_trm"]["ndcg@10"]) >= {"difference", "low", "p"}
    assert read["users"] == {"trm": 60, "policy_stage2": 60}


def test_an_unknown_system_raises():
    with pytest.raises(ValueError, match="stage3"):
        build_results(systems(), [("stage3", "trm")])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    replace_text(path, "old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_results(tmp_path / "metrics.json", {"mean": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_reads_in_titles():
    catalog = Catalog(("A", "B", "C"), (("x",), (), ("y",)), ("1", "2", "3"))
    text = (
        "First idea.\n<|begin_of_preference|>x; y<|end_of_preference|>"
        + observation_text(["A", "B"])
        + "Another.\n<|begin_of_preference|>y<|end_of_preference|>"
        + observation_text(["C"])
        + "Ranking.\n</think>\n"
        + final_list_text(["C", "A", "Z"])
    )
    trajectory = Trajectory(
        user=np.int64(3),
        target=np.int64(1),
        history=[2],
        prompt_ids=[0],
        turns=[Turn("x; y", [1, 2]), Turn("y", [3])],
        ranked=[3, 1, 0],
        finish="done",
        text=text,
        rewards=Rewards(-1.0, 0.5, 0.1, 0.0, 0.0, -0.4, ("list_length",)),
    )
    record = json.loads(json.dumps(conversation_record(trajectory, catalog, "policy_stage2")))
    assert record["turns"] == [
        {"reasoning": "First idea.", "preference": "x; y", "retrieved": ["A", "B"]},
        {"reasoning": "Another.", "preference": "y", "retrieved": ["C"]},
    ]
    assert record["closing"] == "Ranking." and record["ranked"] == ["C", "A", None]
    assert (record["user"], record["target"], record["history"]) == (3, "A", ["B"])
    assert record["rewards"]["broken_rules"] == ["list_length"]
