"""Evaluation: what the ablations change, and what the policies are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deeprec.data import Dataset, Requests, load_dataset
from deeprec.data.load import DataConfig
from deeprec.pipeline import evaluation
from deeprec.pipeline.config import EnvironmentConfig, RunConfig
from deeprec.pipeline.folder import RunFolder
from deeprec.pipeline.parts import Parts
from deeprec.rollout import Sample, SamplingConfig, TokenText, protocol

FIRST, SECOND = "War; like Film 01 (1991)", "Drama"


class Scripted:
    """An engine that asks twice where it may, then lists the first ten titles it has seen."""

    def __init__(self, parts: Parts) -> None:
        self.tokenizer = parts.tokenizer
        self.text = TokenText(parts.tokenizer)
        self.sampling = SamplingConfig()
        self.queue: list[Any] = []
        self.seen: dict[Any, str] = {}

    def close(self) -> None:
        pass

    def submit(self, request: Any) -> None:
        self.queue.append(request)

    def release(self, conversation: Any) -> None:
        pass

    def step(self) -> list[Sample]:
        batch, self.queue = self.queue, []
        return [self.answer(request) for request in batch]

    def answer(self, request: Any) -> Sample:
        before = self.seen.get(request.conversation, "")
        told = self.tokenizer.decode(request.tokens)
        asked = before.count(protocol.ITEMS_OPEN) + told.count(protocol.ITEMS_OPEN)
        self.seen[request.conversation] = before + told
        opened = told.endswith(protocol.LIST_OPEN)
        if asked < 2 and not opened:
            wish = (FIRST, SECOND)[asked]
            text = f"{protocol.PREFERENCE_OPEN}{wish}{protocol.PREFERENCE_CLOSE}"
            stop = protocol.PREFERENCE_CLOSE
        else:
            answers = (before + told).split(protocol.ITEMS_OPEN)[1:]
            shown = [line for a in answers for line in a.split(protocol.ITEMS_CLOSE)[0].split("\n")]
            titles = [line.partition(". ")[2] for line in shown if line][: protocol.LIST_LENGTH]
            lines = [f"\n{n + 1}. {title}" for n, title in enumerate(titles)]
            text, stop = "".join(lines) + "\n" + protocol.LIST_CLOSE, protocol.LIST_CLOSE
            if not opened:
                text = f"{protocol.THINK_CLOSE}\n{protocol.LIST_OPEN}{text}"
        (ids,) = self.text.encode([text])
        n = len(ids)
        return Sample(request.conversation, ids, [0.0] * n, [None] * n, "stop", stop)


class Asked:
    """The encoder: keeps every preference that the recommender is asked with."""

    dim = 4

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], *, query: bool = False) -> torch.Tensor:
        self.texts += texts
        return torch.ones(len(texts), self.dim)


class FirstItems(torch.nn.Module):
    """Finds the items of lowest number."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def retrieve(
        self,
        history: torch.Tensor,
        lengths: Any,
        preference: Any,
        k: int,
        *,
        exclude: Any,
        exclude_history: bool,
        cache: Any,
    ) -> SimpleNamespace:
        rows = []
        for row in range(len(history)):
            closed = set(exclude.ids[exclude.offsets[row] : exclude.offsets[row + 1]].tolist())
            closed |= set(history[row].tolist()) if exclude_history else set()
            found = [item for item in range(1, 31) if item not in closed][:k]
            rows.append(found + [-1] * (k - len(found)))
        return SimpleNamespace(indices=torch.tensor(rows))


@pytest.fixture(scope="module")
def dataset(shop: Path) -> Dataset:
    return load_dataset(DataConfig(path=str(shop)))


