"""What a roll-out asks of whatever generates text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from deeprec.rollout.token_text import TokenText
from deeprec.rollout.types import Request, Sample, SamplingConfig

__all__ = ["Engine", "EngineError"]


class EngineError(RuntimeError):
    """An engine stopped answering. Its conversations are void, not worth a reward of 0."""


class Engine(Protocol):
    """Ids in, ids and log-probs out; conversations keep their state between requests.

    ``sampling`` may be replaced between steps.
    """

    tokenizer: PreTrainedTokenizerBase
    text: TokenText
    sampling: SamplingConfig

    def submit(self, request: Request) -> None:
        """Queue a request; it starts as soon as there is room."""
        ...

    def step(self) -> list[Sample]:
        """Advance every running conversation; returns the turns that ended.

        Raises EngineError instead of waiting for ever.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """Answer all requests, in their order."""
        ...

    def release(self, conversation: Hashable) -> None:
        """Forget a conversation and free what it holds."""
        ...

    def restart(self) -> None:
        """Forget all conversations and be ready for new ones, also after an EngineError."""
        ...

    def sleep(self) -> None:
        """Free the memory of the conversations' state while the policy is trained."""
        ...

    def sync_weights(self) -> None:
        """Take over the policy's current weights; wakes an engine that sleeps."""
        ...

    def close(self) -> None:
        """Give back everything; the engine cannot be used afterwards."""
        ...
