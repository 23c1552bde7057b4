"""Conversations between a policy and the tool, many at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from deeprec.data import Requests
from deeprec.rollout.constraints import Constraint, DistinctTitles, ListLines
from deeprec.rollout.engine import Engine, EngineError
from deeprec.rollout.environment import Observation, RetrievalEnvironment, ToolCall
from deeprec.rollout.prompts import ChatPrompt
from deeprec.rollout.protocol import (
    LIST_CLOSE,
    PREFERENCE_CLOSE,
    clean_preference,
    read_final_list,
    read_preference,
)
from deeprec.rollout.sampling import mix
from deeprec.rollout.token_text import TokenText
from deeprec.rollout.types import Request, Sample, Trajectory, Turn
from deeprec.trm.phrases import LIKE_PREFIX

__all__ = ["ToolError", "rollout"]

logger = logging.getLogger(__name__)

TOOL_ATTEMPTS = 3  # a tool behind a network may fail once or twice; a broken one fails always
ENGINE_ATTEMPTS = 3  # the same of an engine, which is restarted in between
# Without any turn ending. The longest turn of the paper, 2,048 tokens, takes minutes where it is
# worth sampling at all.
STALL_SECONDS = 3600.0


class ToolError(RuntimeError):
    """The tool could not be reached; the roll-out is void, not a reward of 0."""


def rollout(
    engine: Engine,
    env: RetrievalEnvironment,
    requests: Requests,
    samples_per_user: int = 8,
    seed: int = 0,
) -> list[Trajectory]:
    """Let the policy talk to the tool, ``samples_per_user`` times for every request.

    Conversations run side by side at different turns; the preferences that were finished in the
    same step are answered together. Each conversation has its own random numbers, made from
    ``seed``, the user and the sample's number, so a trajectory does not depend on which others it
    ran with (up to rounding in the model). Order: request by request, sample by sample.

    An engine that stops answering is restarted and the conversations begin again, with the same
    random numbers; a conversation that it broke off never becomes a trajectory.

    Raises:
        EngineError: the engine failed :data:`ENGINE_ATTEMPTS` times, or could not be restarted.
        ToolError: the tool failed :data:`TOOL_ATTEMPTS` times with an OSError (connection,
            time-out). Any other exception of the tool is passed on at once.
    """
    if samples_per_user < 1:
        raise ValueError(f"samples_per_user must be at least 1, got {samples_per_user}")
    for attempt in range(1, ENGINE_ATTEMPTS + 1):
        talks = _Talks(engine, env, requests, samples_per_user, seed)
        try:
            trajectories = talks.run()
        except EngineError as error:
            failure = error
            logger.warning("roll-out %d of %d failed: %s", attempt, ENGINE_ATTEMPTS, error)
            engine.restart()
        except BaseException:
            talks.release()
            raise
        else:
            talks.release()
            return trajectories
    raise EngineError(
        f"the engine failed {ENGINE_ATTEMPTS} times in one roll-out, last with: {failure}; look at "
        "its log, then resume"
    ) from failure


@lru_cache(maxsize=4)
def _list_lines(text: TokenText, titles: tuple[str, ...]) -> ListLines:
    """Kept between roll-outs: encoding a catalogue takes longer than a small roll-out."""
    return ListLines(text, titles)


@lru_cache(maxsize=4)
def _title_tokens(text: TokenText, titles: tuple[str, ...]) -> tuple[int, ...]:
    """The token of every title, ascending; kept for the same reason."""
    encoded = text.encode(titles)
    for title, ids in zip(titles, encoded, strict=True):
        if len(ids) != 1:
            raise ValueError(
                f"distinct_titles needs a tokenizer with one token a title, but {title!r} takes "
                f"{len(ids)}; set distinct_titles=False in the environment's options"
            )
    return tuple(sorted(ids[0] for ids in encoded))


@dataclass
class _Talk:
    """One conversation under way; its name for the engine is its number."""

    row: int
    seed: int
    trajectory: Trajectory


class _Talks:
    """All conversations of one roll-out."""

    def __init__(
        self,
        engine: Engine,
        env: RetrievalEnvironment,
        requests: Requests,
        samples_per_user: int,
        seed: int,
    ) -> None:
        self.engine, self.env, self.requests = engine, env, requests
        self._lines = _list_lines(engine.text, env.catalog.titles)
        self._titles: tuple[int, ...] = ()
        if env.options.distinct_titles:
            self._titles = _title_tokens(engine.text, env.catalog.titles)
        self._stop = (
            (PREFERENCE_CLOSE, LIST_CLOSE) if env.options.stop_at_list else (PREFERENCE_CLOSE,)
        )
        prompts = env.prompts or ChatPrompt(engine.tokenizer, env.catalog)
        self._talks = []
        for row in range(len(requests)):
            prompt = prompts.build(requests, row)
            user = int(requests.users[row])
            for sample in range(samples_per_user):
                trajectory = Trajectory(
                    user=user,
                    target=int(requests.targets[row]),
                    history=requests.history[row, : requests.lengths[row]].tolist(),
                    prompt_ids=prompt,
                )
                self._talks.append(_Talk(row, int(mix(seed, user, sample)), trajectory))

    def run(self) -> list[Trajectory]:
        """Talk until every conversation has ended."""
        for number, talk in enumerate(self._talks):
            self._ask(number, talk.trajectory.prompt_ids)
        running = len(self._talks)
        heard = time.monotonic()
        while running:
            calls: dict[int, ToolCall] = {}
            samples = self.engine.step()
            if samples:
                heard = time.monotonic()
            elif time.monotonic() - heard > STALL_SECONDS:
                raise EngineError(f"no turn has ended for {STALL_SECONDS:g} s")
            for sample in samples:
                number = int(sample.conversation)  # type: ignore[call-overload]
                call = self._hear(number, sample)
                if call is None:
                    self.engine.release(number)
                    running -= 1
                else:
                    calls[number] = call
            self._answer(calls)
        return [talk.trajectory for talk in self._talks]

    def release(self) -> None:
        """Forget every conversation; needed when the roll-out was interrupted."""
        for number in range(len(self._talks)):
            self.engine.release(number)

    def _ask(self, number: int, tokens: list[int]) -> None:
        """Let the policy go on after ``tokens``."""
        talk = self._talks[number]
        constraints: list[Constraint] = []
        if self.env.options.constrain_list:
            found = [item for turn in talk.trajectory.turns for item in turn.retrieved]
            constraints.append(self._lines.over(found))
        if self.env.options.distinct_titles:
            constraints.append(DistinctTitles(LIKE_PREFIX, self._titles))
        self.engine.submit(
            Request(number, tokens, seed=talk.seed, stop=self._stop, constraints=tuple(constraints))
        )

    def _hear(self, number: int, sample: Sample) -> ToolCall | None:
        """Take note of what the policy wrote; the tool call it asks for, None at the end."""
        talk = self._talks[number]
        trajectory = talk.trajectory
        trajectory.append_sample(sample)
        if sample.stop != PREFERENCE_CLOSE:
            self._end(trajectory, sample.finish)
            return None
        preference = read_preference(self.engine.text.decode(sample.ids)) or ""
        turn = len(trajectory.turns)
        if not clean_preference(preference):
            self._end(trajectory, "empty_preference")
        elif turn >= self.env.max_calls:
            self._end(trajectory, "too_many_calls")
        else:
            retrieved = [item for turn in trajectory.turns for item in turn.retrieved]
            return ToolCall(talk.row, turn, preference, retrieved)
        return None

    def _answer(self, calls: dict[int, ToolCall]) -> None:
        """Have the tool answer, and let the policy go on."""
        observations = self._observe(list(calls.values()))
        texts = [observation.text for observation in observations]
        for (number, call), observation, ids in zip(
            calls.items(), observations, self.engine.text.encode(texts), strict=True
        ):
            trajectory = self._talks[number].trajectory
            trajectory.append_observation(ids)
            trajectory.turns.append(Turn(call.preference, observation.items))
            self._ask(number, ids)

    def _observe(self, calls: Sequence[ToolCall]) -> list[Observation]:
        for attempt in range(1, TOOL_ATTEMPTS + 1):
            try:
                return self.env.observe(self.requests, calls)
            except OSError as error:
                failure = error
                logger.warning("tool call %d of %d failed: %s", attempt, TOOL_ATTEMPTS, error)
        raise ToolError(
            f"the tool failed {TOOL_ATTEMPTS} times on {len(calls)} calls, last with: {failure}"
        ) from failure

    def _end(self, trajectory: Trajectory, reason: str) -> None:
        """Write down how the conversation ended, and its list."""
        ids = trajectory.response_ids
        text = self.engine.text.decode(ids)
        if reason == "eos":
            text = self.engine.text.decode(ids[:-1])
        trajectory.text = text
        lines = read_final_list(text)
        if lines is not None:
            trajectory.ranked = [self.env.catalog.find(line.title) for line in lines]
            trajectory.list_positions = self.engine.text.token_at(
                ids, [line.start for line in lines]
            )
        if reason == "length":
            trajectory.finish = "too_long"
        elif reason in ("eos", "stop"):
            trajectory.finish = "no_list" if lines is None else "done"
        else:
            trajectory.finish = reason
