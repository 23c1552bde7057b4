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
every one of them from the tool's lists."""

# Said at the end of every question: small models have forgotten the task by then.
_REMINDER = (
    f"What may the user want next? Ask the tool between {PREFERENCE_OPEN} and {PREFERENCE_CLOSE}."
)


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
        # From both ends of the catalogue: what the examples hold does not matter, their form does.
        first, second = self._example(range(1, n + 1)), self._example(range(n, 0, -1))
        self._examples = [(f"{_TASK}\n\n{first[0]}", first[1]), second]

    def build(self, requests: Requests, row: int) -> list[int]:
        """Token ids of the prompt of one request, ending with ``Assistant:\\n<think>\\n``."""
        question = self._question(requests.history[row, : requests.lengths[row]].tolist())
        if self.show_date:
            moment = datetime.datetime.fromtimestamp(
                int(requests.timestamps[row]), tz=datetime.timezone.utc
            )
            question = f"Today is {moment:%Y-%m-%d}. {question}"
        if self.tokenizer.chat_template is None:
            shown = "".join(f"{asked}\n{answer}\n\n" for asked, answer in self._examples)
            return list(self.tokenizer(f"{shown}{question}\n{PROMPT_END}").input_ids)
        messages = []
        for asked, answer in self._examples:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": question})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        # The template writes its own beginning-of-text token.
        return list(self.tokenizer(f"{text}{PROMPT_END}", add_special_tokens=False).input_ids)

    def _question(self, history: list[int]) -> str:
        items = "".join(f"\n- {self.catalog.text(item)}" for item in history)
        return f"The user took, oldest first:{items}\n{_REMINDER}"

    def _example(self, items: range) -> tuple[str, str]:
        """A worked conversation: two items of history, one tool call, a list from its answer."""
        catalog = self.catalog
        history, found = list(items[:2]), list(items[2 : 2 + LIST_LENGTH + 2])
        wishes = [c for item in found[:2] for c in catalog.categories[item - 1]]
        preference = "; ".join(list(dict.fromkeys(wishes))[:3]) or "something new"
        titles = [catalog.titles[item - 1] for item in found]
        answer = (
            f"{PROMPT_END}What would fit after these?\n"
            f"{PREFERENCE_OPEN}{preference}{PREFERENCE_CLOSE}{observation_text(titles)}"
            f"These will do.\n{THINK_CLOSE}\n{final_list_text(titles[1 : 1 + LIST_LENGTH])}"
        )
        return self._question(history), answer
