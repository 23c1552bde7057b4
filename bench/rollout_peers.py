"""How others generate several turns: every turn computes the whole context again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from deeprec.rollout import Request, SamplingConfig, TransformersEngine

__all__ = ["Talk", "reprefilling", "trl_trainer", "with_engine"]

TEMPERATURE, TOP_P = 1.0, 0.95


class Talk:
    """What is said: ``samples`` answers to one prompt, observations of fixed length between."""

    def __init__(self, prompt: list[int], observations: list[list[list[int]]], new: int) -> None:
        self.prompt, self.observations, self.new = prompt, observations, new
        self.samples, self.turns = len(observations), len(observations[0]) + 1

    def contexts(self) -> list[list[int]]:
        return [list(self.prompt) for _ in range(self.samples)]

    @property
    def sampled(self) -> int:
        """Tokens the policy writes."""
        return self.samples * self.turns * self.new


def with_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, talk: Talk) -> Any:
    """A callable for one roll-out with the library's engine, and the engine."""
    sampling = SamplingConfig(temperature=TEMPERATURE, top_p=TOP_P)
    engine = TransformersEngine(model, tokenizer, sampling)

    def run() -> list[list[int]]:
        written: list[list[int]] = [[] for _ in range(talk.samples)]
        for turn in range(talk.turns):
            requests = [
                Request(
                    sample,
                    talk.prompt if turn == 0 else talk.observations[sample][turn - 1],
                    seed=sample,
                    max_new_tokens=talk.new,
                )
                for sample in range(talk.samples)
            ]
            for sample in engine.generate(requests):
                written[sample.conversation] += sample.ids  # type: ignore[index]
        for sample in range(talk.samples):
            engine.release(sample)
        return written

    return run, engine


def reprefilling(
    generate: Callable[[list[list[int]]], list[list[int]]], talk: Talk
) -> Callable[[], list[list[int]]]:
    """A callable for one roll-out by ``generate(contexts) -> answers``, a call a turn."""

    def run() -> list[list[int]]:
        contexts = talk.contexts()
        written: list[list[int]] = [[] for _ in range(talk.samples)]
        for turn in range(talk.turns):
            for sample, ids in enumerate(generate(contexts)):
                written[sample] += ids
                contexts[sample] += ids
                if turn + 1 < talk.turns:
                    contexts[sample] += talk.observations[sample][turn]
        return written

    return run


def transformers_generate(
    model: PreTrainedModel, talk: Talk
) -> Callable[[list[list[int]]], list[list[int]]]:
    """``model.generate`` with its cache; contexts are equally long, so nothing is padded."""
    settings = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=talk.new,
        pad_token_id=0,
    )

    def generate(contexts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(contexts)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers

    return generate


def trl_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, talk: Talk, folder: str
) -> Callable[[list[list[int]]], list[list[int]]]:
    """A turn of TRL's GRPOTrainer on transformers."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=talk.samples,
        num_generations=talk.samples,
        max_completion_length=talk.new,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * talk.samples),
        processing_class=tokenizer,
    )
    trainer.generation_config.eos_token_id = None  # turns of the same length for everybody

    def generate(contexts: list[list[int]]) -> list[list[int]]:
        answers: list[list[int]] = trainer._generate_single_turn(contexts, None, {}, talk.samples)[
            0
        ]
        return [list(ids) for ids in answers]

    return generate
