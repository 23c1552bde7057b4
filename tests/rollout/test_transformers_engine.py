"""The engine: same log-probs as a trainer, nothing computed twice, independent conversations."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_token_text import tokenizer_of
from tiny_world import TITLES, make_model, reference_logprobs
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from deeprec.rollout import (
    DistinctTitles,
    ListLines,
    Request,
    Sample,
    SamplingConfig,
    TransformersEngine,
)
from deeprec.rollout.protocol import LIST_CLOSE, LIST_OPEN


def random_ids(n: int, seed: int, top: int = 150) -> list[int]:
    choices = random.Random(seed)
    return [choices.randrange(1, top) for _ in range(n)]


def prompts(n: int) -> list[list[int]]:
    return [random_ids(1 + 3 * i % 17, seed=i) for i in range(n)]


def check_logprobs(
    model: PreTrainedModel, context: list[int], sample: Sample, temperature: float = 1.0
) -> None:
    """The invariant: engine and trainer agree on what every token's log-prob was."""
    if sample.ids:
        expected = reference_logprobs(model, context, sample.ids, sample.allowed, temperature)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_the_trainers_over_three_turns(
    tiny_model: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    sampling = SamplingConfig(temperature=temperature, max_turn_tokens=9)
    engine = TransformersEngine(tiny_model, word_tokenizer, sampling)
    contexts = prompts(10)
    new = contexts
    for turn in range(3):
        requests = [Request(i, ids, seed=i, stop=("s",)) for i, ids in enumerate(new)]
        samples = engine.generate(requests)
        for context, sample in zip(contexts, samples, strict=True):
            assert 0 < len(sample.ids) <= 9
            check_logprobs(tiny_model, context, sample, temperature)
        new = [random_ids(turn + 2 * i, seed=99 + i) for i in range(10)]
        contexts = [c + s.ids + ids for c, s, ids in zip(contexts, samples, new, strict=True)]


@pytest.mark.parametrize("tokens", ["characters", "words"])
def test_logprobs_equal_the_trainers_under_the_list_constraint(
    tiny_model: PreTrainedModel,
    char_tokenizer: PreTrainedTokenizerFast,
    word_tokenizer: PreTrainedTokenizerFast,
    tokens: str,
) -> None:
    tokenizer = char_tokenizer if tokens == "characters" else word_tokenizer
    engine = TransformersEngine(tiny_model, tokenizer, SamplingConfig(max_turn_tokens=400))
    lines = ListLines(engine.text, TITLES)
    opening = tokenizer("User:" + LIST_OPEN, add_special_tokens=False).input_ids
    items = [[1, 2, 3], [*range(1, 15)], [], [16]]
    requests = [
        Request(i, opening, seed=i, stop=(LIST_CLOSE,), constraints=(lines.over(found),))
        for i, found in enumerate(items)
    ]
    for sample, found in zip(engine.generate(requests), items, strict=True):
        assert sample.finish == "stop" and sample.stop == LIST_CLOSE
        check_logprobs(tiny_model, opening, sample)
        assert all(allowed is not None for allowed in sample.allowed)
        forced = [
            lp
            for lp, ids in zip(sample.logprobs, sample.allowed, strict=True)
            if ids and len(ids) == 1
        ]
        assert forced and not any(forced)
        text = engine.text.decode(sample.ids)
        titles = [line.split(". ", 1)[1] for line in text.split("\n")[1:-1]]
        assert len(titles) == min(10, len(found))
        assert set(titles) <= {TITLES[item - 1] for item in found}


def test_forced_tokens_take_no_pass_of_their_own(
    tiny_model: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = TransformersEngine(tiny_model, word_tokenizer)
    lines = ListLines(engine.text, TITLES)
    opening = word_tokenizer(LIST_OPEN).input_ids
    constraint = lines.over(range(1, 15))
    engine.submit(Request(0, opening, stop=(LIST_CLOSE,), constraints=(constraint,)))
    steps = 0
    done: list[Sample] = []
    while not done:
        done = engine.step()
        steps += 1
    assert steps == 10  # one a title; numbers, line breaks and the closing come for nothing
    assert len(done[0].ids) == 22


def test_the_constraint_begins_when_the_policy_writes_its_trigger(
    word_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_model()
    engine = TransformersEngine(model, word_tokenizer, SamplingConfig(max_turn_tokens=200))
    constraint = ListLines(engine.text, TITLES).over([4, 6])
    opened = word_tokenizer.convert_tokens_to_ids(LIST_OPEN)
    seen = 0
    for seed in range(10):
        request = Request(seed, [5, 6], seed=seed, stop=(LIST_CLOSE,), constraints=(constraint,))
        (sample,) = engine.generate([request])
        check_logprobs(model, [5, 6], sample)
        if opened in sample.ids:
            seen += 1
            start = sample.ids.index(opened) + 1
            assert not any(sample.allowed[:start]) and all(sample.allowed[start:])
            text = engine.text.decode(sample.ids[start:])
            assert text in {
                f"\n1. {a}\n2. {b}\n{LIST_CLOSE}" for a, b in (("Heat", "Big"), ("Big", "Heat"))
            }
        engine.release(seed)
    assert seen > 2


def test_titles_named_in_a_turn_are_distinct(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    engine = TransformersEngine(model, word_tokenizer, SamplingConfig(max_turn_tokens=400))
    like, *titles = word_tokenizer.convert_tokens_to_ids(["like ", "Heat", "Big"])
    most = 0
    for seed in range(10):
        constraint = DistinctTitles("like ", tuple(sorted(titles)))
        (sample,) = engine.generate([Request(seed, [5, 6], seed=seed, constraints=(constraint,))])
        check_logprobs(model, [5, 6], sample)
        left = set(titles)
        for n, (before, token) in enumerate(pairwise([6, *sample.ids])):
            named = before == like and len(left) > 0
            assert sample.allowed[n] == (tuple(sorted(left)) if named else None)
            if named:
                left.remove(token)
        most = max(most, sample.ids.count(like))
        engine.release(seed)
    assert most > len(titles)  # in the end there is nothing left to name


def test_a_conversation_does_not_depend_on_its_company(
    tiny_model: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    def sample_of(engine: TransformersEngine, wanted: list[int]) -> list[list[int]]:
        found = {}
        for i, ids in enumerate(prompts(12)):
            if i in wanted:
                engine.submit(Request(i, ids, seed=i, stop=("s",)))
        while len(found) < len(wanted):
            found.update({s.conversation: s.ids for s in engine.step()})
        return [found[i] for i in (3, 8)]

    sampling = SamplingConfig(max_turn_tokens=25)
    everyone = TransformersEngine(tiny_model, word_tokenizer, sampling)
    few = TransformersEngine(tiny_model, word_tokenizer, sampling, max_step_tokens=5)
    assert sample_of(everyone, [*range(12)]) == sample_of(few, [8, 3])


def test_different_seeds_write_different_things(word_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(make_model(), word_tokenizer, SamplingConfig(max_turn_tokens=12))
    samples = engine.generate([Request(seed, [1, 2, 3], seed=seed) for seed in range(8)])
    assert len({tuple(sample.ids) for sample in samples}) == 8


def test_no_token_is_computed_twice(word_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(make_model(), word_tokenizer, SamplingConfig(max_turn_tokens=7))
    total = 0
    for turn in range(3):
        asked = [random_ids(11 + i, seed=i + 10 * turn) for i in range(5)]
        samples = engine.generate([Request(i, ids) for i, ids in enumerate(asked)])
        total += sum(map(len, asked)) + sum(len(sample.ids) for sample in samples)
        # The last token of each conversation waits for the next turn.
        assert engine.forwarded_tokens == total - 5


def test_a_shared_prompt_is_computed_once(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    engine = TransformersEngine(model, word_tokenizer, SamplingConfig(max_turn_tokens=4))
    common = random_ids(50, seed=0)
    asked = [common, common, common, [*common, 7, 8], [*common[:30], 9], random_ids(20, seed=1)]
    samples = engine.generate([Request(i, ids, seed=i) for i, ids in enumerate(asked)])
    for ids, sample in zip(asked, samples, strict=True):
        check_logprobs(model, ids, sample)
    written = sum(len(sample.ids) - 1 for sample in samples)
    assert engine.forwarded_tokens - written == 50 + 1 + 1 + 2 + 1 + 20


def test_long_prompts_take_several_passes(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    engine = TransformersEngine(
        model, word_tokenizer, SamplingConfig(max_turn_tokens=5), max_step_tokens=16
    )
    asked = [random_ids(70, seed=0), random_ids(3, seed=1), random_ids(40, seed=2)]
    before = engine.forwarded_tokens
    for sample, ids in zip(
        engine.generate([Request(i, ids) for i, ids in enumerate(asked)]), asked, strict=True
    ):
        check_logprobs(model, ids, sample)
    assert engine.forwarded_tokens - before == 70 + 3 + 40 + 3 * 4


def test_more_conversations_than_slots_take_turns(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    engine = TransformersEngine(
        model, word_tokenizer, SamplingConfig(max_turn_tokens=6), max_conversations=3
    )
    asked = prompts(8)
    for i, ids in enumerate(asked):
        engine.submit(Request(i, ids, seed=i))
    found: dict[Any, Sample] = {}
    while len(found) < 8:
        for sample in engine.step():
            found[sample.conversation] = sample
            engine.release(sample.conversation)
    for i, ids in enumerate(asked):
        check_logprobs(model, ids, found[i])


def test_slots_that_nobody_gives_back_are_an_error(word_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(
        make_model(), word_tokenizer, SamplingConfig(max_turn_tokens=2), max_conversations=2
    )
    with pytest.raises(RuntimeError, match="max_conversations"):
        engine.generate([Request(i, [1, 2]) for i in range(3)])


@pytest.mark.parametrize("last", [">", ">tail"])
def test_a_stop_string_may_span_tokens_and_its_last_one_is_kept_whole(last: str) -> None:
    tokenizer = tokenizer_of(["<", "end", last, "a"])
    model = make_model(vocab_size=4)
    engine = TransformersEngine(model, tokenizer, SamplingConfig(max_turn_tokens=3000, top_p=1))
    (sample,) = engine.generate([Request(0, [3], stop=("never", "<end>"))])
    assert (sample.finish, sample.stop) == ("stop", "<end>")
    assert sample.ids[-3:] == [0, 1, 2]
    assert "<end>" not in engine.text.decode(sample.ids[:-1])


def test_end_of_text_ends_the_turn(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    engine = TransformersEngine(model, word_tokenizer, SamplingConfig(max_turn_tokens=3000))
    (sample,) = engine.generate([Request(0, [4, 5], seed=1)])
    assert sample.finish == "eos"
    assert sample.ids[-1] == word_tokenizer.eos_token_id
    assert word_tokenizer.eos_token_id not in sample.ids[:-1]


@pytest.mark.parametrize(
    ("sampling", "request_limit", "expected"),
    [
        (SamplingConfig(max_turn_tokens=6), None, 6),
        (SamplingConfig(max_turn_tokens=6), 3, 3),
        (SamplingConfig(max_turn_tokens=6), 30, 6),
        (SamplingConfig(max_turn_tokens=6, max_tokens=9), None, 4),
        (SamplingConfig(max_turn_tokens=6, max_tokens=5), None, 0),
    ],
)
def test_a_policy_that_never_stops_is_stopped(
    word_tokenizer: PreTrainedTokenizerFast,
    sampling: SamplingConfig,
    request_limit: int | None,
    expected: int,
) -> None:
    engine = TransformersEngine(make_model(), word_tokenizer, sampling)
    request = Request(0, random_ids(5, seed=3), seed=5, max_new_tokens=request_limit)
    (sample,) = engine.generate([request])
    assert (sample.finish, len(sample.ids)) == ("length", expected)


def test_an_observation_that_leaves_no_room_ends_the_turn(
    word_tokenizer: PreTrainedTokenizerFast,
) -> None:
    sampling = SamplingConfig(max_turn_tokens=4, max_tokens=20)
    engine = TransformersEngine(make_model(), word_tokenizer, sampling)
    engine.generate([Request(0, [1, 2, 3])])
    (sample,) = engine.generate([Request(0, random_ids(30, seed=0))])
    assert (sample.finish, sample.ids) == ("length", [])


def test_positions_the_model_does_not_know_are_a_limit(
    word_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_model()
    model.config.max_position_embeddings = 12
    assert TransformersEngine(model, word_tokenizer).max_tokens == 12


def test_greedy_is_the_best_token_each_time(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    engine = TransformersEngine(
        model, word_tokenizer, SamplingConfig(greedy=True, max_turn_tokens=8)
    )
    prompt = random_ids(6, seed=0)
    (sample,) = engine.generate([Request(0, prompt)])
    context = list(prompt)
    for token in sample.ids:
        with torch.no_grad():
            assert model(torch.tensor([context])).logits[0, -1].argmax() == token
        context.append(token)
    check_logprobs(model, prompt, sample)


def test_a_copy_in_another_dtype_follows_the_model(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    sampling = SamplingConfig(max_turn_tokens=8, temperature=2.0)
    engine = TransformersEngine(model, word_tokenizer, sampling, dtype=torch.bfloat16)
    prompt = random_ids(6, seed=0)
    (first,) = engine.generate([Request(0, prompt)])
    # bf16 keeps 8 bits: close to the fp32 model, and exactly what the bf16 model says.
    expected = reference_logprobs(engine.model, prompt, first.ids, first.allowed, 2.0)
    torch.testing.assert_close(torch.tensor(first.logprobs), expected, atol=0.05, rtol=0)
    with pytest.raises(RuntimeError, match="release"):
        engine.sync_weights()
    engine.release(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine.sync_weights()
    assert torch.equal(engine.model.lm_head.weight, model.lm_head.weight.bfloat16())


def test_the_model_is_left_as_it_was(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model().train()
    attention = model.config._attn_implementation
    engine = TransformersEngine(model, word_tokenizer, SamplingConfig(max_turn_tokens=3))
    engine.generate([Request(0, [1, 2, 3])])
    assert model.training and model.config._attn_implementation == attention
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_sliding_windows_are_refused(word_tokenizer: PreTrainedTokenizerFast) -> None:
    config = MistralConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=8,
    )
    with pytest.raises(ValueError, match="sliding"):
        TransformersEngine(MistralForCausalLM(config), word_tokenizer)


def test_misuse_is_named(word_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(make_model(), word_tokenizer)
    with pytest.raises(ValueError, match="no tokens"):
        engine.submit(Request("a", []))
    engine.submit(Request("b", [1]))
    with pytest.raises(ValueError, match="still writing"):
        engine.submit(Request("b", [2]))
    engine.step()
    with pytest.raises(ValueError, match="still writing"):
        engine.submit(Request("b", [2]))
    engine.release("unknown")
    with pytest.raises(ValueError, match="max_conversations"):
        TransformersEngine(make_model(), word_tokenizer, max_conversations=0)
