"""VLLMEngine on vLLM itself. Run by ``.ci/vllm``, in an environment of its own."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import rl_world
import torch
from test_transformers_engine import check_logprobs, prompts, random_ids
from tiny_world import TITLES
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from deeprec.rewards import Rewards
from deeprec.rl import RLConfig, Trainer
from deeprec.rollout import (
    EngineError,
    ListLines,
    Request,
    Sample,
    SamplingConfig,
    Trajectory,
    VLLMEngine,
    VLLMOptions,
)
from deeprec.rollout.protocol import LIST_CLOSE, LIST_OPEN

OPTIONS = VLLMOptions(eager=True, timeout=600.0, max_conversations=16)
LONG = SamplingConfig(max_turn_tokens=9, max_tokens=400)


def make_model() -> PreTrainedModel:
    """Two heads of 32: vLLM's attention on the CPU knows no smaller ones."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=200, max_position_embeddings=4096, **shape, **heads)
    )
    for parameter in model.parameters():
        parameter.data.mul_(3)  # opinionated
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture(scope="module")
def shared_engine(
    model: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(model, word_tokenizer, LONG, options=OPTIONS)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine: VLLMEngine) -> Iterator[VLLMEngine]:
    yield shared_engine
    for name in list(shared_engine._conversations):
        shared_engine.release(name)
    shared_engine.sampling = LONG


def test_logprobs_equal_the_trainers_over_three_turns(
    engine: VLLMEngine, model: PreTrainedModel
) -> None:
    contexts = new = prompts(10)
    for turn in range(3):
        requests = [Request(i, ids, seed=i, stop=("s",)) for i, ids in enumerate(new)]
        samples = engine.generate(requests)
        for context, sample in zip(contexts, samples, strict=True):
            assert 0 < len(sample.ids) <= 9
            ends = engine.text.decode(sample.ids[-1:])
            assert (sample.finish == "stop") == ("s" in ends and ends != "<eos>")
            assert "s" not in engine.text.decode(sample.ids[:-1])
            check_logprobs(model, context, sample)
        new = [random_ids(turn + 140 + i, seed=99 + i) for i in range(10)]
        contexts = [c + s.ids + ids for c, s, ids in zip(contexts, samples, new, strict=True)]


