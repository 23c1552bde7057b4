"""The tool side of a conversation: prompts, answered preferences, and what a list may hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from deeprec.data import Catalog, Requests
from deeprec.ops import SeenItems
from deeprec.rollout.protocol import clean_preference, observation_text
from deeprec.trm import HistoryStates

if TYPE_CHECKING:
    from deeprec.trm import PreferenceAwareTRM
    from deeprec.trm.phrases import TextEncoder

__all__ = [
    "EnvironmentOptions",
    "Observation",
    "PreferenceOverride",
    "PromptBuilder",
    "RetrievalEnvironment",
    "ToolCall",
]

PreferenceOverride = Callable[[int, int, str], str | None]


class PromptBuilder(Protocol):
    """Writes the prompt of a request."""

    def build(self, requests: Requests, row: int) -> list[int]:
        """Token ids; the text ends with :data:`~deeprec.rollout.protocol.PROMPT_END`."""
        ...


@dataclass(frozen=True)
class EnvironmentOptions:
    """How conversations are conducted. The defaults are the paper's but for ``exclude_*``.

    exclude_history: never return what is in the user's history.
    exclude_retrieved: never return what an earlier turn of the conversation returned, so that
        every turn brings new items.
    show_categories: item lists show each title's categories on a line of their own.
    constrain_list: the final list may only hold titles retrieved in the conversation, each once.
    distinct_titles: what a preference calls "like …" is a title of the catalogue, each once. Needs
        a tokenizer with one token a title.
    stop_at_list: a conversation ends with its closed list; otherwise the policy has to end it.
    closing: appended by the tool to its last answer (that of call ``max_calls``). With
        ``max_calls=1`` and a closing that opens the final list, a policy gets a single turn.
    """

    exclude_history: bool = True
    exclude_retrieved: bool = True
    show_categories: bool = True
    constrain_list: bool = False
    distinct_titles: bool = False
    stop_at_list: bool = True
    closing: str = ""


@dataclass(frozen=True)
class ToolCall:
    """A preference to answer: of which request, at which turn (from 0), what came before."""

    row: int
    turn: int
    preference: str
    retrieved: Sequence[int] = ()


@dataclass(frozen=True)
class Observation:
    """The answer to a tool call: the text to append and its items, best first."""

    text: str
    items: list[int]


class RetrievalEnvironment:
    """Answers preferences with the items a preference-aware TRM finds.

    Args:
        trm, catalog, encoder: over the same items; the encoder the TRM was trained with.
        k: items a tool call returns.
        max_calls: tool calls a conversation gets.
        prompts: None writes prompts for a chat model with the engine's tokenizer.
        options: see :class:`EnvironmentOptions`.
        preference_override: ``(row, turn, preference)`` gives what the TRM is asked instead, None
            leaves it; the conversation keeps the policy's words. "" asks with no preference. For
            measuring what preferences are worth: emptied, or those of other users.
    """

    def __init__(
        self,
        trm: PreferenceAwareTRM,
        catalog: Catalog,
        encoder: TextEncoder,
        k: int = 20,
        max_calls: int = 8,
        *,
        prompts: PromptBuilder | None = None,
        options: EnvironmentOptions = EnvironmentOptions(),
        preference_override: PreferenceOverride | None = None,
    ) -> None:
        if k < 1 or max_calls < 1:
            raise ValueError(f"k and max_calls must be at least 1, got {k} and {max_calls}")
        self.trm, self.catalog, self.encoder = trm, catalog, encoder
        self.k, self.max_calls = k, max_calls
        self.prompts, self.options = prompts, options
        self.preference_override = preference_override
        self._histories = HistoryStates()
        self._lines = ("", *catalog.titles)
        if options.show_categories:
            self._lines = ("", *(catalog.text(item) for item in range(1, catalog.n_items + 1)))

    def observe(self, requests: Requests, calls: Sequence[ToolCall]) -> list[Observation]:
        """Answer all calls with one pass of the encoder and one of the TRM.

        The TRM encodes a history once: later turns and other samples of the same user cost the
        preference and the search.
        """
        if not calls:
            return []
        asked = requests[[call.row for call in calls]]
        device = next(self.trm.parameters()).device
        found = self.trm.retrieve(
            torch.from_numpy(asked.history).to(device),
            torch.from_numpy(asked.lengths).to(device),
            self._embed([self._question(call) for call in calls]).to(device),
            self.k,
            exclude=self._retrieved(calls),
            exclude_history=self.options.exclude_history,
            cache=self._histories,
        )
        return [
            self._observation(call, [item for item in items if item > 0])
            for call, items in zip(calls, found.indices.tolist(), strict=True)
        ]

    def _question(self, call: ToolCall) -> str:
        """What the TRM is asked."""
        preference = call.preference
        if self.preference_override is not None:
            replaced = self.preference_override(call.row, call.turn, preference)
            preference = preference if replaced is None else replaced
        return clean_preference(preference)

    def _embed(self, questions: Sequence[str]) -> torch.Tensor:
        """Preference vectors f32 [n, P]; zeros, which is no preference, for an empty one."""
        vectors = torch.zeros(len(questions), self.encoder.dim)
        asked = [row for row, question in enumerate(questions) if question]
        if asked:
            vectors[asked] = self.encoder.encode([questions[row] for row in asked], query=True)
        return vectors

    def _retrieved(self, calls: Sequence[ToolCall]) -> SeenItems | None:
        """What earlier turns have returned, if that may not be returned again."""
        if not self.options.exclude_retrieved:
            return None
        return SeenItems.from_lists([call.retrieved for call in calls])

    def _observation(self, call: ToolCall, items: list[int]) -> Observation:
        text = observation_text([self._lines[item] for item in items])
        if call.turn + 1 == self.max_calls:
            text += self.options.closing
        return Observation(text, items)
