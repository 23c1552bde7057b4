"""Prompts for chat models: the task, two worked conversations, the user's history."""

from __future__ import annotations

import datetime

from transformers import PreTrainedTokenizerBase

from deeprec.data import Catalog, Requests
from deeprec.rollout.protocol import (
    LIST_LENGTH,
    PREFERENCE_CLOSE,
    PREFERENCE_OPEN,
    PROMPT_END,
    THINK_CLOSE,
    final_list_text,
    observation_text,
)

__all__ = ["ChatPrompt"]

_TASK = f"""You recommend the next item to a user. A search tool knows the catalogue.
Think briefly, then ask the tool: write what the user may want now, as short phrases joined by ;, \
between {PREFERENCE_OPEN} and {PREFERENCE_CLOSE}. The tool answers with a numbered list. Ask again \
from another side if that helps. When you have seen enough, close your thoughts with \
{THINK_CLOSE} and write the {LIST_LENGTH} titles you recommend, best first, one a numbered line, \
every one of them from the tool's lists.
Follow the form of these examples exactly."""


class ChatPrompt:
    """Prompts for a chat model, or in plain text for a model that has no chat template.

    Two short worked conversations over titles of the catalogue show the form: small models do not
    follow it from a description alone.

    Args:
        tokenizer: of the policy.
        catalog: titles and categories.
        show_date: tell the policy the date of the request.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, catalog: Catalog, *, show_date: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.catalog = catalog
        self.show_date = show_date
        n = catalog.n_items
        # Two stretches of the catalogue, apart from each other: what they hold does not matter.
        self._instructions = "\n\n".join(
            [_TASK, self._example(range(1, n + 1)), self._example(range(n, 0, -1))]
        )

    def build(self, requests: Requests, row: int) -> list[int]:
        """Token ids of the prompt of one request, ending with ``Assistant:\\n<think>\\n``."""
        history = requests.history[row, : requests.lengths[row]].tolist()
        question = self._question(history)
        if self.show_date:
            moment = datetime.datetime.fromtimestamp(
                int(requests.timestamps[row]), tz=datetime.timezone.utc
            )
            question += f"\nToday is {moment:%Y-%m-%d}."
        text = self._instructions + "\n\nNow the user to answer.\n" + question
        if self.tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": text}]
            opening = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            # The template writes its own beginning-of-text token.
            ids = self.tokenizer(f"{opening}{PROMPT_END}", add_special_tokens=False).input_ids
            return list(ids)
        return list(self.tokenizer(f"{text}\n\n{PROMPT_END}").input_ids)

    def _question(self, history: list[int]) -> str:
        return "The user took, oldest first:" + "".join(
            f"\n- {self.catalog.text(item)}" for item in history
        )

    def _example(self, items: range) -> str:
        """A worked conversation: two items of history, one question, a list of the answer."""
        catalog = self.catalog
        history, found = list(items[:2]), list(items[2 : 2 + LIST_LENGTH + 2])
        wishes = [c for item in found[:2] for c in catalog.categories[item - 1]] or [
            "something new"
        ]
        preference = "; ".join(list(dict.fromkeys(wishes))[:3])
        return (
            f"Example.\n{self._question(history)}\n{PROMPT_END}"
            f"What would fit after these?\n{PREFERENCE_OPEN}{preference}{PREFERENCE_CLOSE}"
            f"{observation_text([catalog.titles[item - 1] for item in found])}"
            f"These will do.\n{THINK_CLOSE}\n"
            f"{final_list_text([catalog.titles[item - 1] for item in found[1 : 1 + LIST_LENGTH]])}"
        )
