"""Training a policy of your own in several processes.

    torchrun --nproc-per-node 2 examples/train_in_processes.py --out runs/trained
    torchrun --nproc-per-node 2 examples/train_in_processes.py --out runs/trained --fsdp

A catalogue of 60 films and a random policy: seconds on a CPU, and nothing to be learnt from it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from deeprec.data import Catalog, Requests
from deeprec.policy.prompts import TitlePrompt, TitleTokens
from deeprec.policy.tokenizer import build_title_tokenizer
from deeprec.rewards import RewardConfig, RewardModel
from deeprec.rl import OptimizerConfig, RLConfig, Trainer
from deeprec.rollout import (
    EnvironmentOptions,
    RetrievalEnvironment,
    SamplingConfig,
    TransformersEngine,
)
from deeprec.trm import PreferenceAwareTRM, TRMConfig

ITEMS, USERS, DIM, NOW = 60, 32, 16, 1_400_000_000


class LetterEncoder:
    """Counts letters: any sentence encoder with ``dim`` and ``encode`` will do."""

    dim = DIM

    def encode(self, texts: list[str], *, query: bool = False) -> torch.Tensor:
        counts = [[float(text.count(chr(97 + n))) for n in range(DIM)] for text in texts]
        return torch.tensor(counts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="folder that all processes share")
    parser.add_argument("--fsdp", action="store_true", help="shard the policy")
    options = parser.parse_args()
    torch.manual_seed(0)  # every process builds the same parts
    rng = np.random.default_rng(0)

    titles = tuple(f"Film {number}" for number in range(1, ITEMS + 1))
    catalog = Catalog(titles=titles, categories=((),) * ITEMS, keys=titles)
    taken = np.stack([rng.permutation(ITEMS)[:5] + 1 for _ in range(USERS)])
    requests = Requests(
        users=np.arange(USERS),
        history=taken[:, :4],
        lengths=np.full(USERS, 4),
        targets=taken[:, 4],
        timestamps=np.full(USERS, NOW),
        history_timestamps=np.full((USERS, 4), NOW),
    )
    tokenizer = build_title_tokenizer(catalog, NOW, NOW)
    policy = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    trm = PreferenceAwareTRM(TRMConfig(n_items=ITEMS, hidden=32, text_dim=DIM)).eval()
    env = RetrievalEnvironment(
        trm,
        catalog,
        LetterEncoder(),
        prompts=TitlePrompt(TitleTokens(tokenizer, catalog)),
        options=EnvironmentOptions(show_categories=False, constrain_list=True),
    )
    vectors = LetterEncoder().encode([title.lower() for title in titles])
    rewards = RewardModel(
        RewardConfig.default("cold"),
        titles=titles,
        text_vectors=torch.cat([torch.zeros(1, DIM), vectors]),
        item_vectors=trm.item_embedding.weight.detach(),
        encode=LetterEncoder().encode,
    )
    # A sharded policy cannot generate: the engine gets a copy, refreshed after every step.
    engine = TransformersEngine(
        policy,
        tokenizer,
        SamplingConfig(max_turn_tokens=32, max_tokens=200),
        copy_weights=options.fsdp,
    )
    config = RLConfig(
        steps=2,
        prompts_per_step=8,
        samples_per_prompt=4,
        train_batch=None,
        optimizer=OptimizerConfig(lr=1e-4),
        checkpoint_every=1,
        fsdp=options.fsdp,
        out=options.out,
    )
    Trainer(policy, engine, env, rewards, config).train(requests, resume=True)


if __name__ == "__main__":
    main()
