"""Prompts for chat models."""

from __future__ import annotations

import pytest
from tiny_world import make_requests
from transformers import PreTrainedTokenizerFast

from deeprec.data import Catalog
from deeprec.rollout import ChatPrompt
from deeprec.rollout.protocol import PROMPT_END, read_final_list, read_preference

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[reply]{% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_prompt_with_or_without_a_chat_template(
    catalog: Catalog, char_tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=char_tokenizer.backend_tokenizer, eos_token="<eos>"
    )
    tokenizer.chat_template = template
    requests = make_requests(3)
    text = tokenizer.decode(ChatPrompt(tokenizer, catalog).build(requests, 1))
    assert text.endswith(PROMPT_END)
    assert text.startswith("[user]") == (template is not None)
    if template is not None:
        assert text.endswith("[reply]" + PROMPT_END)
    history = "".join(f"\n- {catalog.text(i)}" for i in requests.history[1, : requests.lengths[1]])
    assert text.rpartition("The user took")[2].startswith(", oldest first:" + history)
    assert "Today is 2014-05-13." in text


def test_examples_follow_the_protocol_they_show(
    catalog: Catalog, char_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = ChatPrompt(char_tokenizer, catalog, show_date=False).build(make_requests(1), 0)
    examples = char_tokenizer.decode(prompt).split(PROMPT_END)[1:]
    assert len(examples) == 3 and examples.pop() == ""
    for example in examples:
        assert read_preference(example)
        lines = read_final_list(example)
        assert lines is not None and len(lines) == 10
        assert all(catalog.find(line.title) for line in lines)
        shown = example.partition("<|end_of_item_list|>")[0]
        assert all(line.title in shown for line in lines)
