"""What a run is made of: data, encoder, recommenders, policy, environment, engine, rewards."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeprec.data import Dataset, Requests, load_dataset
from deeprec.pipeline.config import OPEN_LIST, RunConfig
from deeprec.pipeline.folder import RunFolder
from deeprec.policy.load import load_policy
from deeprec.policy.prompts import TitlePrompt, TitleTokens
from deeprec.policy.tokenizer import build_title_tokenizer
from deeprec.rewards import RewardConfig, RewardModel
from deeprec.rollout import (
    ChatPrompt,
    Engine,
    PreferenceOverride,
    PromptBuilder,
    RetrievalEnvironment,
    SamplingConfig,
    TransformersEngine,
    VLLMEngine,
)
from deeprec.text import SentenceEncoder, load_encoder
from deeprec.trm import PhraseEncoder, PreferenceAwareTRM

__all__ = ["Parts"]

# Conversations side by side: the cost of a decoding step is nearly flat up to here on two cores.
CONVERSATIONS = 512


class Parts:
    """The parts of a run, each built or loaded when first asked for."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self._trms: dict[str, PreferenceAwareTRM] = {}

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, filtered and split."""
        return load_dataset(self.config.data)

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """The sentence encoder of titles and phrases."""
        return load_encoder(self.config.encoder)

    @cached_property
    def preferences(self) -> PhraseEncoder:
        """Preference texts to vectors, phrase by phrase."""
        return PhraseEncoder(self.encoder)

    @property
    def from_scratch(self) -> bool:
        """Whether the policy is the small one built from the catalogue."""
        return self.config.policy.model is None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        if self.config.policy.model is not None:
            return load_policy(self.config.policy.model)[1]
        times = self.dataset.timestamps
        return build_title_tokenizer(self.dataset.catalog, int(times.min()), int(times.max()))

    @cached_property
    def title_prompts(self) -> TitlePrompt:
        """Prompts of the small policy."""
        return TitlePrompt(TitleTokens(self.tokenizer, self.dataset.catalog))

    @cached_property
    def prompts(self) -> PromptBuilder:
        """Prompts of the policy, whichever it is."""
        if self.from_scratch:
            return self.title_prompts
        return ChatPrompt(self.tokenizer, self.dataset.catalog)

    def trm(self, holdout: Literal["rl", "valid"]) -> PreferenceAwareTRM:
        """The trained recommender: ``rl`` answers in training, ``valid`` at evaluation."""
        if holdout not in self._trms:
            self._trms[holdout] = PreferenceAwareTRM.load(self.folder.trm / holdout)
        return self._trms[holdout]

    def base_model(self) -> PreTrainedModel:
        """The language model that the configuration names."""
        assert self.config.policy.model is not None
        return load_policy(self.config.policy.model)[0]

    def load_stage(self, name: str) -> PreTrainedModel:
        """The policy as it was after a stage, in evaluation mode."""
        return load_policy(str(self.folder.stage(name)))[0].eval()

    def environment(
        self,
        holdout: Literal["rl", "valid"],
        *,
        override: PreferenceOverride | None = None,
        single_turn: bool = False,
    ) -> RetrievalEnvironment:
        """The tool, answering with one of the recommenders.

        In a single turn it answers once, with as many items as all turns would bring, and opens
        the list.
        """
        section = self.config.environment
        k, max_calls, options = section.k, section.max_calls, section.options
        if single_turn:
            k, max_calls = k * max_calls, 1
            options = replace(options, closing=OPEN_LIST)
        return RetrievalEnvironment(
            self.trm(holdout),
            self.dataset.catalog,
            self.preferences,
            k=k,
            max_calls=max_calls,
            prompts=self.prompts,
            options=options,
            preference_override=override,
        )

    def engine(self, policy: PreTrainedModel, sampling: SamplingConfig) -> Engine:
        """Generates with ``policy``."""
        config = self.config.policy
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
        if config.engine == "vllm":
            return VLLMEngine(policy, self.tokenizer, sampling, dtype=dtype, options=config.vllm)
        return TransformersEngine(
            policy,
            self.tokenizer,
            sampling,
            dtype=dtype,
            copy_weights=self.config.rl.fsdp,
            max_conversations=CONVERSATIONS,
        )

    def reward_model(self, stage: Literal["cold", "rec"]) -> RewardModel:
        """The rewards of a stage; similarity to the target as the training recommender sees it."""
        section = self.config.rewards
        catalog = self.dataset.catalog
        texts = self.encoder.encode(catalog.encoder_texts())
        if section.preset == "paper":
            config = RewardConfig.paper(stage)
        else:
            config = RewardConfig.default(
                stage, listwise=section.listwise, pointwise_scale=section.pointwise_scale
            )
        return RewardModel(
            config,
            titles=catalog.titles,
            text_vectors=torch.cat([torch.zeros(1, texts.shape[1]), texts]),
            item_vectors=self.trm("rl").item_embedding.weight.detach(),
            encode=lambda texts: self.preferences.encode(texts, query=True),
        )

    @cached_property
    def training_requests(self) -> Requests:
        """The requests of reinforcement learning, before selection."""
        return self.dataset.requests("rl")


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a policy in Hugging Face format, with ``weights`` where it does not hold its own."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
