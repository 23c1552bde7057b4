"""Micro-batches: what they hold, and that no layout changes a result."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from deeprec.rl.batching import TrainSequence, choice_mask, collate, micro_batches
from deeprec.rl.scorer import PolicyScorer

FORCED = (9,)
CHOICE = (5, 6, 7)


def sequence(make_trajectory: Callable, **fields: object) -> TrainSequence:
    made = make_trajectory(**fields)
    count = int(choice_mask(made).sum())
    return TrainSequence.from_trajectory(made, np.arange(count, dtype=np.float32))


def test_only_the_policys_choices_are_trained_on(make_trajectory: Callable) -> None:
    made = make_trajectory(
        response=6, mask=[1, 1, 0, 0, 1, 1], allowed=[None, None, None, None, FORCED, CHOICE]
    )
    assert choice_mask(made).tolist() == [True, True, False, False, False, True]
    batch = collate([sequence(make_trajectory, response=2)], packed=False)
    assert batch.rows.tolist() == [2, 3]  # the last prompt token predicts the first response token
    train = TrainSequence.from_trajectory(made, np.zeros(3, dtype=np.float32))
    assert train.positions.tolist() == [3, 4, 8]
    assert train.allowed == [None, None, CHOICE]


def test_rows_point_at_the_tokens_before(make_trajectory: Callable) -> None:
    sequences = [
        sequence(make_trajectory, prompt=p, response=r, mask=[1, 0] * (r // 2), seed=p)
        for p, r in [(2, 4), (5, 2), (1, 6)]
    ]
    for packed in (False, True):
        batch = collate(sequences, packed=packed)
        following = batch.input_ids.flatten()[batch.rows + 1]
        assert following.tolist() == batch.token_ids.tolist()
        assert batch.lengths == (2, 1, 3)


def test_padding_and_packing_give_the_same_logprobs(
    make_trajectory: Callable, tiny_policy: Callable
) -> None:
    scorer = PolicyScorer(tiny_policy(), temperature=0.7)
    sequences = [
        sequence(
            make_trajectory,
            prompt=p,
            response=5,
            mask=[1, 1, 0, 1, 1],
            allowed=[None, None, None, CHOICE, FORCED],
            seed=p,
        )
        for p in (1, 4, 9)
    ]
    alone = torch.cat([scorer(collate([s], packed=False))[0] for s in sequences])
    for packed in (False, True):
        logprobs, entropy = scorer(collate(sequences, packed=packed))
        torch.testing.assert_close(logprobs, alone, atol=1e-5, rtol=1e-5)
        assert entropy.shape == logprobs.shape


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_keep_to_the_budget(make_trajectory: Callable, packed: bool) -> None:
    sequences = [sequence(make_trajectory, prompt=1 + n % 7, response=2 + n % 3) for n in range(20)]
    groups = micro_batches(sequences, max_tokens=20, packed=packed)
    assert sorted(id(s) for group in groups for s in group) == sorted(map(id, sequences))
    for group in groups:
        lengths = [len(s) for s in group]
        assert (sum(lengths) if packed else max(lengths) * len(lengths)) <= 20


def test_a_sequence_beyond_the_budget_goes_alone(make_trajectory: Callable) -> None:
    sequences = [sequence(make_trajectory, prompt=n) for n in (3, 60, 3)]
    assert [len(g) for g in micro_batches(sequences, max_tokens=30, packed=False)] == [1, 2]


def test_broken_trajectories_are_refused(make_trajectory: Callable) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        sequence(make_trajectory, prompt=0)
    with pytest.raises(ValueError, match="5 entries in policy_mask"):
        choice_mask(make_trajectory(response=6, policy_mask=[1] * 5))
