"""One configuration for a whole run: the same names in code, YAML and on the command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from deeprec.data import DataConfig
from deeprec.policy.model import TitlePolicyConfig
from deeprec.policy.pretrain import PretrainConfig
from deeprec.policy.tokenizer import RANK
from deeprec.policy.warmstart import WarmStartConfig
from deeprec.rewards.config import ListwiseReward
from deeprec.rl.config import LossConfig, RLConfig, StageConfig
from deeprec.rollout import protocol
from deeprec.rollout.environment import EnvironmentOptions
from deeprec.rollout.types import SamplingConfig
from deeprec.rollout.vllm_engine import VLLMOptions
from deeprec.text import EncoderConfig
from deeprec.trm import TRMTrainConfig

__all__ = ["EnvironmentConfig", "EvalConfig", "PolicyConfig", "RewardSection", "RunConfig", "plain"]

# What an environment appends to its last answer, to open the final list itself.
OPEN_LIST = f"{RANK}\n{protocol.THINK_CLOSE}\n{protocol.LIST_OPEN}"


@dataclass
class PolicyConfig:
    """The language model.

    Args:
        model: None builds the small title-token policy from scratch; a Hugging Face name or path,
            or ``smollm2`` for the packaged SmolLM2-135M-Instruct, takes that model as it is.
        title: shape of the policy built from scratch.
        pretrain: its next-item pre-training.
        warm_start: its supervised warm start.
        dtype: of the copy that generates; the trained weights stay in fp32.
        engine: what generates; ``vllm`` for large models (see :class:`deeprec.rollout.VLLMEngine`).
        vllm: its options.
    """

    model: str | None = None
    title: TitlePolicyConfig = field(default_factory=TitlePolicyConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    dtype: Literal["fp32", "bf16"] = "fp32"
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm: VLLMOptions = field(default_factory=VLLMOptions)


@dataclass
class EnvironmentConfig:
    """The tool. The paper's setting is 20 items a call and 8 calls, with categories shown.

    Args:
        k: items a call returns. With 5 the preferences decide what is found, with 10 three calls
            find most of what ranks well whatever is asked (docs/RESULTS.md).
        max_calls: calls a conversation may make. The answer to the last one opens the list, so
            that nobody asks in vain.
        options: see :class:`deeprec.rollout.EnvironmentOptions`.
    """

    k: int = 5
    max_calls: int = 3
    options: EnvironmentOptions = field(
        default_factory=lambda: EnvironmentOptions(
            show_categories=False, constrain_list=True, distinct_titles=True, closing=OPEN_LIST
        )
    )


@dataclass
class RewardSection:
    """What a run may change of the rewards (see :class:`deeprec.rewards.RewardConfig`).

    ``preset="paper"`` computes them exactly as the authors' code does, whatever the others say.
    """

    preset: Literal["default", "paper"] = "default"
    listwise: ListwiseReward = "ndcg"
    pointwise_scale: float = 1.0


@dataclass
class EvalConfig:
    """Evaluation on the test items.

    Args:
        users: size of the fixed sample on which the policies are compared; all users where there
            are no more. Effects of 0.005 NDCG@10 are lost in the noise of 1,500 users.
        all_users: whether the TRM and the final policy are evaluated on all users as well, where
            there are more.
        exclude_history: items of the history are never recommended.
        ablations: evaluate the final policy with its preferences emptied, those of other users in
            their place, and a single turn.
        conversations: how many of each policy are written to ``trajectories.jsonl``.
    """

    users: int = 5000
    all_users: bool = True
    exclude_history: bool = True
    ablations: bool = True
    conversations: int = 20


def _stages() -> list[StageConfig]:
    """The two stages at the size of a laptop."""
    # Credit by list item in both: with one reward for all tokens, stage 1 blurred the order of
    # the list, which it does not pay for (NDCG@10 -0.013).
    shared: dict[str, Any] = {
        "prompts_per_step": 32,
        "samples_per_prompt": 8,
        "credit": "list_item",
    }
    return [
        StageConfig("stage1", reward="cold", steps=8, lr=1e-4, **shared),
        StageConfig("stage2", reward="rec", steps=30, lr=5e-5, **shared),
    ]


@dataclass
class RunConfig:
    """A whole run: data, recommender, policy, the stages of reinforcement learning, evaluation.

    The defaults are what ``deeprec run`` does on the embedded data in minutes on two cores;
    ``configs/paper.yaml`` has the paper's.

    Args:
        name: of the run; its folder is ``runs/NAME`` unless ``out`` says otherwise.
        out: run folder.
        seed: of everything random.
        threads: torch threads; None leaves torch's default.
        max_rank: train on users whose target is among the TRM's first so many.
        stages: of reinforcement learning, in order; each has users of its own.

    Raises ValueError where ``distinct_titles`` meets a policy that was not built from scratch.
    """

    name: str = "default"
    out: str | None = None
    seed: int = 0
    threads: int | None = None
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    trm: TRMTrainConfig = field(default_factory=TRMTrainConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(max_turn_tokens=64, max_tokens=400)
    )
    rewards: RewardSection = field(default_factory=RewardSection)
    rl: RLConfig = field(
        # The divergence from each stage's start holds what its rewards do not pay for: without it
        # ten steps of stage 1 cost the lists 0.011 to 0.033 NDCG@10 on validation, with it 0.002.
        default_factory=lambda: RLConfig(
            train_batch=128, precision="bf16", list_discount=0.0, loss=LossConfig(kl_coef=0.5)
        )
    )
    max_rank: int = 100
    stages: list[StageConfig] = field(default_factory=_stages)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.policy.model is not None and self.environment.options.distinct_titles:
            raise ValueError(
                f"policy.model is {self.policy.model!r}, whose tokenizer takes several tokens a "
                "title; set environment.options.distinct_titles to false"
            )


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as what YAML writes: dictionaries, lists and numbers."""
    return json.loads(json.dumps(asdict(config)))  # tuples become lists
