"""deeprec's multi-turn conversations and rewards inside TRL's GRPOTrainer.

TRL 1.16 takes a function that generates: ``rollout_func(prompts, trainer)``. The one here is
:func:`deeprec.rollout.rollout`, so what the engine sampled is what TRL trains on, token for token,
and what the tool wrote is masked (TRL's ``env_mask``). The trainer's data set holds names of
requests; the prompts themselves are written by the environment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from deeprec.rollout import Trajectory, rollout
from deeprec.rollout.sampling import mix

if TYPE_CHECKING:
    from datasets import Dataset

    from deeprec.data import Requests
    from deeprec.rewards import RewardModel
    from deeprec.rollout import RetrievalEnvironment
    from deeprec.rollout.engine import Engine

__all__ = ["TRLRollout"]

REWARDS = ("format", "tool_calls", "diversity", "listwise", "pointwise")
NAME = "request "


class TRLRollout:
    """What GRPOTrainer needs to train a policy in a retrieval environment::

        task = TRLRollout(engine, env, requests, reward_model)
        GRPOTrainer(policy, task.reward_funcs, args, task.dataset(),
                    processing_class=tokenizer, rollout_func=task.rollout).train()

    ``engine`` generates with the very ``policy`` that is trained, at the temperature of ``args``.
    Rewards are those of ``reward_model``, one function (and one logged metric) a component; their
    sum is the total. A conversation that outgrew the engine's limit takes no part in the loss.

    Args:
        engine, env: as for :func:`deeprec.rollout.rollout`. The final list may not be constrained
            to retrieved titles: TRL's log-probs are over the whole vocabulary.
        requests: the users to train on.
        reward_model: anything with ``score(trajectories)``, a list of
            :class:`~deeprec.rewards.Rewards`.
        seed: of the conversations; a later step, and another process, draws differently.

    Raises:
        ValueError: the environment constrains lists.
    """

    def __init__(
        self,
        engine: Engine,
        env: RetrievalEnvironment,
        requests: Requests,
        reward_model: RewardModel,
        *,
        seed: int = 0,
    ) -> None:
        if env.options.constrain_list or env.options.distinct_titles:
            raise ValueError(
                "env constrains what is sampled, but TRL's log-probs are over the whole "
                "vocabulary; use EnvironmentOptions(constrain_list=False, distinct_titles=False), "
                "or deeprec.rl.Trainer"
            )
        self.engine, self.env, self.requests = engine, env, requests
        self.reward_model, self.seed = reward_model, seed
        self.reward_funcs: list[Callable[..., list[float]]] = [_component(n) for n in REWARDS]
        self._calls = 0

    def dataset(self) -> Dataset:
        """The data set for GRPOTrainer: one row a request, its name in the column ``prompt``."""
        from datasets import Dataset

        return Dataset.from_dict({"prompt": [f"{NAME}{n}" for n in range(len(self.requests))]})

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """One conversation for every entry of ``prompts``, which repeats a request per sample.

        Raises:
            ValueError: the trainer's temperature is not the engine's, a prompt is not of
                :meth:`dataset`, or leaves no room for an answer.
        """
        wanted, used = trainer.args.temperature, self.engine.sampling
        if used.takes_best or used.temperature != wanted:
            raise ValueError(
                f"the engine samples with {used}, but TRL scores at temperature {wanted}; "
                f"use SamplingConfig(temperature={wanted})"
            )
        rows = [self._row(prompt) for prompt in prompts]
        self.engine.sync_weights()
        process = getattr(trainer.accelerator, "process_index", 0)
        seed = int(mix(self.seed, self._calls, process)) & 0x7FFFFFFF
        self._calls += 1
        talks = self._talk(rows, seed)
        for talk, scored in zip(talks, self.reward_model.score(talks), strict=True):
            talk.rewards = scored
            if not talk.response_ids:
                raise ValueError(
                    f"the prompt of user {talk.user} ({len(talk.prompt_ids)} tokens) leaves no "
                    "room for an answer; raise SamplingConfig.max_tokens"
                )
        return {
            "prompt_ids": [talk.prompt_ids for talk in talks],
            "completion_ids": [talk.response_ids for talk in talks],
            "logprobs": [talk.logprobs for talk in talks],
            "env_mask": [_trained(talk) for talk in talks],
            "trajectory": talks,
        }

    def _row(self, prompt: str) -> int:
        name, number = prompt[: len(NAME)], prompt[len(NAME) :]
        if name != NAME or not number.isdecimal() or int(number) >= len(self.requests):
            raise ValueError(f"prompt {prompt!r} names no request; train on TRLRollout.dataset()")
        return int(number)

    def _talk(self, rows: Sequence[int], seed: int) -> list[Trajectory]:
        """Conversations of the rows, in their order; repeated rows draw differently."""
        counts = Counter(rows)
        made: dict[int, list[Trajectory]] = {}
        for samples in sorted(set(counts.values())):  # one, unless a batch cuts through a group
            alike = [row for row, count in counts.items() if count == samples]
            talks = rollout(self.engine, self.env, self.requests[alike], samples, seed)
            for position, row in enumerate(alike):
                made[row] = talks[position * samples : (position + 1) * samples]
        return [made[row].pop(0) for row in rows]


def _trained(talk: Trajectory) -> list[int]:
    return [0] * len(talk.policy_mask) if talk.finish == "too_long" else talk.policy_mask


def _component(name: str) -> Callable[..., list[float]]:
    """TRL calls it with what ``rollout`` returned and logs it under its name."""

    def reward(trajectory: list[Trajectory], **_: Any) -> list[float]:
        return [float(getattr(talk.rewards, name)) for talk in trajectory]

    reward.__name__ = name
    return reward