def test_earlier_turns_come_out_of_the_prefix_cache(engine: VLLMEngine) -> None:
    """All of a conversation but its last unfinished block; samples of a prompt share that too."""
    block = engine._vllm._vllm.vllm_config.cache_config.block_size
    new = [random_ids(block + 30, seed=77)] * 3
    # Of the same prompt, the second and third conversation find the first one's whole block. The
    # last sampled token of a turn was never an input, so it is in no block.
    computed = [0, block, block]
    for turn in range(3):
        before = engine.cached_tokens
        # One after the other: of requests that start together, none finds the others' blocks.
        for i, ids in enumerate(new):
            engine.generate([Request(i, ids, seed=i)])
        assert engine.cached_tokens - before == sum(n // block * block for n in computed)
        computed = [len(engine._conversations[i].ids) - 1 for i in range(3)]
        new = [random_ids(block // 2 + 7 * i, seed=10 * turn + i) for i in range(3)]


def test_a_turn_repeats_with_its_seed(engine: VLLMEngine) -> None:
    def sample(name: int, seed: int) -> list[int]:
        ids = engine.generate([Request(name, [5, 6, 7], seed=seed)])[0].ids
        engine.release(name)
        return ids

    assert sample(0, 3) == sample(1, 3) != sample(2, 4)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_logprobs_under_the_list_constraint(
    engine: VLLMEngine,
    model: PreTrainedModel,
    word_tokenizer: PreTrainedTokenizerFast,
    top_p: float,
) -> None:
    engine.sampling = SamplingConfig(top_p=top_p, max_turn_tokens=300, max_tokens=400)
    lines = ListLines(engine.text, TITLES)
    opening = word_tokenizer("User:" + LIST_OPEN, add_special_tokens=False).input_ids
    items = [[1, 2, 3], [*range(1, 15)], [], [16]]
    requests = [
        Request(i, opening, seed=i, stop=(LIST_CLOSE,), constraints=(lines.over(found),))
        for i, found in enumerate(items)
    ]
    for sample, found in zip(engine.generate(requests), items, strict=True):
        assert sample.finish == "stop" and sample.stop == LIST_CLOSE
        check_logprobs(model, opening, sample)
        text = engine.text.decode(sample.ids)
        titles = [line.split(". ", 1)[1] for line in text.split("\n")[1:-1]]
        assert len(titles) == min(10, len(found))
        assert set(titles) <= {TITLES[item - 1] for item in found}


def test_greedy(engine: VLLMEngine, model: PreTrainedModel) -> None:
    engine.sampling = replace(LONG, greedy=True)
    prompt = random_ids(6, seed=0)
    (sample,) = engine.generate([Request(0, prompt)])
    context = torch.tensor([prompt + sample.ids])
    with torch.no_grad():
        best = model(context).logits[0, len(prompt) - 1 : -1].argmax(-1)
    assert sample.ids == best.tolist()


def test_weights_follow_the_policy_in_place(engine: VLLMEngine, model: PreTrainedModel) -> None:
    prompt = random_ids(20, seed=0)
    engine.generate([Request(0, prompt)])
    with pytest.raises(RuntimeError, match="release"):
        engine.sync_weights()
    engine.release(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    engine.sleep()
    engine.sync_weights()
    (sample,) = engine.generate([Request(1, prompt)])
    check_logprobs(model, prompt, sample)
    with pytest.raises(AssertionError):
        check_logprobs(make_model(), prompt, sample)


def signal_engine(engine: VLLMEngine, number: signal.Signals) -> None:
    """Send a signal to the processes in which vLLM computes."""
    assert len(engine._vllm._processes) >= 1
    for process in engine._vllm._processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_engine_that_stops_answering_is_started_anew(
    engine: VLLMEngine, model: PreTrainedModel, number: signal.Signals
) -> None:
    """vLLM itself would wait for a process that is dead or hangs without end."""
    engine._vllm.options = replace(OPTIONS, timeout=5.0)
    engine.submit(Request(0, random_ids(6, seed=0)))
    signal_engine(engine, number)
    with pytest.raises(EngineError, match=r"vLLM (failed|has not answered for 5 s)"):
        while True:
            engine.step()
    engine._vllm.options = OPTIONS
    processes = engine._vllm._processes
    engine.restart()
    for process in processes:
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    prompt = random_ids(6, seed=0)
    (sample,) = engine.generate([Request(0, prompt)])
    check_logprobs(model, prompt, sample)


def test_a_training_survives_an_engine_that_dies_and_saves_when_it_keeps_dying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each attempt starts a vLLM. The package gives the function the module's name.
    monkeypatch.setattr(sys.modules["deeprec.rollout.rollout"], "ENGINE_ATTEMPTS", 2)
    world = rl_world.make_world(hidden=64)
    world.warm_start(60)  # conversations that never end are not trained on
    sampling = SamplingConfig(max_turn_tokens=64, max_tokens=400)
    options = replace(OPTIONS, timeout=60.0)
    engine = VLLMEngine(world.policy, world.engine.tokenizer, sampling, options=options)
    killed = 0

    class Scored(rl_world.ToyRewards):
        steps = 0

        def score(self, trajectories: Sequence[Trajectory]) -> list[Rewards]:
            self.steps += 1
            return super().score(trajectories)

    rewards = Scored(lambda made: [float(len(made.response_ids))])
    step = engine.step

    def dying_step() -> list[Sample]:
        nonlocal killed
        if killed == 0 or rewards.steps == 1:  # once in the first step, always in the second
            signal_engine(engine, signal.SIGKILL)
            killed += 1
        return step()

    monkeypatch.setattr(engine, "step", dying_step)
    config = RLConfig(
        steps=3, prompts_per_step=2, samples_per_prompt=2, train_batch=None, out=str(tmp_path)
    )
    try:
        trainer = Trainer(world.policy, engine, world.env, rewards, config)
        with pytest.raises(EngineError, match="failed 2 times in one roll-out"):
            trainer.train(world.requests)
    finally:
        engine.close()
    assert killed >= 3 and rewards.steps == 1
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["logprob_difference"] < 1e-3
    saved = [path.name for path in (tmp_path / "checkpoints" / "rl").iterdir()]
    assert saved == ["step-00000001"]


def test_a_training_step(tmp_path: Path) -> None:
    """Temperature 0.7, conversations with the tool, constrained lists; then the next weights."""
    world = rl_world.make_world(hidden=64)
    world.warm_start(60)
    sampling = SamplingConfig(temperature=0.7, top_p=1.0, max_turn_tokens=64, max_tokens=400)
    engine = VLLMEngine(world.policy, world.engine.tokenizer, sampling, options=OPTIONS)
    try:
        config = RLConfig(steps=2, prompts_per_step=4, samples_per_prompt=2, train_batch=None)
        rewards = rl_world.ToyRewards(lambda made: [float(item % 3) for item in made.ranked])
        trainer = Trainer(world.policy, engine, world.env, rewards, config)
        for line in trainer.train(world.requests):
            assert line["updates"] == 1
            assert line["logprob_difference"] < 1e-3
            assert line["tool_calls"] > 0
    finally:
        engine.close()
