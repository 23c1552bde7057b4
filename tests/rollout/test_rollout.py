"""Conversations: how they go, how they end, and what is written down."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_world import (
    TITLES,
    FakeEncoder,
    FakeTRM,
    PlainPrompt,
    ScriptedEngine,
    make_model,
    make_requests,
    reference_logprobs,
)
from transformers import PreTrainedTokenizerFast

from deeprec.data import Catalog
from deeprec.rollout import (
    EngineError,
    EnvironmentOptions,
    RetrievalEnvironment,
    SamplingConfig,
    ToolError,
    Trajectory,
    TransformersEngine,
    rollout,
)
from deeprec.rollout.protocol import LIST_OPEN, final_list_text

ASK = "Search.<|begin_of_preference|>{}<|end_of_preference|>"


def talk(*turns: str) -> Callable[[Any, int], str]:
    return lambda conversation, turn: turns[turn]


@pytest.fixture
def env(catalog: Catalog, word_tokenizer: PreTrainedTokenizerFast) -> RetrievalEnvironment:
    return RetrievalEnvironment(
        FakeTRM(), catalog, FakeEncoder(), k=5, max_calls=2, prompts=PlainPrompt(word_tokenizer)
    )


def one(
    env: RetrievalEnvironment, tokenizer: PreTrainedTokenizerFast, *turns: str
) -> tuple[Trajectory, ScriptedEngine]:
    engine = ScriptedEngine(tokenizer, talk(*turns))
    (trajectory,) = rollout(engine, env, make_requests(1), samples_per_user=1)
    assert engine.released[0] == 0
    return trajectory, engine


def test_a_whole_conversation(
    env: RetrievalEnvironment, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    ending = "Done.</think>\n" + final_list_text(["Heat", "No such film", " Big "])
    asks = [ASK.format(' old; "new" '), ASK.format("like Heat")]
    trajectory, engine = one(env, word_tokenizer, *asks, ending)
    requests = make_requests(1)
    assert trajectory.user == 10 and trajectory.target == requests.targets[0]
    assert trajectory.history == requests.history[0, : requests.lengths[0]].tolist()
    assert trajectory.finish == "done"
    assert [turn.preference for turn in trajectory.turns] == ['old; "new"', "like Heat"]
    first, second = (turn.retrieved for turn in trajectory.turns)
    assert len(first) == len(second) == 5 and not set(first) & set(second)
    assert trajectory.ranked == [4, 0, 6]
    decode = engine.text.decode
    listed = [decode(trajectory.response_ids[i : i + 1]) for i in trajectory.list_positions]
    assert (listed[0], listed[2]) == ("Heat", "Big")
    assert trajectory.text == decode(trajectory.response_ids)
    assert trajectory.prompt_ids == engine.requests[0].tokens


def test_the_mask_tells_the_policys_tokens_from_the_tools(
    env: RetrievalEnvironment, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    trajectory, engine = one(env, word_tokenizer, ASK.format("old"), "no list<eos>")
    n = len(trajectory.response_ids)
    assert n == len(trajectory.policy_mask) == len(trajectory.logprobs) == len(trajectory.allowed)
    written = [i for i, m in zip(trajectory.response_ids, trajectory.policy_mask, strict=True) if m]
    observed = [
        i for i, m in zip(trajectory.response_ids, trajectory.policy_mask, strict=True) if not m
    ]
    assert engine.text.decode(written) == ASK.format("old") + "no list<eos>"
    assert observed == engine.requests[1].tokens
    assert engine.text.decode(observed).startswith("\n\n<|begin_of_item_list|>\n1. ")
    assert trajectory.logprobs == [-1.0 if mask else 0.0 for mask in trajectory.policy_mask]
    assert trajectory.text.endswith("no list")  # the end-of-text token is no text


@pytest.mark.parametrize(
    ("turns", "finish", "calls"),
    [
        (["thinking<eos>"], "no_list", 0),
        (["thinking"], "too_long", 0),
        ([ASK.format("old"), "thinking"], "too_long", 1),
        ([ASK.format(' "" ')], "empty_preference", 0),
        ([ASK.format("old"), ASK.format("")], "empty_preference", 1),
        (["old<|end_of_preference|>"], "empty_preference", 0),
        ([ASK.format("a"), ASK.format("b"), ASK.format("c")], "too_many_calls", 2),
        ([final_list_text(["Big"])], "done", 0),
        ([final_list_text([])], "done", 0),
    ],
)
def test_every_ending_has_its_name(
    env: RetrievalEnvironment,
    word_tokenizer: PreTrainedTokenizerFast,
    turns: list[str],
    finish: str,
    calls: int,
) -> None:
    trajectory, _ = one(env, word_tokenizer, *turns)
    assert (trajectory.finish, len(trajectory.turns)) == (finish, calls)
    assert trajectory.rewards is None


def test_a_list_that_does_not_end_the_conversation(
    catalog: Catalog, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    env = RetrievalEnvironment(
        FakeTRM(),
        catalog,
        FakeEncoder(),
        prompts=PlainPrompt(word_tokenizer),
        options=EnvironmentOptions(stop_at_list=False),
    )
    trajectory, engine = one(env, word_tokenizer, final_list_text(["Big"]) + "<eos>")
    assert engine.requests[0].stop == ("<|end_of_preference|>",)
    assert (trajectory.finish, trajectory.ranked) == ("done", [6])


def test_order_seeds_and_names_are_fixed(
    env: RetrievalEnvironment, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    def script(conversation: int, turn: int) -> str:
        asks = conversation % 3
        return ASK.format("old" * (turn + 1)) if turn < asks else f"{conversation}<eos>"

    engine = ScriptedEngine(word_tokenizer, script)
    trajectories = rollout(engine, env, make_requests(5), samples_per_user=4, seed=3)
    assert [t.user for t in trajectories] == [10 + i // 4 for i in range(20)]
    assert all(t.text.endswith(str(i)) for i, t in enumerate(trajectories))
    assert [len(t.turns) for t in trajectories] == [i % 3 for i in range(20)]
    seeds = {r.conversation: r.seed for r in engine.requests}
    assert len(set(seeds.values())) == 20
    again = ScriptedEngine(word_tokenizer, script)
    rollout(again, env, make_requests(5)[[2]], samples_per_user=2, seed=3)
    assert [r.seed for r in again.requests[:2]] == [seeds[8], seeds[9]]


def test_preferences_finished_together_are_answered_together(
    env: RetrievalEnvironment, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = ScriptedEngine(word_tokenizer, talk(ASK.format("old"), "x<eos>"))
    rollout(engine, env, make_requests(4), samples_per_user=4)
    assert sum(len(call) for call in env.trm.calls) == 16
    assert len(env.trm.calls) < 16


def test_a_tool_that_fails_for_a_moment_is_asked_again(
    env: RetrievalEnvironment, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: Any
) -> None:
    answer, failures = env.observe, [ConnectionError("down"), TimeoutError("slow")]

    def observe(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return answer(*arguments)

    monkeypatch.setattr(env, "observe", observe)
    trajectory, _ = one(env, word_tokenizer, ASK.format("old"), "x<eos>")
    assert len(trajectory.turns) == 1


def test_a_tool_that_stays_down_raises_and_frees_the_engine(
    env: RetrievalEnvironment, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: Any
) -> None:
    def observe(*arguments: Any) -> Any:
        raise ConnectionError("refused")

    monkeypatch.setattr(env, "observe", observe)
    engine = ScriptedEngine(word_tokenizer, talk(ASK.format("old")))
    with pytest.raises(ToolError, match="refused"):
        rollout(engine, env, make_requests(2), samples_per_user=2)
    assert set(engine.released) == {0, 1, 2, 3}


def test_a_broken_tool_is_not_retried(
    env: RetrievalEnvironment, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: Any
) -> None:
    calls = []

    def observe(*arguments: Any) -> Any:
        calls.append(arguments)
        raise ValueError("shapes")

    monkeypatch.setattr(env, "observe", observe)
    with pytest.raises(ValueError, match="shapes"):
        one(env, word_tokenizer, ASK.format("old"))
    assert len(calls) == 1


def test_one_sample_at_least(
    env: RetrievalEnvironment, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="samples_per_user"):
        rollout(ScriptedEngine(word_tokenizer, talk()), env, make_requests(1), samples_per_user=0)


@pytest.fixture(scope="module")
def talkative_model(word_tokenizer: PreTrainedTokenizerFast) -> Any:
    """A model taught by heart a conversation's delimiters, so that a roll-out meets all of it."""
    model = make_model(vocab_size=len(word_tokenizer), seed=3)
    for parameter in model.parameters():
        parameter.data.div_(3)
    texts = [
        ASK.format("old"),
        ASK.format("new") + "\n\n<|begin_of_item_list|>\n1. Big\n<|end_of_item_list|>\n\n"
        "Done.</think>\n" + LIST_OPEN + "\n1. Big",
        "\n\n<|begin_of_item_list|>\n1. Up\n<|end_of_item_list|>\n\n" + ASK.format("like Up"),
    ]
    ids = [
        word_tokenizer("User:Big<think>\n" + text, return_tensors="pt").input_ids for text in texts
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        loss = torch.stack([model(i, labels=i).loss for i in ids]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("constrain", "distinct"), [(True, False), (False, False), (True, True)])
def test_a_real_roll_out_keeps_the_trainers_logprobs(
    catalog: Catalog,
    word_tokenizer: PreTrainedTokenizerFast,
    talkative_model: Any,
    constrain: bool,
    distinct: bool,
) -> None:
    env = RetrievalEnvironment(
        FakeTRM(),
        catalog,
        FakeEncoder(),
        k=4,
        max_calls=3,
        prompts=PlainPrompt(word_tokenizer),
        options=EnvironmentOptions(constrain_list=constrain, distinct_titles=distinct),
    )
    sampling = SamplingConfig(max_turn_tokens=60, max_tokens=300)
    engine = TransformersEngine(talkative_model, word_tokenizer, sampling, max_conversations=7)
    trajectories = rollout(engine, env, make_requests(6), samples_per_user=4, seed=5)
    assert len({t.finish for t in trajectories}) >= 3
    assert any(t.finish == "done" for t in trajectories) or not constrain
    assert max(len(t.turns) for t in trajectories) >= 2
    named = 0
    for t in trajectories:
        expected = reference_logprobs(talkative_model, t.prompt_ids, t.response_ids, t.allowed)
        mask = torch.tensor(t.policy_mask, dtype=torch.bool)
        got = torch.tensor(t.logprobs)
        torch.testing.assert_close(got[mask], expected[mask], atol=1e-3, rtol=0)
        assert not got[~mask].any()
        words = word_tokenizer.convert_ids_to_tokens(t.response_ids)
        for n, (before, word) in enumerate(pairwise(words), 1):
            if distinct and before == "like " and t.policy_mask[n]:
                assert word in TITLES and len(t.allowed[n] or ()) == len(TITLES)
                named += 1
        if constrain and t.finish == "done":
            retrieved = {item for turn in t.turns for item in turn.retrieved}
            assert len(t.ranked) == min(10, len(retrieved)) and set(t.ranked) <= retrieved
            for item, place in zip(t.ranked, t.list_positions, strict=True):
                assert engine.text.decode([t.response_ids[place]]) == TITLES[item - 1]
    assert bool(named) == distinct
    wide = TransformersEngine(talkative_model, word_tokenizer, sampling)
    alone = rollout(wide, env, make_requests(6)[[4]], samples_per_user=4, seed=5)
    assert [t.response_ids for t in alone] == [t.response_ids for t in trajectories[16:20]]


def test_the_tool_may_open_the_final_list(
    catalog: Catalog, word_tokenizer: PreTrainedTokenizerFast, talkative_model: Any
) -> None:
    env = RetrievalEnvironment(
        FakeTRM(),
        catalog,
        FakeEncoder(),
        k=3,
        max_calls=1,
        prompts=PlainPrompt(word_tokenizer),
        options=EnvironmentOptions(constrain_list=True, closing="Done.</think>\n" + LIST_OPEN),
    )
    engine = TransformersEngine(talkative_model, word_tokenizer, SamplingConfig(max_turn_tokens=60))
    trajectories = rollout(engine, env, make_requests(6), samples_per_user=2)
    called = [t for t in trajectories if t.turns]
    assert called
    for t in called:
        assert t.finish == "done" and len(t.turns) == 1
        assert sorted(t.ranked) == sorted(t.turns[0].retrieved)


class FailingEngine(TransformersEngine):
    """Stops answering in the middle of a roll-out, as often as ``failures`` says."""

    failures = 0
    steps = 0
    restarts = 0
    hangs = False

    def step(self) -> list[Any]:
        self.steps += 1
        if self.failures and self.steps >= 7:
            if self.hangs:
                return []
            self.failures -= 1
            self.steps = 0
            raise EngineError("no answer for 5 s")
        return super().step()

    def restart(self) -> None:
        self.restarts += 1
        super().restart()


@pytest.fixture
def failing(word_tokenizer: PreTrainedTokenizerFast) -> FailingEngine:
    model = make_model(vocab_size=len(word_tokenizer))
    return FailingEngine(model, word_tokenizer, SamplingConfig(max_turn_tokens=12))


def test_an_engine_that_fails_is_restarted(
    env: RetrievalEnvironment, failing: FailingEngine
) -> None:
    requests = make_requests(3)
    expected = rollout(failing, env, requests, samples_per_user=2)
    assert failing.steps > 7
    failing.failures = 2
    assert rollout(failing, env, requests, samples_per_user=2) == expected
    assert failing.restarts == 2


def test_an_engine_that_keeps_failing_is_an_error(
    env: RetrievalEnvironment, failing: FailingEngine
) -> None:
    failing.failures = 100
    with pytest.raises(EngineError, match=r"failed 3 times in one roll-out, last with: no answer"):
        rollout(failing, env, make_requests(3), samples_per_user=2)
    failing.failures = 0
    assert len(rollout(failing, env, make_requests(3), samples_per_user=2)) == 6


def test_an_engine_that_makes_no_progress_is_an_error(
    env: RetrievalEnvironment, failing: FailingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package gives the function the module's name.
    monkeypatch.setattr(sys.modules["deeprec.rollout.rollout"], "STALL_SECONDS", 0.2)
    failing.failures, failing.hangs = 1, True
    with pytest.raises(EngineError, match=r"no turn has ended for 0.2 s"):
        rollout(failing, env, make_requests(3), samples_per_user=2)
