"""What the tests of the policy share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from deeprec.data import Dataset
from deeprec.policy.model import TitlePolicyConfig, build_title_policy
from deeprec.policy.prompts import TitlePrompt
from deeprec.rollout import RetrievalEnvironment


class LetterEncoder:
    """Counts letters."""

    dim = 8

    def encode(self, texts: list[str], *, query: bool = False, **_: Any) -> Tensor:
        rows = [[float(text.count(letter)) for letter in "aeiostr2"] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows) + 0.1, dim=-1)


@dataclass
class World:
    """Everything pre-training and warm start need."""

    dataset: Dataset
    prompts: TitlePrompt
    env: RetrievalEnvironment

    def policy(self, seed: int = 0) -> Qwen2ForCausalLM:
        """A new policy of 30,000 parameters."""
        shape = TitlePolicyConfig(hidden_size=32, layers=1, heads=2, kv_heads=1)
        model = build_title_policy(shape, self.prompts.tokens.tokenizer, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)  # so narrow a model stays on a plateau for long otherwise
        return model
