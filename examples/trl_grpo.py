"""Train deeprec's policy with TRL: multi-turn conversations under GRPOTrainer.

Goes on from a run folder, whose recommender answers and whose warm-started policy asks:

    deeprec run --config configs/smoke.yaml --out runs/smoke
    python examples/trl_grpo.py --run runs/smoke --steps 4

What it leaves out: a second stage, evaluation, and settings that anyone would want to report.
The rewards are those of stage 1 (form, calls, diverse preferences).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func may change, says TRL

import torch
from trl import GRPOConfig, GRPOTrainer

import deeprec
from deeprec.data import load_dataset
from deeprec.integrations.trl_rollout import TRLRollout
from deeprec.policy.load import load_policy
from deeprec.policy.prompts import TitlePrompt, TitleTokens
from deeprec.rewards import RewardConfig, RewardModel
from deeprec.rollout import (
    EnvironmentOptions,
    RetrievalEnvironment,
    SamplingConfig,
    TransformersEngine,
)
from deeprec.text import EncoderConfig, load_encoder
from deeprec.trm import PhraseEncoder, PreferenceAwareTRM


def make_task(run: Path) -> tuple[TRLRollout, torch.nn.Module]:
    """The environment, engine and rewards of a run, for TRL."""
    dataset, encoder = load_dataset(), load_encoder(EncoderConfig())
    phrases = PhraseEncoder(encoder)
    trm = PreferenceAwareTRM.load(run / "trm" / "rl")
    policy, tokenizer = load_policy(run / "stages" / "initial")
    env = RetrievalEnvironment(
        trm,
        dataset.catalog,
        phrases,
        max_calls=4,
        prompts=TitlePrompt(TitleTokens(tokenizer, dataset.catalog)),
        options=EnvironmentOptions(show_categories=False),
    )
    texts = encoder.encode(dataset.catalog.encoder_texts())
    rewards = RewardModel(
        RewardConfig.default("cold"),
        titles=dataset.catalog.titles,
        text_vectors=torch.cat([torch.zeros(1, texts.shape[1]), texts]),
        item_vectors=trm.item_embedding.weight.detach(),
        encode=lambda texts: phrases.encode(texts, query=True),
    )
    sampling = SamplingConfig(top_p=1.0, max_turn_tokens=64, max_tokens=400)
    engine = TransformersEngine(policy, tokenizer, sampling)
    return TRLRollout(engine, env, dataset.requests("rl"), rewards), policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()

    task, policy = make_task(arguments.run)
    args = GRPOConfig(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=64,
        num_generations=8,
        learning_rate=1e-4,
        temperature=task.engine.sampling.temperature,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=task.reward_funcs,
        args=args,
        train_dataset=task.dataset(),
        processing_class=task.engine.tokenizer,
        rollout_func=task.rollout,
    )
    with deeprec.patch("trl") as patch:  # TRL's log-probs by deeprec's kernels
        trainer.train()
        print(patch.explain())
    for row in trainer.state.log_history:
        if "reward" in row:
            parts = {
                name: round(float(row[f"rewards/{name}/mean"]), 3)
                for name in ("format", "tool_calls", "diversity")
            }
            print(f"step {row['step']}: reward {row['reward']:.3f} {parts}")
    trainer.save_model(str(arguments.out))


if __name__ == "__main__":
    main()
