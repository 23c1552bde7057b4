"""What goes in and out of an engine, and what a roll-out leaves behind."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deeprec.rewards import Rewards
    from deeprec.rollout.constraints import Constraint, ConstraintState

__all__ = ["Request", "Sample", "SamplingConfig", "Trajectory", "Turn"]

Allowed = tuple[int, ...] | None  # ids a token was restricted to; None: the whole vocabulary


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn, and how many at most. The defaults are the paper's training setting.

    Args:
        temperature: logits are divided by it; 0 means greedy.
        top_p: tokens are drawn from the smallest set of most likely ones with this mass. Reported
            log-probs are those before this cut.
        greedy: take the most likely token; log-probs are reported at temperature 1.
        max_turn_tokens: most tokens a policy may write before it must have ended its turn.
        max_tokens: most tokens of a conversation, prompt and observations included.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    greedy: bool = False
    max_turn_tokens: int = 2048
    max_tokens: int = 16384

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}; 1 switches it off")
        for name in ("max_turn_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def takes_best(self) -> bool:
        """Whether the most likely token is taken instead of a draw."""
        return self.greedy or self.temperature == 0

    @property
    def logprob_temperature(self) -> float:
        """The temperature log-probs are reported at, here and by the trainer."""
        return 1.0 if self.takes_best else self.temperature


@dataclass(frozen=True)
class Request:
    """Append tokens to a conversation, then let the policy write until it stops.

    Args:
        conversation: names the conversation; the first request with a new name opens it.
        tokens: ids to append first (the prompt, or an observation); may not be empty on opening.
        seed: of the conversation's random draws; the same seed gives the same tokens whatever
            else the engine is doing, up to rounding in the model.
        stop: strings that end the turn. The token that completes one is kept whole.
        max_new_tokens: None leaves the limit to :class:`SamplingConfig`.
        constraints: each restricts what follows its trigger.
    """

    conversation: Hashable
    tokens: list[int]
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    constraints: tuple[Constraint, ...] = ()

    @property
    def watched(self) -> tuple[str, ...]:
        """What may not pass unnoticed: strings that end the turn or open a constraint."""
        return (*self.stop, *(each.trigger for each in self.constraints))

    def opened(self, text: str, overrun: str = "") -> ConstraintState | None:
        """The state of the constraint whose trigger ends ``text``, if one does."""
        for constraint in self.constraints:
            if text.endswith(constraint.trigger):
                return constraint.open(overrun)
        return None


@dataclass(frozen=True)
class Sample:
    """What the policy wrote in answer to one request.

    ``logprobs`` are after temperature and constraints and before top-p; a token the constraint
    forced has 0.0. ``finish`` is "stop" (then ``stop`` is the string that ended it), "eos" or
    "length".
    """

    conversation: Hashable
    ids: list[int]
    logprobs: list[float]
    allowed: list[Allowed]
    finish: str
    stop: str | None = None


@dataclass
class Turn:
    """One answered tool call: the preference as the policy wrote it, and the items it brought."""

    preference: str
    retrieved: list[int]


@dataclass
class Trajectory:
    """One conversation, token for token as the policy saw and wrote it.

    Per response token: ``policy_mask`` 1 if the policy sampled it (stop strings included) and 0 if
    the tool appended it; ``logprobs`` of the engine, 0.0 at tool tokens; ``allowed`` the ids it was
    restricted to, None for the whole vocabulary.

    ``ranked`` holds the items of the final list (0: a line that is no known title), and
    ``list_positions`` the response index of each one's first title token. ``finish`` is "done",
    "no_list", "empty_preference", "too_many_calls" or "too_long". ``text`` is the decoded response.
    """

    user: int
    target: int
    history: list[int]
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    policy_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    allowed: list[Allowed] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    ranked: list[int] = field(default_factory=list)
    list_positions: list[int] = field(default_factory=list)
    finish: str = ""
    text: str = ""
    rewards: Rewards | None = None

    def append_sample(self, sample: Sample) -> None:
        """Append what the policy wrote: trained on."""
        self.response_ids += sample.ids
        self.policy_mask += [1] * len(sample.ids)
        self.logprobs += sample.logprobs
        self.allowed += sample.allowed

    def append_observation(self, ids: list[int]) -> None:
        """Append what the tool wrote: seen by the policy, never trained on."""
        self.response_ids += ids
        self.policy_mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.allowed += [None] * len(ids)
