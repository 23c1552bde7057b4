"""Multi-turn roll-outs: a policy that asks, a tool that answers, token in and token out."""

from deeprec.rollout.constraints import (
    Constraint,
    ConstraintState,
    DistinctTitles,
    ListConstraint,
    ListLines,
)
from deeprec.rollout.engine import Engine, EngineError
from deeprec.rollout.environment import (
    EnvironmentOptions,
    Observation,
    PreferenceOverride,
    PromptBuilder,
    RetrievalEnvironment,
    ToolCall,
)
from deeprec.rollout.prompts import ChatPrompt
from deeprec.rollout.rollout import ToolError, rollout
from deeprec.rollout.token_text import TokenText
from deeprec.rollout.transformers_engine import TransformersEngine
from deeprec.rollout.types import Request, Sample, SamplingConfig, Trajectory, Turn
from deeprec.rollout.vllm_engine import VLLMEngine, VLLMOptions

__all__ = [
    "ChatPrompt",
    "Constraint",
    "ConstraintState",
    "DistinctTitles",
    "Engine",
    "EngineError",
    "EnvironmentOptions",
    "ListConstraint",
    "ListLines",
    "Observation",
    "PreferenceOverride",
    "PromptBuilder",
    "Request",
    "RetrievalEnvironment",
    "Sample",
    "SamplingConfig",
    "TokenText",
    "ToolCall",
    "ToolError",
    "Trajectory",
    "TransformersEngine",
    "Turn",
    "VLLMEngine",
    "VLLMOptions",
    "rollout",
]
