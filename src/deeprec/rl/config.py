"""Settings of reinforcement learning; the defaults are the paper's (DeepRec, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = ["LoRAConfig", "LossConfig", "OptimizerConfig", "RLConfig", "StageConfig"]


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class LossConfig:
    """The policy loss.

    The ratio of new to old probability is clipped to ``[1 - clip_low, 1 + clip_high]``.
    ``aggregate="token"`` averages over all policy tokens of an update, ``"sequence"`` over each
    trajectory's tokens first. ``kl_estimator`` ``"k2"`` and ``"k3"`` are terms of the loss; the
    gradient of ``"k1"`` has mean zero, so it is charged to each token's advantage instead
    (Schulman, "Approximating KL divergence", 2020). ``importance_cap`` bounds the weight
    p_trainer / p_engine that corrects for the two computing different log-probs (truncated
    importance sampling, Yao et al. 2025); None leaves the difference uncorrected.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    aggregate: Literal["token", "sequence"] = "token"
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    importance_cap: float | None = 2.0

    def __post_init__(self) -> None:
        _require(0 < self.clip_low <= 1, "clip_low", "a number in (0, 1]", self.clip_low)
        _require(self.clip_high > 0, "clip_high", "a positive number", self.clip_high)
        _require(self.kl_coef >= 0, "kl_coef", "a number >= 0", self.kl_coef)
        cap = self.importance_cap
        _require(cap is None or cap >= 1, "importance_cap", "a number >= 1 or None", cap)


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with a constant learning rate (after ``warmup`` updates) and a clipped gradient."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", "a positive number", self.lr)
        _require(self.grad_clip > 0, "grad_clip", "a positive number", self.grad_clip)
        _require(self.warmup >= 0, "warmup", "a number of updates >= 0", self.warmup)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in place of training every weight (extra ``peft``)."""

    rank: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        _require(self.rank > 0, "rank", "a positive number", self.rank)


@dataclass(frozen=True)
class RLConfig:
    """One training: ``steps`` iterations of roll-out, reward, advantages and updates.

    An iteration samples ``prompts_per_step`` x ``samples_per_prompt`` trajectories and updates
    the policy once per ``train_batch`` of them (None: one update for all), ``epochs`` times over.
    ``tokens_per_batch`` bounds the padded tokens of one forward pass; gradients accumulate over
    as many as an update needs. ``credit="list_item"`` gives every turn and listed title its own
    return (:mod:`deeprec.rl.credit`), in which the gains of later titles count ``list_discount``
    times as much from one to the next. ``precision="bf16"`` runs the forward under autocast.
    ``fsdp`` spreads weights, gradients and optimizer state over the processes (FSDP2) in place of
    a replica in each. ``name`` says which lines of a shared ``metrics.jsonl`` and which
    checkpoints are this training's.
    """

    steps: int = 20
    prompts_per_step: int = 128
    samples_per_prompt: int = 8
    train_batch: int | None = 512
    epochs: int = 1
    advantage: str = "reinforce++_baseline"
    credit: Literal["sequence", "list_item"] = "sequence"
    list_discount: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tokens_per_batch: int = 16_384
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    fsdp: bool = False
    checkpoint_every: int = 10
    keep_checkpoints: int = 1
    seed: int = 0
    name: str = "rl"
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "epochs", "tokens_per_batch"):
            value = getattr(self, name)
            _require(value >= 1, name, "a number >= 1", value)
        _require(
            0 <= self.list_discount <= 1, "list_discount", "a number in [0, 1]", self.list_discount
        )
        for name in ("checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            _require(value >= 1, name, "a number >= 1", value)
        _require(
            self.samples_per_prompt >= 2,
            "samples_per_prompt",
            "at least 2, since the baseline is the mean of a prompt's other samples",
            self.samples_per_prompt,
        )
        _require(
            self.train_batch is None or self.train_batch >= 1,
            "train_batch",
            "a number of trajectories >= 1, or None for one update a step",
            self.train_batch,
        )
        _require(
            bool(self.name) and not set(self.name) & set("/\\"),
            "name",
            "a non-empty name without slashes",
            self.name,
        )


@dataclass(frozen=True)
class StageConfig:
    """What one stage of training changes in a shared :class:`RLConfig`.

    ``reward`` is the stage of the reward model: ``"cold"`` pays for the process alone (format,
    tool calls, diverse preferences), ``"rec"`` for the format and the recommendation.
    """

    name: str
    reward: Literal["cold", "rec"]
    steps: int
    prompts_per_step: int = 128
    samples_per_prompt: int = 8
    lr: float = 1e-6
    credit: Literal["sequence", "list_item"] = "sequence"

    @staticmethod
    def paper() -> list[StageConfig]:
        """The two stages of the paper: 20 iterations on the process, 80 on the outcome."""
        return [
            StageConfig("stage1", reward="cold", steps=20),
            StageConfig("stage2", reward="rec", steps=80),
        ]

    def apply(self, shared: RLConfig) -> RLConfig:
        """The configuration of this stage's :class:`~deeprec.rl.trainer.Trainer`."""
        return replace(
            shared,
            name=self.name,
            steps=self.steps,
            prompts_per_step=self.prompts_per_step,
            samples_per_prompt=self.samples_per_prompt,
            credit=self.credit,
            optimizer=replace(shared.optimizer, lr=self.lr),
        )