@pytest.fixture
def parts(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Parts whose policy is scripted and whose encoder listens."""
    config = RunConfig(environment=EnvironmentConfig(k=5, max_calls=3))
    made = Parts(config, RunFolder(tmp_path))
    made.dataset = dataset
    made.preferences = Asked()  # type: ignore[assignment]
    made._trms["valid"] = FirstItems()  # type: ignore[assignment]
    monkeypatch.setattr(made, "load_stage", lambda name: None)
    monkeypatch.setattr(made, "engine", lambda policy, sampling: Scripted(made))
    return made


@pytest.fixture
def requests(dataset: Dataset) -> Requests:
    return dataset.requests("test", users=np.arange(6))


def asked(parts: Parts) -> list[str]:
    """What the recommender was asked with since the last call."""
    texts = parts.preferences.texts  # type: ignore[attr-defined]
    kept = list(texts)
    texts.clear()
    return kept


def test_the_policy_is_taken_at_its_word(parts: Parts, requests: Requests) -> None:
    talks = evaluation._talk(parts, "stage2", requests)
    assert sorted(asked(parts)) == sorted([FIRST, SECOND] * 6)
    assert all(len(talk.turns) == 2 and talk.finish == "done" for talk in talks)
    assert all(len(talk.ranked) == 10 and 0 not in talk.ranked for talk in talks)


def test_ablations_change_what_the_recommender_is_asked(parts: Parts, requests: Requests) -> None:
    spoken = evaluation._talk(parts, "stage2", requests)
    for talk in spoken:
        for turn in talk.turns:
            turn.preference += f" of {talk.user}"
    asked(parts)
    made: dict[str, Any] = {}
    original = evaluation._talk

    def recorded(*arguments: Any, **options: Any) -> Any:
        talks = original(*arguments, **options)
        name = "single" if options.get("single_turn") else f"override {len(made)}"
        made[name] = (talks, asked(parts))
        return talks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_talk", recorded)
        results = evaluation._ablations(parts, "stage2", requests, spoken)
    assert set(results) == {"empty_preferences", "shuffled_preferences", "single_turn"}

    empty, nothing = made["override 0"]
    assert nothing == []  # no preference reaches the encoder
    assert all(turn.preference for talk in empty for turn in talk.turns)  # the words stay

    _, shuffled = made["override 1"]
    users = [talk.user for talk in spoken]
    others = [users[-1], *users[:-1]]
    for user, other in zip(users, others, strict=True):
        assert other != user
    assert sorted(shuffled) == sorted(
        f"{wish} of {other}" for other in others for wish in (FIRST, SECOND)
    )

    single, once = made["single"]
    assert once == [FIRST] * 6
    assert all(len(talk.turns) == 1 and talk.finish == "done" for talk in single)
    # As many items at once as all turns may find.
    assert all(len(talk.turns[0].retrieved) == 15 for talk in single)
    assert all(len(talk.ranked) == 10 for talk in single)


def test_each_user_gets_another_users_preferences(parts: Parts, requests: Requests) -> None:
    spoken = evaluation._talk(parts, "stage2", requests)
    for talk in spoken:
        for turn in talk.turns:
            turn.preference = f"of {talk.user}"
    given: dict[int, str | None] = {}

    def talk(*_: Any, override: Any = None, **__: Any) -> list[Any]:
        if override is not None and override(0, 0, "own"):
            given.update({row: override(row, 0, "own") for row in range(6)})
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_talk", talk)
        evaluation._ablations(parts, "stage2", requests, spoken)
    users = requests.users.tolist()
    assert sorted(given.values(), key=str) == sorted(f"of {user}" for user in users)
    assert all(given[row] != f"of {user}" for row, user in enumerate(users))


def test_targets_never_reach_the_policy(parts: Parts, requests: Requests) -> None:
    changed = replace(requests, targets=requests.targets % 30 + 1)
    for row in range(len(requests)):
        prompt = parts.prompts.build(requests, row)
        assert prompt == parts.prompts.build(changed, row)
        title = parts.dataset.catalog.title(int(requests.targets[row]))
        assert title not in parts.tokenizer.decode(prompt)


def test_answers_of_different_lengths_are_reranked(
    parts: Parts, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A history of 12 of 30 items leaves 18 to find, fewer than 20 are shown to some and not all.
    parts.config.environment.k = 20
    everyone = dataset.requests("test")
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(len(everyone), 31, generator=generator)
    logits[:, 0] = -torch.inf
    monkeypatch.setattr(evaluation, "next_item_logits", lambda *_, **__: logits)
    found = evaluation._language_model(parts, everyone)
    assert found["lm_rerank"].values["valid_rate"].all()
    assert set(found) == {"lm", "lm_rerank"}
